"""Predicted step times beside those that others published: how far to trust a prediction.

    python benchmarks/published.py              every row, as Markdown; a CPU, 3 minutes
    python benchmarks/published.py --summary    medians and worst errors only
    python benchmarks/published.py --json       the same as JSON
    python benchmarks/published.py --calibrate  fit the calibrated constants anew; 2 minutes

Rows      published_rows.py. Their programs are not ours: a row is our nearest run, on the fused
          path
Constants one set for all rows, Constants of analysis/layer_time.py. Some were calibrated on the
          rows marked here, at most half of each table; the other rows tell how good they are
Error     predicted / published - 1, in the unit of the table
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from common import cpu_hardware, describe, markdown

sys.path.insert(0, str(Path(__file__).parent.parent))

from published_rows import Row, Table, tables  # noqa: E402

from picotron_lab.analysis.layer_time import CONSTANTS, Constants  # noqa: E402
from picotron_lab.analysis.step_time import StepTime, predict  # noqa: E402

FAR = 0.25  # an error that needs a reason
FITTED = ("operators", "overlap", "links", "network")
FACTORS = (1.25, 1.1, 1.03)


@dataclass(frozen=True)
class Result:
    """A row and its prediction."""

    row: Row
    step: StepTime
    value: float

    @property
    def error(self) -> float:
        """Predicted / published - 1."""
        return self.value / self.row.published - 1


def result(table: Table, row: Row, constants: Constants = CONSTANTS) -> Result:
    """Predict a row."""
    step = predict(row.model, row.mesh, row.cfg, table.hardware, constants)
    return Result(row, step, table.value(step))


def summary(results: list[Result]) -> dict[str, float | int]:
    """Median of the errors without their signs, and the worst."""
    errors = [abs(r.error) for r in results]
    return {
        "rows": len(errors), "median": statistics.median(errors) if errors else math.nan,
        "worst": max(errors, default=math.nan), "far": sum(e > FAR for e in errors),
    }  # fmt: skip


def halves(results: list[Result]) -> dict[str, dict[str, float | int]]:
    """Summaries of the rows that calibrated the constants, and of the others."""
    parts = {"calibrating": True, "others": False}
    return {
        name: summary([r for r in results if r.row.calibrates == c]) for name, c in parts.items()
    }


# ---- what is shown


def as_dict(table: Table, results: list[Result]) -> dict:
    """A table as JSON."""
    rows = [
        {
            "name": r.row.name, "published": r.row.published, "predicted": r.value,
            "error": r.error, "calibrates": r.row.calibrates, "bottleneck": r.step.bottleneck,
            "mfu": r.step.mfu, "parts": r.step.parts, "reason": r.row.reason,
        }
        for r in results
    ]  # fmt: skip
    return {"table": table.name, "unit": table.unit, "note": table.note, **halves(results),
            "rows": rows}  # fmt: skip


def show_rows(table: Table, results: list[Result]) -> None:
    """Every row of a table; under it reasons for those that are far off."""
    print(f"\n### {table.name}\n\n{table.note}\n")
    header = ["run", f"published {table.unit}", "predicted", "error", "after matmuls", "calibrates"]
    print(markdown(header, [_line(r) for r in results]))
    reasons = {}
    for far in (r for r in results if abs(r.error) > FAR):
        reasons.setdefault(far.row.reason or "no reason known", []).append(far.row.name)
    for reason, names in reasons.items():
        print(f"\nMore than {FAR:.0%} off: {'; '.join(names)}: {reason}.")


def _line(r: Result) -> list[str]:
    rest = {name: time for name, time in r.step.parts.items() if name != "matmuls"}
    second = max(rest, key=rest.__getitem__)
    share = rest[second] / r.step.seconds
    return [
        r.row.name, f"{r.row.published:g}", f"{r.value:.4g}", f"{r.error:+.0%}",
        f"{second} {share:.0%}", "yes" if r.row.calibrates else "",
    ]  # fmt: skip


def show_summary(found: list[tuple[Table, list[Result]]]) -> None:
    """Medians and worst errors of all tables."""
    lines = []
    everything = [r for _, results in found for r in results]
    for name, results in [*((t.name, rs) for t, rs in found), ("all", everything)]:
        for part, told in halves(results).items():
            if told["rows"]:
                lines.append([
                    name, part, str(told["rows"]), f"{told['median']:.0%}", f"{told['worst']:.0%}",
                    str(told["far"]),
                ])  # fmt: skip
    header = ["table", "rows that are", "how many", "median error", "worst", f"beyond {FAR:.0%}"]
    print("\n### Summary\n\n" + markdown(header, lines))


# ---- calibration


def loss(constants: Constants, found: list[Table]) -> float:
    """Mean over the tables of the mean of |log(predicted / published)| of calibrating rows."""
    sums = []
    for table in found:
        rows = [r for r in table.rows if r.calibrates]
        errors = [abs(math.log(1 + result(table, row, constants).error)) for row in rows]
        sums += [statistics.fmean(errors)] if errors else []
    return statistics.fmean(sums)


def calibrate(found: list[Table]) -> Constants:
    """Move one constant at a time by a factor, as long as the loss falls; then smaller factors."""
    best, least = CONSTANTS, loss(CONSTANTS, found)
    for factor in FACTORS:
        before = math.inf
        while least < before:
            before = least
            for step in [(name, f) for name in FITTED for f in (factor, 1 / factor)]:
                best, least = _better(best, least, step, found)
    return best


def _better(
    best: Constants, least: float, step: tuple[str, float], found: list[Table]
) -> tuple[Constants, float]:
    """The constants with one of them moved, if that helps; shares stay below 1."""
    name, factor = step
    value = getattr(best, name) * factor
    moved = replace(best, **{name: min(1.0, value)})
    now = loss(moved, found)
    return (moved, now) if now < least - 1e-5 else (best, least)


def main() -> None:
    """Predict, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--json", "--summary", "--calibrate"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    if args.calibrate:
        constants = calibrate(tables())
        print({f.name: f"{getattr(constants, f.name):.3g}" for f in fields(constants)})
        return
    found = [(table, [result(table, row) for row in table.rows]) for table in tables()]
    if args.json:
        print(json.dumps([as_dict(table, results) for table, results in found], indent=1))
        return
    print(describe(cpu_hardware()))
    for table, results in found if not args.summary else ():
        show_rows(table, results)
    show_summary(found)


if __name__ == "__main__":
    main()
