"""Solution of lesson 09: the library's schedules; its executor and deferred matmuls in short."""

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis
from picotron_lab.deferred import product
from picotron_lab.schedules import basic, zero_bubble
from picotron_lab.schedules.actions import Action


def afab(p: int, m: int) -> list[list[Action]]:
    """All forwards first."""
    return [list(actions) for actions in basic.afab(p, m).lists]


def one_f_one_b(p: int, m: int) -> list[list[Action]]:
    """p-1-r forwards first."""
    return [list(actions) for actions in basic.one_f_one_b(p, m).lists]


def run_list(actions: list[Action], stage: nn.Module, axis: Axis, batches: list[Tensor]) -> None:
    """Receive, compute, start to send."""
    first, last = axis.rank == 0, axis.rank == axis.size - 1
    kept, under_way = {}, []
    for kind, _, i, _ in actions:
        if kind == "F":
            x = batches[i] if first else axis.recv(batches[i], axis.rank - 1).requires_grad_()
            kept[i] = x, stage(x, i)
            if not last:
                under_way.append(axis.send(kept[i][1], axis.rank + 1, wait=False))
        else:
            x, out = kept.pop(i)
            out.backward(None if last else axis.recv(out, axis.rank + 1))
            if not first:
                under_way.append(axis.send(x.grad, axis.rank - 1, wait=False))
    for handle in under_way:
        handle.wait()


class LinearLater(torch.autograd.Function):
    """dx now, dW later."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, queue: list) -> Tensor:
        ctx.queue, ctx.weight = queue, weight
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.queue.append((ctx.weight, x.detach(), grad))
        return grad @ ctx.weight, None, None


def weight_gradients(queue: list) -> None:
    """One matmul for each entry."""
    while queue:
        weight, x, grad = queue.pop()
        found = product(grad, x)
        weight.grad = found if weight.grad is None else weight.grad + found


def tight(p: int, m: int) -> list[list[Action]]:
    """ZB-H1."""
    return [list(actions) for actions in zero_bubble.zb_h1(p, m).lists]
