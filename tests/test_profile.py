"""Where time went: tables of traces written by hand, and the names in traces of real steps."""

import dataclasses
import json
from collections import Counter

import numpy as np
import profile_programs as programs
import pytest
import torch
from torch.profiler import ProfilerActivity

import run
from picotron_lab import profile
from picotron_lab.analysis import trace_time
from picotron_lab.analysis.trace_time import CATEGORIES
from picotron_lab.config import ConfigError, MeshConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.processes import run_processes
from picotron_lab.profile import Names, Profile, ProfiledTrainer
from picotron_lab.trainer import Trainer

PP2 = MeshConfig(pp=2, dp=2)


# ---- traces written by hand


def event(name, start, end, cat="cpu_op", **args):
    """One of thread 7, in microseconds."""
    args = {key.replace("_", " "): value for key, value in args.items()}
    where = {"pid": 1, "tid": 7, "ph": "X"}
    return where | {"name": name, "cat": cat, "ts": start, "dur": end - start, "args": args}


def named(name, start, end):
    return event(name, start, end, "user_annotation")


def table(events):
    """{category: microseconds} of rank 0, without those of no time."""
    seconds = trace_time.time_by_category(events)[0]
    rounded = [round(1e6 * s, 6) for s in seconds]
    return {c: s for c, s in zip(CATEGORIES, rounded, strict=True) if s}


def test_each_moment_of_a_cpu_counts_for_the_innermost_event():
    """By hand: a step from 100 to 200. 110-150 a matmul, of which 120-125 and 130-135 are helpers:
    40 matmul; 150-170 an all-reduce with a copy inside and waiting: 20, though torch's own work
    ends later; a norm 170-176; 34 idle."""
    assert table(
        [
            named("rank 0 step 2", 100, 200),
            event("aten::linear", 110, 150), event("aten::t", 120, 125),
            event("aten::mm", 130, 135),
            named("comm all_reduce tp 8 B f.py:1", 150, 170), event("aten::copy_", 155, 160),
            named("gloo:all_reduce", 161, 190), event("aten::rms_norm", 170, 176),
            event("aten::mm", 90, 99),  # before the step
        ]
    ) == {  # fmt: skip
        "matmul": 40, "communication exposed": 20, "norm and pointwise": 6, "idle": 34,
    }  # fmt: skip


def test_ranges_say_what_operations_are_for():
    """Matmuls of attention are attention, those of the head matmul; all of update is optimizer,
    except what is sent in it."""
    assert table(
        [
            named("rank 0 step 0", 0, 100), named("F0.1", 0, 50),
            named("attention layers.0.attention.core AttentionCore", 10, 20),
            event("aten::bmm", 11, 15), event("aten::softmax", 15, 18),
            named("loss head Head", 20, 30),
            event("aten::linear", 20, 26), event("aten::logsumexp", 26, 29),
            named("S.3", 30, 40), event("aten::exp", 30, 33), event("aten::mm", 33, 35),
            named("optimizer", 60, 100), event("aten::mul_", 62, 70), event("aten::mm", 70, 72),
            named("comm wait all_reduce world 8 B f.py:2", 80, 90),
        ]
    ) == {
        "attention": 7, "matmul": 8, "loss": 6, "optimizer": 30, "communication exposed": 10,
        "idle": 39,
    }  # fmt: skip


def test_backward_counts_as_its_forward():
    """Number 4 was last given to a softmax inside attention; 5 to an addition outside; a number of
    another thread's forward means nothing here."""
    assert table(
        [
            named("rank 0 step 0", 0, 100),
            event("aten::mul", 0, 1, Sequence_number=4, Fwd_thread_id=0),
            named("attention core X", 1, 5),
            event("aten::softmax", 1, 5, Sequence_number=4, Fwd_thread_id=0),
            event("aten::add", 5, 6, Sequence_number=5, Fwd_thread_id=0),
            event("SoftmaxBackward0", 50, 60, Sequence_number=4, Fwd_thread_id=1),
            event("aten::mm", 52, 55),
            event("AddBackward0", 60, 80, Sequence_number=5, Fwd_thread_id=1),
            event("autograd::engine::evaluate_function: MmBackward0", 80, 90, Sequence_number=9,
                  Fwd_thread_id=1),
        ]
    ) == {"norm and pointwise": 22, "attention": 14, "matmul": 10, "idle": 54}  # fmt: skip


@pytest.mark.parametrize(
    "name, expected",
    [
        ("aten::addmm", "matmul"), ("aten::baddbmm", "matmul"), ("aten::addmm_", "matmul"),
        ("aten::_grouped_mm", "matmul"), ("aten::einsum", "matmul"), ("BmmBackward0", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("LinearCrossEntropyBackward", "loss"), ("aten::nll_loss_forward", "loss"),
        ("nccl:all_reduce", "communication exposed"), ("aten::comment", "norm and pointwise"),
        ("aten::_foreach_add_", "norm and pointwise"),
    ],
)  # fmt: skip
def test_operations_are_known_by_name(name, expected):
    assert table([named("rank 0 step 0", 0, 9), event(name, 0, 9)]) == {expected: 9}


def kernel(name, start, end, correlation, stream=7):
    where = {"pid": 0, "tid": stream}
    return event(name, start, end, "kernel", correlation=correlation) | where


def test_kernels_count_where_there_are_any_and_hidden_communication_does_not():
    """A step from 0 to 100. Kernels: gemm 20-50, a copy of the optimizer 80-85, nccl 15-70 of which
    25 are exposed; flash 70-80, started by a thread of backward. 30 are left."""
    backward = {"tid": 9}
    assert table(
        [
            named("rank 0 step 0", 0, 100),
            event("aten::mm", 1, 3), event("cudaLaunchKernel", 1, 2, "cuda_runtime", correlation=1),
            event("_flash_attention_forward", 3, 4, Sequence_number=2, Fwd_thread_id=0),
            named("comm all_reduce dp 8 B f.py:1", 4, 9),
            event("cuLaunchKernelEx", 5, 6, "cuda_driver", correlation=2),
            named("optimizer", 10, 20),
            event("cudaMemcpyAsync", 11, 12, "cuda_runtime", correlation=3),
            event("FlashBackward0", 4, 9, Sequence_number=2, Fwd_thread_id=1) | backward,
            event("cudaLaunchKernel", 5, 6, "cuda_runtime", correlation=4) | backward,
            kernel("gemm", 20, 50, 1), kernel("ncclDevKernel_AllReduce", 15, 70, 2, stream=8),
            kernel("bwd_kernel", 70, 80, 4),
            kernel("Memcpy DtoD", 80, 85, 3) | {"cat": "gpu_memcpy"},
            kernel("of another program", 90, 95, 77),
        ]
    ) == {
        "matmul": 30, "communication exposed": 25, "attention": 10, "optimizer": 5, "idle": 30,
    }  # fmt: skip


def test_kernels_of_ranks_that_share_a_gpu_stay_apart():
    """Rank 1 is another thread; steps of a rank are averaged: (30 + 10) / 2 of matmul."""
    other = {"tid": 8}
    times = trace_time.time_by_category(
        [
            named("rank 0 step 0", 0, 100), named("rank 0 step 1", 100, 200),
            named("rank 1 step 0", 0, 100) | other,
            event("aten::mm", 0, 5), event("aten::exp", 6, 9) | other,
            event("launch", 1, 2, "cuda_runtime", correlation=1),
            event("launch", 3, 4, "cuda_runtime", correlation=2),
            event("launch", 7, 8, "cuda_runtime", correlation=3) | other,
            kernel("gemm", 20, 50, 1), kernel("gemm", 150, 160, 2), kernel("exp", 25, 65, 3),
        ]
    )  # fmt: skip
    micro = [[round(1e6 * s, 6) for s in times[rank]] for rank in (0, 1)]
    assert micro == [[20, 0, 0, 0, 0, 0, 80], [0, 0, 40, 0, 0, 0, 60]]


def test_the_table_has_ranks_means_and_sums():
    lines = trace_time.show({0: [0.004, 0, 0, 0, 0, 0, 0.006], 1: [0.002, 0, 0, 0, 0, 0, 0.004]})
    words = [line.split() for line in lines.splitlines()]
    assert words[1] == ["matmul", "4.00", "2.00", "3.00", "37.5%"]
    assert words[-1] == ["step", "10.00", "6.00", "8.00"]
    assert "8 of 9 ranks" in trace_time.show(dict.fromkeys(range(9), [1.0] * 7))


# ---- traces of real steps


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(1).integers(0, 64, 400).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    return TrainConfig(
        global_batch_size=8, micro_batch_size=1, sequence_length=8, steps=3, warmup_steps=1,
        data=str(folder / "tokens.npy"), cache_dir=str(folder), validation_fraction=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def four_threads(cfg, tmp_path_factory):
    """(folder, what each rank has found, events) of steps 1 and 2 of two pipelines of two."""
    folder = tmp_path_factory.mktemp("threads")
    wanted = Profile(folder / "trace.json", first=1, steps=2, threads=True)
    found = run_ranks(programs.record, 4, PP2, cfg, wanted)
    return folder, found, json.loads(wanted.path.read_text())["traceEvents"]


def losses(world, mesh_cfg, cfg):
    trainer = Trainer(programs.MODEL, mesh_cfg, cfg, world)
    return [trainer.train_step(step)["loss"] for step in range(cfg.steps)]


def ranges_by_step(events):
    """{(rank, step): names of the ranges inside, by time and thread}."""
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    steps = {}
    for step in (e for e in ranges if e["name"].startswith("rank ")):
        _, rank, _, number = step["name"].split()
        inside = [
            e["name"] for e in ranges
            if (e["pid"], e["tid"]) == (step["pid"], step["tid"]) and e is not step
            and step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"]
        ]  # fmt: skip
        steps[int(rank), int(number)] = inside
    return steps


def assert_names(inside, rank, calls):
    """Of one step: 4 micro-batches through this rank's stage, every call, what else has a name."""
    stage = rank // 2
    actions = [name for name in inside if name[0] in "FB" and name[-2] == "."]
    expected = {f"{kind}{stage}.{i}" for kind in ("F", "BW") for i in range(4)}
    assert set(actions) == expected and len(actions) == 8, actions
    sent = [name for name in inside if name.startswith("comm ") and "comm wait" not in name]
    assert Counter(sent) == Counter("comm {} {} {} B {}".format(*call) for call in calls)
    assert "optimizer" in inside and "Optimizer.step#AdamW.step" in inside
    assert f"reduce gradients {stage}" in inside
    layer = f"stages.{stage}.layers.{stage}"
    assert inside.count(f"attention {layer}.attention.core SDPA") == 4
    assert inside.count(f"loss stages.{stage}.head ChunkedHead") == 4 * stage


def test_threads_write_one_trace_in_which_everything_has_a_name(four_threads):
    folder, found, events = four_threads
    assert [path.name for path in folder.iterdir()] == ["trace.json"]
    steps = ranges_by_step(events)
    assert sorted(steps) == [(rank, step) for rank in range(4) for step in (1, 2)]
    for (rank, step), inside in steps.items():
        assert_names(inside, rank, found[rank][1][step])
    threads = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert {f"rank {r}" for r in range(4)} <= {*threads}
    assert "take turns" in found[0][2] and not any(report for _, _, report, _ in found[1:])
    assert not any(active for *_, active in found)


def test_categories_add_up_to_the_step(four_threads):
    """And what every step has is there: products, attention, the loss, the optimizer, messages."""
    *_, events = four_threads
    for rank, seconds in trace_time.time_by_category(events).items():
        named = [e["dur"] for e in events if e["name"] in (f"rank {rank} step {s}" for s in (1, 2))]
        assert len(named) == 2
        assert sum(seconds) == pytest.approx(sum(named) / 2e6, abs=1e-7)  # written in ns
        share = dict(zip(CATEGORIES, seconds, strict=True))
        assert (share.pop("loss") > 0) == (rank >= 2), "the head is on the last stage"
        assert min(share.values()) > 0, share


RARE = pytest.mark.exhaustive  # that names change nothing, on other axes


@pytest.mark.parametrize(
    "mesh",
    [
        PP2, pytest.param(MeshConfig(cp=2, tp=2), marks=RARE),
        pytest.param(MeshConfig(dp=4, zero=3), marks=RARE),
    ],
)  # fmt: skip
def test_a_profile_changes_nothing(cfg, tmp_path, mesh):
    cfg = dataclasses.replace(cfg, recompute="full", steps=2, global_batch_size=4)
    wanted = Profile(tmp_path / "trace.json", first=0, steps=1, threads=True)
    plain = run_ranks(losses, 4, mesh, cfg)
    assert [found[0] for found in run_ranks(programs.record, 4, mesh, cfg, wanted)] == plain


@pytest.mark.slow
def test_each_process_writes_a_trace(cfg, tmp_path):
    wanted = Profile(tmp_path / "trace.json", first=2, steps=1)
    found = run_processes(programs.record, 2, MeshConfig(dp=2), cfg, wanted)
    assert sorted(p.name for p in tmp_path.glob("trace*")) == [
        "trace.rank0.json", "trace.rank1.json",
    ]  # fmt: skip
    for rank, (_, calls, report, _) in enumerate(found):
        path = tmp_path / f"trace.rank{rank}.json"
        steps = ranges_by_step(json.loads(path.read_text())["traceEvents"])
        assert [*steps] == [(rank, 2)]
        sent = [name for name in steps[rank, 2] if name.startswith("comm all")]
        assert Counter(sent) == Counter("comm {} {} {} B {}".format(*call) for call in calls[2])
        assert bool(report) == (rank == 0)
    assert "rank 0   rank 1" in found[0][2]


# ---- no cost where nobody asked


def everywhere():
    """A profiler that sees all threads."""
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return torch.profiler.profile(activities=[ProfilerActivity.CPU], experimental_config=threads)


@pytest.mark.exhaustive  # left to a run after a change
def test_without_a_profile_nothing_has_a_name(cfg, tmp_path):
    """Nor outside the steps of one: an outer profiler sees torch's own ranges alone."""

    def one_step(world, kind, *more):
        trainer = kind(programs.MODEL, PP2, cfg, world, *more)
        trainer.train_step(0)
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]

    wanted = Profile(tmp_path / "trace.json", first=2)
    seen = []
    for arguments in ((Trainer,), (ProfiledTrainer, wanted)):
        with everywhere() as outer:
            seen.append(run_ranks(one_step, 4, *arguments))
        events = profile.write(outer, tmp_path / "outer.json")
        ranges = {e["name"] for e in events if e.get("cat") == "user_annotation"}
        assert ranges == {"Optimizer.step#AdamW.step"}
    assert not any(map(any, seen[0])) and any(map(any, seen[1])), "hooks of modules"


def test_a_failed_step_leaves_no_profiler_behind(cfg, tmp_path, monkeypatch):
    def fail(self, step):
        raise ZeroDivisionError

    def train(world):
        trainer = ProfiledTrainer(programs.MODEL, PP2, cfg, world, wanted)
        trainers.append(trainer)  # alive until the end
        monkeypatch.setattr(Trainer, "update", fail)
        trainer.train_step(0)

    trainers, wanted = [], Profile(tmp_path / "trace.json", first=0, threads=True)
    with pytest.raises(ZeroDivisionError):
        run_ranks(train, 4)
    assert not torch.autograd.profiler._is_profiler_enabled, "of this process, in any thread"


def test_a_forward_that_is_left_early_ends_its_range(tmp_path):
    class Leaves(torch.nn.Module):
        def forward(self):
            raise ZeroDivisionError

    model, names = torch.nn.ModuleDict({"core": Leaves()}), Names()
    profile.name_modules(model, names)
    names.active = True
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorder:
        with pytest.raises(ZeroDivisionError):
            model["core"]()
        with names("after"):
            torch.zeros(2)
    events = profile.write(recorder, tmp_path / "trace.json")
    first, second = (e for e in events if e.get("cat") == "user_annotation")
    assert (first["name"], second["name"]) == ("attention core Leaves", "after")
    assert first["ts"] + first["dur"] <= second["ts"]


# ---- the command line


@pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]])
def test_run_py_shows_a_table(text, tmp_path, monkeypatch, capsys, ranks):
    monkeypatch.chdir(tmp_path)
    small = "--hidden-size 16 --heads 2 --kv-heads 1 --ffn-size 24 --layers 1 --sequence-length 8"
    options = [*small.split(), "--global-batch-size", "4", "--micro-batch-size", "2"]
    options += ["--steps", "4", "--warmup-steps", "1", "--sample-tokens", "0"]
    options += ["--validation-fraction", "0", "--profile", "t.json", "--profile-steps", "1", *ranks]
    assert run.main([*options, *text]) == 0
    out = capsys.readouterr().out
    assert "steps 2 to 2" in out and all(category in out for category in CATEGORIES)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sorted(ranges_by_step(events)) == [(rank, 2) for rank in range(2 if ranks else 1)]


@pytest.mark.parametrize(
    "given, first, steps, sentence",
    [
        ({"profile": "no/t.json"}, 0, 9, "--profile no/t.json needs a folder that exists"),
        ({"profile": "."}, 0, 9, "must be a file"),
        ({"profile": "t.json"}, 0, 3, "--steps 3 ends before; try --steps 4 or --profile-steps 1."),
        ({"profile": "t.json"}, 0, 2, "--steps 2 ends before; try --steps 4."),
        ({"profile": "t.json"}, 10, 13, "try --steps 14 or --profile-steps 1."),
        ({"profile": "t.json", "profile_steps": 5}, 0, 6, "try --steps 7 or --profile-steps 4."),
        ({"profile": "t.json", "profile_steps": 0}, 0, 6, "--profile-steps 0 must be at least 1"),
        ({"profile_steps": 3}, 0, 6, "--profile-steps 3 needs a file"),
    ],
)
def test_what_cannot_be_recorded_is_refused(given, first, steps, sentence):
    with pytest.raises(ConfigError) as error:
        profile.choose(given, first, steps)
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_what_is_recorded_unless_said_otherwise(tmp_path):
    """Steps 2 and 3; after a resume at step 10 steps 12 and 13; one file per process."""
    path = tmp_path / "t.json"
    chosen = profile.choose({"profile": str(path)}, 10, 14)
    assert chosen == Profile(path, first=12, steps=2, threads=False) and chosen.last == 13
    assert profile.choose({"profile": str(path), "ranks": 2}, 0, 4).threads
    assert profile.choose({}, 0, 4) is None
    assert chosen.file_of(3, 4).name == "t.rank3.json" and chosen.file_of(0, 1) == path
    assert dataclasses.replace(chosen, threads=True).file_of(0, 4) == path
