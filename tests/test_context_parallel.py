"""Context parallelism equals one device: whole models, and attention beside torch's own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from context_programs import (
    CASES,
    MERGED,
    PROCESSES,
    WAYS,
    attention_inputs,
    backward,
    case,
    documents_of,
    error,
    every_way,
    on_rank,
    one_device,
    over_gloo,
    own_part,
    whole_batch,
)
from tensor_programs import Job, scaled_value

from picotron_lab import context_parallel, sequence_parallel, sharding, tensor_parallel
from picotron_lab.analysis.context import Layer, predictions, saved_bytes
from picotron_lab.config import CP_KINDS, ConfigError
from picotron_lab.context_parallel import (
    FusedGather,
    FusedRing,
    Ring,
    chunks,
    make_core,
    parallelize,
    positions,
)
from picotron_lab.fused import SDPA
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore, Llama
from picotron_lab.processes import run_processes

MORE = (
    "4 ranks, 4 kv heads, documents", "8 ranks, documents", "8 ranks, 2 kv heads, 1 token each",
)  # fmt: skip


def rare(*case):
    """Left to a run after a change."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def assert_equal(results, expected, limit=1e-10):
    """Loss, every gradient relative to its own norm, and what routers saw."""
    loss, gradients, seen = expected
    for mine, my_gradients, my_seen in results:
        assert float(mine) == pytest.approx(float(loss), rel=limit)
        assert my_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            off = torch.linalg.vector_norm(my_gradients[name] - gradient)
            assert off <= limit * torch.linalg.vector_norm(gradient), f"{name} is off by {off}"
        assert my_seen == pytest.approx(seen, rel=limit)


# ---- whole models


@every_way
@pytest.mark.parametrize("name", [rare(name) if name in MORE else name for name in CASES])
def test_loss_and_gradients_equal_one_device(name, kind, impl):
    it = replace(CASES[name], kind=kind, impl=impl, fused_model=impl == "fused")
    assert_equal(run_ranks(on_rank, it.n, it), one_device(it))


@pytest.mark.slow
def test_over_gloo():
    """Real processes, which see no memory of each other."""
    for it, *results in zip(PROCESSES, *run_processes(over_gloo, 3), strict=True):
        assert_equal(results, one_device(it))


@pytest.mark.parametrize("kind", CP_KINDS)
def test_paths_may_be_mixed(kind):
    for impl, fused_model in (("fused", False), ("plain", True)):
        it = replace(CASES["4 ranks, 2 kv heads"], kind=kind, impl=impl, fused_model=fused_model)
        assert_equal(run_ranks(on_rank, it.n, it), one_device(it))


@every_way
def test_float32(kind, impl):
    it = case(4, 8, 2, dtype=torch.float32, packed=True, kind=kind, impl=impl)
    assert_equal(run_ranks(on_rank, it.n, it), one_device(it), 1e-5)


@pytest.mark.parametrize("kind", CP_KINDS)
@pytest.mark.parametrize("seed", [0, rare(1)])
def test_any_order_of_ranks(kind, seed):
    it = replace(CASES["3 ranks, 1 kv head, documents"], kind=kind, impl="fused")
    assert_equal(run_ranks(on_rank, it.n, it, seed=seed), one_device(it))


@pytest.mark.parametrize("kind", CP_KINDS)
@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("again", ["full", rare("selective")])
def test_recomputed(kind, impl, again):
    it = case(4, 8, 2, packed=True, kind=kind, impl=impl, recompute=again)
    assert_equal(run_ranks(on_rank, it.n, it), one_device(it))


@every_way
def test_experts_balance_over_whole_sequences(kind, impl):
    """Balance loss, and a bias that moves: a rank that balanced its own tokens would differ."""
    it = case(4, 8, 2, experts=4, kind=kind, impl=impl)
    options = {"balance_loss": 0.3, "balance_speed": 0.1, "z_loss": 0.01}
    it = replace(it, job=it.job.with_model(**options))
    expected = one_device(it)
    assert expected[2]["balance_loss"] > 1.01, "experts are busy alike: nothing to see"
    assert_equal(run_ranks(on_rank, it.n, it), expected)


def both_axes(world, it):
    """2 tensor-parallel ranks, with the sequence cut between regions, times 2 of context."""
    tp, cp = (world.split(*axis) for axis in (("tp", [[0, 1], [2, 3]]), ("cp", [[0, 2], [1, 3]])))
    kv = tp.split("kv", [[rank] for rank in tp.ranks])
    with torch.device("meta"):
        model = Llama(it.job.cfg, it.job.dropout)
    sharding.attach(model)
    tensor_parallel.parallelize(model, tp, kv, it.impl)
    tensor_parallel.split_head(model, tp, it.impl)
    sequence_parallel.parallelize(model, tp, it.impl)
    parallelize(model, cp, it.impl, it.kind)
    sharding.replicate(model, cp)
    sharding.materialise(model, 1, scaled_value, dtype=it.job.dtype)
    inputs, count = whole_batch(it)
    backward(model, own_part(inputs, positions(it.kind, it.length, cp)), count)
    sharding.reduce_gradients(model.parameters(), {"tp": tp, "cp": cp, "kv": kv})
    return [(p.record, p.grad) for p in model.parameters()]


@every_way
def test_inside_tensor_parallel_regions(kind, impl):
    it = case(2, 8, 4, chunk=4, packed=True, kind=kind, impl=impl)
    gradients = one_device(it)[1]
    for parts in run_ranks(both_axes, 4, it):
        for record, gradient in parts:
            expected = gradients[record.name][record.index]
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="--cp-kind spiral is not one of ring, zigzag"):
        run_ranks(lambda axis: parallelize(Llama(Job().cfg), axis, "plain", "spiral"), 1)


# ---- who has which tokens


def test_chunks_and_positions_by_hand():
    def held(axis, kind):
        return positions(kind, 12, axis).tolist()

    in_order = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    mirrored = [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    for kind, expected in zip(CP_KINDS, (in_order, mirrored, mirrored, in_order), strict=True):
        assert run_ranks(held, 3, kind) == expected
        assert run_ranks(held, 1, kind) == [list(range(12))]
    assert [chunks("zigzag", rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [chunks("ring", rank, 3) for rank in range(3)] == [(0,), (1,), (2,)]


def held_by(rank, size, kind):
    """Positions [4] of a rank's tokens, four on each."""
    return positions(kind, 4 * size, SimpleNamespace(rank=rank, size=size))


def look(seen, queries_T, keys_S, pieces):
    """Count in seen, [T, all positions], what queries at some positions see of keys at others."""
    for rows, keys, causal in pieces:
        part = torch.ones(len(queries_T[rows]), len(keys_S[keys]), dtype=torch.int64)
        seen[rows, keys_S[keys]] += part.tril() if causal else part


QUERIES = SimpleNamespace(q_BTHC=torch.empty(1, 4, 1, 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["ring", "zigzag", "all-gather"])
@pytest.mark.parametrize("way", [Ring, FusedRing])
def test_pieces_are_all_that_is_not_future(way, kind, n):
    """Chunk by chunk, or in larger shapes: of all ranks' blocks, each query meets every key up to
    its own position once, and no other."""
    for rank in range(n):
        mine_T, seen = held_by(rank, n, kind), torch.zeros(4, 4 * n, dtype=torch.int64)
        ring = way(SimpleNamespace(rank=rank, size=n), kind)
        for hops in range(n):
            look(seen, mine_T, held_by((rank - hops) % n, n, kind), ring.pieces(hops, QUERIES))
        assert torch.equal(seen, (mine_T[:, None] >= torch.arange(4 * n)).long())


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_shapes_of_gathered_keys_are_all_that_is_not_future(n):
    """The same of own squares, and keys in the order late chunks of all ranks, early ones."""
    held = [held_by(rank, n, "all-gather") for rank in range(n)]
    gathered = torch.cat([x[2:] for x in held] + [x[:2] for x in held])
    for rank, mine_T in enumerate(held):
        axis, seen = SimpleNamespace(rank=rank, size=n), torch.zeros(4, 4 * n, dtype=torch.int64)
        squares, rectangles = FusedGather(axis, "all-gather").shapes(QUERIES)
        look(seen, mine_T, mine_T, squares)
        look(seen, mine_T, gathered, rectangles)
        assert torch.equal(seen, (mine_T[:, None] >= torch.arange(4 * n)).long())


@pytest.mark.parametrize(("kind", "length", "count"), [("ring", 10, 4), ("zigzag", 12, 8)])
def test_lengths_that_cannot_be_shared_out(kind, length, count):
    with pytest.raises(AssertionError, match=f"{length} tokens .* multiple of {count}"):
        run_ranks(lambda axis: positions(kind, length, axis), 4)


# ---- attention by itself


def by_torch(inputs, documents_BT=None):
    """out, dq, dk, dv of torch's attention on the whole sequence."""
    *qkv, grad = (x.transpose(1, 2) for x in inputs)
    qkv = [x.detach().requires_grad_() for x in qkv]
    grouped, mask = qkv[0].shape[1] != qkv[1].shape[1], None
    if documents_BT is not None:
        mask = (documents_BT[:, :, None] == documents_BT[:, None]).tril()[:, None]
    out = F.scaled_dot_product_attention(
        *qkv, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    out.backward(grad)
    return [x.detach().transpose(1, 2) for x in (out, *(x.grad for x in qkv))]


def by_ranks(n, kind, impl, inputs, documents_BT=None, core=AttentionCore):
    """The same of n ranks, put together."""
    length = inputs[0].shape[1]

    def on_rank(axis):
        mine_T = positions(kind, length, axis)
        # slices of a larger tensor, as v is of a joint projection
        *qkv, grad = (x.repeat(1, 1, 1, 2)[:, mine_T, :, : x.shape[-1]] for x in inputs)
        qkv = [x.detach().requires_grad_() for x in qkv]
        documents = None if documents_BT is None else documents_BT[:, mine_T]
        out = make_core(core(), axis, impl, kind)(*qkv, documents)
        out.backward(grad)
        return mine_T, [out.detach(), *(x.grad for x in qkv)]

    wholes = [torch.empty_like(x) for x in (inputs[0], *inputs[:3])]
    for mine_T, parts in run_ranks(on_rank, n):
        for whole, part in zip(wholes, parts, strict=True):
            assert part.dtype == whole.dtype
            whole[:, mine_T] = part
    return wholes


SHAPES = {  # n, B, chunk, H, K, C
    "2 ranks": (2, 2, 5, 4, 4, 3),
    "3 ranks, 1 kv head": (3, 1, 3, 6, 1, 5),
    "4 ranks, 2 kv heads": (4, 3, 2, 4, 2, 4),
    "8 ranks": (8, 2, 1, 8, 4, 2),
    "1 rank": (1, 2, 5, 2, 1, 3),
}


@every_way
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [rare(s) if s == "8 ranks" else s for s in SHAPES])
def test_attention_equals_torchs(shape, packed, kind, impl):
    """Forward and backward in float64. Documents hide whole blocks from some rows."""
    n, B, chunk, *sizes = SHAPES[shape]
    length = chunk * n * len(chunks(kind, 0, n))
    documents = documents_of(B, length, seed=1) if packed else None
    inputs = attention_inputs((B, length, *sizes))
    found = by_ranks(n, kind, impl, inputs, documents)
    for mine, expected in zip(found, by_torch(inputs, documents), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@every_way
def test_documents_in_any_order(kind, impl):
    """Tokens of a document need not be neighbours: only equal numbers count."""
    inputs, dice = attention_inputs((2, 24, 4, 2, 4)), torch.Generator().manual_seed(0)
    documents = torch.randint(3, (2, 24), generator=dice)
    found = by_ranks(4, kind, impl, inputs, documents)
    for mine, expected in zip(found, by_torch(inputs, documents), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@every_way
def test_large_scores_neither_overflow_nor_vanish(kind, impl):
    """Scores of some thousands: exp of any difference is 0 or out of range in float32."""
    inputs = attention_inputs((2, 16, 4, 2, 8), torch.float32, scale=30.0)
    found = by_ranks(4, kind, impl, inputs)
    wide = [x.double() for x in inputs]
    for mine, expected in zip(found, by_torch(wide), strict=True):
        size = expected.abs().max()
        assert (mine - expected).abs().max() < 1e-3 * size, "a score of 5000 is off by 5e-4 itself"


@every_way
def test_gradients_without_strides(kind, impl):
    """The gradient of a sum is one number, expanded; values are all alike: dq is 0."""

    def on_rank(axis):
        q, k, v = (torch.full((2, 4, heads, 3), 0.5, requires_grad=True) for heads in (4, 2, 2))
        make_core(AttentionCore(), axis, impl, kind)(q, k, v).sum().backward()
        return q.grad, v.grad.sum()

    for dq, _ in (results := run_ranks(on_rank, 2)):
        torch.testing.assert_close(dq, torch.zeros_like(dq))
    assert float(sum(dv for _, dv in results)) == pytest.approx(2 * 8 * 4 * 3)


@every_way
def test_bfloat16_is_as_exact_as_torchs(kind, impl):
    """Relative to torch's own errors. Plain blocks are wide, and rounded once: better. Fused ones
    are rounded before they are merged, and once more after: root 2. Inside ulysses, plain, is
    model.py's core, which rounds the softmax to 8 bits: 2."""
    inputs = attention_inputs((2, 64, 4, 2, 16), torch.bfloat16, scale=1.0)
    exact = by_torch([x.double() for x in inputs])
    factor = 2 if (kind, impl) == ("ulysses", "plain") else 1 if impl == "plain" else 2**0.5
    core = AttentionCore if impl == "plain" else SDPA
    mine = error(by_ranks(4, kind, impl, inputs, core=core), exact)
    torchs = error(by_torch(inputs), exact)
    assert all(a <= factor * b for a, b in zip(mine, torchs, strict=True)), (mine, torchs)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("kind", ["ring", "zigzag", "all-gather"])
def test_long_sequences_are_as_exact_as_torchs(kind, impl):
    """4096 tokens in float32 on 4 ranks, beside float64: as exact as torch on one device."""
    inputs = attention_inputs((1, 4096, 2, 1, 32), torch.float32, scale=1.0)
    exact = by_torch([x.double() for x in inputs])
    mine, torchs = error(by_ranks(4, kind, impl, inputs), exact), error(by_torch(inputs), exact)
    assert all(a <= MERGED * b for a, b in zip(mine, torchs, strict=True)), (mine, torchs)


# ---- alone


@every_way
def test_one_rank_sends_nothing(kind, impl):
    it = replace(CASES["1 rank, 2 kv heads, documents"], kind=kind, impl=impl)

    def sent(axis):
        on_rank(axis, it)
        return axis.ledger.calls

    assert run_ranks(sent, 1) == [[]]


# ---- the program's table


def columns(printed):
    """{(kind, path, what): (predicted, measured)} of what `main` prints."""
    rows = [line for line in printed.splitlines() if line.split()[0] in CP_KINDS]
    names = [(row[:11].strip(), row[11:18].strip(), row[18:42].strip()) for row in rows]
    values = [(row[-25:-13].strip(), row[-12:].strip()) for row in rows]
    return dict(zip(names, values, strict=True))


def test_the_table_predicts_what_it_measures(capsys):
    context_parallel.main()
    found = columns(capsys.readouterr().out)
    assert {(kind, impl) for kind, impl, _ in found} == set(WAYS)
    assert len(found) == 2 * (5 + 5 + 6) + 4 + 3
    assert [key for key, (predicted, measured) in found.items() if predicted != measured] == []
    work = {("ring", "plain"): "4", ("ring", "fused"): "7"}  # 4 blocks to 1; 3 + 1/2 to 1/2
    for kind, impl in WAYS:
        assert found[kind, impl, "work"][1] == work.get((kind, impl), "1")


@every_way
@pytest.mark.parametrize(("n", "element"), [rare(1, 4), (2, 2), rare(4, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_predictions_of_other_layers(kind, impl, n, element, packed):
    """One rank, other precisions, documents: on every rank."""
    at = Layer(kind, impl, n, B=2, T=8, H=8, K=2, C=4, element=element, documents=packed)
    seen = run_ranks(context_parallel._demo, n, at)
    said = {name: str(value) for name, (_, value) in predictions(at).items()}
    work = [measured["work"] for measured in seen]
    assert said.pop("work", f"{max(work) / min(work):g}") == f"{max(work) / min(work):g}"
    for measured in seen:
        assert {name: str(measured[name]) for name in said} == said


def test_layers_that_are_not_predicted():
    with pytest.raises(AssertionError, match="no element has 3 bytes"):
        Layer("ring", "plain", n=2, B=1, T=4, H=2, K=1, C=4, element=3)
    at = Layer("ulysses", "fused", n=2, B=1, T=4, H=2, K=1, C=4, documents=True)
    with pytest.raises(AssertionError, match="a fused core inside ulysses"):
        saved_bytes(at, flash=True)
