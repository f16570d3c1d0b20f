"""A run as its user sees it: train, show a live line, say what went wrong, let the model write.

Dims    T tokens of the prompt
"""

from pathlib import Path

import torch

from picotron_lab import diagnose, state
from picotron_lab.checkpoint import Manifest
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.generate import generate
from picotron_lab.log import Log
from picotron_lab.profile import Profile, ProfiledTrainer
from picotron_lab.trainer import Trainer

PROMPT = 32  # tokens of the held-out text that the model goes on from


def train(
    model_cfg: ModelConfig,
    mesh_cfg: MeshConfig,
    cfg: TrainConfig,
    world: Axis,
    manifest: Manifest | None = None,
    wanted: Profile | None = None,
) -> None:
    """Train from the start, or go on from a checkpoint. Every rank of `world` calls this."""
    trainer = make_trainer(model_cfg, mesh_cfg, cfg, world, wanted)
    if manifest is not None:
        state.load(trainer, manifest)
    log = Log(Path(cfg.log_file), trainer.first_step, cfg.steps, active=world.rank == 0)
    changes = state.changes(state.options_of(manifest), cfg) if manifest is not None else []
    if changes:
        log.say(f"goes on from {manifest.path} with changed options: {', '.join(changes)}")
    if mesh_cfg.token_slices == "auto":
        log.say(f"token slices, best by times just measured: {','.join(map(str, trainer.slices))}")
    try:
        for metrics in trainer.fit():
            log.step(metrics)
            if "validation_loss" in metrics:
                log.say(f"step {metrics['step']}: validation loss {metrics['validation_loss']:.4f}")
            if wanted and metrics["step"] == wanted.last:
                log.say(trainer.report)
    except torch.OutOfMemoryError:
        parameters = list(trainer.model.parameters())
        raise diagnose.out_of_memory(
            parameters, trainer.parameters, mesh_cfg.zero, trainer.device
        ) from None
    finally:
        log.close()
    alone = mesh_cfg.size == mesh_cfg.dp and mesh_cfg.ep == 1 and mesh_cfg.zero < 3
    if cfg.sample_tokens and (world.rank == 0 or not alone):  # who shares a model writes together
        prompt, continuation = write_sample(trainer)
        if world.rank == 0:
            print(f"\n--- the model goes on from the held-out text\n{prompt}|{continuation}\n---")
    if world.rank == 0:
        print(f"metrics: {log.path}")


def make_trainer(
    model_cfg: ModelConfig,
    mesh_cfg: MeshConfig,
    cfg: TrainConfig,
    world: Axis,
    wanted: Profile | None = None,
) -> Trainer:
    """A trainer, or one sentence where the model does not fit at all."""
    try:
        if wanted:
            return ProfiledTrainer(model_cfg, mesh_cfg, cfg, world, wanted)
        return Trainer(model_cfg, mesh_cfg, cfg, world)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no own
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise diagnose.TrainingError(
                f"out of memory: the weights of {model_cfg.name} do not fit; try a smaller --model."
            ) from None
        raise


def write_sample(trainer: Trainer) -> tuple[str, str]:
    """(prompt, continuation): how the model goes on from the start of the held-out text."""
    cfg, tokenizer = trainer.cfg, trainer.tokenizer
    text = trainer.held_out if len(trainer.held_out) else trainer.batches.windows.tokens
    prompt = text[:PROMPT].tolist()
    ids = generate(trainer.predict, prompt, cfg.sample_tokens, cfg.sequence_length)
    return tokenizer.decode(prompt), tokenizer.decode(ids)
