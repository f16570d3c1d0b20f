"""Solution of lesson 02. The library's dropout needs no random state (dropout.py), and its trainer
accumulates by schedule, so what is asked for here is written out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from picotron_lab.analysis.parameters import BYTES


def state_bytes(parameters: int, dtype: str, optimizer: str) -> dict[str, int]:
    """As precision.py has it."""
    narrow, wide = BYTES[dtype], max(4, BYTES[dtype])
    return {
        "weights": narrow * parameters,
        "gradients": wide * parameters,
        "masters": wide * parameters if narrow < wide else 0,
        "moments": 2 * wide * parameters if optimizer == "adamw" else 0,
    }


def saved_bytes(forward: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> int:
    """By the address of each storage."""
    there = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # while it lives, no address is used twice
    del loss
    return sum(kept.values())


def accumulate(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Every sum over the counted tokens of all."""
    counted = sum(int((labels != -100).sum()) for _, labels in batches)
    total = 0.0
    for tokens, labels in batches:
        loss = model(tokens, labels) / counted
        loss.backward()
        total += loss.item()
    return total


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """One node of the graph, in place of all of the module's."""
    return RunTwice.apply(module, x)


class RunTwice(torch.autograd.Function):
    """Forward keeps x and the random state; backward runs the module again, and through it."""

    @staticmethod
    def forward(ctx, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module, ctx.state = module, torch.get_rng_state()
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        x, now = x.detach().requires_grad_(), torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.module(x)
        torch.set_rng_state(now)
        torch.autograd.backward(y, grad)  # parameters get theirs here
        return None, x.grad
