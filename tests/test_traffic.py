"""Predicted traffic beside the ledgers of real runs: calls and bytes of every rank, exactly.

The sample of sixty random meshes is that of test_memory_prediction.py, and so is routing: experts
are chosen one after the other, as the prediction says, and none is dropped.
"""

import dataclasses

import numpy as np
import pytest
from test_memory_prediction import LONG, SIXTY, chosen_alike

from picotron_lab import router
from picotron_lab.analysis import dryrun, traffic
from picotron_lab.analysis.parameters import Place
from picotron_lab.cases import DENSE, EXPERTS, TIED
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer
from picotron_lab.verify import BASE, TEXT, TEXT_BYTES

QUICK = (2, 5, 8, 9, 31, 33, 37)
DEEP, MIXED = dataclasses.replace(DENSE, layers=4), dataclasses.replace(EXPERTS, layers=4)
BF16, FUSED, ONE = {"dtype": "bfloat16"}, {"impl": "fused"}, {"micro_batch_size": 1}
FULL = {"recompute": "full"}


@pytest.fixture
def cfg(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:TEXT_BYTES])
    return dataclasses.replace(BASE, data=str(text), cache_dir=str(tmp_path))


def ledgers(model, mesh, cfg):
    """What each rank sends in a step: in the first one, or with ZeRO-3, which learns there what
    backward reads, in the second one; later ones are alike."""

    def rank_main(world):
        trainer = Trainer(model, mesh, cfg, world)
        for step in range(2 if mesh.zero == 3 else 1):
            trainer.train_step(step)
        return dryrun.traffic(world.ledger.calls)

    return run_ranks(rank_main, mesh.size)


def place_of(rank, mesh):
    return Place(*map(int, np.unravel_index(rank, (mesh.pp, mesh.dp, mesh.cp, mesh.tp))))


def check(model, mesh, cfg):
    for rank, seen in enumerate(ledgers(model, mesh, cfg)):
        said = traffic.predict(model, mesh, cfg, place_of(rank, mesh))
        assert said == seen, f"rank {rank}"


# ---- beside real runs


def slow_but(names, cases):
    """Of these cases some always, some with the slow tests; LONG ones after a change."""

    def level(name):
        often = pytest.mark.exhaustive if name in LONG else pytest.mark.slow
        return () if name in names else often

    return [pytest.param(*case, id=str(name), marks=level(name)) for name, case in cases.items()]


@pytest.mark.parametrize("number", slow_but(QUICK, {i: (i,) for i in range(len(SIXTY))}))
def test_sixty_random_meshes(number, cfg, monkeypatch):
    monkeypatch.setattr(router, "choose", chosen_alike)
    case = SIXTY[number]
    check(case.model, case.mesh, dataclasses.replace(cfg, **case.changes))


def sliced(schedule, **axes):
    return MeshConfig(pp=2, schedule=schedule, token_slices="4", **axes)


SLICES = {
    "1f1b, plain": (DEEP, sliced("1f1b"), {"dropout": 0.2}),
    "terapipe, fused, sp": (DEEP, sliced("terapipe", tp=2, sequence_parallel=True), FUSED),
    "1f1b, fused, ep": (MIXED, sliced("1f1b", dp=2, ep=2), FUSED),
    "terapipe, plain, uneven": (
        DEEP, MeshConfig(pp=2, schedule="terapipe", token_slices="7,5,4"), FULL
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "mesh", "changes"), slow_but(("1f1b, plain",), SLICES))
def test_slices_of_sequences(model, mesh, changes, cfg, monkeypatch):
    monkeypatch.setattr(router, "choose", chosen_alike)
    batches = {"global_batch_size": 2 * mesh.dp, **BF16, **ONE}
    check(model, mesh, dataclasses.replace(cfg, **{**batches, **changes}))


TP_EXPERTS, ZERO_3 = MeshConfig(tp=2), MeshConfig(dp=2, zero=3)
MORE = {
    "overlapped": (DEEP, MeshConfig(pp=2, dp=2, schedule="zb-h1"), {"dp_step": "overlapped"}),
    "bucketed": (
        DEEP, MeshConfig(pp=2, dp=2, schedule="zb-h1"),
        {**FUSED, "dp_step": "bucketed", "bucket_mib": 0.02},
    ),
    "narrow gradients": (DENSE, MeshConfig(dp=2), {**BF16, **FUSED, "reduce_dtype": "bfloat16"}),
    "narrow gradients, ZeRO-2": (
        TIED, MeshConfig(dp=2, zero=2),
        {**BF16, **FUSED, "reduce_dtype": "bfloat16", "bucket_mib": 0.02},
    ),
    "ZeRO-3, logits gathered": (
        DENSE, MeshConfig(dp=2, tp=2, zero=3, vocab_parallel="none"), {**BF16, **FUSED}
    ),
    "ZeRO-3, plain, tied, again": (TIED, ZERO_3, {**BF16, **FULL}),
    "ZeRO-3, fused, again": (EXPERTS, MeshConfig(dp=4, ep=2, zero=3), {**FUSED, **FULL}),
    "experts over tp, again": (EXPERTS, TP_EXPERTS, {**FUSED, **FULL}),
    "experts over tp, again, masks": (EXPERTS, TP_EXPERTS, {**FUSED, **FULL, "dropout": 0.2}),
    "post-validation": (TIED, MeshConfig(pp=2, dp=2), {"post_validation": True}),
    "a stage without layers": (EXPERTS, MeshConfig(pp=2, dp=2, pp_layers="2,0"), {}),
    "AdamW": (DENSE, MeshConfig(dp=2, zero=1), {**BF16, "optimizer": "adamw"}),
}  # fmt: skip


ALWAYS = (
    "overlapped", "narrow gradients", "experts over tp, again", "a stage without layers",
)  # fmt: skip


@pytest.mark.parametrize(("model", "mesh", "changes"), slow_but(ALWAYS, MORE))
def test_what_the_sample_lacks(model, mesh, changes, cfg, monkeypatch):
    monkeypatch.setattr(router, "choose", chosen_alike)
    batches = {"global_batch_size": 2 * mesh.dp, **ONE}
    check(model, mesh, dataclasses.replace(cfg, **{**batches, **changes}))


@pytest.mark.slow
def test_a_loss_in_chunks(cfg):
    """2^20 logits at a time: 16 tokens of 2^17 words on 2 ranks, so 2 chunks of 32 tokens."""
    model = dataclasses.replace(DENSE, vocab_size=2**17, hidden_size=8, ffn_size=8)
    for algorithm in ("naive", "2"):
        mesh = MeshConfig(tp=2, vocab_parallel=algorithm)
        small = {"global_batch_size": 2, "micro_batch_size": 2, "dtype": "float32", **FUSED}
        check(model, mesh, dataclasses.replace(cfg, **small))


@pytest.mark.slow
def test_larger_chunks_on_a_gpu():
    """Beside the program without data: 2^27 logits at a time are 1024 tokens of 2^18 words on 2
    ranks; on a CPU it is the width, 64 tokens."""
    pytest.importorskip("triton")
    model = ModelConfig(vocab_size=2**18, hidden_size=64, layers=1, heads=2, kv_heads=2)
    cfg, mesh = TrainConfig(1, 1, 2048, dtype="bfloat16"), MeshConfig(tp=2)
    for gpu, chunks in ((True, 2), (False, 32)):
        seen = dryrun.dry_run(model, mesh, cfg, 0, as_gpu=gpu).traffic
        assert traffic.predict(model, mesh, cfg, on_gpu=gpu) == seen
        assert seen["tp"]["all_gather"][0] == chunks


# ---- worked by hand


SMALL = ModelConfig(vocab_size=10, hidden_size=8, layers=1, heads=2, kv_heads=2, ffn_size=16)
TWO_LAYERS = dataclasses.replace(SMALL, layers=2)
# Embedding and head 80 each, norms 3 x 8, q k v o 64 each, MLP 3 x 128: 12 tensors, 824 elements,
# 3296 bytes; of 3 ranks norms have 9, embedding and head 12 x 8, q k v o 9 x 8, gate and up 18 x 8,
# down 9 x 16: 939 elements, 3756 bytes. An activation [1, 4, 8] has 128 bytes, a number for 4
# tokens 16.
NORM = {"all_reduce": (1, 8)}
HAND = {
    "dp, plain: a call per tensor; two scalars": (
        SMALL, MeshConfig(dp=2), "plain", 0,
        {"dp": {"all_reduce": (12 + 2, 3296 + 2 * 8)}, "world": NORM},
    ),
    "dp, fused: one bucket": (
        SMALL, MeshConfig(dp=2), "fused", 1,
        {"dp": {"all_reduce": (1 + 2, 3296 + 2 * 8)}, "world": NORM},
    ),
    "ZeRO-1 of 3: 939 elements, with padding": (
        SMALL, MeshConfig(dp=3, zero=1), "fused", 2,
        {
            "dp": {"all_reduce": (2, 16), "reduce_scatter": (1, 3756), "all_gather": (1, 3756)},
            "world": NORM,
        },
    ),
    "tp, plain: a micro-batch sums 4 in the layer, 1 embedding, 1 dX; 1 + 2 numbers": (
        SMALL, MeshConfig(tp=2), "plain", 1,
        {"tp": {"all_reduce": (2 * (6 + 2), 2 * (6 * 128 + 3 * 16))}, "world": NORM},
    ),
    "tp, fused: m, s and z of both ranks at once": (
        SMALL, MeshConfig(tp=2), "fused", 0,
        {
            "tp": {"all_reduce": (2 * 6, 2 * 6 * 128), "all_gather": (2, 2 * 2 * 3 * 16)},
            "world": NORM,
        },
    ),
    "pp, the first stage": (
        TWO_LAYERS, MeshConfig(pp=2), "plain", 0,
        {"pp.F": {"send": (2, 2 * 128)}, "pp.B": {"recv": (2, 0)}, "pp": NORM, "world": NORM},
    ),
    "pp, the last stage": (
        TWO_LAYERS, MeshConfig(pp=2), "fused", 1,
        {"pp.F": {"recv": (2, 0)}, "pp.B": {"send": (2, 2 * 128)}, "pp": NORM, "world": NORM},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "mesh", "impl", "rank", "expected"), HAND.values(), ids=HAND)
def test_worked_by_hand(model, mesh, impl, rank, expected, cfg):
    """Two micro-batches of 1 x 4 tokens, float32."""
    changes = {"sequence_length": 4, "dtype": "float32", "impl": impl, **ONE}
    cfg = dataclasses.replace(cfg, global_batch_size=2 * mesh.dp, **changes)
    assert traffic.predict(model, mesh, cfg, place_of(rank, mesh)) == expected


def test_a_capacity_by_hand(cfg):
    """4 tokens take experts 0 1 2 0, which have room for ceil(0.7 x 4 / 3) = 1 of a sequence: 3
    rows leave a rank. Of 3 experts rank 0 has the first, which gets a row from each of 2 ranks."""
    model = dataclasses.replace(DENSE, layers=1, experts=3, top_k=1, capacity_factor=0.7)
    changes = {"sequence_length": 4, "micro_batch_size": 1, "global_batch_size": 2}
    cfg = dataclasses.replace(cfg, **changes, dtype="float32", impl="plain")
    sent = traffic.predict(model, MeshConfig(dp=2, ep=2), cfg)["ep"]["all_to_all"]
    assert sent == (4, 2 * (3 + 2) * 4 * model.hidden_size)


# ---- what cannot be told


def test_what_only_values_or_times_can_tell():
    cfg, experts = TrainConfig(), dataclasses.replace(PRESETS["moe-small"], vocab_size=320)
    with pytest.raises(ConfigError, match="--token-slices auto is decided by times"):
        traffic.predict(experts, MeshConfig(pp=2, token_slices="auto"), cfg)
    with pytest.raises(ConfigError, match="--global-batch-size 32 must be a multiple"):
        traffic.predict(experts, MeshConfig(dp=3), cfg)
    with pytest.raises(AssertionError, match="vocab_size is 0"):
        traffic.predict(PRESETS["tiny"], MeshConfig(dp=2), cfg)


def test_one_device_sends_nothing():
    assert traffic.predict(DENSE, MeshConfig(), TrainConfig()) == {}
