"""A picture of a plan: speed against memory of all candidates, and those that nothing beats.

Grey     every candidate's bounds (planner_bounds.py): at most so fast, with at least so much memory
Line     the frontier, predicted: whoever wants to be faster needs more memory. Its points are the
         plan's choices, and candidates whose bounds no other one's beat in both
Read     save -> draw -> frontier
Tests    tests/test_planner.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from picotron_lab.analysis.planner import GIB, Choice, Plan, judge, usable
from picotron_lab.analysis.planner_bounds import Bounds
from picotron_lab.analysis.planner_space import Candidate, candidates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 30  # predictions along the frontier
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#bbbbbb"  # Okabe and Ito's: told apart by everyone


def save(found: Plan, path: Path) -> None:
    """Write the picture; the file's name says which format."""
    draw(found).savefig(path, dpi=150)


def draw(found: Plan) -> "Figure":
    """Tokens per second of a GPU against its GiB; the GPU's limit is a dashed line."""
    from matplotlib.figure import Figure

    ask, bounds = found.question, Bounds(found.question)
    every = list(candidates(ask, max(ask.hardware.node, found.choices[0].candidate.mesh.tp)))
    share = ask.batch * ask.sequence_length / ask.gpus
    pairs = [(bounds.memory(one), bounds.seconds(one)) for one in every]
    best = frontier([*found.choices, *closest(found, every, pairs)])
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    grey = [[m / GIB for m, _ in pairs], [share / s for _, s in pairs]]
    axes.plot(*grey, ".", color=GREY, markersize=2, rasterized=True, label="all, at best")
    line = [[c.memory.peak / GIB for c in best], [c.time.tokens_per_second_per_rank for c in best]]
    axes.plot(
        *line, "o-", color=BLUE, drawstyle="steps-post", markersize=5, label="frontier, predicted"
    )
    first = found.choices[0]
    place = first.memory.peak / GIB, first.time.tokens_per_second_per_rank
    axes.plot(*place, "*", color=ORANGE, markersize=16, markeredgecolor="black", label="first")
    axes.axvline(usable(ask) / GIB, color="black", linestyle="--", linewidth=1)
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(usable(ask) / GIB, 10, "a GPU", rotation=90, va="bottom", ha="right", bbox=plain)
    axes.set_xscale("log", base=2)  # doublings can be told apart, and their labels do not touch
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="memory, GiB per GPU", ylabel="tokens/s per GPU")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{ask.model.name} on {ask.gpus} {ask.hardware.name}")
    axes.legend(frameon=False)
    return figure


def closest(
    found: Plan, every: Sequence[Candidate], pairs: Sequence[tuple[int, float]]
) -> list[Choice]:
    """Predictions of candidates that fit and whose bounds no other one's beat in both.

    pairs   (bytes, seconds) of each candidate's bounds
    """
    order = sorted(range(len(every)), key=lambda i: (*pairs[i], i))
    chosen, fastest = [], float("inf")
    for i in order:
        if pairs[i][1] < fastest and pairs[i][0] <= usable(found.question):
            fastest = pairs[i][1]
            chosen.append(i)
    step = max(1, len(chosen) // POINTS)
    judged = [judge(found.question, every[i]) for i in chosen[::step]]
    return [one for one in judged if one and one.memory.peak <= usable(found.question)]


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Those that none is faster than with as little memory, least memory first."""
    best: list[Choice] = []
    for one in sorted(choices, key=lambda c: (c.memory.peak, c.time.seconds)):
        if not best or one.time.seconds < best[-1].time.seconds:
            best.append(one)
    return best
