"""RMSNorm, and residual add + RMSNorm, as one Triton kernel each way.

Source   Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
Idea     A norm does some ten operations on every number it reads, and the GPU could do hundreds
         in the time of that read. So its speed is the number of bytes moved. Keep a row in
         registers from the first read to the last write, and move each number once.
Fused    s = x + delta;  y = weight * s / sqrt(mean(s^2) + eps).  Arithmetic in fp32. As in Hugging
         Face Llama, s and the normalised s are rounded to the storage type before they are used.
Bytes    per element, e = bytes of one stored number (2 for bf16); weight and rstd are negligible.
           forward    add, cast, square, mean, scale, cast, weight, one kernel each: 7e + 28
                      torch's add, then torch.nn.functional.rms_norm:               5e
                      here (read x and delta, write s and y):                       4e
           backward   torch's rms_norm backward (3e), then adding ds (3e):          6e
                      here (read dy, ds and s, write dx):                           4e
Backward n = s * rstd (rstd = 1/sqrt(mean(s^2) + eps), saved by the forward), g = dy * weight:
           dx = ddelta = ds + rstd * (g - n * mean(g * n))        mean over D
           dweight = sum over rows of dy * n
         The sum over rows crosses programs. Each program adds up its own rows in registers and
         writes one row of partial sums; torch adds these few rows in fp32. No atomics, hence the
         same bits in every run.
Dims     N rows (all leading dims flattened), D model width, P programs of the backward.
Reading  _forward_kernel, _backward_kernel, then the operators that launch them, then the two
         public functions at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384  # one row must fit in the registers of one program


# ---- 1. the kernels


@triton.jit
def _forward_kernel(
    x_ptr, delta_ptr, weight_ptr, s_ptr, y_ptr, rstd_ptr, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program normalises one row. delta_ptr and s_ptr are None for the plain norm."""
    row = tl.program_id(0).to(tl.int64)  # N * D may exceed 2^31
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    offsets = row * D + cols
    s = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + offsets, mask=mask, other=0.0)
        s = (s.to(tl.float32) + delta.to(tl.float32)).to(s.dtype)  # normalise what is stored
        tl.store(s_ptr + offsets, s, mask=mask)
    s_f32 = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s_f32 * s_f32) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    normed = (s_f32 * rstd).to(s.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, weight * normed, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program p takes rows p, p + P, p + 2P, ... and keeps its part of dweight in registers."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, n_rows, tl.num_programs(0)):
        offsets = row * D + cols
        # weight is read again for every row: it comes from the cache and frees registers
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
        dweight += dy * normed
        dnormed = dy * weight
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed) / D))
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx, mask=mask)
    tl.store(partial_ptr + program * D + cols, dweight, mask=mask)


# ---- 2. the operators: allocate, launch, and tell torch the shapes and the gradient


def _block_and_warps(width: int) -> tuple[int, int]:
    """One row per block; 16 numbers per thread, so that bf16 needs at most 64 registers each."""
    block = triton.next_power_of_2(width)
    return block, min(32, max(1, block // 512))


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return s (None without delta), y and rstd."""
    x, weight = x.contiguous(), weight.contiguous()
    delta = None if delta is None else delta.contiguous()
    s = None if delta is None else torch.empty_like(x)
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    width = x.shape[-1]
    block, warps = _block_and_warps(width)
    _forward_kernel[(x.numel() // width,)](
        x, delta, weight, s, y, rstd, eps, D=width, BLOCK=block, num_warps=warps
    )
    return s, y, rstd


@torch.library.custom_op("picotron_lab::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, y, rstd = _forward(x, None, weight, eps)
    return y, rstd


@torch.library.custom_op("picotron_lab::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, delta, weight, eps)


@torch.library.custom_op("picotron_lab::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx and dweight; ds is the gradient that arrives at the sum, None if there is none."""
    dy, s, weight = dy.contiguous(), s.contiguous(), weight.contiguous()
    ds = None if ds is None else ds.contiguous()
    width, n_rows = s.shape[-1], rstd.numel()
    block, warps = _block_and_warps(width)
    sms = torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else 1
    # 64 registers a thread let 32 warps live on one SM: start just enough programs to fill all
    programs = min(n_rows, sms * 32 // warps)
    dx = torch.empty_like(s)
    partial_PD = s.new_empty(programs, width, dtype=torch.float32)
    _backward_kernel[(programs,)](
        dy, ds, s, weight, rstd, dx, partial_PD, n_rows, D=width, BLOCK=block, num_warps=warps
    )
    return dx, partial_PD.sum(0).to(weight.dtype)


@_rms_norm.register_fake
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_rms_norm.register_fake
def _add_rms_norm_fake(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_rms_norm_fake(x, weight, eps)


@_rms_norm_backward.register_fake
def _rms_norm_backward_fake(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


def _rms_norm_save(ctx, inputs: tuple, output: tuple) -> None:
    (x, weight, _), (_, rstd) = inputs, output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_gradient(ctx, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_rms_norm_backward(dy, None, *ctx.saved_tensors), None


def _add_rms_norm_save(ctx, inputs: tuple, output: tuple) -> None:
    (_, _, weight, _), (s, _, rstd) = inputs, output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # an unused output sends None, not a tensor of zeros
    ctx.save_for_backward(s, weight, rstd)


def _add_rms_norm_gradient(
    ctx, ds: Tensor | None, dy: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if dy is None:  # only the sum was used
        return ds, ds, None, None
    dx, dweight = _rms_norm_backward(dy, ds, *ctx.saved_tensors)
    return dx, dx, dweight, None


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_save)
_add_rms_norm.register_autograd(_add_rms_norm_gradient, setup_context=_add_rms_norm_save)


# ---- 3. the public functions


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"The RMSNorm kernel computes in float32 and was given {x.dtype}; give it bfloat16, "
            "float16 or float32, or call torch.nn.functional.rms_norm."
        )
    if weight.dtype != x.dtype or weight.shape != x.shape[-1:] or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"The RMSNorm kernel was given x {tuple(x.shape)} {x.dtype} and weight "
            f"{tuple(weight.shape)} {weight.dtype}; both need one dtype, weight needs the length "
            f"of the last dim of x, and that length may be at most {MAX_WIDTH}."
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), the mean over the last dim.

    x [..., D] and weight [D] are bfloat16, float16 or float32, of one dtype, D <= 16384; the
    result is contiguous, in their dtype. Differentiable in x and weight, once.
    Raises TypeError for another dtype, ValueError for shapes that do not fit.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return s = x + delta and rms_norm(s, weight, eps): a block's end and the next one's start.

    x and delta [..., D], weight [D], dtypes and errors as in rms_norm. Both results are new
    tensors; the residual stream goes on in the first.
    """
    _check(x, weight)
    if delta.shape != x.shape or delta.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm was given x {tuple(x.shape)} {x.dtype} and delta {tuple(delta.shape)} "
            f"{delta.dtype}; they need one shape and one dtype."
        )
    s, y, _ = _add_rms_norm(x, delta, weight, eps)
    return s, y
