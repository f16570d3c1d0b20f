"""Lesson 12: what expert parallelism must do. Rows and gradients in float64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lessons.kit import Lesson, task
from picotron_lab.comm import Axis

LESSON = Lesson(
    title="Experts",
    builds="a mixture of experts whose experts live on different ranks, and that stays balanced",
    allowed=("picotron_lab.comm",),
)
BYTES = 8  # of a float64, and of a count


@dataclass(frozen=True)
class Case:
    """Tokens of all ranks [n, N, D], their choices and gates [n, N, k], a matrix per expert."""

    ranks: int
    x: Tensor
    expert: Tensor
    gate: Tensor
    weight: Tensor  # [E, D, D]
    grad: Tensor  # of the result, [n, N, D]

    @property
    def each(self) -> int:
        """Experts of a rank."""
        return len(self.weight) // self.ranks


class Expert(nn.Module):
    """tanh(x W)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()


def draw(attempt: Any) -> Case:
    """Uneven choices: all experts of one rank, and one more, are chosen by nobody."""
    n, e, k = attempt.rng.randint(3, 5), attempt.rng.randint(2, 3), 2
    N, D, E = attempt.rng.randint(5, 9), attempt.rng.choice((3, 5)), n * e
    idle = attempt.rng.randrange(n)
    chosen = [i for i in range(E) if i // e != idle][1:]
    expert = torch.tensor(
        [[attempt.rng.sample(chosen, k) for _ in range(N)] for _ in range(n)], dtype=torch.int64
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=attempt.generator, dtype=torch.float64)

    return Case(n, normal(n, N, D), expert, normal(n, N, k).softmax(-1), normal(E, D, D),
                normal(n, N, D))  # fmt: skip


def one_device(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every token through its experts, without ranks: y, and gradients of x, gates, weights."""
    x, gate, weight = (t.clone().requires_grad_() for t in (case.x, case.gate, case.weight))
    through = torch.einsum("nid,nijdf->nijf", x, weight[case.expert]).tanh()
    y = (gate[..., None] * through).sum(2)
    return y.detach(), *torch.autograd.grad(y, (x, gate, weight), case.grad)


# ---- programs: what every rank runs


def travel(axis: Axis, student: Any, rows: list[Tensor], table: list[list[int]]) -> tuple:
    """Task 12.1: rows there, their squares' gradient back."""
    mine = rows[axis.rank].clone().requires_grad_()
    send, receive = table[axis.rank], [row[axis.rank] for row in table]
    came = student.Travel.apply(mine, send, receive, axis)
    (came.square() * (axis.rank + 1)).sum().backward()
    return came.detach(), mine.grad


def layer(axis: Axis, student: Any, case: Case) -> tuple:
    """Task 12.2: forward and backward of this rank's tokens."""
    r, e = axis.rank, case.each
    experts = [Expert(w) for w in case.weight[r * e : (r + 1) * e]]
    x, gate = case.x[r].clone().requires_grad_(), case.gate[r].clone().requires_grad_()
    y = student.moe(x, case.expert[r], gate, experts, axis)
    y.backward(case.grad[r])
    return y.detach(), x.grad, gate.grad, [expert.weight.grad for expert in experts]


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, only to keep out of here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts how often Python reads the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += func in (Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__iter__)
        return func(*args, **(kwargs or {}))


def capacity(axis: Axis, student: Any, expert: Tensor, experts: int, limit: int) -> tuple:
    """Task 12.3."""
    with Operators() as operators, Reads() as reads:
        kept = student.within_capacity(expert, experts, limit)
    return kept, operators.seen, reads.seen


def bias(axis: Axis, student: Any, bias: Tensor, expert: list[Tensor], speed: float) -> tuple:
    """Task 12.4."""
    mine = bias.clone()
    return student.moved_bias(mine, expert[axis.rank], speed, axis), mine


# ---- tasks


@task("12.1", points=3, minutes=20, core=True, compare="picotron_lab.expert_parallel:Travel")
def test_travel(attempt: Any) -> None:
    """Rows travel to other ranks, and their gradients back."""
    n, D = attempt.rng.randint(3, 6), attempt.rng.choice((3, 5))
    table = [[attempt.rng.randint(0, 4) for _ in range(n)] for _ in range(n)]
    table[1][2], table[0][1] = 0, 3
    rows = [
        torch.randn(sum(row), D, generator=attempt.generator, dtype=torch.float64) for row in table
    ]
    run = attempt.run(travel, n, rows, table)
    parts = [x.split(row) for x, row in zip(rows, table, strict=True)]
    came = [torch.cat([parts[i][j] for i in range(n)]) for j in range(n)]
    back = [torch.cat([2 * (j + 1) * parts[i][j] for j in range(n)]) for i in range(n)]
    stayed = [2 * (i + 1) * rows[i] for i in range(n)]
    attempt.same("rows that came", [value[0] for value in run.values], came, ranks=n)
    attempt.same("gradients that came back", [value[1] for value in run.values], back, ranks=n,
                 suspects={"the gradients of a rank's own rows never left it": stayed})  # fmt: skip
    for rank in range(n):
        both = sum(table[rank]) + sum(row[rank] for row in table)
        attempt.equal(f"bytes of all_to_all on rank {rank}", run.bytes("all_to_all", rank=rank),
                      both * D * BYTES, formula="(M + R) D 8",
                      because="rows are padded, or sent twice")  # fmt: skip
    attempt.equal("calls on any axis", run.count(), 2, formula="one forward, one backward",
                  because="all_to_all does it alone")  # fmt: skip


@task("12.2", points=6, minutes=40, core=True, compare="picotron_lab.expert_parallel:run_plain")
def test_moe(attempt: Any) -> None:
    """A layer whose experts are spread over ranks."""
    case = draw(attempt)
    run = attempt.run(layer, case.ranks, case)
    y, dx, dgate, dweight = one_device(case)
    got = list(zip(*run.values, strict=True))
    attempt.same("y", list(got[0]), list(y), ranks=case.ranks, suspects={
        "gates were left out": list(unweighted(case)),
        "rows come sorted by source: sort them by expert before the experts have them":
            list(by_source(case)),
    })  # fmt: skip
    attempt.same("gradient of x", list(got[1]), list(dx), ranks=case.ranks)
    attempt.same("gradient of the gates", list(got[2]), list(dgate), ranks=case.ranks)
    of_ranks = [list(w) for w in dweight.unflatten(0, (case.ranks, -1))]
    mixed = [sum(parts) for parts in zip(*of_ranks, strict=True)]
    attempt.same("gradients of experts", list(got[3]), of_ranks, ranks=case.ranks, suspects={
        "a sum over ep mixes different experts; theirs are complete as they are":
            [mixed] * case.ranks,
        "nobody chose this expert: give it 0 rows, and its gradient is zeros, not None":
            [[w if w.any() else None for w in one] for one in of_ranks],
    })  # fmt: skip
    D, sent = case.x.shape[2], case.expert[0].numel()
    for rank in range(case.ranks):
        came = int((case.expert // case.each == rank).sum())
        attempt.equal(f"bytes of all_to_all on rank {rank}", run.bytes("all_to_all", rank=rank),
                      2 * (sent + came) * D * BYTES, formula="2 (M + R) D 8",
                      because="only routed rows travel: no padding, no second copy")  # fmt: skip
    attempt.equal("calls of all_to_all", run.count("all_to_all"), 4, formula="2 each way")
    E = len(case.weight)
    attempt.at_most("bytes of everything else", run.bytes() - run.bytes("all_to_all"),
                    case.ranks * E * BYTES, formula="n E 8",
                    because="counts of rows are all that must be known")  # fmt: skip


@task("12.3", points=3, minutes=15, compare="picotron_lab.router:keep")
def test_within_capacity(attempt: Any) -> None:
    """An expert takes no more than it can, first come, first served."""
    T, E, k = attempt.rng.randint(11, 19), attempt.rng.randint(3, 5), 2
    expert = torch.tensor([attempt.rng.sample(range(E), k) for _ in range(T)])
    limit = attempt.rng.randint(T // E, 2 * T // E - 1)
    run = attempt.run(capacity, 1, expert, E, limit)
    kept, operators, reads = run.values[0]
    flat = expert.flatten().tolist()
    want = torch.tensor([flat[:i].count(c) < limit for i, c in enumerate(flat)]).view(T, k)
    last = torch.tensor([flat[i + 1 :].count(c) < limit for i, c in enumerate(flat)]).view(T, k)
    turned = expert.T.flatten().tolist()
    firsts = torch.tensor([turned[:i].count(c) < limit for i, c in enumerate(turned)])
    attempt.same("kept choices", kept, want, suspects={
        "every first choice was served before any second, so a later token takes an earlier one's "
        "place": firsts.view(k, T).T,
        "last come, first served: count from the front": last,
    })  # fmt: skip
    why = "a loop over tokens: count with a cumulative sum"
    attempt.equal("times that Python reads values", reads, 0, formula="none", because=why)
    attempt.at_most("operators", operators, 40, formula="for any number of tokens", because=why)


@task("12.4", points=3, minutes=15, compare="picotron_lab.router:settle")
def test_moved_bias(attempt: Any) -> None:
    """A bias moves tokens from busy experts to idle ones."""
    n, E, speed = attempt.rng.randint(3, 5), attempt.rng.choice((4, 6, 8)), 0.25
    expert = choices_with_a_mean(attempt, n, E)
    start = torch.randn(E, generator=attempt.generator, dtype=torch.float64)
    run = attempt.run(bias, n, start, expert, speed)
    counts = torch.stack([c.flatten().bincount(minlength=E) for c in expert]).double()
    total = counts.sum(0)
    move = (total.mean() - total).sign()
    alone = [start + speed * (c.mean() - c).sign() for c in counts]
    got, old = (list(x) for x in zip(*run.values, strict=True))
    attempt.same("new bias", got, [start + speed * move] * n, ranks=n, suspects={
        "only this rank's tokens were counted": alone,
        "an expert with just the mean stays where it is": [
            start + speed * torch.where(total < total.mean(), 1.0, -1.0)] * n,
        "busy experts went up: idle ones should": [start - speed * move] * n,
        "the step is `speed`, not speed times the difference":
            [start + speed * (total.mean() - total)] * n,
    })  # fmt: skip
    attempt.same("the old bias, unchanged", old, [start] * n)
    attempt.equal("calls", run.count(), 1, formula="one all_reduce")
    attempt.at_most("bytes", run.bytes(), E * BYTES, formula="8 E",
                    because="counts are enough, not choices")  # fmt: skip


def choices_with_a_mean(attempt: Any, n: int, E: int) -> list[Tensor]:
    """Choices [12, 2] of each rank, whose tokens like 3 experts; some expert gets just the mean."""
    while True:
        liked = [attempt.rng.sample(range(E), 3) for _ in range(n)]
        expert = [torch.tensor([attempt.rng.sample(some, 2) for _ in range(12)]) for some in liked]
        counts = torch.cat(expert).flatten().bincount(minlength=E)
        if 24 * n // E in counts.tolist():  # E divides 24
            return expert


# ---- wrong answers that the tests know by sight


def unweighted(case: Case) -> Tensor:
    """y without gates."""
    return torch.einsum("nid,nijdf->nijf", case.x, case.weight[case.expert]).tanh().sum(2)


def by_source(case: Case) -> Tensor:
    """y if a rank splits its rows among its experts in the order in which they came."""
    y = torch.zeros_like(case.x)
    tokens = [(i, t, j) for i in range(case.ranks)
              for _, t, j in sorted((int(c), t, j) for t, row in enumerate(case.expert[i])
                                    for j, c in enumerate(row))]  # fmt: skip
    for rank in range(case.ranks):
        mine = [at for at in tokens if int(case.expert[at]) // case.each == rank]
        wrong = sorted(int(case.expert[at]) for at in mine)  # counts are right, rows are not
        for at, expert in zip(mine, wrong, strict=True):
            y[at[:2]] += case.gate[at] * (case.x[at[:2]] @ case.weight[expert]).tanh()
    return y
