"""Tour: one loss curve on eight meshes, and why that is a proof only with SGD."""

# %% [markdown]
# # 00 A tour: one loss curve, whatever the mesh
#
# A model that is too large, or too slow, for one GPU is spread over many. Every way to spread it
# (over data, weights, sequence, layers) changes *who computes and holds what*. None may change
# *what is computed*. This page trains one small Llama nine times, on one rank and on eight meshes
# of up to eight, and compares.
#
# Ranks are threads of this one process (`picotron_lab/lab.py`): you see all of them at once, and
# you need no GPU.
#
# **Predict first.** Eight meshes add numbers in different orders. In float64, with plain SGD: will
# the nine loss curves be equal to 2, to 6, or to 12 digits?

# %%
import start  # finds picotron_lab, shows figures in the page

import dataclasses
import tempfile

from picotron_lab.analysis import clock_plots
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer

STEPS, TEXT = 8, "../picotron_lab/model.py"  # a model learns to write the file it is made of
MODEL = ModelConfig("tour", hidden_size=32, layers=4, heads=4, kv_heads=2, ffn_size=80)
CFG = TrainConfig(
    global_batch_size=8, micro_batch_size=8, sequence_length=32, optimizer="sgd", lr=0.5,
    warmup_steps=0, dtype="float64", weight_decay=0, data=TEXT, cache_dir=tempfile.mkdtemp(),
)

def step_of(mesh, cfg=CFG):
    """The same 8 sequences; pp stages get a rank's share as pp micro-batches, others at once."""
    return dataclasses.replace(cfg, micro_batch_size=8 // mesh.dp // mesh.pp)

def losses(mesh, cfg=CFG, times=1.0):
    cfg = step_of(mesh, cfg)
    def rank_main(world):
        trainer, curve = Trainer(MODEL, mesh, cfg, world), []
        for step in range(STEPS):
            curve.append(trainer.compute_gradients(step)[0])
            for parameter in trainer.parameters:
                parameter.grad *= times  # 1: as it should be
            trainer.update(step)
        return curve
    return run_ranks(rank_main, mesh.size)[0]

MESHES = {
    "one rank": MeshConfig(),
    "dp 4": MeshConfig(dp=4),
    "dp 4, ZeRO-3": MeshConfig(dp=4, zero=3),
    "tp 2": MeshConfig(tp=2),
    "tp 4, sequence parallel": MeshConfig(tp=4, sequence_parallel=True),
    "cp 4, zigzag": MeshConfig(cp=4, cp_kind="zigzag"),
    "pp 4, 1F1B": MeshConfig(pp=4),
    "pp 2, ZB-V": MeshConfig(pp=2, schedule="zb-v"),
    "dp 2 x pp 2 x tp 2": MeshConfig(dp=2, pp=2, tp=2, zero=1),
}
curves = {name: losses(mesh) for name, mesh in MESHES.items()}
clock_plots.one_curve(curves, 1e-10, "One seed, one loss curve: SGD, float64, nine meshes")

# %% [markdown]
# Left, eight runs lie on the thick grey line of one rank; each has its marks at other steps, or you
# would see only the last. Right, their distances: float64 keeps about 16 digits, and at first the
# curves differ in the last one at most, because sums of the same numbers in another order round
# differently. Later they may drift apart a little: each step starts from the differences of the one
# before, and a loss that jumps, as it does at this large learning rate, magnifies them.
#
# This is the first promise of the library: **exact**. Any mesh, any schedule, any path gives the
# loss, every gradient and the weights of one device. What the numbers behind the picture are:

# %%
def apart(one, other):
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))

print("\n".join(
    f"{name:24} first loss {curve[0]:.12f}  last {curve[-1]:.12f}"
    f"  apart by {apart(curve, curves['one rank']):.0e} at most"
    for name, curve in curves.items()
))

# %% [markdown]
# ## Who is who
#
# A mesh is a grid with named axes. Rank numbers run fastest along `tp`, slowest along `pp`:
# tensor-parallel ranks talk most and become neighbours, pipeline stages talk least.
#
# $$\text{rank} = ((pp \cdot DP + dp) \cdot CP + cp) \cdot TP + tp$$
#
# **Predict:** in the mesh of 8 ranks above, who shares a batch with rank 5 (same `dp`), and whose
# weights does it hold as well (same `pp` and `tp`)?

# %%
from picotron_lab.mesh import build, grid

sizes = MESHES["dp 2 x pp 2 x tp 2"]
print("ranks as [pp][dp][tp]:", grid(sizes.pp, sizes.dp, sizes.cp, sizes.tp)[:, :, 0].tolist())
print("\n".join(run_ranks(lambda world: str(build(world, sizes)), sizes.size)))

# %% [markdown]
# ## The same weight on eight ranks
#
# The plain model does not know that parallelism exists. `parallelize` functions replace its parts,
# and every parameter carries a record: its full name, its full shape, the slice this rank holds.
# Here is one matrix, the gate of a feed-forward layer, shape $[F, D]$ = [80, 32]. Stage 0 holds
# layers 0 and 1, stage 1 layers 2 and 3; `tp` cuts its rows $F$ in two; `dp` keeps copies.

# %%
def gates(world):
    model = Trainer(MODEL, sizes, step_of(sizes), world).model
    records = [p.record for p in model.parameters() if p.record.name.endswith("mlp.gate.weight")]
    return [(r.name, [(part.start, part.stop) for part in r.index]) for r in records]

print("\n".join(
    f"rank {rank}: " + "  ".join(f"{name} rows {rows}" for name, (rows, *_) in found)
    for rank, found in enumerate(run_ranks(gates, 8))
))

# %% [markdown]
# ## What a mesh costs: bytes
#
# Every call that a rank makes is written into its ledger. Equal results, very different traffic:
# one step of each mesh, payload in bytes of rank 0, by axis. Data parallelism sends gradients once
# a step; the other axes send activations, for every micro-batch and layer.
#
# **Predict:** which mesh sends most? (The model has few weights, and its activations are small
# too.)

# %%
def sent(mesh):
    def rank_main(world):
        trainer = Trainer(MODEL, mesh, step_of(mesh), world)
        return trainer.train_step(0)["sent_bytes"]
    return run_ranks(rank_main, mesh.size)[0]

traffic = {name: sent(mesh) for name, mesh in MESHES.items()}
print("\n".join(f"{name:24} {sum(t.values()):>10,}  {t}" for name, t in traffic.items()))

# %% [markdown]
# Tensor parallelism sends most, several times each layer, and should sit on the fastest links; a
# pipeline sends least, one activation per boundary and micro-batch. The 8 bytes on `world` are the
# gradient norm; `kv` joins tensor-parallel ranks that share a key and value head. Pages 02 to 10
# derive each number.
#
# ## Why SGD? A bug that AdamW hides
#
# Loss curves are the usual proof that a parallel program is right, and with AdamW they prove
# little. Its update is $\eta\, m / (\sqrt{v} + \epsilon)$: multiply every gradient by $c$ and $m$
# grows by $c$, $\sqrt{v}$ by $c$ as well. The commonest bugs (a mean in place of a sum,
# micro-batches that are not divided, a reduction done twice) do just that. SGD's update is $\eta\,
# g$: it shows them.
#
# **Predict:** below, every gradient is 4 times too large. What will each optimizer show?

# %%
sgd = dataclasses.replace(CFG, lr=0.3, clip=0)
adamw = dataclasses.replace(CFG, optimizer="adamw", lr=0.003, clip=0)
runs = {
    name: {"right gradient": losses(MeshConfig(), cfg), "4 times too large":
           losses(MeshConfig(), cfg, times=4.0)}
    for name, cfg in {"AdamW": adamw, "SGD": sgd}.items()
}
clock_plots.loss_panels(runs, 10, "A gradient four times too large: AdamW hides it, SGD shows it")

# %%
print("\n".join(
    f"{name:6} largest relative difference of the two curves: "
    f"{apart(pair['4 times too large'], pair['right gradient']):.0e}"
    for name, pair in runs.items()
))

# %% [markdown]
# Under AdamW the two curves agree to several digits; only $\epsilon$ keeps them apart. (Clipping of
# the gradient norm hides the bug from SGD, too: it is off here.) So the library is tested with
# plain SGD and a large learning rate, and compares *each parameter's gradient*, not only the loss.
#
# ## Where to go from here
#
# | page | question |
# |---|---|
# | 01 | what fills the memory of one GPU? |
# | 02, 03 | copies of the model: how gradients travel, and how not to keep n copies of everything |
# | 04, 05, 07, 10 | cutting layers, sequences, the vocabulary, experts |
# | 06, 08, 09 | pipelines: schedules, slices of sequences, one controller |
# | 11, 12 | planning a cluster; from this laptop to eight GPUs |
#
# The library's contract is a table: each technique beside one device, worst deviation of any
# gradient, loss or weight, bytes sent and most bytes held. A few rows of it (`python run.py verify`
# prints all, `--all` adds 100 random products of techniques):

# %%
from picotron_lab.cases import cases
from picotron_lab.verify import verify

wanted = ("dp, silent", "ZeRO-3, plain", "cp4, zigzag, fused",
          "ep3 of dp3, fused", "pp4, zb-v, plain")
chosen = {case.technique: case for case in cases() if case.technique in wanted}
lines = []
rows = verify(list(chosen.values()), show=lines.append)
print("\n".join(lines))  # the contract: each deviation stays below its limit
