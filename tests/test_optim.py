"""The update against torch's own clipping and hand-worked numbers; precision where bf16 would
fail."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from picotron_lab import optim, precision
from picotron_lab.analysis import cost, hardware
from picotron_lab.comm import Alone, Axis
from picotron_lab.config import PRESETS, ModelConfig, TrainConfig
from picotron_lab.ledger import Ledger
from picotron_lab.sharding import Record

ALONE = Axis("world", [0], 0, Alone(), Ledger())


def parameter(values, dtype=torch.float32):
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.record = Record("w", tuple(p.shape), tuple((0, n) for n in p.shape))
    return p


def test_learning_rate_warms_up_and_falls_by_a_half_cosine():
    cfg = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=4, steps=15)
    rates = [optim.learning_rate(step, cfg) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.6)  # half way from step 4 to step 14
    assert rates[14] == pytest.approx(0.2)
    assert optim.learning_rate(0, dataclasses.replace(cfg, warmup_steps=0)) == 1.0
    assert optim.learning_rate(0, TrainConfig(steps=1, warmup_steps=0)) == TrainConfig().lr


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clipping_equals_torch(limit):
    ours = [parameter([[1.0, 2.0], [3.0, 4.0]]), parameter([5.0])]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = torch.full_like(p, 0.7), torch.full_like(p, 0.7)
    norm = optim.clip(ours, limit, ALONE, {})
    assert norm.item() == pytest.approx(0.7 * math.sqrt(5))
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit or math.inf)
    assert norm.item() == pytest.approx(expected.item())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_adamw_first_step_by_hand():
    """After one step Adam moves by lr against the sign of the gradient; decay takes lr * 0.1 *
    w."""
    weights = [parameter([[2.0, -3.0]]), parameter([4.0])]
    optimizer = optim.build(weights, TrainConfig(lr=0.01, min_lr=0.0, weight_decay=0.1))
    weights[0].grad, weights[1].grad = torch.tensor([[5.0, -1e-3]]), torch.tensor([-1.0])
    optimizer.step()
    expected = torch.tensor([[2 - 0.01 - 0.002, -3 + 0.01 + 0.003]])
    torch.testing.assert_close(weights[0].detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        weights[1].detach(), torch.tensor([4.01])
    )  # norm weights do not decay


def test_fused_optimizer_is_really_chosen():
    fused = optim.build([parameter([[1.0]])], TrainConfig(impl="fused"))
    plain = optim.build([parameter([[1.0]])], TrainConfig(impl="plain"))
    assert all(group["fused"] for group in fused.param_groups)
    assert not any(group["fused"] for group in plain.param_groups)


def test_the_kernel_is_chosen_where_it_serves(monkeypatch):
    """CUDA is made up. A step that may be taken back must not write the parameters, see
    KernelAdamW."""
    kernel = optim.KernelAdamW
    assert type(optim.build([parameter([1.0])], TrainConfig(impl="fused"))) is torch.optim.AdamW
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for dtype, changes, kind in (
        (torch.float32, {}, kernel),
        (torch.float32, {"impl": "plain"}, torch.optim.AdamW),
        (torch.float32, {"optimizer": "sgd"}, torch.optim.SGD),
        (torch.float32, {"post_validation": True}, torch.optim.AdamW),
        (torch.float64, {}, torch.optim.AdamW),
    ):
        cfg = TrainConfig(**{"impl": "fused", "lr": 0.01, "min_lr": 0.0, **changes})
        optimizer = optim.build([parameter([[1.0]], dtype), parameter([1.0])], cfg)
        assert type(optimizer) is kind, changes
        if kind is kernel:
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            assert decays == [cfg.weight_decay, 0.0] and cfg.weight_decay > 0


@pytest.mark.parametrize(("limit", "scale"), [(0.0, None), (0.5, 0.1), (100.0, 1.0)])
def test_clipping_may_be_left_to_the_optimizer(limit, scale):
    """Norm 5, and gradients stay as they are."""
    weight = parameter([[1.0, 2.0]])
    weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = optim.KernelAdamW([{"params": [weight]}], 0.1)
    assert optim.clip([weight], limit, ALONE, {}, optimizer).item() == pytest.approx(5)
    assert weight.grad.tolist() == [[3, 4]]
    assert (optimizer.scale is None) == (scale is None)
    if scale is not None:
        assert optimizer.scale.dtype == torch.float32
        assert optimizer.scale.item() == pytest.approx(scale, rel=1e-6)


def test_tiny_updates_add_up_in_master_weights():
    """1 - 100 * 1e-3 in bf16 stays 1: each update is below half of its last bit."""
    p = parameter([[1.0]], torch.bfloat16)
    masters = precision.MasterWeights([p])
    precision.accumulate_in([p], torch.float32)
    optimizer = torch.optim.SGD(masters.weights, lr=1e-3)
    for _ in range(100):
        p.grad = torch.ones(1, 1)
        masters.take_gradients()
        optimizer.step()
        masters.publish()
    assert p.dtype == torch.bfloat16 and p.item() == pytest.approx(0.9, abs=2**-8)
    assert masters.weights[0].item() == pytest.approx(0.9, abs=1e-5)


def test_wide_parameters_are_their_own_masters():
    p = parameter([1.0])
    assert precision.MasterWeights([p]).weights[0] is p
    assert precision.MasterWeights([p]).pieces() == []


def test_flops_by_hand():
    """1 layer, width 8, 2 heads of 4, 1 kv head, ffn 12, vocabulary 100, 16 tokens."""
    cfg = ModelConfig("x", 100, 8, 1, 2, 1, 12)
    weights = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12 + 100 * 8
    assert cost.matmul_parameters(cfg) == weights  # the head once; the embedding look-up not at all
    assert cost.flops_per_token(cfg, 16) == 6 * weights + 12 * 1 * 8 * 16
    assert cost.flops_per_token(cfg, 16, causal=True) == 6 * weights + 6 * 1 * 8 * 16
    assert cost.matmul_parameters(dataclasses.replace(cfg, tied=True)) == weights
    experts = dataclasses.replace(cfg, experts=5, top_k=2)
    assert cost.matmul_parameters(experts) == weights + 3 * 8 * 12 + 8 * 5


def test_llama3_8b_flops_as_published():
    """57.9 GFLOP per token at 8k, the embedding left out; 51.5 with causal attention (NeMo's
    count)."""
    assert cost.flops_per_token(PRESETS["llama3-8b"], 8192) / 1e9 == pytest.approx(57.9, abs=0.05)
    causal = cost.flops_per_token(PRESETS["llama3-8b"], 8192, causal=True)
    assert causal / 1e9 == pytest.approx(51.5, abs=0.05)


def test_mfu_needs_a_known_peak():
    peak = hardware.peak_flops("NVIDIA H200", torch.bfloat16)
    assert peak == 989e12
    assert cost.model_flops_utilisation(1000, 989e9, peak, 2) == pytest.approx(0.5)
    for other in ("CPU", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"):
        assert hardware.peak_flops(other, torch.bfloat16) is None
    assert hardware.peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert cost.model_flops_utilisation(1000, 1e9, None, 1) is None
