"""An expert-parallel layer equals one device, wherever tokens go.

A Llama with such layers: test_expert_models.py. What they send: test_expert_contract.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tensor_programs import scaled_value
from torch import nn

from picotron_lab import data_parallel, expert_parallel, sharding
from picotron_lab.config import ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.model import MoE

IMPLS = pytest.mark.parametrize("impl", ["plain", "fused"])
SMALL = ModelConfig(
    hidden_size=8, ffn_size=6, experts=4, top_k=2, balance_loss=0.1, z_loss=0.05
)
D, T = SMALL.hidden_size, 5


# ---- a layer by itself


def layer(cfg, draw, dtype=torch.float64, parallelize=lambda model: None):
    """A mixture of experts as the trainer builds it."""
    with torch.device("meta"):
        model = nn.Sequential(MoE(cfg))
    sharding.attach(model)
    parallelize(model)
    sharding.materialise(model, 1, draw, dtype=dtype)
    return model


def sequences(count, dtype=torch.float64):
    """x and the gradient of the result, [count, T, D] each."""
    dice = torch.Generator().manual_seed(count)
    return torch.randn(2, count, T, D, generator=dice, dtype=torch.float64).to(dtype).unbind()


def back(model, x_BTD, dy_BTD):
    """(y, dx, [(record, gradient)], choices of each expert)."""
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = model(x_BTD)
    y_BTD.backward(dy_BTD)
    gradients = [(p.record, p.grad) for p in model.parameters()]
    return y_BTD.detach(), x_BTD.grad, gradients, model[0].router.counts_E


def on_rank(axis, cfg, impl, draw, x_BTD, dy_BTD):
    """This rank's sequences alone: their number differs from rank to rank."""
    model = layer(
        cfg, draw, x_BTD.dtype, lambda model: expert_parallel.parallelize(model, axis, impl)
    )
    mine = (whole.tensor_split(axis.size)[axis.rank] for whole in (x_BTD, dy_BTD))
    return back(model, *mine)


def off(found, expected):
    """The largest difference, relative to the largest number; infinite for what is no number."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max()
    if difference == 0:
        return 0.0  # of zeros, too
    return float((difference / expected.double().abs().max()).nan_to_num(float("inf")))


def assert_equals_one_device(n, cfg, impl, draw=scaled_value, inputs=None, **how):
    """All that n ranks compute, against one device with the sequences of all."""
    x_BTD, dy_BTD = inputs or sequences(2 * n - 1)
    tolerance = how.pop("tolerance", 1e-12)
    y_BTD, dx_BTD, expected, counts_E = back(layer(cfg, draw, x_BTD.dtype), x_BTD, dy_BTD)
    ys, dxs, gradients, counts = zip(
        *run_ranks(on_rank, n, cfg, impl, draw, x_BTD, dy_BTD, **how), strict=True
    )
    assert off(torch.cat(ys), y_BTD) < tolerance
    assert off(torch.cat(dxs), dx_BTD) < tolerance
    assert torch.equal(sum(counts), counts_E)
    for record, whole in expected:
        found = [g for rank in gradients for mine, g in rank if mine == record]
        assert len(found) == (1 if ".experts." in record.name else n), record.name
        assert off(sum(found), whole) < tolerance, record.name
    return counts_E


LAYERS = {  # ranks, experts, top-k, what else
    "2 ranks": (2, 4, 2, {}),
    "2 ranks, an odd expert": (2, 5, 3, {}),
    "3 ranks, one without experts": (3, 2, 2, {}),
    "3 ranks, unequal shares": (3, 4, 2, {}),
    "4 ranks, 1 1 1 2 experts": (4, 5, 2, {}),
    "4 ranks, groups": (4, 8, 4, {"expert_groups": 4, "top_groups": 2}),
    "8 ranks": (8, 8, 3, {}),
    "8 ranks, 3 experts": (8, 3, 2, {"shared_experts": 1}),
    "top-1": (3, 6, 1, {}),
    "all experts": (3, 6, 6, {}),
    "sigmoid": (4, 8, 3, {"router": "sigmoid"}),
    "shared experts": (2, 4, 2, {"shared_experts": 2}),
    "capacity": (3, 6, 2, {"capacity_factor": 0.7}),
    "capacity of one": (4, 4, 2, {"capacity_factor": 0.01, "shared_experts": 1}),
    "as DeepSeek-V3": (4, 8, 4, {
        "router": "sigmoid", "expert_groups": 4, "top_groups": 2, "shared_experts": 1}),
    "1 rank": (1, 4, 2, {"shared_experts": 1}),
    "1 rank, capacity": (1, 4, 2, {"capacity_factor": 0.5}),
}  # fmt: skip


def config(name):
    n, experts, top_k, changes = LAYERS[name]
    return n, replace(SMALL, experts=experts, top_k=top_k, **changes)


@IMPLS
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_one_device(name, impl):
    assert_equals_one_device(*config(name), impl)


@IMPLS
@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_of_ranks(impl, seed):
    assert_equals_one_device(*config("4 ranks, 1 1 1 2 experts"), impl, seed=seed)


@IMPLS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_other_dtypes(impl, dtype, tolerance):
    """bfloat16 keeps 8 bits: 1/256, and some more after three matmuls."""
    n, cfg = config("as DeepSeek-V3")
    inputs = sequences(2 * n - 1, dtype)
    assert_equals_one_device(n, cfg, impl, inputs=inputs, tolerance=tolerance)


def routed_by(weights):
    """Draws the router's weights [E, D] from a function of their shape."""

    def draw(name, shape, generator):
        chosen = "router" in name
        return weights(shape).float() if chosen else scaled_value(name, shape, generator)

    return draw


@IMPLS
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_equal_scores_go_to_the_first_experts(impl, top_k):
    """A router of zeros: experts 0 to k - 1 have all tokens, which are rank 0's; others none."""
    cfg = replace(SMALL, experts=8, top_k=top_k)
    counts_E = assert_equals_one_device(4, cfg, impl, routed_by(torch.zeros))
    assert counts_E.tolist() == [7 * T] * top_k + [0] * (8 - top_k)


@IMPLS
@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_tokens_to_one_expert(impl, n):
    """Positive x, one positive row of the router: expert 3 of 4."""

    def weights(shape):
        return -torch.ones(shape).index_fill(0, torch.tensor(3), -1.0)

    x_BTD, dy_BTD = sequences(2 * n)
    cfg = replace(SMALL, top_k=1, shared_experts=1)
    inputs = x_BTD.abs() + 0.1, dy_BTD
    counts_E = assert_equals_one_device(n, cfg, impl, routed_by(weights), inputs)
    assert counts_E.tolist() == [0, 0, 0, 2 * n * T]


@IMPLS
def test_twin_rows_of_the_router(impl):
    """Of two experts with equal scores the first is chosen, on every rank. Small whole numbers, so
    that scores are exact in any order of addition."""

    def weights(shape):
        rows = torch.arange(6 * D).view(shape) * 7 % 5 - 2
        return rows[[0, 1, 0, 1, 2, 2]]

    x_BTD, dy_BTD = sequences(5)
    cfg = replace(SMALL, experts=6, top_k=3)
    inputs = (4 * x_BTD).round(), dy_BTD
    counts_E = assert_equals_one_device(3, cfg, impl, routed_by(weights), inputs)
    assert (counts_E[[0, 1, 4]] > counts_E[[2, 3, 5]]).all()


@IMPLS
def test_an_expert_without_tokens_has_a_gradient_of_zeros(impl):
    def gradients(axis):
        _, _, gradients, _ = on_rank(
            axis, replace(SMALL, top_k=1), impl, routed_by(torch.zeros), *sequences(2)
        )
        return {record.name: gradient for record, gradient in gradients}

    first, second = run_ranks(gradients, 2)
    assert first["0.experts.0.down.weight"].abs().max() > 0
    for idle in (first["0.experts.1.down.weight"], second["0.experts.3.gate.weight"]):
        assert idle is not None and not idle.any()


@IMPLS
def test_by_hand(impl):
    """Two experts of width 1 on two ranks, positive x to the first: p d silu(g x) (u x). The router
    says x and -x: of the chosen one p = e^|x| / (e^x + e^-x) = sigmoid(2 |x|)."""
    values = {"0.gate": 2, "0.up": 3, "0.down": 0.5, "1.gate": -1, "1.up": 0.5, "1.down": 4}

    def draw(name, shape, generator):
        if "router" in name:
            return torch.tensor([[1.0], [-1.0]])
        return torch.full(shape, float(values[name[len("0.experts.") : -len(".weight")]]))

    x_BTD = torch.tensor([0.5, -1, 2, -3, 1, 0.25], dtype=torch.float64).view(2, 3, 1)
    cfg = ModelConfig(
        hidden_size=1, heads=1, kv_heads=1, head_size=2, ffn_size=1, experts=2, top_k=1
    )
    p_BTD = torch.sigmoid(2 * x_BTD.abs())
    first = p_BTD * F.silu(2 * x_BTD) * 3 * x_BTD  # before the last weight
    second = p_BTD * F.silu(-x_BTD) * 0.5 * x_BTD
    results = run_ranks(on_rank, 2, cfg, impl, draw, x_BTD, torch.ones_like(x_BTD))
    found = torch.cat([y for y, *_ in results])
    torch.testing.assert_close(found, torch.where(x_BTD > 0, 0.5 * first, 4 * second))
    of_first, of_second = (
        next(g for r, g in mine if "down" in r.name) for _, _, mine, _ in results
    )  # the gradient of the sum of y
    torch.testing.assert_close(of_first, first[x_BTD > 0].sum().view(1, 1))
    torch.testing.assert_close(of_second, second[x_BTD < 0].sum().view(1, 1))


class Recorder(nn.Module):
    """In place of experts: notes its rows, and gives each back ten times as large."""

    def forward(self, x_RD, counts_e):
        self.rows, self.counts = x_RD.detach()[:, 0].tolist(), counts_e.tolist()
        return 10 * x_RD


@IMPLS
def test_rows_come_by_expert_then_by_rank_then_in_order(impl):
    """x of token t of rank r is (r + 1) 10 + t. Even t choose experts 1 and 2, odd ones 2 and 3; of
    rank 2 all choose 0 and 1. Expert 0 is on rank 0, expert 1 on rank 1, experts 2 and 3 on rank 2.
    Gates 0.25 and 0.75 add up 10 x."""
    pairs = {0: (1, 2), 1: (2, 3)}

    def deal(axis):
        model = layer(
            SMALL, scaled_value, parallelize=lambda m: expert_parallel.parallelize(m, axis, impl)
        )[0]
        model.experts = Recorder()
        x_ND = ((axis.rank + 1) * 10 + torch.arange(3.0)).double()[:, None].expand(3, D)
        expert_Nk = torch.tensor([(0, 1) if axis.rank == 2 else pairs[t % 2] for t in range(3)])
        gate_Nk = torch.tensor([[0.25, 0.75]], dtype=torch.float64).expand(3, 2)
        y_ND = model.run(model, x_ND, expert_Nk, gate_Nk)
        assert torch.equal(y_ND, 10 * x_ND)
        return model.experts.rows, model.experts.counts

    assert run_ranks(deal, 3) == [
        ([30, 31, 32], [3]),
        ([10, 12, 20, 22, 30, 31, 32], [7]),
        ([10, 11, 12, 20, 21, 22, 11, 21], [6, 2]),
    ]


# ---- what cannot be done


@IMPLS
@pytest.mark.parametrize("partial", [True, False])
def test_experts_cannot_be_shared_out_among_their_replicas(impl, partial):
    """Else each rank's own experts would be summed with others, which are on other ranks."""

    def build(axis):
        def parallelize(model):
            if partial:
                data_parallel.parallelize(model, axis)
            else:
                sharding.add_axis(model[0].experts[-1].up.weight, axis, partial=False)
            expert_parallel.parallelize(model, axis, impl)

        layer(SMALL, scaled_value, parallelize=parallelize)

    name = "0.gate" if partial else "3.up"
    sentence = rf"0.experts.{name}.weight is recorded .*: call expert_parallel.parallelize first"
    with pytest.raises(AssertionError, match=sentence):
        run_ranks(build, 2)


@IMPLS
def test_a_layer_by_itself_needs_a_parent(impl):
    def build(axis):
        expert_parallel.parallelize(MoE(SMALL), axis, impl)

    with pytest.raises(AssertionError, match="give a module that contains it"):
        run_ranks(build, 2)
