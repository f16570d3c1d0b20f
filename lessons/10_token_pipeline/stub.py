"""Lesson 10, token pipelines: a sequence goes through the pipeline in slices.

Dims  B sequences  T tokens, of a slice l  S keys so far  H heads  C head width  D = H*C width
      n slices  K stages
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lessons import TODO
from picotron_lab.comm import Axis


class SlicedAttention:  # Tasks 10.1 and 10.2
    """One attention layer that takes a sequence slice by slice, in order, and goes backward from
    the last slice to the first.

    layer.project(x_BTD, first)  q, k, v [B, T, H, C]; x is tokens first, first + 1, ... of the
                                 sequence, by which q and k are rotated
    layer.finish(out_BTHC)       [B, T, D]
    """

    def __init__(self, layer: Any):
        """Keep whatever you need: this is yours to extend."""
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Output [B, T, D] of the next slice: a token sees itself and all tokens before it.

        Scores are q k / sqrt(C). Earlier slices have been here, in other calls.
        Budget  every token is projected once, however many slices come after it
        """
        raise TODO("10.1")

    def backward(self, grad_BTD: Tensor) -> Tensor:
        """Gradient [B, T, D] for the input of the newest slice that was not backward yet.

        Before  grad_BTD of that slice's output; all later slices were backward
        After   p.grad of the layer has grown by what this slice contributes
        Budget  the call goes backward through this slice's projection and no other; afterwards
                nothing of the slice is kept
        """
        raise TODO("10.2")


def run_slices(stage: Any, axis: Axis, slices: list[Tensor]) -> None:  # Task 10.3
    """One sequence through stage axis.rank of a chain, all slices forward, then all backward.

    stage   stage.forward(x) -> output of the next slice; stage.backward(grad) -> gradient for the
            input of the newest slice that was not backward yet. On the last rank, which has the
            loss, stage.backward(None)
    slices  the inputs [B, l_k, D] on rank 0; on other ranks only shapes and dtype are right, which
            all stages share
    Budget  n messages to each neighbour; time sum(f + b) + (K-1)(max f + max b) for slices that
            take f_k forward and b_k backward
    """
    raise TODO("10.3")


def best_slices(  # Task 10.4
    length: int, stages: int, time: Callable[[int, int], float]
) -> tuple[list[int], float]:
    """The slices of a sequence with the least latency through a pipeline, and that latency.

    time     time(l, c): seconds, the same on every stage, for l tokens after c others
    Returns  (tokens of each slice from first to last, sum of t_i + (stages-1) max of t_i)
    Budget   each time(l, c) is measured on a machine: ask once, length (length+1) / 2 in all
    """
    raise TODO("10.4")
