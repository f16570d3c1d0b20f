"""Predicted beside measured on this machine's CPU: analysis/step_time.py, then the real run.py.

    python benchmarks/this_machine.py                about three minutes
    python benchmarks/this_machine.py --ranks 2 --repeat 3

The machine is measured for some seconds (picotron_lab/analysis/this_machine.py), a step predicted,
and then trained: the tiny model with run.py's own options, data-parallel, one thread for each rank
(OMP_NUM_THREADS=1, as torchrun has it). The median step counts. Then it is measured again: where
the two predictions differ, others used the machine meanwhile, and the row tells little.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from common import cpu_hardware, describe, markdown
from cpu import WARM_UP, Row, run_row

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.analysis import step_time  # noqa: E402
from picotron_lab.analysis.planner_show import seen_through  # noqa: E402
from picotron_lab.analysis.this_machine import measure  # noqa: E402
from picotron_lab.config import PRESETS, MeshConfig, TrainConfig  # noqa: E402

BYTES, VOCABULARY = 256, 320  # ids of the data; of run.py's own tokenizer 257, rounded up to 64
TINY = replace(PRESETS["tiny"], vocab_size=VOCABULARY)


def predicted(ranks: int) -> float:
    """Tokens per second, after measuring."""
    cfg = TrainConfig()
    device = seen_through(measure(TINY, cfg, ranks))
    return step_time.predict(TINY, MeshConfig(dp=ranks), cfg, device).tokens_per_second


def line(ranks: int, steps: int) -> list[str]:
    """Predict, train, predict: one line of the table."""
    print(f"measuring for {ranks} ranks, then training", file=sys.stderr)
    before = predicted(ranks)
    tokens, seconds = run_row(Row(ranks, 1, BYTES, f"--vocab-size {VOCABULARY}"), steps)
    after = predicted(ranks)
    found = tokens / statistics.median(seconds)
    spread = f"{tokens / max(seconds):,.0f} to {tokens / min(seconds):,.0f}"
    errors = [f"{told / found - 1:+.0%}" for told in (before, after)]
    return [str(ranks), f"{before:,.0f}", f"{found:,.0f}", f"{after:,.0f}", *errors, spread]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=20, help=f"{WARM_UP} of them are warm-up")
    parser.add_argument("--repeat", type=int, default=2, metavar="N")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves nothing to time; try --steps {WARM_UP + 15}.")
    rows = [line(ranks, args.steps) for _ in range(args.repeat) for ranks in args.ranks]
    print(describe(cpu_hardware()), "\n")
    header = ["ranks", "predicted before", "measured tok/s", "predicted after", "error before",
              "error after", "slowest to fastest step"]  # fmt: skip
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
