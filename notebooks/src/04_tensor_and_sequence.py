# %% [markdown]
# # Tensor and sequence parallelism, region by region
#
# A layer of a large model may be too much for one GPU. Tensor parallelism (TP) gives every rank a
# part of every matrix; sequence parallelism (SP) then also gives it a part of the tokens, wherever
# TP leaves them whole. This page asks one question again and again: **who holds what?**
#
# Four ranks run as threads of this process, so one cell can show the tensors of all of them. The
# pictures are not drawn from a plan: each rank's tensor is searched for in the tensor of one
# device, value by value, and a field is coloured where it was found.
#
# *Before you run the first cell:* a block has seven matrices. $W_q, W_k, W_v$ and $W_o$ belong to
# attention, gate, up and down to the MLP. Which of them would you cut by rows, which by columns?
# And what if 4 ranks share only 2 key/value heads?
# %%
import start  # finds picotron_lab, shows figures in the page
import inspect

import torch

from picotron_lab import mesh, sequence_parallel, sharding, tensor_parallel
from picotron_lab.analysis import shard_plots
from picotron_lab.config import MeshConfig, ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value

CFG = ModelConfig("small", vocab_size=16, hidden_size=8, layers=1, heads=4, kv_heads=2, ffn_size=12)
N, T = 4, 8


def make(world=None, sequence=False):
    """The same model on one device (no world), or this rank's part of it."""
    with torch.device("meta"):
        model = Llama(CFG)
    sharding.attach(model)
    if world is not None:
        mine = mesh.build(world, MeshConfig(tp=world.size), CFG.kv_heads)
        tensor_parallel.parallelize(model, mine.tp, mine.kv, "plain")
        tensor_parallel.split_head(model, mine.tp)
        if sequence:
            sequence_parallel.parallelize(model, mine.tp, "plain")
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    return model


def weights(world=None):
    names = ("q", "k", "v", "o", "gate", "up", "down")
    return {n.split(".")[-2]: p.detach() for n, p in make(world).named_parameters()
            if n.split(".")[-2] in names}


DIMS = {"q": ("H C", "D"), "k": ("K C", "D"), "v": ("K C", "D"), "o": ("D", "H C"),
        "gate": ("F", "D"), "up": ("F", "D"), "down": ("D", "F")}
whole, parts = weights(), run_ranks(weights, N)
held = [shard_plots.found(name, DIMS[name], [mine[name] for mine in parts], whole[name])
        for name in DIMS]
shard_plots.holdings(held, "Weights of a block on 4 ranks, [outputs, inputs]: tensor parallelism")
# %% [markdown]
# $D$ is the width of the model, $F$ that of the MLP; $H$ query heads and $K$ key/value heads are
# $C$ wide each. What enters a region (q, k, v, gate, up) is cut by its outputs; what leaves it (o,
# down) is cut by its inputs. (`nn.Linear` stores $W^T$, so the paper's *columns* are rows of these
# pictures.) Two key/value heads do not suffice for four ranks: ranks 0 and 1 hold the same one, as
# do 2 and 3, and each uses it for the one query head that it has.
#
# ## Why this cut, and no other
#
# For an MLP without its gate (Megatron-LM, 1909.08053, section 3):
#
# $$\mathrm{act}\big(x\,[W_1\; W_2]\big)\begin{bmatrix}U_1\\U_2\end{bmatrix}
#   = \mathrm{act}(x W_1)\,U_1 + \mathrm{act}(x W_2)\,U_2,\qquad
#   x\,[T, D],\; W_r\,[D, F/n],\; U_r\,[F/n, D]$$
#
# The activation works element by element, so it does not mind that another rank has the other
# columns. Nothing of width $F$ travels: one sum of $[T, D]$ at the end joins the ranks. Cut the
# first matrix by its *inputs* instead, and each rank has only a term of each element when it comes
# to act; as act(a + b) is not act(a) + act(b), there would be a sum before it as well.
# %%
dice = torch.Generator().manual_seed(0)
x_TD, w_DF, u_FD = (torch.randn(*shape, generator=dice).double()
                    for shape in ((T, 8), (8, 12), (12, 8)))


def mlp(axis):
    w, u = w_DF.chunk(axis.size, 1)[axis.rank], u_FD.chunk(axis.size, 0)[axis.rank]
    term_TD = torch.relu(x_TD @ w) @ u
    return term_TD, axis.all_reduce(term_TD)


one_device = torch.relu(x_TD @ w_DF) @ u_FD
for rank, (term, total) in enumerate(run_ranks(mlp, N)):
    print(f"rank {rank}: its term {term[0, 0]:+.4f}, after the sum {total[0, 0]:+.4f}; "
          f"largest difference from one device {(total - one_device).abs().max():.0e}")
print(f"one device:                              {one_device[0, 0]:+.4f}")
# %% [markdown]
# ## The border of a region, forward and backward
#
# Between *enter* and *leave* lies a region in which each rank has its own columns. Two autograd
# functions stand at its border. The paper calls them $f$ and $g$; each is the other's dual:
# %%
print(inspect.getsource(tensor_parallel.Enter))
print(inspect.getsource(tensor_parallel.Leave))
# %% [markdown]
# Entering sends nothing forward. *Predict:* what happens if one leaves `Enter` out? The loss stays
# right, on all ranks. But the gradient of $x$ on a rank is then only what flows back through its
# own columns, and whatever is below the region (the norm, the layers before, the embedding) learns
# from a part of the layer. It is the usual bug of a first try, and a loss curve may look healthy.
# %%


def gradient_of_x(axis, enter):
    x = x_TD[None].clone().requires_grad_()
    w, u = w_DF.chunk(axis.size, 1)[axis.rank], u_FD.chunk(axis.size, 0)[axis.rank]
    inside = tensor_parallel.Enter.apply(x, axis) if enter else x
    y = tensor_parallel.Leave.apply(torch.relu(inside @ w) @ u, axis)
    y.square().sum().backward()
    return x.grad[0]


x_right = x_TD.clone().requires_grad_()
(torch.relu(x_right @ w_DF) @ u_FD).square().sum().backward()
for enter in (True, False):
    grads = run_ranks(gradient_of_x, N, enter)
    norms = ", ".join(f"{grad.norm():.2f}" for grad in grads)
    off = max((grad - x_right.grad).norm() / x_right.grad.norm() for grad in grads)
    print(f"{'with' if enter else 'without':7} Enter: norm of dx on ranks 0 to 3: {norms}; "
          f"worst relative error {off:.0e}")
print(f"one device: {x_right.grad.norm():.2f}")
# %% [markdown]
# ## Activations, region by region
#
# Now a whole block. Hooks note what passes at ten places of the plain model and of the parallel
# one.
#
# *Predict:* which of these tensors does TP make smaller on each rank?
# %%
PLACES = {  # name -> (module of a block, which tensor of it, dims)
    "into the block": ("attention_norm", "in", "D"), "norm": ("attention_norm", "out", "D"),
    "queries": ("attention.core", 0, "H C"), "keys": ("attention.core", 1, "K C"),
    "heads' outputs": ("attention.core", "out", "H C"),
    "after o and g": ("attention_dropout", "in", "D"), "norm 2": ("mlp_norm", "out", "D"),
    "gate": ("mlp.activation", "in", "F"), "silu(gate) up": ("mlp.activation", "out", "F"),
    "after down and g": ("mlp_dropout", "in", "D"),
}


def activations(world=None, sequence=False):
    """{place: [tokens, features]} of one sequence."""
    model, seen = make(world, sequence), {}
    for name, (path, which, _) in PLACES.items():
        def note(module, inputs, out, name=name, which=which):
            x = out if which == "out" else inputs[0 if which == "in" else which]
            seen[name] = x.detach().flatten(2)[0]
        model.layers[0].get_submodule(path).register_forward_hook(note)
    model(torch.arange(T)[None])
    return seen


def region_by_region(parts, title):
    held = [shard_plots.found(name, ("T", dim), [mine[name] for mine in parts], whole[name])
            for name, (_, _, dim) in PLACES.items()]
    return shard_plots.holdings(held, title, columns=5)


whole, alone = activations(), run_ranks(activations, N)
region_by_region(alone, "Activations of a block, tensor parallelism: grey is on every rank")
# %% [markdown]
# Inside the regions each rank has 1/4 of the width (and keys once per *two* ranks). Outside, the
# residual stream and the norms are grey: all ranks hold all of them, and all compute the same. And
# between `o` and `g`? There each rank holds a whole tensor that is no part of the right one, but
# a term of it:
# %%
def before_leave(world):
    model, terms = make(world), []
    crossing = model.layers[0].mlp.crossing  # attention and MLP of a block share it
    leave = crossing.leave
    crossing.leave = lambda y_BTD: terms.append(y_BTD.detach()[0]) or leave(y_BTD)
    model(torch.arange(T)[None])
    return terms


attention, mlp_terms = zip(*run_ranks(before_leave, N), strict=True)
held = [shard_plots.found("before g, attention", ("T", "D"), attention, whole["after o and g"]),
        shard_plots.found("before g, MLP", ("T", "D"), mlp_terms, whole["after down and g"])]
shard_plots.holdings(held, "Just before the sums")
# %% [markdown]
# ## Sequence parallelism: the rest is cut by tokens
#
# Norms, dropout and the residual stream never look at another token. So each rank may keep $T/n$
# tokens of them (Korthikanti et al., 2205.05198, section 4.2.2). An all-reduce is a reduce-scatter
# followed by an all-gather; the border takes the two apart, and sends no more than before:
#
# | | forward | backward |
# |---|---|---|
# | TP enter ($f$) | nothing | all-reduce |
# | TP leave ($g$) | all-reduce | nothing |
# | SP enter | all-gather along $T$ | reduce-scatter along $T$ |
# | SP leave | reduce-scatter along $T$ | all-gather along $T$ |
#
# *Predict* how the picture changes: which fields stay as they are?
# %%
both = run_ranks(activations, N, True)
region_by_region(both, "The same with sequence parallelism: nothing is on every rank")
# %%
def most(parts):
    """Numbers of the ten tensors on the fullest rank."""
    return max(sum(x.numel() for x in mine.values()) for mine in parts)


print("numbers in these ten tensors, of the rank that holds most")
for name, parts in (("one device", [whole]), ("TP", alone), ("TP and SP", both)):
    print(f"{name:12} {most(parts):5}   1/{most([whole]) / most(parts):.2f} of one device")
print(inspect.getsource(sequence_parallel.SequenceCrossing))
# %% [markdown]
# Only keys keep it from being exactly 1/4: two ranks share a head. Nothing that lives outside is
# whole any more. What is the price?
#
# ## What goes over the wire
#
# On a ring of $n$ ranks an all-reduce of $S$ bytes makes each rank send $2\frac{n-1}{n}S$, an
# all-gather or a reduce-scatter half of that. *Predict:* does SP send more than TP, and where?
# Mind that the first matmul of a region needs the gathered $x$ again for its weight's gradient. To
# save it would undo the gain, so each rank saves its shard and gathers once more in backward.
# %%
(regions, B, length, D, width), n = tensor_parallel.DEMO, 4
S = 4 * B * length * D
told = {"TP": tensor_parallel.contract(regions, S),
        "TP and SP": sequence_parallel.contract(regions, S, n, "plain")}
crossings = {"TP": (tensor_parallel.Crossing, length),
             "TP and SP": (sequence_parallel.SequenceCrossing, length // n)}
for name, predicted in told.items():
    measured = run_ranks(tensor_parallel.demo, n, *crossings[name])[0]
    found = {key: measured[key] for key in predicted}
    wires = [sequence_parallel.on_wire(counts, n) for counts in (predicted, found)]
    for direction in ("forward", "backward"):
        print(f"{name:10} {direction:9} predicted {wires[0][direction] / S:.2f} S, "
              f"measured {wires[1][direction] / S:.2f} S on the wire of a rank, {regions} regions")
# %% [markdown]
# Forward costs the same, to the byte. Backward costs half as much again.
#
# ## The gradient that is easily forgotten
#
# Under SP a norm's weight is on all ranks, but each rank's norm has seen only $T/n$ tokens. Its
# gradient is a term, and has to be summed over tp. No file here says "if it is a norm ...": the
# parameter's record says over which axes its gradient is partial, and one function reduces by it.
# %%
LABELS = torch.arange(1, T + 1)[None] % CFG.vocab_size


def norm_gradients(world=None, sequence=False):
    model = make(world, sequence)
    model(torch.arange(T)[None], LABELS).backward()
    weight = model.layers[0].mlp_norm.weight
    before = weight.grad.clone()
    if world is not None:
        tp = mesh.build(world, MeshConfig(tp=world.size), CFG.kv_heads).tp
        sharding.reduce_gradients(model.parameters(), {"tp": tp})
    return before, weight.grad, weight.record.partial


right = norm_gradients()[0]
for sequence in (False, True):
    seen = run_ranks(norm_gradients, N, sequence)
    print(f"{'TP and SP' if sequence else 'TP'}: partial over {seen[0][2] or 'nothing'}")
    for when, i in (("before", 0), ("after", 1)):
        off = max((grads[i] - right).norm() / right.norm() for grads in seen)
        print(f"  worst relative error of a rank's gradient {when} reduce_gradients: {off:.0e}")
# %% [markdown]
# ## At the size where it matters
#
# Llama 3 70B in bfloat16, predicted by the closed forms that the tests compare with measurements.
# However many ranks there are, TP alone stays above what it leaves whole; with SP all of it falls
# as $1/n$. (Weights are cut the same way in both.) The limit of $n$ is the node: these messages lie
# between matmuls that need them, and a slow network cannot hide them.
# %%
from picotron_lab.analysis import memory_plots
from picotron_lab.config import PRESETS, TrainConfig

memory_plots.tensor_parallel_activations(
    PRESETS["llama3-70b"], (2048, 8192, 32_768), (1, 2, 4, 8),
    TrainConfig(1, 1, 4096, dtype="bfloat16"))
# %% [markdown]
# ## Is it still the same model?
#
# Plain SGD with a large learning rate, float64, five steps. AdamW would hide a gradient that is
# twice too large; SGD does not.
# %%
from picotron_lab.trainer import Trainer

run = TrainConfig(4, 4, 32, steps=5, optimizer="sgd", lr=0.5, warmup_steps=0, clip=0,
                  dtype="float64", impl="plain", data="../README.md")  # a small text
model = ModelConfig("small", hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48)


def losses(world, sequence):
    sizes = MeshConfig(tp=world.size, sequence_parallel=sequence)
    trainer = Trainer(model, sizes, run, world)
    return [trainer.train_step(step)["loss"] for step in range(run.steps)]


plain = run_ranks(losses, 1, False)[0]
print("one device", *(f"{loss:.6f}" for loss in plain))
for sequence in (False, True):
    found = run_ranks(losses, N, sequence)[0]
    worst = max(abs(a - b) for a, b in zip(found, plain, strict=True))
    print(f"{'TP 4, SP' if sequence else 'TP 4':10}", *(f"{loss:.6f}" for loss in found),
          f"  largest difference {worst:.0e}")
# %% [markdown]
# ## The contracts
#
# What each technique promises: calls and bytes, as formulas, predicted and measured. To go on:
# `picotron_lab/tensor_parallel.py` and `picotron_lab/sequence_parallel.py`, top to bottom, and
# their fused paths, which hide these transfers behind the matmuls next to them.
# %%
tensor_parallel.main()
print()
sequence_parallel.main()
