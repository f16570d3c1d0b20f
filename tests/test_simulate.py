"""The simulator: times worked out by hand, then the bubble rates that Zero Bubble measured."""

from dataclasses import replace

import pytest

from picotron_lab.schedules.actions import Schedule, ScheduleError, parse
from picotron_lab.schedules.costs import Costs, Options, parse_costs
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import Deadlock, peaks, simulate
from picotron_lab.schedules.validator import validate


def schedule(*lists, placement=None, **more):
    """A schedule from strings such as "F0.0 BW0.0", one per rank; rank r has stage r."""
    items = tuple(tuple(map(parse, text.split())) for text in lists)
    placement = placement or tuple((rank,) for rank in range(len(lists)))
    return Schedule("by-hand", items, placement, more.pop("microbatches", 1), **more)


def test_ranks_wait_for_each_other():
    # rank 1 gets F0.0, which ends at 2, at 2.5; rank 0 gets BW1.0, which ends at 8.5, at 9
    lists = ("F0.0 F0.1 BW0.0 BW0.1", "F1.0 BW1.0 F1.1 BW1.1")
    line = simulate(schedule(*lists, microbatches=2), Costs(F=2, B=3, W=1, transfer=0.5))
    assert line.starts == ((0, 2, 9, 15), (2.5, 4.5, 8.5, 10.5))
    assert line.ends == ((2, 4, 13, 19), (4.5, 8.5, 10.5, 14.5))
    assert (line.makespan, line.span) == (19, 19)


def test_split_backwards():
    # W's delay no other rank: B0.0 starts when B1.0 ends
    line = simulate(schedule("F0.0 B0.0 W0.0", "F1.0 B1.0 W1.0"), Costs(F=1, B=2, W=4))
    assert line.starts == ((0, 4, 6), (1, 2, 4))
    assert line.makespan == 10


def test_uneven_stages():
    line = simulate(schedule("F0.0 BW0.0", "F1.0 B1.0 W1.0"), Costs(factors=(1, 3)))
    assert line.starts == ((0, 7), (1, 4, 7))
    assert line.ends == ((1, 9), (4, 7, 10))


@pytest.mark.parametrize(("pair", "ends"), [(0, (1, 4, 6)), (2, (1, 3, 5)), (2.5, (1, 3.5, 5.5))])
def test_pairs(pair, ends):
    line = simulate(schedule("F0.0 F0.1&BW0.0 BW0.1", microbatches=2), Costs(pair=pair))
    assert line.ends == (ends,)


def test_a_pair_waits_for_both_members():
    # a V of 2 ranks: F2.1 ends at 6, BW1.0 at 13, and both are needed a transfer later
    lists = ("F0.0 F0.1 F3.0 BW3.0 F3.1&BW0.0 BW3.1 BW0.1",
             "F1.0 F2.0 F1.1 F2.1 BW2.0 BW1.0 BW2.1 BW1.1")  # fmt: skip
    folded = {"placement": ((0, 3), (1, 2)), "microbatches": 2}
    line = simulate(schedule(*lists, **folded), Costs(transfer=1))
    assert line.starts[1] == (2, 3, 4, 5, 9, 11, 20, 22)
    assert line.starts[0] == (0, 1, 5, 6, 14, 17, 25)
    # now BW1.0 ends at 13, and after it F2.1 at 14
    late = lists[1].replace("F2.1 BW2.0 BW1.0", "BW2.0 BW1.0 F2.1")
    assert simulate(schedule(lists[0], late, **folded), Costs(transfer=1)).starts[0][4] == 15


def test_slices_go_there_in_order_and_back_in_reverse():
    order = "F0.0 F0.0/1 BW0.0/1 BW0.0"
    assert simulate(schedule(order, slices=2)).ends == ((1, 2, 4, 6),)
    with pytest.raises(Deadlock, match=r"rank 0 waits in BW0\.0 for B0\.0/1 or BW0\.0/1"):
        simulate(schedule("F0.0 F0.0/1 BW0.0 BW0.0/1", slices=2))
    with pytest.raises(Deadlock, match=r"rank 0 waits in F0\.0/1 for F0\.0"):
        simulate(schedule("F0.0/1 F0.0 BW0.0/1 BW0.0", slices=2))


# Passes take 1 and BW 2. Of both ranks IF ends at 1 and its sum is there at 1.5, so F0.0 ends at
# 2.5, F1.0 at 3.75, S at 4.75 on rank 1 and at 5 on rank 0; its sums are there at 5.5.
VOCABULARY = {
    # T ends at 6.5, sums 7; BW1.0 ends at 9, BW0.0 at 11.25, and its gradient needs 0.25 to rank 1
    1: (("IF.0 F0.0 S.0 T.0 BW0.0 IB.0", "IF.0 F1.0 S.0 T.0 BW1.0 IB.0"),
        ((0, 1.5, 4, 5.5, 9.25, 11.25), (0, 2.75, 3.75, 5.5, 7, 11.5))),
    # BW1.0 starts with the sums of S, and ends at 7.5
    2: (("IF.0 F0.0 S.0 T.0 BW0.0 IB.0", "IF.0 F1.0 S.0 BW1.0 T.0 IB.0"),
        ((0, 1.5, 4, 5.5, 7.75, 9.75), (0, 2.75, 3.75, 5.5, 7.5, 10))),
    # S of rank 1 waits for rank 0, IB of rank 0 for rank 1
    3: (("IF.0 F0.0 S.0 T.0 BW0.0 IB.0", "IF.0 F1.0 S.0 T.0 BW1.0 IB.0"),
        ((0, 1.5, 4, 5.5, 9.25, 11.5), (0, 2.75, 4, 5.5, 7, 11.5))),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", VOCABULARY)
def test_vocabulary_passes(algorithm):
    lists, starts = VOCABULARY[algorithm]
    made = schedule(*lists, vocabulary=algorithm)
    assert simulate(made, Costs(transfer=0.25, barrier=0.5)).starts == starts


def test_deadlocks_name_ranks_and_reasons():
    crossed = ("F0.0 F0.1 BW0.0 BW0.1", "F1.0 F1.1 BW1.1 BW1.0")
    simulate(schedule(*crossed, microbatches=2))  # only late
    stuck = ("F0.0 BW0.0 F0.1 BW0.1", "F1.0 F1.1 BW1.0 BW1.1")
    sentence = r"by-hand cannot run to its end: rank 0 waits in BW0\.0 for B1\.0 or BW1\.0; "
    with pytest.raises(Deadlock, match=sentence + r"rank 1 waits in F1\.1 for F0\.1"):
        simulate(schedule(*stuck, microbatches=2))
    missing = schedule("IF.0 F0.0 S.0 BW0.0 T.0 IB.0", "F1.0 S.0 BW1.0 T.0 IB.0", vocabulary=2)
    with pytest.raises(Deadlock, match=r"rank 0 waits in F0\.0 for IF\.0 of every rank"):
        simulate(missing)
    swapped = schedule("IF.0 IF.1", "IF.1 IF.0", microbatches=2, vocabulary=3)
    with pytest.raises(Deadlock, match=r"rank 0 waits in IF\.0 for all ranks to come to IF\.0"):
        simulate(swapped)


def test_one_factor_for_every_stage():
    with pytest.raises(ScheduleError, match="3 factors do not fit 2 stages"):
        simulate(schedule("F0.0 BW0.0", "F1.0 BW1.0"), Costs(factors=(1, 2, 3)))


def test_peaks_with_three_changes_of_memory():
    made = schedule("F0.0 F0.1 B0.0 F0.2 W0.0 BW0.1 B0.2 W0.2", microbatches=3)
    assert peaks(made) == (3,)  # F0.2 comes before W0.0
    assert peaks(made, kept=0.0) == (2,)
    assert peaks(made, kept=0.25) == (2.25,)
    sliced = schedule("F0.0 F0.0/1 BW0.0/1 BW0.0", slices=2)
    assert peaks(sliced) == (1,)


# ---- costs


def test_costs():
    costs = parse_costs("F=2,B=3,W=0.5,transfer=1e-2")
    assert costs == Costs(F=2, B=3, W=0.5, transfer=0.01)
    assert [costs.of(parse(text)) for text in ("F0.0", "BW0.0", "S.1", "F0.1&BW3.0")] == [
        2, 3.5, 1, 5.5,
    ]  # fmt: skip
    uneven = Costs(F=2, pair=5, factors=(1, 3))
    assert [uneven.of(parse(text)) for text in ("F0.0", "F1.0", "IF.0", "F0.1&BW1.0")] == [
        2, 6, 1, 10,
    ]  # fmt: skip
    measured = Costs(F=2, pair=3, factors=((1, 2, 3), (0.5, 1, 1)))  # of F, B and W
    assert [measured.of(parse(text)) for text in ("F0.0", "B0.0", "W0.0", "BW0.0", "F1.0")] == [
        2, 2, 3, 5, 1,
    ]  # fmt: skip
    assert measured.of(parse("F1.1&BW0.0")) == 3 * (1 + 5) / (2 + 2)


@pytest.mark.parametrize("text", ["F", "F=", "F=x", "Q=1", "F=-1", "factors=1", "F=1;B=2"])
def test_wrong_costs(text):
    with pytest.raises(ScheduleError, match="needs a name of F, B, W.* and a time, as in F=1"):
        parse_costs(text)


def test_impossible_costs():
    with pytest.raises(ScheduleError, match="cost W=-1 is no time"):
        Costs(W=-1)
    with pytest.raises(ScheduleError, match="is no time"):
        Costs(factors=(1, float("nan")))
    with pytest.raises(ScheduleError, match=r"cost factors\[1\]=-2 is no time"):
        Costs(factors=(1, (1, -2, 1)))


# ---- large steps


@pytest.mark.slow
def test_a_large_step():
    # interleaved, p = 64, m = 1024, v = 4: m v (F+B+W) + (p-1)(F+B+W), in units of a chunk
    made = build("interleaved", 64, 1024, Options(virtual_stages=4))
    validate(made)
    assert simulate(made).makespan == 1024 * 4 * 3 + 63 * 3


# ---- Zero Bubble, arXiv 2401.10241, tables 5 and 9


# p m v  tF tB tW t_comm in ms, measured; bubble rates of 1F1B, interleaved with v, ZB-H1, ZB-H2
RATES = """
8 24 3   18.522 18.086 9.337 .601  .2431 .1055 .1585 .1083
8 32 3   18.513 18.086 9.331 .626  .1985 .0818 .1242 .0837
8 64 3   18.546 18.097 9.321 .762  .1240 .0443 .0674 .0444
8 24 4   29.718 29.444 19.927 .527  .2347 .0808 .1323 .0698
8 32 4   29.802 29.428 19.530 .577  .1898 .0628 .1045 .0559
8 64 4   29.935 29.621 19.388 .535  .1091 .0320 .0554 .0294
16 48 3  11.347 11.248 8.132 .377  .2552 .1104 .1397 .0672
16 64 3  11.307 11.254 8.101 .379  .2082 .0852 .1088 .0516
16 128 3 11.325 11.308 8.109 .378  .1251 .0445 .0576 .0266
32 96 2  10.419 10.207 7.715 .408  .2646 .1493 .1421 .0641
32 128 2 10.408 10.204 7.703 .408  .2168 .1164 .1106 .0490
32 256 2 10.402 10.248 7.698 .460  .1352 .0624 .0594 .0257
"""


def rows(table):
    """Large steps only among the slow tests."""
    lines = [" ".join(line.split()) for line in table.split("\n")[1:-1]]
    slow = [[pytest.mark.slow] if int(line.split()[1]) >= 96 else [] for line in lines]
    return [pytest.param(line, marks=marks) for line, marks in zip(lines, slow, strict=True)]


@pytest.mark.parametrize("row", rows(RATES))
def test_published_bubble_rates(row):
    p, m, v = map(int, row.split()[:3])
    forward, backward, weights, transfer, *published = map(float, row.split()[3:])
    costs = Costs(F=forward, B=backward, W=weights, transfer=transfer)
    chunk = replace(costs, F=forward / v, B=backward / v, W=weights / v)
    work = m * (forward + backward + weights)
    spans = [simulate(build(name, p, m), costs).span for name in ("1f1b", "zb-h1", "zb-h2")]
    # the paper takes interleaving to wait for 2(pv-1) - p transfers, the rule for 2(pv-1)
    looped = simulate(build("interleaved", p, m, Options(virtual_stages=v)), chunk).span
    spans.insert(1, looped - p * transfer)
    assert [round(1 - work / span, 4) for span in spans] == published
