"""What lesson 11 asks for. Programs come from the library's schedules; their tasks compute numbers,
and actors are ranks on which a send waits for its receive."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab.clock import Network
from picotron_lab.comm import Axis
from picotron_lab.ledger import CommError
from picotron_lab.schedules.actions import Action
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate

LESSON = Lesson(
    title="Programs and controllers",
    builds="a compiler from tasks to the instructions of every actor: transfers, frees, dispatches",
)
FINE, MS = "fine", 1e-3
NAMES = ("1f1b", "zb-h1", "interleaved", "zb-v", "v-half")
FIELDS = {"run": 2, "send": 3, "recv": 3, "free": 2}
Fields = tuple[str, int, float, tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Case:
    """A step as tasks: their fields, in the lists of actors; when each starts; numbers to compute.

    bias  of every value: it is tanh(sum of what its task reads, times 1, 2, .. / 3, + bias)
    """

    schedule: str
    lists: list[list[Fields]]
    starts: dict[str, float]
    span: float
    bias: dict[str, Tensor]

    @property
    def tasks(self) -> dict[str, Fields]:
        """By name."""
        return {fields[0]: fields for fields in sum(self.lists, [])}

    @property
    def order(self) -> list[tuple[float, Fields]]:
        """All tasks by start."""
        pairs = [(self.starts[name], fields) for name, fields in self.tasks.items()]
        return sorted(pairs, key=lambda pair: pair[0])

    @property
    def keep(self) -> set[str]:
        """Weight gradients."""
        return {value for value in self.bias if value.startswith("w")}


def values_of(action: Action, last: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(reads, makes). Of stage s and micro-batch i: hs.i output, as.i what backward needs, gs.i
    gradient of the input, ds.i what W needs, ws.i gradient of the weights. All read mask.i, which
    stage 0 makes; nobody reads seen.i."""
    kind, s, i, _ = action
    mask, before, after = f"mask.{i}", f"h{s - 1}.{i}", f"g{s + 1}.{i}"
    if kind == "F":
        made = (f"h{s}.{i}", f"a{s}.{i}") + ((mask, f"seen.{i}") if s == 0 else ())
        return (before, mask) if s else (), made
    if kind == "W":
        return (f"a{s}.{i}", f"d{s}.{i}"), (f"w{s}.{i}",)
    reads = (f"a{s}.{i}", after if s < last else f"h{s}.{i}", mask)
    makes = (f"g{s}.{i}",) if s else ()
    return reads, (*makes, f"d{s}.{i}" if kind == "B" else f"w{s}.{i}")


def make_case(attempt: Any) -> Case:
    """A schedule with tasks of 1 to 3 ms."""
    rng = attempt.rng
    p, name = rng.randint(3, 4), rng.choice(NAMES)
    schedule = build(name, p, p * rng.randint(1, 2))
    costs = Costs(F=rng.randint(1, 3), B=rng.randint(1, 3), W=rng.randint(1, 3))
    times, lists, starts, values = simulate(schedule, costs), [], {}, []
    for actor, items in enumerate(schedule.lists):
        lists.append([])
        for item, start in zip(items, times.starts[actor], strict=True):
            reads, makes = values_of(item, schedule.stages - 1)
            lists[actor].append((str(item), actor, costs.of(item), reads, makes))
            starts[str(item)] = start
            values += makes
    numbers = torch.randn(len(values), 3, generator=attempt.generator, dtype=torch.float64)
    bias = dict(zip(values, numbers, strict=True))
    return Case(f"{name}, {p} actors", lists, starts, times.makespan, bias)


def compute(fields: Fields, held: dict[str, Tensor], bias: dict[str, Tensor]) -> None:
    """Run a task on the values that an actor holds."""
    _, _, _, reads, makes = fields
    total = sum((k + 1) / 3 * held[value] for k, value in enumerate(reads))
    held.update({value: torch.tanh(total + bias[value]) for value in makes})


def tasks_of(student: ModuleType, case: Case) -> dict[str, Any]:
    """The student's Tasks, by name."""
    return {name: student.Task(*fields) for name, fields in case.tasks.items()}


def a_list(name: str, found: Any, of: str) -> list:
    """What `name` returned, if it is a list. Raises CommError: its sentence is all that is told."""
    if not isinstance(found, list | tuple):
        raise CommError(f"{name} returned {short(found)}, a list of {of} is wanted")
    return list(found)


def read_program(name: str, items: Any) -> list[tuple]:
    """Plain tuples. Raises CommError for what is no instruction."""
    for item in a_list(name, items, "instructions"):
        if not isinstance(item, tuple) or not item or FIELDS.get(item[0]) != len(item):
            raise CommError(f"{name} has the item {short(item)}: write it as exercise.py shows")
    return [*items]


def in_words(item: tuple) -> str:
    """send h0.3 to 2"""
    between = {"send": ["to"], "recv": ["from"]}.get(item[0], [])
    return " ".join(map(str, [*item[:2], *between, *item[2:]]))


def who_goes_on(heads: list[tuple], actor: int) -> list[int]:
    """This actor, with the receiver of what it sends; nobody, if it must wait or hears that way."""
    item = heads[actor]
    if item[:1] == ("send",):
        return [actor, item[2]] if ("recv", item[1], actor) in heads[item[2] : item[2] + 1] else []
    return [actor] if item[:1] in (("run",), ("free",)) else []


def check_rendezvous(programs: list[list[tuple]]) -> None:
    """Raises CommError that says where actors wait, if a send and its receive never meet."""
    at, moved = [0] * len(programs), True
    while moved:
        heads = [items[k] if k < len(items) else () for items, k in zip(programs, at, strict=True)]
        moved = [one for actor in range(len(at)) for one in who_goes_on(heads, actor)]
        for one in moved:
            at[one] += 1
    waits = [f"actor {a} waits at: {in_words(item)}" for a, item in enumerate(heads) if item]
    if waits:
        raise CommError("no actor can go on, no send has its receive:\n" + ";\n".join(waits))


def check_verdict(attempt: Any, what: str, verdict: str) -> None:
    """Its sentence is said once, as the cause."""
    attempt.same(what, FINE if verdict == FINE else "wrong", FINE, suspects={verdict: "wrong"})


# ---- 11.1


def ordered(axis: Axis, student: ModuleType, case: Case, circle: list) -> dict[str, Any]:
    """Starts in the student's order, and what is said about lists that wait in a circle."""
    tasks = tasks_of(student, case)
    lists = [[tasks[fields[0]] for fields in one] for one in case.lists]
    found = []
    for pair in a_list("one_order", student.one_order(lists), "(start, task)"):
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], student.Task):
            raise CommError(f"one_order returned {short(pair)} as an item: write (start, task)")
        found.append((pair[0], pair[1].name))
    try:
        student.one_order([[tasks[name] for name in one] for one in circle])
    except ValueError as error:
        return {"order": found, "said": str(error)}
    return {"order": found, "said": "no error"}


@task("11.1", points=4, minutes=25, core=True, compare="picotron_lab.mpmd_program:timed")
def test_order(attempt: Any) -> None:
    """One order of all tasks."""
    case = make_case(attempt)
    circle = [[fields[0] for fields in one] for one in case.lists]
    last = next(one for one in circle if "F0.0" not in one)
    back = next(name for name in last if name.startswith("B"))
    last.remove(back)
    last.insert(0, back)
    run = attempt.run(ordered, 1, case, circle)
    got, want = run.values[0]["order"], [(start, fields[0]) for start, fields in case.order]
    missing = sorted({*case.tasks} - {name for _, name in got})
    attempt.same("tasks that your order lacks", missing, [])
    attempt.same("tasks in your order", len(got), len(want))
    starts = {name: start for start, name in got}
    by_time = {name: start for start, name in want}
    eager = {"a task begins before what it reads has been made": without_waiting(case)}
    attempt.same(f"start of each task ({case.schedule})", starts, by_time, suspects=eager)
    mine = [start for start, _ in got]
    attempt.same(
        "starts in your order", mine, [*by_time.values()],
        suspects={"every start is right, so only the order is not: sort by them": mine},
    )  # fmt: skip
    said, after = run.values[0]["said"], back.replace("BW", "F").replace("B", "F")
    wanted = f"a ValueError that names {back}"
    heard = wanted if back in said else said
    attempt.same(f"said of a list with {back} before {after}", heard, wanted)


def without_waiting(case: Case) -> dict[str, float]:
    """Starts, if only the actor had to be free."""
    found = {}
    for one in case.lists:
        found |= {fields[0]: sum(f[2] for f in one[:at]) for at, fields in enumerate(one)}
    return {fields[0]: found[fields[0]] for _, fields in case.order}


# ---- 11.2


def executed(axis: Axis, student: ModuleType, case: Case) -> dict[str, Tensor]:
    """What an actor made, by its program."""
    tasks = tasks_of(student, case)
    order = [(start, tasks[fields[0]]) for start, fields in case.order]
    found = a_list("transfers", student.transfers(order, axis.size), "programs")
    programs = [read_program("transfers", items) for items in found]
    if len(programs) != axis.size:
        raise CommError(f"transfers returned {len(programs)} programs for {axis.size} actors")
    check_rendezvous(programs)
    held: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for item in programs[axis.rank]:
        do(axis, item, held, case)
        if item[0] == "run":
            made |= {value: held[value] for value in case.tasks[item[1]][4]}
    return made


def do(axis: Axis, item: tuple, held: dict[str, Tensor], case: Case) -> None:
    """One instruction. Raises CommError if a value is not there."""
    kind, name, *other = item
    missing = [value for value in uses(kind, name, case.tasks) if value not in held]
    if missing:
        words = f"{in_words(item)} on actor {axis.rank}, and {missing[0]} is not there"
        raise CommError(f"{words}: it must be made or received before")
    if kind == "run":
        compute(case.tasks[name], held, case.bias)
        axis.spend(case.tasks[name][2] * MS)
    elif kind == "send":
        axis.send(held[name], other[0])
    elif kind == "recv":
        held[name] = axis.recv(case.bias[name], other[0])


def uses(kind: str, name: str, tasks: dict[str, Fields]) -> tuple[str, ...]:
    """Values that must be there."""
    return tasks[name][3] if kind == "run" else () if kind == "recv" else (name,)


def on_one_device(case: Case) -> list[dict[str, Tensor]]:
    """What each actor makes."""
    held = {}
    for _, fields in case.order:
        compute(fields, held, case.bias)
    return [{value: held[value] for fields in one for value in fields[4]} for one in case.lists]


def messages(case: Case) -> list[int]:
    """By sender: pairs of a value and another actor that reads it."""
    programs = [program_of(case, actor) for actor in range(len(case.lists))]
    return [sum(item[0] == "send" for item in items) for items in programs]


@task("11.2", points=4, minutes=30, core=True, compare="picotron_lab.mpmd_program:Placing")
def test_transfers(attempt: Any) -> None:
    """Transfers are inferred."""
    case = make_case(attempt)
    actors = len(case.lists)
    run = attempt.run(executed, actors, case, network=Network())
    attempt.same(f"values made ({case.schedule})", run.values, on_one_device(case), ranks=actors)
    for actor, count in enumerate(messages(case)):
        attempt.equal(
            f"messages that actor {actor} sends", run.count("send", rank=actor), count,
            "one for each value and other actor that reads it",
            "what is there already need not come again, and nobody needs what it does not read",
        )  # fmt: skip
    attempt.at_most(
        "milliseconds of the step", round(max(run.times) / MS, 6), case.span, "the order's end",
        "an actor waits in a receive and could run a task meanwhile: a value is there at its "
        "task's end, not at its start",
    )  # fmt: skip


# ---- 11.3


def program_of(case: Case, actor: int) -> list[tuple]:
    """One actor's instructions, its receives right before their first use: fine for itself."""
    home = {value: fields[1] for fields in case.tasks.values() for value in fields[4]}
    readers = {value: set() for value in home}
    for _, reader, _, reads, _ in case.tasks.values():
        for value in reads:
            readers[value].add(reader)
    items, there = [], set()
    for name, _, _, reads, makes in case.lists[actor]:
        come = [value for value in reads if home[value] != actor and value not in there]
        there.update(come)
        items += [("recv", value, home[value]) for value in come] + [("run", name)]
        items += [("send", value, to) for value in makes for to in sorted(readers[value] - {actor})]
    return items


def freed(axis: Axis, student: ModuleType, case: Case, programs: list[list]) -> list[list[tuple]]:
    """Each actor's program with its frees."""
    tasks, keep = tasks_of(student, case), case.keep
    found = [student.lifetimes(list(one), tasks, set(keep)) for one in programs]
    return [read_program("lifetimes", items) for items in found]


def judge(items: list[tuple], case: Case) -> tuple[str, int]:
    """A verdict on the frees of a program, and the most values held at a time."""
    held, gone, most = set(), set(), 0
    for item in items:
        kind, name = item[:2]
        lost = [value for value in uses(kind, name, case.tasks) if value in gone]
        if lost:
            why = ": a value is in use while it is sent, too" if kind == "send" else ""
            return f"{item} needs {lost[0]}, which is freed before{why}", most
        if kind == "free":
            held.discard(name)
            gone.add(name)
            continue
        held |= {*case.tasks[name][4]} if kind == "run" else {name}
        most = max(most, len(held))
    kept, wrong = held - case.keep, gone & case.keep
    if wrong:
        return f"{min(wrong)} is freed, and it is among those to keep", most
    return f"{min(kept)} is never freed" if kept else FINE, most


def least(items: list[tuple], case: Case) -> int:
    """The most values between their first and their last use."""
    touched = [{*uses(*item[:2], case.tasks)} | ({*case.tasks[item[1]][4]} if item[0] == "run"
               else {item[1]}) for item in items]  # fmt: skip
    first, last = {}, {}
    for at, values in enumerate(touched):
        for value in values:
            first.setdefault(value, at)
            last[value] = len(items) if value in case.keep else at
    return max(sum(first[v] <= at <= last[v] for v in first) for at in range(len(items)))


@task("11.3", points=4, minutes=20, compare="picotron_lab.mpmd_program:freed")
def test_lifetimes(attempt: Any) -> None:
    """Values are freed after their last use."""
    case = make_case(attempt)
    programs = [program_of(case, actor) for actor in range(len(case.lists))]
    found = attempt.run(freed, 1, case, programs).values[0]
    for actor, items in enumerate(found):
        others = [item for item in items if item[0] != "free"]
        attempt.same(f"instructions of actor {actor} beside frees", others, programs[actor])
    judged = [judge(items, case) for items in found]
    for actor, (verdict, _) in enumerate(judged):
        check_verdict(attempt, f"verdict on the frees of actor {actor}", verdict)
    for actor, (_, most) in enumerate(judged):
        attempt.at_most(
            f"values that actor {actor} holds", most, least(programs[actor], case),
            "the most between first and last use", "a free stands later than right behind the last "
            "use of its value",
        )  # fmt: skip


# ---- 11.4


def cut(axis: Axis, student: ModuleType, programs: list[list[tuple]]) -> list[list[list[tuple]]]:
    """Each actor's blocks."""
    found = [a_list("blocks", student.blocks(list(one)), "blocks") for one in programs]
    return [[read_program("blocks", block) for block in blocks] for blocks in found]


def waits_inside(block: list[tuple]) -> str:
    """The first receive of a block that stands behind something else."""
    for before, item in zip(block, block[1:], strict=False):
        if item[0] == "recv" and before[0] != "recv":
            return f"{item} stands behind {before} in one block: the actor would wait there"
    return FINE


@task("11.4", points=3, minutes=15, compare="picotron_lab.mpmd_program:Program.blocks")
def test_blocks(attempt: Any) -> None:
    """Few dispatches."""
    case = make_case(attempt)
    programs = [program_of(case, actor) for actor in range(len(case.lists))]
    found = attempt.run(cut, 1, programs).values[0]
    for actor, pieces in enumerate(found):
        attempt.same(f"blocks of actor {actor}, joined", sum(pieces, []), programs[actor])
        verdict = next((w for w in map(waits_inside, pieces) if w != FINE), FINE)
        check_verdict(attempt, f"verdict on the blocks of actor {actor}", verdict)
    for actor, (pieces, items) in enumerate(zip(found, programs, strict=True)):
        kinds = [item[0] == "recv" for item in items]
        turns = sum(b and not a for a, b in zip(kinds, kinds[1:], strict=False))
        attempt.at_most(
            f"dispatches for {len(items)} instructions of actor {actor}", len(pieces), 1 + turns,
            "1 + receives that follow something else",
            "receives in a row are one wait, and what follows them needs no message of its own",
        )  # fmt: skip
