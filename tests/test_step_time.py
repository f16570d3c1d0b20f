"""Predicted times beside operations that torch counts, bytes in the ledgers of real steps, and
bubbles worked by hand. On a toy device a byte, or an operation, takes a known time."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from picotron_lab.analysis.cost import axis_size
from picotron_lab.analysis.hardware import hardware
from picotron_lab.analysis.layer_time import Constants, Place
from picotron_lab.analysis.step_time import held, predict, replicas
from picotron_lab.checks import layers_of, schedule_of
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import wire_bytes
from picotron_lab.model import Llama
from picotron_lab.trainer import Trainer

MODEL = ModelConfig("m", 64, 96, 4, 4, 2, 288)
MOE = replace(MODEL, experts=4, top_k=2)
EXACT = Constants(1, 1, 1, 1, kernel=0, overlap=0, links=1, network=1)
# computing takes no time, a byte on the wire a second
WIRES = replace(
    hardware("h100"), peak={torch.float32: 1e30}, memory_bandwidth=1e30,
    links=((1e-9, 1.0), (1.0, 1.0)), ring_share=1.0, node=2**20,
)  # fmt: skip
# messages take no time, nor does memory; an operation a second
MATMULS = replace(
    WIRES, peak={torch.float32: 1.0}, matmul_share=1.0, links=((1e-9, 1e30), (1.0, 1e30))
)
H100 = hardware("h100")


def run(batch=8, micro_batch=2, sequence=32, **changes):
    return TrainConfig(
        global_batch_size=batch, micro_batch_size=micro_batch, sequence_length=sequence,
        impl="plain", validation_fraction=0, **changes,
    )  # fmt: skip


def name_of(value):
    """A test's name: what is not as usual in a mesh."""
    usual = vars(MeshConfig()).items()
    if not isinstance(value, MeshConfig):
        return str(value)
    return " ".join(f"{k}={v}" for k, v in vars(value).items() if (k, v) not in usual) or "alone"


# ---- operations


def test_operations_are_those_that_torch_counts():
    """Forward and backward of a plain model, every matmul in it, counted by torch."""
    model, tokens_BT = Llama(MODEL), torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT, tokens_BT).backward()
    parts = predict(MODEL, MeshConfig(), run(2), MATMULS, EXACT).parts
    assert parts["matmuls"] + parts["attention"] == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize(
    "mesh", [MeshConfig(tp=2), MeshConfig(cp=2), MeshConfig(pp=2), MeshConfig(dp=2)], ids=name_of
)
def test_ranks_share_operations(mesh):
    """A rank of two does half of a layer's matmuls; in a pipeline the head's all fall to one."""
    small = replace(MODEL, vocab_size=2)
    alone = predict(small, MeshConfig(), run(), MATMULS, EXACT).parts
    shared = predict(small, mesh, run(), MATMULS, EXACT).parts
    for part in ("matmuls", "attention"):
        assert shared[part] == pytest.approx(alone[part] / 2, rel=2e-3)


@pytest.mark.parametrize(("recompute", "more"), [("none", 3), ("selective", 3), ("full", 4)])
def test_recomputation_runs_forward_again(recompute, more):
    parts = predict(
        replace(MODEL, vocab_size=1), MeshConfig(), run(recompute=recompute), MATMULS, EXACT
    ).parts
    assert parts["matmuls"] == pytest.approx(2 * 8 * 32 * 4 * 110_592 * more, rel=2e-3)
    assert parts["attention"] == 8 * 4 * 4 * 32 * 32 * 4 * 24 * (more if recompute == "none" else 4)


# ---- messages


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, np.random.default_rng(1).integers(0, 64, 40 * 32 + 1).astype(np.uint16))
    return str(path)


def sent_bytes(model, mesh, cfg):
    """{axis: most bytes that a rank put on the wire} in one real step."""

    def step(world):
        trainer = Trainer(model, mesh, cfg, world)
        trainer.train_step(0)
        sums = defaultdict(float)
        for call in world.ledger.calls:
            axis = "replica" if call.axis == "dp" else call.axis
            if axis not in ("world", "kv"):  # norms, and gradients of shared heads: once a step
                sums[axis] += wire_bytes(call.op, call.bytes, axis_size(mesh, axis))
        return sums

    found = run_ranks(step, mesh.size)
    return defaultdict(float, {name: max(sums[name] for sums in found) for name in found[0]})


@pytest.mark.parametrize(
    ("mesh", "axis", "close"),
    [
        (MeshConfig(dp=2), "replica", 1e-3),
        (MeshConfig(dp=4, zero=1), "replica", 1e-3),
        (MeshConfig(dp=2, zero=2), "replica", 1e-3),
        (MeshConfig(dp=2, zero=3), "replica", 0.02),  # an embedding is not gathered again
        (MeshConfig(tp=2), "tp", 0.05),  # the loss's statistics are left out
        (MeshConfig(tp=4), "tp", 0.05),
        (MeshConfig(tp=2, sequence_parallel=True), "tp", 0.06),  # and gradients of norms
        (MeshConfig(cp=2), "cp", 1e-3),
        (MeshConfig(cp=2, cp_kind="all-gather"), "cp", 1e-3),
        (MeshConfig(cp=2, cp_kind="ulysses"), "cp", 1e-3),
    ],
    ids=name_of,
)
@pytest.mark.exhaustive
def test_messages_are_those_in_the_ledger(mesh, axis, close, data, tmp_path):
    cfg = run(data=data, cache_dir=str(tmp_path))
    measured = sent_bytes(MODEL, mesh, cfg)
    predicted = predict(MODEL, mesh, cfg, WIRES, EXACT).exposed
    assert predicted[axis] == pytest.approx(measured[axis], rel=close)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(dp=2, ep=2), MeshConfig(dp=4, ep=2, zero=3)], ids=name_of
)
@pytest.mark.exhaustive
def test_messages_of_experts(mesh, data, tmp_path):
    """As many rows as tokens choose, give or take what the routing favours; weights exactly."""
    cfg = run(data=data, cache_dir=str(tmp_path))
    measured = sent_bytes(MOE, mesh, cfg)
    predicted = predict(MOE, mesh, cfg, WIRES, EXACT).exposed
    assert predicted["ep"] == pytest.approx(measured["ep"], rel=0.2)
    weights = measured["replica"] + measured["expert_replica"]
    assert predicted["replica"] == pytest.approx(weights, rel=0.02 if mesh.zero else 1e-3)


def test_overlap_hides_messages_under_computing():
    """ZeRO-3: with a slow network all is waited for but what computing hides."""
    slow = replace(H100, network_bandwidth=1e9)
    mesh, cfg = MeshConfig(dp=16, zero=3), run(16, 1, 2048, dtype="bfloat16")
    cfg, model = replace(cfg, impl="fused"), PRESETS["llama3-8b"]
    none, some = (
        predict(model, mesh, cfg, slow, replace(Constants(), overlap=share)).exposed["replica"]
        for share in (0.0, 0.5)
    )
    alone = predict(model, MeshConfig(), replace(cfg, global_batch_size=1), H100)
    computing = alone.seconds - alone.parts["optimizer"]
    assert none - some == pytest.approx(0.5 * computing, rel=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_axes_hide_under_one_backward(zero):
    """10 bytes each on both axes, a second a byte; half of 8 seconds hides: by hand. ZeRO-2 has two
    micro-batches; ZeRO-1 and -2 also wait for 10 bytes of weights on each axis."""
    mesh = MeshConfig(dp=4, ep=2, zero=zero)
    at = Place(MOE, mesh, replace(run(16), impl="fused"), WIRES, replace(EXACT, overlap=0.5))
    ways = 2 if zero == 0 else 1  # an all_reduce sends (n - 1) / n of its payload twice
    own = {"replica": 10 / (4 * ways * 3 / 4), "expert_replica": 10 / (4 * ways * 1 / 2)}
    assert replicas(at, own, 8.0)[0] == pytest.approx((20 - 4) * max(1, zero) + 20 * (zero > 0))


def test_messages_hide_under_computing_alone():
    """What tensor parallelism waits for hides no gradients: with 1000 times the waiting, the same
    message of replicas is left."""
    cfg = replace(run(16, 1, 2048, dtype="bfloat16"), impl="fused")
    for zero in (0, 3):
        mesh = MeshConfig(dp=8, tp=8, zero=zero)
        slow = replace(H100, network_bandwidth=1e8)
        slower = replace(slow, links=tuple((size, rate / 1000) for size, rate in H100.links))
        near, far = (
            predict(PRESETS["llama3-8b"], mesh, cfg, each, replace(Constants(), overlap=0.5))
            for each in (replace(slow, ring_share=1e9), replace(slower, ring_share=1e9))
        )
        assert far.parts["tp"] > 100 * near.parts["tp"]
        assert far.parts["replica"] == pytest.approx(near.parts["replica"], rel=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_travel_as_wide_as_they_are_told_to(zero):
    cfg = replace(run(16, dtype="bfloat16"), impl="fused")
    mesh = MeshConfig(dp=2, zero=zero)
    wires = replace(WIRES, peak={torch.bfloat16: 1e30})
    wide, narrow = (
        predict(MODEL, mesh, replace(cfg, reduce_dtype=name), wires, EXACT).exposed["replica"]
        for name in ("float32", "bfloat16")
    )
    # gradients in units of weights: (4 bytes or 2) each way; weights 2 bytes, once or twice
    sums = {0: (8, 4), 1: (6, 4), 2: (4 * 4 + 2, 2 * 4 + 2), 3: (8, 6)}[zero]
    assert wide / narrow == pytest.approx(sums[0] / sums[1])


@pytest.mark.parametrize(
    ("dtype", "optimizer", "size"),
    [
        ("bfloat16", "adamw", 42), ("float32", "adamw", 40), ("float64", "adamw", 80),
        ("bfloat16", "sgd", 26), ("float32", "sgd", 24),
    ],
)  # fmt: skip
def test_an_update_moves_so_many_bytes(dtype, optimizer, size):
    """Gradient read for the norm, read and written for clipping, read for the step; a master weight
    and two moments, read and written; a bfloat16 weight, written."""
    cfg = replace(run(dtype=dtype, optimizer=optimizer), impl="fused")
    step = predict(MODEL, MeshConfig(), cfg, replace(H100, memory_bandwidth=1.0), EXACT)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in Llama(MODEL).parameters())
    assert step.parts["optimizer"] == pytest.approx(size * numbers)


# ---- parameters, pipelines


@pytest.mark.parametrize(
    "model", [MODEL, MOE, replace(MODEL, tied=True)], ids=["dense", "experts", "tied"]
)
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(pp=2)], ids=name_of)
def test_parameters_are_those_of_the_model(model, mesh):
    with torch.device("meta"):
        full = sum(p.numel() for p in Llama(model).parameters())
    place = Place(model, mesh, run(), H100)
    schedule, counts = schedule_of(mesh, run()), layers_of(model, mesh, run())
    ranks = [held(place, schedule, rank, counts) for rank in range(mesh.pp)]
    twice = model.vocab_size * model.hidden_size if model.tied and mesh.pp > 1 else 0
    assert sum(sum(own.values()) for own in ranks) == full + twice


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8)])
@pytest.mark.parametrize(
    ("schedule", "share"), [("afab", 1), ("1f1b", 1), ("zb-h1", 1 / 3), ("interleaved", 1 / 2)]
)
def test_bubbles_by_hand(p, m, schedule, share):
    """(p-1)/(m+p-1) with equal stages; zb-h1 (p-1)(tF + tB - tW), a third of it."""
    model = replace(MODEL, layers=2 * p, vocab_size=1)
    mesh = MeshConfig(pp=p, schedule=schedule)
    step = predict(model, mesh, run(m, 1, 4), MATMULS, replace(EXACT, attention=1e9))
    bubble = share * (p - 1)
    assert step.bubble == pytest.approx(bubble / (m + bubble), rel=0.01)


def test_parts_add_up_and_name_the_bottleneck():
    cfg = replace(run(16, 1, 8192, dtype="bfloat16"), impl="fused")
    step = predict(PRESETS["llama3-8b"], MeshConfig(pp=2, dp=2, tp=2), cfg, H100)
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.bottleneck == "matmuls"
    assert set(step.exposed) <= {"tp", "replica"}
    assert step.tokens_per_second_per_rank * step.ranks * step.seconds == pytest.approx(16 * 8192)
    # 57.9 GFLOP per token, as torchtitan counts Llama 3 8B at 8192 tokens
    rate = step.tokens_per_second_per_rank * 57.9e9
    assert step.mfu == pytest.approx(rate / 989e12, rel=1e-3)
    assert step.hfu == step.mfu
    again = predict(PRESETS["llama3-8b"], MeshConfig(), replace(cfg, recompute="full"), H100)
    head = 6 * 128_256 * 4096  # the only part that is not run again
    assert again.hfu / again.mfu == pytest.approx(1 + (57.9e9 - head) / 3 / 57.9e9, rel=1e-3)


def test_a_slow_network_becomes_the_bottleneck():
    """Tensor parallelism over two nodes, each of whose adapters does 1 GB/s."""
    cfg = replace(run(1, 1, 4096, dtype="bfloat16"), impl="fused")
    slow = replace(H100, network_bandwidth=1e8)
    assert predict(PRESETS["llama3-70b"], MeshConfig(tp=16), cfg, slow).bottleneck == "tp"


def test_an_unknown_vocabulary_is_a_sentence():
    with pytest.raises(ConfigError, match="--vocab-size 0 must be known"):
        predict(PRESETS["tiny"], MeshConfig(), run(), H100)


def test_slices_of_sequences_are_not_predicted():
    mesh = MeshConfig(pp=2, schedule="afab", token_slices="2")
    with pytest.raises(ConfigError, match="--token-slices 2: the time of slices"):
        predict(MODEL, mesh, run(), H100)


@pytest.mark.parametrize("name", ["1f1b-vocab1", "1f1b-vocab2", "1f1b-interlaced"])
def test_a_split_vocabulary_leaves_nothing_to_one_rank(name):
    """With a large vocabulary the last rank is not slower for having the head."""
    model = replace(MODEL, vocab_size=4096)
    seconds = {
        kind: predict(model, MeshConfig(pp=4, schedule=kind), run(16, 1), MATMULS, EXACT).seconds
        for kind in ("1f1b", name)
    }
    whole = predict(model, MeshConfig(), run(16, 1), MATMULS, EXACT).seconds
    assert whole / 4 < seconds[name] < 1.5 * whole / 4 < seconds["1f1b"]
