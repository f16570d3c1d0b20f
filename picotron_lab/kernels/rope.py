"""Rotary position embedding of queries and keys in one Triton kernel.

Source   Su et al. 2021, "RoFormer", section 3.4.2, in the rotate-half form of Hugging Face Llama.
Idea     A head is C/2 planes; plane i is spanned by the numbers i and i + C/2, and the token at
         position t turns it by an angle that depends on t and i. One program takes one token,
         loads that token's angles once, and turns every head of q, then every head of k.
Fused    (a, b) -> (a cos - b sin, b cos + a sin), with a = x[:C/2] and b = x[C/2:]. In fp32 with
         fp32 cos and sin, rounded once.
Bytes    per element of q and k, e = bytes of one stored number (2 for bf16); each pass:
           negate (e), concatenate (2e), times cos (2e), times sin (2e), add (3e):   10e
           here (read, write):                                                       2e
         cos and sin add 4C bytes per token (half of each), shared by all H + K heads.
Backward A rotation's gradient turns by the opposite angle: the same kernel with -sin. Nothing of
         q and k is saved, only the two tables.
Dims     B microbatch, T sequence, H query heads, K key heads, C head width.
Reading  _rotate_heads, _rope_kernel, then the operator that launches it, then rope_qk at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---- 1. the kernel


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos, sin,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):
    """Turn the HEADS heads of one token, BLOCK_HEADS at a time; cos and sin are [1, C/2]."""
    half = tl.arange(0, BLOCK_HALF)[None, :]
    for first_head in range(0, HEADS, BLOCK_HEADS):
        head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (head < HEADS) & (half < C // 2)
        offsets = head * C + half
        a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + offsets + C // 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, a * cos - b * sin, mask=mask)
        tl.store(out_ptr + offsets + C // 2, b * cos + a * sin, mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, INVERSE: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):
    """One program turns all heads of one token; program b * T + t takes token t of sample b."""
    token = tl.program_id(0).to(tl.int64)  # B * T * H * C may exceed 2^31
    half = tl.arange(0, BLOCK_HALF)[None, :]
    angles = (token % T) * C + half
    cos = tl.load(cos_ptr + angles, mask=half < C // 2, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=half < C // 2, other=0.0)
    if INVERSE:
        sin = -sin
    q_start, k_start = token * H * C, token * K * C
    _rotate_heads(q_ptr + q_start, q_out_ptr + q_start, cos, sin, H, C, BLOCK_H, BLOCK_HALF)
    _rotate_heads(k_ptr + k_start, k_out_ptr + k_start, cos, sin, K, C, BLOCK_K, BLOCK_HALF)


# ---- 2. the operator: allocate, launch, and tell torch the shapes and the gradient


def _blocks_and_warps(heads: int, kv_heads: int, half: int) -> tuple[int, int, int, int]:
    """Return BLOCK_H, BLOCK_K, BLOCK_HALF and the number of warps.

    As many warps as give each thread 8 numbers (128 bits of bf16) of each half of k, at most 4;
    then heads per step so that a thread holds at most 16 numbers of each half.
    """
    half = triton.next_power_of_2(half)
    heads, kv_heads = triton.next_power_of_2(heads), triton.next_power_of_2(kv_heads)
    warps = min(4, max(1, kv_heads * half // (32 * 8)))
    most = max(1, warps * 32 * 16 // half)
    return min(heads, most), min(kv_heads, most), half, warps


@torch.library.custom_op("picotron_lab::rope_qk", mutates_args=())
def _rope_qk(
    q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Turn by the angles of the tables; inverse turns back."""
    q_BTHC, k_BTKC = q_BTHC.contiguous(), k_BTKC.contiguous()
    cos_TC, sin_TC = cos_TC.contiguous(), sin_TC.contiguous()
    q_out_BTHC, k_out_BTKC = torch.empty_like(q_BTHC), torch.empty_like(k_BTKC)
    (b, t, heads, width), kv_heads = q_BTHC.shape, k_BTKC.shape[2]
    block_h, block_k, block_half, warps = _blocks_and_warps(heads, kv_heads, width // 2)
    _rope_kernel[(b * t,)](
        q_BTHC, k_BTKC, cos_TC, sin_TC, q_out_BTHC, k_out_BTKC, t, INVERSE=inverse,
        H=heads, K=kv_heads, C=width,
        BLOCK_H=block_h, BLOCK_K=block_k, BLOCK_HALF=block_half, num_warps=warps,
    )
    return q_out_BTHC, k_out_BTKC


@_rope_qk.register_fake
def _rope_qk_fake(
    q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return q_BTHC.new_empty(q_BTHC.shape), k_BTKC.new_empty(k_BTKC.shape)


def _rope_qk_save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, cos_TC, sin_TC, ctx.inverse = inputs
    ctx.save_for_backward(cos_TC, sin_TC)


def _rope_qk_gradient(ctx, dq_BTHC: Tensor, dk_BTKC: Tensor) -> tuple[Tensor | None, ...]:
    dq_BTHC, dk_BTKC = _rope_qk(dq_BTHC, dk_BTKC, *ctx.saved_tensors, not ctx.inverse)
    return dq_BTHC, dk_BTKC, None, None, None


_rope_qk.register_autograd(_rope_qk_gradient, setup_context=_rope_qk_save)


# ---- 3. the public function


def rope_qk(
    q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k with every head of token t turned by the angles in row t of the tables.

    q_BTHC and k_BTKC are bfloat16, float16 or float32, of one dtype; cos_TC and sin_TC are
    float32 and repeat their first C/2 columns, as in Hugging Face Llama (only these are read).
    The results are new contiguous tensors. Differentiable in q and k, not in the tables.
    Raises TypeError for other dtypes, ValueError for shapes that do not fit.
    """
    dtypes = (q_BTHC.dtype, k_BTKC.dtype, cos_TC.dtype, sin_TC.dtype)
    if dtypes[0] not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"The RoPE kernel computes in float32 and was given {q_BTHC.dtype}; give it "
            "bfloat16, float16 or float32, or rotate with torch's own operators."
        )
    if dtypes[1:] != (dtypes[0], torch.float32, torch.float32):
        raise TypeError(
            f"rope_qk was given q, k, cos and sin in {dtypes}; k needs the dtype of q, and cos "
            "and sin need torch.float32."
        )
    (b, t, _, width), table = q_BTHC.shape, q_BTHC.shape[1::2]
    k_fits = k_BTKC.shape == (b, t, k_BTKC.shape[2], width)
    if not k_fits or cos_TC.shape != table or sin_TC.shape != table or width % 2:
        raise ValueError(
            f"rope_qk was given q {tuple(q_BTHC.shape)}, k {tuple(k_BTKC.shape)}, cos "
            f"{tuple(cos_TC.shape)} and sin {tuple(sin_TC.shape)}; it needs [B, T, H, C], "
            "[B, T, K, C], [T, C] and [T, C] with an even C."
        )
    return _rope_qk(q_BTHC, k_BTKC, cos_TC, sin_TC, False)
