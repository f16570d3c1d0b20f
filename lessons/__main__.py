"""python -m lessons: where you stand, and what to do next.

    python -m lessons                    where am I
    python -m lessons check 03           one lesson, or one task: 03.2
    python -m lessons hint 03.2          the next hint, three levels
    python -m lessons watch              check again whenever an exercise.py is saved
    python -m lessons reset 03           put the stub back; your file is kept
    python -m lessons pack               a zip of your exercises
    python -m lessons grade              points of all lessons as results.json
Exit code 0: all that was checked passed; 1: not all; 2: the command was wrong.
"""

import argparse
import os
import sys
from pathlib import Path

from lessons.kit import commands, server
from lessons.kit.tasks import LESSONS, BadUse


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    args.command = args.command or "status"
    if args.command in ("check", "watch", "grade"):
        server.start()  # it imports torch while this process reads
    try:
        code = getattr(commands, args.command)(args)
        sys.stdout.flush()
        return code
    except BadUse as sentence:
        print(sentence, file=sys.stderr)
        return 2
    except BrokenPipeError:  # of a reader such as head, who has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped.")
        return 0 if args.command == "watch" else 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lessons", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--lessons", type=Path, default=LESSONS, help="the folder of the lessons")
    add = parser.add_subparsers(dest="command", metavar="COMMAND").add_parser
    add("status", help="where am I")
    check = add("check", help="check a lesson or a task")
    check.add_argument("what", help="a lesson such as 03, or a task such as 03.2")
    check.add_argument("--seed", type=int, default=1, help="of sizes, values and order of turns")
    check.add_argument("--exercise", help="another file than the lesson's exercise.py")
    check.add_argument("--as-processes", action="store_true", help="ranks are real processes")
    check.add_argument("--debug", action="store_true", help="in this process: for breakpoint()")
    hint = add("hint", help="the next hint for a task")
    hint.add_argument("what", help="a task such as 03.2")
    hint.add_argument("--yes", action="store_true", help="level 3 too, without a question")
    watch = add("watch", help="check again whenever an exercise.py is saved")
    watch.add_argument("what", nargs="?", help="only this lesson")
    add("reset", help="put the stub back").add_argument("what", help="a lesson such as 03")
    pack = add("pack", help="a zip of your exercises")
    pack.add_argument("--out", type=Path, default=Path("submission.zip"))
    grade = add("grade", help="points of all lessons")
    grade.add_argument("--seed", type=int, default=1, help="other numbers, other sizes")
    grade.add_argument("--out", type=Path, default=Path("results.json"))
    grade.add_argument("--submission", type=Path, help="a folder or zip to grade instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
