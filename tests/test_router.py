"""The router against numbers worked by hand and Hugging Face's.

Gradients and penalties: test_router_penalties.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from picotron_lab import router, sharding
from picotron_lab.alone import Alone
from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.model import Llama, MoE, initial_value
from picotron_lab.router import Router, choose, keep, settle

ALONE = Axis("world", [0], 0, Alone(), Ledger())
EVEN = dict(hidden_size=16, heads=1, kv_heads=1, vocab_size=50, layers=2, ffn_size=12)


def config(**options):
    return ModelConfig(**{**EVEN, "experts": 8, **options})


def identity_router(experts, **options):
    """A router whose logits are its input."""
    made = Router(config(hidden_size=experts, head_size=2, experts=experts, **options)).double()
    made.weight.data = torch.eye(experts, dtype=torch.float64)
    return made


def random_router(**options):
    made = Router(config(**options)).double()
    made.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return made


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits_for(experts, choices):
    """x for an identity router: token t of each sequence prefers choices[t], best first."""
    x_BTE = torch.zeros(*torch.tensor(choices).shape[:2], experts, dtype=torch.float64)
    for b, tokens in enumerate(choices):
        for t, chosen in enumerate(tokens):
            for place, expert in enumerate(chosen):
                x_BTE[b, t, expert] = 3.0 - place
    return x_BTE


def dense(expert_Nk, gate_Nk, experts):
    """Gates as [N, E], 0 where an expert was not chosen."""
    out = gate_Nk.new_zeros(len(gate_Nk), experts + 1)
    return out.scatter_add(1, expert_Nk, gate_Nk)[:, :experts]


# ---- scores, choices, gates


@pytest.mark.parametrize(
    ("kind", "odds", "top_k", "experts", "gates"),
    [  # softmax of ln(odds): odds / their sum; sigmoid: odds / (1 + odds)
        ("softmax", [1, 2, 3, 4], 2, [3, 2], [4 / 7, 3 / 7]),
        ("softmax", [1, 2, 3, 4], 1, [3], [0.4]),
        ("sigmoid", [1, 1 / 3, 3, 9], 2, [3, 2], [0.9 / 1.65, 0.75 / 1.65]),
        ("sigmoid", [1, 1 / 3, 3, 9], 1, [3], [0.9]),
        ("sigmoid", [1, 1 / 3, 3, 9], 4, [3, 2, 0, 1], [0.375, 0.3125, 0.5 / 2.4, 0.25 / 2.4]),
    ],
)
def test_gates_worked_by_hand(kind, odds, top_k, experts, gates):
    x = torch.tensor(odds, dtype=torch.float64).log()[None, None]
    expert_Nk, gate_Nk = identity_router(4, router=kind, top_k=top_k)(x)
    assert expert_Nk.tolist() == [experts]
    assert gate_Nk.tolist() == [pytest.approx(gates, rel=1e-12)]


def test_bias_decides_who_but_not_how_much():
    """s = .1 .2 .3 .4; with a bias of .35 the first expert has .45, and its gate is .1 / .5."""
    made = identity_router(4)
    made.bias[0] = 0.35
    x = torch.tensor([[[1.0, 2, 3, 4]]], dtype=torch.float64).log()
    expert_Nk, gate_Nk = made(x)
    assert expert_Nk.tolist() == [[0, 3]]
    assert gate_Nk.tolist() == [pytest.approx([0.2, 0.8], rel=1e-12)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_of_equal_experts_the_first_win(kind, dtype):
    made = Router(config(experts=64, top_k=4, router=kind, expert_groups=8, top_groups=2))
    made.weight.data = torch.zeros_like(made.weight, dtype=dtype)
    expert_Nk, gate_Nk = made(numbers(2, 50, 16, dtype=dtype))
    assert torch.equal(expert_Nk, torch.arange(4).expand(100, 4))
    assert torch.equal(gate_Nk, torch.full((100, 4), 0.25, dtype=dtype))


def test_ties_behind_the_best():
    scores = torch.tensor([[[0.2, 0.3, 0.3, 0.2]]])
    assert choose(scores, config(experts=4, top_k=3)).tolist() == [[[1, 2, 0]]]


# the best of each group: .9 .5 .45 .8; the two best together: .9 1. .9 .85
SCORES = torch.tensor([[[0.9, 0.0, 0.5, 0.5, 0.45, 0.45, 0.8, 0.05]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("top_k", "top_groups", "experts"),
    [
        (4, 4, [0, 6, 2, 3]),  # every group is open
        (4, 2, [0, 2, 3, 1]),  # groups 1 and 0, which ties with group 2 and comes first
        (2, 2, [0, 6]),  # by their best: groups 0 and 3
        (2, 1, [2, 3]),  # by both experts: group 1
        (1, 2, [0]),
    ],
)
def test_groups_worked_by_hand(top_k, top_groups, experts):
    cfg = config(top_k=top_k, expert_groups=4, top_groups=top_groups)
    assert choose(SCORES, cfg).tolist() == [[experts]]
    assert choose(SCORES - 5, cfg).tolist() == [[experts]], "a bias may make every score negative"


def test_softmax_equals_hugging_face_mixtral():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    theirs = MixtralTopKRouter(
        transformers.MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=3)
    )
    made, x_BTD = random_router(top_k=3).float(), numbers(2, 9, 16, dtype=torch.float32)
    theirs.weight.data = made.weight.data
    _, gates, experts = theirs(x_BTD)
    torch.testing.assert_close(dense(*made(x_BTD), 8), dense(experts, gates, 8))


def deepseek(experts, top_k, groups, top_groups, shared=1):
    transformers = pytest.importorskip("transformers")
    return transformers.DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=12, n_routed_experts=experts, n_group=groups,
        topk_group=top_groups, num_experts_per_tok=top_k, n_shared_experts=shared,
        norm_topk_prob=True, routed_scaling_factor=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(("top_k", "top_groups"), [(4, 2), (2, 1), (8, 4)])
def test_sigmoid_bias_and_groups_equal_hugging_face_deepseek(top_k, top_groups):
    """Theirs always adds up two experts of a group, ours k/M: here they are the same."""
    config_of_theirs = deepseek(16, top_k, 4, top_groups)
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3TopkRouter(config_of_theirs)
    made = random_router(
        experts=16, router="sigmoid", top_k=top_k, expert_groups=4, top_groups=top_groups
    ).float()
    made.bias = numbers(16, seed=5) * 0.3
    theirs.weight.data = made.weight.data
    theirs.e_score_correction_bias.copy_(made.bias)
    x_BTD = numbers(3, 40, 16, dtype=torch.float32)
    _, gates, experts = theirs(x_BTD)
    torch.testing.assert_close(dense(*made(x_BTD), 16), dense(experts, gates, 16))


@torch.no_grad()
def test_shared_experts_equal_hugging_face_deepseek():
    config_of_theirs = deepseek(8, 4, 4, 2, shared=2)
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config_of_theirs._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config_of_theirs)
    ours = MoE(config(top_k=4, router="sigmoid", expert_groups=4, top_groups=2, shared_experts=2))
    for i, parameter in enumerate(ours.parameters()):
        parameter.copy_(numbers(*parameter.shape, seed=i) * 0.3)
    ours.router.bias.copy_(numbers(8, seed=50) * 0.3)
    theirs.gate.weight.copy_(ours.router.weight)
    theirs.gate.e_score_correction_bias.copy_(ours.router.bias)
    for i, mlp in enumerate(ours.experts):
        theirs.experts.gate_up_proj[i] = torch.cat([mlp.gate.weight, mlp.up.weight])
        theirs.experts.down_proj[i] = mlp.down.weight
    for name in ("gate", "up", "down"):
        getattr(theirs.shared_experts, f"{name}_proj").weight.copy_(
            getattr(ours.shared, name).weight
        )
    x_BTD = numbers(2, 20, 16, dtype=torch.float32)
    torch.testing.assert_close(ours(x_BTD), theirs(x_BTD), rtol=1e-5, atol=1e-5)


def test_bfloat16_tokens_are_scored_in_float32():
    """Logits 1 and 1 + 2^-9: bfloat16 has 8 bits and would call them equal."""
    made = Router(config(hidden_size=2, experts=2, top_k=1)).bfloat16()
    made.weight.data = torch.tensor([[1.0, 0], [1, 1]], dtype=torch.bfloat16)
    x_BTD = torch.tensor([[[1, 2**-9]]], dtype=torch.bfloat16)
    expert_Nk, gate_Nk = made(x_BTD)
    assert expert_Nk.tolist() == [[1]] and gate_Nk.dtype == torch.bfloat16


def test_scores_that_vanish_give_no_nan():
    made = identity_router(4, router="sigmoid", balance_loss=1.0).float()
    x_BTD = torch.full((1, 2, 4), -200.0, requires_grad=True)
    _, gate_Nk = made(x_BTD)
    gate_Nk.sum().backward()
    assert gate_Nk.count_nonzero() == 0
    assert made.weight.grad.isfinite().all() and x_BTD.grad.isfinite().all()


# ---- capacity


@pytest.mark.parametrize(
    ("experts", "factor", "choices", "kept"),
    [  # room for ceil(factor T k / E) tokens
        (2, 1.0, [[[0], [0], [0], [1]]], [[[1], [1], [0], [1]]]),  # ceil(4 / 2) = 2
        (3, 0.5, [[[0, 1], [0, 2], [1, 2]]], [[[1, 1], [0, 1], [0, 0]]]),  # ceil(3 / 3) = 1
        (3, 0.6, [[[0, 1], [0, 2], [1, 0]]], [[[1, 1], [1, 1], [1, 0]]]),  # ceil(3.6 / 3) = 2
        (2, 1.0, [[[0], [0]], [[0], [1]]], [[[1], [0]], [[1], [1]]]),  # sequences do not compete
        (4, 1e-6, [[[3], [3], [2]]], [[[1], [0], [1]]]),  # one at least
        (2, 2.0, [[[0], [0], [0]]], [[[1], [1], [1]]]),
        (2, 0.0, [[[0], [0], [0]]], [[[1], [1], [1]]]),  # no capacity
    ],
)
def test_drops_worked_by_hand(experts, factor, choices, kept):
    choices, kept = torch.tensor(choices), torch.tensor(kept)
    top_k = choices.shape[-1]
    cfg = config(experts=experts, top_k=top_k, capacity_factor=factor)
    assert torch.equal(keep(choices, cfg), kept.bool())
    made = identity_router(experts, top_k=top_k, capacity_factor=factor)
    expert_Nk, gate_Nk = made(logits_for(experts, choices.tolist()))
    dropped = kept.flatten(0, 1) == 0
    assert torch.equal(expert_Nk, choices.flatten(0, 1).masked_fill(dropped, experts))
    assert torch.equal(gate_Nk == 0, dropped)
    gate_Nk.sum().backward()
    report = settle(made, ALONE, positions=kept[..., 0].numel())
    assert report["dropped_choices"] == dropped.sum()
    assert torch.equal(made.counts_E, choices.flatten().bincount(minlength=experts)), (
        "the bias must hear of choices that were dropped"
    )


def test_gates_that_stay_are_those_without_capacity():
    x_BTD = numbers(2, 12, 16)
    free, tight = random_router(top_k=3), random_router(top_k=3, capacity_factor=0.5)
    (_, gates), (experts, some) = free(x_BTD), tight(x_BTD)
    assert 0 < (experts == 8).sum() < experts.numel()
    assert torch.equal(some, gates * (experts != 8))


def test_later_tokens_do_not_decide_what_is_dropped():
    made = random_router(top_k=2, capacity_factor=0.5)
    x_BTD, other_BTD = numbers(3, 10, 16), numbers(3, 10, 16, seed=1)
    whole = made(x_BTD)[0].view(3, 10, 2)
    assert (whole == 8).any()
    for t in range(1, 10):
        changed_BTD = torch.cat([x_BTD[:, :t], other_BTD[:, t:]], 1)
        assert torch.equal(made(changed_BTD)[0].view(3, 10, 2)[:, :t], whole[:, :t])


# ---- bias, and what a step reports


def learn(made, choices):
    """Forward and backward of a batch whose tokens make these choices, whatever the bias."""
    x_BTE = logits_for(made.cfg.experts, choices)
    made(x_BTE * 1000)[1].sum().backward()


def test_bias_moves_by_hand():
    """Counts 2 1 1 0, mean 1: the busy one falls, the idle one rises. Then 0 4 0 0."""
    made = identity_router(4, top_k=1, balance_speed=0.01)
    learn(made, [[[0], [0], [1], [2]]])
    report = settle(made, ALONE, positions=4)
    assert made.bias.tolist() == [-0.01, 0, 0, 0.01]
    assert report["busiest_expert"] == 2 and report["dropped_choices"] == 0
    router.begin_step(made, 1.0)
    learn(made, [[[1], [1]]])
    learn(made, [[[1], [1]]])  # counts of micro-batches add up
    assert settle(made, ALONE, positions=4)["busiest_expert"] == 4
    assert made.bias.tolist() == [0, -0.01, 0.01, 0.02]


def test_counts_that_cannot_be_equal_leave_no_bias_where_it_was():
    """5 tokens for 4 experts, 2 1 1 1: the mean is 1.25, and three have fewer."""
    made = identity_router(4, top_k=1, balance_speed=1.0)
    learn(made, [[[0], [0], [1], [2], [3]]])
    settle(made, ALONE, positions=5)
    assert made.bias.tolist() == [-1, 1, 1, 1]


def test_reported_balance_by_hand():
    """One sequence, softmax scores (.75, .25) and (.6, .4), both tokens to the first expert:
    f = 2, 0, P = .675, .325; a second layer is perfect: 1. Their mean is 1.175."""
    x_BTE = torch.tensor([[[0.75, 0.25], [0.6, 0.4]]], dtype=torch.float64).log()
    layers = nn.ModuleList(identity_router(2, top_k=1, balance_loss=1.0) for _ in range(2))
    layers[0](x_BTE)[1].sum().backward()
    layers[1](logits_for(2, [[[0], [1]]]))[1].sum().backward()
    report = settle(layers, ALONE, positions=2)
    assert report["balance_loss"] == pytest.approx(1.175, rel=1e-12)
    assert report["busiest_expert"] == 2, "of any layer"


def test_balance_loss_equals_hugging_face_mixtral_for_one_sequence():
    """Theirs counts each of k choices in full: k times as much."""
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    made, x_BTD = random_router(top_k=3, balance_loss=1.0), numbers(1, 30, 16)
    made(x_BTD)[1].sum().backward()
    theirs = load_balancing_loss_func((F.linear(x_BTD[0], made.weight.detach()),), 8, 3)
    assert settle(made, ALONE, positions=30)["balance_loss"] == pytest.approx(float(theirs) / 3)


CHOICES = [[[0], [0], [1]], [[0], [2], [2]], [[0], [1], [3]]]  # 4 2 2 1 of 9, mean 2.25


def test_ranks_agree_on_a_bias_that_one_device_has_too():
    def run(axis):
        made = identity_router(4, top_k=1, balance_speed=0.5)
        learn(made, [CHOICES[axis.rank]])
        report = settle(made, axis, positions=9)
        assert [call.op for call in axis.ledger.calls] == ["all_reduce"]
        assert axis.ledger.calls[0].bytes == 8 * (4 + 2)  # L (E + 2) numbers
        return made.bias.tolist(), report

    one = identity_router(4, top_k=1, balance_speed=0.5)
    learn(one, CHOICES)
    report = settle(one, ALONE, positions=9)
    assert one.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert report["busiest_expert"] == pytest.approx(4 / 2.25)
    for bias, found in run_ranks(run, 3, seed=1):
        assert bias == one.bias.tolist()
        assert found == pytest.approx(report, rel=1e-12)


def test_bias_keeps_its_digits_in_a_bfloat16_model():
    """bfloat16 could not tell 1 from 1.001; and a thousand small steps must add up."""
    with torch.device("meta"):
        model = Llama(config(balance_speed=0.001))
    sharding.attach(model)
    sharding.materialise(model, 0, initial_value, dtype=torch.bfloat16)
    records = [made.bias.record for made in router.routers(model)]
    assert [r.name for r in records] == [f"layers.{i}.mlp.router.bias" for i in range(2)]
    assert {(r.shape, r.slices) for r in records} == {((8,), ((0, 8),))}
    made = router.routers(model)[0]
    assert made.weight.dtype == torch.bfloat16 and not made.bias.any()
    assert "layers.0.mlp.router.bias" in model.state_dict()
    busy = torch.tensor([3, 1, 1, 1, 1, 1, 1, 1])
    for _ in range(1000):
        router.begin_step(model, 1.0)
        for part in router.routers(model):
            part.counts_E, part.dropped = busy, torch.tensor(0)
            part.balance = torch.tensor(0.0).double()
        settle(model, ALONE, positions=5)
    assert made.bias.tolist() == pytest.approx([-1.0] + [1.0] * 7, rel=1e-9)


def test_without_experts_or_a_backward_there_is_nothing_to_settle():
    def run(axis):
        made = identity_router(4, balance_speed=1.0)
        made(numbers(1, 3, 4))
        return settle(made, axis, 3), settle(nn.Linear(2, 2), axis, 3), made.bias.any(), axis.ledger

    for first, second, moved, ledger in run_ranks(run, 2):
        assert (first, second, bool(moved), ledger.calls) == ({}, {}, False, [])
