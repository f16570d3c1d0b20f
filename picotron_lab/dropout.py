"""Dropout whose masks depend on the place of an element in the whole run, never on call order.

Idea    A mask drawn from a random stream depends on who draws when, so a sharded run differs from
        one device. Here the bits of an element are a hash of (seed, step, site, row of the global
        batch, position, channel): any rank computes the bits of just the elements that it holds.
Source  the counter-based generators of Salmon et al. 2011, with the mixing steps of MurmurHash3
Dims    B micro-batch  T sequence  D width
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Where:
    """Where a micro-batch sits in the whole run: decides positions and masks."""

    positions_T: Tensor  # position of each token in its sequence
    rows_B: Tensor  # index of each sequence in the global batch
    step: int = 0
    seed: int = 0
    documents_BT: Tensor | None = None  # document of each token; None: one document a sequence

    @staticmethod
    def first(tokens_BT: Tensor) -> "Where":
        """A batch on its own: positions and rows count from 0."""
        B, T = tokens_BT.shape
        device = tokens_BT.device
        return Where(torch.arange(T, device=device), torch.arange(B, device=device))


class Dropout(nn.Module):
    """Zero a share `rate` of the elements; which ones depends on their place in the run alone."""

    def __init__(self, rate: float, site: int):
        super().__init__()
        self.rate, self.site = rate, site

    def forward(self, x_BTD: Tensor, where: Where) -> Tensor:
        if self.rate == 0 or not self.training:
            return x_BTD
        channels_D = torch.arange(x_BTD.shape[-1], device=x_BTD.device)
        bits_BTD = scramble(where.seed, where.step, self.site, where.rows_B[:, None, None],
                            where.positions_T[:, None], channels_D)  # fmt: skip
        keep_BTD = bits_BTD >= int(self.rate * 2**32)
        return x_BTD * keep_BTD / (1 - self.rate)


def scramble(*coordinates: int | Tensor) -> Tensor:
    """32 random-looking bits for each combination of the coordinates (murmur3's mixing steps)."""
    bits = torch.zeros((), dtype=torch.int64)
    for coordinate in coordinates:
        bits = bits * 31 + coordinate + 0x9E3779B9 & 0xFFFFFFFF
        bits = (bits ^ bits >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        bits = bits ^ bits >> 16
    return bits
