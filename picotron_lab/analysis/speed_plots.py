"""Pictures of time: what step_time.py and the simulator predict, beside what others measured.

Throughput   tokens per second and GPU over the size of one axis; open marks are published
Bubble       share of the makespan in which the busiest rank waits, from the simulated schedule
Imbalance    seconds of each pipeline rank per micro-batch: the slowest sets the pace
Colours      of Okabe and Ito, which the colour-blind can tell apart; marks and hatches for grey
Tests        tests/test_speed_plots.py
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from picotron_lab.analysis.hardware import Hardware
from picotron_lab.analysis.layer_time import Passes, Place, embedding, head, layer
from picotron_lab.analysis.step_time import predict, stage_passes
from picotron_lab.analysis.timeline import metrics
from picotron_lab.checks import layers_of, schedule_of
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.schedules.costs import Options
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")  # Okabe and Ito
MARKS = "osD^vP"
LAYERS, ENDS = "#56b4e9", "#e69f00"


@dataclass(frozen=True)
class Run:
    """A run, and the tokens per second and GPU that somebody measured, if anybody did."""

    model: ModelConfig
    mesh: MeshConfig
    cfg: TrainConfig
    published: float | None = None


def throughput(
    lines: Mapping[str, Sequence[Run]], axis: str, hardware: Hardware, source: str = ""
) -> "Figure":
    """Tokens per second and GPU over the size of a mesh axis: a line for each name, filled marks
    predicted, open ones published.

    axis     dp, tp, cp or pp      source   of what is published
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, runs), style in zip(lines.items(), _styles(len(lines)), strict=True):
        sizes = [getattr(run.mesh, axis) for run in runs]
        steps = [predict(run.model, run.mesh, run.cfg, hardware) for run in runs]
        speeds = [step.tokens_per_second_per_rank for step in steps]
        axes.plot(sizes, speeds, label=f"{name}: predicted", **style)
        known = [(getattr(r.mesh, axis), r.published) for r in runs if r.published is not None]
        if known:
            axes.plot(
                *zip(*known, strict=True), label=f"{name}: published", linestyle="--",
                fillstyle="none", markeredgewidth=1.6, **style,
            )  # fmt: skip
    _sizes(axes, sorted({getattr(r.mesh, axis) for runs in lines.values() for r in runs}))
    axes.set_ylim(bottom=0, top=1.08 * axes.get_ylim()[1])
    axes.axvline(hardware.node, color="0.5", linestyle=":")
    where = axes.get_xaxis_transform()
    axes.text(hardware.node, 0.99, " one node", transform=where, va="top", color="0.3")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"ranks of {axis}")
    axes.set_ylabel("tokens/s of one GPU")
    models = ", ".join(sorted({run.model.name for runs in lines.values() for run in runs}))
    beside = f", and published by {source}" if source else ""
    axes.set_title(f"{models} on {hardware.name}: predicted{beside}", loc="left", fontsize=10)
    axes.legend(frameon=False)
    return figure


def bubbles(
    ranks: Sequence[int], rounds: Sequence[int], schedules: Sequence[tuple[str, int]]
) -> "Figure":
    """Share of the makespan in which the busiest rank waits, over micro-batches; a panel for each
    number of ranks p, a line for each (schedule, stages per rank; 0: its own number), and one line
    for those that are equal everywhere.

    rounds   micro-batches as multiples of p. F, B and W of a stage take equally long
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(ranks) + 0.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
    curves = defaultdict(list)
    for name, v in schedules:
        told = tuple(tuple(bubble(name, p, p * n, v) for n in rounds) for p in ranks)
        curves[told].append(f"{name}, v = {v}" if v else name)
    for number, (axes, p) in enumerate(zip(panels, ranks, strict=True)):
        batches = [p * times for times in rounds]
        for (told, names), style in zip(curves.items(), _styles(len(curves)), strict=True):
            shares = [100 * share for share in told[number]]
            axes.plot(batches, shares, label=" and ".join(names), **style)
        _sizes(axes, batches)
        axes.set_title(f"p = {p} ranks", fontsize=10)
        axes.set_xlabel("micro-batches m")
        axes.grid(axis="y", color="0.9")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("bubble (% of the makespan)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=len(names))
    figure.suptitle("Bubbles of simulated schedules: F, B and W take equally long, transfers none")
    return figure


def bubble(name: str, ranks: int, microbatches: int, virtual_stages: int = 0) -> float:
    """Share of the makespan of a schedule in which the busiest rank waits."""
    schedule = build(name, ranks, microbatches, Options(virtual_stages=virtual_stages))
    return metrics(simulate(schedule)).bubble_ratio


def imbalance(runs: Mapping[str, Run], hardware: Hardware) -> "Figure":
    """Milliseconds of each pipeline rank per micro-batch: its layers, and what it has of embedding
    and head; a panel for each run by its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(runs) + 0.4, 3.9), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        times = rank_seconds(run, hardware)
        layers, ends = ([1e3 * pair[i] for pair in times] for i in (0, 1))
        style = {"edgecolor": "black", "linewidth": 0.5}
        axes.bar(range(len(times)), layers, color=LAYERS, label="layers", **style)
        axes.bar(
            range(len(times)), ends, bottom=layers, color=ENDS, hatch="///",
            label="embedding, head and loss", **style,
        )  # fmt: skip
        sums = [1e3 * sum(pair) for pair in times]
        mean = sum(sums) / len(sums)
        axes.axhline(mean, color="black", linestyle="--", label="mean")
        axes.set_title(f"{name}\nslowest rank / mean: {max(sums) / mean:.2f}", fontsize=10)
        axes.set_xticks(range(len(times)))
        axes.set_xlabel("pipeline rank")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("forward and backward of\none micro-batch (ms)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=3)
    models = sorted({
        f"{m.layers} layers of width {m.hidden_size:,}, {m.vocab_size:,} words"
        for m in (run.model for run in runs.values())
    })  # fmt: skip
    figure.suptitle(f"Work of pipeline ranks, predicted: {'; '.join(models)}; {hardware.name}")
    return figure


def rank_seconds(run: Run, hardware: Hardware) -> list[tuple[float, float]]:
    """(layers, embedding and head): seconds of each pipeline rank for F, B and W of a micro-batch.

    A vocabulary that the pipeline's ranks share: its passes are equal parts of head and embedding.
    """
    at = Place(run.model, run.mesh, run.cfg, hardware)
    schedule, counts = schedule_of(run.mesh, run.cfg), layers_of(run.model, run.mesh, run.cfg)
    every = [_seconds(passes) for passes in stage_passes(at, schedule, counts)]
    one, pp = _seconds(layer(at)), run.mesh.pp
    shared = 0.0
    if schedule.vocabulary:
        shared = _seconds(head(at, pp)) + _seconds(embedding(at, pp))
    found = []
    for stages in schedule.placement:
        layers = one * sum(counts[stage] for stage in stages)
        found.append((layers, sum(every[stage] for stage in stages) - layers + shared))
    return found


def _seconds(passes: Passes) -> float:
    return sum(part.total() for part in passes.values())


def _styles(lines: int) -> list[dict[str, str]]:
    """A colour and a mark for each of so many lines."""
    assert lines <= len(COLOURS), (
        f"{lines} lines cannot be told apart: draw {len(COLOURS)} at most in one picture."
    )
    pairs = list(zip(COLOURS, MARKS, strict=True))[:lines]
    return [{"color": colour, "marker": mark} for colour, mark in pairs]


def _sizes(axes: "Axes", sizes: Sequence[int]) -> None:
    """An axis of powers of two, with these marked."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.spines[["top", "right"]].set_visible(False)
