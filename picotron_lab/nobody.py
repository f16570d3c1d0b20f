"""Nobody: the world of a dry run, in which one process sits in the seat of rank r of any job.

Idea    The program of one rank is the same whoever answers it. So nobody need: each call is
        answered at once, with a tensor of the right shape. On torch's meta device, where tensors
        have shapes and no memory, rank 17 of 16,384 then runs on a laptop, and its memory,
        operations and traffic can be read off (analysis/dryrun.py).
Values  there are none. Where the program asks for one all the same (how many tokens, what norm),
        the answer is one: finite, not zero, true.
GPU     `as_gpu`: tensors say that they are on a GPU, so that the program takes its way with
        kernels, of which torch knows the shapes (register_fake).
Meta    FakeTensorMode would do as well, and gives the same bytes, but takes 7 times as long. What
        the meta device does in its own way is answered here: attention, which would form all
        scores, and on a GPU norms, which torch takes apart elsewhere.
Routing what a router chooses decides sizes, so it has values: experts get choices in turn, equal
        shares. These tensors lie on the CPU, and what follows from them alone is computed. Where
        they meet tensors without values, they go along without.
Not     other data that decide sizes
Dims    B micro-batch  T queries  S keys  H/K query/kv heads  C head width
Read    Nobody -> seat -> Pretence -> pretend
Tests   tests/test_nobody.py, tests/test_comm.py
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from picotron_lab.alone import Alone, Done, Work
from picotron_lab.buffers import unmetered
from picotron_lab.comm import Axis
from picotron_lab.ledger import Call, Ledger

# ---- who answers


class Nobody(Alone):
    """A world whose calls are over at once; shapes, dtypes and the ledger are real.

    The values mean nothing: each peer seems to hold what I hold, or zeros. What it allocates to
    answer is no memory of the rank's program, so no meter sees it.
    """

    def all_gather(self, call: Call, out: Tensor, x: Tensor) -> Work:
        with unmetered():
            if x.numel() > 0:
                out.view(-1, *x.shape).copy_(x.clone())  # x may lie in out
        return Done()

    def reduce_scatter(self, call: Call, out: Tensor, x: Tensor, op: str) -> Work:
        with unmetered():
            out.copy_(x[: out.shape[0]])
        return Done()

    def all_to_all(
        self, call: Call, out: Tensor, x: Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> Work:
        with unmetered():
            out.zero_()
        return Done()

    def exchange(self, call: Call, sends: list, receives: list) -> Work:
        with unmetered():
            for out, _ in receives:
                out.zero_()
        return Done()


def seat(rank: int, size: int) -> Axis:
    """The world axis of rank `rank` in a job of `size` ranks, of which no other exists.

    Cutting it into axes takes a list of ranks per axis, not an object per rank.
    """
    assert 0 <= rank < size, f"there is no rank {rank} among {size}: choose one of 0 to {size - 1}."
    return Axis("world", range(size), rank, Nobody(), Ledger())


# ---- tensors without values

DEVICE = torch.device("meta")
VALUES = {  # what Python asks of a tensor
    Tensor.item: lambda x: torch.ones((), dtype=x.dtype).item(),
    Tensor.tolist: lambda x: torch.ones(x.shape, dtype=x.dtype).tolist(),
    Tensor.numpy: lambda x: torch.ones(x.shape, dtype=x.dtype).numpy(),
    Tensor.__bool__: lambda x: True, Tensor.__int__: lambda x: 1, Tensor.__float__: lambda x: 1.0,
}  # fmt: skip


class Pretence(TorchFunctionMode):
    """Answers what a program asks of tensors without values, or does with them.

    as_gpu   tensors say that they are on a GPU, so that the program takes its way with kernels
    choices  experts that a token chooses; 0: there are none
    """

    def __init__(self, as_gpu: bool, choices: int):
        super().__init__()
        self.as_gpu, self.choices = as_gpu, choices
        self.instead: dict[Callable, Callable] = {
            torch.randn: _undrawn, torch.tensor: _made,
            torch.nn.functional.scaled_dot_product_attention: self._attention,
            torch.autograd.grad: self._grad, torch.autograd.backward: self._backward,
            Tensor.backward: self._backward_of, Tensor.sort: self._sort,
        }  # fmt: skip
        if as_gpu:
            self.instead[Tensor.is_cuda.__get__] = lambda x: x.is_meta
            self.instead[torch.nn.functional.rms_norm] = _rms_norm

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        answer = self.instead.get(func, func)
        if func in VALUES and args[0].is_meta:
            answer = VALUES[func]
        elif self.choices and func not in INDEXING and _mixed(args):
            args = _without_values(args)
        return answer(*args, **(kwargs or {}))

    # torch puts a mode aside while it answers. But backward runs parts of the program, such as a
    # forward again, which must take its way as before. For edges of a graph no mode is asked

    def _grad(self, outputs: Sequence, inputs: Sequence, **others: Any) -> tuple:
        """torch.autograd.grad."""
        with self:
            return torch.autograd.grad(_edges(outputs), _edges(inputs), **others)

    def _backward(self, outputs: Sequence, **others: Any) -> None:
        """torch.autograd.backward."""
        with self:
            torch.autograd.backward(_edges(outputs), **others)

    def _backward_of(self, x: Tensor, gradient: Tensor | None, **others: Any) -> None:
        """Tensor.backward."""
        self._backward([x], grad_tensors=gradient, **others)

    def _sort(self, x: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        """Tensor.sort, which routers call: of the first `choices` of each row of E, row after row,
        every one of 0..E-1 has an equal share."""
        values, places = x.sort(*args, **others)
        if x.is_meta:
            E = x.shape[-1]
            first = torch.arange(x.numel() // E)[:, None] * self.choices
            places = ((first + torch.arange(E)) % E).view(x.shape)
        return torch.return_types.sort((values, places))

    def _attention(
        self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, attn_mask: Tensor | None = None,
        is_causal: bool = False, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The flash operator of the CPU or, without a mask, of the GPU; both know grouped heads."""
        qkv, aten = (q_BHTC, k_BKSC, v_BKSC), torch.ops.aten
        if self.as_gpu and attn_mask is None:
            return aten._scaled_dot_product_flash_attention(*qkv, 0.0, is_causal)[0]
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(*qkv, 0.0, is_causal, attn_mask=attn_mask)[0]


INDEXING = (Tensor.__getitem__, Tensor.__setitem__)  # by values, also of what has none


def _tensors(args: Sequence) -> Iterator[Tensor]:
    """Those of one dim at least; a number goes with every device."""
    for x in args:
        if isinstance(x, Tensor) and x.dim() > 0:
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _mixed(args: Sequence) -> bool:
    """Whether some of the tensors have values, and others have none."""
    return len({x.is_meta for x in _tensors(args)}) == 2


def _without_values(args: Sequence) -> tuple:
    """The same arguments, all on the meta device."""
    with unmetered():
        return tuple(
            x.to(DEVICE) if isinstance(x, Tensor) and x.dim() > 0
            else _without_values(x) if isinstance(x, list | tuple)
            else x
            for x in args
        )  # fmt: skip


def _edges(tensors: Sequence) -> list:
    """Where in the graph their gradients arrive; edges stay as they are."""
    return [
        torch.autograd.graph.get_gradient_edge(x) if isinstance(x, Tensor) else x for x in tensors
    ]


def _made(*args: Any, **kwargs: Any) -> Tensor:
    """torch.tensor makes one on the meta device without any operation that a meter could see."""
    made = torch.tensor(*args, **kwargs)
    return torch.empty_like(made) if made.is_meta else made


def _undrawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initial weights: nobody draws them."""
    return torch.empty(shape, device=DEVICE)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    return Norm.apply(x, weight)


class Norm(torch.autograd.Function):
    """RMSNorm as torch has it on a GPU: one operator, which keeps x and 1/rms in float32. On other
    devices torch takes it apart, and keeps more. x [..., D], weight [D] -> [..., D]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rms = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, rms)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def pretend(as_gpu: bool = False, choices: int = 0) -> Iterator[None]:
    """Inside, tensors on the meta device answer what needs values.

    as_gpu   they say that they are on a GPU; needs triton for a fused model
    choices  experts that a token chooses; 0: there are none
    """
    with Pretence(as_gpu, choices), torch.autograd.set_multithreading_enabled(False):
        yield
