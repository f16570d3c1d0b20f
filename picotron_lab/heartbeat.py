"""Heartbeat: how ranks that are processes learn that one of them is lost or stuck, and say so.

Idea    A dead peer leaves the others waiting inside a collective. So every rank writes a sign of
        life and what it is doing into the launcher's key-value store, twice a second, from a small
        thread. Who cannot go on reads the others' signs, says which rank is missing, and tells all
        to end.
Ends    A rank ends with a sentence when its own call fails, when another rank asks all to end, or
        when its right-hand neighbour gave no sign of life for `timeout` seconds (a ring of watchers
        sees everyone). A rank that is done waits for the others, so none ends well while another
        fails.
Keys    beat/R  number|what rank R does      abort  the first sentence      finished, left  counters
Tests   tests/test_processes.py
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from picotron_lab.ledger import Call, CommError

INTERVAL = 0.5  # seconds between two signs of life
GRACE = 8 * INTERVAL  # how long a rank asked to end may take to say its own sentence first
SHOWN = 4  # groups of peers that a sentence describes; a job may have hundreds of ranks


class Heartbeat:
    """Signs of life of rank `rank` of `size`, in a `store` of its own (get, set, add, check).

    timeout  seconds of silence after which a rank counts as lost
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float):
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._lock = threading.Lock()  # one store client, two threads
        self._doing, self._beats = "computing before its first call", 0
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    @contextlib.contextmanager
    def guard(self, call: Call) -> Iterator[None]:
        """Inside, this rank is in `call`; what torch raises there becomes a CommError in words."""
        self._doing = f"waiting in {call.in_full()}"
        try:
            yield
        except RuntimeError as error:
            raise CommError(self._explain(call, error)) from None
        self._doing = f"computing after {call}"

    def fail(self, error: BaseException) -> None:
        """Ask all ranks to end, because this one ends with `error`."""
        words = " ".join(str(error).split()).rstrip(".")
        kind = type(error).__name__
        self._abort(f"rank {self._rank} ended with {kind}{': ' if words else ''}{words}.")
        self._over.set()  # it ends by itself now and needs no watching

    @contextlib.contextmanager
    def outlive_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM leaves this rank a moment to say what happened, then ends it.

        A launcher sends it to all ranks as soon as one has died: too soon for a sentence. It stays
        so after an exception, which is such a sentence.
        """
        if threading.current_thread() is not threading.main_thread():  # Python forbids it there
            yield
            return
        reason = "the launcher asked it to (SIGTERM), as it does when another rank has died."
        last_words = threading.Thread(target=self._say_last, args=(reason,), daemon=True)

        def handler(number: int, frame: object) -> None:
            if not last_words.ident:
                last_words.start()

        before = signal.signal(signal.SIGTERM, handler)
        yield
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def finish(self) -> None:
        """Wait until every rank has finished; raise CommError if one of them cannot."""
        self._doing = "done"
        try:
            self._beat()
            self._count("finished")
            self._poll(lambda: self._counted("finished") == self._size)
        except RuntimeError:
            raise CommError(f"rank {self._rank} had finished, but the launcher is gone.") from None
        self._over.set()
        self._thread.join()

    def leave(self) -> None:
        """The very last word: rank 0, which may host the store, stays until all have said it."""
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(RuntimeError):
            self._count("left")
            while self._rank == 0 and self._counted("left") < self._size:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)

    # ---- why a call failed

    def _explain(self, call: Call, error: Exception) -> str:
        """A sentence from what the others say and show; asks all ranks to end."""
        torch_says = f"torch says: {shorten(error)}."
        try:
            self._beat()
            reason = self._read("abort") or "; ".join([*self._describe_peers(), torch_says])
        except RuntimeError:  # the store went away with the launcher
            reason = f"the launcher is gone; {torch_says}"
        sentence = f"rank {self._rank} cannot finish {call.in_full()}; {reason}"
        self._abort(sentence)
        return sentence

    def _describe_peers(self) -> list[str]:
        """What the other ranks do; one whose sign does not change between two looks is lost."""
        peers = [r for r in range(self._size) if r != self._rank]
        before = self._read_signs(peers)
        time.sleep(4 * INTERVAL)
        after = self._read_signs(peers)
        doing: dict[str, list[int]] = {}
        for peer, old, new in zip(peers, before, after, strict=True):
            words = new.partition("|")[2]
            words = f"lost (last sign of life: {words or 'none'})" if old == new else words
            doing.setdefault(words, []).append(peer)
        groups = sorted(doing.items(), key=lambda item: (not item[0].startswith("lost"), item[1]))
        facts = [f"{_name(ranks)} {words}" for words, ranks in groups[:SHOWN]]
        return facts + ["and others"] * (len(groups) > SHOWN)

    # ---- the thread

    def _run(self) -> None:
        neighbour = [(self._rank + 1) % self._size]
        seen, since = [""], time.monotonic()
        while not self._over.wait(INTERVAL):
            try:
                self._beat()
                reason, sign = self._read("abort"), self._read_signs(neighbour)
            except RuntimeError:
                reason, sign = f"rank {self._rank} lost the launcher's store.", seen
            if sign != seen:
                seen, since = sign, time.monotonic()
            if not reason and time.monotonic() - since > self._timeout:
                reason = f"rank {neighbour[0]} gave no sign of life for {self._timeout:g} s."
            if reason:
                return self._end(reason)

    def _end(self, reason: str) -> None:
        """Tell the others that this process ends, and end it."""
        self._abort(reason)
        self._say_last(reason)

    def _say_last(self, reason: str) -> None:
        """Leave the main thread a moment to say more, still showing life, then end this process."""
        for _ in range(int(GRACE / INTERVAL)):
            if self._over.wait(INTERVAL):
                return
            with contextlib.suppress(RuntimeError):
                self._beat()
        sys.stdout.flush()
        print(f"error: rank {self._rank} ends, because {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is stuck: nothing else can end it

    # ---- the store

    def _beat(self) -> None:
        self._beats += 1
        with self._lock:
            self._store.set(f"beat/{self._rank}", f"{self._beats}|{self._doing}")

    def _abort(self, sentence: str) -> None:
        """Ask all ranks to end because of `sentence`; the first one asked for is kept."""
        with contextlib.suppress(RuntimeError), self._lock:  # without a store nobody can be told
            self._store.compare_set("abort", "", sentence)

    def _read(self, key: str) -> str:
        """The value of a key, empty while it has none."""
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else ""

    def _read_signs(self, ranks: list[int]) -> list[str]:
        """The signs of life of some ranks: in one request, once all of them have one."""
        keys = [f"beat/{r}" for r in ranks]
        with self._lock:
            if self._store.check(keys):
                return [value.decode() for value in self._store.multi_get(keys)]
        return [self._read(key) for key in keys]

    def _count(self, key: str) -> None:
        with self._lock:
            self._store.add(key, 1)

    def _counted(self, key: str) -> int:
        return int(self._read(key) or 0)

    def _poll(self, done: Callable[[], bool]) -> None:
        """Wait until done(), asking less and less often; raise when a rank asks all to end."""
        pause = 0.001
        while not done():
            reason = self._read("abort")
            if reason:
                raise CommError(f"rank {self._rank} had finished, but {reason}")
            time.sleep(pause)
            pause = min(1.5 * pause, INTERVAL)


def shorten(error: Exception) -> str:
    """The first sentence of torch's message, without the place in C++ before it."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". ")[0].rstrip(".")


def _name(ranks: list[int]) -> str:
    """'rank 3 is', 'ranks 1, 2 and 5 are' or 'ranks 1, 2, 3 and 97 more are'."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    shown = [str(r) for r in ranks[:8]]
    rest = len(ranks) - len(shown)
    last = f"{rest} more" if rest else shown.pop()
    return f"ranks {', '.join(shown)} and {last} are"
