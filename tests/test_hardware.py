"""Known devices beside their data sheets, the table of bandwidths, and this machine."""

import json
import math
from dataclasses import replace

import pytest
import torch

import run
from picotron_lab.analysis import this_machine
from picotron_lab.analysis.hardware import KNOWN, MIB, hardware, peak_flops
from picotron_lab.analysis.layer_time import CONSTANTS, Place, layer
from picotron_lab.analysis.planner_show import seen_through
from picotron_lab.analysis.step_time import predict
from picotron_lab.analysis.this_machine import Measured, measure, shapes
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, TrainConfig

BF16 = torch.bfloat16


def test_an_unknown_device_is_a_sentence_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--hardware v100 .* A100, H100, H200, B200; try"):
        hardware("v100")


@pytest.mark.parametrize(
    ("name", "best_matmul", "gigabytes"),
    [("a100", 271.2, 80), ("h100", 794.5, 80), ("h200", 788, 141), ("b200", 1745, 180)],
)
def test_a_device_reaches_what_was_measured(name, best_matmul, gigabytes):
    device = hardware(name)
    reached = device.peak[BF16] * device.matmul_share / 1e12
    assert reached == pytest.approx(best_matmul, rel=2e-3)
    assert device.memory_bytes == gigabytes * 1e9


def test_ridge_points():
    """Operations per byte at which a matmul and memory take equally long, from the data sheets."""
    ridges = {name: d.peak[BF16] / d.memory_bandwidth for name, d in KNOWN.items()}
    assert ridges["H100"] == pytest.approx(295, abs=1)
    assert ridges["H200"] == pytest.approx(206, abs=1)


@pytest.mark.parametrize(
    ("mib", "gigabytes"), [(1, 40), (4, 107), (32, 276), (1024, 464), (4096, 464), (0.5, 20)]
)
def test_bandwidth_at_measured_sizes_and_beyond(mib, gigabytes):
    assert hardware("h200").bandwidth(mib * MIB) == pytest.approx(gigabytes * 1e9)


def test_bandwidth_between_two_sizes():
    middle = hardware("h100").bandwidth(math.sqrt(32 * 64) * MIB)
    assert middle == pytest.approx((276 + 347) / 2 * 1e9)


def test_links_of_other_devices_are_scaled():
    size = 64 * MIB
    assert hardware("a100").bandwidth(size) == pytest.approx(347e9 * 300 / 450)
    assert hardware("b200").bandwidth(size) == pytest.approx(347e9 * 2)


def test_peaks_of_names_that_drivers_report():
    assert peak_flops("NVIDIA B200", BF16) == 2250e12
    assert peak_flops("NVIDIA H100 NVL", BF16) is None
    assert peak_flops("NVIDIA H200", torch.float64) is None


# ---- this machine

TINY = replace(PRESETS["tiny"], vocab_size=320)
RUN = TrainConfig(8, 8, 128)  # one micro-batch
FOUND = Measured(  # FLOP/s 50e9, in a layer 40e9; the layer 0.1 s; copies 10e9 bytes/s
    2, TINY, RUN, 50e9, 40e9, 0.1, 10e9, ((2**12, 1e-3), (2**20, 4e-3))
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_this_machine_is_slower_than_any_of_them(ranks):
    found = measure(TINY, RUN, ranks)
    assert 1e8 < found.matmuls < KNOWN["A100"].peak[BF16]
    assert 1e8 < found.best < KNOWN["A100"].peak[BF16]
    assert 1e7 < found.copies < KNOWN["A100"].memory_bandwidth
    assert [size for size, _ in found.messages] == ([2**12, 2**16, 2**20, 2**22] * (ranks - 1))
    slowest = 1e9 / found.layer  # a layer has more than 1e9 operations: 6 x 1024 x 200,704
    assert slowest < KNOWN["A100"].peak[BF16]


def test_predictions_for_this_machine_are_what_was_measured():
    """A layer of 0.1 s; its seven matmuls at 40e9 FLOP/s; a message of 2**20 bytes in 4 ms."""
    passes = layer(Place(TINY, MeshConfig(), RUN, seen_through(FOUND)))
    assert sum(each.total() for each in passes.values()) == pytest.approx(0.1)
    matrices = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352
    matmuls = sum(each["matmuls"] for each in passes.values())
    assert matmuls == pytest.approx(6 * 1024 * matrices / 40e9)
    pair = Place(TINY, MeshConfig(dp=2), replace(RUN, global_batch_size=16), seen_through(FOUND))
    assert pair.message("all_reduce", 2**20, "replica") == pytest.approx(4e-3)
    assert pair.message("all_reduce", 2**10, "replica") == pytest.approx(1e-3)  # no faster
    step = predict(TINY, pair.mesh, pair.cfg, seen_through(FOUND))
    assert 4 * 0.1 < step.seconds < 4 * 0.1 * 1.2  # four layers, and a small head


def test_operators_move_bytes_no_faster_than_a_copy():
    """A layer measured faster than its matmuls: a disturbed measurement."""
    device = seen_through(replace(FOUND, layer=1e-3))
    assert device.memory_bandwidth * CONSTANTS.operators == pytest.approx(10e9)


def test_matrices_of_a_layer():
    assert shapes(TINY) == [
        (128, 128), (64, 128), (64, 128), (128, 128), (352, 128), (352, 128), (128, 352)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--gpus", "100000"], "--gpus 100000 with --measure are processes here"),
        (["--gpus", "1", "--hardware", "h200"], "--hardware h200 and --measure both say"),
        (["--gpus", "1", "--model", "moe-small"], "--experts 8 gives as many rows as routers"),
    ],
)
def test_what_cannot_be_measured(more, sentence, capsys):
    options = ["plan", "--measure", "--model", "tiny", "--vocab-size", "320", *more]
    assert run.main([*options, "--sequence-length", "128"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_plan_for_what_was_measured(capsys, monkeypatch):
    monkeypatch.setattr(this_machine, "measure", lambda model, cfg, ranks: FOUND)
    monkeypatch.setattr(Measured, "memory_bytes", 8 * 2**30)
    options = ["--gpus", "2", "--sequence-length", "128", "--global-batch-size", "32", "--json"]
    options += ["--dtype", "float32", "--model", "tiny", "--vocab-size", "320"]
    assert run.main(["plan", "--measure", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["question"]["hardware"] == "ranks of this machine"
    assert told["usable_bytes_per_gpu"] == pytest.approx(0.9 * 8 * 2**30)
    tokens, operations = 32 * 128, 6 * 32 * 128 * 4 * 200_704  # of the layers' matmuls
    assert told["choices"][0]["tokens_per_second"] < tokens / (operations / (2 * 40e9))
