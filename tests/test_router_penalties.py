"""Penalties of the router: gradients of whole layers against the papers' formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from picotron_lab import recompute, router, sharding
from picotron_lab.config import ModelConfig
from picotron_lab.fused import fuse
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value
from picotron_lab.router import Router, begin_step

SMALL = dict(hidden_size=16, heads=1, kv_heads=1, vocab_size=50, layers=2, ffn_size=12)


def config(**options):
    return ModelConfig(**{**SMALL, "experts": 8, **options})


def numbers(*shape, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice, dtype=torch.float64)


# ---- the whole layer, written out


def written_choice(biased, cfg):
    """The experts of one token, best first, from its scores + bias as Python numbers."""
    size = cfg.experts // cfg.expert_groups
    groups = [range(g * size, g * size + size) for g in range(cfg.expert_groups)]
    few = max(1, cfg.top_k // cfg.top_groups)
    worth = [sum(sorted((biased[e] for e in group), reverse=True)[:few]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: -worth[g])[: cfg.top_groups]
    return sorted((e for g in best for e in groups[g]), key=lambda e: -biased[e])[: cfg.top_k]


def written_sequence(logits_TE, bias_E, cfg):
    """Of one sequence: gates [T, E], sum of f P (2412.19437, 17 to 20), mean of the squared log of
    the sum (2202.08906, 5), choices."""
    T, E = logits_TE.shape
    exp = logits_TE.exp()
    s_TE = exp / exp.sum(1, keepdim=True) if cfg.router == "softmax" else exp / (1 + exp)
    chosen = [written_choice((s + bias_E).tolist(), cfg) for s in s_TE.detach()]
    gates, taken = torch.zeros(T, E, dtype=torch.float64), [0] * E
    capacity = math.ceil(cfg.capacity_factor * T * cfg.top_k / E) or T
    for t, experts in enumerate(chosen):
        whole = sum(s_TE[t, e] for e in experts) if cfg.top_k > 1 else 1
        for e in experts:
            taken[e] += 1
            if taken[e] <= capacity:
                gates[t, e] = s_TE[t, e] / whole
    f = [E / (cfg.top_k * T) * sum(e in experts for experts in chosen) for e in range(E)]
    p_E = (s_TE / s_TE.sum(1, keepdim=True)).sum(0) / T
    z = (exp.sum(1).log() ** 2).sum() / T
    return gates, sum(f[e] * p_E[e] for e in range(E)), z, chosen


class Written(nn.Module):
    """An MoE of the library, computed as the papers write it: every expert, every token."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x_BTD):
        moe, cfg, out = self.moe, self.moe.router.cfg, []
        logits_BTE = x_BTD @ moe.router.weight.T
        rows = [written_sequence(row, moe.router.bias, cfg) for row in logits_BTE]
        self.penalty = sum(cfg.balance_loss * b + cfg.z_loss * z for _, b, z, _ in rows)
        self.penalty = self.penalty * x_BTD.shape[1]  # mean of a sequence -> sum over positions
        for x_TD, (gates, _, _, _) in zip(x_BTD, rows, strict=True):
            y = sum(gates[:, e, None] * mlp(x_TD, m) for e, m in enumerate(moe.experts))
            out.append(y + (mlp(x_TD, moe.shared) if moe.shared else 0))
        self.chosen = torch.tensor([row[-1] for row in rows])
        return torch.stack(out)


def mlp(x, weights):
    gate, up, down = weights.gate.weight, weights.up.weight, weights.down.weight
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


BALANCED = {"balance_loss": 0.5, "z_loss": 0.25}
KINDS = {
    "softmax": dict(top_k=2, **BALANCED),
    "one expert": dict(top_k=1, **BALANCED),
    "sigmoid, one expert": dict(top_k=1, router="sigmoid"),
    "balance": dict(top_k=3, router="sigmoid", balance_loss=0.5),
    "z": dict(top_k=3, router="sigmoid", z_loss=0.5),
    "groups": dict(top_k=4, router="sigmoid", expert_groups=4, top_groups=2, shared_experts=2),
    "groups, softmax": dict(top_k=3, expert_groups=4, top_groups=3, **BALANCED),
    "capacity": dict(top_k=2, capacity_factor=0.75, **BALANCED),
}


def build(cfg, kind="none", impl="plain", fused=False):
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    if fused:
        fuse(model)
    recompute.apply(model, kind, impl)
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    for parameter in model.parameters():  # large enough for scores to be far from uniform
        parameter.data *= 10 if parameter.dim() == 2 else 1
    for i, part in enumerate(router.routers(model)):
        part.bias += numbers(cfg.experts, seed=90 + i) * 0.1
    return model


def batch():
    tokens = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100  # counts neither in the loss nor in the number it is divided by
    return tokens, labels


def written_gradients(cfg):
    model = build(cfg)
    for layer in model.layers:
        layer.mlp = Written(layer.mlp)
    loss = model(*batch()) + sum(layer.mlp.penalty for layer in model.layers)
    (loss / 18).backward()
    return {p.record.name: p.grad for p in model.parameters()}, model




def sampled():
    """Every other kind always, the rest after a change."""
    for k, kind in enumerate(KINDS):
        yield pytest.param(kind, marks=[pytest.mark.exhaustive] * (k % 2))


WAYS = [("none", "plain", False), ("none", "plain", True), ("full", "plain", False),
        ("full", "fused", False), ("full", "plain", True), ("full", "fused", True)]  # fmt: skip


@pytest.mark.parametrize("kind", list(sampled()))
def test_gradients_equal_those_of_the_loss_with_its_penalties(kind):
    """Recomputation runs every router twice: its penalties and its counts are there once."""
    cfg = config(**KINDS[kind])
    expected, written = written_gradients(cfg)
    for way in WAYS:
        model = build(cfg, *way)
        begin_step(model, 1 / 18)
        (model(*batch()) / 18).backward()
        for p in model.parameters():
            torch.testing.assert_close(p.grad, expected[p.record.name], rtol=1e-9, atol=1e-13)
        for made, layer in zip(router.routers(model), written.layers, strict=True):
            counts = layer.mlp.chosen.flatten().bincount(minlength=8)
            assert torch.equal(made.counts_E, counts), way


# ---- what counts, and when


def random_router(**options):
    made = Router(config(**options)).double()
    made.weight.data = numbers(8, 16, seed=1)
    return made


def penalised(made, x_BTD):
    """Gradients of x and W when the gates count for something, and penalties on top."""
    x_BTD = x_BTD.clone().requires_grad_()
    expert_Nk, gate_Nk = made(x_BTD)
    ((gate_Nk * (expert_Nk + 1).sin()).sum() * made.scale).backward()
    return x_BTD.grad, made.weight.grad


def test_only_backward_counts():
    made, x_BTD = random_router(**BALANCED), numbers(2, 5, 16)
    for trains in (True, False):
        made.train(trains)
        made(x_BTD)
        with torch.no_grad():
            made(x_BTD)
    assert not made.counts_E and not made.dropped and not made.balance
    penalised(made, x_BTD)
    assert made.counts_E.sum() == 2 * 5 * 2
    begin_step(made, 0.25)
    assert not made.counts_E and not made.dropped and not made.balance and made.scale == 0.25


def test_micro_batches_under_way_together_each_count_once():
    made, parts = random_router(top_k=3, **BALANCED), numbers(4, 2, 5, 16)
    for gates in [made(x_BTD)[1] for x_BTD in parts]:  # all forwards first, as in a pipeline
        gates.sum().backward()
    whole = random_router(top_k=3, **BALANCED)
    whole(parts.flatten(0, 1))[1].sum().backward()
    assert torch.equal(made.counts_E, whole.counts_E)
    torch.testing.assert_close(made.weight.grad, whole.weight.grad)
    torch.testing.assert_close(made.balance, whole.balance)


def test_ranks_with_halves_of_a_sequence_equal_one_device():
    """Counts of the whole sequence are f; P, z and gradients add up over the ranks."""
    x_BTD, options = numbers(3, 8, 16), dict(top_k=3, router="sigmoid", **BALANCED)

    def run(axis):
        made = random_router(**options)
        made.over_sequence = axis.all_reduce
        x_grad, w_grad = penalised(made, x_BTD.chunk(2, 1)[axis.rank])
        return x_grad, w_grad, made.counts_E, made.balance

    whole = random_router(**options)
    x_grad, w_grad = penalised(whole, x_BTD)
    halves, weights, counts, balances = zip(*run_ranks(run, 2), strict=True)
    torch.testing.assert_close(torch.cat(halves, 1), x_grad)
    torch.testing.assert_close(sum(weights), w_grad)
    assert torch.equal(sum(counts), whole.counts_E)
    torch.testing.assert_close(sum(balances), whole.balance)
    alone = [random_router(**options) for _ in range(2)]
    apart = [penalised(m, x)[1] for m, x in zip(alone, x_BTD.chunk(2, 1), strict=True)]
    assert (sum(apart) - w_grad).abs().max() > 1e-3, "halves by themselves are another loss"


def test_ranks_that_share_a_penalty_answer_for_a_part_each():
    x_BTD, grads = numbers(2, 6, 16), []
    for share in (1.0, 0.25, 0.75, 0.0):
        made = random_router(**BALANCED)
        made.share, made.scale = share, 0.5
        grads.append(penalised(made, x_BTD))
    for whole, quarter, rest, none in zip(*grads, strict=True):
        assert (whole - none).abs().max() > 1e-2
        torch.testing.assert_close(quarter - none, (whole - none) / 4)
        torch.testing.assert_close(quarter + rest, whole + none)
