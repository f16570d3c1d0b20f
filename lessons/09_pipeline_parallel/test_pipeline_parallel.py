"""What lesson 09 asks for. Lists are checked and timed by the library's validator and simulator;
executors run on ranks with a virtual clock, which stages advance: 1 ms forward, 2 ms backward."""

import weakref
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab.clock import Network
from picotron_lab.comm import Axis
from picotron_lab.ledger import CommError
from picotron_lab.schedules.actions import Action, Schedule, ScheduleError
from picotron_lab.schedules.basic import one_f_one_b, straight
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import peaks, simulate
from picotron_lab.schedules.validator import validate

LESSON = Lesson(
    title="Pipelines",
    builds="schedules as lists of actions, one with a third of 1F1B's bubble, and their executor",
    allowed=("picotron_lab.comm", "picotron_lab.schedules.actions"),
)
MS = 1e-3
UNIT = Costs()
MATMULS = ("mm", "addmm", "bmm", "mv", "dot")


# ---- 09.1 and 09.4: lists


def listed(axis: Axis, student: ModuleType, calls: list[tuple[str, int, int]]) -> list[list]:
    """What the student's functions list."""
    return [plain(getattr(student, name)(p, m)) for name, p, m in calls]


def plain(found: Any) -> Any:
    """Lists and tuples, actions too, as plain tuples."""
    return tuple(map(plain, found)) if isinstance(found, list | tuple) else found


def check_step(attempt: Any, lists: Any, call: tuple[str, int, int]) -> Schedule:
    """Gate 2 of a schedule: it is a correct step of a chain of p stages."""
    name, p, m = call
    title, schedule, wrong = f"{name}({p}, {m})", None, ""
    try:
        schedule = Schedule(title, read_lists(name, lists), straight(p), m)
        validate(schedule)
    except ScheduleError as error:
        wrong = str(error)
    verdict, right = "no training step" if wrong else "a training step", "a training step"
    attempt.same(title, verdict, right, suspects={wrong: "no training step"})
    return schedule


def read_lists(name: str, lists: Any) -> tuple[tuple[Action, ...], ...]:
    """Raises ScheduleError if these are no actions of ranks."""
    if not isinstance(lists, tuple):
        raise ScheduleError(f"{name} returned {short(lists)}: a list of lists is wanted.")
    for rank, actions in enumerate(lists):
        if not isinstance(actions, tuple):
            raise ScheduleError(f"rank {rank} has {short(actions)}: a list of actions is wanted.")
    return tuple(tuple(map(read_action, actions)) for actions in lists)


def read_action(fields: Any) -> Action:
    """Raises ScheduleError if these are no fields of an action."""
    fits = isinstance(fields, tuple) and 3 <= len(fields) <= 4
    if not fits or not all(isinstance(n, int) for n in fields[1:]):
        raise ScheduleError(f"{fields} is no action: list Action(kind, stage, microbatch).")
    return Action(*fields)


def check_bubble(attempt: Any, schedule: Schedule, costs: Costs, limit: float, words: str) -> None:
    """The simulated bubble: time of the step without the work of a rank."""
    work = schedule.microbatches * (costs.F + costs.B + costs.W)
    times = f"tF={costs.F:g} tB={costs.B:g} tW={costs.W:g}"
    formula, because = words.split("; ")
    bubble = simulate(schedule, costs).makespan - work
    attempt.at_most(f"bubble of {schedule.name}, {times}", bubble, limit, formula, because)


@task("09.1", points=4, minutes=25, core=True, compare="picotron_lab.schedules.basic:one_f_one_b")
def test_lists(attempt: Any) -> None:
    """AFAB and 1F1B as lists of actions."""
    p = attempt.rng.randint(3, 6)
    few, many = attempt.rng.randint(1, p - 2), attempt.rng.randint(p + 1, 3 * p)
    calls = [("afab", p, many), ("one_f_one_b", p, many), ("one_f_one_b", p, few)]
    found = attempt.run(listed, 1, calls).values[0]
    schedules = [check_step(attempt, *pair) for pair in zip(found, calls, strict=True)]
    kinds = [fields[0] for fields in found[0][0][:many]]
    attempt.same("the first m actions of rank 0 in afab", kinds, ["F"] * many)
    for schedule in schedules[1:]:
        m = schedule.microbatches
        for rank, most in enumerate(peaks(schedule)):
            attempt.at_most(
                f"micro-batches held by rank {rank} of {p} in {schedule.name}", most,
                min(m, p - rank), "min(m, p-r)",
                "the backward comes later than it could: too many forwards come before it",
            )  # fmt: skip
    for schedule in schedules:
        words = "(p-1)(tF+tB+tW); ranks wait for each other: too few forwards come first"
        check_bubble(attempt, schedule, UNIT, 3 * (p - 1), words)
        check_bubble(attempt, schedule, Costs(F=2, B=2, W=1), 5 * (p - 1), words)


@task("09.4", points=6, minutes=35, compare="picotron_lab.schedules.zero_bubble:zb_h1")
def test_tight(attempt: Any) -> None:
    """A shorter bubble in the same memory."""
    p = attempt.rng.randint(3, 6)
    m = attempt.rng.randint(2 * p, 3 * p)
    w = attempt.rng.randint(1, 3)
    costs = Costs(F=attempt.rng.randint(w, 5), B=attempt.rng.randint(w, 5), W=w)
    call = "tight", p, m
    schedule = check_step(attempt, attempt.run(listed, 1, [call]).values[0][0], call)
    for rank, most in enumerate(peaks(schedule)):
        attempt.at_most(
            f"micro-batches held by rank {rank} of {p}, from F to W", most, p, "p",
            "activations wait for W: run each W sooner, or fewer forwards first",
        )  # fmt: skip
    for times in (UNIT, costs):
        limit = (p - 1) * (times.F + times.B - times.W)
        words = "(p-1)(tF+tB-tW); for 1F1B it is (p-1)(tF+tB+tW): which W could fill a gap later?"
        check_bubble(attempt, schedule, times, limit, words)


# ---- 09.2: an executor


@dataclass(frozen=True)
class Chain:
    """A model of p stages, one per rank, and a batch of m micro-batches."""

    lists: list[list[Action]]
    weights: list[tuple[Tensor, Tensor]]  # of each stage, [D, D]
    batches: list[Tensor]  # [N_i, D]
    labels: list[Tensor]

    @property
    def ranks(self) -> int:
        """One per stage."""
        return len(self.weights)


class Busy(torch.autograd.Function):
    """Lets a rank be busy for 1 ms in forward and 2 ms in backward."""

    @staticmethod
    def forward(ctx, out: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        axis.spend(MS)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.axis.spend(2 * MS)
        return grad, None


@dataclass(eq=False)
class Saved:
    """What autograd keeps for backward: counted while it lives."""

    tensor: Tensor


class Stage(nn.Module):
    """Two layers, or with a loss behind them; sees of how many micro-batches something is saved,
    and how many inputs that were received are alive."""

    def __init__(self, case: Chain, axis: Axis):
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(w.clone()) for w in case.weights[axis.rank])
        self.axis, self.labels = axis, case.labels
        self.held, self.most, self.most_inputs = Counter(), 0, 0
        self.inputs = weakref.WeakSet()

    def forward(self, x: Tensor, i: int) -> Tensor:
        """[N_i, D] -> [N_i, D], on the last rank the loss."""
        if self.axis.rank > 0:
            self.inputs.add(x.untyped_storage())
        with saved_tensors_hooks(lambda tensor: self.save(tensor, i), lambda saved: saved.tensor):
            out = layers(x, *self.layers)
            if self.axis.rank == self.axis.size - 1:
                out = (out - self.labels[i]).square().sum()
        self.most = max(self.most, sum(count > 0 for count in self.held.values()))
        self.most_inputs = max(self.most_inputs, len(self.inputs))
        return Busy.apply(out, self.axis)

    def save(self, tensor: Tensor, i: int) -> Saved:
        """Count it until it goes."""
        saved = Saved(tensor)
        self.held[i] += 1
        weakref.finalize(saved, self.held.subtract, [i])
        return saved


def layers(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What a stage computes."""
    return torch.tanh(x @ first) @ second


def executed(axis: Axis, student: ModuleType, case: Chain) -> dict[str, Any]:
    """One step: gradients, and most micro-batches held at a time."""
    stage = Stage(case, axis)
    likes = [x if axis.rank == 0 else torch.full_like(x, torch.nan) for x in case.batches]
    student.run_list(case.lists[axis.rank], stage, axis, likes)
    grads = [p.grad for p in stage.parameters()]
    return {"gradients": grads, "held": stage.most, "inputs": stage.most_inputs}


def on_one_device(case: Chain) -> list[list[Tensor]]:
    """Gradients of the sum of all losses, of each stage's layers."""
    weights = [[w.clone().requires_grad_() for w in pair] for pair in case.weights]
    for x, label in zip(case.batches, case.labels, strict=True):
        for pair in weights:
            x = layers(x, *pair)
        (x - label).square().sum().backward()
    return [[w.grad for w in pair] for pair in weights]


def make_chain(attempt: Any) -> Chain:
    """Micro-batches of different rows."""
    p, D = attempt.rng.randint(3, 5), attempt.rng.choice((3, 5))
    m = attempt.rng.randint(p, 2 * p)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, D, generator=attempt.generator, dtype=torch.float64)

    rows = [attempt.rng.randint(1, 4) for _ in range(m)]
    return Chain(
        [list(actions) for actions in one_f_one_b(p, m).lists],
        [(draw(D), draw(D)) for _ in range(p)], [draw(n) for n in rows], [draw(n) for n in rows],
    )  # fmt: skip


@task("09.2", points=5, minutes=40, core=True, compare="picotron_lab.pipeline_parallel:Executor")
def test_executor(attempt: Any) -> None:
    """An executor for a chain of stages."""
    case = make_chain(attempt)
    p, m, size = case.ranks, len(case.batches), sum(x.nbytes for x in case.batches)
    run = attempt.run(executed, p, case, network=Network())
    gradients = [value["gradients"] for value in run.values]
    attempt.same(
        "gradients by rank", gradients, on_one_device(case), ranks=p, factors={m: "micro-batches"}
    )
    for rank in range(p):
        borders = (rank > 0) + (rank < p - 1)
        attempt.at_most(
            f"micro-batches held by rank {rank} of {p}", run.values[rank]["held"],
            min(m, p - rank), "min(m, p-r), the list being 1F1B's",
            "run the actions in the order of the list, and keep nothing after BW",
        )  # fmt: skip
        messages = run.count("send", rank=rank) + run.count("exchange", rank=rank)
        attempt.equal(
            f"messages that rank {rank} sends", messages, borders * m, "m per neighbour",
            "one per micro-batch, boundary and direction: the receiver knows shapes beforehand",
        )  # fmt: skip
        attempt.equal(
            f"bytes that rank {rank} sends", run.bytes(rank=rank), borders * size,
            "N D 8 per micro-batch and neighbour", "only activations and their gradients cross",
        )  # fmt: skip
    for rank in range(1, p):  # those of rank 0 are there anyway
        attempt.at_most(
            f"received inputs alive on rank {rank} of {p}", run.values[rank]["inputs"],
            min(m, p - rank) + 1, "min(m, p-r), and one that a variable still names",
            "take a micro-batch's input and output out of your notes at its BW (pop)",
        )  # fmt: skip
    attempt.at_most(
        "milliseconds of the step", round(max(run.times) / MS, 6), 3 * (m + p - 1),
        "(m+p-1)(tF+tB+tW), tF = 1, tB+tW = 2", "somebody waits for what nothing depends on",
    )  # fmt: skip


# ---- 09.3: backward in two parts


@dataclass(frozen=True)
class Layers:
    """Some layers without bias, tanh between, and micro-batches."""

    weights: list[Tensor]  # [F, D]
    batches: list[Tensor]  # [B, T, D]
    grads: list[Tensor]  # of the outputs, [B, T, F]


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes seconds

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """One operation."""
        self.count += func.overloadpacket.__name__ in MATMULS
        return func(*args, **(kwargs or {}))


def split_backward(axis: Axis, student: ModuleType, case: Layers) -> dict[str, Any]:
    """All forwards, all B, then all W, the newest first; matmuls of one of each."""
    weights = [nn.Parameter(w.clone()) for w in case.weights]
    xs, outs, queues = [x.clone().requires_grad_() for x in case.batches], [], []
    for x in xs:
        queues.append([])
        for weight in weights:
            x = student.LinearLater.apply(x, weight, queues[-1])
            if not isinstance(x, Tensor):
                raise CommError(f"LinearLater.forward returned {short(x)}, a tensor is wanted")
            x = torch.tanh(x)
        outs.append(x)
    with Matmuls() as of_b:
        for out, grad in zip(outs, case.grads, strict=True):
            out.backward(grad)
    early = [weight.grad is not None for weight in weights]
    with Matmuls() as of_w:
        for queue in reversed(queues):
            student.weight_gradients(queue)
    return {
        "dx": [x.grad for x in xs], "dW": [weight.grad for weight in weights], "early": early,
        "left": [len(queue) for queue in queues], "of B": of_b.count, "of W": of_w.count,
    }  # fmt: skip


def whole_backward(case: Layers) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """dx of each micro-batch; dW of each micro-batch and layer."""
    dxs, dws = [], []
    for x, grad in zip(case.batches, case.grads, strict=True):
        leaf = x.clone().requires_grad_()
        weights = [w.clone().requires_grad_() for w in case.weights]
        out = leaf
        for weight in weights:
            out = torch.tanh(out @ weight.T)
        dx, *dw = torch.autograd.grad(out, [leaf, *weights], grad)
        dxs.append(dx)
        dws.append(dw)
    return dxs, dws


@task("09.3", points=5, minutes=20, compare="picotron_lab.deferred:linear")
def test_split_backward(attempt: Any) -> None:
    """Backward in two parts: B now, W later."""
    rng, m = attempt.rng, attempt.rng.randint(2, 4)
    widths = rng.sample((2, 3, 5, 7), 3) + [rng.choice((4, 6))]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=attempt.generator, dtype=torch.float64)

    B, T = rng.sample((1, 2, 3), 2)
    case = Layers(
        [draw(F, D) for D, F in zip(widths, widths[1:], strict=False)],
        [draw(B, T, widths[0]) for _ in range(m)], [draw(B, T, widths[-1]) for _ in range(m)],
    )  # fmt: skip
    run = attempt.run(split_backward, 1, case)
    got, (dxs, dws) = run.values[0], whole_backward(case)
    jobs = m * len(case.weights)
    attempt.same("dx after B", got["dx"], dxs)
    total = [sum(parts) for parts in zip(*dws, strict=True)]
    words = "only the micro-batch whose W came last is in weight.grad: add to what is there"
    attempt.same("weight.grad after W", got["dW"], total, suspects={words: dws[0]})
    attempt.same("whether weight.grad is there before W", got["early"], [False] * len(total))
    attempt.same("entries left in each queue after W", got["left"], [0] * m)
    attempt.equal(
        f"matmuls in backwards of {m} micro-batches through {len(total)} layers", got["of B"], jobs,
        "one per layer: dx = dy W", "dW = dy^T x is for W: leave x and dy in the queue",
    )  # fmt: skip
    attempt.equal(
        "matmuls of weight_gradients", got["of W"], jobs, "one per layer: dW = dy^T x",
        "dx is known from B: do not compute it again",
    )  # fmt: skip
