"""Lesson 13: gradient parity finds what a loss curve hides. Everything is float64."""

from typing import Any

import torch
from torch import Tensor, nn

from lessons.kit import Lesson, task
from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis

LESSON = Lesson(
    title="Compose: gradient bookkeeping",
    builds="an eye for gradients that are off by a factor, a rank or an axis",
    allowed=("picotron_lab.comm", "picotron_lab.model"),
    broken=("13.1", "13.2", "13.3", "13.4", "13.5", "13.6"),
)
FLOAT = 8  # bytes


def normal(attempt: Any, *shape: int) -> Tensor:
    """Random numbers of the attempt's seed."""
    return torch.randn(shape, generator=attempt.generator).double()


# ---- 13.1


class Stage(nn.Module):
    """tanh(x W)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return torch.tanh(x @ self.weight)


def piped(axis: Axis, student: Any, weights: list, inputs: list, labels: list) -> dict:
    """One step of a pipeline of one stage per rank."""
    stage = Stage(weights[axis.rank])
    error = student.pipeline_step(stage, list(inputs), list(labels), axis)
    return {"error": float(error), "gradient": stage.weight.grad}


@task("13.1", points=1, minutes=10, core=True)
def test_pipeline_step(attempt: Any) -> None:
    """A pipeline and its micro-batches."""
    ranks, m = attempt.rng.randint(3, 5), attempt.rng.choice([6, 7])
    weights = [0.5 * normal(attempt, 3, 3) for _ in range(ranks)]
    inputs, labels = ([normal(attempt, 2, 3) for _ in range(m)] for _ in range(2))
    run = attempt.run(piped, ranks, weights, inputs, labels, timeout=60)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    out = torch.cat(inputs)
    for leaf in leaves:
        out = torch.tanh(out @ leaf)
    error = (out - torch.cat(labels)).square().mean()
    gradients = list(torch.autograd.grad(error, leaves))
    again = [gradient / m ** (ranks - 1 - r) for r, gradient in enumerate(gradients)]
    attempt.same(
        "gradient of the stage",
        [value["gradient"] for value in run.values],
        gradients,
        ranks=ranks,
        factors={m: "micro-batches"},
        suspects={"every stage divides once more: what comes from the right is divided": again},
    )
    errors = [value["error"] for value in run.values]
    attempt.same("error", errors, [0.0] * (ranks - 1) + [error.item()], ranks=ranks)


# ---- 13.2


def accumulated(axis: Axis, student: Any, weights: list, inputs: list) -> dict:
    """The losses of this rank's micro-batches go backward."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    losses = [loss_of(parameters, x) for x in inputs[axis.rank]]
    student.backward_and_sum(losses, parameters, axis)
    return {
        "gradients": [parameter.grad for parameter in parameters],
        "weights": [parameter.detach() for parameter in parameters],
    }


def loss_of(weights: list, x: Tensor) -> Tensor:
    """Squared outputs of two layers."""
    return (torch.tanh(x @ weights[0]) @ weights[1]).square().sum()


def gradients_of(weights: list, inputs: list) -> list[Tensor]:
    """Of the sum of the losses."""
    leaves = [weight.clone().requires_grad_() for weight in weights]
    return list(torch.autograd.grad(sum(loss_of(leaves, x) for x in inputs), leaves))


def added(lists: list) -> list[Tensor]:
    """Sum lists of tensors, tensor by tensor."""
    return [sum(parts) for parts in zip(*lists, strict=True)]


@task("13.2", points=2, minutes=10, core=True, compare="picotron_lab.data_parallel:Overlapped")
def test_backward_and_sum(attempt: Any) -> None:
    """Hooks and accumulated gradients."""
    ranks, m = attempt.rng.randint(3, 5), attempt.rng.choice([2, 6])
    weights = [normal(attempt, 3, 5), normal(attempt, 5, 2)]
    inputs = [[normal(attempt, 2, 3) for _ in range(m)] for _ in range(ranks)]
    run = attempt.run(accumulated, ranks, weights, inputs)
    parts = [[gradients_of(weights, [x]) for x in row] for row in inputs]
    last = added([row[-1] for row in parts])
    again = [torch.zeros_like(weight) for weight in weights]
    for i in range(m):
        again = added([added([again, row[i]]) for row in parts])
    shared = {
        "the last micro-batch is summed over ranks, the earlier ones are this rank's own: when "
        "does your hook run, before or after the gradient is added to p.grad?": [
            added([*row[:-1], last]) for row in parts
        ],
        "every micro-batch sums over the ranks what was summed before": [again] * ranks,
        "nothing was summed over ranks": [added(row) for row in parts],
    }
    values = [value["weights"] for value in run.values]
    words = "the weights were summed: a post-accumulate hook is handed the parameter, not its grad"
    summed = [[ranks * weight for weight in weights]] * ranks
    attempt.same("weights", values, [weights] * ranks, ranks=ranks, suspects={words: summed})
    want = added([gradients for row in parts for gradients in row])
    got = [value["gradients"] for value in run.values]
    attempt.same("gradients", got, [want] * ranks, ranks=ranks, suspects=shared)
    size = FLOAT * sum(weight.numel() for weight in weights)
    why = "only the last micro-batch need send"
    attempt.at_most("payload bytes of one rank", run.bytes(), size, "8Ψ, whatever m", why)


# ---- 13.3


def meshed(axis: Axis, student: Any, dp: int, gradients: list) -> list[Tensor]:
    """Ranks in dp rows and cp columns, each with gradients of its own."""
    cp = axis.size // dp
    rows = axis.split("cp", [list(range(i * cp, i * cp + cp)) for i in range(dp)])
    columns = axis.split("dp", [list(range(j, axis.size, cp)) for j in range(cp)])
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients[axis.rank]]
    for parameter, gradient in zip(parameters, gradients[axis.rank], strict=True):
        parameter.grad = gradient.clone()
    student.synchronise(parameters, columns, rows)
    return [parameter.grad for parameter in parameters]


@task("13.3", points=1, minutes=10, core=True, compare="picotron_lab.sharding:reduce_gradients")
def test_synchronise(attempt: Any) -> None:
    """Two axes, of which one may have a single rank."""
    shapes, n = [(3, 5), (7,), (2, 2)], attempt.rng.choice([3, 5])
    runs = []
    for dp, cp in ((1, n), (2, 2), (n, 1)):
        ranks = dp * cp
        gradients = [[normal(attempt, *shape) for shape in shapes] for _ in range(ranks)]
        run = attempt.run(meshed, ranks, dp, gradients)
        runs.append((dp, cp, run))
        total = added(gradients)
        over_dp = [added([gradients[i * cp + r % cp] for i in range(dp)]) for r in range(ranks)]
        over_cp = [added(gradients[r // cp * cp : r // cp * cp + cp]) for r in range(ranks)]
        attempt.same(
            f"gradients with dp = {dp}, cp = {cp}",
            run.values,
            [total] * ranks,
            ranks=ranks,
            factors={cp: "context parallel ranks"} if dp > 1 else {},
            suspects={
                "nothing was summed: every rank has the gradient of its own tokens": gradients,
                "summed over dp, not over cp": over_dp,
                "summed over cp, not over dp": over_cp,
            },
        )
    for dp, cp, run in runs:
        axes = (dp > 1) + (cp > 1)
        limit = axes * FLOAT * sum(torch.Size(shape).numel() for shape in shapes)
        why = "a sum of sums is enough: nobody needs everybody's gradients"
        formula = "8Ψ on each axis of more than one rank"
        attempt.at_most(f"payload bytes, dp = {dp}, cp = {cp}", run.bytes(), limit, formula, why)


# ---- 13.4


def drawn(axis: Axis, student: Any, cases: list) -> list:
    """Parts of some weights, and the bytes that stay alive."""
    with Meter() as meter:
        parts = [student.weight_shard(shape, dim, seed, axis) for shape, dim, seed in cases]
        alive = meter.live_bytes
    return [parts, alive]


def draw(shape: tuple, seed: int) -> Tensor:
    """Uniform within 1 / sqrt(inputs)."""
    generator, bound = torch.Generator().manual_seed(seed), shape[1] ** -0.5
    return torch.empty(shape).double().uniform_(-bound, bound, generator=generator)


@task("13.4", points=2, minutes=10, compare="picotron_lab.sharding:materialise")
def test_weight_shard(attempt: Any) -> None:
    """Initial weights of shards."""
    ranks, seed = attempt.rng.randint(3, 5), attempt.rng.randrange(1000)
    cases = [((2 * ranks, 5), 0, seed), ((7, 3 * ranks), 1, seed + 1)]
    run = attempt.run(drawn, ranks, cases)

    def part(case: tuple, rank: int, own_seeds: bool) -> Tensor:
        (outputs, inputs), dim, seed = case
        shape = (outputs // ranks, inputs) if dim == 0 else (outputs, inputs // ranks)
        return draw(shape, seed + rank * own_seeds)

    want = [
        [draw(shape, s).chunk(ranks, dim)[rank] for shape, dim, s in cases] for rank in range(ranks)
    ]
    attempt.same(
        "shards",
        [value[0] for value in run.values],
        want,
        ranks=ranks,
        suspects={
            "all ranks drew the same numbers: they are copies, and stay copies for ever, so that "
            f"the layer is {ranks} times narrower than it looks": [
                [part(case, rank, False) for case in cases] for rank in range(ranks)
            ],
            "the shards differ now, but no device alone would have drawn them, and the bound is "
            "that of the part": [[part(case, r, True) for case in cases] for r in range(ranks)],
        },
    )
    attempt.at_most("messages of one rank", run.count(), 0, "none", "the same seed is everywhere")
    size = FLOAT * sum(shape[0] * shape[1] for shape, _, _ in cases)
    attempt.at_most(
        "bytes that stay alive",
        max(value[1] for value in run.values),
        size // ranks,
        "8Ψ/n",
        "a slice is a view, which keeps the whole weight alive",
    )


# ---- 13.5


def finished(axis: Axis, student: Any, cut: set, gradients: list) -> dict:
    """Every rank has the gradients of its tokens."""
    mine = gradients[axis.rank]
    parameters = {name: nn.Parameter(torch.zeros_like(g)) for name, g in mine.items()}
    for name, parameter in parameters.items():
        parameter.grad = mine[name].clone()
    student.finish_gradients(parameters, cut, axis)
    return {name: parameter.grad for name, parameter in parameters.items()}


def model_loss(p: dict, x: Tensor) -> Tensor:
    """A layer with two norms and two projections, and a norm at the end; sums over tokens."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt() * weight

    h = norm(x, p["layers.0.attention_norm.weight"]) @ p["layers.0.up.weight"].T
    y = x + torch.tanh(h) @ p["layers.0.down.weight"].T + p["layers.0.down.bias"]
    y = y + norm(y, p["layers.0.mlp_norm.weight"]).pow(3)
    return norm(y, p["norm.weight"]).sin().sum()


def gradients_by_name(p: dict, x: Tensor) -> dict[str, Tensor]:
    """Of the loss of some tokens."""
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    return dict(zip(p, torch.autograd.grad(model_loss(leaves, x), leaves.values()), strict=True))


def draw_model(attempt: Any, D: int, F: int) -> dict[str, Tensor]:
    """Its weights by name; D is the width, F that of the layer inside."""
    return {
        "layers.0.attention_norm.weight": normal(attempt, D),
        "layers.0.up.weight": 0.5 * normal(attempt, F, D),
        "layers.0.down.weight": 0.5 * normal(attempt, D, F),
        "layers.0.down.bias": normal(attempt, D),
        "layers.0.mlp_norm.weight": normal(attempt, D),
        "norm.weight": normal(attempt, D),
    }


@task("13.5", points=2, minutes=10, compare="picotron_lab.sharding:reduce_gradients")
def test_finish_gradients(attempt: Any) -> None:
    """Gradients of what sequence parallel ranks share."""
    ranks, D = attempt.rng.randint(3, 5), attempt.rng.choice([5, 7])
    p = draw_model(attempt, D, 2 * ranks)
    cut = {"layers.0.up.weight": 0, "layers.0.down.weight": 1}
    x = normal(attempt, 2 * ranks, D)
    whole, own = gradients_by_name(p, x), [gradients_by_name(p, t) for t in x.chunk(ranks)]
    parts = {name: whole[name].chunk(ranks, dim) for name, dim in cut.items()}
    before = [
        {name: parts[name][r] if name in cut else own[r][name] for name in p} for r in range(ranks)
    ]
    run = attempt.run(finished, ranks, set(cut), before)
    want = [
        {name: parts[name][r] if name in cut else whole[name] for name in p} for r in range(ranks)
    ]
    sums = {name: sum(one[name] for one in before) for name in p}
    attempt.same(
        "gradients",
        run.values,
        want,
        ranks=ranks,
        suspects={
            "gradients of cut weights were summed too, which are of different rows": [sums] * ranks,
            "some shared weights have only the gradient of this rank's tokens: which names does "
            "your condition miss?": before,
        },
    )
    shared = [name for name in p if name not in cut]
    attempt.at_most(
        "collectives of one rank", run.count(), 1, "one", "they are few: send them flat"
    )
    size = FLOAT * sum(p[name].numel() for name in shared)
    why = "what is complete need not travel"
    attempt.at_most(
        "payload bytes of one rank", run.bytes(), size, "8 bytes for each shared number", why
    )


# ---- 13.6


def tied_ends(axis: Axis, student: Any, buffers: list, tied: list) -> Tensor:
    """The first half of the ranks is the first stage, the other half the last one."""
    n = axis.size // 2
    stage = axis.rank // n
    dp = axis.split("dp", [list(range(n)), list(range(n, 2 * n))])
    ends = axis.split("ends", [[r, r + n] for r in range(n)])
    return student.reduce_with_tied(buffers[axis.rank].clone(), slice(*tied[stage]), dp, ends)


@task("13.6", points=2, minutes=10)
def test_reduce_with_tied(attempt: Any) -> None:
    """A weight that two stages share, and whose rows nobody holds whole."""
    n = attempt.rng.randint(3, 4)
    length, shared = 6 * n, 2 * n + 1
    tied = [(0, shared), (length - shared, length)]
    buffers = [normal(attempt, length) for _ in range(2 * n)]
    run = attempt.run(tied_ends, 2 * n, buffers, tied)
    totals = [sum(buffers[stage * n : stage * n + n]) for stage in range(2)]
    both = totals[0][slice(*tied[0])] + totals[1][slice(*tied[1])]
    want = [total.clone() for total in totals]
    for total, place in zip(want, tied, strict=True):
        total[slice(*place)] = both
    late = late_sums(buffers, tied, totals, n)
    attempt.same(
        "parts of the buffers",
        run.values,
        [total.chunk(n)[r] for total in want for r in range(n)],
        ranks=2 * n,
        suspects={
            "when the two ends met, each rank's buffer held the sum in its own part and its own "
            "gradients elsewhere, and the part lies elsewhere on the other stage": late,
            "the shared weight's gradients of the two stages were never added": [
                total.chunk(n)[r] for total in totals for r in range(n)
            ],
        },
    )
    why = "an all_reduce brings every rank all parts"
    attempt.at_most("calls of all_reduce over dp", run.count("all_reduce", "dp"), 0, "none", why)
    attempt.at_most(
        "payload bytes over ends",
        run.bytes(axis="ends"),
        FLOAT * shared,
        "8 bytes for each shared number",
        "what the stages do not share need not travel between them",
    )


def late_sums(buffers: list, tied: list, totals: list, n: int) -> list[Tensor]:
    """What comes out when the data parallel sum is taken first."""
    after = [buffer.clone() for buffer in buffers]
    for r, buffer in enumerate(after):
        buffer.chunk(n)[r % n].copy_(totals[r // n].chunk(n)[r % n])
    for r in range(n):
        first, last = after[r][slice(*tied[0])], after[r + n][slice(*tied[1])]
        total = first + last
        first.copy_(total)
        last.copy_(total)
    return [buffer.chunk(n)[r % n] for r, buffer in enumerate(after)]
