"""Lesson 04: the specification of ZeRO. Everything is float64, and every live byte is counted."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab import sharding
from picotron_lab.analysis.meter import Meter
from picotron_lab.buffers import unmetered
from picotron_lab.comm import Axis
from picotron_lab.ledger import CommError

LESSON = Lesson(
    title="ZeRO 1-2-3",
    builds="optimizer states, gradients and parameters that no two ranks hold twice",
    allowed=("picotron_lab.comm", "picotron_lab.model"),
)
FLOAT, LR = 8, 0.5  # bytes; learning rate of SGD


def draw(attempt: Any, *shape: int) -> Tensor:
    """Random float64 numbers of this attempt."""
    return torch.randn(shape, generator=attempt.generator).double()


def padded(shapes: list, ranks: int) -> int:
    """Bytes of tensors whose rows are filled up to a multiple of the number of ranks."""
    elements = (-(-s[0] // ranks) * ranks * torch.Size(s[1:]).numel() for s in shapes)
    return FLOAT * sum(elements)


def rows_of(tensors: list, rank: int, ranks: int) -> list[Tensor]:
    """The rows that a rank holds."""
    return [t[slice(*sharding.bounds(len(t), ranks, rank))] for t in tensors]


def tensors(what: str, found: Any) -> list[Tensor]:
    """`found`, if it is a list of tensors. Raises CommError: its sentence is all that is told."""
    items = found if isinstance(found, list | tuple) else [found]
    for item in items:
        if not isinstance(item, Tensor):
            raise CommError(f"{what}: {short(item)}, where a tensor is wanted")
    return list(items)


def no_all_reduce(attempt: Any, run: Any) -> None:
    """Budget: nobody gets rows that another rank steps."""
    why = "it brings every rank all rows, at twice the price of a reduce_scatter"
    attempt.at_most("calls of all_reduce", run.count("all_reduce"), 0, "none", why)


# ---- 04.1: rows on their way


def rows_travel(axis: Axis, student: Any, parts: list, full: list) -> dict[str, Any]:
    """Cut, sum and gather a few tensors."""
    found = {"mine": {}, "scatter_sum": [], "gather_rows": []}
    shards = rows_of(full, axis.rank, axis.size)
    for part, whole, shard in zip(parts[axis.rank], full, shards, strict=True):
        rows = student.mine(whole, axis)
        if not isinstance(rows, slice):
            raise CommError(f"mine returned {short(rows)}, a slice is wanted")
        found["mine"][f"{len(whole)} rows"] = {"start": rows.start, "stop": rows.stop}
        found["scatter_sum"].append(student.scatter_sum(part.clone(), axis))
        found["gather_rows"].append(student.gather_rows(shard.clone(), len(whole), axis))
    return found


def bounds(shapes: list, ranks: int, stop: Any) -> list[dict]:
    """What `mine` gives by rank, if rank r has the rows up to stop(rows, r)."""
    return [
        {f"{n} rows": {"start": stop(n, r - 1), "stop": stop(n, r)} for n, *_ in shapes}
        for r in range(ranks)
    ]


@task("04.1", points=3, minutes=20, core=True, compare="picotron_lab.zero_rows:scatter_sum")
def test_rows(attempt: Any) -> None:
    """Rows are scattered and gathered, also where they do not divide."""
    ranks = attempt.rng.randint(3, 6)
    shapes = [[2 * ranks, 3], [2 * ranks + 1, 2], [ranks - 1], [3 * ranks - 1, 1, 2]]
    parts = [[draw(attempt, *shape) for shape in shapes] for _ in range(ranks)]
    full = [draw(attempt, *shape) for shape in shapes]
    run = attempt.run(rows_travel, ranks, parts, full)
    sums = [sum(column) for column in zip(*parts, strict=True)]
    own = [rows_of(part, r, ranks) for r, part in enumerate(parts)]
    found = {key: [value[key] for value in run.values] for key in run.values[0]}
    each = bounds(shapes, ranks, lambda rows, r: rows // ranks * (r + 1))
    rest = bounds(shapes, ranks, lambda rows, r: rows // ranks * (r + 1) if r < ranks - 1 else rows)
    words = "ceil rounds up, rows // n down: the last rows"
    suspects = {f"{words} are nobody's": each, f"{words} do not belong to the last rank": rest}
    want = bounds(shapes, ranks, lambda rows, r: min(-(-rows // ranks) * (r + 1), rows))
    attempt.same("mine", found["mine"], want, ranks=ranks, suspects=suspects)
    suspects = {"my rows of my own part: nothing was added": own}
    want = [rows_of(sums, r, ranks) for r in range(ranks)]
    attempt.same("scatter_sum", found["scatter_sum"], want, ranks=ranks, suspects=suspects)
    attempt.same("gather_rows", found["gather_rows"], [full] * ranks, ranks=ranks)
    no_all_reduce(attempt, run)
    words = "one reduce_scatter and one all_gather of every tensor, padded"
    why = "a summand travels to the rank that holds its row, not to everybody"
    attempt.at_most("payload bytes of one rank", run.bytes(), 2 * padded(shapes, ranks), words, why)


# ---- 04.2 and 04.3: a model of which optimizer state and gradients are cut


@dataclass(frozen=True)
class Case:
    """A chain of layers x -> tanh(x W); the first matrix is tied to a use at the end."""

    ranks: int
    weights: list[Tensor]
    inputs: list[list[list[Tensor]]]  # by step, rank, micro-batch

    @property
    def microbatches(self) -> int:
        """Of one rank and step."""
        return len(self.inputs[0][0])

    @property
    def bytes(self) -> int:
        """8Ψ."""
        return FLOAT * sum(weight.numel() for weight in self.weights)

    @property
    def padded(self) -> int:
        """8Ψ with the padding of all rows."""
        return padded([list(weight.shape) for weight in self.weights], self.ranks)


def draw_case(attempt: Any) -> Case:
    """Widths of 6 to 11, of which the last ranks have fewer rows or none."""
    rng, m = attempt.rng, 2
    ranks, layers = rng.randint(3, 5), rng.randint(9, 10)
    widths = [rng.choice([6, 7, 9, 11]) for _ in range(layers)]
    shapes = zip(widths, [*widths[1:], widths[0]], strict=True)
    weights = [0.4 * draw(attempt, *shape) for shape in shapes]
    numbers = draw(attempt, 3, ranks, m, 1, widths[0])
    return Case(ranks, weights, [[list(row) for row in step] for step in numbers])


def loss_of(weights: list, x: Tensor) -> Tensor:
    """The loss of one micro-batch."""
    for weight in weights:
        x = torch.tanh(x @ weight)
    return (x @ weights[0]).square().sum()  # tied


class Adam:
    """Two moments for each number (Kingma and Ba 2014, algorithm 1). It steps as SGD, which shows
    the size of gradients, each time that `plain` is set."""

    def __init__(self, shards: list):
        self.shards, self.steps = shards, 0
        self.moments = [(torch.zeros_like(s), torch.zeros_like(s)) for s in shards]

    @torch.no_grad()
    def step(self, plain: bool) -> None:
        """shards -= LR * gradient, or what the moments make of it."""
        self.steps += not plain
        for shard, (m, v) in zip(self.shards, self.moments, strict=True):
            g, t = shard.grad, self.steps
            if plain:
                shard -= LR * g
                continue
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.05)
            shard -= 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)


def trained(axis: Axis, student: Any, kind: str, case: Case) -> dict:
    """Three steps: the weights before, between and after them, and bytes alive in the last one."""
    with Meter() as meter:
        model = nn.ParameterList(weight.clone() for weight in case.weights)
        sharding.attach(model)
        weights = list(model)
        sync, seen = getattr(student, kind)(weights, axis), [copies(weights)]
        optimizer = Adam(tensors(f"in {kind}.shards", sync.shards))
        for step, batches in enumerate(case.inputs):
            sync.begin_step()
            alive = backward(sync, weights, batches[axis.rank], meter)
            sync.finish()
            tensors("a shard.grad after finish()", [shard.grad for shard in sync.shards])
            optimizer.step(plain=step < 2)
            sync.publish()
            seen.append(copies(weights))
        meter.label("optimizer", [moment for pair in optimizer.moments for moment in pair])
        return {"weights": seen, "optimizer": meter.live["optimizer"], **alive}


def copies(weights: list) -> list[Tensor]:
    """Copies that do not count as alive."""
    with unmetered():
        return [weight.detach().clone() for weight in weights]


def backward(sync: Any, weights: list, batches: list, meter: Meter) -> dict:
    """Bytes alive after the last micro-batch, and how far they rose while it was under way."""
    for i, x in enumerate(batches):
        sync.before_backward(last=i == len(batches) - 1)
        meter.reset_peak()
        before = meter.live_bytes
        loss_of(weights, x).backward()
    return {"alive": meter.live_bytes, "rise": meter.peak_bytes - before}


def one_device(case: Case) -> tuple[list, list]:
    """(weights before, between and after the steps, gradients of each step) of the whole batch."""
    weights = [nn.Parameter(weight.clone()) for weight in case.weights]
    seen, gradients, optimizer = [copies(weights)], [], Adam(weights)
    for step, batches in enumerate(case.inputs):
        gradients.append(gradients_of(weights, [x for row in batches for x in row]))
        for weight, gradient in zip(weights, gradients[-1], strict=True):
            weight.grad = gradient
        optimizer.step(plain=step < 2)
        seen.append(copies(weights))
    return seen, gradients


def steps_of_sgd(seen: list) -> list[list[Tensor]]:
    """What the two steps of SGD took for the gradients."""
    pairs = (zip(*seen[i : i + 2], strict=True) for i in (0, 1))
    return [[(a - b) / LR for a, b in pair] for pair in pairs]


def gradients_of(weights: list, xs: list) -> list[Tensor]:
    """Of the sum of the losses of some micro-batches."""
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    return list(torch.autograd.grad(sum(loss_of(leaves, x) for x in xs), leaves))


def only_own_rows(tensors: list, rank: int, ranks: int) -> list[Tensor]:
    """The tensors with zeros in the rows of other ranks."""
    kept = rows_of([torch.arange(len(t)) for t in tensors], rank, ranks)
    return [torch.zeros_like(t).index_copy_(0, i, t[i]) for t, i in zip(tensors, kept, strict=True)]


def check_values(attempt: Any, run: Any, case: Case) -> None:
    """Gate 2: what SGD took for the gradient, then the weights after Adam."""
    seen, gradients = one_device(case)
    first, second = zip(*(steps_of_sgd(value["weights"]) for value in run.values), strict=True)
    n, weights, rows = case.ranks, case.weights, case.inputs[0]
    local = [gradients_of(weights, row) for row in rows]
    only_last = gradients_of(weights, [row[-1] for row in rows])
    attempt.same(
        "the gradient by which the first step moved the weights", list(first), [gradients[0]] * n,
        ranks=n, factors={case.microbatches: "micro-batches"},
        suspects={
            "every rank stepped with its own gradients: nothing was summed": local,
            "only this rank's rows have moved: the others' never came, see publish()": [
                only_own_rows(gradients[0], rank, n) for rank in range(n)
            ],
            "only the last micro-batch is in it: add to what is there": [only_last] * n,
        },
    )  # fmt: skip
    stale = [a + b for a, b in zip(*gradients[:2], strict=True)]
    suspects = {"the first step's gradients are still in it: see begin_step()": [stale] * n}
    what, want = "the gradient by which the second step moved them", [gradients[1]] * n
    attempt.same(what, list(second), want, ranks=n, suspects=suspects)
    final = [value["weights"][-1] for value in run.values]
    attempt.same("weights after a third step, with Adam", final, [seen[-1]] * n, ranks=n)


def train(attempt: Any, kind: str) -> tuple[Case, Any]:
    """A run with right values, in which nobody keeps another one's moments."""
    case = draw_case(attempt)
    run = attempt.run(trained, case.ranks, kind, case)
    check_values(attempt, run, case)
    state, limit = max(value["optimizer"] for value in run.values), 2 * case.padded // case.ranks
    why = "every rank keeps every moment: which rank steps which rows?"
    attempt.at_most("bytes of one rank's optimizer", state, limit, "16Ψ/n, rows rounded up", why)
    return case, run


def check_wire(attempt: Any, run: Any, case: Case, rounds: int) -> None:
    """Budget: rounds reduce_scatters of everything and one all_gather, in each step."""
    steps = len(case.inputs)
    no_all_reduce(attempt, run)
    attempt.at_most(
        "bytes of one rank's reduce_scatters in a step", run.bytes("reduce_scatter") // steps,
        rounds * case.padded, "8Ψ, whatever m" if rounds == 1 else "m times 8Ψ",
        "full gradients can add up over micro-batches before they leave",
    )  # fmt: skip
    gathered, why = run.bytes("all_gather") // steps, "weights change once per step"
    attempt.at_most("bytes of its all_gathers in a step", gathered, case.padded, "8Ψ", why)


@task("04.2", points=5, minutes=30, core=True, compare="picotron_lab.zero:Stage1")
def test_moments_are_cut(attempt: Any) -> None:
    """Stage 1: the optimizer's state is cut."""
    case, run = train(attempt, "Stage1")
    check_wire(attempt, run, case, rounds=1)


@task("04.3", points=5, minutes=30, compare="picotron_lab.zero:Stage2")
def test_gradients_are_cut(attempt: Any) -> None:
    """Stage 2: gradients are cut and freed as soon as they are made."""
    case, run = train(attempt, "Stage2")
    attempt.at_most(
        "bytes alive after backward", max(value["alive"] for value in run.values),
        case.bytes + 4 * case.padded // case.ranks,
        "8Ψ of weights and (8Ψ + 16Ψ + 8Ψ)/n of gradients, moments and room, rows rounded up",
        "full gradients are still alive: reduce each in a hook, and set p.grad to None",
    )  # fmt: skip
    largest = FLOAT * max(weight.numel() for weight in case.weights)
    limit = 4 * largest + 2 * FLOAT * sum(weight.shape[1] for weight in case.weights)
    attempt.at_most(
        "bytes that are alive only during forward and backward",
        max(value["rise"] for value in run.values), limit, "activations and the 4 largest tensors",
        "full gradients wait for each other: reduce each as soon as it is there",
    )  # fmt: skip
    check_wire(attempt, run, case, rounds=case.microbatches)


# ---- 04.4: a layer that is whole only while it computes


def settled(meter: Meter) -> int:
    """Live bytes. Real processes' messages let go of tensors a moment after they are done."""
    seen = [meter.live_bytes]
    for _ in range(3):
        time.sleep(0.01)
        seen.append(meter.live_bytes)
    return min(seen)


def layers_of(axis: Axis, student: Any, weights: list, inputs: list) -> dict:
    """Two micro-batches through a chain of sharded layers."""
    with Meter() as meter:
        shards = [nn.Parameter(w.clone()) for w in rows_of(weights, axis.rank, axis.size)]
        outputs, dx, held = [], [], 0
        for x in inputs[axis.rank]:
            with unmetered():
                x = x.clone().requires_grad_()
            y, before = x, meter.live_bytes
            for shard, weight in zip(shards, weights, strict=True):
                y = student.ShardedLinear.apply(y, shard, len(weight), axis)
                y = torch.tanh(*tensors("ShardedLinear's forward returned", [y]))
            held = max(held, settled(meter) - before)
            y.square().sum().backward()
            outputs.append(y.detach())
            dx.append(x.grad)
    gradients = [shard.grad for shard in shards]
    return {"y": outputs, "dx": dx, "gradients": gradients, "held": held}


def dense(weights: list, inputs: list) -> dict:
    """The same on one device: {name: by rank}."""
    leaves = [weight.clone().requires_grad_() for weight in weights]
    found = {"y": [], "dx": [], "local": []}
    for row in inputs:
        ys = xs = [x.clone().requires_grad_() for x in row]
        for leaf in leaves:
            ys = [torch.tanh(y @ leaf.T) for y in ys]
        *dw, a, b = torch.autograd.grad(sum(y.square().sum() for y in ys), [*leaves, *xs])
        for name, values in (("local", dw), ("y", [y.detach() for y in ys]), ("dx", [a, b])):
            found[name].append(values)
    return found


@task("04.4", points=7, minutes=40, compare="picotron_lab.zero_units:Sharded")
def test_parameters_are_cut(attempt: Any) -> None:
    """Stage 3: a weight is whole only while it is used."""
    rng = attempt.rng
    ranks, widths = rng.randint(3, 5), [rng.choice([9, 11, 13]) for _ in range(rng.randint(5, 7))]
    shapes = list(zip(widths[1:], widths, strict=False))
    weights = [0.3 * draw(attempt, *shape) for shape in shapes]
    inputs = [[0.3 * draw(attempt, 2, widths[0]) for _ in range(2)] for _ in range(ranks)]
    run, want = attempt.run(layers_of, ranks, weights, inputs), dense(weights, inputs)
    sums = [sum(column) for column in zip(*want["local"], strict=True)]
    for name, words in (("y", "outputs"), ("dx", "gradients of inputs")):
        found = [value[name] for value in run.values]
        summed = "alike on all ranks, as if it were summed: every rank has tokens of its own"
        suspects = {} if found[0][0] is None else {summed: [found[0]] * ranks}
        attempt.same(words, found, want[name], ranks=ranks, suspects=suspects)
    local = [rows_of(local, rank, ranks) for rank, local in enumerate(want["local"])]
    suspects = {"my rows of my own tokens' gradient: nothing was summed over ranks": local}
    got = [value["gradients"] for value in run.values]
    sliced = [rows_of(sums, rank, ranks) for rank in range(ranks)]
    attempt.same("gradients of the shards", got, sliced, ranks=ranks, suspects=suspects)
    check_stage3(attempt, run, shapes, ranks)


def check_stage3(attempt: Any, run: Any, shapes: list, ranks: int) -> None:
    """Budgets of stage 3: bytes alive between forward and backward, and the wire."""
    attempt.at_most(
        "bytes alive between forward and backward, beside the shards",
        max(value["held"] for value in run.values), 4 * FLOAT * sum(shape[0] for shape in shapes),
        "activations: x W^T and tanh of every layer, 8 bytes a number",
        "gathered weights are still alive: save the shard, and gather again in backward",
    )  # fmt: skip
    no_all_reduce(attempt, run)
    words = "2 micro-batches of two all_gathers and one reduce_scatter of every weight"
    why, limit = "a weight is needed once forward, and once backward", 6 * padded(shapes, ranks)
    attempt.at_most("payload bytes of one rank", run.bytes(), limit, words, why)
