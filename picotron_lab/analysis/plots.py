"""Pictures of schedules, as papers draw them: a row per rank, and below what each rank holds."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from picotron_lab.analysis.timeline import activations, metrics
from picotron_lab.schedules.actions import VOCABULARY, Action, Schedule, parts
from picotron_lab.schedules.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

Box = tuple[float, float, float, float]  # left, right, top, bottom
MEANINGS = {
    "F": "forward", "B": "backward for the input", "W": "backward for the weights",
    "BW": "backward", "S": "output layer S", "T": "output layer T",
    "IF": "input layer forward", "IB": "input layer backward",
}  # fmt: skip
COLOURS = {
    "F": "#a9cbee", "B": "#f6c177", "W": "#a8d8a0", "BW": "#f3ab83",
    "S": "#dcb3dc", "T": "#c08fc0", "IF": "#cfd6da", "IB": "#aab4ba",
}  # fmt: skip
CELL, WIDEST, NARROWEST, ROW, LABEL = 0.24, 30.0, 8.0, 0.34, 1.9  # inches
POINTS = 72  # per inch
SMALLEST, MOST = 5.0, 2500  # points of a number that can be read; numbers that take a few seconds


def draw(timeline: Timeline) -> "Figure":
    """The timeline as a figure: time to the right, rank 0 on top, micro-batch numbers in cells.

    Cells of a rank's later chunks are darker; the members of a pair share a cell's height; slice k
    of micro-batch i is i/k. Numbers are left out where they would be too small, or too many.
    """
    from matplotlib.figure import Figure

    schedule, makespan = timeline.schedule, timeline.makespan or 1.0
    cells = _cells(timeline)
    usual = sorted(right - left for left, right, *_ in cells)[len(cells) // 4]
    width = min(WIDEST, max(NARROWEST, CELL * makespan / (usual or makespan)))
    rows = ROW * schedule.ranks
    figure = Figure(figsize=(width + 1.2, rows + 3.6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(rows, 1.8))
    _fill(top, schedule, cells, width * POINTS / makespan)
    _explain(top, schedule, width)
    _hold(below, timeline)
    found = metrics(timeline)
    top.set_title(
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches, "
        f"makespan {makespan:g}\n"
        f"bubble {found.bubble_makespan:g} = {found.bubble_ratio:.1%} of the makespan; per stage "
        f"{found.bubble_stage:g} = {found.bubble_ratio_stage:.1%}",
        loc="left", fontsize=10,
    )  # fmt: skip
    below.set_xlim(0, makespan)
    below.set_xlabel("time, in units of the costs")
    return figure


def compare(timelines: Sequence[tuple[str, Timeline]]) -> "Figure":
    """Several steps under one another, each with a title, on one axis of time."""
    from matplotlib.figure import Figure

    longest = max(timeline.makespan for _, timeline in timelines)
    heights = [timeline.schedule.ranks for _, timeline in timelines]
    size = (9, 0.4 * sum(heights) + 0.7 * len(heights) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    for axes, (title, timeline) in zip(panels[:, 0], timelines, strict=True):
        _fill(axes, timeline.schedule, _cells(timeline), 8 * POINTS / longest)
        axes.axvline(timeline.makespan, color="black", linewidth=0.8)
        axes.set_title(f"{title}: {timeline.makespan:.4g}", loc="left", fontsize=9)
        axes.set_xlim(0, 1.01 * longest)
    axes.set_xlabel("time, in units of the costs")
    patches = _patches(timelines[-1][1].schedule)
    figure.legend(handles=patches, loc="outside lower left", frameon=False, fontsize=8, ncols=6)
    return figure


def save(timeline: Timeline, path: Path) -> None:
    """Draw the timeline into a file; its ending chooses the format, such as .png or .svg."""
    draw(timeline).savefig(path, dpi=110)


def _cells(timeline: Timeline) -> dict[Box, tuple[Action, int]]:
    """Box -> what is in it, and on which rank."""
    cells = {}
    for rank, items in enumerate(timeline.schedule.lists):
        times = zip(timeline.starts[rank], timeline.ends[rank], strict=True)
        for item, (start, end) in zip(items, times, strict=True):
            members = parts(item)
            for i, action in enumerate(members):
                low, high = rank + i / len(members), rank + (i + 1) / len(members)
                cells[start, end, low - 0.46, high - 0.54] = (action, rank)
    return cells


def _fill(axes: "Axes", schedule: Schedule, cells: dict, points: float) -> None:
    """Rows with coloured cells; points: of a unit of time in the picture."""
    from matplotlib.collections import PolyCollection

    boxes = defaultdict(list)
    for (left, right, low, high), (action, rank) in cells.items():
        corners = ((left, low), (right, low), (right, high), (left, high))
        boxes[_colour(schedule, action, rank)].append(corners)
        text = f"{action.microbatch}" + (f"/{action.slice}" if schedule.slices > 1 else "")
        size = min(8.0, 1.5 * (right - left) * points / (len(text) + 0.4))
        if size >= SMALLEST and len(cells) <= MOST:
            middle = ((left + right) / 2, (low + high) / 2)
            number = axes.text(*middle, text, ha="center", va="center_baseline", fontsize=size)
            number.set_in_layout(False)  # it is inside the axes: no need to measure it
    for colour, corners in boxes.items():
        axes.add_collection(
            PolyCollection(corners, facecolors=colour, edgecolors="white", linewidths=0.5)
        )
    axes.set_ylim(schedule.ranks - 0.4, -0.6)
    axes.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#f4f4f4")


def _explain(axes: "Axes", schedule: Schedule, width: float) -> None:
    """What the colours mean, in as many columns as fit the width (inches)."""
    shown = _patches(schedule)
    axes.legend(
        handles=shown, loc="upper left", bbox_to_anchor=(0, 0), frameon=False, fontsize=8,
        ncols=min(len(shown), int(width / LABEL)), columnspacing=1.2,
    )  # fmt: skip


def _patches(schedule: Schedule) -> list["Patch"]:
    """A sample of each colour, with its meaning."""
    from matplotlib.patches import Patch

    kinds = {action.kind for items in schedule.lists for item in items for action in parts(item)}
    shown = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in COLOURS if kind in kinds]
    if len(schedule.placement[0]) > 1:
        darker = "second direction" if schedule.replicated else "later stages of a rank"
        shown.append(Patch(color="#888888", label=f"darker: {darker}"))
    return shown


def _colour(schedule: Schedule, action: Action, rank: int) -> tuple[float, ...]:
    """Of its kind, darker for later chunks of the rank."""
    from matplotlib.colors import to_rgb

    stages = schedule.placement[rank]
    chunk = 0 if action.kind in VOCABULARY else stages.index(action.stage)
    light = 1 - 0.25 * chunk / max(1, len(stages) - 1)
    return tuple(light * part for part in to_rgb(COLOURS[action.kind]))


def _hold(axes: "Axes", timeline: Timeline) -> None:
    """Activations over time, a line for each rank."""
    from matplotlib import colormaps

    ranks = timeline.schedule.ranks
    for rank in range(ranks):
        times, held = zip(*activations(timeline, rank), strict=True)
        colour = colormaps["viridis"](0.85 * rank / max(1, ranks - 1))
        label = f"rank {rank}, peak {max(held):g}"
        thick = 3.0 - 1.9 * rank / max(1, ranks - 1)  # so that equal curves can be told apart
        axes.step(times, held, where="post", color=colour, linewidth=thick, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=timeline.schedule.slices == 1)
    axes.set_ylabel("activations\n(held until W)")
    axes.spines[["top", "right"]].set_visible(False)
    if ranks <= 16:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7)
