"""The world of one rank, and what every world answers with: work under way.

Idea    An axis of size 1 needs no world at all, so that the same code serves size 1 and size n.
Tests   tests/test_comm.py
"""

from typing import Any, Protocol

from torch import Tensor

from picotron_lab.ledger import Call


class Work(Protocol):
    """A call under way."""

    def wait(self) -> None:
        """Return when it is over; raise CommError when it never will be."""

    def done(self) -> bool:
        """Whether wait() would return at once."""


class Done:
    """Work that is already over."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def done(self) -> bool:
        return True


class Handle:
    """A result that is on its way; `wait()` returns it, as often as asked."""

    def __init__(self, work: Work, result: Any, out: Tensor | None = None):
        self._work, self._result, self._out = work, result, out

    def wait(self) -> Any:
        """The result, when it is there."""
        self._work.wait()
        if self._out is not None:
            if not self._out.is_contiguous():  # then the call went through a buffer of its own
                self._out.detach().copy_(self._result)
            self._result, self._out = self._out, None
        return self._result

    def done(self) -> bool:
        """Whether wait() would return at once. Do wait in the end: some calls tell only then."""
        return self._work.done()


class Alone:
    """An axis of one rank: every collective is a copy at most."""

    def all_reduce(self, call: Call, out: Tensor, op: str) -> Work:
        return Done()

    def broadcast(self, call: Call, out: Tensor, source: int) -> Work:
        return Done()

    def all_gather(self, call: Call, out: Tensor, x: Tensor) -> Work:
        out.copy_(x)
        return Done()

    def reduce_scatter(self, call: Call, out: Tensor, x: Tensor, op: str) -> Work:
        out.copy_(x)
        return Done()

    def all_to_all(
        self, call: Call, out: Tensor, x: Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> Work:
        out.copy_(x)
        return Done()

    def barrier(self, call: Call) -> Work:
        return Done()

    def split(self, call: Call, mine: list[int]) -> "Alone":
        return self
