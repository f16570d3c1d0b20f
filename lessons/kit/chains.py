"""Chains: layers whose gradients are summed over replicas, on the clock of the model.

Lesson 03 trains them with the student's buckets, and on one device.
Read    Case -> draw_case -> loss_of -> one_device        Tests  tests/test_lessons.py
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from picotron_lab.clock import Network
from picotron_lab.comm import Axis

LAYER = 1e-3  # seconds that the backward of one layer takes
FLOAT = 8  # bytes


@dataclass(frozen=True)
class Case:
    """A chain of layers x -> tanh(x W); the first matrix is tied to a use at the end."""

    ranks: int
    microbatches: int
    weights: list[Tensor]
    inputs: list[list[list[Tensor]]]  # by step, rank, micro-batch
    skipped: tuple[int, int]  # this rank does not use this layer in the first step
    bucket_bytes: int

    def left_out(self, step: int, rank: int) -> int | None:
        """The layer that this rank does not use in this step."""
        return self.skipped[1] if step == 0 and rank == self.skipped[0] else None

    @property
    def groups(self) -> list[list[int]]:
        """Layers of each bucket, in the order in which buckets leave."""
        groups, room = [], 0
        for i in reversed(range(len(self.weights))):
            size = FLOAT * self.weights[i].numel()
            if size > room or not groups:
                groups.append([])
                room = self.bucket_bytes
            groups[-1].append(i)
            room -= size
        return groups

    @property
    def bucket_sizes(self) -> list[int]:
        """Bytes of each bucket."""
        return [FLOAT * sum(self.weights[i].numel() for i in group) for group in self.groups]

    @property
    def bytes(self) -> int:
        """8Ψ."""
        return sum(self.bucket_sizes)

    @property
    def network(self) -> Network:
        """All buckets together travel for 0.8 of the time that backward takes."""
        sent = 2 * (self.ranks - 1) / self.ranks * self.bytes
        return Network(LAYER / 10, bandwidth=sent / (0.8 * LAYER * len(self.weights)))

    @property
    def shortest(self) -> float:
        """Seconds of a step, if every bucket leaves as soon as it is full."""
        network, layers = self.network, len(self.weights)
        free, share = 0.0, 2 * (self.ranks - 1) / self.ranks
        for group, size in zip(self.groups, self.bucket_sizes, strict=True):
            ready = LAYER * (layers - min(group))
            free = max(free, ready) + share * size / network.bandwidth
        return LAYER * layers * (self.microbatches - 1) + free + network.latency


def draw_case(rng: Random, generator: torch.Generator, microbatches: int) -> Case:
    """Layers of many widths, in four buckets or more, of which no two neighbours are alike."""
    ranks, layers = rng.randint(3, 5), rng.randint(7, 9)
    skipped = (rng.randrange(ranks), layers - 1)
    while True:
        widths = [rng.choice([2, 3, 5, 7]) for _ in range(layers)]
        shapes = list(zip(widths, [*widths[1:], widths[0]], strict=True))
        weights = [0.5 * torch.randn(shape, generator=generator).double() for shape in shapes]

        def draw(width: int) -> Tensor:
            return torch.randn(2, width, generator=generator).double()

        inputs = [
            [[draw(widths[0]) for _ in range(microbatches)] for _ in range(ranks)] for _ in range(2)
        ]
        bucket_bytes = FLOAT * sum(weight.numel() for weight in weights) // 4
        case = Case(ranks, microbatches, weights, inputs, skipped, bucket_bytes)
        sizes = case.bucket_sizes
        if all(a != b for a, b in zip(sizes, sizes[1:], strict=False)):
            return case


class Busy(torch.autograd.Function):
    """x -> x; its backward keeps the rank busy for the time of one layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis | None) -> Tensor:
        """The same."""
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        """The same, a layer's time later."""
        if ctx.axis is not None:
            ctx.axis.spend(LAYER)
        return dx, None


def loss_of(weights: list, x: Tensor, left_out: int | None, axis: Axis | None = None) -> Tensor:
    """The loss of one micro-batch; the layer left_out is not used."""
    for i, weight in enumerate(weights):
        used = torch.ones_like(weight, requires_grad=False) if i == left_out else weight
        x = Busy.apply(torch.tanh(x @ used), axis)
    return (x @ weights[0]).square().sum()  # tied


def local_gradients(case: Case, weights: list, step: int) -> list:
    """By rank and micro-batch: the gradients that the rank itself computes."""

    def gradients(rank: int, x: Tensor) -> list[Tensor]:
        leaves = [weight.clone().requires_grad_() for weight in weights]
        loss = loss_of(leaves, x, case.left_out(step, rank))
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    return [[gradients(r, x) for x in row] for r, row in enumerate(case.inputs[step])]


def added(gradients: list) -> list[Tensor]:
    """The sum of lists of tensors, tensor by tensor."""
    return [sum(parts) for parts in zip(*gradients, strict=True)]


def one_device(case: Case) -> dict:
    """What `trained` returns on one device that has the whole batch."""
    weights, seen = case.weights, []
    for step in range(2):
        local = local_gradients(case, weights, step)
        seen.append(added([gradients for row in local for gradients in row]))
        weights = [w - 0.1 * g for w, g in zip(weights, seen[-1], strict=True)]
    return {"gradients": seen, "weights": weights}
