"""What a training step costs in floating-point operations.

Convention  a multiply and an add are 2 operations; backward is twice forward, so a weight costs 6
            per token. Counted: every matmul weight (the embedding is a look-up and costs nothing; a
            tied one counts once, as the head), and attention scores with the full T x T square:
            "6N + 12 L H C T".
Source      PaLM (2204.02311), appendix B; with causal=True the upper triangle is left out, as it
            need not be computed.
"""

from picotron_lab.config import ModelConfig


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that one token is multiplied with: of experts, those it goes through."""
    width = cfg.heads * cfg.head_width
    kv_width = cfg.kv_heads * cfg.head_width
    attention = cfg.hidden_size * (2 * width + 2 * kv_width)
    mlp = 3 * cfg.hidden_size * cfg.ffn_size
    if cfg.experts:
        mlp = (cfg.top_k + cfg.shared_experts) * mlp + cfg.hidden_size * cfg.experts
    return cfg.layers * (attention + mlp) + cfg.vocab_size * cfg.hidden_size


def flops_per_token(cfg: ModelConfig, sequence_length: int, causal: bool = False) -> float:
    """Training operations per token: 6 per matmul weight, 12 L H C T for attention (half if
    causal)."""
    attention = 12 * cfg.layers * cfg.heads * cfg.head_width * sequence_length
    return 6 * matmul_parameters(cfg) + attention / (2 if causal else 1)


def model_flops_utilisation(
    tokens_per_second: float, flops_of_token: float, peak: float | None, ranks: int
) -> float | None:
    """MFU: the share of the peak of all ranks that useful operations take; None if no peak is
    known."""
    return tokens_per_second * flops_of_token / (peak * ranks) if peak else None
