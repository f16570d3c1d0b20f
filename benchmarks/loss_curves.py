"""Draws benchmarks/loss_curves.png: one loss curve on any mesh, and a bug that only SGD shows.

python benchmarks/loss_curves.py          about three minutes on two cores
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.pyplot as plt  # noqa: E402
from torch import Tensor  # noqa: E402

from picotron_lab.config import PRESETS, MeshConfig, TrainConfig  # noqa: E402
from picotron_lab.diagnose import TrainingError  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.pipeline_parallel import Executor  # noqa: E402
from picotron_lab.trainer import Trainer  # noqa: E402

STEPS = 60
MICROBATCHES = 4


class Undivided:
    """The bug: each micro-batch's loss is divided by its own tokens, so gradients add up too
    large."""

    def __init__(self, executor: Executor):
        self.executor = executor

    def run(self, batches: list, tokens: float) -> Tensor:
        """As the executor's, with fewer tokens."""
        return self.executor.run(batches, tokens / MICROBATCHES)


def losses(cfg: TrainConfig, ranks: int = 1, undivided: bool = False) -> list[float]:
    """The loss of every step, as rank 0 sees it."""
    model_cfg = dataclasses.replace(PRESETS["tiny"], hidden_size=64, ffn_size=176, layers=2)

    def rank_main(world):
        trainer = Trainer(model_cfg, MeshConfig(dp=ranks), cfg, world)
        if undivided:
            trainer.executor = Undivided(trainer.executor)
        curve = []
        with contextlib.suppress(TrainingError):  # the run has exploded: the curve ends
            for step in range(STEPS):
                curve.append(trainer.compute_gradients(step)[0])
                trainer.update(step)
        return curve

    return run_ranks(rank_main, ranks)[0]


def main() -> None:
    """Train on several meshes and with the bug, then draw."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = TrainConfig(
            global_batch_size=16, micro_batch_size=4, steps=STEPS, warmup_steps=5, clip=0,
            sequence_length=64, cache_dir=folder,
        )  # fmt: skip
        sgd = dataclasses.replace(base, optimizer="sgd", lr=0.4, min_lr=0.1, weight_decay=0)
        meshes = {
            "1 process": losses(base),
            "2 ranks": losses(dataclasses.replace(base, micro_batch_size=8), 2),
            "4 ranks, bucketed": losses(dataclasses.replace(base, dp_step="bucketed"), 4),
        }
        bugs = {
            "AdamW": (losses(base), losses(base, undivided=True)),
            "SGD": (losses(sgd), losses(sgd, undivided=True)),
        }
    draw(meshes, bugs)


def draw(meshes: dict[str, list[float]], bugs: dict[str, tuple]) -> None:
    """Two panels, with the largest difference between meshes in the title of the first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    first = next(iter(meshes.values()))
    worst = max(abs(a - b) for curve in meshes.values() for a, b in zip(curve, first, strict=True))
    for i, (name, curve) in enumerate(meshes.items()):
        left.plot(curve, label=name, linewidth=6 - 2.2 * i, alpha=0.4 + 0.3 * i)
    left.set_title(f"Any mesh, one curve (float32, apart by at most {worst:.0e})", fontsize=10)
    for colour, (name, (right_curve, wrong_curve)) in zip(("C0", "C3"), bugs.items(), strict=True):
        right.plot(right_curve, colour, linewidth=4, alpha=0.4, label=f"{name}, right gradient")
        right.plot(wrong_curve, colour, linestyle="--", label=f"{name}, gradient 4 times too large")
    right.set_title("A bug that AdamW hides and SGD shows", fontsize=10)
    right.set_ylim(2, 8)
    for axis in (left, right):
        axis.set(xlabel="optimizer step", ylabel="loss (nats per byte)")
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
