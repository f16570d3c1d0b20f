"""Lesson 06, sequence parallelism: between the regions of lesson 05 each rank keeps T/n tokens.

Dims    B micro-batch  T sequence  t = T/n tokens of this rank  D width  F this rank's columns
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lessons import TODO
from picotron_lab.comm import Axis


def enter(x_BtD: Tensor, axis: Axis) -> Tensor:  # Task 06.1
    """The beginning of a region: each rank computes one term of a sum, from all tokens.

    Before  x [B, T/n, D]: rank r has the tokens r*T/n up to (r+1)*T/n of every sequence
    After   [B, T, D], alike on all ranks. In backward each rank brings the gradient of its own
            term for all tokens; x gets what all of them add up to, for its tokens
    Budget  S = 8 B T D bytes: forward one all_gather(S), backward one reduce_scatter(S)
    """
    raise TODO("06.1")


def leave(y_BTD: Tensor, axis: Axis) -> Tensor:  # Task 06.1
    """The end of a region.

    Before  y [B, T, D] on rank r: its term of the sum, for all tokens
    After   [B, T/n, D]: the sum, for this rank's tokens. In backward each rank brings the gradient
            for its tokens; y gets that of all tokens
    Budget  forward one reduce_scatter(S), backward one all_gather(S)
    """
    raise TODO("06.1")


def column(x_BtD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:  # Task 06.2
    """Enter a region and multiply by several weights, saving only the own tokens for backward.

    Before  x [B, T/n, D]; each W [F, D], which has a gradient
    After   one x W^T [B, T, F] for each W, x being that of all tokens. Backward needs all of x for
            the gradients of the weights, and gets it a second time
    Budget  forward one all_gather(S); backward one all_gather(S) and one reduce_scatter(S), however
            many weights. Alive between them, beside x, weights and results: at most S/n bytes
    """
    raise TODO("06.2")


def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:  # Task 06.3
    """After backward: make the gradients what one device would have.

    Before  picotron_lab.model.Block after Block, with attention and MLP cut as in lesson 05; each
            rank ran norms and residual stream on its own tokens. Some parameters may be frozen
            (their .grad is None), some may be shared by several modules
    After   every .grad that came from this rank's tokens alone is that of all tokens, on all ranks;
            the gradients of matrices are already right
    Budget  one all_reduce for all of them together, 8 bytes per number
    """
    raise TODO("06.3")
