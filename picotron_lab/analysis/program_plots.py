"""Pictures of programs and plans: tasks, messages and lifetimes; slices; what a choice costs.

Schedules   bubble against memory, and the peak of every rank, as simulated
Slices      how long they take, where a sequence is cut, latency over their number
Programs    the tasks of a recorded step, the instructions of actors, how long values live
Plans       memory and time of some choices beside each other, by their parts
Colours     of Okabe and Ito; hatches, marks and labels tell the same in grey
Tests       tests/test_program_plots.py
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from picotron_lab.analysis.planner import GIB, Choice
from picotron_lab.analysis.timeline import metrics
from picotron_lab.mpmd_program import STEP, Feed, Free, Instruction, Program, Recv, Run, Send, Value
from picotron_lab.mpmd_trace import Body
from picotron_lab.schedules.simulate import Timeline
from picotron_lab.token_times import Fit, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#d55e00", "#ffffff",
    "#999999", "#000000",
)  # fmt: skip
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "", "///", "|||", "---", "")
MARKS = "osD^vP"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")
FORWARD, BACKWARD = "#56b4e9", "#e69f00"
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}
EDGE = {"edgecolor": "black", "linewidth": 0.5}


# ---- schedules


def tradeoff(timelines: Mapping[str, Timeline]) -> "Figure":
    """Bubble against memory: a point with its name for each simulated step, all of equally many
    ranks; memory of the rank that holds most, in micro-batches of 1/ranks of the model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    places = {
        name: (max(_peaks(timeline)), 100 * metrics(timeline).bubble_ratio)
        for name, timeline in timelines.items()
    }
    for (name, (x, y)), mark in zip(places.items(), 2 * MARKS, strict=False):
        axes.plot(x, y, mark, color=LINES[0], markersize=8)
        close = [a for a, b in places.values() if 0 < a - x <= 1 and abs(b - y) < 1]
        place = {"xytext": (-7, 4), "ha": "right"} if close else {"xytext": (7, 4)}
        axes.annotate(name, (x, y), textcoords="offset points", fontsize=9, **place)
    schedule = next(iter(timelines.values())).schedule
    axes.axvline(schedule.ranks, color="0.5", linestyle=":")
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.text(schedule.ranks, axes.get_ylim()[1], f" p = {schedule.ranks}", va="top", color="0.3")
    axes.set_xlabel("activations of the rank that holds most (micro-batches in 1/p of the model)")
    axes.set_ylabel("bubble (% of the makespan)")
    axes.spines[["top", "right"]].set_visible(False)
    told = f"{schedule.ranks} ranks, {schedule.microbatches} micro-batches, simulated; "
    axes.set_title(f"{told}best is below, on the left", loc="left", fontsize=10)
    return figure


def peaks_by_rank(timelines: Mapping[str, Timeline]) -> "Figure":
    """Most activations that each rank holds: a panel for each simulated step, a bar for each rank,
    in micro-batches of 1/ranks of the model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.7 * len(timelines) + 0.6, 3.0), layout="constrained")
    panels = figure.subplots(1, len(timelines), sharey=True, squeeze=False)[0]
    for axes, (name, timeline) in zip(panels, timelines.items(), strict=True):
        held = _peaks(timeline)
        bars = axes.bar(range(len(held)), held, color=FORWARD, **EDGE)
        axes.bar_label(bars, [f"{size:g}" for size in held], fontsize=8)
        axes.axhline(len(held), color="black", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(held)))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("rank")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("most activations\n(micro-batches in 1/p of the model)")
    figure.suptitle(f"Memory by rank; dotted: p = {timeline.schedule.ranks}", fontsize=10)
    return figure


def _peaks(timeline: Timeline) -> list[float]:
    """Of each rank, in micro-batches of 1/p of the model: a stage is 1/v of that."""
    per_rank = timeline.schedule.stages / timeline.schedule.ranks
    return [size / per_rank for size in metrics(timeline).peak_until_W]


# ---- slices of sequences


def slice_times(points: Sequence[Point], fit: Fit) -> "Figure":
    """Measured times of slices (marks) and the fit through them (lines), over tokens before them,
    of every second length; times in that of the longest slice."""
    from matplotlib.figure import Figure

    lengths = sorted({length for length, _, _ in points}, reverse=True)[::2]
    whole = fit(lengths[0], 0)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for length, colour, mark in zip(lengths, LINES, MARKS, strict=False):
        mine = [(c, seconds / whole) for l, c, seconds in points if l == length]
        ends = [c for c in (0, 1, max(mine)[0]) if c <= max(mine)[0]]
        axes.plot(*zip(*mine, strict=True), mark, color=colour, label=f"{length:,} tokens")
        axes.plot(ends, [fit(length, c) / whole for c in ends], color=colour, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens before the slice")
    axes.set_ylabel(f"time (of {lengths[0]:,} tokens alone: 1)")
    axes.set_title("Time of a slice: measured (marks), fitted (lines)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="slice of", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def cuts(lengths: Mapping[str, Sequence[int]]) -> "Figure":
    """Where a sequence is cut: a row for each name, a box for each slice, with its tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(lengths) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    total = max(map(sum, lengths.values()))
    for row, slices in enumerate(lengths.values()):
        left = 0
        for number, size in enumerate(slices):
            axes.barh(row, size, left=left, color=(FORWARD, "white")[number % 2], **EDGE)
            if size > 0.035 * total:
                middle = left + size / 2, row
                axes.text(*middle, f"{size}", ha="center", va="center", fontsize=8)
            left += size
    axes.set_yticks(range(len(lengths)), [*lengths])
    axes.invert_yaxis()
    axes.set_xlim(0, total)
    axes.set_xlabel("tokens of the sequence, from its start")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def latency(
    equal: Mapping[str, Sequence[tuple[int, float]]], best: Mapping[str, tuple[int, float]]
) -> "Figure":
    """Latency over the number of slices: a line for each name for `equal` slices, a star for the
    best ones; each line in units of its first point.

    both   (slices, latency), latency in any unit
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, line), colour, mark in zip(equal.items(), LINES, MARKS, strict=False):
        numbers, times = zip(*line, strict=True)
        shares = [time / times[0] for time in times]
        axes.plot(numbers, shares, marker=mark, color=colour, label=f"{name}, equal slices")
        many, least = best[name]
        style = {"color": colour, "markersize": 15, "markeredgecolor": "black"}
        axes.plot(many, least / times[0], "*", label=f"{name}, best slices", **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slices of a sequence")
    axes.set_ylabel(f"latency ({numbers[0]} slice: 1)")
    axes.set_title("Thin slices fill a pipeline fast, and cost more", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---- programs of actors


def tasks(body: Body, kinds: Sequence[str] = ("F", "BW")) -> "Figure":
    """The tasks of a recorded step: a column for each stage, a row for each of `kinds`, an arrow
    with its name for each value that one makes and another reads; leaves of parameters and batch
    stand in the task that reads them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * body.stages, 1.5 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    shown = {key: task for key, task in body.tasks.items() if key[0] in kinds and task.makes}
    makers = {name: key for key, task in shown.items() for name in task.makes}
    for (kind, stage), task in shown.items():
        given = [name for name in task.reads if name not in makers]
        kept = [name for name in task.makes if not _readers(shown, name)]
        lines = [f"{kind}{stage}", f"reads {', '.join(given) or 'nothing else'}"]
        lines += [f"gives {', '.join(kept)}"] if kept else []
        box = {"boxstyle": "round", "facecolor": FORWARD if kind == "F" else BACKWARD}
        place = stage, kinds.index(kind)
        axes.text(*place, "\n".join(lines), ha="center", va="center", bbox=box, zorder=5)
    for pair, names in _edges(shown, makers).items():
        ends = [(stage, kinds.index(kind)) for kind, stage in pair]
        _arrow(axes, *ends, ", ".join(names))
    axes.set_xlim(-0.5, body.stages - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_axis_off()
    axes.set_title("Tasks of a step, and the values that pass between them", fontsize=10)
    return figure


def _readers(shown: Mapping, name: str) -> list:
    return [key for key, task in shown.items() if name in task.reads]


def _edges(shown: Mapping, makers: Mapping) -> dict[tuple, list[str]]:
    """(task that makes, task that reads) -> names of the values."""
    found: dict[tuple, list[str]] = defaultdict(list)
    for name, maker in makers.items():
        for reader in _readers(shown, name):
            found[maker, reader].append(name)
    return found


def _arrow(axes: "Axes", begin: tuple, end: tuple, text: str) -> None:
    """From box to box, with a name on it."""
    style = {"arrowstyle": "-|>", "shrinkA": 30, "shrinkB": 44, "color": "black"}
    if begin[0] == end[0]:
        style["shrinkB"] = 26
    axes.annotate("", end, begin, arrowprops=style)
    slanted = begin[0] != end[0] and begin[1] != end[1]
    share = 0.35 if slanted else 0.5  # where two cross, their names do not meet
    middle = [a + share * (b - a) for a, b in zip(begin, end, strict=True)]
    axes.text(*middle, text, ha="center", va="center", fontsize=9, bbox=PLAIN)


def instructions(program: Program) -> "Figure":
    """What actors do, in the program's one order: a row for each actor, a box for each task, an
    arrow with its value for each message. Feeds, sums and frees are left out."""
    from matplotlib.figure import Figure

    steps = [pair for pair in program.order if isinstance(pair[1], Run | Send)]
    actors = program.schedule.ranks
    figure = Figure((0.33 * len(steps) + 1.0, 1.1 * actors + 0.9), layout="constrained")
    axes = figure.add_subplot()
    for at, (actor, what) in enumerate(steps):
        if isinstance(what, Run):
            colour = FORWARD if what.kind == "F" else BACKWARD
            axes.barh(actor, 1.1, 0.42, left=at - 0.55, color=colour, **EDGE)
            text = f"{what.kind}\n{what.stage}.{what.microbatch}"
            axes.text(at, actor, text, ha="center", va="center", fontsize=7.5)
        else:
            style = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (at, what.to), (at, actor), arrowprops=style)
            place, style = (at - 0.08, (actor + what.to) / 2), {"rotation": 90, "fontsize": 7.5}
            axes.text(*place, str(what.value), ha="right", va="center", **style)
    axes.set_xlim(-0.8, len(steps) - 0.2)
    axes.set_ylim(actors - 0.6, -0.4)
    axes.set_yticks(range(actors), [f"actor {actor}" for actor in range(actors)])
    axes.set_xticks([])
    axes.set_xlabel("one order of all tasks and messages")
    sent = f"{program.transfers} messages, {program.transfer_bytes:,} bytes"
    told = f"{program.schedule.name}: {len(steps) - program.transfers} tasks, {sent}"
    axes.set_title(told, loc="left", fontsize=10)
    axes.spines[:].set_visible(False)
    return figure


def lifetimes(program: Program, actor: int) -> "Figure":
    """Values of micro-batches on an actor, from the instruction that brings each to the one that
    frees it, and below the bytes of all that it holds."""
    from matplotlib.figure import Figure

    items = program.lists[actor]
    lives = spans(items)
    tall = 0.17 * len(lives) + 0.4
    figure = Figure(figsize=(9, tall + 2.2), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(tall, 1.2))
    _lives(axes, lives)
    moments = range(len(items) + 1)
    alive = [[value.name for value, (a, b) in lives.items() if a <= t < b] for t in moments]
    held = [sum(program.sizes[name] for name in names) for names in alive]
    below.step(moments, held, where="post", color="black")
    below.set_ylim(bottom=0)
    below.set_ylabel("bytes held")
    runs = {at: str(what) for at, what in enumerate(items) if isinstance(what, Run)}
    below.set_xticks([*runs], [*runs.values()], rotation=90, fontsize=7)
    below.set_xlim(-0.09 * len(items), len(items))
    below.set_xlabel("instructions of the actor, in order; its tasks are named")
    most = program.peak[actor]
    told = f"{program.schedule.name}, actor {actor}: at most {most.values} values, "
    axes.set_title(f"{told}{most.bytes:,} bytes", loc="left", fontsize=10)
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
    return figure


def _lives(axes: "Axes", lives: Mapping[Value, tuple[int, int]]) -> None:
    """A bar for each value; those of one name look alike."""
    names = list(dict.fromkeys(value.name for value in lives))
    for row, (value, (begin, end)) in enumerate(lives.items()):
        style = names.index(value.name) % len(COLOURS)
        fill = {"color": COLOURS[style], "hatch": HATCHES[style]}
        axes.barh(row, end - begin, 0.8, left=begin, **fill, **EDGE)
        axes.text(begin - 0.3, row, str(value), ha="right", va="center", fontsize=7)
    axes.set_ylim(len(lives) - 0.3, -0.7)
    axes.set_yticks([])


def spans(items: Sequence[Instruction]) -> dict[Value, tuple[int, int]]:
    """Of each value of a micro-batch the places in an actor's list that bring it and free it."""
    begins: dict[Value, int] = {}
    found: dict[Value, tuple[int, int]] = {}
    for at, what in enumerate(items):
        if isinstance(what, Free):
            found |= {value: (begins[value], at) for value in what.values if value in begins}
        brings = what.makes if isinstance(what, Run) else ()
        brings = (what.value,) if isinstance(what, Feed | Recv) else brings
        begins |= {value: at for value in brings if value.microbatch != STEP}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


# ---- plans


def weigh(choices: Mapping[str, Choice], limit: float) -> "Figure":
    """Memory of a GPU and time of a step, by their parts: a bar in each panel for each name.

    limit   bytes that a GPU can hold, a line
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.42 * len(choices) + 2.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _stack(left, [_held(one) for one in choices.values()])
    _stack(right, [one.time.parts for one in choices.values()])
    left.axvline(limit / GIB, color="black", linestyle="--", label="limit")
    left.set_yticks(range(len(choices)), [*choices])
    left.invert_yaxis()
    left.set_xlabel("GiB of a GPU")
    right.set_xlabel("seconds of a step, of the busiest rank")
    for row, one in enumerate(choices.values()):
        text = f" {one.time.seconds:.3g} s, {one.time.mfu:.0%} MFU"
        right.text(one.time.seconds, row, text, va="center", fontsize=8)
    right.set_xlim(0, 1.3 * max(one.time.seconds for one in choices.values()))
    style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.3), "frameon": False}
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(**style, ncols=4, fontsize=8)
    figure.suptitle("Choices beside each other, predicted", fontsize=10)
    return figure


def speeds(bounds: Sequence[tuple[float, float]], best: Sequence[Choice], limit: float) -> "Figure":
    """Tokens per second of a GPU over its memory: dots for candidates at their bounds, a line
    through predicted choices, whose options stand below.

    bounds   (bytes, tokens/s of a GPU)    best   by memory, ascending    limit   bytes, a line
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    grey = [size / GIB for size, _ in bounds], [rate for _, rate in bounds]
    axes.plot(*grey, ".", color=COLOURS[8], markersize=2)
    places = [(c.memory.peak / GIB, c.time.tokens_per_second_per_rank) for c in best]
    axes.plot(*zip(*places, strict=True), color=LINES[0], drawstyle="steps-post")
    for number, (place, one) in enumerate(zip(places, best, strict=True), 1):
        told = f"{number}: {one.candidate.options()}"
        axes.plot(*place, "o", color=LINES[0], label=told)
        axes.annotate(f"{number}", place, (-10, 3), textcoords="offset points", bbox=PLAIN)
    axes.axvline(limit / GIB, color="black", linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("memory (GiB of a GPU); dashed: the limit")
    axes.set_ylabel("tokens/s of a GPU")
    axes.spines[["top", "right"]].set_visible(False)
    told = "Grey: bounds, at best so fast with so little. Blue: predicted, nothing beats it"
    axes.set_title(told, loc="left", fontsize=10)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    return figure


def _held(one: Choice) -> dict[str, float]:
    """GiB of each category when most is there: while backward runs, or while AdamW steps."""
    found = asdict(one.memory)
    steps = one.memory.update > one.memory.activations + one.memory.temporaries
    for name in ("activations", "temporaries") if steps else ("update",):
        del found[name]
    return {name: size / GIB for name, size in found.items()}


def _stack(axes: "Axes", bars: Sequence[Mapping[str, float]]) -> None:
    """Horizontal bars of parts, largest part of all bars first; parts of nothing are left out."""
    names = {name for bar in bars for name in bar}
    most = {name: max(bar.get(name, 0.0) for bar in bars) for name in names}
    shown = sorted((name for name in names if most[name] > 0), key=lambda n: (-most[n], n))
    ends = [0.0] * len(bars)
    for name, colour, hatch in zip(shown, 2 * COLOURS, 2 * HATCHES, strict=False):
        sizes = [bar.get(name, 0.0) for bar in bars]
        axes.barh(range(len(bars)), sizes, left=ends, color=colour, hatch=hatch, label=name, **EDGE)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
