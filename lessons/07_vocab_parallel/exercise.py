"""Lesson 07, vocabulary parallelism: every rank has some words of embedding, output layer and loss.

Dims    B micro-batch  T sequence  N = B*T tokens  D width  V vocabulary  R words of this rank
Words   this rank has the words `start` up to start + R, as rows of w_RD: R = ceil(V/n), the last
        rank has fewer (never none). Words are numbers from 0 to V - 1
Notation of one token: logits y; the loss is log sum exp(y) - y[label]
"""

from typing import Any

from torch import Tensor

from lessons import TODO
from picotron_lab.comm import Axis

IGNORED = -100  # a label that counts neither in the loss nor in any gradient


def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:  # Task 07.1
    """Look up tokens in a table that is cut by rows.

    Before  tokens [B, T] alike on all ranks, any of the V words; w [R, D] has a gradient
    After   [B, T, D], alike on all ranks; in backward each rank's rows get the gradient of their
            own words
    Budget  forward one all_reduce of [B, T, D]; backward nothing is sent
    """
    raise TODO("07.1")


def three_barriers(  # Task 07.2
    x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int, axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients, the obvious way: largest logit | sums | gradient of x.

    Before  x [N, D] and labels [N] alike on all ranks; w [R, D]. No autograd here: these are plain
            tensors. Logits may be in the thousands, where exp(y) overflows
    After   (loss, dx, dw): the sum of the token losses, a scalar alike on all ranks; its gradients
            of x [N, D], whole on all ranks, and of w [R, D]
    Budget  three calls of 8 (N + 2N + N D) bytes in all; no tensor of N V numbers is ever made:
            none is larger than 2 N R
    """
    raise TODO("07.2")


def local_pass(x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int) -> Any:  # Task 07.3
    """Pass S of the version with one barrier: all that this rank can compute by itself.

    Before  as in 07.2; there is no axis: nothing can be sent
    After   whatever `meet` and `weight_gradient` need, of your choice. What is multiplied by w for
            the gradient of x is multiplied here
    Budget  no tensor is larger than 2 N R
    """
    raise TODO("07.3")


def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:  # Task 07.3
    """The one barrier: what local_pass computed with its own largest logit and sum, made right.

    Before  what local_pass returned; meet may add to it
    After   (loss, dx): as in 07.2
    Budget  no matmul at all, and no operation that reads N R or R D numbers, such as P or w;
            nothing larger than 2 N R; at most 2 calls, 8 N (3n + D) bytes
    """
    raise TODO("07.3")


def weight_gradient(state: Any) -> Tensor:  # Task 07.3
    """Pass T: nobody but the optimizer waits for it, so it comes as late as one likes.

    Before  what local_pass returned, after meet; other micro-batches were met in between
    After   dw [R, D]: as in 07.2
    Budget  nothing larger than 2 N R; nothing can be sent
    """
    raise TODO("07.3")
