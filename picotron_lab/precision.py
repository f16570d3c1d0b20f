"""Precision: compute in bf16, remember in fp32.

Paper   Micikevicius et al. 2018, sections 3.1 and 3.3 (1710.03740): master weights, wide
        accumulation
Idea    bf16 keeps 8 bits of a number. A weight near 1 ignores an update below 1/256, and a sum of
        many gradients ignores its small terms. So bf16 serves where rounding is harmless (matmuls,
        activations on the wire), and fp32 where small things add up (gradients over micro-batches
        and ranks, weights).
Bytes   per parameter with AdamW: 2 bf16 weight + 4 fp32 gradient + 4 fp32 master weight + 8 moments
        = 18; fp32 throughout: 4 + 4 + 8 = 16
Read    accumulate_in -> MasterWeights
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from picotron_lab.sharding import Record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype is too narrow to accumulate in."""
    return torch.promote_types(dtype, torch.float32) != dtype


def accumulate_in(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    """Let `parameter.grad` be of `dtype`: each micro-batch's gradient is cast, then added."""
    for parameter in parameters:
        parameter.grad_dtype = dtype


class MasterWeights:
    """What the optimizer steps: float32 copies of narrow parameters, the parameters themselves
    else."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = list(parameters)
        self.weights = [_master(p) for p in parameters]

    def take_gradients(self) -> None:
        """Hand each parameter's gradient to its master weight, without a copy."""
        for parameter, weight in self._narrow():
            weight.grad, weight.is_published = parameter.grad, False

    @torch.no_grad()
    def publish(self) -> None:
        """Round the stepped master weights into the parameters, unless the optimizer did. Their
        gradients go: else the next step would hold both these and its own."""
        for parameter, weight in self._narrow():
            if not weight.is_published:
                parameter.copy_(weight)
            weight.grad, weight.is_published = None, False

    def pieces(self) -> list[tuple[Record, Tensor]]:
        """The float32 copies with their records, for checkpoints."""
        return [
            (replace(w.record, name=f"master/{w.record.name}"), w.detach())
            for _, w in self._narrow()
        ]

    def _narrow(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = zip(self._parameters, self.weights, strict=True)
        return [(p, w) for p, w in pairs if w is not p]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if not is_narrow(parameter.dtype):
        return parameter
    weight = nn.Parameter(parameter.detach().float())
    weight.record = parameter.record
    # an optimizer may write the parameter as it steps, and says so: optim.KernelAdamW
    weight.rounded, weight.is_published = parameter, False
    return weight
