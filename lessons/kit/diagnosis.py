"""Diagnosis: what is probably wrong with a wrong value, as one sentence.

Idea    Most wrong answers of parallel programs are right answers of another question: the sum
        instead of the mean, my neighbour's shard, a tensor that was never sent. So a wrong value is
        compared with such answers, and the first that fits is said.
Order   the author's suspects, NaN, other precision, multiples, places of ranks, places inside a
        tensor, and if nothing fits only where the wrong numbers are.
Read    Difference -> find -> DIAGNOSES        Tests  tests/test_lesson_diagnosis.py
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lessons.kit.compare import Leaf, Misfit, alike, near, walk


@dataclass(frozen=True)
class Difference:
    """What was seen, what was expected, and a likely cause (empty: none fits)."""

    seen: str
    expected: str
    cause: str = ""


@dataclass(frozen=True)
class Question:
    """A value that is not right, with all that may explain it.

    factors   {6: "micro-batches"}
    suspects  {sentence: the value that proves it}
    """

    what: str
    got: Any
    want: Any
    ranks: int | None = None
    factors: dict[int, str] = field(default_factory=dict)
    suspects: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[Leaf, ...] = ()

    @property
    def wrong(self) -> list[Leaf]:
        """Leaves that differ."""
        return [leaf for leaf in self.leaves if not leaf.right]


def find(question: Question) -> Difference | None:
    """The first difference with a likely cause; None if there is none."""
    try:
        leaves = tuple(walk(question.what, question.got, question.want, question.ranks))
    except Misfit as misfit:
        cause = _suspect(question) or _suspect_where_wrong(question) or misfit.cause
        return Difference(str(misfit), "", cause)
    question = Question(**{**vars(question), "leaves": leaves})
    if not question.wrong:
        return None
    causes = (diagnose(question) for diagnose in DIAGNOSES)
    cause = next((sentence for sentence in causes if sentence), "")
    first = question.wrong[0]
    bad = (~near(first.got, first.want)).nonzero()
    at = tuple(bad[0].tolist())
    place = f" at {list(at)}" if at else ""
    here, there = _apart(first.got[at].item(), first.want[at].item())
    seen = f"{first.where}{place} is {here}"
    if first.want.numel() > 1:
        seen += f" ({len(bad)} of {first.want.numel()} numbers differ)"
    return Difference(seen, there, cause)


# ---- one function per kind of cause: a sentence, or nothing


def _suspect(question: Question) -> str:
    for sentence, value in question.suspects.items():
        if alike(question.got, value):
            return sentence
    return ""


def _suspect_where_wrong(question: Question) -> str:
    """What is wrong equals a suspect, though other parts may be right."""
    for sentence, value in question.suspects.items():
        if _either(question.got, question.want, value):
            return sentence
    return ""


def _either(got: Any, want: Any, suspect: Any) -> bool:
    """Whether every part is alike one of the two; a part may be None."""
    if alike(got, want) or alike(got, suspect):
        return True
    rows = [_items(value) for value in (got, want, suspect)]
    if not rows[0] or not len(rows[0]) == len(rows[1]) == len(rows[2]):
        return False
    return all(_either(*parts) for parts in zip(*rows, strict=True))


def _items(value: Any) -> list:
    """What a container holds, in order."""
    if is_dataclass(value):
        return [getattr(value, part.name) for part in fields(value)]
    if isinstance(value, dict):
        return [value[key] for key in sorted(value, key=str)]
    return list(value) if isinstance(value, list | tuple) else []


def _nan(question: Question) -> str:
    wrong = [~near(leaf.got, leaf.want) for leaf in question.wrong]
    bad = [leaf.got[w].isnan() for leaf, w in zip(question.wrong, wrong, strict=True)]
    if all(bool(b.all()) for b in bad):
        return (
            "NaN, and nothing else is wrong: a division by zero, or inf minus inf, as in a softmax "
            "over a row that is masked completely"
        )
    return ""


def _precision(question: Question) -> str:
    narrow = {leaf.got.dtype for leaf in question.wrong} - {torch.float64}
    names = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
    for leaf in question.wrong:
        allowed = names.get(leaf.got.dtype)
        if leaf.want.dtype != torch.float64 or allowed is None or not leaf.want.numel():
            return ""
        error = (leaf.got.double() - leaf.want).abs().max()
        if not error <= allowed * leaf.want.abs().max():
            return ""
    named = ", ".join(sorted(str(dtype) for dtype in narrow))
    return f"right, but only as exact as {named}: keep the dtype of the input"


def _multiple(question: Question) -> str:
    leaves = [leaf for leaf in question.wrong if leaf.want.is_floating_point()]
    if not leaves or len(leaves) < len(question.wrong):
        return ""
    got = torch.cat([leaf.got.detach().double().flatten() for leaf in leaves])
    want = torch.cat([leaf.want.detach().double().flatten() for leaf in leaves])
    top = want.abs().argmax()
    if not bool(want.isfinite().all()) or want[top] == 0:
        return ""
    ratio = float(got[top] / want[top])
    if not bool(near(got, want * ratio).all()) and not (ratio == 0 and not bool(got.any())):
        return ""
    return _multiple_in_words(ratio, question)


def _multiple_in_words(ratio: float, question: Question) -> str:
    """ratio  got / want"""
    if ratio == 0:
        return "all zeros: nothing was computed, added or written there"
    known = {question.ranks: "the axis has {0} ranks"} if question.ranks else {}
    for count, name in question.factors.items():
        known[count] = f"{known[count]}, and there are {{0}} {name}" if count in known else (
            f"there are {{0}} {name}"
        )  # fmt: skip
    for count, words in known.items():
        words = words.format(count)
        if count > 1 and _equal(ratio, count):
            return f"exactly {count} times the reference, and {words}: a sum where a mean belongs"
        if count > 1 and _equal(ratio, 1 / count):
            return f"exactly 1/{count} of the reference, and {words}: a mean where a sum belongs"
        if count > 1 and _equal(ratio, count * count):
            return f"exactly {count}*{count} times the reference, and {words}: summed twice"
        if count > 1 and _equal(ratio, 1 / count**2):
            return f"exactly 1/({count}*{count}) of the reference, and {words}: divided twice"
    if _equal(ratio, -1):
        return "exactly minus the reference: the sign is wrong"
    if _equal(ratio, 2):
        return "exactly twice the reference: is something counted twice?"
    return f"exactly {ratio:.6g} times the reference: which factor is that?"


def _places_of_ranks(question: Question) -> str:
    got, want, n = question.got, question.want, question.ranks
    if not n or n < 2 or not isinstance(want, list | tuple) or len(want) != n:
        return ""
    if all(alike(w, want[0]) for w in want[1:]):
        return _some_ranks(question)
    for shift in range(1, n):
        if all(alike(got[r], want[(r + shift) % n]) for r in range(n)):
            r = next(r for r in range(n) if not alike(got[r], want[r]))
            return (
                f"rank {r} has what rank {(r + shift) % n} should have: check which neighbour you "
                "send to, and which you hear from"
            )
    if all(alike(got[r], want[n - 1 - r]) for r in range(n)):
        return "the ranks are in reverse order: rank 0 has what the last rank should have"
    for r in range(n):
        if all(alike(got[s], want[r]) for s in range(n)):
            return f"every rank has what only rank {r} should have"
    homes = [[s for s in range(n) if alike(got[r], want[s])] for r in range(n)]
    if all(homes):
        told = ", ".join(f"rank {r} has that of {home[0]}" for r, home in enumerate(homes))
        return f"right parts on the wrong ranks: {told}"
    return _some_ranks(question)


def _some_ranks(question: Question) -> str:
    """The wrong ones, if some are right; the place inside a tensor may say more."""
    n = question.ranks
    wrong = [r for r in range(n) if not alike(question.got[r], question.want[r])]
    inside = _places_in_tensor(question)
    if inside or len(wrong) == n:
        return inside
    names = f"rank {wrong[0]} is" if len(wrong) == 1 else f"ranks {_listed(wrong)} are"
    return f"only {names} wrong, the other ranks are right"


def _places_in_tensor(question: Question) -> str:
    """Looks at the first wrong leaf, and believes only what holds for all wrong leaves."""
    for holds in (_transposed, _rotated, _reversed_parts, _last_part):
        sentences = [holds(leaf.got, leaf.want, question.ranks) for leaf in question.wrong]
        if all(sentences):
            return sentences[0]
    return ""


def _transposed(got: Tensor, want: Tensor, ranks: int | None) -> str:
    for a in range(want.dim()):
        for b in range(a + 1, want.dim()):
            turned = want.transpose(a, b)
            if turned.shape == got.shape and bool(near(got, turned).all()):
                return f"dims {a} and {b} are swapped: it is transposed"
    return ""


def _rotated(got: Tensor, want: Tensor, ranks: int | None) -> str:
    for dim in range(want.dim()):
        length = want.shape[dim]
        if not ranks or length % ranks:
            continue
        for shift in range(1, ranks):
            if bool(near(got, want.roll(shift * length // ranks, dim)).all()):
                near_way = shift if 2 * shift <= ranks else shift - ranks
                return (
                    f"right parts, shifted by {near_way} of {ranks} along dim {dim}: check which "
                    "part each rank starts with, and which neighbour it sends to"
                )
    return ""


def _reversed_parts(got: Tensor, want: Tensor, ranks: int | None) -> str:
    for dim in range(want.dim()):
        if not ranks or ranks < 2 or want.shape[dim] % ranks:
            continue
        back = torch.cat(want.chunk(ranks, dim)[::-1], dim)
        if bool(near(got, back).all()):
            return f"the parts along dim {dim} are joined in reverse order of ranks"
    return ""


def _last_part(got: Tensor, want: Tensor, ranks: int | None) -> str:
    if not ranks or ranks < 2 or want.dim() == 0 or want.shape[0] < ranks:
        return ""
    bad = ~near(got, want)
    start = (ranks - 1) * -(-want.shape[0] // ranks)
    begins = start < want.shape[0] and int(bad.nonzero()[0, 0]) == start
    if not begins or (int(bad.sum()) < 2 and not bool(bad[start:].all())):
        return ""
    if want.shape[0] % ranks:
        return "only the last, shorter shard is wrong: look at padding"
    return "only the last shard is wrong: look at where the last rank's part begins and ends"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"


def _equal(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * abs(b)


def _apart(got: Any, want: Any) -> tuple[str, str]:
    """Both in as many digits as tell them apart, and no more."""
    for digits in (7, 9, 11, 13, 15, 17):
        told = [f"{x:.{digits}g}" if isinstance(x, float) else str(x) for x in (got, want)]
        if told[0] != told[1]:
            break
    return told[0], told[1]


DIAGNOSES: tuple[Callable[[Question], str], ...] = (
    _suspect, _suspect_where_wrong, _nan, _precision, _multiple, _places_of_ranks,
    _places_in_tensor,
)  # fmt: skip
