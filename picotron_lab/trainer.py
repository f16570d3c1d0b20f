"""The trainer: one model, one mesh, one list of actions per step; it composes every technique.

Idea    loss = sum of token losses / counted tokens, both over the *global* batch. A step is a
        schedule, of which each rank executes its list of actions: with one stage it is gradient
        accumulation. Afterwards every gradient is that of one device, so what follows (norm,
        clipping, AdamW) need not know the mesh.
Step    deal rows of the global batch -> F, BW (or B, W) per stage and micro-batch -> reduce
        gradients -> clip -> update -> log
Exact   any mesh gives the same loss, gradients and weights: tests/test_trainer.py
Dims    as in model.py
Read    build.py -> pipeline_parallel.py -> Trainer.train_step -> Trainer.fit
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picotron_lab import (
    build,
    corpus,
    data,
    data_parallel,
    mesh,
    optim,
    precision,
    router,
    sharding,
    state,
    token_slices,
)  # fmt: skip
from picotron_lab.analysis import cost, hardware, meter
from picotron_lab.checks import check_run, schedule_of
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.diagnose import TrainingError, not_finite
from picotron_lab.dropout import Where
from picotron_lab.model import IGNORED
from picotron_lab.schedules.validator import validate


class Trainer:
    """Everything one rank needs to train, to save and to go on."""

    def __init__(self, model_cfg: ModelConfig, mesh_cfg: MeshConfig, cfg: TrainConfig, world: Axis):
        check_run(model_cfg, mesh_cfg, cfg)
        self.cfg, self.mesh = cfg, mesh.build(world, mesh_cfg, model_cfg.kv_heads)
        self.microbatches = cfg.micro_batches(self.mesh.dp.size)
        self.device = self._find_device()
        self._open_data(model_cfg)
        check_run(self.model_cfg, mesh_cfg, cfg)  # the vocabulary is known now
        positions_T = build.positions(mesh_cfg, cfg, self.mesh)  # of this rank's tokens
        self.columns, self.positions_T = positions_T.numpy(), positions_T.to(self.device)
        schedule = schedule_of(mesh_cfg, cfg)
        self.model = build.build_model(
            self.model_cfg, mesh_cfg, cfg, self.mesh, schedule, self.device
        )
        self.slices = build.choose_slices(self.model_cfg, mesh_cfg, cfg, self.mesh, self.device)
        schedule = schedule_of(mesh_cfg, cfg, len(self.slices))
        validate(schedule)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        wide = torch.promote_types(precision.DTYPES[cfg.dtype], torch.float32)
        precision.accumulate_in(parameters, wide)
        found = build.synchronisers(self.model, mesh_cfg, cfg, self.mesh)
        self.executor = build.executor(self.model, schedule, self.mesh, cfg.impl, found)
        self.synchroniser = data_parallel.together(list(found.values()))
        self.parameters = self.synchroniser.shards  # what this rank's optimizer steps
        self.masters = precision.MasterWeights(self.parameters)
        self.optimizer = optim.build(self.masters.weights, cfg)
        copies = getattr(self.model, "axes", {})  # of parameters on two pipeline ranks
        self.axes = {**self.mesh.axes, **copies}
        served = (self.mesh.replica, self.mesh.expert_replica)  # by synchronisers
        self.other_axes = {n: a for n, a in self.axes.items() if a not in served}
        self.validation = None
        if cfg.post_validation:
            self.validation = build.post_validation(
                self.optimizer, self.parameters, mesh_cfg, self.mesh, self.axes
            )
        self.routing: dict[str, float] = {}
        self.first_step = 0

    def _find_device(self) -> torch.device:
        cuda = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def _open_data(self, model_cfg: ModelConfig) -> None:
        cfg = self.cfg
        self.tokenizer, tokens = corpus.prepare(
            cfg.data, cfg.tokenizer_file or cfg.tokenizer, Path(cfg.cache_dir)
        )
        size = model_cfg.vocab_size or -(-self.tokenizer.vocab_size // 64) * 64
        self.model_cfg = replace(model_cfg, vocab_size=size)
        corpus.check_vocabulary(tokens, size)
        train, held_out = data.split(tokens, cfg.sequence_length, cfg.validation_fraction)
        self.batches = data.Batches(train, cfg.sequence_length, cfg.seed, cfg.global_batch_size)
        self.held_out = held_out

    # ---- one step

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step on global batch `step`; returns its metrics."""
        start = time.perf_counter()
        ledger = self.mesh.world.ledger
        ledger.clear()
        loss, tokens = self.compute_gradients(step)
        if not math.isfinite(loss):
            batches = self._deal(step)
            raise not_finite(loss, step, self.model, self.executor.forward, batches)
        norm = self.update(step)
        seconds = time.perf_counter() - start
        return {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": optim.learning_rate(step, self.cfg),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "mfu": self._mfu(tokens / seconds),
            "peak_memory_bytes": meter.peak_memory_bytes(self.device),
            "sent_bytes": ledger.bytes_by_axis(),
            **self.routing,
        }

    def compute_gradients(self, step: int) -> tuple[float, int]:
        """Leave the global batch's gradients in every .grad; returns (loss, counted tokens)."""
        batches = self._deal(step)
        mine = torch.stack([(labels != IGNORED).sum() for _, labels, _ in batches]).sum()
        tokens = int(self.mesh.replica.all_reduce(mine))
        positions = self.cfg.global_batch_size * self.cfg.sequence_length
        router.begin_step(self.model, 1 / positions)
        if len(self.slices) > 1:
            batches = [token_slices.cut(batch, self.slices) for batch in batches]
        loss_sum = self.executor.run(batches, max(tokens, 1))
        sharding.reduce_gradients(self.parameters, self.other_axes)
        if self.model_cfg.experts:
            copies, pp = self.axes.get("mirror"), self.mesh.pp
            self.routing = router.settle(self.model, self.mesh.replica, positions, copies, pp)
        loss_sum = self.mesh.pp.all_reduce(self.mesh.replica.all_reduce(loss_sum))
        return float(loss_sum / max(tokens, 1)), tokens

    def update(self, step: int) -> float:
        """Clip, step, publish the weights; returns the gradient norm before clipping."""
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, self.cfg))
        norm = self._clip_and_step() if self.validation is None else self._step_and_validate()
        if not math.isfinite(norm):  # no step: the newest checkpoint must stay a good one
            raise TrainingError(f"the gradient norm is {norm} at step {step}; try a lower --lr.")
        self.masters.publish()
        self.synchroniser.publish()
        return norm

    def _clip_and_step(self) -> float:
        """All ranks learn the norm, then step."""
        world, limit = self.mesh.world, self.cfg.clip
        norm = float(optim.clip(self.parameters, limit, world, self.axes, self.optimizer))
        if math.isfinite(norm):
            self.masters.take_gradients()
            self.optimizer.step()
        return norm

    def _step_and_validate(self) -> float:
        """Each pipeline stage steps, then learns whether it was right (post_validation.py)."""
        self.masters.take_gradients()
        self.validation.step(self.cfg.clip)
        norm = self.validation.validate()
        self.validation.finish()
        return norm

    def _deal(self, step: int) -> list[tuple]:
        """This rank's micro-batches of global batch `step`: a contiguous run of its rows."""
        size = self.cfg.micro_batch_size
        first = self.mesh.dp.rank * self.microbatches * size
        rows = range(first, first + self.microbatches * size, size)
        batches = [self.batches.micro_batch(step, row, size, self.columns) for row in rows]
        return [self._to_model(batch, step) for batch in batches]

    def _to_model(self, batch: data.MicroBatch, step: int) -> tuple[Tensor, Tensor, Where]:
        where = Where(self.positions_T, batch.rows_B.to(self.device), step, self.cfg.seed)
        return batch.tokens_BT.to(self.device), batch.labels_BT.to(self.device), where

    def _mfu(self, tokens_per_second: float) -> float | None:
        peak = hardware.peak_flops(hardware.device_name(self.device), self.parameters[0].dtype)
        flops = cost.flops_per_token(self.model_cfg, self.cfg.sequence_length)
        return cost.model_flops_utilisation(tokens_per_second, flops, peak, self.mesh.world.size)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean token loss over all held-out text."""
        dp, size = self.mesh.dp, self.cfg.micro_batch_size
        held_out = data.Evaluation(self.held_out, self.cfg.sequence_length, size * dp.size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        for i in range(len(held_out)):
            rows = held_out.micro_batch(i, dp.rank * size, size, self.columns)
            batch = self._to_model(rows, 0)
            loss = self.executor.forward(batch)
            if loss is not None:  # it is known to one of the pipeline ranks
                sums += torch.stack([loss, (batch[1] != IGNORED).sum()])
        self.model.train()
        loss_sum, tokens = self.mesh.pp.all_reduce(self.mesh.replica.all_reduce(sums)).tolist()
        return loss_sum / tokens

    @torch.no_grad()
    def predict(self, tokens: list[int]) -> Tensor:
        """Logits [V] of what follows 1 to T tokens; ranks that share a model call it together.

        Padded behind: later tokens do not change earlier logits, and a mesh may need this length.
        """
        length = self.cfg.sequence_length
        assert 1 <= len(tokens) <= length, (
            f"{len(tokens)} tokens cannot be gone on from: give 1 to {length}, the sequence length."
        )
        padded = tokens + [0] * (length - len(tokens))
        mine_BT = torch.tensor([padded], device=self.device)[:, self.positions_T]
        where = Where(self.positions_T, torch.zeros(1, dtype=torch.int64, device=self.device))
        self.model.eval()
        logits_BTV = self.executor.forward((mine_BT, None, where))
        self.model.train()
        last_T = self.positions_T == len(tokens) - 1  # on one of the ranks that share the sequence
        logits_V = torch.zeros(self.model_cfg.vocab_size, device=self.device)
        if logits_BTV is not None:  # on one of the pipeline ranks
            logits_V += logits_BTV[0, last_T].float().sum(0)
        return self.mesh.pp.all_reduce(self.mesh.cp.all_reduce(logits_V))

    # ---- a whole run

    def fit(self) -> Iterator[dict[str, Any]]:
        """Train to the last step; gives the metrics of each step."""
        cfg = self.cfg
        for step in range(self.first_step, cfg.steps):
            metrics = self.train_step(step)
            done = step + 1
            if len(self.held_out) and is_due(done, cfg.validate_every, cfg.steps):
                metrics["validation_loss"] = self.validate()
            yield metrics  # logged before the checkpoint, so that no saved step lacks its line
            if cfg.save_dir and is_due(done, cfg.save_every, cfg.steps):
                state.save(self, done)


def is_due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now."""
    return done == steps or (every > 0 and done % every == 0)
