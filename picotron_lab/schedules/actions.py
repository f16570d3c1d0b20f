"""Action: one thing that a rank does in a training step; a Schedule lists them for every rank.

Kinds   F forward   B backward for the input   W backward for the weights   BW both at once
        S, T the output-vocabulary passes   IF, IB the input-embedding passes
        G gather parameters   R reduce gradients (data parallelism)
Written F2.3 is the forward of stage 2 on micro-batch 3, F2.3/1 of its slice 1; S.3 has no stage;
        R0 and G0 have no micro-batch; F0.4&BW7.1 is a pair that runs as one, overlapped action
A schedule lists what is computed and by whom. Transfers follow from it, so nobody lists them.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

KINDS = ("F", "B", "W", "BW", "S", "T", "IF", "IB", "G", "R")
VOCABULARY = ("S", "T", "IF", "IB")  # every rank runs these, on its share of the vocabulary
DATA = ("G", "R")


class ScheduleError(ValueError):
    """A schedule that cannot be built, or lists that are no training step; says what to do."""


class _Fields(NamedTuple):
    kind: str
    stage: int = 0
    microbatch: int = 0
    slice: int = 0


class Action(_Fields):
    """What to do (kind), to which part of the model (stage), with which part of the batch.

    A named tuple, because a large schedule has a million of them, looked up again and again.
    """

    __slots__ = ()

    def __new__(cls, kind: str, stage: int = 0, microbatch: int = 0, slice: int = 0) -> "Action":
        if kind not in KINDS:
            raise ScheduleError(f"an action's kind is one of {', '.join(KINDS)}, not '{kind}'.")
        return tuple.__new__(cls, (kind, stage, microbatch, slice))

    def __str__(self) -> str:
        if self.kind in DATA:
            return f"{self.kind}{self.stage}"
        stage = "" if self.kind in VOCABULARY else self.stage
        part = f"/{self.slice}" if self.slice else ""
        return f"{self.kind}{stage}.{self.microbatch}{part}"


@dataclass(frozen=True)
class Pair:
    """Two actions of one rank that run as one: each hides the other's communication."""

    first: Action
    second: Action

    def __str__(self) -> str:
        return f"{self.first}&{self.second}"


Item = Action | Pair


def parts(item: Item) -> tuple[Action, ...]:
    """The one or two actions of an entry of a list."""
    return (item.first, item.second) if isinstance(item, Pair) else (item,)


def parse(text: str) -> Item:
    """An item from its string: F2.3  BW2.3/1  S.3  R0  F0.4&BW7.1; the inverse of str()."""
    if "&" in text:
        first, second = text.split("&", 1)
        return Pair(parse(first), parse(second))
    found = re.fullmatch(r"([A-Z]+)(\d*)(?:\.(\d+)(?:/(\d+))?)?", text)
    action = Action(found[1], *(int(n or 0) for n in found.groups()[1:])) if found else None
    if action is None or str(action) != text.removesuffix("/0"):
        raise ScheduleError(f"'{text}' is no action: write it like F2.3, BW2.3/1, S.3 or R0.")
    return action


@dataclass(frozen=True)
class Schedule:
    """One training step of all ranks, as data.

    lists         what each rank runs, in order (one tuple of items per rank)
    placement     the stages of each rank, in the order of its chunks
    microbatches  how many the step has;  slices  into how many each is cut along the sequence
    replicated    every stage lives on two ranks (DualPipe): the first half of the micro-batches
                  uses chunk 0 of every rank, the second half chunk 1
    vocabulary    split over the ranks: 0 no, 1 or 2 by that algorithm, 3 interlaced
    """

    name: str
    lists: tuple[tuple[Item, ...], ...]
    placement: tuple[tuple[int, ...], ...]
    microbatches: int
    slices: int = 1
    replicated: bool = False
    vocabulary: int = 0

    @property
    def ranks(self) -> int:
        """How many ranks run it (p)."""
        return len(self.placement)

    @cached_property
    def stages(self) -> int:
        """Into how many stages the model is cut."""
        return 1 + max(stage for stages in self.placement for stage in stages)

    @cached_property
    def homes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Stage -> its rank, for the first and for the second half of the micro-batches."""
        if self.replicated:
            first, second = zip(*self.placement, strict=True)
            return _index(first), _index(second)
        everywhere = {s: rank for rank, stages in enumerate(self.placement) for s in stages}
        return everywhere, everywhere

    def rank_of(self, stage: int, microbatch: int = 0) -> int:
        """The rank that runs this stage on this micro-batch."""
        return self.homes[2 * microbatch >= self.microbatches][stage]


def _index(stages: tuple[int, ...]) -> dict[int, int]:
    return {stage: rank for rank, stage in enumerate(stages)}


def last_backwards(actions: list[Action]) -> set[int]:
    """Indices of the actions that complete a stage's gradients: its last BW or W of the list."""
    last = {a.stage: i for i, a in enumerate(actions) if a.kind in ("BW", "W")}
    return set(last.values())
