"""benchmarks/train_one_gpu.py: what it says of figures, and what a row does, without a GPU."""

import argparse
import importlib
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import one_gpu_row
from picotron_lab import mesh
from picotron_lab.alone import Alone
from picotron_lab.build import build_model
from picotron_lab.comm import Axis
from picotron_lab.config import PRESETS, MeshConfig, TrainConfig
from picotron_lab.ledger import Ledger
from picotron_lab.schedules.basic import one_f_one_b

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU, GIB = torch.device("cpu"), 2**30
TINY = replace(PRESETS["tiny"], vocab_size=320)
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.equal", "aten.is_nonzero")


@pytest.fixture
def train(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_one_gpu")


@pytest.fixture
def scaling(monkeypatch):
    """The script that reads what this one writes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


PRESET = {"A": ("smollm-1.7b", 24), "B": ("llama3.2-1b", 16), "C": ("llama3-8b", 8)}


def row(name, setup, speed=40_000.0, gib=60, device="NVIDIA H200"):
    """Figures of a row, as its process prints them."""
    model, layers = PRESET[setup]
    return {
        "row": name, "setup": setup, "model": model, "layers": layers, "batch": [1, 8, 2048],
        "tokens_per_second": speed, "peak_memory_bytes": gib * GIB, "device": device, "mfu": 0.5,
        "mfu_causal": 0.475, "first_loss": 10.8, "last_loss": 10.1, "step_seconds": [0.4, 0.3, 0.5],
    }  # fmt: skip


# ---- bars


def test_bars_of_a_model_say_reached_or_missed(train):
    speeds = {"ours-fused": 47_000.0, "hugging-face": 42_000.0, "hugging-face-liger": 47_001.0,
              "hugging-face-compiled": 47_900.0}  # fmt: skip
    results = [row(name, "A", speed) for name, speed in speeds.items()]
    results[2]["peak_memory_bytes"] = 59 * GIB
    assert [line for line in train.verdicts(results) if line.startswith("A")] == [
        "A: tokens/s of ours-fused / hugging-face: 1.119, bar 1.120: missed",
        "A: tokens/s of ours-fused / hugging-face-liger: 1.000, bar 1.000: missed",
        "A: tokens/s of ours-fused / hugging-face-compiled: 0.981, bar 0.980: reached",
        "A: tokens/s of ours-fused on an H200: 47,000, bar 47,000: reached",
        "A: peak memory of hugging-face-liger / ours-fused: 0.983, bar 1.000: missed",
    ]


def test_each_model_has_its_own_bar_beside_hugging_face(train):
    results = [row("hugging-face", m, 100.0) for m in "ABC"]
    results += [row("ours-fused", m, 110.0) for m in "ABC"]
    said = [line for line in train.verdicts(results) if " / hugging-face:" in line]
    assert [line.split(": ", 2)[2] for line in said] == [
        "1.100, bar 1.120: missed", "1.100, bar 1.120: missed", "1.100, bar 1.070: reached",
    ]  # fmt: skip


def test_bars_whose_rows_are_absent_say_so(train):
    results = [row("ours-fused", "A", device="NVIDIA H100 80GB HBM3")]
    results.append({"row": "hugging-face", "setup": "A", "model": "smollm-1.7b", "skipped": "no"})
    lines = train.verdicts(results)
    assert len(lines) == 13, "4 for each model, and the speed of A"
    assert all(": not measured; bar " in line for line in lines)


# ---- tables and the file


def test_a_line_of_the_table_has_speed_shares_and_memory(train):
    assert train.table_line(row("ours-fused", "C", 38_123.4)) == [
        "ours-fused", "C llama3-8b, 8 layers", "1 x 8 x 2048", "38,123", "50.0%", "47.5%", "60.0",
        "10.800", "10.100",
    ]  # fmt: skip
    skipped = {"row": "ours-plain", "setup": "A", "model": "smollm-1.7b", "skipped": "why"}
    line = train.table_line(skipped)
    assert line[:3] == ["ours-plain", "A smollm-1.7b", "why"] and len(line) == len(train.HEADER)


def test_a_line_of_the_profiled_step_has_shares_of_all_of_it(train):
    names = ("matmul", "attention", "norm and pointwise", "loss", "optimizer", "idle")
    seconds = dict(zip(names, (0.15, 0.06, 0.03, 0.015, 0.03, 0.015), strict=True))
    found = {"seconds": seconds, "attention": ["cudnn_generated_sdpa_bprop", "other"]}
    line = train.step_line(row("ours-fused", "A") | {"host_synchronisations": 1, "profile": found})
    assert line == [
        "ours-fused", "A smollm-1.7b", "50.0%", "20.0%", "10.0%", "5.0%", "10.0%", "5.0%", "300.0",
        "1", "cuDNN: `cudnn_generated_sdpa_bprop`",
    ]  # fmt: skip
    lost = train.step_line(row("ours-fused", "A") | {"profile_failed": "no CUPTI"})
    assert lost[2] == "no CUPTI" and len(lost) == len(train.STEP_HEADER) == len(line)


def test_scaling_reads_whole_models_from_the_file(train, scaling, tmp_path):
    """A model with fewer layers has another prediction, so it must not be taken for the preset."""
    path = tmp_path / "results.json"
    results = [row("ours-fused", "C"), row("hugging-face", "A"), row("ours-fused", "A")]
    path.write_text(json.dumps(train.for_file(results)))
    (setting,) = scaling.measured_settings(path)
    assert setting.model == PRESETS["smollm-1.7b"] and setting.hardware.name == "H200"
    assert setting.step(MeshConfig(), 1).seconds == pytest.approx(0.4), "the median step"


def test_a_profile_that_fails_loses_no_figures(train, monkeypatch):
    figures = json.dumps({"row": "ours-fused", "tokens_per_second": 9.0})
    said = iter([(f"noise\n{figures}\n", "RuntimeError: no CUPTI"), ("noise\n", "out of memory")])
    monkeypatch.setattr(train, "finish", lambda command: next(said))
    first, second = (train.run_row("ours-fused", "A", train.MODELS["A"], []) for _ in range(2))
    assert first["tokens_per_second"] == 9.0 and first["setup"] == "A"
    assert first["profile_failed"] == "RuntimeError: no CUPTI"
    assert second["skipped"] == "failed: out of memory"


def test_a_process_that_fails_gives_its_last_words(train, monkeypatch):
    fails = "import sys; print('figures'); sys.exit('why')"
    assert train.finish([sys.executable, "-c", fails]) == ("figures\n", "why")
    monkeypatch.setattr(train, "ROW_SECONDS", 1)
    lasts = ["sh", "-c", "echo figures; exec sleep 60"]
    assert train.finish(lasts) == ("figures\n", "not done after 1 s")


# ---- what is run


def test_models_are_those_whose_sizes_are_known(train):
    """Parameters, counted by hand: embedding (and head), attention, MLP, norms."""
    sizes = {"A": (1.71e9, 16_384), "B": (1.24e9, 16_384), "C": (2.80e9, 16_384)}
    for name, setup in train.MODELS.items():
        cfg = PRESETS[setup.preset]
        V, D, F_, C = cfg.vocab_size, cfg.hidden_size, cfg.ffn_size, cfg.head_width
        layer = 2 * D * (cfg.heads + cfg.kv_heads) * C + 3 * D * F_ + 2 * D
        counted = (2 - cfg.tied) * V * D + (setup.layers or cfg.layers) * layer + D
        assert counted == pytest.approx(sizes[name][0], rel=5e-3)
        for each in train.ROWS:
            assert math.prod(setup.shape(each)) == sizes[name][1], "the same tokens"


def test_plain_attention_fits_only_shorter_sequences(train):
    """C: at least 8 layers x 32 heads x 8192^2 scores, in float32 and again in bf16."""
    h200, scores = 139 * GIB, 8 * 32 * 8192**2
    assert train.MODELS["C"].plain_bytes() > scores * (4 + 2)
    for name, fits in (("A", True), ("B", True), ("C", False)):
        said = train.reason_to_skip("ours-plain", train.MODELS[name], h200)
        assert (said == "") == fits and ("does not fit" in said) != fits
        assert train.reason_to_skip("ours-fused", train.MODELS[name], h200) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so(train, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_one_gpu.py"])
    assert train.main() == 0
    assert capsys.readouterr().out.count("\n") == 1


# ---- a row


class Waits(TorchDispatchMode):
    """Counts operations whose result the CPU must wait for, if they run on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.update(name for name in WAITING if str(function).startswith(name))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ours-plain", "ours-fused"])
def test_no_operation_of_a_step_makes_the_cpu_wait(name):
    loop = one_gpu_row.Loop.around(name, one_gpu_row.build(name, TINY, CPU), micro_batches=2)
    batches = one_gpu_row.make_batches(0, 320, (2, 1, 8), CPU)
    with Waits() as waits:
        loss = loop.step(batches)
    assert not waits.seen
    with Waits() as waits:
        float(loss)
    assert waits.seen == {"aten._local_scalar_dense": 1}, "what is counted is seen"


def test_weights_are_those_that_a_training_run_begins_with():
    axes = mesh.build(Axis("world", [0], 0, Alone(), Ledger()), MeshConfig())
    cfg = TrainConfig(dtype="bfloat16", impl="plain", seed=one_gpu_row.SEED)
    theirs = build_model(TINY, MeshConfig(), cfg, axes, one_f_one_b(1, 1), CPU).state_dict()
    for fused in (False, True):
        mine = one_gpu_row.ours(TINY, fused, CPU).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_hugging_face_gives_the_sum_of_the_losses():
    pytest.importorskip("transformers")
    model = one_gpu_row.build("hugging-face", TINY, CPU)
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}, "rotary frequencies"
    ((tokens, labels, where),) = one_gpu_row.make_batches(0, 320, (1, 2, 16), CPU)
    logits = model.llama(tokens).logits.float().flatten(0, 1)
    wanted = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels, where), wanted)
    assert wanted > 32 * 5, "32 tokens, log 320 = 5.77 each"


@pytest.mark.parametrize("name", ["ours-plain", "ours-fused"])
def test_a_row_prints_its_figures_before_and_after_the_profile(name, capsys):
    given = argparse.Namespace(
        row=name, model="tiny", layers=1, micro_batches=2, micro_batch_size=1, sequence_length=8,
        warm_up=1, steps=2,
    )  # fmt: skip
    one_gpu_row.measure(given)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    before, after = map(json.loads, lines)
    found = after["profile"]
    assert before == {key: after[key] for key in before} and len(before["step_seconds"]) == 2
    assert before["first_loss"] == pytest.approx(math.log(320), abs=0.5)
    assert all(found["seconds"][key] > 0 for key in ("matmul", "attention", "loss", "optimizer"))
    assert bool(found["attention"]) == (name == "ours-fused")


def test_kernels_of_attention_are_those_of_the_step_longest_first():
    def event(cat, name, ts, dur, **args):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1, "args": args}

    events = [
        event("kernel", "cudnn_sdpa_fprop", 5, 1, correlation=9),  # before the step
        event("user_annotation", "rank 0 step 1", 10, 90),
        event("cpu_op", "aten::_scaled_dot_product_cudnn_attention", 12, 8),
        event("cuda_runtime", "cudaLaunchKernel", 13, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 15, 1, correlation=2),
        event("cpu_op", "aten::mm", 22, 8),
        event("cuda_runtime", "cudaLaunchKernel", 23, 1, correlation=3),
        event("kernel", "cudnn_sdpa_fprop", 20, 10, correlation=1),
        event("kernel", "cudnn_flash_bprop", 30, 25, correlation=2),
        event("kernel", "nvjet_gemm", 60, 30, correlation=3),
    ]
    found = one_gpu_row.read_profile(events, cuda=True)
    assert found["attention"] == ["cudnn_flash_bprop", "cudnn_sdpa_fprop"]
    wanted = {"attention": 35e-6, "matmul": 30e-6, "idle": 25e-6}
    assert {k: v for k, v in found["seconds"].items() if v} == pytest.approx(wanted)
