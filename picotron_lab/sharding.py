"""The record of a parameter: its full name and shape, which part this rank holds, who else has a
say.

Idea    A parallel technique replaces a parameter by a shard of it, or lets other ranks compute a
        part of its gradient. It writes that down in the parameter's record and is done:
        initialisation, gradient reduction, clipping, checkpoints and tests read the record, and
        know no technique by name.
Record  slices      part of the full parameter that this rank holds, (start, stop) per dim
        replicas    axes whose ranks all hold the same slices
        partial     axes whose ranks each hold a part of the gradient: their sum is the gradient
Exact   every *full* parameter is drawn from a generator seeded by (seed, name), then sliced: any
        mesh starts from the weights of one device (Picotron seeds each shard alike, so its ranks
        stay copies for ever).
Read    Record -> attach -> narrow -> materialise -> reduce_gradients -> squared_norm
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis


@dataclass(frozen=True)
class Record:
    """What must be known of a parameter beyond its values."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]
    replicas: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()

    @property
    def index(self) -> tuple[slice, ...]:
        """The slices as an index into the full parameter."""
        return tuple(slice(start, stop) for start, stop in self.slices)


def attach(model: nn.Module) -> None:
    """Give all parameters and buffers of a plain model their record: whole, and nowhere else."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape = tuple(tensor.shape)
        tensor.record = Record(name, shape, tuple((0, n) for n in shape))


def update(parameter: nn.Parameter, **changes: tuple) -> None:
    """Change fields of a parameter's record."""
    parameter.record = replace(parameter.record, **changes)


def replicate(model: nn.Module, axis: Axis) -> None:
    """The ranks of `axis` hold the same parameters and see other tokens: gradients are partial."""
    for parameter in model.parameters():
        add_axis(parameter, axis, partial=True)


def add_axis(parameter: nn.Parameter, axis: Axis, partial: bool) -> None:
    """The ranks of `axis` hold the same slices; partial: each computes a part of the gradient."""
    record = parameter.record
    update(parameter, replicas=(*record.replicas, axis.name))
    if partial:
        update(parameter, partial=(*record.partial, axis.name))


def bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` of `length` things cut into `parts`.

    Parts are ceil(length / parts) long, the last ones shorter or empty.
    """
    size = -(-length // parts)
    return min(index * size, length), min((index + 1) * size, length)


def share_out(count: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` of `count` whole things: numbers differ by one at most, and no
    part is empty while there are enough."""
    return index * count // parts, (index + 1) * count // parts


def narrow(
    parameter: nn.Parameter, dim: int, start: int, stop: int, **changes: tuple
) -> nn.Parameter:
    """A parameter for start:stop of what `parameter` holds along `dim`; its record says so.

    changes  other fields of the record. Cut on the meta device, before there are weights.
    """
    part = parameter.detach().narrow(dim, start, stop - start).clone()
    shard = nn.Parameter(part, requires_grad=parameter.requires_grad)
    slices = list(parameter.record.slices)
    first = slices[dim][0]
    slices[dim] = (first + start, first + stop)
    shard.record = replace(parameter.record, slices=tuple(slices), **changes)
    return shard


# ---- initial weights


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random stream of one parameter; the same on every rank of every mesh."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def materialise(
    model: nn.Module,
    seed: int,
    draw: Callable[[str, tuple[int, ...], torch.Generator], Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Turn the parameters of a model on the meta device into real ones, shard by shard.

    draw     (name, full shape, generator) -> the full parameter in float32
    Memory   one full parameter at a time; tied parameters stay tied. Buffers start at zero, in
             their own dtype.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                record = old.record
                full = draw(record.name, record.shape, generator_of(seed, record.name))
                part = full[record.index].to(device=device, dtype=dtype, copy=True)
                made[id(old)] = nn.Parameter(part, requires_grad=old.requires_grad)
                made[id(old)].record = record
            setattr(module, key, made[id(old)])
        for key, old in module._buffers.items():
            module._buffers[key] = torch.zeros_like(old, device=device)
            module._buffers[key].record = old.record


# ---- gradients


def zero_gradient(parameter: nn.Parameter) -> Tensor:
    """A zero gradient, in the dtype in which they add up: also a parameter that no token used has
    one."""
    return torch.zeros_like(parameter, dtype=parameter.grad_dtype, requires_grad=False)


def group_by_size(
    parameters: Sequence[nn.Parameter], bucket_bytes: float
) -> list[list[nn.Parameter]]:
    """Parameters in reverse order, cut into groups whose gradients fill at most `bucket_bytes`.

    A parameter that is larger by itself has a group of its own.
    """
    groups: list[list[nn.Parameter]] = []
    room = 0.0
    for parameter in reversed(list(parameters)):
        size = parameter.numel() * parameter.grad_dtype.itemsize
        if size > room or not groups:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(parameter)
        room -= size
    return groups


def reduce_gradients(parameters: Iterable[nn.Parameter], axes: Mapping[str, Axis]) -> None:
    """Sum every gradient over the axes that hold a part of it: the one rule for all techniques.

    partial -> replicated: one all_reduce per axis, for these gradients are few and small (norm
    weights, replicated heads); data_parallel.py and zero.py serve the axis where they are not.
    Frozen parameters are left alone; others must have a gradient, if only a zero one.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for name, axis in axes.items():
        partial = [p.grad for p in parameters if name in p.record.partial]
        if axis.size == 1 or not partial:
            continue
        total = axis.all_reduce(torch.cat([gradient.flatten() for gradient in partial]))
        for gradient, part in zip(partial, total.split([g.numel() for g in partial]), strict=True):
            gradient.copy_(part.view_as(gradient))


def squared_norm(
    parameters: Iterable[nn.Parameter], world: Axis, axes: Mapping[str, Axis]
) -> Tensor:
    """Squared norm of the whole model's reduced gradient, float64 scalar; a replica counts once.

    The ranks that have the same slice contribute 1/n each, if they are n, summed over the world.
    Every rank comes: one alone cannot know whether all others have all that it has.
    """
    parameters = list(parameters)
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        gradient, replicas = parameter.grad, parameter.record.replicas
        norm = torch.linalg.vector_norm(gradient, dtype=at_least_float32(gradient.dtype)).double()
        total += norm**2 / math.prod(axes[name].size for name in replicas)
    return world.all_reduce(total)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over many elements are taken."""
    return torch.promote_types(dtype, torch.float32)
