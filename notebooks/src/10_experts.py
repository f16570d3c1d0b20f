# %% [markdown]
# # Experts: tokens that travel
#
# A mixture of experts has $E$ MLPs in each layer, and a token goes through $k$ of them. A router, a
# small matrix, chooses. So the model has many more weights than a token meets: more to know for the
# same work. All $E$ want room, though; expert parallelism (EP) gives each of $n$ ranks $E/n$ of
# them, and as each rank has other tokens, it is the tokens that move (GShard, 2006.16668).
#
# The first cell lets 4 ranks route 48 tokens each to 2 of 8 experts. Tokens of a real model
# resemble each other, so these do, too. *Before you run it:* what would the mean be, and how far
# from it may the busiest expert be, if nobody has trained the router?
# %%
import start  # finds picotron_lab, shows figures in the page
import inspect
from dataclasses import replace

import torch
from torch import nn

from picotron_lab import expert_parallel, router, sharding
from picotron_lab.analysis import shard_plots
from picotron_lab.config import ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.model import MoE, initial_value

N, B, T, E = 4, 4, 12, 8
CFG = ModelConfig("small", hidden_size=16, ffn_size=24, experts=E, top_k=2)


def layer(axis=None):
    """One layer of experts, all of them or those of this rank."""
    with torch.device("meta"):
        model = nn.Sequential(MoE(CFG))
    sharding.attach(model)
    if axis is not None:
        expert_parallel.parallelize(model, axis, "plain")
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    return model


def tokens(rank):
    """This rank's own: noise around a common direction."""
    dice = torch.Generator().manual_seed(rank)
    common = torch.randn(16, generator=torch.Generator().manual_seed(99))
    return (common + torch.randn(B, T, 16, generator=dice)).double()


def choices(axis):
    chosen = layer(axis)[0].router(tokens(axis.rank))[0]
    return chosen.flatten().bincount(minlength=E).tolist()


HOMES = [rank for rank in range(N) for _ in range(*sharding.share_out(E, N, rank))]
counts = run_ranks(choices, N)
shard_plots.routing(counts, HOMES, f"{N} ranks route {B * T} tokens each to 2 of {E} experts")
# %% [markdown]
# Below, a row is a rank with its tokens, a column an expert; black lines separate the experts of
# one rank from those of the next. Above are the sums: what an expert has to compute. The mean is
# $4 \cdot 48 \cdot 2 / 8 = 48$. The rank with the busiest experts sets the pace of all others, for
# they wait for its results.
#
# ## What a router does
#
# Scores are a softmax over $W x$; the $k$ largest win, and their scores, divided by their sum,
# become the weights of the experts' outputs (the *gates*). For three tokens of rank 0:
# %%
plain = layer()[0]
x_BTD = tokens(0)
score_TE = torch.nn.functional.linear(x_BTD, plain.router.weight).softmax(-1)[0].detach()
chosen, gates = plain.router(x_BTD)
for t in range(3):
    told = " ".join(f"{score:.3f}" for score in score_TE[t].tolist())
    print(f"token {t}: scores {told} -> experts {chosen[t].tolist()}, "
          f"gates {[round(gate, 3) for gate in gates[t].tolist()]}")
print("\n" + inspect.getsource(router.choose))
# %% [markdown]
# ## There and back
#
# Four moves: *count* (every rank tells every rank how many rows it has for each expert), *dispatch*
# (a row per choice, sorted by expert, goes to the rank of that expert), *compute*, *combine* (rows
# go back the way they came, and a token adds up its $k$, weighted by the gates).
#
# The two journeys are all-to-alls whose parts are uneven: as long as the routing makes them.
# Nothing is padded. *Predict* from the picture how many rows rank 0 sends to rank 1.
# %%
table = torch.tensor(counts)


def deal(axis):
    found = expert_parallel.Deal.of(axis.all_gather(table[axis.rank][None]), axis)
    return found.send, found.receive


for rank, (send, receive) in enumerate(run_ranks(deal, N)):
    print(f"rank {rank}: sends {send} rows to ranks 0 to 3, receives {receive}; "
          f"its experts compute {sum(receive)} rows")
print("\n" + inspect.getsource(expert_parallel.run_plain))
# %% [markdown]
# ## The same as one device, forward and backward
#
# An expert gets the rows of *all* ranks, so its gradient is complete without any sum over ranks.
# That makes the commonest mistake so easy: data parallelism sums all gradients over these ranks,
# and would sum those of different experts, or count an expert $n$ times. The router is on all
# ranks, each with its own tokens; its gradient does want the sum.
# %%
def learn(axis=None):
    """(outputs, gradient of the router, gradients of the experts held here)."""
    model = layer(axis)
    mine = [tokens(axis.rank)] if axis is not None else [tokens(rank) for rank in range(N)]
    outputs = [model(x) for x in mine]
    sum(out.square().sum() for out in outputs).backward()
    experts = [p.grad for p in expert_parallel.expert_parameters(model)]
    return [out.detach() for out in outputs], model[0].router.weight.grad, experts


def off(found, right):
    """Largest difference over the largest number."""
    pairs = list(zip(found, right, strict=True))
    return max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)


outputs, router_grad, expert_grads = learn()
seen = run_ranks(learn, N)
print(f"outputs: relative error {off([rank[0][0] for rank in seen], outputs):.0e}")
mine = [grad for rank in seen for grad in rank[2]]
print(f"gradients of the experts, nothing summed: relative error {off(mine, expert_grads):.0e}")
for name, grad in (("of rank 0 alone", seen[0][1]), ("summed", sum(rank[1] for rank in seen))):
    print(f"gradient of the router, {name}: relative error {off([grad], [router_grad]):.0e}")
# %% [markdown]
# ## Left alone, few experts win
#
# An expert that is chosen more often learns more, and is chosen more often. We train a layer of 8
# experts on this project's README, with a large learning rate so that it shows soon, three times:
#
# * nothing done about it;
# * *bias* (DeepSeek-V3, 2412.19437, section 2.1.2): after each step an expert's bias rises by a
#   fixed speed if it had fewer tokens than the mean, and falls if it had more. The bias decides who
#   is chosen, never the gates: no gradient, no loss;
# * *balance loss*: loss + 0.05 · mean over sequences of $\sum_e f_e P_e$, where $f_e$ is how often
#   $e$ was chosen and $P_e$ its mean score; it is smallest when all are equal.
#
# The curve is what the busiest expert has, over the mean. *Predict* its largest possible value,
# with 2 of 8 experts for each token.
# %%
from picotron_lab.config import MeshConfig, TrainConfig
from picotron_lab.trainer import Trainer

model = ModelConfig("moe", hidden_size=32, layers=1, heads=2, kv_heads=2, ffn_size=32, experts=E)
run = TrainConfig(16, 16, 32, steps=80, lr=0.01, warmup_steps=0, data="../README.md")
ways = {"left alone": {}, "bias": {"balance_speed": 0.01}, "balance loss": {"balance_loss": 0.05}}


def train(world, changes):
    """(metrics of all steps, choices [B, T, k] in the last one)."""
    trainer, seen = Trainer(replace(model, **changes), MeshConfig(), run, world), []
    trainer.model.layers[0].mlp.router.register_forward_hook(
        lambda module, inputs, out: seen.append(out[0].unflatten(0, inputs[0].shape[:2])))
    return [trainer.train_step(step) for step in range(run.steps)], seen[-1]


trained = {name: run_ranks(train, 1, changes)[0] for name, changes in ways.items()}
busiest = {name: [(m["step"], m["busiest_expert"]) for m in metrics]
           for name, (metrics, _) in trained.items()}
said = shard_plots.Lines("The busiest of 8 experts while a small model learns", "step",
                         "its tokens / the mean")
shard_plots.curves(busiest, said, level=(1.0, "all alike"), marks=False)
# %%
for name, (metrics, _) in trained.items():
    late = [m["busiest_expert"] for m in metrics[-20:]]
    print(f"{name:13} mean over the last 20 steps: busiest / mean {sum(late) / 20:.2f}, "
          f"loss {sum(m['loss'] for m in metrics[-20:]) / 20:.3f}")
# %% [markdown]
# The ceiling is $E/k = 4$: two experts have everything, six are dead weight. In all runs that is
# where it goes first. (A loss so early says nothing yet about which way is better.)
#
# On four ranks this is not only a waste of experts: the same last step of the model that was left
# alone, its 16 sequences dealt to 4 ranks, is all work for one or two of them:
# %%
chosen = trained["left alone"][1]
counts = [rows.flatten().bincount(minlength=E).tolist() for rows in chosen.chunk(N)]
shard_plots.routing(counts, HOMES, "Left alone for 80 steps: who works?")
# %% [markdown]
# ## Capacity: drop what is too much
#
# The oldest answer (GShard, 2006.16668; Switch, 2101.03961, section 2.2): an expert takes at most
# $\lceil c \, T k / E \rceil$ tokens of a sequence, $c$ the capacity factor. Later ones are dropped
# there: that choice adds nothing. The buffers have a fixed size, and balance is enforced, but
# tokens lose experts. (MegaBlocks, 2211.15841, and this project by default drop nothing.)
#
# *Predict:* which share is dropped at $c = 1$ if the routing is perfectly even? And if two experts
# have everything?
# %%
FACTORS = [i / 4 for i in range(1, 18)]


def dropped(expert_BTk):
    """[(capacity factor, % of choices dropped)]."""
    cfgs = [replace(model, capacity_factor=factor) for factor in FACTORS]
    return [(cfg.capacity_factor, 100 * (~router.keep(expert_BTk, cfg)).float().mean().item())
            for cfg in cfgs]


lines = {name: dropped(expert_BTk) for name, (_, expert_BTk) in trained.items()}
lines["perfectly even"] = [(factor, 100 * max(0.0, 1 - factor)) for factor in FACTORS]
said = shard_plots.Lines("Choices that find their expert full, in the last step of each run",
                         "capacity factor c", "dropped choices (%)")
shard_plots.curves(lines, said)
# %% [markdown]
# Even routing loses nothing from $c = 1$ on. Where two of eight experts have all tokens, only $c/4$
# of the choices find room, and nothing short of $c = 4$ saves the rest; that is four times the
# buffers. Balance is what makes a small capacity affordable.
#
# ## Fewer messages: groups
#
# With many ranks a token's $k$ experts may lie on $k$ of them. DeepSeek-V3 limits that: experts
# form groups, a group lives on one node, and a token may choose from its best groups only.
# *Predict* the most ranks that a token can reach with 4 experts of 8 on 4 ranks, without groups and
# with 2 groups of 4 allowed.
# %%
many = replace(CFG, top_k=4)
for cfg in (many, replace(many, expert_groups=N, top_groups=2)):
    torch.manual_seed(0)
    score_BTE = torch.rand(1, 1000, E)
    expert_Nk = router.choose(score_BTE, cfg).flatten(0, 1)
    reached = expert_parallel.ranks_per_token(expert_Nk, E, N).bincount(minlength=N + 1).tolist()
    told = [f"{count} reach {ranks} ranks" for ranks, count in enumerate(reached) if count]
    print(f"{cfg.top_groups} of {cfg.expert_groups} groups: of 1000 tokens {', '.join(told)}")
# %% [markdown]
# ## A whole model
#
# Plain SGD, float64: one device, and four ranks with two experts each, bias and balance loss both
# on. Balance is counted over the global batch, so no mesh changes who is chosen.
# %%
exact = TrainConfig(8, 2, 32, steps=5, optimizer="sgd", lr=0.5, warmup_steps=0, clip=0,
                    dtype="float64", impl="plain", data="../README.md")
both = replace(model, balance_speed=0.01, balance_loss=0.05)


def losses(world):
    trainer = Trainer(both, MeshConfig(dp=world.size, ep=world.size), exact, world)
    return [trainer.train_step(step)["loss"] for step in range(exact.steps)]


one, four = run_ranks(losses, 1)[0], run_ranks(losses, N)[0]
for name, found in (("one device", one), ("dp 4, ep 4", four)):
    print(name, *(f"{loss:.6f}" for loss in found))
print(f"largest difference {max(abs(a - b) for a, b in zip(one, four, strict=True)):.0e}")
# %% [markdown]
# ## The contract
#
# Calls, bytes, rows and ranks, summed over four ranks; formulas, predicted, measured. To go on:
# `picotron_lab/router.py`, then `picotron_lab/expert_parallel.py`; its fused path computes the
# shared expert while rows travel.
# %%
expert_parallel.main()
