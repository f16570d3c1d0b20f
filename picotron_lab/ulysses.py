"""Ulysses: for attention alone, turn "all heads of 1/n of the tokens" into "1/n of the heads of all
tokens", and back.

Paper   Jacobs et al. 2023, "DeepSpeed-Ulysses", section 3 (2309.14509)
Idea    No head looks at another, so a rank that has whole sequences of its own heads needs no other
        rank: any attention serves, unchanged. One all_to_all is the way there, and the same one
        the other way round is the way back; each is the other's dual. All ranks work alike, and
        what is sent does not grow with n when T does. But n may not exceed the query heads; with
        fewer key/value heads than ranks each is sent to the n/K ranks whose queries share it.
        context_parallel.py chooses between this and rings.
Dims    B micro-batch  T queries, a rank's tokens  S = n T keys that they meet, the whole sequence
        H/K query/kv heads  C head width
Read    to_heads, to_tokens -> ToHeads, ToTokens -> Ulysses -> FusedUlysses
Tests   tests/test_context_*.py
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from picotron_lab.comm import Axis
from picotron_lab.model import AttentionCore


def to_heads(xs: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Each [B, T, H, C] -> [B, S, H/n, C], all in one all_to_all: rank r gets the r-th n-th of
    every one's heads."""
    n = axis.size
    widths = [x.shape[2] // n for x in xs]
    groups = [rearrange(x, "b t (n h) c -> n t b h c", n=n) for x in xs]
    sent = torch.cat(groups, 3) if len(xs) > 1 else groups[0]
    mine = axis.all_to_all(sent.flatten(0, 1))  # from every rank its tokens, in order
    return [rearrange(x, "s b h c -> b s h c") for x in mine.split(widths, 2)]


def to_tokens(xs: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Each [B, S, H/n, C] -> [B, T, H, C], all in one all_to_all: the way back."""
    n, widths = axis.size, [x.shape[2] for x in xs]
    rows = [rearrange(x, "b s h c -> s b h c") for x in xs]
    mine = axis.all_to_all(torch.cat(rows, 2) if len(xs) > 1 else rows[0])
    parts = mine.unflatten(0, (n, -1)).split(widths, 3)  # from every rank its heads, in order
    return [rearrange(x, "n t b h c -> b t (n h) c") for x in parts]


class ToHeads(torch.autograd.Function):
    """Tokens -> heads (all_to_all of what is given); backward: heads -> tokens."""

    @staticmethod
    def forward(ctx, axis: Axis, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return tuple(to_heads(xs, axis))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *to_tokens(grads, ctx.axis)


class ToTokens(torch.autograd.Function):
    """Heads -> tokens (all_to_all of what is given); backward: tokens -> heads."""

    @staticmethod
    def forward(ctx, axis: Axis, x_BSHC: Tensor) -> Tensor:
        ctx.axis = axis
        return to_tokens([x_BSHC], axis)[0]

    @staticmethod
    def backward(ctx, grad_BTHC: Tensor) -> tuple[None, Tensor]:
        return None, to_heads([grad_BTHC], ctx.axis)[0]


class Ulysses(nn.Module):
    """The core of an attention that has 1/n of the tokens, around one that sees all of them.

    Rank r holds the r-th n-th of the sequence. n divides H, and K, or is a multiple of K.
    """

    def __init__(self, core: AttentionCore, axis: Axis):
        super().__init__()
        self.core, self.axis = core, axis

    def forward(
        self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None = None
    ) -> Tensor:
        copies = self._copies(q_BTHC.shape[2], k_BTKC.shape[2])
        if copies > 1:
            k_BTKC, v_BTKC = (x.repeat_interleave(copies, 2) for x in (k_BTKC, v_BTKC))
        qkv = self._to_heads(q_BTHC, k_BTKC, v_BTKC)
        documents_BS = None if documents_BT is None else self._join(documents_BT)
        return ToTokens.apply(self.axis, self.core(*qkv, documents_BS))

    def _to_heads(self, *qkv: Tensor) -> list[Tensor]:
        return [ToHeads.apply(self.axis, x)[0] for x in qkv]

    def _join(self, documents_BT: Tensor) -> Tensor:
        """shard -> replicated (all_gather, 8 B T)."""
        return self.axis.all_gather(documents_BT.T).T

    def _copies(self, heads: int, kv_heads: int) -> int:
        """How many ranks share a key/value head."""
        n = self.axis.size
        assert heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0), (
            f"ulysses shares {heads} query and {kv_heads} key/value heads out among {n} ranks, and "
            "a head cannot be cut: choose a number of ranks that divides the first, and divides "
            "the second or is a multiple of it, or another kind, such as zigzag."
        )
        return max(1, n // kv_heads)


class FusedUlysses(Ulysses):
    """q, k and v in one all_to_all: one wait instead of three."""

    def _to_heads(self, *qkv: Tensor) -> list[Tensor]:
        return list(ToHeads.apply(self.axis, *qkv))


ULYSSES = {"plain": Ulysses, "fused": FusedUlysses}
