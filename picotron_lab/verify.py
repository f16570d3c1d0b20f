"""Verify: every technique against one device, as a table that anyone can print.

Idea    A falling loss proves little: AdamW hides a gradient that is twice too large. So each row
        starts from the same weights as one plain device, trains three steps of SGD (a few rows of
        AdamW) with a large learning rate on the same global batches, and compares loss, gradient
        norm, *every parameter's gradient* at each step and the final weights, on every rank.
        Deviation: largest difference, relative to the tensor's largest element.
Limits  float64 1e-10, float32 1e-5 (design of the project); bfloat16 0.1, it keeps 8 bits of each
        number
Try     python run.py verify
"""

import dataclasses
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picotron_lab import optim
from picotron_lab.analysis.memory import Meter
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks, unmetered
from picotron_lab.ledger import wire_bytes
from picotron_lab.trainer import Trainer
from picotron_lab.zero_units import Sharded

STEPS = 3
LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1}


@dataclass(frozen=True)
class Case:
    """One mesh, one model, and what else differs from BASE."""

    technique: str
    mesh: MeshConfig
    model: ModelConfig
    changes: dict[str, Any]


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


# ---- what is verified

DENSE = ModelConfig(vocab_size=320, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=72)
EXPERTS = dataclasses.replace(DENSE, experts=3, top_k=2)
TIED = dataclasses.replace(DENSE, tied=True)
# 8 windows of 16 bytes and a ragged one of 4: ranks count different numbers of labels
TEXT = "a gradient is a sum over tokens, never a mean over ranks; " * 3
TEXT_BYTES = 8 * 16 + 5


def cases() -> list[Case]:
    """The rows that are always shown: every technique, plain and fused, and a few products."""
    return [*_one_device(), *_data_parallel(), *_zero(), *_tensor_parallel(), *_products()]


def _one_device() -> list[Case]:
    one, two, fused = {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"impl": "fused"}
    mesh, four = MeshConfig(), {"micro_batch_size": 3}
    return [
        Case("gradient accumulation, 4 micro-batches", mesh, DENSE, four),
        Case("gradient accumulation, 12 micro-batches", mesh, DENSE, one),
        Case("dropout 0.3, 4 micro-batches", mesh, DENSE, {**four, "dropout": 0.3}),
        Case("fused model", mesh, DENSE, fused),
        Case("fused model", mesh, DENSE, {**fused, "dtype": "float32"}),
        Case("fused model, experts", mesh, EXPERTS, {**fused, **two}),
        Case("fused model, tied embedding", mesh, TIED, {**fused, **two}),
        Case("bfloat16, float32 gradients and masters", mesh, DENSE, {"dtype": "bfloat16"}),
        Case("recompute selective", mesh, DENSE, {**four, "recompute": "selective"}),
        Case("recompute full", mesh, DENSE, {**four, "recompute": "full", "dropout": 0.3}),
        Case("recompute full, fused, experts", mesh, EXPERTS, {**fused, "recompute": "full"}),
    ]


def _data_parallel() -> list[Case]:
    one, two, fused = {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"impl": "fused"}
    bf16, adamw = {"dtype": "bfloat16"}, {"optimizer": "adamw", "lr": 0.01}
    lesson = [
        Case(f"dp, {step}", MeshConfig(dp=n), DENSE, {**one, "bucket_mib": 0.02, "dp_step": step})
        for step in ("naive", "overlapped", "bucketed", "silent")
        for n in (2, 3, 4)
    ]
    dp2, dp3, dp4 = (MeshConfig(dp=n) for n in (2, 3, 4))
    return [
        *lesson,
        Case("dp, fused, dropout 0.3", dp3, DENSE, {**two, **fused, "dropout": 0.3}),
        Case("dp, fused", dp4, DENSE, {**one, **fused, "dtype": "float32"}),
        Case("dp, fused, AdamW", dp3, DENSE, {**two, **fused, **adamw}),
        Case("dp, fused, experts", dp4, EXPERTS, {**one, **fused}),
        Case("dp, fused, tied embedding", dp4, TIED, {**one, **fused}),
        Case("dp, bfloat16", dp2, DENSE, {**two, **fused, **bf16}),
        Case("dp, bfloat16, gradients sent in bfloat16", dp2, DENSE,
             {**two, **fused, **bf16, "reduce_dtype": "bfloat16"}),
    ]  # fmt: skip


def _zero() -> list[Case]:
    two, adamw = {"micro_batch_size": 2}, {"optimizer": "adamw", "lr": 0.01}
    stages = [
        Case(f"ZeRO-{stage}, {impl}", MeshConfig(dp=n, zero=stage), DENSE, {**two, "impl": impl})
        for stage in (1, 2, 3)
        for impl, n in (("plain", 2), ("fused", 3))
    ]
    more = [
        Case(f"ZeRO-{stage}, fused, {what}", MeshConfig(dp=2, zero=stage), model,
             {**two, "impl": "fused", **changes})
        for stage in (1, 2, 3)
        for what, model, changes in (("AdamW, tied", TIED, adamw), ("experts", EXPERTS, {}),
                                     ("bfloat16", DENSE, {"dtype": "bfloat16"}))
    ]  # fmt: skip
    return [*stages, *more]


def _tensor_parallel() -> list[Case]:
    mesh = MeshConfig(tp=2)
    return [
        Case(
            f"tp{n}{', sp' if sp else ''}, vocabulary {vocab}, {impl}",
            MeshConfig(tp=n, sequence_parallel=sp, vocab_parallel=vocab),
            DENSE,
            {"impl": impl},
        )
        for impl in ("plain", "fused")
        for n, sp, vocab in ((2, False, "none"), (4, False, "naive"), (2, False, "1"),
                             (4, True, "2"), (2, True, "naive"), (4, True, "none"))
    ] + [
        Case("tp, fused, tied embedding", mesh, TIED, {"impl": "fused"}),
        Case("tp, fused, experts", mesh, EXPERTS, {"impl": "fused"}),
        Case("tp, fused", mesh, DENSE, {"impl": "fused", "dtype": "float32"}),
        Case("tp, sp, fused, bfloat16", MeshConfig(tp=4, sequence_parallel=True), DENSE,
             {"impl": "fused", "dtype": "bfloat16"}),
    ]  # fmt: skip


def _products() -> list[Case]:
    both = {"micro_batch_size": 2, "impl": "fused", "dropout": 0.3}
    meshes = [MeshConfig(dp=2, tp=2, zero=stage, sequence_parallel=stage > 1) for stage in range(4)]
    return [
        Case(f"{describe(mesh, kind)}, dropout 0.3", mesh, DENSE, {**both, "recompute": kind})
        for mesh, kind in zip(meshes, ("none", "selective", "none", "full"), strict=True)
    ]


def sample(count: int, seed: int = 0) -> list[Case]:
    """Random products of everything, always the same ones: rows 1 to `count` of --all."""
    dice = random.Random(seed)
    return [_draw(dice) for _ in range(count)]


def _draw(dice: random.Random) -> Case:
    """Sizes are odd where they may be: nothing should divide by luck."""
    tp, dp = dice.choice([(1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (4, 2),
                          (4, 1), (8, 1)])  # fmt: skip
    heads = {3: 6, 8: 8}.get(tp, 4)
    shared = [n for n in range(1, heads + 1) if heads % n == 0 and (n % tp == 0 or tp % n == 0)]
    experts, tied = dice.choice([0, 0, 0, 3]), dice.random() < 0.3
    model = ModelConfig(
        vocab_size=323, hidden_size=48, layers=2, heads=heads, kv_heads=dice.choice(shared),
        ffn_size=50, experts=experts, tied=tied,
    )  # fmt: skip
    mesh = MeshConfig(
        dp=dp, tp=tp, zero=dice.choice([0, 1, 2, 3]) if dp > 1 else 0,
        sequence_parallel=tp > 1 and dice.random() < 0.6,
        vocab_parallel=dice.choice(["naive", "1", "2"] + ["none"] * (not tied)) if tp > 1 else "",
    )  # fmt: skip
    changes = {
        "impl": dice.choice(["plain", "fused"]), "dropout": dice.choice([0.0, 0.2]),
        "micro_batch_size": dice.choice([n for n in (2, 3, 4, 6, 12) if 12 % (n * dp) == 0]),
        "recompute": dice.choice(["none", "selective", "full"]), "bucket_mib": 0.02,
        "sequence_length": 24 if tp == 3 else 16,
        "dtype": dice.choice(["float64", "float64", "float32"]),
    }  # fmt: skip
    what = [f"kv {model.kv_heads}", changes["impl"]]
    what += ["experts"] * bool(experts) + ["tied"] * tied + ["dropout"] * (changes["dropout"] > 0)
    return Case(f"{describe(mesh, changes['recompute'])}, {', '.join(what)}", mesh, model, changes)


def describe(mesh: MeshConfig, recompute: str) -> str:
    """A mesh in a few words: 'dp2 zero3 tp2 sp vocab-2 recompute-full'."""
    words = [f"dp{mesh.dp}"] * (mesh.dp > 1) + [f"zero{mesh.zero}"] * (mesh.zero > 0)
    words += [f"tp{mesh.tp}"] * (mesh.tp > 1) + ["sp"] * mesh.sequence_parallel
    words += [f"vocab-{mesh.vocab_parallel}"] * bool(mesh.vocab_parallel)
    words += [f"recompute-{recompute}"] * (recompute != "none")
    return " ".join(words)


# ---- how

BASE = TrainConfig(
    global_batch_size=12, micro_batch_size=12, sequence_length=16, steps=STEPS, lr=0.5,
    warmup_steps=0, optimizer="sgd", dtype="float64", impl="plain", weight_decay=0.01,
    validation_fraction=0,
)  # fmt: skip
SHARED = ("dropout", "optimizer", "lr", "sequence_length")  # one device is asked for these as well


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
            worst = max(deviation(mine, references[case.model, alone]) for mine in found)
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
        return {**seen, "bytes": _on_wire(trainer), "peak": meter.peak_bytes}

    return run_ranks(rank_main, mesh_cfg.size)


def _on_wire(trainer: Trainer) -> int:
    """Bytes that this rank sent, if every call went around a ring (ledger.py)."""
    sizes = {name: axis.size for name, axis in trainer.mesh.axes.items()}
    sizes["world"] = trainer.mesh.world.size
    calls = trainer.mesh.world.ledger.calls
    return round(sum(wire_bytes(call.op, call.bytes, sizes[call.axis]) for call in calls))


def held(trainer: Trainer) -> dict[str, list[Tensor]]:
    """What a rank keeps from step to step, by the categories of analysis/memory.py."""
    parameters, sync = list(trainer.model.parameters()), trainer.stage.synchroniser
    moments = [tensor for _, tensor in optim.moments(trainer.optimizer)]
    units = [m for m in trainer.model.modules() if isinstance(m, Sharded)]
    buffers = [buffer for unit in units for buffer in unit.gatherer.buffers]
    return {
        "optimizer": [*trainer.masters.weights, *moments],
        "buffer": [*buffers, *getattr(sync, "buffers", [])],
        "parameter": parameters,  # also the weights that are their own masters
        "gradient": [p.grad for p in (*parameters, *trainer.parameters)],
    }


def _step(trainer: Trainer, step: int, seen: dict[str, Any]) -> None:
    loss, _ = trainer.compute_gradients(step)
    with unmetered():
        for p in trainer.parameters:
            name = f"step {step} gradient {p.record.name}"
            seen["tensors"].append((name, p.record, p.grad.clone()))
    seen["numbers"] += [loss, trainer.update(step)]


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
