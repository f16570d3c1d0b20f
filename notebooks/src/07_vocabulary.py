# %% [markdown]
# # The vocabulary: when the last stage is twice as slow as the others
#
# A pipeline gives every stage equally many layers. But the first also has the embedding, and
# the last the output layer and the loss: for each token as many products as there are words. The
# slowest stage sets the pace of all.
#
# The first cell predicts the time of each rank for a model of 32 layers on 8 A100, with 256,000
# words (a row of Table 5 in Yeung et al., 2411.05288). *Before you run it:* how many of the 4
# layers of a stage does the output layer cost? And could one repair it by giving the last rank
# fewer?
# %%
import start  # finds picotron_lab, shows figures in the page
import inspect

import torch
import torch.nn.functional as F

from benchmarks.published_rows import vocabulary
from picotron_lab.analysis import plots, shard_plots, speed_plots
from picotron_lab.lab import run_ranks

table = vocabulary("1f1b")
rows = {row.name: row for row in table.rows}


def runs(words):
    """Our nearest runs to three rows of the paper."""
    names = {"even": "baseline", "balanced": "redistribution", "vocabulary parallel": "vocab-2"}
    found = {name: rows[f"8 GPUs, 2048 tokens, {kind}, {words}"] for name, kind in names.items()}
    return {name: speed_plots.Run(row.model, row.mesh, row.cfg) for name, row in found.items()}


speed_plots.imbalance(runs("256k"), table.hardware)
# %% [markdown]
# *Even*: the last rank needs far longer than the mean, and seven ranks wait for it in every
# micro-batch. *Balanced*: it has no layer at all, and is still the slowest; layers are whole, so
# the rest does not come out even either. *Vocabulary parallel*: each rank has 1/8 of the words.
#
# ## How large is it?
#
# A token costs 6 operations per weight: an output layer $6DV$, a layer of the paper's model
# $72 D^2 + 12 D T$, with the scores of attention. Their ratio is $V/(12 D + 2 T)$. Ours, with
# a gated MLP, counts its weights one by one:
# %%
from dataclasses import replace

from picotron_lab.analysis.cost import flops_per_token

T = 2048
for words in (32_000, 64_000, 128_000, 256_000):
    cfg = runs("256k")["even"].model
    layer = flops_per_token(replace(cfg, layers=1, vocab_size=0), T)
    head = flops_per_token(replace(cfg, layers=1, vocab_size=words), T) - layer
    formula = words / (12 * cfg.hidden_size + 2 * T)
    print(f"{words // 1000:3}k words: the output layer costs {head / layer:.2f} layers, "
          f"V/(12 D + 2 T) = {formula:.2f}; a stage has {cfg.layers // 8}")
# %% [markdown]
# ## Split the words
#
# Rank $k$ of $n$ gets $R = \lceil V/n \rceil$ rows of the embedding and of the output layer. It can
# then compute the logits of its own words, for all tokens. The picture is made from real tensors:
# each rank's weights and logits are searched for in those of one device.
# %%
from picotron_lab import sharding, vocab_parallel
from picotron_lab.config import ModelConfig
from picotron_lab.model import Llama, initial_value

CFG = ModelConfig("small", vocab_size=18, hidden_size=8, layers=1, heads=2, kv_heads=2, ffn_size=8)
N, TOKENS = 4, torch.arange(6)[None]
X_BTD = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).double()


def words_of(axis=None):
    """Embedding, output layer, and logits of these tokens: on one device, or on this rank."""
    with torch.device("meta"):
        model = Llama(CFG)
    sharding.attach(model)
    if axis is not None:
        vocab_parallel.parallelize(model, axis, "plain", "1")
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    head = model.head.weight.detach()
    return model.embed.weight.detach(), head, (X_BTD @ head.T)[0]


whole, parts = words_of(), run_ranks(words_of, N)
names = {"embedding": ("V", "D"), "output layer": ("V", "D"), "logits": ("tokens", "V")}
held = [shard_plots.found(name, dims, [mine[i] for mine in parts], whole[i])
        for i, (name, dims) in enumerate(names.items())]
shard_plots.holdings(held, "18 words on 4 ranks: 5, 5, 5 and 3")
# %% [markdown]
# ## A softmax of which each rank has a part
#
# The logits never travel: [tokens, $V$] is the largest tensor of all. The loss of a token is
# $\log \sum_j e^{y_j} - y_{\text{label}}$, and three numbers from each rank suffice for it: its
# largest logit $m$, the sum $s$ of $e^{y - m}$ over its words, and the label's logit $z$, if the
# label is one of its words.
#
# $$M = \max_k m_k,\qquad S = \sum_k s_k\, e^{m_k - M},\qquad
#   \text{loss} = \log S + M - \sum_k z_k$$
#
# *Predict:* the label is word 7. Which rank has a $z$ other than 0?
# %%
LABEL = torch.tensor([7])


def statistics(axis):
    logits = 40 * run_part(axis)
    shard = vocab_parallel.Shard(axis, 18, fused=False)
    mine = vocab_parallel.Torch.statistics(logits, shard.local(LABEL))
    return mine, vocab_parallel.merge(axis.all_gather(mine), axis.size)


def run_part(axis):
    """Logits [1, R] of the first token."""
    return words_of(axis)[2][:1]


seen = run_ranks(statistics, N)
largest, total, z = seen[0][1]
for rank, (mine, _) in enumerate(seen):
    m, s, z_mine = (number.item() for number in mine)
    share = s * (m - largest).exp().item() / total.item()
    print(f"rank {rank}: m {m:6.3f}  s {s:.3f}  z {z_mine:6.3f}  "
          f"has {share:.3f} of the softmax")
print(f"together: M {largest.item():6.3f}  S {total.item():.3f}  z {z.item():6.3f}  "
      f"loss {(total.log() + largest - z).item():.12f}")
print(f"one device, F.cross_entropy:            loss "
      f"{F.cross_entropy(40 * whole[2][:1], LABEL).item():.12f}")
# %% [markdown]
# ## Two passes, and how often ranks wait for each other
#
# The last stage cannot begin its backward before it knows $dX = D\,W$, where $D$ is softmax minus
# onehot and every rank has a term of it. How often must all ranks have finished something before
# the next thing can begin? The paper (sections 3 and 4) counts these **barriers**:
#
# | | pass S | barrier | pass T | barrier |
# |---|---|---|---|---|
# | naive | logits, max | max, then sums: 2 | $dX$, $dW$ | $dX$ |
# | Algorithm 1 | logits, $m$, $s$, $z$ | all three at once | $dX$, $dW$ | $dX$ |
# | Algorithm 2 | the same, and $A = P W$, own softmax $P$ | all three, **and $dX$** | $dW$ | none |
#
# Algorithm 2 turns the order around: it multiplies with the weight *before* it knows the sums, and
# rescales each row of the product afterwards, by one number per token. Then only the optimizer
# waits for T, which may run at any time.
# %%
print(inspect.getsource(vocab_parallel.Algorithm1))
print(inspect.getsource(vocab_parallel.Passes.t_pass))
print(inspect.getsource(vocab_parallel.Algorithm2))
# %% [markdown]
# Passes can be called one by one, as a schedule does. *Predict* for each algorithm how many calls
# of `all_reduce` and `all_gather` a rank makes. (A call is not yet a barrier: Algorithm 2 makes its
# second one directly after the first, and nobody has to compute in between.)
# %%
dice = torch.Generator().manual_seed(1)
x_ND, w_VD = (torch.randn(rows, 8, generator=dice).double() for rows in (12, 18))
labels_N = torch.randint(18, (12,), generator=dice)


def pass_by_pass(axis, algorithm):
    shard = vocab_parallel.Shard(axis, 18, fused=False)
    mine = slice(*shard.bounds)
    passes = vocab_parallel.ALGORITHMS[algorithm](shard, x_ND, w_VD[mine], labels_N, 1.0)
    dw_RD = torch.zeros_like(w_VD[mine])
    passes.s_pass()
    loss = passes.c1()
    if algorithm == "2":  # dX first: T can wait
        dx_ND = passes.c2()
    passes.t_pass(dw_RD)
    return loss, dx_ND if algorithm == "2" else passes.c2(), dw_RD, axis.ledger


x, w = x_ND.clone().requires_grad_(), w_VD.clone().requires_grad_()
right = F.cross_entropy(x @ w.T, labels_N, reduction="sum")
right.backward()
for algorithm in vocab_parallel.ALGORITHMS:
    seen = run_ranks(pass_by_pass, N, algorithm)
    dw_VD = torch.cat([rank[2] for rank in seen])
    pairs = (seen[0][0], right), (seen[0][1], x.grad), (dw_VD, w.grad)
    off = max((a - b).abs().max() for a, b in pairs)
    barriers, calls, _ = vocab_parallel.contract(algorithm, 12, 8, N)
    print(f"{algorithm:5} barriers: {barriers}; calls predicted {calls}, measured "
          f"{len(seen[0][3].calls)};  loss, dX, dW differ from one device by {off:.0e} at most")
# %% [markdown]
# ## S and T in a schedule
#
# Four stages, six micro-batches, and an output layer that costs one and a half stages. F, B and W
# of a stage take 1 each. Whole on the last stage, the output layer makes it 2.5 times as slow.
# Shared out, its three matmuls are $1.5 \cdot 3/4 = 1.125$ for each rank: S has one of them and T
# two, or with Algorithm 2 the other way round.
#
# *Predict* the makespan of the first: the last stage does its $2.5 \cdot 3$ six times, one after
# the other, after three forwards and before three backwards of the other stages.
# %%
from picotron_lab.analysis.timeline import metrics
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate

P, M = 4, 6


def timeline(name, **times):
    costs = Costs(**{"F": 1.0, "B": 1.0, "W": 1.0, **times})
    options = Options(costs=costs) if "vocab" in name else Options()
    return simulate(build(name, P, M, options), costs)


third, ends = 1.5 / P, {"IF": 0.05, "IB": 0.05}
lines = [
    ("1F1B, output layer on the last stage", timeline("1f1b", factors=(1.0, 1.0, 1.0, 2.5))),
    ("Algorithm 1", timeline("1f1b-vocab1", S=third, T=2 * third, **ends)),
    ("Algorithm 2", timeline("1f1b-vocab2", S=2 * third, T=third, **ends)),
]
print(f"the first, by hand: 3 + 6 * 7.5 + 3 * 2 = {3 + M * 7.5 + 3 * 2}")
plots.compare(lines)
# %% [markdown]
# The work is the same in all three. In the first most of it waits in line before rank 3. In the
# others every rank has its S and T (violet, numbers are micro-batches) between forwards and
# backwards. (The gaps at the start and the end become small beside many micro-batches.)
#
# Look at rank 3: between its forward of a micro-batch and its backward lies S, and with Algorithm 1
# also T, of *all* ranks. In that time it does something else: so more micro-batches are in flight.
# *Predict* how many, from the number of barriers.
# %%
for (name, line), barriers in zip(lines, (0, 2, 1), strict=True):
    print(f"{name:38} predicted p + barriers = {P + barriers}, "
          f"simulated peak of each rank {metrics(line).peak_until_W}")
# %% [markdown]
# That is the price: one or two more micro-batches of activations. (The naive form would need
# three.) In return no rank holds a whole vocabulary layer.
#
# ## Against the number of words
#
# Published MFU on 8 A100, Table 5, beside our prediction of each row. (The paper divides by 320
# TFLOP/s, and so do we here. Some of these rows helped to choose the constants of our model;
# `python benchmarks/published.py` says which, and shows all others.)
#
# *Predict:* does MFU fall with the vocabulary because the hardware works less, or because the
# operations of the output layer do not count?
# %%
from picotron_lab.analysis.step_time import predict


def line_of(method):
    """(words, predicted, published) of a method."""
    chosen = [row for row in table.rows if row.name.startswith(f"8 GPUs, 2048 tokens, {method},")]
    steps = [predict(row.model, row.mesh, row.cfg, table.hardware) for row in chosen]
    return [(row.model.vocab_size, table.value(step), row.published)
            for row, step in zip(chosen, steps, strict=True)]


said = shard_plots.Lines("8 A100, 32 layers, 2048 tokens: MFU against the vocabulary",
                         "words of the vocabulary", "MFU (%)")
methods = {method: line_of(method) for method in ("baseline", "redistribution", "vocab-2")}
shard_plots.by_vocabulary(methods, said)
# %%
for method, points in methods.items():
    (_, few, few_seen), (_, many, many_seen) = points[0], points[-1]
    print(f"{method:14} from 32k to 256k words: predicted {few:.1f} -> {many:.1f} %, "
          f"published {few_seen:.1f} -> {many_seen:.1f} %")
# %% [markdown]
# They do count. The hardware waits: with 256k words seven of eight ranks stand still for more than
# half of the time. Shared out, the vocabulary is just more of the work that all ranks do.
#
# ## Is it still the same model?
#
# A small Llama in float64 with SGD: one device, four stages, four stages with a shared vocabulary;
# and how many parameters each rank holds.
# %%
from picotron_lab.config import MeshConfig, TrainConfig
from picotron_lab.trainer import Trainer

run = TrainConfig(8, 1, 32, steps=4, optimizer="sgd", lr=0.5, warmup_steps=0, clip=0,
                  dtype="float64", impl="plain", data="../README.md")  # a small text
model = ModelConfig("small", hidden_size=32, layers=4, heads=4, kv_heads=2, ffn_size=48)


def train(world, sizes):
    trainer = Trainer(model, sizes, run, world)
    count = sum(p.numel() for p in trainer.model.parameters())
    return [trainer.train_step(step)["loss"] for step in range(run.steps)], count


plain = run_ranks(train, 1, MeshConfig())[0][0]
print("one device      ", *(f"{loss:.6f}" for loss in plain))
for schedule in ("1f1b", "1f1b-vocab1", "1f1b-vocab2"):
    seen = run_ranks(train, P, MeshConfig(pp=P, schedule=schedule))
    worst = max(abs(a - b) for a, b in zip(seen[0][0], plain, strict=True))
    print(f"{schedule:16}", *(f"{loss:.6f}" for loss in seen[0][0]),
          f"  largest difference {worst:.0e}; parameters of ranks {[count for _, count in seen]}")
# %% [markdown]
# ## The contract
#
# Barriers, calls, payload and peak memory of each algorithm; predicted, then measured. To go on:
# `picotron_lab/vocab_parallel.py`, then `picotron_lab/schedules/vocab.py` for the order of passes;
# `python run.py schedule 1f1b-vocab2 --pp 4 --microbatches 8 --plot vocab.png` draws others.
# %%
vocab_parallel.main()
