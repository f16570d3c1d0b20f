"""Lesson 12, expert parallelism: each rank keeps some experts; tokens travel to theirs, and back.

Here an expert is a module, [rows, D] -> [rows, D], in float64. Rank r has experts r e to r e + e-1.
Dims    N tokens of this rank  k experts of a token  D width  E = n e experts, e of them this rank's
        M = N k rows that leave  R rows that come
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lessons import TODO
from picotron_lab.comm import Axis


class Travel(torch.autograd.Function):  # Task 12.1: fill in both methods
    """Rows go to other ranks; their gradients come back the same way.

    Call it as Travel.apply(rows_MD, send, receive, ep); `send[j]` rows go to rank j, in order, and
    `receive[i]` rows come from rank i. ep.all_to_all(x, send, receive) does that with any tensor.

    Before  [M, D], sorted by destination
    After   [R, D], sorted by source. Backward: [R, D] of gradients -> [M, D]
    Budget  one all_to_all each way, of these rows and no padding
    """

    @staticmethod
    def forward(ctx, rows_MD: Tensor, send: list[int], receive: list[int], ep: Axis) -> Tensor:
        """[M, D] -> [R, D]."""
        raise TODO("12.1")

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """[R, D] -> [M, D], and nothing for the other arguments."""
        raise TODO("12.1")


def moe(
    x_ND: Tensor, expert_Nk: Tensor, gate_Nk: Tensor, experts: Sequence[nn.Module], ep: Axis
) -> Tensor:  # Task 12.2
    """Each token's k experts, weighted by its gates: y[i] = sum over j of gate[i, j] expert(x[i]).

    expert_Nk  int64, which of the E experts          experts  this rank's e, in order
    Before  every rank: its own tokens, and e experts that tokens of all ranks may choose
    After   [N, D] for its own tokens. In backward every expert has a gradient, of zeros if nobody
            chose it, and it is complete: that of one device
    Budget  one all_gather of the counts (int64, E per rank); two all_to_all forward, two backward,
            of the routed rows alone
    """
    raise TODO("12.2")


def within_capacity(expert_Tk: Tensor, experts: int, capacity: int) -> Tensor:  # Task 12.3
    """Which choices of one sequence are kept if an expert takes no more than `capacity` of them.

    First come, first served: token after token, and its k choices from left to right, so that no
    token depends on a later one.
    Before  [T, k] int64, T tokens in order
    After   [T, k] bool
    Budget  no loop over tokens: at most 40 operators on tensors, however long the sequence is
    """
    raise TODO("12.3")


def moved_bias(bias_E: Tensor, expert_Nk: Tensor, speed: float, ep: Axis) -> Tensor:  # Task 12.4
    """The bias of the next step: up by `speed` for an expert with fewer tokens than the mean of all
    ranks' tokens, down for one with more, unchanged for one that has just the mean.

    Before  every rank: the same bias [E], and the choices of its own tokens
    After   every rank: the same new bias [E]; bias_E itself unchanged
    Budget  one all_reduce, of E numbers
    """
    raise TODO("12.4")
