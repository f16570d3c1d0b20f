"""Plans: the same as by brute force, legal, with bounds that hold, and sentences where none is."""

import itertools
import json
from dataclasses import asdict, replace

import pytest

import run
from picotron_lab.analysis import memory, planner, step_time
from picotron_lab.analysis.hardware import hardware
from picotron_lab.analysis.planner import GIB, Search, judge, plan, usable, why
from picotron_lab.analysis.planner_bounds import Bounds
from picotron_lab.analysis.planner_plots import draw, frontier
from picotron_lab.analysis.planner_space import FAMILIES, Question, candidates, usual_batch
from picotron_lab.checks import check_run, layers_of, schedule_of
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.options import train_parser
from picotron_lab.schedules import registry
from picotron_lab.schedules.actions import ScheduleError
from picotron_lab.schedules.costs import Options
from picotron_lab.schedules.simulate import peaks

MODEL = ModelConfig("plain", 4096, 512, 4, 8, 4, 1408)
EXPERTS = ModelConfig("experts", 512, 64, 2, 4, 2, 96, experts=4)
H100 = hardware("h100")
SMALL = replace(H100, memory_bytes=0.3 * GIB, node=2)  # few candidates fit
ASK = Question(MODEL, 4, SMALL, 512, 8)


def by_hand(ask):
    """(seconds, bytes) of everything that the options allow, without the planner's code."""
    sizes, found = range(1, ask.gpus + 1), []
    schedules = [("1f1b", 0), ("interleaved", 2), ("zb-h1", 0), ("zb-v", 0), ("v-half", 0)]
    for pp, dp, cp, tp in itertools.product(sizes, repeat=4):
        if pp * dp * cp * tp != ask.gpus or tp > ask.hardware.node:
            continue
        others = itertools.product(
            range(4), (False, True), schedules, (1, 2, 4, 8), ("none", "full")
        )
        for zero, split, (name, virtual), micro, recompute in others:
            cfg = TrainConfig(
                global_batch_size=ask.batch, micro_batch_size=micro, recompute=recompute,
                sequence_length=ask.sequence_length, dtype=ask.dtype,
            )  # fmt: skip
            given = {"zero": zero, "sequence_parallel": split, "schedule": name}
            try:
                mesh = MeshConfig(pp, dp, cp, tp, virtual_stages=virtual, **given)
                check_run(ask.model, mesh, cfg)
            except ConfigError:
                continue
            seconds = step_time.predict(ask.model, mesh, cfg, ask.hardware).seconds
            ranks = range(pp)
            held = [memory.predict(ask.model, mesh, cfg, r, kernels=True).peak for r in ranks]
            found.append((seconds, max(held)))
    return found


@pytest.fixture(scope="module")
def planned():
    return plan(ASK)


@pytest.fixture(scope="module")
def every():
    pairs = ((one, judge(ASK, one)) for one in candidates(ASK, 2))
    return [(one, choice) for one, choice in pairs if choice]


def test_the_plan_is_what_brute_force_finds(planned):
    found = by_hand(ASK)
    fitting = sorted(seconds for seconds, size in found if size <= 0.9 * SMALL.memory_bytes)
    assert 10 < len(fitting) < len(found), "memory should rule out some, and not all"
    assert [choice.time.seconds for choice in planned.choices] == pytest.approx(
        fitting[:10], rel=1e-5
    )
    assert planned.complete


@pytest.mark.exhaustive  # else brute force above says it
def test_pruning_loses_nothing(planned):
    slow = plan(ASK, prune=False)
    assert slow.predicted == slow.considered > planned.fitting > planned.predicted
    assert [c.candidate for c in slow.choices] == [c.candidate for c in planned.choices]


@pytest.mark.exhaustive  # left to a run after a change
def test_no_prediction_is_below_its_bounds(every):
    bounds = Bounds(ASK)
    for one, choice in every:
        assert bounds.seconds(one) <= choice.time.seconds * (1 + 1e-9), one.options()
        assert bounds.memory(one) <= choice.memory.peak, one.options()


@pytest.mark.parametrize(
    "model, sequence, step",
    [("llama3-8b", 8192, 999), ("gpt3-175b", 2048, 199)],
)
@pytest.mark.exhaustive  # left to a run after a change
def test_bounds_hold_for_large_models(model, sequence, step):
    ask = Question(PRESETS[model], 64, H100, sequence, 64)
    bounds, some = Bounds(ask), list(candidates(ask, 8))[::step]
    judged = [(one, choice) for one in some if (choice := judge(ask, one))]
    assert len(judged) > 5
    for one, choice in judged:
        assert bounds.seconds(one) <= choice.time.seconds * (1 + 1e-9), one.options()
        assert bounds.memory(one) <= choice.memory.peak, one.options()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_rank_0_holds(family):
    seen = 0
    for p, m, v in itertools.product((2, 3, 4, 8), (1, 2, 3, 4, 5, 8, 16, 24), (2, 3)):
        virtual = v if family.name == "interleaved" else 0
        try:
            schedule = registry.build(family.name, p, m, Options(virtual_stages=virtual))
        except ScheduleError:
            continue
        assert family.placement(p, v) == schedule.placement
        assert family.held(p, m, v) <= peaks(schedule, kept=0.0)[0], (p, m, v)
        seen += 1
    assert seen > 20


def parsed(options):
    """Model, mesh and training of a command, as run.py reads them."""
    given = vars(train_parser().parse_args(options))
    mesh = run.choose(MeshConfig, given, MeshConfig(dp=given.get("dp", 1)))
    return run.choose_model(given, None), mesh, run.choose(TrainConfig, given, TrainConfig())


@pytest.mark.slow  # left to CI
def test_every_command_can_be_started(capsys):
    options = ["--model", "llama3-8b", "--gpus", "24", "--sequence-length", "4096"]
    assert run.main(["plan", *options, "--global-batch-size", "24", "--top", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["choices"]) == 8 and found["question"]["hardware"] == "H100"
    for choice in found["choices"]:
        start, words = choice["command"].split(" run.py ")
        assert start.startswith("torchrun --nnodes 3 --rdzv") and start.endswith(" 8")
        model, mesh, cfg = parsed(words.split())
        check_run(model, mesh, cfg)
        assert asdict(mesh) == choice["mesh"] and mesh.size == 24
        assert (cfg.micro_batch_size, cfg.recompute) == (
            choice["micro_batch_size"], choice["recompute"],
        )  # fmt: skip
        assert cfg.sequence_length == 4096 and cfg.dtype == "bfloat16"
        assert choice["memory_bytes_per_gpu"] <= found["usable_bytes_per_gpu"] == 0.9 * 80e9
        parts = sum(choice["parts"].values())
        assert choice["tokens_per_second"] == pytest.approx(24 * 4096 / parts)
    seconds = [choice["step_seconds"] for choice in found["choices"]]
    assert seconds == pytest.approx(sorted(seconds), rel=1e-5)


def test_experts_are_shared_out():
    ask = Question(EXPERTS, 4, H100, 64, 8)
    ranks = {one.mesh.ep for one in candidates(ask, 4)}
    assert ranks == {1, 2, 4}
    assert all(one.mesh.dp * one.mesh.cp % one.mesh.ep == 0 for one in candidates(ask, 4))
    assert len(plan(ask, top=3).choices) == 3


def test_tensor_parallelism_leaves_a_node_only_if_nothing_else_fits():
    deep = ModelConfig("wide", 512, 1024, 1, 16, 16, 4096)  # one layer: no pipeline
    ask = Question(deep, 4, replace(H100, node=2), 64, 1)  # one sequence: no replicas
    assert {one.mesh.tp for one in candidates(ask, 2)} == {1, 2}
    roomy = plan(ask)
    assert {choice.candidate.mesh.tp for choice in roomy.choices} <= {1, 2}
    smallest = min(c.memory.peak for c in plan(ask, prune=False, top=99).choices)
    tight = replace(ask, hardware=replace(ask.hardware, memory_bytes=smallest / 0.9 - 1))
    assert {choice.candidate.mesh.tp for choice in plan(tight).choices} == {4}


@pytest.mark.exhaustive
def test_of_equally_fast_ones_those_with_less_memory_come_first(every, monkeypatch):
    same = replace(every[0][1].time, parts={"matmuls": 1e6})
    monkeypatch.setattr(planner, "predicted", lambda ask, one: same)
    monkeypatch.setattr(planner, "MOST", len(every) + 1)
    roomy = Search(ASK, 80e9).best([one for one, _ in every], 5, True)
    assert [choice.memory.peak for choice in roomy.choices] == sorted(
        choice.memory.peak for _, choice in every
    )[:5]


@pytest.mark.exhaustive  # left to a run after a change
def test_the_smallest_takes_no_times(every, monkeypatch):
    monkeypatch.delattr(step_time, "predict")
    search, some = Search(ASK, usable(ASK)), [one for one, _ in every]
    least = min(choice.memory.peak for _, choice in every)
    held, one = search.smallest(some)
    assert held.peak == least == most_of_all_ranks(one)
    assert search.smallest(some, least - 1) is None
    assert search.smallest(some, least + 1)[0].peak <= least + 1


def most_of_all_ranks(one):
    ranks = range(one.mesh.pp)
    return max(memory.predict(MODEL, one.mesh, one.cfg, r, kernels=True).peak for r in ranks)


@pytest.mark.exhaustive
def test_many_micro_batches_only_if_nothing_else_fits():
    """2048 sequences on one GPU: 2048 micro-batches of one, or 1024 of two, and so on."""
    ask = Question(MODEL, 1, H100, 512, 2048)
    assert {one.rounds for one in candidates(ask, 1)} == {128, 256, 512, 1024, 2048}
    found = plan(ask, prune=False, top=99)
    assert max(choice.candidate.rounds for choice in found.choices) == 1024
    least = min(choice.memory.peak for choice in found.choices)
    tight = replace(ask, hardware=replace(H100, memory_bytes=least / 0.9 - 1))
    assert {choice.candidate.rounds for choice in plan(tight).choices} == {2048}


# ---- what is told


def test_why_the_second_lost(planned):
    first = planned.choices[0]
    parts = {"matmuls": 1.0, "bubble": 1.0, "tp": 1.0}
    best = replace(first, time=replace(first.time, parts=parts))
    more = {"matmuls": 1.0, "bubble": 1.5, "tp": 0.8}
    other = replace(first, time=replace(first.time, parts=more))
    assert why(best, other) == (
        "takes 0.3 s (10.0%) longer: 0.5 s more for the pipeline's bubble, though 0.2 s less for "
        "waiting for tensor parallelism."
    )
    assert why(best, best).startswith("takes as long")


def test_a_table(capsys):
    options = ["--model", "llama3.2-1b", "--gpus", "2", "--sequence-length", "1024"]
    assert run.main(["plan", *options, "--global-batch-size", "4", "--hardware", "H200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama3.2-1b on 2 H200: 4 sequences of 1024 a step, bfloat16")
    assert lines[3].split()[:3] == ["GiB/GPU", "step", "s"]
    assert "torchrun --nproc-per-node 2 run.py --model llama3.2-1b" in lines[-3]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--gpus", "8", "--hardware", "v100"], "--hardware v100 is not one of A100, H100"),
        (["--gpus", "0"], "--gpus 0 must lie between 1 and 1048576; try --gpus 8."),
        (["--gpus", "8", "--top", "0"], "--top 0 must lie between 1 and 100; try --top 10."),
        (["--gpus", "8", "--dtype", "int8"], "--dtype int8 is not one of"),
        (["--gpus", "8", "--plot", "plan.txt"], "--plot plan.txt ends in none of .png"),
        (["--gpus", "8", "--global-batch-size", "-1"], "--global-batch-size -1 must be at least"),
        (["--gpus", "8", "--sequence-length", "0"], "--sequence-length 0 must be at least 1; try"),
        # at most 16 replicas and 16 sequences at a time: 256 of them in a round
        (
            ["--gpus", "16", "--global-batch-size", "16000000"],
            "--global-batch-size 16000000 gives every rank 62500 micro-batches or more with --gpus "
            "16, and a plan looks at 4096 at most; try --global-batch-size 262144.",
        ),
        # 7 is prime: 7 replicas, or 7 stages
        (
            ["--gpus", "49", "--global-batch-size", "4"],
            "--global-batch-size 4 cannot be shared out by --gpus 49: tp x cp x pp of --model "
            "llama3-8b (32 layers, 32 heads, sequences of 8192) leave 7 data-parallel ranks or "
            "more, each with as many sequences; try --global-batch-size 7.",
        ),
    ],
)
def test_bad_input(options, sentence, capsys):
    assert run.main(["plan", "--model", "llama3-8b", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


def test_a_model_must_be_named_and_have_a_vocabulary(capsys):
    assert run.main(["plan", "--gpus", "8"]) == 2
    assert "--model names what is to be trained" in capsys.readouterr().err
    assert run.main(["plan", "--gpus", "8", "--model", "tiny"]) == 2
    assert "add --vocab-size 32000." in capsys.readouterr().err


@pytest.mark.exhaustive  # left to a run after a change
def test_too_little_memory_says_how_much_is_missing():
    tiny = Question(MODEL, 2, replace(SMALL, memory_bytes=0.04 * GIB), 512, 8)
    with pytest.raises(ConfigError) as caught:
        plan(tiny)
    said = str(caught.value)
    smallest = min(size for _, size in by_hand(tiny))
    missing = smallest - 0.9 * 0.04 * GIB
    assert f"the smallest footprint is {smallest / GIB:.1f} GiB per GPU" in said
    assert f"{missing / GIB:.1f} GiB more than the 0.0 GiB" in said
    number = int(said.split("try --gpus ")[1].rstrip("."))
    assert plan(replace(tiny, gpus=number)).choices
    assert number > 2


def test_a_batch_that_many_meshes_share():
    assert usual_batch(640, 8192) == 640  # 512 sequences are 4 Mi tokens; 320 shares 640 GPUs
    assert usual_batch(16_384, 8192) == 2048  # 16 Mi tokens, as in Llama 3's training
    assert usual_batch(1, 8192) == 512


def test_the_frontier(planned):
    best = frontier(planned.choices)
    pairs = [(choice.memory.peak, choice.time.seconds) for choice in planned.choices]
    for one in best:
        mine = one.memory.peak, one.time.seconds
        assert not any(a <= mine[0] and b < mine[1] for a, b in pairs)
    pytest.importorskip("matplotlib")
    axes = draw(planned).axes[0]
    assert [line.get_label() for line in axes.lines[:3]] == [
        "all, at best", "frontier, predicted", "first",
    ]  # fmt: skip
    assert len(axes.lines[0].get_xdata()) == planned.considered


# ---- beside others' measurements

THEIRS = MeshConfig(pp=4, dp=20, tp=8, sequence_parallel=True, zero=1)


def test_llama_70b_on_640_gpus_beside_theirs():
    # A team's own figures for this mesh: about 450 TFLOP/s per GPU (6 per weight and token), 685k
    # tokens/s, 59 billion tokens a day. Batch, length and schedule they do not tell
    published = 685e3
    assert published * 86_400 == pytest.approx(59e9, rel=0.01)
    assert published * 6 * 70e9 / 640 == pytest.approx(450e12, rel=0.01)
    ask = Question(PRESETS["llama3-70b"], 640, H100)
    cfg = TrainConfig(
        global_batch_size=ask.batch, micro_batch_size=1, sequence_length=8192, dtype="bfloat16"
    )
    check_run(ask.model, THEIRS, cfg)
    assert layers_of(ask.model, THEIRS, cfg) == (20, 20, 20, 20)
    assert schedule_of(THEIRS, cfg).microbatches == 32
    time = step_time.predict(ask.model, THEIRS, cfg, H100)
    assert time.tokens_per_second / published == pytest.approx(0.66, abs=0.06)


@pytest.mark.slow
def test_our_first_choice_for_640_gpus():
    ask = Question(PRESETS["llama3-70b"], 640, H100)
    found = plan(ask)
    first = found.choices[0]
    assert found.complete and first.memory.peak <= usable(ask)
    assert first.time.tokens_per_second / 685e3 == pytest.approx(0.95, abs=0.1)
    shaped = [c for c in candidates(ask, 8) if asdict(c.mesh) == asdict(THEIRS)]
    theirs = Search(ask, usable(ask)).best(shaped, 1, True).choices[0]
    assert theirs.time.seconds > first.time.seconds
