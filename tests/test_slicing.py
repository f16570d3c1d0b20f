"""Slices of a sequence: against all compositions, and against a pipeline that is played through."""

import itertools
import random

import pytest

from picotron_lab.schedules import basic
from picotron_lab.schedules.actions import ScheduleError
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import simulate
from picotron_lab.schedules.slicing import best_groups, best_slices, latency

EVERY_LENGTH = range(1, 15)


def compositions(length):
    """Every way to write the length as a sum of positive parts, in order."""
    for bits in range(2 ** (length - 1)):
        ends = [i + 1 for i in range(length - 1) if bits >> i & 1]
        yield tuple(b - a for a, b in zip([0, *ends], [*ends, length], strict=True))


def times_of(slices, time):
    """What each slice takes, by adding up the tokens before it."""
    return [time(l, sum(slices[:i])) for i, l in enumerate(slices)]


def played(times, stages):
    """When the last stage ends: each stage takes slice after slice, once the stage before is done
    with it."""
    ends = [0] * len(times)  # of the stage before: the first one's inputs are there
    for _ in range(stages):
        free = 0
        for i, time in enumerate(times):
            ends[i] = free = max(free, ends[i]) + time
    return max(ends)


def played_twice(forward, backward, stages):
    """The same with a backward, last slice first, from the last stage to the first."""
    free, ends = [0] * stages, {}
    for stage in range(stages):
        for i, time in enumerate(forward):
            start = max(free[stage], ends.get(("F", stage - 1, i), 0))
            free[stage] = ends["F", stage, i] = start + time
    for stage in reversed(range(stages)):
        for i, time in reversed(list(enumerate(backward))):
            start = max(free[stage], ends.get(("B", stage + 1, i), 0))
            free[stage] = ends["B", stage, i] = start + time
    return max(free)


def table(seed):
    """Times without any order: a whole number of seconds for each slice."""
    draw = random.Random(seed)
    known = {(l, c): draw.randint(1, 30) for l in range(1, 15) for c in range(14)}
    return lambda l, c: known[l, c]


MODELS = {
    "linear": lambda l, c: 3 * l,
    "floor": lambda l, c: 2 + max(4, l),
    "quadratic": lambda l, c: 5 + l * l + 2 * l * c,
    "table 0": table(0),
    "table 1": table(1),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_composition_is_faster(name):
    time = MODELS[name]
    for length in EVERY_LENGTH:
        found = {(sum(t), max(t)) for t in (times_of(s, time) for s in compositions(length))}
        for stages in range(1, 7):
            slices, seconds = best_slices(length, stages, time)
            assert sum(slices) == length and min(slices) >= 1
            assert seconds == min(work + (stages - 1) * peak for work, peak in found)
            assert seconds == played(times_of(slices, time), stages)


@pytest.mark.parametrize("seed", range(3))
def test_forward_and_backward_apart(seed):
    forward, backward = table(seed), table(seed + 10)
    for length in range(1, 10):
        ways = [(times_of(s, forward), times_of(s, backward)) for s in compositions(length)]
        for stages in range(1, 7):
            slices, seconds = best_slices(length, stages, (forward, backward))
            assert seconds == min(played_twice(f, b, stages) for f, b in ways)
            assert seconds == latency(slices, stages, (forward, backward))
            both = best_slices(length, stages, lambda l, c: forward(l, c) + backward(l, c))
            assert both[1] <= seconds  # maxima at two slices count fully only if apart


def test_one_function_says_too_little_where_maxima_lie_apart():
    forward, backward = (lambda l, c: 9 - 8 * (c > 0)), (lambda l, c: 1 + 8 * (c > 0))
    assert latency((1, 1), 3, (forward, backward)) == 20 + 2 * (9 + 9)
    assert latency((1, 1), 3, lambda l, c: forward(l, c) + backward(l, c)) == 20 + 2 * 10


def test_one_function_is_exact_where_backward_is_twice_forward():
    for name in MODELS:
        time = MODELS[name]
        pair = best_slices(10, 5, (time, lambda l, c, f=time: 2 * f(l, c)))
        assert pair[1] == best_slices(10, 5, lambda l, c, f=time: 3 * f(l, c))[1]


def test_worked_example():
    assert latency((3, 3, 2), 3, lambda l, c: l) == (3 + 3 + 2) + 2 * 3 == 14
    assert played([3, 3, 2], 3) == 14
    assert best_slices(8, 3, lambda l, c: l) == ((1,) * 8, 8 + 2 * 1)
    assert best_slices(8, 3, lambda l, c: max(3, l))[1] == 9 + 2 * 3  # from 3 + 3 + 2: 3 each


def test_the_recurrence_without_a_bound_misses_the_optimum():
    """The fastest way through one stage is one slice: 10 + 3 * 10 = 40; halves: 2 * 6 + 3 * 6."""
    times = {(2, 0): 10, (1, 0): 6, (1, 1): 6}

    def time(l, c):
        return times[l, c]

    unbounded = min(compositions(2), key=lambda slices: sum(times_of(slices, time)))
    assert unbounded == (2,) and latency(unbounded, 4, time) == 40
    assert best_slices(2, 4, time) == ((1, 1), 30)


def test_earlier_slices_are_longer():
    slices, _ = best_slices(64, 8, lambda l, c: 20 + 4 * l + l * (c + l / 2))
    assert len(slices) > 2 and list(slices) == sorted(slices, reverse=True)


@pytest.mark.parametrize("granularity", [2, 3, 4, 20])
def test_granularity_leaves_the_rest_to_the_last(granularity):
    time = table(5)
    for length in EVERY_LENGTH:
        allowed = [s for s in compositions(length) if not any(l % granularity for l in s[:-1])]
        slices, seconds = best_slices(length, 4, time, granularity)
        assert slices in allowed
        assert seconds == min(played(times_of(s, time), 4) for s in allowed)


def test_several_sequences_in_a_row():
    for name in MODELS:
        ways = [times_of(s, MODELS[name]) for s in compositions(8)]
        for sequences in (1, 2, 5):
            slices, seconds = best_slices(8, 5, MODELS[name], sequences=sequences)
            assert seconds == min(played(times * sequences, 5) for times in ways)
            assert seconds == played(times_of(slices, MODELS[name]) * sequences, 5)


@pytest.mark.parametrize("epsilon", [1.5, 7, 100])
def test_epsilon_costs_no_more_than_it_says(epsilon):
    for seed in range(10):
        time, back = table(seed), table(seed + 10)
        best, rough = best_slices(12, 5, time), best_slices(12, 5, time, epsilon=epsilon)
        assert best[1] <= rough[1] <= best[1] + 4 * epsilon
        best = best_slices(12, 5, (time, back))
        rough = best_slices(12, 5, (time, back), epsilon=epsilon)
        assert best[1] <= rough[1] <= best[1] + 8 * epsilon


def test_equal_slices_are_micro_batches_to_the_simulator():
    for stages, count in itertools.product((1, 2, 5), (1, 3, 8)):
        costs = Costs(F=2, B=1, W=3)
        said = simulate(basic.afab(stages, count), costs).makespan
        assert latency((4,) * count, stages, (lambda l, c: l / 2, lambda l, c: l)) == said


# ---- batch and tokens


def group_table(seed):
    draw = random.Random(seed)
    known = {}

    def time(b, l, c):
        return known.setdefault((b, l, c), draw.randint(1, 12) + 2 * b * l)

    return time


GROUP_MODELS = {
    "floor": lambda b, l, c: max(6, b * l) + b * l * c,
    "table 0": group_table(0),
    "table 1": group_table(1),
}


def partitions(count, most=None):
    """Every way to write the count as a sum of parts that do not grow."""
    if not count:
        yield ()
    for part in range(min(count, most or count), 0, -1):
        yield from ((part, *rest) for rest in partitions(count - part, part))


def ways(batch, length, time):
    """(work, peak) of every way to cut a batch into groups, and each group into slices."""
    single = {
        b: {(sum(t), max(t)) for t in (
            times_of(s, lambda l, c, b=b: time(b, l, c)) for s in compositions(length))}
        for b in range(1, batch + 1)
    }  # fmt: skip
    for groups in partitions(batch):
        for chosen in itertools.product(*(single[b] for b in groups)):
            yield sum(work for work, _ in chosen), max(peak for _, peak in chosen)


@pytest.mark.parametrize("name", GROUP_MODELS)
@pytest.mark.parametrize("batch, length", [(1, 6), (2, 5), (3, 4), (4, 3)])
def test_no_groups_are_faster(name, batch, length):
    time = GROUP_MODELS[name]
    every = set(ways(batch, length, time))
    for stages in range(1, 6):
        groups, seconds = best_groups(batch, length, stages, time)
        assert sum(size for size, _ in groups) == batch
        assert seconds == min(work + (stages - 1) * peak for work, peak in every)
        times = [t for b, s in groups for t in times_of(s, lambda l, c, b=b: time(b, l, c))]
        assert seconds == played(times, stages)


def text(batch, length, stages, time):
    """Section 3.4 as written: the sum of the groups' own latencies."""
    alone = [
        best_slices(length, stages, lambda l, c, b=b: time(b, l, c))[1] for b in range(1, batch + 1)
    ]
    return min(sum(alone[b - 1] for b in groups) for groups in partitions(batch))


def test_the_text_of_the_paper_is_an_upper_bound():
    above = []
    for name, stages in itertools.product(GROUP_MODELS, (1, 2, 4)):
        exact = best_groups(4, 3, stages, GROUP_MODELS[name])[1]
        above.append(text(4, 3, stages, GROUP_MODELS[name]) / exact)
    assert min(above) == 1 and max(above) > 1.2  # 1 with one stage, which is never empty


def test_the_text_by_hand():
    """Two sequences of 1 token, 4 s each, or 8.5 s together, 3 stages. Streaming: 8 + 2 * 4 = 16;
    the text: 2 * (4 + 2 * 4) = 24, or one group of 8.5 + 2 * 8.5 = 25.5."""

    def time(b, l, c):
        return 4 if b == 1 else 8.5

    assert best_groups(2, 1, 3, time) == ([(1, (1,)), (1, (1,))], 16)
    assert text(2, 1, 3, time) == 24


# ---- errors


@pytest.mark.parametrize(
    "given, words",
    [
        ((0, 2, MODELS["linear"]), "length 0"),
        ((8, 0, MODELS["linear"]), "stages 0"),
        ((8, 2, MODELS["linear"], 0), "granularity 0"),
        ((8, 2, MODELS["linear"], 1, -1.0), "epsilon -1"),
        ((8, 2, MODELS["linear"], 1, float("nan")), "epsilon nan"),
        ((8, 2, MODELS["linear"], 1, 0.0, 0), "sequences 0"),
        ((2, 2, lambda l, c: -1.0 if c else 1.0), r"time\(1, 1\) gives -1"),
        ((2, 2, lambda l, c: float("inf")), r"time\(1, 0\) gives inf"),
    ],
)
def test_errors_say_what_works(given, words):
    with pytest.raises(ScheduleError, match=f"{words}.*give .*or more"):
        best_slices(*given)


def test_no_batch():
    with pytest.raises(ScheduleError, match="batch 0 .*give 1 or more"):
        best_groups(0, 4, 2, GROUP_MODELS["floor"])
