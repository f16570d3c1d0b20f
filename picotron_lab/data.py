"""From tokens to micro-batches, in an order that no mesh can change.

Idea    Which sequences form global batch `step` is a pure function of (seed, step). Ranks and
        micro-batches only take rows out of that batch, so every mesh, every micro-batch size and
        every restart trains on the same sequences in the same order. Ranks that share a sequence
        take columns: tokens, and the labels after them, are dealt in the order that a rank wants.
Dims    B sequences of a micro-batch, T sequence length
Read    split -> TokenWindows -> BatchOrder -> Batches
"""

from dataclasses import dataclass

import numpy as np
import torch

from picotron_lab.config import ConfigError
from picotron_lab.model import IGNORED


def split(
    tokens: np.ndarray, sequence_length: int, validation_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return 1-D (training, validation) tokens: the tail is held out, at least one full window.

    A fraction of 0 holds out nothing. Raises ConfigError when fewer than 2 tokens remain.
    """
    held_out = max(int(validation_fraction * len(tokens)), sequence_length + 1)
    trained = len(tokens) - (held_out if validation_fraction > 0 else 0)
    if trained < 2:
        raise ConfigError(
            f"--validation-fraction {validation_fraction} at --sequence-length {sequence_length} "
            f"takes {held_out} of {len(tokens)} tokens and training needs 2; try fraction 0."
        )
    return tokens[:trained], tokens[trained:]


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and labels (B, T), and which rows (B,) of the global batch they are; all int64."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    rows_B: torch.Tensor


class TokenWindows:
    """Windows of T tokens that tile a 1-D text: every token but the first is predicted once.

    Window i reads tokens i*T .. i*T + T - 1. Beyond the text: token 0 with the label IGNORED.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ConfigError(f"--sequence-length {sequence_length} must be at least 1; try 128.")
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def take(
        self, windows: np.ndarray, first_row: int, count: int, columns: np.ndarray | None = None
    ) -> MicroBatch:
        """Return rows first_row .. first_row + count - 1 of the batch made of `windows`, 1-D.

        columns  positions in the sequence to deal, in this order (None: all)
        """
        assert 0 <= first_row < first_row + count <= len(windows), (
            f"{count} rows from {first_row} on: ask for rows 0 to {len(windows) - 1}, at least one"
        )
        starts_B = windows[first_row : first_row + count] * self.sequence_length
        columns = np.arange(self.sequence_length) if columns is None else columns
        at_BT = starts_B[:, None] + columns
        last = len(self.tokens) - 1
        tokens_BT = self.tokens[np.minimum(at_BT, last)].astype(np.int64)
        labels_BT = self.tokens[np.minimum(at_BT + 1, last)].astype(np.int64)
        tokens_BT[at_BT >= last], labels_BT[at_BT >= last] = 0, IGNORED
        rows_B = torch.arange(first_row, first_row + count)
        return MicroBatch(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT), rows_B)


class BatchOrder:
    """Which windows form global batch `step`: a pure function of (seed, step).

    The stream of sequences is one permutation of all windows after another, each an epoch, and
    batches are cut from it without a gap: nothing is dropped or seen twice in an epoch.
    """

    def __init__(self, seed: int, windows: int, global_batch_size: int) -> None:
        self.seed, self.windows, self.global_batch_size = seed, windows, global_batch_size
        self._latest: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """Return the windows of global batch `step`, counted from 0: int64 (global_batch_size,)."""
        start = step * self.global_batch_size
        epoch, place = np.divmod(np.arange(start, start + self.global_batch_size), self.windows)
        return np.concatenate([self._epoch(int(e))[place[epoch == e]] for e in np.unique(epoch)])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._latest:
            newest = list(self._latest.items())[-1:]  # a batch may straddle two epochs: keep two
            order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            self._latest = dict([*newest, (epoch, order)])
        return self._latest[epoch]


class Batches:
    """The training batches of a 1-D text: any rank asks for the rows that it computes."""

    def __init__(
        self, tokens: np.ndarray, sequence_length: int, seed: int, global_batch_size: int
    ) -> None:
        self.windows = TokenWindows(tokens, sequence_length)
        self.order = BatchOrder(seed, len(self.windows), global_batch_size)

    def micro_batch(
        self, step: int, first_row: int, count: int, columns: np.ndarray | None = None
    ) -> MicroBatch:
        """Return rows first_row .. first_row + count - 1 of global batch `step`, or `columns` of
        them."""
        return self.windows.take(self.order.rows(step), first_row, count, columns)


class Evaluation:
    """All of a 1-D text in order; the last batch is filled up with rows of IGNORED labels."""

    def __init__(self, tokens: np.ndarray, sequence_length: int, batch_size: int) -> None:
        self.windows, self.batch_size = TokenWindows(tokens, sequence_length), batch_size

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def micro_batch(
        self, index: int, first_row: int, count: int, columns: np.ndarray | None = None
    ) -> MicroBatch:
        """Return rows first_row .. first_row + count - 1 of batch `index`, or `columns` of them."""
        windows = index * self.batch_size + np.arange(self.batch_size)
        return self.windows.take(windows, first_row, count, columns)
