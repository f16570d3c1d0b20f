"""The time of a step from its trace: beside figures worked by hand, and beside the closed forms."""

from dataclasses import replace

import pytest
import torch

from picotron_lab.analysis import dryrun, dryrun_time, step_time
from picotron_lab.analysis.dryrun import UNDER_WAY, Work
from picotron_lab.analysis.hardware import Hardware, hardware
from picotron_lab.analysis.layer_time import Constants, Place
from picotron_lab.config import PRESETS, MeshConfig, ModelConfig, TrainConfig

H100 = hardware("h100")
ROUND = Hardware(  # 100 operations and 10 bytes a second; messages of 6 bytes a second
    "round", {torch.bfloat16: 100.0}, 1.0, 1e9, 10.0, ((1.0, 6.0),), 8, ring_share=1.0
)
CONSTANTS = Constants(
    matmuls=0.5, attention=0.25, copies=0.8, kernel=0.125, overlap=0.5, links=0.5, network=0.5
)
SMALL = ModelConfig("small", 1000, 64, 8, 4, 2, 192)
SCHEDULES = ("1f1b", "interleaved", "zb-h1", "dualpipe-v", "1f1b-vocab2")


def place(mesh: MeshConfig, impl: str = "fused") -> Place:
    cfg = TrainConfig(mesh.dp, 1, 16, dtype="bfloat16", impl=impl)
    return Place(SMALL, mesh, cfg, ROUND, CONSTANTS)


def test_a_pass_by_hand():
    """Two actions did: 200 operations of 50 a second, 50 of 25; 32 bytes of 8; 4 operators. An
    all_gather of 24 bytes over 2 ranks sends 12 of 3 a second. So each takes 2, 1, 2, 1/4 and 2."""
    sent = {"tp": {"all_gather": (2, 48)}, "world": {"all_reduce": (1, 8)}}
    work = Work(2, 200, 50, 32, 4, sent)
    found = dryrun_time.pass_of(place(MeshConfig(tp=2)), work)
    assert found == {"matmuls": 2, "attention": 1, "memory": 2, "kernels": 0.25, "tp": 4}


@pytest.mark.parametrize(("impl", "left"), [("fused", 3), ("plain", 4)])
def test_what_is_not_waited_for_hides(impl, left):
    """4 seconds of messages, less half of the 2 of matmuls."""
    work = Work(1, 100, 0, 0, 0, {"tp": {f"all_gather, {UNDER_WAY}": (1, 24)}})
    assert dryrun_time.pass_of(place(MeshConfig(tp=2), impl), work)["tp"] == left


def test_replicas_are_in_a_pass_for_zero_3_alone():
    work = Work(1, 0, 0, 0, 0, {"dp": {"all_gather": (1, 24)}})
    seconds = [
        dryrun_time.pass_of(place(MeshConfig(dp=2, zero=stage)), work)["replica"]
        for stage in (0, 1, 2, 3)
    ]
    assert seconds == [0, 0, 0, 4]


def test_work_of_a_matmul_and_a_sum():
    """[3, 4] x [4, 5] of float32: 2 x 3 x 4 x 5 operations; then two [3, 5] are read, one written.
    Views and tensors that nobody fills move nothing."""
    tally = dryrun.Tally(dryrun.Meter(), dryrun.Ledger())
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    with tally:
        y = x @ w
        y = y + y.T.T
        torch.empty_like(y)
    work = tally.work
    assert (work.matmuls, work.attention) == (120, 0)
    assert (work.moved, work.operators) == (3 * 15 * 4, 1)


def test_one_rank_for_each_kind_of_stage():
    """First, last, and one between; of uneven ones, one of each number of layers."""
    cfg = TrainConfig(16, 1, 16)
    even, uneven = MeshConfig(pp=4), MeshConfig(pp=4, dp=2, pp_layers="2,1,3,2")
    assert dryrun_time.traced_ranks(SMALL, even, cfg) == [0, 2, 3]
    assert dryrun_time.traced_ranks(SMALL, uneven, cfg) == [0, 2, 4, 6]
    twice = replace(even, schedule="interleaved")
    assert dryrun_time.traced_ranks(SMALL, twice, cfg) == [0, 3]


def both(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> tuple:
    """From the trace; and by closed forms."""
    pytest.importorskip("triton")
    reports = dryrun_time.traced(model, mesh, cfg, [])
    found = dryrun_time.from_trace(model, mesh, cfg, H100, reports)
    return found, step_time.predict(model, mesh, cfg, H100)


LARGE = [
    ("llama3-8b", MeshConfig(dp=8, zero=1), 1),
    ("llama3-8b", MeshConfig(dp=4, tp=2), 1),
    ("llama3-70b", MeshConfig(pp=4, dp=20, tp=8, sequence_parallel=True, zero=1), 4),
]


MARKS = pytest.mark.slow, pytest.mark.slow, pytest.mark.exhaustive  # the last takes half a minute


@pytest.mark.parametrize(
    ("name", "mesh", "rounds"),
    [pytest.param(*case, marks=mark) for case, mark in zip(LARGE, MARKS, strict=True)],
    ids=["dp", "tp", "640 GPUs"],
)
def test_large_models_take_as_long_as_closed_forms_say(name, mesh, rounds):
    cfg = TrainConfig(mesh.dp * rounds, 1, 8192, dtype="bfloat16", impl="fused")
    found, told = both(PRESETS[name], mesh, cfg)
    assert found.seconds == pytest.approx(told.seconds, rel=0.15)
    assert found.mfu == pytest.approx(told.mfu, rel=0.15)
    assert found.parts["matmuls"] == pytest.approx(told.parts["matmuls"], rel=0.01)
    assert found.parts["attention"] == pytest.approx(told.parts["attention"], rel=0.01)


@pytest.mark.parametrize(
    "schedule",
    ["1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES[1:])],
)
def test_every_kind_of_schedule(schedule):
    """Matmuls of the busiest rank as by closed forms; parts add up to the timeline's end, and what
    comes after it: replicas, the optimizer."""
    model = replace(SMALL, hidden_size=512, ffn_size=1536)
    mesh = MeshConfig(pp=2, dp=2, schedule=schedule)
    cfg = TrainConfig(8, 1, 2048, dtype="bfloat16", impl="fused")
    found, told = both(model, mesh, cfg)
    assert found.parts["matmuls"] == pytest.approx(told.parts["matmuls"], rel=0.01)
    after = found.parts["replica"] + found.parts["optimizer"]
    assert found.seconds == pytest.approx(found.line.makespan + after)
    assert 0 < found.bubble < 1
