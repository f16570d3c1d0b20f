"""MPMD: a loss function is recorded, cut into tasks, and becomes a program for each actor."""

# %% [markdown]
# # 09 Programs: one controller, many actors
#
# In the pages before, every rank ran the *same* program and asked "which rank am I?" (SPMD). JaxPP
# (2412.14374) does it the other way round: a controller gives each *actor* a program of its own
# (MPMD). Nobody writes these programs. The user marks where stages end, and gives an ordinary loss
# function and a schedule. All the rest is inferred: which operators belong to which stage, what
# must be sent to whom and when, when a buffer is free.
#
# **Predict first.** Below, three layers on three actors, 1F1B, 3 micro-batches. Nobody has said
# what to send. How many messages will there be?

# %%
import start  # finds picotron_lab, shows figures in the page

import torch

from picotron_lab.analysis import program_plots
from picotron_lab.mpmd import Controller, accumulate_grads, pipeline_yield

def loss_fn(params, x):
    x = pipeline_yield(torch.relu(x @ params["a"]))  # here stage 0 ends
    x = pipeline_yield(torch.relu(x @ params["b"]))  # here stage 1 ends
    return (x @ params["c"]).square().sum()

generator = torch.Generator().manual_seed(0)
params = {name: torch.randn(16, 16, generator=generator) for name in "abc"}
batches = [torch.randn(8, 16, generator=generator) for _ in range(3)]

def compiled(schedule, loss_fn=loss_fn, params=params, batches=batches, actors=3):
    """(program, loss, gradients, what each actor reports) of one step."""
    with Controller(actors) as controller:
        step = accumulate_grads(loss_fn, schedule)
        remote = controller.compile(step, params, batches)
        return remote.program, *remote(batches), remote.reports()

program, loss, grads, reports = compiled("1f1b")
program_plots.instructions(program)

# %% [markdown]
# `relu.1` is what stage 0 makes of micro-batch 1, `mm_6.1` the gradient that comes back. On a chain
# of $p$ stages that is $2m(p - 1)$ messages: 12.
#
# ## Step 1: record
#
# The loss function and its backward run once, on tensors that have a shape and no memory. What
# comes out is a flat list of operators. `pipeline_yield` leaves a marker in it, and another one
# where its gradient comes back; here they are already taken out.

# %%
from picotron_lab.mpmd_trace import trace

body = trace(loss_fn, params, batches[0])
for node in body.located.record.module.graph.nodes:
    if node.op == "call_function":
        where = f"{body.located.phase[node]:10} {body.located.segment[node]}"
        print(f"{where:12} {node.name:20} = {node.target.__name__}{node.args}")

# %% [markdown]
# ## Step 2: cut into tasks
#
# A forward operator lies behind the last marker that it depends on, a backward operator where the
# gradients that it needs have come back to. Views such as a transpose lie nowhere: each task makes
# them again, which is cheaper than sending. That gives two tasks for each stage.
#
# **Predict:** which values does the backward of stage 1 read, and who made them?

# %%
program_plots.tasks(body)

# %% [markdown]
# Arrows are values. `BW1` reads `relu` (for the gradient of `b`) and `relu_1` (where was the ReLU
# open?): both are on its actor already, one was received for `F1`, one made by it. Only `mm_4`
# must come. A task is an ordinary function without knowledge of pipelines:

# %%
print(body.tasks["BW", 1].run.code)

# %% [markdown]
# Zero-bubble schedules split backward: `B` is what other stages wait for, `W` all the rest. The cut
# is found in the same graph: an operator belongs to `B` if a value depends on it that another stage
# reads. Stage 0 has an empty `B`: nobody waits for it.

# %%
program_plots.tasks(body, ("F", "B", "W"))

# %% [markdown]
# ## Step 3: place, order, infer transfers
#
# The schedule says which actor runs which task, in which order. A simulation puts all tasks into
# *one* order. A value that another actor reads is sent once, after its task has ended. Then each
# actor's program is what the order has for it:

# %%
for actor, items in enumerate(program.lists):
    print(f"actor {actor}: ", end="")
    for item in items[:14]:
        kind, value = type(item).__name__, getattr(item, "value", "")
        print(item if kind == "Run" else f"{kind}({value or len(item.values)})", end=" ")
    print("...")

# %% [markdown]
# Why one order for all? Two actors meet in the same sequence in both of their lists, because both
# come from one. So they cannot wait in a circle, even if each send waits for its receive: of all
# instructions that are not done, the first of the order can always be done.
#
# `Free(3)` gives three values back. Where? Behind the last use in the actor's list, which is known
# since the whole program is.
#
# ## Lifetimes
#
# A longer step, of 5 micro-batches. **Predict:** at which moment does actor 1 hold most?

# %%
five = [torch.randn(8, 16, generator=generator) for _ in range(5)]
longer, *_, reports = compiled("1f1b", batches=five)
program_plots.lifetimes(longer, 1)

# %% [markdown]
# Bars that overlap are held at the same time; the curve below adds their bytes. In backward the
# received gradient, the two new ones and what forward left meet. Another schedule is another list,
# and so other lifetimes: with AFAB everything waits for backward.

# %%
afab, *_, afab_reports = compiled("afab", batches=five)
program_plots.lifetimes(afab, 1)

# %% [markdown]
# The peak is a property of the list, so it can be predicted before anything runs. Beside what the
# actors saw:

# %%
for name, of, seen in (("1f1b", longer, reports), ("afab", afab, afab_reports)):
    for actor, (said, report) in enumerate(zip(of.peak, seen, strict=True)):
        print(f"{name}, actor {actor}: predicted {said.values:2} values, {said.bytes:5,} bytes; "
              f"measured {report.peak.values:2} values, {report.peak.bytes:5,} bytes")

# %% [markdown]
# ## The same numbers
#
# A step can also be called here, on this device: then it is a plain loop. The actors' gradients are
# not close to it but equal, bit for bit, as long as each stage ends its micro-batches in order.

# %%
here_loss, here = accumulate_grads(loss_fn)(params, batches)
print("loss equal:", torch.equal(loss, here_loss))
print("gradients equal:", {name: torch.equal(grads[name], here[name]) for name in params})

# %% [markdown]
# ## A weight in two stages
#
# Let the first and the last stage share `a` (as a tied embedding does). Each micro-batch gives two
# parts of its gradient, on two actors. To add them at once would take a message per micro-batch.
#
# **Predict:** how many messages does sharing add, for 3 micro-batches? For 300?

# %%
def tied(params, x):
    x = pipeline_yield(torch.relu(x @ params["a"]))
    x = pipeline_yield(torch.relu(x @ params["b"]))
    return (x @ params["a"].t()).square().sum()

shared, *_ = compiled("1f1b", tied, {name: params[name] for name in "ab"})
print(f"without sharing {program.transfers} messages, with it {shared.transfers}")
for actor, item in shared.order[-5:]:
    if hasattr(item, "value"):
        print(f"actor {actor}: {type(item).__name__:5} {item.value}")

# %% [markdown]
# One: sums commute. Each actor adds up its own part over all micro-batches, and the parts meet
# once, after the last (JaxPP calls it loop commuting). After an update the new weight travels
# once, too.
#
# ## The contract
#
# Messages and bytes follow from the schedule's chain, $2m$ for each boundary between actors. How
# often must the controller speak? *plain*: once for each instruction. *fused*: once for each block,
# which is as many instructions as an actor can run without waiting for another: at most actors +
# messages.

# %%
from picotron_lab import mpmd

mpmd.main()  # prints the contract
