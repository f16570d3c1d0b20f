"""ZeRO: what n copies are good for, and what goes away with each stage."""

# %% [markdown]
# # 03 ZeRO: stop keeping n copies
#
# With data parallelism $n$ ranks hold the same weights, gradients and moments: 16 or 18 bytes of
# each parameter, $n$ times. ZeRO (Rajbhandari et al. 2020, sections 5 and 7) gives each rank $1/n$
# of the rows and fetches the rest when, and only while, it is needed:
#
# | stage | shared out | bytes per parameter, 16 bit as in the paper |
# |---|---|---|
# | 0 | nothing | $2 + 2 + 12$ |
# | 1 | optimizer state | $2 + 2 + 12/n$ |
# | 2 | and gradients | $2 + (2 + 12)/n$ |
# | 3 | and weights | $(2 + 2 + 12)/n$ |
#
# **Predict first**, for 7.5 billion parameters on 64 ranks: the bytes of one rank in each stage,
# and which stage helps most.

# %%
import start  # finds picotron_lab, shows figures in the page

import tempfile

from picotron_lab.analysis import clock_plots, memory_plots
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig

PAPER = ModelConfig("7.45 billion parameters", 50_257, 4096, 36, 32, 32, 10_923, tied=True)
memory_plots.zero_state(PAPER, 64, TrainConfig(64, 1, 1024, dtype="bfloat16"), 7.5e9)

# %% [markdown]
# White, the figures of the paper's first picture: 120, 31.4, 16.6 and 1.9 GB. Beside them what this
# library would hold: its gradients add up in float32 (4 bytes, not 2), and its fused path keeps
# flat buffers. Stage 1 takes away most, at no cost on the wire, as we shall see.
#
# ## Who holds which rows
#
# A matrix is cut by its rows. Each rank has $\lceil \text{rows} / n \rceil$, the last ones fewer;
# on the wire all send as many, some of them zeros. Ten rows on four ranks, side by side: what a
# rank holds, what it gets by `all_gather`, and what its gradients become by `reduce_scatter` (each
# rank's own gradient is its rank number in every place, so the sum is 0 + 1 + 2 + 3).

# %%
import torch

from picotron_lab.lab import run_ranks
from picotron_lab.zero_rows import gather_rows, mine, scatter_sum

def rows(axis):
    full = torch.arange(10.0)[:, None]
    shard = full[mine(full, axis)]
    gathered = gather_rows(shard, len(full), axis)
    summed = scatter_sum(torch.full_like(full, axis.rank), axis)
    return [x.flatten().int().tolist() for x in (shard, gathered, summed)]

for rank, (shard, gathered, summed) in enumerate(run_ranks(rows, 4)):
    print(f"rank {rank} holds {str(shard):11} gathers {gathered}  sums {summed}")

# %% [markdown]
# ## The formula beside a measurement
#
# A small Llama on four ranks, float32, AdamW: the formulas become $4\Psi + 4\Psi + 8\Psi$ with
# the shared parts over $n = 4$. One step is trained, then a meter looks at what lies on each rank.
#
# **Predict:** are the four ranks equal? (90 rows of a matrix, and norm weights, do not divide by
# 4.)

# %%
from picotron_lab.analysis.dryrun import held
from picotron_lab.analysis.meter import Meter
from picotron_lab.trainer import Trainer

MODEL = ModelConfig("zero", 320, hidden_size=60, layers=4, heads=2, kv_heads=1, ffn_size=90)
CFG = TrainConfig(4, 1, 32, impl="plain", data="../picotron_lab/model.py",
                  cache_dir=tempfile.mkdtemp())
N, STAGES = 4, (0, 1, 2, 3)

def state(world, stage):
    trainer = Trainer(MODEL, MeshConfig(dp=N, zero=stage), CFG, world)
    trainer.train_step(0)
    with Meter() as meter:
        for category, tensors in held(trainer).items():
            meter.label(category, tensors)
        return meter.live

measured = {stage: run_ranks(state, N, stage) for stage in STAGES}

# %%
PSI = measured[0][0]["parameter"] // 4

def formula(stage):
    """Bytes by category; `stage >= k` is whether the stage shares it out."""
    cut = {"parameter": (4, 3), "gradient": (4, 2), "optimizer": (8, 1)}
    return {name: size * PSI / (N if stage >= k else 1) for name, (size, k) in cut.items()}

groups = {
    f"stage {stage}": {"formula": formula(stage)}
    | {f"rank {rank}": live for rank, live in enumerate(measured[stage])}
    for stage in STAGES
}
clock_plots.stacks(groups, f"State of each of {N} ranks: told and measured, {PSI:,} parameters")

# %%
from picotron_lab.analysis.memory import predict
from picotron_lab.analysis.parameters import Place

for stage in STAGES:
    for rank in (0, N - 1):
        said = predict(MODEL, MeshConfig(dp=N, zero=stage), CFG, place=Place(dp=rank)).state
        seen = sum(measured[stage][rank].values())
        print(f"stage {stage} rank {rank}: formula {sum(formula(stage).values()):>11,.0f}"
              f"  with rows counted {said:>9,}  measured {seen:>9,}")

# %% [markdown]
# The paper's formula divides evenly; `predict` counts rows, and is right to the byte.
#
# ## The timeline of one rank
#
# Between steps stage 3 holds next to nothing. *During* a step weights must be there to compute
# with: a unit (embedding, layer, norm, head) is gathered when its forward begins, forgotten after
# it, and gathered again for backward. Gathered weights are nobody's property: the meter shows them
# among activations.
#
# **Predict:** where do you expect the difference between the two pictures, at the peak or between
# the steps?

# %%
def record(world, stage):
    trainer = Trainer(MODEL, MeshConfig(dp=N, zero=stage), CFG, world)
    trainer.train_step(0)  # after which everything that stays is there
    with Meter(record=True) as meter:
        for category, tensors in held(trainer).items():
            meter.label(category, tensors)
        for step in (1, 2):
            meter.mark(f"stage {stage}, step {step + 1}")
            trainer.train_step(step)
    return meter

meters = {stage: run_ranks(record, N, stage)[0] for stage in (1, 3)}
memory_plots.memory_timeline(meters[1])

# %%
memory_plots.memory_timeline(meters[3])

# %% [markdown]
# At both: less lies between the steps, and the peak falls as well, because at most one unit is
# whole at a time: the teeth on the slopes are units that come and go. What forward keeps for
# backward is the same in both pictures: ZeRO shares out state, not the work. Every rank runs the
# whole model.
#
# ## What it costs on the wire
#
# | | per step of $m$ micro-batches, weights of $w$, gradients of $g$ bytes | float32 |
# |---|---|---|
# | data parallel | all_reduce($g\Psi$), in a ring reduce_scatter + all_gather | $4\Psi$ |
# | stage 1 | reduce_scatter($g\Psi$) + all_gather($w\Psi$): the same bytes | $4\Psi + 4\Psi$ |
# | stage 2 | reduce_scatter in every micro-batch | $m\,4\Psi + 4\Psi$ |
# | stage 3 | and two all_gathers in every micro-batch | $m\,(8\Psi + 4\Psi)$ |
#
# A ring's all_reduce of $S$ bytes sends $2\frac{n-1}{n}S$ from each rank, an all_gather or
# reduce_scatter half of that. **Predict** with $m = 1$: how much more does stage 3 send than stage
# 1? And with $m = 2$? Above are payloads, below bytes on the wire, from the ledger of rank 0:

# %%
import dataclasses

from picotron_lab.ledger import wire_bytes

def sent(world, stage, m):
    cfg = dataclasses.replace(CFG, global_batch_size=N * m)
    trainer = Trainer(MODEL, MeshConfig(dp=N, zero=stage), cfg, world)
    trainer.train_step(0)
    calls = world.ledger.select(axis="dp")
    return {op: sum(wire_bytes(c.op, c.bytes, N) for c in calls if c.op == op and c.bytes > 8)
            for op in ("all_reduce", "reduce_scatter", "all_gather")}

once = wire_bytes("all_reduce", 4 * PSI, N)
for m in (1, 2):
    for stage in STAGES:
        found = run_ranks(sent, N, stage, m)[0]
        print(f"m={m} stage {stage}: {sum(found.values()) / once:.2f} x data parallel  ",
              "  ".join(f"{op} {size:,.0f}" for op, size in found.items() if size))

# %% [markdown]
# With one micro-batch stage 3 sends somewhat less than half as much again (backward does not read
# the embedding, so that is gathered once; padding adds a little). With two, stages 2 and 3 pay for
# each: with many micro-batches per step, stage 1 is the cheap one. That is why pipelines, which
# need many, go together with stage 1.
#
# ## Equal to one device
#
# Three steps of plain SGD in float64, every gradient and weight compared:

# %%
from picotron_lab.cases import cases
from picotron_lab.verify import verify

wanted = [f"ZeRO-{stage}, {impl}" for stage in (1, 2, 3) for impl in ("plain", "fused")]
lines = []
verify([case for case in cases() if case.technique in wanted], show=lines.append)
print("\n".join(lines))

# %% [markdown]
# ## Read the code
#
# Stage 1 on the plain path: gradients add up in full, each rank gets the sum of its rows, steps
# them, and all gather the new weights.

# %%
import inspect

from picotron_lab import zero

print(inspect.getsource(zero.Stage1))

# %% [markdown]
# The contract of the module: bytes of state, payload, buffers and calls; formula, prediction and
# measurement, for three choices of 16 and 32 bit (`python -m picotron_lab.zero`).

# %%
zero.main()
