"""Lesson 03: the specification of data parallelism. Everything is float64; time is the model's."""

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from lessons.kit import Lesson, task
from lessons.kit.chains import Case, added, draw_case, local_gradients, loss_of, one_device
from picotron_lab.comm import Axis

LESSON = Lesson(
    title="Data parallelism",
    builds="gradient synchronisation that sends few large messages while backward computes",
    allowed=("picotron_lab.comm", "picotron_lab.model"),
)
FLOAT = 8  # bytes


# ---- 03.1: gradients that are already there


def summed(axis: Axis, student: Any, shapes: list, gradients: list) -> dict:
    """Give every parameter this rank's gradient, sum them; also returns the weights."""
    parameters = []
    for i, (shape, frozen) in enumerate(shapes):
        weight = torch.full(shape, float(i + 1), dtype=torch.float64)
        parameters.append(nn.Parameter(weight, requires_grad=not frozen))
    for parameter, gradient in zip(parameters, gradients[axis.rank], strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    student.sum_gradients(parameters, axis)
    return {"gradients": [p.grad for p in parameters], "weights": [p.detach() for p in parameters]}


def draw_gradients(rng: Random, generator: torch.Generator, ranks: int) -> tuple[list, list]:
    """([(shape, frozen)], by rank [gradient or None]): one is frozen, one not used everywhere."""
    count = rng.randint(4, 6)
    shapes = [(rng.sample([2, 3, 5, 7], 2 - i % 2), i == 1) for i in range(count)]
    skips = {(rng.randrange(ranks), count - 1), (rng.randrange(ranks), 2)}

    def draw(rank: int, i: int) -> Tensor | None:
        shape, frozen = shapes[i]
        used = not frozen and (rank, i) not in skips
        return torch.randn(shape, generator=generator).double() if used else None

    return shapes, [[draw(rank, i) for i in range(count)] for rank in range(ranks)]


@task("03.1", points=3, minutes=15, core=True, compare="picotron_lab.data_parallel:Naive")
def test_sum_gradients(attempt: Any) -> None:
    """Gradients are summed over replicas, after backward."""
    ranks = attempt.rng.randint(3, 6)
    shapes, gradients = draw_gradients(attempt.rng, attempt.generator, ranks)
    weights = [torch.full(shape, i + 1.0).double() for i, (shape, _) in enumerate(shapes)]
    sums_of_weights = [ranks * weight for weight in weights]
    run = attempt.run(summed, ranks, shapes, gradients)
    attempt.same(
        "weights after the call",
        [value["weights"] for value in run.values],
        [weights] * ranks,
        ranks=ranks,
        suspects={"the weights were summed, not their gradients": [sums_of_weights] * ranks},
    )
    want = [
        None if frozen else sum(g[i] for g in gradients if g[i] is not None)
        for i, (_, frozen) in enumerate(shapes)
    ]
    attempt.same(
        "gradients",
        [value["gradients"] for value in run.values],
        [want] * ranks,
        ranks=ranks,
        suspects=kept_to_oneself(shapes, gradients, run.count()),
    )
    trainable = [shape for shape, frozen in shapes if not frozen]
    size = sum(torch.Size(shape).numel() for shape in trainable)
    why = "gathering everybody's gradients costs n times what their sum does"
    if run.bytes() < FLOAT * size:
        why = "less was sent than the gradients of all trainable parameters in their own dtype"
    attempt.equal("payload bytes of one rank", run.bytes(), FLOAT * size, "8Ψ", why)


def kept_to_oneself(shapes: list, gradients: list, calls: int) -> dict[str, list]:
    """Every rank still has its own gradients, and zeros or nothing where it had none."""
    words = "the gradients never travelled: every rank has its own"
    if calls:
        words = (
            "the sums were thrown away, every rank still has its own: all_reduce returns the sum, "
            "and leaves what it is given as it is, unless you say out="
        )
    zeros = [None if frozen else torch.zeros(shape).double() for shape, frozen in shapes]
    filled = [
        [zero if g is None else g for g, zero in zip(row, zeros, strict=True)] for row in gradients
    ]
    return {words: gradients, f"{words}.": filled}


# ---- 03.2: the mean over all counted tokens


def weighted(axis: Axis, student: Any, weight: Tensor, batches: list) -> Tensor:
    """The gradient of this rank's losses, whatever the student makes of them."""
    weight = nn.Parameter(weight.clone())
    losses = [loss_sum(weight, *batch) for batch in batches[axis.rank]]
    counts = [int(counted.sum()) for _, _, counted in batches[axis.rank]]
    for part in student.parts_of_mean(losses, counts, axis):
        part.backward()
    return weight.grad


def loss_sum(weight: Tensor, x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """The sum of token losses: squared errors of the counted tokens."""
    return ((x @ weight - y).square() * counted).sum()


def gradient_of(weight: Tensor, batches: list, denominators: list[float]) -> Tensor:
    """The gradient of the sum of all losses, each divided by its denominator (0: left out)."""
    total = torch.zeros_like(weight)
    for batch, denominator in zip(batches, denominators, strict=True):
        leaf = weight.clone().requires_grad_()
        if denominator:
            total += torch.autograd.grad(loss_sum(leaf, *batch), leaf)[0] / denominator
    return total


def draw_batches(rng: Random, generator: torch.Generator, ranks: int, m: int) -> list:
    """By rank, m micro-batches (x, y, counted); the very last one has no counted token."""

    def draw(tokens: int, kept: int) -> tuple:
        x = torch.randn(tokens, 3, generator=generator).double()
        y = torch.randn(tokens, generator=generator).double()
        return x, y, (torch.arange(tokens) < kept).double()

    sizes = [[(7, rng.randint(1, 7)) for _ in range(m)] for _ in range(ranks)]
    sizes[0][0], sizes[-1][-1] = (7, 2), (7, 0)
    return [[draw(*size) for size in row] for row in sizes]


@task("03.2", points=3, minutes=15, core=True)
def test_parts_of_mean(attempt: Any) -> None:
    """The loss is a mean over all tokens of the global batch."""
    ranks, m = attempt.rng.randint(3, 6), attempt.rng.randint(2, 4)
    weight = torch.randn(3, generator=attempt.generator).double()
    batches = draw_batches(attempt.rng, attempt.generator, ranks, m)
    every = [batch for row in batches for batch in row]
    counts = [float(counted.sum()) for _, _, counted in every]
    own = [sum(counts[r * m : r * m + m]) for r in range(ranks) for _ in range(m)]
    run = attempt.run(weighted, ranks, weight, batches)
    suspects = {
        "every micro-batch was divided by its own count: a mean of means, in which a token of a "
        "short micro-batch weighs more": [c * ranks * m for c in counts],
        "every micro-batch was divided by its own count": counts,
        "every rank divided by its own count: a mean of means, in which a token of a rank with few "
        "counted tokens weighs more": [c * ranks for c in own],
        "every rank divided by its own count": own,
        "divided by all positions, also those that do not count": [7.0 * ranks * m] * len(every),
    }
    attempt.same(
        "sum of the ranks' gradients",
        sum(run.values),
        gradient_of(weight, every, [sum(counts)] * len(every)),
        ranks=ranks,
        factors={
            m: "micro-batches",
            ranks * m: "micro-batches in all",
            int(sum(counts)): "counted tokens in the global batch",
        },
        suspects={words: gradient_of(weight, every, by) for words, by in suspects.items()},
    )
    why = "the counts of all micro-batches can be added before they travel"
    attempt.equal("collectives of one rank", run.count(), 1, "one, whatever m", why)
    why = "nobody needs to know the others' counts, only their sum"
    if run.bytes() < FLOAT:
        why = "float32 counts exactly up to 16.7 million tokens only: send a float64 or an int64"
    attempt.equal("payload bytes of one rank", run.bytes(), FLOAT, "one number of 8 bytes", why)


# ---- 03.3 and 03.4: buckets that travel while backward computes


def trained(axis: Axis, student: Any, kind: str, case: Case) -> dict:
    """Two steps of SGD: gradients and hooks after each, the weights, the time of the second."""
    weights = [nn.Parameter(weight.clone()) for weight in case.weights]
    sync = getattr(student, kind)(weights, axis, case.bucket_bytes)
    seen, hooks = [], []
    for step, batches in enumerate(case.inputs):
        start, left_out = axis.now(), case.left_out(step, axis.rank)
        sync.begin_step()
        for i, x in enumerate(batches[axis.rank]):
            sync.before_backward(last=i == len(batches[axis.rank]) - 1)
            loss_of(weights, x, left_out, axis).backward()
        sync.finish()
        seconds = axis.now() - start
        seen.append([None if w.grad is None else w.grad.clone() for w in weights])
        held = [(w._post_accumulate_grad_hooks, w._backward_hooks) for w in weights]
        hooks.append(max(sum(len(kind or ()) for kind in kinds) for kinds in held))
        with torch.no_grad():
            for weight in weights:
                weight -= 0.1 * (0 if weight.grad is None else weight.grad)
    weights = [weight.detach() for weight in weights]
    return {"gradients": seen, "weights": weights, "seconds": seconds, "hooks": hooks}


def suspects_of(case: Case) -> dict[str, list]:
    """Wrong gradients of the first step, and what leads there."""
    local = local_gradients(case, case.weights, 0)
    own = [added(row) for row in local]
    first, last = (added([row[i] for row in local]) for i in (0, -1))
    later = [
        added([first, mine, [-g for g in row[0]]]) for mine, row in zip(own, local, strict=True)
    ]
    again = [torch.zeros_like(weight) for weight in case.weights]
    for i in range(case.microbatches):  # sums what was summed before
        again = added([added([again, row[i]]) for row in local])
    return {
        "the gradients never travelled: every rank has its own, at least of some buckets": own,
        "only the last micro-batch is in it: do not clear what the earlier ones have added": [last]
        * case.ranks,
        "only the first micro-batch is in it": [first] * case.ranks,
        "only the first micro-batch was sent: what the later ones add must travel too": later,
        "every micro-batch sums over the ranks what earlier ones had summed already": [again]
        * case.ranks,
    }


def check(attempt: Any, kind: str, case: Case) -> None:
    """Run two steps and pass both gates."""
    run = attempt.run(trained, case.ranks, kind, case, network=case.network)
    check_values(attempt, run, case)
    check_budget(attempt, run, case)


def check_values(attempt: Any, run: Any, case: Case) -> None:
    """Gate 2: gradients and weights."""
    want = one_device(case)
    first = [value["gradients"][0] for value in run.values]
    attempt.same(
        "gradients of the first step",
        first,
        [want["gradients"][0]] * case.ranks,
        ranks=case.ranks,
        factors={case.microbatches: "micro-batches"} if case.microbatches > 1 else {},
        suspects=suspects_of(case),
    )
    before, now = want["gradients"]
    summed_again = added([*[before] * case.ranks, now])
    words = "the first step's gradients are still in it: begin_step forgets them"
    attempt.same(
        "gradients of the second step",
        [value["gradients"][1] for value in run.values],
        [want["gradients"][1]] * case.ranks,
        ranks=case.ranks,
        suspects={
            words: [added([before, now])] * case.ranks,
            f"{words}, else they are summed once more": [summed_again] * case.ranks,
        },
    )
    weights = [value["weights"] for value in run.values]
    attempt.same("weights after two steps", weights, [want["weights"]] * case.ranks)


def check_budget(attempt: Any, run: Any, case: Case) -> None:
    """Gate 3: bytes, buckets, hooks, and the time of the second step on the model's clock."""
    attempt.equal(
        "payload bytes of two steps", run.bytes(), 2 * case.bytes, "2 steps of 8Ψ, whatever m",
        "every gradient travels once per step: only the last micro-batch sends",
    )  # fmt: skip
    calls, want = run.count(), 2 * len(case.groups)
    why = "a call for every tensor? fill buckets"
    if calls < want:
        why = "fewer calls: a bucket holds more than bucket_bytes"
    attempt.equal("collectives of two steps", calls, want, "one per bucket and step", why)
    sizes = [call.bytes for call in run.calls[0][-len(case.groups) :]]
    why = "a bucket takes gradients, last layer first, as long as it holds at most bucket_bytes"
    formula = f"in the order of leaving, bucket_bytes = {case.bucket_bytes}"
    attempt.equal("bytes of the buckets", sizes, case.bucket_sizes, formula, why)
    first, second = run.values[0]["hooks"]
    why = "hooks are registered again in every step: do it once, in __init__"
    formula = "as many as after one step"
    attempt.equal("hooks of a parameter after two steps", second, first, formula, why)
    check_time(attempt, run, case)


def check_time(attempt: Any, run: Any, case: Case) -> None:
    """As short as it can be, and no shorter."""
    taken, least = max(value["seconds"] for value in run.values), case.shortest
    why = "nothing overlaps: buckets leave too late, or are waited for too early"
    if all(call.waits for call in run.calls[0]):
        why = "every call waits at once, and backward stands still: pass wait=False"
    if taken < least:
        why = "finish returns before the last bucket is home: wait for every handle"
    attempt.equal(
        "milliseconds of a step", round(1e3 * taken, 9), round(1e3 * least, 9),
        "backward of all layers + the journey of the last bucket", why,
    )  # fmt: skip


@task("03.3", points=5, minutes=30, compare="picotron_lab.data_parallel:Bucketed")
def test_buckets_overlap(attempt: Any) -> None:
    """Buckets of gradients leave while backward computes."""
    case = draw_case(attempt.rng, attempt.generator, microbatches=1)
    check(attempt, "Bucketed", case)


@task("03.4", points=4, minutes=15, compare="picotron_lab.data_parallel:Silent")
def test_silent_between_microbatches(attempt: Any) -> None:
    """Micro-batches add up in silence, and only the last one sends."""
    microbatches = attempt.rng.choice([2, 6])
    case = draw_case(attempt.rng, attempt.generator, microbatches)
    check(attempt, "Silent", case)
