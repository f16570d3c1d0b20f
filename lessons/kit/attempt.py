"""Attempt: what a task's check may ask for: run a program, compare, hold against a budget.

Idea    Three gates in order: import rules (rules.py), then `same` (equal to one device in float64),
        then budgets (`equal`, `at_most`, `at_least`): a cheap wrong answer is worth nothing, and a
        right one that cheats the budget is not the technique.
Says    One message per failure: what ran, what was seen, what was expected with its formula, a
        likely cause, and where a hint is.
Read    Attempt.run -> Run -> Attempt.same -> Wrong        Tests  tests/test_lesson_kit.py
"""

import math
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lessons.kit import child
from lessons.kit.diagnosis import Question, find
from lessons.kit.tasks import Chapter, Task
from picotron_lab.clock import Network
from picotron_lab.ledger import Call


class Wrong(Exception):
    """The message about a failed check."""


class NotStarted(Exception):
    """A stub was met; the message says which task's."""


@dataclass(frozen=True)
class How:
    """How a task is tried.

    exercise      path, or "mutants.py::name"
    rules         whether the import rules hold
    as_processes  ranks as real processes, but for programs with a network
    debug         in this very process, without a time-out, so that breakpoint() works
    """

    exercise: str
    seed: int = 1
    rules: bool = True
    as_processes: bool = False
    debug: bool = False


@dataclass(frozen=True)
class Run:
    """What a program gave: per rank its value, its calls, and its virtual time at the end.

    times  seconds; 0.0 for a run without a network
    """

    values: list[Any]
    calls: list[list[Call]]
    times: list[float]

    def count(self, op: str | None = None, axis: str | None = None, rank: int | None = None) -> int:
        """Calls of an operation and/or on an axis, by one rank or (None) the most of all ranks."""
        return max(len(calls) for calls in self._selected(op, axis, rank))

    def bytes(self, op: str | None = None, axis: str | None = None, rank: int | None = None) -> int:
        """Payload bytes of those calls."""
        return max(sum(c.bytes for c in calls) for calls in self._selected(op, axis, rank))

    def _selected(self, op: str | None, axis: str | None, rank: int | None) -> list[list[Call]]:
        ranks = self.calls if rank is None else [self.calls[rank]]
        return [[c for c in one if op in (None, c.op) and axis in (None, c.axis)] for one in ranks]


class Attempt:
    """One try at one task.

    rng, generator  random.Random and torch.Generator from the seed, from which the check makes its
                    case: sizes, numbers of ranks, values
    lines           what was found right, for the report
    printed         what the student's code printed
    """

    def __init__(self, chapter: Chapter, task: Task, how: How):
        self.seed, self.rng = how.seed, random.Random(how.seed)
        self.generator = torch.Generator().manual_seed(how.seed)
        self.lines: list[str] = []
        self.printed = ""
        self._chapter, self._task, self._how = chapter, task, how
        self._ran, self._budgets = "nothing yet", False

    def run(
        self,
        program: Callable[..., Any],
        ranks: int,
        *args: Any,
        network: Network | None = None,
        timeout: float = 20,
    ) -> Run:
        """Call program(axis, student, *args) on `ranks` ranks, in a process of their own.

        program  a top-level function of the test file; args and results are picklable
        network  for a virtual clock; None: the run has no times
        timeout  seconds
        Raises Wrong, or NotStarted at a stub.
        """
        self._ran = f"{program.__name__} on {ranks} rank{'s' * (ranks > 1)}, seed {self.seed}"
        job = child.Job(
            self._chapter.tests, self._how.exercise, program.__name__, ranks, pickle.dumps(args),
            self.seed, network,
        )  # fmt: skip
        if self._how.debug:
            ending = child.perform(job)
        elif self._how.as_processes and network is None:
            ending = child.run_as_processes(job, timeout)
        else:
            ending = child.run_in_child(job, timeout)
        self.printed += ending.printed
        return self._judge(ending, timeout)

    def _judge(self, ending: child.Ending, timeout: float) -> Run:
        if ending.kind == "done":
            return Run(ending.values, ending.calls, ending.times)
        if ending.kind == "todo":
            mine = ending.words == self._task.number
            raise NotStarted("not started" if mine else f"waits for {ending.words}")
        if ending.kind == "timeout":
            cause = "a loop that never ends?"
            raise self._wrong(f"no answer after {timeout:g} s", "", cause)
        left = ending.kind == "disagreement" and re.search("has finished|ever made", ending.words)
        cause = (
            "some ranks make a call that others leave out: what makes them differ?" if left else ""
        )
        raise self._wrong(ending.words, "", cause, ending.lines)

    def same(
        self,
        what: str,
        got: Any,
        want: Any,
        ranks: int | None = None,
        factors: dict[int, str] | None = None,
        suspects: dict[str, Any] | None = None,
    ) -> None:
        """Gate 2: `got` must equal the reference `want`, nested tensors and numbers alike.

        ranks     of the axis; a list of that length is taken as one value per rank
        factors   {6: "micro-batches"}: counts by which it may be off
        suspects  {sentence: wrong value that proves it}, looked at before everything else
        """
        assert not self._budgets, (
            f"{self._task.number} checks '{what}' after a budget: compare first, budgets last."
        )
        question = Question(what, got, want, ranks, factors or {}, suspects or {})
        difference = find(question)
        if difference:
            raise self._wrong(difference.seen, difference.expected, difference.cause)
        self.lines.append(f"{what}: equal to the reference")

    def equal(self, what: str, got: float, want: float, formula: str, because: str = "") -> None:
        """Gate 3: a budget that must be met exactly."""
        kept = close(got, want)
        self._budget((what, got, formula, because), "", want, kept)

    def at_most(self, what: str, got: float, limit: float, formula: str, because: str = "") -> None:
        """Gate 3: a budget that may not be exceeded."""
        kept = got <= limit or close(got, limit)
        self._budget((what, got, formula, because), "at most ", limit, kept)

    def at_least(
        self, what: str, got: float, limit: float, formula: str, because: str = ""
    ) -> None:
        """Gate 3: what must be reached."""
        kept = got >= limit or close(got, limit)
        self._budget((what, got, formula, because), "at least ", limit, kept)

    def _budget(self, told: tuple, relation: str, limit: float, kept: bool) -> None:
        what, got, formula, because = told
        self._budgets = True
        if not kept:
            allowed = f"{relation}{amount(limit)}{equals(limit, formula)}"
            raise self._wrong(f"{what}: {amount(got)}", allowed, because)
        allowed = equals(limit, formula)
        if relation:
            allowed = f" ({relation}{amount(limit)}{allowed})"
        self.lines.append(f"{what}: {amount(got)}{allowed}")

    def stopped(self, words: str) -> str:
        """The message where the check itself could not go on."""
        cause = "what your code gave has another form than the docstring says"
        seen = f"your code returned, and the check could not use what it returned: {words}"
        return str(self._wrong(seen, "", cause))

    def _wrong(self, seen: str, expected: str, cause: str, lines: tuple[str, ...] = ()) -> Wrong:
        parts = [("ran", self._ran)]
        parts += [("right", line) for line in self.lines]
        parts += [("seen", seen), ("expected", expected), ("likely", cause)]
        parts += [("at", line) for line in lines]
        text = "\n".join(_row(label, words) for label, words in parts if words)
        return Wrong(f"{text}\nhint: python -m lessons hint {self._task.number}")


def _row(label: str, words: str) -> str:
    return f"{label:<10}" + words.replace("\n", "\n" + " " * 10)


def close(a: float, b: float) -> bool:
    """Whether alike; seconds are sums of floats."""
    return a == b or (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-9))


def equals(number: float, formula: str) -> str:
    """ " = " and the formula, unless that is the number itself."""
    return "" if formula.replace(",", "") == amount(number).replace(",", "") else f" = {formula}"


def amount(number: float) -> str:
    """A number for people: 12,544 or 0.001234."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return str(number)
    return f"{number:,}" if isinstance(number, int) else f"{number:,.6g}"
