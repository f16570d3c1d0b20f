"""Each wrong value gets the sentence of its cause: values worked by hand."""

import pytest
import torch

from lessons.kit.compare import alike
from lessons.kit.diagnosis import Question, find

WANT = [torch.tensor([1.0, 2.0, 5.0]), torch.tensor([7.0, 11.0, 13.0]), torch.tensor([0.5, 3, 4])]
WANT = [w.double() for w in WANT]
SHARED = [WANT[0]] * 3
ROWS = torch.tensor([[1.0, 2.0], [3.0, 5.0], [8.0, 13.0]]).double()
FOUR = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).double()
SEVEN = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0]).double()
INF = float("inf")


def cause(got, want, **about) -> str:
    return find(Question("x", got, want, **about)).cause


@pytest.mark.parametrize(
    ("factor", "sentence"),
    [
        (3, "exactly 3 times the reference, and the axis has 3 ranks: a sum where a mean belongs"),
        (1 / 3, "exactly 1/3 of the reference, and the axis has 3 ranks: a mean where a sum"),
        (9, "exactly 3*3 times the reference, and the axis has 3 ranks: summed twice"),
        (6, "exactly 6 times the reference, and there are 6 micro-batches: a sum where a mean"),
        (1 / 6, "exactly 1/6 of the reference, and there are 6 micro-batches: a mean where a sum"),
        (-1, "exactly minus the reference: the sign is wrong"),
        (2, "exactly twice the reference: is something counted twice?"),
        (0, "all zeros: nothing was computed"),
        (1.5, "exactly 1.5 times the reference"),
    ],
)
def test_multiples(factor, sentence):
    got = [w * factor for w in WANT]
    assert cause(got, WANT, ranks=3, factors={6: "micro-batches"}).startswith(sentence)


@pytest.mark.parametrize(
    ("got", "want", "sentence"),
    [
        ([WANT[1], WANT[2], WANT[0]], WANT, "rank 0 has what rank 1 should have: check which neig"),
        ([WANT[2], WANT[0], WANT[1]], WANT, "rank 0 has what rank 2 should have: check which neig"),
        ([WANT[2], WANT[1], WANT[0]], WANT, "the ranks are in reverse order"),
        ([WANT[1], WANT[0], WANT[2]], WANT, "right parts on the wrong ranks: rank 0 has that of 1"),
        ([WANT[0], WANT[0], WANT[0]], WANT, "every rank has what only rank 0 should have"),
        ([WANT[0], WANT[1], WANT[2] + 1], WANT, "only rank 2 is wrong, the other ranks are right"),
        ([WANT[0] + 1, WANT[1], WANT[2] - 1], WANT, "only ranks 0 and 2 are wrong"),
        ([WANT[0], SHARED[0] + 1, WANT[0]], SHARED, "only rank 1 is wrong"),
        (FOUR.roll(2), FOUR, "right parts, shifted by 1 of 3 along dim 0"),
        (FOUR.roll(-2), FOUR, "right parts, shifted by -1 of 3 along dim 0"),
        (torch.cat([FOUR[4:], FOUR[2:4], FOUR[:2]]), FOUR, "the parts along dim 0 are joined in r"),
        (torch.cat([SEVEN[:6], SEVEN[6:] + 1]), SEVEN, "only the last, shorter shard is wrong: lo"),
        (torch.cat([FOUR[:4], FOUR[4:] + 1]), FOUR, "only the last shard is wrong"),
        (torch.cat([FOUR[:5], FOUR[5:] + 1]), FOUR, ""),  # a part of a shard may be anything
        (torch.cat([FOUR[:3], FOUR[3:] + 1]), FOUR, ""),
        (ROWS.T, ROWS, "it is transposed"),
        (ROWS[:2].T, ROWS[:2], "dims 0 and 1 are swapped: it is transposed"),
    ],
)
def test_places(got, want, sentence):
    found = cause(got, want, ranks=3)
    assert found.startswith(sentence) and bool(found) == bool(sentence)


def test_shards_are_named_only_where_there_are_ranks():
    assert cause(torch.cat([FOUR[:4], FOUR[4:] + 1]), FOUR) == ""


def test_nan_is_told_only_if_nothing_else_is_wrong():
    bad = WANT[0].clone()
    bad[1] = float("nan")
    assert cause(bad, WANT[0]).startswith("NaN, and nothing else is wrong")
    bad[0] = 9.0
    assert cause(bad, WANT[0]) == ""


def test_precision_is_told():
    third = torch.tensor([1 / 3, 1 / 7], dtype=torch.float64)
    assert cause(third.float(), third).startswith("right, but only as exact as torch.float32")


def test_suspects_come_first_and_may_explain_a_part():
    local = [w * 3 for w in WANT]
    suspects = {"the gradients were never sent": local}
    assert cause(local, WANT, ranks=3, suspects=suspects) == "the gradients were never sent"
    part = [local[0], WANT[1], local[2]]
    assert cause(part, WANT, ranks=3, suspects=suspects) == "the gradients were never sent"


def test_suspects_may_hold_none_and_explain_a_part():
    sentence = "it never reached rank 0"
    suspects = {sentence: [[None, WANT[0] * 3]] * 2}
    want = [[WANT[0], WANT[0]]] * 2
    got = [[WANT[0], WANT[0]], [None, WANT[0]]]
    assert cause([[None, WANT[0] * 3]] * 2, want, suspects=suspects) == sentence
    assert cause(got, want, ranks=2, suspects=suspects) == sentence
    assert cause([[None, None]] * 2, want, suspects=suspects).startswith("does every path")


def test_gradient_that_is_none_is_no_missing_return():
    found = find(Question("gradient of x", [None], [WANT[0]], ranks=1))
    assert found.seen == "gradient of x of rank 0 is None"
    assert found.cause.startswith("no gradient came there")


def test_digits_are_enough_to_tell_two_numbers_apart():
    found = find(Question("x", 0.12323250613, 0.12323250612 * (1 - 1e-8)))
    assert (found.seen, found.expected) == ("x is 0.123232506", "0.123232505")


@pytest.mark.parametrize(
    ("got", "want", "seen"),
    [
        (None, WANT[0], "x is None"),
        ([WANT[0]], [WANT[0], WANT[1]], "x has 1 items, it should have 2"),
        (WANT[0][:2], WANT[0], "x has shape [2], it should be [3]"),
        ({"a": 1}, {"b": 1}, "x has the keys ['a'], needed are ['b']"),
        ("no", 3, "x is 'no', it should be a number"),
        ([1, 2], torch.tensor([1, 2]), "x is [1, 2], it should be a tensor"),
        (3, [3], "x is 3, it should be a list or tuple"),
        ([WANT[0], None, WANT[2]], WANT, "x of rank 1 is None"),
        (
            WANT[0],
            torch.tensor([1, 2, 5]),
            "x has floats (torch.float64), it should have integers (torch.int64)",
        ),
        (
            torch.tensor([1, 0]),
            torch.tensor([True, False]),
            "x has integers (torch.int64), it should have truth values (torch.bool)",
        ),
        (torch.tensor(3), 3, "x is a tensor of shape [], it should be a number"),
        (3.0, 3, "x is 3.0, it should be of type int"),
        (1, True, "x is 1, it should be of type bool"),
        (True, 1, "x is True, it should be of type int"),
        (4, 3, "x is 4"),
    ],
)
def test_forms(got, want, seen):
    assert find(Question("x", got, want, ranks=3)).seen == seen


def test_place_of_the_first_wrong_number_is_told():
    bad = ROWS.clone()
    bad[1, 1] = 6.0
    found = find(Question("x", [ROWS, bad], [ROWS, ROWS], ranks=2))
    assert found.seen == "x of rank 1 at [1, 1] is 6 (1 of 6 numbers differ)"
    assert found.expected == "5"


def test_alike_means_nine_digits_of_the_largest_number():
    assert alike(torch.tensor([1e3, 1e-8]).double(), torch.tensor([1e3, 0.0]).double())
    assert not alike(torch.tensor([1e3, 1e-5]).double(), torch.tensor([1e3, 0.0]).double())
    assert not alike(1_000_000_001, 1_000_000_000)
    assert alike(torch.tensor([-INF, 1.0]), torch.tensor([-INF, 1.0]))
    assert not alike(torch.tensor([-1.0, 1.0]), torch.tensor([-INF, 1.0]))
    assert alike([(1, 2.0)], [[1, 2.0]]) and not alike([1], [True, 1])
