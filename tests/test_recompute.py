"""Recomputation changes no gradient, and repeats the operations it promises.

What it keeps is measured in test_activations.py.
"""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from picotron_lab import recompute, sharding, tensor_parallel
from picotron_lab.analysis import cost
from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.data_parallel import synchroniser
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.lab import run_ranks
from picotron_lab.model import AttentionCore, Llama, initial_value
from picotron_lab.precision import accumulate_in
from picotron_lab.processes import run_processes

CFG = ModelConfig(
    vocab_size=50, hidden_size=24, layers=2, heads=6, kv_heads=3, ffn_size=34, head_size=6
)
CONFIGS = {
    "grouped": CFG,
    "one kv head": dataclasses.replace(CFG, kv_heads=1),
    "no groups": dataclasses.replace(CFG, kv_heads=6),
    "tied": dataclasses.replace(CFG, tied=True),
    "experts": dataclasses.replace(CFG, experts=4),
}
AGAIN = [("selective", "plain"), ("selective", "fused"), ("full", "plain"), ("full", "fused")]
ALL = [("none", "plain"), *AGAIN]
RARE = [pytest.param(*way, marks=pytest.mark.exhaustive) for way in AGAIN[1:3]]
SOME = [AGAIN[0], *RARE, AGAIN[3]]  # each path and each kind once; the others after a change


def build(cfg=CFG, kind="none", impl="plain", rate=0.0, dtype=torch.float64, fused=False):
    """As the trainer builds it: recomputation before weights exist."""
    with torch.device("meta"):
        model = Llama(cfg, rate)
    sharding.attach(model)
    if fused:
        fuse(model)
    recompute.apply(model, kind, impl)
    sharding.materialise(model, 0, initial_value, "cpu", dtype)
    return model


def batch(B=3, T=7, first_row=0):
    dice = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(50, (first_row + B, T), generator=dice)[first_row:]
    where = Where(torch.arange(T), torch.arange(first_row, first_row + B), step=5, seed=2)
    return tokens_BT, tokens_BT.roll(-1, 1), where


def gradients(model, inputs=None):
    """Loss, and gradients by the names of the plain model; None where a parameter is frozen."""
    loss = model(*(inputs or batch()))
    loss.backward()
    return loss.detach(), {p.record.name: p.grad for p in model.parameters()}


def assert_same(model, plain, tolerance=1e-12):
    loss, found = gradients(model)
    expected_loss, expected = gradients(plain)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
            continue
        assert gradient.abs().max() > 0
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= tolerance, f"{name}: {error}"


# ---- the same gradients


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_gradients_are_those_of_the_plain_model(kind, impl, name, rate):
    assert_same(build(CONFIGS[name], kind, impl, rate), build(CONFIGS[name], rate=rate))


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
def test_gradients_of_the_fused_model(kind, impl):
    assert_same(build(kind=kind, impl=impl, rate=0.3, fused=True), build(rate=0.3), 1e-10)


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
def test_in_eval_mode_nothing_is_dropped(kind, impl):
    assert_same(build(kind=kind, impl=impl, rate=0.3).eval(), build())


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
@pytest.mark.parametrize(
    "frozen", [["embed.weight"], ["embed.weight", "layers.0."], [".q.weight", ".k.weight"]]
)
def test_frozen_parameters(kind, impl, frozen):
    """Layers whose input needs no gradient still learn; a frozen layer gets none."""
    models = build(kind=kind, impl=impl), build()
    for model in models:
        for parameter in model.parameters():
            parameter.requires_grad_(not any(f in parameter.record.name for f in frozen))
    assert_same(*models)


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
def test_bfloat16_with_wide_gradients(kind, impl):
    """The same operations in the same order: not one bit may differ."""
    models = [build(kind=kind, impl=impl, dtype=torch.bfloat16), build(dtype=torch.bfloat16)]
    for model in models:
        accumulate_in(list(model.parameters()), torch.float32)
    assert_same(*models, tolerance=0)
    assert {p.grad.dtype for p in models[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "impl"), AGAIN)
def test_two_micro_batches_add_up_and_backward_can_be_repeated(kind, impl):
    model, plain = build(kind=kind, impl=impl), build()
    _, once = gradients(plain)
    losses = [model(*batch()) for _ in range(2)]  # both are under way, as in a pipeline
    losses[1].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, 3 * once[parameter.record.name])


@pytest.mark.parametrize("outer", ["plain", "fused"])
@pytest.mark.parametrize("inner", ["plain", "fused"])
def test_one_inside_the_other(inner, outer):
    model = build(kind="selective", impl=inner, rate=0.3)
    recompute.apply(model, "full", outer)
    assert_same(model, build(rate=0.3))


def test_fused_path_leaves_an_ordinary_graph():
    model, plain = build(kind="full", impl="fused"), build()
    _, expected = gradients(plain)
    found = torch.autograd.grad(model(*batch()), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, expected[parameter.record.name])


def little(impl):
    """A module whose backward needs its input, and the same module again, recomputed."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return module, recompute.Recompute(module, impl)


NOTICED = {
    "plain": (RuntimeError, "modified by an inplace operation"),
    "fused": (AssertionError, "an input of a recomputed module was changed in place before"),
}


@pytest.mark.parametrize("impl", NOTICED)
@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x[:1].zero_()])
def test_an_input_that_was_changed_is_noticed(impl, change):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True) * 1
    y = little(impl)[1](x)
    change(x)
    error, sentence = NOTICED[impl]
    with pytest.raises(error, match=sentence):
        y.sum().backward()


@pytest.mark.parametrize("impl", NOTICED)
def test_second_derivatives_are_right_or_refused(impl):
    """The gradient of |dy/dx|^2, as a penalty on gradients needs it."""
    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    module, again = little(impl)
    weights = list(module.parameters())[:1]

    def of_the_penalty(module):
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *weights])

    if impl == "plain":
        with pytest.raises(AssertionError, match="create_graph=True asks for second derivatives"):
            of_the_penalty(again)
        return
    for found, expected in zip(of_the_penalty(again), of_the_penalty(module), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)


def freeze_q(model):
    model.layers[0].module.attention.q.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("trains", "change"), [(True, nn.Module.eval), (False, nn.Module.train), (True, freeze_q)]
)
def test_a_second_run_that_differs_is_noticed(trains, change):
    model = build(kind="full", impl="fused", rate=0.3)
    loss = model.train(trains)(*batch())
    change(model)
    with pytest.raises(AssertionError, match="wanted to keep other tensors the second time: leave"):
        loss.backward()


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_selective_leaves_a_fused_model_as_it_is(impl):
    model = build(kind="selective", impl=impl, fused=True)
    assert not [m for m in model.modules() if isinstance(m, recompute.Recompute)]
    assert [type(m) for m in model.modules()] == [type(m) for m in build(fused=True).modules()]


class Box(nn.Module):
    """A module around another, as parallel techniques put one."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *inputs):
        return self.inside(*inputs)


def test_what_is_replaced():
    model = build()
    for layer in model.layers:
        layer.attention = Box(Box(layer.attention))
    recompute.apply(model, "selective")
    for layer in model.layers:
        core = layer.attention.inside.inside.core
        assert isinstance(core, recompute.Recompute) and isinstance(core.module, AttentionCore)
    assert_same(model, build())
    with pytest.raises(ConfigError, match="--recompute half is not one of none, selective, full"):
        recompute.apply(model, "half")


# ---- ranks


def step_of_rank(axis, kind, impl, sync_step):
    """Gradients of two micro-batches on this rank's rows, summed over ranks, and its calls."""
    model = build(kind=kind, impl=impl, rate=0.3)
    parameters = list(model.parameters())
    sync = synchroniser(sync_step, parameters, axis, bucket_bytes=20_000)
    counts = dict.fromkeys((p.record.name for p in parameters), 0)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: _count(counts, p))
    sync.begin_step()
    for i in range(2):
        sync.before_backward(last=i == 1)
        model(*batch(1, 7, 2 * axis.rank + i)).backward()
    sync.finish()
    assert set(counts.values()) == {2}, "every gradient is accumulated once per micro-batch"
    calls = [(call.op, call.bytes) for call in axis.ledger.calls]
    return {p.record.name: p.grad for p in parameters}, calls


def _count(counts, parameter):
    counts[parameter.record.name] += 1


@pytest.mark.parametrize(("kind", "impl"), SOME)
@pytest.mark.parametrize("sync_step", ["overlapped", "silent"])
def test_data_parallel_hooks_fire(kind, impl, sync_step):
    _, expected = gradients(build(rate=0.3), batch(6))
    _, usual = run_ranks(step_of_rank, 3, "none", "plain", sync_step)[0]
    for found, calls in run_ranks(step_of_rank, 3, kind, impl, sync_step, seed=1):
        assert calls == usual
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_processes_do_as_threads_do():
    threads = run_ranks(step_of_rank, 2, "full", "plain", "silent")
    processes = run_processes(step_of_rank, 2, "full", "plain", "silent")
    for (found, calls), (expected, others) in zip(processes, threads, strict=True):
        assert calls == others
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return axis.all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.axis.all_reduce(grad), None


class Talk(nn.Module):
    """cos of the sum over ranks of sin of (x * weight): sends in forward and in backward."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.arange(4, dtype=torch.float64) + axis.rank)

    def forward(self, x):
        return SumOverRanks.apply((x * self.weight).sin(), self.axis).cos()


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_collectives_inside_are_sent_again(impl, seed):
    """Each of two modules sends in forward, again, and in backward; rank r has its own weights."""

    def run(axis):
        talk = [recompute.Recompute(Talk(axis), impl) for _ in range(2)]
        talk[1](talk[0](torch.ones(4, dtype=torch.float64))).sum().backward()
        return len(axis.ledger.calls), [module.module.weight.grad for module in talk]

    weights = [torch.arange(4.0, dtype=torch.float64).add(r).requires_grad_() for r in range(3)]
    w = [torch.stack(weights), torch.stack(weights)]
    x = w[0].sin().sum(0).cos()
    # each of three ranks computes this loss, and backward adds up what they learned from it
    expected = torch.autograd.grad((x * w[1]).sin().sum(0).cos().sum() * 3, w)
    for rank, (calls, (first, second)) in enumerate(run_ranks(run, 3, seed=seed)):
        assert calls == 2 * 3
        torch.testing.assert_close(second, expected[1][rank])
        torch.testing.assert_close(first, expected[0][rank])


def calls_of_tensor_parallel(axis, regions, impl, rate):
    """all_reduces of forward, and of backward, of a model of 2 layers cut over 2 ranks."""
    with torch.device("meta"):
        model = Llama(dataclasses.replace(CFG, kv_heads=2), rate)
    sharding.attach(model)
    tensor_parallel.parallelize(model, axis, axis.split("kv", [[0], [1]]), regions)
    recompute.apply(model, "full", impl)
    sharding.materialise(model, 0, initial_value, "cpu", torch.float64)
    loss = model(*batch())
    forward = len(axis.ledger.calls)
    loss.backward()
    assert {call.op for call in axis.ledger.calls} == {"all_reduce"}
    return forward, len(axis.ledger.calls) - forward


@pytest.mark.parametrize(
    ("regions", "impl", "rate", "of_layer"),
    [
        ("plain", "plain", 0, 4),
        ("plain", "fused", 0, 3),  # the layer's last matmul is skipped, and its sum
        ("plain", "fused", 0.3, 4),  # but not before a dropout
        ("fused", "plain", 0, 4),
        ("fused", "fused", 0, 4),  # one operator with its sum
    ],
)
def test_calls_of_tensor_parallel_layers(regions, impl, rate, of_layer):
    """2 of backward itself, and those of forward again."""
    found = run_ranks(calls_of_tensor_parallel, 2, regions, impl, rate)
    assert found == [(2 * 2, 2 * of_layer)] * 2


# ---- operations


def operations(model, inputs):
    with FlopCounterMode(display=False) as counter:
        model(*inputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("kind", "impl"), ALL)
@pytest.mark.parametrize("name", ["grouped", "one kv head"])
def test_operations_equal_the_formula(kind, impl, name):
    cfg, B, T = CONFIGS[name], 3, 7
    once = B * T * cost.flops_per_token(cfg, T)
    again = operations(build(cfg, kind, impl, dtype=torch.float32), batch(B, T)) - once
    assert again == recompute.flops_again(cfg, B, T, kind, impl)


def test_operations_worked_by_hand():
    """N = 2 tokens, T = 2, D = 4, two heads of 2, F = 3, 1 layer.

    Scores and values: 2 N T H C = 32 each. Matrices q, k, v, o 4 * 16 and three of 12 elements: 2 N
    for each is 400; `down` of it 48.
    """
    cfg = ModelConfig(hidden_size=4, layers=1, heads=2, kv_heads=2, ffn_size=3, vocab_size=5)
    assert recompute.flops_again(cfg, 1, 2, "none", "plain") == 0
    assert recompute.flops_again(cfg, 1, 2, "selective", "plain") == 64
    assert recompute.flops_again(cfg, 1, 2, "selective", "fused") == 32
    assert recompute.flops_again(cfg, 1, 2, "full", "plain") == 464
    assert recompute.flops_again(cfg, 1, 2, "full", "fused") == 416


def test_full_makes_four_thirds_of_three_thirds():
    """Layers alone, without a head: forward is a third of a step, and is done twice."""
    cfg = dataclasses.replace(CFG, vocab_size=1)
    head = 6 * 3 * 7 * 24
    once = operations(build(cfg), (torch.zeros(3, 7, dtype=torch.long),) * 2) - head
    assert recompute.flops_again(cfg, 3, 7, "full", "plain") * 3 == once
