"""Context parallelism: each rank has 1/n of every sequence, and attention still sees all of it.

Paper   ring: Liu et al. 2023, section 3 (2310.01889); its idle ranks: Striped Attention, Brandon et
        al. 2023 (2311.09431); zigzag order and all-gather: Llama 3, section 3.3.2 (2407.21783);
        ulysses: Jacobs et al. 2023, section 3 (2309.14509), in ulysses.py
Idea    Only attention looks at other tokens. Queries stay at home, keys and values come by, block
        after block, and what a query got from each is merged (attention_blocks.py):
            ring        a block is one rank's K and V; all move right at once, n - 1 times
            zigzag      the same, but a rank holds chunks r and 2n-1-r of 2n. Under a causal mask
                        rank 0 of a ring has next to nothing to do, and all wait for the last; one
                        early and one late chunk are the same work for everybody
            all-gather  chunks of zigzag; all K and V at once: they are few, if heads share them
            ulysses     no blocks: 1/n of the tokens becomes 1/n of the heads, and back
        Backward forms scores again from q, k and lse: nothing of size T*T is kept. Each block comes
        by once more, and the sum of its dK, dV travels with it, and one hop further: home.
        The usual mistakes: every rank's positions start at 0; a block's own softmax in backward
        instead of the whole row's; -inf minus -inf where a row has seen nothing yet; K and V
        expanded to H heads before they travel; gradients of weights not summed over cp
Before  every rank: whole sequences, n T tokens each, from embedding to loss
After   every rank: T tokens of each, q, k, v, out of these alone kept for backward; all weights
Wire    KV = bytes of one rank's K and V, Q of its q; dKV: gradients of KV, float32 at least. Layer:
        ring, zigzag  forward exchange (n-1) KV   backward exchange (n-1) KV + n dKV
        all-gather    forward all_gather n KV     backward all_gather n KV, reduce_scatter n dKV
        ulysses       each way all_to_all 2Q + KV; n/K KV, if K < n
        Documents, if there are any, travel with K. Routers add up their counts over cp
        recompute.py's full runs forward again, and so sends what forward sends once more
Axes    cp: parts of the sequence, inside the axis over which gradients of weights are partial
Exact   8192 tokens in float32 on 4 ranks, beside float64: out is off by 1.07 to 1.09 times what
        torch's is on one device, gradients by 1.03 times at most; ulysses as the core inside
Dims    B micro-batch  T queries, a rank's tokens  S keys that they meet, a block's
        H/K query/kv heads  C head width
Read    chunks -> pairs_of_chunks -> Queries -> Attend -> Ring -> Gather -> FusedRing -> FusedGather
Try     python -m picotron_lab.context_parallel    Tests   tests/test_context_*.py
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from picotron_lab.analysis.context import Layer, measure, predictions
from picotron_lab.attention_blocks import BLOCKS
from picotron_lab.comm import Axis, Handle
from picotron_lab.config import CP_KINDS, TWO_CHUNKS, require
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore
from picotron_lab.router import Router
from picotron_lab.sharding import at_least_float32
from picotron_lab.ulysses import ULYSSES

Block = Sequence[Tensor]  # what travels: k, v [B, S, K, C]; documents [B, S], if there are any

# ---- 1. the idea


def chunks(kind: str, rank: int, size: int) -> tuple[int, ...]:
    """Which chunks of a sequence a rank holds: one of n, or (early, late) of 2n."""
    if size > 1 and kind in TWO_CHUNKS:
        return rank, 2 * size - 1 - rank
    return (rank,)


def positions(kind: str, length: int, axis: Axis) -> Tensor:
    """Positions [T] int64 of this rank's tokens of a sequence of `length`, as it holds them."""
    mine = chunks(kind, axis.rank, axis.size)
    count = len(mine) * axis.size
    assert length % count == 0, (
        f"{length} tokens cannot be cut into the {count} equal chunks of {kind} on {axis.size} "
        f"ranks: choose a length that is a multiple of {count}."
    )
    return torch.arange(length).view(count, -1)[list(mine)].flatten()


class Piece(NamedTuple):
    """Some of one rank's queries, which see some of another's keys: all of these or, causal, those
    up to their own place."""

    queries: slice
    keys: slice
    causal: bool


def pairs_of_chunks(kind: str, rank: int, source: int, size: int, length: int) -> list[Piece]:
    """What queries of `rank` see of keys of `source`, each holding `length` tokens of a sequence.

    A key chunk b and a query chunk a: b > a lies in the future and is skipped, b < a is seen whole.
    """
    mine, theirs = chunks(kind, rank, size), chunks(kind, source, size)
    step = length // len(mine)
    parts = [slice(first, first + step) for first in range(0, length, step)]
    pairs = [(i, j) for i, a in enumerate(mine) for j, b in enumerate(theirs) if b <= a]
    return [Piece(parts[i], parts[j], causal=mine[i] == theirs[j]) for i, j in pairs]


class Queries:
    """This rank's queries in forward: what they got from all keys that they met so far."""

    def __init__(self, arithmetic: Any, q_BTHC: Tensor, documents: Block):
        self.arithmetic, self.q_BTHC, self.documents = arithmetic, q_BTHC, documents
        B, T, H, _ = q_BTHC.shape
        self.out_BTHC = wide_zeros(q_BTHC)
        self.lse_BHT = self.out_BTHC.new_full((B, H, T), -math.inf)  # log 0: nothing seen

    def meet(self, block: Block, pieces: Sequence[Piece]) -> None:
        """Attend to keys of a block, and merge."""
        k_BSKC, v_BSKC, *documents = block
        for rows, keys, causal in pieces:
            pair = (self.documents[0][:, rows], documents[0][:, keys]) if documents else None
            k, v = k_BSKC[:, keys], v_BSKC[:, keys]
            part = self.arithmetic.attend(self.q_BTHC[:, rows], k, v, causal, pair)
            self.arithmetic.merge(self.out_BTHC[:, rows], self.lse_BHT[..., rows], *part)


class Gradients:
    """This rank's queries in backward: their gradient so far. mine: q, grad; whole out, lse."""

    def __init__(self, arithmetic: Any, mine: Sequence[Tensor], documents: Block):
        self.arithmetic, self.documents = arithmetic, documents
        self.q_BTHC, self.grad_BTHC, self.out_BTHC, self.lse_BHT = mine
        self.dq_BTHC = wide_zeros(self.q_BTHC)

    def meet(self, block: Block, pieces: Sequence[Piece]) -> list[tuple[slice, Tensor, Tensor]]:
        """Add to dq, and return what to add to the gradients of a block: (keys, dk, dv)."""
        k_BSKC, v_BSKC, *documents = block
        found = []
        for rows, keys, causal in pieces:
            pair = (self.documents[0][:, rows], documents[0][:, keys]) if documents else None
            grad, q, out = (x[:, rows] for x in (self.grad_BTHC, self.q_BTHC, self.out_BTHC))
            qkv, row = (q, k_BSKC[:, keys], v_BSKC[:, keys]), (out, self.lse_BHT[..., rows])
            dq, *dkv = self.arithmetic.attend_backward(grad, qkv, row, causal, pair)
            self.dq_BTHC[:, rows] += dq
            found.append((keys, *dkv))
        return found


def add(sums: Sequence[Tensor], found: Sequence[tuple[slice, Tensor, Tensor]]) -> None:
    """Add what queries found to the sums of a block, dk and dv [B, S, K, C]."""
    for keys, dk, dv in found:
        sums[0][:, keys] += dk
        sums[1][:, keys] += dv


def wide_zeros(x: Tensor) -> Tensor:
    """Room for a sum over blocks, shaped as x: float32 at least."""
    return x.new_zeros(x.shape, dtype=at_least_float32(x.dtype))


class Attend(torch.autograd.Function):
    """Attention of this rank's queries to all ranks' keys; saves own q, k, v, out and lse alone."""

    @staticmethod
    def forward(ctx, way: "Ring", q_BTHC: Tensor, *block: Tensor) -> Tensor:
        queries = Queries(way.arithmetic, q_BTHC, block[2:])
        way.visit(queries, block)
        out_BTHC = queries.out_BTHC.to(q_BTHC.dtype)
        ctx.way = way
        ctx.save_for_backward(q_BTHC, out_BTHC, queries.lse_BHT, *block)
        return out_BTHC

    @staticmethod
    def backward(ctx, grad_BTHC: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), (
            "create_graph=True asks for second derivatives, which attention over several ranks "
            "does not have: leave it out."
        )
        q_BTHC, out_BTHC, lse_BHT, *block = ctx.saved_tensors
        mine = q_BTHC, grad_BTHC, out_BTHC, lse_BHT
        queries = Gradients(ctx.way.arithmetic, mine, block[2:])
        dkv = ctx.way.visit_again(queries, block)
        dqkv = (x.to(q_BTHC.dtype) for x in (queries.dq_BTHC, *dkv))
        return None, *dqkv, *(None for _ in block[2:])


# ---- 2. plain path


class Ring(nn.Module):
    """The core of an attention that has T tokens of n T: all blocks move right, one rank at a time.

    visit        shard -> shard (n - 1 exchanges of KV): each block meets each rank's queries
    visit_again  the same with sums of dK, dV, which one more exchange brings home: own (dk, dv)
    """

    arithmetic = BLOCKS["plain"]

    def __init__(self, axis: Axis, kind: str):
        super().__init__()
        self.axis, self.kind = axis, kind

    def forward(
        self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None = None
    ) -> Tensor:
        documents = [] if documents_BT is None else [documents_BT]
        return Attend.apply(self, q_BTHC, k_BTKC, v_BTKC, *documents)

    def visit(self, queries: Queries, block: Block) -> None:
        for hops in range(self.axis.size):
            queries.meet(block, self.pieces(hops, queries))
            if hops < self.axis.size - 1:
                block = self.pass_on(block)

    def visit_again(self, queries: Gradients, block: Block) -> Sequence[Tensor]:
        sums = [wide_zeros(x) for x in block[:2]]
        for hops in range(self.axis.size):
            add(sums, queries.meet(block, self.pieces(hops, queries)))
            if hops < self.axis.size - 1:
                *block, sums[0], sums[1] = self.pass_on([*block, *sums])
        return self.pass_on(sums) if self.axis.size > 1 else sums

    def pieces(self, hops: int, queries: Queries | Gradients) -> list[Piece]:
        """What my queries see of a block that has come `hops` ranks far (from right: negative)."""
        rank, size, length = self.axis.rank, self.axis.size, queries.q_BTHC.shape[1]
        return pairs_of_chunks(self.kind, rank, (rank - hops) % size, size, length)

    def pass_on(self, tensors: Sequence[Tensor], wait: bool = True) -> Sequence[Tensor] | Handle:
        """Give tensors to the right neighbour, and get those of the left one."""
        right, left = ((self.axis.rank + hop) % self.axis.size for hop in (1, -1))
        sends, receives = ([(x, other) for x in tensors] for other in (right, left))
        return self.axis.exchange(sends, receives, wait)


class Gather(Ring):
    """All blocks come at once.

    visit        shard -> replicated (all_gather, n KV)
    visit_again  the same; dK, dV: partial -> shard (reduce_scatter, n dKV)
    """

    def visit(self, queries: Queries, block: Block) -> None:
        for source, theirs in enumerate(self.gather(block)):
            queries.meet(theirs, self.pieces(self.axis.rank - source, queries))

    def visit_again(self, queries: Gradients, block: Block) -> Sequence[Tensor]:
        gathered = self.gather(block)
        sums = [wide_zeros(x.expand(self.axis.size, *x.shape)) for x in block[:2]]
        for source, theirs in enumerate(gathered):
            found = queries.meet(theirs, self.pieces(self.axis.rank - source, queries))
            add([x[source] for x in sums], found)
        return [self.axis.reduce_scatter(x)[0] for x in sums]

    def gather(self, block: Block) -> list[Block]:
        """The blocks of all ranks, in rank order."""
        return list(zip(*(self.axis.all_gather(x[None]) for x in block), strict=True))


def parallelize(model: nn.Module, axis: Axis, impl: str, kind: str) -> None:
    """Let every attention of a model see the tokens of all ranks of `axis`.

    impl     "plain" | "fused"      kind     ring | zigzag | all-gather | ulysses
    Callers  deal tokens and labels by `positions`, put these into Where, and write into the record
             of every parameter that its gradient is partial over `axis`.
    raises   ConfigError for another kind
    """
    require(kind in CP_KINDS, f"--cp-kind {kind} is not one of {', '.join(CP_KINDS)}.")
    for module in list(model.modules()):
        if isinstance(getattr(module, "core", None), AttentionCore):
            module.core = make_core(module.core, axis, impl, kind)
        if isinstance(module, Router):
            module.over_sequence = axis.all_reduce


def make_core(core: AttentionCore, axis: Axis, impl: str, kind: str) -> nn.Module:
    """What replaces `core`. Alone, a rank holds one chunk, whatever the kind: a ring of one."""
    if kind == "ulysses":
        return ULYSSES[impl](core, axis)
    ways = {"plain": (Ring, Gather), "fused": (FusedRing, FusedGather)}[impl]
    return ways[kind == "all-gather" and axis.size > 1](axis, kind)


# ---- 3. fused path


class FusedRing(Ring):
    """A ring that computes while it sends. Beside its own, at most two K/V blocks are on a rank.

    In backward the sums are one step behind: while a block is computed here, what the ranks before
    found for it is still on its way, and is added afterwards.
    """

    arithmetic = BLOCKS["fused"]

    def visit(self, queries: Queries, block: Block) -> None:
        for hops in range(self.axis.size):
            further = block if hops < self.axis.size - 1 else []
            coming = self.pass_on(further, wait=False)
            queries.meet(block, self.pieces(hops, queries))
            block = coming.wait()

    def visit_again(self, queries: Gradients, block: Block) -> Sequence[Tensor]:
        sums: Sequence[Tensor] = []  # none before the own block
        for hops in range(self.axis.size):
            further = block if hops < self.axis.size - 1 else []
            coming = self.pass_on([*further, *sums], wait=False)
            found = queries.meet(block, self.pieces(hops, queries))
            arrived = coming.wait()  # the next block, and the sums of this one
            sums = arrived[len(further) :] or [wide_zeros(x) for x in block[:2]]
            add(sums, found)
            block = arrived[: len(further)]
        return self.pass_on(sums) if self.axis.size > 1 else sums

    def pieces(self, hops: int, queries: Queries | Gradients) -> list[Piece]:
        """Pairs of chunks side by side, as one piece: only simple shapes."""
        length, zigzag = queries.q_BTHC.shape[1], self.kind in TWO_CHUNKS
        everything, late = slice(length), slice(length // 2, length)
        if hops == 0:  # chunks are held in order: a causal square
            return [Piece(everything, everything, causal=True)]
        if hops <= self.axis.rank:  # the block of a lower rank, whose late chunk is after all mine
            return [Piece(everything, slice(length // 2) if zigzag else everything, causal=False)]
        return [Piece(late, everything, causal=False)] if zigzag else []


class FusedGather(Gather):
    """Two squares on the diagonal hide what travels; the other keys are two rectangles.

    The late chunks of all ranks lie before all early ones: 2n-1 .. n, 0 .. n-1. Early chunk r sees
    the first r of the early ones; late chunk 2n-1-r those after it, which are the late ones of
    higher ranks and all early ones. So each finds its keys in a row, and none has to be moved.
    """

    arithmetic = BLOCKS["fused"]

    def visit(self, queries: Queries, block: Block) -> None:
        gathered, coming = self.start(block)
        squares, rectangles = self.shapes(queries)
        queries.meet(block, squares)
        for handle in coming:
            handle.wait()
        queries.meet(gathered, rectangles)

    def visit_again(self, queries: Gradients, block: Block) -> Sequence[Tensor]:
        gathered, coming = self.start(block)
        (early, late), rectangles = self.shapes(queries)
        mine = [wide_zeros(x) for x in block[:2]]
        add(mine, queries.meet(block, [early]))
        for handle in coming:
            handle.wait()
        sums = [wide_zeros(x.transpose(0, 1)) for x in gathered[:2]]
        add([x.transpose(0, 1) for x in sums], queries.meet(gathered, rectangles))
        home = [self.axis.reduce_scatter(x, wait=False) for both in sums for x in both.chunk(2)]
        add(mine, queries.meet(block, [late]))
        for x, of_late, of_early in zip(mine, home[::2], home[1::2], strict=True):
            x += torch.cat([of_early.wait(), of_late.wait()]).transpose(0, 1)
        return mine

    def start(self, block: Block) -> tuple[Block, list[Handle]]:
        """Room for all keys, [B, n T, ...], and what to wait for until they are there.

        Tokens go first, for the verbs join dim 0: a copy of the own ones, unless B is 1.
        """
        gathered, coming = [], []
        for x in block:
            mine = x.transpose(0, 1)
            whole = x.new_empty(self.axis.size * len(mine), *mine.shape[1:])
            for half, out in zip(mine.chunk(2)[::-1], whole.chunk(2), strict=True):
                coming.append(self.axis.all_gather(half, out=out, wait=False))
            gathered.append(whole.transpose(0, 1))
        return gathered, coming

    def shapes(self, queries: Queries | Gradients) -> tuple[list[Piece], list[Piece]]:
        """Squares of own early and late chunk; rectangles of gathered keys."""
        n, rank, c = self.axis.size, self.axis.rank, queries.q_BTHC.shape[1] // 2
        early, late = slice(c), slice(c, 2 * c)
        of_early, of_late = slice(n * c, (n + rank) * c), slice((rank + 1) * c, 2 * n * c)
        squares = [Piece(early, early, causal=True), Piece(late, late, causal=True)]
        rectangles = [Piece(late, of_late, causal=False), Piece(early, of_early, causal=False)]
        return squares, rectangles[: 2 if rank > 0 else 1]


# ---- 4. contract


def main() -> None:
    """One attention on 4 threads, in every way: what a rank sends, holds, saves and computes."""
    at = Layer("ring", "plain", n=4, B=1, T=32, H=8, K=2, C=4)
    print(f"{at.n} ranks, B {at.B}, T {at.T}, H {at.H}, K {at.K}, C {at.C}, float32: "
          f"Q = {at.q}, KV = dKV = {at.kv} bytes")  # fmt: skip
    print("Of a rank: calls and bytes sent each way; K/V blocks of others at a time; bytes saved.")
    print("work: of the busiest rank / of the idlest")
    row = "{:10} {:6} {:23} {:20} {:>12} {:>12}".format
    print(row("kind", "path", "", "formula", "predicted", "measured"))
    for kind, impl in product(CP_KINDS, ("plain", "fused")):
        at = replace(at, kind=kind, impl=impl)
        seen = run_ranks(_demo, at.n, at)
        work = [measured["work"] for measured in seen]
        seen[0]["work"] = f"{max(work) / min(work):g}"
        for name, (formula, said) in predictions(at).items():
            print(row(kind, impl, name, formula, said, seen[0][name]))


def _demo(axis: Axis, at: Layer) -> dict[str, Any]:
    return measure(make_core(AttentionCore(), axis, at.impl, at.kind), axis.ledger, at)


if __name__ == "__main__":
    main()
