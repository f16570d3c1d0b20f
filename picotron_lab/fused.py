"""The fused model: the same modules as model.py, with fewer trips to memory.

Idea    A matmul is bound by arithmetic; norms, rotations, activations and the loss are bound by
        memory. Fusing them saves reads and writes, and never forming a large tensor saves memory as
        well:
        attention     scores T*T stay on chip (scaled_dot_product_attention)
        add + norm    x + delta is read once and normalised while it is there
        rotary, SwiGLU one kernel each way; only the inputs are saved for backward
        loss          logits exist for a chunk of tokens at a time, never all N*V of them
Where   CUDA: Triton kernels (kernels/) or torch's fused operators. CPU, and float64 anywhere:
        torch's operators. Same parameters under the same names: fuse() may be called on any plain
        model.
Paper   chunked loss: Liger Kernel (2410.10989), section 3.2; attention: FlashAttention (2205.14135)
Dims    as in model.py; N = B*T tokens, a chunk has n of them
Read    fuse -> FusedBlock -> SDPA -> ChunkedHead
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from picotron_lab import deferred
from picotron_lab.dropout import Where
from picotron_lab.model import (
    IGNORED,
    MLP,
    Attention,
    AttentionCore,
    Block,
    Head,
    Llama,
    Rotate,
    SwiGLU,
    wide,
)  # fmt: skip

CHUNK_ELEMENTS = {
    "cuda": 2**27,
    "cpu": 2**21,
}  # logits alive at a time; small ones stay in CPU caches


def fuse(model: Llama) -> None:
    """Replace the parts of a plain model, in place, by fused ones with the same parameters."""
    for i, block in enumerate(model.layers):
        for part in block.modules():
            if isinstance(part, Attention):
                part.rotate, part.core = FusedRotate(), SDPA()
            if isinstance(part, MLP):
                part.activation = FusedSwiGLU()
        model.layers[i] = FusedBlock(block)
    model.head = ChunkedHead(model.head)


def has_kernel(x: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0


class FusedBlock(nn.Module):
    """A Block whose second norm also does the addition before it."""

    def __init__(self, block: Block):
        super().__init__()
        for name, part in block.named_children():
            setattr(self, name, part)

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], where: Where) -> Tensor:
        first, second = self.attention_norm, self.mlp_norm
        normed_BTD = F.rms_norm(x_BTD, first.weight.shape, first.weight, first.eps)
        attended_BTD = self.attention(normed_BTD, angles, where.documents_BT)
        delta_BTD = self.attention_dropout(attended_BTD, where)
        x_BTD, normed_BTD = add_rms_norm(x_BTD, delta_BTD, second.weight, second.eps)
        return x_BTD + self.mlp_dropout(self.mlp(normed_BTD), where)


def add_rms_norm(
    x_BTD: Tensor, delta_BTD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm)."""
    if has_kernel(x_BTD):
        from picotron_lab.kernels import norm

        return norm.add_rms_norm(x_BTD, delta_BTD, weight_D, eps)
    x_BTD = x_BTD + delta_BTD
    return x_BTD, F.rms_norm(x_BTD, weight_D.shape, weight_D, eps)


class FusedRotate(Rotate):
    """Queries and keys turned in one kernel."""

    def forward(self, q_BTHC: Tensor, k_BTKC: Tensor, angles: tuple) -> tuple[Tensor, Tensor]:
        if not has_kernel(q_BTHC):
            return super().forward(q_BTHC, k_BTKC, angles)
        from picotron_lab.kernels import rope

        return rope.rope_qk(q_BTHC, k_BTKC, *angles)


class FusedSwiGLU(SwiGLU):
    """silu(gate) * up in one kernel each way."""

    def forward(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        if not has_kernel(gate_BTF):
            return super().forward(gate_BTF, up_BTF)
        from picotron_lab.kernels import swiglu

        return swiglu.swiglu(gate_BTF, up_BTF)


class SDPA(AttentionCore):
    """torch's fused causal attention: cuDNN or flash kernels on CUDA, flash on CPU."""

    def forward(
        self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None = None
    ) -> Tensor:
        q, k, v = (rearrange(x, "b t h c -> b h t c") for x in (q_BTHC, k_BTKC, v_BTKC))
        mask = None
        if documents_BT is not None:  # True: may be seen
            same = documents_BT[:, None, :, None] == documents_BT[:, None, None]
            mask = same.tril()
        causal, grouped = mask is None, q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        return rearrange(out, "b h t c -> b t h c")


# ---- the loss, a chunk of tokens at a time


class ChunkedHead(nn.Module):
    """A Head that computes loss and gradients chunk by chunk."""

    def __init__(self, head: Head):
        super().__init__()
        self.weight = head.weight

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        if labels_BT is None:
            return F.linear(x_BTD, self.weight)
        elements = CHUNK_ELEMENTS["cuda" if x_BTD.is_cuda else "cpu"]
        chunk = max(1, elements // self.weight.shape[0])
        x_ND, labels_N = x_BTD.flatten(0, 1), labels_BT.flatten()
        learning = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(x_ND, self.weight, labels_N, chunk, learning)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over counted tokens of -log softmax(x W^T)[label], with gradients made in the forward.

    The gradient of a summed loss needs only one number from above, the factor that backward gives.
    So a chunk's logits can turn into its part of dX and dW while they exist. Source: 2410.10989,
    3.2.
    """

    @staticmethod
    def forward(
        ctx, x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, chunk: int, learning: bool
    ) -> Tensor:
        loss = wide(x_ND.new_zeros(()))
        dx_ND = torch.empty_like(x_ND) if learning else None
        dw_VD = wide(torch.zeros_like(w_VD)) if learning else None
        for first in range(0, x_ND.shape[0], chunk):
            rows = slice(first, first + chunk)
            into = (dx_ND[rows], dw_VD) if learning else None
            loss += loss_of_chunk(x_ND[rows], w_VD, labels_N[rows], into)
        if learning:
            ctx.save_for_backward(dx_ND, dw_VD)
            ctx.weight_dtype = w_VD.dtype
        return loss

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dw_VD = ctx.saved_tensors
        return dx_ND.mul_(factor), dw_VD.mul_(factor).to(ctx.weight_dtype), None, None, None


def loss_of_chunk(
    x_nD: Tensor, w_VD: Tensor, labels_n: Tensor, into: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Sum of the losses of n tokens. into: where their dX is written, and their dW is added."""
    counted_n = labels_n != IGNORED  # other labels outside the vocabulary stay errors
    word_n1 = labels_n.masked_fill(~counted_n, 0)[:, None]
    logits_nV = wide(x_nD @ w_VD.T)
    picked_n1 = logits_nV.gather(1, word_n1)
    log_sum_n1 = softmax_(logits_nV)
    loss = ((log_sum_n1 - picked_n1).squeeze(1) * counted_n).sum()
    if into is not None:
        dx_nD, dw_VD = into
        ones_n1 = torch.ones_like(picked_n1)
        grad_nV = logits_nV.scatter_add_(1, word_n1, -ones_n1).to(x_nD.dtype)
        torch.mul(grad_nV @ w_VD, counted_n[:, None], out=dx_nD)
        deferred.add_product(dw_VD, grad_nV, x_nD * counted_n[:, None])
    return loss


def softmax_(logits_nV: Tensor) -> Tensor:
    """Logits become probabilities, in place; returns log sum exp of each row, [n, 1].

    log p = logit - log sum exp holds for every word; for the likeliest one p cannot be near 0.
    """
    largest_n1 = logits_nV.amax(-1, keepdim=True)
    torch.softmax(logits_nV, -1, out=logits_nV)
    return largest_n1 - logits_nV.amax(-1, keepdim=True).log()
