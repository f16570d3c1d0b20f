"""Lesson 04, ZeRO: stop keeping n copies of what only one rank needs.

Gradients are sums over ranks here, never means: every loss was divided by the global count already.
Rows     a tensor is cut along dim 0 into n parts of ceil(rows / n) rows; the last ranks have fewer
         rows, or none. On the wire all parts are equally long: padding fills them up
Letters  n ranks   m micro-batches   Ψ elements of all parameters, 8 bytes each (float64)
"""

from typing import Any

import torch
from torch import Tensor, nn

from lessons import TODO
from picotron_lab.comm import Axis


def mine(full: Tensor, axis: Axis) -> slice:  # Task 04.1
    """The rows (dim 0) of a full tensor that this rank holds.

    Before  [rows, ...]
    After   slice(start, stop), ceil(rows / n) rows or, on the last ranks, fewer or none
    Budget  nothing is sent
    """
    raise TODO("04.1")


def scatter_sum(part: Tensor, axis: Axis) -> Tensor:  # Task 04.1
    """My rows of the sum over ranks.

    Before  part on rank r: [rows, ...], a summand of the full tensor
    After   [my rows, ...] of the sum
    Budget  one reduce_scatter of the full tensor, padded
    """
    raise TODO("04.1")


def gather_rows(shard: Tensor, rows: int, axis: Axis) -> Tensor:  # Task 04.1
    """The full tensor from everybody's rows.

    Before  shard on rank r: its rows, [my rows, ...]
    After   [rows, ...] on every rank
    Budget  one all_gather of the full tensor, padded
    """
    raise TODO("04.1")


class Stage1:  # Task 04.2
    """Moments are cut: each rank steps its rows, then all gather the new weights.

    parameters  all trainable ones; every rank uses every one of them
    shards      list of nn.Parameter, an optimizer's whole food: shard i is this rank's rows of
                parameter i, best a view of its memory; a shard without rows stays in the list
    Use         sync = Stage1(...); an optimizer of sync.shards; then per step begin_step(), m times
                before_backward(last) and backward, finish(), the optimizer's step, publish()
    Before      parameters alike on all ranks
    After       finish(): shard.grad is my rows of the sum over all n*m losses
                publish(): parameters are the stepped ones, alike on all ranks
    Budget      live: 16Ψ/n of moments. Payload per step: reduce_scatter 8Ψ + all_gather 8Ψ,
                whatever m, as much as one all_reduce costs on the wire; no all_reduce
    """

    def __init__(self, parameters: list[nn.Parameter], axis: Axis):
        raise TODO("04.2")

    def begin_step(self) -> None:
        """Gradients are zero."""
        raise TODO("04.2")

    def before_backward(self, last: bool) -> None:
        """One micro-batch's backward comes; `last` says that no other follows in this step."""
        raise TODO("04.2")

    def finish(self) -> None:
        """partial -> shard: every shard.grad is the whole sum of its rows."""
        raise TODO("04.2")

    def publish(self) -> None:
        """shard -> replicated: the optimizer has stepped the shards; the other weights follow."""
        raise TODO("04.2")


class Stage2(Stage1):  # Task 04.3
    """Gradients are cut too: a full one is reduced and freed as soon as backward has made it.

    Before  as stage 1
    After   as stage 1; after backward every p.grad is None
    Budget  live after backward: 8Ψ + (8Ψ + 16Ψ)/n, and room for another 8Ψ/n
            peak: besides, a few tensors, not all gradients
            payload per step: m reduce_scatter of 8Ψ + all_gather of 8Ψ
    """

    def __init__(self, parameters: list[nn.Parameter], axis: Axis):
        raise TODO("04.3")

    def begin_step(self) -> None:
        """Gradients are zero."""
        raise TODO("04.3")

    def finish(self) -> None:
        """partial -> shard: every shard.grad is the whole sum of its rows."""
        raise TODO("04.3")


class ShardedLinear(torch.autograd.Function):  # Task 04.4
    """Stage 3 for one layer y = x W^T: W is whole only while it is multiplied.

    Call    ShardedLinear.apply(x_NI, shard_RI, rows, axis); W is [rows, I], I inputs, N tokens
    Before  x_NI differs by rank; shard_RI is this rank's rows of W
    After   forward: y [N, rows]. backward: dx_NI of my tokens, and for the shard my rows of the
            sum over ranks of dW
    Budget  live between forward and backward: activations, no gathered weight
            payload: 2 all_gathers and 1 reduce_scatter of W; no all_reduce
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, shard_RI: Tensor, rows: int, axis: Axis) -> Tensor:
        """y [N, rows]."""
        raise TODO("04.4")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """(dx_NI, gradient of shard_RI, None, None)."""
        raise TODO("04.4")
