"""Draws what is predicted: memory and time by model, length, mesh and schedule; no GPU needed.

python benchmarks/pictures.py [--folder DIR]     half a minute; default: benchmarks/pictures
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

import published_rows  # noqa: E402
import torch  # noqa: E402

from picotron_lab.analysis import memory_plots, speed_plots  # noqa: E402
from picotron_lab.analysis.hardware import hardware  # noqa: E402
from picotron_lab.analysis.meter import Meter  # noqa: E402
from picotron_lab.analysis.speed_plots import Run  # noqa: E402
from picotron_lab.config import PRESETS, MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.trainer import Trainer  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GPU = hardware("h100")
# 1910.02054, figure 1: 7.5 billion parameters on 64 ranks; the layers are chosen to have as many
ZERO_PARAMETERS, ZERO_RANKS = 7.5e9, 64
ZERO_MODEL = ModelConfig(
    "7.45 billion parameters", 50_257, 4096, 36, 32, 32, 10_923, tied=True
)  # fmt: skip
LENGTHS, LONG = (1024, 2048, 4096, 8192), (4096, 8192, 16_384, 32_768, 65_536, 131_072)


def step(length: int, recompute: str = "none", impl: str = "fused") -> TrainConfig:
    """One sequence of so many tokens in bfloat16."""
    return TrainConfig(1, 1, length, dtype="bfloat16", recompute=recompute, impl=impl)


def memory_by_length() -> "Figure":
    """One GPU: three models, with and without the scores, recomputed or not."""
    names = ("llama3.2-1b", "llama3-8b", "llama3-70b")
    runs = {
        "scores kept": step(1024, "none", "plain"),
        "selective\nrecomputation": step(1024, "selective", "plain"),
        "full\nrecomputation": step(1024, "full", "plain"),
        "fused kernels,\nno recomputation": step(1024),
    }
    models = [PRESETS[name] for name in names]
    return memory_plots.memory_by_length(models, LENGTHS, runs, GPU.memory_bytes)


def memory_by_zero() -> "Figure":
    """The picture of the ZeRO paper."""
    cfg = TrainConfig(ZERO_RANKS, 1, 1024, dtype="bfloat16")
    return memory_plots.zero_state(ZERO_MODEL, ZERO_RANKS, cfg, ZERO_PARAMETERS)


def memory_by_tensor_parallel() -> "Figure":
    """Llama 3 70B on one node."""
    model, lengths = PRESETS["llama3-70b"], (2048, 8192, 32_768)
    return memory_plots.tensor_parallel_activations(model, lengths, (1, 2, 4, 8), step(4096))


def memory_by_context_parallel() -> "Figure":
    """Llama 3 8B on 16 GPUs."""
    meshes = [MeshConfig(dp=16 // n, cp=n, zero=3) for n in (1, 2, 4, 8, 16)]
    model = PRESETS["llama3-8b"]
    return memory_plots.context_parallel_stacks(model, LONG, meshes, step(4096), GPU.memory_bytes)


def memory_of_first_steps() -> "Figure":
    """Four steps of a small model, measured on this machine."""
    model = ModelConfig("first steps", 512, 64, 4, 4, 2, 176)
    cfg = TrainConfig(8, 8, 64, impl="plain")

    def rank_main(world):
        trainer = Trainer(model, MeshConfig(), cfg, world)
        with Meter(record=True) as meter:
            meter.watch(trainer.model.parameters())
            for number in range(4):
                meter.mark(f"step {number + 1}")
                trainer.compute_gradients(number)
                with meter.making("optimizer"):
                    trainer.update(number)
        return meter

    figure = memory_plots.memory_timeline(run_ranks(rank_main, 1)[0])
    figure.axes[0].set_title(
        "Measured: the first four training steps of a small model, AdamW, float32",
        loc="left", fontsize=10,
    )  # fmt: skip
    return figure


def published(table: published_rows.Table, parallel: bool = False) -> list[Run]:
    """The rows of a table, with or without sequence parallelism."""
    rows = [row for row in table.rows if row.mesh.sequence_parallel == parallel]
    return [Run(row.model, row.mesh, row.cfg, row.published) for row in rows]


def speed_by_replicas() -> "Figure":
    """The playbook's 1.34B on up to 256 GPUs."""
    table = published_rows.playbook_replicas()
    lines = {"data parallel": published(table)}
    return speed_plots.throughput(lines, "dp", table.hardware, "the Ultra-Scale Playbook")


def speed_by_tensor_parallel() -> "Figure":
    """The playbook's 3.57B on up to 32 GPUs."""
    table = published_rows.playbook_tensor()
    lines = {"tp": published(table), "tp and sequence parallel": published(table, True)}
    return speed_plots.throughput(lines, "tp", table.hardware, "the Ultra-Scale Playbook")


def bubbles() -> "Figure":
    """Six schedules on 4, 8 and 16 ranks."""
    schedules = [("afab", 0), ("1f1b", 0), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 0)]
    return speed_plots.bubbles((4, 8, 16), (1, 2, 4, 8), [*schedules, ("zb-v", 0)])


def vocabulary() -> "Figure":
    """A row of the vocabulary paper's Table 5: 8 stages, 32 layers, 256k words."""
    table = published_rows.vocabulary("1f1b")
    methods = {
        "even": "baseline", "balanced": "redistribution", "vocabulary parallel": "vocab-2",
    }  # fmt: skip
    rows = {row.name: row for row in table.rows}
    found = {name: rows[f"8 GPUs, 2048 tokens, {kind}, 256k"] for name, kind in methods.items()}
    runs = {name: Run(row.model, row.mesh, row.cfg) for name, row in found.items()}
    return speed_plots.imbalance(runs, table.hardware)


PICTURES: tuple[Callable[[], "Figure"], ...] = (
    memory_by_length, memory_by_zero, memory_by_tensor_parallel, memory_by_context_parallel,
    memory_of_first_steps, speed_by_replicas, speed_by_tensor_parallel, bubbles, vocabulary,
)  # fmt: skip


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "pictures"
    parser.add_argument("--folder", type=Path, default=default, metavar="DIR")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        path = args.folder / f"{picture.__name__}.png"
        picture().savefig(path, dpi=100)
        print(path)


if __name__ == "__main__":
    main()
