"""What lesson 10 asks for: slices of a sequence change nothing but when things are computed."""

import gc
import math
import weakref
from dataclasses import dataclass, replace
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab.clock import Network
from picotron_lab.comm import Axis
from picotron_lab.ledger import CommError

LESSON = Lesson(
    title="Token pipelines",
    builds="attention over slices, forward and backward, its pipeline, and where to cut best",
    allowed=("picotron_lab.comm",),
)
MS = 1e-3
UNBOUND = "fastest through one stage, not through all: try every t_max, and no slice above it"


def draw(attempt: Any, *shape: int) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, generator=attempt.generator, dtype=torch.float64)


# ---- 10.1 and 10.2: an attention layer


@dataclass(frozen=True)
class Case:
    """A layer's weights, a sequence, its slices, and a gradient of the output."""

    w_qkv: Tensor  # [D, 3 D]
    w_out: Tensor  # [D, D]
    heads: int
    x_BTD: Tensor
    grad_BTD: Tensor
    lengths: list[int]


class Watch(torch.autograd.Function):
    """Changes nothing; tells the layer which rows go forward, backward, and what is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "Layer") -> Tensor:
        ctx.layer, ctx.alive = layer, lambda: None  # something that lives as long as the graph
        layer.rows_forward += x.shape[1]
        layer.kept.add(ctx.alive)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.layer.rows_backward += grad.shape[1]
        return grad, None


class Layer(nn.Module):
    """Projections of an attention layer with rotated positions; counts tokens."""

    def __init__(self, case: Case):
        super().__init__()
        self.w_qkv, self.w_out = nn.Parameter(case.w_qkv.clone()), nn.Parameter(case.w_out.clone())
        self.heads, self.rows_forward, self.rows_backward = case.heads, 0, 0
        self.kept = weakref.WeakSet()

    def project(self, x_BTD: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, C] of tokens first, first + 1, ..."""
        parts = (Watch.apply(x_BTD, self) @ self.w_qkv).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.unbind(2)
        positions = torch.arange(first, first + x_BTD.shape[1], dtype=torch.float64)
        angles = positions[:, None, None] * 0.7
        return rotated(q, angles), rotated(k, angles), v

    def finish(self, out_BTHC: Tensor) -> Tensor:
        """[B, T, D]."""
        return out_BTHC.flatten(2) @ self.w_out


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of numbers turned by an angle per token."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def whole(
    case: Case, starts: list[int], visible: Tensor, learns: Tensor | None = None
) -> tuple[Tensor, Layer, Tensor]:
    """The sequence at once: output, layer, input. Positions count from starts[t] at token t.

    visible, learns  [T, T]: which keys a query sees, and (None: all) which learn from it
    """
    layer, x = Layer(case), case.x_BTD.clone().requires_grad_()
    columns = [layer.project(x[:, t : t + 1], t - start) for t, start in enumerate(starts)]
    q, k, v = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
    learns = visible if learns is None else learns
    both = [torch.einsum("bthc,bshc->bhts", q, keys) for keys in (k, k.detach())]
    scores = torch.where(learns, *both) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    parts = (weights * learns, v), (weights * ~learns, v.detach())
    out = sum(torch.einsum("bhts,bshc->bthc", w, values) for w, values in parts)
    return layer.finish(out), layer, x


def masks(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """[T, T] causal, True where a query sees a key; [T] first token, and number, of its slice."""
    T, n = sum(case.lengths), len(case.lengths)
    number = torch.arange(n).repeat_interleave(torch.tensor(case.lengths))
    begins = torch.tensor([0, *accumulate(case.lengths)])
    return torch.ones(T, T, dtype=torch.bool).tril(), begins[number], number


def make_case(attempt: Any) -> Case:
    """Slices of different lengths, the first longer than one token."""
    rng, heads = attempt.rng, attempt.rng.randint(1, 3)
    lengths = [rng.randint(2, 4), *(rng.randint(1, 4) for _ in range(rng.randint(2, 3)))]
    B, T, D = rng.randint(1, 3), sum(lengths), heads * rng.choice((2, 4))
    shapes = (D, 3 * D), (D, D), (B, T, D), (B, T, D)
    w_qkv, w_out, x, grad = (draw(attempt, *shape) for shape in shapes)
    return Case(w_qkv, w_out, heads, x, grad, lengths)


def copied(x: Any) -> Any:
    """A tensor without its graph; anything else as it is, for `same` to name."""
    return x.detach().clone() if isinstance(x, Tensor) else x


def forward(axis: Axis, student: ModuleType, case: Case) -> dict[str, Any]:
    """All slices forward."""
    layer = Layer(case)
    attention = student.SlicedAttention(layer)
    outs = [attention.forward(x) for x in case.x_BTD.split(case.lengths, 1)]
    return {"out": [copied(out) for out in outs], "rows": layer.rows_forward}


def backward(axis: Axis, student: ModuleType, case: Case) -> dict[str, Any]:
    """All slices forward, then backward."""
    layer, rows, dxs = Layer(case), [], []
    attention = student.SlicedAttention(layer)
    for x in case.x_BTD.split(case.lengths, 1):
        attention.forward(x)
    for grad in reversed(case.grad_BTD.split(case.lengths, 1)):
        before = layer.rows_backward
        dxs.append(copied(attention.backward(grad)))
        rows.append(layer.rows_backward - before)
    gc.collect()
    dw, kept = [layer.w_qkv.grad, layer.w_out.grad], len(layer.kept)
    return {"dx": dxs[::-1], "dw": dw, "rows": rows[::-1], "kept": kept}


@task("10.1", points=3, minutes=20, core=True, compare="picotron_lab.token_pipeline:SliceCore")
def test_forward(attempt: Any) -> None:
    """Keys and values are carried from slice to slice."""
    case = make_case(attempt)
    seen, begin, number = masks(case)
    T = len(begin)
    top_left = torch.arange(T) <= (torch.arange(T) - begin)[:, None]

    def slices(visible: Tensor, starts: list[int]) -> list[Tensor]:
        return list(whole(case, starts, visible)[0].detach().split(case.lengths, 1))

    got, zeros = attempt.run(forward, 1, case).values[0], [0] * T
    restart, own = slices(seen, begin.tolist()), slices(seen & (begin[:, None] == begin), zeros)
    square, blind = slices(top_left, zeros), slices(begin[:, None] >= begin, zeros)
    suspects = {
        "positions start at 0 in every slice: tell project where the slice begins": restart,
        "a slice sees only its own keys: keep those of earlier slices": own,
        "query t of a slice sees keys 0..t, as in a square mask: it is token first + t": square,
        "a slice sees the tokens after a query too: mask them": blind,
    }
    attempt.same("output by slice", got["out"], slices(seen, zeros), suspects=suspects)
    attempt.equal(
        f"tokens projected for slices of {case.lengths}", got["rows"], T, "T, each once",
        "keep keys and values, not inputs, of earlier slices",
    )  # fmt: skip


@task("10.2", points=4, minutes=30, compare="picotron_lab.token_pipeline:Parts")
def test_backward(attempt: Any) -> None:
    """Gradients of keys and values are carried back."""
    case = make_case(attempt)
    seen, _, number = masks(case)
    dxs = []
    for apart in (0, 1, len(number)):  # of slices, how far gradients reach; last: all
        learns = number[:, None] - number <= apart
        out, layer, x = whole(case, [0] * len(number), seen, learns)
        out.backward(case.grad_BTD)
        dxs.append(list(x.grad.split(case.lengths, 1)))
    got = attempt.run(backward, 1, case).values[0]
    suspects = {
        "an earlier slice learns nothing from later ones: their gradients for its keys and values "
        "are lost": dxs[0],
        "a slice learns only from the one right after it: add up what all later ones leave": dxs[1],
    }
    attempt.same("dx by slice", got["dx"], dxs[2], suspects=suspects)
    attempt.same("gradients of the layer", got["dw"], [layer.w_qkv.grad, layer.w_out.grad])
    for k, rows in enumerate(got["rows"]):
        attempt.equal(
            f"tokens of the projection in backward of slice {k}", rows, case.lengths[k],
            f"l_{k}: only its own", "its keys carry the graphs of earlier slices: cut them there",
        )  # fmt: skip
    attempt.equal(
        "projections whose graph is kept after the last backward", got["kept"], 0,
        "a slice goes with its backward", "let go of what only that slice's backward needed",
    )  # fmt: skip


# ---- 10.3: slices through a pipeline


@dataclass(frozen=True)
class Stages:
    """A causal model of K stages, one sequence, its slices, and what they take."""

    weights: list[Tensor]  # [D, D] of each stage
    x_BTD: Tensor
    label_BTD: Tensor
    lengths: list[int]
    ms: list[int]  # of each slice forward, on every stage; backward takes twice as long


class Prefix:
    """out_t = tanh(sum of x_s W for s <= t), slice by slice, with its backward by hand."""

    def __init__(self, case: Stages, axis: Axis):
        self.case, self.axis, self.w = case, axis, case.weights[axis.rank]
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.sum, self.later, self.grad = 0.0, 0.0, torch.zeros_like(self.w)
        self.forwarded = 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The next slice."""
        self.axis.spend(self.case.ms[len(self.kept)] * MS)
        y = (x_BTD @ self.w).cumsum(1) + self.sum
        self.sum, self.forwarded = y[:, -1:], self.forwarded + 1
        self.kept.append((x_BTD, y.tanh()))
        return y.tanh()

    def backward(self, grad_BTD: Tensor | None) -> Tensor:
        """The newest slice."""
        x, out = self.kept.pop()
        k, n = len(self.kept), len(self.case.lengths)
        assert self.forwarded == n, (
            f"slice {k} went backward when {self.forwarded} of {n} were forward: later slices have "
            "gradients for it, so run all slices forward first."
        )
        assert grad_BTD is None or grad_BTD.shape == out.shape, (
            f"slice {k} of {out.shape[1]} tokens got a gradient of {grad_BTD.shape[1]}: "
            "backward goes from the last slice to the first."
        )
        self.axis.spend(2 * self.case.ms[k] * MS)
        if grad_BTD is None:
            grad_BTD = 2 * (out - self.case.label_BTD.split(self.case.lengths, 1)[k])
        dy = (grad_BTD * (1 - out * out)).flip(1).cumsum(1).flip(1) + self.later
        self.later = dy[:, :1]
        self.grad += torch.einsum("btd,btf->df", x, dy)
        return dy @ self.w.T


def pipelined(axis: Axis, student: ModuleType, case: Stages) -> Tensor:
    """One sequence, forward and backward: the gradient of this rank's stage."""
    stage = Prefix(case, axis)
    slices = list(case.x_BTD.split(case.lengths, 1))
    mine = slices if axis.rank == 0 else [torch.full_like(x, torch.nan) for x in slices]
    student.run_slices(stage, axis, mine)
    return stage.grad


def whole_sequence(case: Stages) -> list[Tensor]:
    """Gradients of all stages on one device."""
    weights, x = [w.clone().requires_grad_() for w in case.weights], case.x_BTD
    for w in weights:
        x = (x @ w).cumsum(1).tanh()
    (x - case.label_BTD).square().sum().backward()
    return [w.grad for w in weights]


@task("10.3", points=3, minutes=15, core=True, compare="picotron_lab.schedules.sliced:terapipe")
def test_pipeline(attempt: Any) -> None:
    """Slices of one sequence fill a pipeline."""
    rng = attempt.rng
    K, n, B, D = rng.randint(3, 5), rng.randint(3, 5), rng.randint(1, 3), rng.randint(2, 4)
    lengths = [rng.randint(1, 4) for _ in range(n)]
    f = [l + c for l, c in zip(lengths, [0, *accumulate(lengths)], strict=False)]
    weights = [draw(attempt, D, D) / 2 for _ in range(K)]
    case = Stages(weights, *(draw(attempt, B, sum(lengths), D) for _ in range(2)), lengths, f)
    run = attempt.run(pipelined, K, case, network=Network())
    attempt.same("gradient of each stage", run.values, whole_sequence(case), ranks=K)
    for rank in range(K):
        neighbours = (rank > 0) + (rank < K - 1)
        attempt.equal(
            f"messages that rank {rank} sends",
            run.count("send", rank=rank) + run.count("exchange", rank=rank), neighbours * n,
            "n to each neighbour", "each slice is a message, each way",
        )  # fmt: skip
    attempt.at_most(
        f"milliseconds of slices that take {f} forward, and backward twice that",
        round(max(run.times) / MS, 6), 3 * (sum(f) + (K - 1) * max(f)),
        "sum(f+b) + (K-1)(max f + max b)",
        "the next stage could begin sooner: give it each slice as soon as that is done",
    )  # fmt: skip


# ---- 10.4: where to cut


@dataclass(frozen=True)
class Cost:
    """A sequence, and milliseconds of l tokens after c: flat below `thin`, then by l, and l c."""

    length: int
    stages: int
    thin: int
    each: int
    pair: int

    def time(self, l: int, c: int) -> float:
        """Raises ValueError for no slice."""
        if l < 1 or c < 0 or l + c > self.length:
            raise ValueError(f"time({l}, {c}): no slice of {self.length} tokens has {l} after {c}.")
        return float(self.each * max(l, self.thin) + self.pair * l * (2 * c + l))

    def latency(self, slices: tuple[int, ...]) -> float:
        """sum + (K-1) max."""
        times = [self.time(l, sum(slices[:i])) for i, l in enumerate(slices)]
        return sum(times) + (self.stages - 1) * max(times)


def all_slicings(length: int) -> list[tuple[int, ...]]:
    """Every way to cut: 2^(length-1)."""
    shorter = [(way, last) for last in range(1, length) for way in all_slicings(length - last)]
    return [(length,), *((*way, last) for way, last in shorter)]


def planned(axis: Axis, student: ModuleType, case: Cost) -> tuple[list[int], float, int]:
    """(slices, latency, times asked). Raises CommError for other things, with a sentence."""
    asked = []

    def time(l: int, c: int) -> float:
        asked.append((l, c))
        return case.time(l, c)

    match student.best_slices(case.length, case.stages, time):
        case [[*slices], latency] if all(type(l) is int for l in slices):
            return slices, latency, len(asked)
        case other:
            raise CommError(f"best_slices returned {short(other)}: (list of int, number) is wanted")


def best(case: Cost) -> tuple[float, dict[str, float]]:
    """The least latency, and that of likely wrong answers, by trying everything."""
    ways = all_slicings(case.length)
    more = replace(case, stages=case.stages + 1)
    equal = [way for way in ways if max(way) - min(way) <= 1]
    return min(map(case.latency, ways)), {
        UNBOUND: min(map(case.latency, fastest(case, ways))),
        "max counts K-1 times, not K": min(map(more.latency, ways)),
        "equal lengths: later slices see more and take longer": min(map(case.latency, equal)),
    }


def fastest(case: Cost, ways: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The ways through one stage that take least: there may be several."""
    times = {way: replace(case, stages=1).latency(way) for way in ways}
    return [way for way in ways if times[way] == min(times.values())]


def make_cost(attempt: Any) -> tuple[Cost, float, dict[str, float]]:
    """One for which the likely wrong answers are wrong."""
    ranges = (9, 11), (3, 8), (2, 3), (4, 9), (1, 2)
    while True:
        case = Cost(*(attempt.rng.randint(*limits) for limits in ranges))
        least, wrong = best(case)
        if all(value > least for value in wrong.values()):
            return case, least, wrong


@task("10.4", points=5, minutes=30, compare="picotron_lab.schedules.slicing:best_slices")
def test_best_slices(attempt: Any) -> None:
    """TeraPipe's dynamic program."""
    case, least, wrong = make_cost(attempt)
    slices, latency, asked = attempt.run(planned, 1, case).values[0]
    title, mine = f"of {case.length} tokens on {case.stages} stages", tuple(slices)
    attempt.same(f"sum of your slices {title}", sum(slices), case.length)
    attempt.same("your slices of less than a token", [l for l in slices if l < 1], [])
    if mine in fastest(case, all_slicings(case.length)):
        wrong |= {UNBOUND: case.latency(mine)}
    attempt.same(f"latency of {slices} {title}", case.latency(mine), least, suspects=wrong)
    attempt.same(f"your latency {title}", latency, least, suspects=wrong)
    attempt.at_most(
        f"times asked for {case.length} tokens", asked, case.length * (case.length + 1) // 2,
        "L(L+1)/2", "each is measured on a machine: keep what you have asked for",
    )  # fmt: skip
