"""What of a run goes into a checkpoint, and how a run goes on from one.

Holds   every parameter; with bf16 its float32 master weight ("master/NAME"); AdamW's moments
        ("adamw.exp_avg/NAME", "adamw.exp_avg_sq/NAME"); the number of steps; the options of model
        and run.
Not     positions in the data, random states: batches and dropout masks are functions of (seed,
        step).
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from picotron_lab import checkpoint, hugging_face, optim
from picotron_lab.comm import Alone, Axis
from picotron_lab.config import ConfigError, ModelConfig, TrainConfig
from picotron_lab.ledger import Ledger
from picotron_lab.sharding import Record

Pieces = list[tuple[Record, Tensor]]


def save(trainer: Any, step: int) -> Path:
    """Write a checkpoint of the state after `step` steps; all ranks take part."""
    pieces: Pieces = [(p.record, p.detach()) for p in trainer.model.parameters()]
    pieces += trainer.masters.pieces() + optim.moments(trainer.optimizer)
    meta = {"model": asdict(trainer.model_cfg), "train": asdict(trainer.cfg)}
    return checkpoint.save(Path(trainer.cfg.save_dir), step, pieces, meta, trainer.mesh.world)


def load(trainer: Any, manifest: checkpoint.Manifest) -> None:
    """Go on from a checkpoint, written by any mesh, as if the run had never stopped."""
    wanted: Pieces = [(p.record, p.detach()) for p in trainer.model.parameters()]
    wanted += [(best_source(w.record, manifest), w.detach()) for w in trainer.masters.weights]
    moments = optim.moments(trainer.optimizer)
    if all(record.name in manifest.tensors for record, _ in moments):  # not so if just imported
        wanted += moments
        optim.set_step_count(trainer.optimizer, manifest.step)
    checkpoint.load(manifest, wanted)
    trainer.first_step = manifest.step


def best_source(record: Record, manifest: checkpoint.Manifest) -> Record:
    """Where a weight is stored most precisely: as a master weight, if there is one."""
    master = f"master/{record.name}"
    return replace(record, name=master) if master in manifest.tensors else record


# ---- Hugging Face folders


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write the model of a checkpoint, or of the newest one in a folder, for Hugging Face."""
    newest = path if (path / "manifest.json").exists() else checkpoint.latest(path)
    if newest is None:
        raise ConfigError(f"--checkpoint {path} is no checkpoint, nor a folder that holds one.")
    manifest = checkpoint.read_manifest(newest)
    checkpoint.verify(manifest)
    names = [name for name in manifest.tensors if "/" not in name]
    best = {n: f"master/{n}" if f"master/{n}" in manifest.tensors else n for n in names}
    tensors = {n: checkpoint.read_full(manifest, best[n]) for n in names}
    tokenizer = Path(manifest.meta["train"]["tokenizer"])
    cfg = ModelConfig(**manifest.meta["model"])
    hugging_face.export(cfg, tensors, folder, tokenizer if tokenizer.is_file() else None)


def import_folder(folder: Path, save_dir: Path) -> Path:
    """Turn a Hugging Face Llama folder into a checkpoint of step 0."""
    if checkpoint.latest(save_dir) is not None:
        raise ConfigError(f"--save-dir {save_dir} already holds checkpoints; try another.")
    cfg = hugging_face.read_config(folder)
    pieces = []
    for name, tensor in hugging_face.read_tensors(folder, cfg).items():
        shape = tuple(tensor.shape)
        pieces.append((Record(name, shape, tuple((0, n) for n in shape)), tensor))
    meta = {"model": asdict(cfg), "train": asdict(TrainConfig())}
    alone = Axis("world", [0], 0, Alone(), Ledger())
    return checkpoint.save(save_dir, 0, pieces, meta, alone)
