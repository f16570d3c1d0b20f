"""The command line as users meet it: training, resuming, wrong options, killed processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
from picotron_lab import checkpoint, state
from picotron_lab.cases import cases
from picotron_lab.config import MeshConfig
from picotron_lab.lab import run_ranks
from picotron_lab.trainer import Trainer

ROOT = Path(__file__).parent.parent
SMALL = [
    "--hidden-size", "16", "--heads", "2", "--kv-heads", "1", "--ffn-size", "24", "--layers", "1",
    "--sequence-length", "8", "--global-batch-size", "12", "--micro-batch-size", "1",
    "--warmup-steps", "2", "--sample-tokens", "4", "--validation-fraction", "0.1",
]  # fmt: skip


def metrics(path):
    """The lines of metrics.jsonl without what a clock or a meter says."""
    drop = {"tokens_per_second", "peak_memory_bytes", "sent_bytes", "mfu"}
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def assert_same(found, expected, rel):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=rel)


def train(*options):
    return run.main([*SMALL, *options])


def torchrun(ranks, *options, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += [*more.pop("launcher", []), "run.py", *SMALL, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


# ---- training


def test_a_new_user_sees_metrics_and_a_sample(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(*text, "--steps", "3") == 0
    out = capsys.readouterr().out
    assert "the model goes on from the held-out text" in out
    path = out.rsplit("metrics: ", 1)[1].strip()
    assert [line["step"] for line in metrics(path)] == [0, 1, 2]
    assert metrics(path)[-1]["validation_loss"] > 0


def test_threads_and_processes_print_the_same_curve(text, tmp_path):
    options = [*text, "--steps", "6", "--dtype", "float64", "--dropout", "0.1"]
    assert train(*options, "--log-file", str(tmp_path / "one")) == 0
    process = torchrun(2, *options, "--dp", "2", "--log-file", str(tmp_path / "processes"))
    for n in (3, 4):
        assert train(*options, "--ranks", str(n), "--log-file", str(tmp_path / f"threads{n}")) == 0
    assert process.wait(120) == 0, process.stderr.read()
    for name in ("threads3", "threads4", "processes"):
        assert_same(metrics(tmp_path / name), metrics(tmp_path / "one"), 1e-10)


@pytest.mark.exhaustive
def test_two_launchers(text, tmp_path):
    """Two nodes of one rank each that meet on loopback; test_run_split.py has 4 processes."""
    options = [*text, "--steps", "6", "--dtype", "float64", "--dp", "2"]
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29741"]
    nodes = [
        torchrun(1, *options, "--log-file", str(tmp_path / "nodes"), launcher=meet)
        for _ in range(2)
    ]
    assert train(*options, "--ranks", "2", "--log-file", str(tmp_path / "one")) == 0
    for node in nodes:
        assert node.wait(180) == 0, node.stderr.read()
    assert_same(metrics(tmp_path / "nodes"), metrics(tmp_path / "one"), 1e-10)


# ---- resuming


def test_resume_continues_exactly(text, tmp_path):
    """10 steps at once; 10 steps in three parts on 4 ranks, 2 ranks and one process."""
    whole = [*text, "--steps", "10", "--dtype", "float64", "--dropout", "0.1"]
    assert train(*whole, "--log-file", str(tmp_path / "whole")) == 0
    saved = [*whole, "--save-dir", str(tmp_path / "saved"), "--save-every", "3"]
    stop_after(4, [*saved, "--ranks", "4"])
    stop_after(7, [*saved, "--ranks", "2", "--resume"])
    assert run.main(["--save-dir", str(tmp_path / "saved"), "--resume"]) == 0  # options are kept
    assert_same(metrics(tmp_path / "saved/metrics.jsonl"), metrics(tmp_path / "whole"), 1e-10)


def stop_after(step, options):
    """Interrupt training when the metrics of `step` are written, as Ctrl-C would."""
    from picotron_lab.log import Log

    class Interrupting(Log):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("picotron_lab.session.Log", Interrupting)
        assert train(*options) == 130


def test_one_mesh_resumes_to_the_last_bit(text, tmp_path):
    options = [*text, "--steps", "6", "--dtype", "bfloat16", "--ranks", "2", "--impl", "fused"]
    assert train(*options, "--log-file", str(tmp_path / "whole")) == 0
    saved = [*options, "--save-dir", str(tmp_path / "saved"), "--save-every", "2"]
    stop_after(2, saved)
    assert train(*saved, "--resume") == 0
    assert metrics(tmp_path / "saved/metrics.jsonl") == metrics(tmp_path / "whole")


def test_resume_with_nothing_there_starts(text, tmp_path):
    options = [*text, "--steps", "1", "--save-dir", str(tmp_path / "new"), "--resume"]
    assert train(*options) == 0
    assert checkpoint.latest(tmp_path / "new").name == "step-00000001"


# ---- losing a rank


def children_of(pid):
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(p) for p in listing.stdout.split()]


def wait_for(condition, seconds=90, pause=0.05):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(pause)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("training", marks=pytest.mark.slow),  # left to CI
        pytest.param("saving", marks=pytest.mark.exhaustive),  # to a run after a change
    ],
)
def test_killed_rank_ends_all_and_the_next_start_goes_on(text, tmp_path, moment):
    saved, every = tmp_path / "saved", {"training": "5", "saving": "1"}[moment]
    options = [*text, "--steps", "100000", "--save-dir", str(saved), "--save-every", every]
    options += ["--timeout", "20"]
    process = torchrun(2, *options)
    wait_for(lambda: checkpoint.latest(saved) is not None)
    if moment == "saving":
        wait_for(lambda: list(saved.glob("*.partial")), pause=0.0)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 1" in errors and "error: rank" in errors
    newest = checkpoint.latest(saved)
    done = checkpoint.read_manifest(newest).step
    assert run.main(["--save-dir", str(saved), "--resume", "--steps", str(done + 2)]) == 0
    steps = [line["step"] for line in metrics(saved / "metrics.jsonl")]
    assert steps == list(range(done + 2))


# ---- sentences


def failing(capsys, *arguments):
    assert run.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_wrong_options_end_with_a_sentence_and_code_2(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    wrong = {
        ("--stesp", "3"): "did you mean --steps?",
        ("--steps", "many"): "invalid int value: 'many'",
        ("--model", "huge"): "--model huge is not one of tiny, small",
        ("--global-batch-size", "10", "--micro-batch-size", "4"): "try --global-batch-size 8",
        ("--dp", "4"): "but there are 1",
        ("--ranks", "2", "--dp", "3"): "but there are 2",
        ("--ranks", "0"): "--ranks 0 must be at least 1",
        ("trian",): "did you mean train?",
        ("",): "see --help",
        ("--lr", "nan"): "--lr nan must lie between",
        ("--save-dir", ""): "--save-dir was given an empty value",
        ("--save-dir", "empty.txt"): "--save-dir needs a folder that can be written to",
        ("--cache-dir", "empty.txt/x"): "--cache-dir needs a folder that can be written to",
        ("--log-file", "empty.txt/x"): "--log-file needs a folder that can be written to",
        ("--data", "x" * 5000): "File name too long",
        ("--data", "nowhere.txt"): "nowhere.txt",
        ("--data", "empty.txt"): "empty.txt",
        ("--vocab-size", "100", *text): "--vocab-size 100",
        ("--tokenizer", "words"): "words",
        ("--resume",): "--resume without a folder",
        ("--resume", "nowhere"): "nowhere",
        ("verify", "--fast"): "--fast",
        ("--zero", "1"): "--zero 1 shares weights out among data-parallel ranks",
        ("--ranks", "2", "--sequence-parallel"): "try --tp 2 on 2 ranks",
        ("--ranks", "3", "--tp", "2"): "but there are 3; try 2 ranks or a multiple of 2",
        ("--ranks", "3", "--tp", "3"): "--tp 3 must divide the model's 4 attention heads",
        ("--ranks", "4", "--tp", "3"): "--tp 3 makes a mesh of 3 ranks, but there are 4",
        ("--ranks", "2", "--tp", "2", "--zero", "2"): "--zero 2 shares weights out",
        ("--ranks", "2", "--zero", "7"): "--zero 7 must lie between 0 and 3",
        ("--ranks", "2", "--tp", "0"): "--tp 0 must lie between 1",
        ("--recompute", "most"): "--recompute most is not one of none, selective, full",
        ("export", "--hf", "x"): "--checkpoint",
        ("import", "--hf", "nowhere", "--save-dir", "y"): "nowhere",
    }
    for arguments, sentence in wrong.items():
        assert sentence in failing(capsys, *arguments), arguments


def test_a_run_is_never_overwritten(text, tmp_path, capsys):
    options = [*SMALL, *text, "--steps", "2"]
    assert run.main([*options, "--save-dir", str(tmp_path / "a")]) == 0
    assert run.main([*options, "--log-file", str(tmp_path / "log")]) == 0
    capsys.readouterr()
    sentence = failing(capsys, *options, "--save-dir", str(tmp_path / "a"))
    assert "already holds step-00000002: add --resume" in sentence
    assert "already exists" in failing(capsys, *options, "--log-file", str(tmp_path / "log"))
    again = failing(capsys, "--save-dir", str(tmp_path / "a"), "--resume")
    assert "--steps 2 is already reached" in again


def test_a_resumed_run_keeps_its_model_and_optimizer(text, tmp_path, capsys):
    saved = tmp_path / "saved"
    assert train(*text, "--steps", "2", "--layers", "2", "--save-dir", str(saved)) == 0
    capsys.readouterr()
    wrong = {
        ("--layers", "1"): "layers is 1, but in step-00000002 it is 2",
        ("--tied",): "tied is True",
        ("--heads", "4"): "heads is 4",
        ("--vocab-size", "512"): "vocab_size is 512",
        ("--optimizer", "sgd"): "--optimizer sgd cannot go on",
        ("--tokenizer", "bpe:300"): "--tokenizer bpe:300 would give the tokens",
        ("--ranks", "5"): "--global-batch-size 12",
    }
    go_on = ["--save-dir", str(saved), "--resume", "--steps", "9"]
    for options, sentence in wrong.items():
        assert sentence in failing(capsys, *go_on, *options), options


def test_two_runs_are_never_mixed(text, tmp_path, capsys):
    saved = tmp_path / "saved"
    options = [*SMALL, *text, "--steps", "4", "--save-every", "2", "--save-dir", str(saved)]
    assert run.main(options) == 0
    capsys.readouterr()
    old = str(saved / "step-00000002")
    branch = ["--resume", old, "--seed", "7", "--save-dir"]
    assert "would mix two runs" in failing(capsys, *branch, str(saved))
    assert run.main([*branch, str(tmp_path / "branch")]) == 0
    assert "changed options: --seed 0 -> 7" in capsys.readouterr().out


def test_a_run_keeps_the_tokenizer_that_it_began_with(tmp_path, capsys):
    """A text that is added later would train another one."""
    folder, saved, hf = tmp_path / "texts", tmp_path / "saved", tmp_path / "hf"
    folder.mkdir()
    (folder / "a.txt").write_text("ranks meet in collectives; a ledger counts every byte. " * 20)
    options = ["--data", str(folder), "--cache-dir", str(tmp_path / "cache")]
    options += ["--tokenizer", "bpe:290", "--save-dir", str(saved)]
    assert train(*options, "--steps", "2") == 0
    first = (saved / "tokenizer.json").read_text()
    (folder / "b.txt").write_text("quite another vocabulary, with zebras and quizzes " * 40)
    assert train(*options, "--steps", "4", "--resume") == 0
    assert (saved / "tokenizer.json").read_text() == first
    manifest = checkpoint.read_manifest(saved / "step-00000004")
    assert manifest.meta["train"]["tokenizer_file"] == str(saved / "tokenizer.json")
    assert run.main(["export", "--checkpoint", str(saved), "--hf", str(hf)]) == 0
    assert (hf / "tokenizer.json").read_text() == first


def test_a_step_with_no_number_is_not_taken(text, tmp_path, capsys):
    """The newest checkpoint must stay one that can go on."""
    saved = tmp_path / "saved"
    wild = ["--lr", "10000", "--warmup-steps", "0", "--clip", "0", "--optimizer", "sgd"]
    options = [*wild, "--steps", "50", "--save-every", "1", "--save-dir", str(saved)]
    assert train(*text, *options) == 1
    assert "try a lower --lr" in capsys.readouterr().err
    manifest = checkpoint.read_manifest(checkpoint.latest(saved))
    assert all(torch.isfinite(checkpoint.read_full(manifest, n)).all() for n in manifest.tensors)
    for line in (saved / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line


@pytest.mark.parametrize("ranks", [1, 3])
def test_float32_goes_on_from_the_master_weights(text, tmp_path, ranks):
    """A bf16 run goes on in float32 from what its optimizer stepped, not from rounded copies."""
    saved = tmp_path / "saved"
    options = [*text, "--dtype", "bfloat16", "--steps", "2", "--save-dir", str(saved)]
    assert train(*options, "--ranks", str(ranks)) == 0
    manifest = checkpoint.read_manifest(checkpoint.latest(saved))

    def weights(world):
        cfg = dataclasses.replace(state.options_of(manifest), dtype="float32")
        trainer = Trainer(state.model_of(manifest), MeshConfig(), cfg, world)
        state.load(trainer, manifest)
        return {p.record.name: p.detach() for p in trainer.parameters}

    for name, weight in run_ranks(weights, 1)[0].items():
        assert torch.equal(weight, checkpoint.read_full(manifest, f"master/{name}")), name


def test_damaged_checkpoint_is_refused_and_a_good_one_offered(text, tmp_path, capsys):
    saved = tmp_path / "a"
    options = [*SMALL, *text, "--steps", "4", "--save-every", "2", "--save-dir", str(saved)]
    assert run.main(options) == 0
    capsys.readouterr()
    damaged = next((saved / "step-00000004").glob("*.safetensors"))
    contents = bytearray(damaged.read_bytes())
    contents[-7] ^= 1
    damaged.write_bytes(contents)
    sentence = failing(capsys, "--save-dir", str(saved), "--resume", "--steps", "9")
    assert damaged.name in sentence and "step-00000002" in sentence
    damaged.unlink()
    assert damaged.name in failing(capsys, "--save-dir", str(saved), "--resume", "--steps", "9")
    good = str(saved / "step-00000002")
    assert run.main(["--resume", good, "--steps", "3", "--save-dir", str(tmp_path / "b")]) == 0


@pytest.mark.slow
def test_wrong_option_under_torchrun_is_said_once(text):
    process = torchrun(2, *text, "--dp", "3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("error: --dp 3") == 1


def test_sentence_without_traceback_from_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "run.py", "--stesp", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == "error: unrecognized arguments: --stesp 3; did you mean --steps?\n"


def test_help_shows_a_slurm_job(capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "#SBATCH" in out and "--nnodes" in out


# ---- Hugging Face


def test_export_and_import_round_trip(text, tmp_path):
    saved, folder, back = (str(tmp_path / name) for name in ("saved", "hf", "back"))
    assert train(*text, "--steps", "2", "--save-dir", saved) == 0
    assert run.main(["export", "--checkpoint", saved, "--hf", folder]) == 0
    assert run.main(["import", "--hf", folder, "--save-dir", back]) == 0
    options = [*text, "--steps", "2", "--sequence-length", "8", "--sample-tokens", "0"]
    assert run.main([*options, "--save-dir", back, "--resume"]) == 2  # which tokenizer?
    options += ["--tokenizer", "bytes"]
    assert run.main([*options, "--save-dir", back, "--resume"]) == 0
    first = metrics(Path(back) / "metrics.jsonl")[0]["loss"]
    before = metrics(Path(saved) / "metrics.jsonl")[0]["loss"]
    assert first < before, "the imported model has learned something already"


# ---- verify


@pytest.mark.slow
def test_verify_prints_a_table_and_json(capsys, monkeypatch):
    """Every ninth row as JSON, a few as a table."""
    monkeypatch.setattr(run, "cases", lambda: cases()[::9])
    assert run.main(["verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(run, "cases", lambda: cases()[:3])
    assert run.main(["verify"]) == 0
    assert capsys.readouterr().out.count("\nok ") == 3
    assert len(rows) >= 9
    assert all(row["good"] and row["deviation"] <= row["limit"] for row in rows)
