"""MPMD: whatever the model, the schedule and the number of actors, they give what torch's own
backward gives, send what they must, and keep nothing.

The reference is backward() of each micro-batch, one after the other: gradients add up in .grad in
the order of the micro-batches, so even the last bit can be compared if no weight is shared.
"""

import itertools
import threading

import pytest
import torch

from picotron_lab import mpmd
from picotron_lab.mpmd import Controller, accumulate_grads, contract, pipeline_yield
from picotron_lab.mpmd_actors import ActorError, ThreadActors
from picotron_lab.mpmd_program import Send
from picotron_lab.mpmd_schedule import resolve
from picotron_lab.mpmd_worker import Mail, Stopped

PATIENCE = 60  # seconds after which a test that hangs is given up
MIXED = [  # BW of one micro-batch, B and W of the other
    ["F0.0", "F0.1", "BW0.0", "B0.1", "W0.1"],
    ["F1.0", "F1.1", "B1.0", "W1.0", "BW1.1"],
    ["F2.0", "BW2.0", "F2.1", "B2.1", "W2.1"],
]


# ---- models, and what torch says about them


def layers(params, x, count):
    """A layer of a stage's own width each; a yield between two."""
    for i in range(count):
        x = torch.tanh(x @ params[f"w{i}"])
        x = pipeline_yield(x) if i < count - 1 else x
    return x.square().sum()


def three_layers(params, x):
    return layers(params, x, 3)


def four_layers(params, x):
    return layers(params, x, 4)


def six_layers(params, x):
    return layers(params, x, 6)


def skip(params, x):
    """The first stage's value is used by all others, around the yields."""
    first = torch.tanh(x @ params["w0"])
    x = pipeline_yield(first)
    x = pipeline_yield(torch.tanh(x @ params["w1"]) * first)
    return (x @ params["w2"] + first).square().sum()


def tied(params, x):
    """A weight of the first and the last stage, and a bias of all."""
    x = pipeline_yield(torch.tanh(x @ params["w0"] + params["bias"]))
    x = pipeline_yield(torch.tanh(x @ params["w1"] + params["bias"]))
    return ((x + params["bias"]) @ params["w0"].T).square().sum()


def no_weights(params, x):
    """A stage without parameters, and a parameter that nobody uses."""
    x = pipeline_yield(torch.tanh(x @ params["w0"]))
    x = pipeline_yield(torch.sin(x) * 2)
    return (x @ params["w2"]).square().sum()


def several(params, batch):
    """Several values of different shapes and types over one yield; labels for the last stage."""
    a, b = torch.tanh(batch["x"] @ params["w0"]), batch["x"].sum(-1, keepdim=True) * params["s"]
    a, b = pipeline_yield(a, b)
    c, b = pipeline_yield(torch.tanh(a @ params["w1"]), b + a.mean())
    scores = c @ params["w2"] * b
    return torch.nn.functional.cross_entropy(scores, batch["labels"], reduction="sum")


WIDTHS = {
    three_layers: (6, 5, 7, 3), four_layers: (6, 5, 7, 3, 4), six_layers: (4, 5, 6, 3, 4, 2, 3),
    skip: (5, 5, 5, 5), tied: (5, 5, 5), no_weights: (6, 4, 4, 4), several: (4, 5, 6, 3),
}  # fmt: skip


def example(loss_fn, microbatches):
    """Parameters and micro-batches in float64."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64) / 2

    widths = WIDTHS[loss_fn]
    params = {f"w{i}": draw(a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))}
    params |= {"bias": draw(5)} if loss_fn is tied else {}
    params |= {"s": draw(1)} if loss_fn is several else {}
    batches = [draw(4, widths[0]) for _ in range(microbatches)]
    if loss_fn is several:
        labels = torch.tensor([0, 2, 1, 0])
        batches = [{"x": x, "labels": labels} for x in batches]
    return params, batches


def by_torch(loss_fn, params, batches):
    """Loss and gradients by backward()."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    losses = []
    for batch in batches:
        losses.append(loss_fn(leaves, batch))
        losses[-1].backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}
    return sum(losses).detach(), grads


def check(found, expected, exact=True):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **tolerance, msg=name)


def at_last(function):
    """Call it in a thread that is given up if it hangs."""
    results = []

    def call():
        try:
            results.append((function(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, f"it hangs: no end in {PATIENCE} seconds"
    if results[0][1]:
        raise results[0][1]
    return results[0][0]


def remotely(loss_fn, schedule, actors, microbatches, impl="fused"):
    """A step on actors, its program, what the actors saw, and the number of dispatches."""
    params, batches = example(loss_fn, microbatches)

    def run():
        with Controller(actors, impl=impl) as controller:
            remote = controller.compile(accumulate_grads(loss_fn, schedule), params, batches)
            found = remote(batches)
            return found, remote.program, remote.reports(), controller.dispatches

    return at_last(run)


# ---- the same numbers


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("schedule", ["afab", "1f1b", "zb-h1"])
def test_three_layers_are_exactly_those_of_one_device(schedule, impl):
    found, *_ = remotely(three_layers, schedule, 3, 4, impl)
    check(found, by_torch(three_layers, *example(three_layers, 4)))


@pytest.mark.parametrize(
    "loss_fn, schedule, actors, microbatches",
    [
        (three_layers, MIXED, 3, 2),
        (six_layers, "interleaved", 3, 3),
        (six_layers, "zb-v", 3, 4),
        (four_layers, "dualpipe-v", 2, 4),
        (four_layers, "auto", 2, 3),
        (three_layers, "1f1b", 3, 1),
        (six_layers, "interleaved", 1, 2),
    ],
)
def test_other_schedules_are_too(loss_fn, schedule, actors, microbatches):
    found, *_ = remotely(loss_fn, schedule, actors, microbatches)
    check(found, by_torch(loss_fn, *example(loss_fn, microbatches)))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("loss_fn", [skip, no_weights, several, tied])
def test_other_models(loss_fn, schedule):
    found, *_ = remotely(loss_fn, schedule, 3, 3)
    check(found, by_torch(loss_fn, *example(loss_fn, 3)), exact=loss_fn is not tied)


@pytest.mark.parametrize("loss_fn", WIDTHS)
def test_without_actors_it_is_a_loop(loss_fn):
    params, batches = example(loss_fn, 3)
    check(accumulate_grads(loss_fn)(params, batches), by_torch(loss_fn, params, batches))


def sgd(params, grads):
    for name, parameter in params.items():
        parameter -= 0.05 * grads[name]


@pytest.mark.parametrize("loss_fn", [three_layers, tied, no_weights])
def test_five_steps_of_sgd(loss_fn):
    """Copies of shared weights must follow, or the second step would differ."""
    params, batches = example(loss_fn, 2)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.SGD([*leaves.values()], lr=0.05)
    with Controller(3) as controller:
        remote = controller.compile(accumulate_grads(loss_fn, "1f1b"), params, batches)
        for _ in range(5):
            loss, _ = remote(batches)
            remote.apply(sgd)
            optimizer.zero_grad()
            expected = sum(loss_fn(leaves, batch) for batch in batches)
            expected.backward()
            optimizer.step()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        after = remote.parameters()
    for name, leaf in leaves.items():
        torch.testing.assert_close(after[name], leaf.detach(), rtol=1e-11, atol=1e-13)
        assert loss_fn is no_weights or not torch.equal(params[name], after[name])


def test_two_programs_on_the_same_actors():
    """Each has its own values; the user's parameters stay as they are."""
    params, batches = example(three_layers, 2)
    copies = {name: p.clone() for name, p in params.items()}
    with Controller(3) as controller:
        first, second = (
            controller.compile(accumulate_grads(three_layers, name), params, batches)
            for name in ("afab", "1f1b")
        )
        first(batches)
        first.apply(sgd)
        check(second(batches), by_torch(three_layers, copies, batches))
    assert all(torch.equal(params[name], copies[name]) for name in params)


# ---- what runs do


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("loss_fn, schedule", [(three_layers, "1f1b"), (tied, "zb-h1")])
def test_actors_hold_and_send_what_the_program_says(loss_fn, schedule, impl):
    _, made, reports, dispatches = remotely(loss_fn, schedule, 3, 4, impl)
    assert [report.peak for report in reports] == [*made.peak]
    assert [report.left for report in reports] == [()] * 3
    assert sum(report.messages for report in reports) == made.transfers
    assert sum(report.message_bytes for report in reports) == made.transfer_bytes
    assert dispatches == len(made.order if impl == "plain" else made.block_order)


def test_messages_of_a_chain():
    """Widths 6 5 7 3 of 4 rows, float64: two boundaries, there and back for 4 micro-batches."""
    _, made, reports, dispatches = remotely(three_layers, "afab", 3, 4)
    assert made.transfers == 2 * 2 * 4 == contract(made.schedule, 0)[0]
    assert made.transfer_bytes == 2 * 4 * (4 * 5 + 4 * 7) * 8
    assert dispatches <= 3 + 16
    assert contract(resolve("1f1b", 3, 3, 4), 100) == (16, 1600, 19)


def test_a_shared_weight_travels_once_a_step():
    """w0 of the first and the last stage: one gradient comes home, whatever the micro-batches."""
    for m in (2, 4):
        _, made, *_ = remotely(tied, "1f1b", 3, m)
        sent = [str(i.value) for _, i in made.order if isinstance(i, Send)]
        assert sum("w0" in name for name in sent) == 1
        assert sum("bias" in name for name in sent) == 2
        assert sorted(str(i.value) for _, i in made.publish if isinstance(i, Send)) == [
            "params.bias", "params.bias", "params.w0"
        ]  # fmt: skip


class Rendezvous(Mail):
    """A send waits until its value has been taken."""

    def __init__(self):
        self.moved, self.offers, self.stopped = threading.Condition(), {}, False

    def send(self, source, to, value, x):
        with self.moved:
            self.offers[source, to] = value, x
            self.moved.notify_all()
            self.moved.wait_for(lambda: (source, to) not in self.offers or self.stopped)
            if self.stopped:
                raise Stopped

    def receive(self, source, to):
        with self.moved:
            self.moved.wait_for(lambda: (source, to) in self.offers or self.stopped)
            if self.stopped:
                raise Stopped
            self.moved.notify_all()
            return self.offers.pop((source, to))

    def stop(self):
        with self.moved:
            self.stopped = True
            self.moved.notify_all()


def test_with_channels_that_have_no_room():
    params, batches = example(skip, 3)

    def run():
        with Controller(3) as controller:
            controller.actors.close()
            controller.actors = ThreadActors(3, mail=Rendezvous())
            return controller.compile(accumulate_grads(skip, "1f1b"), params, batches)(batches)

    check(at_last(run), by_torch(skip, params, batches))


# ---- what fails


def look_up(params, batch):
    x = pipeline_yield(batch["x"] * params["scale"])
    return (params["words"][batch["tokens"]] * x).sum()


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_a_task_that_fails_is_named_and_nothing_hangs(impl):
    """The third micro-batch has a token that does not exist, which stage 1 notices."""
    params = {"scale": torch.ones(1), "words": torch.ones(4)}
    good, bad = ({"x": torch.ones(1), "tokens": torch.tensor([token])} for token in (3, 9))

    def run():
        with Controller(3, impl=impl) as controller:
            lists = [["F0.0", "F0.1", "F0.2", "BW0.0", "BW0.1", "BW0.2"],
                     ["F1.0", "F1.1", "BW1.0", "BW1.1", "F1.2", "BW1.2"], []]  # fmt: skip
            step = accumulate_grads(look_up, lists)
            remote = controller.compile(step, params, [good] * 3)
            with pytest.raises(ActorError, match=r"^task F1.2 on actor 1 failed: IndexError: "):
                remote([good, good, bad])
            with pytest.raises(ActorError, match=r"^the actors have stopped, because task F1.2"):
                remote([good] * 3)

    at_last(run)


def wrong_update(params, grads):
    params["w1"] -= grads["no such name"]


def test_an_update_that_fails_is_named():
    params, batches = example(three_layers, 2)

    def run():
        with Controller(3) as controller:
            remote = controller.compile(accumulate_grads(three_layers, "1f1b"), params, batches)
            remote(batches)
            with pytest.raises(ActorError, match="^the update on actor . failed: KeyError: "):
                remote.apply(wrong_update)

    at_last(run)


def test_main_shows_what_was_predicted(capsys):
    mpmd.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert len(rows) == 4
    for row in rows:
        assert row[1] == row[2] and row[3] == row[4] and row[7:13:2] == row[8:13:2]
        assert int(row[6]) <= int(row[5].removeprefix("<="))
        assert row[13] == "yes"
