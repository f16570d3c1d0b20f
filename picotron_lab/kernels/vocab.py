"""The loss over a shard of the vocabulary: statistics in one read, gradient in place.

Source   Milakov and Gimelshein 2018 (1805.02867), section 3: max and sum in one pass;
         Yeung et al. 2024 (2411.05288), section 4: what the ranks of a split vocabulary exchange.
Idea     Logits are the largest tensor of a training step, and softmax, logarithm and their gradient
         would each read and write all of it. Here a row is read once for the three numbers that
         other ranks need, and once more to be overwritten by its gradient.
Fused    statistics   m = max y;  s = sum exp(y - m);  z = y[label] (0 if it is another rank's)
         gradient     y <- f exp(y - m) - c [j == label], with m, f, c given per row; without m,
                      y is an exponential already: y <- f y - c [j == label]
         Arithmetic in fp32, rounded once.
Bytes    per logit, e = bytes of one stored number (2 for bf16):
           float(), log_softmax, gather and their backward:   about 32 for bf16
           here (read; read and write):                       3e = 6
         128 bits at a time if V is a multiple of 16/e; other V are right, but slower.
Dims     N rows (tokens), V columns: the words of this rank's shard.
Reading  _statistics_kernel, _gradient_kernel, the operators that launch them, the two functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 8192  # numbers that a program reads at a time: 16 per thread of 16 warps


# ---- 1. the kernels


@triton.jit
def _statistics_kernel(y_ptr, label_ptr, out_ptr, n_rows, V: tl.constexpr, BLOCK: tl.constexpr):
    """One program reads one row. When a larger maximum appears, the sum so far is scaled to it."""
    row = tl.program_id(0).to(tl.int64)  # N * V may exceed 2^31
    m, s = -3.4028234663852886e38, 0.0  # not -inf, so that exp(y - m) of a logit -inf is 0
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, tl.max(y))
        s = s * tl.exp(m - larger) + tl.sum(tl.exp(y - larger))
        m = larger
    label = tl.load(label_ptr + row)
    z = tl.load(y_ptr + row * V + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, m)
    tl.store(out_ptr + n_rows + row, s)
    tl.store(out_ptr + 2 * n_rows + row, z)


@triton.jit
def _gradient_kernel(y_ptr, m_ptr, f_ptr, c_ptr, label_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, j) overwrites block j of row i. m_ptr is None for exponentials."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < V
    y = tl.load(y_ptr + row * V + cols, mask=mask, other=0.0).to(tl.float32)
    if m_ptr is not None:
        y = tl.exp(y - tl.load(m_ptr + row))
    grad = y * tl.load(f_ptr + row)
    grad -= tl.where(cols == tl.load(label_ptr + row), tl.load(c_ptr + row), 0.0)
    tl.store(y_ptr + row * V + cols, grad, mask=mask)


# ---- 2. the operators: allocate, launch, and tell torch the shapes


def _block_and_warps(width: int) -> tuple[int, int]:
    """Numbers per program and its warps: 16 numbers per thread, two 128-bit loads of bf16."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return block, max(1, block // 512)


@torch.library.custom_op("picotron_lab::vocab_statistics", mutates_args=())
def _statistics(y_NV: Tensor, label_N: Tensor) -> Tensor:
    y_NV, label_N = y_NV.contiguous(), label_N.contiguous()
    n_rows, width = y_NV.shape
    out_3N = y_NV.new_empty(3, n_rows, dtype=torch.float32)
    block, warps = _block_and_warps(width)
    _statistics_kernel[(n_rows,)](
        y_NV, label_N, out_3N, n_rows, V=width, BLOCK=block, num_warps=warps
    )
    return out_3N


@_statistics.register_fake
def _statistics_fake(y_NV: Tensor, label_N: Tensor) -> Tensor:
    return y_NV.new_empty(3, y_NV.shape[0], dtype=torch.float32)


@torch.library.custom_op("picotron_lab::vocab_gradient_", mutates_args=("y_NV",))
def _gradient_(y_NV: Tensor, m_N: Tensor | None, f_N: Tensor, c_N: Tensor, label_N: Tensor) -> None:
    n_rows, width = y_NV.shape
    m_N = None if m_N is None else m_N.contiguous()
    block, warps = _block_and_warps(width)
    _gradient_kernel[(n_rows, triton.cdiv(width, block))](
        y_NV, m_N, f_N.contiguous(), c_N.contiguous(), label_N.contiguous(),
        V=width, BLOCK=block, num_warps=warps,
    )  # fmt: skip


@_gradient_.register_fake
def _gradient_fake(
    y_NV: Tensor, m_N: Tensor | None, f_N: Tensor, c_N: Tensor, label_N: Tensor
) -> None:
    return None


# ---- 3. the public functions


def _check(y_NV: Tensor, label_N: Tensor, *others: Tensor | None) -> None:
    if y_NV.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"The vocabulary kernels compute in float32 and were given {y_NV.dtype}; give them "
            "bfloat16, float16 or float32, or use torch's own operators."
        )
    per_row = [x for x in others if x is not None]
    good = all(x.shape == label_N.shape and x.dtype == torch.float32 for x in per_row)
    if not good or label_N.shape != y_NV.shape[:1] or label_N.dtype != torch.int64:
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (label_N, *per_row))
        raise ValueError(
            f"The vocabulary kernels were given logits {tuple(y_NV.shape)} with {given}; they need "
            "logits [N, V], labels [N] of torch.int64 and, of each other number, [N] float32."
        )


def statistics(y_NV: Tensor, label_N: Tensor) -> Tensor:
    """Return [3, N] float32: of each row its max m, sum exp(y - m), and y[label].

    y_NV     bfloat16, float16 or float32, V >= 1; some logits of a row may be -inf, but not all
    label_N  int64 column of the label, in -1..V-1; -1: not in this shard, y[label] is then 0
    Raises TypeError for another dtype, ValueError for shapes that do not fit. Not differentiable:
    the gradient is `gradient_`.
    """
    _check(y_NV, label_N)
    return _statistics(y_NV, label_N)


def gradient_(
    y_NV: Tensor, m_N: Tensor | None, f_N: Tensor, c_N: Tensor, label_N: Tensor
) -> Tensor:
    """Overwrite y by f exp(y - m) - c onehot(label), without m by f y - c onehot(label); return y.

    y_NV          contiguous, dtypes as in statistics
    m_N f_N c_N   float32, one number per row
    label_N       as in statistics
    """
    _check(y_NV, label_N, m_N, f_N, c_N)
    if not y_NV.is_contiguous():
        raise ValueError(
            f"gradient_ overwrites its logits and was given strides {y_NV.stride()} for shape "
            f"{tuple(y_NV.shape)}; give a contiguous tensor."
        )
    _gradient_(y_NV, m_N, f_N, c_N, label_N)
    return y_NV
