"""zb-auto: the order of F, B and W that Zero Bubble's heuristic finds for given times and memory.

Idea    a W can run at any time after its B, so W's are put where a rank would have to wait; the
        forwards that memory has room for come early, so that there is less to wait for
Rule    1. each stage: as many forwards before its first B as memory holds and time allows
        2. then in rounds: a forward on every stage that wants one, then a B on every stage;
           before either, W's into the gap until its input arrives, or until memory has room
        3. the remaining W's
        At three points either choice may be better (Choice below): all eight ways are tried
Source  Zero Bubble, arXiv 2401.10241, section 3.1
"""

from dataclasses import dataclass, field
from itertools import product

from picotron_lab.schedules.actions import Action, Schedule, ScheduleError
from picotron_lab.schedules.basic import straight
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import check_factors

TRIAL = 4  # micro-batches per rank that show which way is best
CLOSE = 1e-9  # sums of times and of shares of memory are rounded


@dataclass(frozen=True)
class Choice:
    """Where the heuristic may go either way."""

    delay: bool  # a forward that starts before the first B can may make it wait
    hold: bool  # a forward that the next stage has no use for yet may be put off
    close: bool  # a W that is longer than the gap is run there too, whatever the other ranks idle


@dataclass
class Stage:
    """What one stage has run so far; times has its F, B and W."""

    times: dict[str, float]
    free: float = 0.0  # from then on
    idle: float = 0.0  # since its first forward
    held: float = 0.0  # activations, as a share of the limit
    actions: list[tuple[str, int]] = field(default_factory=list)
    ends: dict[str, list[float]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})

    def count(self, kind: str) -> int:
        """How many of these have run: the number of the next micro-batch."""
        return len(self.ends[kind])

    @property
    def owed(self) -> int:
        """W's that could run."""
        return len(self.ends["B"]) - len(self.ends["W"])

    @property
    def span(self) -> float:
        """From its first start to its last end."""
        return self.free - (self.ends["F"][0] - self.times["F"])


class Pipe:
    """All stages, while their lists are being made."""

    def __init__(self, stages: list[Stage], transfer: float, change: dict[str, float]) -> None:
        self.stages, self.transfer = stages, transfer
        self.change = change  # of what a stage holds, by F, B and W, as a share of the limit
        self.waits = 0.0  # of the stage that waits most

    def arrival(self, s: int, kind: str) -> float:
        """When the input of a stage's next F or B is there."""
        source = s - 1 if kind == "F" else s + 1
        if not 0 <= source < len(self.stages):
            return 0.0
        return self.stages[source].ends[kind][self.stages[s].count(kind)] + self.transfer

    def run(self, s: int, kind: str) -> None:
        """Let a stage do its next F, B or W."""
        stage = self.stages[s]
        start = max(stage.free, self.arrival(s, kind)) if kind != "W" else stage.free
        if stage.ends["F"]:
            stage.idle += start - stage.free
            self.waits = max(self.waits, stage.idle)
        stage.free = start + stage.times[kind]
        stage.held += self.change[kind]
        stage.actions.append((kind, stage.count(kind)))
        stage.ends[kind].append(stage.free)

    def full(self, s: int, kind: str, freed: float = 0.0) -> bool:
        """Whether memory has no room for a stage's next action."""
        return self.stages[s].held + self.change[kind] - freed > 1 + CLOSE

    def make_room(self, s: int) -> bool:
        """W's until a forward fits; whether it does."""
        while self.full(s, "F") and self.stages[s].owed:
            self.run(s, "W")
        return not self.full(s, "F")

    def fill(self, s: int, until: float, close: bool) -> None:
        """W's into the time that a stage would wait."""
        stage, time = self.stages[s], self.stages[s].times["W"]
        while stage.owed and stage.free + time <= until:
            self.run(s, "W")
        gap = until - stage.free
        if stage.owed and gap > 0 and (close or gap > self.waits - stage.idle):
            self.run(s, "W")


def warm_up(pipe: Pipe, m: int, choice: Choice) -> bool:
    """Forwards before each stage's first B, and that B; False if memory cannot hold even that."""
    stages = pipe.stages
    for s in range(len(stages)):
        if pipe.full(s, "F"):
            return False
        pipe.run(s, "F")
    more = [0] * len(stages)
    back = stages[-1].free + stages[-1].times["B"]
    for s in range(len(stages) - 2, -1, -1):
        arrival, clock, time = back + pipe.transfer, stages[s].free, stages[s].times["F"]
        while 1 + more[s] < m and not pipe.full(s, "F", -more[s] * pipe.change["F"]):
            if clock >= arrival or (clock + time > arrival and not choice.delay):
                break
            clock += time
            more[s] += 1
        back = max(clock, arrival) + stages[s].times["B"]
    for s in range(len(stages)):
        # a stage must be ahead of the next one by at least one forward, else it gains nothing
        more[s] = max(0, min(more[s], more[s - 1] - 1)) if s else more[s]
        for _ in range(more[s]):
            pipe.run(s, "F")
    for s in reversed(range(len(stages))):
        pipe.run(s, "B")
    return True


def wants_forward(pipe: Pipe, s: int, m: int, choice: Choice) -> bool:
    """Whether a stage should do a forward in this round."""
    stage = pipe.stages[s]
    if stage.count("F") >= m:
        return False
    after = pipe.stages[s + 1] if s + 1 < len(pipe.stages) else None
    if not choice.hold or after is None or stage.count("F") < after.count("F") + 2:
        return True
    needed = after.free + after.times["F"] + after.times["B"] + pipe.transfer
    if stage.free >= needed:
        return False
    first = 0  # W's that must make room
    while first < stage.owed and pipe.full(s, "F", -first * pipe.change["W"]):
        first += 1
    if stage.free + stage.times["F"] + first * stage.times["W"] <= needed:
        return True
    return needed - stage.free > pipe.waits - stage.idle


def one_round(pipe: Pipe, m: int, choice: Choice) -> bool:
    """A forward on the stages that want one, a B on all; False if memory cannot hold that."""
    stages = pipe.stages
    wanted = [wants_forward(pipe, s, m, choice) for s in range(len(stages))]
    for s in range(len(stages)):
        if wanted[s]:
            if not pipe.make_room(s):
                return False
            if s:
                pipe.fill(s, pipe.arrival(s, "F"), choice.close)
            pipe.run(s, "F")
    for s in reversed(range(len(stages))):
        if s + 1 < len(stages):
            pipe.fill(s, pipe.arrival(s, "B"), choice.close)
        if s == 0 and stages[0].count("F") == m:
            while stages[0].owed:
                pipe.run(0, "W")
        pipe.run(s, "B")
    return True


@dataclass(frozen=True)
class Memory:
    """How many activations a rank may hold, and the share of one that stays from B until W."""

    limit: float
    kept: float = 1.0

    @property
    def change(self) -> dict[str, float]:
        """What an action adds, as a share of the limit."""
        unit = 1 / self.limit
        return {"F": unit, "B": (self.kept - 1) * unit, "W": -self.kept * unit}


def attempt(p: int, m: int, costs: Costs, memory: Memory, choice: Choice) -> Pipe | None:
    """One of the eight ways; None if memory has no room for it."""
    times = [{kind: costs.of(Action(kind, s)) for kind in "FBW"} for s in range(p)]
    pipe = Pipe([Stage(of) for of in times], costs.transfer, memory.change)
    if not warm_up(pipe, m, choice):
        return None
    for _ in range(m - 1):
        if not one_round(pipe, m, choice):
            return None
    for s, stage in enumerate(pipe.stages):
        while stage.owed:
            pipe.run(s, "W")
    return pipe


def zb_auto(p: int, m: int, costs: Costs, limit: float = 0.0, kept: float = 1.0) -> Schedule:
    """The best of the heuristic's eight lists: the one whose longest stage is shortest.

    Rank r  stage r
    Bubble  searched; with a limit of p that of zb-h1 or less, and with 2p about none if
            m > 4p: see the table in the tests
    Peak    limit; 0: no limit, m M
    Needs   limit >= 1, in activations of one stage and micro-batch
    Source  Zero Bubble, arXiv 2401.10241, section 3.1 and table 5 (there kept is 32h / (34h + 5as))
    """
    check_factors(costs, p)
    memory = Memory(limit or float(m), kept)
    choices = [Choice(*ways) for ways in product((False, True), repeat=3)]
    if m > TRIAL * p:
        choices = [min(choices, key=lambda way: _span(attempt(p, TRIAL * p, costs, memory, way)))]
    pipe = min((attempt(p, m, costs, memory, choice) for choice in choices), key=_span)
    if pipe is None:
        raise ScheduleError(
            f"memory_limit {limit} is too small for zb-auto: give at least 1, the activations of "
            "one stage and micro-batch."
        )
    lists = (
        tuple(Action(kind, s, i) for kind, i in stage.actions)
        for s, stage in enumerate(pipe.stages)
    )
    return Schedule("zb-auto", tuple(lists), straight(p), m)


def _span(pipe: Pipe | None) -> float:
    return max(stage.span for stage in pipe.stages) if pipe else float("inf")
