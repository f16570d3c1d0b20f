"""Data parallelism on a virtual clock: naive, overlapped, bucketed, silent."""

# %% [markdown]
# # 02 Data parallelism: when do gradients travel?
#
# Every rank has the whole model and a share of the batch. The loss is a sum over tokens, so its
# gradient is a sum over ranks: one all-reduce per weight, and every rank holds the gradient of one
# device (Li et al. 2020, "PyTorch Distributed", sections 3.2 and 3.3). *What* is sent is settled.
# The art is *when*, and in how many messages. Four answers, in the order in which they were found:
#
# | step | sends |
# |---|---|
# | naive | after the last backward, one weight after the other, waiting for each |
# | overlapped | each gradient as soon as backward has made it, in every micro-batch |
# | bucketed | the same in flat buffers of several gradients |
# | silent | micro-batches add up in the buffers; only the last backward sends |
#
# Threads on a laptop cannot show what overlap saves. So each rank has a **virtual clock**:
# computing advances it by a number we choose, sending takes bytes / bandwidth + latency on a wire
# beside it. It is a model of a cluster, the same on every machine, and no measurement.
#
# **Predict first.** 6 layers, 3 micro-batches, forward of a layer takes 1, backward 2, and the
# wire 4 for a gradient. Order the four by the time when all gradients are there. Is overlapping
# always better than not?

# %%
import start  # finds picotron_lab, shows figures in the page

import torch
from torch import nn

from picotron_lab import data_parallel
from picotron_lab.analysis import clock_plots
from picotron_lab.clock import Network
from picotron_lab.lab import run_ranks

LAYERS, SIDE, MICRO = 6, 50, 3
SIZE = 4 * SIDE**2  # bytes of a gradient; on a ring of 2 ranks each sends as many
WIRE = Network(latency=0.5, bandwidth=SIZE / 4)

def layer(watch, x, weight, name, slower):
    watch.spend(slower, "forward", f"F{name}")
    y = x @ weight
    y.register_hook(lambda grad: watch.spend(2 * slower, "backward", f"B{name}"))
    return y

def step(axis, kind, network=WIRE, late=None):
    watch = clock_plots.Watch(axis, network)
    weights = [nn.Parameter(torch.eye(SIDE)) for _ in range(LAYERS)]
    sync = data_parallel.synchroniser(kind, weights, watch, bucket_bytes=2 * SIZE)
    sync.begin_step()
    for i in range(MICRO):
        x = torch.ones(1, SIDE)
        for name, weight in enumerate(weights):
            x = layer(watch, x, weight, name, 1.3 if axis.rank == late else 1)
        sync.before_backward(last=i == MICRO - 1)
        x.sum().backward()
    sync.finish()  # all sums are there: the optimizer may step
    watch.spend(2, "update")
    return watch

KINDS = ("naive", "overlapped", "bucketed", "silent")
watches = {kind: run_ranks(step, 2, kind, network=WIRE) for kind in KINDS}
panels = {kind: clock_plots.lanes_of(found) for kind, found in watches.items()}
clock_plots.lanes(panels, "One step on 2 ranks with a slow wire, virtual time", "units")

# %% [markdown]
# - **naive**: nothing is wrong but the time: first all computing, then all sending, one latency for
#   each weight.
# - **overlapped**: the wire works while backward does. But it carries every micro-batch's
#   gradients,
#   three times the bytes. Here the wire is the slower one, so computing waits for it, and the step
#   ends *later* than the naive one: overlap hides sending, it does not make it free.
# - **bucketed**: fewer messages; a bucket leaves when its *last* gradient is there, so a bit later.
# - **silent**: the bytes of naive, under the last backward. The gradient of layer 0 comes last and
#   nothing is left to hide it.
#
# Backward runs from layer 5 to layer 0, and so do the messages: that is why buckets are filled from
# the last layer on.
#
# ## Calls and bytes
#
# **Predict** from the table above: with $\Psi$ = 6 · 50 · 50 weights of 4 bytes, $m$ = 3, buckets
# of two gradients: how many calls does each step make, and how many bytes?

# %%
psi = LAYERS * SIDE**2
print(f"{'step':11} calls: predicted measured   bytes: predicted measured")
for kind, found in watches.items():
    calls, size = data_parallel.contract(kind, psi, LAYERS, LAYERS // 2, MICRO)
    ledger = found[0].axis.ledger
    print(f"{kind:11} {calls:16} {len(ledger.calls):8} {size:18,} {ledger.bytes():8,}")

# %% [markdown]
# ## Why buckets at all?
#
# On our clock a byte costs the same in any message, so buckets seem to bring nothing. On real links
# small messages are slow. Below: one all-reduce of all gradients of 1.7 billion float32 parameters
# over a node of 8 H200, cut into messages of one size, by the bandwidths that NCCL's own test
# measures (sources in `analysis/hardware.py`).
#
# **Predict:** PyTorch's DDP uses buckets of 25 MiB by default. How far is that from the best?

# %%
from picotron_lab.analysis.hardware import MIB, hardware
from picotron_lab.ledger import wire_bytes

total = 4 * 1.7e9
for size in (1, 4, 8, 25, 64, 128, 512):
    rate = hardware("h200").bandwidth(size * MIB)
    seconds = wire_bytes("all_reduce", total, 8) / rate
    print(f"messages of {size:3} MiB: bandwidth {rate / 1e9:4.0f} GB/s, {1e3 * seconds:4.0f} ms")

# %% [markdown]
# Larger buckets send faster and start later; the last one is never hidden. 64 MiB is the default
# here (`--bucket-mib`).
#
# ## A rank that is late
#
# **Predict:** of four ranks one computes 30 % slower: a hot GPU, a longer document. How much later
# is the step, and on whose lane does the loss of time appear?

# %%
late = run_ranks(step, 4, "silent", WIRE, 2, network=WIRE)
fast = run_ranks(step, 4, "silent", network=WIRE)
clock_plots.lanes(
    {"all alike": clock_plots.lanes_of(fast), "rank 2 slower": clock_plots.lanes_of(late)},
    "A late rank: everybody's sums are complete when the last one has sent", "units",
)

# %% [markdown]
# Ranks 0, 1 and 3 have sent, and wait for nothing but rank 2. In a profile the time appears in
# *their* all-reduce: a long collective often means that someone else came late, not that the
# network is slow. (The wire's lane shows only what a rank itself sends.)
#
# Four ranks also send more than two: a ring makes each send $2\frac{n-1}{n}$ times the bytes, so
# 1.5 times those of the first picture.
#
# ## A sum, not a mean of means
#
# Ranks rarely count the same number of tokens: padding and ignored labels see to that. If each rank
# divides by its *own* count and the means are averaged, tokens on short ranks weigh more. Below,
# the loss is $\frac1N\sum_t w\,x_t$, its gradient the mean of all $x_t$.

# %%
TOKENS = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [10.0], [20.0, 30.0], [40.0]]  # of each rank

def gradient(axis, globally):
    x, weight = torch.tensor(TOKENS[axis.rank]), nn.Parameter(torch.tensor(1.0))
    count = axis.all_reduce(torch.tensor(len(x))) if globally else len(x)
    ((weight * x).sum() / count).backward()
    return weight.grad.item(), axis.all_reduce(weight.grad, "sum" if globally else "mean").item()

one = [x for share in TOKENS for x in share]
print(f"one device:            {sum(one) / len(one):.4f}")
for name, globally in (("global count, sum:", True), ("own count, mean:", False)):
    own, reduced = zip(*run_ranks(gradient, 4, globally), strict=True)
    print(f"{name:22} {reduced[0]:.4f}   before the all-reduce, by rank: "
          + " ".join(f"{part:.2f}" for part in own))

# %% [markdown]
# Equal counts would have hidden the difference: a test of data parallelism needs unequal ones.
#
# ## Every gradient, every rank
#
# The promise of the library is about *each parameter's gradient* of a real model. Worst deviation
# from one device over three steps of SGD in float64, all four steps of this page:

# %%
from picotron_lab.cases import cases
from picotron_lab.verify import verify

lines = []
verify([case for case in cases() if case.technique.startswith("dp, ") and case.mesh.dp == 3
        and case.technique[4:] in KINDS], show=lines.append)
print("\n".join(lines))

# %% [markdown]
# ## Read the code
#
# `silent` is a few lines more than `bucketed`: it only asks whether this backward is the last.

# %%
import inspect

print(inspect.getsource(data_parallel.Silent))

# %% [markdown]
# The contract of the module: calls and bytes of each step, formula beside ledger
# (`python -m picotron_lab.data_parallel`).

# %%
data_parallel.main()
