"""Pictures of who holds what, who works when, and who gets how much; the notebooks show them.

Held      a rectangle is a whole tensor, a field of it what a rank holds; `place` finds the field by
          its values, so that a picture shows what a rank has, and not what it should have
Times     of ranks, in whatever unit the caller counts, such as that of a virtual clock
Colours   of Okabe and Ito, which the colour-blind can tell apart, one for each rank; numbers in the
          fields, marks and hatches say the same without colours
Tests     tests/test_shard_plots.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (  # of ranks: Okabe and Ito, the lighter ones first
    "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#999999",
)  # fmt: skip
LINES, MARKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000"), "osD^vP"
SHARED, TERM = "#e8e8e8", "#ffffff"
Box = tuple[tuple[int, int], tuple[int, int]]  # (first, last + 1) of rows, and of columns


# ---- who holds what


@dataclass(frozen=True)
class Held:
    """A tensor of two dims, and the part of it that each rank holds; None: a term of a sum.

    shape, dims   of the whole: sizes, and how to call them
    """

    name: str
    shape: tuple[int, int]
    dims: tuple[str, str]
    parts: tuple[Box | None, ...]


def place(part: Tensor, whole: Tensor) -> Box | None:
    """Where in `whole` [rows, columns] these values stand, the first such place; None: nowhere."""
    (rows, columns), (height, width) = whole.shape, part.shape
    for top in range(rows - height + 1):
        for left in range(columns - width + 1):
            if torch.allclose(whole[top : top + height, left : left + width], part):
                return (top, top + height), (left, left + width)
    return None


def found(name: str, dims: tuple[str, str], parts: Sequence[Tensor], whole: Tensor) -> Held:
    """What ranks have of a tensor [rows, columns] of one device, compared value by value.

    AssertionError if they are neither parts of it nor terms that add up to it.
    """
    places = tuple(place(part, whole) for part in parts)
    if None in places:
        places = (None,) * len(parts)
        shapes = {part.shape for part in parts}
        assert shapes == {whole.shape} and torch.allclose(sum(parts), whole), (
            f"what {len(parts)} ranks have of '{name}' is neither part of it nor adds up to it: "
            f"give tensors of the same weights and tokens, in float64."
        )
    return Held(name, tuple(whole.shape), dims, places)


def holdings(tensors: Sequence[Held], title: str, columns: int = 4) -> "Figure":
    """A panel for each tensor: who holds which field of it. The number in a field is its rank's."""
    from matplotlib.figure import Figure

    columns = min(columns, len(tensors))
    rows = -(-len(tensors) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.2, 2.15 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, held in zip(panels, tensors, strict=False):
        _fields(axes, held)
    for axes in panels[len(tensors) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    return figure


def _fields(axes: "Axes", held: Held) -> None:
    """The whole as a frame, and in it a field for each part, with the ranks that hold it."""
    from matplotlib.patches import Rectangle

    height, width = held.shape
    whole = (0, height), (0, width)
    ranks = len(held.parts)
    for part in dict.fromkeys(held.parts):
        holders = [rank for rank in range(ranks) if held.parts[rank] == part]
        (top, bottom), (left, right) = part or whole
        colour, text = COLOURS[holders[0]], ", ".join(map(str, holders))
        if len(holders) == ranks and ranks > 1:
            colour, text = SHARED, "all ranks"
        if part is None:
            colour, text = TERM, "a term of it\non every rank"
        axes.add_patch(Rectangle(
            (left, top), right - left, bottom - top, facecolor=colour, edgecolor="black",
            hatch="" if part else "////", linewidth=0.8, alpha=None if part else 0.35,
        ))  # fmt: skip
        label = axes.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center")
        if part is None:
            label.set_bbox({"facecolor": TERM, "edgecolor": "none", "pad": 2})
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{held.dims[1]} = {width}", fontsize=9)
    axes.set_ylabel(f"{held.dims[0]} = {height}", fontsize=9)
    axes.set_title(held.name, fontsize=10)


# ---- who works when


class Span(NamedTuple):
    """A rank computes from `start` to `end`; `group` chooses the colour, `label` is written."""

    start: float
    end: float
    group: int
    label: str


def turns(panels: Mapping[str, Sequence[Sequence[Span]]], unit: str) -> "Figure":
    """When ranks compute: a panel for each run by its name, a row for each rank; what is empty, it
    waits. Titles say when the last rank is done and how much of the time all of them computed.

    unit   of time
    """
    from matplotlib.figure import Figure

    ends = {name: max(s.end for spans in ranks for s in spans) for name, ranks in panels.items()}
    heights = [len(ranks) for ranks in panels.values()]
    size = (9, 0.3 * sum(heights) + 0.55 * len(heights) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, ranks) in zip(every, panels.items(), strict=True):
        for rank, spans in enumerate(ranks):
            _row(axes, rank, [span for span in spans if span.end > span.start])
        busy = sum(span.end - span.start for spans in ranks for span in spans)
        share = busy / (ends[name] * len(ranks))
        title = f"{name}: done after {ends[name]:.3g}, ranks compute {share:.0%} of that time"
        axes.set_title(title, loc="left", fontsize=10)
        axes.axvline(ends[name], color="black", linewidth=0.8)
        axes.set_ylim(len(ranks) - 0.45, -0.55)
        axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        axes.set_facecolor("#f4f4f4")
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)
    every[-1].set_xlim(0, 1.01 * max(ends.values()))
    every[-1].set_xlabel(f"time ({unit})")
    return figure


def _row(axes: "Axes", rank: int, spans: Sequence[Span]) -> None:
    """The boxes of one rank, with their labels."""
    starts, widths = [span.start for span in spans], [span.end - span.start for span in spans]
    colours = [COLOURS[span.group % len(COLOURS)] for span in spans]
    axes.barh(
        [rank] * len(spans), widths, 0.86, starts, color=colours, edgecolor="black", linewidth=0.6
    )
    for span in spans:
        middle = (span.start + span.end) / 2
        axes.text(middle, rank, span.label, ha="center", va="center_baseline", fontsize=8)


def score_map(maps: Mapping[str, Sequence[Sequence[tuple[int, int] | None]]]) -> "Figure":
    """Which rank computes which score, and in which step: a panel for each way by its name.

    maps   [queries][keys] of (rank, step), the step is the number in the cell; None: hidden
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(5.1 * len(maps), 4.9), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, maps.items(), strict=True):
        white = to_rgb(TERM)
        axes.imshow([[to_rgb(COLOURS[cell[0]]) if cell else white for cell in r] for r in rows])
        cells = [(i, j, cell) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell]
        for i, j, (_, step) in cells:
            axes.text(j, i, str(step), ha="center", va="center", fontsize=7)
        counts = [sum(cell[0] == rank for *_, cell in cells) for rank in _ranks(rows)]
        axes.set_title(f"{name}: {', '.join(map(str, counts))} scores of ranks 0, 1, ...")
        axes.set_xlabel("position of the key")
        axes.set_xticks(range(0, len(rows), 4))
        _owners(axes, [next(cell[0] for cell in row if cell) for row in rows])
    panels[0].set_ylabel("positions of the queries")
    ranks = _ranks(next(iter(maps.values())))
    patches = [Patch(facecolor=COLOURS[r], edgecolor="black", label=f"rank {r}") for r in ranks]
    figure.legend(handles=patches, loc="outside lower center", frameon=False, ncols=len(ranks))
    return figure


def _owners(axes: "Axes", ranks: Sequence[int]) -> None:
    """Beside the rows of a picture, whose they are: neighbours of one rank together."""
    runs = [(rank, list(run)) for rank, run in groupby(range(len(ranks)), ranks.__getitem__)]
    names = [f"{f'{run[0]} to {run[-1]}' if run[1:] else run[0]}: rank {r}" for r, run in runs]
    axes.set_yticks([(run[0] + run[-1]) / 2 for _, run in runs], names)


def _ranks(rows: Sequence[Sequence[tuple[int, int] | None]]) -> list[int]:
    return sorted({cell[0] for row in rows for cell in row if cell})


# ---- how parts become a whole


def merging(
    steps: Mapping[str, Sequence[float]], owners: Sequence[int], whole: Sequence[float]
) -> "Figure":
    """The softmax of one query as blocks of keys come by: a panel for each step by its name.

    steps    weights of all keys after a step, 0 for those that have not come
    owners   the rank that holds each key
    whole    weights of the softmax over all keys at once: black lines
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.5 * len(steps) + 0.4, 3.1), layout="constrained")
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    places = range(len(owners))
    for axes, (name, weights) in zip(panels, steps.items(), strict=True):
        colours = [COLOURS[rank] for rank in owners]
        axes.bar(places, weights, 0.9, color=colours, edgecolor="black", linewidth=0.4)
        axes.hlines(whole, [i - 0.45 for i in places], [i + 0.45 for i in places], color="black")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("position of the key")
        axes.set_xticks(range(0, len(owners), 4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight in the softmax")
    shown = [Patch(facecolor=COLOURS[r], edgecolor="black", label=f"keys of rank {r}")
             for r in sorted(set(owners))]  # fmt: skip
    figure.legend(handles=shown, loc="outside lower center", frameon=False, ncols=len(shown))
    return figure


# ---- who gets how much


def routing(counts: Sequence[Sequence[int]], homes: Sequence[int], title: str) -> "Figure":
    """Rows that ranks send to experts: above what each expert gets from all, with the mean; below
    where it comes from.

    counts   [ranks][experts]      homes   the rank of each expert
    """
    from matplotlib.figure import Figure

    experts, totals = range(len(homes)), [sum(column) for column in zip(*counts, strict=True)]
    size = (max(6.0, 0.62 * len(homes) + 1.6), 0.36 * len(counts) + 2.6)
    figure = Figure(figsize=size, layout="constrained")
    ratios = (1.6, 0.36 * len(counts))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    colours = [COLOURS[home] for home in homes]
    bars = above.bar(experts, totals, 0.8, color=colours, edgecolor="black", linewidth=0.6)
    above.bar_label(bars, totals, fontsize=8)
    mean = sum(totals) / len(totals)
    above.axhline(mean, color="black", linestyle="--", linewidth=1)
    above.text(len(homes) - 0.45, mean, f"mean\n{mean:g}", va="center", fontsize=8)
    above.set_ylim(0, 1.15 * max(totals))
    above.set_ylabel("rows")
    above.spines[["top", "right"]].set_visible(False)
    above.set_title(title, loc="left", fontsize=10)
    most = max(max(row) for row in counts)
    below.imshow(counts, cmap="Greys", vmin=0, vmax=1.6 * most, aspect="auto")
    for rank, row in enumerate(counts):
        for expert, number in enumerate(row):
            below.text(expert, rank, str(number), ha="center", va="center", fontsize=8)
    for expert in experts[1:]:
        if homes[expert] != homes[expert - 1]:
            below.axvline(expert - 0.5, color="black", linewidth=1.5)
    below.set_yticks(range(len(counts)), [f"of rank {rank}" for rank in range(len(counts))])
    below.set_xticks(experts, [f"{e}\non rank {homes[e]}" for e in experts], fontsize=8)
    below.set_xlabel("expert")
    return figure


class Lines(NamedTuple):
    """What `curves` says around its lines."""

    title: str
    x: str
    y: str


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    said: Lines,
    level: tuple[float, str] | None = None,
    marks: bool = True,
) -> "Figure":
    """A line for each name through its points (x, y), and one at a level (y, its name).

    marks   whether points are marked; lines without marks are told apart by dashes
    """
    from matplotlib.figure import Figure

    assert len(lines) <= len(LINES), (
        f"{len(lines)} lines cannot be told apart: draw {len(LINES)} at most in one picture."
    )
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    dashes = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
    for i, (name, points) in enumerate(lines.items()):
        style = {"marker": MARKS[i]} if marks else {"linestyle": dashes[i]}
        axes.plot(*zip(*points, strict=True), color=LINES[i], label=name, **style)
    if level is not None:
        axes.axhline(level[0], color="0.5", linewidth=1, linestyle=(0, (1, 3)), label=level[1])
    axes.set_xlabel(said.x)
    axes.set_ylabel(said.y)
    axes.set_title(said.title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def by_vocabulary(lines: Mapping[str, Sequence[tuple[int, float, float]]], said: Lines) -> "Figure":
    """Over the number of words: a line for each name through (words, predicted, published); filled
    marks predicted, open ones published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        words, predicted, published = zip(*points, strict=True)
        style = {"color": LINES[i], "marker": MARKS[i]}
        axes.plot(words, predicted, label=f"{name}: predicted", **style)
        axes.plot(
            words, published, label=f"{name}: published", linestyle="--", fillstyle="none",
            markeredgewidth=1.6, **style,
        )  # fmt: skip
    every = sorted({words for points in lines.values() for words, *_ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [f"{words // 1000}k" for words in every])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(said.x)
    axes.set_ylabel(said.y)
    axes.set_title(said.title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
