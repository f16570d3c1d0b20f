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
Inside  Under expert parallelism fewer ranks hold the same experts than the same layer. So a layer's
        experts are a unit inside the layer's, with an axis and a gatherer of its own; the layer's
        leaves their weights alone. What the inner one does not recognise of what autograd saves,
        it hands to the outer one, and that to whoever recomputes.
Plain   Gatherer: when needed, a call per weight, waiting
Fused   Prefetcher: a call per unit, under way while the unit before computes. Two buffers that
        stay, for each axis: on one the next weights arrive, from the other the unit computes
Read    Sharded.forward -> Boundary -> Sharded._pack, _unpack -> Gatherer | Prefetcher
Tests   tests/test_zero.py
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from picotron_lab.comm import Axis, Handle
from picotron_lab.model import Llama
from picotron_lab.zero_rows import Group, Memory, gather_rows, shard_rows


class Note(NamedTuple):
    """What is kept of a view of gathered weights.

    weight   one whose storage it is in (a fused unit has one storage for all of its weights)
    offset   from the beginning of that storage
    version  of the weights that forward saw
    """

    weight: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    version: int


class Kept(NamedTuple):
    """What is kept of any other tensor: what the hooks around the unit make of it."""

    unpack: Callable[[Any], Tensor]
    x: Any


class Sharded(nn.Module):
    """A unit, called as its module is, with positional arguments, of which the first is a tensor.

    shards   {full parameter: this rank's rows of it}; they take its place in the module, where
             other parameters stay as they are: those of a unit inside this one
    raises   AssertionError when weights changed between forward and backward, and, fused, when two
             units must be whole at once: recompute at most one unit at a time

    The module must not keep weights anywhere but in autograd's graph. Nor may it change in place
    what autograd has saved: torch notices that only where no hooks look after saved tensors.
    """

    def __init__(self, module: nn.Module, gatherer: "Gatherer", shards: dict):
        super().__init__()
        self.module, self.gatherer = module, gatherer
        own = {name: p for name, p in module.named_parameters() if p in shards}
        self.shapes = {name: tuple(p.shape) for name, p in own.items()}
        self.group = Group(list(own.values()), gatherer.axis)
        self.weights: list[Tensor] | None = None
        self.index: dict[int, int] = {}  # by the address of a storage: a weight that lies there
        self.read_by_backward = False  # of an embedding, for one, it never is
        for part in module.modules():
            for key, parameter in list(part._parameters.items()):
                if parameter in shards:
                    setattr(part, key, shards[parameter])

    def forward(self, x: Tensor, *others: Any) -> Any:
        if not in_backward():
            self.gatherer.close_all()  # what a backward that was broken off has left
        shards, version = self.shards(), self.version()
        learns = x.requires_grad or any(shard.requires_grad for shard in shards)
        learns = learns and torch.is_grad_enabled()
        if learns:
            x, *weights = Boundary.apply(self, x, *shards)
        else:
            weights = self.open()
        lent = dict(zip(self.shapes, weights, strict=True))
        pack = partial(self._pack, version, outer_hooks())
        try:
            with saved_tensors_hooks(pack, self._unpack):
                return functional_call(self.module, lent, (x, *others))
        finally:
            if not (learns and in_backward()):  # else backward follows at once
                self.close()

    def shards(self) -> list[nn.Parameter]:
        """Looked up each time: materialise replaces the parameters of the meta device."""
        return [self.module.get_parameter(name) for name in self.shapes]

    def version(self) -> int:
        """Grows whenever weights are changed in place; torch counts that, rows or none."""
        return sum(shard._version for shard in self.shards())

    def open(self) -> list[Tensor]:
        """shard -> replicated (all_gather, one unit), unless the weights are whole already."""
        if self.weights is None:
            self.weights = self.gatherer.gather(self)
            self.index = {w.untyped_storage()._cdata: i for i, w in enumerate(self.weights)}
        return self.weights

    def close(self) -> None:
        """Forget the whole weights."""
        self.weights, self.index = None, {}

    def _pack(self, version: int, around: tuple[Callable, Callable], x: Tensor) -> Note | Kept:
        """What autograd keeps instead of x."""
        weight = self.index.get(x.untyped_storage()._cdata)
        if weight is not None:
            return Note(weight, tuple(x.shape), x.stride(), x.storage_offset(), version)
        pack, unpack = around
        return Kept(unpack, pack(x))

    def _unpack(self, kept: Note | Kept) -> Tensor:
        if isinstance(kept, Kept):
            return kept.unpack(kept.x)
        assert kept.version == self.version(), (
            "weights changed between forward and backward, which would now mix old and new ones: "
            "call backward before the optimizer steps."
        )
        return self.open()[kept.weight].as_strided(kept.shape, kept.stride, kept.offset)


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
            synchroniser_of(shards).reduce(shards, sums, unit.gatherer.axis)
        return None, dx, *(None for _ in gradients)


def synchroniser_of(shards: list[nn.Parameter]) -> Any:
    """The zero.Stage3 that zero.make has made for them."""
    ready = all(hasattr(shard, "synchroniser") and shard.grad is not None for shard in shards)
    assert ready, (
        f"there is nowhere to add the gradients of {shards[0].record.name}: call zero.make for all "
        "trainable parameters, and its begin_step, before backward."
    )
    return shards[0].synchroniser


def outer_hooks() -> tuple[Callable, Callable]:
    """(pack, unpack) that would apply here: recomputation may surround a unit, and torch asks only
    the innermost ones."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks or (Tensor.detach, lambda x: x)  # a result that kept itself would never be freed


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread: a forward is a recomputation then."""
    return torch._C._current_graph_task_id() != -1


# ---- what is a unit


def units_of(model: Llama) -> list[nn.Module]:
    """What stage 3 gathers at a time, in the order of forward."""
    return [model.embed, *model.layers, model.norm, model.head]


def shard_experts(model: nn.Module, gatherer: "Gatherer", axis: Axis) -> set[nn.Parameter]:
    """Make units over gatherer.axis of experts, which are to lie inside units over `axis`.

    Returns the parameters with which those outer units have nothing to do. Where nobody else has
    the same experts, nothing need be gathered: they stay as they are.
    """
    apart: set[nn.Parameter] = set()
    for parent, name in modules_over(model, gatherer.axis, axis):
        module = getattr(parent, name)
        if gatherer.axis.size > 1:
            shards = {p: shard_rows(p, gatherer.axis) for p in module.parameters()}
            gatherer.units.append(Sharded(module, gatherer, shards))
            setattr(parent, name, gatherer.units[-1])
        apart.update(module.parameters())
    return apart


def modules_over(model: nn.Module, axis: Axis, other: Axis) -> list[tuple[nn.Module, str]]:
    """(parent, name) of the largest modules whose parameters are partial over `axis`, and none over
    `other`: with expert_replica and dp the experts of each layer, if this rank has any."""

    def find(parent: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        for name, module in parent.named_children():
            over = [p.record.partial for p in module.parameters()]
            if over and all(axis.name in names and other.name not in names for names in over):
                yield parent, name
            else:
                yield from find(module)

    return list(find(model))


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

    Forward the next unit follows; backward the nearest one below whose weights an earlier backward
    has read: the first one has nothing to go by. What left is used only if its weights are still
    the same. Every rank must change weights alike, or ranks would meet in different calls.
    """

    def __init__(self, axis: Axis):
        super().__init__(axis)
        self.wire, self.whole = Memory(), Memory()
        self.guess: tuple[Sharded, int] | None = None  # the unit under way, version of its weights
        self.arriving: Handle | None = None

    @property
    def buffers(self) -> list[Tensor]:
        return [self.wire.bytes, self.whole.bytes]

    def gather(self, unit: Sharded) -> list[Tensor]:
        assert all(other.weights is None for other in self.units), (
            "a unit needs its weights while another still uses the buffer they would take: let "
            "one unit end before the next begins, or use impl plain."
        )
        unit.read_by_backward |= in_backward()
        if self.guess != (unit, unit.version()):
            self._start(unit)
        wire = self.arriving.wait()
        weights = self._place(unit, wire.dtype, wire.device)
        unit.group.unpack(weights, wire)
        self.guess = self.arriving = None
        following = self._following(unit)
        if following is not None:
            self._start(following)
        return weights

    def _start(self, unit: Sharded) -> None:
        if self.arriving is not None:
            self.arriving.wait()  # a wrong guess: its buffer is needed
        group, shards, n = unit.group, unit.shards(), self.axis.size
        wire = self.wire.elements(group.size, shards[0].dtype, shards[0].device)
        self.guess = unit, unit.version()
        self.arriving = group.gather(shards, wire.view(n, group.size // n))

    def _place(self, unit: Sharded, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Room for whole weights, one after the other."""
        shapes = unit.shapes.values()
        sizes = [math.prod(shape) for shape in shapes]
        parts = self.whole.elements(sum(sizes), dtype, device).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _following(self, unit: Sharded) -> Sharded | None:
        i = self.units.index(unit)
        below = (other for other in reversed(self.units[:i]) if other.read_by_backward)
        return next(below if in_backward() else iter(self.units[i + 1 :]), None)
