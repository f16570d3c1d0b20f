"""SwiGLU, silu(gate) * up, as one Triton kernel each way.

Source   Shazeer 2020, "GLU Variants Improve Transformer", section 2.
Idea     Multiply while the numbers are in registers; keep only the two inputs for the backward,
         which recomputes the sigmoid faster than it could read a saved product.
Fused    out = gate * sigmoid(gate) * up, in fp32, rounded once.
Bytes    per element, e = bytes of one stored number (2 for bf16):
           forward    silu (2e), multiply (3e):                                      5e
                      here (read gate and up, write out):                            3e
           backward   two products (6e), silu backward (3e):                         9e
                      here (read dout, gate and up, write dgate and dup):            5e
           saved      gate, silu(gate) and up: 3e;   here gate and up:               2e
Backward sigma = sigmoid(gate):
           dup = dout * gate * sigma
           dgate = dout * up * sigma * (1 + gate * (1 - sigma))
Dims     none: every element stands alone, so tensors are read as one flat run of numbers.
Reading  the two kernels, then the operators that launch them, then swiglu at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers per program: 128 threads (4 warps) times 8 bf16, one 128-bit load each
NUM_WARPS = 4


# ---- 1. the kernels


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _backward_kernel(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    tl.store(dgate_ptr + offsets, dout * up * sigma * (1.0 + gate * (1.0 - sigma)), mask=mask)
    tl.store(dup_ptr + offsets, dout * gate * sigma, mask=mask)


# ---- 2. the operators: allocate, launch, and tell torch the shapes and the gradient


@torch.library.custom_op("picotron_lab::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    n = gate.numel()
    _forward_kernel[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


@torch.library.custom_op("picotron_lab::swiglu_backward", mutates_args=())
def _swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    n = gate.numel()
    _backward_kernel[(triton.cdiv(n, BLOCK),)](
        dout, gate, up, dgate, dup, n, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return dgate, dup


@_swiglu.register_fake
def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _swiglu_backward_fake(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _swiglu_save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(dout, *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_save)


# ---- 3. the public function


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, element by element.

    gate and up have one shape, any, and one dtype: bfloat16, float16 or float32; the result is
    contiguous, in that shape and dtype. Differentiable in both, once.
    Raises TypeError for another dtype, ValueError if the two do not fit each other.
    """
    if gate.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"The SwiGLU kernel computes in float32 and was given {gate.dtype}; give it bfloat16, "
            "float16 or float32, or compute torch.nn.functional.silu(gate) * up."
        )
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu was given gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} "
            f"{up.dtype}; they need one shape and one dtype."
        )
    return _swiglu(gate, up)
