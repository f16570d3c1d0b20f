"""Tensor parallelism equals one device, sends what its contract says, and holds 1/n."""

from dataclasses import replace

import pytest
import tensor_programs as programs
import torch
from tensor_programs import Job

from picotron_lab import optim, sharding
from picotron_lab.analysis.activations import Setting, layer_bytes
from picotron_lab.config import TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.processes import run_processes
from picotron_lab.tensor_parallel import contract

PATHS = {
    "plain": Job(), "fused": Job(impl="fused", fused_model=True),
    "fused in a plain model": Job(impl="fused"), "plain in a fused model": Job(fused_model=True),
}  # fmt: skip
MODELS = {  # ranks, heads, key/value heads, ffn size, experts
    "2 ranks": (2, 8, 8, 22, 0),
    "3 ranks, odd ffn": (3, 6, 3, 7, 0),
    "3 ranks, 1 kv head": (3, 6, 1, 9, 0),
    "4 ranks, 2 kv heads, odd ffn": (4, 8, 2, 13, 0),
    "4 ranks, 1 kv head, one without ffn": (4, 8, 1, 5, 0),
    "4 ranks, 4 kv heads": (4, 8, 4, 22, 0),
    "8 ranks": (8, 8, 8, 22, 0),
    "8 ranks, 2 kv heads": (8, 8, 2, 22, 0),
    "2 ranks, experts": (2, 4, 4, 9, 3),
    "4 ranks, 2 kv heads, experts": (4, 8, 2, 13, 4),
    "1 rank": (1, 4, 2, 9, 0),
}


MORE = ("8 ranks", "8 ranks, 2 kv heads", "4 ranks, 2 kv heads, experts", "3 ranks, 1 kv head")


def rare(*case):
    """Left to a run after a change."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def build(path, model):
    n, heads, kv_heads, ffn_size, experts = MODELS[model]
    job = PATHS[path].with_model(
        heads=heads, kv_heads=kv_heads, ffn_size=ffn_size, experts=experts, hidden_size=2 * heads
    )
    return n, job


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
@pytest.mark.parametrize("model", [rare("4 ranks, 2 kv heads, odd ffn"), "2 ranks, experts"])
def test_three_clipped_steps_of_sgd(path, model):
    """A learning rate of 1 and a limit that every step exceeds: a gradient or a norm that counts
    twice shows at once. Replicas stay equal to the last bit."""
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


@pytest.mark.parametrize("vocab_size", [9, 23])
def test_logits_are_gathered_from_uneven_shards(vocab_size):
    """9 words on 8 ranks: 2, 2, 2, 2, 1, and three ranks with none."""
    job = Job(dropout=0).with_model(vocab_size=vocab_size)
    tokens_BT = programs.batch(job)[0][0]
    logits = run_ranks(
        lambda axis: programs.parallel_model(programs.split_axes(axis, job), job)(tokens_BT), 8
    )
    for mine in logits:
        torch.testing.assert_close(mine, programs.plain_model(job)(tokens_BT))


# ---- weights


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.exhaustive
def test_shards_tile_the_weights_of_one_device(model):
    """Each element is held once, or by all ranks that the record calls replicas."""
    n, job = build("plain", model)
    _, _, _, wholes = programs.one_device(job)
    holders = {name: torch.zeros(whole.shape) for name, whole in wholes.items()}
    group = max(1, n // job.cfg.kv_heads)
    for _, _, parts in run_ranks(programs.on_rank, n, job):
        for record, _, weight in parts:
            assert torch.equal(weight, wholes[record.name][record.index])
            times = {(): 1, ("tp",): n, ("kv",): group}[record.replicas]
            holders[record.name][record.index] += 1 / times
    for name, held in holders.items():
        assert torch.allclose(held, torch.ones_like(held)), name


def test_shards_of_different_ranks_differ():
    """Not the same random numbers on every rank, which would halve the model."""
    first, second = (parts for _, _, parts in run_ranks(programs.on_rank, 2, Job()))
    pairs = zip(first, second, strict=True)
    cut = [(a, b) for (mine, _, a), (other, _, b) in pairs if mine.slices != other.slices]
    assert len(cut) == 2 * 7 + 1, "2 layers of q, k, v, o, gate, up, down, and the head"
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in cut)


@pytest.mark.parametrize("n", [2, 4])
def test_weights_of_a_rank(n):
    """D 16, 8 heads of 2, ffn 22, V 23. Attention 4 * 16 * 16 / n. By 2: ffn 11, head 12 or 11
    rows. By 4: ffn 6, 6, 6, 4, head 6, 6, 6, 5 rows. Whole: norms 5 * 16, embedding 23 * 16."""
    expected = {
        2: [2 * (512 + 3 * 16 * 11) + 80 + 368 + 16 * rows for rows in (12, 11)],
        4: [2 * (256 + 48 * f) + 80 + 368 + 16 * rows for f, rows in ((6, 6),) * 3 + ((4, 5),)],
    }
    assert [held for _, _, held in run_ranks(programs.traffic, n, Job())] == expected[n]


def test_moments_have_the_size_of_the_shards():
    def moments(axis):
        model = programs.parallel_model(programs.split_axes(axis, Job()), Job())
        optimizer = optim.build(list(model.parameters()), TrainConfig())
        weights = sum(p.numel() for p in model.parameters())
        return weights, sum(tensor.numel() for _, tensor in optim.moments(optimizer))

    assert run_ranks(moments, 4)[0] == (2 * (256 + 48 * 6) + 448 + 96, 2 * 1632)


# ---- traffic


@pytest.mark.parametrize("layers", [1, rare(3)])
@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("experts", [0, 3])
def test_traffic_equals_the_contract(layers, path, experts):
    """Two sums per block each way, and one for q, k, v together; the head sends its logits and one
    sum. S = 3 * 7 * 16 float64; V = 23 becomes 24."""
    job = PATHS[path].with_model(layers=layers, experts=experts)
    S = 3 * 7 * 16 * 8
    expected = {
        "forward all_reduce": (2 * layers, 2 * layers * S),
        "forward all_gather": (1, 3 * 7 * 24 * 8),
        "backward all_reduce": (2 * layers + 1, (2 * layers + 1) * S),
    }
    assert contract(2 * layers, S, 3 * 7 * 24 * 8) == expected
    for sent, calls, _ in run_ranks(programs.traffic, 4, job):
        if experts:  # the gradients of the routers, 3 * 16 each
            assert sent.pop("reduction all_reduce") == (1, layers * 3 * 16 * 8)
        assert sent == expected
        assert {call.axis for call in sum(calls, [])} == {"tp"}


def test_shared_heads_are_summed_once_over_those_that_share_them():
    """4 ranks, 2 key/value heads of 2: k and v of a rank are 2 * 16 each, in 2 layers."""
    for sent, calls, _ in run_ranks(programs.traffic, 4, Job().with_model(kv_heads=2)):
        assert sent["reduction all_reduce"] == (1, 2 * 2 * 2 * 16 * 8)
        assert [call.axis for call in calls[2]] == ["kv"]


def test_one_rank_sends_nothing():
    assert run_ranks(programs.traffic, 1, Job())[0][0] == {}


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_only_the_fused_path_computes_while_it_sends(path):
    for _, (forward, backward, _), _ in run_ranks(programs.traffic, 2, PATHS[path]):
        assert all(call.waits for call in forward)
        assert {call.waits for call in backward} == {path == "plain"}


def test_the_fused_path_starts_the_sum_before_the_gradient_of_the_weights():
    """down: dX, dW; gate and up in one: dX, then dW while dX is summed."""
    forward, backward = run_ranks(
        programs.order_in_mlp, 2, PATHS["fused in a plain model"], ("all_reduce",)
    )[0]
    assert forward == ["mm", "mm", "all_reduce"]
    assert backward == ["mm", "mm", "mm", "all_reduce", "mm", "all_reduce done"]


def test_the_plain_path_multiplies_weight_by_weight():
    forward, backward = run_ranks(programs.order_in_mlp, 2, Job(), ("all_reduce",))[0]
    assert forward == ["mm", "mm", "mm", "all_reduce"]
    assert backward == ["mm"] * 6 + ["all_reduce"]


# ---- gradients that are terms of a sum


def test_gradients_through_a_router_are_partial():
    """Each rank sees one term of what every expert says: so the routing weights' gradients, and
    the router's, are terms. One device has their sum; no rank has it alone."""
    job = Job().with_model(experts=4)
    whole = programs.one_device(job)[2]["layers.1.mlp.router.weight"]

    def unreduced(axis):
        model = programs.parallel_model(programs.split_axes(axis, job), job)
        inputs, count = programs.batch(job)
        (model(*inputs) / count).backward()
        return model.layers[1].mlp.moe.router.weight

    routers = run_ranks(unreduced, 4)
    assert {p.record.partial for p in routers} == {("tp",)}
    torch.testing.assert_close(sum(p.grad for p in routers), whole, rtol=1e-10, atol=1e-14)
    for p in routers:
        assert (p.grad - whole).norm() > 0.1 * whole.norm()


# ---- others' ways with weights


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("sequence", [False, True])
def test_weights_may_be_given_from_outside(impl, sequence):
    """ZeRO-3 hands a module gathered weights, which are no parameters, for the time of a call."""
    job = Job(impl=impl, sequence=sequence, T=8)

    def gradients(axis, outside):
        model = programs.parallel_model(programs.split_axes(axis, job), job)
        mlp = model.layers[0].mlp
        x_BTD = torch.ones(3, 8 // axis.size if sequence else 8, 16, dtype=torch.float64)
        weights = {name: p.detach().clone() for name, p in mlp.named_parameters()}
        if not outside:
            mlp(x_BTD).sum().backward()
            return {name: p.grad for name, p in mlp.named_parameters()}
        for parameter in mlp.parameters():
            parameter.detach().zero_()
        leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
        torch.func.functional_call(mlp, leaves, (x_BTD,)).sum().backward()
        return {name: weight.grad for name, weight in leaves.items()}

    for inside, outside in zip(
        run_ranks(gradients, 2, False), run_ranks(gradients, 2, True), strict=True
    ):
        assert all(inside[name].abs().max() > 0 for name in inside)
        torch.testing.assert_close(outside, inside)


@pytest.mark.parametrize("sequence", [False, True])
def test_wide_gradients_of_narrow_weights(sequence):
    """bf16 keeps 8 bits: some 1 % off the gradients of float64."""
    job = Job(impl="fused", fused_model=True, sequence=sequence, T=8, dtype=torch.bfloat16)
    expected = programs.one_device(replace(job, dtype=torch.float64))[2]

    def gradients(axis):
        axes = programs.split_axes(axis, job)
        model = programs.parallel_model(axes, job)
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
        inputs, count = programs.batch(job)
        (model(*inputs) / count).backward()
        sharding.reduce_gradients(model.parameters(), axes)
        return [(p.record, p.grad) for p in model.parameters()]

    for record, gradient in sum(run_ranks(gradients, 2), []):
        whole = expected[record.name]
        assert gradient.dtype == torch.float32
        assert (gradient - whole[record.index]).norm() < 0.05 * whole.norm(), record.name


# ---- memory


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("n", [1, 2, rare(4)])
@pytest.mark.parametrize(
    ("kv_heads", "dropout", "B", "dtype"), [(8, 0, 1, torch.float32), (2, 0.3, 3, torch.bfloat16)]
)
def test_saved_activations_of_a_layer(impl, n, kv_heads, dropout, B, dtype):
    job = Job(impl=impl, dropout=dropout, B=B, T=12, dtype=dtype)
    job = job.with_model(kv_heads=kv_heads, ffn_size=24)
    at = Setting(B, 12, dtype.itemsize, dropout > 0, n)
    three, two = (run_ranks(programs.saved, n, job.with_model(layers=k)) for k in (3, 2))
    expected = sum(layer_bytes(job.cfg, at).values())
    assert [a - b for a, b in zip(three, two, strict=True)] == [expected] * n


# ---- real processes


@pytest.mark.slow
def test_a_block_equals_torchs_own_tensor_parallelism():
    """Both paths in the same processes, which need seconds to get ready for torch's."""
    jobs = [replace(PATHS[path], dropout=0).with_model(kv_heads=4) for path in ("plain", "fused")]
    for (y, dx, theirs), *both_paths in run_processes(programs.beside_torch, 2, jobs):
        for our_y, our_dx, ours, ops in both_paths:
            torch.testing.assert_close(our_y, y, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(our_dx, dx, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            assert ops == ["all_reduce"] * 4


def test_processes_equal_one_device():
    n, job = build("fused", "3 ranks, 1 kv head")
    results = run_processes(programs.on_rank, n, job, 2)
    assert programs.worst_deviation(results, programs.one_device(job, steps=2)) < 1e-10


# ---- what the helpers of these tests must see


def test_a_result_that_is_no_number_is_far_off():
    expected = programs.one_device(Job())
    results = run_ranks(programs.on_rank, 2, Job())
    assert programs.worst_deviation(results, expected) < 1e-10
    results[1][2][0][1][0] = float("nan")  # one element of one gradient on one rank
    assert programs.worst_deviation(results, expected) == float("inf")


def test_a_tied_head_is_not_split_apart():
    with pytest.raises(AssertionError, match="use vocab_parallel.parallelize"):
        run_ranks(programs.on_rank, 2, Job().with_model(tied=True))
