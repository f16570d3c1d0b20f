"""Saved activations of the fused path (fused.py): the closed forms of activations.py again.

Paper   as there; attention that keeps no scores: FlashAttention (2205.14135), section 3.1; the loss
        in chunks: Liger Kernel (2410.10989), section 3.2
Forms   e: bytes of an element, w: the same, but at least 4; N = B T tokens of a rank
        operator             torch's operators              kernels (CUDA, not float64)
        RMSNorm, both        x and x / rms, widened;        x; 1/rms in float32; result
                             1/rms; result
                             2 w N D + w N + e N D          2 e N D + 4 N
        Rotate               4 e T C, unless float32        0: the tables of all layers
        attention            q, k, v; result; row sums: e N (2 H + 2 K) C + w B H T
        SwiGLU, down         gate, silu(gate), up, product  gate, up, product
                             4 e N F                        3 e N F
        Dropout, both        2 N D
        last norm            w N D + w N + e N D: what it gives is not kept, for the head
        head                 makes its gradients in forward: of its input e N D, of its weight w V D
        In bfloat16, H C = D, without dropout, beside some bytes per row: N D (12 + 4 K/H + 6 F/D) a
        layer with kernels, N D (24 + 4 K/H + 8 F/D) without. Llama 3 8B: 34 N D, and 53 N D.
        No T T anywhere. So context parallelism changes no form: attention by blocks keeps the same,
        of T/n tokens. Only the head's weight gradient stays when T falls.
Dims    as in model.py
Tests   tests/test_context_memory.py: equal to what the meter of meter.py sees, to the byte
"""

from picotron_lab.analysis import activations
from picotron_lab.analysis.activations import Setting, own_columns, own_heads
from picotron_lab.config import ModelConfig


def layer_bytes(
    cfg: ModelConfig, at: Setting, recompute: str = "none", kernels: bool = False
) -> dict[str, int]:
    """Bytes that one dense layer keeps, by operator: the table above.

    recompute  none, and selective, which leaves fused attention as it is | full: the input only
    kernels    whether Triton kernels serve: CUDA, but not float64
    """
    activations.check(cfg, recompute)
    e, N, own, D, C = at.element, at.tokens, at.own_tokens, cfg.hidden_size, cfg.head_width
    if recompute == "full":
        return {"input": e * own * D}
    (H, K), F = own_heads(cfg, at.ranks), own_columns(cfg, at.ranks)
    return {
        "norms": 2 * norm_bytes(cfg, at, kernels),
        "angles": 0 if kernels else activations.narrowed_angles(cfg, at),
        "q, k, v": e * N * (H + 2 * K) * C,
        "row sums": activations.row_sums(at, H),
        "mixed values": e * N * H * C,
        "mlp": (3 if kernels else 4) * e * N * F,
        "dropout": 2 * own * D if at.dropout else 0,
    }


def norm_bytes(cfg: ModelConfig, at: Setting, kernels: bool = False) -> int:
    """Bytes that a fused RMSNorm and the matmuls after it keep."""
    numbers = at.own_tokens * cfg.hidden_size
    if kernels:
        return 2 * at.element * numbers + 4 * at.own_tokens
    return 2 * at.wide * numbers + at.wide * at.own_tokens + at.element * numbers


def rest_bytes(
    cfg: ModelConfig, at: Setting, recompute: str = "none", kernels: bool = False
) -> dict[str, int]:
    """Bytes kept outside the layers of a fused model on one tensor-parallel rank, with its loss."""
    activations.check(cfg, recompute, at)
    numbers = at.tokens * cfg.hidden_size
    shared = kernels or at.element == activations.ANGLE_BYTES or recompute == "full"
    return {
        "dropout of embedding": numbers if at.dropout else 0,
        "angles": activations.angle_bytes(cfg, at) if shared else 0,
        "last norm": (at.wide + at.element) * numbers + at.wide * at.tokens,
        "gradients of head": at.element * numbers + at.wide * cfg.vocab_size * cfg.hidden_size,
        "loss": at.wide,
    }


def model_bytes(
    cfg: ModelConfig, at: Setting, recompute: str = "none", kernels: bool = False
) -> int:
    """Bytes that forward of a whole fused model leaves for backward, on one rank."""
    layer = layer_bytes(cfg, at, recompute, kernels)
    rest = rest_bytes(cfg, at, recompute, kernels)
    return cfg.layers * sum(layer.values()) + sum(rest.values())
