"""Predicted, not measured: one to 8 GPUs of a node, by each technique alone.

    python benchmarks/scaling.py                            Llama 3 8B on H100 and H200; 5 seconds
    python benchmarks/scaling.py --hardware b200 --json     another device; every figure
    python benchmarks/scaling.py --measured results.json    models that one GPU was measured with

Time      analysis/step_time.py: computing modelled from shapes, messages from the bus bandwidth
          that NCCL's tests measured on 8 H200 (analysis/hardware.py), less what hides. How far to
          trust it: benchmarks/published.py
Measured  FILE is what train_one_gpu.py --json wrote. Then its models are scaled, and all computing
          takes as many times longer, or shorter, as their measured step took than the predicted
          one; messages stay modelled. Shards are taken for as efficient as the whole model, so
          tensor parallelism, whose matmuls become narrow, will do worse
Strong    the same batch on n GPUs;  weak: n times the batch
cp        takes n times as many sequences at once, so that a rank has as many tokens at a time as in
          the other rows; that is what the memory which it saves is good for
Of ideal  tokens/s of n GPUs over n times that of one, which may not have the memory for it
Memory    analysis/memory.py, of the first or last rank; what exceeds 0.9 of a GPU does not fit
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import GIB, cpu_hardware, describe, markdown

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.analysis import memory, step_time  # noqa: E402
from picotron_lab.analysis.hardware import KNOWN, Hardware, hardware  # noqa: E402
from picotron_lab.analysis.layer_time import CONSTANTS, Constants  # noqa: E402
from picotron_lab.analysis.planner import ROOM  # noqa: E402
from picotron_lab.config import (  # noqa: E402
    PRESETS,
    ConfigError,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    require,
)

GPUS = (2, 4, 8)
MICRO_BATCHES = {"strong": 16, "weak": 4}  # of one GPU; strong: of all
MEASURED_ROW = "ours-fused"
HEADER = ("technique", *(f"of ideal, {n} GPUs" for n in GPUS), "tokens/s, 8 GPUs", "MFU",
          "waiting, of the step", "GiB")  # fmt: skip


def balanced(n: int) -> MeshConfig:
    """A pipeline whose last stage has fewer layers, for the sake of the output layer."""
    return MeshConfig(pp=n, pp_layers="balanced")


MESHES: dict[str, Callable[[int], MeshConfig]] = {
    "dp": lambda n: MeshConfig(dp=n),
    "ZeRO-3": lambda n: MeshConfig(dp=n, zero=3),
    "tp, sp": lambda n: MeshConfig(tp=n, sequence_parallel=True),
    "cp, ZeRO-3": lambda n: MeshConfig(cp=n, zero=3),
    "pp 1f1b": balanced,
}


@dataclass(frozen=True)
class Setting:
    """What is scaled, and on what."""

    model: ModelConfig
    micro_batch_size: int
    sequence_length: int
    hardware: Hardware
    constants: Constants = CONSTANTS

    def training(self, micro_batches: int, together: int) -> TrainConfig:
        """A step of so many micro-batches, of all ranks, which take some of them together."""
        size = self.micro_batch_size
        return TrainConfig(
            global_batch_size=size * micro_batches, micro_batch_size=size * together,
            sequence_length=self.sequence_length, dtype="bfloat16",
        )  # fmt: skip

    def step(self, mesh: MeshConfig, micro_batches: int) -> step_time.StepTime:
        """Predict it."""
        cfg = self.training(micro_batches, mesh.cp)
        return step_time.predict(self.model, mesh, cfg, self.hardware, self.constants)

    def peak_bytes(self, mesh: MeshConfig, micro_batches: int) -> int:
        """Of the first or the last pipeline rank."""
        cfg, ends = self.training(micro_batches, mesh.cp), {0, mesh.pp - 1}
        found = [memory.predict(self.model, mesh, cfg, rank, kernels=True) for rank in ends]
        return max(one.peak for one in found)


# ---- measured shards


def measured_settings(path: Path) -> list[Setting]:
    """The models of a file that train_one_gpu.py wrote; ConfigError for a file without any."""
    rows = [row for row in json.loads(path.read_text()) if "skipped" not in row]
    rows = [row for row in rows if row["row"] == MEASURED_ROW]
    require(
        bool(rows),
        f"--measured {path} has no row {MEASURED_ROW}; write one on a GPU: python "
        "benchmarks/train_one_gpu.py --json results.json.",
    )
    return [measured_setting(row) for row in rows]


def measured_setting(row: dict) -> Setting:
    """One row: computing is scaled until one GPU takes exactly what it took."""
    names = [name for name in KNOWN if name in row["device"].split()]
    require(
        bool(names),
        f"--measured has a row of {row['device']}, and known devices are {', '.join(KNOWN)}; "
        "measure on one of them.",
    )
    micro_batches, size, length = row["batch"]
    setting = Setting(PRESETS[row["model"]], size, length, hardware(names[0]))
    said = setting.step(MeshConfig(), micro_batches).seconds
    ratio = statistics.median(row["step_seconds"]) / said
    print(f"{row['model']} on {names[0]}: one GPU took {ratio:.3f} of what is predicted\n")
    return dataclasses.replace(setting, constants=slower(ratio))


def slower(ratio: float) -> Constants:
    """Constants with which all computing takes `ratio` times as long."""
    rates = ("matmuls", "attention", "operators", "copies")
    changed = {name: getattr(CONSTANTS, name) / ratio for name in rates}
    return dataclasses.replace(CONSTANTS, kernel=CONSTANTS.kernel * ratio, **changed)


# ---- tables


@dataclass(frozen=True)
class Scaled:
    """One technique on 1 to 8 GPUs; `of_ideal`, `tokens_per_second` by the number of GPUs."""

    technique: str
    of_ideal: dict[int, float]
    tokens_per_second: dict[int, float]
    mfu: float
    waiting: dict[str, float]  # share of the step on most GPUs, by what is waited for
    peak_bytes: int
    fits: bool

    def cells(self) -> list[str]:
        """A row of the table."""
        waiting = ", ".join(f"{name} {share:.0%}" for name, share in self.waiting.items())
        size = f"{self.peak_bytes / GIB:.0f}" + ("" if self.fits else ", too much")
        shares = [f"{self.of_ideal[n]:.2f}" for n in GPUS]
        speed = f"{self.tokens_per_second[GPUS[-1]]:,.0f}"
        return [self.technique, *shares, speed, f"{self.mfu:.0%}", waiting or "none", size]


def scale(setting: Setting, technique: str, kind: str) -> Scaled:
    """Predict one technique, strong or weak."""
    micro_batches, mesh_of = MICRO_BATCHES[kind], MESHES[technique]
    counts = {n: micro_batches * (n if kind == "weak" else 1) for n in (1, *GPUS)}
    alone = setting.step(MeshConfig(), counts[1]).tokens_per_second
    steps = {n: setting.step(mesh_of(n), counts[n]) for n in GPUS}
    speeds = {n: step.tokens_per_second for n, step in steps.items()}
    last, most = steps[GPUS[-1]], GPUS[-1]
    shares = {name: seconds / last.seconds for name, seconds in last.exposed.items()}
    shares["bubble"] = last.bubble
    peak = setting.peak_bytes(mesh_of(most), counts[most])
    return Scaled(
        technique, {n: speed / n / alone for n, speed in speeds.items()}, {1: alone, **speeds},
        last.mfu, {name: share for name, share in shares.items() if share >= 0.005}, peak,
        peak <= ROOM * setting.hardware.memory_bytes,
    )  # fmt: skip


def report(setting: Setting, as_json: bool) -> list[dict]:
    """Print strong and weak scaling of a setting; the figures."""
    figures = []
    for kind, micro_batches in MICRO_BATCHES.items():
        rows = [scale(setting, technique, kind) for technique in MESHES]
        where = {"model": setting.model.name, "hardware": setting.hardware.name, "scaling": kind}
        figures += [{**where, **dataclasses.asdict(row)} for row in rows]
        if as_json:
            continue
        size, length = setting.micro_batch_size, setting.sequence_length
        print(f"Predicted: {setting.model.name} on {setting.hardware.name}, {kind} scaling; "
              f"{micro_batches} micro-batches of {size} x {length} tokens"
              f"{' for each GPU' * (kind == 'weak')}; one GPU "
              f"{rows[0].tokens_per_second[1]:,.0f} tokens/s\n")  # fmt: skip
        print(markdown(HEADER, [row.cells() for row in rows]), "\n")
    return figures


def main() -> int:
    """Predict and print; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="llama3-8b")
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--hardware", nargs="+", default=["h100", "h200"])
    parser.add_argument("--measured", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        settings = [
            Setting(PRESETS[args.model], 1, args.sequence_length, hardware(name))
            for name in args.hardware
        ]
        if args.measured:
            settings = measured_settings(args.measured)
        if not args.json:
            print(f"Predictions, computed on {describe(cpu_hardware())}\n")
        figures = [figure for setting in settings for figure in report(setting, args.json)]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
