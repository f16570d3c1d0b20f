"""Compare: nested tensors and numbers with a reference, and where they first differ.

Lists, tuples, dicts and dataclasses are walked; leaves are tensors, numbers, strings, None.
Numbers are alike when they differ by at most 1e-9 of the largest number of the reference leaf;
integers, truth values and strings only when they are equal.
Read    Leaf -> walk -> alike        Tests  tests/test_lesson_diagnosis.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-9
UNFILLED = "does every path end in a return, is every part filled?"
LOST = (
    "no gradient came there. Does backward reach it (an nn.Parameter that forward uses, without "
    "detach(), collectives inside a torch.autograd.Function), and is .grad set on every path?"
)
NUMBER = np.generic | bool | int | float | complex


class Misfit(Exception):
    """A sentence: the structure differs, before any number is looked at.

    cause  a likely one, or empty
    """

    def __init__(self, sentence: str, cause: str = ""):
        super().__init__(sentence)
        self.cause = cause


@dataclass(frozen=True)
class Leaf:
    """One tensor of the reference with its counterpart; numbers are tensors without dimensions."""

    where: str
    got: Tensor
    want: Tensor

    @property
    def right(self) -> bool:
        """Whether they are alike."""
        return bool(near(self.got, self.want).all())


def near(got: Tensor, want: Tensor) -> Tensor:
    """Elementwise: whether alike; infinities and NaN only where the reference has them."""
    if not want.is_floating_point() and not want.is_complex():
        return got.to(torch.float64) == want.to(torch.float64)
    got, want = (x if x.is_complex() else x.double() for x in (got.detach(), want.detach()))
    finite = want[want.isfinite()].abs()
    scale = finite.max() if finite.numel() and finite.max() > 0 else 1.0
    same = (got == want) | (got.isnan() & want.isnan())
    return same | ((got - want).abs() <= TOLERANCE * scale)


def alike(got: Any, want: Any) -> bool:
    """Whether structure and numbers are alike."""
    try:
        return all(leaf.right for leaf in walk("", got, want))
    except Misfit:
        return False


def walk(where: str, got: Any, want: Any, ranks: int | None = None) -> Iterator[Leaf]:
    """All leaves. Raises Misfit where the structure differs.

    where  words for the value
    ranks  given, and of the length of the outermost list: its items are called by their rank
    """
    if want is None:
        if got is not None:
            raise Misfit(f"{where} is {short(got)}, it should be None")
    elif got is None:
        raise Misfit(f"{where} is None", LOST if "gradient" in where else UNFILLED)
    elif isinstance(want, str):
        if got != want:
            raise Misfit(f"{where} is {short(got)}, it should be {short(want)}")
    elif isinstance(want, Tensor | np.ndarray | NUMBER):
        yield _leaf(where, got, want)
    elif isinstance(want, set | frozenset):
        if got != want:
            raise Misfit(f"{where} is {short(got)}, it should be {short(want)}")
    else:
        for name, mine, theirs in _parts(where, got, want, ranks):
            yield from walk(name, mine, theirs)


def _parts(where: str, got: Any, want: Any, ranks: int | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, got, want) of what a container holds."""
    if is_dataclass(want):
        if type(got) is not type(want):
            raise Misfit(f"{where} is {short(got)}, it should be a {type(want).__name__}")
        names = [field.name for field in fields(want)]
        yield from ((f"{where}.{n}", getattr(got, n), getattr(want, n)) for n in names)
    elif isinstance(want, dict):
        if not isinstance(got, dict):
            raise Misfit(f"{where} is {short(got)}, it should be a dict")
        if set(got) != set(want):
            raise Misfit(f"{where} has the keys {short(list(got))}, needed are {short(list(want))}")
        yield from ((f"{where}[{key!r}]", got[key], want[key]) for key in want)
    else:
        if not isinstance(got, list | tuple):
            raise Misfit(f"{where} is {short(got)}, it should be a list or tuple")
        if len(got) != len(want):
            raise Misfit(f"{where} has {len(got)} items, it should have {len(want)}")
        by_rank = ranks is not None and ranks == len(want)
        for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            yield (f"{where} of rank {i}" if by_rank else f"{where}[{i}]"), mine, theirs


def _leaf(where: str, got: Any, want: Any) -> Leaf:
    reference = _tensor(want)
    number = isinstance(want, NUMBER)
    if not isinstance(got, Tensor | np.ndarray | NUMBER) or number > isinstance(got, NUMBER):
        needed = "a number" if number else "a tensor"
        raise Misfit(f"{where} is {short(got)}, it should be {needed}")
    mine = _tensor(got)
    if mine.shape != reference.shape:
        turned = mine.shape == reference.shape[::-1]
        cause = "it is transposed" if turned else ""
        raise Misfit(
            f"{where} has shape {list(mine.shape)}, it should be {list(reference.shape)}", cause
        )
    kinds = kind(mine), kind(reference)
    whole = number and kinds == ("integers", "floats")  # 0 is as good as 0.0
    if kinds[0] != kinds[1] and not whole:
        if number:
            raise Misfit(f"{where} is {short(got)}, it should be of type {type(want).__name__}")
        raise Misfit(
            f"{where} has {kinds[0]} ({mine.dtype}), it should have {kinds[1]} ({reference.dtype})"
        )
    return Leaf(where, mine, reference)


def _tensor(value: Any) -> Tensor:
    """Python's numbers in their own precision, which is numpy's, not torch's."""
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def kind(x: Tensor) -> str:
    """What its elements are: how wide they are is another question."""
    if x.is_floating_point():
        return "floats"
    if x.dtype == torch.bool:
        return "truth values"
    return "complex numbers" if x.is_complex() else "integers"


def short(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"
