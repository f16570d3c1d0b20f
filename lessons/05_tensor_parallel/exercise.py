"""Lesson 05, tensor parallelism: cut every matrix of a block over the ranks, join with two sums.

Dims    B micro-batch  T sequence  D width  H/K query/key-value heads  C head width
        F feed-forward width  V vocabulary; of n ranks, each holds its part of H, K, F and V
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lessons import TODO
from picotron_lab.comm import Axis
from picotron_lab.model import MLP, Attention, Head


def enter(x_BTD: Tensor, axis: Axis) -> Tensor:  # Task 05.1
    """f: the beginning of a region, in which each rank computes one term of a sum.

    Before  x alike on all ranks
    After   the same values. In backward, each rank brings the gradient of its own term; x gets
            their sum, alike on all ranks
    Budget  forward nothing is sent; backward one all_reduce of [B, T, D]
    """
    raise TODO("05.1")


def leave(y_BTD: Tensor, axis: Axis) -> Tensor:  # Task 05.1
    """g: the end of a region.

    Before  y on rank r: its term of the sum
    After   the sum, alike on all ranks; y itself is unchanged. In backward, every rank already has
            the gradient of the sum, which is the gradient of each term
    Budget  forward one all_reduce of [B, T, D]; backward nothing is sent
    """
    raise TODO("05.1")


def cut(whole: Tensor, dim: int, parts: int, index: int) -> nn.Parameter:  # Task 05.2
    """Part `index` of `parts` of a weight, cut along dim.

    Before  `length` rows (dim 0) or columns (dim 1)
    After   index*size up to (index+1)*size of them, where size = ceil(length / parts): the last
            part may be shorter. A parameter that stays when `whole` is deleted
    Budget  once `whole` is deleted, only the bytes of the part are alive
    """
    raise TODO("05.2")


def column(x_BTD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:  # Task 05.2
    """Column-parallel: x W^T for several W that share an input; begins a region.

    Before  x alike on all ranks; each W [F/n, D]: this rank's outputs. (nn.Linear keeps the
            transpose of the paper's matrix: what is a column there is a row of W.)
    After   one [B, T, F/n] for each W
    Budget  forward nothing is sent; backward one all_reduce of [B, T, D], however many weights
    """
    raise TODO("05.2")


def row(x_BTF: Tensor, w_DF: Tensor, b_D: Tensor | None, axis: Axis) -> Tensor:  # Task 05.2
    """Row-parallel: x W^T + b, where each rank has some of the inputs; ends a region.

    Before  x [B, T, F/n] and W [D, F/n]: this rank's inputs; b, if there is one, whole everywhere
    After   [B, T, D], alike on all ranks; in backward every rank has the whole gradient of b
    Budget  forward one all_reduce of [B, T, D]; backward nothing is sent
    """
    raise TODO("05.2")


class ParallelMLP(nn.Module):  # Task 05.3
    """The plain MLP (picotron_lab.model) on n ranks.

    Before  `whole`: an MLP with all its weights, on every rank; its modules may be changed
    After   gate, up, down: nn.Linear without bias as in the plain MLP, each with this rank's part
            of the weight, cut as in 05.2
    Budget  forward one all_reduce of [B, T, D], backward one
    """

    def __init__(self, whole: MLP, axis: Axis):
        super().__init__()
        raise TODO("05.3")

    def forward(self, x_BTD: Tensor) -> Tensor:
        raise TODO("05.3")


class ParallelAttention(nn.Module):  # Task 05.3
    """The plain Attention (picotron_lab.model) on n ranks, cut by heads.

    Before  `whole`: an Attention with all its weights; n divides H, and divides K or is a multiple
            of it
    After   q, k, v, o: nn.Linear as in the plain one. Rank r has query heads r*H/n up to
            (r+1)*H/n, and the key/value heads that those use: H/K neighbouring query heads share
            one. If K < n, n/K neighbours hold the same key/value head: they are the axis `kv`
            (else that has size 1). After backward the gradient of k and v is that of one device
    Budget  axis: forward one all_reduce of [B, T, D], backward one. kv: backward one all_reduce of
            each shared weight, nothing if its size is 1
    """

    def __init__(self, whole: Attention, axis: Axis, kv: Axis):
        super().__init__()
        raise TODO("05.3")

    def forward(
        self,
        x_BTD: Tensor,
        angles: tuple[Tensor, Tensor],
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        raise TODO("05.3")


class ParallelHead(nn.Module):  # Task 05.4
    """The output layer on n ranks: each holds rows of the weight, each gets all logits.

    Before  `whole`: the plain Head, whose weight is [V, D]; V is any number
    After   weight: nn.Parameter, this rank's rows, cut as in 05.2. forward(x) gives logits
            [B, T, V], alike on all ranks; all ranks then compute the same loss from them
    Budget  weight 8 D ceil(V/n) bytes; forward one all_gather of n ceil(V/n) logits per token,
            backward one all_reduce of [B, T, D]
    """

    def __init__(self, whole: Head, axis: Axis):
        super().__init__()
        raise TODO("05.4")

    def forward(self, x_BTD: Tensor) -> Tensor:
        raise TODO("05.4")
