"""Solution of lesson 05: the plain path of picotron_lab/tensor_parallel.py."""

from collections.abc import Sequence

from torch import Tensor, nn

from picotron_lab import sharding, tensor_parallel
from picotron_lab.comm import Axis
from picotron_lab.model import MLP, Attention, Head
from picotron_lab.tensor_parallel import Crossing


def enter(x_BTD: Tensor, axis: Axis) -> Tensor:
    """f."""
    return Crossing(axis).enter(x_BTD)


def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
    """g."""
    return Crossing(axis).leave(y_BTD)


def cut(whole: Tensor, dim: int, parts: int, index: int) -> nn.Parameter:
    """A copy: a slice would keep the whole alive."""
    start, stop = sharding.bounds(whole.shape[dim], parts, index)
    return nn.Parameter(whole.detach().narrow(dim, start, stop - start).clone())


def column(x_BTD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Enters once."""
    return list(Crossing(axis).column(x_BTD, weights))


def row(x_BTF: Tensor, w_DF: Tensor, b_D: Tensor | None, axis: Axis) -> Tensor:
    """The bias comes after the sum: once."""
    y_BTD = Crossing(axis).row(x_BTF, w_DF)
    return y_BTD if b_D is None else y_BTD + b_D


class ParallelMLP(tensor_parallel.ParallelMLP):
    """The library's."""

    def __init__(self, whole: MLP, axis: Axis):
        sharding.attach(whole)
        super().__init__(whole, Crossing(axis))


class ParallelAttention(tensor_parallel.ParallelAttention):
    """The library's. Its trainer sums what is partial over kv; here a hook does."""

    def __init__(self, whole: Attention, axis: Axis, kv: Axis):
        sharding.attach(whole)
        super().__init__(whole, kv, Crossing(axis))
        for shared in (self.k, self.v):
            shared.weight.register_hook(kv.all_reduce)


class ParallelHead(tensor_parallel.ParallelHead):
    """The library's."""

    def __init__(self, whole: Head, axis: Axis):
        sharding.attach(whole)
        super().__init__(whole, Crossing(axis))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return super().forward(x_BTD)
