"""Pipelines within the trainer: products with other techniques, validation, writing, checkpoints,
and what is said when something is not finite."""

import dataclasses
from pathlib import Path

import pytest
import torch

from picotron_lab import checkpoint, state
from picotron_lab.cases import BALANCED, DENSE, PIPELINES, TIED, Case, sample
from picotron_lab.config import MeshConfig, TrainConfig
from picotron_lab.data_parallel import Naive
from picotron_lab.diagnose import TrainingError
from picotron_lab.dropout import Where
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value
from picotron_lab.pipeline_parallel import Executor, FusedExecutor
from picotron_lab.pipeline_stages import split
from picotron_lab.schedules.registry import build
from picotron_lab.sharding import attach, materialise
from picotron_lab.trainer import Trainer
from picotron_lab.verify import verify

FOUR = dataclasses.replace(DENSE, layers=4)
PRODUCTS = {
    "dp zero1": (MeshConfig(pp=2, dp=2, zero=1, schedule="zb-h1"), DENSE, "fused"),
    "dp zero2": (MeshConfig(pp=2, dp=2, zero=2, schedule="zb-v"), FOUR, "plain"),
    "dp zero2 vocabulary": (
        MeshConfig(pp=2, dp=2, zero=2, schedule="1f1b-vocab2"), TIED, "fused",
    ),
    "dp ep": (
        MeshConfig(pp=2, dp=2, ep=2, schedule="dualpipe"),
        dataclasses.replace(BALANCED, layers=2), "plain",
    ),
    "tp sp": (MeshConfig(pp=2, tp=2, sequence_parallel=True, schedule="zb-h2"), TIED, "plain"),
    "cp": (MeshConfig(pp=2, cp=2, schedule="interleaved"), FOUR, "fused"),
}  # fmt: skip


LONG = {  # left to CI, or to a run after a change
    "cp": pytest.mark.slow, "dp zero1": pytest.mark.slow, "tp sp": pytest.mark.exhaustive,
    "dp zero2": pytest.mark.exhaustive, "dp ep": pytest.mark.exhaustive,
}  # fmt: skip
RARE = pytest.mark.exhaustive


@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG.get(n, ())) for n in PRODUCTS])
def test_products_equal_one_device(name):
    mesh, model, impl = PRODUCTS[name]
    changes = {"micro_batch_size": 1, "impl": impl, "clip": 0.2, "bucket_mib": 0.02}
    assert verify([Case(name, mesh, model, changes)])[0].good


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(2, PIPELINES), ids=lambda case: case.technique)
def test_a_random_product_equals_one_device(case):
    """Some of the rows of `run.py verify --all`."""
    assert verify([case])[0].good


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=RARE)])
def test_post_validation_equals_clipping_together(optimizer):
    mesh = MeshConfig(pp=2, dp=2, zero=1, schedule="zb-h2")
    # the first stage alone stays below this limit, both together do not
    changes = {"micro_batch_size": 1, "clip": 1.6, "optimizer": optimizer, "impl": "fused"}
    changes |= {"post_validation": True, "lr": {"sgd": 0.5, "adamw": 0.01}[optimizer]}
    assert verify([Case("post-validation", mesh, TIED, changes)])[0].good


@pytest.mark.parametrize("executor", [Executor, FusedExecutor])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_micro_batches_of_different_sizes(executor, name):
    """The last one of an epoch may be smaller, in sequences and in tokens."""
    sizes = [(2, 6), (2, 6), (1, 4)]
    drawn = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, DENSE.vocab_size, size, generator=drawn) for size in sizes]
    batches = [(x, x, Where.first(x)) for x in tokens]

    def model():
        with torch.device("meta"):
            whole = Llama(DENSE)
        attach(whole)
        return whole

    def train(axis):
        schedule = build(name, axis.size, len(sizes))
        part = split(model(), axis, schedule, [1, 1])
        materialise(part, 0, initial_value, dtype=torch.float64)
        stages = {int(number): stage for number, stage in part.stages.items()}
        alone = {s: Naive(list(stage.parameters()), axis.split("alone", [[r] for r in range(2)]))
                 for s, stage in stages.items()}  # fmt: skip
        executor(stages, schedule, axis, alone).run(batches, 28)
        return {p.record.name: p.grad for p in part.parameters()}

    found = run_ranks(train, 2)
    alone = model()
    materialise(alone, 0, initial_value, dtype=torch.float64)
    sum(alone(*batch) for batch in batches).div(28).backward()
    assert sum(map(len, found)) == len(list(alone.parameters()))
    for p in alone.parameters():
        mine = next(grads[p.record.name] for grads in found if p.record.name in grads)
        torch.testing.assert_close(mine, p.grad, rtol=1e-10, atol=1e-12)


# ---- a whole run


@pytest.fixture
def cfg(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("every stage has a part of the model, and none has it all. " * 8)
    return TrainConfig(
        global_batch_size=4, micro_batch_size=1, sequence_length=16, steps=4, dtype="float64",
        data=str(text), cache_dir=str(tmp_path), save_dir=str(tmp_path / "saved"),
        validation_fraction=0.2, impl="plain", optimizer="adamw", warmup_steps=0,
    )  # fmt: skip


MESHES = {
    "zb-v": MeshConfig(pp=2, schedule="zb-v"),
    "dualpipe": MeshConfig(pp=2, schedule="dualpipe"),
    "1f1b-vocab1": MeshConfig(pp=2, schedule="1f1b-vocab1"),
    "1f1b": MeshConfig(pp=4),
    "alone": MeshConfig(),
}


def run(cfg, mesh, first=0, last=2, save=False):
    """Losses, norms and validation of steps first to last - 1, and how the model would go on."""

    def rank_main(world):
        trainer = Trainer(dataclasses.replace(FOUR, tied=True), mesh, cfg, world)
        if first:
            newest = checkpoint.latest(Path(cfg.save_dir))
            state.load(trainer, checkpoint.read_manifest(newest))
        numbers = []
        for step in range(first, last):
            metrics = trainer.train_step(step)
            numbers += [metrics["loss"], metrics["grad_norm"]]
        if save:
            state.save(trainer, last)
        numbers.append(trainer.validate())
        return torch.tensor(numbers), trainer.predict([1, 2, 3])

    return run_ranks(rank_main, mesh.size)


CHANGES = [
    ("zb-v", "1f1b-vocab1"), pytest.param("dualpipe", "1f1b", marks=RARE),
    pytest.param("1f1b-vocab1", "alone", marks=RARE),
]  # fmt: skip


@pytest.mark.parametrize("saved, loaded", CHANGES)
def test_a_run_goes_on_as_on_one_device(cfg, saved, loaded):
    """Loss, norm, validation and logits on every rank, also after a change of the mesh."""
    alone = dataclasses.replace(cfg, save_dir=None)
    [(numbers, logits)] = run(alone, MeshConfig(), last=2)
    for mine, theirs in run(cfg, MESHES[saved], last=2, save=True):
        torch.testing.assert_close(mine, numbers, rtol=1e-6, atol=0)
        torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-6)
    [(whole, logits)] = run(alone, MeshConfig(), last=4)
    for mine, theirs in run(cfg, MESHES[loaded], first=2, last=4):
        torch.testing.assert_close(mine, whole[4:], rtol=1e-6, atol=0)
        torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_named_on_its_rank(cfg):
    def rank_main(world):
        trainer = Trainer(FOUR, MeshConfig(pp=2), cfg, world)
        if world.rank == 1:
            with torch.no_grad():
                trainer.model.stages["1"].layers["3"].mlp.up.weight[0, 0] = float("nan")
        try:
            trainer.train_step(0)
        except TrainingError as error:
            return str(error)

    first, second = run_ranks(rank_main, 2)
    assert "all outputs are finite on this rank" in first
    assert "module layers.3.mlp.up is the first" in second
