"""Llama and MoE-Llama on one device: the plain model that every technique must equal.

Paper   Touvron et al. 2023 (2302.13971), section 2.2; grouped-query attention (2305.13245); rotary
        positions (2104.09864); mixture of experts as in Mixtral (2401.04088), section 2.1
Idea    tokens -> embedding -> L blocks (x + attention(norm(x)), then x + mlp(norm(x))) -> norm ->
        head. Parts are small modules, so that a technique can replace one and leave the rest alone.
Dims    B micro-batch  T sequence (S: as keys)  D width  H/K query/kv heads  G = H/K  C head width
        F feed-forward width  E experts  V vocabulary  N = B*T tokens
Read    Llama -> Block -> Attention -> MLP, MoE -> Head; parallelism does not exist in this file
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Dropout, Where
from picotron_lab.router import Router, wide

IGNORED = -100  # a label that counts neither in the loss nor in its normalisation


class Llama(nn.Module):
    """tokens [B, T] -> logits [B, T, V], or with labels the *sum* of the token losses."""

    def __init__(self, cfg: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.cfg = cfg
        table = torch.empty(cfg.vocab_size, cfg.hidden_size)  # all weights are drawn later
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.embed_dropout = Dropout(dropout, site=0)
        self.layers = nn.ModuleList(Block(cfg, i, dropout) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.head = Head(cfg.hidden_size, cfg.vocab_size)
        if cfg.tied:
            self.head.weight = self.embed.weight

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor | None = None, where: Where | None = None
    ) -> Tensor:
        where = where or Where.first(tokens_BT)
        x_BTD = self.embed_dropout(self.embed(tokens_BT), where)
        angles = rotary_angles(where.positions_T, self.cfg.head_width, self.cfg.rope_theta)
        for layer in self.layers:
            x_BTD = layer(x_BTD, angles, where)
        return self.head(self.norm(x_BTD), labels_BT)


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, cfg: ModelConfig, layer: int, dropout: float):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.attention_dropout = Dropout(dropout, site=2 * layer + 1)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp = MoE(cfg) if cfg.experts else MLP(cfg.hidden_size, cfg.ffn_size)
        self.mlp_dropout = Dropout(dropout, site=2 * layer + 2)

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], where: Where) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD), angles, where.documents_BT)
        x_BTD = x_BTD + self.attention_dropout(attended_BTD, where)
        return x_BTD + self.mlp_dropout(self.mlp(self.mlp_norm(x_BTD)), where)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dim."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = wide(x_BTD)
        rms = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.weight * (x * rms).to(x_BTD.dtype)


def rotary_angles(positions_T: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin [T, C] of the rotary embedding: channel pair i turns by position / theta^(2i/C)."""
    exponents = torch.arange(0, width, 2, device=positions_T.device).float() / width
    angles = positions_T[:, None].float() / theta**exponents
    angles_TC = torch.cat([angles, angles], -1)  # channel i pairs with channel i + C/2
    return angles_TC.cos(), angles_TC.sin()


class Rotate(nn.Module):
    """Turn the halves a, b of each head by its position: (a cos - b sin, b cos + a sin)."""

    def forward(self, q_BTHC: Tensor, k_BTKC: Tensor, angles: tuple) -> tuple[Tensor, Tensor]:
        return self._turn(q_BTHC, *angles), self._turn(k_BTKC, *angles)

    def _turn(self, x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        cos, sin = cos_TC[:, None].to(x_BTHC.dtype), sin_TC[:, None].to(x_BTHC.dtype)
        a, b = x_BTHC.chunk(2, -1)
        return x_BTHC * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Grouped-query attention: G query heads share one key/value head."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D, C = cfg.hidden_size, cfg.head_width
        self.head_width = C
        self.q = nn.Linear(D, cfg.heads * C, bias=False)
        self.k = nn.Linear(D, cfg.kv_heads * C, bias=False)
        self.v = nn.Linear(D, cfg.kv_heads * C, bias=False)
        self.o = nn.Linear(cfg.heads * C, D, bias=False)
        self.rotate = Rotate()
        self.core = AttentionCore()

    def forward(self, x_BTD: Tensor, angles: tuple, documents_BT: Tensor | None = None) -> Tensor:
        qkv = (linear(x_BTD) for linear in (self.q, self.k, self.v))
        q, k, v = (rearrange(x, "b t (h c) -> b t h c", c=self.head_width) for x in qkv)
        q_BTHC, k_BTKC = self.rotate(q, k, angles)
        return self.o(self.core(q_BTHC, k_BTKC, v, documents_BT).flatten(2))


class AttentionCore(nn.Module):
    """Causal softmax(q k^T / sqrt(C)) v with all T*T scores, each document of T by itself."""

    def forward(
        self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None = None
    ) -> Tensor:
        T, K, C = k_BTKC.shape[1:]
        q = rearrange(q_BTHC, "b t (k g) c -> b t k g c", k=K)
        scores = wide(einsum(q, k_BTKC, "b t k g c, b s k c -> b k g t s")) / math.sqrt(C)
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # the future
        if documents_BT is not None:
            hidden = hidden | (documents_BT[:, :, None] != documents_BT[:, None])[:, None, None]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(q.dtype)
        return einsum(weights, v_BTKC, "b k g t s, b s k c -> b t k g c").flatten(2, 3)


class SwiGLU(nn.Module):
    """silu(gate) * up."""

    def forward(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        return F.silu(gate_BTF) * up_BTF


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(size, hidden, bias=False)
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)
        self.activation = SwiGLU()

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_BTD), self.up(x_BTD)))


class MoE(nn.Module):
    """Each token goes through the experts that its router chose, and a shared one if there is."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D, hidden = cfg.hidden_size, cfg.ffn_size
        self.router = Router(cfg)
        self.experts = nn.ModuleList(MLP(D, hidden) for _ in range(cfg.experts))
        self.shared = MLP(D, cfg.shared_experts * hidden) if cfg.shared_experts else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        expert_Nk, gate_Nk = self.router(x_BTD)
        x_ND = x_BTD.flatten(0, 1)
        out_ND = torch.zeros_like(x_ND) if self.shared is None else self.shared(x_ND)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(expert_Nk == e)
            out = expert(x_ND[token]) * gate_Nk[token, choice, None]
            out_ND = out_ND.index_add(0, token, out)
        return out_ND.view_as(x_BTD)


class Head(nn.Module):
    """Output layer and loss: logits, or the sum over counted tokens of -log p(label)."""

    def __init__(self, D: int, V: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(V, D))

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        logits_BTV = F.linear(x_BTD, self.weight)
        if labels_BT is None:
            return logits_BTV
        logits_NV, labels_N = wide(logits_BTV).flatten(0, 1), labels_BT.flatten()
        return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


def initial_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norm weights are 1, others normal with deviation 0.02 (GPT-2, section 2.3)."""
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
