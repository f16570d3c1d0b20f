"""Saved activations: formulas equal what the meter sees, to the byte, whatever is recomputed."""

import dataclasses

import pytest
import torch
from test_recompute import AGAIN, ALL, CFG, CONFIGS, batch, build

from picotron_lab.analysis.activations import Setting, layer_bytes, model_bytes, rest_bytes
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import ModelConfig

# ---- measured


def kept_and_left(model, inputs):
    """Activation bytes between forward and backward; after backward."""
    with Meter() as meter:
        meter.watch(model.parameters())
        loss = model(*inputs)
        kept = meter.live["activation"]
        loss.backward()
        del loss
        return kept, meter.live["activation"]


@pytest.mark.parametrize(("kind", "impl"), ALL)
@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("grouped", torch.bfloat16, 0.3),
        ("one kv head", torch.float32, 0.0),
        ("one kv head", torch.bfloat16, 0.0),
        ("no groups", torch.float64, 0.3),
    ],
)
def test_saved_bytes_equal_the_formula(kind, impl, dtype, rate, name):
    for B, T in ((3, 7), (2, 1)):
        model = build(CONFIGS[name], kind, impl, rate, dtype)
        kept, left = kept_and_left(model, batch(B, T))
        setting = Setting(B, T, dtype.itemsize, dropout=rate > 0)
        assert kept == model_bytes(CONFIGS[name], setting, kind)
        assert left == 0


def peak_of_second_step(layers, kind, impl):
    """Its gradients are added in place to those of the first, so that only activations change."""
    cfg = dataclasses.replace(CFG, layers=layers)
    model = build(cfg, kind, impl, dtype=torch.float32)
    with Meter() as meter:
        meter.watch(model.parameters())
        model(*batch()).backward()
        meter.reset_peak()
        model(*batch()).backward()
        return meter.peak["activation"]


@pytest.mark.parametrize(("kind", "impl"), ALL)
def test_a_layer_more_raises_the_peak_by_what_it_keeps(kind, impl):
    """Backward holds all of one layer at a time, whatever the kind."""
    low, high = (peak_of_second_step(layers, kind, impl) for layers in (3, 4))
    assert high - low == sum(layer_bytes(CFG, Setting(3, 7, 4), kind).values())


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
def test_what_was_computed_again_is_given_up_once_it_is_used(kind, impl):
    """Also when the graph stays for another backward."""
    model = build(kind=kind, impl=impl)
    with Meter() as meter:
        meter.watch(model.parameters())
        loss = model(*batch())
        kept = meter.live["activation"]
        loss.backward(retain_graph=True)
        assert meter.live["activation"] == kept


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(kind, impl, without):
    model = build(kind=kind, impl=impl, dtype=torch.float32)
    inputs = batch()
    with Meter() as meter, without():
        loss = model(*inputs)
        assert meter.live_bytes == 4
        del loss
    assert meter.live_bytes == 0


# ---- worked by hand


def test_a_layer_worked_by_hand():
    """B 1, T 4, D 8, two heads of 4, one key/value head, F 6, float32: in elements of 4 bytes.

    norms 2 (32 + 4 + 32 + 32) = 200; q, k, v 32 + 16 + 16 = 64; scores 2 (2 * 16) = 64, and a mask
    of 16 bytes; mixed values 32; mlp 4 * 24 = 96; dropout 2 * 32 bytes.
    """
    cfg = ModelConfig(hidden_size=8, layers=1, heads=2, kv_heads=1, ffn_size=6, vocab_size=5)
    setting = Setting(1, 4, 4, dropout=True)
    layer = layer_bytes(cfg, setting)
    assert sum(layer.values()) == 4 * (200 + 64 + 64 + 32 + 96) + 16 + 64
    assert sum(layer_bytes(cfg, setting, "selective").values()) == 4 * (200 + 64 + 32 + 96) + 64
    assert layer_bytes(cfg, setting, "full") == {"input": 4 * 32}


def test_a_layer_on_two_ranks_worked_by_hand():
    """As above, with two key/value heads: each rank has one of both heads and 3 of F.

    Tensor parallel: norms 200, q, k, v 3 * 16, scores 16 (kept once) and the mask, mixed values 16,
    mlp 48. Sequence parallel: norms 100 and half of the dropout.
    """
    cfg = ModelConfig(hidden_size=8, layers=1, heads=2, kv_heads=2, ffn_size=6, vocab_size=5)
    tp = Setting(1, 4, 4, dropout=True, ranks=2)
    sp = dataclasses.replace(tp, sequence_parallel=True)
    assert sum(layer_bytes(cfg, tp).values()) == 4 * (200 + 48 + 16 + 16 + 48) + 16 + 64
    assert sum(layer_bytes(cfg, sp).values()) == 4 * (100 + 48 + 16 + 16 + 48) + 16 + 32
    assert layer_bytes(cfg, sp, "full") == {"input": 4 * 16}


def test_a_misspelled_kind_is_no_kind():
    for count in (layer_bytes, rest_bytes, model_bytes):
        with pytest.raises(AssertionError, match="no recomputation 'ful': ask for one of none, "):
            count(CFG, Setting(1, 4, 4), "ful")


@pytest.mark.parametrize(("kv_heads", "ranks"), [(2, 3), (4, 3), (1, 8), (2, 8)])
def test_heads_that_ranks_cannot_share(kv_heads, ranks):
    """Four query heads: neither 3 nor 8 ranks have as many each."""
    cfg = ModelConfig(hidden_size=8, heads=4, kv_heads=kv_heads)
    with pytest.raises(AssertionError, match=f"{ranks} ranks cannot share 4 query and {kv_heads}"):
        layer_bytes(cfg, Setting(1, 4, 4, ranks=ranks))


def test_key_value_heads_that_ranks_cannot_share():
    """Of 6 query heads each of 2 ranks has 3; but of 3 key/value heads one would have more."""
    with pytest.raises(AssertionError, match="2 ranks cannot share 6 query and 3 key/value heads"):
        layer_bytes(CFG, Setting(1, 4, 4, ranks=2))
    cfg = dataclasses.replace(CFG, kv_heads=1)  # shared by both ranks: 3 query heads, k, v of 6
    assert layer_bytes(cfg, Setting(1, 4, 4, ranks=2))["q, k, v"] == 4 * 4 * (3 + 2) * 6


def test_the_paper_s_table():
    """16 bit, h = H C, no groups, F = 4 h: s b h (22 + 4 + 32 + 6 a s / h), but for 1/rms, mask and
    angles: what does not grow with h or with a s s is below 1 %."""
    s, b, h, a = 2048, 2, 4096, 32
    cfg = ModelConfig(hidden_size=h, heads=a, kv_heads=a, ffn_size=4 * h)
    total = sum(layer_bytes(cfg, Setting(b, s, 2, dropout=True)).values())
    assert 1 <= total / (s * b * h * (58 + 6 * a * s / h)) < 1.01
