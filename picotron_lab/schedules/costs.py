"""Costs: how long each action takes; Options: what a caller may choose about a schedule."""

import re
from dataclasses import dataclass, fields
from math import prod

from picotron_lab.schedules.actions import DATA, VOCABULARY, Action, Item, Pair, ScheduleError

NUMBER = r"\d+\.?\d*(e-?\d+)?|\.\d+"
UNITS = ("F", "B", "W", "S", "T", "IF", "IB", "transfer", "barrier", "pair")
Factor = float | tuple[float, float, float]


@dataclass(frozen=True)
class Costs:
    """Times, in any one unit, of one action on one stage of the schedule (on one slice, if sliced).

    F, B, W   BW takes B + W.  With v stages per rank a stage is a v-th of a rank's layers
    S, T      output-vocabulary passes;  IF, IB  input-embedding passes; of one rank's share
    transfer  from the end of an action until another rank may start with its result
    barrier   from the end of the last rank's vocabulary pass until its sum is known everywhere
    pair      of an overlapped F&BW or F&B;  0: no gain, the sum of its members
    factors   per stage, by which its F, B and W are multiplied (uneven stages): a number, or three,
              one for each; a pair becomes longer as its members do. Empty: all 1
    slices    the same per slice of a sequence (uneven slices)
    """

    F: float = 1.0
    B: float = 1.0
    W: float = 1.0
    S: float = 1.0
    T: float = 1.0
    IF: float = 1.0
    IB: float = 1.0
    transfer: float = 0.0
    barrier: float = 0.0
    pair: float = 0.0
    factors: tuple[Factor, ...] = ()
    slices: tuple[Factor, ...] = ()

    def __post_init__(self) -> None:
        for name, value in [*((n, getattr(self, n)) for n in UNITS), *self._factors()]:
            if not 0 <= value < float("inf"):
                raise ScheduleError(f"cost {name}={value} is no time: give 0 or more, as {name}=1.")

    def _factors(self) -> list[tuple[str, float]]:
        """Every factor with its name."""
        of = {"factors": self.factors, "slices": self.slices}
        each = [(f"{name}[{i}]", f) for name, all_f in of.items() for i, f in enumerate(all_f)]
        return [(name, number) for name, f in each for number in _three(f)]

    def of(self, item: Item) -> float:
        """How long an item takes. G and R take nothing here: the executor overlaps them."""
        if not isinstance(item, Pair):
            stage = self.factors[item.stage] if self.factors else 1.0
            part = self.slices[item.slice] if self.slices else 1.0
            return self._time(item, stage, part)
        both = (item.first, item.second)
        together, even = sum(map(self.of, both)), sum(self._time(action) for action in both)
        return self.pair * together / even if self.pair and even else self.pair or together

    def _time(self, action: Action, stage: Factor = 1.0, part: Factor = 1.0) -> float:
        kind = action.kind
        if kind in DATA:
            return 0.0
        if kind in VOCABULARY:
            return getattr(self, kind)
        units = (self.F, self.B, self.W)
        f, b, w = map(prod, zip(units, _three(stage), _three(part), strict=True))
        return {"F": f, "B": b, "W": w, "BW": b + w}[kind]


def _three(factor: Factor) -> tuple[float, float, float]:
    """Of F, of B, of W."""
    return factor if isinstance(factor, tuple) else (factor, factor, factor)


def parse_costs(text: str) -> Costs:
    """Costs from F=1,B=1.5,transfer=0.1; a kind that is not named costs 1, a delay 0.

    Raises  ScheduleError with a sentence that shows a value that works
    """
    known = {field.name for field in fields(Costs)} - {"factors", "slices"}
    given = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not re.fullmatch(NUMBER, value):
            names = ", ".join(UNITS)
            raise ScheduleError(f"cost '{part}' needs a name of {names} and a time, as in F=1,B=1.")
        given[name] = float(value)
    return Costs(**given)


@dataclass(frozen=True)
class Options:
    """What may be chosen; a schedule that cannot use a choice refuses it.

    virtual_stages  stages per rank (v); 0: the schedule's own number
    slices          parts of a sequence that flow one after the other (n)
    costs           for the schedules that are made for given times
    memory_limit    activations of one stage and micro-batch that a rank may hold; 0: no limit
    kept            share of an activation that stays from B until W, for the memory limit
    vocabulary      0: not split; 1 or 2: split over the ranks, by that algorithm
    """

    virtual_stages: int = 0
    slices: int = 1
    costs: Costs = Costs()
    memory_limit: float = 0.0
    kept: float = 1.0
    vocabulary: int = 0
