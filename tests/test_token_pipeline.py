"""Slices of sequences make the gradients of whole sequences, and nothing of them stays behind.

Compared in float64 with torch's scaled_dot_product_attention and the plain model's whole sequences.
"""

import dataclasses
import itertools
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from picotron_lab import deferred, recompute, sequence_parallel, sharding, tensor_parallel
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.lab import run_ranks
from picotron_lab.model import IGNORED, AttentionCore, Llama, initial_value
from picotron_lab.token_pipeline import CORES, parallelize
from picotron_lab.token_slices import cut

CFG = ModelConfig(
    vocab_size=29, hidden_size=12, layers=2, heads=6, kv_heads=3, ffn_size=10, head_size=4
)
CONFIGS = {
    "grouped": CFG,
    "one kv head": dataclasses.replace(CFG, kv_heads=1),
    "no groups": dataclasses.replace(CFG, kv_heads=6),
    "tied": dataclasses.replace(CFG, tied=True),
    "experts": dataclasses.replace(CFG, experts=3),
}
IMPLS = ("plain", "fused")
AGAIN = (("selective", "plain"), ("full", "plain"), ("full", "fused"))
B, T = 3, 9


def compositions(length):
    """Every way to cut a sequence: of each border between two tokens, whether it is a cut."""
    for borders in itertools.product((False, True), repeat=length - 1):
        ends = [i + 1 for i, border in enumerate(borders) if border] + [length]
        yield [end - first for first, end in zip([0, *ends], ends, strict=False)]


def test_compositions_are_all():
    assert sorted(compositions(3)) == [[1, 1, 1], [1, 2], [2, 1], [3]]


def error(found, expected):
    """Largest deviation beside the largest number expected; nan if anything is."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


# ---- one attention


def qkv_and_grad(length, H=4, K=2, C=3, dtype=torch.float64):
    """q, k, v, and the gradient of the result."""
    dice = torch.Generator().manual_seed(length)
    shapes = [(2, length, heads, C) for heads in (H, K, K, H)]
    return [2 * torch.randn(shape, generator=dice).to(dtype) for shape in shapes]


def torchs_attention(q, k, v, grad, documents_BT=None):
    """[out, dq, dk, dv] of whole sequences, in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(1, 2) for x in leaves]
    heads[1:] = [x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in heads[1:]]
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    if documents_BT is not None:
        seen = seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None])
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def sliced_attention(core, qkv, grad, lengths, documents_BT=None):
    """The same slice by slice; also the Sequence."""
    leaves, outs = [x.detach().requires_grad_() for x in qkv], []
    tokens_BT = torch.zeros(qkv[0].shape[:2], dtype=torch.int64)
    where = dataclasses.replace(Where.first(tokens_BT), documents_BT=documents_BT)
    slices = [where for _, _, where in cut((tokens_BT, None, where), lengths)]
    for core.where, *part in zip(slices, *(x.split(lengths, 1) for x in leaves), strict=True):
        outs.append(core(*part, core.where.documents_BT))
    for out, part in reversed([*zip(outs, grad.split(lengths, 1), strict=True)]):
        out.backward(part)
    return [torch.cat(outs, 1).detach(), *(x.grad for x in leaves)], slices[0].sequence


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 6, 7, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_every_way_to_cut_a_sequence(length, impl):
    *qkv, grad = qkv_and_grad(length)
    expected = torchs_attention(*qkv, grad)
    for lengths in compositions(length):
        found, sequence = sliced_attention(CORES[impl](AttentionCore()), qkv, grad, lengths)
        assert max(map(error, found, expected)) < 1e-12, lengths
        assert sequence.held == {}


@pytest.mark.parametrize("impl", IMPLS)
def test_every_way_to_cut_documents(impl):
    """Some end inside a slice, some at a border; some queries see nothing of earlier slices."""
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
    *qkv, grad = qkv_and_grad(7)
    expected = torchs_attention(*qkv, grad, documents_BT)
    for lengths in compositions(7):
        core = CORES[impl](AttentionCore())
        found, _ = sliced_attention(core, qkv, grad, lengths, documents_BT)
        assert max(map(error, found, expected)) < 1e-12, lengths


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16(impl):
    """As near as the plain model's attention, which is off by 0.015, whatever the slices."""
    *qkv, grad = qkv_and_grad(48, C=8, dtype=torch.bfloat16)
    expected = torchs_attention(*qkv, grad)
    for lengths in ([48], [20, 16, 12], [1] * 48):
        found, _ = sliced_attention(CORES[impl](AttentionCore()), qkv, grad, lengths)
        assert {x.dtype for x in found} == {torch.bfloat16}
        assert max(map(error, found, expected)) < 0.015, lengths


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_keys_add_up_in_float32(impl):
    """All 33 queries see key 0 alone. The last one brings it a gradient of 256, each before it 1,
    together 288; in bfloat16 256 + 1 is 256."""
    q = torch.full((1, 33, 1, 8), 30.0, dtype=torch.bfloat16)
    k, v, grad = torch.zeros(3, 1, 33, 1, 8, dtype=torch.bfloat16)
    k[:, 0], grad[:], grad[:, -1] = 30, 1, 256
    found, _ = sliced_attention(CORES[impl](AttentionCore()), (q, k, v), grad, [1] * 33)
    assert (found[3][:, 0] == 288).all() and (found[3][:, 1:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_of_all_queries_times_all_keys_is_kept(impl):
    """64 x 64 scores; of 4 slices one has 16 x 64. q and out of a slice have 16 * 2 elements."""
    *qkv, grad = qkv_and_grad(64, H=1, K=1, C=2)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().nbytes()) or x, lambda x: x):
        sliced_attention(CORES[impl](AttentionCore()), qkv, grad, [16] * 4)
    assert len(kept) > 8 and max(kept) <= 2 * 64 * 2 * 8


HELD = {  # tokens whose keys and values are held, and whose gradients are, after each backward
    "plain": [(6, 6), (3, 3), (0, 0)],
    "fused": [(7, 6), (7, 6), (0, 0)],  # buffers, which go with the first slice
}


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_held_and_when_it_goes(impl):
    """Slices of 3, 3 and 1 tokens, the memory of their tensors counted."""
    *qkv, grad = qkv_and_grad(7, K=2, C=3)
    core, tokens_BT, outs = CORES[impl](AttentionCore()), torch.zeros(2, 7, dtype=torch.int64), []
    slices = cut((tokens_BT, None, Where.first(tokens_BT)), [3, 3, 1])
    parts = (xs.split([3, 3, 1], 1) for xs in qkv)
    for (_, _, core.where), *part in zip(slices, *parts, strict=True):
        outs.append(core(*(x.clone().requires_grad_() for x in part)))
    held, token = core.where.sequence.held, 2 * 2 * 2 * 3 * 8  # k and v, B, K, C, float64

    def tokens(tensors):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        return sum(x.nbytes() for x in storages.values()) / token

    assert not any(x.requires_grad for x in held[core].tensors()), "graphs are kept"
    seen = [tokens(held[core].tensors())]
    for out, part in reversed([*zip(outs, grad.split([3, 3, 1], 1), strict=True)]):
        out.backward(part)
        both, gradients = (held[core].tensors(), held[core].sums) if held else ((), ())
        seen.append((tokens(both) - tokens(gradients), tokens(gradients)))
    assert seen == [7, *HELD[impl]]


# ---- whole models


def large_value(name, shape, generator):
    """Weights so large that attention is not all but even."""
    return initial_value(name, shape, generator) * (1 if len(shape) == 1 else 15)


def build(cfg=CFG, impl=None, again=("none", "plain"), rate=0.3, fused=False):
    """In the order of the trainer; impl None: a plain model."""
    with torch.device("meta"):
        model = Llama(cfg, rate)
    sharding.attach(model)
    if fused:
        fuse(model)
    if impl:
        parallelize(model, impl)
    recompute.apply(model, *again)
    sharding.materialise(model, 1, large_value, dtype=torch.float64)
    return model


def batch(first_row=0, documents=False, length=T):
    dice = torch.Generator().manual_seed(7 + first_row)
    tokens_BT, labels_BT = torch.randint(29, (2, B, length), generator=dice)
    labels_BT[torch.rand(B, length, generator=dice) < 0.2] = IGNORED
    documents_BT = torch.randint(2, (B, length), generator=dice).cumsum(1) if documents else None
    rows_B = torch.arange(first_row, first_row + B)
    return tokens_BT, labels_BT, Where(torch.arange(length), rows_B, 3, 7, documents_BT)


def run(model, slices):
    """Loss of a sequence, slice by slice, there and back."""
    losses = [model(*arguments) for arguments in slices]
    for loss in reversed(losses):
        loss.backward()
    assert slices[0][2].sequence.held == {}, "keys and values of layers stayed behind"
    return sum(losses).detach()


def gradients(model):
    return {p.record.name: p.grad for p in model.parameters() if p.requires_grad}


def assert_equal(model, plain):
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and error(found[name], gradient) < 1e-12, name


def assert_as_whole(model, arguments, lengths, plain):
    """Loss and gradients of all parameters, the embedding's too."""
    loss = plain(*arguments)
    loss.backward()
    assert abs(run(model, cut(arguments, lengths)) / loss - 1) < 1e-12
    assert_equal(model, plain)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_models(name, impl):
    model = build(CONFIGS[name], impl, fused=impl == "fused")
    assert_as_whole(model, batch(), [4, 3, 2], build(CONFIGS[name]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("again", AGAIN, ids="-".join)
@pytest.mark.parametrize("documents", [False, True])
def test_recomputation(again, impl, documents):
    """Forward of a slice runs twice; the second time later slices are gone."""
    model = build(impl=impl, again=again, fused=impl == "fused")
    assert_as_whole(model, batch(documents=documents), [2, 3, 1, 3], build())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(6))
def test_random_slices_of_longer_sequences(seed, impl):
    lengths = torch.randint(1, 12, (1 + seed,), generator=torch.Generator().manual_seed(seed))
    arguments = batch(documents=seed % 2 > 0, length=int(lengths.sum()))
    model = build(impl=impl, again=("full" if seed % 3 else "none", impl))
    assert_as_whole(model, arguments, lengths.tolist(), build())


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_of_a_slice_may_run_twice(impl):
    """Without gradients, as validation does, and with; in both graphs the same is stored."""
    model, plain, arguments = build(impl=impl), build(), batch()
    slices = cut(arguments, [4, 3, 2])
    with torch.no_grad():
        for each in slices:
            model(*each)
    losses = [(model(*each), model(*each))[i % 2] for i, each in enumerate(slices)]
    model(*slices[0])
    for loss in reversed(losses):
        loss.backward()
    plain(*arguments).backward()
    assert_equal(model, plain)
    assert slices[0][2].sequence.held == {}


@pytest.mark.parametrize("impl", IMPLS)
def test_validation_keeps_no_gradients_and_gives_the_logits(impl):
    model, (tokens_BT, _, where) = build(impl=impl).eval(), batch()
    slices = cut((tokens_BT, None, where), [5, 4])
    with torch.no_grad():
        logits_BTV = torch.cat([model(*each) for each in slices], 1)
        expected = build().eval()(tokens_BT, None, where)
    assert error(logits_BTV, expected) < 1e-12
    assert all(held.sums == [] for held in slices[0][2].sequence.held.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_micro_batches_take_turns(impl):
    """As in 1F1B over slices: the second one goes forward while the first one goes backward."""
    model, plain = build(impl=impl), build()
    (a, b, c), (d, e) = (cut(batch(row), lengths) for row, lengths in ((0, (3, 3, 3)), (3, (5, 4))))
    first = [model(*each) for each in (a, b)]
    second = [model(*d)]
    first.append(model(*c))
    first.pop().backward()
    second.append(model(*e))
    first.pop().backward()
    second.pop().backward()
    first.pop().backward()
    second.pop().backward()
    for row in (0, 3):
        plain(*batch(row)).backward()
    assert_equal(model, plain)
    assert a[2].sequence.held == d[2].sequence.held == {}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_slice_without_labels(place, impl):
    """Its own loss is 0; the last one has no gradients at all, another one those of later ones."""
    tokens_BT, labels_BT, where = batch()
    labels_BT[:, 3 * place : 3 * place + 3] = IGNORED
    assert_as_whole(build(impl=impl), (tokens_BT, labels_BT, where), [3, 3, 3], build())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk", "kv", "qkv"])
def test_frozen_weights(frozen, impl):
    """Gradients of keys flow on to what lies below, even if no key weight learns."""
    model, plain = build(impl=impl), build()
    for parameter in (*model.parameters(), *plain.parameters()):
        kind = re.search(r"attention\.(.)\.weight", parameter.record.name)
        parameter.requires_grad_(kind is None or kind[1] not in frozen)
    assert_as_whole(model, batch(), [4, 3, 2], plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_where_nothing_learns_keys_go_with_their_slices(impl):
    """The first layer's attention and all below it are frozen: it has no backward."""
    model, plain, slices = build(impl=impl), build(), cut(batch(), [4, 3, 2])
    for parameter in (*model.parameters(), *plain.parameters()):
        learns = re.match(r"layers\.1|norm|head", parameter.record.name)
        parameter.requires_grad_(learns is not None)
    sequence = weakref.ref(slices[0][2].sequence)
    losses = [model(*each) for each in slices]
    while losses:
        losses.pop().backward()
    plain(*batch()).backward()
    assert_equal(model, plain)
    assert len(sequence().held) == 1
    del slices
    assert sequence() is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["none", "full"])
def test_backward_in_two_parts(kind, impl):
    """B of all slices, last first; then W of all."""
    model, plain, arguments = build(impl=impl, again=(kind, impl)), build(), batch()
    later, parameters, owed = deferred.prepare(model), [*model.parameters()], []
    for loss in reversed([model(*each) for each in cut(arguments, [4, 3, 2])]):
        later.jobs = []
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        jobs, later.jobs = later.jobs, None
        owed.append((found, jobs))
    for found, jobs in owed:
        for parameter, direct in zip(parameters, found, strict=True):
            parts = [deferred.gradient(job) for job in jobs if job.weight is parameter]
            parameter.backward(sum(parts + ([] if direct is None else [direct])))
    plain(*arguments).backward()
    assert_equal(model, plain)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sequence", [False, True])
def test_on_ranks_of_tensor_and_sequence_parallelism(sequence, impl):
    """2 ranks with the heads of one key/value head each; slices have even lengths."""
    cfg, arguments = dataclasses.replace(CFG, heads=4, kv_heads=2), batch(length=10)

    def on_rank(axis):
        with torch.device("meta"):
            model = Llama(cfg, 0.3)
        sharding.attach(model)
        tp, kv = axis.split("tp", [[0, 1]]), axis.split("kv", [[0], [1]])
        tensor_parallel.parallelize(model, tp, kv, impl)
        tensor_parallel.split_head(model, tp, impl)
        if sequence:
            sequence_parallel.parallelize(model, tp, impl)
        parallelize(model, impl)
        recompute.apply(model, "full", impl)
        sharding.materialise(model, 1, large_value, dtype=torch.float64)
        run(model, cut(arguments, [4, 4, 2]))
        sharding.reduce_gradients(model.parameters(), {"tp": tp, "kv": kv})
        return [(p.record, p.grad) for p in model.parameters()]

    plain = build(cfg)
    plain(*arguments).backward()
    expected = gradients(plain)
    for record, gradient in itertools.chain(*run_ranks(on_rank, 2)):
        assert error(gradient, expected[record.name][record.index]) < 1e-12, record.name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("again", AGAIN, ids="-".join)
def test_whole_sequences_still_work(again, impl):
    model, plain, arguments = build(impl=impl, again=again), build(), batch(documents=True)
    for each in (model, plain):
        each(*arguments).backward()
    assert_equal(model, plain)
