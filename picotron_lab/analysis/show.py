"""`run.py schedule`: build a schedule, simulate it, and print, draw or write what came out."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from picotron_lab.analysis.timeline import Metrics, as_dict, metrics, write_trace
from picotron_lab.config import ConfigError
from picotron_lab.schedules.actions import Schedule, ScheduleError
from picotron_lab.schedules.costs import Options, parse_costs
from picotron_lab.schedules.registry import NAMES, build
from picotron_lab.schedules.simulate import Timeline, simulate
from picotron_lab.schedules.validator import validate

COLUMNS = 100
PICTURES = (".png", ".svg", ".pdf")
OPTIONS = {  # how a ScheduleError begins -> how the command line calls that
    "ranks": "--pp", "microbatches": "--microbatches", "virtual stages": "--virtual-stages",
    "token slices": "--token-slices", "cost": "--cost", "memory_limit": "--memory-limit",
    "vocabulary": "--vocab-parallel",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run.py schedule` understands."""
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--pp", type=int, default=4, metavar="P", help="ranks (default: 4)")
    parser.add_argument("--microbatches", type=int, default=8, metavar="M", help="(default: 8)")
    parser.add_argument("--virtual-stages", type=int, default=0, metavar="V", help="per rank")
    parser.add_argument("--token-slices", type=int, default=1, metavar="N", help="of a sequence")
    parser.add_argument(
        "--cost", default="", metavar="F=1,B=1,W=1",
        help="times of F, B, W, S, T, IF, IB (default: 1); delays: transfer, barrier (default: 0); "
        "pair, of an overlapped forward and backward (default: 0, their sum)",
    )  # fmt: skip
    parser.add_argument(
        "--stage-factors", default="", metavar="1,1,2,1", help="how much longer each stage takes"
    )
    parser.add_argument(
        "--slice-factors", default="", metavar="1,1.2", help="how much longer each slice takes"
    )
    parser.add_argument(
        "--memory-limit", type=float, default=0.0, metavar="A",
        help="activations of one stage and micro-batch that a rank may hold (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-parallel", type=int, default=0, metavar="1|2",
        help="for auto: split the vocabulary over the ranks by this algorithm",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture, as in papers")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="for ui.perfetto.dev")


def show(args: argparse.Namespace) -> None:
    """Build, simulate, and print, draw or write what was asked for.

    Raises  ConfigError, one sentence that names the option, its value and one that works
    """
    if args.plot and args.plot.suffix not in PICTURES:
        raise ConfigError(
            f"--plot {args.plot} ends in none of {', '.join(PICTURES)}: try --plot schedule.png."
        )
    try:
        timeline = simulated(args)
    except ScheduleError as error:
        raise ConfigError(_sentence(str(error), args)) from None
    if args.plot:
        from picotron_lab.analysis.plots import save

        save(timeline, args.plot)
    if args.trace:
        write_trace(timeline, args.trace)
    print(json.dumps(as_dict(timeline)) if args.json else table(timeline))


def simulated(args: argparse.Namespace) -> Timeline:
    """The schedule that was asked for, and when everything in it runs."""
    factors = _factors("--stage-factors", args.stage_factors)
    slices = _factors("--slice-factors", args.slice_factors)
    costs = replace(parse_costs(args.cost), factors=factors, slices=slices)
    options = Options(
        virtual_stages=args.virtual_stages, slices=args.token_slices, costs=costs,
        memory_limit=args.memory_limit, vocabulary=args.vocab_parallel,
    )  # fmt: skip
    schedule = build(args.name, args.pp, args.microbatches, options)
    if args.memory_limit:
        _check_memory(schedule, args.memory_limit)
    return simulate(schedule, costs)


def _check_memory(schedule: Schedule, limit: float) -> None:
    try:
        validate(schedule, limit)
    except ScheduleError as error:
        raise ScheduleError(f"memory_limit {limit:g}: {error}") from None


def _factors(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise ScheduleError(
            f"{option} {text} needs numbers with commas between them, as in 1,1,2,1."
        ) from None


def _sentence(message: str, args: argparse.Namespace) -> str:
    """A ScheduleError for who typed options."""
    for name, option in OPTIONS.items():
        if message.startswith(f"{name} "):
            return option + message.removeprefix(name)
    if "factors do not fit" in message:
        what, given = "stage", args.stage_factors
        if message.partition(":")[0].endswith("slices"):
            what, given = "slice", args.slice_factors
        return f"--{what}-factors {given}: {message}"
    if message.startswith(("schedule ", "--")):
        return message
    return f"--pp {args.pp} --microbatches {args.microbatches}: {message}"


def table(timeline: Timeline) -> str:
    """What a person wants to know, at most 100 columns wide."""
    schedule, found = timeline.schedule, metrics(timeline)
    rows = [_row(schedule, found, rank) for rank in range(schedule.ranks)]
    heads = ("rank", "stages", "peak until W", "until B", "order")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join(
        [
            f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches",
            f"makespan          {found.makespan:g}",
            f"bubble            {found.bubble_makespan:g}, {found.bubble_ratio:.2%} of the "
            f"makespan, {found.bubble_ratio_of_work:.2%} of the busiest rank's work",
            f"bubble per stage  {found.bubble_stage:g}, {found.bubble_ratio_stage:.2%} of the time "
            "from a rank's first start to its last end",
            "peaks             in activations of one stage and micro-batch",
            "",
            *(f"{line[: COLUMNS - 3]}..." if len(line) > COLUMNS else line for line in lines),
        ]
    )


def _row(schedule: Schedule, found: Metrics, rank: int) -> tuple[str, ...]:
    peaks = (found.peak_until_W[rank], found.peak_until_B[rank])
    stages = " ".join(map(str, schedule.placement[rank]))
    items = " ".join(map(str, schedule.lists[rank][:COLUMNS]))
    return (str(rank), stages, *(f"{peak:g}" for peak in peaks), items)
