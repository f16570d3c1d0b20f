"""Pipelines that compute: measured timelines over simulated ones, in one picture.

    python benchmarks/pp_overlay.py             a CPU, 2 minutes; draws benchmarks/pp_overlay.png

Run       2 and 4 real processes over gloo, one thread each, train a small Llama with 1F1B
          (pp_overlay_ranks.py)
Simulated from each stage's F and BW measured alone, and the time of one message; nothing is taken
          from the run that it is compared with
Between   the same simulation with each stage's actions as long as they were in the run, on average:
          what it adds to the first is slower computing, what the run adds to it is waiting
Cores     fewer than ranks cannot compute in less than the work of all ranks over the cores; the
          simulator gives every rank a core
Step      from the first start to the last end of any rank; the best of some steps
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import cpu_hardware, describe, markdown
from pp_overlay_ranks import run_steps

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.analysis.plots import COLOURS, MEANINGS  # noqa: E402
from picotron_lab.checks import layers_of, schedule_of  # noqa: E402
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from picotron_lab.processes import run_processes  # noqa: E402
from picotron_lab.schedules.actions import Schedule, parts  # noqa: E402
from picotron_lab.schedules.costs import Costs  # noqa: E402
from picotron_lab.schedules.simulate import Timeline, simulate  # noqa: E402

PICTURE = Path(__file__).parent / "pp_overlay.png"
MODEL = ModelConfig(
    vocab_size=4096, hidden_size=256, layers=8, heads=8, kv_heads=4, ffn_size=768
)  # twice as deep as `peer` of cpu.py
SEQUENCES, TOKENS, MICRO_BATCHES = 1, 128, 8
HEADER = ("ranks", "simulated, ms", "with the run's own F and BW, ms", "measured (worst), ms",
          "measured / simulated", "F and BW / alone", "processor time / F and BW",
          "F and BW alone / cores, ms", "message, ms", "load")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A pipeline; timelines in seconds from the first start of any rank."""

    mesh: MeshConfig
    layers: list[int]  # of each stage
    simulated: Timeline
    between: Timeline
    measured: list[Timeline]
    busy: list[float]  # processor time of all ranks, in each step
    message: float
    load: float

    @property
    def best(self) -> int:
        """The fastest step."""
        return min(range(len(self.measured)), key=lambda step: self.measured[step].makespan)

    def cells(self) -> list[str]:
        """A row of the table."""
        best, said = self.measured[self.best], self.simulated
        spans = [timeline.makespan * 1e3 for timeline in (said, self.between, best)]
        worst = max(timeline.makespan for timeline in self.measured) * 1e3
        work = working(best)
        return [
            f"{self.mesh.pp}", *(f"{span:.0f}" for span in spans[:2]),
            f"{spans[2]:.0f} ({worst:.0f})",
            f"{spans[2] / spans[0]:.2f}", f"{work / working(said):.2f}",
            f"{self.busy[self.best] / work:.2f}",
            f"{working(said) / (os.cpu_count() or 1) * 1e3:.0f}",
            f"{self.message * 1e3:.1f}", f"{self.load:.1f}",
        ]  # fmt: skip


def working(timeline: Timeline) -> float:
    """Seconds of all actions of all ranks."""
    return sum(map(sum, timeline.ends)) - sum(map(sum, timeline.starts))


def run(ranks: int, steps: int, folder: Path) -> Run:
    """Measure and simulate."""
    mesh = MeshConfig(pp=ranks, pp_layers="balanced")
    text = folder / "text.txt"
    dice = np.random.default_rng(0)
    text.write_bytes(dice.integers(32, 127, 2**16, dtype=np.uint8).tobytes())
    cfg = TrainConfig(
        global_batch_size=SEQUENCES * MICRO_BATCHES, micro_batch_size=SEQUENCES,
        sequence_length=TOKENS, data=str(text), cache_dir=str(folder), validation_fraction=0,
    )  # fmt: skip
    schedule = schedule_of(mesh, cfg)
    seen = run_processes(run_steps, ranks, MODEL, mesh, cfg, steps, timeout=120)
    measured = [together(schedule, [rank.steps[i] for rank in seen]) for i in range(steps)]
    best = min(measured, key=lambda timeline: timeline.makespan)
    busy = [sum(rank.busy[i] for rank in seen) for i in range(steps)]
    message = statistics.mean(rank.message for rank in seen[:2])
    alone = simulated(schedule, [rank.alone for rank in seen], message)
    between = simulated(schedule, lengths(best), message)
    load, layers = os.getloadavg()[0], list(layers_of(MODEL, mesh, cfg))
    return Run(mesh, layers, alone, between, measured, busy, message, load)


def together(schedule: Schedule, ranks: list[list[tuple[float, float]]]) -> Timeline:
    """A measured step: 0 is the first start of any rank."""
    first = min(actions[0][0] for actions in ranks)
    starts = tuple(tuple(start - first for start, _ in actions) for actions in ranks)
    ends = tuple(tuple(end - first for _, end in actions) for actions in ranks)
    return Timeline(schedule, Costs(), starts, ends)


def simulated(schedule: Schedule, stages: list[tuple[float, float]], message: float) -> Timeline:
    """A step whose stages take (F, BW) seconds each."""
    factors = tuple((forward, backward / 2, backward / 2) for forward, backward in stages)
    return simulate(schedule, Costs(factors=factors, transfer=message))


def lengths(timeline: Timeline) -> list[tuple[float, float]]:
    """Mean seconds of F and BW of each rank's stage."""
    found = []
    for rank, items in enumerate(timeline.schedule.lists):
        times: dict[str, list[float]] = {"F": [], "BW": []}
        for item, start, end in zip(items, timeline.starts[rank], timeline.ends[rank], strict=True):
            times[item.kind].append(end - start)
        found.append((statistics.mean(times["F"]), statistics.mean(times["BW"])))
    return found


# ---- the picture


def draw(runs: list[Run]) -> None:
    """A panel for each run; every rank has two bars: above measured, below simulated."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(len(runs), 1, height_ratios=[one.mesh.pp + 0.6 for one in runs])
    for panel, one in zip(panels, runs, strict=True):
        best, said = one.measured[one.best], one.simulated
        draw_bars(panel, said, 0.22, 0.45)
        draw_bars(panel, best, -0.22, 1.0)
        for timeline, style in ((said, ":"), (best, "-")):
            panel.axvline(timeline.makespan, color="black", linestyle=style, linewidth=1)
        panel.set_title(
            f"{one.mesh.pp} ranks, layers {', '.join(map(str, one.layers))}: measured "
            f"{best.makespan * 1e3:.0f} ms, simulated {said.makespan * 1e3:.0f} ms",
            fontsize=11, loc="left",
        )  # fmt: skip
        names = [f"rank {rank}" for rank in range(one.mesh.pp)]
        panel.set_yticks(range(one.mesh.pp), names, size=9)
        panel.set_ylim(one.mesh.pp - 0.5, -0.5)
        panel.set_xlim(0, 1.01 * max(best.makespan, said.makespan))
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel("seconds; upper bars and solid line: measured; "
                          "lower, lighter bars and dotted line: simulated")  # fmt: skip
    shown = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in ("F", "BW")]
    figure.legend(handles=shown, ncols=2, frameon=False, loc="outside upper right")
    figure.savefig(PICTURE, dpi=110)


def draw_bars(panel: Any, timeline: Timeline, shift: float, alpha: float) -> None:
    """The actions of each rank, with micro-batch numbers."""
    for rank, items in enumerate(timeline.schedule.lists):
        times = zip(timeline.starts[rank], timeline.ends[rank], strict=True)
        for item, (start, end) in zip(items, times, strict=True):
            (action,) = parts(item)
            at = rank + shift
            panel.barh(
                at, end - start, 0.42, start, color=COLOURS[action.kind], alpha=alpha,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            panel.text(
                (start + end) / 2, at, f"{action.microbatch}", ha="center", va="center", fontsize=7
            )


def main() -> int:
    """Run, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(ranks, args.steps, Path(folder)) for ranks in args.ranks]
    print(describe(cpu_hardware()), "\n")
    print(markdown(HEADER, [one.cells() for one in runs]))
    if len(runs) > 1:
        draw(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
