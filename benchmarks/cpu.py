"""Tokens per second on this machine's CPU, of the real run.py and of Picotron, in the same run.

    python benchmarks/cpu.py                                 10 minutes
    python benchmarks/cpu.py --picotron picotron-checkout    with Picotron's rows, 20 minutes
    python benchmarks/cpu.py --all                           with ZeRO, recomputation, models
    python benchmarks/cpu.py --only peer-plain peer-fused

Every row (cpu_rows.py) is trained in fresh processes, a few steps at a time: all rows once, then
all again, for a machine with neighbours is fast in one minute and slow in the next. The first steps
of a process are warm-up. Reported are the median over the rounds of each round's median step, which
is what a user sees, and the best step of all, which neighbours disturb least. A ratio of medians is
taken within each round, and the median of these is reported. Compare rows of one run only.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import cpu_hardware, describe, markdown
from cpu_rows import CUT, LAYOUTS, MATCHED, PEER, ROWS, SEQUENCE, WARM_UP, Run, run_row

from picotron_lab import partition
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.registry import build as schedule
from picotron_lab.schedules.simulate import simulate

MATMULS = ((1024, 256, 768), (1024, 768, 256), (2048, 2048, 2048))  # m, k, n: two of the MLP
FUSED_OVER_PLAIN = (("tiny", "tiny-fused", "tiny-plain"), ("small", "small-fused", "small-plain"))
APART = (("2 processes (dp) over 2 apart", "peer-fused-dp2", "peer-fused-apart"),)
VARIANTS = (  # (what is compared, one row, the other)
    ("cp2: all-gather over zigzag", "peer-fused-cp2-all-gather", "peer-fused-cp2"),
    ("cp2: ulysses over zigzag", "peer-fused-cp2-ulysses", "peer-fused-cp2"),
    ("sequence parallelism over tp alone", "peer-fused-tp2-sp", "peer-fused-tp2"),
    ("ZeRO-1 over dp", "peer-fused-zero1", "peer-fused-dp2"),
    ("ZeRO-3 over dp", "peer-fused-zero3", "peer-fused-dp2"),
    ("full recomputation over none", "peer-fused-recompute", "peer-fused"),
)  # fmt: skip
SCALING = (  # (what follows a row's name, what follows its base's)
    ("-2-threads", ""), ("-dp2", ""), ("-tp2", ""), ("-cp2", ""), ("-pp2", ""), ("-pp2-8", "-8"),
    ("-pp2-8-even", "-8"), ("-pp2-8-vocab1", "-8"), ("-pp2-8-vocab2", "-8"),
)  # fmt: skip
PICOTRON_BAR, APART_BAR = 1.3, 0.95
PIPELINE_BAR = 0.95  # of ideal, with 8 micro-batches
Found = dict[str, list[Run]]  # of each row its run in every round


def matmul_rate() -> float:
    """FLOP/s of one thread in fp32: the median over the shapes of each one's median call."""
    torch.set_num_threads(1)
    rates = []
    for m, k, n in MATMULS:
        a, b = torch.randn(m, k), torch.randn(k, n)
        seconds = []
        for _ in range(9):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - start)
        rates.append(2 * m * k * n / statistics.median(seconds))
    return statistics.median(rates)


def run_rounds(names: list[str], args: argparse.Namespace) -> tuple[Found, list[float]]:
    """All rows, `rounds` times; and the matmul rate before each round and after the last."""
    found, rates = {name: [] for name in names}, [matmul_rate()]
    for turn in range(args.rounds):
        for name in names:
            run = run_row(ROWS[name], args.steps, args.picotron)
            print(f"round {turn + 1}, {name}: {run.median_speed:,.0f} tok/s", file=sys.stderr)
            found[name].append(run)
        rates.append(matmul_rate())
    return found, rates


def row_line(name: str, runs: list[Run], rate: float) -> list[str]:
    """One line of the table of rows."""
    row, tokens = ROWS[name], runs[0].tokens
    median = statistics.median(run.median_speed for run in runs)
    best = max(run.best_speed for run in runs)
    kinds = f"{row.ranks * row.copies} x {row.threads}"
    speeds = [f"{tokens / median:.3f}", f"{tokens / best:.3f}", f"{median:,.0f}", f"{best:,.0f}"]
    of_rate = f"{median * row.flops_per_token / (rate * row.cores):.2f}"
    losses = f"{runs[0].losses[0]:.2f} to {runs[0].losses[-1]:.2f}"
    return [name, kinds, f"{tokens:,}", *speeds, of_rate, losses]


def ratios(fast: list[Run], slow: list[Run]) -> tuple[float, float]:
    """Tokens per second of `fast` over those of `slow`: of medians, of best steps."""
    pairs = zip(fast, slow, strict=True)
    medians = statistics.median(a.median_speed / b.median_speed for a, b in pairs)
    best = [max(run.best_speed for run in runs) for runs in (fast, slow)]
    return medians, best[0] / best[1]


def ratio_lines(
    found: Found, pairs: Sequence[tuple[str, str, str]], bar: float | None = None
) -> list[list[str]]:
    """Of (text, fast row, slow row) those whose rows were run."""
    lines = []
    for text, fast, slow in pairs:
        if fast in found and slow in found:
            both = ratios(found[fast], found[slow])
            lines.append([text, *(f"{ratio:.2f}" for ratio in both), *judged(bar, both[0])])
    return lines


def judged(bar: float | None, value: float) -> list[str]:
    """A column such as '1.30: met'; none where there is no bar."""
    return [f"{bar:.2f}: {'met' if value >= bar else 'missed'}"] if bar else []


def scaling_lines(found: Found) -> list[list[str]]:
    """Speed-ups of two threads or processes, of ours and of Picotron."""
    lines = []
    for suffix, base in SCALING:
        for program in ("peer-plain", "peer-fused", "picotron"):
            name, alone = program + suffix, program + base
            if name in found and alone in found:
                medians, best = ratios(found[name], found[alone])
                ideal = ideal_speed_up(program, suffix)
                bar = judged(PIPELINE_BAR, medians / ideal) if base == "-8" else [""]
                figures = (medians, best, ideal, medians / ideal, best / ideal)
                lines.append([f"{name} over {alone}", *(f"{x:.2f}" for x in figures), *bar])
    return lines


def ideal_speed_up(program: str, suffix: str) -> float:
    """2, less what a pipeline idles: the simulated 1F1B of two stages as long as their operations.

    A stage has its layers, the last one the head too. Fused, the head's forward makes its gradients
    as well: F lasts as long as F, B and W together elsewhere. A split head makes both stages alike.
    """
    if "-pp2" not in suffix:
        return 2.0
    m = 8 if "-8" in suffix else 2
    layer, _, head = partition.costs(PEER, SEQUENCE)
    first, last = (2, 2) if program == "picotron" or suffix.endswith("even") else CUT
    head_F, head_BW = (3 * head, 0.0) if program == "peer-fused" else (head, head)
    work = 3 * (PEER.layers * layer + head)
    stages = ((first * layer,) * 3, (last * layer + head_F, *[last * layer + head_BW] * 2))
    if "vocab" in suffix:
        stages = ((work / 6,) * 3,) * 2
    return m * work / simulate(schedule("1f1b", 2, m), Costs(factors=stages)).makespan


def beside_picotron() -> list[tuple[str, str, str]]:
    """Ours, fused, and Picotron's row of every layout."""
    pairs = [(f"peer-fused{s} over picotron{s}", f"peer-fused{s}", f"picotron{s}") for s in LAYOUTS]
    reduced = "picotron-cp2-reduced"
    return [*pairs, (f"peer-fused-cp2 over {reduced}", "peer-fused-cp2", reduced)]


def report(found: Found, rates: list[float]) -> None:
    """Print all tables that have rows."""
    each = ", ".join(f"{rate / 1e9:.0f}" for rate in rates)
    rate = statistics.median(rates)
    print(describe(cpu_hardware()), "\n")
    print(f"Matmuls of one thread, fp32, before each round and after the last: {each} GFLOP/s.")
    print(f"'of matmul rate': model FLOP/s of the median per thread, over {rate / 1e9:.0f}.\n")
    header = ["row", "processes x threads", "tokens/step", "median s/step", "best s/step",
              "median tok/s", "best tok/s", "of matmul rate", "loss"]  # fmt: skip
    print(markdown(header, [row_line(name, runs, rate) for name, runs in found.items()]))
    plain = [(f"peer{s}", f"peer-fused{s}", f"peer-plain{s}") for s in LAYOUTS]
    two = ["of medians", "of best steps"]
    tables = (
        (["ours over Picotron", *two, "bar"],
         ratio_lines(found, beside_picotron(), PICOTRON_BAR)),
        (["speed-up", *two, "ideal", "of ideal, medians", "of ideal, best", "bar"],
         scaling_lines(found)),
        (["what data parallelism costs", *two, "bar"], ratio_lines(found, APART, APART_BAR)),
        (["ratio of tokens per second", *two], ratio_lines(found, VARIANTS)),
        (["fused over plain", *two], ratio_lines(found, [*plain, *FUSED_OVER_PLAIN])),
    )  # fmt: skip
    for head, lines in tables:
        if lines:
            print("\n" + markdown(head, lines))


def parse() -> argparse.Namespace:
    """The options, checked; `only` lists the rows to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=WARM_UP + 4,
                        help=f"of a row in a round; {WARM_UP} of them are warm-up")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="how often all rows are run")
    parser.add_argument("--picotron", type=Path, metavar="PATH",
                        help="a checkout of github.com/huggingface/picotron, commit 59714b1: adds "
                             "its rows")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW",
                       help=f"some of {', '.join(ROWS)}")  # fmt: skip
    which.add_argument("--all", action="store_true", help="also rows that Picotron has no like of")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves nothing to time; try --steps {WARM_UP + 4}.")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} runs nothing; try --rounds 3.")
    if args.picotron and not (args.picotron / "picotron" / "model.py").is_file():
        parser.error(f"--picotron {args.picotron} has no picotron/model.py; give the folder that "
                     "git clone https://github.com/huggingface/picotron made.")  # fmt: skip
    theirs = [name for name in args.only or () if ROWS[name].picotron]
    if theirs and not args.picotron:
        parser.error(f"--only {theirs[0]} needs Picotron; add --picotron PATH, a checkout of it.")
    rows = ROWS if args.all else MATCHED
    args.only = args.only or [name for name in rows if args.picotron or not rows[name].picotron]
    return args


def main() -> None:
    """Run the rows in rounds and print the tables."""
    args = parse()
    report(*run_rounds(args.only, args))
    if not args.picotron:
        print("\nPicotron's rows: clone https://github.com/huggingface/picotron, check out 59714b1 "
              "and add --picotron and its path.")  # fmt: skip


if __name__ == "__main__":
    main()
