"""What lesson 00 asks for, as tests: each mesh here is drawn from the seed."""

import itertools
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lessons.kit import Lesson, task
from picotron_lab import mesh
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig

LESSON = Lesson(
    title="Ranks and axes",
    builds="the map of a mesh: who a rank is, whom it speaks to, and on which axis",
    allowed=("picotron_lab.comm",),
)
ORDER = ("pp", "dp", "cp", "tp")
ELEMENT = 8  # bytes of a float64


# ---- programs: they run on every rank


def find_coordinates(axis: Axis, student: ModuleType, sizes: dict[str, int]) -> dict[str, Any]:
    """The coordinates of every rank."""
    return {f"rank {r}": student.coordinates(r, sizes) for r in range(_size(sizes))}


def find_groups(axis: Axis, student: ModuleType, sizes: dict[str, int]) -> dict[str, list]:
    """The groups of every axis."""
    return {name: student.groups(sizes, name) for name in ORDER}


def add_up(
    axis: Axis, student: ModuleType, sizes: dict[str, int], name: str, xs: list[Tensor]
) -> dict[str, Tensor]:
    """The sum over one axis, and x after it."""
    x = xs[axis.rank].clone()
    return {"sum": student.sum_over(axis, sizes, name, x), "x": x}


def hand_on(axis: Axis, student: ModuleType, sizes: dict[str, int], xs: list[Tensor]) -> Tensor:
    """What the previous stage gave."""
    return student.pass_on(axis, sizes, xs[axis.rank].clone())


# ---- cases


def _size(sizes: dict[str, int]) -> int:
    return sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]


def _named(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _large(rng: Random) -> dict[str, int]:
    """A mesh in which every axis has another size."""
    return dict(zip(ORDER, rng.sample([2, 3, 4, 5], 4), strict=True))


def _six(rng: Random, first: str = "") -> tuple[dict[str, int], list[str]]:
    """Six ranks on two axes, of 2 and of 3 ranks, and the names of these two.

    first   an axis that is one of the two, with at least one axis nested inside it
    """
    one = first or rng.choice(ORDER)
    other = rng.choice([name for name in ORDER if name != one])
    sizes = dict.fromkeys(ORDER, 1)
    sizes[one], sizes[other] = rng.sample([2, 3], 2)
    return sizes, [one, other]


def _coordinates(grid: np.ndarray) -> dict[str, dict[str, int]]:
    """Of every rank in turn, where a grid [pp, dp, cp, tp] has its number."""
    at = {int(rank): place for place, rank in np.ndenumerate(grid)}
    return {f"rank {r}": dict(zip(ORDER, at[r], strict=True)) for r in sorted(at)}


def _groups(sizes: dict[str, int], name: str) -> list[list[int]]:
    """Those of the library."""
    return mesh.groups(MeshConfig(**sizes))[name]


def _tensors(attempt: Any, ranks: int) -> list[Tensor]:
    shape = attempt.rng.choice([(3, 5), (7,), (2, 3, 3)])
    return [
        torch.randn(shape, generator=attempt.generator, dtype=torch.float64) for _ in range(ranks)
    ]


# ---- tasks


@task("00.1", points=1, minutes=5, core=True, compare="picotron_lab.mesh:grid")
def test_coordinates(attempt: Any) -> None:
    """A rank knows its coordinates."""
    sizes = _large(attempt.rng)
    run = attempt.run(find_coordinates, 1, sizes)
    suspects = {
        "here the first axis runs fastest: the last one should, so that ranks 0 and 1 differ in tp "
        "alone": _coordinates(np.arange(_size(sizes)).reshape(tuple(sizes.values()), order="F"))
    }
    want = _coordinates(mesh.grid(**sizes))
    attempt.same(f"with {_named(sizes)}, coordinates", run.values[0], want, suspects=suspects)


@task("00.2", points=1, minutes=5, core=True, compare="picotron_lab.mesh:groups")
def test_groups(attempt: Any) -> None:
    """Ranks that differ in one coordinate form a group."""
    sizes = _large(attempt.rng)
    grid = mesh.grid(**sizes)
    run = attempt.run(find_groups, 1, sizes)
    for name in ORDER:
        n = sizes[name]
        blocks = [list(range(i, i + n)) for i in range(0, _size(sizes), n)]
        suspects = {
            "these are neighbouring ranks, which is right for the fastest axis only: how far apart "
            f"are two ranks that differ by 1 on {name}?": blocks,
            f"these are ranks that are alike on {name}: ranks of a group differ there, and are "
            "alike on the other axes": [
                part.flatten().tolist() for part in np.moveaxis(grid, ORDER.index(name), 0)
            ],
        }
        want = _groups(sizes, name)
        what = f"with {_named(sizes)}, groups of {name}"
        attempt.same(what, run.values[0][name], want, suspects=suspects)
    for name in ORDER:
        others = " * ".join(other for other in ORDER if other != name)
        count = len(run.values[0][name])
        attempt.equal(f"groups of {name}", count, _size(sizes) // sizes[name], others)


@task("00.3", points=2, minutes=5, compare="picotron_lab.mesh:build")
def test_sum_over(attempt: Any) -> None:
    """A sum stays on its axis."""
    sizes, names = _six(attempt.rng)
    xs = _tensors(attempt, 6)
    runs = {name: attempt.run(add_up, 6, sizes, name, xs) for name in names}
    for name, run in runs.items():
        want = list(xs)
        for group in _groups(sizes, name):
            for rank in group:
                want[rank] = sum(xs[other] for other in group)
        suspects = {"that is the sum over the whole world, not over my group": [sum(xs)] * 6}
        suspects["nothing was sent: that is each rank's own x"] = xs
        what, factors = f"with {_named(sizes)}, sum over {name}", {sizes[name]: f"ranks on {name}"}
        sums = [value["sum"] for value in run.values]
        attempt.same(what, sums, want, ranks=6, factors=factors, suspects=suspects)
        suspects = {"x was written to (out=x?): the sum is a new tensor": want}
        after = [value["x"] for value in run.values]
        attempt.same("x after the call", after, xs, ranks=6, suspects=suspects)
    for name, run in runs.items():
        _check_sum(attempt, run, name, xs[0].numel() * ELEMENT)


def _check_sum(attempt: Any, run: Any, name: str, size: int) -> None:
    """One call, on the axis of that name."""
    attempt.equal(
        "calls on the world", run.count(axis="world"), 0, "only the group speaks",
        because="other groups need not wait for this sum: split the world",
    )  # fmt: skip
    _check_name(attempt, run, name)
    attempt.equal(
        f"calls of all_reduce on {name}", run.count("all_reduce", name), 1, "one sum, one call",
        because="a sum over the axis is one verb of it",
    )  # fmt: skip
    attempt.equal(
        f"payload bytes on {name}", run.bytes(axis=name), size, "8 bytes per element of x",
        because="more was sent than x: gathering all parts, only to add them up?",
    )  # fmt: skip


def _check_name(attempt: Any, run: Any, name: str) -> None:
    """All is said on an axis of that name."""
    names = {call.axis for calls in run.calls for call in calls} - {name}
    attempt.equal(
        "names of other axes that were used", len(names), 0, f"all is said on one called {name}",
        because=f"it was called {', '.join(sorted(names))}: split(name, groups) is given the name",
    )  # fmt: skip


@task("00.4", points=1, minutes=5, compare="picotron_lab.pipeline_channels:Channels.send")
def test_pass_on(attempt: Any) -> None:
    """Stages hand on to their neighbours on the pp axis."""
    sizes, _ = _six(attempt.rng, first="pp")
    xs = _tensors(attempt, 6)
    run = attempt.run(hand_on, 6, sizes, xs)
    want, ring = [torch.zeros_like(x) for x in xs], list(xs)
    for group in _groups(sizes, "pp"):
        for before, rank in itertools.pairwise(group):
            want[rank] = xs[before]
        for i, rank in enumerate(group):
            ring[rank] = xs[group[i - 1]]
    suspects = {
        "the last stage sends to the first: a pipeline is no ring, and stage 0 should get zeros": (
            ring
        ),
        f"each rank gave x to world rank + 1: the next stage is {6 // sizes['pp']} ranks away": [
            torch.zeros_like(xs[0]),
            *xs[:-1],
        ],
    }
    what = f"with {_named(sizes)}, what came to the stage"
    attempt.same(what, run.values, want, ranks=6, suspects=suspects)
    attempt.equal(
        "calls on the world", run.count(axis="world"), 0, "messages of the pipeline are on pp",
        because="the right ranks, but over the world: split it, so that the axis knows who is next",
    )  # fmt: skip
    _check_name(attempt, run, "pp")
    size = xs[0].numel() * ELEMENT
    sent = [run.bytes(axis="pp", rank=rank) for rank in range(6)]
    last = [group[-1] for group in _groups(sizes, "pp")]
    attempt.equal(
        "payload bytes on pp of a rank that has a next stage, such as rank 0", max(sent), size,
        "8 bytes per element of x, once",
        because="more was sent than one message to the next stage",
    )  # fmt: skip
    attempt.equal(
        "payload bytes on pp of the last stage, such as rank 5", max(sent[r] for r in last), 0,
        "no stage comes after it", because="a pipeline is no ring: whom does the last stage tell?",
    )  # fmt: skip
