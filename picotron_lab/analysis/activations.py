"""Saved activations: the bytes that forward leaves for backward, as closed forms.

Paper   Korthikanti et al. 2022, section 4 (2205.05198). For GPT in 16 bit, one layer:
            s b h (34 + 5 a s / h)        tensor parallel:    s b h (10 + 24 / t + 5 a s / (h t))
            + sequence parallel: all / t                      selective: without 5 a s / h
Ours    the same count for the plain path of model.py, where every operator keeps what torch keeps.
        e: bytes of an element, w: the same, but at least 4 (model.py's `wide`); N = B T tokens.
        operator                 keeps for backward                           bytes
        RMSNorm, both of them    its input, widened; 1/rms of each token      w N D + w N
                                 x / rms, for the weight; its result, for     2 e N D
                                 the matmul that follows
        Rotate                   q's and k's cos and sin, unless float32      4 e T C
        q k^T                    q and k, turned                              e N (H + K) C
        mask                     which scores lie in the future               T T
        softmax                  the weights, wide                            w B H T T
        weights v                the weights, narrowed or reordered; v        e B H T T + e N K C
        o                        its input                                    e N H C
        SwiGLU, down             gate, silu(gate), up, their product          4 e N F
        Dropout, both of them    which elements stay, 1 byte each             N D
        With w = e, and H = K or T = 1, softmax and `weights v` keep the same tensor: count it once.
        In bfloat16 with H C = D, D = h, H = a: s b h (22 + 4 K/H + 8 F/D + 6 a s / h), where 22 is
        16 for norms, 4 for q and o, 2 for dropout. GPT's 34 is 11 for attention, 19 for the MLP, 4
        for norms; its 5 a s / h a softmax of 16 bit, dropout of it, and its mask.
n ranks tensor parallel: H/n, K/n (at least 1) and F/n. Sequence parallel also: norms and dropout
        N/n; the matmuls that follow a norm keep its shard and gather it again in backward.
        context parallel, with blocks (ring, zigzag, all-gather): T/n tokens of each sequence, and
        instead of mask, softmax and weights the log of each row's sum: w B H T/n. All of it falls
        as 1/n, which is how long sequences fit. (Ulysses: saved_bytes of context.py.)
Fused   fused_activations.py
Dims    as in model.py
Tests   tests/test_activations.py, tests/test_context_memory.py: equal to what the meter of
        meter.py sees, to the byte
"""

from dataclasses import dataclass

from picotron_lab.config import RECOMPUTE, ModelConfig

ANGLE_BYTES = 4  # an element of rotary_angles is float32, whatever the model is


@dataclass(frozen=True)
class Setting:
    """A micro-batch on one rank; of uneven parts of T and F, the largest."""

    batch: int  # B
    sequence: int  # T, all of it
    element: int  # bytes: 2 for bfloat16, 4 for float32, 8 for float64
    dropout: bool = False
    ranks: int = 1  # tensor parallel
    sequence_parallel: bool = False
    context_ranks: int = 1  # with blocks, not ulysses

    @property
    def length(self) -> int:
        """Tokens of each sequence that a rank has in attention and MLP."""
        return _part(self.sequence, self.context_ranks)

    @property
    def tokens(self) -> int:
        """N, those of all sequences."""
        return self.batch * self.length

    @property
    def own_tokens(self) -> int:
        """Tokens that a rank holds between these regions."""
        return self.batch * _part(self.length, self.ranks if self.sequence_parallel else 1)

    @property
    def wide(self) -> int:
        """Bytes of an element in which sums over many are taken."""
        return max(self.element, 4)


def layer_bytes(cfg: ModelConfig, at: Setting, recompute: str = "none") -> dict[str, int]:
    """Bytes that one dense layer keeps, by operator: the table above.

    recompute  none | selective: nothing between q, k, v and the mixed values; context-parallel
               blocks are so by themselves, and keep their row sums | full: the input only
    """
    check(cfg, recompute)
    e, N, own, D, C = at.element, at.tokens, at.own_tokens, cfg.hidden_size, cfg.head_width
    if recompute == "full":
        return {"input": e * own * D}
    (H, K), F = own_heads(cfg, at.ranks), own_columns(cfg, at.ranks)
    return {
        "norms": 2 * norm_bytes(cfg, at),
        "angles": narrowed_angles(cfg, at),
        "q, k, v": e * N * (H + 2 * K) * C,
        "scores": _score_bytes(at, H, K, recompute),
        "mixed values": e * N * H * C,
        "mlp": 4 * e * N * F,
        "dropout": 2 * own * D if at.dropout else 0,
    }


def norm_bytes(cfg: ModelConfig, at: Setting) -> int:
    """Bytes that an RMSNorm and the matmuls after it keep."""
    own, D = at.own_tokens, cfg.hidden_size
    return at.wide * own * D + at.wide * own + 2 * at.element * own * D


def rest_bytes(cfg: ModelConfig, at: Setting, recompute: str = "none") -> dict[str, int]:
    """Bytes kept outside the layers of a plain model on one rank, with its loss."""
    check(cfg, recompute, at)
    shared = at.element == ANGLE_BYTES or recompute == "full"
    return {
        "dropout of embedding": at.tokens * cfg.hidden_size if at.dropout else 0,
        "angles": angle_bytes(cfg, at) if shared else 0,
        "last norm": norm_bytes(cfg, at),
        "log probabilities": at.wide * at.tokens * cfg.vocab_size,
        "loss and its divisor": 2 * at.wide,
    }


def model_bytes(cfg: ModelConfig, at: Setting, recompute: str = "none") -> int:
    """Bytes that forward of a whole plain model leaves for backward, on one rank."""
    layer, rest = layer_bytes(cfg, at, recompute), rest_bytes(cfg, at, recompute)
    return cfg.layers * sum(layer.values()) + sum(rest.values())


def angle_bytes(cfg: ModelConfig, at: Setting) -> int:
    """cos and sin of all layers, as they are made."""
    return 2 * ANGLE_BYTES * at.length * cfg.head_width


def narrowed_angles(cfg: ModelConfig, at: Setting) -> int:
    """cos and sin as q and as k need them, each a copy, unless they have that dtype already."""
    return 0 if at.element == ANGLE_BYTES else 4 * at.element * at.length * cfg.head_width


def row_sums(at: Setting, H: int) -> int:
    """The log of each query's sum of exponentials, with which backward forms its scores again."""
    return at.wide * H * at.tokens


def _score_bytes(at: Setting, H: int, K: int, recompute: str) -> int:
    """The mask, the softmax, and what the product with v keeps of it; or row sums of blocks."""
    if at.context_ranks > 1:
        return row_sums(at, H)
    if recompute == "selective":
        return 0
    shared = at.element == at.wide and (H == K or at.sequence == 1)
    squares = at.batch * H * at.sequence**2
    return at.sequence**2 + squares * (at.wide + (0 if shared else at.element))


def own_heads(cfg: ModelConfig, ranks: int) -> tuple[int, int]:
    """Query and key/value heads of each of the ranks."""
    H, K = cfg.heads, cfg.kv_heads
    assert H % ranks == 0 and (K % ranks == 0 or ranks % K == 0), (
        f"{ranks} ranks cannot share {H} query and {K} key/value heads alike: ask for a number "
        "that divides the first, and divides the second or is a multiple of it, such as 1."
    )
    return H // ranks, max(1, K // ranks)


def own_columns(cfg: ModelConfig, ranks: int) -> int:
    """F of the rank that has most of it."""
    return _part(cfg.ffn_size, ranks)


def check(cfg: ModelConfig, recompute: str, whole: Setting | None = None) -> None:
    """These forms count a dense model; its head, if they count a `whole` model, on one rank."""
    assert cfg.experts == 0, (
        f"what {cfg.experts} experts keep depends on the routing: ask for a model without experts."
    )
    assert recompute in RECOMPUTE, (
        f"there is no recomputation '{recompute}': ask for one of {', '.join(RECOMPUTE)}."
    )
    assert whole is None or whole.ranks == 1, (
        f"{whole.ranks} ranks share the head in several ways: ask for one rank."
    )


def _part(length: int, parts: int) -> int:
    return -(-length // parts)
