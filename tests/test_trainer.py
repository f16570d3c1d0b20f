"""Any number of ranks, any micro-batch, any path equals a plain loop on one device, written out
here."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from picotron_lab import data, optim, sharding
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.diagnose import TrainingError, state_bytes
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value
from picotron_lab.session import train
from picotron_lab.trainer import Trainer

MODEL = ModelConfig(vocab_size=64, hidden_size=24, layers=2, heads=4, kv_heads=2, ffn_size=40)
MOE = dataclasses.replace(MODEL, experts=3, top_k=2)
TIED = dataclasses.replace(MODEL, tied=True)


def rare(*case):
    """Left to a run after a change: every option is in some other case, with another path."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    """29 windows of 7 tokens and a last one of 3, so that the batches of 12 straddle epochs."""
    tokens = np.random.default_rng(1).integers(0, 64, 29 * 7 + 4).astype(np.uint16)
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, tokens)
    return path


@pytest.fixture
def base(tokens_file, tmp_path):
    return TrainConfig(
        global_batch_size=12, micro_batch_size=12, sequence_length=7, steps=20, lr=0.5, min_lr=0.1,
        warmup_steps=3, optimizer="sgd", weight_decay=0.01, clip=1.0, dtype="float64", impl="plain",
        data=str(tokens_file), cache_dir=str(tmp_path), validation_fraction=0, bucket_mib=0.01,
    )  # fmt: skip


def one_device(model_cfg, cfg, steps):
    """The plain loop: whole global batches, torch's own loss, clipping and optimizer."""
    model = Llama(model_cfg)
    sharding.attach(model)
    sharding.materialise(model, cfg.seed, initial_value, dtype=getattr(torch, cfg.dtype))
    decay, rest = (
        [p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)
    )
    groups = [
        {"params": decay, "weight_decay": cfg.weight_decay},
        {"params": rest, "weight_decay": 0},
    ]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[cfg.optimizer]
    more = {"betas": (0.9, 0.95)} if cfg.optimizer == "adamw" else {}
    optimizer = kind(groups, lr=cfg.lr, **more)
    tokens = np.load(cfg.data)
    batches = data.Batches(tokens, cfg.sequence_length, cfg.seed, cfg.global_batch_size)
    seen = []
    for step in range(steps):
        batch = batches.micro_batch(step, 0, cfg.global_batch_size)
        optimizer.zero_grad()
        logits = model(batch.tokens_BT)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=-100)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, cfg)
        optimizer.step()
        seen.append(
            (loss.item(), norm.item(), gradients, [p.detach().clone() for p in model.parameters()])
        )
    return seen


def on_ranks(world, model_cfg, cfg, steps):
    """The same numbers, as one rank of a trainer sees them."""
    trainer = Trainer(model_cfg, MeshConfig(dp=world.size), cfg, world)
    seen = []
    for step in range(steps):
        loss, _ = trainer.compute_gradients(step)
        gradients = [p.grad.clone() for p in trainer.parameters]
        norm = trainer.update(step)
        seen.append((loss, norm, gradients, [p.detach().clone() for p in trainer.parameters]))
    return seen


def assert_equal(found, expected, limit, what, weights=True):
    for step, (mine, reference) in enumerate(zip(found, expected, strict=True)):
        assert mine[0] == pytest.approx(reference[0], rel=limit), f"{what}: loss of step {step}"
        assert mine[1] == pytest.approx(reference[1], rel=limit), f"{what}: norm of step {step}"
        for name, index in (("gradient", 2), ("weight", 3))[: 1 + weights]:
            for i, (a, b) in enumerate(zip(mine[index], reference[index], strict=True)):
                error, size = (a - b).abs().max(), b.abs().max()
                which = f"{what}: {name} {i} of step {step}"
                assert error <= limit * size, f"{which} is off by {error:.1e}"


def assert_replicas_identical(found):
    for other in found[1:]:
        for mine, first in zip(other, found[0], strict=True):
            for a, b in zip(mine[2] + mine[3], first[2] + first[3], strict=True):
                assert torch.equal(a, b), "replicas must stay equal to the last bit"


@pytest.mark.parametrize("optimizer", ["sgd", rare("adamw")])
def test_every_split_of_the_batch_equals_one_device(base, optimizer):
    """Six steps: more than two epochs."""
    base = dataclasses.replace(base, optimizer=optimizer, lr={"sgd": 0.5, "adamw": 0.02}[optimizer],
                               min_lr=0.01, clip=0.5)  # fmt: skip
    expected = one_device(MODEL, base, 6)
    assert max(seen[1] for seen in expected) > base.clip, "clipping must do something"
    for ranks, micro_batch in [(1, 12), (1, 3), (2, 6), (2, 2), (3, 2), (4, 3)]:
        cfg = dataclasses.replace(base, micro_batch_size=micro_batch)
        found = run_ranks(on_ranks, ranks, MODEL, cfg, 6)
        assert_equal(found[-1], expected, 1e-10, f"{ranks} ranks, micro-batch {micro_batch}")
        assert_replicas_identical(found)


STEPS = ["naive", "overlapped", "bucketed", "silent"]


@pytest.mark.parametrize(
    ("dp_step", "impl"),
    [
        (step, impl) if (k % 2 == 0) == (impl == "plain") else rare(step, impl)
        for k, step in enumerate(STEPS) for impl in ("plain", "fused")
    ],
)  # fmt: skip
def test_every_step_of_the_lesson_equals_one_device(base, dp_step, impl):
    expected = one_device(MODEL, base, 4)
    cfg = dataclasses.replace(base, micro_batch_size=2, dp_step=dp_step, impl=impl)
    found = run_ranks(on_ranks, 3, MODEL, cfg, 4)
    assert_equal(found[1], expected, 1e-10, dp_step)
    assert_replicas_identical(found)


@pytest.mark.parametrize("model_cfg", [MOE, rare(TIED)], ids=["experts", "tied"])
@pytest.mark.parametrize("impl", [rare("plain"), "fused"])
def test_experts_and_tied_embeddings(base, model_cfg, impl):
    expected = one_device(model_cfg, base, 4)
    cfg = dataclasses.replace(base, micro_batch_size=1, impl=impl)
    assert_equal(run_ranks(on_ranks, 4, model_cfg, cfg, 4)[3], expected, 1e-10, impl)


@pytest.mark.parametrize("optimizer", ["sgd", rare("adamw")])
def test_float32_stays_within_rounding(base, optimizer):
    """Twenty steps. AdamW's weights are left out: where a gradient is nearly 0 it divides rounding
    by
    rounding and moves the weight by up to lr either way; gradients, loss and norm must still
    agree."""
    lr = {"sgd": 0.5, "adamw": 0.001}[optimizer]
    base = dataclasses.replace(
        base, optimizer=optimizer, dtype="float32", impl="fused", lr=lr, min_lr=lr / 3
    )
    expected = one_device(MODEL, base, 20)
    for ranks, micro_batch in [(1, 6), (3, 4)]:
        cfg = dataclasses.replace(base, micro_batch_size=micro_batch)
        found = run_ranks(on_ranks, ranks, MODEL, cfg, 20)
        assert_equal(found[0], expected, 1e-5, f"{ranks} ranks", weights=optimizer == "sgd")
        assert_replicas_identical(found)


def test_dropout_masks_do_not_depend_on_the_mesh(base):
    base = dataclasses.replace(base, dropout=0.2)
    whole = run_ranks(on_ranks, 1, MODEL, base, 3)[0]
    without = run_ranks(on_ranks, 1, MODEL, dataclasses.replace(base, dropout=0.0), 3)[0]
    assert abs(whole[0][0] - without[0][0]) > 1e-4, "dropout must change the loss"
    cfg = dataclasses.replace(base, micro_batch_size=2, impl="fused")
    assert_equal(run_ranks(on_ranks, 3, MODEL, cfg, 3)[2], whole, 1e-10, "dropout")


def test_ranks_without_counted_labels(base, monkeypatch):
    """Rows 4 and later count no label, row 1 only three: ranks 2 and 3 of 4 add nothing."""
    original = data.Batches.micro_batch

    def masked(self, *where):
        batch = original(self, *where)
        batch.labels_BT[batch.rows_B >= 4] = -100
        batch.labels_BT[batch.rows_B == 1, 3:] = -100
        return batch

    monkeypatch.setattr(data.Batches, "micro_batch", masked)
    expected = one_device(MODEL, base, 3)
    for impl in ("plain", "fused"):
        cfg = dataclasses.replace(base, micro_batch_size=1, impl=impl)
        assert_equal(run_ranks(on_ranks, 4, MODEL, cfg, 3)[3], expected, 1e-10, impl)


def test_a_text_of_one_label(base, tmp_path):
    """2 tokens: one window with one counted label, seen by every row of every batch."""
    np.save(tmp_path / "two.npy", np.array([3, 5], dtype=np.uint16))
    cfg = dataclasses.replace(base, data=str(tmp_path / "two.npy"), micro_batch_size=1)
    expected = one_device(MODEL, cfg, 2)
    assert_equal(run_ranks(on_ranks, 4, MODEL, cfg, 2)[0], expected, 1e-10, "one label")


def test_ledger_counts_gradients_and_three_numbers(base):
    """4Ψ bytes of float32 gradients, whatever the micro-batches; and loss, token count and norm, 8
    each."""

    def sent(world):
        trainer = Trainer(MODEL, MeshConfig(dp=2), dataclasses.replace(
            base, micro_batch_size=1, dtype="float32", impl="fused"), world)  # fmt: skip
        elements = sum(p.numel() for p in trainer.parameters)
        return trainer.train_step(0)["sent_bytes"], elements

    for bytes_by_axis, elements in run_ranks(sent, 2):
        assert bytes_by_axis == {"dp": 4 * elements + 8 + 8, "world": 8}


def test_validation_sees_every_held_out_token_once(base):
    cfg = dataclasses.replace(base, validation_fraction=0.3, micro_batch_size=2)

    def validate(world):
        trainer = Trainer(MODEL, MeshConfig(dp=world.size), cfg, world)
        return trainer.validate(), trainer.held_out, trainer.model

    loss, held_out, model = run_ranks(validate, 1)[0]
    windows = [held_out[i : i + 8].astype(np.int64) for i in range(0, len(held_out) - 1, 7)]
    losses = [
        F.cross_entropy(model(torch.tensor(w[None, :-1]))[0], torch.tensor(w[1:]), reduction="none")
        for w in windows
    ]
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-12)
    for other in run_ranks(validate, 3):
        assert other[0] == pytest.approx(loss, rel=1e-12)


def test_nan_names_step_and_module(base):
    def train(world):
        trainer = Trainer(
            MODEL, MeshConfig(dp=2), dataclasses.replace(base, micro_batch_size=6), world
        )
        with torch.no_grad():
            trainer.model.layers[1].mlp.up.weight[0, 0] = float("nan")
        trainer.train_step(0)

    with pytest.raises(TrainingError, match=r"loss is nan at step 0; module layers\.1\.mlp\.up is"):
        run_ranks(train, 2)


def test_metrics_have_the_documented_keys(base, tmp_path):
    cfg = dataclasses.replace(base, steps=2, log_file=str(tmp_path / "m.jsonl"), sample_tokens=0)
    run_ranks(lambda world: train(MODEL, MeshConfig(), cfg, world), 1)
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert set(lines[0]) == {
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu",
        "peak_memory_bytes", "sent_bytes",
    }  # fmt: skip
    assert lines[0]["tokens"] == 84 and lines[0]["lr"] == pytest.approx(0.5 / 3)


def test_a_full_gpu_names_the_category(base, tmp_path, monkeypatch):
    """The sentence depends on what is large; a GPU of 1 GiB or of 1 KiB is made up here."""

    def full(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", full)
    for room, sentence in ((2**30, "activations do not fit"), (2**10, "choose a smaller --model")):
        gpu = type("Properties", (), {"total_memory": room})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        cfg = dataclasses.replace(base, log_file=str(tmp_path / str(room)))
        with pytest.raises(TrainingError, match=sentence):
            run_ranks(lambda world, cfg=cfg: train(MODEL, MeshConfig(), cfg, world), 1)


def test_predicted_state_by_hand():
    """100 parameters, 25 of them this rank's: w + g + K of 4 + 4 + 8 or 2 + 4 + 12 bytes."""
    for dtype, by_stage in (
        (torch.float32, {0: 1600, 1: 400 + 400 + 200, 2: 400 + 100 + 200, 3: 100 + 100 + 200}),
        (torch.bfloat16, {0: 1800, 1: 200 + 400 + 300, 2: 200 + 100 + 300, 3: 50 + 100 + 300}),
        (torch.float64, {0: 3200}),
    ):
        whole, part = ([torch.nn.Parameter(torch.zeros(n, dtype=dtype))] for n in (100, 25))
        for stage, expected in by_stage.items():
            held, stepped = part if stage == 3 else whole, whole if stage == 0 else part
            assert state_bytes(held, stepped, stage) == expected, (dtype, stage)


def test_state_is_16_or_18_bytes_per_parameter(base):
    """Weight, gradient and AdamW's moments; with bf16 a float32 master weight as well."""
    for dtype, expected in (("float32", 16), ("bfloat16", 18)):
        for step in ("naive", "overlapped", "silent"):
            cfg = dataclasses.replace(base, optimizer="adamw", dtype=dtype, dp_step=step)

            def count(world, cfg=cfg):
                trainer = Trainer(MODEL, MeshConfig(), cfg, world)
                trainer.train_step(0)
                tensors = [*trainer.parameters, *trainer.masters.weights]
                tensors += [p.grad for p in trainer.parameters]
                for moments in trainer.optimizer.state.values():
                    tensors += [moments["exp_avg"], moments["exp_avg_sq"]]
                storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
                elements = sum(p.numel() for p in trainer.parameters)
                return sum(s.nbytes() for s in storages.values()) / elements

            assert run_ranks(count, 1)[0] == expected


def test_nan_in_a_later_micro_batch_is_found(base):
    """A poisoned embedding row that only the last micro-batch reads."""

    def train(world):
        trainer = Trainer(MODEL, MeshConfig(), dataclasses.replace(base, micro_batch_size=1), world)
        tokens = [set(batch[0].flatten().tolist()) for batch in trainer._deal(0)]
        only_last = tokens[-1] - set.union(*tokens[:-1])
        with torch.no_grad():
            trainer.model.embed.weight[only_last.pop()] = float("nan")
        trainer.train_step(0)

    with pytest.raises(TrainingError, match="module embed is the first"):
        run_ranks(train, 1)
