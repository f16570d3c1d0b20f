"""Pictures of a run: what each rank does when, loss over steps, bytes told beside bytes found.

Lanes     a row for what a rank computes, a row for what its wire carries; in between it waits.
          Watch writes both down, in the virtual time of a lab with a network (clock.py): a model
          of a cluster, no measurement of one
Curves    losses of several runs; apart by how much, on an axis of powers of ten
Stacks    bytes of each rank by category, beside what a formula says
Colours   of Okabe and Ito, which the colour-blind can tell apart; marks, hatches and words for grey
Tests     tests/test_clock_plots.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from picotron_lab.analysis.memory_plots import COLOURS as SHADES
from picotron_lab.clock import Network
from picotron_lab.comm import Axis, Handle
from picotron_lab.ledger import wire_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILLS = (  # colour and hatch of each kind of span
    ("#56b4e9", ""), ("#e69f00", "\\\\\\"), ("#009e73", "..."), ("#cc79a7", "///"),
)  # fmt: skip
COLOURS = (  # of Okabe and Ito
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
)  # fmt: skip
MARKS = "osD^vP*X"
WIDTH, ROW, LETTER = 9.0, 0.3, 0.055  # inches: of a figure, of a lane, of a letter
LEAST = 1e-17  # where a difference of 0 is drawn


@dataclass(frozen=True)
class Span:
    """What happens on a lane from `start` to `end`: the kind is its colour, the name its text."""

    start: float
    end: float
    kind: str
    name: str = ""


Lanes = Mapping[str, Sequence[Span]]


class Watch:
    """An axis that writes down when its rank computes and when its wire is busy.

    axis      of a lab with a network; it does the work
    network   that network
    """

    def __init__(self, axis: Axis, network: Network):
        self.axis, self.network = axis, network
        self.work: list[Span] = []
        self.wire: list[Span] = []

    def spend(self, seconds: float, kind: str, name: str = "") -> None:
        """Compute for so long."""
        start = self.axis.now()
        self.axis.spend(seconds)
        self.work.append(Span(start, self.axis.now(), kind, name))

    def all_reduce(
        self, x: Tensor, op: str = "sum", out: Tensor | None = None, wait: bool = True
    ) -> Tensor | Handle:
        """That of the axis. The wire is busy from now on, or from when it is free, by clock.py's
        model: bytes of a ring / bandwidth."""
        start = max(self.axis.now(), self.wire[-1].end if self.wire else 0.0)
        seconds = wire_bytes("all_reduce", x.nbytes, self.axis.size) / self.network.bandwidth
        self.wire.append(Span(start, start + seconds, "on the wire"))
        return self.axis.all_reduce(x, op, out, wait)


def lanes_of(watches: Sequence[Watch]) -> dict[str, list[Span]]:
    """Two lanes for each rank: what it computes, what its wire carries."""
    found = {}
    for rank, watch in enumerate(watches):
        found[f"rank {rank} computes"] = watch.work
        found["wire" + " " * rank] = watch.wire  # keys differ, labels look alike
    return found


def lanes(panels: Mapping[str, Lanes], title: str, unit: str) -> "Figure":
    """A panel for each name, a row for each lane, on one axis of time; the end is told in words.

    unit   of the times, as the axis names it
    """
    from matplotlib.figure import Figure

    heights = [len(rows) for rows in panels.values()]
    size = (WIDTH, ROW * sum(heights) + 0.42 * len(heights) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    every = [span for rows in panels.values() for spans in rows.values() for span in spans]
    kinds = list(dict.fromkeys(span.kind for span in every))
    assert len(kinds) <= len(FILLS), (
        f"{len(kinds)} kinds of spans cannot be told apart: draw {len(FILLS)} at most."
    )
    fills, latest = dict(zip(kinds, FILLS, strict=False)), max(span.end for span in every)
    for axes, (name, rows) in zip(below[:, 0], panels.items(), strict=True):
        _fill(axes, rows, fills, (WIDTH - 1.6) / latest)
        end = max(span.end for spans in rows.values() for span in spans)
        axes.axvline(end, color="black", linewidth=1)
        axes.set_title(f"{name}: {end:.4g} {unit}".removeprefix(": "), loc="left", fontsize=9)
        axes.set_xlim(0, 1.01 * latest)
    axes.set_xlabel(f"time ({unit})")
    figure.legend(
        handles=_samples(fills), loc="outside lower left", frameon=False, fontsize=8, ncols=6
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _fill(axes: "Axes", rows: Lanes, fills: Mapping[str, tuple], inches: float) -> None:
    """Boxes of each lane; inches: of a unit of time. A name that does not fit is left out."""
    for row, spans in enumerate(rows.values()):
        for span in spans:
            colour, hatch = fills[span.kind]
            axes.barh(
                row, span.end - span.start, 0.8, span.start, color=colour, hatch=hatch,
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            if span.name and LETTER * len(span.name) <= (span.end - span.start) * inches:
                axes.text(
                    (span.start + span.end) / 2, row, span.name, ha="center", va="center",
                    fontsize=7, bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.4},
                )  # fmt: skip
    axes.set_yticks(range(len(rows)), [name.strip() for name in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#f2f2f2")


def _samples(fills: Mapping[str, tuple[str, str]]) -> list:
    """A box for each kind, and one for waiting."""
    from matplotlib.patches import Patch

    found = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=kind)
        for kind, (colour, hatch) in fills.items()
    ]
    return [*found, Patch(facecolor="#f2f2f2", edgecolor="#bbbbbb", label="nothing")]


# ---- curves


def one_curve(runs: Mapping[str, Sequence[float]], limit: float, title: str) -> "Figure":
    """Losses over steps, and how far each run is from the first one, beside what is allowed.

    runs    the first is what the others must equal, 9 at most
    limit   of the relative difference, a line
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    (name, first), *others = runs.items()
    left.plot(first, color="#bbbbbb", linewidth=7, label=name)
    for i, (other, losses) in enumerate(others):
        style = {"color": COLOURS[i], "marker": MARKS[i], "markersize": 5}
        left.plot(losses, label=other, markevery=(i, len(others)), linewidth=0.8, **style)
        apart = [max(LEAST, abs(a - b) / abs(b)) for a, b in zip(losses, first, strict=True)]
        right.plot(apart, linewidth=0.8, markevery=(i, len(others)), **style)
    right.axhline(limit, color="black", linestyle="--")
    right.text(0, 1.6 * limit, f"allowed: {limit:.0e}", va="bottom")
    right.set_yscale("log")
    right.set_ylim(LEAST / 3, 100 * limit)
    right.set_ylabel(f"relative difference from\n{name} ({LEAST:.0e}: none)")
    left.set_ylabel("loss (nats per token)")
    for axes in (left, right):
        _steps(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def loss_panels(
    panels: Mapping[str, Mapping[str, Sequence[float]]], highest: float, title: str
) -> "Figure":
    """A panel for each name with the losses of its runs, told by words; higher ones are cut off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for i, (run, losses) in enumerate(runs.items()):
            axes.plot(
                losses, label=run, color=COLOURS[i], marker=MARKS[i], markevery=(3 * i, 6),
                linewidth=3.5 if i == 0 else 1.2, markersize=5,
            )  # fmt: skip
        axes.set_title(name, fontsize=10)
        _steps(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylim(0, highest)
    figure.axes[0].set_ylabel("loss (nats per token)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _steps(axes: "Axes") -> None:
    """Whole steps to the right."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")


# ---- stacks


def stacks(groups: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> "Figure":
    """Bytes as stacks: a panel for each group, a bar for each name, a part for each category, of
    which all bars have the same; the sum above, in KiB."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (group, bars) in zip(panels, groups.items(), strict=True):
        bottoms = [0.0] * len(bars)
        for part, colour in zip(next(iter(bars.values())), SHADES, strict=False):
            sizes = [parts[part] / 2**10 for parts in bars.values()]
            axes.bar(
                range(len(bars)), sizes, 0.86, bottoms, color=colour, edgecolor="white",
                linewidth=0.5, label=part,
            )  # fmt: skip
            bottoms = [low + size for low, size in zip(bottoms, sizes, strict=True)]
        for place, top in enumerate(bottoms):
            axes.text(place, top, f"{top:.0f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(bars)), list(bars), rotation=90, fontsize=8)
        axes.set_title(group, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KiB")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
