"""The rows of cpu.py: what each one starts, and what it reports.

Ours      the real run.py in a fresh process, with torchrun where a row has several ranks
Picotron  picotron_row.py: its own model and loops, always with torchrun
Peer      the configuration in which Picotron was measured (README.md): 4.2 million matmul weights,
          micro-batches of 4 sequences of 256 tokens, fp32, AdamW. A rank has 2 of them in a step,
          in rows whose name ends in 8 eight
Apart     two one-process runs that know nothing of each other, started at the same moment: the
          cores and the memory bus are shared as in dp2, and nothing is sent. Their speeds add up
Data      random tokens with Zipf's frequencies, the same for every row
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from common import ROOT

sys.path.insert(0, str(ROOT))

from picotron_lab.analysis import cost  # noqa: E402
from picotron_lab.config import PRESETS, ModelConfig  # noqa: E402

WARM_UP = 2
TOKENS = 1_000_000
PEER = ModelConfig(vocab_size=4096, hidden_size=256, ffn_size=768, layers=4, heads=8, kv_heads=4)
SEQUENCE, MICRO_BATCH = 256, 4
PEER_OPTIONS = (
    f"--hidden-size {PEER.hidden_size} --ffn-size {PEER.ffn_size} --layers {PEER.layers} "
    f"--heads {PEER.heads} --kv-heads {PEER.kv_heads} --vocab-size {PEER.vocab_size} "
    f"--sequence-length {SEQUENCE} --micro-batch-size {MICRO_BATCH} "
    "--dtype float32 --optimizer adamw"
)


@dataclass(frozen=True)
class Row:
    """One way to run: ranks are processes, each with so many threads.

    options  of run.py, or of picotron_row.py where `picotron`
    copies   independent runs at the same moment, of `ranks` processes each
    """

    ranks: int
    threads: int
    options: str
    model: str = "peer"
    picotron: bool = False
    copies: int = 1

    @property
    def cores(self) -> int:
        """Threads of all processes."""
        return self.ranks * self.threads * self.copies

    @property
    def flops_per_token(self) -> float:
        """6N + 12 L H C T, as analysis/cost.py counts, whatever the program computes."""
        if self.model == "peer":
            return cost.flops_per_token(PEER, SEQUENCE)
        # 256 bytes and the tokenizer's special token, rounded up; 128 is run.py's default length
        return cost.flops_per_token(replace(PRESETS[self.model], vocab_size=320), 128)


@dataclass(frozen=True)
class Run:
    """What one run of a row said: tokens of a step, seconds of its timed steps, losses of all."""

    tokens: int
    seconds: list[float]
    losses: list[float]

    @property
    def median_speed(self) -> float:
        """Tokens per second of the median step."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def best_speed(self) -> float:
        """Tokens per second of the fastest step."""
        return self.tokens / min(self.seconds)


@dataclass(frozen=True)
class Layout:
    """Rows that train alike: ours plain, ours fused, Picotron's.

    batch    sequences of a step, over all ranks
    options  of ours
    theirs   of Picotron's row; it has 2 micro-batches if that says nothing else
    """

    ranks: int
    threads: int
    batch: int
    options: str
    theirs: str

    def rows(self, suffix: str) -> Iterator[tuple[str, Row]]:
        """Named peer-plain, peer-fused and picotron, each with the suffix."""
        for impl in ("plain", "fused"):
            yield f"peer-{impl}{suffix}", self.ours(f"--impl {impl}")
        yield f"picotron{suffix}", Row(self.ranks, self.threads, self.theirs, picotron=True)

    def ours(self, more: str) -> Row:
        """A row of ours with more options."""
        options = f"{PEER_OPTIONS} --global-batch-size {self.batch} {self.options} {more}"
        return Row(self.ranks, self.threads, options)


CUT = (3, 1)  # layers of both stages: the head costs as much as 1.1 layers; others: ...-pp2-8-...
PIPELINE = f"--pp 2 --pp-layers {CUT[0]},{CUT[1]}"
ONE, EIGHT = Layout(1, 1, 8, "", ""), Layout(1, 1, 32, "", "--micro-batches 8")
DP, TP = Layout(2, 1, 16, "", "--dp 2"), Layout(2, 1, 8, "--tp 2", "--tp 2")
PP8 = Layout(2, 1, 32, "--pp 2", "--pp 2 --micro-batches 8")
LAYOUTS = {  # what follows the row's name: how it runs
    "": ONE,
    "-2-threads": replace(ONE, threads=2),
    "-dp2": DP,
    "-tp2": TP,
    "-pp2": Layout(2, 1, 8, PIPELINE, "--pp 2"),
    "-cp2": Layout(2, 1, 8, "--cp 2", "--cp 2"),
    "-8": EIGHT,
    "-pp2-8": replace(PP8, options=PIPELINE),
}
CORES = os.cpu_count() or 1
MATCHED = {name: row for suffix, layout in LAYOUTS.items() for name, row in layout.rows(suffix)}
MATCHED["peer-fused-apart"] = replace(ONE.ours("--impl fused"), copies=2)
MATCHED["picotron-cp2-reduced"] = Row(2, 1, "--cp 2 --reduce", picotron=True)
OTHERS = {
    "peer-fused-pp2-8-even": PP8.ours("--impl fused --pp-layers 2,2"),
    "peer-fused-pp2-8-vocab1": PP8.ours("--impl fused --schedule 1f1b-vocab1"),
    "peer-fused-pp2-8-vocab2": PP8.ours("--impl fused --schedule 1f1b-vocab2"),
    "peer-fused-cp2-all-gather": LAYOUTS["-cp2"].ours("--impl fused --cp-kind all-gather"),
    "peer-fused-cp2-ulysses": LAYOUTS["-cp2"].ours("--impl fused --cp-kind ulysses"),
    "peer-fused-tp2-sp": TP.ours("--impl fused --sequence-parallel"),
    "peer-fused-zero1": DP.ours("--impl fused --zero 1"),
    "peer-fused-zero3": DP.ours("--impl fused --zero 3"),
    "peer-fused-recompute": ONE.ours("--impl fused --recompute full"),
    "tiny-plain": Row(1, CORES, "--model tiny --impl plain", "tiny"),
    "tiny-fused": Row(1, CORES, "--model tiny --impl fused", "tiny"),
    "small-plain": Row(1, CORES, "--model small --global-batch-size 8 --impl plain", "small"),
    "small-fused": Row(1, CORES, "--model small --global-batch-size 8 --impl fused", "small"),
}
ROWS = MATCHED | OTHERS


def write_tokens(path: Path, vocabulary: int) -> None:
    """A token file in which id k appears with a frequency of about 1 / (k + 1), as words do."""
    chances = 1 / np.arange(1, vocabulary + 1)
    dice = np.random.default_rng(0)
    tokens = dice.choice(vocabulary, size=TOKENS, p=chances / chances.sum())
    np.save(path, tokens.astype(np.uint16))


def command(row: Row, steps: int, folder: Path, picotron: Path | None) -> list[str]:
    """What a user would type for this row."""
    start = [sys.executable]
    if row.ranks > 1 or row.picotron:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(row.ranks)]
    tokens, chosen = str(folder / "tokens.npy"), [*row.options.split(), "--steps", str(steps)]
    if row.picotron:
        program = Path(__file__).with_name("picotron_row.py")
        return [*start, str(program), str(picotron), "--data", tokens, *chosen]
    files = ["--data", tokens, "--cache-dir", str(folder / "cache")]
    files += ["--log-file", str(folder / "metrics.jsonl")]
    only_training = ["--validation-fraction", "0", "--sample-tokens", "0"]
    return [*start, str(ROOT / "run.py"), *chosen, *files, *only_training]


def run_row(row: Row, steps: int, picotron: Path | None) -> Run:
    """Train; a row of several copies trains one step more, for the last one may be alone."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(copy) for copy in range(row.copies)]
        for folder in folders:
            folder.mkdir()
            write_tokens(folder / "tokens.npy", 4096 if row.model == "peer" else 256)
        count = steps + (row.copies > 1)
        started = [_start(command(row, count, folder, picotron), row, folder) for folder in folders]
        codes = [process.wait() for process in started]
        for code, folder in zip(codes, folders, strict=True):
            if code:
                said = (folder / "errors.txt").read_text()[-2000:]
                raise SystemExit(f"the run failed: {said}")
        return _together([_read(folder, row.picotron, steps) for folder in folders])


def _start(words: list[str], row: Row, folder: Path) -> subprocess.Popen:
    """The process; what it prints goes to files."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(row.threads)}
    with (folder / "printed.txt").open("w") as out, (folder / "errors.txt").open("w") as errors:
        return subprocess.Popen(words, env=environment, stdout=out, stderr=errors)


def _read(folder: Path, picotron: bool, steps: int) -> Run:
    """The first `steps` steps; Picotron's row prints what run.py writes to its log file."""
    text = (folder / ("printed.txt" if picotron else "metrics.jsonl")).read_text()
    metrics = [json.loads(line) for line in text.splitlines() if line.startswith("{")][:steps]
    seconds = [step["tokens"] / step["tokens_per_second"] for step in metrics]
    return Run(metrics[0]["tokens"], seconds[WARM_UP:], [step["loss"] for step in metrics])


def _together(runs: list[Run]) -> Run:
    """Independent runs as one, whose speed is the sum of theirs, step by step."""
    tokens = sum(run.tokens for run in runs)
    steps = zip(*([run.tokens / s for s in run.seconds] for run in runs), strict=True)
    return Run(tokens, [tokens / sum(speeds) for speeds in steps], runs[0].losses)
