"""What can be recorded of a loss function and what is refused, in a sentence; pipeline_yield."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from picotron_lab.config import ConfigError
from picotron_lab.mpmd_record import pipeline_yield, record
from picotron_lab.mpmd_trace import trace

PARAMS = {"a": torch.eye(4), "loss": torch.tensor(1.0)}
BATCH = (torch.ones(3, 4), torch.zeros(4), torch.ones(4))
STATISTICS = torch.nn.BatchNorm1d(4, affine=False)
OUTSIDE = torch.ones(4)


def test_yield_is_the_identity_outside_of_recording():
    x = torch.tensor([1.0, -2, 3], dtype=torch.float64).requires_grad_()
    y, numbers = pipeline_yield(x * 2, torch.arange(3))
    assert torch.equal(y, x * 2) and torch.equal(numbers, torch.arange(3))
    (y * numbers).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 2, 4], dtype=torch.float64))
    square = torch.eye(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(pipeline_yield, square)
    with torch.no_grad():
        assert not pipeline_yield(x).requires_grad


def branch(p, batch):
    x = batch[0] @ p["a"]
    return (pipeline_yield(x) if x.sum() > 0 else x).sum()


def inside_checkpoint(p, batch):
    x = checkpoint(lambda x: pipeline_yield(x.sin()).cos(), batch[0] @ p["a"], use_reentrant=False)
    return x.sum()


def changes_batch(p, batch):
    return (batch[0].add_(1) @ p["a"]).sum()


def changes_parameter(p, batch):
    with torch.no_grad():
        p["a"].mul_(2)
    return (batch[0] @ p["a"]).sum()


def second_is_unused(p, batch):
    x = pipeline_yield(batch[0] @ p["a"])
    pipeline_yield(x * 2)
    return x.sum()


def statistics_outside(p, batch):
    return functional_call(STATISTICS, {}, batch[0] @ p["a"]).sum()


def statistics_in_batch(p, batch):
    mean, variance = batch[1:]
    return F.batch_norm(batch[0] @ p["a"], mean, variance, training=True).sum()


def lstm(p, batch):
    cell = [p["a"].repeat(4, 1)] * 2 + [torch.zeros(16)] * 2
    x, zeros = batch[0][None], torch.zeros(1, 3, 4)
    return torch.lstm(x, (zeros, zeros), cell, True, 1, 0.0, False, False, False)[0].sum()


REFUSED = {
    "asks for the value of a tensor.*branch.*torch.where": [
        branch, lambda p, batch: (batch[0] @ p["a"]).sum() * float(batch[0].sum()),
    ],
    "takes a number or a shape from values": [
        lambda p, batch: (batch[0] @ p["a"]).sum() * batch[0].sum().item(),
        lambda p, batch: (batch[0] @ p["a"])[batch[0] > 0].sum(),
        lambda p, batch: (batch[0] @ p["a"])[batch[0].nonzero()[0]].sum(),
    ],
    "output_size of repeat_interleave": [
        lambda p, batch: p["a"].repeat_interleave(batch[0][0].long(), 0).sum(),
    ],
    "LSTM of oneDNN.*flags": [lstm],
    "BatchNorm, which changes its buffers": [statistics_in_batch],
    "from outside.*such as buffers of a module": [statistics_outside],
    "itself a leaf of params": [lambda p, batch: p["loss"]],
    "draws random numbers": [
        lambda p, batch: F.dropout(batch[0] @ p["a"], 0.5).sum(),
        lambda p, batch: (batch[0] @ p["a"] * torch.rand(4)).sum(),
        lambda p, batch: F.scaled_dot_product_attention(
            *[batch[0][None, None] @ p["a"]] * 3, dropout_p=0.1
        ).sum(),
    ],
    "in place.*clone": [changes_batch, changes_parameter],
    r"uses tensors from outside, of shape \[\[4\]\]": [
        lambda p, batch: (batch[0] @ p["a"] * OUTSIDE).sum()
    ],
    r"gives a tensor \[3, 4\].*give loss.sum": [lambda p, batch: batch[0] @ p["a"]],
    "gives a tuple": [lambda p, batch: ((batch[0] @ p["a"]).sum(),)],
    "does not depend on params": [lambda p, batch: batch[0].sum()],
    "1 of 2 pipeline_yields give what the loss does not use": [second_is_unused],
    "computes again": [inside_checkpoint],
    "Stage 0 of 2 has nothing to compute.*after it": [
        lambda p, batch: (pipeline_yield(batch[0]) @ p["a"]).sum()
    ],
    "Stage 1 of 2 has nothing to compute.*before it": [
        lambda p, batch: pipeline_yield((batch[0] @ p["a"]).sum())
    ],
    "given nothing": [lambda p, batch: pipeline_yield()],
    r"no tensor \((NoneType|float|list|dict|tuple)\): .* one by one": [
        lambda p, batch, x=x: pipeline_yield(batch[0], x)
        for x in (None, 1.0, [OUTSIDE], {"x": OUTSIDE}, (OUTSIDE, OUTSIDE))
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "words,loss_fn", [(words, f) for words, programs in REFUSED.items() for f in programs]
)
def test_refused(words, loss_fn):
    with pytest.raises(ConfigError, match=words) as error:
        trace(loss_fn, PARAMS, BATCH)
    assert str(error.value).endswith(".") and ". " not in str(error.value)


@pytest.mark.parametrize(
    "params,batch,words",
    [
        ({"i": torch.arange(3)}, (), "params.i is a tensor of torch.int64.*into the batch"),
        (PARAMS, ({"n": 3},), "batch.0.n is 3.*make it a tensor, or a constant of loss_fn"),
        ({}, BATCH, "params are empty: give at least one"),
        (torch.nn.Linear(1, 1), BATCH, r"params is a module \(Linear\).*functional_call"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, (), "one name.*keys without dots"),
    ],
)
def test_refused_leaves(params, batch, words):
    with pytest.raises(ConfigError, match=words):
        record(second_is_unused, params, batch)
