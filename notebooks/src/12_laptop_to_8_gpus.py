"""From a laptop to eight GPUs: launching, placing ranks, reading traces, two lessons in speed."""

# %% [markdown]
# # 12 From this laptop to eight GPUs
#
# Nothing on this page needs a GPU. It is about what changes when you get some: how ranks are
# started, which of them should be neighbours, how to read a trace, and two details that cost real
# runs much of their speed and are invisible in any loss curve.
#
# **Predict first.** Llama 3 8B on one node of 8 H100, and on two. `tp` ranks cut each layer, `dp`
# takes the rest. Which `tp` is fastest, and what happens when `tp` leaves the node?

# %%
import start  # finds picotron_lab, shows figures in the page

from picotron_lab.analysis import clock_plots, speed_plots
from picotron_lab.analysis.hardware import hardware
from picotron_lab.config import PRESETS, MeshConfig, ModelConfig, TrainConfig

H100 = hardware("h100")

def runs(gpus):
    cfg = TrainConfig(128, 2, 4096, dtype="bfloat16", recompute="full")
    meshes = [MeshConfig(dp=gpus // n, tp=n, zero=int(n < gpus), sequence_parallel=n > 1)
              for n in (1, 2, 4, 8, 16) if n <= gpus]
    return [speed_plots.Run(PRESETS["llama3-8b"], mesh, cfg) for mesh in meshes]

speed_plots.throughput({"8 GPUs": runs(8), "16 GPUs": runs(16)}, "tp", H100)

# %% [markdown]
# These are predictions (`analysis/step_time.py`; page 11 says how far such predictions are off).
# From 2 on each doubling of `tp` costs, because every layer sends activations while nobody can
# compute; whether the replicas are 8 or 16 GPUs hardly matters. Across the dotted line they travel
# through the network adapter instead of NVLink, and the price jumps. So take the smallest `tp`
# that *fits the memory*, and never more than a node has.
#
# ## One program, three ways to start it
#
# | where | command | ranks are |
# |---|---|---|
# | laptop | `python run.py --ranks 8 --tp 2 --zero 1` | threads of one process, no speed-up |
# | one node | `torchrun --nproc-per-node 8 run.py --tp 2 --zero 1` | processes, one for each GPU |
# | cluster | see below | the same on several nodes |
#
# The options after the program do not change. `torchrun` starts the processes and tells each its
# number in environment variables (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`);
# `comm.connect` reads them, takes GPU number `LOCAL_RANK`, and returns the world axis. What
# `python run.py --help` ends with:

# %%
from picotron_lab import checks

print(checks.SEVERAL_NODES.strip())

# %% [markdown]
# In the SLURM job `srun` starts *one* `torchrun` per node (`--ntasks-per-node 1`), which starts 8
# ranks. The first node's name is the meeting point. `--resume` makes the job restartable: queue it
# again and it goes on from the newest complete checkpoint, also on another mesh.
#
# Does it make no difference? Three steps on two ranks: threads here, then real processes under
# `torchrun` on this machine. **Predict** how many digits of the losses agree.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer

FOLDER = tempfile.mkdtemp()
MODEL = ModelConfig(hidden_size=32, layers=2, ffn_size=80)
CFG = TrainConfig(8, 2, 32, steps=3, dtype="float64", cache_dir=FOLDER,
                  data=os.path.abspath("../picotron_lab/model.py"))
OPTIONS = f"""--hidden-size 32 --layers 2 --ffn-size 80 --global-batch-size 8 --micro-batch-size 2
 --sequence-length 32 --steps 3 --dtype float64 --data {CFG.data} --sample-tokens 0
 --validation-fraction 0.01 --dp 2 --zero 1 --cache-dir {FOLDER} --log-file {FOLDER}/log.jsonl"""

def train(world):
    trainer = Trainer(MODEL, MeshConfig(dp=2, zero=1), CFG, world)
    return [metrics["loss"] for metrics in trainer.fit()]

threads = run_ranks(train, 2)[0]
launch = "-m torch.distributed.run --standalone --nproc-per-node 2 run.py"
subprocess.run([sys.executable, *launch.split(), *OPTIONS.split()], cwd="..", check=True,
               capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
lines = Path(FOLDER, "log.jsonl").read_text().splitlines()
processes = [json.loads(line)["loss"] for line in lines]
for step, pair in enumerate(zip(threads, processes, strict=True)):
    print(f"step {step}: threads {pair[0]:.15f}  processes {pair[1]:.15f}")

# %% [markdown]
# ## Who should be neighbours
#
# Ranks are numbered so that `tp` runs fastest and `pp` slowest: rank // 8 is the node. **Predict**
# for 16 ranks, pp 2 x dp 2 x tp 4: which axes stay inside a node?

# %%
from picotron_lab.mesh import groups

found = groups(MeshConfig(pp=2, dp=2, tp=4))
for axis in ("tp", "dp", "pp"):
    inside = all(len({rank // 8 for rank in group}) == 1 for group in found[axis])
    print(f"{axis}: {'inside a node ' if inside else 'crosses nodes '} {found[axis]}")

# %% [markdown]
# ## Reading a trace
#
# `python run.py schedule 1f1b --pp 4 --microbatches 8 --trace trace.json` writes Chrome trace
# events: open <https://ui.perfetto.dev> and drag the file in. (`w` and `s` zoom, `a` and `d` move,
# `m` measures what you have selected.) A process per rank, a slice per action, and below it a
# counter of the activations held. A trace is only JSON; here are its first events, and the picture
# that Perfetto would show.
#
# **Predict** the share of time in which rank 0 waits: $(p - 1) / (m + p - 1)$ with $p$ = 4, $m$ =
# 8.

# %%
from picotron_lab.analysis.timeline import write_trace
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate

path = Path(FOLDER, "trace.json")
write_trace(simulate(build("1f1b", 4, 8)), path)
events = json.loads(path.read_text())["traceEvents"]
for event in events[:3]:
    print(event)
rows = {f"rank {rank}": [] for rank in range(4)}
for event in (event for event in events if event["ph"] == "X"):
    first, last = event["ts"] / 1000, (event["ts"] + event["dur"]) / 1000
    span = clock_plots.Span(first, last, event["cat"], event["name"])
    rows[f"rank {event['pid']}"].append(span)
clock_plots.lanes({"": rows}, "The slices of the trace: 1F1B, 4 ranks, 8 micro-batches", "units")

# %%
longest = max(span.end for spans in rows.values() for span in spans)
for rank, spans in rows.items():
    busy = sum(span.end - span.start for span in spans)
    print(f"{rank}: busy {busy:.0f} of {longest:.0f}, waits {1 - busy / longest:.4f} of the time")
print(f"(p - 1) / (m + p - 1) = {3 / 11:.4f}")

# %% [markdown]
# On a GPU take a trace of a real step with `torch.profiler.profile` and `export_chrome_trace`, of
# steps 3 to 5 (the first ones compile and allocate), and read it in this order:
#
# 1. **Gaps on the compute stream.** Is the CPU too slow to launch (short kernels, gaps everywhere),
#    or does a kernel wait for a collective (a gap that ends where a message ends)?
# 2. **Long collectives.** Compare ranks: who begins it *last* is the cause, the others only wait.
# 3. **Overlap.** Are messages beneath kernels, or after them?
# 4. **The longest kernels that are no matmuls.** Ask of each: how many bytes must it move? That was
#    the next story.
#
# ## One flattened tensor: from 34 to 54 % MFU
#
# A well-known teaching repository (picotron, its pull request 33) computed its loss as
# `cross_entropy(logits.transpose(1, 2), labels)`: torch wants the classes in dim 1, and $[B, V, T]$
# is what its manual shows for sequences. Flattening to $[B \cdot T, V]$ instead moved an 8B model
# on dp 4 x pp 2 from 34 to 54 % MFU, as the pull request reports; the loss is the same but for
# rounding. The logits of 8192 tokens and 128k words are 2 GiB in 16 bit: the largest tensor of
# all.
#
# **Predict:** both calls sum over the same numbers. What does torch do for one that it does not do
# for the other?

# %%
import torch
from torch.autograd.profiler import profile  # torch.profiler.profile does this and more
from torch.nn.functional import cross_entropy

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler need not say that it begins and ends
B, T, V = 2, 64, 4000
labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
WAYS = {
    "transposed": lambda x: cross_entropy(x.transpose(1, 2), labels),
    "flattened": lambda x: cross_entropy(x.flatten(0, 1), labels.flatten()),
}

def operators(loss):
    """Value, and names of the operators that are given whole logits."""
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with profile(record_shapes=True, use_kineto=False) as seen:
        value = loss(logits)
        value.backward()
    whole = [e.key for e in seen.key_averages(group_by_input_shape=True)
             if any(shape and torch.Size(shape).numel() == B * T * V for shape in e.input_shapes)]
    return value.item(), {name.removeprefix("aten::") for name in whole if "aten::" in name}

found = {name: operators(loss) for name, loss in WAYS.items()}
for name, (value, mine) in found.items():
    other = next(theirs for key, (_, theirs) in found.items() if key != name)
    print(f"{name}: loss {value:.5f}, only here:\n    {', '.join(sorted(mine - other))}")

# %% [markdown]
# Transposed, the classes of a token are still neighbours in memory, but torch must treat them as
# the *middle* dim of three: it first copies the logits into that layout (`contiguous`, `clone`,
# `copy_`), then sums along a dim whose elements lie $T$ apart, with other kernels (`nll_loss2d`),
# and the gradient comes back in that layout, too, for the matmul before it to read. Flattened, a
# row is a run of neighbours, and nothing is copied. The model of this library flattens
# (`model.Head`), and its fused path never has whole logits (`fused.py`; page 07).
#
# The general lesson: at the largest tensor, count bytes. A profile shows such a kernel at once,
# a loss curve never.
#
# ## What `CUDA_DEVICE_MAX_CONNECTIONS` does
#
# Many launch scripts set it to 1. The CPU launches kernels into streams; the GPU receives them
# through hardware queues ("connections", 8 unless told otherwise). Streams in *different* queues
# are independent: whoever is ready first begins. In *one* queue, work begins in the order of its
# launch.
#
# That order matters for tensor parallelism. Its backward computes dX, launches the all_reduce of dX
# on another stream, then launches the matmul of dW, which is to hide it. If dW begins first, it
# fills every multiprocessor of the GPU, and the all_reduce begins when dW has ended: no overlap.
# With one queue the all_reduce was launched first, so it begins first. Below is a model of just
# this rule: a message cannot begin while a matmul, begun before it, fills the GPU. To learn of
# another stream's event takes a moment, 0.3. It is a model, not a trace.
#
# **Predict:** and what does one queue do to a program that launches a message *early*, long before
# it can start, as ZeRO-3 prefetches weights?

# %%
EVENT = 0.3  # launches below: (stream, name, time, needs) in order; `issue` makes lanes of them

def issue(launches, connections):
    streams = {"compute": [], "messages": []}
    queues = [[k for k in launches if connections == 1 or k[0] == s] for s in streams][:connections]
    ends, full, last = {}, (0.0, 0.0), 0.0
    def ready(kernel):
        stream, _, _, needs = kernel
        free = [span.end for span in streams[stream]] + [ends.get(n, 1e9) + EVENT for n in needs]
        moment = max([0.0, *free, last if connections == 1 else 0.0])
        return full[1] if stream == "messages" and full[0] < moment < full[1] else moment
    while queue := min(filter(None, queues), key=lambda queue: ready(queue[0]), default=None):
        stream, name, time, _ = queue[0]
        last = ready(queue.pop(0))
        ends[name] = last + time
        full = (last, last + time) if stream == "compute" else full
        streams[stream].append(clock_plots.Span(last, last + time, stream, name))
    return streams

C, M = "compute", "messages"
TENSOR = [(C, "dX 3", 3, []), (M, "sum 3", 2.5, ["dX 3"]), (C, "dW 3", 3, []),
          (C, "dX 2", 3, ["sum 3"]), (M, "sum 2", 2.5, ["dX 2"]), (C, "dW 2", 3, []),
          (C, "dX 1", 3, ["sum 2"]), (M, "sum 1", 2.5, ["dX 1"]), (C, "dW 1", 3, [])]
ZERO = [(M, "gather 1", 4, []), (C, "layer 0", 3, []), (M, "gather 2", 4, []),
        (C, "rest of 0", 3, []), (C, "layer 1", 3, ["gather 1"]), (M, "gather 3", 4, []),
        (C, "layer 2", 3, ["gather 2"])]
panels = {f"{name}, {text}": issue(program, n) for name, program in
          (("tensor parallel backward", TENSOR), ("prefetch of weights", ZERO))
          for text, n in (("several connections", 2), ("one connection", 1))}
clock_plots.lanes(panels, "A model of hardware queues: launch order, or who is ready", "units")

# %% [markdown]
# Above, one connection lets the sums travel beneath dW. Below it does harm: `gather 2` waits at the
# head of the queue until `gather 1` has left the wire, and matmuls behind it, which need neither,
# wait as well. So: 1 for tensor parallelism that overlaps by order of launch, *not* for ZeRO-3 or
# FSDP, which launch ahead. Megatron-LM demands 1 for tensor parallelism up to
# Hopper, and no longer from Blackwell on; it refuses 1 with FSDP, for which torchtitan advises 16
# or 32. This library sets nothing; try both with your model:
#
# `CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc-per-node 8 run.py --tp 8 --sequence-parallel`
#
# ## Before you press the button
#
# A checklist for the first run on GPUs: `python run.py verify` on the node; `dryrun` with the exact
# options (below); 20 steps with `--steps 20`, reading `mfu` and `peak_memory_bytes` from
# `metrics.jsonl`; kill one rank to see that the others end with a sentence; then the long job.
#
# The contract of a launch: what one rank of 8 will hold and send, as formulas say, beside the
# trainer itself, run in the seat of rank 0 without GPUs, data or neighbours (`run.py dryrun`). Four
# layers of a 1.7B model keep it short. Pairs are (calls, payload bytes).

# %%
import dataclasses

from picotron_lab.analysis import dryrun, memory, traffic

model = dataclasses.replace(PRESETS["smollm-1.7b"], layers=4)
cfg = TrainConfig(64, 4, 2048, dtype="bfloat16")
for mesh in (MeshConfig(dp=8, zero=1), MeshConfig(dp=2, tp=4, sequence_parallel=True, zero=1)):
    report = dryrun.dry_run(model, mesh, cfg, rank=0)
    told = memory.predict(model, mesh, cfg, kernels=True).peak
    print(f"contract, dp {mesh.dp}, tp {mesh.tp}: peak predicted {told / 2**30:.2f} GiB, rehearsed"
          f" {report.peak_bytes / 2**30:.2f} GiB")
    sent = traffic.predict(model, mesh, cfg, on_gpu=True)
    for axis, ops in sorted(report.traffic.items()):
        for op, (calls, size) in sorted(ops.items()):
            print(f"  {axis:6} {op:15} predicted {sent[axis][op]}  rehearsed {calls, size}")
