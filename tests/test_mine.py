"""run.py --mine: the code of lessons trains a model. The solutions stand for a student's code."""

from pathlib import Path

import pytest

import run
from lessons import mine
from picotron_lab.config import ConfigError

HERE = Path(__file__).parent
SOLUTIONS = HERE / "solutions"
TOGETHER = ["03", "04", "05", "06", "07", "08", "09", "12", "03,05", "05,07", "04,08", "08,12"]
QUICK, MORE = ("09", "03,05"), ("07", "12", "04,08", "08,12")
WRONG = {  # a mutant, and the step at which the curves part: a wrong gradient shows after it
    "03_data_parallel.py::cleared_before_every_microbatch": 1,
    "06_sequence_parallel.py::norms_forgotten": 1,
    "08_context_parallel.py::stays_at_home": 0,
    "12_experts.py::without_gates": 0,
}


def chosen(names, quick):
    level = {n: pytest.mark.exhaustive if n in MORE else pytest.mark.slow for n in names}
    return [pytest.param(n, marks=() if n in quick else level[n]) for n in names]


@pytest.mark.parametrize("numbers", chosen(TOGETHER, QUICK))
def test_one_curve(numbers, tmp_path, capsys):
    options = ["--ranks", "4", "--mine", numbers, "--steps", "3", "--exercises", str(SOLUTIONS)]
    assert run.main([*options, "--plot", str(tmp_path / "mine.png")]) == 0
    assert "one curve" in capsys.readouterr().out
    assert (tmp_path / "mine.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", chosen(WRONG, list(WRONG)[:1]))
def test_a_wrong_program_leaves_the_curve(name, tmp_path, capsys):
    todo = mine.plan([name[:2]], 4, 3, 0.5, SOLUTIONS)
    todo.files[name[:2]] = str(HERE / "lesson_mutants" / name)
    told = mine.tell(mine.one_device(todo), mine.on_ranks(todo), todo, tmp_path / "mine.png")
    assert told == 1
    assert f"they part at step {WRONG[name]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "ranks", "sentence"),
    [
        ("01", 4, "--mine 01 has no code that trains a model"),
        ("03,04", 4, "--mine 03,04 cannot be tried together"),
        ("03,05", 3, "--ranks 3 cannot be shared out evenly over dp and tp"),
        ("03", 3, "take 2 or 4"),
    ],
)
def test_what_is_refused(numbers, ranks, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mine.plan(numbers.split(","), ranks, 3, 0.5, SOLUTIONS)


def test_sentences_of_the_command_line(tmp_path, capsys):
    folder = tmp_path / "03_data_parallel"
    folder.mkdir()
    stub = HERE.parent / "lessons" / "03_data_parallel" / "stub.py"
    (folder / "exercise.py").write_text(stub.read_text())
    assert run.main(["--mine", "03", "--exercises", str(tmp_path)]) == 2
    assert "task 03.3 is not started" in capsys.readouterr().err
    assert run.main(["--mine", "05", "--exercises", str(tmp_path)]) == 2
    assert "0 files for lesson 05" in capsys.readouterr().err
    (folder / "exercise.py").write_text("class Silent:\n    pass\n")
    assert run.main(["--mine", "03", "--exercises", str(tmp_path)]) == 2
    assert "your code of lesson 03 raised TypeError" in capsys.readouterr().err
    for plot in ("no/mine.png", "mine.xyz"):
        assert run.main(["--mine", "03", "--plot", plot]) == 2
        assert f"--plot {plot} must end in .png" in capsys.readouterr().err
    assert run.main(["--mine", "03", "--steps", "0"]) == 2
    assert "--steps 0 trains nothing" in capsys.readouterr().err
    assert run.main(["--mine"]) == 2
    assert "expected one argument" in capsys.readouterr().err
