"""Solution of lesson 10: token_pipeline.py in short, by autograd; the library's slices."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from picotron_lab.comm import Axis
from picotron_lab.schedules import slicing


class SlicedAttention:
    """Keys and values of earlier slices are leaves, in whose .grad later slices leave gradients."""

    def __init__(self, layer: Any):
        self.layer, self.slices, self.filled = layer, [], 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attend to the leaves and to the own keys."""
        x_BTD = x_BTD.detach().requires_grad_()
        q_BTHC, *own = self.layer.project(x_BTD, self.filled)
        pasts = zip(*(leaves for _, _, _, leaves in self.slices), strict=True)
        pasts = [*pasts] or [(), ()]
        keys, values = (torch.cat([*past, x], 1) for past, x in zip(pasts, own, strict=True))
        out_BTD = self.layer.finish(attend(q_BTHC, keys, values))
        leaves = [x.detach().requires_grad_() for x in own]
        self.slices.append((x_BTD, out_BTD, own, leaves))
        self.filled += x_BTD.shape[1]
        return out_BTD.detach()

    def backward(self, grad_BTD: Tensor) -> Tensor:
        """Of the output, and of the own keys and values what later slices have left."""
        x_BTD, out_BTD, own, leaves = self.slices.pop()
        self.filled -= x_BTD.shape[1]
        left = [
            (x, leaf.grad) for x, leaf in zip(own, leaves, strict=True) if leaf.grad is not None
        ]
        tensors, grads = zip((out_BTD, grad_BTD), *left, strict=True)
        torch.autograd.backward(tensors, grads)
        return x_BTD.grad


def attend(q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor) -> Tensor:
    """The last query sees all keys."""
    T, S = q_BTHC.shape[1], k_BSHC.shape[1]
    scores_BHTS = torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC) / math.sqrt(q_BTHC.shape[-1])
    hidden_TS = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    weights_BHTS = scores_BHTS.masked_fill(hidden_TS, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshc->bthc", weights_BHTS, v_BSHC)


def run_slices(stage: Any, axis: Axis, slices: list[Tensor]) -> None:
    """Each slice goes on as soon as it is done."""
    first, last = axis.rank == 0, axis.rank == axis.size - 1
    under_way = []
    for x in slices:
        out = stage.forward(x if first else axis.recv(x, axis.rank - 1))
        if not last:
            under_way.append(axis.send(out, axis.rank + 1, wait=False))
    for x in reversed(slices):
        grad = stage.backward(None if last else axis.recv(x, axis.rank + 1))
        if not first:
            under_way.append(axis.send(grad, axis.rank - 1, wait=False))
    for handle in under_way:
        handle.wait()


def best_slices(
    length: int, stages: int, time: Callable[[int, int], float]
) -> tuple[list[int], float]:
    """The library's, which asks for some times again at the end."""
    slices, latency = slicing.best_slices(length, stages, cache(time))
    return list(slices), latency
