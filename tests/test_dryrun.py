"""Dry runs beside the same step on lab threads, and beside figures worked by hand.

The real trainer computes real numbers there, real ranks answer, and the same Meter counts.
"""

import json
from dataclasses import replace

import pytest
import torch

import run
from picotron_lab import router, verify
from picotron_lab.analysis import cost, dryrun, dryrun_show
from picotron_lab.analysis.dryrun import Report, dry_run, observe
from picotron_lab.cases import BALANCED, DENSE, DROPPING, EXPERTS, TIED
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer

DEEP = replace(DENSE, layers=4)
FUSED, PLAIN = {"impl": "fused"}, {"impl": "plain"}
ADAMW, BF16 = {"optimizer": "adamw", "lr": 0.01}, {"dtype": "bfloat16"}
SMALL = {"micro_batch_size": 2}
ZIGZAG = MeshConfig(cp=2, cp_kind="zigzag")
ALONE = {  # without a pipeline: equal to the byte
    "recompute, dropout": (DENSE, MeshConfig(), {**FUSED, "recompute": "full", "dropout": 0.3}),
    "dp, silent, bf16, tied": (TIED, MeshConfig(dp=2), {**FUSED, **BF16, **ADAMW, **SMALL}),
    "zero 3": (DENSE, MeshConfig(dp=3, zero=3), {**FUSED, **ADAMW, **SMALL}),
    "tp, sp": (DENSE, MeshConfig(tp=4, sequence_parallel=True), FUSED),
}
RARE = {"one device, AdamW": (DENSE, MeshConfig(), {**PLAIN, **ADAMW, "micro_batch_size": 3})}
MORE = {
    "cp": (DENSE, ZIGZAG, {**FUSED, **SMALL}),
    "zero 1": (DENSE, MeshConfig(dp=3, zero=1), {**FUSED, **ADAMW, **SMALL}),
    "selective": (DENSE, MeshConfig(), {**PLAIN, "recompute": "selective"}),
    "bf16": (DENSE, MeshConfig(), {**PLAIN, **BF16, **ADAMW}),
    "dp, bucketed": (DENSE, MeshConfig(dp=2), {**SMALL, "dp_step": "bucketed"}),
    "dp, overlapped": (DENSE, MeshConfig(dp=2), {**SMALL, "dp_step": "overlapped"}),
    "zero 2, plain": (DENSE, MeshConfig(dp=2, zero=2), {**PLAIN, **SMALL}),
    "zero 2, bf16": (DENSE, MeshConfig(dp=2, zero=2), {**FUSED, **BF16, **ADAMW, **SMALL}),
    "zero 3, plain": (DENSE, MeshConfig(dp=2, zero=3), {**PLAIN, **SMALL}),
    "zero 3, recompute": (DENSE, MeshConfig(dp=2, zero=3), {**FUSED, **SMALL, "recompute": "full"}),
    "tp, plain": (DENSE, MeshConfig(tp=2, vocab_parallel="1"), PLAIN),
    "cp, ring": (DENSE, MeshConfig(cp=2, cp_kind="ring"), {**PLAIN, **SMALL}),
    "cp, ulysses": (DENSE, MeshConfig(cp=2, cp_kind="ulysses"), {**FUSED, **SMALL}),
    "cp, all-gather": (DENSE, MeshConfig(cp=2, cp_kind="all-gather"), {**FUSED, **SMALL}),
    "dp, cp, tp, zero 2": (DENSE, MeshConfig(dp=2, cp=2, tp=2, zero=2), {**FUSED, **SMALL}),
}
PIPELINES = {
    "1f1b": (DENSE, MeshConfig(pp=2), {**PLAIN, **SMALL}),
}
MORE_PIPELINES = {
    "zb-h1, bf16": (DENSE, MeshConfig(pp=2, schedule="zb-h1"), {**FUSED, **BF16, **SMALL}),
    "afab, fused": (DENSE, MeshConfig(pp=2, schedule="afab"), {**FUSED, **SMALL}),
    "interleaved": (DEEP, MeshConfig(pp=2, schedule="interleaved"), {**FUSED, **SMALL}),
    "zb-v": (DEEP, MeshConfig(pp=2, schedule="zb-v"), {**PLAIN, **SMALL}),
    "dualpipe": (DENSE, MeshConfig(pp=2, schedule="dualpipe"), {**FUSED, "micro_batch_size": 1}),
    "vocabulary": (DENSE, MeshConfig(pp=2, schedule="1f1b-vocab2"), {**FUSED, **SMALL}),
    "slices": (DENSE, MeshConfig(pp=2, schedule="seq1f1b", token_slices="2"), {**FUSED, **SMALL}),
    "post-validation": (DENSE, MeshConfig(pp=2), {**FUSED, **SMALL, "post_validation": True}),
    "dp, tp, pp, zero 1": (
        DENSE, MeshConfig(pp=2, dp=2, tp=2, zero=1, sequence_parallel=True), {**FUSED, **SMALL}
    ),
}  # fmt: skip


ONE, TWO_EP = {"micro_batch_size": 1}, MeshConfig(dp=2, ep=2)
ROUTED = {
    "experts": (EXPERTS, MeshConfig(), PLAIN),
}
MORE_ROUTED = {
    "ep, fused": (EXPERTS, TWO_EP, {**FUSED, **SMALL}),
    "ep, dropping": (DROPPING, TWO_EP, {**PLAIN, **ONE}),
    "recompute": (EXPERTS, MeshConfig(), {**FUSED, **ONE, "recompute": "full"}),
    "groups, zero 1": (BALANCED, MeshConfig(dp=2, ep=2, zero=1), {**FUSED, **ONE}),
    "tp, pp": (
        EXPERTS, MeshConfig(pp=2, tp=2, sequence_parallel=True, schedule="zb-h1"), {**FUSED, **ONE}
    ),
    "ep, bf16": (EXPERTS, TWO_EP, {**FUSED, **SMALL, **BF16}),
}  # fmt: skip
RARELY_ROUTED = {"cp, zero 3": (BALANCED, MeshConfig(dp=2, cp=2, ep=2, zero=3), {**FUSED, **ONE})}


def slow(cases: dict) -> list:
    return [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in cases.items()]


def rare(cases: dict) -> list:
    return [pytest.param(*c, id=name, marks=pytest.mark.exhaustive) for name, c in cases.items()]


def quick(cases: dict) -> list:
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.fixture
def cfg(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(verify.TEXT[: verify.TEXT_BYTES])
    return replace(verify.BASE, data=str(text), cache_dir=str(tmp_path))


def real_runs(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> list[Report]:
    def rank_main(world):
        trainer = Trainer(model, mesh, cfg, world)
        trainer.train_step(0)
        return observe(trainer)

    return run_ranks(rank_main, mesh.size)


def without_memory(report: Report) -> Report:
    return replace(report, peak={}, peak_at="", seconds=0.0)


# ---- beside lab threads


@pytest.mark.parametrize(("model", "mesh", "changes"), quick(ALONE) + slow(MORE) + rare(RARE))
def test_equal_to_a_real_run(model, mesh, changes, cfg):
    cfg = replace(cfg, **changes)
    real = real_runs(model, mesh, cfg)
    dry = dry_run(model, mesh, cfg, mesh.size - 1, as_gpu=False)
    assert replace(dry, seconds=0.0) == real[-1]


def chosen_alike(score_BTE, cfg):
    """In place of router.choose: one expert after the other, [B, T, k]."""
    B, T, _ = score_BTE.shape
    return torch.arange(B * T * cfg.top_k).view(B, T, cfg.top_k) % cfg.experts


@pytest.mark.parametrize(
    ("model", "mesh", "changes"), quick(ROUTED) + slow(MORE_ROUTED) + rare(RARELY_ROUTED)
)
def test_experts_get_equal_shares(model, mesh, changes, cfg, monkeypatch):
    """As a real run whose routers choose so. Lists of places have values in a dry run, and what is
    kept of them for backward is not counted: below 1.5 %."""
    cfg = replace(cfg, **changes)
    dry = [dry_run(model, mesh, cfg, rank, as_gpu=False) for rank in range(mesh.size)]
    monkeypatch.setattr(router, "choose", chosen_alike)
    for mine, real in zip(dry, real_runs(model, mesh, cfg), strict=True):
        assert without_memory(mine) == without_memory(real)
        assert mine.peak_bytes == pytest.approx(real.peak_bytes, rel=0.015)


@pytest.mark.parametrize(("model", "mesh", "changes"), quick(PIPELINES) + rare(MORE_PIPELINES))
def test_a_pipeline_is_equal_but_for_messages(model, mesh, changes, cfg):
    """A real sender holds what it sent until it was taken: at most two messages at the peak, one
    forward and one back, which a dry run has given away at once."""
    cfg = replace(cfg, **changes)
    real = real_runs(model, mesh, cfg)
    width = {"float64": 8, "bfloat16": 2}[cfg.dtype]
    message = cfg.micro_batch_size * cfg.sequence_length * model.hidden_size * width
    for rank in (0, mesh.size - 1):
        dry = dry_run(model, mesh, cfg, rank, as_gpu=False)
        assert without_memory(dry) == without_memory(real[rank])
        assert 0 <= real[rank].peak_bytes - dry.peak_bytes <= 2 * message


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(
            MeshConfig(tp=2, sequence_parallel=True, vocab_parallel="1"),
            marks=pytest.mark.exhaustive,
        ),
        MeshConfig(pp=2, schedule="zb-h1"),
        pytest.param(ZIGZAG, marks=pytest.mark.slow),
        pytest.param(MeshConfig(pp=2, schedule="1f1b-vocab2"), marks=pytest.mark.slow),
    ],
    ids=["tp", "zb-h1", "cp", "vocabulary"],
)
def test_a_gpu_keeps_less_and_computes_and_sends_the_same(mesh, cfg):
    """What each kernel keeps is counted in test_nobody.py; here all of them serve in a step."""
    pytest.importorskip("triton")
    cfg = replace(cfg, **FUSED, **SMALL, **BF16, optimizer="adamw")
    cpu, gpu = (dry_run(DENSE, mesh, cfg, 0, as_gpu=way) for way in (False, True))
    assert gpu.peak["activation"] < cpu.peak["activation"]
    assert (gpu.flops, gpu.kept) == (cpu.flops, cpu.kept)
    assert gpu.traffic == cpu.traffic


# ---- beside figures worked by hand


@pytest.mark.exhaustive  # left to a run after a change
def test_llama_70b_on_640_gpus():
    """tp 8, pp 20 of 4 layers, dp 4, zero 1; the first stage also has an eighth of the embedding.

    A layer: q, o 8192 x 8192, k, v 8192 x 1024, three matrices 8192 x 28672, two norms.
    """
    mesh = MeshConfig(pp=20, dp=4, tp=8, sequence_parallel=True, zero=1)
    cfg = TrainConfig(
        global_batch_size=16, micro_batch_size=1, sequence_length=8192, dtype="bfloat16"
    )
    report = dry_run(PRESETS["llama3-70b"], mesh, cfg, 0)
    matrices = (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) // 8
    held = 4 * (matrices + 2 * 8192) + 128_256 // 8 * 8192
    assert report.parameters == held
    assert report.kept["parameter"] == 2 * held
    assert report.kept["gradient"] == 4 * held
    assert report.kept["optimizer"] == (4 + 4 + 4) * held // 4  # master and moments of a fourth
    assert report.actions == {"F": 4, "BW": 4}
    tokens, layers = 4 * 8192, 4  # matmuls of weights; then scores and values of 8 heads, 128 wide
    forward = 2 * tokens * layers * matrices + 4 * tokens * layers * 8 * 128 * 8192
    back = 4 * tokens * layers * matrices + 10 * tokens * layers * 8 * 128 * 8192
    assert report.flops == {"F": forward, "BW": back}
    boundary = 8192 // 8 * 8192 * 2  # bytes of this rank's rows of an activation
    assert report.traffic["pp.F"] == {"send": (4, 4 * boundary)}
    assert report.traffic["pp.B"] == {"recv": (4, 0)}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_operations_of_one_device(recompute, cfg):
    """6 per weight and token, 4 + 10 N T H C for attention: flash forms the scores again. full:
    the forward of the layers once more, without the last matmul, which backward does not need."""
    cfg = replace(cfg, **FUSED, recompute=recompute)
    report = dry_run(DENSE, MeshConfig(), cfg, 0, as_gpu=False)
    N, T, D = 12 * 16, 16, 32
    weights = cost.matmul_parameters(DENSE)
    expected = 6 * N * weights + 2 * 14 * N * T * D
    if recompute == "full":
        expected += 2 * N * (weights - 320 * D) + 2 * (4 * N * T * D - 2 * N * D * 72)
    assert sum(report.flops.values()) == expected


# ---- what cannot be told, and the command line


def test_what_only_values_or_times_can_tell():
    with pytest.raises(ConfigError, match="--token-slices auto is decided by times"):
        dry_run(DENSE, MeshConfig(pp=2, token_slices="auto"), TrainConfig(), 0)
    with pytest.raises(ConfigError, match="a dry run does not open; add --vocab-size 1024"):
        dry_run(ModelConfig(), MeshConfig(), TrainConfig(tokenizer="bpe:1024"), 0)


def test_ranks_that_stand_for_their_stages():
    mesh = MeshConfig(pp=4, dp=20, tp=8)
    assert dryrun.ranks(mesh) == [0, 480]
    assert dryrun.ranks(mesh, every_stage=True) == [0, 160, 320, 480]
    assert dryrun.ranks(MeshConfig(dp=2)) == [0]


OPTIONS = ["dryrun", "--layers", "4", "--pp", "2", "--tp", "2", "--gpus", "8"]


def test_command_line(capsys):
    assert run.main([*OPTIONS, "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)
    assert (first["rank"], first["stages"], last["rank"], last["stages"]) == (0, [0], 4, [1])
    assert first["actions"] == {"F": 2, "BW": 2}  # 32 sequences, dp 2, 8 at a time
    assert run.main(OPTIONS) == 0
    out = capsys.readouterr().out
    assert "tiny on 8 GPUs: 2 micro-batches of 8 sequences of 128 tokens" in out
    assert "H100: 74.5 GiB" in out  # 80e9 bytes
    assert max(map(len, out.splitlines())) <= 100


def test_the_predicted_step_is_told_too(capsys):
    """JSON and text say the same; tokens 32 x 128, bfloat16, operations worked by hand."""
    options = [*OPTIONS, "--dtype", "bfloat16", "--sequence-parallel", "--vocab-size", "320"]
    assert run.main([*options, "--json"]) == 0
    told = [report["predicted"] for report in json.loads(capsys.readouterr().out)]
    first = told[0]
    assert told == [first, first]
    tokens, seconds = 32 * 128, first["step_seconds"]
    assert first["tokens_per_second"] == pytest.approx(tokens / seconds)
    matrices = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352  # q, o; k, v; gate, up, down
    flops = 6 * (4 * matrices + 320 * 128) + 12 * 4 * 128 * 128
    assert first["mfu"] == pytest.approx(flops * tokens / (seconds * 8 * 989e12))
    assert first["bubble_share"] > 1 / 4  # 2 micro-batches, 2 stages: 1 of 3 slots, less the rest
    assert first["exposed_seconds"]["tp"] > 0
    assert first["exposed_seconds"]["tp"] < seconds * (1 - first["bubble_share"])
    assert run.main(options) == 0
    out = capsys.readouterr().out
    assert f"predicted   {seconds:.3g} s a step on H100, from closed forms" in out
    assert f"MFU {first['mfu']:.1%}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_step_that_cannot_be_predicted_is_a_line(capsys, monkeypatch):
    def refuse(*_):
        raise ConfigError("--pp 2 has no times; try --pp 1.")

    monkeypatch.setattr(dryrun_show.step_time, "predict", refuse)
    assert run.main(OPTIONS) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nno step time predicted: --pp 2 has no times; try --pp 1.\n")
    assert "rank 4, stage 1" in out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--hardware", "h900"], "--hardware h900 is not one of A100, H100"),
        (["--dp", "3"], "makes a mesh of 12 ranks, but there are 8; try --dp 2.\n"),
        (["--gpus", "7"], "but there are 7; try --gpus 4 or a multiple of 4.\n"),
        (["--gpus", "0"], "error: --gpus 0 must be at least 1; try --gpus 8.\n"),
        (["--ranks", "2"], "--ranks 2 starts threads, and a dry run starts none: leave it out"),
        (["--plot", "step.txt"], "--plot step.txt ends in none of .png"),
        (["--trace", "nowhere/step.json"], "--trace nowhere/step.json lies in a folder"),
    ],
)
def test_command_line_refuses(more, sentence, capsys):
    assert run.main([*OPTIONS, *more]) == 2
    assert sentence in capsys.readouterr().err


def test_help_is_of_this_command(capsys):
    with pytest.raises(SystemExit):
        run.main(["dryrun", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: run.py dryrun ")
    told = " ".join(out.split())
    assert "Options of training that change nothing here: --steps, --lr" in told


def test_numbers_for_people(capsys):
    """One of a thing is singular; small numbers have small units; nobody sends what it receives."""
    options = ["dryrun", "--layers", "2", "--global-batch-size", "1", "--micro-batch-size", "1"]
    assert run.main([*options, "--gpus", "2", "--pp", "2", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert "tiny on 2 GPUs: 1 micro-batch of 1 sequence of 128 tokens" in out
    assert "memory as with the operators of a CPU" in out  # whose kernels know no float64
    assert "received             in 1 recv on pp.B" in out
    assert f"sent          {128 * 128 * 8 / 1024:.2f} KiB in 1 send on pp.F" in out
    assert " 0.00 " not in out
    sizes = [dryrun_show._size(n) for n in (0, 20, 2**20, 3 * 2**29)]
    assert sizes == ["       0 B", "      20 B", "    1.00 MiB", "    1.50 GiB"]


def test_pictures_of_the_step(tmp_path, capsys):
    """A Chrome trace in microseconds, to the end of the last action."""
    pytest.importorskip("matplotlib")
    trace, plot = tmp_path / "step.json", tmp_path / "step.png"
    assert run.main([*OPTIONS, "--json", "--trace", str(trace), "--plot", str(plot)]) == 0
    told = json.loads(capsys.readouterr().out)[0]["traced"]
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    end = max(event["ts"] + event["dur"] for event in events) / 1e6
    assert 0.5 * told["step_seconds"] < end <= told["step_seconds"]
    assert {event["name"] for event in events} >= {"F0.0", "F1.1", "BW0.1", "BW1.0"}
    assert plot.stat().st_size > 1000


# ---- backward in two halves, and forward once more in the first one


def split(schedule: str, impl: str, recompute: str) -> tuple:
    layers = DENSE if schedule == "zb-h1" else DEEP
    changes = {"impl": impl, "recompute": recompute, **SMALL}
    return layers, MeshConfig(pp=2, schedule=schedule), changes


@pytest.mark.exhaustive
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v", "v-half"])
@pytest.mark.parametrize("impl", ["fused", "plain"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_split_backward_with_recomputation(schedule, impl, recompute, cfg):
    """As test_a_pipeline_is_equal_but_for_messages."""
    test_a_pipeline_is_equal_but_for_messages(*split(schedule, impl, recompute), cfg)


@pytest.mark.parametrize("as_gpu", [False, True])
def test_operations_of_split_backward_with_recomputation(as_gpu, cfg):
    """The layer's forward runs again in B, without the last matmul, which backward does not need.
    F: 2 N W and attention's 4 N T H C; B: that, less 2 N D F, as much as 2 N W for dx, and 10 N T H
    C, for flash forms the scores again; W: 2 N W. N = 4 micro-batches of 3 x 16 tokens."""
    if as_gpu:
        pytest.importorskip("triton")
    cfg = replace(cfg, **FUSED, micro_batch_size=3, recompute="full", dtype="bfloat16")
    flops = dry_run(DENSE, MeshConfig(pp=2, schedule="zb-h1"), cfg, 0, as_gpu).flops
    N, T, D = 12 * 16, 16, 32
    weights = 2 * N * (cost.matmul_parameters(DENSE) - 320 * D) // 2  # one of the two layers
    forward = weights + 4 * N * T * D
    again = forward - 2 * N * D * 72
    assert flops == {"F": forward, "B": again + weights + 10 * N * T * D, "W": weights}
