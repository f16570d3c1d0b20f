"""Searched schedules: zb-auto against published rates, auto against all that people made."""

import random

import pytest

from picotron_lab.schedules.actions import ScheduleError
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import NAMES, build
from picotron_lab.schedules.simulate import peaks, simulate
from picotron_lab.schedules.validator import validate


def handmade(p, m, v):
    """All schedules with v stages per rank, each on one rank, without a split vocabulary."""
    found = []
    for name in NAMES:
        if "auto" in name or "vocab" in name or name in ("1f1b-interlaced", "dualpipe"):
            continue
        try:
            made = build(name, p, m, Options(virtual_stages=v))
        except ScheduleError:  # not for these numbers
            continue
        found.append(made)
    return found


def fastest(schedules, costs, limit):
    fitting = [made for made in schedules if not limit or max(peaks(made)) <= limit]
    return min((simulate(made, costs).makespan for made in fitting), default=float("inf"))


# ---- zb-auto: Zero Bubble, arXiv 2401.10241, tables 3, 5 and 9


# p m  tF tB tW t_comm in ms; bubble rates with a limit of p and of 2p; width h and heads a
RATES = """
8 24   18.522 18.086 9.337 .601   .1585 .0433  2304 24
8 32   18.513 18.086 9.331 .626   .1242 .0039  2304 24
8 64   18.546 18.097 9.321 .762   .0674 .0026  2304 24
8 24   29.718 29.444 19.927 .527  .1323 .0029  4096 32
8 32   29.802 29.428 19.530 .577  .1045 .0022  4096 32
8 64   29.935 29.621 19.388 .535  .0554 .0010  4096 32
16 48  11.347 11.248 8.132 .377   .1397 .0066  5120 40
16 64  11.307 11.254 8.101 .379   .1088 .0054  5120 40
16 128 11.325 11.308 8.109 .378   .0576 .0028  5120 40
32 96  10.419 10.207 7.715 .408   .1421 .0038  6144 48
32 128 10.408 10.204 7.703 .408   .1106 .0029  6144 48
32 256 10.402 10.248 7.698 .460   .0594 .0018  6144 48
"""


def rows(table):
    """Large steps only among the slow tests."""
    lines = [" ".join(line.split()) for line in table.split("\n")[1:-1]]
    slow = [[pytest.mark.slow] if int(line.split()[1]) >= 96 else [] for line in lines]
    return [pytest.param(line, marks=marks) for line, marks in zip(lines, slow, strict=True)]


@pytest.mark.parametrize("row", rows(RATES))
def test_published_bubble_rates(row):
    p, m, *_, width, heads = map(int, (part for part in row.split() if "." not in part))
    forward, backward, weights, transfer, *published = (float(s) for s in row.split() if "." in s)
    costs = Costs(F=forward, B=backward, W=weights, transfer=transfer)
    kept = 32 * width / (34 * width + 5 * heads * 1024)  # sequences of 1024
    rates = []
    for limit in (p, 2 * p):
        made = build("zb-auto", p, m, Options(costs=costs, memory_limit=limit, kept=kept))
        assert max(peaks(made, kept)) <= limit + 1e-9
        rates.append(1 - m * (forward + backward + weights) / simulate(made, costs).span)
    assert [round(rate, 4) for rate in rates] == published


def test_zb_auto_is_a_step_whatever_the_limit():
    for p, m in [(1, 1), (1, 5), (2, 1), (2, 7), (3, 3), (4, 9), (8, 5), (8, 20), (3, 20)]:
        for limit in (1, 1.5, 2, 3, p, 2 * p, 0):
            for kept in (1.0, 0.4):
                costs = Costs(W=0.7, transfer=0.1)
                options = Options(costs=costs, memory_limit=limit, kept=kept)
                made = build("zb-auto", p, m, options)
                validate(made, limit if kept == 1 else None)
                assert max(peaks(made, kept)) <= (limit or m) + 1e-9


def test_one_activation_runs_one_micro_batch_after_the_other():
    # F, B, W of all 3 stages in turn: 3 + 3 + 1 until rank 0 can start again, 10 times
    made = build("zb-auto", 3, 10, Options(memory_limit=1))
    assert simulate(made).makespan == 10 * 7


def test_a_forward_may_delay_the_first_backward():
    # stage 0 takes twice as long, and works without a pause: 10 times 2 of F, B and W
    costs = Costs(B=1.5, W=0.3, transfer=0.1, factors=(2, 1))
    made = build("zb-auto", 2, 10, Options(costs=costs, memory_limit=4))
    assert simulate(made, costs).makespan == pytest.approx(10 * 2 * 2.8)


def test_zb_auto_refuses_less_than_one_activation():
    with pytest.raises(ScheduleError, match=r"memory_limit 0\.9 is too small .*: give at least 1"):
        build("zb-auto", 4, 8, Options(memory_limit=0.9))


# ---- auto


def sizes(count):
    chosen = random.Random(5)
    for _ in range(count):
        v, p = chosen.choice((1, 1, 2, 2, 3)), chosen.choice((1, 2, 3, 4, 6))
        m = chosen.choice((1, p, 2 * p, 4 * p, 3 * p + 1))
        uneven = tuple(chosen.choice((0.7, 1, 1, 1.5, 2)) for _ in range(p * v))
        head = (*[1] * (p * v - 1), (1.5, 2.5, 2))  # the output layer: other ratios of F, B and W
        costs = Costs(
            B=chosen.choice((1, 1.2)), W=chosen.choice((1, 0.6)), transfer=chosen.choice((0, 0.1)),
            factors=chosen.choice((uneven, uneven, head, ())),
        )  # fmt: skip
        yield p, m, v, costs, chosen.choice((0, v, 1.5 * v, p * v, 1.5 * p * v, 2 * p * v))


@pytest.mark.parametrize(
    "count",  # few after a change, as CI has many
    [pytest.param(20, marks=pytest.mark.exhaustive), pytest.param(80, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_auto_is_never_worse_than_the_best_handmade_one_that_fits(count):
    for p, m, v, costs, limit in sizes(count):
        options = Options(virtual_stages=v, costs=costs, memory_limit=limit)
        made = build("auto", p, m, options)
        validate(made, limit)
        best = fastest(handmade(p, m, v), costs, limit)
        assert simulate(made, costs).makespan <= best + 1e-9, (p, m, v, costs, limit)


# p m v limit, W, uneven stages, and what no list can beat: a rank's work, after the way to it
UNEVEN = [
    (3, 9, 1, 4.5, 0.5, (2, 1.5, 1.5), 9 * 2 * 2.5),
    (3, 6, 1, 3, 0.5, (1.5, 1, 0.5), 6 * 1.5 * 2.5),
    (4, 8, 1, 4, 1, (0.5, 1, 1.5, 1), 0.5 + 1 + 8 * 1.5 * 3),
    (4, 8, 1, 6, 1, (2, 2, 1.5, 1), 2 + 8 * 2 * 3),
    (4, 8, 2, 12, 0.5, (2, 0.5, 0.5, 0.5, 1.5, 1, 1.5, 1), 8 * 3 * 2.5),  # rank 0 of a V
    (8, 25, 1, 12, 0.6, (0.7, 1.5, 2, 2, 1.5, 1, 1.5, 0.7), None),
    (4, 16, 2, 16, 0.6, (1, 2, 1, 1, 0.7, 1, 1.5, 1), None),
    (3, 12, 3, 18, 0.6, (1, 2, 1, 1, 0.7, 1, 1.5, 1, 1), None),
]


@pytest.mark.parametrize("case", UNEVEN)
def test_auto_beats_all_handmade_ones_on_uneven_stages(case):
    p, m, v, limit, weights, factors, bound = case
    costs = Costs(W=weights, factors=factors)
    made = build("auto", p, m, Options(virtual_stages=v, costs=costs, memory_limit=limit))
    found = simulate(made, costs).makespan
    assert found < fastest(handmade(p, m, v), costs, limit) - 1e-9
    assert bound is None or found == pytest.approx(bound)


def test_auto_splits_the_vocabulary_too():
    costs = Costs(S=0.6, T=0.6, IF=0.1, IB=0.1, transfer=0.05, barrier=0.1)
    for v, base in ((1, "1f1b"), (2, "v-half")):
        for algorithm in (1, 2):
            options = Options(virtual_stages=v, costs=costs, vocabulary=algorithm)
            made, name = build("auto", 4, 16, options), f"{base}-vocab{algorithm}"
            given = build(name, 4, 16, Options(costs=costs) if v == 1 else Options())
            validate(made)
            assert made.vocabulary == algorithm
            assert simulate(made, costs).makespan < simulate(given, costs).makespan


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (Options(memory_limit=0.5), r"memory_limit 0\.5 is too small .* give 1 or more"),
        (
            Options(virtual_stages=3, memory_limit=2),
            "memory_limit 2 is too small .* give 3 or more",
        ),
        (Options(vocabulary=3), "vocabulary 3 is no algorithm for auto: give 0, 1 or 2"),
        (Options(vocabulary=1, virtual_stages=3), "virtual stages 3 .* give 1 or 2"),
        (Options(vocabulary=2, memory_limit=2), "memory_limit 2 is too small .* give 5"),
        (Options(costs=Costs(factors=(1, 2))), "2 factors do not fit 4 stages"),
    ],
)
def test_what_auto_refuses(options, sentence):
    with pytest.raises(ScheduleError, match=sentence):
        build("auto", 4, 8, options)
