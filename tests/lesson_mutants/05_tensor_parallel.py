"""Wrong answers to lesson 05 that a student may give."""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lessons.kit import mutant
from picotron_lab import sharding
from picotron_lab.comm import Axis
from picotron_lab.tensor_parallel import Crossing, keep_part


class Carry(torch.autograd.Function):
    """What two functions do, one in forward and one in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, ahead: Callable, back: Callable) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def same(x: Tensor) -> Tensor:
    """Nothing happens."""
    return x.view_as(x)


@mutant("05.1", "its own term alone")
def no_f(solution: ModuleType) -> dict:
    """x is already there: nothing to do."""

    def enter(x_BTD: Tensor, axis: Axis) -> Tensor:
        return x_BTD

    return {"enter": enter}


@mutant("05.1", "not seen by autograd")
def no_gradient(solution: ModuleType) -> dict:
    """The sum is all there is to g."""

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return axis.all_reduce(y_BTD.detach())

    return {"leave": leave}


@mutant("05.1", "what every rank already had")
def g_sums_again(solution: ModuleType) -> dict:
    """The dual of a sum over ranks is a sum over ranks."""

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return Carry.apply(y_BTD, axis.all_reduce, axis.all_reduce)

    return {"leave": leave}


@mutant("05.1", "changed places")
def f_and_g_exchanged(solution: ModuleType) -> dict:
    """Backward goes the other way round, so the sums do, too."""

    def enter(x_BTD: Tensor, axis: Axis) -> Tensor:
        return Carry.apply(x_BTD, same, same)

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return Carry.apply(y_BTD, axis.all_reduce, axis.all_reduce)

    return {"enter": enter, "leave": leave}


@mutant("05.1", "sends in forward")
def f_makes_sure(solution: ModuleType) -> dict:
    """Better to see to it that x is alike on all ranks."""

    def enter(x_BTD: Tensor, axis: Axis) -> Tensor:
        return Carry.apply(x_BTD, lambda x: axis.all_reduce(x, "mean"), axis.all_reduce)

    return {"enter": enter}


@mutant("05.1", "sends in backward")
def g_makes_sure(solution: ModuleType) -> dict:
    """Better to see to it that the gradient is alike on all ranks."""

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return Carry.apply(y_BTD, axis.all_reduce, lambda grad: axis.all_reduce(grad, "mean"))

    return {"leave": leave}


@mutant("05.1", "forward in leave, back in enter")
def two_halves(solution: ModuleType) -> dict:
    """Half of x enters at a time: as if it were two regions."""

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return solution.leave(y_BTD / 2, axis) + solution.leave(y_BTD / 2, axis)

    return {"leave": leave}


@mutant("05.2", "no nn.Parameter")
def part_does_not_learn(solution: ModuleType) -> dict:
    """A part of a weight is a tensor."""

    def cut(whole: Tensor, dim: int, parts: int, index: int) -> Tensor:
        return solution.cut(whole, dim, parts, index).detach()

    return {"cut": cut}


@mutant("05.2", "a slice is a view")
def view_of_whole(solution: ModuleType) -> dict:
    """A slice of the weight is what this rank holds."""

    def cut(whole: Tensor, dim: int, parts: int, index: int) -> nn.Parameter:
        size = -(-whole.shape[dim] // parts)
        start = index * size
        length = min(size, whole.shape[dim] - start)
        return nn.Parameter(whole.detach().narrow(dim, start, length))

    return {"cut": cut}


@mutant("05.2", "what remains belongs to nobody")
def remainder_lost(solution: ModuleType) -> dict:
    """Widths divide by the number of ranks."""

    def cut(whole: Tensor, dim: int, parts: int, index: int) -> nn.Parameter:
        size = whole.shape[dim] // parts
        return nn.Parameter(whole.detach().narrow(dim, index * size, size).clone())

    return {"cut": cut}


@mutant("05.2", "added by every rank")
def bias_n_times(solution: ModuleType) -> dict:
    """A linear layer is x W^T + b; then comes the sum."""

    def row(x_BTF: Tensor, w_DF: Tensor, b_D: Tensor | None, axis: Axis) -> Tensor:
        return solution.leave(F.linear(x_BTF, w_DF, b_D), axis)

    return {"row": row}


@mutant("05.2", "its replicas would drift apart")
def bias_on_one_rank(solution: ModuleType) -> dict:
    """If only rank 0 adds the bias, it is added once."""

    def row(x_BTF: Tensor, w_DF: Tensor, b_D: Tensor | None, axis: Axis) -> Tensor:
        return solution.leave(F.linear(x_BTF, w_DF, b_D if axis.rank == 0 else None), axis)

    return {"row": row}


@mutant("05.2", "however many weights share x")
def f_per_weight(solution: ModuleType) -> dict:
    """Each weight is a layer of its own, so each has its f."""

    def column(x_BTD: Tensor, weights: list[Tensor], axis: Axis) -> list[Tensor]:
        return [F.linear(solution.enter(x_BTD, axis), weight) for weight in weights]

    return {"column": column}


class PerMatrix(Crossing):
    """An f for each of q, k and v."""

    def column(self, x_BTD: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [F.linear(self.enter(x_BTD), weight) for weight in weights]


@mutant("05.3", "however many weights share x")
def f_for_q_k_and_v(solution: ModuleType) -> dict:
    """Three all_reduces where one serves: 7 per block instead of 4, as in a known repository."""

    class ParallelAttention(solution.ParallelAttention):
        def __init__(self, whole: nn.Module, axis: Axis, kv: Axis):
            super().__init__(whole, axis, kv)
            self.crossing = PerMatrix(axis)

    return {"ParallelAttention": ParallelAttention}


@mutant("05.3", "this rank's own query heads")
def shared_heads_not_summed(solution: ModuleType) -> dict:
    """Every rank has its key/value head, and its gradient."""

    class ParallelAttention(solution.ParallelAttention):
        def __init__(self, whole: nn.Module, axis: Axis, kv: Axis):
            super().__init__(whole, axis, kv)
            for shared in (self.k, self.v):
                shared.weight = nn.Parameter(shared.weight.detach())  # without its hook

    return {"ParallelAttention": ParallelAttention}


@mutant("05.3", "dealt out in turn")
def shared_heads_dealt(solution: ModuleType) -> dict:
    """Rank r takes key/value head r mod K: with K < n that is another group's."""

    class ParallelAttention(solution.ParallelAttention):
        def __init__(self, whole: nn.Module, axis: Axis, kv: Axis):
            k, v = (linear.weight.detach().clone() for linear in (whole.k, whole.v))
            super().__init__(whole, axis, kv)
            heads = len(k) // self.head_width
            for linear, weight in ((self.k, k), (self.v, v)):
                mine = weight.unflatten(0, (heads, -1))[axis.rank % heads]
                linear.weight.data = mine if kv.size > 1 else linear.weight.data

    return {"ParallelAttention": ParallelAttention}


@mutant("05.3", "calls on kv")
def shared_heads_kept_alike(solution: ModuleType) -> dict:
    """Copies may drift apart: average them whenever they are used."""

    class ParallelAttention(solution.ParallelAttention):
        def __init__(self, whole: nn.Module, axis: Axis, kv: Axis):
            super().__init__(whole, axis, kv)
            self.kv = kv

        def forward(self, x_BTD: Tensor, *others: object) -> Tensor:
            for shared in (self.k, self.v):
                shared.weight.data = self.kv.all_reduce(shared.weight.data, "mean")
            return super().forward(x_BTD, *others)

    return {"ParallelAttention": ParallelAttention}


@mutant("05.3", "look into other documents")
def documents_forgotten(solution: ModuleType) -> dict:
    """A sequence is one document."""

    class ParallelAttention(solution.ParallelAttention):
        def forward(self, x_BTD: Tensor, angles: tuple, documents_BT: Tensor | None = None):
            return super().forward(x_BTD, angles)

    return {"ParallelAttention": ParallelAttention}


@mutant("05.4", "all_gather the logits")
def weight_gathered(solution: ModuleType) -> dict:
    """The rows of the others are fetched, and every rank computes all logits."""

    class ParallelHead(nn.Module):
        def __init__(self, whole: nn.Module, axis: Axis):
            super().__init__()
            self.size, self.words = -(-len(whole.weight) // axis.size), len(whole.weight)
            self.weight, self.axis = solution.cut(whole.weight, 0, axis.size, axis.rank), axis

        def forward(self, x_BTD: Tensor) -> Tensor:
            start = self.axis.rank * self.size
            mine = slice(start, start + len(self.weight))
            padded = F.pad(self.weight, (0, 0, 0, self.size - len(self.weight)))
            gather = self.axis.all_gather
            whole = Carry.apply(padded, gather, lambda grad: F.pad(
                grad[mine], (0, 0, 0, self.size - len(grad[mine]))))  # fmt: skip
            return x_BTD @ whole[: self.words].T

    return {"ParallelHead": ParallelHead}


@mutant("05.4", "holds the whole head")
def whole_head(solution: ModuleType) -> dict:
    """The logits are right, so the head is: it is not cut at all, as in a known repository."""

    class ParallelHead(nn.Module):
        def __init__(self, whole: nn.Module, axis: Axis):
            super().__init__()
            self.weight = whole.weight

        def forward(self, x_BTD: Tensor) -> Tensor:
            return x_BTD @ self.weight.T

    return {"ParallelHead": ParallelHead}


@mutant("05.4", "keep your slice")
def logits_scattered_back(solution: ModuleType) -> dict:
    """The dual of all_gather is reduce_scatter."""

    class ParallelHead(solution.ParallelHead):
        def forward(self, x_BTD: Tensor) -> Tensor:
            logits_BTV = super().forward(x_BTD)
            return Carry.apply(logits_BTV, same, self.crossing.axis.all_reduce)

    return {"ParallelHead": ParallelHead}


@mutant("05.4", "keeps all of its tensor alive")
def view_of_head(solution: ModuleType) -> dict:
    """A slice of the weight is what this rank holds."""

    class ParallelHead(solution.ParallelHead):
        def __init__(self, whole: nn.Module, axis: Axis):
            weight = whole.weight.detach()
            super().__init__(whole, axis)
            start = axis.rank * -(-len(weight) // axis.size)
            self.weight = nn.Parameter(weight[start : start + len(self.weight)])

    return {"ParallelHead": ParallelHead}


@mutant("05.4", "there is nothing to add up")
def logits_added_up(solution: ModuleType) -> dict:
    """Each rank writes its logits among zeros; the sum of all is all of them."""

    class ParallelHead(solution.ParallelHead):
        def forward(self, x_BTD: Tensor) -> Tensor:
            axis, rows = self.crossing.axis, len(self.weight)
            start = axis.rank * -(-self.vocabulary // axis.size)
            part_BTR = F.linear(solution.enter(x_BTD, axis), self.weight)
            among = F.pad(part_BTR, (start, self.vocabulary - start - rows))
            return solution.leave(among, axis)

    return {"ParallelHead": ParallelHead}


@mutant("05.4", "only x needs a sum")
def logits_averaged_back(solution: ModuleType) -> dict:
    """Better to see to it that the gradient is alike on all ranks."""

    class ParallelHead(solution.ParallelHead):
        def forward(self, x_BTD: Tensor) -> Tensor:
            axis = self.crossing.axis
            return Carry.apply(
                super().forward(x_BTD), same, lambda grad: axis.all_reduce(grad, "mean")
            )

    return {"ParallelHead": ParallelHead}


@mutant("05.4", "rows of padding")
def padding_left_in(solution: ModuleType) -> dict:
    """Rows of zeros make V divisible; nobody asks for their logits."""

    class ParallelHead(nn.Module):
        def __init__(self, whole: nn.Module, axis: Axis):
            super().__init__()
            sharding.attach(whole)
            rows = -len(whole.weight) % axis.size
            padded = nn.Linear(whole.weight.shape[1], len(whole.weight) + rows, bias=False)
            padded.weight = nn.Parameter(F.pad(whole.weight.detach(), (0, 0, 0, rows)))
            sharding.attach(padded)
            keep_part(padded, 0, axis.size, axis.rank)
            self.weight, self.axis = padded.weight, axis

        def forward(self, x_BTD: Tensor) -> Tensor:
            part_RBT = (solution.enter(x_BTD, self.axis) @ self.weight.T).movedim(-1, 0)
            mine = slice(self.axis.rank * len(part_RBT), (self.axis.rank + 1) * len(part_RBT))
            whole = Carry.apply(part_RBT, self.axis.all_gather, lambda grad: grad[mine])
            return whole.movedim(0, -1)

    return {"ParallelHead": ParallelHead}
