"""Context parallelism sends, holds, saves and computes what its contract says."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from context_programs import (
    CASES,
    WAYS,
    Sizes,
    Story,
    attention_inputs,
    case,
    every_way,
    own_part,
    parallel_model,
    whole_batch,
)

from picotron_lab.analysis.activations import Setting, layer_bytes
from picotron_lab.analysis.context import Layer, contract, imbalance, saved_bytes, visitors
from picotron_lab.analysis.meter import Meter
from picotron_lab.context_parallel import chunks, make_core, positions
from picotron_lab.fused import SDPA
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore
from picotron_lab.recompute import Recompute

rare = partial(pytest.param, marks=pytest.mark.exhaustive)  # left to a run after a change
SENT = "3 ranks, 1 kv head, documents", "4 ranks, 4 kv heads, documents", rare("8 ranks, documents")
BLOCKS = [(kind, impl) for kind, impl in WAYS if kind != "ulysses"]

# ---- what is sent


def sent(ledger, direction):
    """{"forward exchange": (calls, bytes)} of a ledger, which is emptied; and the calls."""
    calls = ledger.calls[:]
    ledger.clear()
    found = {}
    for call in calls:
        count, size = found.get(f"{direction} {call.op}", (0, 0))
        found[f"{direction} {call.op}"] = count + 1, size + call.bytes
    return found, calls


def traffic(axis, it):
    """What a whole model sends forward and backward, and the calls of both."""
    model, (inputs, count) = parallel_model(axis, it), whole_batch(it)
    mine = own_part(inputs, positions(it.kind, it.length, axis))
    loss = model(*mine) / count
    forward, there = sent(axis.ledger, "forward")
    loss.backward()
    back, calls = sent(axis.ledger, "backward")
    return forward | back, [there, calls]


def layer_of(it):
    cfg, tokens = it.job.cfg, it.length // it.n
    return Layer(it.kind, it.impl, it.n, it.job.B, tokens, cfg.heads, cfg.kv_heads, cfg.head_width,
                 it.job.dtype.itemsize, it.packed)  # fmt: skip


@every_way
@pytest.mark.parametrize("name", SENT)
def test_traffic_is_the_contract_of_each_layer(name, kind, impl):
    it = replace(CASES[name], kind=kind, impl=impl)
    layers = it.job.cfg.layers
    said = contract(layer_of(it))
    expected = {op: (layers * calls, layers * size) for op, (calls, size) in said.items()}
    for found, _ in run_ranks(traffic, it.n, it):
        assert found == expected


@every_way
def test_bfloat16_travels_narrow_and_its_sums_wide(kind, impl):
    it = case(4, 8, 2, dtype=torch.bfloat16, kind=kind, impl=impl)
    for found, _ in run_ranks(traffic, it.n, it):
        assert found == contract(layer_of(it))


@every_way
def test_full_recomputation_sends_forward_again(kind, impl):
    """So a fused ring of 2 makes 1 + 1 + 3 exchanges a layer."""
    it = case(2, packed=True, kind=kind, impl=impl, layers=2, recompute="full")
    said = contract(layer_of(it))
    for op, (calls, size) in [*said.items()]:
        again = op.replace("forward", "backward")
        if again != op:
            before = said.get(again, (0, 0))
            said[again] = before[0] + calls, before[1] + size
    expected = {op: (2 * calls, 2 * size) for op, (calls, size) in said.items()}
    for found, _ in run_ranks(traffic, it.n, it):
        assert found == expected
        assert (kind, impl) != ("ring", "fused") or found["backward exchange"][0] == 2 * (1 + 3)


# 4 ranks, B 3, T 6, H 8, K 2, C 4 in bfloat16: K and V of a rank 2 * 3 * 6 * 2 * 4 * 2 bytes
KV, DKV, Q, LABELS = 576, 1152, 1152, 3 * 6 * 8
RING = {"forward exchange": (3, 3 * 576), "backward exchange": (4, 3 * 576 + 4 * 1152)}
GATHER = {
    "forward all_gather": (2, 4 * 576), "backward all_gather": (2, 4 * 576),
    "backward reduce_scatter": (2, 4 * 1152),
}  # fmt: skip
ULYSSES = {f"{way} all_to_all": (4, 2 * 1152 + 2 * 576) for way in ("forward", "backward")}
FUSED_CALLS = {"forward exchange": 3, "backward exchange": 5, "forward all_to_all": 2,
               "backward all_to_all": 2}  # fmt: skip


@every_way
def test_payload_by_hand(kind, impl):
    """Two key/value heads travel, not eight; to ulysses' four ranks each of them goes twice."""
    at = Layer(kind, impl, n=4, B=3, T=6, H=8, K=2, C=4, element=2)
    assert (at.kv, at.dkv, at.q) == (KV, DKV, Q)
    expected = {"ring": RING, "zigzag": RING, "all-gather": GATHER, "ulysses": ULYSSES}[kind]
    if impl == "fused":  # all-gather: early and late chunks by themselves
        expected = {op: (FUSED_CALLS.get(op, 4), size) for op, (_, size) in expected.items()}
    assert contract(at) == expected
    with_labels = contract(replace(at, documents=True))
    if kind == "ulysses":
        assert with_labels["forward all_gather"] == (1, 4 * LABELS)
    elif kind == "all-gather":
        calls = 3 if impl == "plain" else 6
        assert with_labels["forward all_gather"] == (calls, 4 * (KV + LABELS))
    else:
        assert with_labels["forward exchange"] == (3, 3 * (KV + LABELS))


@every_way
def test_only_the_fused_path_computes_while_it_sends(kind, impl):
    """All calls but the last hop of the sums, when all is computed; ulysses never."""
    it = replace(CASES["4 ranks, 2 kv heads"], kind=kind, impl=impl)
    for _, (there, back) in run_ranks(traffic, it.n, it):
        assert {call.axis for call in there + back} == {"world"}
        waits = [call.waits for call in there], [call.waits for call in back]
        if impl == "plain" or kind == "ulysses":
            assert all(waits[0] + waits[1])
        elif kind == "all-gather":
            assert not any(waits[0] + waits[1])
        else:
            assert waits == ([False] * 3, [False] * 4 + [True])


# ---- when it is sent


def story(axis, kind, tokens=4):
    """Events of the fused path, forward and backward, with `tokens` on this rank."""
    q, k, v, grad = attention_inputs((1, tokens, 4, 2, 4))
    with Story(axis) as told:
        out = make_core(SDPA(), axis, "fused", kind)(q.requires_grad_(), k, v)
        forward = told.seen[:]
        told.seen.clear()
        out.backward(grad)
    return forward, told.seen


EVERYTHING, EARLY, LATE, SQUARE = (4, 4, False), (4, 2, False), (2, 4, False), (4, 4, True)


def hops(blocks, there=True):
    """A ring that computes each block (None: one that it skips) while something travels: the next
    block; on the way back, sums, also during the last block, and once more to come home."""
    told = []
    for i, block in enumerate(blocks):
        travels = i < len(blocks) - 1 or not there
        told += ["exchange"] * travels + [block] * (block is not None)
        told += ["exchange done"] * travels
    return told if there else [*told, "exchange"]


def test_shapes_and_order_of_a_fused_ring():
    """Own: a causal square. Lower ranks: everything. Higher ranks: nothing."""
    for rank, (forward, back) in enumerate(run_ranks(story, 3, "ring")):
        blocks = [SQUARE, *[EVERYTHING] * rank, *[None] * (2 - rank)]
        assert (forward, back) == (hops(blocks), hops(blocks, there=False))


def test_shapes_and_order_of_a_fused_zigzag():
    """Own: one square. Lower ranks: all queries, their early chunk. Higher: my late chunk, all."""
    for rank, (forward, back) in enumerate(run_ranks(story, 3, "zigzag")):
        blocks = [SQUARE, *[EARLY] * rank, *[LATE] * (2 - rank)]
        assert (forward, back) == (hops(blocks), hops(blocks, there=False))


def test_shapes_and_order_of_a_fused_gather():
    """4 ranks, chunks of 2. Squares of both chunks hide the gather; of one, in backward, the other
    hides the way home. Chunk r sees r chunks before it, chunk 7 - r sees 7 - r."""
    gather, square = ["all_gather"] * 4, (2, 2, True)
    arrived, scatter = ["all_gather done"] * 4, ["reduce_scatter"] * 4
    for rank, (forward, back) in enumerate(run_ranks(story, 4, "all-gather")):
        rectangles = [(2, 2 * (7 - rank), False)] + [(2, 2 * rank, False)] * (rank > 0)
        assert forward == [*gather, square, square, *arrived, *rectangles]
        assert back[:5] == [*gather, square]
        assert back[5:-5] == [*arrived, *rectangles, *scatter]
        assert back[-5:] == [square, *["reduce_scatter done"] * 4]


# ---- what is computed


def operations(axis, kind, chunk):
    """Of forward and of backward, on the plain path; B 2, H 4, K 2, C 3."""
    tokens = chunk * len(chunks(kind, 0, axis.size))
    q, k, v, grad = attention_inputs((2, tokens, 4, 2, 3))
    with Sizes() as seen:
        out = make_core(AttentionCore(), axis, "plain", kind)(q.requires_grad_(), k, v)
        forward = seen.operations
        out.backward(grad)
    return forward, seen.operations - forward


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", ["ring", "zigzag", "all-gather"])
def test_chunks_of_the_future_are_skipped(kind, n):
    """Ring: rank r computes r + 1 pairs of chunks. Two chunks: 3 of its own, 2 of each other rank.

    A pair: scores and values in forward, 2 matmuls; in backward scores again, dP, dV, dQ, dK.
    """
    pair = 2 * 2 * 4 * 5 * 5 * 3
    for rank, found in enumerate(run_ranks(operations, n, kind, 5)):
        pairs = rank + 1 if kind == "ring" else 3 + 2 * (n - 1)
        assert found == (2 * pairs * pair, 5 * pairs * pair)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("kind", "impl"), BLOCKS)
def test_work_of_the_busiest_rank(kind, impl, n):
    """Scores of the fused path by its shapes; a causal square of t has about t*t/2."""

    def work(axis):
        if impl == "plain":
            return operations(axis, kind, 4)[0]
        shapes = [event for event in story(axis, kind, 4)[0] if isinstance(event, tuple)]
        return sum(rows * keys / (2 if causal else 1) for rows, keys, causal in shapes)

    found = run_ranks(work, n)
    at = Layer(kind, impl, n, 1, 4, 4, 2, 4)
    assert max(found) / min(found) == imbalance(at)
    assert imbalance(at) == (1 if kind != "ring" else n if impl == "plain" else 2 * n - 1)


def test_ulysses_gives_each_rank_its_heads():
    """H/n heads of all tokens: as many operations for everybody, 1/n of those of one device."""
    alone = run_ranks(operations, 1, "ulysses", 12)[0]
    shared = run_ranks(operations, 2, "ulysses", 6)
    assert shared[0] == shared[1] == (alone[0] // 2, alone[1] // 2)


# ---- what is held


@pytest.mark.parametrize("n", [2, 3, rare(5)])
@pytest.mark.parametrize(("kind", "impl"), BLOCKS)
def test_blocks_of_others_at_a_time(kind, impl, n):
    """Rings: one in use, one on its way, forward and backward. All-gather: all of them."""

    def held(axis):
        q, k, v, grad = attention_inputs((2, 4, 4, 2, 4), torch.bfloat16)
        with Sizes() as seen:
            out = make_core(SDPA(), axis, impl, kind)(q.requires_grad_(), k, v)
            forward, seen.most = seen.most, 0
            out.backward(grad)
        return forward / (2 * k.nbytes), seen.most / (2 * k.nbytes)

    expected = n if kind == "all-gather" else min(2, n - 1)
    for found in run_ranks(held, n):
        assert found == (expected, expected)
    assert visitors(Layer(kind, impl, n, 2, 4, 4, 2, 4, 2)) == expected


@pytest.mark.parametrize("packed", [rare(False), True])
@pytest.mark.parametrize(("kind", "impl"), BLOCKS)
def test_no_tensor_has_scores_of_two_ranks(kind, impl, packed):
    """B 1, H 4, 16 tokens of a rank: 4 * 16 * 16 scores at most; fused, none at all, and no more of
    a mask of documents than q has."""
    documents = torch.arange(16)[None] // 5 if packed else None

    def largest(axis):
        q, k, v, grad = attention_inputs((1, 16, 4, 2, 2))
        with Sizes() as seen:
            out = make_core(SDPA(), axis, impl, kind)(q.requires_grad_(), k, v, documents)
            out.backward(grad)
        return seen.largest

    gathered = 4 * 16 * 2 * 2
    most = max(4 * 16 * 16 if impl == "plain" else 4 * 16 * 2, gathered * (kind == "all-gather"))
    assert max(run_ranks(largest, 4)) <= most


# ---- what is saved


def kept(axis, it, layers):
    """Bytes of activations between forward and backward of a rank."""
    it = replace(it, job=it.job.with_model(layers=layers))
    model, (inputs, _) = parallel_model(axis, it), whole_batch(it)
    tokens_BT, labels_BT, where = own_part(inputs, positions(it.kind, it.length, axis))
    with Meter() as meter:
        meter.label("parameter", model.parameters())
        meter.label("buffer", [tokens_BT, labels_BT, where.positions_T, where.documents_BT])
        loss = model(tokens_BT, labels_BT, where)
        meter.label("buffer", [loss])
        return meter.live["activation"]


@pytest.mark.parametrize(
    ("n", "dtype"), [(1, torch.float32), (2, torch.bfloat16), rare(4, torch.float32)]
)
@pytest.mark.parametrize(("kind", "impl"), BLOCKS)
def test_saved_bytes_of_a_layer(kind, impl, n, dtype):
    """A layer keeps what one of T/n tokens does, with a number per row and head in float32 where
    that has scores: 1/n of all tokens, whatever the number of ranks."""
    it = case(n, 8, 2, dtype=dtype, kind=kind, impl=impl, packed=True)
    it = replace(it, chunk=48 // n // len(chunks(kind, 0, n)))
    parts = layer_bytes(it.job.cfg, Setting(2, 48 // n, dtype.itemsize, dropout=True))
    parts["scores"] = 4 * 2 * 8 * (48 // n)
    more, less = run_ranks(kept, n, it, 2), run_ranks(kept, n, it, 1)
    assert [a - b for a, b in zip(more, less, strict=True)] == [sum(parts.values())] * n


def core_keeps(axis, kind, impl, core, sizes):
    """Bytes that one attention keeps: q, k, v, which nobody else has, to out."""
    with Meter() as meter:
        q, k, v, _ = attention_inputs(sizes, torch.float32)
        leaf = torch.zeros((), requires_grad=True)
        meter.label("buffer", [leaf])
        qkv = [x + leaf for x in (q, k, v)]
        del q, k, v, _
        out = make_core(core, axis, impl, kind)(*qkv)
        del qkv
        kept = meter.live["activation"]
    assert out.requires_grad
    return kept


@every_way
@pytest.mark.parametrize(("n", "K"), [(2, 4), (4, 2), rare(4, 4)])
def test_saved_bytes_of_attention(kind, impl, n, K):
    """e = 4, B 2, 6 tokens of a rank, H 8, C 4: q and out 4 * 2 * 6 * 8 * 4 = 1536 bytes."""
    flash = impl == "fused"
    core, sizes = SDPA() if flash else AttentionCore(), (2, 6, 8, K, 4)
    found = run_ranks(core_keeps, n, kind, impl, core, sizes)
    at = Layer(kind, impl, n, *sizes)
    assert found == [saved_bytes(at, flash)] * n
    q, kv, lse = 1536, 2 * 4 * 2 * 6 * K * 4, 4 * 2 * 6 * 8
    if kind != "ulysses":
        assert saved_bytes(at, flash) == q + kv + q + lse
    if kind == "ulysses" and flash:  # out in both orders; key/value heads once for each of n/K
        assert saved_bytes(at, flash) == q + max(n, K) // K * kv + 2 * q + lse


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_selective_recomputation_finds_the_core_inside_ulysses(impl):
    """Rings keep no scores: there is nothing to recompute."""

    def cores(axis, kind):
        it = case(2, kind=kind, impl=impl, recompute="selective")
        return [m for m in parallel_model(axis, it).modules() if isinstance(m, Recompute)]

    assert [len(found) for found in run_ranks(cores, 2, "ulysses")] == [1, 1]
    assert [len(found) for found in run_ranks(cores, 2, "zigzag")] == [0, 0]


@pytest.mark.parametrize(("n", "H", "K"), [(4, 6, 2), (3, 6, 2), (4, 4, 3)])
def test_ulysses_cannot_cut_a_head(n, H, K):
    def attend(axis):
        q, k, v, _ = attention_inputs((1, 2, H, K, 2))
        make_core(AttentionCore(), axis, "plain", "ulysses")(q, k, v)

    with pytest.raises(AssertionError, match=f"{H} query and {K} key/value heads out among {n}"):
        run_ranks(attend, n)


def test_a_loss_without_backward_leaves_nothing():
    """Evaluation: nothing is kept, whether with a graph or without."""

    def left(axis):
        it = case(2, kind="zigzag", impl="fused")
        model, (inputs, _) = parallel_model(axis, it), whole_batch(it)
        mine = own_part(inputs, positions(it.kind, it.length, axis))
        with Meter() as meter:
            meter.label("parameter", model.parameters())
            loss = model(*mine)
            before = meter.live["activation"]
            del loss
            return before > 0, meter.live["activation"]

    assert run_ranks(left, 2) == [(True, 0)] * 2


def test_second_derivatives_are_refused():
    def twice(axis):
        q, k, v, grad = attention_inputs((1, 2, 2, 2, 2))
        out = make_core(AttentionCore(), axis, "plain", "ring")(q.requires_grad_(), k, v)
        torch.autograd.grad(out, q, grad, create_graph=True)

    with pytest.raises(AssertionError, match="create_graph=True"):
        run_ranks(twice, 2)
