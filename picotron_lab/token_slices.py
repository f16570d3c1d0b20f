"""Slices of sequences: where each one sits, and what a rank keeps of a sequence while they pass.

Idea    A slice is a micro-batch of its own, some tokens of each sequence, for which all slices of a
        sequence share one object: there a layer finds what it has kept of the slices before.
        Positions and rows are those of the whole run, so that rotations and dropout masks are, too.
Dims    B micro-batch  T tokens of a sequence, or of its slice
Read    cut -> SliceOf -> Sequence; lengths: partition.py; who keeps what: token_pipeline.py
Tests   tests/test_token_slices.py
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from picotron_lab.dropout import Where


class Sequence:
    """What this rank keeps of a micro-batch while its slices pass: for each attention layer keys,
    values, and their gradients.

    length        tokens T of the whole sequence
    documents_BT  of all its tokens, or None
    held          what each SliceCore keeps: empty before the first slice, and after its backward
    Without backward it goes when its slices go.
    """

    def __init__(self, length: int, documents_BT: Tensor | None = None):
        self.length, self.documents_BT = length, documents_BT
        self.held: dict[Any, Any] = {}

    def of(self, core: Any) -> Any:
        """What a layer keeps: core.make_held(T), made when it is first asked for."""
        if core not in self.held:
            self.held[core] = core.make_held(self.length)
        return self.held[core]


@dataclass(frozen=True, kw_only=True)
class SliceOf(Where):
    """Where a slice sits in the whole run, and in its sequence."""

    first: int  # index of its first token in the sequence as this rank holds it
    last: bool  # whether the sequence ends with it
    sequence: Sequence  # the one that all its slices share

    def documents(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Documents of the slice, and of all keys up to the end of its `tokens`; None: no such."""
        if self.documents_BT is None:
            return None
        return self.documents_BT, self.sequence.documents_BT[:, : self.first + tokens]


def cut(batch: tuple, lengths: Iterable[int]) -> list[tuple]:
    """A model's arguments (tokens [B, T], labels [B, T] or None, where) -> those of each slice.

    lengths   tokens of each slice, at least 1, T together
    Run forward in this order and backward in the opposite one; micro-batches do not mind another.
    """
    (tokens_BT, labels_BT, where), lengths = batch, list(lengths)
    length = tokens_BT.shape[1]
    assert sum(lengths) == length and min(lengths) >= 1, (
        f"slices of {lengths} tokens do not make up a sequence of {length}: give lengths of at "
        f"least 1 that add up to {length}."
    )
    sequence, ends = Sequence(length, where.documents_BT), list(accumulate(lengths))
    slices = []
    for first, end in zip([0, *ends], ends, strict=False):
        labels = None if labels_BT is None else labels_BT[:, first:end]
        documents = None if where.documents_BT is None else where.documents_BT[:, first:end]
        there = SliceOf(
            where.positions_T[first:end], where.rows_B, where.step, where.seed, documents,
            first=first, last=end == length, sequence=sequence,
        )  # fmt: skip
        slices.append((tokens_BT[:, first:end], labels, there))
    return slices
