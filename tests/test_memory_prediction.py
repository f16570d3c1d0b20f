"""Predicted memory beside what the meter of each rank sees: parameters, gradients, optimizer state
and buffers to the byte, activations within 3 %; and the numbers of the papers.

The sample is that of `verify`: random products of everything, of odd sizes. All experts are chosen
alike here, which is what is predicted; UNEVEN has the figures with the router's own choices.
"""

import dataclasses

import numpy as np
import pytest
import torch

from picotron_lab import fused, router, vocab_parallel
from picotron_lab.analysis import memory, saved
from picotron_lab.analysis.activations import Setting, layer_bytes
from picotron_lab.analysis.dryrun import dry_run, held
from picotron_lab.analysis.meter import Meter
from picotron_lab.analysis.parameters import Place
from picotron_lab.cases import DENSE, PIPELINES, TIED, Case, describe, sample
from picotron_lab.clock import Network
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.schedules.costs import Costs
from picotron_lab.trainer import Trainer
from picotron_lab.verify import BASE, TEXT, TEXT_BYTES

SIXTY = [
    dataclasses.replace(case, mesh=dataclasses.replace(case.mesh, token_slices="1"))
    for case in sample(36) + sample(24, PIPELINES)
]
QUICK = (7, 8, 18, 29, 33)
# Of 6 or 8 ranks, two thirds of the time of all: exhaustive, as are two of three of the others.
LONG = (0, 1, 21, 25, 27, 30, 32, 36, 38, 39, 41, 42, 44, 46, 48, 50, 53, 56, 57, 59)
# Beyond 3 %, in per cent: one message between stages, where recomputation leaves little else. Told
# is that it is held until the receiver takes it by simulated time. On lab threads the receiver runs
# on while the sender asks, so it may be taken earlier; in 38 a virtual clock prevents that.
KNOWN = {38: 4.6, 58: 10.5}
# Beyond 3 % with the router's own choices, in per cent. At first it chooses few experts: a capacity
# drops more than its share (plus), or a rank gets more rows than others (minus).
UNEVEN = {
    5: 21.4, 8: 7.3, 17: 3.4, 25: -4.7, 26: 12.3, 27: -10.1, 30: 15.2, 36: 28.1, 41: 35.5, 44: 32.9,
    50: 19.8, 51: 30.5, 54: 73.9,
}  # fmt: skip
BFLOAT16 = [
    Case(describe(mesh, "none"), mesh, model, {"micro_batch_size": 1, "impl": impl, "dropout": 0.2})
    for mesh, model, impl in (
        (MeshConfig(dp=2, zero=1), DENSE, "fused"),
        (MeshConfig(dp=2, zero=3), DENSE, "plain"),
        (MeshConfig(tp=2, sequence_parallel=True), DENSE, "fused"),
        (MeshConfig(pp=2, schedule="zb-h1"), DENSE, "plain"),
    )
]


# ---- measuring


class Watch:
    """Stands in for an executor's trace: bytes of activations after each item."""

    def __init__(self, trainer, meter):
        self.trainer, self.meter, self.seen = trainer, meter, []

    def append(self, _):
        for category in ("gradient", "buffer"):  # made anew in each step, or grown
            self.meter.label(category, held(self.trainer)[category])
        self.seen.append(self.meter.live["activation"])


def measured(model, mesh, cfg, network=None):
    """Of each rank: bytes by category after a step, activations after each item, the peak.

    network   None, or that of a virtual clock, by which actions take the times of simulate()
    """

    def rank_main(world):
        trainer = Trainer(model, mesh, cfg, world)
        trainer.executor.pretend = Costs().of if network else None
        trainer.compute_gradients(0)
        trainer.update(0)
        with Meter() as meter:
            for category, tensors in held(trainer).items():
                meter.label(category, tensors)
            watch = trainer.executor.trace = Watch(trainer, meter)
            trainer.compute_gradients(1)
            trainer.update(1)
            for category, tensors in held(trainer).items():
                meter.label(category, tensors)
            return meter.live, watch.seen, meter.peak_bytes

    return run_ranks(rank_main, mesh.size, network=network)


def chosen_alike(score_BTE, cfg):
    """In place of router.choose: one expert after the other, [B, T, k]."""
    B, T, _ = score_BTE.shape
    return torch.arange(B * T * cfg.top_k).view(B, T, cfg.top_k) % cfg.experts


def configured(case, folder, **changes):
    text = folder / "text.txt"
    text.write_text(TEXT[:TEXT_BYTES])
    more = {"data": str(text), "cache_dir": str(folder), "optimizer": "adamw", "lr": 0.01}
    return dataclasses.replace(BASE, **more, **{**case.changes, **changes})


def short(case, folder, **changes):
    """As configured, with no more micro-batches than a pipeline needs to fill and to drain."""
    cfg = configured(case, folder, **changes)
    count = min(cfg.micro_batches(case.mesh.dp), 2 * case.mesh.pp)
    size = count * cfg.micro_batch_size * case.mesh.dp
    return dataclasses.replace(cfg, global_batch_size=size)


def worst(case, cfg, network=None):
    """Check the state of every rank to the byte; returns the largest deviation of activations, in
    per cent, and that of the peak."""
    mesh, deviations, peaks = case.mesh, [], []
    for rank, (live, seen, peak) in enumerate(measured(case.model, mesh, cfg, network)):
        place = Place(*map(int, np.unravel_index(rank, (mesh.pp, mesh.dp, mesh.cp, mesh.tp))))
        said = memory.predict(case.model, mesh, cfg, place.pp, place)
        told = said.parameters, said.gradients, said.masters + said.moments, said.buffers
        names = "parameter", "gradient", "optimizer", "buffer"
        assert told == tuple(live[name] for name in names), f"rank {rank}"
        deviations.append(100 * (said.activations / max(seen) - 1))
        peaks.append(100 * (said.peak / peak - 1))
    return max(deviations, key=abs), max(peaks, key=abs)


def slow_but(numbers):
    """Of the sample these always, some with the slow tests, the others after a change."""

    def level(i):
        often = pytest.mark.exhaustive if i in LONG or i % 3 else pytest.mark.slow
        return () if i in numbers else often

    return [
        pytest.param(i, marks=level(i), id=f"{i} {case.technique}") for i, case in enumerate(SIXTY)
    ]


# ---- predicted and measured


@pytest.mark.parametrize("number", slow_but(QUICK))
def test_sixty_random_meshes(number, tmp_path, monkeypatch):
    monkeypatch.setattr(router, "choose", chosen_alike)
    case = SIXTY[number]
    activations, peak = worst(case, short(case, tmp_path))
    known = KNOWN.get(number, 0)
    assert abs(activations - known) < (1 if known else 3)
    assert -30 < peak < 30, "not a promise, but an order of magnitude"


@pytest.mark.slow
def test_simulated_times_explain_a_message(tmp_path, monkeypatch):
    """Case 38, which KNOWN has without a clock."""
    monkeypatch.setattr(router, "choose", chosen_alike)
    case = SIXTY[38]
    assert abs(worst(case, short(case, tmp_path), Network())[0]) < 1


FOUR = dataclasses.replace(DENSE, layers=4)
SLICED = [  # pp, schedule, token slices, and options
    (2, "terapipe", "4", {}), (2, "terapipe", "7,5,4", {"impl": "fused"}),
    (2, "1f1b", "7,5,4", {"impl": "fused"}), (4, "seq1f1b", "3", {"impl": "fused"}),
    (2, "seq1f1b", "4", {"recompute": "selective", "dropout": 0.2}), (2, "zb-h1", "4", {}),
    (2, "zb-h1", "7,5,4", {"impl": "fused"}), (2, "zb-v", "9,7", {"impl": "fused"}),
    (4, "terapipe", "9,7", {"impl": "fused", "recompute": "full", "dropout": 0.2}),
    (2, "1f1b", "4", {"dtype": "bfloat16"}), (2, "1f1b", "4", {"impl": "fused", "tp": 2}),
    (2, "seq1f1b", "5,11", {"micro_batch_size": 2, "global_batch_size": 8}),
    (2, "terapipe", "4", {"dtype": "bfloat16", "impl": "fused"}),
    (4, "1f1b", "2", {"recompute": "full"}),
]  # fmt: skip
SLICED_QUICK = (1,)
SLICED_KNOWN = {13: -3.0}  # a message, as in KNOWN


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, marks=() if i in SLICED_QUICK else pytest.mark.exhaustive)
        for i in range(len(SLICED))
    ],
)
def test_slices_of_sequences(number, tmp_path):
    """Activations of each slice, keys and values of all, what is left for their gradients."""
    pp, schedule, slices, options = SLICED[number]
    changes = {"micro_batch_size": 1, "global_batch_size": 4, **options}
    tp = changes.pop("tp", 1)
    mesh = MeshConfig(pp=pp, tp=tp, sequence_parallel=tp > 1, schedule=schedule,
                      token_slices=slices)  # fmt: skip
    case = Case(f"{schedule} {slices}", mesh, FOUR, changes)
    activations, _ = worst(case, configured(case, tmp_path))
    known = SLICED_KNOWN.get(number, 0)
    assert abs(activations - known) < (1 if known else 1.5)


def test_keys_and_values_of_slices_by_hand():
    """2 x 12 tokens in slices of 5, 4 and 3, H 4, K 2, C 8, float32. A layer's keys and values of
    all: 2 x 24 x 2 x 8 x 4 bytes; of the first slice q, and values mixed: 10 x 4 x 8 x 4 each."""
    at = {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 12, "impl": "plain"}
    cfg, mesh = TrainConfig(**at), MeshConfig(pp=2, schedule="terapipe", token_slices="5,4,3")
    rank = saved.Rank(DENSE, mesh, cfg, Place(pp=1))
    assert saved.keys_and_values(rank, 12) == 3072
    assert saved.gradients_of_keys(rank, 12) == 3072
    kept = saved.layer(rank.slice_of(5))
    assert (kept["queries"], kept["mixed values"]) == (2 * 5 * 4 * 8 * 4, 2 * 5 * 4 * 8 * 4)
    assert kept["row sums"] == 2 * 4 * 5 * 4 and "scores" not in kept
    narrow = dataclasses.replace(rank, cfg=dataclasses.replace(cfg, dtype="bfloat16"))
    assert (saved.keys_and_values(narrow, 9), saved.gradients_of_keys(narrow, 9)) == (1152, 2304)


@pytest.mark.parametrize("mesh", [MeshConfig(pp=2), MeshConfig(dp=2)], ids=["pp", "dp"])
def test_bfloat16_has_one_gradient_in_every_step(mesh, tmp_path):
    """The master weight must let the old one go, where each step makes its gradients anew: of a
    tied weight over pp, of all weights in the plain step of dp."""
    case = Case("tied", mesh, TIED, {"micro_batch_size": 3, "dtype": "bfloat16"})
    cfg = configured(case, tmp_path)

    def rank_main(world):
        with Meter() as meter:  # from the beginning: it sees what nobody labels, too
            trainer = Trainer(TIED, mesh, cfg, world)
            for step in range(2):
                trainer.compute_gradients(step)
                for category, tensors in held(trainer).items():
                    meter.label(category, tensors)
                bytes_before_update = meter.live_bytes - meter.live["optimizer"]
                trainer.update(step)
        return bytes_before_update, sum(p.numel() for p in trainer.model.parameters())

    for seen, numbers in run_ranks(rank_main, 2):
        weights_and_gradients = (2 + 4) * numbers
        assert weights_and_gradients <= seen < weights_and_gradients + 4 * 320 * 32 / 2


@pytest.mark.slow
@pytest.mark.parametrize("number", (5, 36, 51))
def test_what_uneven_routing_changes(number, tmp_path):
    case = SIXTY[number]
    assert abs(worst(case, configured(case, tmp_path))[0] - UNEVEN[number]) < 2


@pytest.mark.parametrize(
    "case",
    [
        # two of four are left to a run after a change
        pytest.param(case, id=case.technique, marks=[pytest.mark.exhaustive] * (i in (1, 2)))
        for i, case in enumerate(BFLOAT16)
    ],
)
def test_bfloat16_has_masters_and_wide_gradients(case, tmp_path):
    activations, _ = worst(case, configured(case, tmp_path, dtype="bfloat16"))
    assert abs(activations) < 3


LARGE = ModelConfig("large vocabulary", 50_257, 128, 2, 4, 2, 256)
HEADS = [  # mesh, rows of a micro-batch, and whether on a GPU
    (MeshConfig(pp=2), 4, True), (MeshConfig(tp=2, pp=2), 4, True), (MeshConfig(), 1, True),
    (MeshConfig(tp=2, vocab_parallel="naive"), 4, True), (MeshConfig(tp=2), 4, False),
    (MeshConfig(tp=2, vocab_parallel="none"), 1, True), (MeshConfig(pp=2), 1, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "number", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, len(HEADS)))]
)
def test_the_head_of_a_large_vocabulary(number, dtype):
    """The peak of the rank with the head, beside the program without data: forward makes logits of
    a chunk or two, dX and dW. On a GPU chunks are larger than on a CPU."""
    mesh, rows, gpu = HEADS[number]
    cfg = TrainConfig(4 * rows, rows, 1024, dtype=dtype)
    seen = dry_run(LARGE, mesh, cfg, (mesh.pp - 1) * mesh.tp, as_gpu=gpu).peak_bytes
    said = memory.predict(LARGE, mesh, cfg, mesh.pp - 1, kernels=gpu).peak
    assert said == pytest.approx(seen, rel=0.03)


def test_chunks_are_those_of_the_program():
    for told, found in ((memory.CHUNK, fused), (memory.SPLIT_CHUNK, vocab_parallel)):
        assert dict(zip(("cpu", "cuda"), told, strict=True)) == found.CHUNK_ELEMENTS


# ---- worked by hand, and published


def test_a_dense_layer_by_hand():
    """Two micro-batches of 1 x 4 tokens, D 8, one head, F 16, V 10, float32, SGD.

    Parameters: embedding and head 80 each, norms 8 each, q k v o 64 each, MLP 3 x 128.
    """
    model = ModelConfig(
        vocab_size=10, hidden_size=8, layers=1, heads=1, kv_heads=1, ffn_size=16
    )  # fmt: skip
    cfg = TrainConfig(
        global_batch_size=2, micro_batch_size=1, sequence_length=4, impl="plain", optimizer="sgd"
    )
    said = memory.predict(model, MeshConfig(), cfg)
    numbers = 2 * 80 + 3 * 8 + 4 * 64 + 3 * 128
    assert (said.parameters, said.gradients) == (4 * numbers, 4 * numbers)
    assert (said.masters, said.moments, said.buffers, said.update) == (0, 0, 0, 0)
    norms = 3 * (3 * 4 * 32 + 4 * 4)  # x, x / rms, result; 1 / rms
    attention = 2 * 128 + 4 * 128 + (16 + 4 * 16)  # cos and sin; q, k, v, mixed; mask, softmax
    mlp, loss = 4 * 4 * 64, 4 * 40 + 4  # log probabilities, and a divisor
    inputs = 2 * (2 * 4 + 1) * 8 + 8 + 4  # tokens, labels, row; loss so far, its share
    assert said.activations == norms + attention + mlp + loss + inputs


def test_a_pipeline_keeps_several_micro_batches():
    """1F1B: rank r of p holds p - r (2104.04473, section 2.2); all of them in GPipe. Messages, of
    which a few are there, are small beside a layer."""
    model = dataclasses.replace(DENSE, layers=4)
    cfg = TrainConfig(
        global_batch_size=8, micro_batch_size=1, sequence_length=16, impl="plain"
    )  # fmt: skip
    message, angles = 4 * 16 * 32, 8 * 16 * 8
    each = sum(layer_bytes(model, Setting(1, 16, 4)).values()) + angles
    assert each > 10 * message
    inputs = 8 * (8 * (2 * 16 + 1) + 1) + 4  # tokens, labels, rows; loss, its share
    for name, counts in (("1f1b", (4, 3, 2)), ("afab", (8, 8, 8))):
        for rank, count in enumerate(counts):
            mesh = MeshConfig(pp=4, schedule=name)
            said = memory.predict(model, mesh, cfg, rank).activations
            assert 0 <= said - inputs - count * each <= 3 * message, f"{name}, rank {rank}"


def test_published_sizes():
    """Llama 3 8B has 8 030 261 248 parameters (its model card); GPT-3 174.6 billion (2005.14165,
    table 2.1 rounds to 175.0); ZeRO's example of 7.5 billion on 64 ranks: 120, 31.4, 16.6, 1.9 GB
    (1910.02054, figure 1)."""
    cfg = TrainConfig(
        global_batch_size=1, micro_batch_size=1, sequence_length=8192, dtype="bfloat16"
    )
    said = memory.predict(PRESETS["llama3-8b"], MeshConfig(), cfg, kernels=True)
    assert said.parameters == 2 * 8_030_261_248
    assert said.state == 18 * 8_030_261_248
    assert memory.playbook_parameters(12_288, 50_257, 96) / 1e9 == pytest.approx(174.6, abs=0.05)
    gigabytes = [memory.playbook_state(7.5e9, 64, stage) / 1e9 for stage in range(4)]
    assert gigabytes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_published_activations():
    """2205.05198, section 5: 5 a s / h is 80 for GPT-3 and 64 for MT-NLG, beside 34, so that
    selective recomputation saves 70 % and 65 % of it."""
    for h, heads, scores, less in ((12_288, 96, 80, 0.70), (20_480, 128, 64, 0.65)):
        whole = memory.playbook_activations(1, 2048, 1, h, heads)
        assert whole == 2048 * h * (34 + scores)
        assert scores / (34 + scores) == pytest.approx(less, abs=0.005)


def test_what_cannot_be_predicted_is_a_sentence():
    cfg = TrainConfig(global_batch_size=3, micro_batch_size=2)
    with pytest.raises(ConfigError, match="--global-batch-size 3 must be a multiple"):
        memory.predict(DENSE, MeshConfig(), cfg)
    with pytest.raises(ConfigError, match="--token-slices auto .* try --token-slices 4"):
        memory.predict(DENSE, MeshConfig(pp=2, token_slices="auto"), TrainConfig())
    with pytest.raises(AssertionError, match="vocab_size is 0"):
        memory.predict(ModelConfig(), MeshConfig(), TrainConfig())
