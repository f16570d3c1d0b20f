"""Saved activations of the fused path and of context-parallel ranks: formulas equal what the meter
sees, to the byte."""

import gc
from dataclasses import replace

import pytest
import tensor_programs
import torch
from context_programs import case, own_part, parallel_model, whole_batch
from test_activations import kept_and_left
from test_recompute import ALL, CONFIGS, batch, build

from picotron_lab import context_parallel, fused
from picotron_lab.analysis import activations, fused_activations
from picotron_lab.analysis.activations import Setting
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import ModelConfig
from picotron_lab.context_parallel import chunks, positions
from picotron_lab.lab import run_ranks

FORMS = {"plain": activations, "fused": fused_activations}
RARE = pytest.mark.exhaustive  # more of what others sample
every_path = pytest.mark.parametrize("path", FORMS)

# ---- one device, fused


@pytest.mark.parametrize(("kind", "impl"), ALL)
@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("grouped", torch.bfloat16, 0.3),
        pytest.param("no groups", torch.float32, 0.0, marks=RARE),
        ("tied", torch.float64, 0.3),
        pytest.param("tied", torch.bfloat16, 0.0, marks=RARE),
    ],
)
def test_a_fused_model_keeps_what_the_formula_says(kind, impl, name, dtype, rate):
    for B, T in ((3, 7), (2, 1)):
        model = build(CONFIGS[name], kind, impl, rate, dtype, fused=True)
        kept, left = kept_and_left(model, batch(B, T))
        setting = Setting(B, T, dtype.itemsize, dropout=rate > 0)
        assert kept == fused_activations.model_bytes(CONFIGS[name], setting, kind)
        assert left == 0


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=RARE)])
def test_kernels_keep_what_the_formula_says(monkeypatch, device, kind, dtype):
    """On a GPU; without one the kernels run in Triton's interpreter, and the first norm of a block,
    which is torch's on a GPU, is our kernel, which keeps the same."""
    norm = pytest.importorskip("picotron_lab.kernels.norm", reason="kernels need Triton")
    if device == "cpu":
        ours = lambda x, _, weight, eps: norm.rms_norm(x, weight, eps)  # noqa: E731
        monkeypatch.setattr(fused, "has_kernel", lambda x: True)
        monkeypatch.setattr(torch.nn.functional, "rms_norm", ours)
    cfg = replace(CONFIGS["grouped"], head_size=8)
    model = build(cfg, kind, "fused", 0.3, dtype, fused=True).to(device)
    tokens_BT, labels_BT, where = batch(2, 5)
    where = replace(where, positions_T=where.positions_T.to(device), rows_B=where.rows_B.to(device))
    with Meter() as meter:
        meter.watch(model.parameters())
        loss = model(tokens_BT.to(device), labels_BT.to(device), where)
        gc.collect()  # the interpreter's last arguments
        kept = meter.live["activation"]
    setting = Setting(2, 5, dtype.itemsize, dropout=True)
    said = fused_activations.model_bytes(cfg, setting, kind, kernels=True)
    assert loss.item() > 0 and said == kept


# ---- context-parallel ranks


def kept_by_a_rank(axis, it):
    """Bytes between forward and backward of the whole model, loss included."""
    model, (inputs, _) = parallel_model(axis, it), whole_batch(it)
    mine = own_part(inputs, positions(it.kind, it.length, axis))
    with Meter() as meter:
        meter.label("parameter", model.parameters())
        loss = model(*mine)  # its graph holds what was kept
        assert loss.requires_grad
        return meter.live["activation"]


def small_case(n, path, kind, dtype, **changes):
    """24 tokens, heads of 4, dropout."""
    it = case(n, 8, 2, dtype=dtype, kind=kind, impl=path, **changes)
    it = replace(it, fused_model=path == "fused")
    return replace(it, chunk=24 // n // len(chunks(kind, 0, n)))


@every_path
@pytest.mark.parametrize("kind", ["ring", "zigzag", "all-gather"])
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=RARE)])
@pytest.mark.parametrize(
    ("dtype", "again"),
    [(torch.bfloat16, "none"), (torch.bfloat16, "full"), (torch.float32, "none")],
)
def test_a_rank_keeps_what_the_formula_says(path, kind, n, dtype, again):
    it = small_case(n, path, kind, dtype, recompute=again)
    setting = Setting(it.job.B, 24, dtype.itemsize, dropout=True, context_ranks=n)
    said = FORMS[path].model_bytes(it.job.cfg, setting, again)
    assert run_ranks(kept_by_a_rank, n, it) == [said] * n


@every_path
@pytest.mark.parametrize("kind", ["ring", "zigzag"])
def test_blocks_have_nothing_for_selective_recomputation(path, kind):
    it = small_case(2, path, kind, torch.float32, recompute="selective")
    setting = Setting(it.job.B, 24, 4, dropout=True, context_ranks=2)
    said = FORMS[path].model_bytes(it.job.cfg, setting, "selective")
    assert said == FORMS[path].model_bytes(it.job.cfg, setting)
    assert run_ranks(kept_by_a_rank, 2, it) == [said] * 2


@every_path
def test_documents_are_no_activations(path):
    """Attention saves their labels for backward; but these came with the batch."""
    it = small_case(2, path, "zigzag", torch.float32, packed=True)
    said = FORMS[path].model_bytes(it.job.cfg, Setting(it.job.B, 24, 4, True, context_ranks=2))
    assert run_ranks(kept_by_a_rank, 2, it) == [said] * 2


# ---- with tensor and sequence parallelism


def kept_in_a_mesh(world, job, tp):
    """Bytes between forward and backward of a rank that has 1/tp of the layers and 1/cp of T."""
    ranks = range(world.size)
    axes = {
        "tp": world.split("tp", [list(ranks[i : i + tp]) for i in ranks[::tp]]),
        "cp": world.split("cp", [list(ranks[i::tp]) for i in range(tp)]),
        "kv": world.split("kv", [[r] for r in ranks]),
    }
    model = tensor_programs.parallel_model(axes, job)
    if axes["cp"].size > 1:
        context_parallel.parallelize(model, axes["cp"], job.impl, "zigzag")
    inputs, _ = tensor_programs.batch(job)
    mine = own_part(inputs, positions("zigzag", job.T, axes["cp"]))
    with Meter() as meter:
        meter.label("parameter", model.parameters())
        loss = model(*mine)
        meter.label("buffer", [loss])
        return meter.live["activation"]


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=RARE)])
@pytest.mark.parametrize(
    ("cp", "sequence"), [(1, True), pytest.param(2, False, marks=RARE), (2, True)]
)
def test_a_layer_on_two_tensor_parallel_ranks(path, dtype, cp, sequence):
    """The head is shared in several ways, so a layer: of 2, what 1 does not keep."""
    job = tensor_programs.Job(impl=path, fused_model=path == "fused", sequence=sequence, T=24)
    job = replace(job.with_model(kv_heads=4, ffn_size=24), dtype=dtype)
    two, one = (
        run_ranks(kept_in_a_mesh, 2 * cp, job.with_model(layers=layers), 2) for layers in (2, 1)
    )
    at = Setting(job.B, 24, dtype.itemsize, True, 2, sequence, context_ranks=cp)
    said = sum(FORMS[path].layer_bytes(job.cfg, at).values())
    assert [a - b for a, b in zip(two, one, strict=True)] == [said] * (2 * cp)


# ---- long sequences

LONG = ModelConfig(vocab_size=64, hidden_size=32, layers=2, heads=2, kv_heads=1, ffn_size=88)


@pytest.mark.parametrize(("n", "T"), [(1, 1024), (1, 4096), (2, 4096), (4, 4096)])
def test_long_sequences(n, T):
    """4 ranks keep of 4096 tokens what one keeps of 1024."""
    said = fused_activations.model_bytes(LONG, Setting(1, T, 4, context_ranks=n))
    assert (n, T) != (4, 4096) or said == fused_activations.model_bytes(LONG, Setting(1, 1024, 4))
    job = tensor_programs.Job(cfg=LONG, dropout=0, B=1, dtype=torch.float32)
    it = replace(case(n), job=job, kind="zigzag", impl="fused", fused_model=True)
    it = replace(it, chunk=T // n // len(chunks("zigzag", 0, n)))
    assert run_ranks(kept_by_a_rank, n, it) == [said] * n


# ---- worked by hand

SMALL = ModelConfig(hidden_size=8, layers=1, heads=2, kv_heads=1, ffn_size=6, vocab_size=5)


def test_a_fused_layer_worked_by_hand():
    """B 1, T 4, D 8, two heads of 4, one key/value head, F 6, bfloat16: in bytes.

    A norm: x and x / rms 4 * 32 each, 1/rms 16, result 64: 336; angles 4 * 2 * 16 = 128; q, k, v
    2 (32 + 16 + 16) = 128; row sums 4 * 8 = 32; mixed values 64; mlp 4 * 48 = 192; dropout 64.
    Kernels: a norm 64 + 16 + 64 = 144, no angles, mlp 3 * 48 = 144.
    """
    setting = Setting(1, 4, 2, dropout=True)
    layer = fused_activations.layer_bytes(SMALL, setting)
    assert sum(layer.values()) == 2 * 336 + 128 + 128 + 32 + 64 + 192 + 64
    layer = fused_activations.layer_bytes(SMALL, setting, kernels=True)
    assert sum(layer.values()) == 2 * 144 + 128 + 32 + 64 + 144 + 64
    assert fused_activations.layer_bytes(SMALL, setting, "full") == {"input": 64}


def test_half_of_a_sequence_worked_by_hand():
    """As there and in test_activations.py, in float32, on one of two context-parallel ranks: half
    of all, and instead of scores and mask 2 * 2 numbers."""
    setting = Setting(1, 4, 4, dropout=True, context_ranks=2)
    plain = activations.layer_bytes(SMALL, setting)
    assert sum(plain.values()) == (4 * (200 + 64 + 32 + 96) + 64) // 2 + 4 * 2 * 2
    mine = fused_activations.layer_bytes(SMALL, setting)
    whole = fused_activations.layer_bytes(SMALL, replace(setting, context_ranks=1))
    assert {part: 2 * size for part, size in mine.items()} == whole


def test_a_llama_3_8b_keeps_34_bytes_per_number_of_its_stream():
    """bfloat16 with kernels, 8192 tokens: 32 layers of 34 N D, and per row 8 for norms, 4 * 32 for
    attention; with operators 53 N D."""
    cfg = ModelConfig("8b", 128_256, 4096, 32, 32, 8, 14_336)
    setting, numbers = Setting(1, 8192, 2), 8192 * 4096
    kernels = fused_activations.layer_bytes(cfg, setting, kernels=True)
    assert sum(kernels.values()) == 34 * numbers + 8192 * (8 + 4 * 32)
    operators = sum(fused_activations.layer_bytes(cfg, setting).values())
    assert operators == 53 * numbers + 8192 * (8 + 4 * 32 + 4 * 2 * 128)


def test_what_the_forms_do_not_count():
    with pytest.raises(AssertionError, match="no recomputation 'ful': ask for one of none, "):
        fused_activations.model_bytes(SMALL, Setting(1, 4, 4), "ful")
    with pytest.raises(AssertionError, match="2 ranks share the head in several ways"):
        fused_activations.rest_bytes(SMALL, Setting(1, 4, 4, ranks=2))
    with pytest.raises(AssertionError, match="what 4 experts keep depends on the routing"):
        fused_activations.layer_bytes(replace(SMALL, experts=4), Setting(1, 4, 4))
