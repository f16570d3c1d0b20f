"""Ledger: every call that a rank made, with its payload, so that no byte on the wire goes unseen.

Tests, exercises, the trainer's log and the cost model read it. Payload S is the bytes of the whole
tensor that a call is about: the full tensor for all_reduce, all_gather and reduce_scatter alike.
Wire    what a ring of n ranks makes each rank send: all_reduce 2(n-1)/n S; all_gather,
        reduce_scatter and all_to_all (n-1)/n S; broadcast, send and exchange S; recv and barrier
        nothing (Thakur, Rabenseifner and Gropp 2005, section 4)
Tests   tests/test_comm.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PLUMBING = ("torch", "contextlib", "picotron_lab.comm", "picotron_lab.ledger")


class CommError(Exception):
    """A sentence about ranks that cannot go on together."""


@dataclass(frozen=True, slots=True)
class Call:
    """One entry of the ledger. `bytes` is the payload S; a recv counts 0, its sender counts it."""

    op: str
    axis: str
    number: int  # counts the calls of this rank on this axis, from 1
    place: str  # file.py:line of the code that called
    detail: str  # what must be alike on all ranks: reduction, shape, dtype
    bytes: int
    waits: bool = True  # False: the caller computes meanwhile, and waits later

    def __str__(self) -> str:
        return f"{self.op} #{self.number} on axis {self.axis} ({self.place})"

    def in_full(self) -> str:
        """The call with its reduction, shape and dtype, for sentences about disagreement."""
        return f"{self}: {self.detail}" if self.detail else str(self)


class Ledger:
    """Every call that one rank made, on all of its axes, in order.

    It grows by some 130 bytes per call until `clear()`, which the trainer calls every step.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def select(self, op: str | None = None, axis: str | None = None) -> list[Call]:
        """The calls of one operation and/or one axis."""
        return [c for c in self.calls if op in (None, c.op) and axis in (None, c.axis)]

    def bytes(self, op: str | None = None, axis: str | None = None) -> int:
        """Payload bytes of the selected calls."""
        return sum(c.bytes for c in self.select(op, axis))

    def bytes_by_axis(self) -> dict[str, int]:
        """{axis name: payload bytes}, for metrics."""
        return {name: self.bytes(axis=name) for name in dict.fromkeys(c.axis for c in self.calls)}

    def clear(self) -> None:
        """Forget all calls."""
        self.calls.clear()


def wire_bytes(op: str, payload: float, size: int) -> float:
    """Bytes one rank sends for `payload` bytes S on a ring of `size` ranks (see Wire above)."""
    share = (size - 1) / size
    factor = {
        "all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share,
        "broadcast": 1, "send": 1, "exchange": 1, "recv": 0, "barrier": 0,
    }  # fmt: skip
    if op not in factor:
        raise ValueError(f"wire_bytes knows {', '.join(factor)}; it was given '{op}'.")
    return payload * factor[op]


def caller() -> str:
    """file.py:line of the nearest caller outside this module, comm.py and torch."""
    frame = sys._getframe(1)
    while frame is not None and _is_plumbing(frame):
        frame = frame.f_back
    if frame is None:
        return "unknown place"
    file = frame.f_code.co_filename
    return f"{'cell' if 'ipykernel' in file else Path(file).name}:{frame.f_lineno}"


def _is_plumbing(frame: FrameType) -> bool:
    """By the module's name, not by its path: paths differ between systems and installations."""
    name = frame.f_globals.get("__name__", "")
    return name in PLUMBING or name.startswith("torch.")
