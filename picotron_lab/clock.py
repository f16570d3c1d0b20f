"""Clocks: the time of a rank, real, or virtual in a lab with a network.

    def step(axis):
        handle = axis.all_reduce(torch.ones(1000), wait=False)      # 4000 bytes, 2 ranks
        axis.spend(3.0)                                             # compute meanwhile
        handle.wait()
        return axis.now()
    run_ranks(step, 2, network=Network(latency=0.5, bandwidth=1000.0))  # [4.5, 4.5]

Idea    Ranks that share a laptop cannot show what overlap saves. So beside the program each rank
        may have a clock of its own, from 0, which only `Axis.spend` and waiting advance: the same
        on every machine, in whatever order the ranks take turns.
Model   of a cluster, not a measurement of one:
        wire        A rank has one, for all of its axes. What it sends goes out in the order of the
                    calls, bytes / bandwidth each, and is there `latency` later. Starting a call
                    takes no time, receiving no room.
        message     Who waits for it goes on when it is there; its sender at once: it was buffered.
        collective  Each rank sends its bytes of a ring (ledger.wire_bytes) as soon as its wire is
                    free; the result is there for all when the last of them is. So for equal bytes:
                    latest start of any rank + bytes / bandwidth + latency.
Not     the program's own work (only `spend` counts), the steps of a ring, links that ranks share, a
        sender without a buffer. To ask `Handle.done()` takes no time: `spend` before you ask again.
Read    Network -> VirtualClock        Tests  tests/test_clock.py
"""

import math
import time
from dataclasses import dataclass

from picotron_lab.config import require
from picotron_lab.ledger import CommError


@dataclass(frozen=True)
class Network:
    """What the model knows of a cluster; without arguments, one that takes no time.

    latency    seconds from the last byte's departure to its arrival, 0 or more
    bandwidth  bytes per second that one rank can send, more than 0; inf: as fast as one likes
    raises     ConfigError for other values
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        require(
            0 <= self.latency < math.inf,
            f"Network latency={self.latency} is no time: give 0 or more seconds, as latency=1e-5.",
        )
        require(
            self.bandwidth > 0,
            f"Network bandwidth={self.bandwidth} sends nothing: give more than 0 bytes per second, "
            "as bandwidth=1e9.",
        )


class Clock:
    """The machine's clock: time passes by itself, and what came has come."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def spend(self, seconds: float) -> None:
        """Be busy for so long."""
        time.sleep(_checked(seconds))

    def send(self, size: float) -> float:
        """Give `size` bytes to the wire of this rank; returns when they will be there."""
        return 0.0

    def reach(self, moment: float) -> None:
        """Wait until a moment that `send` told, here or on another rank."""

    def place_in_line(self) -> float:
        """Who asks whether a call is done goes on after all with a lower place; -inf: any time."""
        return -math.inf


class VirtualClock(Clock):
    """The virtual time of one rank, on all of its axes; see Model above."""

    def __init__(self, network: Network):
        self._network, self._now, self._wire_is_free = network, 0.0, 0.0

    def now(self) -> float:
        return self._now

    def spend(self, seconds: float) -> None:
        self._now += _checked(seconds)

    def send(self, size: float) -> float:
        start = max(self._now, self._wire_is_free)
        self._wire_is_free = start + size / self._network.bandwidth
        return self._wire_is_free + self._network.latency

    def reach(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def place_in_line(self) -> float:
        return self._now


def _checked(seconds: float) -> float:
    if not 0 <= seconds < math.inf:
        raise CommError(f"nobody can spend {seconds} seconds: give 0 or more, as spend(0.1).")
    return seconds
