"""Lesson 07: what your vocabulary parallelism must do. All numbers are float64.

A program runs on every rank with your functions as `student`; a Watch notes the largest tensor that
is made on the way, and counts matmuls and whatever else reads all logits or w.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab.comm import Axis
from picotron_lab.ledger import CommError
from picotron_lab.model import IGNORED

LESSON = Lesson(
    title="Vocabulary parallelism",
    builds="an embedding, and a loss with its gradients, of which no rank ever sees all logits: "
    "first with three barriers, then with one",
    allowed=("picotron_lab.comm", "picotron_lab.model"),
)
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
LOGITS = "logits never travel: three numbers per token of each rank say all that a softmax needs"


class Watch(TorchDispatchMode):
    """Bytes of the largest storage that an operation returns, and how many passes there were:
    matmuls, and operations that read a storage of so many `numbers`."""

    def __init__(self, numbers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.sizes = [8 * n for n in numbers]
        self.largest = self.passes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 1.5 s

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        results = func(*args, **(kwargs or {}))
        read = [x.untyped_storage().nbytes() in self.sizes for x in args if isinstance(x, Tensor)]
        self.passes += any(read) or func.overloadpacket.__name__ in MATMULS
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return results


@dataclass
class Case:
    """x [N, D]; labels [N]; the whole weight [V, D]; R words for each rank but the last."""

    x: Tensor
    labels: Tensor
    weight: Tensor
    R: int
    ranks: int

    def rows(self, rank: int) -> slice:
        """This rank's words."""
        return slice(rank * self.R, min((rank + 1) * self.R, len(self.weight)))

    def parts(self, whole: Tensor) -> list[Tensor]:
        """[V, ...] cut as the words are."""
        return [whole[self.rows(rank)] for rank in range(self.ranks)]


def draw(attempt: Any, *shape: int) -> Tensor:
    """Random float64 numbers of this attempt."""
    return torch.randn(shape, generator=attempt.generator, dtype=torch.float64)


def make_case(attempt: Any) -> Case:
    """The last rank has fewer words; some labels are ignored; logits lie around 800, for the first
    number of x and of every word is large."""
    N, D, R, n = (attempt.rng.choice(s) for s in ([14, 17], [5, 6], [16, 19], [3, 4, 5]))
    V = n * R - attempt.rng.choice([1, 2])
    labels = torch.randint(V, (N,), generator=attempt.generator)
    labels[torch.randperm(N, generator=attempt.generator)[:3]] = IGNORED
    weight = draw(attempt, V, D)
    weight[:, 0] = 20
    return Case(draw_x(attempt, N, D), labels, weight, R, n)


def draw_x(attempt: Any, N: int, D: int) -> Tensor:
    """Inputs of the output layer."""
    x_ND = draw(attempt, N, D)
    x_ND[:, 0] = 40
    return x_ND


def sent(axis: Axis, since: int = 0) -> list[tuple[str, int]]:
    """(operation, payload bytes) of this rank's calls, those after the first `since`."""
    return [(call.op, call.bytes) for call in axis.ledger.calls[since:]]


def tensors(name: str, found: Any, count: int = 1) -> Any:
    """What `name` returned, if it is so many tensors. Raises CommError with a sentence."""
    items = found if isinstance(found, tuple | list) else [found]
    if len(items) != count or not all(isinstance(x, Tensor) for x in items):
        wanted = "a tensor is" if count == 1 else f"{count} tensors are"
        raise CommError(f"{name} returned {', '.join(map(short, items))}; {wanted} wanted")
    return found


def each(run: Any, key: str) -> list[Any]:
    """One result of all ranks."""
    return [value[key] for value in run.values]


def total(calls: list[tuple[str, int]]) -> int:
    """Payload bytes."""
    return sum(call[1] for call in calls)


# ---- 07.1


def looked_up(axis: Axis, student: ModuleType, case: Case, tokens: Tensor, gain: Tensor) -> dict:
    """Look up, and learn."""
    rows = case.rows(axis.rank)
    w_RD = nn.Parameter(case.weight[rows].clone())
    x_BTD = tensors("embed", student.embed(tokens, w_RD, rows.start, axis))
    forward = sent(axis)
    if x_BTD.requires_grad:
        (x_BTD * gain).sum().backward()
    found = {"x": x_BTD.detach(), "dw": w_RD.grad}
    return found | {"forward": forward, "backward": sent(axis, len(forward))}


@task("07.1", 2, 10, core=True, compare="picotron_lab.vocab_parallel:VocabEmbedding")
def test_embedding(attempt: Any) -> None:
    """An embedding, cut by words."""
    case = make_case(attempt)
    n = case.ranks
    tokens = torch.randint(len(case.weight), (2, 13), generator=attempt.generator)
    gain = draw(attempt, 2, 13, case.x.shape[1])
    run = attempt.run(looked_up, n, case, tokens, gain)
    weight = case.weight.clone().requires_grad_()
    x = F.embedding(tokens, weight)
    (x * gain).sum().backward()
    x, starts = x.detach(), range(0, len(weight), case.R)
    clamped = sum(
        F.embedding((tokens - start).clamp(0, len(part) - 1), part)
        for start, part in zip(starts, case.parts(case.weight), strict=True)
    )
    alone = [x * ((tokens >= start) & (tokens < start + case.R))[..., None] for start in starts]
    suspects = {
        "nothing was added up: tokens of other ranks' words are zeros": alone,
        "every rank gave a row for every token: words of other ranks must count as zeros":
            [clamped] * n,
    }  # fmt: skip
    attempt.same("embedded tokens", each(run, "x"), [x] * n, ranks=n, suspects=suspects)
    dws = case.parts(weight.grad)
    suspects = {
        "n times too large: backward summed the gradient, which every rank already has whole":
            [n * dw for dw in dws],
        "no gradient came back: a collective is not seen by autograd": [None] * n,
    }  # fmt: skip
    attempt.same("gradient of the rows", each(run, "dw"), dws, ranks=n, suspects=suspects)
    forward, backward = run.values[0]["forward"], run.values[0]["backward"]
    because = "the table stays where it is: add up the rows that were looked up"
    what = "payload bytes in forward on rank 0"
    attempt.at_most(what, total(forward), x.nbytes, "8 B T D, one all_reduce", because)
    because = "every rank has the gradient of all embedded tokens: its rows take what is theirs"
    attempt.equal("calls in backward on rank 0", len(backward), 0, "none", because=because)


# ---- 07.2


def naive(axis: Axis, student: ModuleType, case: Case) -> dict:
    """Loss and gradients in one go."""
    given = own_tensors(axis, case)
    with Watch() as watch:
        found = student.three_barriers(*given, case.rows(axis.rank).start, axis)
        loss, dx, dw = tensors("three_barriers", found, 3)
    found = {"loss": loss, "dx": dx, "dw": dw, "sent": sent(axis)}
    return found | {"largest": watch.largest}


def own_tensors(axis: Axis, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, this rank's rows of the weight, labels: copies, for ranks may change theirs."""
    return case.x.clone(), case.weight[case.rows(axis.rank)].clone(), case.labels.clone()


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradients of x and of the weight, and [N, V] gradients of the logits."""
    x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    y = x @ weight.T
    loss = F.cross_entropy(y, case.labels, ignore_index=IGNORED, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, [x, weight, y])


def same_gradients(attempt: Any, run: Any, case: Case, batch: int | None = None) -> None:
    """Loss, dx and dw of all ranks against one device."""
    n, (loss, dx, dw, dy) = case.ranks, reference(case)
    key, of = ("", "") if batch is None else (str(batch), f" of micro-batch {batch}")
    suspects = {sentence: [wrong] * n for sentence, wrong in wrong_losses(case).items()}
    attempt.same(f"loss{of}", each(run, f"loss{key}"), [loss] * n, ranks=n, suspects=suspects)
    wrong = wrong_logits(case)
    suspects = {sentence: [dy @ case.weight] * n for sentence, dy in wrong.items()}
    suspects["each rank has the gradient from its own words alone: their sum is that of x"] = [
        dy[:, case.rows(rank)] @ part for rank, part in enumerate(case.parts(case.weight))
    ]
    what = f"gradient of x{of}"
    attempt.same(what, each(run, f"dx{key}"), [dx] * n, ranks=n, suspects=suspects)
    suspects = {sentence: case.parts(dy.T @ case.x) for sentence, dy in wrong.items()}
    what = f"gradient of w{of}"
    attempt.same(what, each(run, f"dw{key}"), case.parts(dw), ranks=n, suspects=suspects)


def wrong_losses(case: Case) -> dict[str, Tensor]:
    """What likely mistakes would give."""
    y, counted = case.x @ case.weight.T, case.labels != IGNORED
    picked = y.gather(1, case.labels.clamp(min=0)[:, None])[:, 0] * counted
    most = y.amax(1)
    sums = sum((part - part.amax(1)[:, None]).exp().sum(1) for part in y.split(case.R, 1))
    endless = torch.tensor(float("inf"), dtype=torch.float64)
    overflows = "exp of a large logit overflows: subtract the largest logit of all ranks first"
    return {
        "ignored labels count in the loss": (y.logsumexp(1) - picked).sum(),
        "sums that are relative to different largest logits were added: bring each to the largest "
        "of all by exp(own - largest)": (sums.log() + most - picked)[counted].sum(),
        overflows: endless, f"{overflows} (inf - inf)": endless - endless,
    }  # fmt: skip


def wrong_logits(case: Case) -> dict[str, Tensor]:
    """Gradients of the logits after likely mistakes, [N, V]."""
    y, counted = case.x @ case.weight.T, (case.labels != IGNORED)[:, None]
    softmax, V = y.softmax(1) * counted, len(case.weight)
    label = F.one_hot(case.labels.clamp(min=0), V) * counted
    anywhere, share = [], []
    for rank in range(case.ranks):
        rows = case.rows(rank)
        local = (case.labels - rows.start).clamp(0, rows.stop - rows.start - 1)
        anywhere.append(F.one_hot(local, rows.stop - rows.start))
        share.append(softmax[:, rows].sum(1, keepdim=True).expand(-1, anywhere[-1].shape[1]))
    return {
        "labels of other ranks' words were taken for own words: only a label that is here counts":
            softmax - torch.cat(anywhere, 1),
        "softmax without the label: subtract 1 where the label is": softmax,
        "the factor that makes P W right has scaled the row of the label, too: subtract W[label] "
        "as it is": softmax - torch.cat(share, 1) * label,
    }  # fmt: skip


@task("07.2", 3, 20, core=True, compare="picotron_lab.vocab_parallel:Naive")
def test_three_barriers(attempt: Any) -> None:
    """A loss without logits on the wire, three barriers."""
    case = make_case(attempt)
    run = attempt.run(naive, case.ranks, case)
    same_gradients(attempt, run, case)
    N, D = case.x.shape
    calls = run.values[0]["sent"]
    because = "what needs no answer of another call can go with it: sums and label's logits do"
    attempt.at_most("calls on rank 0", len(calls), 3, formula="max | sums | dx", because=because)
    limit, formula = 8 * (3 * N + N * D), "8 (N + 2N + N D)"
    attempt.at_most("payload bytes on rank 0", total(calls), limit, formula=formula, because=LOGITS)
    no_wide_tensor(attempt, run, case)


def no_wide_tensor(attempt: Any, run: Any, case: Case) -> None:
    """Nothing as large as all logits was made."""
    largest, limit = max(each(run, "largest")), 8 * 2 * len(case.x) * case.R
    formula, because = "8 * 2 N R; all logits: 8 N V", "a rank needs columns for its own words only"
    attempt.at_most("bytes of the largest tensor", largest, limit, formula, because)


# ---- 07.3


def one_barrier(axis: Axis, student: ModuleType, cases: list[Case]) -> dict:
    """Two micro-batches: both S, both barriers, then the weights' gradients in reverse order."""
    found, states, (N, D) = {}, [], cases[0].x.shape
    wide = N * cases[0].R, cases[0].R * D  # logits or w: with these sizes nothing else is so large
    watches = {"S": Watch(), "barrier": Watch(wide), "T": Watch()}
    inputs, start = [own_tensors(axis, case) for case in cases], cases[0].rows(axis.rank).start
    with watches["S"]:
        for three in inputs:
            states.append(student.local_pass(*three, start))
    with watches["barrier"]:
        for i, state in enumerate(states):
            found[f"loss{i}"], found[f"dx{i}"] = tensors("meet", student.meet(state, axis), 2)
    met = sent(axis)
    with watches["T"]:
        for i in (1, 0):
            found[f"dw{i}"] = student.weight_gradient(states[i])
    found["largest"] = max(watch.largest for watch in watches.values())
    return found | {"met": met, "passes": watches["barrier"].passes}


@task("07.3", 5, 30, compare="picotron_lab.vocab_parallel:Algorithm2")
def test_one_barrier(attempt: Any) -> None:
    """The same with one barrier."""
    case = make_case(attempt)
    (N, D), n = case.x.shape, case.ranks
    labels = torch.randint(len(case.weight), (N,), generator=attempt.generator)
    other = Case(draw_x(attempt, N, D), labels, case.weight, case.R, n)
    run = attempt.run(one_barrier, n, [case, other])
    same_gradients(attempt, run, case, 0)
    same_gradients(attempt, run, other, 1)
    passes, met = run.values[0]["passes"], run.values[0]["met"]
    limit, payload = 2 * 8 * N * (3 * n + D), total(met)
    formula = "8 N (3n + D) of each of 2 micro-batches"
    attempt.at_most("payload bytes in meet on rank 0", payload, limit, formula, because=LOGITS)
    because = "a second barrier: all wait for a product with w; compute P W before the first one"
    what = "matmuls and reads of N R or R D numbers in meet on rank 0"
    attempt.equal(what, passes, 0, formula="none", because=because)
    because = "m, s and z can travel together: with all of them each rank knows M and S"
    formula = "m, s, z | dx, of each of 2 micro-batches"
    attempt.at_most("calls in meet on rank 0", len(met), 4, formula=formula, because=because)
    because = "nobody waits for this pass, so nobody answers: keep what meet has learned"
    late = run.count(rank=0) - len(met)
    attempt.equal("calls in weight_gradient on rank 0", late, 0, formula="none", because=because)
    no_wide_tensor(attempt, run, case)
