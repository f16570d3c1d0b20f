"""How long a slice of a sequence takes after how many other tokens: measured, fitted, used to cut.

Paper   TeraPipe, Li et al. 2021, section 3.3 (2102.07988)
Idea    The best slices (schedules/slicing.py) need the time of every slice after every context,
        T^2 / 2 of them. A few are measured, the rest follow from
            t(l, c) = t(l, 0) + a0 + a1 l + a2 c + a3 l c    for c > 0
        where t(l, 0) is piecewise linear between measured lengths, since thin slices take as long
        as less thin ones, and the a are a least-squares fit: attention is l c operations, reading
        keys and values c, and the rest is small. Least are the squares of relative errors, for
        slices may come out thin or thick.
Mind    Slices depend on ratios of times only, so one layer stands for a stage of equal layers: a
        whole layer on one rank, without tensor parallelism, recomputation and dropout, on equal
        tokens, which experts share unevenly. Embedding and head are left out, as if they did not
        make their stages longer. Measured anew in every run, so slices may differ from run to run.
Dims    B micro-batch  T sequence  D width
Read    of_layer -> measure -> Fit -> choose -> choose_under
Tests   tests/test_token_times.py
"""

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from picotron_lab import sharding, token_pipeline
from picotron_lab.config import ModelConfig, require
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.model import Llama, initial_value, rotary_angles
from picotron_lab.schedules.actions import Schedule
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import simulate
from picotron_lab.schedules.slicing import best_slices
from picotron_lab.token_slices import cut

Point = tuple[int, int, float]  # l tokens after c others take so many seconds
Prepare = Callable[[int, int], Callable[[], None]]  # l, c -> what is to be timed, ready to run once
RUNS = 3  # of which the median counts
PIECES = 128  # a sequence is cut at multiples of about this share of it


# ---- measure


def of_layer(
    cfg: ModelConfig, batch: int, impl: str, dtype: torch.dtype, device: torch.device
) -> Prepare:
    """Forward and backward of one layer of a model, for `measure`.

    The context goes forward before, with gradients, so that what is timed also leaves gradients for
    the context's keys and values.
    """
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    if impl == "fused":
        fuse(model)
    token_pipeline.parallelize(model, impl)
    layer = model.layers[0]
    sharding.materialise(layer, 0, initial_value, device, dtype)

    def prepare(length: int, context: int) -> Callable[[], None]:
        tokens_BT = torch.zeros(batch, context + length, dtype=torch.int64, device=device)
        lengths = [context, length] if context else [length]
        outs = []

        def forward(where: Where) -> None:
            T = len(where.positions_T)
            shape = batch, T, cfg.hidden_size
            x_BTD = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
            angles = rotary_angles(where.positions_T, cfg.head_width, cfg.rope_theta)
            outs.append(layer(x_BTD, angles, where))

        *before, last = cut((tokens_BT, None, Where.first(tokens_BT)), lengths)
        for _, _, where in before:
            forward(where)

        def run() -> None:
            forward(last[2])
            outs[-1].backward(torch.ones_like(outs[-1]))

        return run

    return prepare


def measure(
    prepare: Prepare, length: int, device: torch.device, multiple: int = 1, runs: int = RUNS
) -> list[Point]:
    """Times of slices of a sequence of `length` tokens: medians of some runs, in seconds. Runs go
    round all slices, so that a busy moment of the machine disturbs one run of each at most.

    prepare   l, c -> a function of no arguments, the forward and backward of a slice of l tokens
              after c others: called once, and timed
    multiple  all l and c are multiples of it, and so must be the length
    """
    where = places(length, multiple)
    for l, c in where:
        prepare(l, c)()  # memory is allocated, kernels are chosen
    rounds = [[_seconds(prepare(l, c), device) for l, c in where] for _ in range(runs)]
    times = map(statistics.median, zip(*rounds, strict=True))
    return [(l, c, seconds) for (l, c), seconds in zip(where, times, strict=True)]


def places(length: int, multiple: int = 1) -> list[tuple[int, int]]:
    """What is measured: lengths from a 32nd on, after nothing, after half of the rest, after all of
    it; l, c in tokens, multiples of `multiple`, l + c <= length."""
    _check_multiple(length, multiple)
    units = length // multiple
    found = set()
    for l in {max(1, units * part // 32) for part in (1, 2, 4, 8, 12, 16, 24, 32)}:
        found |= {(l * multiple, c * multiple) for c in (0, (units - l) // 2, units - l)}
    return sorted(found)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call, all of its kernels included."""
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- fit


@dataclass(frozen=True)
class Fit:
    """t(l, c): seconds of a slice of l tokens after c others; call it.

    alone    measured (l, t(l, 0)), ascending: linear between them; shorter slices take as long as
             the shortest, longer ones go on like the last two (one: as long as it)
    context  a0, a1, a2, a3: what c > 0 tokens add, a0 + a1 l + a2 c + a3 l c, if that is above 0
    worst    largest relative error at a point that it was made from
    """

    alone: tuple[tuple[int, float], ...]
    context: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    worst: float = 0.0

    def __call__(self, length: int, context: int) -> float:
        seconds = self._alone(length)
        if context == 0:
            return seconds
        a0, a1, a2, a3 = self.context
        return seconds + max(0.0, a0 + a1 * length + a2 * context + a3 * length * context)

    def _alone(self, length: int) -> float:
        if length <= self.alone[0][0] or len(self.alone) == 1:
            return self.alone[0][1]
        at = bisect_left(self.alone, (length, 0.0), 1, len(self.alone) - 1)
        (l, before), (r, after) = self.alone[at - 1 : at + 1]
        return max(0.0, before + (after - before) * (length - l) / (r - l))


def fit(points: Sequence[Point]) -> Fit:
    """The t(l, c) that comes closest to measured points (squares of relative errors are least).

    Every length needs its point after 0 tokens; a length measured twice counts with its mean.
    """
    times: dict[int, list[float]] = {}
    for l, c, seconds in points:
        if c == 0:
            times.setdefault(l, []).append(seconds)
    later = [(l, c, seconds) for l, c, seconds in points if c > 0]
    lonely = sorted({l for l, _, _ in later} - set(times))
    assert times and not lonely, (
        f"slices of {lonely or 'any'} tokens were measured after others, but not alone: measure "
        "them after 0 tokens too."
    )
    alone = Fit(tuple(sorted((l, statistics.mean(of)) for l, of in times.items())))
    context = _least_squares(alone, later) if later else alone.context
    rough = Fit(alone.alone, context)
    worst = max(abs(rough(l, c) - seconds) / seconds for l, c, seconds in points)
    return Fit(alone.alone, context, worst)


def _least_squares(alone: Fit, later: Sequence[Point]) -> tuple[float, ...]:
    """a0 .. a3; with lengths in units of the longest, so that no column is much larger than another
    (few points leave several solutions: the smallest). Every row is divided by its seconds."""
    longest = max(l + c for l, c, _ in later)
    rows = [(1, l / longest, c / longest, l * c / longest**2) for l, c, _ in later]
    added = [seconds - alone(l, 0) for l, _, seconds in later]
    seconds = torch.tensor([point[2] for point in later], dtype=torch.float64)
    A, b = (torch.tensor(x, dtype=torch.float64) for x in (rows, added))
    A, b = A / seconds[:, None], b / seconds
    a0, a1, a2, a3 = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0].tolist()
    return a0, a1 / longest, a2 / longest, a3 / longest**2


# ---- use


def choose(
    times: Callable[[int, int], float],
    length: int,
    stages: int,
    multiple: int = 1,
    sequences: int = 1,
) -> tuple[int, ...]:
    """The slices with the least latency in TeraPipe's order, exact but for the grain.

    times      seconds of l tokens after c others, forward and backward, on a stage or a layer
    multiple   all slices are multiples of it: the ranks of sequence parallelism
    sequences  micro-batches of a step, each cut alike
    raises     ConfigError if the length is no multiple
    """
    _check_multiple(length, multiple)
    grain = multiple * max(1, round(length / multiple / PIECES))
    return best_slices(length, stages, times, grain, 0.0, sequences)[0]


def choose_under(
    schedule_of: Callable[[int], Schedule],
    times: Callable[[int, int], float],
    length: int,
    multiple: int = 1,
) -> tuple[int, ...]:
    """The slices for --token-slices auto: those whose step a schedule ends first, as simulated.

    schedule_of   number of slices -> the schedule of a step
    Tried are one slice, and what `choose` says for 1, 2, 4, ... stages up to 4 times the ranks: the
    deeper a pipeline, the finer its best slices. A schedule may fill otherwise than TeraPipe's, and
    then want coarser or finer ones than those for its own number of stages.
    """
    whole = schedule_of(1)
    depths = (2**k for k in range(whole.ranks.bit_length() + 2))
    tried = {choose(times, length, depth, multiple, whole.microbatches) for depth in depths}

    def makespan(slices: tuple[int, ...]) -> float:
        contexts = accumulate(slices, initial=0)
        seconds = tuple(times(l, c) for l, c in zip(slices, contexts, strict=False))
        costs = Costs(F=1 / 3, B=1 / 3, W=1 / 3, slices=seconds)  # of forward and backward together
        return simulate(schedule_of(len(slices)), costs).makespan

    return min(sorted({(length,), *tried}, key=len), key=makespan)


def _check_multiple(length: int, multiple: int) -> None:
    require(
        length > 0 and length % multiple == 0,
        f"--sequence-length {length} must be a multiple of {multiple}, the ranks that share every "
        f"slice out; try --sequence-length {max(1, round(length / multiple)) * multiple}.",
    )
