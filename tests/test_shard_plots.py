"""Pictures of shards, turns and shares show what they are given."""

import pytest
import torch

from picotron_lab.analysis import shard_plots
from picotron_lab.analysis.shard_plots import Held, Lines, Span

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

WHOLE = torch.arange(12, dtype=torch.float64).view(3, 4) ** 2


def texts(axes):
    return [text.get_text() for text in axes.texts]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


# ---- who holds what


def test_a_part_is_found_by_its_values():
    assert shard_plots.place(WHOLE[1:3, 2:4], WHOLE) == ((1, 3), (2, 4))
    assert shard_plots.place(WHOLE, WHOLE) == ((0, 3), (0, 4))
    assert shard_plots.place(WHOLE[:2] + 1e-3, WHOLE) is None


def test_parts_replicas_and_terms():
    rows, left = (WHOLE[:1], WHOLE[1:]), WHOLE[:, :2]
    held = shard_plots.found("x", ("T", "D"), rows, WHOLE)
    assert held == Held("x", (3, 4), ("T", "D"), (((0, 1), (0, 4)), ((1, 3), (0, 4))))
    assert shard_plots.found("x", ("T", "D"), (left, left), WHOLE).parts == (((0, 3), (0, 2)),) * 2
    terms = 0.25 * WHOLE, 0.75 * WHOLE
    assert shard_plots.found("x", ("T", "D"), terms, WHOLE).parts == (None, None)
    terms = WHOLE, torch.zeros_like(WHOLE)  # one term may happen to look like the whole
    assert shard_plots.found("x", ("T", "D"), terms, WHOLE).parts[1] is None


@pytest.mark.parametrize("parts", [(WHOLE, 2 * WHOLE), (2 * WHOLE[:1], WHOLE[1:])])
def test_what_is_neither_part_nor_term_is_refused(parts):
    with pytest.raises(AssertionError, match="2 ranks have of 'x' is neither part of it nor adds"):
        shard_plots.found("x", ("T", "D"), parts, WHOLE)


def test_fields_of_a_tensor():
    """Rows [0, 1) on rank 0, [1, 3) on ranks 1 and 2; one on all ranks; one in terms."""
    top, rest = ((0, 1), (0, 4)), ((1, 3), (0, 4))
    tensors = [
        Held("cut", (3, 4), ("T", "D"), (top, rest, rest)),
        Held("whole", (3, 4), ("T", "D"), (((0, 3), (0, 4)),) * 3),
        Held("sum", (3, 4), ("T", "D"), (None,) * 3),
    ]
    cut, whole, term, empty = shard_plots.holdings(tensors, "parts", columns=2).axes
    boxes = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in cut.patches]
    assert boxes == [(0, 0, 4, 1), (0, 1, 4, 2)] and texts(cut) == ["0", "1, 2"]
    assert texts(whole) == ["all ranks"] and texts(term) == ["a term of it\non every rank"]
    assert term.patches[0].get_hatch() and not cut.patches[0].get_hatch()
    assert [p.get_facecolor() for p in cut.patches] == [*map(to_rgba, shard_plots.COLOURS[:2])]
    assert (cut.get_xlabel(), cut.get_ylabel(), cut.get_title()) == ("D = 4", "T = 3", "cut")
    assert not empty.axison


# ---- who works when


def test_turns_of_ranks():
    """Two ranks, 4 long: one computes 1 + 2, the other 1; a span of no length is not drawn."""
    ranks = [[Span(0, 1, 0, "a"), Span(2, 4, 1, "b")], [Span(0, 1, 1, "c"), Span(3, 3, 0, "d")]]
    longer, shorter = shard_plots.turns({"one": ranks, "two": [ranks[1]]}, "steps").axes
    boxes = [(bar.get_x(), bar.get_width()) for bar in longer.patches if type(bar) is Rectangle]
    assert boxes == [(0, 1), (2, 2), (0, 1)] and texts(longer) == ["a", "b", "c"]
    assert longer.get_title("left") == "one: done after 4, ranks compute 50% of that time"
    assert shorter.get_title("left").startswith("two: done after 3, ranks compute 33%")
    assert shorter.get_xlabel() == "time (steps)" and longer.get_xlim() == shorter.get_xlim()


def test_who_computes_which_score():
    """Rank 0 has queries 0 and 1, rank 1 has 2: of a causal square it computes 3 of 6 each."""
    rows = [[(0, 0), None, None], [(0, 0), (0, 0), None], [(1, 1), (1, 1), (1, 0)]]
    (axes,) = shard_plots.score_map({"way": rows}).axes
    assert axes.get_title() == "way: 3, 3 scores of ranks 0, 1, ..."
    assert texts(axes) == ["0", "0", "0", "1", "1", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 to 1: rank 0", "2: rank 1"]
    shown = axes.images[0].get_array()
    assert shown[2][0].tolist() == pytest.approx(to_rgba(shard_plots.COLOURS[1])[:3])
    assert shown[0][2].tolist() == [1, 1, 1]


# ---- parts of a softmax, rows of experts, lines


def test_weights_step_by_step():
    steps = {"first": [0, 0, 0.5, 0.5], "last": [0.1, 0.2, 0.3, 0.4]}
    figure = shard_plots.merging(steps, [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])
    assert [heights(axes) for axes in figure.axes] == list(steps.values())
    for axes in figure.axes:
        assert [line[0][1] for line in axes.collections[0].get_segments()] == steps["last"]
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert len(set(colours[:2])) == len(set(colours[2:])) == 1 and colours[0] != colours[2]


def test_rows_of_experts():
    above, below = shard_plots.routing([[1, 2, 3], [4, 0, 2]], [0, 0, 1], "rows").axes
    assert heights(above) == [5, 2, 5] and above.lines[0].get_ydata()[0] == 4
    assert "mean\n4" in texts(above) and texts(below) == ["1", "2", "3", "4", "0", "2"]
    assert [line.get_xdata()[0] for line in below.lines] == [1.5], "between the ranks' experts"
    names = [label.get_text() for label in below.get_xticklabels()]
    assert names == ["0\non rank 0", "1\non rank 0", "2\non rank 1"]


@pytest.mark.parametrize("marks", [True, False])
def test_curves_and_a_level(marks):
    lines = {"a": [(0, 1), (1, 3)], "b": [(0, 2), (1, 0)]}
    figure = shard_plots.curves(lines, Lines("title", "x", "y"), (1.5, "level"), marks)
    (axes,) = figure.axes
    first, second, level = axes.lines
    assert [line.get_xydata().tolist() for line in (first, second)] == [
        [[0, 1], [1, 3]], [[0, 2], [1, 0]]
    ]  # fmt: skip
    assert level.get_ydata()[0] == 1.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "level"]
    assert (axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()) == ("title", "x", "y")
    told = [(line.get_marker(), line.get_linestyle()) for line in (first, second)]
    assert told[0] != told[1], "also without colours"


def test_too_many_lines_are_refused():
    lines = {str(i): [(0, i)] for i in range(7)}
    with pytest.raises(AssertionError, match="7 lines cannot be told apart: draw 6 at most"):
        shard_plots.curves(lines, Lines("title", "x", "y"))


def test_predicted_and_published_by_vocabulary():
    points = [(32_000, 40.0, 41.0), (64_000, 30.0, 33.0)]
    (axes,) = shard_plots.by_vocabulary({"way": points}, Lines("title", "words", "%")).axes
    predicted, published = axes.lines
    assert predicted.get_label() == "way: predicted" and published.get_label() == "way: published"
    assert predicted.get_xydata().tolist() == [[32_000, 40], [64_000, 30]]
    assert published.get_xydata().tolist() == [[32_000, 41], [64_000, 33]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32k", "64k"]
    assert published.get_fillstyle() == "none" and axes.get_ylim()[0] == 0
