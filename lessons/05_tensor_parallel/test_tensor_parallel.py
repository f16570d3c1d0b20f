"""Lesson 05: what your tensor parallelism must do. All numbers are float64.

A program runs on every rank with your functions as `student`; a test compares what the ranks bring
back with one device, then looks at what they sent and held.
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lessons.kit import Lesson, task
from lessons.kit.blocks import (
    MATRICES,
    SHARED,
    Stack,
    bounds,
    draw_stack,
    gradients,
    kv_parts,
    own_heads,
    part_of,
    plain_blocks,
    through,
)  # fmt: skip
from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis
from picotron_lab.ledger import wire_bytes
from picotron_lab.model import Head

LESSON = Lesson(
    title="Tensor parallelism",
    builds="a transformer block with shared key/value heads, and an output head, that are cut over "
    "the ranks and need four sums per block",
    allowed=("picotron_lab.comm", "picotron_lab.model"),
)
ONE_SUM = "a region is one sum of terms, so it needs one all_reduce there and one back: "


def draw(attempt: Any, *shape: int) -> Tensor:
    """Random float64 numbers of this attempt."""
    return torch.randn(shape, generator=attempt.generator, dtype=torch.float64)


def sent(axis: Axis, since: int = 0) -> list[tuple[str, str, int]]:
    """(operation, axis, payload bytes) of this rank's calls, those after the first `since`."""
    return [(call.op, call.axis, call.bytes) for call in axis.ledger.calls[since:]]


def learn(axis: Axis, y: Tensor, gain: Tensor) -> dict[str, Any]:
    """Backward of a loss that weighs each element of y differently; what was sent meanwhile."""
    forward = sent(axis)
    if y.requires_grad:
        (y * gain).sum().backward()
    return {"y": y.detach(), "forward": forward, "backward": sent(axis, len(forward))}


def each(run: Any, key: str) -> list[Any]:
    """One result of all ranks."""
    return [value[key] for value in run.values]


def same_sums(attempt: Any, run: Any, regions: int, S: int, because: str) -> None:
    """Every region: one all_reduce(S) forward, one backward, however they were called."""
    n = len(run.values)
    for direction in ("forward", "backward"):
        calls = [call for call in run.values[0][direction] if call[1] == "world"]
        wire = round(sum(wire_bytes(op, payload, n) for op, _, payload in calls))
        formula = "2(n-1)/n S, S = 8 B T D: an all_reduce"
        if regions > 1:
            formula = f"{regions} * 2(n-1)/n S, S = 8 B T D: two all_reduces in each of two blocks"
        limit = round(regions * wire_bytes("all_reduce", S, n))
        often = f"{len(calls)} call{'s' * (len(calls) > 1)}"
        what = f"bytes that rank 0 sends in {direction}, in {often}"
        attempt.equal(what, wire, limit, formula=formula, because=ONE_SUM + because)


# ---- 05.1


def crossed(axis: Axis, student: ModuleType, x: Tensor, terms: Tensor, gain: Tensor) -> dict:
    """A region where each rank multiplies x by a matrix of its own."""
    x_BTD = x.clone().requires_grad_()
    term_BTD = torch.tanh(student.enter(x_BTD, axis) @ terms[axis.rank])
    return learn(axis, student.leave(term_BTD, axis), gain) | {"dx": x_BTD.grad}


@task("05.1", 3, 15, core=True, compare="picotron_lab.tensor_parallel:Enter")
def test_conjugate_pair(attempt: Any) -> None:
    """The pair f and g around a region."""
    n, D = attempt.rng.choice([3, 4, 5, 6]), attempt.rng.choice([5, 6, 7])
    x, terms, gain = draw(attempt, 2, 3, D), draw(attempt, n, D, D), draw(attempt, 2, 3, D)
    run = attempt.run(crossed, n, x, terms, gain)
    leaves = [x.clone().requires_grad_() for _ in range(n)]
    ys = [torch.tanh(leaf @ term) for leaf, term in zip(leaves, terms, strict=True)]
    own = torch.autograd.grad(sum((y * gain).sum() for y in ys), leaves)
    suspects = {"leave sent nothing: each rank has its own term alone": [y.detach() for y in ys]}
    y = sum(ys).detach()
    attempt.same("output", each(run, "y"), [y] * n, ranks=n, suspects=suspects)
    suspects = {
        "enter sent nothing in backward: each rank has the gradient of its own term alone": [*own],
        "the gradient is n times too large: leave summed in backward what every rank already had "
        "whole": [n * sum(own)] * n,
        "f and g have changed places in backward: leave sums there, enter does not": [
            n * one for one in own
        ],
        "no gradient came back: a collective is not seen by autograd, write a torch.autograd."
        "Function around it": [None] * n,
    }
    attempt.same("gradient of x", each(run, "dx"), [sum(own)] * n, ranks=n, suspects=suspects)
    same_sums(attempt, run, 1, x.nbytes, "forward in leave, back in enter")


# ---- 05.2


@dataclass
class Matrices:
    """An MLP: x [B, T, D]; gate, up [F, D]; down [D, F]; bias [D]."""

    x: Tensor
    weights: list[Tensor]
    bias: Tensor
    gain: Tensor


def mlp(case: Matrices, x: Tensor, weights: list[Tensor]) -> Tensor:
    """The term of some of the F columns, without bias."""
    gate, up, down = weights
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def sharded_mlp(axis: Axis, student: ModuleType, case: Matrices) -> dict:
    """Cut three matrices, let the whole ones go, then cross the region."""
    x_BTD, bias = case.x.clone().requires_grad_(), nn.Parameter(case.bias.clone())
    with Meter() as meter:
        weights = cut_all(axis, student, case)
    held = meter.live_bytes
    gate_BTF, up_BTF = student.column(x_BTD, weights[:2], axis)
    y_BTD = student.row(F.silu(gate_BTF) * up_BTF, weights[2], bias, axis)
    values = [w.detach().clone() for w in weights]
    learned = learn(axis, y_BTD, case.gain)
    found = {"held": held, "weights": values, "dx": x_BTD.grad, "db": bias.grad}
    return learned | found | {"dw": [w.grad for w in weights]}


def cut_all(axis: Axis, student: ModuleType, case: Matrices) -> list[Tensor]:
    """This rank's parts of copies that end here."""
    wholes = [w.clone() for w in case.weights]
    dims = zip(wholes, (0, 0, 1), strict=True)
    return [student.cut(whole, dim, axis.size, axis.rank) for whole, dim in dims]


def parts(weights: list[Tensor], n: int) -> list[list[Tensor]]:
    """For each rank: its rows of gate and up, its columns of down."""
    gate, up, down = weights
    mine = [bounds(len(gate), n, rank) for rank in range(n)]
    return [[gate[m], up[m], down[:, m]] for m in mine]


@task("05.2", 4, 20, core=True, compare="picotron_lab.tensor_parallel:Crossing.column")
def test_column_and_row(attempt: Any) -> None:
    """Column-parallel and row-parallel matmuls."""
    D, R, less, n = (attempt.rng.choice(sizes) for sizes in ([5, 7], [4, 5], [1, 2], [3, 4, 5]))
    width = n * R - less
    shapes = [(width, D), (width, D), (D, width)]
    weights = [draw(attempt, *shape) for shape in shapes]
    case = Matrices(draw(attempt, 2, 3, D), weights, draw(attempt, D), draw(attempt, 2, 3, D))
    run = attempt.run(sharded_mlp, n, case)
    floor = width // n * n
    short = [weights[0][:floor], weights[1][:floor], weights[2][:, :floor]]
    sentence = "size is length / parts rounded down: what remains belongs to nobody, round up"
    suspects = {sentence: parts(short, n)}
    attempt.same("weights", each(run, "weights"), parts(weights, n), ranks=n, suspects=suspects)

    x, wholes = case.x.clone().requires_grad_(), [w.requires_grad_() for w in weights]
    leaves = [case.x.clone().requires_grad_() for _ in range(n)]
    y = mlp(case, x, wholes).detach() + case.bias
    own = [
        torch.autograd.grad((mlp(case, leaf, part) * case.gain).sum(), [leaf])[0]
        for leaf, part in zip(leaves, parts(wholes, n), strict=True)
    ]
    dws = torch.autograd.grad((mlp(case, x, wholes) * case.gain).sum(), wholes)
    suspects = {"the bias was added by every rank, n times": [y + (n - 1) * case.bias] * n}
    attempt.same("output", each(run, "y"), [y] * n, ranks=n, suspects=suspects)
    suspects = {"column has no f: each rank has the gradient of its own term alone": own}
    attempt.same("gradient of x", each(run, "dx"), [sum(own)] * n, ranks=n, suspects=suspects)
    suspects = {"cut gave a tensor that is no nn.Parameter: it does not learn": [[None] * 3] * n}
    attempt.same("gradients of weights", each(run, "dw"), parts(dws, n), n, suspects=suspects)
    db = case.gain.sum((0, 1))
    wrong = "only rank 0 has a gradient of the bias: its replicas would drift apart"
    suspects = {wrong: [db] + [None] * (n - 1), f"{wrong} ": [db] + [0 * db] * (n - 1)}
    attempt.same("gradient of the bias", each(run, "db"), [db] * n, ranks=n, suspects=suspects)
    attempt.at_most(
        "bytes of weights that rank 0 still holds", run.values[0]["held"],
        8 * sum(part.numel() for part in parts(weights, n)[0]), formula="8 * 3 D ceil(F/n)",
        because="a slice is a view, and a view keeps all of its tensor alive",
    )  # fmt: skip
    same_sums(attempt, run, 1, case.x.nbytes, "enter it once, however many weights share x")


# ---- 05.3


def split_blocks(axis: Axis, student: ModuleType, case: Stack) -> dict:
    """The same blocks on all ranks."""
    blocks, x_BTD = plain_blocks(case), case.x.clone().requires_grad_()
    for block, cfg in zip(blocks, case.configs, strict=True):
        shared = max(1, axis.size // cfg.kv_heads)
        groups = [[*range(r, r + shared)] for r in range(0, axis.size, shared)]
        kv = axis.split("kv", groups)
        block.attention = student.ParallelAttention(block.attention, axis, kv)
        block.mlp = student.ParallelMLP(block.mlp, axis)
    learned = learn(axis, through(case, blocks, x_BTD), case.gain)
    norms = [p.grad for name, p in blocks.named_parameters() if "norm" in name]
    return learned | {
        "replicated": [x_BTD.grad, *norms],
        "matrices": gradients(blocks, MATRICES),
        "shared": gradients(blocks, SHARED),
    }


@task("05.3", 5, 25, compare="picotron_lab.tensor_parallel:ParallelAttention")
def test_block(attempt: Any) -> None:
    """A block, cut by heads that may be shared."""
    case, n = draw_stack(attempt.rng, attempt.generator)
    run = attempt.run(split_blocks, n, case)
    blocks, x = plain_blocks(case), case.x.clone().requires_grad_()
    y = through(case, blocks, x)
    (y * case.gain).sum().backward()
    dealt = own_heads(case, [rank % case.configs[0].kv_heads for rank in range(n)])[0]
    sentence = "key/value heads are dealt out in turn: neighbours share one, rank r has r * K // n"
    one = replace(case, documents=None)
    across = through(one, plain_blocks(one), case.x).detach()
    suspects = {
        sentence: [dealt] * n,
        "tokens look into other documents: core wants documents_BT too": [across] * n,
    }
    attempt.same("output", each(run, "y"), [y.detach()] * n, ranks=n, suspects=suspects)
    norms = [p.grad for name, p in blocks.named_parameters() if "norm" in name]
    what = "gradients of x and of the norms"
    attempt.same(what, each(run, "replicated"), [[x.grad, *norms]] * n, ranks=n)
    whole = gradients(blocks, MATRICES)
    names = MATRICES * 2
    want = [
        [part_of(name, grad, n, rank) for name, grad in zip(names, whole, strict=True)]
        for rank in range(n)
    ]
    attempt.same(f"gradients of {', '.join(MATRICES)}", each(run, "matrices"), want, ranks=n)
    want = [kv_parts(case, gradients(blocks, SHARED), n, rank) for rank in range(n)]
    alone = own_heads(case, [rank * case.configs[0].kv_heads // n for rank in range(n)])[1]
    own = [[g[bounds(len(g), n, rank)] for g in alone] for rank in range(n)]
    sentence = "a shared head got only the gradient of this rank's own query heads: sum it over kv"
    suspects = {sentence: [mine + right[2:] for mine, right in zip(own, want, strict=True)]}
    what = "gradients of attention.k, attention.v"
    attempt.same(what, each(run, "shared"), want, ranks=n, suspects=suspects)
    because = "enter it once, however many weights share x"
    same_sums(attempt, run, 4, case.x.nbytes, because)
    because = "gradients of k and v of the block whose heads are shared, and nothing else"
    calls = run.count(axis="kv", rank=0)
    attempt.at_most("calls on kv on rank 0", calls, 2, formula="one per weight", because=because)


# ---- 05.4


def all_logits(axis: Axis, student: ModuleType, weight: Tensor, x: Tensor, labels: Tensor) -> dict:
    """Logits and the gradients of their loss, which every rank computes."""
    x_BTD = x.clone().requires_grad_()
    with Meter() as meter:
        head = student.ParallelHead(whole_head(weight), axis)
    held = meter.live_bytes
    logits_BTV = head(x_BTD)
    forward = sent(axis)
    F.cross_entropy(logits_BTV.flatten(0, 1), labels, reduction="sum").backward()
    found = {"y": logits_BTV.detach(), "dx": x_BTD.grad, "dw": head.weight.grad}
    return found | {"held": held, "forward": forward, "backward": sent(axis, len(forward))}


def whole_head(weight: Tensor) -> Head:
    """A plain head with this weight."""
    head = Head(weight.shape[1], 0)
    head.weight = nn.Parameter(weight.clone())
    return head


@task("05.4", 3, 15, compare="picotron_lab.tensor_parallel:ParallelHead")
def test_head(attempt: Any) -> None:
    """The output head, cut by words."""
    D, R, n = (attempt.rng.choice(sizes) for sizes in ([5, 7], [5, 6, 8], [3, 4, 5]))
    V = n * R - attempt.rng.choice([1, 2])
    weight, x = draw(attempt, V, D).requires_grad_(), draw(attempt, 2, 3, D).requires_grad_()
    labels = torch.randint(V, (6,), generator=attempt.generator)
    run = attempt.run(all_logits, n, weight.detach(), x.detach(), labels)
    logits = x @ weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    d_logits, dx, dw = torch.autograd.grad(loss, [logits, x, weight])
    mine = [bounds(V, n, rank) for rank in range(n)]
    padded = F.pad(logits.detach(), (0, n * R - V))
    suspects = {"rows of padding are among the words: cut them off": [padded] * n}
    attempt.same("logits", each(run, "y"), [logits.detach()] * n, ranks=n, suspects=suspects)
    twice = "is n times too large: all ranks have the whole gradient of the logits, keep your slice"
    suspects = {
        "the region has no f: each rank has the gradient from its own words alone": [
            d_logits[..., m] @ weight[m].detach() for m in mine
        ],
        f"it {twice}": [n * dx] * n,
    }
    attempt.same("gradient of x", each(run, "dx"), [dx] * n, ranks=n, suspects=suspects)
    want = [dw[m] for m in mine]
    suspects = {"every rank holds the whole head": [dw] * n, f"it {twice}": [n * w for w in want]}
    attempt.same("gradient of the weight", each(run, "dw"), want, ranks=n, suspects=suspects)
    attempt.at_most(
        "bytes of weights that rank 0 still holds", run.values[0]["held"], 8 * D * R,
        formula="8 D ceil(V/n)", because="a slice is a view, and keeps all of its tensor alive",
    )  # fmt: skip
    wire = {
        direction: round(sum(wire_bytes(call[0], call[2], n) for call in run.values[0][direction]))
        for direction in ("forward", "backward")
    }
    because = "all_gather the logits, padded: nobody else has a rank's, there is nothing to add up"
    what, formula = "bytes that rank 0 sends in forward", "(n-1) 8 B T ceil(V/n)"
    attempt.equal(what, wire["forward"], (n - 1) * 8 * 6 * R, formula, because)
    because = "only x needs a sum: every rank computes the same loss and has all of its gradient"
    what, formula = "bytes that rank 0 sends in backward", "2(n-1)/n 8 B T D"
    want = round(wire_bytes("all_reduce", x.nbytes, n))
    attempt.equal(what, wire["backward"], want, formula, because)
