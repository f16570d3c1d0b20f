"""Tensor parallelism: every layer's matrices are cut over the ranks; two sums a block join them.

Paper   Shoeybi et al. 2019, "Megatron-LM", section 3 (1909.08053); shared key/value heads: Ainslie
        et al. 2023, section 2.2 (2305.13245)
Idea    Cut the first of two matrices by columns and the second by rows:
            act(x [W1 W2]) [U1; U2] = act(x W1) U1 + act(x W2) U2
        Each rank computes one term, and a single all_reduce adds them: nothing of width F travels.
        Attention has the same form, cut by heads, for no head looks at another. Two functions stand
        at the border of such a region, each the other's dual:
            f, enter   forward: identity       backward: all_reduce
            g, leave   forward: all_reduce     backward: identity
        The usual mistakes: no f, so that norms and embedding learn from 1/n of the layer; one f for
        each of q, k and v, three sums where one serves; shards drawn from one seed on all ranks.
Before  every rank: H query and K key/value heads, F columns, V rows of the output head
After   rank r of n: H/n query heads, K/n key/value heads (or a replica of one, if K < n), F/n
        columns of gate and up and rows of down (of every expert), V/n rows of the head; gradients
        and moments likewise. Norms, router and embedding are whole.
Wire    S = bytes of [B, T, D]. Block: forward 2 all_reduce(S), backward 2 all_reduce(S). Head:
        forward all_gather(bytes of [B, T, V]), backward all_reduce(S)
Axes    tp: parts of each layer; kv: those ranks of tp that hold the same key/value head
Dims    B micro-batch  T sequence  D width  H/K query/kv heads  C head width  F feed-forward width
        V vocabulary  R this rank's rows of it  N = B*T tokens; inside a region H, K and F are this
        rank's part
Read    Enter, Leave -> Crossing -> ParallelMLP, ParallelAttention, ParallelMoE, ParallelHead ->
        parallelize -> FusedColumn -> contract
Try     python -m picotron_lab.tensor_parallel    Tests   tests/test_tensor_parallel.py
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from picotron_lab import deferred, sharding
from picotron_lab.comm import Axis
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.model import IGNORED, MLP, Attention, Head, Llama, MoE, RMSNorm, wide

# ---- 1. the idea


class Enter(torch.autograd.Function):
    """f: replicated -> replicated (nothing sent); backward: partial -> replicated (all_reduce, S),
    for each rank's region uses all of x, and yields the gradient of its own term only."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.all_reduce(grad_BTD), None


class Leave(torch.autograd.Function):
    """g: partial -> replicated (all_reduce, S); backward: replicated -> replicated (nothing sent),
    for every rank has the gradient of the sum, which is that of each term."""

    @staticmethod
    def forward(ctx, y_BTD: Tensor, axis: Axis) -> Tensor:
        return axis.all_reduce(y_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return grad_BTD, None


class Crossing:
    """How activations cross the border of a region: sequence_parallel.py only swaps this."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def enter(self, x_BTD: Tensor) -> Tensor:
        """replicated -> replicated (nothing sent); backward: all_reduce(S)."""
        return Enter.apply(x_BTD, self.axis)

    def leave(self, y_BTD: Tensor) -> Tensor:
        """partial -> replicated (all_reduce, S); backward: nothing sent."""
        return Leave.apply(y_BTD, self.axis)

    def column(self, x_BTD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Enter once, then multiply by this rank's columns of each weight: w [F, D] -> [B, T, F].

        nn.Linear stores the transpose, so that columns of the paper's matrix are rows here.
        """
        x_BTD = self.enter(x_BTD)
        return [deferred.linear(x_BTD, weight) for weight in weights]

    def row(self, x_BTF: Tensor, w_DF: Tensor) -> Tensor:
        """Multiply by this rank's rows of a weight, then leave: [B, T, F] -> [B, T, D]."""
        return self.leave(deferred.linear(x_BTF, w_DF))


# ---- 2. plain path


class Region(nn.Module):
    """What lies between enter and leave: all of its parameters are this rank's part."""

    def __init__(self, crossing: Crossing):
        super().__init__()
        self.crossing = crossing


class ParallelMLP(Region):
    """An MLP that keeps F/n of its F columns; an odd F is cut unevenly, for none of it travels."""

    def __init__(self, whole: MLP, crossing: Crossing):
        super().__init__(crossing)
        cut_mlp(whole, crossing.axis)
        self.gate, self.up, self.down = whole.gate, whole.up, whole.down
        self.activation = whole.activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.crossing.column(x_BTD, [self.gate.weight, self.up.weight])
        return self.crossing.row(self.activation(gate_BTF, up_BTF), self.down.weight)


class ParallelAttention(Region):
    """H/n query heads and the key/value heads that they use.

    With fewer key/value heads than ranks, the n/K neighbours on the axis kv hold the same one. Each
    computes a gradient of it from its own query heads only: it is partial over kv.
    """

    def __init__(self, whole: Attention, kv: Axis, crossing: Crossing):
        super().__init__(crossing)
        axis = crossing.axis
        self.head_width, self.rotate, self.core = whole.head_width, whole.rotate, whole.core
        self.q, self.k, self.v, self.o = whole.q, whole.k, whole.v, whole.o
        keep_part(self.q, 0, axis.size, axis.rank)
        keep_part(self.o, 1, axis.size, axis.rank)
        assert len(self.q.weight) % self.head_width == 0, (
            f"{axis.size} ranks cannot have whole heads each: choose a number that divides them."
        )
        for shared in (self.k, self.v):
            keep_part(shared, 0, axis.size // kv.size, axis.rank // kv.size)
            sharding.add_axis(shared.weight, kv, partial=True)

    def forward(self, x_BTD: Tensor, angles: tuple, documents_BT: Tensor | None = None) -> Tensor:
        weights = [self.q.weight, self.k.weight, self.v.weight]
        qkv = self.crossing.column(x_BTD, weights)
        q, k, v = (rearrange(y, "b t (h c) -> b t h c", c=self.head_width) for y in qkv)
        q_BTHC, k_BTKC = self.rotate(q, k, angles)
        mixed_BTF = self.core(q_BTHC, k_BTKC, v, documents_BT).flatten(2)
        return self.crossing.row(mixed_BTF, self.o.weight)


class ParallelMoE(Region):
    """The plain MoE with F/n columns of every expert, all of it between enter and leave.

    Every rank routes alike. But y = sum over experts of p_e y_e, and a rank has only its term of
    y_e: its gradient dy . y_e of the routing weight p_e is one term as well. So is all that flows
    back through the router: partial over tp, its weight by its record, x by enter."""

    def __init__(self, whole: MoE, crossing: Crossing):
        super().__init__(crossing)
        for mlp in [*whole.experts] + [whole.shared] * (whole.shared is not None):
            cut_mlp(mlp, crossing.axis)
        whole.router.share = 1 / crossing.axis.size  # of penalties, which every rank computes
        sharding.add_axis(whole.router.weight, crossing.axis, partial=True)
        self.moe = whole

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.crossing.leave(self.moe(self.crossing.enter(x_BTD)))


class ParallelHead(Region):
    """V/n rows of the output layer; the logits are gathered, every rank computes the whole loss.

    vocab_parallel.py does without the gathered logits.
    """

    def __init__(self, whole: Head, crossing: Crossing):
        super().__init__(crossing)
        axis = crossing.axis
        self.vocabulary = whole.weight.shape[0]
        rows = sharding.bounds(self.vocabulary, axis.size, axis.rank)
        self.weight = sharding.narrow(whole.weight, 0, *rows)

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        (part_BTR,) = self.crossing.column(x_BTD, [self.weight])
        logits_BTV = GatherLogits.apply(part_BTR, self.crossing.axis, self.vocabulary)
        if labels_BT is None:
            return logits_BTV
        logits_NV, labels_N = wide(logits_BTV).flatten(0, 1), labels_BT.flatten()
        return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


class GatherLogits(torch.autograd.Function):
    """shard -> replicated (all_gather, bytes of [B, T, V]); backward: own slice, nothing sent.

    Every rank computes the same loss, so each has the gradient of all logits. V goes first, a copy,
    for the verb works along dim 0; ranks with fewer rows send padding.
    """

    @staticmethod
    def forward(ctx, part_BTR: Tensor, axis: Axis, vocabulary: int) -> Tensor:
        ctx.mine = slice(*sharding.bounds(vocabulary, axis.size, axis.rank))
        longest = -(-vocabulary // axis.size)
        part_BTR = F.pad(part_BTR, (0, longest - part_BTR.shape[-1]))
        logits_VBT = axis.all_gather(rearrange(part_BTR, "b t v -> v b t"))[:vocabulary]
        return rearrange(logits_VBT, "v b t -> b t v")

    @staticmethod
    def backward(ctx, grad_BTV: Tensor) -> tuple[Tensor, None, None]:
        return grad_BTV[..., ctx.mine], None, None


def keep_part(linear: nn.Linear, dim: int, parts: int, index: int) -> None:
    """Keep part `index` of `parts` of a weight along dim: 0 its outputs, 1 its inputs."""
    start, stop = sharding.bounds(linear.weight.shape[dim], parts, index)
    linear.weight = sharding.narrow(linear.weight, dim, start, stop)
    linear.out_features, linear.in_features = linear.weight.shape


def cut_mlp(mlp: MLP, axis: Axis) -> None:
    """Keep this rank's columns of gate and up, and the rows of down that belong to them."""
    for linear, dim in ((mlp.gate, 0), (mlp.up, 0), (mlp.down, 1)):
        keep_part(linear, dim, axis.size, axis.rank)


def parallelize(model: Llama, axis: Axis, kv: Axis, impl: str) -> None:
    """Cut attention and MLP (or MoE) of every layer, on the meta device, over the ranks of `axis`.

    kv     the ranks of `axis` with the same key/value head, neighbours: axis.size / kv_heads of
           them where kv_heads < axis.size, else 1
    impl   "plain" | "fused"
    Sizes  axis.size divides heads, and divides kv_heads or is a multiple of it. Embedding and head
           are left to split_head or to vocab_parallel.py.
    """
    crossing = CROSSINGS[impl](axis)
    for block in model.layers:
        block.attention = ParallelAttention(block.attention, kv, crossing)
        region = ParallelMoE if isinstance(block.mlp, MoE) else ParallelMLP
        block.mlp = region(block.mlp, crossing)
    for module in model.modules():
        if isinstance(module, RMSNorm):  # sees whole tokens and, thanks to f, whole gradients
            sharding.add_axis(module.weight, axis, partial=False)


def split_head(model: Llama, axis: Axis, impl: str = "plain") -> None:
    """Cut the output head by rows of the vocabulary, evenly or not; the embedding is replicated.

    For models whose head has a weight of its own; a tied one is for vocab_parallel.py.
    """
    assert model.head.weight is not model.embed.weight, (
        "split_head was given a model whose head is tied to the embedding, and would part the two: "
        "use vocab_parallel.parallelize."
    )
    model.head = ParallelHead(model.head, CROSSINGS[impl](axis))
    sharding.add_axis(model.embed.weight, axis, partial=False)


# ---- 3. fused path


class FusedCrossing(Crossing):
    """One matmul for weights that share an input; backward sends while it computes. A mixture of
    experts enters and leaves as on the plain path."""

    def column(self, x_BTD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return FusedColumn.apply(x_BTD, self.axis, *weights)

    def row(self, x_BTF: Tensor, w_DF: Tensor) -> Tensor:
        return FusedRow.apply(x_BTF, w_DF, self.axis)


class FusedColumn(torch.autograd.Function):
    """x -> x W^T for several W in one matmul; backward: all_reduce(S) of dX during that of dW."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.rows = axis, [len(weight) for weight in weights]
        ctx.owners = [*map(deferred.owner, weights)]
        ctx.save_for_backward(x_BTD, *weights)
        return apart(F.linear(x_BTD, join(weights)), ctx.rows)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, *weights = ctx.saved_tensors
        grad_BTF = join(grads, -1)
        dx_BTD = grad_BTF @ join(weights)
        summed = ctx.axis.all_reduce(dx_BTD, out=dx_BTD, wait=False)
        dws = deferred.weight_gradients(ctx.owners, grad_BTF, x_BTD, ctx.rows)
        return summed.wait(), None, *dws


class FusedRow(torch.autograd.Function):
    """x -> all_reduce(x W^T) in place: partial -> replicated (S); backward: nothing sent."""

    @staticmethod
    def forward(ctx, x_BTF: Tensor, w_DF: Tensor, axis: Axis) -> Tensor:
        ctx.owner = deferred.owner(w_DF)
        ctx.save_for_backward(x_BTF, w_DF)
        y_BTD = F.linear(x_BTF, w_DF)
        return axis.all_reduce(y_BTD, out=y_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTF, w_DF = ctx.saved_tensors
        return grad_BTD @ w_DF, deferred.weight_gradient(ctx.owner, grad_BTD, x_BTF), None


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat, without a copy of a single tensor: the weight of a head is large."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def apart(y_BTF: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """y cut along its last dim into tensors of their own, which kernels want. As a view v would
    keep q and k alive, too, which backward does not need."""
    return tuple(part.contiguous() for part in y_BTF.split(widths, -1))


CROSSINGS = {"plain": Crossing, "fused": FusedCrossing}


# ---- 4. contract


def contract(regions: int, S: int, logits: int = 0) -> dict[str, tuple[int, int]]:
    """{"forward all_reduce": (calls, payload bytes), ...} of one micro-batch.

    regions   2 per layer      S   bytes of [B, T, D]
    logits    bytes of [B, T, V], V rounded up to a multiple of n; 0: without split_head
    """
    head = 1 if logits else 0
    sent = {
        "forward all_reduce": (regions, regions * S),
        "backward all_reduce": (regions + head, (regions + head) * S),
    }
    return sent | ({"forward all_gather": (1, logits)} if head else {})


def tally(ledger: Ledger, direction: str) -> dict[str, tuple[int, int]]:
    """What a ledger holds, in the form of `contract`."""
    ops = sorted({call.op for call in ledger.calls})
    return {f"{direction} {op}": (len(ledger.select(op)), ledger.bytes(op)) for op in ops}


DEMO = (4, 2, 12, 32, 88)  # regions, B, T, D, F: a residual stream of float32 through MLPs


def main() -> None:
    """MLPs on 4 threads: what a rank sends, holds and saves for backward."""
    (regions, B, T, D, width), n = DEMO, 4
    S = 4 * B * T * D
    predicted = contract(regions, S)
    predicted["weights"] = 1, 4 * regions * 3 * D * width // n
    predicted["saved"] = 1, 4 * regions * B * T * (D + 4 * width // n)
    formulas = "regions S", "regions S", "regions 4 (3 D F/n)", "regions 4 B T (D + 4 F/n)"
    print(f"{regions} MLPs, B {B}, T {T}, D {D}, F {width}, S = 4 B T D = {S}, n = {n} ranks")
    print_contract(formulas, predicted, run_ranks(demo, n, Crossing, T)[0])


def print_contract(formulas: Sequence[str], predicted: dict, measured: dict) -> None:
    """A line for everything that was predicted: calls and bytes."""
    print(f"{'calls and bytes':24} {'formula':26} {'predicted':>12} {'measured':>12}")
    for name, formula in zip(predicted, formulas, strict=True):
        columns = ("{} {:8}".format(*counts) for counts in (predicted[name], measured[name]))
        print(f"{name:24} {formula:26}", *(f"{column:>12}" for column in columns))


def demo(axis: Axis, crossing: Callable[[Axis], Crossing], T: int) -> dict[str, tuple[int, int]]:
    """Calls and bytes of one rank that holds T tokens of each sequence outside the regions."""
    count, B, _, D, width = DEMO
    mlps = nn.Sequential(*(MLP(D, width) for _ in range(count)))
    sharding.attach(mlps)
    regions = nn.Sequential(*(ParallelMLP(mlp, crossing(axis)) for mlp in mlps))
    weights = {p.data_ptr(): p.nbytes for p in regions.parameters()}
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            saved[x.data_ptr()] = x.nbytes
        return x

    x_BTD = torch.ones(B, T, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        for region in regions:
            x_BTD = x_BTD + region(x_BTD)
        loss = x_BTD.sum()
    measured = tally(axis.ledger, "forward")
    axis.ledger.clear()
    loss.backward()
    held = {"weights": (1, sum(weights.values())), "saved": (1, sum(saved.values()))}
    return measured | tally(axis.ledger, "backward") | held


if __name__ == "__main__":
    main()
