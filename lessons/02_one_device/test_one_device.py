"""What lesson 02 asks for, as tests: all on one device; sizes and values come from the seed."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis
from picotron_lab.ledger import CommError

LESSON = Lesson(
    title="One device",
    builds="where memory goes, gradients of micro-batches, and activations computed twice",
    allowed=(),
)
IGNORED = -100
RANDOM_STATE = 5056  # bytes of torch's generator on CPU, with room to spare below
OWN = 1024  # bytes of small tensors that a program may have beside the large ones
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
CASES = [(dtype, name) for dtype in DTYPES for name in ("adamw", "sgd")]


# ---- 02.1


def predict_state(axis: Axis, student: ModuleType, parameters: int) -> dict[str, dict[str, int]]:
    """What the student says of every dtype and optimizer."""
    return {
        f"{dtype} and {name}": student.state_bytes(parameters, dtype, name) for dtype, name in CASES
    }


def _measured(parameters: int, dtype: str, name: str) -> dict[str, int]:
    """What is there after a step in mixed precision."""
    weight = nn.Parameter(torch.ones(parameters, dtype=DTYPES[dtype]))
    wide = weight.grad_dtype = torch.promote_types(weight.dtype, torch.float32)
    weight.square().sum().backward()
    narrow = weight.dtype != wide
    master = nn.Parameter(weight.detach().to(wide)) if narrow else weight
    master.grad = weight.grad
    state = [master.grad * 0.1, master.grad**2 * 0.05] if name == "adamw" else []
    with torch.no_grad():  # AdamW's first step, or one of SGD
        master -= 0.1 * (master.grad.sign() if state else master.grad)
        weight.copy_(master)
    return {
        "weights": weight.nbytes,
        "gradients": weight.grad.nbytes,
        "masters": master.nbytes if narrow else 0,
        "moments": sum(x.nbytes for x in state),
    }


@task("02.1", points=2, minutes=10, core=True, compare="picotron_lab.analysis.parameters:state")
def test_state(attempt: Any) -> None:
    """What stays on the device, in bytes."""
    parameters = attempt.rng.randint(100, 999)
    want = {f"{dtype} and {name}": _measured(parameters, dtype, name) for dtype, name in CASES}
    got = attempt.run(predict_state, 1, parameters).values[0]

    def parts(found: dict, part: str) -> list:
        """Of every case; None where it is missing."""
        return [one.get(part) if isinstance(one, dict) else None for one in found.values()]

    guesses = {  # one part of some cases has so many bytes per parameter
        "gradients of 16 bit: small terms would be lost when micro-batches add up, so they are "
        "float32": ("bfloat16", "gradients", 2),
        "no float32 copies: an update that is small beside a weight of 16 bit would be lost":
            ("bfloat16", "masters", 0),
        "only bfloat16 weights need a float32 copy": ("", "masters", 4),
        "moments of 16 bit: the optimizer steps the float32 masters, so they are float32":
            ("bfloat16 and adamw", "moments", 4),
    }  # fmt: skip
    suspects = {}
    for sentence, (cases, part, each) in guesses.items():
        wrong = [
            each * parameters if name.startswith(cases) else one[part] for name, one in want.items()
        ]
        if parts(got, part) == wrong:  # whatever the other parts are
            suspects[sentence] = got
    attempt.same(f"bytes of {parameters} parameters", got, want, suspects=suspects)
    for name, words in (("adamw", "2 + 4 + 4 + 8"), ("sgd", "2 + 4 + 4")):
        case = f"bfloat16 and {name}"
        each, right = (sum(found[case].values()) // parameters for found in (got, want))
        attempt.equal(f"bytes per parameter, {case}", each, right, words)


# ---- 02.2


class Gated(nn.Module):
    """Two linear layers, with a view that keeps more than it shows, and two dtypes."""

    def __init__(self, D: int, F: int):
        super().__init__()
        self.first = nn.Linear(D, 3 * F, bias=False, dtype=torch.float64)
        self.down = nn.Linear(F, D, bias=False, dtype=torch.float64)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate, up, _ = self.first(x_ND).chunk(3, -1)
        y_ND = self.down(functional.silu(gate) * up)
        return (y_ND * y_ND).float().tanh().double().sum()


def count_saved(axis: Axis, student: ModuleType, N: int, D: int, F: int) -> dict[str, Any]:
    """What the student counts; and whether backward still works then."""
    model, x_ND = Gated(D, F), torch.ones(N, D, dtype=torch.float64)
    losses = []

    def forward() -> Tensor:
        losses.append(model(x_ND))
        return losses[-1]

    counted = student.saved_bytes(forward, list(model.parameters()))
    return {"bytes": counted, "runs": len(losses)}


@task("02.2", points=4, minutes=15, compare="picotron_lab.analysis.meter:Meter")
def test_saved(attempt: Any) -> None:
    """What forward leaves for backward, in bytes."""
    N, D, F = attempt.rng.randint(5, 9), attempt.rng.choice([3, 7]), attempt.rng.choice([4, 5])
    run = attempt.run(count_saved, 1, N, D, F)
    # x and y; the result of the first layer, silu(gate), their product; tanh in float32
    want = 8 * (2 * N * D + 5 * N * F) + 4 * N * D
    twice = want + 8 * N * D + 24 * N * F, want + 8 * N * D - 8 * N * F
    seen = want - 8 * N * F, want - 16 * N * F
    guesses = {
        "the weight of `down` is counted: what is kept is a view of it, so compare storages, not "
        "tensors": [8 * F * D + found for found in (want, *twice, *seen)],
        "a tensor that is kept twice, as in y * y, is one storage: it counts once": twice,
        "a view keeps its whole storage alive, also the third that nobody uses": seen,
        "8 bytes for every element: a float32 has 4 (element_size)": [want + 4 * N * D],
    }
    suspects = {
        sentence: run.values[0]
        for sentence, values in guesses.items()
        if run.values[0]["bytes"] in values
    }
    attempt.same(
        f"with N {N}, D {D}, F {F}, kept", run.values[0], {"bytes": want, "runs": 1},
        suspects=suspects,
    )  # fmt: skip
    attempt.equal("bytes kept", run.values[0]["bytes"], want, "8 (2 N D + 5 N F) + 4 N D")


# ---- 02.3


class Tiny(nn.Module):
    """Tokens to the sum of the losses of the labels that count."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.embed, self.head = (nn.Parameter(w.clone()) for w in weights)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        logits = functional.linear(functional.embedding(tokens_BT, self.embed).tanh(), self.head)
        return functional.cross_entropy(
            logits.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )


def gradients(
    axis: Axis, student: ModuleType, weights: list[Tensor], batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Loss, gradients, and the most bytes that were alive meanwhile."""
    model = Tiny(weights)
    with Meter() as meter:
        loss = student.accumulate(model, batches)
    grads = [p.grad for p in model.parameters()]
    return {"loss": loss, "gradients": grads, "peak": meter.peak_bytes}


def _peak_of_one(weights: list[Tensor], batch: tuple[Tensor, Tensor]) -> int:
    """The most bytes that forward and backward of one micro-batch take."""
    model = Tiny(weights)
    with Meter() as meter:
        model(*batch).backward()
    return meter.peak_bytes


def _reference(weights: list[Tensor], batches: list, divisors: list[float]) -> dict[str, Any]:
    """Loss and gradients if the sum of each micro-batch is divided by that."""
    model = Tiny(weights)
    losses = [model(*batch) / d for batch, d in zip(batches, divisors, strict=True)]
    total = torch.stack(losses).sum()
    total.backward()
    return {"loss": total.item(), "gradients": [p.grad for p in model.parameters()]}


def _batches(attempt: Any, count: int, words: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of different numbers of counted tokens, at least one each."""
    found = []
    for _ in range(count):
        tokens, labels = torch.randint(words, (2, 2, 24), generator=attempt.generator)
        ignored = attempt.rng.uniform(0.1, 0.8)
        labels[torch.rand(2, 24, generator=attempt.generator) < ignored] = IGNORED
        labels[0, 0] = 0
        found.append((tokens, labels))
    return found


@task(
    "02.3", points=4, minutes=15, core=True,
    compare="picotron_lab.trainer:Trainer.compute_gradients",
)  # fmt: skip
def test_accumulate(attempt: Any) -> None:
    """Micro-batches give the gradient of the whole batch."""
    count, words = attempt.rng.randint(5, 7), attempt.rng.choice([7, 11])
    size = (words, attempt.rng.choice([3, 5]))
    weights = [
        torch.randn(size, generator=attempt.generator, dtype=torch.float64) for _ in range(2)
    ]
    batches = _batches(attempt, count, words)
    run = attempt.run(gradients, 1, weights, batches)
    counts = [int((labels != IGNORED).sum()) for _, labels in batches]
    total, positions = sum(counts), sum(labels.numel() for _, labels in batches)
    means = _reference(weights, batches, [n * count for n in counts])
    suspects = {
        "a mean of means: micro-batches with few counted tokens weigh too much. Divide every sum "
        "by the counted tokens of the whole batch": means,
        "divided by all positions: labels of -100 do not count": (
            _reference(weights, batches, [positions] * count)
        ),
        "only the last micro-batch is there: gradients add up in .grad": (
            _reference(weights, batches[-1:], [total])
        ),
        "divided by the number of micro-batches, not by that of counted tokens": (
            _reference(weights, batches, [count] * count)
        ),
    }
    factors = {total: "counted tokens", count: "micro-batches"}
    want = _reference(weights, batches, [total] * count)
    _check_gradients(attempt, run.values[0], want, factors, suspects)
    tokens, _ = batches[-1]
    empty = [*batches[:-1], (tokens, torch.full_like(tokens, IGNORED))]
    again = attempt.run(gradients, 1, weights, empty).values[0]
    want = _reference(weights, empty, [total - counts[-1]] * count)
    _check_gradients(attempt, again, want, {}, {}, "without a counted token in one micro-batch, ")
    one, state = _peak_of_one(weights, batches[0]), sum(w.nbytes for w in weights)
    attempt.at_most(
        "most bytes alive", run.values[0]["peak"], one + 2 * state + OWN,
        "forward and backward of one micro-batch + 2 x gradients + 1 KiB",
        because="the graphs of several micro-batches are alive at once, or they were joined into "
        "one: call backward on each",
    )  # fmt: skip


def _check_gradients(
    attempt: Any, got: dict, want: dict, factors: dict, suspects: dict, case: str = ""
) -> None:
    for key in ("gradients", "loss"):
        wrong = {sentence: one[key] for sentence, one in suspects.items()}
        attempt.same(case + key, got[key], want[key], factors=factors, suspects=wrong)


# ---- 02.4


class Block(nn.Module):
    """x + dropout(down(tanh(up(x)))), which counts its runs."""

    def __init__(self, up_FD: Tensor, down_DF: Tensor):
        super().__init__()
        self.up, self.down, self.runs = nn.Parameter(up_FD), nn.Parameter(down_DF), 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        self.runs += 1
        hidden = functional.linear(x_BTD, self.up).tanh()
        return x_BTD + functional.dropout(functional.linear(hidden, self.down), 0.4)


def recomputed(
    axis: Axis, student: ModuleType, x_BTD: Tensor, weights: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Blocks, each recomputed by the student."""

    def run(block: Block, x_BTD: Tensor) -> Tensor:
        y_BTD = student.recompute(block, x_BTD)
        if not isinstance(y_BTD, Tensor):
            raise CommError(f"recompute returned {short(y_BTD)}, a tensor is wanted")
        if not y_BTD.requires_grad:
            raise CommError("recompute returned a tensor without a graph: backward stops there")
        return y_BTD

    return _train(run, x_BTD, weights)


def _with_other_masks(x_BTD: Tensor, weights: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Gradients if each block, the last one first, runs again with the next random numbers."""
    blocks = [Block(up.clone(), down.clone()) for up, down in weights]
    torch.manual_seed(7)
    inputs = [x_BTD]
    with torch.no_grad():
        for block in blocks:
            inputs.append(block(inputs[-1]))
    grad_BTD = 2 * inputs.pop()
    for block in reversed(blocks):
        x_BTD = inputs.pop().clone().requires_grad_()
        (block(x_BTD) * grad_BTD).sum().backward()
        grad_BTD = x_BTD.grad
    grads = [p.grad for block in blocks for p in block.parameters()]
    return {"gradient of x": grad_BTD, "gradients": grads}


def _train(run: Any, x_BTD: Tensor, weights: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Forward and backward of all blocks: gradients, what was kept, what chance gives next."""
    blocks = [Block(up.clone(), down.clone()) for up, down in weights]
    x_BTD = x_BTD.clone().requires_grad_()
    torch.manual_seed(7)
    with Meter() as meter:
        y_BTD = x_BTD
        for block in blocks:
            y_BTD = run(block, y_BTD)
        kept = meter.live_bytes
    result = y_BTD.detach().clone()
    y_BTD.square().sum().backward()
    return {
        "result": result,
        "gradient of x": x_BTD.grad,
        "gradients": [p.grad for block in blocks for p in block.parameters()],
        "next random numbers": torch.rand(3, dtype=torch.float64),
        "kept": kept,
        "runs": max(block.runs for block in blocks),
    }


@task("02.4", points=5, minutes=20, compare="picotron_lab.recompute:RunTwice")
def test_recompute(attempt: Any) -> None:
    """Activations are computed twice, with the same dropout."""
    depth, B, T, D = attempt.rng.randint(2, 4), 3, attempt.rng.choice([21, 25]), 16
    x = torch.randn(B, T, D, generator=attempt.generator, dtype=torch.float64)
    weights = [
        tuple(torch.randn(4 * D, D, generator=attempt.generator, dtype=torch.float64) / 8
              for _ in range(2))
        for _ in range(depth)
    ]  # fmt: skip
    weights = [(up, down.T.contiguous()) for up, down in weights]
    with torch.random.fork_rng():
        want = _train(lambda block, x_BTD: block(x_BTD), x, weights)
        wrong = _with_other_masks(x, weights)
    got = attempt.run(recomputed, 1, x, weights).values[0]
    sentence = "the second run drew another dropout mask: give it the random state of the first one"
    attempt.same("result", got["result"], want["result"])
    forgotten = "the parameters got no gradient: torch.autograd.backward fills .grad, grad does not"
    for key in ("gradient of x", "gradients"):
        suspects = {sentence: wrong[key], forgotten: [None] * len(want[key])}
        attempt.same(key, got[key], want[key], suspects=suspects)
    key = "next random numbers"
    sentence = "the second run moved the random state: put it back as backward found it"
    elsewhere = {sentence: got[key]} if got[key].tolist() != want[key].tolist() else {}
    attempt.same(key, got[key], want[key], suspects=elsewhere)
    limit = depth * (x.nbytes + 2 * RANDOM_STATE)
    attempt.at_most(
        "bytes kept between forward and backward", got["kept"], limit,
        "layers x (x and random state)",
        because="the graph of the module was built: run it without one in forward",
    )  # fmt: skip
    attempt.equal(
        "runs of a module", got["runs"], 2, "once in forward, once in backward",
        because="a third run costs another forward",
    )  # fmt: skip
