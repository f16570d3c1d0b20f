"""MPMD: what users may do wrong is told in a sentence, at once; what they may do does no harm.

Every test that could hang runs in a thread that is given up.
"""

import sys
import threading
from dataclasses import replace

import pytest
import torch

from picotron_lab.config import ConfigError
from picotron_lab.mpmd import Controller, accumulate_grads, pipeline_yield
from picotron_lab.mpmd_actors import ActorError

PATIENCE = 60  # seconds after which a test that hangs is given up


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"a": draw(4, 4, seed=1), "b": draw(4, 4, seed=2)}
BATCHES = [draw(3, 4, seed=3), draw(3, 4, seed=4)]


def two_layers(params, x):
    x = pipeline_yield(torch.tanh(x @ params["a"]))
    return (x @ params["b"]).square().sum()


def by_torch(loss_fn, params, batches):
    """Loss and gradients by backward(), one micro-batch after the other."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    losses = [loss_fn(leaves, batch) for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(losses).detach(), {name: p.grad for name, p in leaves.items()}


def check(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-12, atol=1e-14)


def ends(function, *arguments):
    """The error that it raises, before patience ends; None if there is none."""
    errors = []

    def call():
        try:
            function(*arguments)
            errors.append(None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert errors, f"it hangs: no end in {PATIENCE} seconds"
    return errors[0]


# ---- what ends a step


def leave(params, grads):
    sys.exit("enough")


class Leaving(torch.nn.Module):
    """A task that ends its thread."""

    def forward(self, *values):
        sys.exit("enough")


@pytest.mark.parametrize("where", ["task F1.0", "the update"])
def test_a_thread_that_wants_to_exit_is_heard_of(where):
    controller = Controller(2)
    remote = controller.compile(accumulate_grads(two_layers, "1f1b"), PARAMS, BATCHES)
    if where == "the update":
        remote(BATCHES)
        error = ends(remote.apply, leave)
    else:
        controller.actors.ask("load", [(1, job) for job in leaving(remote)])
        error = ends(remote, BATCHES)
    assert isinstance(error, ActorError) and f"{where} on actor " in str(error)
    assert "failed: SystemExit: enough" in str(error)
    with pytest.raises(ActorError, match="have stopped, because .*: start another Controller.$"):
        remote(BATCHES)


def leaving(remote):
    """The jobs of a program, in which stage 1 leaves."""
    for job in remote._jobs():
        tasks = {key: Leaving() if key == ("F", 1) else task for key, task in job.tasks.items()}
        yield replace(job, tasks=tasks)


@pytest.mark.parametrize("method", ["_next", "_post"])
def test_an_interrupt_stops_the_actors(method, monkeypatch):
    """Else the next call would take the answers to this one's questions, or half of its step."""
    with Controller(2) as controller:
        remote = controller.compile(accumulate_grads(two_layers, "1f1b"), PARAMS, BATCHES)
        original, calls = getattr(controller.actors, method), []

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(controller.actors, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            remote(BATCHES)
        monkeypatch.undo()
        with pytest.raises(ActorError, match="the controller was interrupted .KeyboardInterrupt"):
            remote([2 * batch for batch in BATCHES])
        assert not any(thread.is_alive() for thread in controller.actors.threads)


# ---- what shares memory, or lies in it otherwise


def two_biases(params, x):
    """The gradients of both are one value, which stage 1 sends to stage 0, too."""
    x = pipeline_yield(torch.tanh(x) + params["a"])
    return (x + params["b"]).square().sum()


def expanded(params, x):
    """The gradients are expanded views of one number."""
    return pipeline_yield(x + params["a"]).sum() + params["b"].sum()


def views(params, x):
    """The gradient of b is that of a, transposed."""
    return (pipeline_yield(torch.tanh(x) + params["a"]) + params["b"].t()).square().sum()


def doubles_in_place(params, grads):
    for name, grad in grads.items():
        params[name] -= grad.mul_(2)


@pytest.mark.parametrize("loss_fn", [two_biases, expanded, views])
def test_an_update_may_change_gradients_in_place(loss_fn):
    x = draw(4, 4)
    loss, grads = by_torch(loss_fn, PARAMS, [x])
    with Controller(2) as controller:
        lists = [["F0.0", "BW0.0"], ["F1.0", "BW1.0"]]
        remote = controller.compile(accumulate_grads(loss_fn, lists), PARAMS, [x])
        check(remote([x]), (loss, grads))
        remote.apply(doubles_in_place)
        after = remote.parameters()
    for name, grad in grads.items():
        torch.testing.assert_close(after[name], PARAMS[name] - 2 * grad, rtol=1e-12, atol=1e-14)
    _, plain = accumulate_grads(loss_fn)(PARAMS, [x])
    doubles_in_place({name: p.clone() for name, p in PARAMS.items()}, plain)
    for name, grad in grads.items():
        torch.testing.assert_close(plain[name], 2 * grad, rtol=1e-12, atol=1e-14)


def flat(params, x):
    """Views, which torch would refuse for other strides than those that were recorded."""
    x = pipeline_yield(torch.tanh(x.reshape(-1).view(4, 4)) * params["a"].reshape(-1).view(4, 4))
    return (x @ params["b"]).square().sum()


STRIDED = {
    "rows": lambda x: x.clone(), "columns": lambda x: x.t().contiguous().t(),
    "gaps": lambda x: x.repeat_interleave(2, 1)[:, ::2], "expanded": lambda x: x[0].expand(4, 4),
}  # fmt: skip


@pytest.mark.parametrize("compiled", STRIDED)
@pytest.mark.parametrize("weights", ["rows", "gaps"])
def test_batches_may_lie_in_memory_as_they_like(compiled, weights):
    params = {"a": STRIDED[weights](PARAMS["a"]), "b": PARAMS["b"]}
    batches = [lie(draw(4, 4, seed=i)) for i, lie in enumerate(STRIDED.values())]
    with Controller(2) as controller:
        examples = [STRIDED[compiled](draw(4, 4))] * len(batches)
        remote = controller.compile(accumulate_grads(flat, "1f1b"), params, examples)
        check(remote(batches), by_torch(flat, params, batches))


class Known(torch.autograd.Function):
    """x w, with w or x w in the place of the gradient of w."""

    @staticmethod
    def forward(ctx, x, w, whole):
        y = x @ w
        ctx.save_for_backward(x, w, y)
        ctx.whole = whole
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, y = ctx.saved_tensors
        return grad @ w.t(), (y if ctx.whole else w), None


@pytest.mark.parametrize("whole", [True, False])
def test_a_gradient_may_be_what_forward_has_made_or_a_weight(whole):
    def loss_fn(params, x):
        x = pipeline_yield(Known.apply(x, params["a"], whole))
        return (torch.tanh(x) @ params["b"]).square().sum()

    batches = [draw(4, 4, seed=5), draw(4, 4, seed=6)]
    with Controller(2) as controller:
        remote = controller.compile(accumulate_grads(loss_fn, "1f1b"), PARAMS, batches)
        found = remote(batches)
    check(found, by_torch(loss_fn, PARAMS, batches))
    a = PARAMS["a"]
    wanted = sum(batches) @ a if whole else 2 * a
    torch.testing.assert_close(found[1]["a"], wanted, rtol=1e-12, atol=1e-14)


# ---- what is refused


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"actors": 0}, "actors 0 is too small: give 1 or more"),
        ({"actors": "2"}, "actors '2' is no whole number: give one such as 2"),
        ({"actors": 1, "devices": ["gpu"]}, "devices name 'gpu', which this machine does not have"),
        ({"actors": 3, "devices": "cpu"}, "must name one device for each of 3 actors"),
        ({"actors": 2, "kind": "rpc"}, "kind 'rpc' is unknown: choose threads or processes, both"),
        ({"actors": 2, "impl": "quick"}, "impl 'quick' is unknown: choose plain or fused"),
        ({"actors": 2, "devices": ["cpu"]}, "must name one device for each of 2 actors"),
        ({"actors": 1, "kind": "processes", "devices": ["cpu"]}, "are for actors of kind threads"),
    ],
)
def test_a_controller_that_cannot_be(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Controller(**options)


@pytest.fixture(scope="module")
def remote():
    """A program for two micro-batches; nothing that is refused may harm it."""
    with Controller(2) as controller:
        yield controller.compile(accumulate_grads(two_layers, "1f1b"), PARAMS, BATCHES)


@pytest.mark.parametrize(
    "batches, words",
    [
        (lambda: [], "batches are empty: give a list of at least one"),
        (lambda: (batch for batch in BATCHES), "batches are a generator, .*: give list.batches."),
        (lambda: {"a": 1}, "batches are a dict, .*: give list.batches."),
    ],
)
def test_batches_that_are_no_list(remote, batches, words):
    step = accumulate_grads(two_layers, "1f1b")
    with pytest.raises(ConfigError, match=words):
        remote(batches())
    with pytest.raises(ConfigError, match=words):
        step(PARAMS, batches())
    with pytest.raises(ConfigError, match=words):
        remote.controller.compile(step, PARAMS, batches())


@pytest.mark.parametrize(
    "batches, words",
    [
        ([*BATCHES, BATCHES[0]], "3 batches do not fit a program compiled for 2"),
        ([BATCHES[0], BATCHES[1][:2]], "batch 1 has shapes .* one shape, or compile again"),
        ([BATCHES[0], 3], "batches.1 is 3; leaves of batch must be tensors"),
        ([BATCHES[0], {"x": BATCHES[1]}], "batch 1 is of batches.1.x, and .* for batch: give"),
    ],
)
def test_batches_that_do_not_fit(remote, batches, words):
    with pytest.raises(ConfigError, match=words):
        remote(batches)
    check(remote(BATCHES), by_torch(two_layers, PARAMS, BATCHES))


def test_an_update_needs_gradients(remote):
    fresh = remote.controller.compile(accumulate_grads(two_layers, "1f1b"), PARAMS, BATCHES)
    with pytest.raises(ConfigError, match="apply needs gradients: call remote"):
        fresh.apply(leave)


def test_compile_needs_a_step():
    with Controller(1) as controller, pytest.raises(ConfigError, match="accumulate_grads.loss_fn"):
        controller.compile(two_layers, PARAMS, BATCHES)


@pytest.mark.parametrize(
    "loss_fn, params, sentence",
    [
        (two_layers, {}, "params are empty: give at least one tensor"),
        (two_layers, {"a": torch.arange(3)}, "params.a is a tensor of torch.int64"),
        (two_layers, torch.nn.Linear(1, 1), "params is a module .Linear."),
        (lambda p, x: x @ p["a"], PARAMS, r"gives a tensor \[3, 4\] .* give loss.sum"),
        (lambda p, x: x.sum(), PARAMS, "does not depend on params"),
    ],
)
def test_a_loop_on_this_device_refuses_what_a_controller_does(loss_fn, params, sentence):
    step = accumulate_grads(loss_fn, "1f1b")
    with pytest.raises(ConfigError, match=sentence):
        step(params, BATCHES)
    with Controller(2) as controller, pytest.raises(ConfigError, match=sentence):
        controller.compile(step, params, BATCHES)
