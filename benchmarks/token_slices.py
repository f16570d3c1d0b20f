"""One sequence flowing through the stages in slices, and what ranks hold while it does.

python benchmarks/token_slices.py                       the tables; no GPU needed
python benchmarks/token_slices.py --plot slices.png     and the picture

Picture  the executor's own trace of one training step on lab ranks with a virtual clock, where a
         slice of l tokens after c others takes t(l, c) = 12 + l + l (c + l/2) / 48: a floor, its
         matmuls, its attention; backward twice that
Memory   a schedule in which all forwards come first against one with backwards as early as may be:
         slices held at most, and bytes as the meter counts them on rank 0, of activations with keys
         and values, those that slices carry along included
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab import build, mesh, partition, token_slices  # noqa: E402
from picotron_lab.analysis.meter import Meter  # noqa: E402
from picotron_lab.analysis.plots import compare  # noqa: E402
from picotron_lab.checks import schedule_of, slices_of  # noqa: E402
from picotron_lab.clock import Network  # noqa: E402
from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from picotron_lab.dropout import Where  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.schedules.costs import Costs  # noqa: E402
from picotron_lab.schedules.simulate import Timeline, simulate  # noqa: E402
from picotron_lab.schedules.slicing import best_slices  # noqa: E402

P, T, MICROBATCHES = 4, 64, 8
MODEL = ModelConfig(vocab_size=64, hidden_size=32, layers=P, heads=4, kv_heads=2, ffn_size=88)


def time_of(length: int, context: int) -> float:
    """Forward of a slice on one stage, in the units of the picture."""
    return 12 + length + length * (context + length / 2) / 48


def step(
    world: Axis, schedule: str, slices: str, microbatches: int, costs: Costs | None
) -> tuple[list, int, int]:
    """One training step: (trace, slices held at most, bytes of activations held at most)."""
    mesh_cfg = MeshConfig(pp=P, schedule=schedule, token_slices=slices)
    cfg = TrainConfig(
        global_batch_size=microbatches, micro_batch_size=1, sequence_length=T, impl="fused"
    )
    lengths, axes = slices_of(mesh_cfg, cfg), mesh.build(world, mesh_cfg, MODEL.kv_heads)
    chosen = schedule_of(mesh_cfg, cfg, len(lengths))
    with Meter() as meter:
        part = build.build_model(MODEL, mesh_cfg, cfg, axes, chosen, torch.device("cpu"))
        meter.watch(part.parameters())
        found = build.synchronisers(part, mesh_cfg, cfg, axes)
        executor = build.executor(part, chosen, axes, cfg.impl, found)
        executor.trace = []
        if costs is not None:
            executor.pretend = costs.of
        tokens_BT = torch.arange(T)[None] % MODEL.vocab_size
        batches: list[Any] = [(tokens_BT, tokens_BT, Where.first(tokens_BT))] * microbatches
        if len(lengths) > 1:
            batches = [token_slices.cut(batch, lengths) for batch in batches]
        meter.reset_peak()
        executor.run(batches, T * microbatches)
    return executor.trace, executor.peak, meter.peak["activation"]


def traced(schedule: str, lengths: tuple[int, ...]) -> Timeline:
    """The executor's trace of one sequence in such slices; it is as simulated."""
    context, factors = 0, []
    for length in lengths:
        factors.append(time_of(length, context))
        context += length
    costs = Costs(F=1, B=1, W=1, slices=tuple(factors))
    text = ",".join(map(str, lengths)) if len(lengths) > 1 else "1"
    traces = [trace for trace, _, _ in run_ranks(
        step, P, schedule, text, 1, costs, network=Network())]  # fmt: skip
    starts = tuple(tuple(start for _, start, _ in trace) for trace in traces)
    ends = tuple(tuple(end for _, _, end in trace) for trace in traces)
    mesh_cfg, cfg = MeshConfig(pp=P, schedule=schedule), TrainConfig(1, 1, T)
    timeline = Timeline(schedule_of(mesh_cfg, cfg, len(lengths)), costs, starts, ends)
    assert abs(timeline.makespan - simulate(timeline.schedule, costs).makespan) < 1e-9
    return timeline


def pictures() -> list[tuple[str, Timeline]]:
    """One sequence whole, in equal slices, in the best ones."""
    best, _ = best_slices(T, P, time_of)
    equal = partition.token_slices(str(len(best)), T)
    named = {"whole": (T,), f"{len(best)} equal slices": equal, "the best slices": best}
    return [
        (f"{name}, {' '.join(map(str, lengths))} tokens", traced("terapipe", lengths))
        for name, lengths in named.items()
    ]


def memory() -> list[tuple[str, str, float, int]]:
    """(schedule, slices, sequences held at most, bytes of activations) of rank 0."""
    rows = []
    for schedule in ("terapipe", "1f1b", "seq1f1b"):
        for slices in (1, 2, 4):
            if (schedule, slices) == ("seq1f1b", 1):
                continue  # is 1f1b
            _, peak, held = run_ranks(step, P, schedule, str(slices), MICROBATCHES, None)[0]
            rows.append((schedule, str(slices), peak / slices, held))
    return rows


def main() -> None:
    """Print the tables, and draw if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    print(f"One sequence of {T} tokens, {P} stages, forward and backward, on the virtual clock\n")
    print("| slices | time of the step | of the whole sequence's |\n|---|--:|--:|")
    drawn = pictures()
    whole = drawn[0][1].makespan
    for name, timeline in drawn:
        print(f"| {name} | {timeline.makespan:.1f} | {timeline.makespan / whole:.2f} |")
    print(f"\n{MICROBATCHES} sequences, {P} stages: what rank 0 holds at most\n")
    print("| schedule | slices | sequences | bytes of activations | of the first row |")
    print("|---|--:|--:|--:|--:|")
    rows = memory()
    for schedule, slices, held, size in rows:
        print(f"| {schedule} | {slices} | {held:g} | {size:,} | {size / rows[0][3]:.2f} |")
    if args.plot:
        compare(drawn).savefig(args.plot, dpi=110)


if __name__ == "__main__":
    main()
