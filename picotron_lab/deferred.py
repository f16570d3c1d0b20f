"""Deferred weight gradients: backward for inputs now, backward for weights later.

Paper   Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2, appendix (2401.10241)
Idea    Backward of y = x W^T has two products: dx = dy W, for which the stage before waits, and
        dW = dy^T x, for which only the optimizer does: pipelines fill their bubbles with it. While
        `later.jobs` of a stage is a list, its matmuls add a Job to it instead of computing dW:
            B   with later.waits() as jobs:
                    grads = torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True)
            W   of each parameter: its gradient in grads, if any, plus gradient(job) of its jobs
        Nobody reads one micro-batch's dW, only the sum. With `later.at_once` a matmul
        adds to weight.grad, which may be wider: no dW is written, rounded, read and added.
Holds   a job: x (with sequence parallelism, the gathered one) and dy; nothing else of the graph
Not     deferred: routers, ChunkedHead and VocabHead, GroupedExperts, what ZeRO-3 lends
Dims    as in model.py; N = B*T tokens
Read    prepare -> linear -> weight_gradient -> accumulate; of jobs: gradient
Tests   tests/test_deferred.py
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab import model
from picotron_lab.precision import is_narrow
from picotron_lab.sharding import zero_gradient


class Job(NamedTuple):
    """dW [F, D] of a weight, still to be computed, from x [..., D] and the gradient [..., F]."""

    weight: nn.Parameter
    x: Tensor
    grad: Tensor


class Later:
    """What the matmuls of one stage do instead of handing dW to autograd.

    jobs      where they leave jobs, in the order of backward; None: nothing waits
    at_once   whether they add to weight.grad, if there is one. Hooks that run after a gradient has
              been accumulated run as ever. Not for torch.autograd.grad, which would get None
    """

    def __init__(self, at_once: bool):
        self.at_once = at_once
        self.jobs: list[Job] | None = None

    @contextmanager
    def waits(self) -> Iterator[list[Job]]:
        """Jobs of a B, left in the list until the block ends, also if backward breaks off."""
        self.jobs = []
        try:
            yield self.jobs
        finally:
            self.jobs = None


def prepare(stage: nn.Module, at_once: bool = False) -> Later:
    """Let the matmuls below `stage` ask whether dW can wait; after materialise. Linear layers
    without bias, and plain heads, give way to modules that hold the same parameters."""
    later = Later(at_once)
    for parent in list(stage.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is nn.Linear and part.bias is None:
                setattr(parent, name, Linear(part.weight))
            if type(part) is model.Head:
                setattr(parent, name, Head(part.weight))
    for parameter in stage.parameters():
        parameter.later = later
    return later


class Linear(nn.Module):
    """x [..., D] -> x W^T [..., F]."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Head(Linear):
    """As model.Head: logits, or the sum over counted tokens of -log p(label)."""

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        logits_BTV = super().forward(x_BTD)
        if labels_BT is None:
            return logits_BTV
        logits_NV, labels_N = model.wide(logits_BTV).flatten(0, 1), labels_BT.flatten()
        return F.cross_entropy(logits_NV, labels_N, ignore_index=model.IGNORED, reduction="sum")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear; if the weight is prepared and not frozen, dW may go another way in backward.

    Backward goes from CatchGradient, which leaves dy, over torch's own product, dx, to KeepInput.
    Three nodes, because recomputation ends before an operator when all is kept that it needs: one
    node around the product could keep x only after the product. An x that wants no gradient gets
    one all the same.
    """
    if not (hasattr(weight, "later") and weight.requires_grad):
        return F.linear(x, weight)
    caught: list[Tensor] = []
    x = KeepInput.apply(x, weight, caught)
    return CatchGradient.apply(F.linear(x, weight.detach()), caught)


class CatchGradient(torch.autograd.Function):
    """y; backward leaves dy in `caught`."""

    @staticmethod
    def forward(ctx, y: Tensor, caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.caught.append(grad)
        return grad, None


class KeepInput(torch.autograd.Function):
    """x; backward, which has dx by now: dW of x and the gradient in `caught`, now or later."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, caught: list[Tensor]) -> Tensor:
        ctx.owner, ctx.caught = owner(weight), caught
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        assert not torch.is_grad_enabled(), (
            "create_graph=True asks for second derivatives, which prepared matmuls drop: take them "
            "of a model that no executor has prepared."
        )
        dw = weight_gradient(ctx.owner, ctx.caught.pop(), *ctx.saved_tensors)
        return dx if ctx.needs_input_grad[0] else None, dw, None


def owner(weight: Tensor) -> nn.Parameter | None:
    """The parameter itself if it is prepared, for ctx: recomputation gives back a copy of what was
    saved. None else: what ZeRO-3 lends must not be kept."""
    return weight if hasattr(weight, "later") else None


def weight_gradient(weight: nn.Parameter | None, grad: Tensor, x: Tensor) -> Tensor | None:
    """dW [F, D] of y = x W^T from grad [..., F] and x [..., D]; None if it waits or has been added,
    or if the weight, which is given by its owner(), is frozen."""
    if weight is not None and not weight.requires_grad:
        return None
    if not takes(weight):
        return product(grad, x)
    job = Job(weight, x.detach(), grad)  # x itself would keep the graph below it
    if weight.later.jobs is not None:
        weight.later.jobs.append(job)
    else:
        accumulate(job)
    return None


def takes(weight: nn.Parameter | None) -> bool:
    """Whether the dW of a weight, given by its owner(), goes another way than through autograd."""
    if weight is None:
        return False
    at_once = weight.later.at_once and weight.grad is not None
    return at_once or weight.later.jobs is not None


def weight_gradients(
    weights: Sequence[nn.Parameter | None], grad: Tensor, x: Tensor, rows: Sequence[int]
) -> Sequence[Tensor | None]:
    """weight_gradient of weights [rows[i], D] with one x, grads joined: one matmul, or several."""
    if any(takes(weight) for weight in weights):
        parts = zip(weights, grad.split(rows, -1), strict=True)
        return [weight_gradient(weight, part, x) for weight, part in parts]
    return product(grad, x).split(rows)


def product(grad: Tensor, x: Tensor) -> Tensor:
    """The sum over all tokens of dy times x: [..., F], [..., D] -> [F, D]."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


def gradient(job: Job) -> Tensor:
    """dW [F, D] of a job."""
    return product(job.grad, job.x)


@torch.no_grad()
def accumulate(job: Job) -> None:
    """Add dW to weight.grad, which may be wider. It runs no hooks itself."""
    if job.weight.grad is None:
        job.weight.grad = zero_gradient(job.weight)
    add_product(job.weight.grad, job.grad.flatten(0, -2), job.x.flatten(0, -2))


def add_product(total_FD: Tensor, grad_NF: Tensor, x_ND: Tensor) -> None:
    """total += dy^T x, in place: total may be wider. One operation if torch has it."""
    grad_FN = grad_NF.T
    if total_FD.dtype == x_ND.dtype:
        total_FD.addmm_(grad_FN, x_ND)
    elif total_FD.is_cuda and total_FD.dtype == torch.float32 and is_narrow(x_ND.dtype):
        torch.addmm(total_FD, grad_FN, x_ND, out_dtype=torch.float32, out=total_FD)
    else:
        total_FD += grad_FN @ x_ND
