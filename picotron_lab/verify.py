"""Verify: every technique against one device, as a table that anyone can print.

Idea    A falling loss proves little: AdamW hides a gradient that is twice too large. So each row
        starts from the same weights as one plain device, trains three steps of SGD (a few rows of
        AdamW) with a large learning rate on the same global batches, and compares loss, gradient
        norm, *every parameter's gradient* at each step and the final weights, on every rank.
        Deviation: largest difference, relative to the tensor's largest element.
Limits  float64 1e-10, float32 1e-5 (design of the project); bfloat16 0.1, it keeps 8 bits of each
        number
Try     python run.py verify
Read    cases.py (what) -> verify -> trajectories -> deviation
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picotron_lab.analysis.dryrun import held
from picotron_lab.analysis.meter import Meter
from picotron_lab.cases import Case, cases
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks, unmetered
from picotron_lab.ledger import wire_bytes
from picotron_lab.trainer import Trainer

STEPS = 3
LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1}


@dataclass(frozen=True)
class Row:
    """How far a case is from one device, what a rank sent per step, and the most it held.

    bytes_per_step  on the wire, if every call went around a ring (ledger.py)
    """

    technique: str
    ranks: int
    dtype: str
    deviation: float
    bytes_per_step: int
    peak_bytes: int

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
            f"{'ok  ' if self.good else 'BAD '} {self.technique:58} {self.ranks:5} {self.dtype:9}"
            f"{self.deviation:10.1e} {LIMITS[self.dtype]:8.0e} {self.bytes_per_step:12,}"
            f"{self.peak_bytes:12,}"
        )


HEADER = f"     {'technique':58} ranks dtype     deviation    limit   bytes/step  peak bytes"


BASE = TrainConfig(
    global_batch_size=12, micro_batch_size=12, sequence_length=16, steps=STEPS, lr=0.5,
    warmup_steps=0, optimizer="sgd", dtype="float64", impl="plain", weight_decay=0.01,
    validation_fraction=0,
)  # fmt: skip
# 8 windows of 16 bytes and a ragged one of 4: ranks count different numbers of labels
TEXT = "a gradient is a sum over tokens, never a mean over ranks; " * 3
TEXT_BYTES = 8 * 16 + 5
# one device is asked for these as well
SHARED = ("dropout", "optimizer", "lr", "clip", "sequence_length")


def verify(
    chosen: Sequence[Case] | None = None, show: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Run the cases; `show` is called with a line as soon as there is one."""
    show(HEADER)
    rows = []
    references: dict[tuple, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(TEXT[:TEXT_BYTES])
        base = dataclasses.replace(BASE, data=str(text), cache_dir=folder)
        for case in cases() if chosen is None else chosen:
            cfg = dataclasses.replace(base, **case.changes)
            alone = dataclasses.replace(base, **{field: getattr(cfg, field) for field in SHARED})
            if (case.model, alone) not in references:
                references[case.model, alone] = trajectories(case.model, MeshConfig(), alone)[0]
            found = trajectories(case.model, case.mesh, cfg)
            reference = references[case.model, alone]
            worst = max(deviation(mine, reference) for mine in found)
            worst = worst if covers(found, reference) else math.inf
            sent, peak = (max(mine[key] for mine in found) for key in ("bytes", "peak"))
            rows.append(Row(case.technique, len(found), cfg.dtype, worst, sent // STEPS, peak))
            show(rows[-1].line())
    return rows


def trajectories(
    model_cfg: ModelConfig, mesh_cfg: MeshConfig, cfg: TrainConfig
) -> list[dict[str, Any]]:
    """What each rank sees in STEPS steps: losses and norms; (name, record, tensor) of gradients and
    weights; bytes sent; most bytes held."""

    def rank_main(world: Axis) -> dict[str, Any]:
        trainer = Trainer(model_cfg, mesh_cfg, cfg, world)
        seen: dict[str, Any] = {"numbers": [], "tensors": []}
        for step in range(STEPS - 1):
            _step(trainer, step, seen)
        with Meter() as meter:  # the last step, when everything that stays is there
            for category, tensors in held(trainer).items():
                meter.label(category, tensors)
            _step(trainer, STEPS - 1, seen)
        for p in (*trainer.model.parameters(), *trainer.parameters):
            seen["tensors"].append((f"weight {p.record.name}", p.record, p.detach()))
        for bias in trainer.model.buffers():
            seen["tensors"].append((f"buffer {bias.record.name}", bias.record, bias))
        return {**seen, "bytes": _on_wire(trainer), "peak": meter.peak_bytes}

    return run_ranks(rank_main, mesh_cfg.size)


def _on_wire(trainer: Trainer) -> int:
    """Bytes that this rank sent, if every call went around a ring (ledger.py)."""
    sizes = {name: axis.size for name, axis in trainer.mesh.axes.items()}
    sizes |= {"world": trainer.mesh.world.size, "tie": 2, "mirror": 2, "pp.F": 2, "pp.B": 2}
    pp = trainer.mesh.pp.size
    sizes |= {
        "pp.all.F": pp,
        "pp.all.B": pp,
        "pp.all.dx": pp,
        "validation": pp,
        "stage": sizes["world"] // pp,
    }
    calls = trainer.mesh.world.ledger.calls
    return round(sum(wire_bytes(call.op, call.bytes, sizes[call.axis]) for call in calls))


def _step(trainer: Trainer, step: int, seen: dict[str, Any]) -> None:
    loss, _ = trainer.compute_gradients(step)
    with unmetered():
        for p in trainer.parameters:
            name = f"step {step} gradient {p.record.name}"
            seen["tensors"].append((name, p.record, p.grad.clone()))
    seen["numbers"] += [loss, trainer.update(step)]


def covers(found: list[dict[str, Any]], reference: dict[str, Any]) -> bool:
    """Whether the ranks together hold every element of every gradient and weight."""
    missing = {name: torch.ones(whole.shape, dtype=bool) for name, _, whole in reference["tensors"]}
    for mine in found:
        for name, record, _ in mine["tensors"]:
            missing[name][record.index] = False
    return not any(elements.any() for elements in missing.values())


def deviation(mine: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest difference of any number or tensor from the reference, relative to the largest
    element of the whole tensor."""
    pairs = zip(mine["numbers"], reference["numbers"], strict=True)
    differences = [relative(*torch.tensor(pair, dtype=torch.float64)) for pair in pairs]
    whole = {name: tensor for name, _, tensor in reference["tensors"]}
    for name, record, tensor in mine["tensors"]:
        differences.append(relative(tensor, whole[name][record.index], whole[name]))
    return max(differences)


def relative(a: Tensor, b: Tensor, whole: Tensor | None = None) -> float:
    """max |a - b| / max |whole| (None: b), in float64; infinite where that is no number, 0 where a
    equals b."""
    if torch.equal(a, b):
        return 0.0
    scale = (b if whole is None else whole).double().abs().max()
    ratio = float((a.double() - b.double()).abs().max() / scale)
    return ratio if math.isfinite(ratio) else math.inf
