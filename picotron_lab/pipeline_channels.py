"""Channels between pipeline ranks: one for each sender, receiver and kind (F or B).

Idea    Messages of one kind between an ordered pair of ranks come in the order in which they are
        wanted (schedules/walk.py checks it), so no channel needs tags. A communicator carries one
        channel only: on a GPU its calls queue up behind each other, and a receive that waits for a
        rank must not hold up a send that this rank waits for. Routes that share no rank share a
        `split`, so that few are needed.
Plain   Channels: a receive is called when its tensor is needed
Fused   PostedChannels: before, so that it travels while this rank computes
Dims    as in pipeline_parallel.py
Read    routes -> matchings -> Channels -> PostedChannels
Tests   tests/test_pipeline_parallel.py
"""

from collections import Counter, deque
from collections.abc import Sequence

from torch import Tensor

from picotron_lab.comm import Axis, Handle
from picotron_lab.pipeline_stages import pair_up
from picotron_lab.schedules.actions import Schedule

Route = tuple[int, int, str]  # sender, receiver, kind: F or B


def routes(schedule: Schedule) -> Counter[Route]:
    """How many messages a step sends on each route."""
    m, found = schedule.microbatches, Counter()
    for homes, count in zip(schedule.homes, ((m + 1) // 2, m // 2), strict=True):
        for stage in range(1, schedule.stages):
            before, after = homes[stage - 1], homes[stage]
            if before != after:
                found[before, after, "F"] += count * schedule.slices
                found[after, before, "B"] += count * schedule.slices
    return found


def matchings(found: Sequence[Route]) -> list[list[Route]]:
    """Routes in groups, in each of which a rank appears once at most."""
    rounds: list[list[Route]] = []
    for route in sorted(found):
        free = (r for r in rounds if not {*route[:2]} & {rank for x in r for rank in x[:2]})
        room = next(free, None)
        if room is None:
            rounds.append(room := [])
        room.append(route)
    return rounds


class Channels:
    """What carries activations and gradients between ranks: a pair of ranks for every route.

    Plain: a receive is called when its tensor is needed, and waits.
    """

    def __init__(self, axis: Axis, schedule: Schedule):
        self.rank, found = axis.rank, routes(schedule)
        self.axes: dict[Route, Axis] = {}
        self.under_way: list[Handle] = []
        for kind in ("F", "B"):
            for together in matchings([route for route in found if route[2] == kind]):
                mine = pair_up(axis, f"pp.{kind}", [set(route[:2]) for route in together])
                self.axes |= {route: mine for route in together if axis.rank in route[:2]}

    def begin(self, likes: dict[Route, deque[Tensor]]) -> None:
        """A step begins, in which such tensors [B, T, D] come on each route, in this order."""

    def send(self, kind: str, x: Tensor, to: int) -> None:
        """Start to send; nobody waits for it before the end of the step."""
        axis = self.axes[self.rank, to, kind]
        self.under_way = [handle for handle in self.under_way if not handle.done()]
        self.under_way.append(axis.send(x, 1 - axis.rank, wait=False))

    def receive(self, kind: str, source: int, like: Tensor) -> Tensor:
        """The next tensor of that kind from rank `source`."""
        axis = self.axes[source, self.rank, kind]
        return axis.recv(like, 1 - axis.rank)

    def finish(self) -> None:
        """All that was sent has been taken."""
        for handle in self.under_way:
            handle.wait()
        self.under_way = []


class PostedChannels(Channels):
    """The next receive of every route is called before its tensor is needed, so that it travels
    while this rank computes."""

    def __init__(self, axis: Axis, schedule: Schedule):
        super().__init__(axis, schedule)
        self.posted: dict[Route, Handle] = {}
        self.likes: dict[Route, deque[Tensor]] = {}  # of messages that are not called for yet

    def begin(self, likes: dict[Route, deque[Tensor]]) -> None:
        self.likes = likes
        for route in likes:
            self._post(route)

    def receive(self, kind: str, source: int, like: Tensor) -> Tensor:
        route = source, self.rank, kind
        if route not in self.posted:  # no step is under way
            return super().receive(kind, source, like)
        x = self.posted.pop(route).wait()
        self._post(route)
        return x

    def _post(self, route: Route) -> None:
        if self.likes[route]:
            axis = self.axes[route]
            like = self.likes[route].popleft()
            self.posted[route] = axis.recv(like, 1 - axis.rank, wait=False)
