"""Sentences for what can go wrong while training runs."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from picotron_lab.precision import is_narrow

GIB = 2**30
WRAPPERS = ("module", "whole", "moe")  # what techniques call the module that they wrap


class TrainingError(Exception):
    """A sentence about a run that cannot go on."""


def not_finite(
    loss: float, step: int, model: nn.Module, run: Callable[[tuple], Any], batches: list[tuple]
) -> TrainingError:
    """The error for a NaN or infinite loss; it names the first module with such an output.

    run  a forward of one micro-batch through the modules of `model`, and those of other ranks
    """
    # all batches, also when the first tells: ranks that share the model run it together
    culprits = [first_bad_module(model, run, batch) for batch in batches]
    culprit = next(filter(None, culprits), None)
    where = (
        f"module {culprit} is the first with such an output"
        if culprit
        else "all outputs are finite"
    )
    return TrainingError(
        f"the loss is {loss} at step {step}; {where} on this rank; try a lower --lr, a longer "
        "--warmup-steps or --dtype float32."
    )


@torch.no_grad()
def first_bad_module(model: nn.Module, run: Callable[[tuple], Any], batch: tuple) -> str | None:
    """Run one forward and return the name of the first module that gives NaN or infinity."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            tensors = [x for x in (output if isinstance(output, tuple) else (output,))]
            if not all(bool(x.isfinite().all()) for x in tensors if isinstance(x, Tensor)):
                stageless = re.sub(r"^stages\.\d+\.?", "", name)
                words = [word for word in stageless.split(".") if word not in WRAPPERS]
                found.append(".".join(words) or "the whole model")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    run(batch)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def out_of_memory(
    parameters: Sequence[nn.Parameter],
    shards: Sequence[nn.Parameter],
    zero: int,
    device: torch.device,
) -> TrainingError:
    """The error for a full GPU: which category is too large, and what to change.

    parameters  of the model on this rank        shards  what its optimizer steps
    """
    state = state_bytes(parameters, shards, zero) / GIB
    room = torch.cuda.get_device_properties(device).total_memory / GIB
    if state > room:
        return TrainingError(
            f"out of memory: weights, gradients and optimizer need {state:.1f} GiB of the GPU's "
            f"{room:.1f}; share them out (--zero 3, --tp 2) or choose a smaller --model."
        )
    return TrainingError(
        f"out of memory: activations do not fit beside the {state:.1f} GiB of weights, "
        f"gradients and optimizer in the GPU's {room:.1f} GiB; halve --micro-batch-size, or try "
        "--recompute full."
    )


def state_bytes(
    parameters: Sequence[nn.Parameter], shards: Sequence[nn.Parameter], zero: int
) -> int:
    """Weights, gradients and AdamW with its float32 masters: 16 bytes per parameter, 18 for bf16,
    where nothing is sharded (see precision.py, zero.py)."""
    width = max(4, parameters[0].itemsize)
    weights = sum(p.nbytes for p in parameters)
    gradients = width * sum(p.numel() for p in (parameters if zero < 2 else shards))
    per_shard = 2 * width + (width if is_narrow(parameters[0].dtype) else 0)
    return weights + gradients + per_shard * sum(p.numel() for p in shards)
