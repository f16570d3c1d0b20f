"""MPMD on processes: the same numbers as on one device, and every end of an actor is heard of; and
on threads with devices of their own.

What actors do is tested with threads in test_mpmd.py. Processes import this file.
"""

import os
import pickle
import signal
import sys
import threading
import types

import pytest
import torch

from picotron_lab.config import ConfigError
from picotron_lab.mpmd import Controller, Remote, accumulate_grads, pipeline_yield
from picotron_lab.mpmd_actors import ActorError, packed
from picotron_lab.mpmd_worker import Actor, Queues, serve

PATIENCE = 90  # seconds after which a test that hangs is given up
MICROBATCHES, WIDTH, ROWS = 3, 8, 5000  # messages of 312 KiB: more than a pipe holds


def loss_fn(params, batch):
    """A weight of the first and the last stage, words of the second."""
    x = pipeline_yield(torch.tanh(batch["x"] @ params["a"]))
    x = pipeline_yield(x * params["words"][batch["tokens"]])
    return (x @ params["a"].T).square().mean()


def update(params, grads):
    for name, parameter in params.items():
        parameter -= 0.5 * grads[name]


def example():
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    params = {"a": draw(WIDTH, WIDTH) / 3, "words": draw(4, WIDTH)}
    tokens = torch.arange(ROWS) % 4
    return params, [{"x": draw(ROWS, WIDTH), "tokens": tokens} for _ in range(MICROBATCHES)]


@pytest.fixture
def there():
    """A program on three processes, which are gone at the end; and the batches."""
    params, batches = example()
    with Controller(3, kind="processes") as controller:
        yield controller.compile(accumulate_grads(loss_fn, "zb-h1"), params, batches), batches
    assert not any(process.is_alive() for process in controller.actors.processes)


def fails(function, *arguments) -> str:
    """The sentence of the ActorError that it raises, before patience ends."""
    sentences = []

    def call():
        with pytest.raises(ActorError) as error:
            function(*arguments)
        sentences.append(str(error.value))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert sentences, f"no ActorError came in {PATIENCE} seconds"
    return sentences[0]


def test_three_steps_are_those_of_one_device(there: tuple[Remote, list]):
    remote, batches = there
    params, _ = example()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.SGD([*leaves.values()], lr=0.5)
    for _ in range(3):
        loss, grads = remote(batches)
        remote.apply(update)
        optimizer.zero_grad()
        expected = sum(loss_fn(leaves, batch) for batch in batches)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        for name, leaf in leaves.items():
            torch.testing.assert_close(grads[name], leaf.grad, rtol=1e-11, atol=1e-13)
        optimizer.step()
    for name, parameter in remote.parameters().items():
        torch.testing.assert_close(parameter, leaves[name].detach(), rtol=1e-11, atol=1e-13)
    reports = remote.reports()
    assert [report.peak for report in reports] == [*remote.program.peak]
    assert [report.left for report in reports] == [()] * 3
    sent = sum(report.message_bytes for report in reports)
    copies = 3 * WIDTH * WIDTH * 8  # of the shared weight, after each update
    assert sent == 3 * remote.program.transfer_bytes + copies


@pytest.mark.slow  # left to CI
def test_a_task_that_fails_is_named(there: tuple[Remote, list]):
    remote, batches = there
    wrong = {**batches[1], "tokens": batches[1]["tokens"] + 1}
    sentence = fails(remote, [batches[0], wrong, batches[2]])
    assert sentence.startswith("task F1.1 on actor 1 failed: IndexError: ")
    assert fails(remote, batches).startswith("the actors have stopped, because task F1.1")


def test_an_actor_that_is_killed_is_named(there: tuple[Remote, list]):
    remote, batches = there
    process = remote.controller.actors.processes[2]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert fails(remote, batches) == "actor 2 ended with exit code -9."


@pytest.mark.exhaustive  # left to a run after a change
def test_a_function_that_others_cannot_import(there: tuple[Remote, list], monkeypatch):
    """What cannot be pickled is refused before any actor is asked, so the next question is well.
    What only the controller can import, an actor says."""
    remote, batches = there
    remote(batches)
    with pytest.raises(ConfigError, match="apply was given what other processes cannot import"):
        remote.apply(lambda params, grads: None)
    with pytest.raises(ConfigError, match="report was given"):
        remote.controller.actors.ask("report", [(1,), (1,), (lambda: 1,)])
    assert [report.left for report in remote.reports()] == [()] * 3
    only_here = types.ModuleType("only_here")
    exec("def update(params, grads): pass", only_here.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    sentence = fails(remote.apply, only_here.update)
    assert sentence.startswith("taking a command on actor ") and "only_here" in sentence
    assert "define it at the top level of a .py file" in sentence


@pytest.mark.exhaustive  # left to a run after a change
def test_an_actor_that_ends_as_unguarded_scripts_do(there: tuple[Remote, list]):
    remote, batches = there
    remote(batches)
    assert "exit code 1, as it does if the script" in fails(remote.apply, end)


def end(params, grads):
    os._exit(1)


# ---- what is sent


def transposed(params, x):
    """The second stage was recorded with a view, as what comes is transposed twice in all."""
    x = pipeline_yield(torch.relu((x @ params["a"]).t()))
    return (x.t().reshape(-1).view(4, WIDTH) @ params["a"]).square().sum()


@pytest.mark.exhaustive  # left to a run after a change
def test_values_keep_their_strides(there: tuple[Remote, list]):
    controller = there[0].controller
    params, x = {"a": example()[0]["a"]}, torch.ones(4, WIDTH, dtype=torch.float64)
    step = accumulate_grads(transposed, [["F0.0", "BW0.0"], ["F1.0", "BW1.0"], []])
    remote = controller.compile(step, params, [x])
    leaf = params["a"].clone().requires_grad_()
    expected = transposed({"a": leaf}, x)
    expected.backward()
    loss, grads = remote([x])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grads["a"], leaf.grad, rtol=1e-12, atol=0)


LARGE = torch.arange(800_000.0).view(100_000, 8)


@pytest.mark.parametrize(
    "x",
    [
        LARGE[:4], LARGE[7:11, 2:4], LARGE[:5, 3], LARGE[::30_000].t(), LARGE[3, 3], LARGE[:0],
        LARGE[0].expand(3, 8), LARGE[:3, :1].expand(3, 9), LARGE[0].unfold(0, 3, 1),
        LARGE[:4].clone().t(), torch.nn.Parameter(LARGE[:4]),
    ],
)  # fmt: skip
def test_only_the_part_is_sent_and_strides_are_kept(x):
    message = packed({"x": x})
    found = pickle.loads(message)["x"]
    assert torch.equal(found, x) and found.stride() == x.stride() and found.dtype == x.dtype
    assert len(message) < x.nbytes + 2000


# ---- one command after the other


def test_an_actor_that_has_failed_does_nothing_more():
    """No program 1 was loaded, so the first command fails; the second would need an answer."""
    commands = iter([("run", (1, (), {}), False), ("__init__", (0, None, None), True), None])
    answers = []
    serve(Actor(0, Queues(1), torch.device("cpu")), lambda: next(commands), answers.append)
    assert [well for well, _ in answers] == [False]


def test_threads_with_devices(device: str):
    """Constants that were recorded on one device are made on that of the actor."""
    params, batches = example()
    expected_loss, expected = accumulate_grads(shifted)(params, batches)
    with Controller(3, devices=["cpu", device, device]) as controller:
        remote = controller.compile(accumulate_grads(shifted, "1f1b"), params, batches)
        loss, grads = remote(batches)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-13)


def shifted(params, batch):
    """A loss in which tensors are created, in the last stage."""
    x = pipeline_yield(torch.tanh(batch["x"] @ params["a"]))
    x = pipeline_yield(x * params["words"][batch["tokens"]])
    return (x + torch.arange(WIDTH, dtype=x.dtype, device=x.device)).square().mean()
