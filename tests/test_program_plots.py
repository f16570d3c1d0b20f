"""Pictures of programs and plans show what they are given."""

from types import SimpleNamespace

import pytest
import torch

from picotron_lab.analysis import program_plots
from picotron_lab.analysis.memory import Footprint
from picotron_lab.mpmd import Controller, accumulate_grads, pipeline_yield
from picotron_lab.mpmd_program import Run, Send
from picotron_lab.mpmd_trace import trace
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate
from picotron_lab.token_times import fit

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
WIDE, ROWS, BATCHES = 4, 3, 2
VALUE = WIDE * ROWS * 4  # bytes of what a stage gives to the next
GIB = 2**30


def texts(axes):
    return [text.get_text() for text in axes.texts]


def bars(axes):
    """(left, width) of each, in the order in which they were drawn."""
    return [(bar.get_x(), bar.get_width()) for bar in axes.patches]


def two_layers(params, x):
    return (pipeline_yield(torch.relu(x @ params["a"])) @ params["b"]).square().sum()


@pytest.fixture(scope="module")
def body():
    return trace(two_layers, weights(), torch.ones(ROWS, WIDE))


@pytest.fixture(scope="module")
def seen():
    """(program, reports) of two actors."""
    batches = [torch.ones(ROWS, WIDE)] * BATCHES
    with Controller(2) as controller:
        step = accumulate_grads(two_layers, "afab")
        remote = controller.compile(step, weights(), batches)
        remote(batches)
        return remote.program, remote.reports()


def weights():
    return {name: torch.ones(WIDE, WIDE) for name in "ab"}


# ---- schedules


def timelines():
    return {name: simulate(build(name, 4, 8)) for name in ("afab", "1f1b", "zb-v")}


def test_bubble_against_memory():
    """AFAB holds m, 1F1B p, both wait (p-1)/(m+p-1) [2104.04473]; ZB-V holds p and waits 3 of 51
    units of half a stage [2401.10241]."""
    axes = program_plots.tradeoff(timelines()).axes[0]
    points = [line.get_xydata()[0].tolist() for line in axes.lines[:3]]
    both = 100 * 3 / 11
    assert points == [pytest.approx(p) for p in ([8, both], [4, both], [4, 100 * 3 / 51])]
    assert texts(axes)[:3] == ["afab", "1f1b", "zb-v"]
    assert axes.lines[3].get_xdata()[0] == 4, "p"


def test_peaks_of_each_rank():
    panels = program_plots.peaks_by_rank(timelines()).axes
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    assert heights == [[8, 8, 8, 8], [4, 3, 2, 1], [4, 4, 4, 4]]
    assert [axes.get_title() for axes in panels] == ["afab", "1f1b", "zb-v"]
    assert texts(panels[1]) == ["4", "3", "2", "1"]


# ---- slices


def test_times_of_slices():
    """t(l, c) = l + c: what is drawn is in units of t(4, 0) = 4; the length between is left out."""
    points = [(l, c, float(l + c)) for l in (1, 2, 4) for c in (0, 2, 4)]
    axes = program_plots.slice_times(points, fit(points)).axes[0]
    marks = {line.get_label(): line.get_ydata().tolist() for line in axes.lines[::2]}
    assert marks == {"4 tokens": [1, 1.5, 2], "1 tokens": [0.25, 0.75, 1.25]}
    assert axes.lines[1].get_xdata().tolist() == [0, 1, 4]
    assert axes.lines[1].get_ydata().tolist() == pytest.approx([1, 1.25, 2])


def test_cuts_lie_end_to_end():
    axes = program_plots.cuts({"two": (6, 4), "three": (5, 3, 2)}).axes[0]
    assert bars(axes) == [(0, 6), (6, 4), (0, 5), (5, 3), (8, 2)]
    assert texts(axes) == ["6", "4", "5", "3", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["two", "three"]
    assert axes.get_xlim() == (0, 10)


def test_latency_is_relative_to_one_slice():
    axes = program_plots.latency({"K": [(1, 8.0), (2, 6.0)]}, {"K": (3, 4.0)}).axes[0]
    line, star = axes.lines
    assert line.get_xydata().tolist() == [[1, 1], [2, 0.75]]
    assert star.get_xydata().tolist() == [[3, 0.5]]


# ---- programs


def test_tasks_and_the_values_between_them(body):
    found = texts(program_plots.tasks(body).axes[0])
    boxes = {text.split("\n")[0]: text for text in found if "\n" in text}
    assert sorted(boxes) == ["BW0", "BW1", "F0", "F1"]
    assert "params.a, batch" in boxes["F0"] and "gives" not in boxes["F0"]
    assert "params.b" in boxes["F1"] and "params.b" in boxes["BW1"]
    passed = sorted(text for text in found if text and "\n" not in text)
    (forward,) = body.tasks["F", 0].makes
    (back,) = set(body.tasks["BW", 1].makes) & set(body.tasks["BW", 0].reads)
    (kept,) = set(body.tasks["F", 1].makes) & set(body.tasks["BW", 1].reads)
    assert passed == sorted([*[forward] * 3, kept, back])  # relu goes to F1, BW0 and BW1


def test_parts_of_backward_have_their_own_row(body):
    found = texts(program_plots.tasks(body, ("F", "B", "W")).axes[0])
    boxes = sorted(text.split("\n")[0] for text in found if "\n" in text)
    assert boxes == ["B1", "F0", "F1", "W0", "W1"], "nobody waits for B of stage 0"


def test_instructions_are_those_of_the_order(seen):
    program, reports = seen
    axes = program_plots.instructions(program).axes[0]
    steps = [what for _, what in program.order if isinstance(what, Run | Send)]
    expected = [
        f"{what.kind}\n{what.stage}.{what.microbatch}" if isinstance(what, Run) else f"{what.value}"
        for what in steps
    ]
    assert [text for text in texts(axes) if text] == expected
    assert len(axes.patches) == 2 * 2 * BATCHES, "F and BW of two stages"
    sent = sum(report.message_bytes for report in reports)
    assert sent == 2 * BATCHES * VALUE, "one message forward and one back of each micro-batch"
    assert axes.get_title("left") == f"afab: 8 tasks, 4 messages, {sent:,} bytes"


def test_lifetimes_reach_the_measured_peak(seen):
    program, reports = seen
    for actor in range(2):
        axes, below = program_plots.lifetimes(program, actor).axes
        held = below.lines[0].get_ydata()
        assert max(held) == reports[actor].peak.bytes and held[-1] == 0
        assert f"{reports[actor].peak.values} values" in axes.get_title("left")
        assert len(bars(axes)) == len(texts(axes)) == len(program_plots.spans(program.lists[actor]))


def test_spans_of_values(seen):
    """Actor 0 of AFAB: feeds 2 batches, keeps relu of both until its two backwards."""
    program, _ = seen
    items = program.lists[0]
    runs = {str(what): at for at, what in enumerate(items) if isinstance(what, Run)}
    found = {str(value): ends for value, ends in program_plots.spans(items).items()}
    for i in range(BATCHES):
        assert found[f"batch.{i}"] == (runs[f"F0.{i}"] - 1, runs[f"BW0.{i}"] + 1)
        assert found[f"relu.{i}"] == (runs[f"F0.{i}"], runs[f"BW0.{i}"] + 1)


# ---- plans


def choice(update, **parts):
    memory = Footprint(GIB, 2 * GIB, 0, 0, 0, 3 * GIB, GIB, update)
    return SimpleNamespace(
        memory=memory, time=SimpleNamespace(parts=parts, seconds=sum(parts.values()), mfu=0.25)
    )


def test_choices_beside_each_other():
    choices = {"one": choice(0, matmuls=3.0, bubble=1.0), "two": choice(6 * GIB, matmuls=2.0)}
    left, right = program_plots.weigh(choices, 5 * GIB).axes
    for axes, ends in ((left, [7, 9]), (right, [4, 2])):
        stacks = [bars(axes)[row::2] for row in range(2)]
        assert [max(x + width for x, width in stack) for stack in stacks] == ends
    names = left.get_legend_handles_labels()[1]
    assert names[1:] == ["update", "activations", "gradients", "parameters", "temporaries"]
    assert right.get_legend_handles_labels()[1] == ["matmuls", "bubble"]
    assert left.lines[0].get_xdata()[0] == 5, "the limit"
    assert texts(right) == [" 4 s, 25% MFU", " 2 s, 25% MFU"]


def test_speed_against_memory():
    candidate = SimpleNamespace(options=lambda: "--dp 2")
    best = [
        SimpleNamespace(
            memory=SimpleNamespace(peak=size * GIB), candidate=candidate,
            time=SimpleNamespace(tokens_per_second_per_rank=rate),
        )
        for size, rate in ((2, 10.0), (3, 20.0))
    ]  # fmt: skip
    axes = program_plots.speeds([(GIB, 5.0), (4 * GIB, 30.0)], best, 5 * GIB).axes[0]
    dots, line, *points, limit = axes.lines
    assert dots.get_xydata().tolist() == [[1, 5], [4, 30]]
    assert line.get_xydata().tolist() == [[2, 10], [3, 20]]
    assert limit.get_xdata()[0] == 5
    named = [point.get_label() for point in points]
    assert named == ["1: --dp 2", "2: --dp 2"]
    assert texts(axes) == ["1", "2"]
