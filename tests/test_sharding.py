"""Records, initial weights and the gradient norm."""

import dataclasses

import pytest
import torch
from torch import nn

from picotron_lab import sharding
from picotron_lab.config import ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value

CFG = ModelConfig(vocab_size=48, hidden_size=16, layers=2, heads=2, kv_heads=1, ffn_size=24)


def make(cfg=CFG, dtype=torch.float32, seed=0):
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    sharding.materialise(model, seed, initial_value, dtype=dtype)
    return model


def test_initial_weights_do_not_depend_on_order_or_dtype():
    narrow, wide = make(dtype=torch.float32), make(dtype=torch.float64)
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a.double(), b)
    shallow = make(dataclasses.replace(CFG, layers=1))
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, dict(narrow.named_parameters())[name])


def test_initial_weights_differ_between_parameters_and_seeds():
    model, other = make(), make(seed=1)
    q0, q1 = model.layers[0].attention.q.weight, model.layers[1].attention.q.weight
    assert not torch.allclose(q0, q1)
    assert not torch.allclose(q0, other.layers[0].attention.q.weight)
    assert 0.015 < q0.std() < 0.025 and torch.equal(model.norm.weight, torch.ones(16))


def test_a_shard_is_a_slice_of_the_full_parameter():
    """Different shards hold different numbers, and their scale does not depend on the cut."""
    full = make().layers[0].attention.q.weight
    with torch.device("meta"):
        model = Llama(CFG)
    sharding.attach(model)
    q = model.layers[0].attention.q
    q.weight = sharding.narrow(q.weight, 0, 4, 12)
    q.weight = sharding.narrow(q.weight, 0, 2, 6)  # of what is held
    assert q.weight.record.slices == ((6, 10), (0, 16)) and q.weight.shape == (4, 16)
    sharding.materialise(model, 0, initial_value)
    assert torch.equal(q.weight, full[6:10])


def test_parts_are_ceil_sized():
    assert [sharding.bounds(10, 4, i) for i in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [sharding.bounds(5, 4, i) for i in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [sharding.bounds(2, 4, i) for i in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]
    assert sharding.bounds(7, 1, 0) == (0, 7)


def test_tied_parameters_stay_tied():
    model = make(dataclasses.replace(CFG, tied=True))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.record.name == "embed.weight"


def test_norm_counts_replicas_once_and_shards_each():
    """4 ranks as 2 replicas of 2 shards: the norm of [3, 4 | 12, 84] and of a replicated [0.5] *
    4."""

    def norm(world):
        dp = world.split("dp", [[0, 2], [1, 3]])
        tp = world.split("tp", [[0, 1], [2, 3]])
        shard = nn.Parameter(torch.zeros(2))
        shard.record = sharding.Record("a", (4,), ((2 * tp.rank, 2 * tp.rank + 2),), ("dp",))
        shard.grad = torch.tensor([[3.0, 4.0], [12.0, 84.0]])[tp.rank]
        shared = nn.Parameter(torch.zeros(4))
        shared.record = sharding.Record("b", (4,), ((0, 4),), ("dp", "tp"))
        shared.grad = torch.full((4,), 0.5)
        axes = {"dp": dp, "tp": tp}
        return sharding.squared_norm([shard, shared], world, axes).item()

    for found in run_ranks(norm, 4):
        assert found == pytest.approx(3**2 + 4**2 + 12**2 + 84**2 + 1)


def test_gradients_are_summed_over_their_partial_axes_only():
    def reduce(world):
        dp = world.split("dp", [[0, 2], [1, 3]])
        tp = world.split("tp", [[0, 1], [2, 3]])
        a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        a.record = sharding.Record("a", (1,), ((0, 1),), ("dp", "tp"), partial=("dp",))
        b.record = sharding.Record("b", (1,), ((0, 1),), ("dp", "tp"), partial=("dp", "tp"))
        for p in (a, b):
            p.grad = torch.tensor([10.0**world.rank])
        sharding.reduce_gradients([a, b], {"dp": dp, "tp": tp})
        calls = [(call.op, call.axis) for call in world.ledger.calls]
        assert calls == [("all_reduce", "dp"), ("all_reduce", "tp")], "one call per axis"
        return a.grad.item(), b.grad.item()

    assert run_ranks(reduce, 4) == [(101, 1111), (1010, 1111), (101, 1111), (1010, 1111)]


def test_frozen_parameters_are_left_alone_by_the_rule():
    def reduce(world):
        a, b = (nn.Parameter(torch.zeros(1), requires_grad=learns) for learns in (True, False))
        for p in (a, b):
            p.record = sharding.Record("p", (1,), ((0, 1),), ("world",), ("world",))
        a.grad = torch.ones(1)
        sharding.reduce_gradients([a, b], {"world": world})
        return a.grad.item(), b.grad

    assert run_ranks(reduce, 3) == [(3, None)] * 3
