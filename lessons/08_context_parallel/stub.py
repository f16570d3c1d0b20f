"""Lesson 08, context parallelism: one sequence over several ranks, and attention still sees it all.

Here there is one sequence and one head, in float64: q, k and v of a rank are [T, C].
Dims    T tokens of this rank, its queries   S tokens of a block of keys   C head width
        n ranks of cp
"""

import math

import torch
from torch import Tensor

from lessons import TODO
from picotron_lab.comm import Axis

# ---- given: attention between some queries and one block of keys


def attend(
    q_TC: Tensor, k_SC: Tensor, v_SC: Tensor, queries_T: Tensor, keys_S: Tensor
) -> tuple[Tensor, Tensor]:
    """out [T, C]: each query's weighted mean of the values of this block's keys that it may see,
    and lse [T]: the log of its sum of exponentials. A query that sees none: 0 and -inf.

    queries_T, keys_S   their positions in the sequence; a query sees keys up to its own position
    """
    scores_TS = q_TC @ k_SC.T / math.sqrt(q_TC.shape[1])
    scores_TS = scores_TS.masked_fill(keys_S[None, :] > queries_T[:, None], -math.inf)
    lse_T = scores_TS.logsumexp(1)
    safe_T = torch.where(lse_T == -math.inf, 0, lse_T)  # not -inf minus -inf
    return (scores_TS - safe_T[:, None]).exp() @ v_SC, lse_T


def attend_backward(
    grad_TC: Tensor, qkv: tuple, row: tuple, queries_T: Tensor, keys_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, C], dk [S, C], dv [S, C]): what this block of keys adds to the gradients.

    qkv   q_TC, k_SC, v_SC          row   out_TC, lse_T of ALL keys that the queries saw
    """
    (q_TC, k_SC, v_SC), (out_TC, lse_T) = qkv, row
    scale = math.sqrt(q_TC.shape[1])
    weights_TS = (q_TC @ k_SC.T / scale - lse_T[:, None]).exp()
    weights_TS = weights_TS.masked_fill(keys_S[None, :] > queries_T[:, None], 0)
    from_values_TS = grad_TC @ v_SC.T - (grad_TC * out_TC).sum(1, keepdim=True)
    dscores_TS = weights_TS * from_values_TS / scale
    return dscores_TS @ k_SC, dscores_TS.T @ q_TC, weights_TS.T @ grad_TC


# ---- yours


def positions(rank: int, size: int, length: int) -> Tensor:  # Task 08.1
    """Which tokens of a sequence a rank holds, so that under a causal mask all work alike.

    A query at position t has t + 1 scores to compute. `length` is a multiple of 2 * size.
    Before  one sequence of `length` tokens
    After   [length / size] int64, in rising order; over all ranks every position once
    Budget  scores of the busiest rank at most 1.1 times those of the idlest
    """
    raise TODO("08.1")


def merge(
    out_TC: Tensor, lse_T: Tensor, other_out_TC: Tensor, other_lse_T: Tensor
) -> tuple[Tensor, Tensor]:  # Task 08.2
    """(out [T, C], lse [T]) over the keys of two blocks, from those of each block (see attend).

    Before  two softmaxes, each over its own keys; lse is anything from -inf to some hundreds
    After   the softmax over both sets of keys. No NaN: a row blind to both has out 0, lse -inf
    """
    raise TODO("08.2")


def ring_forward(
    q_TC: Tensor, k_TC: Tensor, v_TC: Tensor, places_T: Tensor, cp: Axis
) -> tuple[Tensor, Tensor]:  # Task 08.3
    """(out [T, C], lse [T]) of this rank's queries over the keys of all ranks.

    places_T   positions of this rank's tokens. Those of another rank's you may send along, or
               compute if you know how tokens were dealt: positions(rank, cp.size, length)
    Before  every rank: q, k, v of its own tokens
    After   the same, and out as if it had seen all k, v
    Budget  sends n - 1 times k and v, and at most 8 bytes a token with them; never holds more than
            a few blocks, however many ranks there are
    """
    raise TODO("08.3")


def ring_backward(
    grad_TC: Tensor, qkv: tuple, row: tuple, places_T: Tensor, cp: Axis
) -> tuple[Tensor, Tensor, Tensor]:  # Task 08.4
    """(dq, dk, dv), each [T, C]: gradients of this rank's q, k, v.

    grad_TC   gradient of out_TC    qkv   q_TC, k_TC, v_TC    row   out_TC, lse_T of ring_forward
    Before  other ranks' queries used this rank's keys, and nobody has told it
    After   dk, dv: sums over the queries of ALL ranks
    Budget  sends k and v n - 1 times, their gradients n times, at most 8 bytes a token with them
    """
    raise TODO("08.4")
