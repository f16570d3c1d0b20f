# %% [markdown]
# # Ring and zigzag: one sequence on several ranks
#
# With long sequences the activations of a single sequence outgrow a GPU. Context parallelism gives
# each of $n$ ranks $1/n$ of its tokens, from embedding to loss. Only attention looks at other
# tokens: there the keys and values travel around a ring, while the queries stay at home.
#
# *Before you run the first cell:* 4 ranks hold 4 tokens each of a sequence of 16, in order. The
# mask is causal: a query sees keys up to its own position. How many scores does each rank compute?
# Who is done first, and can it go home?
# %%
import start  # finds picotron_lab, shows figures in the page
import inspect

import torch

from picotron_lab.analysis import shard_plots
from picotron_lab.context_parallel import chunks, make_core, pairs_of_chunks, positions
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore

N, LENGTH = 4, 16


def score_map(kind):
    """[queries][keys] of (rank, step): who computes a score, and in which step of the ring."""
    mine = run_ranks(lambda axis: positions(kind, LENGTH, axis).tolist(), N)
    home = {place: rank for rank, places in enumerate(mine) for place in places}
    return [[(home[q], (home[q] - home[k]) % N) if k <= q else None for k in range(LENGTH)]
            for q in range(LENGTH)]


shard_plots.score_map({kind: score_map(kind) for kind in ("ring", "zigzag")})
# %% [markdown]
# Colours say which rank computes a score, numbers in which step of the ring its key is there. On
# the left rank 0 has its diagonal in step 0, and then nothing ever again, while rank 3 has a whole
# block in every step. On the right each rank holds one early and one late chunk, and all counts are
# equal.
#
# Zigzag cuts the sequence into $2n$ chunks, and rank $r$ holds chunks $r$ and $2n-1-r$ (Llama 3,
# 2407.21783, section 3.3.2; a cyclic order does the same: Striped Attention, 2311.09431). A key
# chunk later than a query chunk is skipped, an earlier one is seen whole, the same one is a causal
# square. (A rank's tokens are no longer neighbours: rotary angles and the mask must ask for their
# `positions`. To count from 0 on every rank is the usual mistake.)
# %%
print(inspect.getsource(pairs_of_chunks))
for kind in ("ring", "zigzag"):
    for rank in range(N):
        told = [len(pairs_of_chunks(kind, rank, (rank - hop) % N, N, 4)) for hop in range(N)]
        print(f"{kind:7} rank {rank} holds chunks {chunks(kind, rank, N)}; "
              f"pairs of chunks it computes in steps 0 to {N - 1}: {told}")
# %% [markdown]
# ## Who works when
#
# The lab has a virtual clock: a rank's time passes only when it says that it computes, or when it
# waits for a message. It is a model, and a good one for questions of order. Below the library's own
# rings run on it, unchanged but for one thing: whenever a rank asks what to compute next, its clock
# advances by the scores that are to be computed, in units of a whole block of $T \times T$. The
# network brings a block of keys and values in 0.4 of that time. The plain path computes, then
# sends, then waits. The fused path sends on what it has before it computes.
#
# *Predict:* with $n = 4$, when is the plain ring done? Its last rank computes 3 whole blocks and
# half a one, and three messages come in between. And what is the least that zigzag could need?
# %%
from picotron_lab.clock import Network

T, MESSAGE = 8, 0.4
network = Network(bandwidth=2 * 4 * T * 4 / MESSAGE)  # k and v of T tokens, 4 float32 each


def scores(piece):
    queries, keys = (len(range(T)[part]) for part in (piece.queries, piece.keys))
    return queries * keys / 2 if piece.causal else queries * keys


def timed(axis, kind, impl):
    """When this rank computes in forward of one attention."""
    ring, spans = make_core(AttentionCore(), axis, impl, kind), []
    ask = ring.pieces

    def pieces(hops, queries):
        found, begun = ask(hops, queries), axis.now()
        axis.spend(sum(map(scores, found)) / T**2)
        source = (axis.rank - hops) % axis.size
        spans.append(shard_plots.Span(begun, axis.now(), source, str(source)))
        return found

    ring.pieces = pieces
    ring(*(torch.ones(1, T, heads, 4) for heads in (2, 1, 1)))
    return spans


runs = {f"{kind}, {impl}": run_ranks(timed, N, kind, impl, network=network)
        for kind in ("ring", "zigzag") for impl in ("plain", "fused")}
shard_plots.turns(runs, "whole blocks of scores; virtual clock")
# %% [markdown]
# The number in a box is the rank whose keys these are.
#
# * **ring, plain**: rank 3 sets the pace with 3.5 blocks and three messages of 0.4: 4.7. Rank 0 is
#   idle nearly all the time, but may not go home: it must pass blocks on.
# * **ring, fused** hides the messages, not the idle ranks: 3.5.
# * **zigzag**: each step is half a block for everybody, $4 \times 0.5$; plain + $3 \times 0.4$.
#   Half a block takes longer than a message here, so all of it can be hidden: 2.0, and no rank
#   waits.
#
# With $n$ ranks a ring's last rank computes $n - \frac12$ blocks where $\frac n2$ would be its
# share: nearly twice as long. On a fast enough network zigzag gives all of it back.
#
# ## How parts of a softmax are merged
#
# A rank sees keys block by block, but a softmax is over all keys. Of each block it keeps, per
# query, the weighted mean of the values, $o$, and the logarithm of the sum of exponentials, $\ell$.
# Two such pairs merge into one (Milakov and Gimelshein, 1805.02867, section 3.1):
#
# $$w = \sigma(\ell_2 - \ell_1),\qquad o = (1 - w)\,o_1 + w\,o_2,\qquad
#   \ell = \log\big(e^{\ell_1} + e^{\ell_2}\big)$$
#
# To watch it, one trick: let the value of key $i$ be the unit vector $e_i$. Then $o$ *is* the row
# of softmax weights. We follow the query at position 15 on rank 3; its own keys come first, then
# those of ranks 2, 1 and 0.
#
# *Predict:* after the first block, do the four weights add up to 1? Black lines show the weights of
# the full softmax: are the first four above or below theirs?
# %%
from picotron_lab.attention_blocks import PlainBlocks
from picotron_lab.context_parallel import Piece, Queries

dice = torch.Generator().manual_seed(4)
q = torch.randn(1, 1, 1, LENGTH, generator=dice).double()
k = torch.randn(1, LENGTH, 1, LENGTH, generator=dice).double()
v = torch.eye(LENGTH).double()[None, :, None]
full = ((q @ k[:, :, 0].mT).flatten() / LENGTH**0.5).softmax(0)

queries, steps, rows = Queries(PlainBlocks(), q, ()), {}, []
for step, source in enumerate((3, 2, 1, 0)):
    mine = slice(4 * source, 4 * source + 4)
    before = queries.lse_BHT.item()
    queries.meet((k[:, mine], v[:, mine]), [Piece(slice(1), slice(4), causal=False)])
    weights = queries.out_BTHC.flatten().tolist()
    steps[f"step {step}: keys of rank {source}"] = weights
    rows.append((source, before, queries.lse_BHT.item(), sum(weights[mine]), sum(weights)))
shard_plots.merging(steps, [i // 4 for i in range(LENGTH)], full.tolist())
# %%
for source, before, after, share, total in rows:
    print(f"keys of rank {source}: log of the sum {before:6.3f} -> {after:6.3f}, "
          f"w = weight of the new block {share:.3f}, all weights together {total:.6f}")
print(f"largest difference from the softmax over all keys: "
      f"{(queries.out_BTHC.flatten() - full).abs().max():.0e}")
naive = torch.cat([full[i : i + 4] / full[i : i + 4].sum() / N for i in range(0, LENGTH, 4)])
print(f"had we taken the mean of the four blocks' results:  {(naive - full).abs().max():.2f}")
# %% [markdown]
# After each step the weights add up to 1 over the keys *seen so far*: too much for each of them.
# The next block pushes them down by $1 - w$, and at the end they stand on the black lines. Nothing
# has to be computed twice, and no rank ever needs the whole row of scores.
#
# Before the first block $\ell = -\infty$, the logarithm of nothing, and so it is for a block in
# which a query sees no key at all. Then $\ell_2 - \ell_1$ must not become $-\infty - (-\infty)$,
# which is not a number: one of the usual mistakes. Here is the merge of the plain path:
# %%
print(inspect.getsource(PlainBlocks.merge))
# %% [markdown]
# ## Backward goes around once more
#
# With $\ell$ of the whole row every block stands alone: $P = e^{S - \ell}$ is right at once, with
# no merging (FlashAttention-2, 2307.08691, section 3.1). Scores are formed again from $q$, $k$ and
# $\ell$: nothing of size $T \times T$ is kept. But the gradients of a block's keys and values have
# terms on all ranks. Their sum travels with the block, and one hop further: home.
# %%
print(inspect.getsource(make_core(AttentionCore(), None, "plain", "ring").visit_again))
# %% [markdown]
# *Predict:* how many exchanges does a rank make in forward, and how many in backward? Below each
# way of context parallelism computes an attention of 32 tokens and its gradients, and all of it is
# compared with one device, in float64.
# %%
SHAPES = [(1, 32, heads, 8) for heads in (4, 4, 4)]
dice = torch.Generator().manual_seed(0)
QKV = [torch.randn(shape, generator=dice).double() for shape in SHAPES]


def attention(core, places):
    """Output and gradients of q, k, v for the tokens at these places."""
    qkv = [x[:, places].clone().requires_grad_() for x in QKV]
    out = core(*qkv)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in qkv)]


def one_rank(axis, kind, impl):
    places = positions(kind, 32, axis)
    found, sent = attention(make_core(AttentionCore(), axis, impl, kind), places), axis.ledger
    off = [(a - b[:, places]).abs().max().item() for a, b in zip(found, whole, strict=True)]
    return max(off), {op: len(sent.select(op)) for op in sorted({c.op for c in sent.calls})}


whole = attention(AttentionCore(), torch.arange(32))
for kind in ("ring", "zigzag", "all-gather", "ulysses"):
    for impl in ("plain", "fused"):
        seen = run_ranks(one_rank, N, kind, impl)
        print(f"{kind:10} {impl:5}: worst difference {max(off for off, _ in seen):.0e}; "
              f"calls, both ways: {seen[0][1]}")
# %% [markdown]
# A ring makes $n - 1$ exchanges forward and $n$ backward, the last of which brings the sums home.
# (The fused one runs its sums one step behind: one more.) *All-gather* brings all keys at once,
# which is fine where few key/value heads serve many query heads. *Ulysses* (2309.14509) is another
# idea: an all-to-all turns "all heads of $1/n$ of the tokens" into "$1/n$ of the heads of all
# tokens".
#
# ## Memory
#
# Each rank keeps its own $q$, $k$, $v$, output and $\ell$ for backward, of $T$ = length/$n$ tokens.
# *Predict* what doubling $n$ does to it, before you read the table.
# %%
from picotron_lab.analysis.context import Layer, measure, saved_bytes


def saved(axis, at):
    return measure(make_core(AttentionCore(), axis, at.impl, at.kind), axis.ledger, at)["saved"]


print("bytes that one attention keeps for backward, 128 tokens in all, 8 heads, 2 key/value heads")
for n in (1, 2, 4, 8):
    at = Layer("zigzag", "fused", n, B=1, T=128 // n, H=8, K=2, C=16)
    print(f"{n} ranks: predicted {saved_bytes(at):6}, measured {run_ranks(saved, n, at)[0]:6}")
# %% [markdown]
# And a model of today: Llama 3 8B on 16 GPUs, predicted. ZeRO-3 spreads the state over all of them,
# whatever the split; so the dark foot of the stacks stays, and the activations of one sequence
# are what context parallelism cuts. The dashed line is an H100.
# %%
from picotron_lab.analysis import memory_plots
from picotron_lab.analysis.hardware import hardware
from picotron_lab.config import PRESETS, MeshConfig, TrainConfig

meshes = [MeshConfig(dp=16 // n, cp=n, zero=3) for n in (1, 4, 16)]
memory_plots.context_parallel_stacks(
    PRESETS["llama3-8b"], (4096, 8192, 16_384, 32_768, 65_536, 131_072), meshes,
    TrainConfig(1, 1, 4096, dtype="bfloat16"), hardware("h100").memory_bytes)
# %% [markdown]
# ## The contract
#
# Calls and bytes each way, blocks of other ranks held at a time, bytes saved for backward, and the
# work of the busiest rank over that of the idlest; formulas, predicted, measured. (The plain path
# computes the hidden half of a diagonal square as well, so its ring's last rank has 4 times the
# work of the first; counted without it, it is $2n - 1 = 7$ times.)
#
# To go on: `picotron_lab/context_parallel.py` and `picotron_lab/attention_blocks.py`;
# `python benchmarks/context.py` counts the work on 8 ranks.
# %%
from picotron_lab import context_parallel

context_parallel.main()
