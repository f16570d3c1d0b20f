"""Token pipelining: a sequence is cut into slices, which follow each other through the pipeline.

Paper   TeraPipe, Li et al. 2021, sections 3.1 to 3.3 (2102.07988); slices inside 1F1B: Seq1F1B,
        Sun et al. 2024 (2406.03488)
Idea    A token sees only tokens before it. So a stage may begin with the first tokens of a sequence
        while the stage before still works on later ones: a pipeline is filled by parts of one
        sequence, where micro-batches are too few, or one sequence is all that fits. A slice's
        queries need keys and values of all slices before it. Every stage has computed these
        itself: it keeps them, layer by layer, and nothing new is sent.
        Backward goes from the last slice to the first. Slice k finds gradients for its own keys and
        for all earlier ones. Its own, and what later slices left for them, are complete: autograd
        carries them on. Those of earlier keys are added to what is left for their slices.
        The usual mistakes: positions that start at 0 in every slice; keys that are constants for
        later slices, so that a slice learns nothing from its future; keys that keep the graphs
        they came from, so that the last slice's backward runs through all; gradients of keys
        added up in bfloat16
Slices  Later ones see more keys, so equal times need earlier ones longer: schedules/slicing.py. One
        of n slices costs more than 1/n: thin matmuls
Before  a stage works on [B, T] tokens at a time, and waits for as many
After   a stage works on [B, l_k]. Of a micro-batch under way a layer keeps keys and values, and
        from the first backward on their gradients: plain of the slices that were forward and not
        backward, fused of all T, until the first slice's backward. Never T*T scores: of a slice at
        most l_k (l_1 + ... + l_k)
Wire    per micro-batch and border of stages N D forward, N D back, as without slices, in n messages
        each way instead of one. Keys and values stay where they are
Axes    none: a stage keeps keys and values of its own layers, with tensor parallelism of its heads
Not     attention over cp (context_parallel.py). And routers take a slice for a sequence: balance
        and capacity (router.py) are then those of slices
Dims    B micro-batch  T queries, a slice's tokens  S keys so far  H/K query/kv heads  C head width
        D width; in formulas T is the whole sequence, cut into slices l_1 .. l_n, and N = B*T
Read    token_slices.py: cut -> SliceOf -> Sequence; parallelize -> SlicedLayer -> Attend -> Held ->
        Parts, SliceCore -> Buffer, FusedSliceCore -> contract
Try     python -m picotron_lab.token_pipeline    Tests   tests/test_token_pipeline.py
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from picotron_lab import sharding
from picotron_lab.attention_blocks import BLOCKS, QKV, Documents, Row, hidden_keys
from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore, Llama, initial_value
from picotron_lab.pipeline_stages import Stage
from picotron_lab.router import wide
from picotron_lab.token_slices import SliceOf, cut

# ---- 1. the idea


def parallelize(model: Llama, impl: str) -> None:
    """Let every layer of a model also take slices of sequences, in order.

    impl     "plain" | "fused"
    When     after tensor and sequence parallelism, before recomputation and the cut into stages.
             Selective recomputation finds nothing to do for slices: no scores are kept.
    """
    for i, layer in enumerate(model.layers):
        cores = []
        for part in list(layer.modules()):  # attention may lie inside a parallel region
            if isinstance(getattr(part, "core", None), AttentionCore):
                part.core = CORES[impl](part.core)
                cores.append(part.core)
        assert cores, (
            f"layer {i} has no attention over whole sequences that could take slices of them: cut "
            "sequences either into slices or over the ranks of context parallelism, not both."
        )
        model.layers[i] = SlicedLayer(layer, cores)


class SlicedLayer(nn.Module):
    """A layer that tells its attention which slice it is called for: layers give `where` on to no
    core. Recomputation calls this module again, which then tells the same."""

    def __init__(self, layer: nn.Module, cores: list["SliceCore"]):
        super().__init__()
        self.layer, self.cores = layer, cores

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], where: Where) -> Tensor:
        told = where if isinstance(where, SliceOf) else None
        for core in self.cores:
            core.where = told
        try:
            return self.layer(x_BTD, angles, where)
        finally:  # recomputation may break off
            for core in self.cores:
                core.where = None


class Attend(torch.autograd.Function):
    """Attention of a slice to its keys and all earlier ones; saves q, out and lse. Keys and values,
    and gradients of earlier slices' keys and values, go by way of the Sequence."""

    @staticmethod
    def forward(ctx, core: "SliceCore", where: SliceOf, *qkv: Tensor) -> Tensor:
        q_BTHC, k_BTKC, v_BTKC = qkv
        held = where.sequence.of(core)
        held.put(where.first, k_BTKC.detach(), v_BTKC.detach())
        out_BTHC, lse_BHT = core.attend(q_BTHC, held, where)
        out_BTHC = out_BTHC.to(q_BTHC.dtype)
        ctx.core, ctx.where = core, where
        ctx.save_for_backward(q_BTHC, out_BTHC, lse_BHT)
        return out_BTHC

    @staticmethod
    def backward(ctx, grad_BTHC: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), (
            "create_graph=True asks for second derivatives, which slices of a sequence do not "
            "have: leave it out."
        )
        core, where = ctx.core, ctx.where
        q_BTHC, *row = ctx.saved_tensors
        held = where.sequence.of(core)
        held.check_last(where.first, where.first + q_BTHC.shape[1])
        dq, *dkv = core.attend_backward(grad_BTHC, q_BTHC, tuple(row), held, where)
        held.filled = where.first  # nobody sees this slice again
        if where.first == 0:
            del where.sequence.held[core]
        return None, None, *(x.to(q_BTHC.dtype) for x in (dq, *dkv))


class Held:
    """What one attention layer keeps of a sequence: keys and values of its first `filled` tokens,
    and `sums`: what slices that were backward have found for [dk, dv], in float32 at least."""

    def __init__(self, length: int):
        self.length, self.filled = length, 0
        self.sums: list[Tensor] = []

    def put(self, first: int, k_BTKC: Tensor, v_BTKC: Tensor) -> None:
        """Keep keys and values of the tokens from `first` on; once more, the same ones."""
        assert first <= self.filled, (
            f"the slice at token {first} came when keys were known up to token {self.filled}: run "
            "slices forward in the order of the sequence."
        )
        self.store(first, k_BTKC, v_BTKC)
        self.filled = max(self.filled, first + k_BTKC.shape[1])

    def check_last(self, first: int, end: int) -> None:
        """Raise unless all later slices were backward."""
        assert end == self.filled, (
            f"the slice of tokens {first} to {end} went backward when that of tokens up to "
            f"{self.filled} was due: run backwards once each, from the last slice to the first."
        )


# ---- 2. plain path


class Parts(Held):
    """Keys and values as they came: a list of slices, joined whenever they are needed."""

    def __init__(self, length: int):
        super().__init__(length)
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}  # by first token, in order

    def store(self, first: int, k_BTKC: Tensor, v_BTKC: Tensor) -> None:
        """Of a slice. As tensors, not as copies of them."""
        self.parts[first] = k_BTKC, v_BTKC

    def up_to(self, first: int) -> list[Tensor]:
        """[k, v] [B, S, K, C] of all slices up to the one that begins at `first`."""
        seen = [part for at, part in self.parts.items() if at <= first]
        return [torch.cat(xs, 1) for xs in zip(*seen, strict=True)]

    def settle(self, first: int, found: list[Tensor]) -> list[Tensor]:
        """Own part of the gradients that a slice has found for all keys that it sees, with those
        that later slices have left for it; the rest is kept for earlier ones. The slice goes."""
        if self.sums:
            found = [x + left for x, left in zip(found, self.sums, strict=True)]
        self.sums = [x[:, :first].clone() for x in found]  # a view would hold all of it
        del self.parts[first]
        return [x[:, first:] for x in found]

    def tensors(self) -> list[Tensor]:
        """All that is kept now."""
        return [*self.sums, *(x for part in self.parts.values() for x in part)]


class SliceCore(nn.Module):
    """The core of an attention that a SlicedLayer tells which slice it is called for; `core` serves
    whole sequences."""

    blocks, make_held = BLOCKS["plain"], Parts

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core, self.where = core, None

    def forward(
        self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None = None
    ) -> Tensor:
        if self.where is None:
            return self.core(q_BTHC, k_BTKC, v_BTKC, documents_BT)
        return Attend.apply(self, self.where, q_BTHC, k_BTKC, v_BTKC)

    def attend(self, q_BTHC: Tensor, held: Held, where: SliceOf) -> Row:
        """Queries of a slice, and all keys so far -> (out [B, T, H, C], lse [B, H, T])."""
        k_BSKC, v_BSKC = held.up_to(where.first)
        return self.blocks.attend(q_BTHC, k_BSKC, v_BSKC, True, where.documents(q_BTHC.shape[1]))

    def attend_backward(
        self, grad_BTHC: Tensor, q_BTHC: Tensor, row: Row, held: Held, where: SliceOf
    ) -> QKV:
        """(dq [B, T, H, C], dk, dv [B, T, K, C]) of a slice; what it finds for others is kept."""
        qkv, documents = (q_BTHC, *held.up_to(where.first)), where.documents(q_BTHC.shape[1])
        dq, *found = self.blocks.attend_backward(grad_BTHC, qkv, row, True, documents)
        return dq, *held.settle(where.first, found)


# ---- 3. fused path


class Buffer(Held):
    """Keys and values in one tensor each, as long as the sequence, written in place and let go with
    the first slice's backward."""

    def __init__(self, length: int):
        super().__init__(length)
        self.whole: list[Tensor] = []  # k, v [B, length, K, C]

    def store(self, first: int, k_BTKC: Tensor, v_BTKC: Tensor) -> None:
        """Into the buffers, which the first slice makes."""
        B, T, K, C = k_BTKC.shape
        if not self.whole:
            self.whole = [x.new_empty(B, self.length, K, C) for x in (k_BTKC, v_BTKC)]
        for whole, x in zip(self.whole, (k_BTKC, v_BTKC), strict=True):
            whole[:, first : first + T] = x

    def between(self, first: int, end: int) -> list[Tensor]:
        """[k, v] of some tokens, as views."""
        return [x[:, first:end] for x in self.whole]

    def add(self, found: list[Tensor]) -> None:
        """Keep gradients for the first tokens; the last slice comes first, and sees most."""
        if not self.sums:
            self.sums = [wide(x) for x in found]
            return
        for left, x in zip(self.sums, found, strict=True):
            left[:, : x.shape[1]] += x

    def tensors(self) -> list[Tensor]:
        return [*self.sums, *self.whole]


class FusedSliceCore(SliceCore):
    """Flash attention to two blocks, all earlier tokens and, causal, the slice itself: both are
    shapes that its kernels know."""

    blocks, make_held = BLOCKS["fused"], Buffer

    def attend(self, q_BTHC: Tensor, held: Held, where: SliceOf) -> Row:
        (past, seen), (own, square) = self.two_blocks(q_BTHC, held, where)
        out_BTHC, lse_BHT = self.blocks.attend(q_BTHC, *own, True, square)
        if where.first > 0:
            out_BTHC = wide(out_BTHC)
            block = self.blocks.attend(q_BTHC, *past, False, seen)
            self.blocks.merge(out_BTHC, lse_BHT, *block)
        return out_BTHC, lse_BHT

    def attend_backward(
        self, grad_BTHC: Tensor, q_BTHC: Tensor, row: Row, held: Held, where: SliceOf
    ) -> QKV:
        first, end = where.first, where.first + q_BTHC.shape[1]
        (past, seen), (own, square) = self.two_blocks(q_BTHC, held, where)
        dq, *dkv = self.blocks.attend_backward(grad_BTHC, (q_BTHC, *own), row, True, square)
        if held.sums:
            dkv = [x + left[:, first:end] for x, left in zip(dkv, held.sums, strict=True)]
        if first > 0:
            qkv = q_BTHC, *past
            dq_past, *found = self.blocks.attend_backward(grad_BTHC, qkv, row, False, seen)
            dq = wide(dq) + dq_past
            held.add(found)
        return dq, *dkv

    def two_blocks(
        self, q_BTHC: Tensor, held: Held, where: SliceOf
    ) -> list[tuple[list[Tensor], Documents]]:
        """([k, v], documents) of the tokens before the slice, and of the slice."""
        first, end = where.first, where.first + q_BTHC.shape[1]
        documents, blocks = where.documents(q_BTHC.shape[1]), []
        for start, stop in ((0, first), (first, end)):
            both = documents and (documents[0], documents[1][:, start:stop])
            blocks.append((held.between(start, stop), both))
        return blocks


CORES = {"plain": SliceCore, "fused": FusedSliceCore}


# ---- 4. contract


def contract(lengths: Iterable[int], B: int, K: int, C: int, D: int, e: int) -> dict[str, int]:
    """What slices cost: of one micro-batch, in elements of e bytes.

    keys, values   bytes that a layer keeps between forward and backward: 2 B T K C e
    gradients      bytes of theirs, most at a time, after the last slice's backward:
                   2 B (T - l_n) K C max(4, e)
    messages       between two stages, forward and back: 2 n          bytes: 2 B T D e
    pairs          of a query and a key that it sees, for a head: B T (T + 1) / 2, as without slices
    """
    lengths = list(lengths)
    T, n = sum(lengths), len(lengths)
    return {
        "keys, values": 2 * B * T * K * C * e,
        "gradients": 2 * B * (T - lengths[-1]) * K * C * max(4, e),
        "messages": 2 * n,
        "bytes": 2 * B * T * D * e,
        "pairs": B * T * (T + 1) // 2,
    }


DEMO = ModelConfig(vocab_size=32, hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=24)
FORMULAS = "2BTKC e", "2B(T-l_n)KC max(4,e)", "2n", "2BTD e", "BT(T+1)/2"


def main() -> None:
    """Two stages, one layer each, on 2 threads: what slices cost, and that they change nothing."""
    B, cfg = 2, DEMO
    row = "{:7} {:11} {:13} {:21} {:>10} {:>10}".format
    print(f"B {B}, K {cfg.kv_heads}, C {cfg.head_width}, D {cfg.hidden_size}, float64: e = 8 bytes")
    print(row("path", "slices", "", "formula", "predicted", "measured"))
    for lengths in ((24,), (10, 8, 6)):
        said = contract(lengths, B, cfg.kv_heads, cfg.head_width, cfg.hidden_size, 8)
        for impl in CORES:
            first, last = run_ranks(_demo, 2, impl, lengths, B)
            seen = first | {name: first[name] + last[name] for name in ("messages", "bytes")}
            error = max(first["error"], last["error"])
            for formula, (name, predicted) in zip(FORMULAS, said.items(), strict=True):
                print(row(impl, "+".join(map(str, lengths)), name, formula, predicted, seen[name]))
            print(f"largest error of a gradient, beside the whole sequence: {error:.0e}")


def _demo(axis: Axis, impl: str, lengths: tuple[int, ...], B: int) -> dict[str, float]:
    """One rank's stage, by hand: slices forward, and backward in the opposite order."""
    whole, model = _model(""), _model(impl)
    stage = Stage(model, range(axis.rank, axis.rank + 1), axis.rank == 0, axis.rank == 1)
    core = stage.layers[str(axis.rank)].cores[0]
    core.blocks = counted = _Counted(core.blocks)
    sharding.materialise(stage, 0, initial_value, dtype=torch.float64)
    tokens_BT = torch.arange(B * sum(lengths)).view(B, -1) % DEMO.vocab_size
    batch = tokens_BT, tokens_BT, Where.first(tokens_BT)
    slices = cut(batch, lengths)
    held, sums, done = slices[0][2].sequence.of(core), 0, []
    for x, *rest in slices:
        if axis.rank == 1:
            x = axis.recv(stage.boundary(x), 0).requires_grad_()
        done.append((x, stage(x, *rest)))
        if axis.rank == 0:
            axis.send(done[-1][1], 1)
    keys = sum(x.nbytes for x in held.tensors())
    for x, out in reversed(done):
        out.backward(axis.recv(out.detach(), 1) if axis.rank == 0 else None)
        sums = max(sums, sum(x.nbytes for x in held.sums))
        if axis.rank == 1:
            axis.send(x.grad, 0)
    whole(*batch).backward()
    truth = {p.record.name: p.grad for p in whole.parameters()}
    calls = axis.ledger.select("send")
    return {
        "keys, values": keys, "gradients": sums, "pairs": counted.pairs,
        "messages": len(calls), "bytes": axis.ledger.bytes("send"),
        "error": max((p.grad - truth[p.record.name]).abs().max() for p in stage.parameters()),
    }  # fmt: skip


def _model(impl: str) -> Llama:
    with torch.device("meta"):
        model = Llama(DEMO)
    sharding.attach(model)
    if impl:
        parallelize(model, impl)
    else:
        sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    return model


class _Counted:
    """Blocks of attention that count pairs of a query and a key that it sees."""

    def __init__(self, blocks: Any):
        self.blocks, self.pairs = blocks, 0
        self.attend_backward, self.merge = blocks.attend_backward, blocks.merge

    def attend(self, q_BTHC: Tensor, k_BSKC: Tensor, *rest: Any) -> Row:
        (B, T), S = q_BTHC.shape[:2], k_BSKC.shape[1]
        hidden_BTS = hidden_keys(T, S, *rest[1:], q_BTHC.device)
        self.pairs += B * (T * S - (0 if hidden_BTS is None else int(hidden_BTS.sum())))
        return self.blocks.attend(q_BTHC, k_BSKC, *rest)


if __name__ == "__main__":
    main()
