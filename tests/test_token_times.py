"""Times of slices: a fit finds a law again, points lie where they should, slices follow from it."""

import itertools
import random

import pytest
import torch

from picotron_lab import token_pipeline, token_times
from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.token_times import Fit, choose, fit, measure, of_layer, places

CPU = torch.device("cpu")
CFG = ModelConfig(vocab_size=16, hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=24)


def law(l, c):
    """Flat below 64 tokens; in seconds."""
    alone = 1e-3 * max(64, l) / 64
    return alone + (2e-4 + 1e-6 * l + 3e-6 * c + 5e-9 * l * c if c else 0)


def points(length=512, noise=0.0):
    draw = random.Random(0)
    return [(l, c, law(l, c) * (1 + noise * draw.uniform(-1, 1))) for l, c in places(length)]


def test_a_law_is_found_again():
    found = fit(points())
    assert found.context == pytest.approx((2e-4, 1e-6, 3e-6, 5e-9), rel=1e-6)
    assert found.worst < 1e-9
    for l, c in itertools.product((64, 100, 256, 300, 512), (0, 1, 50, 400)):
        assert found(l, c) == pytest.approx(law(l, c), rel=1e-9)


def test_noise_is_reported_and_averaged_out():
    found = fit(points(noise=0.02))
    assert 0.005 < found.worst < 0.06
    off = [abs(found(l, c) / law(l, c) - 1) for l in (64, 128, 256) for c in (64, 128, 200)]
    assert max(off) < 0.06


def test_worst_is_the_largest_relative_error():
    """After 10 tokens 11, 10, 10, 11 seconds, alone 10: a line in l that is as high at both ends,
    so a constant x. (x - 1)^2 / 121 + x^2 / 100 is least at 100 / 221; then 11 is furthest off."""
    alone = [(l, 0, 10.0) for l in (1, 2, 3, 4)]
    later = [(l, 10, 10.0 + x) for l, x in ((1, 1), (2, 0), (3, 0), (4, 1))]
    found = fit(alone + later)
    assert found(2, 10) == pytest.approx(10 + 100 / 221)
    assert found.worst == pytest.approx(121 / 221 / 11)


def test_between_and_beyond_measured_lengths():
    found = Fit(((10, 4.0), (20, 6.0), (40, 16.0)))
    assert [found(l, 0) for l in (1, 10, 15, 20, 30, 40, 60)] == [4, 4, 5, 6, 11, 16, 26]
    assert Fit(((10, 4.0),))(99, 0) == 4


def test_context_never_saves_time():
    found = Fit(((1, 2.0),), (-1.0, 0.0, 0.5, 0.0))
    assert [found(1, c) for c in (0, 1, 2, 4)] == [2, 2, 2, 3]


def test_a_length_measured_twice_counts_with_its_mean():
    assert fit([(4, 0, 1.0), (4, 0, 3.0)]).alone == ((4, 2.0),)


def test_what_is_missing_is_named():
    with pytest.raises(AssertionError, match=r"\[8\] tokens .* measure them after 0 tokens"):
        fit([(4, 0, 1.0), (8, 4, 2.0)])
    with pytest.raises(AssertionError, match="any tokens .* measure them after 0 tokens"):
        fit([])


@pytest.mark.parametrize("length, multiple", [(1, 1), (7, 1), (64, 1), (96, 4), (8, 8)])
def test_places_fit_into_the_sequence(length, multiple):
    found = places(length, multiple)
    assert all(l >= multiple and l + c <= length for l, c in found)
    assert not any(l % multiple or c % multiple for l, c in found)
    assert {l for l, _ in found} == {l for l, c in found if c == 0}
    assert (length, 0) in found
    assert len(found) <= 24


def test_places_determine_all_coefficients():
    rows = [[1, l, c, l * c] for l, c in places(64) if c]
    assert torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64)) == 4


# ---- choice


def test_choice_is_the_best_of_all_multiples():
    def times_of(l, c):
        return 3 + l + l * c / 50

    for stages, multiple, sequences in itertools.product((1, 2, 6), (2, 4), (1, 3)):
        best = choose(times_of, 24, stages, multiple, sequences)
        seconds = {}
        units = 24 // multiple
        for bits in range(2 ** (units - 1)):
            ends = [i + 1 for i in range(units - 1) if bits >> i & 1] + [units]
            slices = [multiple * (b - a) for a, b in zip([0, *ends], ends, strict=False)]
            times = [times_of(l, sum(slices[:i])) for i, l in enumerate(slices)]
            seconds[tuple(slices)] = sequences * sum(times) + (stages - 1) * max(times)
        assert seconds[best] == pytest.approx(min(seconds.values()), rel=1e-12)


def test_choice_takes_multiples_and_a_grain():
    slices = choose(law, 1026, 8, 3)
    assert sum(slices) == 1026 and not any(l % 3 for l in slices)
    assert len(slices) > 2
    assert not any(l % 9 for l in slices[:-1])  # 342 threes, 128 pieces of 3 threes or less


def test_one_stage_needs_no_slices():
    assert choose(lambda l, c: 1 + l + l * c / 100, 512, 1) == (512,)


@pytest.mark.parametrize("length, multiple, works", [(10, 4, 8), (3, 4, 4), (0, 1, 1)])
def test_a_length_that_cannot_be_shared_out(length, multiple, works):
    for act in (choose, lambda _, *rest: places(rest[0], rest[2])):
        with pytest.raises(ConfigError, match=f"--sequence-length {length} .* {works}\\.$"):
            act(law, length, 2, multiple)


# ---- measurements


def test_the_median_of_the_runs_is_kept(monkeypatch):
    """With a clock that a run moves on: 1, 3, 2, .. seconds, whatever the first, untimed one."""
    now, prepared = [0.0], []
    count = len(places(16))
    durations = iter([100.0] * count + [1.0] * count + [3.0] * count + [2.0] * count)
    monkeypatch.setattr(token_times.time, "perf_counter", lambda: now[0])

    def prepare(l, c):
        prepared.append((l, c))
        now[0] += 50  # preparing is not timed

        def run():
            now[0] += next(durations) * (l + 10 * c)

        return run

    found = measure(prepare, 16, CPU, runs=3)
    assert found == [(l, c, 2.0 * (l + 10 * c)) for l, c in places(16)]
    assert prepared == 4 * places(16)


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_a_layer_runs_forward_and_backward_after_its_context(impl, monkeypatch):
    seen, learns = [], []
    original, forward = token_pipeline.Attend, token_pipeline.SlicedLayer.forward

    class Watched:
        @staticmethod
        def apply(core, where, q, k, v):
            seen.append(("forward", where.first, q.shape, k.shape))
            assert k.requires_grad  # its context learns from it
            q.register_hook(lambda grad: seen.append(("backward", where.first, grad.shape)))
            return original.apply(core, where, q, k, v)

    def watched(layer, x_BTD, *rest):
        learns.append(x_BTD.requires_grad)  # as a stage's input does: its gradient takes time
        return forward(layer, x_BTD, *rest)

    monkeypatch.setattr(token_pipeline, "Attend", Watched)
    monkeypatch.setattr(token_pipeline.SlicedLayer, "forward", watched)
    run = of_layer(CFG, 2, impl, torch.float32, CPU)(3, 5)
    assert seen == [("forward", 0, (2, 5, 4, 4), (2, 5, 2, 4))]
    run()
    assert seen[1:] == [
        ("forward", 5, (2, 3, 4, 4), (2, 3, 2, 4)),
        ("backward", 5, (2, 3, 4, 4)),
    ]
    assert learns == [True, True]


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_a_layer_is_measured_and_its_slices_chosen(impl):
    prepare = of_layer(CFG, 1, impl, torch.float64, CPU)
    found = fit(measure(prepare, 32, CPU, multiple=4, runs=2))
    assert {l for l, _ in found.alone} == {l for l, _ in places(32, 4)}
    assert all(seconds > 0 for _, seconds in found.alone)
    slices = choose(found, 32, 4, 4)
    assert sum(slices) == 32 and not any(l % 4 for l in slices)
