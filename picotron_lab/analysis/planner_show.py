"""`run.py plan`: the fastest ways to train a model on so many GPUs, predicted: printed or drawn.

--json   {"question": {model, gpus, hardware, sequence_length, global_batch_size, dtype},
          "usable_bytes_per_gpu", "considered", "fitting", "predicted": numbers of candidates,
          "complete": whether the search came to its end,
          "choices": best first [{"options": as run.py takes them, "command": the whole of it,
             "mesh": {option: value}, "micro_batch_size", "recompute", "step_seconds",
             "parts": {part of the step: seconds}, "bottleneck", "bubble_share",
             "tokens_per_second", "tokens_per_second_per_gpu", "flops_per_second_per_gpu", "mfu",
             "hfu", "memory_bytes_per_gpu", "memory": {category: bytes}}],
          "why_not_second": a sentence, empty where there is one choice}
--measure  this machine in place of a named one: this_machine.py; a disturbed measurement errs by as
         much as the machine was disturbed (benchmarks/this_machine.py)
Read     add_options -> show -> table, as_dict; seen_through
Tests    tests/test_planner.py
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from picotron_lab.analysis import this_machine
from picotron_lab.analysis.hardware import Hardware, hardware
from picotron_lab.analysis.layer_time import CONSTANTS, MEMORY, Place, layer
from picotron_lab.analysis.planner import GIB, Choice, Plan, plan, usable, why
from picotron_lab.analysis.planner_space import Question
from picotron_lab.config import (
    PRESETS,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    model_from_file,
    require,
)
from picotron_lab.precision import DTYPES

PICTURES = (".png", ".svg", ".pdf")
MOST_ROWS = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run.py plan` understands."""
    parser.add_argument("--model", default="", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", default="", metavar="FILE.json", help="in place of --model")
    parser.add_argument(
        "--vocab-size", type=int, default=0, metavar="N",
        help="entries of the vocabulary, where the model leaves them to a tokenizer",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="all of them are used")
    parser.add_argument("--hardware", default="", metavar="NAME", help="(default: h100)")
    parser.add_argument(
        "--measure", action="store_true",
        help="the hardware is this machine, measured in some seconds; --gpus are processes on it, "
        "with OMP_NUM_THREADS=1",
    )  # fmt: skip
    parser.add_argument(
        "--sequence-length", type=int, default=Question.sequence_length, metavar="N",
        help=f"tokens per sequence (default: {Question.sequence_length})",
    )  # fmt: skip
    parser.add_argument(
        "--global-batch-size", type=int, default=0, metavar="N",
        help="sequences per step (default: 4 Mi tokens, at least one sequence for every 8 GPUs, "
        "and a number that many meshes can share)",
    )  # fmt: skip
    parser.add_argument("--dtype", default=Question.dtype, help=f"(default: {Question.dtype})")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows (default: 10)")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="speed and memory of all, as a picture"
    )


def show(args: argparse.Namespace) -> None:
    """Plan, and print or draw what was asked for.

    Raises  ConfigError, one sentence that names the option, its value and one that works
    """
    require(
        args.plot is None or args.plot.suffix in PICTURES,
        f"--plot {args.plot} ends in none of {', '.join(PICTURES)}: try --plot plan.png.",
    )
    require(
        args.plot is None or args.plot.parent.is_dir(),
        f"--plot {args.plot} lies in a folder that is not there; try --plot plan.png.",
    )
    require(
        1 <= args.top <= MOST_ROWS,
        f"--top {args.top} must lie between 1 and {MOST_ROWS}; try --top 10.",
    )
    found = plan(question(args), args.top)
    if args.plot:
        from picotron_lab.analysis.planner_plots import save

        save(found, args.plot)
    print(json.dumps(as_dict(found)) if args.json else table(found))


def question(args: argparse.Namespace) -> Question:
    """What was asked for on the command line."""
    require(
        bool(args.model) != bool(args.config),
        "--model names what is to be trained, or --config describes it: give one of them, such as "
        "--model llama3-8b.",
    )
    require(
        args.global_batch_size >= 0,
        f"--global-batch-size {args.global_batch_size} must be at least 1; try "
        "--global-batch-size 512.",
    )
    model = model_from_file(args.config) if args.config else _preset(args.model)
    given = f"--config {args.config}" if args.config else f"--model {args.model}"
    if args.vocab_size:
        model = replace(model, vocab_size=args.vocab_size)
        given += f" --vocab-size {args.vocab_size}"
    require(
        not (args.measure and args.hardware),
        f"--hardware {args.hardware} and --measure both say where it is trained; leave one out.",
    )
    ask = Question(
        model, args.gpus, hardware(args.hardware or "h100"), args.sequence_length,
        args.global_batch_size, args.dtype, given,
    )  # fmt: skip
    if not args.measure:
        return ask
    found = this_machine.measure(model, ask.training(), args.gpus)
    return replace(ask, hardware=seen_through(found))


def seen_through(found: this_machine.Measured) -> Hardware:
    """Hardware whose predictions are what was measured: of a layer, of its matmuls, of messages.

    Predictions multiply rates by the shares of layer_time.py's CONSTANTS, which were fitted to
    GPUs; so measured rates are divided by them. Memory's is what a layer's counted bytes take in
    the time that its other parts leave, and at most what a copy reaches.
    """
    dtype, share = DTYPES[found.training.dtype], CONSTANTS.links
    best_share = found.matmuls / found.best / CONSTANTS.matmuls
    links = tuple((size, size * 2 * (found.ranks - 1) / found.ranks / seconds / share)
                  for size, seconds in found.messages)  # fmt: skip
    known = Hardware(
        "ranks of this machine", {dtype: found.best}, best_share, found.memory_bytes, 1.0,
        links or ((1.0, found.copies),), found.ranks, 1.0, found.ranks,
    )  # fmt: skip
    passes = layer(Place(found.model, MeshConfig(), found.training, known))
    total = sum(each.total() for each in passes.values())
    moved = sum(each[MEMORY] for each in passes.values())  # seconds at 1 byte per second
    left = max(found.layer - (total - moved), moved * CONSTANTS.operators / found.copies)
    return replace(known, memory_bandwidth=moved / left)


def _preset(name: str) -> ModelConfig:
    require(name in PRESETS, f"--model {name} is not one of {', '.join(PRESETS)}.")
    return PRESETS[name]


# ---- what is told


def table(found: Plan) -> str:
    """For people: a row per choice, how to start the first, and why the second lost."""
    ask, best = found.question, found.choices[0]
    rows = [_row(choice) for choice in found.choices]
    heads = ("GiB/GPU", "step s", "tokens/s", "per GPU", "TFLOP/s", "MFU", "bottleneck", "options")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i < 6 else cell.ljust(w) for i, (cell, w) in enumerate(
            zip(row, widths, strict=True))).rstrip()
        for row in (heads, *rows)
    ]  # fmt: skip
    day = best.time.tokens_per_second * 86_400 / 1e9
    end = "" if found.complete else ", and stopped there: others may be as good"
    return "\n".join(
        [
            f"{ask.model.name} on {ask.gpus} {ask.hardware.name}: {ask.batch} sequences of "
            f"{ask.sequence_length} a step, {ask.dtype}; {usable(ask) / GIB:.1f} GiB of each used",
            f"{found.considered} candidates, {found.fitting} may fit, looked closely at "
            f"{found.predicted}{end}",
            "",
            *lines,
            "",
            f"first   {_number(day)} billion tokens a day: {command(best, ask)}",
            *(f"second  {why(best, other)}" for other in found.choices[1:2]),
            "Predictions: measure the first few.",
        ]
    )


def _row(choice: Choice) -> tuple[str, ...]:
    time = choice.time
    return (
        f"{choice.memory.peak / GIB:.1f}", _number(time.seconds), f"{time.tokens_per_second:,.0f}",
        f"{time.tokens_per_second_per_rank:,.0f}", f"{_tera(choice.flops_per_gpu)}",
        f"{time.mfu:.1%}", time.bottleneck, choice.candidate.options(),
    )  # fmt: skip


def _number(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _tera(rate: float) -> str:
    """FLOP/s in units of 1e12: of a CPU, hundredths count."""
    return f"{rate / 1e12:.0f}" if rate >= 1e13 else f"{rate / 1e12:.2g}"


def command(choice: Choice, ask: Question) -> str:
    """What starts it, on nodes that have equally many GPUs; HEAD is the first one's name."""
    node = max(n for n in range(1, ask.hardware.node + 1) if ask.gpus % n == 0)
    nodes = ""
    if ask.gpus > node:
        nodes = f"--nnodes {ask.gpus // node} --rdzv-backend c10d --rdzv-endpoint HEAD:29500 "
    options = [ask.given or f"--model {ask.model.name}"]
    options += [f"--sequence-length {ask.sequence_length}", f"--global-batch-size {ask.batch}"]
    if ask.dtype != TrainConfig.dtype:
        options.append(f"--dtype {ask.dtype}")
    start = f"torchrun {nodes}--nproc-per-node {node} run.py" if ask.gpus > 1 else "python run.py"
    return " ".join([start, *options, choice.candidate.options()])


def as_dict(found: Plan) -> dict:
    """For programs: see --json above."""
    ask = found.question
    second = found.choices[1:2]
    return {
        "question": {
            "model": ask.model.name, "gpus": ask.gpus, "hardware": ask.hardware.name,
            "sequence_length": ask.sequence_length, "global_batch_size": ask.batch,
            "dtype": ask.dtype,
        },
        "usable_bytes_per_gpu": usable(ask),
        "considered": found.considered,
        "fitting": found.fitting,
        "predicted": found.predicted,
        "complete": found.complete,
        "choices": [_choice(choice, ask) for choice in found.choices],
        "why_not_second": why(found.choices[0], second[0]) if second else "",
    }  # fmt: skip


def _choice(choice: Choice, ask: Question) -> dict:
    time, cfg = choice.time, choice.candidate.cfg
    return {
        "options": choice.candidate.options(),
        "command": command(choice, ask),
        "mesh": asdict(choice.candidate.mesh),
        "micro_batch_size": cfg.micro_batch_size,
        "recompute": cfg.recompute,
        "step_seconds": time.seconds,
        "parts": dict(time.parts),
        "bottleneck": time.bottleneck,
        "bubble_share": time.bubble,
        "tokens_per_second": time.tokens_per_second,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_rank,
        "flops_per_second_per_gpu": choice.flops_per_gpu,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "memory_bytes_per_gpu": choice.memory.peak,
        "memory": asdict(choice.memory),
    }
