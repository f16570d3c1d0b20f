"""The executor keeps the simulator's promise: on the virtual clock every action of every rank
starts and ends when the simulation says.

All times are sums of eighths, so they must be equal to the last bit.
"""

import dataclasses

import pipeline_programs as programs
import pytest

from picotron_lab.clock import Network
from picotron_lab.lab import run_ranks
from picotron_lab.schedules import registry
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import simulate

COSTS = Costs(F=1, B=1.25, W=0.75, S=0.5, T=0.75, IF=0.5, IB=0.25, pair=2.5)
# That all ranks start at once takes a message, and in a simulation no time; and Algorithm 2's
# second sum follows from its first, where a simulation knows one barrier.
ONLY_WITHOUT_LATENCY = ("1f1b-interlaced", "1f1b-vocab2", "v-half-vocab2")
LATENT = [name for name in registry.NAMES if name not in ONLY_WITHOUT_LATENCY]


def sampled():
    """Those that run with latency, too, after a change."""
    for name in registry.NAMES:
        if name != "1f1b-vocab2":
            yield pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LATENT))


def uneven(schedule, latency=0.0):
    """Stages that take 1, 1.5 and 2 times as long in turn; any message, any sum takes `latency`."""
    factors = tuple(1 + 0.5 * (s % 3) for s in range(schedule.stages))
    return dataclasses.replace(COSTS, factors=factors, transfer=latency, barrier=latency)


def differences(schedule, costs, impl="plain", seed=None):
    """(rank, item, start, end, simulated start, simulated end) of the items that differ."""
    network = Network(latency=costs.transfer)
    found = run_ranks(
        programs.times, schedule.ranks, schedule, costs, impl, seed=seed, network=network
    )
    line = simulate(schedule, costs)
    assert [[item for item, _, _ in trace] for trace in found] == [*map(list, schedule.lists)]
    rows = zip(found, line.starts, line.ends, strict=True)
    return [
        (rank, str(item), start, end, *said)
        for rank, (trace, starts, ends) in enumerate(rows)
        for (item, start, end), *said in zip(trace, starts, ends, strict=True)
        if [start, end] != said
    ]


def test_a_step_by_hand():
    """2 ranks, 2 micro-batches: F0.0 F0.1 | wait | BW0.0 BW0.1; messages take half a second."""
    schedule, costs = registry.build("1f1b", 2, 2), Costs(transfer=0.5)
    network = Network(latency=0.5)
    first, last = run_ranks(programs.times, 2, schedule, costs, "plain", network=network)
    assert [times for _, *times in first] == [[0, 1], [1, 2], [5, 7], [8, 10]]
    assert [times for _, *times in last] == [[1.5, 2.5], [2.5, 4.5], [4.5, 5.5], [5.5, 7.5]]


# Algorithm 2's second sum starts between two actions, not within one: see test_equal_stages
@pytest.mark.parametrize("name", list(sampled()))
def test_uneven_stages(name):
    schedule = registry.build(name, 4, 8)
    assert not differences(schedule, uneven(schedule), "fused", seed=1)


@pytest.mark.parametrize("p, m", [(2, 4), (4, 8)])
def test_equal_stages(p, m):
    schedule = registry.build("1f1b-vocab2", p, m)
    assert not differences(schedule, Costs())


@pytest.mark.parametrize("name", [*LATENT, "v-half-vocab2"])
def test_uneven_stages_and_latency(name):
    schedule = registry.build(name, 4, 8)
    assert not differences(schedule, uneven(schedule, 0.25))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["1f1b", "interleaved", "zb-h2", "zb-v", "v-min", "dualpipe", "1f1b-vocab1"]
)
def test_more_ranks_and_long_transfers(name):
    """Also as long as a forward, where nothing hides them."""
    for impl, p, m, latency in (("plain", 3, 6, 1.0), ("fused", 8, 8, 0.125)):
        if name.startswith("dualpipe"):  # needs 2p, and p an even number
            p, m = 2 * (p // 2), 4 * (p // 2)
        schedule = registry.build(name, p, m)
        costs = uneven(schedule, latency if name in LATENT else 0.0)
        assert not differences(schedule, costs, impl, seed=p), p


# left to a run after a change
RARE = [pytest.param(n, marks=pytest.mark.exhaustive) for n in ("1f1b-vocab1", "1f1b-interlaced")]


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "dualpipe-v", *RARE])
def test_who_runs_next_changes_no_time(name):
    schedule = registry.build(name, 3, 6)
    costs = uneven(schedule, 0.25 if name in LATENT else 0.0)
    for seed in range(3):
        assert not differences(schedule, costs, "fused", seed)
