"""Token slices: one sequence fills a pipeline, if its slices follow each other. TeraPipe."""

# %% [markdown]
# # 08 Token slices: a pipeline inside one sequence
#
# A pipeline of $K$ stages needs many micro-batches, and each is at least one sequence. With long
# sequences and many replicas there may be one only. But a token of a causal model sees no later
# token: a stage can begin with the first tokens of a sequence while the stage before it still works
# on the rest. TeraPipe (2102.07988) cuts sequences into *slices* and lets them follow each other.
#
# We take a stage that needs $t(l, c)$ for a slice of $l$ tokens after $c$ others; the matmuls of
# 1000 tokens take 1. Three things make it up: matmuls, $24 l D^2$ operations in GPT's layer;
# attention to all keys so far, $4 l (c + l/2) D$; and what a thin slice wastes: a GPU takes as
# long for few tokens as for 128 (here), and 100 tokens' time goes into kernel starts and messages.
#
# **Predict first.** One sequence of 4096 tokens, 4 stages. Whole, in 4 equal slices, in the best
# slices: are the best ones equal?

# %%
import start  # finds picotron_lab, shows figures in the page

from itertools import accumulate

from picotron_lab.analysis import plots, program_plots
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate
from picotron_lab.schedules.slicing import best_slices, latency

T, D, K = 4096, 1024, 4

def seconds(l, c):
    return (100 + max(l, 128) * (1 + (c + l / 2) / (6 * D))) / 1000

def run(slices, name="terapipe", sequences=1):
    contexts = accumulate((0, *slices[:-1]))
    times = tuple(map(seconds, slices, contexts))
    schedule = build(name, K, sequences, Options(slices=len(slices)))
    return simulate(schedule, Costs(F=1 / 3, B=1 / 3, W=1 / 3, slices=times))

best, _ = best_slices(T, K, seconds, granularity=32)
ways = {"whole": (T,), "4 equal slices": (T // 4,) * 4, f"{len(best)} best slices": best}
plots.compare([(name, run(slices)) for name, slices in ways.items()])

# %% [markdown]
# A cell 0/3 is slice 3 of sequence 0. Backward goes the other way round: the keys of a slice are
# used by all later slices, so its gradient is complete only after theirs.
#
# ## The formula
#
# Slices go through stages that take the same time $t_i$ for slice $i$. The last stage has seen all
# of them after
#
# $$T(l_1 \ldots l_n) = \sum_i t_i + (K-1) \max_i t_i$$
#
# (section 3.2: the sum is one stage's work, and the longest slice sets the pace of filling and
# draining). If backward takes twice as long as forward for each slice, the same formula holds for
# both together. Beside the simulated makespan:

# %%
for name, slices in ways.items():
    said, seen = latency(slices, K, seconds), run(slices).makespan
    print(f"{name:15} formula {said:6.2f}   simulated {seen:6.2f}")

# %% [markdown]
# The third way differs from "equal" in two things: there are more slices, and they are not equal.
#
# ## Where to cut
#
# Later slices attend to more keys. To take equally long, they must be shorter. With more stages the
# maximum counts $K - 1$ times, so slices become thinner, until they would waste more than they win.
#
# **Predict:** what happens for one stage only?

# %%
rows = {f"{k} stage{'s'[: k - 1]}": best_slices(T, k, seconds, 32)[0] for k in (1, 2, 4, 8, 16)}
program_plots.cuts(rows)

# %% [markdown]
# One stage has nobody to keep busy: it runs the sequence whole. From 2 to 8 stages the first slices
# are the longest. Near 128 tokens it ends: thinner slices take no less time.
#
# How much is there to win, and how much do *unequal* slices win over equal ones?

# %%
counts, depths = (1, 2, 4, 8, 16, 32, 64), (2, 4, 16)
equal = {
    f"{k} stages": [(n, latency((T // n,) * n, k, seconds)) for n in counts] for k in depths
}
plans = {k: best_slices(T, k, seconds, 32) for k in depths}
program_plots.latency(equal, {f"{k} stages": (len(plans[k][0]), plans[k][1]) for k in depths})

# %%
for k in depths:
    n, least = min(equal[f"{k} stages"], key=lambda pair: pair[1])
    many, best_of_all = len(plans[k][0]), plans[k][1]
    print(f"{k:2} stages: best of equal slices {n:2}, latency {least:6.2f}; best of all {many:2}, "
          f"{best_of_all:6.2f}: {least / best_of_all:.2f} times faster")

# %% [markdown]
# Most of the gain is in the *number* of slices; that they are unequal adds some percent. The paper
# measured the same: GPT-3 175B on 96 stages took 9.990 s with one slice, 1.547 s with 16 equal
# ones, 1.481 s with planned ones.
#
# ## Why the search needs a bound
#
# The sum alone is a shortest path over places to cut: $S(i) = \min_k S(i-k) + t(k, i-k)$. But its
# answer is the fastest way through *one* stage, which is the whole sequence. TeraPipe's dynamic
# program (section 3.3) fixes a bound $t_{max}$ first and allows only slices within it; then it
# tries the bounds:
#
# $$T^* = \min_{t_{max}} \; S(L; t_{max}) + (K-1)\, t_{max}$$

# %%
from picotron_lab.schedules.slicing import Paths

paths = Paths(T, 32, seconds, lambda l, c: 0.0)
for most in (5.6, 2, 0.9, 0.55, 0.4):
    plan = paths.plan(1, (most, 0.0))
    ((_, slices),) = plan.groups
    total = plan.work + (K - 1) * plan.peaks[0]
    print(f"no slice above {most:4g}: {len(slices):2} slices, sum {plan.work:5.2f} + 3 times "
          f"{plan.peaks[0]:4.2f} = {total:5.2f}")

# %% [markdown]
# ## Measured times, not assumed ones
#
# `--token-slices auto` measures a layer on the machine where it will run: a few lengths after a few
# contexts. The rest follows from the paper's fit (section 3.3),
# $t(l, c) = t(l, 0) + a_0 + a_1 l + a_2 c + a_3 l c$. Here is this machine, with a small layer. Its
# times are those of one process on a CPU, and noisy if other programs run beside it: look at
# shapes, not at values.

# %%
import torch

from picotron_lab import token_times
from picotron_lab.config import ModelConfig

cpu = torch.device("cpu")
layer = ModelConfig(vocab_size=64, hidden_size=64, layers=1, heads=4, kv_heads=4, ffn_size=128)
prepare = token_times.of_layer(layer, 1, "plain", torch.float32, cpu)
points = token_times.measure(prepare, 512, cpu, runs=15)
found = token_times.fit(points)
print(f"the fit's largest error at a measured point: {found.worst:.0%}")
program_plots.slice_times(points, found)

# %% [markdown]
# ## Nothing changes: slices by hand
#
# A slice's queries need keys and values of all slices before it. Each stage has computed these
# itself, so it keeps them (`Held` in the source), and nothing new is sent. `cut` makes slices of a
# batch; they share one object in which layers keep what later slices need.
#
# Run forward from the first slice to the last, and backward from the last to the first. Then every
# gradient is that of the whole sequence, to the last bits of float64. In the other order keys would
# get incomplete gradients, silently; the library refuses.

# %%
from picotron_lab import sharding, token_pipeline
from picotron_lab.dropout import Where
from picotron_lab.model import Llama, initial_value
from picotron_lab.token_slices import cut

tokens_BT = torch.arange(48).view(2, 24) % 32
batch = tokens_BT, tokens_BT, Where.first(tokens_BT)

def gradients(lengths, order=reversed):
    with torch.device("meta"):
        model = Llama(token_pipeline.DEMO)
    sharding.attach(model)
    token_pipeline.parallelize(model, "plain")
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    losses = [model(*part) for part in cut(batch, lengths)]
    for loss in order(losses):
        loss.backward()
    return [p.grad for p in model.parameters()]

whole = gradients([24])
for lengths in ([12, 12], [10, 8, 6], [1, 22, 1]):
    apart = max((a - b).abs().max() for a, b in zip(gradients(lengths), whole, strict=True))
    print(f"slices {lengths}: largest difference of any gradient {apart:.0e}")
try:
    gradients([12, 12], order=list)
except AssertionError as error:
    print("in the other order:", error)

# %% [markdown]
# ## Memory: slices inside 1F1B
#
# TeraPipe runs all forwards before all backwards, so it holds the activations of the whole batch;
# slices alone save no memory. Seq1F1B (2406.03488) runs 1F1B over slices: the pipeline fills $n$
# times faster, and rank $r$ holds $(p - r - 1 + n)/n$ micro-batches instead of $p - r$.

# %%
plots.draw(run((1024,) * 4, "seq1f1b", sequences=2))

# %%
shown = {"1f1b, whole": ("1f1b", (T,)), "terapipe, 4": ("terapipe", (1024,) * 4),
         "seq1f1b, 4": ("seq1f1b", (1024,) * 4), "seq1f1b, 8": ("seq1f1b", (512,) * 8)}
program_plots.peaks_by_rank({
    name: run(slices, schedule, sequences=6) for name, (schedule, slices) in shown.items()
})

# %% [markdown]
# ## The contract
#
# Two stages on two threads, a whole sequence and three slices: keys and values that a layer keeps,
# most bytes of their gradients, messages and bytes between the stages (as many bytes as without
# slices, in more messages), pairs of a query and a key that were computed (as many as without).

# %%
token_pipeline.main()  # prints the contract
