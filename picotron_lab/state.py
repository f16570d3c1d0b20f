"""What of a run goes into a checkpoint, and how a run goes on from one.

Holds   every parameter; with bf16 its float32 master weight ("master/NAME"); AdamW's moments
        ("adamw.exp_avg/NAME", "adamw.exp_avg_sq/NAME"); every router's bias; the number of steps;
        the options of model and run. Beside the checkpoints lies tokenizer.json, unless tokens are
        bytes.
Not     positions in the data, random states: batches and dropout masks are functions of
        (seed, step).
Read    save -> load -> options_of; then Hugging Face folders
"""

import dataclasses
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from picotron_lab import checkpoint, hugging_face, optim
from picotron_lab.checkpoint import Manifest
from picotron_lab.comm import Alone, Axis
from picotron_lab.config import ConfigError, ModelConfig, TrainConfig
from picotron_lab.ledger import Ledger
from picotron_lab.precision import is_narrow
from picotron_lab.sharding import Record

Pieces = list[tuple[Record, Tensor]]
TOKENIZER = "tokenizer.json"


def save(trainer: Any, step: int) -> Path:
    """Write a checkpoint of the state after `step` steps; all ranks take part."""
    folder, world = Path(trainer.cfg.save_dir), trainer.mesh.world
    if world.rank == 0 and not (folder / TOKENIZER).exists():
        trainer.tokenizer.save(folder / TOKENIZER)
    pieces: Pieces = [(p.record, p.detach()) for p in trainer.model.parameters()]
    pieces += [(b.record, b) for b in trainer.model.buffers()]
    pieces += trainer.masters.pieces() + optim.moments(trainer.optimizer)
    meta = {"model": asdict(trainer.model_cfg), "train": asdict(trainer.cfg)}
    return checkpoint.save(folder, step, pieces, meta, world)


def load(trainer: Any, manifest: Manifest) -> None:
    """Go on from a checkpoint, written by any mesh, as if the run had never stopped."""
    wanted: Pieces = []
    for weight in (*trainer.model.parameters(), *trainer.masters.weights):
        record = weight.record if is_narrow(weight.dtype) else best_source(weight.record, manifest)
        wanted.append((record, weight.detach()))
    wanted += [(b.record, b) for b in trainer.model.buffers()]
    if manifest.step > 0:
        wanted += optim.moments(trainer.optimizer)
        optim.set_step_count(trainer.optimizer, manifest.step)
    checkpoint.load(manifest, wanted)
    trainer.first_step = manifest.step


def best_source(record: Record, manifest: Manifest) -> Record:
    """Where a weight is stored most precisely: as a master weight, if there is one."""
    master = f"master/{record.name}"
    return replace(record, name=master) if master in manifest.tensors else record


# ---- the options of a resumed run


def model_of(manifest: Manifest) -> ModelConfig:
    """The model of a checkpoint."""
    return _from_fields(ModelConfig, manifest, "model")


def options_of(manifest: Manifest) -> TrainConfig:
    """The options of the run that wrote a checkpoint, its files left out."""
    files = {"resume": None, "log_file": None, "tokenizer_file": ""}
    return replace(_from_fields(TrainConfig, manifest, "train"), **files)


def _from_fields(kind: type, manifest: Manifest, key: str) -> Any:
    fields = manifest.meta.get(key, {})
    foreign = set(fields) - {field.name for field in dataclasses.fields(kind)}
    if foreign or not fields:
        raise ConfigError(
            f"--resume {manifest.path} was written by another version of this program "
            f"({', '.join(sorted(foreign)) or key}); train from the start, or use that version."
        )
    return kind(**fields)


def check_resume(manifest: Manifest, model_cfg: ModelConfig, cfg: TrainConfig) -> None:
    """Refuse options that would make another model or optimizer of the checkpoint."""
    stored = model_of(manifest)
    for field in dataclasses.fields(ModelConfig):
        mine, theirs = getattr(model_cfg, field.name), getattr(stored, field.name)
        if field.name != "name" and mine != theirs:
            raise ConfigError(
                f"--resume: the model's {field.name} is {mine}, but in {manifest.path.name} it is "
                f"{theirs}; leave the options of the model out to go on with it."
            )
    before = options_of(manifest)
    if manifest.step > 0 and cfg.optimizer != before.optimizer:
        raise ConfigError(
            f"--optimizer {cfg.optimizer} cannot go on from {manifest.path.name}, which was "
            f"trained with {before.optimizer}; leave --optimizer out."
        )
    if cfg.steps <= manifest.step:
        raise ConfigError(
            f"--steps {cfg.steps} is already reached by {manifest.path.name}; try --steps "
            f"{manifest.step + 100}."
        )
    newest = checkpoint.latest(Path(cfg.save_dir)) if cfg.save_dir else None
    if newest is not None and newest.resolve() != manifest.path.resolve():
        raise ConfigError(
            f"--save-dir {cfg.save_dir} already holds {newest.name}, and going on from "
            f"{manifest.path} would mix two runs; choose another --save-dir."
        )


def choose_tokenizer(manifest: Manifest, given: str | None) -> dict[str, str]:
    """The options of a resumed run's tokenizer: the file beside the checkpoint, if there is one."""
    before, saved = options_of(manifest).tokenizer, manifest.path.parent / TOKENIZER
    choice = given or before
    if not choice:
        raise ConfigError(
            f"--tokenizer is needed, because {manifest.path} was imported without one; add "
            "--tokenizer FILE, or --tokenizer bytes to teach it bytes."
        )
    if before and choice != before:
        raise ConfigError(
            f"--tokenizer {given} would give the tokens of {manifest.path.name} another meaning, "
            f"which was trained with {before}; leave --tokenizer out."
        )
    file = str(saved) if saved.exists() and choice != "bytes" else ""
    return {"tokenizer": choice, "tokenizer_file": file}


def changes(before: TrainConfig, now: TrainConfig) -> list[str]:
    """'--option old -> new' for each option of a resumed run that differs from before."""
    files = {"resume", "log_file", "save_dir", "cache_dir", "tokenizer", "tokenizer_file"}
    return [
        f"--{field.name.replace('_', '-')} {old} -> {new}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in files
        and (old := getattr(before, field.name)) != (new := getattr(now, field.name))
    ]


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
    tokenizer = newest.parent / TOKENIZER
    tokenizer = tokenizer if tokenizer.exists() else None
    hugging_face.export(model_of(manifest), tensors, folder, tokenizer)


def import_folder(folder: Path, save_dir: Path) -> Path:
    """Turn a Hugging Face Llama folder into a checkpoint of step 0, with its tokenizer."""
    if checkpoint.latest(save_dir) is not None:
        raise ConfigError(f"--save-dir {save_dir} already holds checkpoints; try another.")
    cfg = hugging_face.read_config(folder)
    pieces = []
    for name, tensor in hugging_face.read_tensors(folder, cfg).items():
        shape = tuple(tensor.shape)
        pieces.append((Record(name, shape, tuple((0, n) for n in shape)), tensor))
    tokenizer, saved = folder / TOKENIZER, save_dir / TOKENIZER
    name = "imported" if tokenizer.exists() else ""
    options = replace(TrainConfig(), tokenizer=name, lr=1e-4)
    meta = {"model": asdict(cfg), "train": asdict(options)}
    path = checkpoint.save(save_dir, 0, pieces, meta, Axis("world", [0], 0, Alone(), Ledger()))
    if tokenizer.exists():
        shutil.copyfile(tokenizer, saved)
    return path
