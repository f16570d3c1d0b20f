"""Walk: do all ranks come to the end of their lists, and does what arrives come in order?

As in execution every pair of sender and receiver has one channel for forwards and one for
backwards, first in, first out. No times: whoever can go on does, and nobody can do harm by it.
"""

from collections import deque

from picotron_lab.schedules.actions import Action, Item, Pair, Schedule, ScheduleError

MOVES = ("F", "B", "BW")  # what receives from other stages, and sends to them
NOTHING = 0  # the channel of an action that receives, or sends, nothing


class Walk:
    """All ranks run their lists in turn, without times, and send through channels.

    A channel joins a sender, a receiver and a kind (F or B). Of each action a step is kept: the
    channel that it receives from, that which it sends to, and the item that it belongs to.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.channels: dict[tuple[int, int, str], int] = {}
        self.sent: list[list[tuple[int, ...]]] = [[]]  # of each channel, in order of sending
        self.wanted: list[list[tuple[int, ...]]] = [[]]  # and in the order of the receiver
        self.steps = [self._steps(rank) for rank in range(schedule.ranks)]

    def check_order(self) -> None:
        """No channel may deliver what its receiver does not want yet."""
        for (sender, receiver, kind), number in self.channels.items():
            for sent, wanted in zip(self.sent[number], self.wanted[number], strict=True):
                if sent != wanted:
                    step = 1 if kind == "F" else -1
                    first, then = Action(kind, *sent), Action(kind, *wanted)
                    reader, user = (a._replace(stage=a.stage + step) for a in (first, then))
                    raise ScheduleError(
                        f"{self.schedule.name}, rank {receiver}: {user} needs {then}, but rank "
                        f"{sender} sends {first} before that, and results come in the order of "
                        f"sending: move {reader} before {user}, or {then} before {first}."
                    )

    def check_end(self) -> None:
        """All ranks can come to the end of their lists."""
        given = [0 for _ in self.sent]
        taken = list(given)
        waiting: dict[int, int] = {}  # channel -> rank
        at = [0 for _ in self.steps]
        ready = deque(range(len(at)))
        while ready:
            rank = ready.popleft()
            steps = self.steps[rank]
            for here in range(at[rank], len(steps)):
                source, target, _ = steps[here]
                if source and taken[source] == given[source]:
                    waiting[source] = rank
                    break
                at[rank] = here + 1
                taken[source] += 1
                given[target] += 1
                if target in waiting:
                    ready.append(waiting.pop(target))
        stuck = [rank for rank, here in enumerate(at) if here < len(self.steps[rank])]
        if stuck:
            waits = "; ".join(self._wait(rank, at[rank], taken) for rank in stuck[:4])
            raise ScheduleError(
                f"{self.schedule.name} comes to a deadlock: {waits}: change the order, so that "
                "what is waited for comes first."
            )

    def _wait(self, rank: int, here: int, taken: list[int]) -> str:
        source, _, item = self.steps[rank][here]
        sender, kind = next((c[0], c[2]) for c, n in self.channels.items() if n == source)
        needed = Action(kind, *self.wanted[source][taken[source]])
        return f"rank {rank} waits in {item} for {needed} of rank {sender}"

    def _steps(self, rank: int) -> list[tuple[int, int, Item]]:
        """A pair receives for both members before it sends for any."""
        steps: list[tuple[int, int, Item]] = []
        routes: dict[tuple[str, int], tuple[int, int, int]] = {}
        for item in self.schedule.lists[rank]:
            begin = len(steps)
            for action in (item.first, item.second) if isinstance(item, Pair) else (item,):
                kind, stage, i, part = action
                if kind not in MOVES:
                    continue
                if (kind, stage) not in routes:  # a rank uses a stage in one direction only
                    routes[kind, stage] = self._route(rank, action)
                source, target, before = routes[kind, stage]
                self.wanted[source].append((before, i, part))
                self.sent[target].append((stage, i, part))
                steps.append((source, target, item))
            if len(steps) == begin + 2:
                (first, sends, _), (second, also, _) = steps[-2:]
                steps[-2:] = (first, NOTHING, item), (second, sends, item), (NOTHING, also, item)
        return steps

    def _route(self, rank: int, action: Action) -> tuple[int, int, int]:
        """Channel from which such actions receive, channel to which they send, stage before."""
        kind, stage, i, _ = action
        step = 1 if kind == "F" else -1
        ranks = self.schedule.homes[2 * i >= self.schedule.microbatches]
        source = self._channel(ranks.get(stage - step), rank, kind[0])
        return source, self._channel(rank, ranks.get(stage + step), kind[0]), stage - step

    def _channel(self, sender: int | None, receiver: int | None, kind: str) -> int:
        if sender is None or receiver is None:
            return NOTHING
        number = self.channels.setdefault((sender, receiver, kind), len(self.sent))
        if number == len(self.sent):
            self.sent.append([])
            self.wanted.append([])
        return number
