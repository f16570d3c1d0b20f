"""Lists that are no training step are refused, with the first wrong action and the rule."""

from dataclasses import replace

import pytest

from picotron_lab.schedules.actions import Pair, Schedule, ScheduleError, parse
from picotron_lab.schedules.costs import Options
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.validator import validate

LISTS = {  # correct steps of two ranks; every case below spoils one of them
    "whole": ["F0.0 F0.1 BW0.0 BW0.1", "F1.0 BW1.0 F1.1 BW1.1"],
    "split": ["F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 B1.0 F1.1 B1.1 W1.0 W1.1"],
    "sliced": ["F0.0 F0.0/1 BW0.0/1 BW0.0", "F1.0 F1.0/1 BW1.0/1 BW1.0"],
    "looped": ["F0.0 F2.0 BW2.0 BW0.0", "F1.0 F3.0 BW3.0 BW1.0"],
    "vocabulary": [
        "IF.0 IF.1 F0.0 F0.1 S.0 S.1 T.0 T.1 BW0.0 BW0.1 IB.0 IB.1",
        "IF.0 IF.1 F1.0 S.0 F1.1 S.1 BW1.0 T.0 BW1.1 T.1 IB.0 IB.1",
    ],
}
PLACES = {"looped": ((0, 2), (1, 3))}


def schedule(kind: str, lists: list[str]) -> Schedule:
    items = tuple(tuple(map(parse, text.split())) for text in lists)
    one = kind in ("sliced", "looped")
    return Schedule(
        kind, items, PLACES.get(kind, ((0,), (1,))), 1 if one else 2,
        slices=2 if kind == "sliced" else 1, vocabulary=2 if kind == "vocabulary" else 0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_correct_lists_pass(kind):
    validate(schedule(kind, LISTS[kind]))


@pytest.mark.parametrize(
    ("kind", "rank", "right", "wrong", "sentence"),
    [
        # missing
        ("split", 1, "B1.1 W1.0", "B1.1", "rank 1: W1.0 is missing: every stage needs F, then BW"),
        ("split", 0, "B0.0 W0.0 ", "", "rank 0: B0.0 is missing"),
        ("whole", 0, "F0.0 F0.1 BW0.0 BW0.1", "F0.0 BW0.0", "rank 0: F0.1 is missing"),
        ("sliced", 1, "BW1.0/1 BW1.0", "BW1.0/1", "B1.0 is missing"),
        # twice
        ("whole", 0, "F0.1", "F0.1 F0.1", "rank 0: F0.1 is one too many"),
        ("whole", 1, "BW1.1", "BW1.1 BW1.1", "rank 1: BW1.1 is one too many"),
        ("split", 0, "W0.0", "W0.0 W0.0", "rank 0: W0.0 is one too many"),
        # both BW and B, W
        ("split", 0, "B0.0 W0.0", "B0.0 BW0.0 W0.0", "BW0.0 does again what B0.0 has done"),
        ("split", 0, "B0.0 W0.0", "BW0.0 W0.0", "W0.0 is one too many"),
        ("split", 0, "B0.0 W0.0", "BW0.0 B0.0", "B0.0 is one too many"),
        # order within a stage
        ("split", 1, "F1.0 B1.0", "B1.0 F1.0", "B1.0 comes before its own F, which it needs"),
        ("whole", 1, "F1.0 BW1.0", "BW1.0 F1.0", "BW1.0 comes before its own F"),
        ("split", 1, "B1.1 W1.0 W1.1", "W1.1 B1.1 W1.0", "W1.1 comes before its own B"),
        # places and ranges
        ("whole", 1, "F1.0", "F0.0", "rank 1: F0.0 is on the wrong rank: stage 0 .* to rank 0"),
        ("whole", 0, "F0.1", "F0.2", "F0.2 is out of range: micro-batch 2 of 2, counted from 0"),
        ("whole", 0, "F0.1", "F2.1", "F2.1 is out of range: stage 2 of 2, counted from 0"),
        ("whole", 0, "F0.1", "F0.1/1", "F0.1/1 is out of range: slice 1 of 1, counted from 0"),
        # slices
        ("sliced", 0, "F0.0 F0.0/1", "F0.0/1 F0.0", "F0.0/1 needs F0.0 first: forwards go from"),
        ("sliced", 1, "BW1.0/1 BW1.0", "BW1.0 BW1.0/1", "BW1.0 needs BW1.0/1 first: backwards go"),
        # micro-batches that cross
        (
            "whole", 1, "F1.0 BW1.0 F1.1 BW1.1", "F1.1 BW1.1 F1.0 BW1.0",
            "rank 1: F1.1 needs F0.1, but rank 0 sends F0.0 .*: move F1.0 before F1.1, or F0.1",
        ),
        (
            "split", 0, "B0.0 W0.0 B0.1 W0.1", "B0.1 B0.0 W0.1 W0.0",
            "rank 0: B0.1 needs B1.1, but rank 1 sends B1.0 before that.*: move B0.0 before B0.1",
        ),
        (
            "looped", 1, "F1.0 F3.0", "F3.0 F1.0",
            "rank 1: F3.0 needs F2.0, but rank 0 sends F0.0 before that.*: move F1.0 before F3.0",
        ),
        # pairs
        ("whole", 1, "F1.0 BW1.0", "F1.0&BW1.0", "F1.0&BW1.0 cannot run as one, BW1.0 needs F1.0"),
        ("split", 0, "B0.0 W0.0", "B0.0&W0.0", "B0.0&W0.0 cannot run as one, W0.0 needs B0.0"),
        ("sliced", 0, "F0.0 F0.0/1", "F0.0&F0.0/1", "cannot run as one, F0.0/1 needs F0.0"),
        # what does not belong there
        ("whole", 0, "BW0.1", "BW0.1 R0", "rank 0: R0 is no part of a schedule"),
        ("whole", 0, "F0.0", "IF.0 F0.0", "IF.0 is a vocabulary pass, but this schedule does not"),
        # vocabulary passes
        ("vocabulary", 1, " T.1", "", "rank 1: T.1 is missing: every rank has a part"),
        ("vocabulary", 0, "IB.1", "IB.1 IB.1", "IB.1 is there twice"),
        ("vocabulary", 0, "IB.1", "IB.2", "IB.2 is out of range: micro-batch 2 of 2"),
        ("vocabulary", 0, "S.0 S.1 T.0", "T.0 S.0 S.1", "T.0 comes before S.0, which it needs"),
        ("vocabulary", 0, "IF.0 IF.1", "IF.1 IF.0", "rank 1: IF.0 comes where rank 0 has IF.1"),
        ("vocabulary", 1, "IF.0 IF.1 F1.0 S.0", "F1.0 IF.0 IF.1 S.0", "cannot run to its end"),
    ],
)  # fmt: skip
def test_wrong_lists(kind, rank, right, wrong, sentence):
    lists = list(LISTS[kind])
    assert right in lists[rank], "the case does not fit its list"
    lists[rank] = lists[rank].replace(right, wrong, 1)
    with pytest.raises(ScheduleError, match=sentence):
        validate(schedule(kind, lists))


def test_deadlock():
    """Each order is possible beside another's, both together are not."""
    waits, hurries = "F0.0 BW0.0 F0.1 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"
    lists = LISTS["whole"]
    validate(schedule("whole", [waits, lists[1]]))
    validate(schedule("whole", [lists[0], hurries]))
    sentence = "rank 0 waits in BW0.0 for B1.0 of rank 1; rank 1 waits in F1.1 for F0.1 of rank 0"
    with pytest.raises(ScheduleError, match=f"whole comes to a deadlock: {sentence}: change"):
        validate(schedule("whole", [waits, hurries]))


def test_deadlock_of_one_rank():
    """The first half of the V has to come before the second, which waits for it on this rank."""
    turn = Schedule("turn", ((parse("F1.0"), parse("F0.0"), parse("BW1.0"), parse("BW0.0")),),
                    ((0, 1),), 1)  # fmt: skip
    with pytest.raises(ScheduleError, match="rank 0 waits in F1.0 for F0.0 of rank 0"):
        validate(turn)


@pytest.mark.parametrize(
    ("placement", "sentence"),
    [
        (((0,), (0, 1)), "places stage 0 on ranks: 0 and 1; every stage from 0 needs exactly one"),
        (((0,), (2,)), "places stage 1 on ranks: none"),
        (((0, 1), (1,)), "places stage 1 on ranks: 0 and 1"),
        (((0,), (1,), (2,)), "has 2 lists for a placement on 3 ranks"),
        (((), ()), "places no stages"),
    ],
)
def test_wrong_placements(placement, sentence):
    with pytest.raises(ScheduleError, match=sentence):
        validate(replace(schedule("whole", LISTS["whole"]), placement=placement))


def test_directions_of_dual_pipe():
    right = build("dualpipe", 2, 4)
    validate(right)
    with pytest.raises(ScheduleError, match="places stage 0 on ranks: 0 and 1"):
        validate(replace(right, replicated=False))
    wrong = tuple(parse("F1.1") if str(item) == "F1.2" else item for item in right.lists[0])
    with pytest.raises(ScheduleError, match="F1.1 is on the wrong rank: stage 1 of micro-batch 1"):
        validate(replace(right, lists=(wrong, right.lists[1])))


@pytest.mark.parametrize(
    ("name", "size", "peak"),
    [("1f1b", (4, 8), 4), ("afab", (4, 8), 8), ("zb-h1", (4, 8), 4), ("v-min", (4, 8), 4)],
)
def test_too_many_in_flight(name, size, peak):
    validate(build(name, *size), memory_limit=peak)
    validate(build(name, *size), memory_limit=0)
    with pytest.raises(ScheduleError, match=f"hold {peak} activations, more than the limit"):
        validate(build(name, *size), memory_limit=peak - 1)


def test_slices_count_as_their_part():
    """p-r-1+n = 4 slices of a half: two micro-batches on rank 0."""
    schedule = build("seq1f1b", 3, 4, Options(slices=2))
    validate(schedule, memory_limit=2)
    with pytest.raises(ScheduleError, match="F0.1/1 makes the rank hold 2 .* the limit 1.5: run"):
        validate(schedule, memory_limit=1.5)


def test_a_pair_frees_memory_only_at_its_end():
    lists = ["F0.0 F0.1&BW0.0 BW0.1", "F1.0 BW1.0 F1.1 BW1.1"]
    paired = schedule("whole", lists)
    assert isinstance(paired.lists[0][1], Pair)
    validate(paired, memory_limit=2)
    with pytest.raises(ScheduleError, match="F0.1 makes the rank hold 2 activations"):
        validate(paired, memory_limit=1)
