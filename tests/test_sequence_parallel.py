"""Sequence parallelism equals one device, sends what its contract says, and saves 1/n."""

from dataclasses import replace

import pytest
import tensor_programs as programs
import torch
from tensor_programs import Job

from picotron_lab.analysis.activations import Setting, layer_bytes
from picotron_lab.dropout import Dropout
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import wire_bytes
from picotron_lab.processes import run_processes
from picotron_lab.sequence_parallel import Split, contract, gather_matmul, matmul_scatter, on_wire

PATHS = {
    "plain": Job(sequence=True, T=12),
    "fused": Job(sequence=True, T=12, impl="fused", fused_model=True),
    "fused in a plain model": Job(sequence=True, T=12, impl="fused"),
    "plain in a fused model": Job(sequence=True, T=12, fused_model=True),
}
MODELS = {  # ranks, T, heads, key/value heads, ffn size, experts
    "2 ranks": (2, 6, 8, 8, 22, 0),
    "3 ranks, odd T, odd ffn": (3, 9, 6, 3, 7, 0),
    "3 ranks, 1 kv head": (3, 3, 6, 1, 9, 0),
    "4 ranks, 2 kv heads, odd ffn": (4, 12, 8, 2, 13, 0),
    "4 ranks, 1 kv head, one without ffn": (4, 4, 8, 1, 5, 0),
    "8 ranks": (8, 8, 8, 8, 22, 0),
    "8 ranks, 2 kv heads": (8, 16, 8, 2, 22, 0),
    "3 ranks, experts": (3, 9, 6, 3, 9, 3),
    "4 ranks, 2 kv heads, experts": (4, 12, 8, 2, 13, 4),
    "1 rank": (1, 7, 4, 2, 9, 0),
}


MORE = ("8 ranks", "8 ranks, 2 kv heads", "4 ranks, 2 kv heads, experts", "3 ranks, 1 kv head")


def rare(*case):
    """Left to a run after a change."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def build(path, model):
    n, T, heads, kv_heads, ffn_size, experts = MODELS[model]
    sizes = {"heads": heads, "kv_heads": kv_heads, "ffn_size": ffn_size, "experts": experts}
    return n, replace(PATHS[path], T=T).with_model(**sizes, hidden_size=2 * heads)


# ---- equal to one device


@pytest.mark.parametrize("model", [rare(m) if m in MORE else m for m in MODELS])
@pytest.mark.parametrize("path", ["plain", "fused"])
def test_loss_and_gradients_equal_one_device(path, model):
    n, job = build(path, model)
    results = run_ranks(programs.on_rank, n, job)
    assert programs.worst_deviation(results, programs.one_device(job)) < 1e-12


@pytest.mark.parametrize("path", ["fused in a plain model", "plain in a fused model"])
def test_paths_may_be_mixed(path):
    n, job = build(path, "4 ranks, 2 kv heads, odd ffn")
    results = run_ranks(programs.on_rank, n, job)
    assert programs.worst_deviation(results, programs.one_device(job)) < 1e-12


@pytest.mark.parametrize("vocab", ["naive", "1", "2"])
@pytest.mark.parametrize("tied", [rare(False), True])
@pytest.mark.parametrize("path", ["plain", "fused"])
def test_with_vocabulary_parallelism(vocab, tied, path):
    """Its embedding gives all tokens to every rank, and its head all gradients."""
    n, job = build(path, "4 ranks, 2 kv heads, odd ffn")
    job = replace(job, vocab=vocab).with_model(tied=tied)
    results = run_ranks(programs.on_rank, n, job)
    assert programs.worst_deviation(results, programs.one_device(job)) < 1e-12


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_float32(path):
    n, job = build(path, "4 ranks, 2 kv heads, odd ffn")
    results = run_ranks(programs.on_rank, n, replace(job, dtype=torch.float32))
    assert programs.worst_deviation(results, programs.one_device(job)) < 1e-5


@pytest.mark.parametrize("seed", [0, rare(1)])
def test_any_order_of_ranks(seed):
    n, job = build("fused", "4 ranks, 2 kv heads, odd ffn")
    results = run_ranks(programs.on_rank, n, job, seed=seed)
    assert programs.worst_deviation(results, programs.one_device(job)) < 1e-12


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("model", [rare("4 ranks, 2 kv heads, odd ffn"), "3 ranks, experts"])
def test_three_clipped_steps_of_sgd(path, model):
    n, job = build(path, model)
    expected = programs.one_device(job, steps=3)
    assert min(expected[1]) > 0.05, "nothing was clipped"
    results = run_ranks(programs.on_rank, n, job, 3)
    assert programs.worst_deviation(results, expected) < 1e-10
    seen = {}
    for _, _, parts in results:
        for record, _, weight in parts:
            twin = seen.setdefault((record.name, record.slices), weight)
            assert torch.equal(weight, twin), f"replicas of {record.name} drifted apart"


def test_processes_equal_one_device():
    n, job = build("fused", "3 ranks, odd T, odd ffn")
    results = run_processes(programs.on_rank, n, job, 2)
    assert programs.worst_deviation(results, programs.one_device(job, steps=2)) < 1e-10


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_rings_equal_torchs_matmul(n):
    """Against the product of the whole matrices, and of the sum of all ranks' products."""
    dice = torch.Generator().manual_seed(0)
    x_ND = torch.randn(n * 3, 4, generator=dice, dtype=torch.float64)
    w_DF = torch.randn(n, 4, 5, generator=dice, dtype=torch.float64)

    def rings(axis):
        mine = x_ND[axis.rank * 3 : axis.rank * 3 + 3].clone()
        shards, product = gather_matmul(mine, w_DF[axis.rank].clone(), axis)
        return torch.cat(shards), product, matmul_scatter(x_ND + axis.rank, w_DF[axis.rank], axis)

    total_NF = sum((x_ND + r) @ w_DF[r] for r in range(n))
    for r, (gathered_ND, product_NF, mine_NF) in enumerate(run_ranks(rings, n)):
        assert torch.equal(gathered_ND, x_ND)
        torch.testing.assert_close(product_NF, x_ND @ w_DF[r])
        torch.testing.assert_close(mine_NF, total_NF[r * 3 : r * 3 + 3])


# ---- what is partial


def test_what_sees_part_of_the_tokens_is_summed_once_over_tp():
    """Norms, the replicated embedding and routers: partial over tp, once. What is cut: never."""
    job = PATHS["plain"].with_model(experts=2)
    for _, _, parts in run_ranks(programs.on_rank, 2, job):
        partial = {record.name: record.partial.count("tp") for record, _, _ in parts}
        assert {count for name, count in partial.items() if "norm" in name} == {1}
        assert {count for name, count in partial.items() if "router" in name} == {1}
        assert partial["embed.weight"] == 1
        assert {r.partial for r, _, _ in parts if "tp" not in r.replicas} <= {(), ("kv",)}


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_a_norm_sees_one_term_of_its_gradient(path):
    """Before the reduction no rank has the gradient of one device, and their sum is it."""
    job = PATHS[path]
    whole = programs.one_device(job)[2]

    def unreduced(axis):
        model = programs.parallel_model(programs.split_axes(axis, job), job)
        inputs, count = programs.batch(job)
        (model(*inputs) / count).backward()
        norms = [p for p in model.parameters() if p.dim() == 1]
        return [(p.record.name, p.grad) for p in norms]

    for terms in zip(*run_ranks(unreduced, 4), strict=True):
        expected = whole[terms[0][0]]
        torch.testing.assert_close(sum(t for _, t in terms), expected, rtol=1e-10, atol=1e-14)
        assert all((t - expected).norm() > 0.1 * expected.norm() for _, t in terms)


def test_dropout_masks_are_those_of_the_ranks_positions():
    """Rank r of 4 gets columns 3 r to 3 r + 3 of the plain module's mask of 12 positions."""
    job = PATHS["plain"]
    (_, _, where), _ = programs.batch(job)
    mask = Dropout(job.dropout, site=1)(torch.ones(job.B, 12, 16), where)

    def masks(axis):
        model = programs.parallel_model(programs.split_axes(axis, job), job)
        return model.layers[0].attention_dropout(torch.ones(job.B, 3, 16), where)

    assert torch.equal(torch.cat(run_ranks(masks, 4), 1), mask)


# ---- traffic


EXPECTED = {  # calls, and payload in S, of 1 layer: 2 regions and the head
    "plain": {
        "forward all_gather": (3 + 1, 3), "forward reduce_scatter": (2, 2),
        "backward all_gather": (2 + 3, 5), "backward reduce_scatter": (3, 3),
    },
    "fused": {  # n = 4: a ring makes 3 exchanges of S/4
        "forward all_gather": (0 + 1, 0), "forward exchange": (15, 15 / 4),
        "backward all_gather": (3, 3), "backward reduce_scatter": (3, 3),
        "backward exchange": (6, 6 / 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_traffic_equals_the_contract(path):
    """S = 3 * 12 * 16 float64, logits 3 * 12 * 24. Then the norms and the embedding, in one call:
    2 + 1 norms of 16 and 23 words of 16."""
    S, logits = 3 * 12 * 16 * 8, 3 * 12 * 24 * 8
    expected = {name: (calls, int(S * k)) for name, (calls, k) in EXPECTED[path].items()}
    calls, payload = expected["forward all_gather"]
    expected["forward all_gather"] = calls, payload + logits
    assert contract(2, S, 4, path, logits=logits) == expected
    expected["reduction all_reduce"] = 1, (3 * 16 + 23 * 16) * 8
    for sent, ledgers, _ in run_ranks(programs.traffic, 4, PATHS[path].with_model(layers=1)):
        assert sent == expected
        assert {call.axis for call in sum(ledgers, [])} == {"tp"}


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("n", [2, rare(4)])
def test_traffic_with_experts(path, layers, n):
    """Their regions gather x once, and save it."""
    S, logits = 3 * 16 * 16 * 8, 3 * 16 * 24 * 8
    job = replace(PATHS[path], T=16).with_model(layers=layers, experts=2)
    expected = contract(2 * layers, S, n, path, experts=layers, logits=logits)
    if path == "plain":
        assert expected["backward all_gather"] == (3 * layers + 1, (3 * layers + 1) * S)
    for sent, _, _ in run_ranks(programs.traffic, n, job):
        sent.pop("reduction all_reduce")
        assert sent == expected


def test_vocabulary_parallelism_adds_one_gather_each_way():
    """Forward before the head, backward after the embedding; no gradient of the table is summed."""
    job = replace(PATHS["plain"], vocab="2").with_model(layers=1)
    S = 3 * 12 * 16 * 8
    for sent, _, _ in run_ranks(programs.traffic, 4, job):
        gathers = {way: sent[f"{way} all_gather"] for way in ("forward", "backward")}
        assert gathers["backward"] == (4 + 1, (4 + 1) * S)
        assert gathers["forward"][0] == 2 + 1 + 1, "regions, head, and the loss's own numbers"
        assert sent["forward reduce_scatter"] == sent["backward reduce_scatter"] == (2, 2 * S)
        assert sent["reduction all_reduce"] == (1, 3 * 16 * 8)


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_wire_bytes_of_a_region(path, n):
    """Forward what tensor parallelism sends, backward one all_gather(S) more: the price of saving
    the shard (Korthikanti et al., section 4.2.2)."""
    S = 12 * 1000
    alone = wire_bytes("all_reduce", S, n)
    total = on_wire(contract(1, S, n, path), n)
    assert total["forward"] == pytest.approx(alone)
    assert total["backward"] == pytest.approx(alone + wire_bytes("all_gather", S, n))
    assert on_wire(contract(1, S, n, path, experts=1), n)["backward"] == pytest.approx(alone)


def test_one_rank_sends_nothing():
    assert run_ranks(programs.traffic, 1, PATHS["fused"])[0][0] == {}


# ---- overlap


def test_only_the_fused_path_computes_while_it_sends():
    for path, waits in (("plain", {True}), ("fused", {False})):
        for _, (forward, backward, _), _ in run_ranks(programs.traffic, 4, PATHS[path]):
            logits = forward.pop()  # nothing is left to compute meanwhile
            assert (logits.op, logits.waits) == ("all_gather", True)
            assert {call.waits for call in forward + backward} == waits


VERBS = ("all_gather", "reduce_scatter", "exchange")


def test_the_fused_path_multiplies_while_shards_travel():
    """3 ranks. gate and up: each shard is multiplied while the next comes; down: each block is
    multiplied while the sum comes. Backward of down: the ring again, then dW; of gate and up: dX
    while x is gathered, dW while dX is scattered."""
    job = replace(PATHS["fused in a plain model"], T=9)
    job = job.with_model(heads=6, kv_heads=6, hidden_size=12)
    hop = ["exchange", "mm", "exchange done"]
    forward, backward = run_ranks(programs.order_in_mlp, 3, job, VERBS)[0]
    assert forward == hop * 2 + ["mm"] + ["mm"] + hop * 2
    column = ["all_gather", "mm", "all_gather done", "reduce_scatter", "mm", "reduce_scatter done"]
    assert backward == hop * 2 + ["mm"] + ["mm"] + column


def test_the_plain_path_waits_for_each_call():
    forward, backward = run_ranks(programs.order_in_mlp, 4, PATHS["plain"], VERBS)[0]
    assert forward == ["all_gather", "mm", "mm", "mm", "reduce_scatter"]
    assert backward == ["all_gather", "mm", "mm", "all_gather", *["mm"] * 4, "reduce_scatter"]


# ---- memory


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("n", [1, 2, rare(4)])
@pytest.mark.parametrize(
    ("kv_heads", "dropout", "B", "dtype"), [(8, 0, 1, torch.float32), (2, 0.3, 3, torch.bfloat16)]
)
def test_saved_activations_of_a_layer(impl, n, kv_heads, dropout, B, dtype):
    job = Job(impl=impl, sequence=True, dropout=dropout, B=B, T=12, dtype=dtype)
    job = job.with_model(kv_heads=kv_heads, ffn_size=24)
    at = Setting(B, 12, dtype.itemsize, dropout > 0, n, sequence_parallel=True)
    three, two = (run_ranks(programs.saved, n, job.with_model(layers=k)) for k in (3, 2))
    expected = sum(layer_bytes(job.cfg, at).values())
    assert [a - b for a, b in zip(three, two, strict=True)] == [expected] * n


def test_other_ranks_tokens_are_not_kept_after_the_embedding():
    """2 of 8 tokens of 2 sequences stay, 4 float32 wide: not a view of all."""

    def kept(axis):
        whole_BTD = torch.ones(2, 8, 4, requires_grad=True)
        return Split.apply(whole_BTD, axis).untyped_storage().nbytes()

    assert run_ranks(kept, 4) == [2 * 2 * 4 * 4] * 4


def test_weights_are_those_of_tensor_parallelism():
    jobs = PATHS["plain"], replace(PATHS["plain"], sequence=False)
    with_it, without = (run_ranks(programs.traffic, 4, job) for job in jobs)
    assert [held for *_, held in with_it] == [held for *_, held in without]


def test_records_of_what_is_cut_stay():
    """Sequence parallelism changes whose gradients are summed, and cuts no weight."""
    jobs = PATHS["plain"], replace(PATHS["plain"], sequence=False)
    with_it, without = (
        [record for record, _, _ in run_ranks(programs.on_rank, 4, job)[1][2]] for job in jobs
    )
    assert [replace(r, partial=()) for r in with_it] == [replace(r, partial=()) for r in without]
