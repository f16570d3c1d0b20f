"""Sequences that flow through pipeline stages slice by slice train as whole ones do."""

import random
from itertools import combinations

import pipeline_programs as programs
import pytest
import torch
from pipeline_programs import FLAVOURS, Case, D, deviation

from picotron_lab import build, mesh, token_times
from picotron_lab.checks import check_run
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.processes import run_processes
from picotron_lab.schedules import registry
from picotron_lab.schedules.actions import Pair
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.simulate import peaks, simulate
from picotron_lab.schedules.slicing import best_slices

WHOLE = ("1f1b-vocab1", "1f1b-vocab2", "1f1b-interlaced", "v-half-vocab1", "v-half-vocab2",
         "zb-auto", "auto")  # fmt: skip
SLICEABLE = tuple(name for name in registry.NAMES if name not in WHOLE)
FLAVOUR = ("tied, dropout", "recompute, dropout", "dense", "recompute, tied")


def rare(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def cases():
    """Every schedule that can be cut, both paths, uneven slices, fewer micro-batches than ranks."""
    for k, name in enumerate(SLICEABLE):
        v = 2 if name.startswith("interleaved") else 0
        few = {"dualpipe": 4, "dualpipe-v": 5, "interleaved": 2, "interleaved-zb": 2}
        m = few.get(name, 1 + k % 3)
        slices, impl = (("1,2,1", "plain"), ("2", "fused"))[k % 2]
        case = Case(name, 2, m, impl, FLAVOUR[k // 2 % 4], v, slices=slices)
        rare = [pytest.mark.exhaustive] * (k // 2 % 2)  # left to a run after a change
        yield pytest.param(case, id=str(case), marks=rare)
        m = {"dualpipe": 8, "dualpipe-v": 8}.get(name, 4)
        impl, flavour = ("plain", "fused")[k // 2 % 2], FLAVOUR[k // 2 % 4]
        case = Case(name, 4, m, impl, flavour, v, slices="1,3")
        if k % 2:
            yield pytest.param(case, id=str(case), marks=pytest.mark.slow)


def one_device(case):
    dropout = FLAVOURS[case.flavour][1].get("dropout", 0.0)
    return programs.alone(case.model(case.schedule().stages), dropout, case.m, case.length)


@pytest.mark.parametrize("case", list(cases()))
def test_trains_as_one_device(case):
    """Loss, norm, every gradient of three steps, weights; peaks as the schedule says."""
    schedule = case.schedule()
    found = run_ranks(programs.train, case.p, case, seed=len(str(case)))
    assert deviation(found, one_device(case)) < 1e-10
    for rank, (mine, most) in enumerate(zip(found, peaks(schedule), strict=True)):
        pairs = any(isinstance(item, Pair) for item in schedule.lists[rank])
        assert mine.peak <= round(most * schedule.slices)  # a pair's actions count as one moment
        assert mine.peak == round(most * schedule.slices) or pairs, rank


# ---- every slicing


def compositions(length):
    """Every way to cut so many tokens, by the number of slices."""
    for n in range(2, length + 1):
        cuts = ((0, *ends, length) for ends in combinations(range(1, length), n - 1))
        yield n, [tuple(b - a for a, b in zip(c, c[1:], strict=False)) for c in cuts]


def check_slicings(p, length, impl, every, name):
    """One step in which each micro-batch is cut in its own way, into as many slices."""
    n, m = len(every[0]), len(every)
    case = Case(name, p, m, impl, slices=str(n), length=length)
    model_cfg = case.model(p)
    found = run_ranks(programs.train, p, case, 1, every)
    reference = programs.alone(model_cfg, 0.0, m, length, steps=1)
    assert deviation(found, reference) < 1e-10


@pytest.mark.parametrize("p", [rare(2), 3, rare(4)])
def test_every_slicing_of_6_tokens(p):
    for n, every in compositions(6):
        check_slicings(p, 6, ("plain", "fused")[(n + p) % 2], every, ("terapipe", "1f1b")[n % 2])


@pytest.mark.slow
@pytest.mark.parametrize(("p", "length"), [(2, 7), (4, 7), (3, 8)])
def test_every_slicing_of_more_tokens(p, length):
    for n, every in compositions(length):
        name = ("terapipe", "seq1f1b")[n % 2]
        check_slicings(p, length, ("fused", "plain")[(n + p) % 2], every, name)


@pytest.mark.parametrize(("p", "length"), [rare(2, 40), (3, 57), rare(4, 64)])
def test_drawn_slicings_of_longer_sequences(p, length):
    dice = random.Random(length)
    every = []
    for _ in range(4):
        ends = sorted(dice.sample(range(1, length), 4))
        every.append(tuple(b - a for a, b in zip([0, *ends], [*ends, length], strict=True)))
    check_slicings(p, length, ("plain", "fused")[p % 2], every, "1f1b")


# ---- what is sent, and real processes


def test_slices_send_as_many_bytes_in_more_messages():
    """4 slices: 4 times as many messages, of a quarter each on average."""
    for slices, count in (("1", 1), ("4", 4), ("3,1", 2)):
        case = Case("1f1b", 2, 3, "fused", slices=slices, length=8 if slices != "3,1" else 4)
        first, last = run_ranks(programs.train, 2, case)
        for mine, axis in ((first, "pp.F"), (last, "pp.B")):
            sends = [call for call in mine.calls if call.op == "send" and call.axis == axis]
            assert len(sends) == 3 * count
            assert sum(call.bytes for call in sends) == 3 * case.length * D * 8


def test_trains_as_one_device_in_processes():
    each = [Case("seq1f1b", 2, 3, "fused", "tied, dropout", slices="1,3"),
            Case("zb-h1", 2, 2, "plain", "recompute, dropout", slices="4")]  # fmt: skip
    for case, *found in zip(each, *run_processes(programs.train_all, 2, each), strict=True):
        assert deviation(found, one_device(case)) < 1e-10


# ---- auto


def slices_by_measurement(axis, mesh_cfg, cfg):
    model = ModelConfig(vocab_size=64, hidden_size=16, heads=2, kv_heads=1, ffn_size=24)
    return build.choose_slices(
        model, mesh_cfg, cfg, mesh.build(axis, mesh_cfg, 1), torch.device("cpu")
    )


@pytest.mark.parametrize(("tp", "length"), [(1, 19), (2, 24)])
def test_auto_gives_all_ranks_the_same_slices(tp, length):
    mesh_cfg = MeshConfig(pp=2, tp=tp, sequence_parallel=tp > 1, token_slices="auto")
    cfg = TrainConfig(global_batch_size=2, micro_batch_size=1, sequence_length=length)
    first, *others = run_ranks(slices_by_measurement, 2 * tp, mesh_cfg, cfg)
    assert sum(first) == length and all(part % tp == 0 for part in first)
    assert others == [first] * (2 * tp - 1)


def test_auto_takes_the_best_slices_of_the_times_that_rank_0_measured(monkeypatch):
    """Rank 0 measures t(l, c) = 4 + l + c / 4, others nothing."""
    calls = []

    def measure(prepare, length, device, multiple=1):
        calls.append(length)
        return [(l, c, 4 + l + c / 4) for l, c in token_times.places(length, multiple)]

    monkeypatch.setattr(token_times, "measure", measure)
    mesh_cfg = MeshConfig(pp=4, token_slices="auto")
    cfg = TrainConfig(global_batch_size=3, micro_batch_size=1, sequence_length=32)
    found = run_ranks(slices_by_measurement, 4, mesh_cfg, cfg)
    best, _ = best_slices(32, 4, lambda l, c: 4 + l + c / 4, sequences=3)
    assert len(best) > 1 and calls == [32]

    assert found == [best] * 4


@pytest.mark.parametrize("name", ["zb-h1", "zb-v", "interleaved", "1f1b"])
def test_auto_is_never_slower_than_whole_sequences(name):
    """By its own times; a schedule that fills fast may want none, or coarser slices."""

    def times(l, c):
        return 12 + l + l * (c + l / 2) / 48

    def seconds(slices):
        schedule = registry.build(name, 4, 8, Options(slices=len(slices)))
        cost = tuple(times(l, sum(slices[:k])) for k, l in enumerate(slices))
        return simulate(schedule, Costs(F=1 / 3, B=1 / 3, W=1 / 3, slices=cost)).makespan

    def schedule_of(n):
        return registry.build(name, 4, 8, Options(slices=n))

    found = token_times.choose_under(schedule_of, times, 64)
    others = [(64,), (38, 26), (32, 32), (28, 20, 16)]
    assert seconds(found) <= min(map(seconds, others)) * 1.01


# ---- refused


BALANCED = ModelConfig(vocab_size=64, experts=4, balance_loss=0.1)
DROPPING = ModelConfig(vocab_size=64, experts=4, capacity_factor=1.5)


@pytest.mark.parametrize(
    ("mesh", "model", "sentence"),
    [
        ({"schedule": "1f1b-vocab2"}, None, "token slices 4 do not fit 1f1b-vocab2, .* seq1f1b"),
        ({"schedule": "zb-auto"}, None, "token slices 4 do not fit zb-auto, .* choose seq1f1b"),
        ({"token_slices": "01"}, None, "--token-slices 01 must be the number of slices, .* try "),
        ({"token_slices": "9" * 5000}, None, "--token-slices 9+ must be the number of slices"),
        ({"token_slices": "0"}, None, "--token-slices 0 .*try --token-slices"),
        ({"token_slices": "129"}, None, "--token-slices 129 .*try --token-slices"),
        ({"token_slices": "64,63"}, None, "--token-slices 64,63 .*128.*try --token-slices"),
        ({"token_slices": "many"}, None, "--token-slices many .*try --token-slices"),
        ({"token_slices": "127,1", "tp": 2, "sequence_parallel": True}, None,
         "--token-slices 127,1 .*multiple.* 2.*try --token-slices"),
        ({"cp": 2}, None, "--token-slices 4 cuts a sequence in time, and --cp 2 over ranks"),
        ({}, BALANCED, "--balance-loss 0.1 counts the tokens of whole sequences"),
        ({}, DROPPING, "--capacity-factor 1.5 counts the tokens of whole sequences"),
    ],
)  # fmt: skip
def test_refuses(mesh, model, sentence):
    mesh_cfg = MeshConfig(**{"pp": 2, "token_slices": "4", **mesh})
    with pytest.raises(ConfigError, match=sentence):
        check_run(model or ModelConfig(vocab_size=64), mesh_cfg, TrainConfig())


def test_refuses_slices_without_stages():
    with pytest.raises(ConfigError, match="--token-slices 4 is about pipeline stages"):
        MeshConfig(token_slices="4")
