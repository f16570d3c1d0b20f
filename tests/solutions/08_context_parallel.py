"""Lesson 08, solved. What the library has with many heads, here with one."""

import math

import torch
from torch import Tensor

from picotron_lab.attention_blocks import PlainBlocks
from picotron_lab.comm import Axis
from picotron_lab.context_parallel import chunks


def _heads(*tensors: Tensor) -> list[Tensor]:
    """[T, C] -> [1, T, 1, C]; [T] -> [1, 1, T]."""
    return [x[None, :, None] if x.dim() == 2 else x[None, None] for x in tensors]


def positions(rank: int, size: int, length: int) -> Tensor:
    return torch.arange(length).view(2 * size, -1)[list(chunks("zigzag", rank, size))].flatten()


def merge(
    out_TC: Tensor, lse_T: Tensor, other_out_TC: Tensor, other_lse_T: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = out_TC.clone(), lse_T.clone()
    PlainBlocks().merge(*_heads(out, lse, other_out_TC, other_lse_T))  # overwrites out and lse
    return out, lse


def attend(
    q_TC: Tensor, k_SC: Tensor, v_SC: Tensor, queries_T: Tensor, keys_S: Tensor
) -> tuple[Tensor, Tensor]:
    scores_TS = q_TC @ k_SC.T / math.sqrt(q_TC.shape[1])
    scores_TS = scores_TS.masked_fill(keys_S[None, :] > queries_T[:, None], -math.inf)
    lse_T = scores_TS.logsumexp(1)
    safe_T = torch.where(lse_T == -math.inf, 0, lse_T)  # not -inf minus -inf
    return (scores_TS - safe_T[:, None]).exp() @ v_SC, lse_T


def attend_backward(
    grad_TC: Tensor, qkv: tuple, row: tuple, queries_T: Tensor, keys_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (q_TC, k_SC, v_SC), (out_TC, lse_T) = qkv, row
    scale = math.sqrt(q_TC.shape[1])
    weights_TS = (q_TC @ k_SC.T / scale - lse_T[:, None]).exp()
    weights_TS = weights_TS.masked_fill(keys_S[None, :] > queries_T[:, None], 0)
    from_values_TS = grad_TC @ v_SC.T - (grad_TC * out_TC).sum(1, keepdim=True)
    dscores_TS = weights_TS * from_values_TS / scale
    return dscores_TS @ k_SC, dscores_TS.T @ q_TC, weights_TS.T @ grad_TC


def pass_on(tensors: list[Tensor], cp: Axis) -> list[Tensor]:
    """To the right neighbour, from the left one."""
    right, left = (cp.rank + 1) % cp.size, (cp.rank - 1) % cp.size
    return cp.exchange([(x, right) for x in tensors], [(x, left) for x in tensors])


def ring_forward(
    q_TC: Tensor, k_TC: Tensor, v_TC: Tensor, places_T: Tensor, cp: Axis
) -> tuple[Tensor, Tensor]:
    block = [k_TC, v_TC, places_T]
    out, lse = attend(q_TC, k_TC, v_TC, places_T, places_T)
    for _ in range(cp.size - 1):
        block = pass_on(block, cp)
        out, lse = merge(out, lse, *attend(q_TC, *block[:2], places_T, block[2]))
    return out, lse


def ring_backward(
    grad_TC: Tensor, qkv: tuple, row: tuple, places_T: Tensor, cp: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    q_TC, k_TC, v_TC = qkv
    block, sums = [k_TC, v_TC, places_T], [torch.zeros_like(k_TC), torch.zeros_like(v_TC)]
    dq_TC = torch.zeros_like(q_TC)
    for hops in range(cp.size):
        dq, dk, dv = attend_backward(grad_TC, (q_TC, *block[:2]), row, places_T, block[2])
        dq_TC, sums = dq_TC + dq, [sums[0] + dk, sums[1] + dv]
        if hops < cp.size - 1:
            *block, sums[0], sums[1] = pass_on([*block, *sums], cp)
    return dq_TC, *pass_on(sums, cp)
