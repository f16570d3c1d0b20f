"""`run.py schedule` as users meet it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parent.parent


def schedule(capsys, *options):
    assert run.main(["schedule", *options]) == 0
    return capsys.readouterr().out


def test_torch_stays_away():
    # nor matplotlib, unless something is drawn
    code = (
        "import sys, run\n"
        "run.main(['schedule', '1f1b', '--pp', '8', '--microbatches', '64', '--json'])\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'too much is imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["makespan"] == (64 + 7) * 3


def test_the_table(capsys):
    lines = schedule(capsys, "zb-v").splitlines()
    assert lines[0] == "zb-v: 4 ranks, 8 micro-batches"
    assert lines[1].split() == ["makespan", "51"]
    assert "3, 5.88% of the makespan, 6.25% of the busiest rank's work" in lines[2]
    assert lines[-4].startswith("0     0 7     8             8        F0.0 F0.1 F0.2")
    assert max(map(len, lines)) <= 100


def test_json(capsys):
    told = json.loads(
        schedule(capsys, "interleaved", "--pp", "2", "--microbatches", "4", "--virtual-stages", "3",
                 "--cost", "F=2,B=3,W=1,transfer=0.5", "--json")
    )  # fmt: skip
    assert told["placement"] == [[0, 2, 4], [1, 3, 5]]
    assert told["order"][0][:3] == ["F0.0", "F0.1", "F2.0"]
    assert told["ends"][1][0] == 2 + 0.5 + 2
    told = json.loads(schedule(capsys, "seq1f1b", "--token-slices", "2", "--json"))
    assert told["order"][0][1] == "F0.0/1"
    told = json.loads(schedule(capsys, "dualpipe", "--cost", "pair=2", "--json"))
    assert any("&" in item for item in told["order"][0])
    told = json.loads(schedule(capsys, "1f1b-vocab2", "--json"))
    assert {"IF.0", "S.0", "T.0", "IB.0"} <= set(told["order"][3])


def test_searched(capsys):
    options = ["--pp", "4", "--microbatches", "8", "--stage-factors", "1,1,2,1", "--json"]
    best = json.loads(schedule(capsys, "auto", *options, "--memory-limit", "4"))
    hand = json.loads(schedule(capsys, "1f1b", *options))
    assert best["makespan"] < hand["makespan"]
    assert max(best["peak_until_W"]) <= 4
    both = json.loads(schedule(capsys, "auto", "--vocab-parallel", "2", "--json"))
    assert "S.0" in both["order"][0]


def test_picture_and_trace(capsys, tmp_path):
    picture, trace = tmp_path / "picture.svg", tmp_path / "trace.json"
    schedule(capsys, "1f1b", "--plot", str(picture), "--trace", str(trace))
    assert "<svg" in picture.read_text()
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("1f1c", "schedule '1f1c' is unknown: choose one of afab, 1f1b, "),
        ("1f1b --pp 0", "--pp 0 is too small for 1f1b: give 1 or more."),
        ("1f1b --microbatches -3", "--microbatches -3 is too small for 1f1b: give 1 or more."),
        ("zb-v --virtual-stages 3", "--virtual-stages 3 "),
        ("1f1b-interlaced --token-slices 2", "--token-slices 2 "),
        ("interleaved --microbatches 9", "--pp 4 --microbatches 9: interleaved "),
        ("dualpipe --microbatches 6", "--pp 4 --microbatches 6: dualpipe "),
        ("1f1b --cost F=fast", "--cost 'F=fast' needs a name of F, B, "),
        ("1f1b --stage-factors 1,2", "--stage-factors 1,2: 2 factors do not fit 4 stages: give "),
        ("1f1b --stage-factors 1,x", "--stage-factors 1,x needs numbers with commas between them"),
        ("1f1b --slice-factors 1,2", "--slice-factors 1,2: 2 factors do not fit 1 slices: give "),
        ("1f1b --memory-limit 2", "--memory-limit 2: 1f1b, rank 0: F0.2 makes the rank hold 3 "),
        ("auto --memory-limit 0.5", "--memory-limit 0.5 is too small for auto: give 1 or more, "),
        ("1f1b --vocab-parallel 2", "--vocab-parallel 2 does not fit 1f1b: choose auto, or "),
        ("1f1b --plot picture.jpx", "--plot picture.jpx ends in none of .png, .svg, .pdf: try "),
        ("1f1b --trace no/such/folder.json", "no/such/folder.json: No such file or directory"),
        ("1f1b --microbatch 4", "unrecognized arguments: --microbatch 4; did you mean --micro"),
        ("", "the following arguments are required: NAME"),
    ],
)
def test_one_sentence_for_a_mistake(capsys, options, sentence):
    assert run.main(["schedule", *options.split()]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {sentence}")
    assert told.err.count("\n") == 1 and not told.out


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        run.main(["schedule", "--help"])
    assert done.value.code == 0
    assert "--virtual-stages" in capsys.readouterr().out
