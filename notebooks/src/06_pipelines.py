"""Pipelines: schedules from AFAB to DualPipe, their bubbles, their memory, and a step that runs."""

# %% [markdown]
# # 06 Pipelines: who works when
#
# A model of $L$ layers is cut into $p$ stages of consecutive layers, one for each rank. Between
# stages only an activation $[B, T, D]$ travels forward, and its gradient back. But a stage can
# start only when the one before has finished: with one batch, $p - 1$ of $p$ ranks would wait. So
# the batch is cut into $m$ *micro-batches*, and several are under way at once.
#
# A **schedule** says which rank does what, in which order. Here it is data: a list of actions for
# each rank. `F2.3` is the forward of stage 2 on micro-batch 3, `BW2.3` its backward.
#
# **Predict first.** 4 ranks, 8 micro-batches; all forwards, then all backwards (AFAB, the schedule
# of GPipe, 1811.06965). Forward takes 1 unit of time, backward 2. How long does the step take, and
# what part of it does a rank wait?

# %%
import start  # finds picotron_lab, shows figures in the page

from picotron_lab.analysis import plots, program_plots, speed_plots
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate

P, M = 4, 8

def step(name, v=1, **options):
    """One simulated step; a stage takes 1/v of a rank's time, where a rank has v stages."""
    schedule = build(name, P, M, Options(**options))
    return simulate(schedule, Costs(F=1 / v, B=1 / v, W=1 / v))

plots.draw(step("afab"))

# %% [markdown]
# Every rank works $m(t_F + t_{BW}) = 8 \cdot 3 = 24$ units. The first forward needs $p - 1$ hops to
# reach the last rank, the first backward as many to come back: each rank waits
# $(p-1)(t_F + t_{BW}) = 9$ units, the *bubble*. Two ratios are in use, and papers rarely say which:
#
# $$\frac{\text{bubble}}{\text{work}} = \frac{p-1}{m} \qquad
#   \frac{\text{bubble}}{\text{makespan}} = \frac{p-1}{m+p-1}$$
#
# Below the rows you see what each rank holds: a forward leaves activations until its backward. AFAB
# holds those of all $m$ micro-batches.
#
# ## 1F1B: the same bubble, less memory
#
# 1F1B (Megatron-LM, 2104.04473, section 2.2) does a backward as soon as there is one: rank $r$ runs
# $p - 1 - r$ forwards, then forward and backward in turn.
#
# **Predict:** is it faster than AFAB?

# %%
plots.compare([(name, step(name)) for name in ("afab", "1f1b")])

# %% [markdown]
# It is not: a hop takes as long as before. What changes is how much is under way. The schedule is
# so short a rule that its source says it best (`alternate` gives so many forwards, then both in
# turn, then what is left):

# %%
import inspect

from picotron_lab.schedules import basic

print(inspect.getsource(basic._one_stage))
for rank, items in enumerate(build("1f1b", P, M).lists):
    print(f"rank {rank}:", " ".join(map(str, items)))

# %% [markdown]
# ## Memory, rank by rank
#
# **Predict:** what is the most that rank $r$ of 1F1B holds? Do more micro-batches make it more?

# %%
shown = {"afab": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2, "v-half": 2}
program_plots.peaks_by_rank({name: step(name, v) for name, v in shown.items()})

# %% [markdown]
# 1F1B: $\min(m, p - r)$, which no longer grows with $m$. So 1F1B allows more micro-batches in the
# same memory, and *these* make the bubble's share small. (The other panels belong to what follows.)
#
# ## Interleaved: more stages than ranks
#
# If a rank holds $v$ thinner stages (rank 0 of 4: stages 0 and 4), a hop takes $1/v$ of the time,
# and so does the bubble: $(p-1)(t_F + t_{BW})/v$. The price: $v$ times as many messages, and rank 0
# holds $1 + \frac{p-1}{pv}$ times as much as in 1F1B.

# %%
several = [("1f1b", step("1f1b"))]
several += [(f"interleaved, v = {v}", step("interleaved", v, virtual_stages=v)) for v in (2, 4)]
plots.compare(several)

# %% [markdown]
# How much is that in larger steps? Over $m$, for two lengths of pipeline (two of the lines are of
# schedules that come next):

# %%
speed_plots.bubbles(
    (4, 8), (2, 4, 8), [("afab", 0), ("1f1b", 0), ("interleaved", 2), ("zb-h1", 0), ("zb-v", 0)]
)

# %% [markdown]
# ## Zero Bubble: backward in two parts
#
# Backward computes two things: the gradient of the *input*, for which the stage before waits (`B`),
# and the gradient of the *weights*, for which nobody waits (`W`). Zero Bubble (2401.10241, section
# 2) splits them and puts `W` where a rank would wait. ZB-H1 keeps 1F1B's memory, its bubble is
# $(p-1)(t_F + t_B - t_W)$. ZB-H2 starts with more forwards.
#
# **Predict:** ZB-H2 promises a bubble of zero. Which of the two bubbles that a picture's title
# names (of the makespan, per stage) will be zero?

# %%
plots.draw(step("zb-h2"))

# %% [markdown]
# Per stage: no rank waits between its own first and last action. Seen from the clock on the wall
# the step is a parallelogram, and its slanted sides cost $(p-1) t_F$ each step, unless the next
# step begins while others end. That needs an optimizer that does not wait for all stages
# (`picotron_lab/post_validation.py`), and ZB-H2 holds $2p - 1$ micro-batches.
#
# ## V-shaped: rank 0 has both ends
#
# Fold the pipeline: rank $r$ holds stages $r$ and $2p - 1 - r$. A micro-batch comes back to rank 0
# for its last stage, and its backward begins there. ZB-V has no bubble per stage in 1F1B's memory.
# V-Half and V-Min (2405.15362) accept some bubble, and in long pipelines hold about a half and a
# third.

# %%
plots.compare([(name, step(name, 2)) for name in ("zb-v", "v-half", "v-min")])

# %% [markdown]
# ## DualPipe: two directions
#
# DualPipe (DeepSeek-V3) feeds micro-batches from both ends; every stage lives twice, on ranks $s$
# and $p - 1 - s$. A cell that is cut in two is a forward and a backward that run *as one*, each
# hiding the other's communication. DualPipe-V does the same in a V, with one copy of the weights.

# %%
plots.draw(step("dualpipe"))

# %% [markdown]
# ## All of them: bubble against memory
#
# Nothing is free: down and to the left is better, and every schedule on that edge pays with
# something that this picture does not show (messages, copies of weights, two parts of backward).

# %%
stages = {"eager-1f1b": 1, "zb-h2": 1, "v-min": 2, "dualpipe": 1, "dualpipe-v": 2}
program_plots.tradeoff({name: step(name, v) for name, v in (shown | stages).items()})

# %% [markdown]
# ## A pipeline by hand
#
# Now with numbers. Three ranks, a $D \times D$ weight each, AFAB in a dozen lines: receive,
# multiply, send; then the same backwards. `recv` is given a tensor of the shape that will come.
# Ranks are threads of this process, so all of their results come back in one list.
#
# **Predict:** how do the three gradients compare with those of one device that runs three layers on
# all rows at once?

# %%
import torch

from picotron_lab.lab import run_ranks

x_mBD = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

def stage(axis):
    w_DD = (torch.eye(3, dtype=torch.float64) * (axis.rank + 1)).requires_grad_()
    first, last, kept = axis.rank == 0, axis.rank == axis.size - 1, []
    for x_BD in x_mBD:  # F
        x_BD = x_BD.clone() if first else axis.recv(x_BD, axis.rank - 1)
        y_BD = torch.tanh(x_BD.requires_grad_() @ w_DD)
        kept.append((x_BD, y_BD))
        if not last:
            axis.send(y_BD, axis.rank + 1)
    for x_BD, y_BD in kept:  # BW: the loss is the sum of the last stage's outputs
        y_BD.backward(torch.ones_like(y_BD) if last else axis.recv(y_BD, axis.rank + 1))
        if not first:
            axis.send(x_BD.grad, axis.rank - 1)
    return w_DD.grad

# %%
weights = [(torch.eye(3, dtype=torch.float64) * n).requires_grad_() for n in (1, 2, 3)]
y_ND = x_mBD.flatten(0, 1)
for w_DD in weights:
    y_ND = torch.tanh(y_ND @ w_DD)
y_ND.sum().backward()
for rank, (grad, w_DD) in enumerate(zip(run_ranks(stage, 3), weights, strict=True)):
    print(f"rank {rank}: gradient\n{grad.numpy().round(4)}")
    print(f"        apart from one device: {(grad - w_DD.grad).abs().max():.0e}\n")

# %% [markdown]
# ## The contract
#
# The library does not write such loops: one executor walks any schedule's list, and what must be
# sent follows from it. Below it trains a small Llama on four threads with a virtual clock, and what
# the schedule predicted stands beside what was seen: messages, bytes of rank 0 in the activations'
# dtype, activations held, time in units of F (a model of a clock, not a measurement).

# %%
from picotron_lab import pipeline_parallel

pipeline_parallel.main()  # prints the contract
