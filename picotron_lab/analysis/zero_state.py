"""What ZeRO keeps and sends, from shapes alone.

Source  Rajbhandari et al. 2020, sections 5 and 7 (1910.02054): per parameter and stage w + g + K/n,
        w + (g + K)/n, (w + g + K)/n bytes, for weights of w, gradients of g and optimizer state of
        K bytes: (4, 4, 8) in float32, (2, 2, 12) in the paper's half precision, (2, 4, 12) with
        gradients that add up in float32
Exact   a rank has ceil(rows / n) rows of each parameter, the last ranks fewer; on the wire all send
        as many, some of them padding. `formula` leaves that out, `contract` does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


def formula(stage: int, w: int, g: int) -> str:
    """Bytes of state per rank, for Ψ parameters and n ranks."""
    K = state_bytes(w)
    forms = (f"{w}Ψ + {g}Ψ + {K}Ψ/n", f"{w}Ψ + ({g}Ψ + {K}Ψ)/n", f"{w + g + K}Ψ/n")
    return forms[stage - 1]


def wire_formula(stage: int, w: int, g: int) -> str:
    """Payload bytes per step of m micro-batches; E parameters are in the embedding."""
    return (f"{g + w}Ψ", f"m {g}Ψ + {w}Ψ", f"m ({2 * w + g}Ψ - {w}E)")[stage - 1]


def state_bytes(w: int) -> int:
    """K: AdamW's two moments, and for narrow weights a float32 master weight."""
    return 12 if w == 2 else 2 * w


@dataclass(frozen=True)
class Job:
    """What a prediction must know; parameters are full ones, with real dtypes, on any device.

    groups  parameters that travel together: the units of stage 3; the buckets of stages 1 and 2,
            which have trainable ones only
    again   of each unit of stage 3, whether backward reads its weights: an embedding's does not
    """

    groups: Sequence[Sequence[nn.Parameter]]
    ranks: int
    again: Sequence[bool]
    rank: int = 0
    microbatches: int = 1

    def part(self, parameter: nn.Parameter, rank: int) -> int:
        """Elements of the rows that a rank holds; of rank 0 as many as all have on the wire."""
        rows = -(-len(parameter) // self.ranks)
        held = min(rows, max(0, len(parameter) - rank * rows))
        return held * math.prod(parameter.shape[1:])

    def wire(self, parameters: Sequence[nn.Parameter]) -> int:
        """Elements of a call for these parameters, with padding."""
        return self.ranks * sum(self.part(p, 0) for p in parameters)


@dataclass(frozen=True)
class Contract:
    """Bytes that lie on one rank between micro-batches, and what it sends in one step.

    transient  the most that comes on top while a step runs, beside activations; exact if n divides
               the rows of every parameter, else padded copies come on top
    """

    parameter: int
    gradient: int
    optimizer: int
    buffer: int
    transient: int
    calls: int
    payload: int

    @property
    def state(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameter + self.gradient + self.optimizer


def contract(stage: int, impl: str, job: Job) -> Contract:
    """The prediction for AdamW with one dtype of weights (w bytes) and one of gradients (g)."""
    every = list({id(p): p for group in job.groups for p in group}.values())  # a tied one once
    trained = [p for p in every if p.requires_grad]
    w, g = every[0].dtype.itemsize, every[0].grad_dtype.itemsize
    full, held = sum(p.numel() for p in every), sum(job.part(p, job.rank) for p in every)
    held_trained = sum(job.part(p, job.rank) for p in trained)
    gradients = sum(p.numel() for p in trained) if stage == 1 else held_trained
    calls, payload = traffic(stage, impl, job)
    return Contract(
        parameter=w * (held if stage == 3 else full),
        gradient=g * gradients,
        optimizer=held_trained * state_bytes(w),
        buffer=buffers(stage, job) if impl == "fused" else 0,
        transient=transient(stage, impl, job),
        calls=calls,
        payload=payload,
    )


def traffic(stage: int, impl: str, job: Job) -> tuple[int, int]:
    """(calls, payload bytes) of one step."""
    calls = payload = 0
    for i, group in enumerate(job.groups):
        trained = [p for p in group if p.requires_grad]
        gathers = job.microbatches * (1 + job.again[i]) if stage == 3 else 1
        reduces = 1 if stage == 1 else job.microbatches
        gathered = group if stage == 3 else trained
        calls += gathers * _calls(gathered, impl) + reduces * _calls(trained, impl)
        w, g = group[0].dtype.itemsize, group[0].grad_dtype.itemsize
        payload += gathers * w * job.wire(gathered) + reduces * g * job.wire(trained)
    return calls, payload


def _calls(group: Sequence[nn.Parameter], impl: str) -> int:
    return len(group) if impl == "plain" else min(1, len(group))


def buffers(stage: int, job: Job) -> int:
    """Bytes of the flat buffers of the fused path, which stay."""
    w, g = job.groups[0][0].dtype.itemsize, job.groups[0][0].grad_dtype.itemsize
    trained = [[p for p in group if p.requires_grad] for group in job.groups]
    if stage == 3:  # a unit arrives and lies in use; gradients of a unit leave
        whole = max(sum(p.numel() for p in group) for group in job.groups)
        return w * (max(map(job.wire, job.groups)) + whole) + g * max(map(job.wire, trained))
    return min(2, len(job.groups)) * max(w, g) * max(map(job.wire, trained))


def transient(stage: int, impl: str, job: Job) -> int:
    """Bytes beside state, buffers and activations at the worst moment of a step.

    A gradient is made in the dtype of its weight, and then, in stages 1 and 2, copied to a wider
    one. A reduce-scatter brings 1/n of it into new memory on the plain path.
    """
    w, g = job.groups[0][0].dtype.itemsize, job.groups[0][0].grad_dtype.itemsize
    trained = [[p.numel() for p in group if p.requires_grad] for group in job.groups]
    made = w + g if g != w else w  # bytes per element while a gradient is made
    if stage == 1:
        return made * max(map(max, trained))
    if stage == 2 and impl == "plain":
        largest = max(map(max, trained))
        return max(made * largest, g * largest + g * largest // job.ranks)
    if stage == 2:
        ends = [(sizes, i) for sizes in trained for i in range(len(sizes))]
        return max(g * sum(sizes[:i]) + made * sizes[i] for sizes, i in ends)
    return max(_unit_transient(impl, job, i) for i in range(len(job.groups)))


def _unit_transient(impl: str, job: Job, i: int) -> int:
    """Stage 3: all gradients of a unit wait for the last one, then the unit's weights are freed."""
    w, g = job.groups[i][0].dtype.itemsize, job.groups[i][0].grad_dtype.itemsize
    sizes = [p.numel() for p in job.groups[i] if p.requires_grad]
    if impl == "fused":
        return w * sum(sizes)  # weights and sums lie in buffers
    gathered = w * job.wire(job.groups[i])
    largest = g * max(sizes, default=0)
    received = largest // job.ranks + (largest if g != w else 0)
    backward = w * sum(sizes) + max(job.again[i] * gathered, received)
    return max(gathered, backward)
