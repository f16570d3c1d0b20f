"""Pictures of a run show the spans, losses and bytes that they are given."""

import pytest
import torch

from picotron_lab.analysis import clock_plots
from picotron_lab.analysis.clock_plots import Span, Watch, lanes_of
from picotron_lab.clock import Network
from picotron_lab.lab import run_ranks

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
PARTS = ("parameter", "gradient")


def watched(axis, network):
    """Two messages of 400 bytes under way while 3 seconds are computed, then waited for."""
    watch = Watch(axis, network)
    watch.spend(1.0, "forward", "F")
    handles = [watch.all_reduce(torch.full((100,), axis.rank + 1.0), wait=False) for _ in range(2)]
    watch.spend(3.0, "backward")
    total = sum(handle.wait() for handle in handles)
    watch.spend(0.5, "update")
    return watch, total


def test_a_watch_writes_down_work_and_wire():
    """A ring of 2 sends 400 of 400 bytes: 2 s each at 200 bytes/s, there half a second later."""
    network = Network(latency=0.5, bandwidth=200.0)
    for watch, total in run_ranks(watched, 2, network, network=network):
        assert total.tolist() == [6.0] * 100
        assert watch.wire == [Span(1.0, 3.0, "on the wire"), Span(3.0, 5.0, "on the wire")]
        expected = [("forward", 0.0, 1.0), ("backward", 1.0, 4.0), ("update", 5.5, 6.0)]
        assert [(span.kind, span.start, span.end) for span in watch.work] == expected
        assert watch.axis.now() == 6.0


def test_what_a_watch_says_of_the_wire_is_when_the_clock_lets_go():
    """Ring of 3: 4/3 of 300 bytes at 100 bytes/s from each, one after the other."""
    network = Network(bandwidth=100.0)

    def rank_main(axis):
        watch, x = Watch(axis, network), torch.zeros(75)
        for _ in range(2):
            watch.all_reduce(x)
            assert watch.wire[-1].end == pytest.approx(axis.now())
        return axis.now()

    assert run_ranks(rank_main, 3, network=network) == pytest.approx([8.0] * 3)


def boxes(axes):
    """(row, start, end) of each bar."""
    found = [
        (bar.get_y() + bar.get_height() / 2, *bar.get_bbox().intervalx) for bar in axes.patches
    ]
    return [tuple(round(float(number), 9) for number in box) for box in found]


def test_lanes_are_where_and_when_they_are_told():
    first = {"a": [Span(0, 2, "forward", "F0"), Span(3, 4, "backward")], "b": [Span(1, 2, "send")]}
    figure = clock_plots.lanes({"one": first, "two": {"a": [Span(0, 8, "send", "x")]}}, "T", "ms")
    one, two = figure.axes
    assert boxes(one) == [(0, 0, 2), (0, 3, 4), (1, 1, 2)]
    assert boxes(two) == [(0, 0, 8)]
    assert [axes.get_title("left") for axes in figure.axes] == ["one: 4 ms", "two: 8 ms"]
    assert [tick.get_text() for tick in one.get_yticklabels()] == ["a", "b"]
    assert {text.get_text() for text in one.texts} == {"F0"} and two.get_xlabel() == "time (ms)"
    fills = {(bar.get_facecolor(), bar.get_hatch()) for bar in one.patches}
    assert len(fills) == 3, "each kind has its own colour"
    assert two.patches[0].get_facecolor() == one.patches[2].get_facecolor(), "the same everywhere"
    kinds = [text.get_text() for text in figure.legends[0].get_texts()]
    assert kinds == ["forward", "backward", "send", "nothing"]


def test_a_name_that_does_not_fit_is_left_out():
    spans = [Span(0, 0.1, "forward", "a long name"), Span(0.1, 100, "forward", "a long name")]
    (axes,) = clock_plots.lanes({"": {"a": spans}}, "T", "s").axes
    assert [text.get_position()[0] for text in axes.texts] == [pytest.approx(50.05)]


def test_kinds_that_could_not_be_told_apart():
    spans = [Span(i, i + 1, f"kind {i}") for i in range(5)]
    with pytest.raises(AssertionError, match="5 kinds of spans cannot be told apart: draw 4"):
        clock_plots.lanes({"": {"a": spans}}, "T", "s")


def test_lanes_of_every_rank():
    network = Network(bandwidth=200.0)
    watches = [watch for watch, _ in run_ranks(watched, 2, network, network=network)]
    found = lanes_of(watches)
    names = ["rank 0 computes", "wire", "rank 1 computes", "wire"]
    assert [name.strip() for name in found] == names
    parts = [part for watch in watches for part in (watch.work, watch.wire)]
    assert list(found.values()) == parts


def test_one_curve_and_how_far_others_are():
    runs = {"one": [2.0, 1.0], "same": [2.0, 1.0], "other": [2.0, 1.5]}
    left, right = clock_plots.one_curve(runs, 1e-10, "T").axes
    assert [line.get_ydata().tolist() for line in left.lines] == list(runs.values())
    same, other, limit = (list(line.get_ydata()) for line in right.lines)
    assert same == [clock_plots.LEAST] * 2, "0 has no place on an axis of powers of ten"
    assert other == [clock_plots.LEAST, pytest.approx(0.5)]
    assert limit == [1e-10] * 2


def test_panels_of_losses():
    panels = {"AdamW": {"right": [3.0, 2.0]}, "SGD": {"right": [3.0, 1.0], "wrong": [3.0, 90.0]}}
    figure = clock_plots.loss_panels(panels, 10.0, "T")
    for axes, (name, runs) in zip(figure.axes, panels.items(), strict=True):
        assert axes.get_title() == name and axes.get_ylim() == (0, 10)
        found = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
        assert found == runs


def test_stacks_add_up():
    sizes = {"told": (1024, 512), "rank 0": (0, 256)}
    bars = {name: dict(zip(PARTS, pair, strict=True)) for name, pair in sizes.items()}
    (axes,) = clock_plots.stacks({"stage 1": bars}, "T").axes
    low, high = axes.containers
    assert [bar.get_height() for bar in low] == [1.0, 0.0]
    assert [(bar.get_y(), bar.get_height()) for bar in high] == [(1.0, 0.5), (0.0, 0.25)]
    assert [text.get_text() for text in axes.texts] == ["2", "0"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["told", "rank 0"]
