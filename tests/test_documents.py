"""Documents packed into one sequence are computed as if each were alone."""

import pytest
import torch
import torch.nn.functional as F

from picotron_lab import recompute, sharding, tensor_parallel
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.fused import SDPA, fuse
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore, Llama, initial_value

LENGTHS = [[3, 1, 5], [9], [1, 7, 1]]  # of the documents of each row
ROWS = [[n for n, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
DOCUMENTS_BT = torch.tensor(ROWS)
# row, start, stop of every document
PARTS = [
    (b, sum(row[:n]), sum(row[: n + 1])) for b, row in enumerate(LENGTHS) for n in range(len(row))
]
CORES = {"plain": AttentionCore, "fused": SDPA}
CFG = ModelConfig(vocab_size=40, hidden_size=24, layers=2, heads=6, kv_heads=2, ffn_size=20)
EXPERTS = ModelConfig(
    vocab_size=40, hidden_size=24, layers=2, heads=6, kv_heads=2, ffn_size=20, experts=4
)


def numbers(*shape, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice, dtype=torch.float64).requires_grad_()


# ---- the core of attention


def alone(q, k, v):
    """torch's own causal attention of one document, [T, heads, C] each."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_packed_attention_equals_each_document_alone(core, kv_heads):
    q, k, v = numbers(3, 9, 6, 4), numbers(3, 9, kv_heads, 4, seed=1), numbers(3, 9, kv_heads, 4)
    factor = numbers(3, 9, 6, 4, seed=3).detach()
    packed = core()(q, k, v, DOCUMENTS_BT)
    expected = torch.zeros_like(packed)
    for b, start, stop in PARTS:
        place = b, slice(start, stop)
        expected[place] = alone(q[place], k[place], v[place])
    torch.testing.assert_close(packed, expected)
    found = torch.autograd.grad((packed * factor).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * factor).sum(), (q, k, v))
    for mine, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_the_first_token_of_a_document_sees_only_itself(core):
    q, k, v = numbers(3, 9, 2, 4), numbers(3, 9, 2, 4, seed=1), numbers(3, 9, 2, 4, seed=2)
    packed = core()(q, k, v, DOCUMENTS_BT)
    for b, start, _ in PARTS:
        torch.testing.assert_close(packed[b, start], v[b, start])


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("numbers_of", [[4, 9, 2], [0, 1, 0], [-1, 7, 3]])
def test_only_equality_of_neighbours_numbers_counts(core, numbers_of):
    """Numbers may start anywhere and fall; but equal ones are one document, also far apart."""
    q, k, v = numbers(1, 9, 2, 4), numbers(1, 9, 2, 4, seed=1), numbers(1, 9, 2, 4, seed=2)
    documents_BT = torch.tensor(numbers_of).repeat_interleave(3)[None]
    scores = torch.einsum("bthc,bshc->bhts", q, k) / 2
    for t in range(9):
        for s in range(9):
            if s > t or numbers_of[s // 3] != numbers_of[t // 3]:
                scores[:, :, t, s] = -torch.inf
    expected = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v)
    torch.testing.assert_close(core()(q, k, v, documents_BT), expected)


# ---- the whole model


def build(cfg, fused=False, kind="none", impl="plain", rate=0.0):
    with torch.device("meta"):
        model = Llama(cfg, rate)
    sharding.attach(model)
    if fused:
        fuse(model)
    recompute.apply(model, kind, impl)
    return materialise(model)


def materialise(model):
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    for parameter in model.parameters():  # large enough for attention to be far from uniform
        parameter.data *= 10 if parameter.dim() == 2 else 1
    return model


def batch():
    dice = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 40, (3, 9), generator=dice) for _ in range(2))
    labels[0, 2] = labels[2, 7] = -100
    return tokens, labels


def packed_where():
    return Where(torch.arange(9), torch.arange(3), 5, 2, DOCUMENTS_BT)


def separately(cfg, rate):
    """Logits, and gradients by name, of documents run by themselves, each at its positions."""
    model, (tokens, labels) = build(cfg, rate=rate), batch()
    logits = torch.zeros(3, 9, 40, dtype=torch.float64)
    for b, start, stop in PARTS:
        mine = b, slice(start, stop)
        where = Where(torch.arange(start, stop), torch.tensor([b]), 5, 2)
        logits[mine] = model(tokens[mine][None], None, where)[0].detach()
        model(tokens[mine][None], labels[mine][None], where).backward()
    return logits, {p.record.name: p.grad for p in model.parameters()}


WAYS = {
    "plain": {},
    "fused": {"fused": True},
    "selective, plain": {"kind": "selective"},
    "selective, fused": {"kind": "selective", "impl": "fused"},
    "full, plain": {"kind": "full"},
    "fused, full, fused": {"kind": "full", "impl": "fused", "fused": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("cfg", [CFG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "rate", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.2]  # without: after a change
)
def test_packed_documents_equal_documents_run_separately(way, cfg, rate):
    logits, expected = separately(cfg, rate)
    model, (tokens, labels) = build(cfg, rate=rate, **way), batch()
    torch.testing.assert_close(model(tokens, None, packed_where()), logits, rtol=1e-10, atol=1e-12)
    model(tokens, labels, packed_where()).backward()
    for p in model.parameters():
        assert expected[p.record.name].abs().max() > 0
        torch.testing.assert_close(p.grad, expected[p.record.name], rtol=1e-9, atol=1e-12)


def test_documents_may_count_positions_from_their_own_start():
    """Rotary positions are relative: only the float32 of their angles tells where a document is."""
    model, (tokens, _) = build(CFG), batch()
    packed = model(tokens, None, packed_where())
    for b, start, stop in PARTS:
        by_itself = model(tokens[b, start:stop][None])[0]
        torch.testing.assert_close(packed[b, start:stop], by_itself, rtol=1e-5, atol=1e-5)


def test_without_documents_a_sequence_is_one():
    model, (tokens, _) = build(CFG), batch()
    one = Where(torch.arange(9), torch.arange(3), documents_BT=torch.zeros(3, 9, dtype=torch.int64))
    torch.testing.assert_close(model(tokens, None, one), model(tokens), rtol=1e-12, atol=1e-12)
    changed = model(tokens, None, packed_where())
    assert not torch.allclose(changed[0, 3:], model(tokens)[0, 3:])


@pytest.mark.parametrize("fused", [False, True])
def test_tensor_parallel_ranks_keep_documents_apart(fused):
    def run(axis):
        with torch.device("meta"):
            model = Llama(CFG)
        sharding.attach(model)
        if fused:
            fuse(model)
        impl = "fused" if fused else "plain"
        tensor_parallel.parallelize(model, axis, axis.split("kv", [[0], [1]]), impl)
        materialise(model)
        tokens, labels = batch()
        model(tokens, labels, packed_where()).backward()
        sharding.reduce_gradients(model.parameters(), {"tp": axis})
        return model(tokens, None, packed_where()).detach(), [
            (p.record, p.grad) for p in model.parameters()
        ]

    logits, expected = separately(CFG, 0.0)
    for found, grads in run_ranks(run, 2):
        torch.testing.assert_close(found, logits, rtol=1e-10, atol=1e-12)
        for record, grad in grads:
            part = expected[record.name][record.index]
            torch.testing.assert_close(grad, part, rtol=1e-9, atol=1e-12)
