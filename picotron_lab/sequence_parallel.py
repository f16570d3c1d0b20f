"""Sequence parallelism: outside the tensor-parallel regions each rank keeps 1/n of the tokens.

Paper   Korthikanti et al. 2022, "Reducing Activation Recomputation", sections 4.2.1 and 4.2.2
        (2205.05198)
Idea    Tensor parallelism leaves the residual stream, norms and dropout whole on every rank, where
        they do the same work and save the same activations n times. None of them looks at another
        token: cut them along T. An all_reduce is a reduce_scatter followed by an all_gather, so the
        border of a region takes the two apart and sends no more:
            enter   forward: all_gather along T        backward: reduce_scatter
            leave   forward: reduce_scatter along T    backward: all_gather
        What a region's first matmul needs for its gradient is the gathered x. Each rank saves
        its own shard instead, and gathers again in backward: the one price.
        The usual mistakes: the norms' gradients, each now from 1/n of the tokens, are not summed;
        dropout on each shard takes the mask of the first positions; the gathered x is saved.
Before  tensor parallelism: T tokens of residual stream, norms, dropout on every rank
After   T/n of them; regions and weights as before. Each rank looks up its own tokens in a
        replicated embedding
Wire    S = bytes of [B, T, D]. Region: forward all_gather(S) + reduce_scatter(S), on the wire what
        all_reduce(S) costs; backward the same, and all_gather(S) once more for x. A mixture of
        experts saves the gathered x and does without that. Head: forward all_gather(S), backward
        all_gather(S) + reduce_scatter(S). Once a step: all_reduce of the gradients of norms,
        routers and a replicated embedding
Axes    tp: parts of each layer, and of the sequence between its regions
Dims    as in tensor_parallel.py; outside regions T is T/n. N = T*B rows, sequence first
Read    Gather, Scatter -> Column -> SequenceCrossing -> parallelize -> travelling, gather_matmul,
        matmul_scatter -> FusedColumn, FusedRow -> contract
Try     python -m picotron_lab.sequence_parallel    Tests   tests/test_sequence_parallel.py
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab import deferred, sharding, tensor_parallel
from picotron_lab.comm import Axis
from picotron_lab.dropout import Dropout, Where
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import wire_bytes
from picotron_lab.model import Llama
from picotron_lab.tensor_parallel import Crossing, Region, apart, demo, join, print_contract

# ---- 1. the idea


def sequence_first(x_BTD: Tensor) -> Tensor:
    """[B, T, D] -> [T*B, D]: the verbs cut and join dim 0. A copy, unless B is 1."""
    return x_BTD.transpose(0, 1).flatten(0, 1).contiguous()


def batch_first(x_ND: Tensor, B: int) -> Tensor:
    """[T*B, D] -> [B, T, D], a view."""
    return x_ND.unflatten(0, (-1, B)).transpose(0, 1)


def gather(x_BTD: Tensor, axis: Axis) -> Tensor:
    """shard -> replicated (all_gather along T, S)."""
    return batch_first(axis.all_gather(sequence_first(x_BTD)), len(x_BTD))


def scatter(y_BTD: Tensor, axis: Axis) -> Tensor:
    """partial -> shard (reduce_scatter along T, S)."""
    return batch_first(axis.reduce_scatter(sequence_first(y_BTD)), len(y_BTD))


def own(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The part of x that belongs to this rank's tokens: a copy, so that the whole can be freed."""
    assert x.shape[dim] % axis.size == 0, (
        f"{x.shape[dim]} tokens cannot be shared out evenly among {axis.size} ranks: choose a "
        f"length that is a multiple of {axis.size}."
    )
    start, stop = sharding.bounds(x.shape[dim], axis.size, axis.rank)
    return x.narrow(dim, start, stop - start).clone()


class Gather(torch.autograd.Function):
    """shard -> replicated (all_gather, S); backward: partial -> shard (reduce_scatter, S)."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather(x_BTD, axis)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return scatter(grad_BTD, ctx.axis), None


class Scatter(torch.autograd.Function):
    """partial -> shard (reduce_scatter, S); backward: shard -> replicated (all_gather, S)."""

    @staticmethod
    def forward(ctx, y_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return scatter(y_BTD, axis)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return gather(grad_BTD, ctx.axis), None


# ---- 2. plain path


class Column(torch.autograd.Function):
    """Gather x, then x W^T for each W; saves the shard of x, and gathers it again in backward."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.owners = axis, [*map(deferred.owner, weights)]
        ctx.save_for_backward(x_BTD, *weights)
        whole_BTD = gather(x_BTD, axis)
        return tuple(F.linear(whole_BTD, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, *weights = ctx.saved_tensors
        whole_BTD = gather(x_BTD, ctx.axis)
        dx_BTD = sum(grad @ weight for grad, weight in zip(grads, weights, strict=True))
        both = zip(ctx.owners, grads, strict=True)
        dws = [deferred.weight_gradient(owner, grad, whole_BTD) for owner, grad in both]
        return scatter(dx_BTD, ctx.axis), None, *dws


class SequenceCrossing(Crossing):
    """The border of a region whose outside holds T/n tokens."""

    def enter(self, x_BTD: Tensor) -> Tensor:
        """shard -> replicated (all_gather, S); backward: reduce_scatter(S)."""
        return Gather.apply(x_BTD, self.axis)

    def leave(self, y_BTD: Tensor) -> Tensor:
        """partial -> shard (reduce_scatter, S); backward: all_gather(S)."""
        return Scatter.apply(y_BTD, self.axis)

    def column(self, x_BTD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gather once, then multiply by this rank's columns of each weight; see Column."""
        return Column.apply(x_BTD, self.axis, *weights)


class Local(nn.Module):
    """A part of the plain model that from now on serves this rank's tokens."""

    def __init__(self, whole: nn.Module, axis: Axis):
        super().__init__()
        self.whole, self.axis = whole, axis


class LocalDropout(Local):
    """Takes the mask of this rank's positions, not that of the first T/n."""

    def forward(self, x_BTD: Tensor, where: Where) -> Tensor:
        positions_T = own(where.positions_T, 0, self.axis)
        return self.whole(x_BTD, replace(where, positions_T=positions_T))


class LocalEmbedding(Local):
    """Looks up this rank's tokens only: the table's gradient becomes partial."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.whole(own(tokens_BT, 1, self.axis))


class SplitEmbedding(Local):
    """After an embedding that gives every rank all tokens: keeps the own ones."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return Split.apply(self.whole(tokens_BT), self.axis)


class GatheredHead(Local):
    """Before a head that wants all tokens, and gives every rank their whole gradient."""

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        return self.whole(Join.apply(x_BTD, self.axis), labels_BT)


class Split(torch.autograd.Function):
    """replicated -> shard (nothing sent); backward: shard -> replicated (all_gather, S)."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return own(x_BTD, 1, axis)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return gather(grad_BTD, ctx.axis), None


class Join(torch.autograd.Function):
    """shard -> replicated (all_gather, S); backward: replicated -> shard (nothing sent).

    Not a reduce_scatter as in Gather: the gradient is no sum of terms, it would count n times.
    """

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather(x_BTD, axis)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return own(grad_BTD, 1, ctx.axis), None


def parallelize(model: Llama, axis: Axis, impl: str) -> None:
    """Cut what a tensor-parallel model does outside its regions along T, which axis.size divides.

    impl     "plain" | "fused"
    After tensor_parallel.parallelize, and split_head or vocab_parallel.py, on the same axis.
    """
    crossing = CROSSINGS[impl](axis)
    for module in list(model.modules()):
        if isinstance(module, Region):
            module.crossing = crossing
        for name, part in list(module.named_children()):
            if isinstance(part, Dropout):
                setattr(module, name, LocalDropout(part, axis))
    replicated = all(axis.name in p.record.replicas for p in model.embed.parameters())
    model.embed = (LocalEmbedding if replicated else SplitEmbedding)(model.embed, axis)
    if not isinstance(model.head, Region):
        model.head = GatheredHead(model.head, axis)
    for parameter in model.parameters():  # norms and embedding; a router is partial already
        record = parameter.record
        if axis.name in record.replicas and axis.name not in record.partial:
            sharding.update(parameter, partial=(*record.partial, axis.name))


# ---- 3. fused path


def travelling(x_ND: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """Every rank's shard in turn, (rank, shard), the own one first: an all_gather in n - 1 steps.

    While the caller works on one, it travels on to the right, and the next comes from the left.
    """
    right, left = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    for step in range(axis.size - 1):
        next_shard = axis.exchange([(x_ND, right)], [(x_ND, left)], wait=False)
        yield (axis.rank - step) % axis.size, x_ND
        (x_ND,) = next_shard.wait()
    yield right, x_ND


def gather_matmul(x_ND: Tensor, w_DF: Tensor, axis: Axis) -> tuple[list[Tensor], Tensor]:
    """(every rank's shard of x, gathered x times w [N, F]): multiplied shard by shard, as they
    come."""
    shards = [x_ND] * axis.size
    y = x_ND.new_empty(axis.size, len(x_ND), w_DF.shape[1])
    for source, shard_ND in travelling(x_ND, axis):
        shards[source] = shard_ND
        torch.mm(shard_ND, w_DF, out=y[source])
    return shards, y.flatten(0, 1)


def matmul_scatter(x_NF: Tensor, w_FD: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of the sum over all ranks of x times w [N, D]: a reduce_scatter in n - 1
    steps.

    A block of rows travels right to the rank that keeps it, and every rank on its way adds its
    term, which it computed while the block came. Sums are rounded to the dtype of x on each step.
    """
    right, left = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    blocks = x_NF.chunk(axis.size)
    total_ND = blocks[left] @ w_FD
    for step in range(1, axis.size):
        coming = axis.exchange([(total_ND, right)], [(total_ND, left)], wait=False)
        term_ND = blocks[(left - step) % axis.size] @ w_FD
        total_ND = term_ND.add_(coming.wait()[0])
    return total_ND


class FusedColumn(torch.autograd.Function):
    """Column with one matmul, shard by shard; backward sends while it computes.

    backward: all_gather of x during the matmul of dX, reduce_scatter of dX during that of dW.
    """

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.rows = axis, [len(weight) for weight in weights]
        ctx.owners = [*map(deferred.owner, weights)]
        ctx.save_for_backward(x_BTD, *weights)
        w_DF = join(weights).T
        y_NF = gather_matmul(sequence_first(x_BTD), w_DF, axis)[1]
        return apart(batch_first(y_NF, len(x_BTD)), ctx.rows)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, *weights = ctx.saved_tensors
        whole_x = ctx.axis.all_gather(sequence_first(x_BTD), wait=False)
        grad_NF = sequence_first(join(grads, -1))
        dx_ND = grad_NF @ join(weights)
        x_ND = whole_x.wait()
        shard_of_dx = ctx.axis.reduce_scatter(dx_ND, wait=False)
        dws = deferred.weight_gradients(ctx.owners, grad_NF, x_ND, ctx.rows)
        return batch_first(shard_of_dx.wait(), len(x_BTD)), None, *dws


class FusedRow(torch.autograd.Function):
    """A row-parallel matmul and its reduce_scatter, block by block; backward: an all_gather of dY
    and the matmul of dX likewise."""

    @staticmethod
    def forward(ctx, x_BTF: Tensor, w_DF: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.owner = axis, deferred.owner(w_DF)
        ctx.save_for_backward(x_BTF, w_DF)
        return batch_first(matmul_scatter(sequence_first(x_BTF), w_DF.T, axis), len(x_BTF))

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTF, w_DF = ctx.saved_tensors
        grads, dx_NF = gather_matmul(sequence_first(grad_BTD), w_DF, ctx.axis)
        x_NF = sequence_first(x_BTF)
        dw_DF = deferred.weight_gradient(ctx.owner, torch.cat(grads), x_NF)
        return batch_first(dx_NF, len(x_BTF)), dw_DF, None


class FusedSequenceCrossing(SequenceCrossing):
    """Transfers that hide behind the matmuls next to them; enter and leave stay plain."""

    def column(self, x_BTD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return FusedColumn.apply(x_BTD, self.axis, *weights)

    def row(self, x_BTF: Tensor, w_DF: Tensor) -> Tensor:
        return FusedRow.apply(x_BTF, w_DF, self.axis)


CROSSINGS = {"plain": SequenceCrossing, "fused": FusedSequenceCrossing}


# ---- 4. contract


def contract(
    regions: int, S: int, n: int, impl: str, experts: int = 0, logits: int = 0
) -> dict[str, tuple[int, int]]:
    """{"forward all_gather": (calls, payload bytes), ...} of one micro-batch.

    regions   2 per layer, of which `experts` are mixtures of experts      S   bytes of [B, T, D]
    logits    bytes of [B, T, V], V rounded up to a multiple of n; 0: without split_head
    """
    rows = regions - experts  # regions that begin with a column and end with a row
    columns = rows + (1 if logits else 0)
    calls = {
        "forward all_gather": columns + experts,
        "forward reduce_scatter": regions,
        "backward all_gather": regions + columns,
        "backward reduce_scatter": columns + experts,
    }
    if impl == "fused":  # rings: n - 1 exchanges of S/n each, on the wire one all_gather(S)
        calls["forward all_gather"] -= columns
        calls["forward reduce_scatter"] -= rows
        calls["backward all_gather"] -= rows
        calls["forward exchange"] = (columns + rows) * (n - 1)
        calls["backward exchange"] = rows * (n - 1)
    sent = {name: (k, k * S // (n if "exchange" in name else 1)) for name, k in calls.items()}
    if logits:
        k, payload = sent["forward all_gather"]
        sent["forward all_gather"] = k + 1, payload + logits
    return {name: counts for name, counts in sent.items() if counts[0]}


def on_wire(sent: dict[str, tuple[int, int]], n: int) -> dict[str, float]:
    """Bytes that a rank sends in forward and in backward, on a ring (see ledger.py)."""
    total = {"forward": 0.0, "backward": 0.0}
    for name, (_, payload) in sent.items():
        direction, op = name.split()
        total[direction] += wire_bytes(op, payload, n)
    return total


ONE, SAVED = "regions S", "regions 4 B T (D + 4 F)/n"
FORMULAS = {
    "plain": (ONE, ONE, f"2 {ONE}", ONE, SAVED),
    "fused": (ONE, ONE, f"2 {ONE} (n-1)/n", f"{ONE} (n-1)/n", SAVED),
}


def main() -> None:
    """The MLPs of tensor_parallel.py on 4 threads, and what goes over the wire with and without."""
    (regions, B, T, D, width), n = tensor_parallel.DEMO, 4
    S = 4 * B * T * D
    print(f"{regions} MLPs, B {B}, T {T}, D {D}, F {width}, S = 4 B T D = {S}, n = {n} ranks")
    for impl, crossing in CROSSINGS.items():
        predicted = contract(regions, S, n, impl)
        wire = on_wire(predicted, n)
        predicted["saved"] = 1, 4 * regions * B * T * (D + 4 * width) // n
        measured = run_ranks(demo, n, crossing, T // n)[0]
        print_contract(FORMULAS[impl], predicted, measured)
        print(f"{impl}: bytes on the wire {wire}\n")
    print("tensor parallelism alone:", on_wire(tensor_parallel.contract(regions, S), n))


if __name__ == "__main__":
    main()
