"""Buffers: what a call may be given, checked, and the tensors that it writes into, prepared.

Idea    torch.distributed trusts its caller: a scalar, a gradient that stops flowing or a buffer of
        the wrong size ends in garbage or deep inside C++. So Axis asks here first, in every world
        alike.
Rules   Every error is a CommError that says what was given, what is needed and what to give
        instead.
Own     What a world allocates for itself is not memory of a rank's program: it does so `unmetered`.
Tests   tests/test_comm.py, tests/test_meter.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from picotron_lab.ledger import CommError

REDUCTIONS = ("sum", "mean", "max")

# `with unmetered():` no dispatch mode (a memory meter) sees what happens inside
unmetered = _disable_current_modes


def describe(x: Tensor) -> str:
    """Shape and dtype, such as '(2, 3) float32'."""
    return f"{tuple(x.shape)} {_name(x.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- tensors to read from and to write into


def rows(op: str, x: Tensor) -> Tensor:
    """x, contiguous, with a dim 0 along which it can be cut or joined."""
    _check_gradient(op, x)
    if x.dim() == 0:
        raise CommError(f"{op} works along dim 0, and a scalar has none: give x.reshape(1).")
    return x.detach().contiguous()


def ready(op: str, x: Tensor, out: Tensor | None) -> Tensor:
    """The contiguous tensor that an in-place collective may overwrite: `out` or new, holding x."""
    _check_gradient(op, x)
    _check_out(op, out, x, x.shape)
    if out is None or not out.is_contiguous():
        return x.detach().clone(memory_format=torch.contiguous_format)
    return out.detach() if out is x else out.detach().copy_(x)


def room(op: str, x: Tensor, rows: int, out: Tensor | None) -> Tensor:
    """The contiguous tensor for a result like x with `rows` rows: `out` or new."""
    shape = torch.Size((rows, *x.shape[1:]))
    _check_out(op, out, x, shape)
    return x.new_empty(shape) if out is None or not out.is_contiguous() else out.detach()


def empty_like(x: Tensor) -> Tensor:
    """A new contiguous tensor of the shape, dtype and device of x."""
    return x.new_empty(x.shape)


# ---- what a caller may get wrong


def check_reduction(op: str, reduction: str, x: Tensor) -> None:
    """A known reduction, of numbers that have it."""
    if reduction not in REDUCTIONS:
        raise CommError(f"{op} knows {', '.join(REDUCTIONS)}; it was given '{reduction}'.")
    if x.dtype == torch.bool:
        raise CommError(f"{op} has no {reduction} of {describe(x)}: give x.int().")
    if reduction == "mean" and not x.dtype.is_floating_point:
        raise CommError(
            f"{op} has no mean of {describe(x)}, it may not be a whole number: give x.float(), or "
            "take the sum and divide."
        )


def check_equal_shards(op: str, x: Tensor, size: int) -> None:
    """dim 0 can be cut into `size` equal shards."""
    if x.shape[0] % size:
        raise CommError(
            f"{op} cuts dim 0 into {size} equal shards, which {describe(x)} does not allow: pad "
            f"dim 0 to {-(-x.shape[0] // size) * size}."
        )


def check_counts(
    x: Tensor, send_rows: Sequence[int] | None, receive_rows: Sequence[int] | None, size: int
) -> None:
    """One count of rows per rank in both lists; what is sent adds up to the rows of x."""
    if send_rows is None or receive_rows is None:
        raise CommError("all_to_all was given one of send_rows and receive_rows: give both.")
    good = len(send_rows) == len(receive_rows) == size and sum(send_rows) == x.shape[0]
    if not good or min(*send_rows, *receive_rows) < 0:
        raise CommError(
            f"all_to_all over {size} ranks was given send_rows {list(send_rows)} and receive_rows "
            f"{list(receive_rows)} for {x.shape[0]} rows: give {size} counts each, none negative, "
            f"where send_rows add up to {x.shape[0]}."
        )


def _check_gradient(op: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise CommError(
            f"no gradient flows through {op}: give x.detach(), or call it inside a "
            "torch.autograd.Function whose backward says what flows back."
        )


def _check_out(op: str, out: Tensor | None, x: Tensor, shape: torch.Size) -> None:
    if out is not None and (out.shape, out.dtype) != (shape, x.dtype):
        needed = f"{tuple(shape)} {_name(x.dtype)}"
        raise CommError(f"{op} of {describe(x)} needs out {needed}; it was given {describe(out)}.")
