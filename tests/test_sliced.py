"""Schedules whose actions are on slices of sequences."""

import pytest

from picotron_lab.schedules.actions import Pair
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import NAMES, build
from picotron_lab.schedules.simulate import simulate
from picotron_lab.schedules.validator import validate

WHOLE = ("1f1b-interlaced", "zb-auto", "auto")  # and the other vocabulary ones cut no sequences


def test_small_sliced_list():
    schedule = build("seq1f1b", 2, 2, Options(slices=2))
    assert [" ".join(map(str, items)) for items in schedule.lists] == [
        "F0.0 F0.0/1 F0.1 BW0.0/1 F0.1/1 BW0.0 BW0.1/1 BW0.1",
        "F1.0 F1.0/1 BW1.0/1 F1.1 BW1.0 F1.1/1 BW1.1/1 BW1.1",
    ]


def test_terapipe_of_two_sequences():
    schedule = build("terapipe", 2, 2, Options(slices=2))
    assert [" ".join(map(str, items)) for items in schedule.lists] == [
        f"F{r}.0 F{r}.0/1 F{r}.1 F{r}.1/1 BW{r}.1/1 BW{r}.1 BW{r}.0/1 BW{r}.0" for r in range(2)
    ]


def test_slices_within_the_order_of_another_schedule():
    schedule = build("zb-h1", 2, 2, Options(slices=2))
    assert [" ".join(map(str, items)) for items in schedule.lists] == [
        "F0.0 F0.0/1 F0.1 F0.1/1 B0.0/1 B0.0 W0.0/1 W0.0 B0.1/1 B0.1 W0.1/1 W0.1",
        "F1.0 F1.0/1 B1.0/1 B1.0 F1.1 F1.1/1 B1.1/1 B1.1 W1.0/1 W1.0 W1.1/1 W1.1",
    ]
    items = build("dualpipe", 2, 4, Options(slices=2)).lists[0]
    pair = next(item for item in items if isinstance(item, Pair))
    assert (pair.first.slice, pair.second.slice) == (0, 1)  # first forward, last backward


@pytest.mark.parametrize("name", [n for n in NAMES if "vocab" not in n and n not in WHOLE])
@pytest.mark.parametrize("n", [2, 3])
def test_slices_of_every_schedule_fill_the_pipeline_sooner(name, n):
    """Valid steps, as much work, and sooner than with whole sequences, which take n
    times as long."""
    p, m = 4, 8
    cut, plain = build(name, p, m, Options(slices=n)), build(name, p, m)
    validate(cut)
    times = Costs(F=1.0, B=1.5, W=0.5)
    assert simulate(cut, times).makespan < n * simulate(plain, times).makespan
    assert sum(map(len, cut.lists)) == n * sum(map(len, plain.lists))


def test_uneven_slices():
    """By hand: sum of F and BW, and the longest ones once more for each further stage."""
    costs = Costs(F=1, B=2, W=1, slices=(1.0, 2.0, (1.0, 2.0, 3.0)))
    f, bw = (1, 2, 1), (2 + 1, 4 + 2, 4 + 3)
    for p, m in ((2, 1), (4, 1), (3, 5)):
        found = simulate(build("terapipe", p, m, Options(slices=3)), costs).makespan
        assert found == m * (sum(f) + sum(bw)) + (p - 1) * (max(f) + max(bw))
