"""AdamW as one Triton kernel: clipping, the update and the narrow copy in one pass.

Source   Loshchilov and Hutter 2019 (1711.05101), algorithm 2, its schedule folded into the rate.
Idea     An update does some fifteen operations on a parameter of which it moves thirty bytes, so
         its speed is the number of bytes moved. What goes before it (gradients are scaled) and what
         follows (float32 weights are rounded) reads the same numbers: do it while they are there.
Fused    g <- scale g;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   of step t
         w <- (1 - lr decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps);   copy = w
         Arithmetic in fp32; what depends on t alone is computed in float64, once, on the host.
Bytes    per parameter, fp32 weights, gradients and moments, a bf16 copy:
           scale g (8), torch's fused AdamW (28), round w (6), one kernel each:   42
           here (read w, g, m, v; write w, m, v and the copy):                    30
           without a copy, of weights that are fp32 themselves:                   36;   here 28
         128 bits at a time if the length is a multiple of 16; others are right, but slower.
Dims     none: every parameter stands alone, so tensors are read as one flat run of numbers.
Reading  _adamw_kernel, Update, the operator that launches it, adamw_ at the end.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers per program: 4 per thread, one 128-bit load of each fp32 tensor
NUM_WARPS = 8


# ---- 1. the kernel


@triton.jit
def _adamw_kernel(
    weight_ptr, grad_ptr, first_ptr, second_ptr, copy_ptr, scale_ptr, n,
    keep, beta1, rest1, beta2, rest2, rate, root, eps, BLOCK: tl.constexpr,
):
    """scale_ptr is None for gradients as they are, copy_ptr for weights without a copy."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr)
    first = beta1 * tl.load(first_ptr + offsets, mask=mask, other=0.0) + rest1 * grad
    second = beta2 * tl.load(second_ptr + offsets, mask=mask, other=0.0) + rest2 * grad * grad
    weight = keep * tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    weight -= rate * first / (root * tl.sqrt(second) + eps)
    tl.store(weight_ptr + offsets, weight, mask=mask)
    tl.store(first_ptr + offsets, first, mask=mask)
    tl.store(second_ptr + offsets, second, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offsets, weight, mask=mask)


# ---- 2. the operator: launches, and tells torch what it changes


class Update(NamedTuple):
    """What all weights of a step share.

    step  its number, from 1: moments start at 0, and are divided by 1 - beta^step
    """

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def factors(self) -> list[float]:
        """What the kernel multiplies by, in its order from `keep` on."""
        b1, b2 = self.betas
        rate, root = self.lr / (1 - b1**self.step), 1 / math.sqrt(1 - b2**self.step)
        return [1 - self.lr * self.weight_decay, b1, 1 - b1, b2, 1 - b2, rate, root, self.eps]


@torch.library.custom_op("picotron_lab::adamw_", mutates_args=("weights", "moments", "copies"))
def _adamw_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Tensor],
    copies: Sequence[Tensor], scale: Tensor | None, factors: Sequence[float],
) -> None:  # fmt: skip
    """One call serves many weights: torch takes longer to call an operator than to launch."""
    for i, weight in enumerate(weights):
        n, copy = weight.numel(), copies[i] if copies else None
        _adamw_kernel[(triton.cdiv(n, BLOCK),)](
            weight, grads[i].contiguous(), moments[2 * i], moments[2 * i + 1], copy, scale, n,
            *factors, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


@_adamw_.register_fake
def _adamw_fake(
    weights: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Tensor],
    copies: Sequence[Tensor], scale: Tensor | None, factors: Sequence[float],
) -> None:  # fmt: skip
    return None


# ---- 3. the public function


def _check(wide: tuple[Tensor, ...], narrow: tuple[Tensor, ...], scale: Tensor | None) -> None:
    """Of one weight. wide: itself, its gradient and moments; narrow: the copy, if there is one."""
    scales = () if scale is None else (scale,)
    if {x.dtype for x in (*wide, *scales)} != {torch.float32} or any(
        x.dtype not in (torch.bfloat16, torch.float16) for x in narrow
    ):
        given = ", ".join(str(x.dtype) for x in (*wide, *narrow, *scales))
        raise TypeError(
            f"adamw_ computes in float32 and was given {given}; give it weights, grads, moments "
            "and scale in float32, and copies in bfloat16 or float16."
        )
    if len({x.shape for x in (*wide, *narrow)}) > 1 or any(x.numel() != 1 for x in scales):
        given = ", ".join(str(tuple(x.shape)) for x in (*wide, *narrow, *scales))
        raise ValueError(
            f"adamw_ was given {given}; a weight, its gradient, both moments and its copy need one "
            "shape, and scale is a single number."
        )
    weight, _, *moments = wide
    if not all(x.is_contiguous() for x in (weight, *moments, *narrow)):
        raise ValueError(
            f"adamw_ overwrites weight, moments and copy, here {tuple(weight.shape)}, and one of "
            "them has gaps: give it tensors that are contiguous."
        )


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    copies: Sequence[Tensor],
    scale: Tensor | None,
    update: Update,
) -> None:
    """One step of AdamW, in place: overwrite weights, moments and copies; a launch for each weight.

    weights  float32, of any shapes
    grads    float32, each of its weight's shape; they stay as they are
    moments  first and second of each weight, float32
    copies   bfloat16 or float16, become the new weights, rounded; an empty list: there are none
    scale    by which gradients are multiplied, one float32 number on the device; None: 1
    Raises TypeError for another dtype, ValueError for lists or shapes that differ, or for numbers
    that do not lie side by side in what is overwritten.
    """
    if not len(weights) == len(grads) == len(moments) or len(copies) not in (0, len(weights)):
        raise ValueError(
            f"adamw_ was given {len(weights)} weights, {len(grads)} grads, {len(moments)} pairs of "
            f"moments and {len(copies)} copies; give it as many of each, or no copies."
        )
    for i, own in enumerate(zip(weights, grads, moments, strict=True)):
        _check((*own[:2], *own[2]), tuple(copies[i : i + 1]), scale)
    flat = [moment for pair in moments for moment in pair]
    _adamw_(weights, grads, flat, copies, scale, update.factors())
