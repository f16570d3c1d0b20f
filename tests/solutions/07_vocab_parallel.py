"""Solution of lesson 07. 07.1 and 07.2 are the library's plain path; its Algorithm 2 starts to send
in its first pass, while the lesson keeps computing and sending apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from picotron_lab.comm import Axis
from picotron_lab.vocab_parallel import IGNORED, Naive, Shard, Torch, VocabEmbedding, merge, rows_of

ANY_WORD = 2**31


@dataclass(frozen=True)
class Words(Shard):
    """A shard of which the first word and the number of words are known."""

    start: int
    count: int

    @property
    def bounds(self) -> tuple[int, int]:
        """(start, stop)"""
        return self.start, self.start + self.count


def words(w_RD: Tensor, start: int, axis: Axis) -> Words:
    """This rank's."""
    return Words(axis, ANY_WORD, False, start, len(w_RD))


def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:
    """The library's."""
    return VocabEmbedding(w_RD, words(w_RD, start, axis))(tokens_BT)


def three_barriers(
    x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int, axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's four passes, one after the other."""
    passes = Naive(words(w_RD, start, axis), x_ND, w_RD, labels_N, 1.0)
    passes.s_pass()
    loss, dw_RD = passes.c1(), torch.zeros_like(w_RD)
    passes.t_pass(dw_RD)
    return loss, passes.c2(), dw_RD


@dataclass
class State:
    """What waits between the passes: P = exp(y - m) / s with own m and s, A = P W, W[label]."""

    x_ND: Tensor
    local_N: Tensor
    counted_N: Tensor
    mine_3N: Tensor
    p_NR: Tensor
    a_ND: Tensor
    b_ND: Tensor
    scale_N: Tensor | None = None


def local_pass(x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int) -> State:
    """P with the largest logit and the sum of this rank's own words, and both matmuls."""
    here_N = (start <= labels_N) & (labels_N < start + len(w_RD))
    local_N = torch.where(here_N, labels_N - start, -1)
    y_NR = x_ND @ w_RD.T
    mine_3N = Torch.statistics(y_NR, local_N)
    m_N, s_N, _ = mine_3N
    p_NR = (y_NR - m_N[:, None]).exp() / s_N[:, None]
    b_ND = rows_of(w_RD, local_N) * here_N[:, None]
    return State(x_ND, local_N, labels_N != IGNORED, mine_3N, p_NR, p_NR @ w_RD, b_ND)


def meet(state: State, axis: Axis) -> tuple[Tensor, Tensor]:
    """Three numbers per token of each rank, then dx = sum over ranks of f A - W[label]."""
    m_N, s_N, z_N = merge(axis.all_gather(state.mine_3N), axis.size)
    loss = (s_N.log() + (m_N - z_N)).masked_fill(~state.counted_N, 0).sum()
    own_m, own_s, _ = state.mine_3N
    share_N = (own_m - m_N).exp() * own_s / s_N
    state.scale_N = share_N * state.counted_N
    return loss, axis.all_reduce(state.scale_N[:, None] * state.a_ND - state.b_ND)


def weight_gradient(state: State) -> Tensor:
    """(f P - onehot)^T x"""
    d_NR = state.scale_N[:, None] * state.p_NR
    here = torch.where(state.local_N >= 0)[0]
    d_NR[here, state.local_N[here]] -= 1
    return d_NR.T @ state.x_ND
