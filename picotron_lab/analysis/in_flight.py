"""Activations in flight: what a rank holds while it goes along its list of a schedule.

Idea    F leaves bytes for backward, B trades them for what W needs, BW and W free them: schedules/
        simulate.py counts that in activations, here each stage has its own bytes, for the first one
        embeds and the last one has the head. Passes of a split vocabulary: IF leaves its places
        until IB, S its logits until T; the first rank has the embedded tokens from IF to F, the
        last one the gradient of its output until B. Slices of a sequence are micro-batches of their
        own, and what their layers keep of keys and values is token_pipeline.py's: plain of each
        slice from its F to its B, and gradients for all earlier keys from a slice's B to the one
        before; fused of all T from the first slice's F to its B, gradients from the last one's B
Not     tensors that wait to be received; luck: a message counts until simulated time takes it, and
        a receiver may come earlier, which is one message of N D less
Dims    as in model.py
Read    over_time -> Walk    Tests   tests/test_memory_prediction.py
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import accumulate

from picotron_lab.analysis import saved
from picotron_lab.analysis.saved import Rank
from picotron_lab.schedules.actions import Action, Schedule, parts
from picotron_lab.schedules.simulate import INTERLACED, Timeline, simulate

ALGORITHM = {1: "1", 2: "2", 3: "naive"}  # of Schedule.vocabulary


def over_time(
    r: Rank, schedule: Schedule, counts: Sequence[int], slices: Sequence[int] = ()
) -> list[int]:
    """Bytes after each item of this rank's list; what an item sends is still there.

    counts   layers of each stage
    slices   tokens of each slice of a sequence, if the schedule runs slices
    """
    walk = Walk(r, schedule, counts, slices)
    return [walk.after(at) for at in range(len(schedule.lists[r.place.pp]))]


def batches(r: Rank, microbatches: int) -> int:
    """Tokens and labels of all micro-batches, numbers of their rows; the loss so far, its share."""
    rows = r.cfg.micro_batch_size
    return saved.INDEX * (microbatches * (2 * r.at.tokens + rows) + 1) + r.at.wide


class Walk:
    """What a rank holds while it goes along its list, by what it is."""

    def __init__(
        self, r: Rank, schedule: Schedule, counts: Sequence[int], slices: Sequence[int] = ()
    ):
        self.r, self.schedule, self.counts, self.lengths = r, schedule, counts, slices
        self.firsts = [0, *accumulate(slices)]  # each slice's first token
        self.of = [r.slice_of(length) for length in slices] or [r]  # as it runs each slice
        self.rank, self.last = r.place.pp, schedule.stages - 1
        self.words = schedule.vocabulary > 0
        self.said = simulate(schedule)
        self.wanted = wanted(self.said)
        self.held: dict[tuple, int] = {("batches",): batches(r, schedule.microbatches)}
        self.under_way: list[tuple[float, int]] = []  # when others take what was sent, its bytes
        self.do = {"F": self._forward, "B": self._backward, "BW": self._backward}
        self.do |= {"W": self._weights, "IF": self._look_up, "S": self._scores}
        self.do |= {"T": self._rest, "IB": self._rows}
        self.coming = self._messages()

    def after(self, at: int) -> int:
        """Bytes held after item number `at` of the list, with what it received and sends."""
        actions = parts(self.schedule.lists[self.rank][at])
        for action in actions:
            self._take(action)
        received = sum(self.do[action.kind](action) for action in actions)
        travels = sum(size for _, size in self.under_way)
        if self.r.fused:  # receives are posted ahead
            travels += sum(sizes[0] for sizes in self.coming.values() if sizes)
        made = sum(self._stream(action) for action in actions if self._is_given(action))
        seen = sum(self.held.values()) + received + travels + made
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

    def _stream(self, action: Action) -> int:
        """Bytes of what an action takes from a stage, and gives to one."""
        return self.of[action.slice].stream

    # ---- between stages

    def _messages(self) -> dict[tuple[int, str], deque[int]]:
        """Bytes of those that are still to be taken, in order, by sender and kind."""
        found = defaultdict(deque)
        for action in (action for item in self.schedule.lists[self.rank] for action in parts(item)):
            way = way_in(self.schedule, action)
            if way is not None and way[0] != self.rank:
                found[way[:2]].append(self._stream(action))
        return found

    def _take(self, action: Action) -> None:
        way = way_in(self.schedule, action)
        if way is None:
            return
        if way[0] == self.rank:
            del self.held["local", *way[1:], *action[2:]]
        else:
            self.coming[way[:2]].popleft()

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
            self.held["local", kind, s, *action[2:]] = self._stream(action)
            return
        self.under_way = [] if self.r.fused else [x for x in self.under_way if x[0] > now]
        self.under_way.append((self.wanted[kind, s, *action[2:]], self._stream(action)))

    # ---- what actions leave, and what they hold while they run

    def _forward(self, action: Action) -> int:
        s, spot = action.stage, action[1:]
        self.held.pop(("embedded", action.microbatch), None)
        said = saved.stage(self.of[action.slice], *self._ends(s), self.words)
        self.held["F", *spot] = sum(said.values())
        if self.lengths:
            self._keep_keys(action)
        return 0

    def _backward(self, action: Action) -> int:
        kind, s, spot = action.kind, action.stage, action[1:]
        del self.held["F", *spot]
        self.held.pop(("gradient", action.microbatch), None)
        if self.lengths:
            self._keep_gradients(action)
        if kind == "B":
            layers, first, last = self._ends(s)
            first, last = first and not self.words, last and not self.words
            self.held["B", *spot] = saved.waiting(self.of[action.slice], layers, first, last)
        model = self.r.model
        last_matmul = model.shared_experts > 0 or not model.experts  # takes what came as its dy
        same = kind == "B" and not self.r.cfg.dropout and last_matmul
        return 0 if same or (s == self.last and not self.words) else self._stream(action)

    def _weights(self, action: Action) -> int:
        del self.held["B", *action[1:]]
        return 0

    # ---- keys and values of sequences that are cut into slices

    def _keep_keys(self, action: Action) -> None:
        """Plain: of this slice. Fused: of all, from the first one on."""
        _, s, i, k = action
        tokens = sum(self.lengths) if self.r.fused else self.lengths[k]
        spot = (s, i) if self.r.fused else (s, i, k)
        self.held["keys", *spot] = self.counts[s] * saved.keys_and_values(self.r, tokens)

    def _keep_gradients(self, action: Action) -> None:
        """For the keys of all slices before; nobody sees this one's own again."""
        _, s, i, k = action
        tokens = self.firsts[len(self.lengths) - 1] if self.r.fused else self.firsts[k]
        if k == 0 or not self.r.fused:
            del self.held["keys", *((s, i) if self.r.fused else (s, i, k))]
        found = self.counts[s] * saved.gradients_of_keys(self.r, tokens)
        self.held["sums", s, i] = found if k > 0 else 0

    # ---- passes of a vocabulary that the pipeline's ranks share

    def _look_up(self, action: Action) -> int:
        i, first = action.microbatch, self.schedule.rank_of(0)
        self.held["IF", i] = saved.embedding(self.r, words=True)
        if self.rank == first:
            self.held["embedded", i] = self.r.stream
        elif self.schedule.vocabulary != INTERLACED:  # there all ranks come at once
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


def wanted(said: Timeline) -> dict[tuple[str, int, int, int], float]:
    """When the result of (kind, stage, micro-batch, slice) is taken by the stage that needs it."""
    found = {}
    for items, starts in zip(said.schedule.lists, said.starts, strict=True):
        timed = zip(items, starts, strict=True)
        for action, start in ((action, start) for item, start in timed for action in parts(item)):
            way = way_in(said.schedule, action)
            if way is not None:
                found[way[1], way[2], *action[2:]] = start
    return found
