"""The plain model against Hugging Face and published sizes; the fused one against the plain one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import sharding
from picotron_lab.config import PRESETS, ModelConfig
from picotron_lab.dropout import Dropout, Where, scramble
from picotron_lab.fused import LinearCrossEntropy, fuse
from picotron_lab.model import AttentionCore, Llama, initial_value

CFG = ModelConfig(vocab_size=96, hidden_size=48, layers=2, heads=6, kv_heads=2, ffn_size=80)


def make(cfg=CFG, fused=False, dtype=torch.float64, dropout=0.0):
    with torch.device("meta"):
        model = Llama(cfg, dropout)
    sharding.attach(model)
    if fused:
        fuse(model)
    sharding.materialise(model, 0, initial_value, dtype=dtype)
    return model


def make_batch(cfg=CFG, shape=(3, 17)):
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, cfg.vocab_size, shape, generator=dice)
    labels = torch.randint(0, cfg.vocab_size, shape, generator=dice)
    labels[:, -4:] = -100
    return tokens, labels


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_hugging_face_llama(tied):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        attn_implementation="eager",
    ))  # fmt: skip
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # large enough for attention to be far from uniform
            parameter.normal_(float(parameter.dim() == 1), 0.2, generator=dice)
    ours = make(dataclasses.replace(CFG, tied=tied), dtype=torch.float32)
    copy_weights(ours, theirs)
    tokens, _ = make_batch()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def copy_weights(ours, theirs):
    pairs = [(ours.embed, theirs.model.embed_tokens), (ours.norm, theirs.model.norm),
             (ours.head, theirs.lm_head)]  # fmt: skip
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        pairs += [(mine.attention_norm, other.input_layernorm)]
        pairs += [(mine.mlp_norm, other.post_attention_layernorm)]
        pairs += [
            (getattr(mine.attention, n), getattr(other.self_attn, f"{n}_proj")) for n in "qkvo"
        ]
        names = ("gate", "up", "down")
        pairs += [(getattr(mine.mlp, n), getattr(other.mlp, f"{n}_proj")) for n in names]
    for mine, other in pairs:
        mine.weight.copy_(other.weight)


def test_experts_equal_hugging_face_mixtral():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=48, intermediate_size=80, num_local_experts=5, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    ours = make(dataclasses.replace(CFG, experts=5, top_k=2), dtype=torch.float32).layers[0].mlp
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        for i, expert in enumerate(ours.experts):
            gate, up = theirs.experts.gate_up_proj[i].chunk(2)
            expert.gate.weight.copy_(gate)
            expert.up.weight.copy_(up)
            expert.down.weight.copy_(theirs.experts.down_proj[i])
    x_BTD = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(3))
    expected = theirs(x_BTD)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(ours(x_BTD), expected, rtol=1e-5, atol=1e-5)


def test_attention_equals_torch():
    q, k, v = (torch.randn(2, 9, h, 8, dtype=torch.float64) for h in (6, 2, 2))
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(AttentionCore()(q, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("llama3-8b", 8.03), ("llama3-70b", 70.55), ("llama3-405b", 405.85), ("gpt3-175b", 175.1),
     ("smollm-1.7b", 1.71), ("llama3.2-1b", 1.236)],
)  # fmt: skip
def test_presets_have_their_published_size(preset, billions):
    with torch.device("meta"):
        model = Llama(PRESETS[preset])
    size = sum(p.numel() for p in model.parameters()) / 1e9
    assert size == pytest.approx(billions, rel=3e-3)


VARIANTS = {
    "grouped": CFG,
    "tied": dataclasses.replace(CFG, tied=True),
    "experts": dataclasses.replace(CFG, experts=4, top_k=2),
    "one kv head": dataclasses.replace(CFG, kv_heads=1),
    "all kv heads": dataclasses.replace(CFG, kv_heads=6),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_fused_equals_plain(cfg):
    plain, fused = make(cfg, dropout=0.1), make(cfg, fused=True, dropout=0.1)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fused.named_parameters()]
    tokens, labels = make_batch(cfg)
    torch.testing.assert_close(plain(tokens), fused(tokens))
    losses = [model(tokens, labels) for model in (plain, fused)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        (loss / 7).backward()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 100])
def test_chunked_loss_equals_torch(chunk):
    dice = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(n, 6, generator=dice, dtype=torch.float64).requires_grad_() for n in (16, 11)
    )
    labels = torch.randint(0, 11, (16,), generator=dice)
    labels[3:6] = -100
    ours = LinearCrossEntropy.apply(x, w, labels, chunk, True) * 0.3
    mine = torch.autograd.grad(ours, (x, w))
    theirs = F.cross_entropy(x @ w.T, labels, ignore_index=-100, reduction="sum") * 0.3
    expected = torch.autograd.grad(theirs, (x, w))
    for a, b in zip((ours, *mine), (theirs, *expected), strict=True):
        torch.testing.assert_close(a, b)


class LargestTensor(TorchDispatchMode):
    """Watches live bytes: every new storage counts until it is freed."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


def test_fused_needs_less_memory_and_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr("picotron_lab.fused.CHUNK_ELEMENTS", {"cpu": 2**15, "cuda": 2**15})
    cfg = dataclasses.replace(CFG, vocab_size=2048)
    tokens, labels = make_batch(cfg, (4, 64))
    meters = []
    for fused in (False, True):
        model = make(cfg, fused, torch.float32)
        with LargestTensor() as meter:
            model(tokens, labels).backward()
        meters.append(meter)
    plain, fused = meters
    assert fused.peak < 0.6 * plain.peak
    assert plain.largest == 4 * 64 * 2048
    assert fused.largest <= 2048 * 48, "the largest tensor should be the head's weight gradient"


def test_dropout_has_its_rate_and_keeps_the_mean():
    where = Where(torch.arange(50), torch.arange(40), step=3, seed=1)
    x = torch.ones(40, 50, 30)
    dropped = Dropout(0.3, site=2)(x, where)
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.005)
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_dropout_of_a_part_is_a_part_of_the_dropout():
    whole = Dropout(0.3, 1)(torch.ones(6, 8, 4), Where(torch.arange(8), torch.arange(6), 2, 7))
    part = Where(torch.arange(2, 8, 2), torch.arange(3, 6), 2, 7)
    assert torch.equal(Dropout(0.3, 1)(torch.ones(3, 3, 4), part), whole[3:, 2::2])


def test_dropout_bits_differ_in_every_coordinate():
    """Neighbours in seed, step, site, row, position or channel agree about half of the time per
    bit."""
    base = (5, 9, 2, torch.arange(20)[:, None, None], torch.arange(20)[:, None], torch.arange(20))
    bits = scramble(*base)
    assert bits.unique().numel() > 7990
    for i in range(6):
        other = scramble(*(c + (i == j) for j, c in enumerate(base)))
        agree = ~(bits ^ other)
        share = sum(((agree >> b) & 1).float().mean() for b in range(32)) / 32
        assert share == pytest.approx(0.5, abs=0.02)


def test_dropout_is_off_in_evaluation():
    model = make(dropout=0.5).eval()
    tokens, _ = make_batch()
    assert torch.equal(model(tokens), make()(tokens))


def test_parts_are_modules_that_can_be_replaced():
    kinds = {type(m).__name__ for m in make(dataclasses.replace(CFG, experts=2)).modules()}
    assert {"AttentionCore", "Linear", "Embedding", "Head", "MoE", "RMSNorm"} <= kinds
    assert not any(isinstance(m, nn.Linear) and m.bias is not None for m in make().modules())
