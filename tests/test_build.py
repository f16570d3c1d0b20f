"""Any mesh starts from one device's weights, ends where it ends, and reads what others wrote."""

import dataclasses

import numpy as np
import pytest
import torch

from picotron_lab import checkpoint, data, optim, router, sharding, state
from picotron_lab.comm import Alone, Axis
from picotron_lab.config import CP_KINDS, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.dropout import Where
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.model import Llama, initial_value
from picotron_lab.trainer import Trainer

MODEL = ModelConfig(vocab_size=61, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=26)
TIED = dataclasses.replace(MODEL, tied=True, kv_heads=1)
EXPERTS = dataclasses.replace(
    MODEL, experts=5, router="sigmoid", shared_experts=1, balance_loss=0.1, balance_speed=0.01
)
MESHES = {
    "zero1": MeshConfig(dp=3, zero=1),
    "zero2": MeshConfig(dp=2, zero=2),
    "zero3": MeshConfig(dp=3, zero=3),
    "tp": MeshConfig(tp=4),
    "tp sp, all logits": MeshConfig(tp=2, sequence_parallel=True, vocab_parallel="none"),
    "zero1 tp": MeshConfig(dp=2, tp=2, zero=1, vocab_parallel="1"),
    "zero2 tp sp": MeshConfig(dp=2, tp=2, zero=2, sequence_parallel=True),
    "zero3 tp sp": MeshConfig(dp=2, tp=2, zero=3, sequence_parallel=True),
    "cp": MeshConfig(cp=2, cp_kind="ring"),
    "cp dp": MeshConfig(dp=2, cp=2, cp_kind="zigzag"),
    "cp tp sp zero2": MeshConfig(cp=2, cp_kind="all-gather", tp=2, sequence_parallel=True, zero=2),
    "ep": MeshConfig(dp=3, ep=3),
    "ep cp zero1": MeshConfig(dp=2, cp=2, cp_kind="ring", ep=4, zero=1),
    "ep zero3": MeshConfig(dp=6, ep=3, zero=3),
}
ALSO_TIED = ("zero1", "zero3", "tp", "zero2 tp sp", "zero3 tp sp")
LONG = ("zero1 tp", "zero3 tp sp", "cp tp sp zero2", "ep cp zero1", "ep zero3")
ALONE = Axis("world", [0], 0, Alone(), Ledger())
SOME = ("zero2 tp sp",)  # all others save and load in a run after a change
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in MESHES]


def paths():
    """Of each mesh one path always or, if it takes long, slow; the other after a change."""
    for k, name in enumerate(MESHES):
        slow = [pytest.mark.slow] * (name in (*LONG, "zero2 tp sp"))
        for j, impl in enumerate(("plain", "fused")):
            rare = (k + j) % 2 and [pytest.mark.exhaustive]
            yield pytest.param(name, impl, marks=rare or slow)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """13 windows of 8 tokens and one of 3, so that ranks count different numbers of labels."""
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(1).integers(0, 61, 13 * 8 + 4).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    return TrainConfig(
        global_batch_size=12, micro_batch_size=12, sequence_length=8, steps=6, lr=0.5, min_lr=0.1,
        warmup_steps=2, optimizer="sgd", weight_decay=0.01, clip=0.5, dtype="float64",
        dropout=0.2, data=str(folder / "tokens.npy"), cache_dir=str(folder / "cache"),
        validation_fraction=0, bucket_mib=0.01,
    )  # fmt: skip


def on_mesh(base, name, **changes):
    """Each rank has two micro-batches in a step, or as many rows as there are."""
    rows = 12 // MESHES[name].dp
    return dataclasses.replace(base, micro_batch_size=max(1, rows // 2), **changes)


def models_for(name):
    """A model with experts where they are shared out; else an untied and perhaps a tied one."""
    if "ep" in name:
        return [EXPERTS]
    return [MODEL, TIED] if name in ALSO_TIED else [MODEL]


def full_weights(model_cfg, cfg):
    model = Llama(model_cfg)
    sharding.attach(model)
    sharding.materialise(model, cfg.seed, initial_value, dtype=torch.float64)
    return {p.record.name: p.detach() for p in model.parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_slices_of_one_devices(base, name):
    """Every element is on some rank, shards differ, and their scale does not depend on the cut."""
    model_cfg = models_for(name)[0]
    full = full_weights(model_cfg, base)

    def weights(world):
        model = Trainer(model_cfg, MESHES[name], on_mesh(base, name), world).model
        return [(p.record, p.detach()) for p in model.parameters()]

    covered = {key: torch.zeros_like(tensor) for key, tensor in full.items()}
    shards = {}
    for held in run_ranks(weights, MESHES[name].size):
        for record, weight in held:
            assert torch.equal(weight, full[record.name][record.index]), record
            covered[record.name][record.index] = 1
            shards.setdefault(record.name, {})[record.slices] = weight
    assert all(seen.all() for seen in covered.values())
    q = [w for w in shards["layers.1.attention.q.weight"].values() if w.numel() > 0]
    assert not any(torch.equal(a, b) for i, a in enumerate(q) for b in q[:i])
    assert all(0.016 < w.std() < 0.024 for w in q)


def one_device(model_cfg, cfg, steps):
    """A plain loop over whole global batches: torch's optimizer, torch's clipping."""
    model = Llama(model_cfg, cfg.dropout)
    sharding.attach(model)
    sharding.materialise(model, cfg.seed, initial_value, dtype=torch.float64)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == m] for m in (1, 0))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors}]
    optimizer = torch.optim.SGD(groups, lr=cfg.lr)
    tokens = np.load(cfg.data)
    batches = data.Batches(tokens, cfg.sequence_length, cfg.seed, cfg.global_batch_size)
    seen = []
    for step in range(steps):
        batch = batches.micro_batch(step, 0, cfg.global_batch_size)
        where = Where(torch.arange(cfg.sequence_length), batch.rows_B, step, cfg.seed)
        counted = int((batch.labels_BT != -100).sum())
        router.begin_step(model, 1 / batch.labels_BT.numel())
        loss = model(batch.tokens_BT, batch.labels_BT, where) / counted
        optimizer.zero_grad()
        loss.backward()
        router.settle(model, ALONE, batch.labels_BT.numel())
        gradients = {p.record.name: p.grad.clone() for p in model.parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, cfg)
        optimizer.step()
        kept = [*model.parameters(), *model.buffers()]
        weights = {p.record.name: p.detach().clone() for p in kept}
        seen.append((loss.item(), norm.item(), gradients, weights))
    return seen


@pytest.fixture(scope="module")
def expected(base):
    """Three steps of every model on one device."""
    models = [MODEL, TIED, EXPERTS]
    seen = {model_cfg: one_device(model_cfg, base, 3) for model_cfg in models}
    norms = [max(step[1] for step in steps) for steps in seen.values()]
    assert min(norms) > base.clip, "clipping must do something"
    return seen


def held(trainer):
    """Weights of a rank, and the biases of its routers."""
    return [*trainer.model.parameters(), *trainer.model.buffers()]


def on_ranks(world, model_cfg, mesh_cfg, cfg, steps):
    trainer = Trainer(model_cfg, mesh_cfg, cfg, world)
    seen = []
    for step in range(steps):
        loss, _ = trainer.compute_gradients(step)
        gradients = [(p.record, p.grad.clone()) for p in trainer.parameters]
        norm = trainer.update(step)
        weights = [(p.record, p.detach().clone()) for p in held(trainer)]
        seen.append((loss, norm, gradients, weights))
    return seen


def assert_equal(found, expected, limit=1e-10):
    for step, (mine, reference) in enumerate(zip(found, expected, strict=True)):
        assert mine[0] == pytest.approx(reference[0], rel=limit), f"loss of step {step}"
        assert mine[1] == pytest.approx(reference[1], rel=limit), f"norm of step {step}"
        for what, index in (("gradient", 2), ("weight", 3)):
            for record, tensor in mine[index]:
                whole = reference[index][record.name]
                error = (tensor - whole[record.index]).abs()
                near = error <= limit * whole.abs().max()  # false for what is no number
                assert near.all(), f"{what} {record.name}, step {step}: {error.max():.1e}"


@pytest.mark.parametrize(("name", "impl"), list(paths()))
def test_three_clipped_steps_equal_one_device(base, expected, name, impl):
    """Untied embeddings with 2 key/value heads, tied ones with 1; recomputed activations."""
    mesh_cfg = MESHES[name]
    kind = {"zero3": "full", "tp": "selective", "zero3 tp sp": "full"}.get(name, "none")
    cfg = on_mesh(base, name, impl=impl, recompute=kind)
    for model_cfg in models_for(name):
        found = run_ranks(on_ranks, mesh_cfg.size, model_cfg, mesh_cfg, cfg, 3)
        for seen in found:
            assert_equal(seen, expected[model_cfg])
        assert_replicas_identical(found)


def assert_replicas_identical(found):
    """Ranks that hold the same slice hold the same bits, after three steps."""
    first = {}
    for seen in found:
        for record, weight in seen[-1][3]:
            other = first.setdefault((record.name, record.slices), weight)
            assert torch.equal(weight, other), f"replicas of {record.name} {record.slices} differ"


@pytest.mark.parametrize("kind", CP_KINDS)
def test_ranks_that_share_a_sequence_predict_like_one_device(base, kind):
    """Whichever rank holds the last token, and however many other sequences there are."""
    tokens = np.load(base.data)[:8].tolist()
    counts = (1, 3, 5, 6, 8)
    cfg = dataclasses.replace(base, dropout=0.0, micro_batch_size=2)
    mesh_cfg = MeshConfig(dp=2, cp=2, cp_kind=kind)

    def predict(world, mesh_cfg):
        trainer = Trainer(MODEL, mesh_cfg, cfg, world)
        return torch.stack([trainer.predict(tokens[:count]) for count in counts])

    model = Llama(MODEL)
    sharding.attach(model)
    sharding.materialise(model, base.seed, initial_value, dtype=torch.float64)
    whole = model(torch.tensor([tokens]))[0, [count - 1 for count in counts]]
    for found in run_ranks(predict, 4, mesh_cfg):
        torch.testing.assert_close(found.double(), whole, rtol=0, atol=1e-6)


# ---- checkpoints


def save_after_two_steps(world, model_cfg, mesh_cfg, cfg):
    trainer = Trainer(model_cfg, mesh_cfg, cfg, world)
    for step in range(2):
        trainer.train_step(step)
    state.save(trainer, 2)
    pieces = [(p.record, p.detach().clone()) for p in held(trainer)]
    return pieces + [(r, t.clone()) for r, t in optim.moments(trainer.optimizer)]


def load_and_go_on(world, model_cfg, mesh_cfg, cfg, path):
    trainer = Trainer(model_cfg, mesh_cfg, cfg, world)
    state.load(trainer, checkpoint.read_manifest(path))
    pieces = [(p.record, p.detach().clone()) for p in held(trainer)]
    pieces += [(r, t.clone()) for r, t in optim.moments(trainer.optimizer)]
    losses = [trainer.train_step(step)["loss"] for step in (2, 3)]
    return pieces, losses


ADAMW = {"optimizer": "adamw", "lr": 0.01, "min_lr": 0.01}


@pytest.fixture(scope="module")
def uninterrupted(base):
    """Losses of steps 2 and 3 of a run on one device."""

    def losses(world, model_cfg):
        trainer = Trainer(model_cfg, MeshConfig(), dataclasses.replace(base, **ADAMW), world)
        return [trainer.train_step(step)["loss"] for step in range(4)][2:]

    return {model_cfg: run_ranks(losses, 1, model_cfg)[0] for model_cfg in (MODEL, EXPERTS)}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n not in SOME)) for n in MESHES]
)
def test_a_checkpoint_of_any_mesh_loads_into_any_other(base, uninterrupted, name, tmp_path):
    """Weights and moments arrive to the last bit; two more steps equal an uninterrupted run."""
    model_cfg, changes = models_for(name)[0], {**ADAMW, "save_dir": str(tmp_path)}
    cfg = on_mesh(base, name, **changes)
    full = {}
    saved = run_ranks(save_after_two_steps, MESHES[name].size, model_cfg, MESHES[name], cfg)
    for pieces in saved:
        for record, tensor in pieces:
            whole = full.setdefault(record.name, torch.full(record.shape, float("nan")).double())
            whole[record.index] = tensor
    path = checkpoint.latest(tmp_path)
    names = [other for other in MESHES if "ep" in name or "ep" not in other]
    other = names[(names.index(name) + 1) % len(names)]  # so that each is loaded once
    alone = (MeshConfig(), dataclasses.replace(base, **changes))
    for mesh_cfg, cfg in (alone, (MESHES[other], on_mesh(base, other, **changes))):
        loaded = run_ranks(load_and_go_on, mesh_cfg.size, model_cfg, mesh_cfg, cfg, path)
        for pieces, losses in loaded:
            assert losses == pytest.approx(uninterrupted[model_cfg], rel=1e-10)
            for record, tensor in pieces:
                assert torch.equal(tensor, full[record.name][record.index]), record
