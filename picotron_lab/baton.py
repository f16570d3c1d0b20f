"""Baton: lets exactly one of many rank-threads run, and knows when none can.

Idea    A rank runs until it has to wait for another; then it hands the baton to a rank that can go
        on: in rank order, or by seeded dice. If there is none, every rank waits for another: a
        deadlock, known at once. A rank that fails stops the others at their next communication.
        One that asks whether a call is done lets others go on first; in virtual time (clock.py) it
        goes on when all others wait or ask too, and it is the earliest: so no seed changes answers.
Rules   The random state (torch, numpy, random) travels with the ranks: each finds it as it left it,
        and the caller of run_ranks too. All ranks begin with the caller's. Modes that belong to a
        thread (no_grad, autocast, the current GPU) begin fresh in each rank.
Read    Baton.run -> _live -> wait_until -> _pass_on        Tests  tests/test_lab.py
"""

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from picotron_lab.ledger import CommError

PATIENCE = 1.0  # seconds that ranks have to end after Ctrl-C


class Stopped(BaseException):
    """Unwinds a rank because another one failed; not an Exception, so that no rank catches it."""


@dataclass
class Wait:
    """What a rank waits for: a test that anyone may call, and words for it."""

    ready: Callable[[], bool]
    words: str
    moment: float = -math.inf  # in virtual time, of a rank that asks; who has none comes first


class Baton:
    """Lets one thread run at a time and knows when none can."""

    def __init__(self, size: int, seed: int | None):
        self._size = size
        self._failure: BaseException | None = None
        self._gates = [threading.Semaphore(0) for _ in range(size)]
        self._threads: list[int | None] = [None] * size
        self._waits: list[Wait | None] = [None] * size
        self._finished = [False] * size
        self._all_finished = threading.Event()
        self._dice = None if seed is None else random.Random(seed)

    def run(self, rank_main: Callable[[int], None]) -> None:
        """Start all ranks, hand one the baton, wait for the end, raise what failed."""
        if torch.cuda.is_available():
            torch.cuda.init()  # its random state must exist before ranks get theirs
        state = _random_state()
        threads = [
            threading.Thread(
                target=self._live, args=(r, rank_main, state), name=f"rank {r}", daemon=True
            )
            for r in range(self._size)
        ]
        try:
            for thread in threads:
                thread.start()
            self._pass_on(self._size - 1)
            self._all_finished.wait()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt as interrupt:
            self._failure = interrupt  # ranks end at their next communication
            self._all_finished.wait(PATIENCE)
            raise
        finally:
            _restore(state)
        if self._failure is not None:
            raise self._failure

    def _live(self, rank: int, rank_main: Callable[[int], None], state: tuple) -> None:
        self._gates[rank].acquire()
        self._threads[rank] = threading.get_ident()
        try:
            if self._failure is None:
                _restore(state)
                rank_main(rank)
        except Stopped:
            pass
        except BaseException as error:
            error.add_note(f"(raised by rank {rank} of {self._size})")
            if self._failure is None:
                self._failure = error
        self._finished[rank] = True
        self._pass_on(rank)

    def enter(self, rank: int, words: str) -> None:
        """A rank begins a call: may it? With a seed, others may come first."""
        if threading.get_ident() != self._threads[rank]:
            raise CommError(
                f"the axis of rank {rank} was used in {words} by a thread that is not rank {rank}: "
                "every rank must use the axis that its own function was given."
            )
        if self._failure is not None:
            raise Stopped
        if self._dice is not None:
            self._turn(rank, Wait(lambda: True, words))

    def wait_until(self, rank: int, ready: Callable[[], bool], words: str) -> None:
        """Hand the baton on until ready() holds."""
        self.enter(rank, words)
        while not ready():
            self._turn(rank, Wait(ready, words))

    def pause(self, rank: int, words: str, moment: float) -> None:
        """Let others go on first; with a finite `moment`, all who can, and who is earlier."""
        self.enter(rank, words)
        self._turn(rank, Wait(lambda: True, words, moment))

    def _turn(self, rank: int, wait: Wait) -> None:
        self._waits[rank] = wait
        state = _random_state()
        self._pass_on(rank)
        self._gates[rank].acquire()
        self._waits[rank] = None
        if self._failure is not None:
            raise Stopped
        _restore(state)

    def _pass_on(self, rank: int) -> None:
        """Choose who runs next: in rank order after me, or by dice. Nobody can: deadlock."""
        after_me = [(rank + 1 + i) % self._size for i in range(self._size)]
        alive = [r for r in after_me if not self._finished[r]]
        if not alive:
            return self._all_finished.set()
        able = [r for r in alive if self._waits[r] is None or self._waits[r].ready()]
        if not able and self._failure is None:
            self._failure = CommError(self._explain_deadlock())
        able = alive if self._failure is not None else able
        self._gates[self._choose(able)].release()

    def _choose(self, able: list[int]) -> int:
        moments = [wait.moment if (wait := self._waits[r]) else -math.inf for r in able]
        earliest = min(moments)
        able = [r for r, moment in zip(able, moments, strict=True) if moment == earliest]
        if earliest > -math.inf:
            return min(able)
        return self._dice.choice(able) if self._dice else able[0]

    def _explain_deadlock(self) -> str:
        doing = [
            f"rank {r} has finished" if self._finished[r] else f"rank {r} waits in {wait.words}"
            for r, wait in enumerate(self._waits)
        ]
        return f"no rank can make progress: {'; '.join(doing)}."


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def _restore(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])
