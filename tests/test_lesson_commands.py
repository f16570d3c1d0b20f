"""python -m lessons, tried on a lesson made up for it: what is said, kept, graded."""

import io
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from lesson_programs import DOUBLE_STUB, HEAD, MEAN, SOLVED, STUB, write_lesson

from lessons import __main__ as command

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    """A lesson that is not started, in a folder of lessons."""
    return write_lesson(tmp_path / "lessons")


def run(folder: Path, *words: str) -> int:
    return command.main(["--lessons", str(folder.parent), *words])


# ---- commands


def test_status_says_marks_points_and_what_is_next(folder, capsys):
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "03  Tiny" in out and "○○" in out and "0 of 8 points" in out
    assert "then python -m lessons check 03.1" in out


def test_reader_that_has_seen_enough_is_no_error(folder):
    words = [sys.executable, "-m", "lessons", "--lessons", str(folder.parent)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as head does
    assert process.stderr.read() == b"" and process.wait() == 0


def test_check_remembers_and_returns_an_exit_code(folder, capsys):
    (folder / "exercise.py").write_text(HEAD + MEAN + DOUBLE_STUB)
    assert run(folder, "check", "03.1") == 0
    assert run(folder, "check", "3") == 1
    assert "○ 03.2" in capsys.readouterr().out
    known = json.loads((folder.parent / ".progress.json").read_text())
    assert known["tasks"] == {"03.1": "passed", "03.2": "todo"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["check", "04"], "there is no lesson 04; the lessons are 03."),
        (["check", "03.9"], "lesson 03 has no task 03.9; its tasks are 03.1, 03.2."),
        (["hint", "03"], "lesson 03 has no task 03; its tasks are 03.1, 03.2."),
        (["check", "03", "--exercise", "none.py"], "there is no file none.py"),
    ],
)
def test_wrong_number_is_one_sentence(folder, capsys, words, sentence):
    assert run(folder, *words) == 2
    assert sentence in capsys.readouterr().err


def test_hints_come_one_by_one_and_the_last_on_request(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal
    for level in (1, 2):
        assert run(folder, "hint", "03.2") == 0
        assert f"hint 2{level}\n" in capsys.readouterr().out
    assert run(folder, "hint", "03.2") == 1
    out = capsys.readouterr().out
    assert "hint 23" not in out and "python -m lessons hint 03.2 --yes" in out
    assert run(folder, "hint", "03.2", "--yes") == 0
    assert "hint 23\n" in capsys.readouterr().out
    assert run(folder, "hint", "03.2") == 0
    assert "hint 21\n" in capsys.readouterr().out
    assert json.loads((folder.parent / ".progress.json").read_text())["hints"] == {"03.2": 3}


def test_damaged_progress_is_set_aside(folder, capsys):
    (folder.parent / ".progress.json").write_text("{half")
    assert run(folder) == 0
    assert "set aside as .progress.json.damaged" in capsys.readouterr().err
    assert (folder.parent / ".progress.json.damaged").read_text() == "{half"


def test_reset_keeps_what_was_written(folder, capsys):
    for text, aside in (("mine = 1", "exercise.py.bak"), ("mine = 2", "exercise.py.bak2")):
        (folder / "exercise.py").write_text(text)
        assert run(folder, "reset", "03") == 0
        assert aside in capsys.readouterr().out
        assert (folder / aside).read_text() == text
        assert (folder / "exercise.py").read_text() == STUB


def test_grade_writes_what_gradescope_reads(folder, tmp_path):
    (folder / "exercise.py").write_text(SOLVED)
    zipped, out = tmp_path / "mine.zip", tmp_path / "results.json"
    assert run(folder, "pack", "--out", str(zipped)) == 0
    (folder / "exercise.py").write_text(STUB)
    assert run(folder, "grade", "--out", str(out), "--submission", str(zipped)) == 0
    results = json.loads(out.read_text())
    assert results["score"] == 8 and len(results["extra_data"]["seeds"]) == 3
    first = results["tests"][0]
    assert first["number"] == "03.1" and first["name"] == "03.1 Ranks agree on the mean"
    assert (first["score"], first["max_score"], first["status"]) == (5, 5, "passed")
    assert run(folder, "grade", "--out", str(out)) == 1
    second = json.loads(out.read_text())["tests"][1]
    assert second["score"] == 0 and second["status"] == "failed"
    assert "not started" in second["output"]
    assert "python -m lessons check 03.2 --seed" in second["output"]


def test_grade_counts_a_missing_lesson_as_nothing(folder, tmp_path):
    out, empty = tmp_path / "results.json", tmp_path / "empty"
    empty.mkdir()
    assert run(folder, "grade", "--out", str(out), "--submission", str(empty)) == 1
    results = json.loads(out.read_text())
    assert results["score"] == 0
    assert "no 03_tiny/exercise.py was handed in" in results["tests"][0]["output"]


def test_zip_that_leads_out_is_refused(folder, tmp_path, capsys):
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("../03_tiny/exercise.py", SOLVED)
    assert run(folder, "grade", "--submission", str(bad), "--out", str(tmp_path / "r")) == 2
    assert "leads out of it" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_huge_exercise_in_a_zip_is_refused(folder, tmp_path, capsys):
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("03_tiny/exercise.py", " " * 2_000_000)
    assert run(folder, "grade", "--submission", str(bad), "--out", str(tmp_path / "r")) == 2
    assert "an exercise has at most 1,000,000" in capsys.readouterr().err


@pytest.mark.slow
def test_watch_checks_what_is_saved_until_interrupted(folder):
    words = [sys.executable, "-m", "lessons", "--lessons", str(folder.parent), "watch"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "save an exercise.py" in process.stdout.readline()
    (folder / "exercise.py").write_text(HEAD + MEAN + "def double(xs):\n    return xs")
    seen = [process.stdout.readline()]
    while not seen[-1].startswith("✘ 03.2"):
        assert seen[-1], seen
        seen.append(process.stdout.readline())
    assert seen[0].startswith("✔ 03.1")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0].endswith("stopped.\n")
    assert process.returncode == 0


@pytest.mark.slow
def test_child_ends_with_its_parent(folder, tmp_path):
    (tmp_path / "solutions").mkdir()  # where the import rules do not hold
    exercise, place = tmp_path / "solutions" / "endless.py", tmp_path / "pid"
    exercise.write_text(
        "import os, pathlib\n"
        "def mean(x, axis):\n"
        f"    pathlib.Path({str(place)!r}).write_text(str(os.getpid()))\n"
        "    while True: pass\n"
    )
    words = [sys.executable, "-m", "lessons", "--lessons", str(folder.parent), "check", "03.1"]
    process = subprocess.Popen([*words, "--exercise", str(exercise)], cwd=ROOT)
    while not (place.exists() and place.read_text()):
        assert process.poll() is None, "it ended before its child began"
        time.sleep(0.01)
    process.kill()
    process.wait()
    child = int(place.read_text())
    deadline = time.monotonic() + 2.5  # before its own time-out of 3 s would end it
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    """Not one that has ended and waits for its parent to notice."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.slow
def test_pytest_runs_a_lesson(folder):
    """With the plugin of lessons/conftest.py, which this folder lacks: loaded by name."""
    (folder / "exercise.py").write_text(HEAD + "def mean(x, axis):\n    return x\n" + DOUBLE_STUB)
    words = [sys.executable, "-m", "pytest", "-p", "lessons.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run([*words, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 1 skipped" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout and "seen      mean of rank 0" in done.stdout
    assert "✘ 03.1  Ranks agree on the mean" in done.stdout and "0 of 8 points" in done.stdout
