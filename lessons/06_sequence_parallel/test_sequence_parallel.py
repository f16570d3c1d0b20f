"""Lesson 06: what your sequence parallelism must do. All numbers are float64.

S is the bytes of [B, T, D]. A program runs on every rank with your functions as `student`.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lessons.kit import Lesson, task
from picotron_lab import sharding, tensor_parallel
from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.ledger import wire_bytes
from picotron_lab.model import Block, rotary_angles
from picotron_lab.sequence_parallel import SequenceCrossing

LESSON = Lesson(
    title="Sequence parallelism",
    builds="the two borders of a tensor-parallel region whose outside holds 1/n of the tokens, at "
    "no more traffic and with 1/n of the saved activations",
    allowed=("picotron_lab.comm", "picotron_lab.model"),
)
TWICE = (
    "an all_reduce sends twice what a reduce_scatter or an all_gather does, and one transfer "
    "serves all weights that share x"
)


def draw(attempt: Any, *shape: int) -> Tensor:
    """Random float64 numbers of this attempt."""
    return torch.randn(shape, generator=attempt.generator, dtype=torch.float64)


def own(x_BTD: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens, a copy."""
    return x_BTD.chunk(axis.size, 1)[axis.rank].clone()


def sent(axis: Axis, since: int = 0) -> list[tuple[str, int]]:
    """(operation, payload bytes) of this rank's calls, those after the first `since`."""
    return [(call.op, call.bytes) for call in axis.ledger.calls[since:]]


def each(run: Any, key: str) -> list[Any]:
    """One result of all ranks."""
    return [value[key] for value in run.values]


def few_bytes(attempt: Any, run: Any, direction: str, transfers: list[str], S: int) -> None:
    """What a ring makes rank 0 send is no more than these transfers of S need."""
    n, calls = len(run.values), run.values[0][direction]
    wire = round(sum(wire_bytes(op, payload, n) for op, payload in calls))
    limit = round(sum(wire_bytes(op, S, n) for op in transfers))
    what = f"bytes that rank 0 sends in {direction}, in {len(calls)} call{'s' * (len(calls) > 1)}"
    formula = f"{len(transfers)} (n-1)/n S: {' and '.join(transfers)}"
    attempt.at_most(what, wire, limit, formula=formula, because=TWICE)


# ---- 06.1


def crossed(axis: Axis, student: ModuleType, x: Tensor, terms: Tensor, gain: Tensor) -> dict:
    """A region where each rank multiplies all tokens by a matrix of its own."""
    x_BtD = own(x, axis).requires_grad_()
    y_BtD = student.leave(torch.tanh(student.enter(x_BtD, axis) @ terms[axis.rank]), axis)
    forward = sent(axis)
    if y_BtD.requires_grad:
        (y_BtD * own(gain, axis)).sum().backward()
    found = {"y": y_BtD.detach(), "dx": x_BtD.grad}
    return found | {"forward": forward, "backward": sent(axis, len(forward))}


@task("06.1", 4, 15, core=True, compare="picotron_lab.sequence_parallel:Gather")
def test_borders(attempt: Any) -> None:
    """The two borders of a region."""
    B, D, t, n = (attempt.rng.choice(sizes) for sizes in ([2, 3], [5, 7], [2, 3], [3, 4, 5]))
    T = n * t
    x, terms, gain = draw(attempt, B, T, D), draw(attempt, n, D, D), draw(attempt, B, T, D)
    run = attempt.run(crossed, n, x, terms, gain)
    leaves = [x.clone().requires_grad_() for _ in range(n)]
    ys = [torch.tanh(leaf @ term) for leaf, term in zip(leaves, terms, strict=True)]
    grads = torch.autograd.grad(sum((y * gain).sum() for y in ys), leaves)
    ys = [y.detach() for y in ys]
    joined = torch.cat(x.chunk(n, 1)).reshape(x.shape)
    mixed = [*sum(torch.tanh(joined @ term) for term in terms).chunk(n, 1)]
    suspects = {
        "leave sent nothing: each rank has its own term alone, for its tokens": own_parts(ys),
        "leave left all tokens everywhere": [sum(ys)] * n,
        "sequences of the batch are mixed up: the verbs join dim 0, where x has its batch": mixed,
    }
    want = [*sum(ys).chunk(n, 1)]
    attempt.same("output", each(run, "y"), want, ranks=n, suspects=suspects)
    suspects = {
        "backward of enter kept this rank's tokens of its own term: add those of all terms":
            own_parts(grads),
        "no gradient came back: a collective is not seen by autograd, write a torch.autograd."
        "Function around it": [None] * n,
    }  # fmt: skip
    want = [*sum(grads).chunk(n, 1)]
    attempt.same("gradient of x", each(run, "dx"), want, ranks=n, suspects=suspects)
    for direction in ("forward", "backward"):
        few_bytes(attempt, run, direction, ["all_gather", "reduce_scatter"], x.nbytes)


def own_parts(wholes: list[Tensor]) -> list[Tensor]:
    """Of the tensor of each rank, the tokens of that rank."""
    n = len(wholes)
    return [whole.chunk(n, 1)[rank] for rank, whole in enumerate(wholes)]


# ---- 06.2


@dataclass
class Columns:
    """x [B, T, D]; for each rank, weights [F, D] and how much each result counts [B, T, F]."""

    x: Tensor
    weights: list[list[Tensor]]
    gains: list[list[Tensor]]


def entered(axis: Axis, student: ModuleType, case: Columns) -> dict:
    """Several matmuls of one x; what lives between forward and backward."""
    x_BtD = own(case.x, axis).requires_grad_()
    weights = [nn.Parameter(w.clone()) for w in case.weights[axis.rank]]
    with Meter() as meter:
        ys = list(student.column(x_BtD, weights, axis))
    saved = meter.live_bytes - sum(y.nbytes for y in ys)
    forward = sent(axis)
    gains = case.gains[axis.rank]
    loss = sum((y * gain).sum() for y, gain in zip(ys, gains, strict=True))
    if loss.requires_grad:
        loss.backward()
    found = {"y": [y.detach() for y in ys], "dx": x_BtD.grad, "dw": [w.grad for w in weights]}
    return found | {"saved": saved, "forward": forward, "backward": sent(axis, len(forward))}


def make_columns(attempt: Any) -> tuple[Columns, int]:
    """Three weights of different widths on each rank."""
    D, t, n = (attempt.rng.choice(sizes) for sizes in ([5, 6], [2, 3], [3, 4, 5]))
    B, T, widths = 2, n * t, (4, 1, 3)
    weights = [[draw(attempt, F, D) for F in widths] for _ in range(n)]
    gains = [[draw(attempt, B, T, F) for F in widths] for _ in range(n)]
    return Columns(draw(attempt, B, T, D), weights, gains), n


@task("06.2", 3, 20, compare="picotron_lab.sequence_parallel:Column")
def test_saved_shard(attempt: Any) -> None:
    """Save a shard, gather twice."""
    case, n = make_columns(attempt)
    run = attempt.run(entered, n, case)
    x, S = case.x.clone().requires_grad_(), case.x.nbytes
    wholes = [[w.clone().requires_grad_() for w in ws] for ws in case.weights]
    ys = [[x @ w.T for w in ws] for ws in wholes]
    pairs = [(y, g) for mine, gains in zip(ys, case.gains, strict=True)
             for y, g in zip(mine, gains, strict=True)]  # fmt: skip
    sum((y * g).sum() for y, g in pairs).backward()
    want = [[y.detach() for y in mine] for mine in ys]
    attempt.same("x W^T", each(run, "y"), want, ranks=n)
    attempt.same("gradient of x", each(run, "dx"), [*x.grad.chunk(n, 1)], ranks=n)
    dws = [[w.grad for w in ws] for ws in wholes]
    few = "the weights learned from this rank's tokens alone: their gradient needs all of x"
    suspects = {few: [
        [torch.einsum("btf,btd->fd", g.chunk(n, 1)[r], case.x.chunk(n, 1)[r]) for g in gains]
        for r, gains in enumerate(case.gains)
    ]}  # fmt: skip
    attempt.same("gradients of weights", each(run, "dw"), dws, ranks=n, suspects=suspects)
    attempt.at_most(
        "bytes alive between forward and backward", max(each(run, "saved")), S // n, formula="S/n",
        because="the x of all tokens is kept for backward: save the own tokens, gather them again",
    )  # fmt: skip
    few_bytes(attempt, run, "forward", ["all_gather"], S)
    few_bytes(attempt, run, "backward", ["all_gather", "reduce_scatter"], S)


# ---- 06.3


@dataclass
class Stack:
    """Two blocks with their weights. The second's first norm is that of the first, and one norm is
    frozen."""

    cfg: ModelConfig
    states: list[dict[str, Tensor]]
    frozen: str
    x: Tensor
    gain: Tensor


def plain_blocks(case: Stack) -> nn.ModuleList:
    """The blocks of one device."""
    blocks = nn.ModuleList(Block(case.cfg, 0, 0.0) for _ in range(2)).double()
    for block, state in zip(blocks, case.states, strict=True):
        block.load_state_dict(state)
    blocks[1].attention_norm.weight = blocks[0].attention_norm.weight
    blocks.get_submodule(case.frozen).weight.requires_grad_(False)
    return blocks


def through(case: Stack, blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """x through both; positions are those of all tokens."""
    where = Where.first(torch.zeros(case.x.shape[:2], dtype=torch.long))
    angles = rotary_angles(where.positions_T, case.cfg.head_width, 1e4)
    for block in blocks:
        x = block(x, angles, where)
    return x


def finished(axis: Axis, student: ModuleType, case: Stack) -> dict:
    """The library's regions, your last step."""
    blocks, crossing = plain_blocks(case), SequenceCrossing(axis)
    sharding.attach(blocks)
    kv = axis.split("kv", [[rank] for rank in range(axis.size)])
    for block in blocks:
        block.attention = tensor_parallel.ParallelAttention(block.attention, kv, crossing)
        block.mlp = tensor_parallel.ParallelMLP(block.mlp, crossing)
    y_BtD = through(case, blocks, own(case.x, axis))
    (y_BtD * own(case.gain, axis)).sum().backward()
    before = len(axis.ledger.calls)
    student.finish_gradients(blocks, axis)
    found = {name: p.grad for name, p in blocks.named_parameters()}
    return {
        "norms": {name: grad for name, grad in found.items() if "norm" in name},
        "down": [block.mlp.down.weight.grad for block in blocks],
        "sent": sent(axis, before),
    }


def make_stack(attempt: Any) -> tuple[Stack, int]:
    """Widths of which each rank has the same share."""
    norms = ["0.mlp_norm", "1.mlp_norm"]
    frozen, t, n = (attempt.rng.choice(some) for some in (norms, [2, 3], [3, 4, 5]))
    B, T, D = 2, n * t, 2 * n
    cfg = ModelConfig(vocab_size=1, hidden_size=D, heads=n, kv_heads=n, ffn_size=2 * n)
    shapes = {name: p.shape for name, p in Block(cfg, 0, 0.0).named_parameters()}
    states = [{name: draw(attempt, *s) / 2 for name, s in shapes.items()} for _ in range(2)]
    return Stack(cfg, states, frozen, draw(attempt, B, T, D), draw(attempt, B, T, D)), n


def by_token(case: Stack) -> dict[str, Tensor | None]:
    """Gradients of the norms of one device, [T, D]: what each token contributes."""
    blocks = plain_blocks(case)
    norms = {name: p for name, p in blocks.named_parameters() if "norm" in name}
    wide = {p: nn.Parameter(p.detach().expand(case.x.shape[1], -1).clone(), p.requires_grad)
            for p in norms.values()}  # fmt: skip
    for block in blocks:
        for norm in (block.attention_norm, block.mlp_norm):
            norm.weight = wide[norm.weight]
    (through(case, blocks, case.x) * case.gain).sum().backward()
    return {name: wide[p].grad for name, p in norms.items()}


@task("06.3", 3, 10, compare="picotron_lab.sharding:reduce_gradients")
def test_norm_gradients(attempt: Any) -> None:
    """Gradients of what saw own tokens only."""
    case, n = make_stack(attempt)
    run = attempt.run(finished, n, case)
    blocks = plain_blocks(case)
    (through(case, blocks, case.x) * case.gain).sum().backward()
    norms = {name: p.grad for name, p in blocks.named_parameters() if "norm" in name}
    tokens = by_token(case)
    local = [
        {k: None if g is None else g.chunk(n)[rank].sum(0) for k, g in tokens.items()}
        for rank in range(n)
    ]
    tied = "0.attention_norm.weight"
    suspects = {
        "nothing was added up: a norm's gradient comes from this rank's tokens alone, so that its "
        "replicas drift apart": local,
        "the norm that two blocks share was added up twice": [
            norms | {tied: n * norms[tied]}
        ] * n,
    }  # fmt: skip
    what = "gradients of the norms"
    attempt.same(what, each(run, "norms"), [norms] * n, ranks=n, suspects=suspects)
    downs = [block.mlp.down.weight.grad for block in blocks]
    want = [[down.chunk(n, 1)[rank] for down in downs] for rank in range(n)]
    added = [[sum(down.chunk(n, 1)) for down in downs]] * n
    sentence = "the shards of different ranks were added up, too: each is whole for its columns"
    suspects = {sentence: added}
    attempt.same("gradients of mlp.down", each(run, "down"), want, ranks=n, suspects=suspects)
    calls, numbers = run.values[0]["sent"], sum(g.numel() for g in norms.values() if g is not None)
    because = "they are few and small: send them in one flat tensor"
    attempt.equal("calls on rank 0", len(calls), 1, formula="one for all", because=because)
    payload, because = sum(call[1] for call in calls), "the shards need not travel"
    formula = "8 bytes per number of norms that can learn"
    attempt.equal("payload bytes on rank 0", payload, 8 * numbers, formula, because)
