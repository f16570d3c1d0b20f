"""Planning: 640 GPUs and a model of 70 billion parameters. Which mesh, and why?"""

# %% [markdown]
# # 11 Planning: which mesh for 640 GPUs?
#
# Each technique of the pages before has a price and a use. On a real cluster one must choose all at
# once: sizes of dp, tp, cp and pp, a schedule, the stage of ZeRO, micro-batches, recomputation.
# Trying them costs GPU hours. Here they are *predicted*, on a laptop: memory from closed forms
# (`analysis/memory.py`), time from the shapes of all operations and messages on the hardware's data
# sheet, and from the simulated schedule (`analysis/step_time.py`).
#
# The question: Llama 3 70B, 640 H100, 512 sequences of 8192 tokens in a step (4 Mi tokens).
#
# **Predict first.** $640 = 2^7 \cdot 5$. Batch ($2^9$), sequence ($2^{13}$) and heads (64) share
# their powers of two out over dp, cp and tp. Which axis must take the 5? And of the five ways
# below: which do not fit into 80 GB, and what makes the slow ones slow?

# %%
import start  # finds picotron_lab, shows figures in the page

from picotron_lab.analysis import planner_plots, program_plots
from picotron_lab.analysis.hardware import hardware
from picotron_lab.analysis.planner import GIB, judge, plan, usable, why
from picotron_lab.analysis.planner_space import FAMILIES, Candidate, Question
from picotron_lab.config import PRESETS, MeshConfig

ASK = Question(PRESETS["llama3-70b"], 640, hardware("h100"), 8192, 512)
FAMILY = {family.name: family for family in FAMILIES}

def choice(size=1, recompute="none", v=1, **mesh):
    """The predictions for one mesh; `size`: sequences of a micro-batch."""
    config = MeshConfig(**mesh)
    family = FAMILY[config.schedule if config.pp > 1 else "1f1b"]
    return judge(ASK, Candidate(config, ASK.training(size, recompute), family, v))

sp = {"sequence_parallel": True}
by_hand = {
    "dp 128, pp 5": choice(dp=128, pp=5, zero=1),
    "the same, recomputed": choice(dp=128, pp=5, zero=1, recompute="full"),
    "dp 16, tp 8, pp 5": choice(dp=16, tp=8, pp=5, zero=1, **sp),
    "dp 8, cp 2, tp 8, pp 5": choice(dp=8, cp=2, tp=8, pp=5, zero=1, **sp),
    "dp 8, tp 4, pp 20": choice(dp=8, tp=4, pp=20, zero=1, **sp),
}
program_plots.weigh(by_hand, usable(ASK))

# %% [markdown]
# 5 divides only the 80 layers: pp must be a multiple of 5. (All five use 1F1B and ZeRO-1.) Left,
# the GPU that needs most; the dashed line is 90 % of an H100's memory, the rest belongs to
# CUDA and to what an allocator cannot use again. Right, where the time of the busiest rank goes.
# In numbers:

# %%
for name, one in by_hand.items():
    fits = "fits" if one.memory.peak <= usable(ASK) else "does not fit"
    waits = {part: round(t, 2) for part, t in one.time.exposed.items() if t > 0.05}
    print(f"{name:24} {one.memory.peak / GIB:6.1f} GiB, {fits:12} {one.time.seconds:6.2f} s, "
          f"bubble {one.time.bubble:5.1%}, waits in s: {waits}")

# %% [markdown]
# Line by line: 128 replicas leave a rank 4 micro-batches, too few for 5 stages, and all the state.
# Recomputation frees activations and takes time; the state stays. With tp 8 it all fits, but each
# rank has so little to compute that its messages no longer hide beneath it; cp 2 makes the
# pieces thinner still. With 20 stages tp 4 is enough, and the bubble grows. So what lies
# between them?
#
# ## Memory, as a formula
#
# With $\Psi$ parameters, of which a rank of tp and pp holds $\Psi / (TP \cdot PP)$, mixed precision
# keeps 2 bytes of weights, 4 of gradients (summed in 32 bit) and $4 + 8$ of master weights and
# AdamW's moments for each. ZeRO-1 shares the last 12 over the replicas:
#
# $$\frac{\Psi}{TP \cdot PP} \left(2 + 4 + \frac{12}{DP \cdot CP}\right)$$
#
# (1910.02054, section 5; the paper keeps gradients in 16 bit.) The first two are fixed by
# $TP \cdot PP$, whatever the number of GPUs. The ends of the pipeline hold the vocabulary as well,
# so the worst rank has somewhat more than this mean:

# %%
import torch

from picotron_lab.model import Llama

with torch.device("meta"):  # shapes without memory
    psi = sum(p.numel() for p in Llama(ASK.model).parameters())
for name, one in by_hand.items():
    mesh, held = one.candidate.mesh, one.memory
    mean = psi / (mesh.tp * mesh.pp) * (6 + 12 / (mesh.dp * mesh.cp)) / GIB
    state = (held.parameters + held.gradients + held.masters + held.moments) / GIB
    print(f"{name:24} formula {mean:5.1f} GiB, predicted for the worst rank {state:5.1f} GiB; "
          f"activations {held.activations / GIB:6.1f}")

# %% [markdown]
# ## The search
#
# How many ways are there? Every divisor of 640 for every axis, five schedules, four stages of ZeRO,
# five sizes of micro-batches, recomputation or not, and numbers of stages. For each a *bound* is
# cheap: it needs at least so much memory, and at least so many seconds. Those that cannot fit go.
# The rest is predicted in the order of the bounds, until the next bound is slower than the last
# choice wanted: then nothing better is left.

# %%
from picotron_lab.analysis.planner_show import table

found = plan(ASK, top=6)
print(table(found))

# %% [markdown]
# Equal rows are equal for the prediction: two sequences on two cp ranks are as much work as one on
# one. Then choose what is easier to run. **Predict:** the third row has less bubble than the first.
# Why is it slower all the same?

# %%
def label(one):
    mesh, size = one.candidate.mesh, one.candidate.cfg.micro_batch_size
    return f"dp {mesh.dp}, cp {mesh.cp}, tp {mesh.tp}, pp {mesh.pp}\n{mesh.schedule}, size {size}"

distinct = {round(one.time.seconds, 4): one for one in reversed(found.choices)}
shown = {label(one): one for one in reversed(distinct.values())}
program_plots.weigh(shown, usable(ASK))

# %%
first, *others = shown.values()
for other in others:
    print(label(other).replace("\n", ", "), why(first, other))

# %% [markdown]
# ## Speed against memory
#
# Every grey dot is a candidate at its bounds: at most so fast, with at least so much memory. (Only
# every third is drawn, and only those with up to 64 micro-batches, which are predicted quickly.) Of
# those that no other one's bounds beat, predictions make the blue line: along it, whoever wants to
# be faster needs more memory.

# %%
from picotron_lab.analysis.planner_bounds import Bounds
from picotron_lab.analysis.planner_space import candidates

bounds = Bounds(ASK)
some = [one for one in candidates(ASK, ASK.hardware.node) if one.rounds <= 64][::3]
pairs = [(bounds.memory(one), bounds.seconds(one)) for one in some]
best = planner_plots.frontier([*found.choices, *planner_plots.closest(found, some, pairs)])
share = ASK.batch * ASK.sequence_length / ASK.gpus  # tokens of a step for each GPU
program_plots.speeds([(size, share / t) for size, t in pairs], best, usable(ASK))

# %% [markdown]
# From right to left: cp 4 leaves thinner pieces to compute, recomputation does work twice, a deeper
# pipeline has more bubble. If a choice must leave room (longer sequences, other programs' buffers),
# read the line, not its end.
#
# ## The contract
#
# The search may skip candidates only because a bound never exceeds the prediction: bound of memory
# at most the predicted peak, bound of seconds at most the predicted step. And a plan is as good as
# its predictions, which err by some percent: `python run.py dryrun` with a choice's options runs
# the real program of one rank without data; then measure the first few.

# %%
from picotron_lab.analysis.planner_show import command

print("the contract: bound <= predicted")
for one in [*by_hand.values(), *shown.values()]:
    memory, seconds = bounds.memory(one.candidate), bounds.seconds(one.candidate)
    holds = memory <= one.memory.peak and seconds <= one.time.seconds
    print(f"{memory / GIB:6.1f} <= {one.memory.peak / GIB:6.1f} GiB   {seconds:5.2f} <= "
          f"{one.time.seconds:5.2f} s   {'holds' if holds else 'broken'}")
print(command(found.choices[0], ASK))
