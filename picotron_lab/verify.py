"""Verify: every technique against one device, as a table that anyone can print.

Idea    A falling loss proves little: AdamW hides a gradient that is twice too large. So each row
        starts from the same weights as one plain device, trains three steps of SGD with a large
        learning rate on the same global batches, and compares loss, gradient norm, *every
        parameter's gradient* at each step and the final weights, on every rank. Deviation: largest
        difference, relative to the tensor's largest element.
Limits  float64 1e-10, float32 1e-5 (design of the project); bfloat16 0.1, it keeps 8 bits of each
        number
Try     python run.py verify
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer

STEPS = 3
LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1}


@dataclass(frozen=True)
class Row:
    """One technique: how far from one device, and what it sent."""

    technique: str
    ranks: int
    dtype: str
    deviation: float
    bytes_per_step: int

    @property
    def good(self) -> bool:
        """Whether the deviation is within the limit of the dtype."""
        return self.deviation <= LIMITS[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """For --json: the fields, the limit and the verdict."""
        return {**dataclasses.asdict(self), "limit": LIMITS[self.dtype], "good": self.good}

    def line(self) -> str:
        """For people."""
        return (
            f"{'ok  ' if self.good else 'BAD '} {self.technique:44} {self.ranks:5} {self.dtype:9}"
            f"{self.deviation:10.1e} {LIMITS[self.dtype]:8.0e} {self.bytes_per_step:14,}"
        )


HEADER = f"     {'technique':44} ranks dtype     deviation    limit     bytes/step"


DENSE = ModelConfig(vocab_size=320, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=72)
EXPERTS = dataclasses.replace(DENSE, experts=3, top_k=2)
TIED = dataclasses.replace(DENSE, tied=True)
# 8 windows of 16 bytes and a ragged one of 4: ranks count different numbers of labels
TEXT = "a gradient is a sum over tokens, never a mean over ranks; " * 3
TEXT_BYTES = 8 * 16 + 5


def cases() -> list[tuple[str, int, ModelConfig, dict[str, Any]]]:
    """(technique, ranks, model, changes to the training options) of every row."""
    one, two, fused = {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"impl": "fused"}
    small, float32, adamw = {"bucket_mib": 0.02}, {"dtype": "float32"}, {"optimizer": "adamw"}
    bf16 = {"dtype": "bfloat16"}
    lesson = [
        (f"data parallel, {step}", ranks, DENSE, {**one, **small, "dp_step": step})
        for step in ("naive", "overlapped", "bucketed", "silent")
        for ranks in (2, 3, 4)
    ]
    return [
        ("gradient accumulation, 4 micro-batches", 1, DENSE, {"micro_batch_size": 3}),
        ("gradient accumulation, 12 micro-batches", 1, DENSE, one),
        ("dropout 0.3, 4 micro-batches", 1, DENSE, {"micro_batch_size": 3, "dropout": 0.3}),
        ("fused model", 1, DENSE, fused),
        ("fused model", 1, DENSE, {**fused, **float32}),
        ("fused model, experts", 1, EXPERTS, {**fused, **two}),
        ("fused model, tied embedding", 1, TIED, {**fused, **two}),
        *lesson,
        ("data parallel, fused, dropout 0.3", 3, DENSE, {**two, **fused, "dropout": 0.3}),
        ("data parallel, fused", 4, DENSE, {**one, **fused, **float32}),
        ("data parallel, fused, AdamW", 3, DENSE, {**two, **fused, **adamw, "lr": 0.01}),
        ("data parallel, fused, experts", 4, EXPERTS, {**one, **fused}),
        ("data parallel, fused, tied embedding", 4, TIED, {**one, **fused}),
        ("bfloat16, float32 gradients and masters", 1, DENSE, bf16),
        ("the same, data parallel", 2, DENSE, {**two, **fused, **bf16}),
        ("the same, gradients sent in bfloat16", 2, DENSE,
         {**two, **fused, **bf16, "reduce_dtype": "bfloat16"}),
    ]  # fmt: skip


def verify(show: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Run all cases; `show` is called with a line as soon as there is one."""
    show(HEADER)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(TEXT[:TEXT_BYTES])
        base = TrainConfig(
            global_batch_size=12, micro_batch_size=12, sequence_length=16, steps=STEPS, lr=0.5,
            warmup_steps=0, optimizer="sgd", dtype="float64", impl="plain", data=str(text),
            cache_dir=folder, weight_decay=0.01, validation_fraction=0,
        )  # fmt: skip
        references: dict[tuple, dict] = {}
        for technique, ranks, model_cfg, changes in cases():
            cfg = dataclasses.replace(base, **changes)
            alone = dataclasses.replace(
                base, dropout=cfg.dropout, optimizer=cfg.optimizer, lr=cfg.lr
            )
            if (model_cfg, alone) not in references:
                references[model_cfg, alone] = trajectories(model_cfg, alone, 1)[0]
            found = trajectories(model_cfg, cfg, ranks)
            worst = max(deviation(mine, references[model_cfg, alone]) for mine in found)
            rows.append(Row(technique, ranks, cfg.dtype, worst, found[0]["bytes"] // STEPS))
            show(rows[-1].line())
    return rows


def trajectories(model_cfg: ModelConfig, cfg: TrainConfig, ranks: int) -> list[dict[str, Any]]:
    """What each rank sees in STEPS steps: {name: (record, tensor)} of gradients and weights, ..."""

    def rank_main(world: Axis) -> dict[str, Any]:
        trainer = Trainer(model_cfg, MeshConfig(dp=ranks), cfg, world)
        seen: dict[str, Any] = {"numbers": [], "tensors": {}}
        for step in range(STEPS):
            loss, _ = trainer.compute_gradients(step)
            for p in trainer.parameters:
                name = f"step {step} gradient {p.record.name}"
                seen["tensors"][name] = (p.record, p.grad.clone())
            seen["numbers"] += [loss, trainer.update(step)]
        for p in trainer.parameters:
            seen["tensors"][f"weight {p.record.name}"] = (p.record, p.detach())
        seen["bytes"] = world.ledger.bytes()
        return seen

    return run_ranks(rank_main, ranks)


def deviation(mine: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest relative difference of any number or tensor from the reference."""
    pairs = zip(mine["numbers"], reference["numbers"], strict=True)
    differences = [relative(*torch.tensor(pair, dtype=torch.float64)) for pair in pairs]
    for name, (record, tensor) in mine["tensors"].items():
        whole = reference["tensors"][name][1]
        differences.append(relative(tensor, whole[record.index]))
    return max(differences)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, in float64; infinite where that is no number, 0 where a equals b."""
    if torch.equal(a, b):
        return 0.0
    ratio = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    return ratio if math.isfinite(ratio) else math.inf
