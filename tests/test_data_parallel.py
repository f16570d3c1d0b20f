"""What data parallelism sends and when; that its result is right is shown in test_trainer.py
too."""

import pytest
import torch
from torch import nn

from picotron_lab import data_parallel
from picotron_lab.data_parallel import contract, group_by_size, synchroniser
from picotron_lab.lab import run_ranks

STEPS = ["naive", "overlapped", "bucketed", "silent"]
WIDTHS = [5, 7, 3, 11, 2]  # odd sizes, so that no bucket is filled evenly


def make_weights(frozen=()):
    dice = torch.Generator().manual_seed(0)
    shapes = zip(WIDTHS, WIDTHS[1:], strict=False)
    weights = [torch.randn(shape, generator=dice, dtype=torch.float64) for shape in shapes]
    return [nn.Parameter(w, requires_grad=i not in frozen) for i, w in enumerate(weights)]


def make_inputs(ranks, microbatches):
    dice = torch.Generator().manual_seed(1)
    return torch.randn(ranks, microbatches, 4, WIDTHS[0], generator=dice, dtype=torch.float64)


def loss_of(weights, x, skip=None):
    for i, weight in enumerate(weights):
        x = (
            torch.tanh(x @ weight)
            if i != skip
            else x[:, : weight.shape[1]].repeat(1, 9)[:, : weight.shape[1]]
        )
    return x.square().sum()


def one_step(axis, step, microbatches=3, bucket_bytes=400, frozen=(), unused_on=None):
    """Gradients of one step on one rank, its ledger, and how many calls each gradient had seen."""
    weights = make_weights(frozen)
    trained = [w for w in weights if w.requires_grad]
    sync = synchroniser(step, trained, axis, bucket_bytes)
    inputs = make_inputs(axis.size, microbatches)[axis.rank]
    calls_before_gradient = []
    for weight in trained:
        weight.register_post_accumulate_grad_hook(
            lambda _: calls_before_gradient.append(len(axis.ledger.calls))
        )
    for _ in range(2):  # the second step must not see anything of the first
        calls_before_gradient.clear()
        axis.ledger.clear()
        sync.begin_step()
        for i, x in enumerate(inputs):
            sync.before_backward(last=i == microbatches - 1)
            loss_of(weights, x, skip=1 if axis.rank == unused_on else None).backward()
        sync.finish()
    return [w.grad.clone() for w in trained], axis.ledger.calls[:], calls_before_gradient


def reference(ranks, microbatches=3, frozen=(), unused_on=None):
    """The sum over all ranks and micro-batches, by torch alone."""
    weights = make_weights(frozen)
    inputs = make_inputs(ranks, microbatches)
    total = sum(
        loss_of(weights, inputs[r, i], skip=1 if r == unused_on else None)
        for r in range(ranks)
        for i in range(microbatches)
    )
    return torch.autograd.grad(total, [w for w in weights if w.requires_grad])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sum_over_ranks_and_microbatches(step, ranks):
    for gradients, _, _ in run_ranks(one_step, ranks, step):
        for mine, expected in zip(gradients, reference(ranks), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_frozen_parameters_are_left_alone(step):
    for gradients, _, _ in run_ranks(one_step, 3, step, 3, 400, (0, 2)):
        for mine, expected in zip(gradients, reference(3, frozen=(0, 2)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", ["naive", "bucketed", "silent"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_parameter_that_one_rank_does_not_use(step, seed):
    """Its gradient is zero there; the order of the buckets must not change on that rank."""
    results = run_ranks(one_step, 3, step, 3, 100, (), 1, seed=seed)
    for gradients, _, _ in results:
        for mine, expected in zip(gradients, reference(3, unused_on=1), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_calls_and_bytes_equal_the_contract(step, microbatches):
    elements = sum(a * b for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
    groups = group_by_size(make_weights(), 400)  # 50 elements: none of these fit together
    assert [[p.numel() for p in g] for g in groups] == [[22], [33], [21], [35]]
    buckets = len(groups)
    calls, payload = contract(step, elements, len(WIDTHS) - 1, buckets, microbatches)
    for _, ledger, _ in run_ranks(one_step, 3, step, microbatches):
        assert len(ledger) == calls
        assert sum(c.bytes for c in ledger) == 2 * payload  # float64: twice the bytes of float32
        assert {c.op for c in ledger} == {"all_reduce"}


def test_payload_of_the_fused_path_is_4_bytes_per_parameter():
    assert contract("silent", 1000, 10, 3, 1) == contract("silent", 1000, 10, 3, 64) == (3, 4000)


@pytest.mark.parametrize("step", ["overlapped", "bucketed", "silent"])
def test_first_collective_leaves_before_the_last_gradient_exists(step):
    for _, _, seen in run_ranks(one_step, 2, step, 1, 200):
        assert seen[-2] > 0, "nothing had left when the last but one gradient was there"


def test_naive_waits_for_all_gradients():
    for _, _, seen in run_ranks(one_step, 2, "naive", 1):
        assert seen == [0] * 4


def test_nothing_is_sent_alone():
    assert run_ranks(one_step, 1, "silent")[0][1] == []


def test_gradients_can_travel_in_another_dtype():
    """float64 gradients sent as float32: half the bytes, and right to 7 digits."""

    def reduce(axis):
        weights = make_weights()
        sync = data_parallel.Silent(weights, axis, 400, torch.float32)
        sync.begin_step()
        sync.before_backward(last=True)
        loss_of(weights, make_inputs(2, 1)[axis.rank, 0]).backward()
        sync.finish()
        return [w.grad for w in weights], axis.ledger.bytes()

    for gradients, payload in run_ranks(reduce, 2):
        assert payload == 4 * sum(g.numel() for g in gradients)
        for mine, expected in zip(gradients, reference(2, 1), strict=True):
            assert mine.dtype == torch.float64
            error = (mine - expected).abs().max() / expected.abs().max()
            assert 1e-12 < error < 1e-6


def test_bfloat16_parameters_add_up_in_float32():
    """256 micro-batches of gradient 1 each: bfloat16 would stop at 256, far from 256 + 1/2 per
    step."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32

    def accumulate(axis):
        sync = data_parallel.Silent([weight], axis)
        sync.begin_step()
        for i in range(600):
            sync.before_backward(last=i == 599)
            weight.sum().backward()
        sync.finish()
        return weight.grad

    gradient = run_ranks(accumulate, 1)[0]
    assert gradient.dtype == torch.float32 and gradient.tolist() == [600.0] * 3


def test_a_large_parameter_has_a_bucket_of_its_own():
    weights = [nn.Parameter(torch.zeros(n)) for n in (1, 2, 100, 3, 4)]
    sizes = [[p.numel() for p in group] for group in group_by_size(weights, 40)]
    assert sizes == [[4, 3], [100], [2, 1]]
