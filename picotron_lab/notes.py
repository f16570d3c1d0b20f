"""Notes: ranks that are processes compare what they call, before it does harm.

Idea    Ranks that call different things, or with other shapes, make gloo return garbage, wait for
        ever or crash, whichever comes first. So every call is accompanied by a note that says what
        this rank calls; who reads a note that does not match its own call ends with a sentence.
When    A caller that waits at once compares notes first, and only then starts the call. One that
        does not wait starts both, and compares in `Handle.wait`; so does an exchange, whose
        messages must not wait for the notes of other messages (that could be a circle).
Cost    one all_gather of 256 bytes per collective, one message of 256 bytes per message: a small
        call takes 1.3 to 1.7 times as long (2 and 4 ranks on 2 cores). Notes are not entered in the
        ledger. nccl does without them: try a new program in the lab or on gloo first.
Tests   tests/test_processes.py
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from picotron_lab.alone import Work
from picotron_lab.buffers import describe, unmetered
from picotron_lab.ledger import Call, CommError

SIZE = 256  # bytes of a note: what must be alike, then the call in words


class Compared:
    """A world of processes (see comm.py) whose ranks compare notes; `me` of `ranks` is this one."""

    def __init__(self, world: Any, ranks: Sequence[int], me: int):
        self._world, self._ranks, self._me = world, tuple(ranks), me

    def all_reduce(self, call: Call, out: Tensor, op: str) -> Work:
        return self._compare(call, lambda: self._world.all_reduce(call, out, op))

    def all_gather(self, call: Call, out: Tensor, x: Tensor) -> Work:
        return self._compare(call, lambda: self._world.all_gather(call, out, x))

    def reduce_scatter(self, call: Call, out: Tensor, x: Tensor, op: str) -> Work:
        return self._compare(call, lambda: self._world.reduce_scatter(call, out, x, op))

    def broadcast(self, call: Call, out: Tensor, source: int) -> Work:
        return self._compare(call, lambda: self._world.broadcast(call, out, source))

    def barrier(self, call: Call) -> Work:
        return self._compare(call, lambda: self._world.barrier(call))

    def all_to_all(
        self, call: Call, out: Tensor, x: Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> Work:
        def begin() -> Work:
            return self._world.all_to_all(call, out, x, receive_rows, send_rows)

        return self._compare(call, lambda: self._compare_rows(call, receive_rows, send_rows, begin))

    def exchange(self, call: Call, sends: list, receives: list) -> Work:
        """Each message follows its note; between two ranks messages keep their order."""
        with unmetered():
            notes = [(torch.empty(SIZE, dtype=torch.uint8), source) for _, source in receives]
        going = [pair for x, to in sends for pair in [(_write(describe(x), call), to), (x, to)]]

        def check() -> None:
            for (out, source), (note, _) in zip(receives, notes, strict=True):
                self._check_message(call, out, self._ranks[source], note)

        if call.op == "recv" and call.waits:
            asked = self._world.exchange(call, [], notes)
            return Checked(asked, check, lambda: self._world.exchange(call, [], receives), True)
        coming = [pair for note, pair in zip(notes, receives, strict=True) for pair in (note, pair)]
        return Checked(self._world.exchange(call, going, coming), check)

    def split(self, call: Call, mine: list[int]) -> "Compared":
        return Compared(self._world.split(call, mine), mine, self._me)

    # ---- comparing

    def _compare(self, call: Call, begin: Callable[[], Work]) -> Work:
        """Gather the notes of all ranks, and begin the call."""
        with unmetered():
            notes = torch.empty(len(self._ranks) * SIZE, dtype=torch.uint8)
            gathered = self._world.all_gather(call, notes, _write(f"{call.op} {call.detail}", call))

        def check() -> None:
            first, words = _read(notes[:SIZE])
            for rank, note in zip(self._ranks, notes.split(SIZE), strict=True):
                alike, other = _read(note)
                if alike != first:
                    raise CommError(
                        f"ranks disagree: rank {rank} calls {other}, but rank {self._ranks[0]} "
                        f"calls {words}."
                    )

        return Checked(gathered, check, begin, call.waits)

    def _compare_rows(
        self, call: Call, receive_rows: list[int], send_rows: list[int], begin: Callable[[], Work]
    ) -> Work:
        """Tell every rank how many rows it will get from me, and begin the all_to_all."""
        ones = [1] * len(self._ranks)
        with unmetered():
            coming, going = torch.empty(len(ones), dtype=torch.int64), torch.tensor(send_rows)
            told = self._world.all_to_all(call, coming, going, ones, ones)

        def check() -> None:
            for rank, sent, asked in zip(self._ranks, coming.tolist(), receive_rows, strict=True):
                if sent != asked:
                    raise CommError(rows_disagree(call, (rank, self._me), sent, asked))

        return Checked(told, check, begin, call.waits)

    def _check_message(self, call: Call, out: Tensor, source: int, note: Tensor) -> None:
        sent, words = _read(note)
        if sent != describe(out):
            raise CommError(
                f"ranks disagree: rank {source} sends {sent} in {words}, but rank {self._me} "
                f"expects {describe(out)} in {call}."
            )


class Checked:
    """A call with its notes: `notes` under way, `check` to read them, `begin` to start the call."""

    def __init__(
        self,
        notes: Work,
        check: Callable[[], None],
        begin: Callable[[], Work] | None = None,
        first: bool = False,
    ):
        self._notes, self._check = notes, check
        if first:
            self._read_notes()
        self._work = begin() if begin else None

    def _read_notes(self) -> None:
        if self._check:
            self._notes.wait()
            self._check()
            self._check = None

    def wait(self) -> None:
        """Compare, if that was not done before, then wait for the call itself."""
        self._read_notes()
        if self._work:
            self._work.wait()

    def done(self) -> bool:
        """Whether the notes, if they were not read before, and the call are there."""
        read = self._check is None or self._notes.done()
        return read and (self._work is None or self._work.done())


def rows_disagree(call: Call, ranks: tuple[int, int], sent: int, expected: int) -> str:
    """The sentence about an all_to_all from ranks[0] to ranks[1]."""
    return (
        f"{call}: rank {ranks[0]} sends {sent} rows to rank {ranks[1]}, which expects {expected}."
    )


def _write(alike: str, call: Call) -> Tensor:
    text = f"{alike}\n{call.in_full()}".encode()[:SIZE].ljust(SIZE)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _read(note: Tensor) -> tuple[str, str]:
    """What must be alike, and the call in words."""
    alike, _, words = bytes(note.tolist()).decode(errors="replace").rstrip().partition("\n")
    return alike, words
