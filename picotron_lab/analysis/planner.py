"""The best ways to train a model on a cluster that one may not have: `run.py plan`.

Idea     Every candidate (planner_space.py) gets a bound on its memory, and of those that may fit,
         on its time (planner_bounds.py). Then predictions, memory first, in the order of the
         bounds: once a bound is above the time of the last one wanted, nothing better is left.
Fits     memory.py's peak of the worst pipeline rank, in ROOM of what a GPU has: the rest is for
         CUDA, its libraries' buffers and what an allocator cannot reuse
Exact    no candidate is passed over that would be predicted among the first; with two exceptions:
         a search ends after MOST predictions, and says so; and ROUNDS limits the micro-batches of
         a step, whose lists take long: with more of them the bubble is next to nothing, so that
         larger ones, or more replicas, do as well
Ties     equally fast ones come in the order of their memory
Not      anything that step_time.py and memory.py leave out; they err, so run the first few
Read     plan -> Search -> Choice; why; a sentence for none: `_nothing_fits`
Tests    tests/test_planner.py
"""

import bisect
import math
from dataclasses import dataclass, replace

from picotron_lab.analysis import memory, step_time
from picotron_lab.analysis.planner_bounds import Bounds, on_triton
from picotron_lab.analysis.planner_space import (
    Candidate,
    Question,
    candidates,
    divisors,
    meshes,
)
from picotron_lab.checks import layers_of
from picotron_lab.config import ConfigError

ROOM = 0.9
MOST = 150  # predictions, which take a minute for 100 layers in 50 stages
GIB = 2**30
SAME = 1e-3  # of a step's time: no prediction can tell such steps apart
ROUNDS = (1024, 4096)  # micro-batches of a step, at most; and if nothing else fits
TRIES = 3  # to find out how many GPUs would do
NAMES = {  # parts of a step, in words
    "matmuls": "matrix products", "attention": "attention", "memory": "memory traffic",
    "kernels": "starting kernels", "tp": "waiting for tensor parallelism",
    "cp": "waiting for context parallelism", "ep": "waiting for expert parallelism",
    "replica": "waiting for data parallelism", "pp": "waiting for transfers",
    "bubble": "the pipeline's bubble", "optimizer": "the optimizer",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A candidate with its predictions; `memory` is of the pipeline rank that needs most."""

    candidate: Candidate
    time: step_time.StepTime
    memory: memory.Footprint

    @property
    def flops_per_gpu(self) -> float:
        """Useful operations per second of one GPU."""
        return self.time.mfu * self.time.peak


@dataclass(frozen=True)
class Plan:
    """What was found, best first.

    considered  candidates;  fitting  those whose memory bound fits;  predicted  those looked at
                closely;  complete  whether the search came to its end
    """

    question: Question
    choices: tuple[Choice, ...]
    considered: int
    fitting: int
    predicted: int
    complete: bool


def plan(ask: Question, top: int = 10, prune: bool = True) -> Plan:
    """The fastest `top` candidates that fit.

    prune    False: predict every candidate, which takes long; the choice is the same
    Raises   ConfigError if none fits: which limit to relax, and by how much
    """
    search = Search(ask, usable(ask))
    node, heads = ask.hardware.node, ask.model.heads  # beyond a node if nothing else fits
    for most_tp, most in ((node, ROUNDS[0]), (heads, ROUNDS[0]), (heads, ROUNDS[1])):
        every = sane(ask, most_tp, most)
        found = search.best(every, top, prune)
        if found.choices:
            return found
    if not every:
        raise ConfigError(_no_batch(ask))
    raise ConfigError(_nothing_fits(ask, search, every))


def sane(ask: Question, most_tp: int, most: int = ROUNDS[0]) -> list[Candidate]:
    """The candidates with at most so many micro-batches."""
    return [one for one in candidates(ask, most_tp) if one.rounds <= most]


def usable(ask: Question) -> float:
    """Bytes of a GPU that a plan may fill."""
    return ROOM * ask.hardware.memory_bytes


def judge(ask: Question, one: Candidate) -> Choice | None:
    """A candidate's predictions, whether it fits or not; None if run.py would refuse it."""
    time = predicted(ask, one)
    return Choice(one, time, footprint(ask, one)) if time else None


def predicted(ask: Question, one: Candidate) -> step_time.StepTime | None:
    """Its step; None if run.py would refuse it."""
    try:
        return step_time.predict(ask.model, one.mesh, one.cfg, ask.hardware)
    except ConfigError:
        return None


def footprint(ask: Question, one: Candidate, room: float = math.inf) -> memory.Footprint:
    """Memory of the pipeline rank that needs most: one with most layers, the first or the last; of
    the first of these that needs more than `room`."""
    mesh, last = one.mesh, one.mesh.pp - 1
    counts = layers_of(ask.model, mesh, one.cfg)
    placement = one.family.placement(mesh.pp, one.virtual)
    layers = [sum(counts[stage] for stage in stages) for stages in placement]
    worst: memory.Footprint | None = None
    for rank in dict.fromkeys((layers.index(max(layers)), 0, last)):
        found = memory.predict(ask.model, mesh, one.cfg, rank, kernels=on_triton(one))
        worst = max(worst or found, found, key=lambda each: each.peak)
        if worst.peak > room:
            break
    return worst


def held_by(ask: Question, one: Candidate, room: float) -> memory.Footprint | None:
    """Its footprint; None if run.py would refuse it."""
    try:
        return footprint(ask, one, room)
    except ConfigError:
        return None


class Search:
    """One question's candidates, bounded, then predicted as far as it takes."""

    def __init__(self, ask: Question, room: float) -> None:
        self.ask, self.room, self.bounds = ask, room, Bounds(ask)

    def best(self, every: list[Candidate], top: int, prune: bool) -> Plan:
        """The fastest `top` of them that fit; of equally fast ones those that need less memory, and
        of these those that come first."""
        fitting = [c for c in every if not prune or self.bounds.memory(c) <= self.room]
        order = sorted((self.bounds.seconds(c), i) for i, c in enumerate(fitting))
        found: list[tuple[float, int, int, Choice]] = []
        for looked, (least, i) in enumerate(order):
            slowest = found[top - 1][0] if len(found) >= top else math.inf
            if prune and (told(least) > slowest or looked == MOST):
                break
            time = predicted(self.ask, fitting[i])
            if time is None or (prune and told(time.seconds) > slowest):
                continue
            held = footprint(self.ask, fitting[i], self.room)
            if held.peak <= self.room:
                choice = Choice(fitting[i], time, held)
                bisect.insort(found, (told(time.seconds), held.peak, i, choice))
        else:
            looked, least = len(order), math.inf
        choices = tuple(choice for *_, choice in found[:top])
        slowest = found[top - 1][0] if len(found) >= top else math.inf
        return Plan(self.ask, choices, len(every), len(fitting), looked, told(least) > slowest)

    def smallest(
        self, every: list[Candidate], most: float = math.inf
    ) -> tuple[memory.Footprint, Candidate] | None:
        """What needs least memory; None if all are refused.

        most   bytes: one that needs no more will do, and None if there is none
        """
        bounds = ((self.bounds.memory(c), i) for i, c in enumerate(every))
        order = sorted(pair for pair in bounds if pair[0] <= most)
        best: tuple[memory.Footprint, Candidate] | None = None
        for least, i in order[:MOST]:
            if best is not None and (least >= best[0].peak or most < math.inf):
                break
            room = best[0].peak if best else most
            held = held_by(self.ask, every[i], room)
            if held is not None and held.peak <= room:
                best = held, every[i]
        return best


def told(seconds: float) -> float:
    """As many digits as tell steps apart."""
    return float(f"{seconds:.6g}")


# ---- in words


def why(best: Choice, other: Choice) -> str:
    """Why `other` lost against `best`: the parts of its step that take longer, and shorter."""
    seconds = other.time.seconds - best.time.seconds
    names = {*best.time.parts, *other.time.parts}
    more = {n: other.time.parts.get(n, 0.0) - best.time.parts.get(n, 0.0) for n in names}
    worst = sorted(more.items(), key=lambda pair: (-abs(pair[1]), pair[0]))
    told = [pair for pair in worst if abs(pair[1]) >= max(0.1 * abs(seconds), 1e-6)][:4]
    longer = [f"{time:.3g} s more for {NAMES.get(n, n)}" for n, time in told if time > 0]
    shorter = [f"{-time:.3g} s less for {NAMES.get(n, n)}" for n, time in told if time < 0]
    rest = f", though {' and '.join(shorter)}" if shorter else ""
    share = seconds / best.time.seconds
    if share < SAME:
        return "takes as long: choose by memory, or by what is easier to run."
    return f"takes {seconds:.3g} s ({share:.1%}) longer: {' and '.join(longer)}{rest}."


def _no_batch(ask: Question) -> str:
    """No mesh at all: too few sequences, a number that no mesh shares out, or far too many."""
    every = candidates(ask, ask.model.heads)
    fewest = min(every, key=lambda one: one.rounds, default=None)
    if fewest is not None:
        return (
            f"--global-batch-size {ask.batch} gives every rank {fewest.rounds} micro-batches or "
            f"more with --gpus {ask.gpus}, and a plan looks at {ROUNDS[1]} at most; try "
            f"--global-batch-size {ask.batch // fewest.rounds * ROUNDS[0]}."
        )
    replicas = sorted(
        ask.gpus // (one.size * pp)
        for one in meshes(ask, ask.model.heads)
        for pp in divisors(ask.gpus // one.size)
        if pp <= ask.model.layers
    )
    least = replicas[0]
    good = -(-ask.batch // least) * least
    return (
        f"--global-batch-size {ask.batch} cannot be shared out by --gpus {ask.gpus}: tp x cp x pp "
        f"of --model {ask.model.name} ({ask.model.layers} layers, {ask.model.heads} heads, "
        f"sequences of {ask.sequence_length}) leave {least} data-parallel ranks or more, each with "
        f"as many sequences; try --global-batch-size {good}."
    )


def _nothing_fits(ask: Question, search: Search, every: list[Candidate]) -> str:
    """Candidates, but none in a GPU's memory: by how much the smallest is too large."""
    least = search.smallest(every)
    if least is None:
        return _no_schedule(ask)
    (held, one), room = least, search.room
    peak = held.peak
    kept = "weights, gradients and optimizer" if held.state > peak / 2 else "activations"
    more = enough(ask, peak / room)
    advice = (
        f"try --gpus {more}" if more else "it takes GPUs with more memory, or a smaller --model"
    )
    return (
        f"--gpus {ask.gpus} of {ask.hardware.name} cannot hold --model {ask.model.name}: the "
        f"smallest footprint is {peak / GIB:.1f} GiB per GPU, mostly {kept} (with "
        f"{one.options()}), {(peak - room) / GIB:.1f} GiB more than the "
        f"{room / GIB:.1f} GiB that can be used of {ask.hardware.memory_bytes / GIB:.1f}; {advice}."
    )


def _no_schedule(ask: Question) -> str:
    return (
        f"--global-batch-size {ask.batch} gives no schedule the micro-batches that it needs with "
        f"--gpus {ask.gpus}; try --global-batch-size {ask.batch * 2}."
    )


def enough(ask: Question, short: float) -> int:
    """How many GPUs hold the model, doubling; 0 if none of a few.

    short   how many times too large it is now: so many times the GPUs are hardly ever too many
    """
    fewest = max(1, int(math.log2(short)))
    for doublings in range(fewest, fewest + TRIES):
        asked = replace(ask, gpus=ask.gpus * 2**doublings)
        search = Search(asked, usable(asked))
        if search.smallest(sane(asked, ask.hardware.node), search.room) is not None:
            return asked.gpus
    return 0
