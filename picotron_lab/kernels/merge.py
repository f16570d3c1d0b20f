"""Two partial softmaxes over different keys made one, in place, by one Triton kernel.

Source   Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1.
Idea     Ring attention computes a softmax block by block. Each block gives, per query, the weighted
         mean of its values (out) and the logarithm of its sum of exponentials (lse). Adding a block
         is little arithmetic over many bytes, so each number is read once and written once.
Fused    w = e^block_lse / (e^lse + e^block_lse);   out <- (1 - w) out + w block_out;
         lse <- log(e^lse + e^block_lse).   Arithmetic in fp32; the larger lse is taken out of both
         exponentials, so that none overflows. -inf is the lse of a row that has seen no key: such
         a row leaves the other unchanged, and two of them stay out = 0, lse = -inf.
Bytes    per number of out, fp32, with a bf16 block of e = 2 bytes; lse is negligible (4/C):
           cast, subtract, multiply, add, one kernel each:   (4 + e) + 12 + 8 + 12 = 38
           here (read out and the block, write out):         8 + e                 = 10
Dims     B micro-batch, T queries, H heads, C head width. out [B, T, H, C] and lse [B, H, T] may be
         slices of T of larger tensors: their strides are arguments.
Reading  _merge_kernel, the operator that launches it, merge_ at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of out per program: 16 per thread, four 128-bit loads of fp32
NUM_WARPS = 4


# ---- 1. the kernel


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, block_out_ptr, block_lse_ptr, T,
    out_b, out_t, out_h, lse_b, lse_h, lse_t,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Program (i, h, b) merges BLOCK_T queries of one head. The block's tensors are contiguous."""
    H = tl.num_programs(1)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # B*T*H*C may exceed 2^31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_C)
    lse_at = lse_ptr + b * lse_b + h * lse_h + rows * lse_t
    lse = tl.load(lse_at, mask=rows < T, other=0.0)
    block_lse = tl.load(block_lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    larger = tl.maximum(lse, block_lse)
    seen = larger > -float("inf")
    larger = tl.where(seen, larger, 0.0)
    mine, theirs = tl.exp(lse - larger), tl.exp(block_lse - larger)  # the larger of both is 1
    total = tl.where(seen, mine + theirs, 1.0)
    mask = (rows < T)[:, None] & (cols < C)[None, :]
    out_at = out_ptr + b * out_b + h * out_h + rows[:, None] * out_t + cols[None, :]
    block_at = block_out_ptr + ((b * T + rows[:, None]) * H + h) * C + cols[None, :]
    out = tl.load(out_at, mask=mask, other=0.0)
    block_out = tl.load(block_at, mask=mask, other=0.0).to(tl.float32)
    merged = (mine / total)[:, None] * out + (theirs / total)[:, None] * block_out
    tl.store(out_at, merged, mask=mask)
    tl.debug_barrier()  # several threads read one lse: all must have it before one overwrites it
    tl.store(lse_at, tl.where(seen, larger + tl.log(total), -float("inf")), mask=rows < T)


# ---- 2. the operator: launches, and tells torch what it changes


def _blocks(width: int) -> tuple[int, int]:
    """Queries and columns per program."""
    block_c = triton.next_power_of_2(width)
    return max(1, BLOCK // block_c), block_c


@torch.library.custom_op("picotron_lab::merge_", mutates_args=("out", "lse"))
def _merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    B, T, H, C = out.shape
    block_t, block_c = _blocks(C)
    _merge_kernel[(triton.cdiv(T, block_t), H, B)](
        out, lse, block_out.contiguous(), block_lse.contiguous(), T,
        *out.stride()[:3], *lse.stride(),
        C=C, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip


@_merge_.register_fake
def _merge_fake(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    return None


# ---- 3. the public function


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Overwrite (out, lse) by those of the softmax over both sets of keys.

    out        [B, T, H, C] float32; the numbers of a head lie side by side, otherwise any strides
    lse        [B, H, T] float32, any strides; -inf: the row has seen no key
    block_out  [B, T, H, C] bfloat16, float16 or float32, finite also where block_lse is -inf
    block_lse  [B, H, T] float32
    Raises TypeError for another dtype, ValueError for shapes or strides that do not fit.
    """
    wide = {x.dtype for x in (out, lse, block_lse)} == {torch.float32}
    if not wide or block_out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        given = ", ".join(str(x.dtype) for x in (out, lse, block_out, block_lse))
        raise TypeError(
            f"merge_ computes in float32 and was given {given}; give it out, lse and block_lse in "
            "float32, and block_out in bfloat16, float16 or float32."
        )
    B, T, H, C = out.shape
    if block_out.shape != out.shape or not lse.shape == block_lse.shape == (B, H, T):
        given = ", ".join(str(tuple(x.shape)) for x in (out, lse, block_out, block_lse))
        raise ValueError(
            f"merge_ was given {given}; it needs out and block_out [B, T, H, C], lse and block_lse "
            "[B, H, T]."
        )
    if out.stride(3) != 1:
        raise ValueError(
            f"merge_ overwrites out and was given strides {out.stride()} for shape "
            f"{tuple(out.shape)}; the numbers of a head must lie side by side."
        )
    _merge_(out, lse, block_out, block_lse)
