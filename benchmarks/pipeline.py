"""Pipelines: does the executor take the time that the simulator says, and what do schedules cost?

    python benchmarks/pipeline.py             everything; a CPU, 20 minutes, nearly all of it asleep
    python benchmarks/pipeline.py --model     the simulator's tables only; 10 seconds
    python benchmarks/pipeline.py --only zb-v --ranks 8 --unit 0.1

Promise   pipeline_ranks.py: real processes over gloo whose actions sleep, so that any number of
          ranks shares a few cores; time of a step beside the simulated one
Picture   benchmarks/pipeline_timelines.png: some of these steps, measured above simulated
Model     makespan, bubbles, activations and messages of every schedule, simulated; nothing measured
"""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import cpu_hardware, describe, markdown
from pipeline_ranks import Step, run_steps

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab import partition  # noqa: E402
from picotron_lab.analysis.plots import COLOURS, MEANINGS  # noqa: E402
from picotron_lab.analysis.timeline import metrics  # noqa: E402
from picotron_lab.config import PRESETS  # noqa: E402
from picotron_lab.pipeline_parallel import contract  # noqa: E402
from picotron_lab.processes import run_processes  # noqa: E402
from picotron_lab.schedules.actions import Schedule, parts  # noqa: E402
from picotron_lab.schedules.costs import Costs, Options  # noqa: E402
from picotron_lab.schedules.registry import NAMES, build  # noqa: E402
from picotron_lab.schedules.simulate import Timeline, simulate  # noqa: E402

PICTURE = Path(__file__).parent / "pipeline_timelines.png"
RUN = (
    "1f1b", "eager-1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "v-half", "dualpipe",
    "dualpipe-v", "1f1b-vocab1", "1f1b-vocab2",
)  # fmt: skip
DRAWN, DRAWN_RANKS = ("1f1b", "zb-h1", "zb-v"), 4

# ---- the promise


@dataclass(frozen=True)
class Measured:
    """The best step of a schedule on real processes."""

    timeline: Timeline  # in seconds, from the first start
    ratios: list[float]  # of all steps: measured makespan over the simulated one
    beside: float  # milliseconds of an action beside its sleep, mean
    load: float  # of the machine in the last minute


def run(name: str, ranks: int, unit: float, steps: int) -> Measured:
    """Run a schedule with two micro-batches per rank."""
    schedule = build(name, ranks, 2 * ranks)
    said, limit = simulate(schedule), 120 + (steps + 1) * 4 * unit * simulate(schedule).makespan
    found = run_processes(run_steps, ranks, name, 2 * ranks, unit, steps, timeout=limit)
    each = [seen(schedule, [rank[step] for rank in found]) for step in range(steps)]
    best = min(each, key=lambda timeline: timeline.makespan)
    ratios = [timeline.makespan / unit / said.makespan for timeline in each]
    work, slept = busy(best), busy(said) * unit
    count = sum(map(len, schedule.lists))
    return Measured(best, ratios, (work - slept) / count * 1e3, os.getloadavg()[0])


def seen(schedule: Schedule, ranks: list[Step]) -> Timeline:
    """A measured step as a timeline: 0 is the first start of any rank."""
    first = min(step[0][0] for step in ranks)
    starts = tuple(tuple(start - first for start, _ in step) for step in ranks)
    ends = tuple(tuple(end - first for _, end in step) for step in ranks)
    return Timeline(schedule, Costs(), starts, ends)


def busy(timeline: Timeline) -> float:
    """Sum of the durations of all actions of all ranks."""
    return sum(map(sum, timeline.ends)) - sum(map(sum, timeline.starts))


def promise(names: list[str], sizes: list[int], unit: float, steps: int) -> None:
    """Print a table, a row for each schedule; draw what should be drawn."""
    found: dict[tuple[str, int], Measured] = {}
    for ranks in sizes:
        for name in names:
            found[name, ranks] = one = run(name, ranks, unit, steps)
            ratios = " ".join(f"{ratio:.3f}" for ratio in one.ratios)
            line = f"{name}, {ranks} ranks: {ratios}, {one.beside:.2f} ms, load {one.load:.1f}"
            print(line, file=sys.stderr)
    loads = [one.load for one in found.values()]
    print(f"{describe(cpu_hardware())}; load {min(loads):.1f} to {max(loads):.1f}")
    print(f"\nAn action sleeps {unit * 1e3:g} ms; best (worst) of {steps} steps\n")
    header = ["schedule"]
    for ranks in sizes:
        header += [f"{ranks} ranks: simulated, s", "measured / simulated"]
    header.append("beside sleep, ms")
    print(markdown(header, [row(name, sizes, found, unit) for name in names]), "\n")
    drawn = [found[name, DRAWN_RANKS] for name in DRAWN if (name, DRAWN_RANKS) in found]
    if len(drawn) == len(DRAWN):
        draw([one.timeline for one in drawn], unit)


def row(name: str, sizes: list[int], found: dict[tuple[str, int], Measured], unit: float) -> list:
    """The cells of a schedule."""
    cells = [name]
    for ranks in sizes:
        one = found[name, ranks]
        said = simulate(one.timeline.schedule).makespan * unit
        cells += [f"{said:.2f}", f"{min(one.ratios):.3f} ({max(one.ratios):.3f})"]
    besides = [found[name, ranks].beside for ranks in sizes]
    return [*cells, f"{min(besides):.1f}-{max(besides):.1f}"]


# ---- the picture


def draw(timelines: list[Timeline], unit: float) -> None:
    """For each schedule two panels: what was measured, below it what was simulated."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 2.7 * len(timelines) + 0.6), layout="constrained")
    parts_of_figure = figure.subfigures(len(timelines), 1)
    longest, kinds = max(timeline.makespan for timeline in timelines), set()
    for area, timeline in zip(parts_of_figure, timelines, strict=True):
        said = simulate(timeline.schedule)
        title = f"{timeline.schedule.name}: measured {timeline.makespan:.2f} s, "
        title += f"simulated {said.makespan * unit:.2f} s"
        area.suptitle(title, fontsize=11, x=0.005, ha="left")
        above, below = area.subplots(2, 1, sharex=True)
        kinds |= draw_rows(above, timeline, 1.0, "measured")
        draw_rows(below, said, unit, "simulated")
        below.set_xlim(0, longest)
        above.tick_params(labelbottom=False)
    below.set_xlabel("seconds", fontsize=9)
    shown = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in COLOURS if kind in kinds]
    figure.legend(handles=shown, ncols=4, frameon=False, loc="outside lower left")
    figure.savefig(PICTURE, dpi=110)


def draw_rows(panel: Any, timeline: Timeline, scale: float, label: str) -> set[str]:
    """A row for each rank, micro-batch numbers in the cells, a rank's first of two stages lighter;
    times x scale are seconds. Gives the kinds of action."""
    schedule, kinds = timeline.schedule, set()
    for rank, items in enumerate(schedule.lists):
        times = zip(timeline.starts[rank], timeline.ends[rank], strict=True)
        for item, (start, end) in zip(items, times, strict=True):
            (action,) = parts(item)
            chunk = schedule.placement[rank].index(action.stage)
            left, width = start * scale, (end - start) * scale
            panel.barh(
                rank, width, 0.92, left, color=COLOURS[action.kind], edgecolor="white",
                linewidth=0.5, alpha=1 - 0.35 * (chunk == 0 and schedule.stages > schedule.ranks),
            )  # fmt: skip
            middle = left + width / 2
            panel.text(middle, rank, f"{action.microbatch}", ha="center", va="center", fontsize=8)
            kinds.add(action.kind)
    panel.set_ylim(schedule.ranks - 0.45, -0.55)
    panel.set_yticks(range(schedule.ranks), [f"rank {r}" for r in range(schedule.ranks)], size=8)
    panel.tick_params(length=0)
    panel.yaxis.set_label_position("right")
    panel.set_ylabel(label, fontsize=10)
    panel.spines[:].set_visible(False)
    panel.set_facecolor("#f1f1f1")
    return kinds


# ---- the model

RANKS, MICROBATCHES = 8, 32
SLICES, LIMIT = 4, 16  # of seq1f1b; activations that zb-auto may hold


def stage_costs(name: str, slices: int) -> Costs:
    """F, B, W of a stage, if those of a p-th of the model and a whole sequence take 1 each."""
    schedule = build(name, RANKS, MICROBATCHES, Options(slices=slices))
    share = RANKS / schedule.stages / slices
    return Costs(F=share, B=share, W=share)


def bubbles() -> None:
    """Every schedule without vocabulary passes, all with the same model."""
    print(f"Simulated: {RANKS} ranks, {MICROBATCHES} micro-batches; F, B, W of 1/{RANKS} of the "
          "model 1 each, sending takes no time\n")  # fmt: skip
    rows = []
    for name in NAMES:
        if "vocab" in name or name == "1f1b-interlaced":
            continue
        slices = SLICES if name == "seq1f1b" else 1
        limit = LIMIT if name == "zb-auto" else 0
        costs = stage_costs(name, slices)
        options = Options(slices=slices, costs=costs, memory_limit=limit)
        schedule = build(name, RANKS, MICROBATCHES, options)
        found, share = metrics(simulate(schedule, costs)), RANKS / schedule.stages
        sent = sum(messages for messages, _ in contract(schedule, 1)) * slices
        label = name + f", {slices} slices" * (slices > 1) + f", at most {limit} M" * (limit > 0)
        rows.append([
            label, f"{found.makespan:g}", f"{found.bubble_makespan:g}", f"{found.bubble_stage:g}",
            f"{found.bubble_ratio:.1%}", f"{share * max(found.peak_until_W):g}",
            f"{sent // MICROBATCHES}",
        ])  # fmt: skip
    header = ("schedule", "makespan", "bubble", "bubble per stage", "bubble / makespan")
    header += ("peak until W, M", "messages per micro-batch")
    print(markdown(header, rows), "\n")


def vocabulary() -> None:
    """Schedules for the output layer of a model whose vocabulary is large."""
    cfg, sequence = PRESETS["llama3-8b"], 8192
    layer, embedding, head = partition.costs(cfg, sequence)
    whole = cfg.layers * layer / RANKS
    h = head / whole
    print(f"Simulated: the same with the output layer of {cfg.name}: {h:.2f} each for F, B, W of "
          f"all of it ({sequence} tokens)\n")  # fmt: skip
    even, last = Costs(), (1.0,) * (RANKS - 1)
    cut = partition.balanced(layer, embedding, head, cfg.layers, RANKS, range(RANKS))
    loads = [count * layer / whole for count in cut]
    schedule = build("1f1b", RANKS, MICROBATCHES)
    cases = [
        ("1f1b", simulate(schedule, replace(even, factors=(*last, 1 + h)))),
        (f"1f1b, layers {','.join(map(str, cut))}",
         simulate(schedule, replace(even, factors=(*loads[:-1], loads[-1] + h)))),
    ]  # fmt: skip
    for name in [name for name in NAMES if "vocab" in name or name == "1f1b-interlaced"]:
        share, word = 1 / build(name, RANKS, MICROBATCHES).stages * RANKS, h / RANKS
        passes = {"S": 2 * word, "T": word} if name.endswith("2") else {"S": word, "T": 2 * word}
        costs = Costs(F=share, B=share, W=share, IF=0, IB=0, **passes)
        options = Options(costs=costs)
        cases.append((name, simulate(build(name, RANKS, MICROBATCHES, options), costs)))
    ideal = MICROBATCHES * (3 + 3 * h / RANKS)
    rows = []
    for name, timeline in cases:
        share = RANKS / timeline.schedule.stages
        peak = share * max(metrics(timeline).peak_until_W)
        span = timeline.makespan
        rows.append([name, f"{span:.1f}", f"{span / ideal:.2f}", f"{peak:g}"])
    print(markdown(("schedule", "makespan", "of equal shares", "peak until W, M"), rows), "\n")


def main() -> int:
    """Run, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="run nothing: the simulator's tables")
    parser.add_argument("--only", nargs="+", choices=RUN, default=RUN, metavar="SCHEDULE")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--unit", type=float, default=0.2, help="seconds that an action sleeps")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if not args.model:
        promise(list(args.only), args.ranks, args.unit, args.steps)
    bubbles()
    vocabulary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
