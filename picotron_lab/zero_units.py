"""Units of stage 3: a module whose weights are whole only while it computes.

Paper   Zhao et al. 2023, "PyTorch FSDP", sections 3.2 and 3.3 (2304.11277)
Idea    Each rank keeps 1/n of the rows of every weight. Sharded wraps a module (embedding, layer,
        norm, head): its forward gathers the weights, lends them to the module, and forgets them.
        Backward needs them again: whatever autograd saves is kept as it is, except for views of
        the gathered weights. Of those a note stays, and who reads the note gathers again.
        When all gradients of a unit have reached its Boundary, the unit's backward is over: its
        weights are forgotten, the gradients are reduce-scattered.
        Recomputation (recompute.py) around a unit runs its forward inside a backward, which
        follows at once: the weights stay for it. So a step gathers each unit twice, not thrice.
Plain   Gatherer: when needed, a call per weight, waiting
Fused   Prefetcher: a call per unit, under way while the unit before computes. Two buffers that
        stay: on one the next weights arrive, from the other the unit computes
Dims    as in zero_rows.py
Read    Sharded.forward -> Boundary -> Sharded._pack, _unpack -> Gatherer -> Prefetcher
Tests   tests/test_zero.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from picotron_lab.comm import Axis, Handle
from picotron_lab.zero_rows import Group, Memory, gather_rows


class Note(NamedTuple):
    """What is kept of a tensor that lay in a gathered weight: where it lay."""

    weight: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Kept(NamedTuple):
    """What is kept of any other tensor: what the hooks around the unit make of it, if any."""

    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]
    x: Any


class Sharded(nn.Module):
    """A unit, called as its module is, with positional arguments, of which the first is a tensor.

    shards   {full parameter: this rank's rows of it}; they take its place in the module
    raises   nothing of its own. The module must not keep weights anywhere but in autograd's graph.
    """

    def __init__(self, module: nn.Module, gatherer: "Gatherer", shards: dict):
        super().__init__()
        self.module, self.gatherer = module, gatherer
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.group = Group(self.shapes.values(), gatherer.axis)
        self.weights: list[Tensor] | None = None
        self.index: dict[int, int] = {}  # by the address of a storage: a weight that lies there
        self.read_by_backward = False  # as the last forward saw it
        for part in module.modules():
            for key, parameter in list(part._parameters.items()):
                if parameter is not None:
                    setattr(part, key, shards[parameter])

    def forward(self, x: Tensor, *others: Any) -> Any:
        if not in_backward():
            self.gatherer.close_all()  # what a backward that was broken off has left
        shards, notes = self.shards(), []
        learns = x.requires_grad or any(shard.requires_grad for shard in shards)
        if torch.is_grad_enabled() and learns:
            x, *weights = Boundary.apply(self, x, *shards)
        else:
            weights = self.open()
        around = outer_hooks()
        lent = dict(zip(self.shapes, weights, strict=True))
        try:
            with saved_tensors_hooks(partial(self._pack, notes, around), self._unpack):
                return functional_call(self.module, lent, (x, *others))
        finally:
            if not in_backward():
                self.close()
                recomputes = self.training and learns and not torch.is_grad_enabled()
                self.read_by_backward = bool(notes) or recomputes

    def shards(self) -> list[nn.Parameter]:
        """The parameters of today: those of the meta device were replaced by real ones."""
        return [parameter for _, parameter in self.module.named_parameters()]

    def open(self) -> list[Tensor]:
        """shard -> replicated (all_gather, one unit), unless the weights are whole already."""
        if self.weights is None:
            self.weights = self.gatherer.gather(self)
            self.index = {w.untyped_storage()._cdata: i for i, w in enumerate(self.weights)}
        return self.weights

    def close(self) -> None:
        """Forget the whole weights."""
        self.weights, self.index = None, {}

    def _pack(self, notes: list[Note], around: Kept, x: Tensor) -> Note | Kept:
        """What autograd keeps instead of x."""
        i = self.index.get(x.untyped_storage()._cdata)
        if i is None:
            return around._replace(x=around.pack(x))
        offset = x.storage_offset() - self.weights[i].storage_offset()
        notes.append(Note(i, tuple(x.shape), x.stride(), offset))
        return notes[-1]

    def _unpack(self, kept: Note | Kept) -> Tensor:
        if isinstance(kept, Kept):
            return kept.unpack(kept.x)
        weight = self.open()[kept.weight]
        offset = weight.storage_offset() + kept.offset
        return weight.as_strided(kept.shape, kept.stride, offset)


class Boundary(torch.autograd.Function):
    """Where backward leaves a unit: when all gradients are here, everything inside is done.

    forward    shard -> replicated (all_gather, one unit): the whole weights; x passes
    backward   partial -> shard (reduce_scatter, one unit): sums go to shard.grad; dx passes
    """

    @staticmethod
    def forward(ctx, unit: Sharded, x: Tensor, *shards: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.unit = unit
        ctx.set_materialize_grads(False)  # no zeros for frozen weights
        outputs = (x.view_as(x), *(weight.detach() for weight in unit.open()))
        learns = zip(outputs, ctx.needs_input_grad[1:], strict=True)
        ctx.mark_non_differentiable(*(out for out, needed in learns if not needed))
        return outputs

    @staticmethod
    def backward(ctx, dx: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit = ctx.unit
        unit.close()
        shards, sums = [], []
        shapes = unit.shapes.values()
        for shard, shape, gradient in zip(unit.shards(), shapes, gradients, strict=True):
            if shard.requires_grad:  # without a gradient here, it may have one on other ranks
                shards.append(shard)
                sums.append(shard.new_zeros(shape) if gradient is None else gradient)
        if shards:
            shards[0].synchroniser.reduce(shards, sums)
        return None, dx, *(None for _ in gradients)


def outer_hooks() -> Kept:
    """The hooks that would apply here: recomputation may surround a unit, and torch asks only the
    innermost ones."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return Kept(*(hooks or (lambda x: x, lambda x: x)), None)


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread: a forward is a recomputation then."""
    return torch._C._current_graph_task_id() != -1


# ---- who gathers


class Gatherer:
    """Gathers the weights of a unit when it needs them, one after the other."""

    def __init__(self, axis: Axis):
        self.axis = axis
        self.units: list[Sharded] = []  # in the order of forward

    @property
    def buffers(self) -> list[Tensor]:
        """Flat memory that stays between steps."""
        return []

    def close_all(self) -> None:
        """Forget all whole weights."""
        for unit in self.units:
            unit.close()

    def gather(self, unit: Sharded) -> list[Tensor]:
        """shard -> replicated (all_gather, one unit): the whole weights."""
        both = zip(unit.shards(), unit.shapes.values(), strict=True)
        return [gather_rows(shard, shape[0], self.axis) for shard, shape in both]


class Prefetcher(Gatherer):
    """Gathers a unit in one call, which leaves when the unit before begins to compute.

    Forward the next unit follows, backward the nearest one below whose backward reads weights. What
    left in one direction is not used in the other: the optimizer may have stepped in between.
    """

    def __init__(self, axis: Axis):
        super().__init__(axis)
        self.wire, self.whole = Memory(), Memory()
        self.guess: tuple[Sharded, bool] | None = None  # the unit under way, and whether backward
        self.arriving: Handle | None = None

    @property
    def buffers(self) -> list[Tensor]:
        return [self.wire.bytes, self.whole.bytes]

    def gather(self, unit: Sharded) -> list[Tensor]:
        assert all(other.weights is None for other in self.units), (
            "a unit needs its weights while another still uses the buffer they would take: let "
            "one unit end before the next begins, or use impl plain."
        )
        backward = in_backward()
        if self.guess != (unit, backward):
            self._start(unit, backward)
        wire_NK = self.arriving.wait()
        whole = self.whole.elements(unit.group.size, wire_NK.dtype, wire_NK.device)
        weights = unit.group.fulls(whole)
        unit.group.unpack(wire_NK, weights)
        self.guess = self.arriving = None
        following = self._following(unit, backward)
        if following is not None:
            self._start(following, backward)
        return weights

    def _start(self, unit: Sharded, backward: bool) -> None:
        if self.arriving is not None:
            self.arriving.wait()  # a wrong guess: its buffer is needed
        shards = unit.shards()
        wire = self.wire.elements(unit.group.size, shards[0].dtype, shards[0].device)
        self.guess = unit, backward
        self.arriving = unit.group.gather(wire.view(self.axis.size, -1), shards)

    def _following(self, unit: Sharded, backward: bool) -> Sharded | None:
        i = self.units.index(unit)
        below = (other for other in reversed(self.units[:i]) if other.read_by_backward)
        return next(below if backward else iter(self.units[i + 1 :]), None)
