"""From tasks and a schedule to one list of instructions for every actor, with all transfers.

Paper   Xhebraj et al. 2024, "Scaling Deep Learning Training with MPMD Pipeline Parallelism"
        (JaxPP, 2412.14374), section 4: placing, inferred communication, buffer lifetimes
Idea    A schedule says which actor runs which task. A task's reads and makes then say what must
        travel. All tasks of a step are put in one order, that of a simulation; a transfer is put
        into it where its value has been made; each actor's list is what the order has for it.
Order   Two actors meet in their transfers in the same order, because both lists come from one. So
        nobody waits in a circle, even if every send waits for its receive: of all instructions
        that are not done, the first of the order can always be done
Steps   Feed take a leaf of the batch from the controller    Run a task    Send, Recv a value
        Add a value to a sum: a gradient, or the loss        Free values after their last use
Sums    A weight that several stages use has a home, the first actor that uses it. Its gradient adds
        up on each of these actors by itself, and is sent home once, after the last micro-batch
Read    Value, instructions -> timed -> Placing -> freed -> program -> Program
Tests   tests/test_mpmd_program.py, tests/test_mpmd.py
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from picotron_lab.mpmd_trace import Body
from picotron_lab.schedules.actions import Action, Schedule, parts
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import simulate

STEP = -1  # in the place of a micro-batch: a value of the whole step


class Value(NamedTuple):
    """A tensor: of one micro-batch, or of the step (a parameter, a sum)."""

    name: str
    microbatch: int = STEP

    def __str__(self) -> str:
        return self.name if self.microbatch == STEP else f"{self.name}.{self.microbatch}"


LOSS = Value("sum of losses")


@dataclass(frozen=True, slots=True)
class Feed:
    """Take this leaf of a batch from the controller."""

    value: Value


@dataclass(frozen=True, slots=True)
class Run:
    """Call a task of the body with these values, which makes those."""

    kind: str
    stage: int
    microbatch: int
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Send:
    """Send a value to that actor."""

    value: Value
    to: int


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive a value from that actor."""

    value: Value
    source: int


@dataclass(frozen=True, slots=True)
class Add:
    """total += value; the first time total = value."""

    total: Value
    value: Value
    first: bool


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody here needs these values any more."""

    values: tuple[Value, ...]


Instruction = Feed | Run | Send | Recv | Add | Free
Order = tuple[tuple[int, Instruction], ...]  # (actor, what it does), one after the other


class Peak(NamedTuple):
    """The most values of micro-batches that an actor holds at one time, and the most bytes."""

    values: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """One step of all actors.

    order    all instructions, in an order in which one worker could run them
    publish  after an update: sends each shared weight from its home to its other users
    holds    per actor the parameters that it needs
    homes    the one actor that has the loss, or a parameter's final gradient, and updates it
    peak     per actor, from its list: no run can hold more
    sizes    bytes of every value, by name
    """

    schedule: Schedule
    order: Order
    publish: Order
    holds: tuple[tuple[str, ...], ...]
    homes: dict[Value, int]
    peak: tuple[Peak, ...]
    sizes: dict[str, int]

    @cached_property
    def lists(self) -> tuple[tuple[Instruction, ...], ...]:
        """What each actor runs."""
        return project(self.order, self.schedule.ranks)

    @cached_property
    def blocks(self) -> tuple[tuple[tuple[Instruction, ...], ...], ...]:
        """Each actor's list in blocks. A block = Recvs, then work, up to the next Recv.

        It can be one dispatch: after its Recvs it waits for nobody. An actor has one block more
        than Recvs at most, so there are no more dispatches than actors + transfers.
        """
        return tuple(map(_cut, self.lists))

    @cached_property
    def block_order(self) -> tuple[tuple[int, int], ...]:
        """(actor, number of its block), by the first instruction of each."""
        begins, at = {}, [0] * self.schedule.ranks
        for actor, blocks in enumerate(self.blocks):
            for number, block in enumerate(blocks):
                begins[actor, at[actor]] = number
                at[actor] += len(block)
        met, found = [0] * self.schedule.ranks, []
        for actor, _ in self.order:
            if (actor, met[actor]) in begins:
                found.append((actor, begins[actor, met[actor]]))
            met[actor] += 1
        return tuple(found)

    @property
    def transfers(self) -> int:
        """Messages of one step."""
        return sum(isinstance(what, Send) for _, what in self.order)

    @property
    def transfer_bytes(self) -> int:
        """Their bytes."""
        sent = (what.value.name for _, what in self.order if isinstance(what, Send))
        return sum(self.sizes[name] for name in sent)


def project(order: Order, actors: int) -> tuple[tuple[Instruction, ...], ...]:
    """Of one order what each actor has to do."""
    lists: list[list[Instruction]] = [[] for _ in range(actors)]
    for actor, what in order:
        lists[actor].append(what)
    return tuple(map(tuple, lists))


def _cut(items: tuple[Instruction, ...]) -> tuple[tuple[Instruction, ...], ...]:
    receives = [isinstance(item, Recv) for item in items]
    cuts = [at for at in range(1, len(items)) if receives[at] and not receives[at - 1]]
    ends = [0, *cuts, len(items)]
    return tuple(items[a:b] for a, b in zip(ends, ends[1:], strict=False) if a < b)


# ---- one order of everything


def timed(schedule: Schedule, costs: Costs) -> list[tuple[float, float, int, Action]]:
    """(start, end, actor, action) of all actions of a simulated step, sorted by these."""
    times, found = simulate(schedule, costs), []
    for actor, items in enumerate(schedule.lists):
        for item, *when in zip(items, times.starts[actor], times.ends[actor], strict=True):
            found += [(*when, actor, action) for action in parts(item)]
    return sorted(found, key=lambda one: one[:3])  # stable: an actor's list keeps its order


class Placing:
    """Goes through the actions by time, and writes down what the actors do."""

    def __init__(self, body: Body, schedule: Schedule):
        self.body, self.schedule = body, schedule
        self.constants, self.leaves = {*body.parameters}, {*body.batch}
        self.homes = self._homes()
        self.sums: dict[str, list[str]] = defaultdict(list)  # value -> parameters it adds to
        for parameter, contributions in body.gradients.items():
            for _, name in contributions:
                self.sums[name].append(parameter)
        self.order: list[tuple[int, Instruction]] = []
        self.there: set[tuple[int, Value]] = set()  # (actor, value) that has come
        self.begun: set[Value] = set()  # sums that have a first value
        self.readers: dict[Value, list[int]] = {}

    def all_actions(self, actions: Sequence[tuple[float, float, int, Action]]) -> None:
        """Runs at their start; a transfer at the end of what makes its value, before the next
        start: there its receiver can have nothing better to do."""
        for _, _, actor, action in actions:
            for value in self._reads(action):
                self.readers.setdefault(value, []).append(actor)
        on_the_way: list[tuple[float, int, Value]] = []
        for start, end, actor, action in actions:
            ready = [one for one in on_the_way if one[0] <= start]
            on_the_way = [one for one in on_the_way if one[0] > start]
            self._transfer(ready)
            on_the_way += [(end, actor, value) for value in self._run(actor, action)]
            on_the_way.sort(key=lambda one: one[0])
        self._transfer(on_the_way)

    def _reads(self, action: Action) -> tuple[Value, ...]:
        reads = self.body.tasks[action.kind, action.stage].reads
        return tuple(self._value(name, action.microbatch) for name in reads)

    def _value(self, name: str, microbatch: int) -> Value:
        return Value(name, STEP if name in self.constants else microbatch)

    def _homes(self) -> dict[str, int]:
        """Of each parameter the actor of the first stage that uses it; actor 0 if none does."""
        homes: dict[str, int] = {}
        for (_, stage), task in sorted(self.body.tasks.items(), key=lambda one: one[0][1]):
            for name in self.constants.intersection(task.reads):
                homes.setdefault(name, self.schedule.rank_of(stage))
        return {name: homes.get(name, 0) for name in self.body.parameters}

    def _run(self, actor: int, action: Action) -> list[Value]:
        """Instructions of one action; gives the values that it makes."""
        task, reads = self.body.tasks[action.kind, action.stage], self._reads(action)
        for value in reads:
            if value.name in self.leaves and (actor, value) not in self.there:
                self._do(actor, Feed(value), value)
            assert value.name in self.constants or (actor, value) in self.there, (
                f"{action} on actor {actor} reads {value}, which has not been made or has not come "
                "by then: a task may read only what tasks make that the schedule runs before it."
            )
        makes = tuple(Value(name, action.microbatch) for name in task.makes)
        run = Run(action.kind, action.stage, action.microbatch, reads, makes)
        self._do(actor, run, *makes)
        for value in makes:
            if value.name == self.body.loss:
                self._add(actor, LOSS, value)
            for parameter in self.sums.get(value.name, ()):
                self._add(actor, self.total(parameter, actor), value)
        return list(makes)

    def _do(self, actor: int, what: Instruction, *makes: Value) -> None:
        self.order.append((actor, what))
        self.there.update((actor, value) for value in makes)

    def _add(self, actor: int, total: Value, value: Value) -> None:
        self.order.append((actor, Add(total, value, total not in self.begun)))
        self.begun.add(total)

    def total(self, parameter: str, actor: int) -> Value:
        """Where this actor adds up a gradient: at home the gradient itself, elsewhere a part."""
        at_home = actor == self.homes[parameter]
        return gradient(parameter) if at_home else _part(parameter, actor)

    def _transfer(self, ready: Iterable[tuple[float, int, Value]]) -> None:
        """One message to each other actor that reads the value."""
        for _, actor, value in ready:
            for reader in sorted({*self.readers.get(value, ())} - {actor}):
                self.move(value, actor, reader)

    def move(self, value: Value, source: int, to: int) -> None:
        """Send and Recv, one after the other."""
        self._do(source, Send(value, to))
        self._do(to, Recv(value, source), value)

    def bring_home(self) -> None:
        """After the last micro-batch: parts of gradients to the homes of their parameters."""
        for parameter, home in self.homes.items():
            for actor in range(self.schedule.ranks):
                part = _part(parameter, actor)
                if part in self.begun:
                    self.move(part, actor, home)
                    self._add(home, gradient(parameter), part)


def gradient(parameter: str) -> Value:
    """The sum of a parameter's gradients over all micro-batches and stages, at its home."""
    return Value(f"gradient of {parameter}")


def _part(parameter: str, actor: int) -> Value:
    return Value(f"gradient of {parameter} on actor {actor}")


def _touched(what: Instruction) -> tuple[Value, ...]:
    """Values that an instruction uses or makes."""
    if isinstance(what, Run):
        return (*what.reads, *what.makes)
    if isinstance(what, Free):
        return what.values
    return (what.total, what.value) if isinstance(what, Add) else (what.value,)


# ---- lifetimes


def freed(order: Order, kept: set[Value]) -> Order:
    """The order with a Free behind the last use of every value on every actor, but for `kept`."""
    ended: set[tuple[int, Value]] = set()
    found: list[tuple[int, Instruction]] = []
    for actor, what in reversed(order):
        values = [value for value in dict.fromkeys(_touched(what)) if value not in kept]
        last = [value for value in values if (actor, value) not in ended]
        ended.update((actor, value) for value in last)
        found += [(actor, Free(tuple(last)))] if last else []
        found.append((actor, what))
    return tuple(reversed(found))


def peak(items: Iterable[Instruction], sizes: dict[str, int]) -> Peak:
    """The most that an actor holds of micro-batches while it runs its list."""
    live: set[Value] = set()
    most = Peak(0, 0)
    for what in items:
        if isinstance(what, Free):
            live -= {*what.values}
            continue
        live |= {value for value in _touched(what) if value.microbatch != STEP}
        held = sum(sizes[value.name] for value in live)
        most = Peak(max(most.values, len(live)), max(most.bytes, held))
    return most


def program(body: Body, schedule: Schedule, costs: Costs = Costs()) -> Program:  # noqa: B008
    """All instructions of one step.

    schedule  checked, with as many stages as the body
    costs     times by which tasks of different actors are put in one order; the result is the same
              for all, but an actor waits less if they are true
    """
    placing = Placing(body, schedule)
    placing.all_actions(timed(schedule, costs))
    placing.bring_home()
    homes = {LOSS: schedule.rank_of(schedule.stages - 1)}
    homes |= {of(name): home for name, home in placing.homes.items() for of in (Value, gradient)}
    order, actors = freed(tuple(placing.order), {*homes}), range(schedule.ranks)
    holds = [{name for name, home in placing.homes.items() if home == actor} for actor in actors]
    for value, readers in placing.readers.items():
        for actor in readers if value.microbatch == STEP else ():
            holds[actor].add(value.name)
    sizes = _sizes(body, schedule.ranks)
    return Program(
        schedule, order, publish(placing.homes, holds),
        tuple(tuple(sorted(names)) for names in holds), homes,
        tuple(peak(items, sizes) for items in project(order, schedule.ranks)), sizes,
    )  # fmt: skip


def publish(homes: dict[str, int], holds: list[set[str]]) -> Order:
    """Sends each parameter from its home to all others who hold it."""
    found: list[tuple[int, Instruction]] = []
    for name, home in homes.items():
        for actor, names in enumerate(holds):
            if name in names and actor != home:
                found += [(home, Send(Value(name), actor)), (actor, Recv(Value(name), home))]
    return tuple(found)


def _sizes(body: Body, actors: int) -> dict[str, int]:
    """Bytes of all values by name; what adds up to a gradient is as large as its parameter."""
    sizes = dict(body.bytes)
    for parameter, contributions in body.gradients.items():
        totals = [gradient(parameter), *(_part(parameter, actor) for actor in range(actors))]
        for name in (*(name for _, name in contributions), *(total.name for total in totals)):
            sizes[name] = body.bytes[parameter]
    return sizes
