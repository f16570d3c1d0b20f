"""Lesson 03, data parallelism: every rank has the whole model and a share of the batch.

You get `Axis` handles: dp.rank, dp.size, dp.all_reduce(x, op="sum", out=None, wait=True), ...
With wait=False a call returns a handle at once, and handle.wait() brings the result.
Letters  n ranks   m micro-batches   Ψ elements of all trainable parameters, 8 bytes each (float64)
"""

from torch import Tensor, nn

from lessons import TODO
from picotron_lab.comm import Axis


def sum_gradients(parameters: list[nn.Parameter], dp: Axis) -> None:  # Task 03.1
    """Replace every gradient by its sum over the ranks of dp, one parameter after the other.

    parameters  of the whole model: some are frozen (requires_grad is False), and some were not
                used by this rank's tokens: their .grad is None here, but not on other ranks
    Before  p.grad on rank r: gradient of rank r's part of the loss
    After   p.grad alike on all ranks: gradient of the whole loss; frozen ones still have none
    Budget  payload 8Ψ in all
    """
    raise TODO("03.1")


def parts_of_mean(losses: list[Tensor], counts: list[int], dp: Axis) -> list[Tensor]:  # Task 03.2
    """What to call backward on, so that the *sum* over ranks is the gradient of the mean loss.

    losses  of this rank's m micro-batches: each the sum of its token losses, a scalar
    counts  of each micro-batch: how many tokens were counted, which differs and may be 0
    Before  n ranks with m sums each
    After   m scalars; those of all ranks together add up to the mean over all counted tokens of
            the global batch
    Budget  one all_reduce of one number (8 bytes), whatever n and m
    """
    raise TODO("03.2")


class Bucketed:  # Task 03.3
    """Gradients travel together in flat buckets, and each leaves while backward still computes.

    parameters    trainable ones, in the order in which forward uses them; a rank may not use all
    bucket_bytes  go from the last parameter to the first: a bucket takes gradients as long as it
                  holds at most so many bytes; one that is larger by itself has its own bucket
    Use     begin_step(), before_backward(last=True), loss.backward(), finish(), then the optimizer;
            and again, with the same object. Register hooks once, here: see
            Tensor.register_post_accumulate_grad_hook, which hands you the *parameter*
    Before  n ranks, each with the loss of its share of the batch
    After   finish(): p.grad is the sum over ranks, on every rank, used there or not
    Budget  one all_reduce per bucket, payload 8Ψ; only the last bucket's journey is waited for:
            buckets leave in their order, each as soon as its last gradient exists
    """

    def __init__(self, parameters: list[nn.Parameter], axis: Axis, bucket_bytes: int):
        raise TODO("03.3")

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        raise TODO("03.3")

    def before_backward(self, last: bool) -> None:
        """One micro-batch's backward comes; `last` says that no other follows in this step."""
        raise TODO("03.3")

    def finish(self) -> None:
        """All backwards are over: bring every gradient home."""
        raise TODO("03.3")


class Silent(Bucketed):  # Task 03.4
    """Buckets, but of the m micro-batches of a step only the last one's backward sends.

    Use     begin_step(), m times before_backward(last) and backward, finish(), then the optimizer
    Before  n ranks with m losses each
    After   finish(): p.grad is the sum over all n*m losses, on every rank
    Budget  payload 8Ψ and one all_reduce per bucket, whatever m; they still leave during backward
    """

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        raise TODO("03.4")

    def before_backward(self, last: bool) -> None:
        """One micro-batch's backward comes; `last` says that no other follows in this step."""
        raise TODO("03.4")

    def finish(self) -> None:
        """All backwards are over: bring every gradient home."""
        raise TODO("03.4")
