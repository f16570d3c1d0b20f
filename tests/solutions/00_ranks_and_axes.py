"""Solution of lesson 00: the library's mesh, as far as the signatures agree."""

import torch
from torch import Tensor

from picotron_lab import mesh
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Where the number stands in the grid."""
    places = (mesh.grid(**sizes) == rank).nonzero()
    return {name: int(place[0]) for name, place in zip(sizes, places, strict=True)}


def groups(sizes: dict[str, int], axis: str) -> list[list[int]]:
    """Those of the library."""
    return mesh.groups(MeshConfig(**sizes))[axis]


def sum_over(world: Axis, sizes: dict[str, int], axis: str, x: Tensor) -> Tensor:
    """On an axis of its own."""
    return world.split(axis, groups(sizes, axis)).all_reduce(x)


def pass_on(world: Axis, sizes: dict[str, int], x: Tensor) -> Tensor:
    """To the right, from the left, at once."""
    pp = world.split("pp", groups(sizes, "pp"))
    sends = [(x, pp.rank + 1)] if pp.rank + 1 < pp.size else []
    receives = [(x, pp.rank - 1)] if pp.rank > 0 else []
    received = pp.exchange(sends, receives)
    return received[0] if received else torch.zeros_like(x)
