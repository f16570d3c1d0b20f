"""`run.py dryrun`: what ranks of a job of any size hold, compute and send, and for how long.

--json   a list, an object for each rank shown: the fields of dryrun.Report (works: what the actions
         of a stage did together), "traffic_predicted": the closed forms of traffic.py, "predicted":
         those of step_time.py, and "traced": what dryrun_time.py makes of the trace:
         {"step_seconds", "tokens_per_second", "mfu", "bubble_share", "exposed_seconds": {axis:
         seconds that nothing hides}}, or {"refused": why}
Read     add_options -> mesh_of -> show
Tests    tests/test_dryrun.py
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picotron_lab.analysis import dryrun_time, hardware, step_time, timeline, traffic
from picotron_lab.analysis.dryrun import Report, dry_run, has_kernels, ranks, vocabulary
from picotron_lab.analysis.dryrun_time import TracedTime
from picotron_lab.analysis.meter import CATEGORIES
from picotron_lab.analysis.parameters import Place
from picotron_lab.analysis.step_time import StepTime
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.precision import DTYPES

GIB = 2**30
BYTES = (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
OPERATIONS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1))
PICTURES = (".png", ".svg", ".pdf")
CHANGES_NOTHING = (
    "Options of training that change nothing here: --steps, --lr, --min-lr, --warmup-steps, "
    "--weight-decay, --seed, --data, --cache-dir, --validation-fraction, --validate-every, "
    "--save-dir, --save-every, --resume, --log-file, --sample-tokens, --timeout."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Make the parser of training that of a dry run."""
    parser.prog, parser.epilog = "run.py dryrun", CHANGES_NOTHING
    parser.formatter_class = argparse.HelpFormatter
    parser.description = "Run one rank of a job of any size, without GPUs, data or other ranks."
    group = parser.add_argument_group("dry run")
    group.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the job")
    group.add_argument("--hardware", default="h100", metavar="NAME", help="such as h100 (default)")
    group.add_argument("--all-stages", action="store_true", help="not only the first and the last")
    group.add_argument("--json", action="store_true", help="everything, as JSON")
    group.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="the step on all pipeline ranks, as a picture"
    )
    group.add_argument("--trace", type=Path, metavar="FILE.json", help="the same for Perfetto")


def check(given: dict[str, Any]) -> None:
    """Refuse at once what would fail later, or change nothing.

    Raises  ConfigError, one sentence that names the option, its value and one that works
    """
    gpus, plot = given["gpus"], given.get("plot")
    require(gpus >= 1, f"--gpus {gpus} must be at least 1; try --gpus 8.")
    require(
        "ranks" not in given,
        f"--ranks {given.get('ranks')} starts threads, and a dry run starts none: leave it out, "
        f"--gpus {gpus} says how many ranks the job has.",
    )
    require(
        plot is None or plot.suffix in PICTURES,
        f"--plot {plot} ends in none of {', '.join(PICTURES)}: try --plot step.png.",
    )
    for option in {"plot", "trace"} & set(given):
        path = given[option]
        require(
            path.parent.is_dir(),
            f"--{option} {path} lies in a folder that is not there: make {path.parent}, or try "
            f"--{option} {path.name}.",
        )


def mesh_of(given: dict[str, Any], choose: Callable[[dict], tuple[int, MeshConfig]]) -> MeshConfig:
    """Check the options; the mesh of --gpus ranks, by what chooses that of training, whose
    sentences then speak of --gpus."""
    check(given)
    try:
        return choose({**given, "ranks": given["gpus"]})[1]
    except ConfigError as error:
        told = str(error).partition(" (torchrun")[0].removesuffix(".")
        raise ConfigError(re.sub(r"try (\d+) ranks", r"try --gpus \1", told) + ".") from None


def show(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, given: dict[str, Any]) -> None:
    """Print the reports. `given` are the options of the command line.

    Raises  ConfigError, one sentence that names the option, its value and one that works
    """
    device = hardware.hardware(given["hardware"])
    reports = [dry_run(model, mesh, cfg, rank) for rank in ranks(mesh, "all_stages" in given)]
    sized = dataclasses.replace(model, vocab_size=model.vocab_size or vocabulary(cfg))
    told = summary(lambda: step_time.predict(sized, mesh, cfg, device))
    sends = [sent_in_theory(sized, mesh, cfg, report.rank) for report in reports]
    line, traced = timed(sized, mesh, cfg, device, reports)
    _write(line, given)
    if "json" in given:
        more = {"predicted": told, "traced": traced}
        pairs = zip(reports, sends, strict=True)
        each = [dataclasses.asdict(r) | {"traffic_predicted": sent} | more for r, sent in pairs]
        print(json.dumps(each, indent=1))
        return
    print("\n".join(_head(model, mesh, cfg)))
    for report, sent in zip(reports, sends, strict=True):
        print("\n".join([*_lines(report, device, DTYPES[cfg.dtype]), *_sent(report, sent)]))
    print("\n".join(_told("traced", "operations, bytes and messages above", traced, device.name)))
    print("\n".join(_told("predicted", "closed forms, nothing traced", told, device.name)))


def sent_in_theory(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, rank: int) -> dict:
    """What traffic.py says that a rank sends: {axis: {operation: (calls, bytes)}}, or {"refused":
    why}."""
    sizes = (mesh.pp, mesh.dp, mesh.cp, mesh.tp)
    place = Place(*map(int, np.unravel_index(rank, sizes)))
    try:
        return traffic.predict(model, mesh, cfg, place, on_gpu=has_kernels())
    except ConfigError as error:
        return {"refused": str(error)}


def timed(
    model: ModelConfig,
    mesh: MeshConfig,
    cfg: TrainConfig,
    device: hardware.Hardware,
    reports: Sequence[Report],
) -> tuple[timeline.Timeline, dict[str, Any]]:
    """(the step on all pipeline ranks, its summary), from the trace."""
    every = dryrun_time.traced(model, mesh, cfg, reports)
    found = dryrun_time.from_trace(model, mesh, cfg, device, every)
    return found.line, summary(lambda: found)


def summary(predict: Callable[[], StepTime | TracedTime]) -> dict[str, Any]:
    """A predicted step for JSON, or {"refused": why}."""
    try:
        step = predict()
    except ConfigError as error:
        return {"refused": str(error)}
    return {
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "bubble_share": step.bubble,
        "exposed_seconds": step.exposed,
    }


def _write(line: timeline.Timeline, given: dict[str, Any]) -> None:
    """The files that were asked for; in a trace, seconds of the job are seconds."""
    if "plot" in given:
        from picotron_lab.analysis import plots

        plots.save(line, given["plot"])
    if "trace" in given:
        timeline.write_trace(_in_milliseconds(line), given["trace"])


def _in_milliseconds(line: timeline.Timeline) -> timeline.Timeline:
    """The unit of a trace."""
    starts, ends = (
        tuple(tuple(1000 * time for time in rank) for rank in times)
        for times in (line.starts, line.ends)
    )
    return dataclasses.replace(line, starts=starts, ends=ends)


# ---- for people, at most 100 columns wide


def _head(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> list[str]:
    batches = _many(cfg.micro_batches(mesh.dp), "micro-batch", "es")
    rows = f"{_many(cfg.micro_batch_size, 'sequence')} of {cfg.sequence_length} tokens"
    kernels = has_kernels() and cfg.impl == "fused" and cfg.dtype != "float64"
    way = "kernels of a GPU" if kernels else "operators of a CPU"
    return [
        f"{model.name} on {_many(mesh.size, 'GPU')}: {batches} of {rows}",
        f"{cfg.dtype}, --impl {cfg.impl}, memory as with the {way}",
        *["every expert gets an equal share of the tokens"] * bool(model.experts),
    ]


def _many(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{ending if count != 1 else ''}"


def _lines(report: Report, device: hardware.Hardware, dtype: torch.dtype) -> list[str]:
    stages = ", ".join(map(str, report.stages))
    flops, peak = sum(report.flops.values()), device.peak.get(dtype)
    least = f", {flops / peak:.3g} s at the peak of {device.name}" if peak else ""
    by_kind = ", ".join(f"{kind} {_size(n, OPERATIONS, 0)}" for kind, n in report.flops.items())
    lines = [
        "",
        f"rank {report.rank}, {_named(report.stages)} {stages}: {report.parameters:,} parameters "
        f"(traced in {report.seconds:.1f} s)",
        f"memory      {_size(report.peak_bytes)} at most, during {report.peak_at}; {device.name}: "
        f"{device.memory_bytes / GIB:.1f} GiB",
    ]
    lines += [f"  {name:10}{_size(report.peak[name])}" for name in CATEGORIES]
    lines.append(f"operations  {_size(flops, OPERATIONS)}{least}: {by_kind}")
    return lines


def _sent(report: Report, theory: dict) -> list[str]:
    """What was sent, and whether the closed forms say the same."""
    lines = []
    for axis, ops in report.traffic.items():
        for op, (calls, size) in ops.items():
            sent = f"sent        {_size(size)} in" if op != "recv" else f"received    {'':8} in"
            lines.append(f"{sent} {calls} {op} on {axis}")
    if not lines:
        return []
    if "refused" in theory:
        return [*lines, f"  no closed form: {theory['refused']}"]
    same = "exactly as" if theory == report.traffic else "not as"
    return [*lines, f"  {same} the closed forms of analysis/traffic.py predict"]


def _named(stages: Sequence[int]) -> str:
    return "stage" if len(stages) == 1 else "stages"


def _size(count: float, units: tuple = BYTES, width: int = 8) -> str:
    """A count in a unit that leaves at most four digits before the point; single ones whole."""
    unit, factor = next(((u, f) for u, f in units if count >= f), units[-1])
    return f"{count / factor:{width}.{2 if factor > 1 else 0}f} {unit}".rstrip()


def _told(name: str, source: str, told: dict[str, Any], device: str) -> list[str]:
    """A predicted step."""
    if "refused" in told:
        return ["", f"no step time {name}: {told['refused']}"]
    waits = told["exposed_seconds"]
    axes = ", ".join(f"{axis} {seconds:.3g}" for axis, seconds in waits.items() if seconds)
    return [
        "",
        f"{name:11} {told['step_seconds']:.3g} s a step on {device}, from {source}",
        f"  speed     {told['tokens_per_second']:,.0f} tokens/s, MFU {told['mfu']:.1%}",
        f"  waiting   bubble {told['bubble_share']:.1%} of the step; messages that nothing hides "
        f"{sum(waits.values()):.3g} s" + (f": {axes}" if axes else ""),
    ]
