"""Tokens per second on this machine's CPU: the real run.py, a fresh process for every row.

    python benchmarks/cpu.py                                     all rows, about ten minutes
    python benchmarks/cpu.py --only peer-plain peer-fused

Each row trains on random tokens with Zipf's frequencies and reads `tokens_per_second` of every step
from metrics.jsonl. The first steps are warm-up; reported are the median of the others and the best
one, which a busy machine disturbs least. Compare rows of one run only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import ROOT, cpu_hardware, describe, markdown

WARM_UP = 5
TOKENS = 1_000_000
# the configuration that Picotron was measured with, 5.25 million parameters (see README.md)
PEER = (
    "--hidden-size 256 --ffn-size 768 --layers 4 --heads 8 --kv-heads 4 --vocab-size 4096 "
    "--sequence-length 256 --micro-batch-size 4 --dtype float32 --optimizer adamw"
)


@dataclass(frozen=True)
class Row:
    """One way to run: ranks are processes, each with so many threads."""

    ranks: int
    threads: int
    vocabulary: int  # token ids of the data; the model's own vocabulary may be larger
    options: str


CORES = os.cpu_count() or 1
ROWS = {
    "peer-plain": Row(1, 1, 4096, f"{PEER} --global-batch-size 8 --impl plain"),
    "peer-fused": Row(1, 1, 4096, f"{PEER} --global-batch-size 8 --impl fused"),
    "peer-fused-2-threads": Row(1, 2, 4096, f"{PEER} --global-batch-size 8 --impl fused"),
    "peer-fused-dp2": Row(2, 1, 4096, f"{PEER} --global-batch-size 16 --impl fused"),
    "peer-plain-tp2": Row(2, 1, 4096, f"{PEER} --global-batch-size 8 --impl plain --tp 2"),
    "peer-fused-tp2": Row(2, 1, 4096, f"{PEER} --global-batch-size 8 --impl fused --tp 2"),
    "peer-fused-tp2-sp": Row(
        2, 1, 4096, f"{PEER} --global-batch-size 8 --impl fused --tp 2 --sequence-parallel"
    ),
    "peer-fused-zero1": Row(2, 1, 4096, f"{PEER} --global-batch-size 16 --impl fused --zero 1"),
    "peer-fused-zero3": Row(2, 1, 4096, f"{PEER} --global-batch-size 16 --impl fused --zero 3"),
    "peer-fused-recompute": Row(
        1, 1, 4096, f"{PEER} --global-batch-size 8 --impl fused --recompute full"
    ),
    "tiny-plain": Row(1, CORES, 256, "--model tiny --impl plain"),
    "tiny-fused": Row(1, CORES, 256, "--model tiny --impl fused"),
    "small-plain": Row(1, CORES, 256, "--model small --global-batch-size 8 --impl plain"),
    "small-fused": Row(1, CORES, 256, "--model small --global-batch-size 8 --impl fused"),
}
RATIOS = (  # (what is compared, faster row, slower row)
    ("fused over plain, Picotron's configuration", "peer-fused", "peer-plain"),
    ("fused over plain, tiny", "tiny-fused", "tiny-plain"),
    ("fused over plain, small", "small-fused", "small-plain"),
    ("2 threads over 1", "peer-fused-2-threads", "peer-fused"),
    ("2 processes (dp) over 1", "peer-fused-dp2", "peer-fused"),
    ("2 processes (tp) over 1", "peer-fused-tp2", "peer-fused"),
    ("fused over plain, tp", "peer-fused-tp2", "peer-plain-tp2"),
    ("sequence parallelism over tp alone", "peer-fused-tp2-sp", "peer-fused-tp2"),
    ("ZeRO-1 over dp", "peer-fused-zero1", "peer-fused-dp2"),
    ("ZeRO-3 over dp", "peer-fused-zero3", "peer-fused-dp2"),
    ("full recomputation over none", "peer-fused-recompute", "peer-fused"),
)


def write_tokens(path: Path, vocabulary: int) -> None:
    """A token file in which id k appears with a frequency of about 1 / (k + 1), as words do."""
    chances = 1 / np.arange(1, vocabulary + 1)
    dice = np.random.default_rng(0)
    tokens = dice.choice(vocabulary, size=TOKENS, p=chances / chances.sum())
    np.save(path, tokens.astype(np.uint16))


def command(row: Row, steps: int, folder: Path) -> list[str]:
    """What a user would type for this row."""
    start = [sys.executable]
    if row.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(row.ranks)]
    files = ["--data", str(folder / "tokens.npy"), "--cache-dir", str(folder / "cache")]
    files += ["--log-file", str(folder / "metrics.jsonl")]
    only_training = ["--validation-fraction", "0", "--sample-tokens", "0"]
    chosen = [*row.options.split(), "--steps", str(steps)]
    return [*start, str(ROOT / "run.py"), *chosen, *files, *only_training]


def run_row(row: Row, steps: int) -> tuple[int, list[float]]:
    """Train; return the tokens of a step and the seconds of each step after the warm-up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens.npy", row.vocabulary)
        environment = {**os.environ, "OMP_NUM_THREADS": str(row.threads)}
        done = subprocess.run(
            command(row, steps, folder), env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"the run failed: {done.stderr[-2000:]}")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    seconds = [step["tokens"] / step["tokens_per_second"] for step in metrics]
    return metrics[0]["tokens"], seconds[WARM_UP:]


def table_line(name: str, tokens: int, seconds: list[float]) -> list[str]:
    """One line of the table of rows."""
    row, median, best = ROWS[name], statistics.median(seconds), min(seconds)
    seconds_and_speeds = [f"{median:.3f}", f"{best:.3f}"]
    seconds_and_speeds += [f"{tokens / median:,.0f}", f"{tokens / best:,.0f}"]
    return [name, f"{row.ranks} x {row.threads}", f"{tokens:,}", *seconds_and_speeds]


def ratio_line(fast: tuple[int, list[float]], slow: tuple[int, list[float]]) -> list[str]:
    """Tokens per second of `fast` over those of `slow`: of the medians, of the best steps."""
    speeds = [[tokens / pick(s) for tokens, s in (fast, slow)] for pick in (statistics.median, min)]
    return [f"{quicker / slower:.2f}" for quicker, slower in speeds]


def main() -> None:
    """Run the rows one after the other and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help=f"{WARM_UP} of them are warm-up")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"some of {', '.join(ROWS)}")  # fmt: skip
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves nothing to time; try --steps {WARM_UP + 25}.")
    found = {}
    for name in args.only:
        print(f"running {name}", file=sys.stderr)
        found[name] = run_row(ROWS[name], args.steps)
    print(describe(cpu_hardware()), "\n")
    header = ["row", "processes x threads", "tokens/step", "median s/step", "best s/step",
              "median tok/s", "best tok/s"]  # fmt: skip
    print(markdown(header, [table_line(name, *result) for name, result in found.items()]), "\n")
    pairs = [(text, a, b) for text, a, b in RATIOS if a in found and b in found]
    ratios = [[text, *ratio_line(found[a], found[b])] for text, a, b in pairs]
    if ratios:
        print(markdown(["ratio of tokens per second", "of medians", "of best steps"], ratios))


if __name__ == "__main__":
    main()
