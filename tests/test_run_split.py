"""The command line with a model that is split over ranks, as users meet it."""

import pytest
from test_run import assert_same, metrics, stop_after, torchrun, train

import run

SPLITS = {  # processes and options
    "ep cp zero3": (2, ["--ep", "2", "--cp", "2", "--cp-kind", "all-gather", "--zero", "3"]),
    "cp tp sp zero3, plain": (4, ["--cp", "2", "--cp-kind", "zigzag", "--tp", "2", "--zero", "3",
                                  "--sequence-parallel", "--impl", "plain"]),
}  # fmt: skip
EXPERTS = ["--experts", "5", "--shared-experts", "1", "--balance-loss", "0.01", "--z-loss", "0.01",
           "--balance-speed", "0.001", "--router", "sigmoid"]  # fmt: skip


def levels(*marks):
    """The splits, each with its mark."""
    pairs = zip(SPLITS, marks, strict=True)
    return [pytest.param(name, marks=getattr(pytest.mark, mark)) for name, mark in pairs]


@pytest.mark.parametrize("name", levels("slow", "exhaustive"))
def test_split_models_print_the_same_curve_and_sample(name, text, tmp_path, capsys):
    """Real processes that share the model, beside one that has all of it."""
    ranks, split = SPLITS[name]
    options = [*text, "--steps", "3", "--dtype", "float64", "--dropout", "0.1", "--heads", "2"]
    options += EXPERTS if "ep" in name else []
    launched = torchrun(ranks, *options, *split, "--log-file", str(tmp_path / "many"))
    assert train(*options, "--log-file", str(tmp_path / "one")) == 0
    sample = capsys.readouterr().out.split("metrics:")[0]
    out, errors = launched.communicate(timeout=180)
    assert launched.returncode == 0, errors
    assert out.split("metrics:")[0] == sample
    assert_same(metrics(tmp_path / "many"), metrics(tmp_path / "one"), 1e-10)


def test_ranks_that_share_experts_write_together(text, capsys):
    """Each has a part of the model that the others need."""
    options = ["--ranks", "2", "--experts", "4", "--ep", "2", "--sample-tokens", "4"]
    assert train(*text, "--steps", "1", *options) == 0
    assert "the model goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_with_another_split(text, tmp_path):
    """Begun with ZeRO-3 and tensor parallelism in bfloat16, ended on one process."""
    saved = [*text, "--steps", "6", "--dtype", "bfloat16", "--save-dir", str(tmp_path / "saved")]
    begun = [*saved, "--save-every", "2", "--ranks", "4", "--tp", "2", "--zero", "3"]
    stop_after(4, begun)
    assert run.main([*saved[-2:], "--resume"]) == 0
    lines = metrics(tmp_path / "saved/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))


def test_zero_goes_on_from_a_run_that_chose_its_buckets(text, tmp_path):
    """--dp-step comes from the checkpoint, and must not stand in the way of --zero."""
    saved = ["--save-dir", str(tmp_path / "saved")]
    assert train(*text, *saved, "--steps", "2", "--ranks", "2", "--dp-step", "bucketed") == 0
    assert run.main([*saved, "--resume", "--steps", "4", "--ranks", "2", "--zero", "1"]) == 0
