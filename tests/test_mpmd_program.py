"""Programs: every actor's list, from one order; checked by hand and by walking through all lists.

Bodies are made here, not traced: what a program does with names needs no tensors.
"""

import itertools
from dataclasses import replace

import pytest

from picotron_lab.config import ConfigError
from picotron_lab.mpmd_program import (
    STEP,
    Add,
    Feed,
    Free,
    Program,
    Recv,
    Run,
    Send,
    Value,
    gradient,
    program,
)
from picotron_lab.mpmd_schedule import balanced, choose, costs_of, resolve
from picotron_lab.mpmd_trace import Body, Task
from picotron_lab.schedules.costs import Options
from picotron_lab.schedules.registry import ENTRIES, NAMES, build

UNFIT = ("dualpipe", "seq1f1b")  # two copies of a stage, cut sequences; and split vocabularies
FIT = [name for name in NAMES if name not in UNFIT and "vocab" not in name and "lace" not in name]


# ---- a program by hand


def by_hand():
    """Loss x a b in two stages, for which no tracing is needed."""
    tasks = [
        Task("F", 0, lambda a, x: (a * x,), ("a", "x"), ("h",), 1.0),
        Task("F", 1, lambda b, h: (b * h,), ("b", "h"), ("loss",), 1.0),
        Task("BW", 1, lambda b, h: (b, h), ("b", "h"), ("dh", "db"), 2.0),
        Task("BW", 0, lambda x, dh: (x * dh,), ("x", "dh"), ("da",), 2.0),
    ]
    grads = {"a": ((0, "da"),), "b": ((1, "db"),)}
    sizes = dict(a=8, b=8, x=8, h=8, loss=8, dh=8, db=8, da=8)
    tasks = {(task.kind, task.stage): task for task in tasks}
    return Body(2, tasks, ("a", "b"), ("x",), "loss", grads, sizes, {}, None, None, None)


def told(item):
    """An instruction in short."""
    if isinstance(item, Free):
        return "free " + " ".join(map(str, item.values))
    if isinstance(item, Run):
        return str(item)
    if isinstance(item, Send | Recv):
        return f"{type(item).__name__.lower()} {item.value}"
    return f"feed {item.value}" if isinstance(item, Feed) else f"add {item.value}"


def test_the_instructions_of_two_stages():
    """1F1B, two micro-batches. With F = 1, BW = 2: F0.1 and F1.0 run from 1 to 2, BW1.0 to 4. So
    h.1 is there at 2, when actor 1 begins BW1.0; dh.0 at 4 and dh.1 at 7."""
    made = program(by_hand(), resolve("1f1b", 2, 2, 2))
    first, second = ([told(item) for item in items] for items in made.lists)
    assert first == [
        "feed x.0", "F0.0", "send h.0", "free h.0", "feed x.1", "F0.1", "send h.1", "free h.1",
        "recv dh.0", "BW0.0", "free x.0 dh.0", "add da.0", "free da.0",
        "recv dh.1", "BW0.1", "free x.1 dh.1", "add da.1", "free da.1",
    ]  # fmt: skip
    assert second == [
        "recv h.0", "F1.0", "add loss.0", "free loss.0",
        "recv h.1", "BW1.0", "free h.0", "add db.0", "free db.0", "send dh.0", "free dh.0",
        "F1.1", "add loss.1", "free loss.1",
        "BW1.1", "free h.1", "add db.1", "free db.1", "send dh.1", "free dh.1",
    ]  # fmt: skip
    assert [len(blocks) for blocks in made.blocks] == [3, 2]
    assert (made.transfers, made.transfer_bytes) == (4, 32)
    assert made.peak == ((4, 32), (4, 32))  # x.0 x.1 dh.0 da.0;  h.0 h.1 dh.0 db.0


# ---- every program


def programs():
    """Programs of all schedules that fit, of a body whose stages know each other all."""
    for name, p, each in itertools.product(FIT, (1, 2, 3, 4), (2, 3)):
        v = 2 if "virtual_stages" in ENTRIES[name].takes else ENTRIES[name].stages
        yield program(dense(p * v), resolve(name, p, p * v, p * each))


def dense(stages):
    """A body in which each stage reads what all before it make, one weight too, and backward."""
    tasks, before = {}, tuple(f"h{s}" for s in range(stages))
    for s in range(stages):
        reads = ("w", "x", *before[:s])
        made = "loss" if s == stages - 1 else f"h{s}"
        later = tuple(f"d{t}" for t in range(s + 1, stages))
        back = {"B": (reads + later, (f"d{s}", f"k{s}")), "W": ((f"k{s}", f"d{s}"), (f"g{s}",))}
        back["BW"] = (reads + later, (f"d{s}", f"g{s}"))
        for kind, (takes, makes) in {"F": (reads, (made,)), **back}.items():
            tasks[kind, s] = Task(kind, s, None, takes, makes, 1.0)
    names = ["w", "x", "loss", *(f"{letter}{s}" for letter in "hdkg" for s in range(stages))]
    grads = {"w": tuple((s, f"g{s}") for s in range(stages))}
    sizes = dict.fromkeys(names, 1)
    return Body(stages, tasks, ("w",), ("x",), "loss", grads, sizes, {}, None, None, None)


@pytest.fixture(scope="module")
def every_program() -> list[Program]:
    return [*programs()]


def test_a_send_and_its_receive_have_the_same_place(every_program):
    for made in every_program:
        for a, b in itertools.permutations(range(made.schedule.ranks), 2):
            sent = [i.value for i in made.lists[a] if isinstance(i, Send) and i.to == b]
            taken = [i.value for i in made.lists[b] if isinstance(i, Recv) and i.source == a]
            assert sent == taken
            assert len({*sent}) == len(sent), "a value travels twice between two actors"


def test_sends_that_wait_for_their_receive_never_wait_in_a_circle(every_program):
    """Channels without room: a Send is done together with its Recv, or not at all."""
    for made in every_program:
        left = [[i for i in items if isinstance(i, Send | Recv)] for items in made.lists]
        while any(left):
            heads = {a: items[0] for a, items in enumerate(left) if items}
            pairs = [
                (a, i.to) for a, i in heads.items()
                if isinstance(i, Send) and heads.get(i.to) == Recv(i.value, a)
            ]  # fmt: skip
            assert pairs, f"{made.schedule.name}: nobody can go on at {heads}"
            for one in pairs[0]:
                left[one].pop(0)


def walk(items, held):
    """What an actor holds at the end of its list, if all is there when it is used."""
    for item in items:
        if isinstance(item, Run):
            assert {*item.reads} <= held
            held = held | {*item.makes}
        elif isinstance(item, Free):
            assert {*item.values} <= held
            held = held - {*item.values}
        elif isinstance(item, Add):
            assert item.value in held and item.first == (item.total not in held)
            held = held | {item.total}
        else:
            assert (item.value in held) == isinstance(item, Send)
            held = held | {item.value}
    return held


def test_values_are_there_when_used_and_gone_at_the_end(every_program):
    for made in every_program:
        for actor, items in enumerate(made.lists):
            weights = {(name, STEP) for name in made.holds[actor]}
            home = {value for value, where in made.homes.items() if where == actor}
            assert walk(items, weights) == home | weights


def test_dispatches_are_at_most_actors_and_transfers(every_program):
    for made in every_program:
        assert len(made.block_order) <= made.schedule.ranks + made.transfers
        for items, blocks in zip(made.lists, made.blocks, strict=True):
            assert tuple(itertools.chain(*blocks)) == items
            for block in blocks:
                receives = [isinstance(item, Recv) for item in block]
                assert receives == sorted(receives, reverse=True), "a block waits in the middle"
                assert not receives[-1], "a block ends while it could go on"


def test_a_shared_weight_is_at_home_where_it_is_used_first(every_program):
    for made in every_program:
        home = made.schedule.rank_of(0)
        assert {made.homes[Value("w")], made.homes[gradient("w")]} == {home}


# ---- which schedule


def test_lists_of_a_user():
    """Stages live where the lists use them; items may be strings or actions."""
    lists = [["F0.0", "F2.0", "BW2.0", "BW0.0"], ["F1.0", "B1.0", "W1.0"]]
    made = resolve(lists, 2, 3, 1)
    assert made.placement == ((0, 2), (1,))
    assert [[str(item) for item in items] for items in made.lists] == lists
    assert resolve(made.lists, 2, 3, 1) == made == resolve(made, 2, 3, 1)


@pytest.mark.parametrize(
    "wanted, actors, stages, m, sentence",
    [
        ("2f2b", 2, 2, 2, "schedule '2f2b' is unknown: choose one of afab, "),
        ("1f1b", 3, 2, 2, "has 3 stages, and the loss function 1 yields, so 2: call pipeline_yield"
         " 2 times"),
        ("1f1b", 2, 3, 2, "1f1b runs stage 2 on no actor, and the loss function has 2 yields, so "
         "stages 0 to 2: give every stage to an actor, or take out yields until 2"),
        ("v-half", 2, 4, 0, "microbatches 0 is too small for v-half"),
        ("dualpipe", 2, 4, 4, "schedule dualpipe keeps two copies of stages"),
        (build("seq1f1b", 2, 4, Options(slices=2)), 2, 2, 4,
         "two copies of stages, splits the vocabulary or cuts sequences"),
        ("1f1b-vocab1", 2, 2, 4, "choose one that runs F, BW, B and W of every stage on one actor"),
        ([["F0.0", "BW0.0"]], 2, 1, 1, "has lists for 1 actors, and there are 2: start Controller"),
        ([["F0.0", "BW0.0"], ["F2.0", "BW2.0"]], 2, 3, 1, "runs stage 1 on no actor"),
        ([["F0.0", "BW0.0"]], 1, 1, 2, "has 1 micro-batches, and 2 were given: give 1"),
        ([["F0.0", "BW1.0"], ["F1.0", "BW0.0"]], 2, 2, 1, "every stage from 0 needs exactly one"),
        ([["F0.0", "B0.0"]], 1, 1, 1, "W0.0 is missing"),
        ([["BW0.0", "F0.0"]], 1, 1, 1, "BW0.0 comes before its own F"),
        ([["F0.0", "F1.0", "BW0.0", "BW1.0"]], 1, 2, 1, "comes to a deadlock"),
        ([["forward 0"]], 1, 1, 1, "'forward 0' is no action: write it like F2.3"),
        (["F0.0", "BW0.0"], 1, 1, 1, "'F0.0' stands where an actor's list must be: give a"),
        (None, 1, 1, 1, "None is no name, no Schedule and no list: give a name such as '1f1b'"),
        (3, 1, 1, 1, "3 is no name, no Schedule and no list"),
        ([[("F", 0)]], 1, 1, 1, "[('F', 0)] holds no task: write it like 'F0.0'"),
        ([[0]], 1, 1, 1, "[0] holds no task: write it like 'F0.0'"),
        ([["F0.99999999"]], 1, 1, 2, "is of micro-batch 99999999, and no task is of 0: number"),
        ([["F0.0", "F0.2"]], 1, 1, 2, "F0.2 is of micro-batch 2, and no task is of 1: number"),
        ([[], []], 2, 1, 1, "the lists are empty: give one list of tasks for each actor"),
    ],
)  # fmt: skip
def test_schedules_that_do_not_fit(wanted, actors, stages, m, sentence):
    with pytest.raises(ConfigError, match="schedule") as error:
        resolve(wanted, actors, stages, m)
    assert sentence in str(error.value)
    assert "schedule: schedule" not in str(error.value)
    assert "schedule your schedule" not in str(error.value)


def test_auto_needs_as_many_stages_as_actors():
    with pytest.raises(ConfigError, match="auto needs a stage for each of 3 actors, .* 1 yields"):
        choose("auto", dense(2), 3, 4)


def test_work_is_balanced():
    """The busiest part against all ways to cut; 5 1 1 1 in two parts: 5 and 3."""
    assert balanced([5, 1, 1, 1], 2) == [1, 3]
    for work in ([3, 1, 4, 1, 5, 9, 2, 6], [1] * 8, [0, 7, 0, 0, 7, 1, 1, 0]):
        for count in (1, 2, 3, 5, 8):
            cuts = itertools.combinations(range(1, 8), count - 1)
            ends = ([0, *cut, 8] for cut in cuts)
            best = min(max(sum(work[a:b]) for a, b in itertools.pairwise(e)) for e in ends)
            counts = balanced(work, count)
            ends = [0, *itertools.accumulate(counts)]
            assert len(counts) == count and ends[-1] == 8 and min(counts) > 0
            assert max(sum(work[a:b]) for a, b in itertools.pairwise(ends)) == best


def test_costs_are_operations_of_the_mean_forward():
    """Forwards of 1 and 3 operations: the mean is 2."""
    body = dense(2)
    tasks = {key: replace(task, flops=1.0 + 2 * key[1]) for key, task in body.tasks.items()}
    assert costs_of(replace(body, tasks=tasks)).factors == ((0.5,) * 3, (1.5,) * 3)
