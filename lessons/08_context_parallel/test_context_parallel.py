"""Lesson 08: what context parallelism must do. One head, one sequence, float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lessons.kit import Lesson, task
from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis

LESSON = Lesson(
    title="Context parallelism",
    builds="ring attention over ranks that share one sequence, with equal work for all",
    allowed=("picotron_lab.comm",),
)
BYTES = 8  # of a float64, and of a position


@dataclass(frozen=True)
class Case:
    """A sequence dealt to ranks. `dealt`: positions of each rank's tokens."""

    ranks: int
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    dealt: list[Tensor]

    @property
    def block(self) -> int:
        """Bytes of k and v of one rank."""
        return 2 * len(self.dealt[0]) * self.k.shape[1] * BYTES


def draw(attempt: Any, ranks: int, width: int) -> Case:
    """Tokens dealt by chunks r and 2n-1-r of 2n, as in task 08.1."""
    length = 2 * ranks * attempt.rng.randint(1, 4)
    tensors = [
        torch.randn(length, width, generator=attempt.generator, dtype=torch.float64)
        for _ in range(4)
    ]
    chunks = torch.arange(length).view(2 * ranks, -1)
    dealt = [chunks[[r, 2 * ranks - 1 - r]].flatten() for r in range(ranks)]
    return Case(ranks, *tensors, dealt)


def whole(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """torch's own attention on one device: out and (dq, dk, dv) of the whole sequence."""
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(q[None], k[None], v[None], is_causal=True)[0]
    return [out.detach()], list(torch.autograd.grad(out, (q, k, v), case.grad))


def lse_of(case: Case) -> Tensor:
    """log of each query's sum of exponentials, [length]."""
    scores = case.q @ case.k.T / math.sqrt(case.q.shape[1])
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf).logsumexp(1)


def shares(case: Case, tensors: list[Tensor]) -> list[list[Tensor]]:
    """What each rank should have of tensors of the whole sequence."""
    return [[x[mine] for x in tensors] for mine in case.dealt]


def least(run: Any) -> int:
    """Bytes sent by the rank that sent least."""
    return min(run.bytes(rank=rank) for rank in range(len(run.values)))


# ---- programs: what every rank runs


def deal(axis: Axis, student: Any, length: int) -> dict:
    """Task 08.1: the positions, and in words what they are."""
    dealt = student.positions(axis.rank, axis.size, length)
    if not isinstance(dealt, Tensor):
        return {"tokens": f"{type(dealt).__name__}, no tensor", "positions": torch.zeros(0)}
    dtype = str(dealt.dtype).removeprefix("torch.")
    return {"tokens": f"{dtype} {list(dealt.shape)}", "positions": dealt.flatten()}


def merged(axis: Axis, student: Any, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Task 08.2. lse is -1e9 where it is -inf, so that it can be compared."""
    found = student.merge(*(x.clone() for x in blocks))
    if not isinstance(found, tuple) or len(found) != 2:
        return found
    return found[0], found[1].nan_to_num(nan=math.nan, neginf=-1e9)


def forward(axis: Axis, student: Any, case: Case) -> tuple[list[Tensor], int]:
    """Task 08.3: (out, lse), and the most bytes that were live beside q, k, v."""
    mine = case.dealt[axis.rank]
    q, k, v = (x[mine] for x in (case.q, case.k, case.v))
    with Meter() as meter:
        out, lse = student.ring_forward(q, k, v, mine, axis)
    return [out, lse], meter.peak_bytes


def backward(axis: Axis, student: Any, case: Case, out: Tensor, lse: Tensor) -> list[Tensor]:
    """Task 08.4, from what forward should have given."""
    mine = case.dealt[axis.rank]
    q, k, v, grad, out, lse = (x[mine] for x in (case.q, case.k, case.v, case.grad, out, lse))
    return list(student.ring_backward(grad, (q, k, v), (out, lse), mine, axis))


# ---- tasks


@task("08.1", points=4, minutes=15, core=True, compare="picotron_lab.context_parallel:chunks")
def test_positions(attempt: Any) -> None:
    """Tokens are dealt so that all ranks have equal work."""
    ranks = attempt.rng.randint(3, 6)
    length = 2 * ranks * attempt.rng.randint(4, 7)
    run = attempt.run(deal, ranks, length)
    sizes = [dealt["tokens"] for dealt in run.values]
    attempt.same("positions of each rank, as", sizes, [f"int64 [{length // ranks}]"] * ranks)
    everything = torch.cat([dealt["positions"] for dealt in run.values]).sort().values
    attempt.same("all positions, sorted", everything, torch.arange(length))
    rising = [bool((dealt["positions"].diff() > 0).all()) for dealt in run.values]
    attempt.same("positions rise on each rank", rising, [True] * ranks)
    work = [int((dealt["positions"] + 1).sum()) for dealt in run.values]
    attempt.at_most(
        "scores of the busiest rank, divided by those of the idlest",
        round(max(work) / min(work), 3), 1.1, formula="1.1",
        because="late tokens see more keys than early ones: give every rank some of both",
    )  # fmt: skip


@task(
    "08.2", points=4, minutes=20, core=True,
    compare="picotron_lab.attention_blocks:PlainBlocks.merge",
)  # fmt: skip
def test_merge(attempt: Any) -> None:
    """Two softmaxes become one."""
    T, C, S = attempt.rng.randint(5, 9), attempt.rng.choice((3, 5)), 4
    scores = 100 * torch.randn(T, 2 * S, generator=attempt.generator, dtype=torch.float64)
    values = torch.randn(2 * S, C, generator=attempt.generator, dtype=torch.float64)
    scores[0, :S] = scores[1, S:] = scores[2] = -math.inf  # blind to one, the other, both
    scores[3] += 2000  # exp of this is inf
    halves = [(scores[:, part], values[part]) for part in (slice(S), slice(S, None))]
    blocks = [x for s, v in halves for x in (s.softmax(1).nan_to_num(0) @ v, s.logsumexp(1))]
    want = scores.softmax(1).nan_to_num(0) @ values, scores.logsumexp(1).nan_to_num(neginf=-1e9)
    run = attempt.run(merged, 1, blocks)
    mean = (blocks[0] + blocks[2]) / 2
    blind = "a row blind to a block: -inf minus -inf is NaN, keep it from being computed"
    overflow = "exp of a large lse is inf: subtract the larger one first"
    wrong = {
        "the mean of two means: weigh each by its sum of exponentials": mean,
        blind: want[0].masked_fill(scores.isneginf().all(1)[:, None], math.nan),
        overflow: overflown(want[0], blocks[1], blocks[3]),
    }
    suspects = {sentence: (value, want[1]) for sentence, value in wrong.items()}
    attempt.same("out and lse (-1e9 for -inf)", run.values[0], want, suspects=suspects)


@task("08.3", points=6, minutes=35, core=True, compare="picotron_lab.context_parallel:Ring.visit")
def test_ring_forward(attempt: Any) -> None:
    """Keys and values go round, and every query sees all that came before it."""
    case = draw(attempt, attempt.rng.randint(5, 6), width=48)
    run = attempt.run(forward, case.ranks, case)
    want = shares(case, [whole(case)[0][0], lse_of(case)])
    got = [value for value, _ in run.values]
    local = [alone(case, rank) for rank in range(case.ranks)]
    unmasked = shares(case, [blind_to_time(case)])
    attempt.same("out", [g[0] for g in got], [w[0] for w in want], ranks=case.ranks, suspects={
        "queries met the keys of their own rank only": local,
        "foreign keys were taken to be at this rank's own positions": misplaced(case),
        "the last block never came: n - 1 hops after your own": [
            seen_by(case, rank, case.ranks - 1) for rank in range(case.ranks)],
        "queries saw keys that come after them": [x[0] for x in unmasked],
    })  # fmt: skip
    attempt.same("lse", [g[1] for g in got], [w[1] for w in want], ranks=case.ranks)
    hops, tokens = case.ranks - 1, len(case.dealt[0])
    attempt.at_least(
        "bytes sent by every rank", least(run), hops * case.block, formula="(n - 1)(k + v)",
        because="what others see of your keys must have been sent",
    )  # fmt: skip
    attempt.at_most(
        "bytes sent by a rank", run.bytes(), hops * (case.block + BYTES * tokens),
        formula="(n - 1)(k + v + 8 bytes a token)",
        because="a block goes to the right neighbour n - 1 times, not n, and not to everybody",
    )  # fmt: skip
    attempt.at_most(
        "most bytes live on a rank beside q, k, v", max(peak for _, peak in run.values),
        4 * case.block, formula="4 blocks of k and v",
        because="all keys are held at once: forget a block when the next one is there",
    )  # fmt: skip


@task("08.4", points=6, minutes=35, compare="picotron_lab.context_parallel:Ring.visit_again")
def test_ring_backward(attempt: Any) -> None:
    """Gradients of keys and values come home, summed over all queries."""
    case = draw(attempt, attempt.rng.randint(3, 6), width=attempt.rng.choice((3, 5)))
    (out,), gradients = whole(case)
    lse, want = lse_of(case), shares(case, gradients)
    run = attempt.run(backward, case.ranks, case, out, lse)
    here = [own(case, rank, out, lse) for rank in range(case.ranks)]
    block_lse = blockwise(case, out)
    for name, i in (("dq", 0), ("dk", 1), ("dv", 2)):
        wanted = [w[i] for w in want]
        away = wanted[1:] + wanted[:1]
        attempt.same(name, [got[i] for got in run.values], wanted, ranks=case.ranks, suspects={
            "the sums stopped one hop before home": away,
            "sums from the queries of this rank only": [mine[i] for mine in here],
            "softmax of a block: use the lse of the whole row": [mine[i] for mine in block_lse],
        })  # fmt: skip
    tokens = len(case.dealt[0])
    attempt.at_least(
        "bytes sent by every rank", least(run), (2 * case.ranks - 1) * case.block,
        formula="(n - 1)(k + v) + n (dk + dv)",
        because="what others found for your keys must have been sent",
    )  # fmt: skip
    attempt.at_most(
        "bytes sent by a rank", run.bytes(),
        (2 * case.ranks - 1) * case.block + (case.ranks - 1) * BYTES * tokens,
        formula="(n - 1)(k + v + 8 bytes a token) + n (dk + dv)",
        because="send the sums along with their block, not to everybody",
    )  # fmt: skip


# ---- wrong answers that the tests know by sight


def overflown(want: Tensor, *lse: Tensor) -> Tensor:
    """`want` with NaN in rows where exp(lse) of a block is inf."""
    rows = sum(x.exp().isinf() for x in lse) > 0
    return want.masked_fill(rows[:, None], math.nan)


def alone(case: Case, rank: int) -> Tensor:
    """Attention among the tokens of one rank."""
    mine = case.dealt[rank]
    q, k, v = (x[mine][None] for x in (case.q, case.k, case.v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0]


def blind_to_time(case: Case) -> Tensor:
    """Attention without a mask."""
    q, k, v = (x[None] for x in (case.q, case.k, case.v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)[0]


def own(case: Case, rank: int, out: Tensor, lse: Tensor) -> list[Tensor]:
    """dq, dk, dv among the tokens of one rank, with out and lse of the whole rows."""
    mine = case.dealt[rank]
    q, k, v, grad, o = (x[mine] for x in (case.q, case.k, case.v, case.grad, out))
    weights = (q @ k.T / math.sqrt(q.shape[1]) - lse[mine][:, None]).exp().tril()
    ds = weights * (grad @ v.T - (grad * o).sum(1, keepdim=True)) / math.sqrt(q.shape[1])
    return [ds @ k, ds.T @ q, weights.T @ grad]


def dealt_keys(case: Case, rank: int, blocks: int) -> list[int]:
    """The ranks whose keys come by, own ones first: as many as `blocks`."""
    return [(rank - hop) % case.ranks for hop in range(blocks)]


def scores_of(case: Case, rank: int, source: int) -> Tensor:
    """Scores of a rank's queries and another's keys, -inf in the future."""
    mine, theirs = case.dealt[rank], case.dealt[source]
    scores = case.q[mine] @ case.k[theirs].T / math.sqrt(case.q.shape[1])
    return scores.masked_fill(theirs[None] > mine[:, None], -math.inf)


def seen_by(case: Case, rank: int, blocks: int) -> Tensor:
    """out of a rank whose queries met the first `blocks` blocks alone."""
    sources = dealt_keys(case, rank, blocks)
    weights = torch.cat([scores_of(case, rank, s) for s in sources], 1).softmax(1)
    return weights.nan_to_num(0) @ torch.cat([case.v[case.dealt[s]] for s in sources])


def misplaced(case: Case) -> list[Tensor]:
    """out if every block's keys were at the positions of the rank that they visit."""
    found = []
    for mine in case.dealt:
        hidden = (mine[None] > mine[:, None]).repeat(1, case.ranks)
        keys = torch.cat(case.dealt)
        scores = case.q[mine] @ case.k[keys].T / math.sqrt(case.q.shape[1])
        found.append(scores.masked_fill(hidden, -math.inf).softmax(1) @ case.v[keys])
    return found


def blockwise(case: Case, out: Tensor) -> list[list[Tensor]]:
    """dq, dk, dv if each block's weights were its own softmax."""
    sums = [[torch.zeros_like(x[mine]) for x in (case.q, case.k, case.v)] for mine in case.dealt]
    for rank, mine in enumerate(case.dealt):
        inner = (case.grad[mine] * out[mine]).sum(1, keepdim=True)
        for source, theirs in enumerate(case.dealt):
            weights = scores_of(case, rank, source).softmax(1).nan_to_num(0)
            ds = weights * (case.grad[mine] @ case.v[theirs].T - inner)
            ds = ds / math.sqrt(case.q.shape[1])
            sums[rank][0] += ds @ case.k[theirs]
            sums[source][1] += ds.T @ case.q[mine]
            sums[source][2] += weights.T @ case.grad[mine]
    return sums
