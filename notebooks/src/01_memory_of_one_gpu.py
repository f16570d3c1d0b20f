"""Memory of one GPU: what is there, when, and what recomputation buys."""

# %% [markdown]
# # 01 Memory of one GPU
#
# Before anything is shared out: what fills the memory of one device while it trains? Four things:
# weights, gradients, optimizer state, and activations, which forward keeps for backward. The
# Ultra-Scale Playbook opens with their timeline; here a meter records it, operation by operation,
# on this machine's CPU (bytes are the same on a GPU, if the operators are).
#
# **Predict first.** A model of $\Psi$ parameters in float32 with AdamW. Which of the four is there
# before the first step? Which appear during it, and which are gone after it? Is the second step's
# peak higher than the first's?

# %%
import start  # finds picotron_lab, shows figures in the page

import dataclasses
import tempfile

from picotron_lab.analysis import memory, memory_plots
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import PRESETS, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer

MODEL = ModelConfig("first steps", 512, 64, 4, 4, 2, 176)
CFG = TrainConfig(8, 8, 64, impl="plain", data="../picotron_lab/model.py",
                  cache_dir=tempfile.mkdtemp())

def record(cfg=CFG, steps=4):
    def rank_main(world):
        trainer = Trainer(MODEL, MeshConfig(), cfg, world)
        with Meter(record=True) as meter:
            meter.watch(trainer.model.parameters())
            for number in range(steps):
                meter.mark(f"step {number + 1}")
                trainer.compute_gradients(number)
                with meter.making("optimizer"):
                    trainer.update(number)
        return meter
    return run_ranks(rank_main, 1)[0]

first = record()
memory_plots.memory_timeline(first)

# %% [markdown]
# Weights lie at the bottom from the beginning. In forward activations climb, layer by layer; in
# backward they fall while gradients appear beneath them. When the first step ends AdamW makes its
# two moments, which stay: so the first step fits where the second does not. That is the commonest
# way to run out of memory *after* one good step.
#
# ## State: counting without running
#
# Per parameter, in bytes:
#
# | | weight | gradient | AdamW's moments | float32 master | sum |
# |---|---|---|---|---|---|
# | float32 | 4 | 4 | 8 | | 16 |
# | bfloat16, gradients added up in float32 (ours) | 2 | 4 | 8 | 4 | 18 |
# | bfloat16, gradients too (the ZeRO paper's) | 2 | 2 | 8 | 4 | 16 |
#
# So 16 bits for the numbers that are multiplied do not make state smaller; they make multiplication
# fast and activations half as large. `memory.predict` reads only the configuration; the meter saw
# the run.

# %%
said, live = memory.predict(MODEL, MeshConfig(), CFG), first.history[-1].live
psi = said.parameters // 4
print(f"parameters: {psi:,}")
for name, told, seen in (
    ("weights", said.parameters, live["parameter"]),
    ("gradients", said.gradients, live["gradient"]),
    ("moments", said.moments, live["optimizer"]),
):
    print(f"{name:10} predicted {told:>9,}  measured {seen:>9,}  per parameter {seen / psi:.4f}")

# %% [markdown]
# Measured moments exceed the prediction by AdamW's step counters: 4 bytes for each *tensor*.
#
# ## Activations: what forward keeps
#
# Each operator keeps what its derivative needs. For GPT in 16 bit, a layer keeps (Korthikanti et
# al. 2022, equation 2), with $s$ tokens of a sequence, $b$ sequences, width $h$, $a$ heads:
#
# $$s\,b\,h\,\Big(34 + 5\,\frac{a\,s}{h}\Big)\ \text{bytes}$$
#
# The first term is linear in the length, the second is the $a\,b\,s^2$ attention scores. Here is
# every part of *our* layer (Llama: other operators, so other constants).
#
# **Predict:** twice the length; which parts become twice as large, and which four times?

# %%
from picotron_lab.analysis.activations import Setting, layer_bytes

short, long = (layer_bytes(MODEL, Setting(8, T, 4)) for T in (64, 128))
for part in (part for part in short if short[part]):
    times = long[part] / short[part]
    print(f"{part:12} T=64: {short[part]:>9,}   T=128: {long[part]:>9,}   x {times:.0f}")

# %% [markdown]
# Only scores grow with $T^2$. Now real models: each panel is one GPU with one sequence, a stack for
# each length. What cannot fit rises above the dashed line of 80 GB.
#
# **Predict:** which of these models can be trained on one GPU at all? What will full recomputation
# change for the 8B model: which part of the stack?

# %%
names = ("llama3.2-1b", "llama3-8b", "llama3-70b")
runs = {
    "scores kept": TrainConfig(1, 1, 1024, dtype="bfloat16", impl="plain"),
    "full\nrecomputation": TrainConfig(
        1, 1, 1024, dtype="bfloat16", impl="plain", recompute="full"
    ),
    "fused kernels,\nno recomputation": TrainConfig(1, 1, 1024, dtype="bfloat16"),
}
memory_plots.memory_by_length([PRESETS[n] for n in names], (1024, 2048, 4096, 8192), runs, 80e9)

# %% [markdown]
# Recomputation cuts activations and nothing else: 8B parameters need 18 bytes each before the first
# token arrives, more than the GPU has, whatever the length. State must be shared out (page 03,
# ZeRO) or the model cut (pages 04, 06). The last row: fused attention kernels never keep scores, so
# the quadratic part is gone without computing a whole layer twice.
#
# ## Recomputation on the timeline
#
# Keep only a layer's input, $2\,s\,b\,h$ bytes in 16 bit, and run its forward again when backward
# arrives (Chen et al. 2016). The price: of a step's 3 parts (1 forward, 2 backward) it adds one
# more forward of the layers, about a third.
#
# **Predict the shape:** the hill of activations was one slope up, one slope down. Now?

# %%
full = record(dataclasses.replace(CFG, recompute="full"), steps=2)
memory_plots.memory_timeline(full)

# %% [markdown]
# A comb. The small teeth are forward: a layer's own work, freed as soon as the layer is done. The
# four tall ones are backward: each layer is run again, then back-propagated, and only one at a time
# is there. The floor under them is what was kept, the inputs of the layers.
#
# Peaks, told by formulas and seen by the meter:

# %%
kinds = {kind: dataclasses.replace(CFG, recompute=kind) for kind in ("none", "selective", "full")}
for kind, cfg in kinds.items():
    told, seen = memory.predict(MODEL, MeshConfig(), cfg).peak, record(cfg, steps=2).peak_bytes
    print(f"{kind:10} peak predicted {told:>9,}  measured {seen:>9,}  off {told / seen - 1:+.1%}")

# %% [markdown]
# ## Smaller micro-batches
#
# Activations also shrink with the micro-batch: 8 sequences as 8 micro-batches of one, whose
# gradients add up, give the same step (in exact arithmetic) with an eighth of the activations.
#
# **Predict** the peak of the run below: state stays. Which of the parts in the table falls by 8?

# %%
for size in (8, 4, 2, 1):
    cfg = dataclasses.replace(CFG, micro_batch_size=size)
    meter = record(cfg, steps=2)
    said = memory.predict(MODEL, MeshConfig(), cfg)
    print(f"micro-batch of {size}: state {said.state:>9,}  activations {said.activations:>9,}"
          f"  peak predicted {said.peak:>9,}  measured {meter.peak_bytes:>9,}")

# %% [markdown]
# Activations fall in proportion, state does not move: at one sequence it is most of the memory.
# What the peak has beyond the two are temporaries, such as the gradient of the logits, which fall
# as well.
#
# ## Read the code
#
# The plain path of recomputation is one autograd function: forward keeps inputs, backward runs the
# module again. Reading is the point here:

# %%
import inspect

from picotron_lab import recompute

print(inspect.getsource(recompute.run_twice))

# %% [markdown]
# The module's contract: what each kind keeps and what it computes again, as formulas, beside what
# the meter and a counter of operations saw (`python -m picotron_lab.recompute`).

# %%
recompute.main()
