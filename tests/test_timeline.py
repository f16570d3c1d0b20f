"""What is read from a simulated step: bubbles, memory over time, JSON, trace and picture."""

import json
from dataclasses import replace

import pytest

from picotron_lab.analysis.plots import compare, draw, save
from picotron_lab.analysis.timeline import activations, as_dict, metrics, trace, write_trace
from picotron_lab.schedules.actions import Schedule, parse
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import NAMES, build
from picotron_lab.schedules.simulate import simulate


def lists(*texts):
    return tuple(tuple(map(parse, text.split())) for text in texts)


LISTS = ("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 B1.0 W1.0 F1.1 B1.1 W1.1")
SPLIT = Schedule("split", lists(*LISTS), ((0,), (1,)), 2)


def test_metrics_by_hand():
    line = simulate(SPLIT, Costs(transfer=1))
    # rank 1: F 2-3, B 3-4, W 4-5, F 5-6, B 6-7, W 7-8; rank 0: B0.0 5-6, W 6-7, B0.1 8-9, W 9-10
    found = metrics(line)
    assert (found.makespan, found.bubble_makespan, found.bubble_stage) == (10, 4, 4)
    assert found.bubble_ratio == 4 / 10
    assert found.bubble_ratio_of_work == 4 / 6
    assert found.bubble_ratio_stage == 4 / 10  # rank 0 waits from 2 to 5 and from 7 to 8
    assert found.peak_until_W == (2, 1)
    assert found.peak_until_B == (2, 1)


def test_the_busiest_rank_counts():
    # rank 1 works from 1 to 13, its B's end at 5 and 11; rank 0 works 6 in 13, and waits for them
    found = metrics(simulate(SPLIT, Costs(factors=(1, 2))))
    assert (found.makespan, found.bubble_makespan, found.bubble_stage) == (13, 1, 7)
    assert found.bubble_ratio_stage == 7 / 13


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 8), (8, 64)])
def test_both_ratios_of_1f1b(p, m):
    found = metrics(simulate(build("1f1b", p, m), Costs(F=1.5, B=2, W=0.25)))
    assert found.bubble_ratio == pytest.approx((p - 1) / (m + p - 1))
    assert found.bubble_ratio_of_work == pytest.approx((p - 1) / m)


@pytest.mark.parametrize("name", ["zb-h2", "zb-v"])
def test_zero_bubble_is_so_only_per_stage(name):
    found = metrics(simulate(build(name, 4, 8)))
    assert (found.bubble_stage, found.bubble_ratio_stage) == (0, 0)
    assert found.bubble_makespan == 3


def test_peaks_differ_only_where_weights_come_later():
    found = metrics(simulate(build("zb-h1", 4, 8)))
    assert found.peak_until_W == (4, 4, 4, 4)
    assert found.peak_until_B == (4, 3, 2, 1)


def test_activations_over_time():
    line = simulate(SPLIT, Costs(transfer=1))
    assert activations(line, 0) == [(0, 1), (1, 2), (7, 1), (10, 0)]
    assert activations(line, 0, kept=0.0) == [(0, 1), (1, 2), (6, 1), (9, 0)]
    until_b = [(0, 1), (1, 2), (6, 1.25), (7, 1), (9, 0.25), (10, 0)]
    assert activations(line, 0, kept=0.25) == until_b
    assert activations(line, 1) == [(0, 0), (2, 1), (5, 1), (8, 0)]  # freed and taken at 5


def test_slices_and_pairs_over_time():
    sliced = Schedule("sliced", lists("F0.0 F0.0/1 BW0.0/1 BW0.0"), ((0,),), 1, 2)
    assert activations(simulate(sliced), 0) == [(0, 0.5), (1, 1), (4, 0.5), (6, 0)]
    pair = Schedule("pair", lists("F0.0 F0.1&BW0.0 BW0.1"), ((0,),), 2)
    assert activations(simulate(pair), 0) == [(0, 1), (1, 2), (4, 1), (6, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_given_back_and_peaks_agree(name):
    costs = Costs(F=1, B=1.25, W=0.75, S=0.5, T=0.5, IF=0.25, IB=0.25, transfer=0.125, pair=2.5)
    line = simulate(build(name, 4, 8), costs)
    found = metrics(line)
    for kept, peak in ((1.0, found.peak_until_W), (0.0, found.peak_until_B)):
        for rank in range(4):
            curve = activations(line, rank, kept)
            times, held = zip(*curve, strict=True)
            assert list(times) == sorted(set(times))
            assert (max(held), held[-1], min(held)) == pytest.approx((peak[rank], 0, 0))


# ---- JSON


def test_json_can_be_read_back():
    for name in NAMES:
        made = build(name, 4, 8)
        line = simulate(made)
        told = json.loads(json.dumps(as_dict(line)))
        orders, placement = lists(*map(" ".join, told["order"])), map(tuple, told["placement"])
        again = replace(made, lists=orders, placement=tuple(placement))
        assert again == made
        assert simulate(again).starts == tuple(map(tuple, told["starts"]))
        assert (told["schedule"], told["microbatches"]) == (name, 8)


def test_json_of_a_small_step():
    told = as_dict(simulate(SPLIT, Costs(transfer=1)))
    assert told["order"] == [text.split() for text in LISTS]
    assert told["placement"] == [[0], [1]]
    assert told["ends"] == [[1, 2, 6, 7, 9, 10], [3, 4, 5, 6, 7, 8]]
    assert told["activations"][0] == [[0, 1], [1, 2], [7, 1], [10, 0]]
    assert told["bubble_ratio"] == 0.4
    assert told["bubble_ratio_of_work"] == 0.666666667
    assert set(told) == {
        "schedule", "microbatches", "order", "placement", "makespan", "bubble_makespan",
        "bubble_stage", "bubble_ratio", "bubble_ratio_of_work", "bubble_ratio_stage",
        "peak_until_W", "peak_until_B", "starts", "ends", "activations",
    }  # fmt: skip


# ---- trace


def test_trace(tmp_path):
    line = simulate(build("dualpipe", 4, 8), Costs(transfer=0.5))
    write_trace(line, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == trace(line)["traceEvents"]
    for rank, items in enumerate(line.schedule.lists):
        mine = [event for event in events if event["pid"] == rank]
        runs = [event for event in mine if event["ph"] == "X"]
        assert [event["name"] for event in runs] == list(map(str, items))
        ends = [event["ts"] + event["dur"] for event in runs]
        assert all(end <= after["ts"] for end, after in zip(ends, runs[1:], strict=False))
        assert ends[-1] == 1000 * line.ends[rank][-1]
        held = [event["args"]["held"] for event in mine if event["ph"] == "C"]
        assert max(held) == 5
        assert [e["args"]["name"] for e in mine if e["ph"] == "M"] == [f"rank {rank}"]


# ---- picture


def boxes(axes):
    """(left, right, row, height) of every cell."""
    for path in (path for cells in axes.collections for path in cells.get_paths()):
        (left, low), (right, high) = path.vertices[0], path.vertices[2]
        yield left, right, round((low + high) / 2), round(high - low, 2)


def test_picture_shows_every_action():
    line = simulate(build("interleaved", 2, 4), Costs(transfer=0.5))
    top, below = draw(line).axes
    found = sorted((left, right, rank) for left, right, rank, _ in boxes(top))
    expected = [
        (start, end, rank)
        for rank in (0, 1)
        for start, end in zip(line.starts[rank], line.ends[rank], strict=True)
    ]
    assert found == sorted(expected)
    numbers = sorted(text.get_text() for text in top.texts)
    assert numbers == sorted("0123" * 8)  # F and BW of 4 stages
    assert len(below.lines) == 2
    assert [label.get_text() for label in top.get_yticklabels()] == ["rank 0", "rank 1"]


def test_picture_tells_chunks_and_kinds_apart():
    top, _ = draw(simulate(build("zb-v", 2, 4))).axes
    assert len(top.collections) == 6  # F, B, W of two chunks
    assert [text.get_text() for text in top.get_legend().get_texts()] == [
        "forward", "backward for the input", "backward for the weights",
        "darker: later stages of a rank",
    ]  # fmt: skip


def test_picture_shows_both_bubbles():
    top, below = draw(simulate(build("zb-v", 4, 8))).axes
    first, second = top.get_title(loc="left").split("\n")
    assert first == "zb-v: 4 ranks, 8 micro-batches, makespan 51"
    assert second == "bubble 3 = 5.9% of the makespan; per stage 0 = 0.0%"
    assert below.get_ylabel() == "activations\n(held until W)"
    assert max(below.lines[2].get_ydata()) == 8


def test_pictures_under_one_another_share_their_time():
    """The longest fills the width; each ends with a line at its makespan."""
    long, short = (simulate(build(name, 3, 5)) for name in ("afab", "zb-h1"))
    top, below = compare([("first", long), ("second", short)]).axes
    assert top.get_title(loc="left") == "first: 21" and below.get_title(loc="left") == "second: 17"
    assert top.get_xlim() == below.get_xlim() == (0, 1.01 * 21)
    assert [list(axes.lines[0].get_xdata()) for axes in (top, below)] == [[21, 21], [17, 17]]


def test_picture_of_slices_pairs_and_large_steps(tmp_path):
    top, _ = draw(simulate(build("seq1f1b", 2, 2, Options(slices=2)))).axes
    assert {text.get_text() for text in top.texts} == {"0/0", "0/1", "1/0", "1/1"}
    top, _ = draw(simulate(build("dualpipe", 2, 4))).axes
    assert {height for *_, height in boxes(top)} == {0.92, 0.42}  # members of a pair share a cell
    top, _ = draw(simulate(build("1f1b", 8, 160))).axes
    assert not top.texts
    save(simulate(build("1f1b-vocab1", 2, 2)), tmp_path / "vocab.png")
    assert (tmp_path / "vocab.png").read_bytes()[1:4] == b"PNG"
