"""The lesson kit, tried on a lesson made up for it: how a task ends, rules, mutants."""

import os
import textwrap
from pathlib import Path

import pytest
from lesson_programs import DOUBLE, MEAN, SOLVED, STUB, tried, write_lesson

from lessons.kit import grading, tasks


@pytest.fixture
def folder(tmp_path) -> Path:
    """A lesson that is not started, in a folder of lessons."""
    return write_lesson(tmp_path / "lessons")


# ---- how a task ends


def test_right_answer_gets_all_points_and_the_place_to_compare(folder):
    result = tried(folder, MEAN + DOUBLE)
    assert (result.status, result.points, result.max_points) == ("passed", 5, 5)
    assert result.lines[:3] == (
        "mean: equal to the reference", "calls: 1 = one", "bytes: 40 (at most 40 = 8 N)"
    )  # fmt: skip
    assert result.lines[3].startswith("compare with picotron_lab/comm.py, lines ")


def test_virtual_seconds_are_reported(folder):
    assert tried(folder, MEAN + DOUBLE, "03.2").status == "passed"


def test_answer_runs_on_real_processes(folder):
    assert tried(folder, MEAN, as_processes=True).status == "passed"
    wrong = tried(folder, "def mean(x, axis):\n    return x[99]", as_processes=True)
    assert wrong.status == "failed" and "exercise.py:4  return x[99]" in wrong.message


def test_stub_is_not_started_and_waits_for_another(folder):
    assert tried(folder, STUB).status == "todo"
    assert tried(folder, STUB).message == "not started"
    other = tried(folder, "def mean(x, axis):\n    raise TODO('02.4')")
    assert (other.status, other.message) == ("todo", "waits for 02.4")


def test_wrong_answer_is_told_what_ran_seen_expected_likely_and_hint(folder):
    result = tried(folder, "def mean(x, axis):\n    return axis.all_reduce(x)", seed=4)
    assert (result.status, result.points) == ("failed", 0)
    rows = [line.split(maxsplit=1) for line in result.message.splitlines()]
    assert [row[0] for row in rows] == ["ran", "seen", "expected", "likely", "hint:"]
    assert rows[0][1] == "averaged on 3 ranks, seed 4"
    assert "mean of rank 0 at [0] is" in rows[1][1] and "5 of 5 numbers differ" in rows[1][1]
    assert rows[3][1].startswith("exactly 3 times the reference, and the axis has 3 ranks: a sum")
    assert rows[4][1] == "python -m lessons hint 03.1"


def test_broken_budget_is_told_with_formula_and_reason(folder):
    result = tried(folder, "def mean(x, axis):\n    axis.all_reduce(x)\n" + MEAN[19:])
    assert result.status == "failed" and "right     mean: equal" in result.message
    assert "calls: 2" in result.message and "1 = one" in result.message
    assert "likely    once!" in result.message


def test_exception_is_told_with_rank_and_lines_innermost_first(folder):
    text = """
        def half(x):
            return x / {}
        def mean(x, axis):
            return half(x) if axis.rank == 2 else axis.all_reduce(x)
        """
    message = tried(folder, text).message
    assert "TypeError on rank 2: " in message
    rows = [line for line in message.splitlines() if line.startswith("at ")]
    assert rows == [
        "at        exercise.py:5  return x / {}",
        "at        exercise.py:7  return half(x) if axis.rank == 2 else axis.all_reduce(x)",
    ]


def test_deadlock_is_told_by_the_lab(folder):
    result = tried(folder, "def mean(x, axis):\n    return axis.recv(x, (axis.rank + 1) % 3)")
    assert "no rank can make progress: rank 0 waits in recv #1" in result.message


def test_endless_loop_is_ended_and_its_prints_are_kept(folder):
    result = tried(folder, "def mean(x, axis):\n    print('here I am')\n    while True: pass")
    assert "no answer after 3 s" in result.message
    assert result.printed == "here I am\n"


def test_many_prints_are_shortened(folder):
    text = "def mean(x, axis):\n    print('a' * 9000)\n    return axis.all_reduce(x) / 3"
    result = tried(folder, text)
    assert result.status == "passed" and "characters left out" in result.printed
    assert len(result.printed) < 5000


def test_death_of_the_process_is_told(folder):
    text = "import ctypes\ndef mean(x, axis):\n    ctypes.string_at(0)"
    result = tried(folder, text, rules=False)
    assert "the process of the ranks died (exit code -11)" in result.message


def test_objects_of_the_exercise_cannot_come_back(folder):
    text = "class Mine:\n    pass\ndef double(xs):\n    return Mine()"
    assert "holds an object of exercise.Mine" in tried(folder, text, "03.2").message


def test_value_of_another_form_is_told(folder):
    message = tried(folder, "def mean(x, axis):\n    return None").message
    assert "seen      mean of rank 0 is None" in message
    assert "does every path end in a return" in message


def test_ranks_share_no_names_of_the_exercise(folder):
    text = """
        SHARED = {}
        def mean(x, axis):
            SHARED[axis.rank] = x
            axis.barrier()
            return sum(SHARED.values()) / axis.size
        """
    result = tried(folder, text)
    assert result.status == "failed" and "1/3 of" not in result.message
    assert "seen      mean of rank 0 at [0] is" in result.message


def test_ranks_share_no_default_values_and_no_classes(folder):
    text = """
        class Box:
            seen = []
        def mean(x, axis, seen=[]):
            seen.append(x)
            Box.seen.append(x)
            axis.barrier()
            assert len(seen) == len(Box.seen) == 1, (len(seen), len(Box.seen))
            return axis.all_reduce(x) / axis.size
        """
    assert tried(folder, text).status == "passed"


def test_what_a_function_returned_is_told_where_the_check_cannot_use_it(folder):
    text = "def double(xs: list) -> list:\n    pass"
    tests = folder / "test_tiny.py"
    used = tests.read_text().replace("return student.double(", "return 1 + student.double(")
    tests.write_text(used)
    message = tried(folder, text, "03.2").message
    assert "double returned None, where its signature says list" in message
    assert "test_tiny.py" not in message and "child.py" not in message
    silent = tried(folder, "def double(xs):\n    return None", "03.2").message
    assert "the check could not use what it returned: TypeError" in silent


def test_lines_of_the_check_are_not_shown(folder):
    tests = folder / "test_tiny.py"
    tests.write_text(tests.read_text().replace('"lists", run.values', '"lists", run.values[9]'))
    message = tried(folder, MEAN + DOUBLE, "03.2").message
    assert "the check could not use what it returned: IndexError" in message
    assert "test_tiny.py" not in message


def test_formula_that_is_the_number_itself_is_said_once(folder):
    tests = folder / "test_tiny.py"
    tests.write_text(tests.read_text().replace('formula="one"', 'formula="1"'))
    assert tried(folder, MEAN).lines[1] == "calls: 1"
    twice = "def mean(x, axis):\n    return (axis.all_reduce(x) + axis.all_reduce(x)) / 6"
    assert "expected  1\n" in tried(folder, twice).message


def test_debug_runs_in_this_process(folder, capfd):
    text = "import os\ndef mean(x, axis):\n    print(os.getpid())\n    return x"
    result = tried(folder, text, debug=True, rules=False)
    assert result.status == "failed" and result.printed == ""
    assert capfd.readouterr().out.split() == [str(os.getpid())] * 3


# ---- rules


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import torch.distributed as dist", "import of torch.distributed: that import is"),
        ("from torch.nn.parallel import DistributedDataParallel", "that import is the answer"),
        (
            "from picotron_lab.data_parallel import x",
            "the answer; this lesson gives you",
        ),
        ("import requests", "import of requests: a lesson needs only torch, numpy, einops"),
        ("import os", "import of os: a lesson needs only"),
        ("from random import _os", "import of random._os: a lesson needs only"),
        ("import contextlib\ny = contextlib.sys.modules", "sys: that leads out of the exercise"),
        ("from torch.utils import checkpoint", "checkpoint: that import is the answer"),
        ("f = open('x')", "open: an exercise needs no other code, files or names"),
        ("y = eval('1')", "eval: an exercise needs no other code"),
        ("torch.distributed.init()", "torch.distributed.init: that is the answer"),
        ("def f(axis):\n    axis.ledger.clear()", "axis.ledger: that is what measures you"),
        ("def f(:", "line 3 of exercise.py is not Python"),
        ("from picotron_lab.comm import Axis\nAxis.now = 1", "Axis.now is changed: what is import"),
        ("torch.mine = {}", "torch.mine is changed"),
        ("torch.mine += 1", "torch.mine is changed"),
        ("del torch.nn.Linear", "torch.nn.Linear is changed"),
        ("for torch.mine in range(3):\n    pass", "torch.mine is changed"),
        ("with open_it() as torch.mine:\n    pass", "torch.mine is changed"),
        ("a, (torch.mine, b) = 1, (2, 3)", "torch.mine is changed"),
        ("import torch.nn.functional as F\nF.x['a'] = 1", "F.x['a'] is changed"),
        ("def f(axis):\n    type(axis).now = 1", "type(axis).now is changed"),
        ("def f(axis):\n    axis.__class__.now = 1", "axis.__class__.now is changed"),
        ("vars(torch)", "vars: write the attribute's name itself"),
        ("getattr(torch, 'x')", "getattr: write"),
        ("setattr(torch, 'x', 1)", "setattr: write"),
        ("delattr(torch, 'x')", "delattr: write"),
    ],
)
def test_rules_refuse_before_anything_runs(folder, text, sentence):
    result = tried(folder, text)
    assert result.status == "refused" and result.points == 0
    assert sentence in result.message and result.message.startswith("line ")


def test_rules_allow_what_a_lesson_needs(folder):
    text = """
        import math, collections, dataclasses, itertools
        from dataclasses import dataclass
        import torch.nn.functional as F
        from torch import nn
        from einops import rearrange
        from picotron_lab.comm import Axis
        class Own(nn.Module):
            def __init__(self):
                self.mine, self.table = 1, {}
                self.table["a"] = torch.zeros(3)
                self.table["a"][0] = 2.0
        """
    assert tried(folder, textwrap.dedent(text) + MEAN).status == "passed"


# ---- mutants


def test_mutant_replaces_names_of_a_solution(folder, tmp_path):
    for name in ("solutions", "lesson_mutants"):
        (tmp_path / name).mkdir()
    (tmp_path / "solutions" / "03_tiny.py").write_text(SOLVED)
    path = tmp_path / "lesson_mutants" / "03_tiny.py"
    path.write_text(
        "from lessons.kit import mutant\n"
        "@mutant('03.1', 'a sum where a mean belongs')\n"
        "def sum_instead(solution):\n"
        "    def mean(x, axis):\n"
        "        return solution.mean(x, axis) * axis.size\n"
        "    return {'mean': mean}\n"
    )
    chapter = tasks.read_chapter(folder)
    how = grading.how(f"{path}::sum_instead")
    found = [grading.run_task(chapter, task, how) for task in chapter.tasks]
    assert [result.status for result in found] == ["failed", "passed"]
    assert "a sum where a mean belongs" in found[0].message
    with pytest.raises(tasks.BadUse, match="has no mutant other; it has sum_instead"):
        tasks.load(f"{path}::other")
