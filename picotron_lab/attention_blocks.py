"""Attention between some queries and some keys, and how such blocks add up to the whole softmax.

Paper   Online normalizer, Milakov and Gimelshein 2018 (1805.02867), section 3.1: merging;
        FlashAttention-2, Dao 2023 (2307.08691), section 3.1: backward from one number per row
Idea    A softmax over many keys can be computed block by block. A block gives, per query, the
        weighted mean of its values (out) and the log of its sum of exponentials (lse). Two merge:
            w = e^lse_2 / (e^lse_1 + e^lse_2) = sigmoid(lse_2 - lse_1)
            out = (1 - w) out_1 + w out_2        lse = log(e^lse_1 + e^lse_2)
        Backward needs no order at all. From out and lse of the whole row every block stands alone,
            P = exp(scores - lse)        dV = P^T dO        dS = P (dO V^T - rowsum(dO out))
            dQ = dS K / sqrt(C)          dK = dS^T Q / sqrt(C)
        and dQ is summed over the blocks of keys, dK and dV over the blocks of queries.
Blind   A query may see no key of a block (another document's). Its out is 0, its lse -inf = log 0,
        and the formulas hold, if -inf - -inf is kept from being computed.
Here    nothing is sent and nothing recorded for autograd: context_parallel.py and token_pipeline.py
        call these inside their autograd Functions, block by block.
Dims    B micro-batch  T queries, a rank's tokens  S keys that they meet, a block's
        H/K query/kv heads  G = H/K  C head width; query head h uses kv head h // G
Read    PlainBlocks -> FusedBlocks -> CpuFlash, CudaFlash -> Chunks -> Masked
"""

import math
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from picotron_lab.router import wide

QKV = tuple[Tensor, Tensor, Tensor]  # q [B, T, H, C]; k, v [B, S, K, C]
Row = tuple[Tensor, Tensor]  # of all keys, not of a block's: out [B, T, H, C], lse [B, H, T]
Documents = tuple[Tensor, Tensor] | None  # of the queries [B, T] and of the keys [B, S]


# ---- 1. the idea


def hidden_keys(
    T: int, S: int, causal: bool, documents: Documents, device: torch.device
) -> Tensor | None:
    """[1 or B, T, S], True where a key is hidden from a query; None where none is.

    Causal: the last query sees all keys, the one before it all but one, and so on.
    """
    hidden_BTS = None
    if causal:
        hidden_BTS = torch.ones(1, T, S, dtype=torch.bool, device=device).triu(S - T + 1)
    if documents is not None:
        other_BTS = documents[0][:, :, None] != documents[1][:, None]
        hidden_BTS = other_BTS if hidden_BTS is None else hidden_BTS | other_BTS
    return hidden_BTS


def blind_rows(lse_BHT: Tensor, value: float) -> Tensor:
    """lse with another value than -inf where a row sees nothing."""
    return lse_BHT.masked_fill(lse_BHT == -math.inf, value)


# ---- 2. plain path


class PlainBlocks:
    """Blocks of attention with all T*S scores; arithmetic and results in float32 at least.

    causal     the last query sees all keys, each query before it one key less; flash attention and
               Chunks want a square on the diagonal, T == S, where query t sees keys 0..t
    documents  what is not of the query's document is hidden
    lse        [B, H, T], -inf for a row that sees nothing; its out is 0
    """

    def attend(
        self,
        q_BTHC: Tensor,
        k_BSKC: Tensor,
        v_BSKC: Tensor,
        causal: bool,
        documents: Documents = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and a block of keys and values -> (out [B, T, H, C], lse [B, H, T])."""
        p_BKGTS = _scores(q_BTHC, k_BSKC, causal, documents)
        peak_BKGT = blind_rows(p_BKGTS.amax(-1), 0)
        p_BKGTS.sub_(peak_BKGT[..., None]).exp_()
        sum_BKGT = p_BKGTS.sum(-1)  # 1 at least, from the peak; 0 if blind
        out = einsum(p_BKGTS, wide(v_BSKC), "b k g t s, b s k c -> b t k g c")
        out /= rearrange(sum_BKGT.clamp(min=1), "b k g t -> b t k g 1")
        return out.flatten(2, 3), (peak_BKGT + sum_BKGT.log()).flatten(1, 2)

    def attend_backward(
        self, grad_BTHC: Tensor, qkv: QKV, row: Row, causal: bool, documents: Documents = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq [B, T, H, C], dk, dv [B, S, K, C]): what a block adds to the gradients."""
        (q_BTHC, k_BSKC, v_BSKC), (out_BTHC, lse_BHT) = qkv, row
        K, C = k_BSKC.shape[2:]
        k, v = wide(k_BSKC), wide(v_BSKC)
        grad, q, out = (
            rearrange(wide(x), "b t (k g) c -> b k g t c", k=K)
            for x in (grad_BTHC, q_BTHC, out_BTHC)
        )
        lse_BKGT = blind_rows(lse_BHT, math.inf).unflatten(1, (K, -1))
        p_BKGTS = _scores(q_BTHC, k_BSKC, causal, documents).sub_(lse_BKGT[..., None]).exp_()
        dv = einsum(p_BKGTS, grad, "b k g t s, b k g t c -> b s k c")
        dp_BKGTS = einsum(grad, v, "b k g t c, b s k c -> b k g t s")
        ds = dp_BKGTS.sub_((grad * out).sum(-1, keepdim=True)).mul_(p_BKGTS).div_(math.sqrt(C))
        dq = einsum(ds, k, "b k g t s, b s k c -> b t k g c").flatten(2, 3)
        return dq, einsum(ds, q, "b k g t s, b k g t c -> b s k c"), dv

    def merge(
        self, out_BTHC: Tensor, lse_BHT: Tensor, block_out_BTHC: Tensor, block_lse_BHT: Tensor
    ) -> None:
        """Overwrite out and lse (both wide) by those of the softmax over both sets of keys."""
        ahead_BHT = (block_lse_BHT - lse_BHT).masked_fill_(block_lse_BHT == -math.inf, -math.inf)
        weight = rearrange(ahead_BHT.sigmoid_(), "b h t -> b t h 1")
        out_BTHC.lerp_(block_out_BTHC.to(out_BTHC.dtype), weight)
        lse_BHT.copy_(torch.logaddexp(lse_BHT, block_lse_BHT))


def _scores(q_BTHC: Tensor, k_BSKC: Tensor, causal: bool, documents: Documents) -> Tensor:
    """[B, K, G, T, S] in float32 at least, -inf where hidden."""
    S, K, C = k_BSKC.shape[1:]
    q = rearrange(wide(q_BTHC), "b t (k g) c -> b t k g c", k=K)
    scores = einsum(q, wide(k_BSKC), "b t k g c, b s k c -> b k g t s").div_(math.sqrt(C))
    hidden_BTS = hidden_keys(q.shape[1], S, causal, documents, q.device)
    if hidden_BTS is not None:
        scores.masked_fill_(hidden_BTS[:, None, None], -math.inf)
    return scores


# ---- 3. fused path


class FusedBlocks(PlainBlocks):
    """The same with torch's flash attention, whose scores stay on chip.

    Where that serves, out and the gradients have q's dtype, and merge widens out. On CUDA it knows
    bfloat16 and float16 and no documents; the rest goes through Chunks. On a CPU documents need a
    mask, which is made for some queries at a time: Masked. merge is one kernel on CUDA.
    """

    def attend(
        self,
        q_BTHC: Tensor,
        k_BSKC: Tensor,
        v_BSKC: Tensor,
        causal: bool,
        documents: Documents = None,
    ) -> tuple[Tensor, Tensor]:
        way = _fastest(q_BTHC, documents)
        return way.attend(q_BTHC, k_BSKC, v_BSKC, causal, documents)

    def attend_backward(
        self, grad_BTHC: Tensor, qkv: QKV, row: Row, causal: bool, documents: Documents = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        way = _fastest(qkv[0], documents)
        return way.attend_backward(grad_BTHC, qkv, row, causal, documents)

    def merge(
        self, out_BTHC: Tensor, lse_BHT: Tensor, block_out_BTHC: Tensor, block_lse_BHT: Tensor
    ) -> None:
        if not out_BTHC.is_cuda or out_BTHC.dtype == torch.float64 or not out_BTHC.numel():
            return super().merge(out_BTHC, lse_BHT, block_out_BTHC, block_lse_BHT)
        from picotron_lab.kernels import merge

        return merge.merge_(out_BTHC, lse_BHT, block_out_BTHC, block_lse_BHT)


def _fastest(q_BTHC: Tensor, documents: Documents) -> Any:
    """What has attend and attend_backward for such queries."""
    if not q_BTHC.is_cuda:
        return CpuFlash() if documents is None else Masked()
    fits = q_BTHC.shape[-1] % 8 == 0 and q_BTHC.shape[-1] <= 256
    half = q_BTHC.dtype in (torch.bfloat16, torch.float16)
    return CudaFlash() if half and fits and documents is None else Chunks()


def _heads_first(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """[B, T, H, C] -> [B, H, T, C], channels side by side: the operators believe it unasked."""
    tensors = [x.to(dtype) for x in tensors]
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return [x.transpose(1, 2) for x in tensors]


class CpuFlash:
    """attend, attend_backward: torch's flash attention for CPUs, in any precision; grouped heads.
    With documents a mask [B, 1, T, S] says it all, the future too."""

    def attend(
        self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, causal: bool, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _heads_first((q_BTHC, k_BSKC, v_BSKC), q_BTHC.dtype)
        mask, blind_BT = self.mask(q, k, causal, documents)
        out, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal and mask is None, attn_mask=mask
        )
        if blind_BT is not None:  # the operator says lse = 0
            lse_BHT = lse_BHT.masked_fill(blind_BT[:, None], -math.inf)
        return out.transpose(1, 2), lse_BHT

    def attend_backward(
        self, grad_BTHC: Tensor, qkv: QKV, row: Row, causal: bool, documents: Documents
    ) -> tuple[Tensor, Tensor, Tensor]:
        out_BTHC, lse_BHT = row
        grad, q, k, v, out = _heads_first((grad_BTHC, *qkv, out_BTHC), qkv[0].dtype)
        mask, _ = self.mask(q, k, causal, documents)
        causal, lse_BHT = causal and mask is None, blind_rows(lse_BHT, math.inf)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse_BHT, 0.0, causal, attn_mask=mask
        )
        return tuple(x.transpose(1, 2) for x in grads)

    def mask(
        self, q: Tensor, k: Tensor, causal: bool, documents: Documents
    ) -> tuple[Tensor | None, Tensor | None]:
        """With documents: what is added to scores [B, 1, T, S], which rows see nothing [B, T]."""
        if documents is None:
            return None, None
        hidden_BTS = hidden_keys(q.shape[2], k.shape[2], causal, documents, q.device)
        mask = q.new_zeros(hidden_BTS.shape).masked_fill_(hidden_BTS, -math.inf)
        return mask[:, None], hidden_BTS.all(-1)


class CudaFlash:
    """attend, attend_backward: FlashAttention-2 as torch brings it; grouped heads, no documents."""

    def attend(
        self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, causal: bool, documents: None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _heads_first((q_BTHC, k_BSKC, v_BSKC), q_BTHC.dtype)
        out, lse_BHT, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out.transpose(1, 2), lse_BHT

    def attend_backward(
        self, grad_BTHC: Tensor, qkv: QKV, row: Row, causal: bool, documents: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out_BTHC, lse_BHT = row
        grad, q, k, v, out = _heads_first((grad_BTHC, *qkv, out_BTHC), qkv[0].dtype)
        dice = lse_BHT.new_empty(2, dtype=torch.uint64)  # for dropout: never read
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse_BHT.contiguous(),
            None, None, q.shape[2], k.shape[2], 0.0, causal, dice, dice,
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in grads)


CHUNK_ELEMENTS = 2**27  # scores alive at a time: 512 MiB in float32


class Chunks:
    """attend, attend_backward: those of `way` for some queries at a time; of the plain arithmetic,
    on any device, for as many as have CHUNK_ELEMENTS scores. Gradients are wide."""

    way: Any = PlainBlocks()

    def attend(
        self, q_BTHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, causal: bool, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        parts = [
            self.way.attend(q_BTHC[:, rows], k_BSKC[:, keys], v_BSKC[:, keys], causal, seen)
            for rows, keys, seen in self.chunks(q_BTHC, k_BSKC, causal, documents)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def attend_backward(
        self, grad_BTHC: Tensor, qkv: QKV, row: Row, causal: bool, documents: Documents
    ) -> tuple[Tensor, Tensor, Tensor]:
        (q, k, v), (out, lse) = qkv, row
        dq, dk, dv = (torch.zeros_like(wide(x)) for x in qkv)
        for rows, keys, seen in self.chunks(q, k, causal, documents):
            part = q[:, rows], k[:, keys], v[:, keys]
            part_row = out[:, rows], lse[..., rows]
            dq[:, rows], dk_part, dv_part = self.way.attend_backward(
                grad_BTHC[:, rows], part, part_row, causal, seen
            )
            dk[:, keys] += dk_part
            dv[:, keys] += dv_part
        return dq, dk, dv

    def chunks(
        self, q_BTHC: Tensor, k_BSKC: Tensor, causal: bool, documents: Documents
    ) -> list[tuple[slice, slice, Documents]]:
        """(queries, keys that they see, documents of both) of each chunk."""
        T, S = q_BTHC.shape[1], k_BSKC.shape[1]
        step = max(1, self.most_rows(q_BTHC, S))
        chunks = []
        for first in range(0, T, step):
            rows = slice(first, min(first + step, T))
            keys = slice(rows.stop if causal else S)
            seen = documents and (documents[0][:, rows], documents[1][:, keys])
            chunks.append((rows, keys, seen))
        return chunks

    def most_rows(self, q_BTHC: Tensor, S: int) -> int:
        """How many queries at a time."""
        B, _, H, _ = q_BTHC.shape
        return CHUNK_ELEMENTS // (B * H * S)


class Masked(Chunks):
    """Flash attention on a CPU for as many queries as have a mask no larger than q: no T * S."""

    way = CpuFlash()

    def most_rows(self, q_BTHC: Tensor, S: int) -> int:
        return q_BTHC[0].numel() // S


# ---- 4. contract

BLOCKS = {"plain": PlainBlocks(), "fused": FusedBlocks()}
