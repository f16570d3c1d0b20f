"""Activations in flight: what a rank holds while it goes along its list of a schedule.

Idea    F leaves bytes for backward, B trades them for what W needs, BW and W free them: schedules/
        simulate.py counts that in activations, here each stage has its own bytes, for the first one
        embeds and the last one has the head. Passes of a split vocabulary: IF leaves its places
        until IB, S its logits until T; the first rank has the embedded tokens from IF to F, the
        last one the gradient of its output until B
Not     tensors that wait to be received
Dims    as in model.py
Read    over_time -> Walk    Tests   tests/test_memory_prediction.py
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from picotron_lab.analysis import saved
from picotron_lab.analysis.saved import Rank
from picotron_lab.schedules.actions import Action, Schedule, parts
from picotron_lab.schedules.simulate import Timeline, simulate

ALGORITHM = {1: "1", 2: "2", 3: "naive"}  # of Schedule.vocabulary


def over_time(r: Rank, schedule: Schedule, counts: Sequence[int]) -> list[int]:
    """Bytes after each item of this rank's list; what an item sends is still there.

    counts   layers of each stage
    """
    walk = Walk(r, schedule, counts)
    return [walk.after(at) for at in range(len(schedule.lists[r.place.pp]))]


def batches(r: Rank, microbatches: int) -> int:
    """Tokens and labels of all micro-batches, numbers of their rows; the loss so far, its share."""
    rows = r.cfg.micro_batch_size
    return saved.INDEX * (microbatches * (2 * r.at.tokens + rows) + 1) + r.at.wide


class Walk:
    """What a rank holds while it goes along its list, by what it is."""

    def __init__(self, r: Rank, schedule: Schedule, counts: Sequence[int]):
        self.r, self.schedule, self.counts = r, schedule, counts
        self.rank, self.last = r.place.pp, schedule.stages - 1
        self.words = schedule.vocabulary > 0
        self.said = simulate(schedule)
        self.wanted = wanted(self.said)
        self.held: dict[tuple, int] = {("batches",): batches(r, schedule.microbatches)}
        self.under_way: list[float] = []  # when others take what was sent
        self.do = {"F": self._forward, "B": self._backward, "BW": self._backward}
        self.do |= {"W": self._weights, "IF": self._look_up, "S": self._scores}
        self.do |= {"T": self._rest, "IB": self._rows}
        coming = [(source, kind) for source, to, kind in messages(schedule) if to == self.rank]
        self.coming = Counter(coming)  # messages on each way to this rank that are not taken yet

    def after(self, at: int) -> int:
        """Bytes held after item number `at` of the list, with what it received and sends."""
        actions = parts(self.schedule.lists[self.rank][at])
        for action in actions:
            self._take(action)
        received = sum(self.do[action.kind](action) for action in actions)
        travels = len(self.under_way)
        if self.r.fused:  # receives are posted ahead
            travels += sum(count > 0 for count in self.coming.values())
        made = sum(self._is_given(action) for action in actions)
        seen = sum(self.held.values()) + received + self.r.stream * (travels + made)
        for action in actions:
            self._send(action, self.said.ends[self.rank][at])
        return seen

    def _is_given(self, action: Action) -> bool:
        """Whether an action's result goes to another stage, or to the words' passes."""
        return way_out(self.schedule, action) is not None or self._is_for_words(action)

    def _is_for_words(self, action: Action) -> bool:
        """The last stage's output, the gradient of the first one's input."""
        return self.words and action[:2] in (("F", self.last), ("B", 0), ("BW", 0))

    def _ends(self, s: int) -> tuple[int, bool, bool]:
        return self.counts[s], s == 0, s == self.last

    # ---- between stages

    def _take(self, action: Action) -> None:
        way = way_in(self.schedule, action)
        if way is None:
            return
        if way[0] == self.rank:
            del self.held["local", *way[1:], action.microbatch]
        else:
            self.coming[way[0], way[1]] -= 1

    def _send(self, action: Action, now: float) -> None:
        """Others hold nothing for it; it is freed when the next one is sent after it was taken.
        On the fused path it is taken at once."""
        if self._is_for_words(action):  # until this rank's own pass takes it
            self.held["given", action.kind[0], action.microbatch] = self.r.stream
        way = way_out(self.schedule, action)
        if way is None:
            return
        to, kind, s = way
        if to == self.rank:
            self.held["local", kind, s, action.microbatch] = self.r.stream
            return
        self.under_way = [] if self.r.fused else [t for t in self.under_way if t > now]
        self.under_way.append(self.wanted[kind, s, action.microbatch])

    # ---- what actions leave, and what they hold while they run

    def _forward(self, action: Action) -> int:
        _, s, i, _ = action
        self.held.pop(("embedded", i), None)
        said = saved.stage(self.r, *self._ends(s), self.words)
        self.held["F", s, i] = sum(said.values())
        return 0

    def _backward(self, action: Action) -> int:
        kind, s, i, _ = action
        del self.held["F", s, i]
        self.held.pop(("gradient", i), None)
        if kind == "B":
            layers, first, last = self._ends(s)
            first, last = first and not self.words, last and not self.words
            self.held["B", s, i] = saved.waiting(self.r, layers, first, last)
        same = kind == "B" and not self.r.cfg.dropout  # what came is dy of the last matmul
        return 0 if same or (s == self.last and not self.words) else self.r.stream

    def _weights(self, action: Action) -> int:
        del self.held["B", action.stage, action.microbatch]
        return 0

    # ---- passes of a vocabulary that the pipeline's ranks share

    def _look_up(self, action: Action) -> int:
        i, first = action.microbatch, self.schedule.rank_of(0)
        self.held["IF", i] = saved.embedding(self.r, words=True)
        if self.rank == first:
            self.held["embedded", i] = self.r.stream
        else:
            self.held["sum",] = self.r.stream  # nobody wants it, until the next one
        return 0

    def _scores(self, action: Action) -> int:
        i, algorithm = action.microbatch, ALGORITHM[self.schedule.vocabulary]
        self.held.pop(("given", "F", i), None)
        said = saved.split_head(self.r, algorithm, self.r.mesh.pp, self.rank)
        self.held["S", i] = sum(said.values())
        return 0

    def _rest(self, action: Action) -> int:
        i = action.microbatch
        del self.held["S", i]
        if self.rank == self.schedule.rank_of(self.last) and self.schedule.vocabulary != 2:
            self.held["gradient", i] = self.r.stream
        return 0

    def _rows(self, action: Action) -> int:
        del self.held["IF", action.microbatch]
        self.held.pop(("given", "B", action.microbatch), None)
        return self.r.stream


# ---- who sends what to whom


def way_in(schedule: Schedule, action: Action) -> tuple[int, str, int] | None:
    """Rank, kind and stage of the result that an action takes from another stage, if any."""
    kind, s, i, _ = action
    step = {"F": -1, "B": 1, "BW": 1}.get(kind)
    if step is None or not 0 <= s + step < schedule.stages:
        return None
    return schedule.rank_of(s + step, i), kind[0], s + step


def way_out(schedule: Schedule, action: Action) -> tuple[int, str, int] | None:
    """Rank that takes an action's result, its kind and its stage, if another stage takes it."""
    kind, s, i, _ = action
    step = {"F": 1, "B": -1, "BW": -1}.get(kind)
    if step is None or not 0 <= s + step < schedule.stages:
        return None
    return schedule.rank_of(s + step, i), kind[0], s


def messages(schedule: Schedule) -> Iterator[tuple[int, int, str]]:
    """Sender, receiver and kind of every message of a step between ranks."""
    for rank, items in enumerate(schedule.lists):
        for action in (action for item in items for action in parts(item)):
            way = way_out(schedule, action)
            if way is not None and way[0] != rank:
                yield rank, way[0], way[1]


def wanted(said: Timeline) -> dict[tuple[str, int, int], float]:
    """When the result of (kind, stage, micro-batch) is taken by the stage that needs it."""
    found = {}
    for items, starts in zip(said.schedule.lists, said.starts, strict=True):
        timed = zip(items, starts, strict=True)
        for action, start in ((action, start) for item, start in timed for action in parts(item)):
            way = way_in(said.schedule, action)
            if way is not None:
                found[way[1], way[2], action.microbatch] = start
    return found
