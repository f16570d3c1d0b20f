"""Saved activations of one pipeline stage on one rank: every technique's form, put together.

Source  dense layers: activations.py and fused_activations.py; attention over cp: context.py; split
        vocabulary: `Holds` in vocab_parallel.py; routing: router.py; experts: model.py and
        grouped_experts.contract; what waits for W: deferred.py
Forms   e: bytes of an element, w: the same, but at least 4; N tokens of a rank, own: N, with
        sequence parallelism N/n; M = N k choices of experts, of which R come to this rank's
        router    scores w N E, logits w N E, their order 8 N E, and w N, 8 N k some times
        experts   plain: of each choice x, 4 F, result, that times its gate, gate and place:
                  M (e (3 D + 4 F + 1) + 16); over ep x of the R that came, results of the M sent.
                  fused: x, gate | up and result of each: M e (2 D + 2 F)
        head      log probabilities w N V; split: naive w N R, 1 and 2 e N R, 2 also dX e N D;
                  fused: dX e N D and dW w R D, where R = V/n
        waiting   for W of a layer: x and dy of each matmul, e N (3 D + 2 H C + 2 K C + 3 F) + e N D
        slices    of a sequence: as micro-batches of N tokens, whose attention keeps q, out and its
                  row sums: e N 2 H C + w B H l; keys and values by themselves, as long as the rest
                  of the sequence needs them: keys_and_values, gradients_of_keys
Balance R is what comes when all experts are chosen alike; a rank that gets x times as much keeps x
        times as much there
Dims    as in model.py; R experts: rows that come, head: rows of this rank's words
Read    Rank -> layer -> head -> embedding -> stage, waiting
Tests   tests/test_memory_prediction.py
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from picotron_lab.analysis import activations, context, fused_activations
from picotron_lab.analysis.activations import ANGLE_BYTES, Setting
from picotron_lab.analysis.parameters import BYTES, Place, experts_here, part
from picotron_lab.config import ROUTING, MeshConfig, ModelConfig, TrainConfig

INDEX, FLAG = 8, 1  # bytes of an index and of a truth value


@dataclass(frozen=True)
class Rank:
    """A rank at work on one micro-batch.

    kernels   whether Triton kernels serve: fused path on CUDA, not float64
    whole     0, or tokens of the sequences of which this micro-batch is a slice
    """

    model: ModelConfig
    mesh: MeshConfig
    cfg: TrainConfig
    place: Place
    kernels: bool = False
    whole: int = 0

    def slice_of(self, length: int) -> "Rank":
        """At work on a slice of so many tokens of each sequence."""
        cfg = replace(self.cfg, sequence_length=length)
        return replace(self, cfg=cfg, whole=self.cfg.sequence_length)

    @cached_property
    def at(self) -> Setting:
        """The micro-batch as activations.py wants it."""
        cfg, mesh = self.cfg, self.mesh
        return Setting(
            cfg.micro_batch_size, cfg.sequence_length, BYTES[cfg.dtype], cfg.dropout > 0,
            mesh.tp, mesh.sequence_parallel, mesh.cp,
        )  # fmt: skip

    @property
    def fused(self) -> bool:
        """Which path."""
        return self.cfg.impl == "fused"

    @property
    def narrow(self) -> bool:
        """Whether sums are wider than elements."""
        return self.at.element < self.at.wide

    @property
    def dense(self) -> ModelConfig:
        """The model with a plain MLP in place of experts."""
        return replace(self.model, experts=0, **{f: getattr(ModelConfig, f) for f in ROUTING})

    @property
    def columns(self) -> int:
        """F of this rank."""
        return part(self.model.ffn_size, self.mesh.tp, self.place.tp)

    @property
    def stream(self) -> int:
        """Bytes of what flows between layers, and between stages."""
        return self.at.element * self.at.own_tokens * self.model.hidden_size


# ---- a layer


def layer(r: Rank) -> dict[str, int]:
    """Bytes that forward of a layer leaves, by operator."""
    recompute, (H, K) = r.cfg.recompute, activations.own_heads(r.model, r.mesh.tp)
    if recompute == "full":
        return {"input": r.stream}
    if r.fused:
        found = fused_activations.layer_bytes(r.dense, r.at, recompute, r.kernels)
    else:
        found = activations.layer_bytes(r.dense, r.at, recompute)
    found["mlp"] = found["mlp"] // activations.own_columns(r.model, r.mesh.tp) * r.columns
    if r.mesh.cp > 1 and r.mesh.context(r.cfg.impl) == "ulysses":
        for name in ("q, k, v", "scores", "row sums", "mixed values"):
            found.pop(name, None)
        found["attention"] = _ulysses(r, H, K)
    if r.whole:
        for name in ("q, k, v", "scores", "row sums"):
            found.pop(name, None)
        queries = r.at.element * r.at.tokens * H * r.model.head_width
        found |= {"queries": queries, "row sums": activations.row_sums(r.at, H)}
    if r.model.experts:
        del found["mlp"]
        found |= {"router": _router(r), "experts": _experts(r), "shared": _shared(r)}
        if r.mesh.sequence_parallel:  # experts save the gathered x, not a shard
            found["gathered"] = r.at.element * (r.at.tokens - r.at.own_tokens) * r.model.hidden_size
    return found


def keys_and_values(r: Rank, tokens: int) -> int:
    """Bytes of so many tokens' keys and values, that a layer keeps for later slices."""
    _, K = activations.own_heads(r.model, r.mesh.tp)
    return 2 * r.at.element * r.at.batch * tokens * K * r.model.head_width


def gradients_of_keys(r: Rank, tokens: int) -> int:
    """Bytes of what later slices have found for them, as wide as it adds up."""
    return keys_and_values(r, tokens) // r.at.element * r.at.wide


def _ulysses(r: Rank, H: int, K: int) -> int:
    """q, k, v of whole sequences for 1/n of the heads, scores or row sums, values both ways."""
    at, n = r.at, r.mesh.cp
    one = context.Layer(
        "ulysses", r.cfg.impl, n, at.batch, at.length, H, K, r.model.head_width, at.element
    )
    saved = context.saved_bytes(one, flash=r.fused)
    if r.cfg.recompute == "selective" and not r.fused:
        cfg = replace(r.dense, heads=H, kv_heads=K, head_size=r.model.head_width)
        inside = Setting(at.batch, at.sequence, at.element, ranks=n)
        saved -= activations.layer_bytes(cfg, inside)["scores"]
    return saved


def _router(r: Rank) -> int:
    """Scores, logits and the order of experts; gates, their sums and what is left of choices."""
    at, cfg = r.at, r.model
    N, E, k, w = at.tokens, cfg.experts, cfg.top_k, at.wide
    square = (2 * w + INDEX) * N * E
    rows = w * N  # of logsumexp, for z
    if k > 1:
        rows += (w * k + 2 * w) * N  # chosen scores, their sum, clamped
    if cfg.balance_loss:
        rows += 2 * w * N + w * at.batch * E
    return square + rows + FLAG * N * k


def _experts(r: Rank) -> int:
    """What routed experts keep, of as many rows as come on average."""
    e, D, F = r.at.element, r.model.hidden_size, r.columns
    M, R = choices(r), arrivals(r)
    if r.fused:
        travel = 2 * INDEX * R if r.mesh.ep > 1 else 0
        return e * R * (D + 2 * F) + e * M * (D + 1) + INDEX * M + travel
    if r.mesh.ep == 1:
        return M * (e * (3 * D + 4 * F + 1) + 2 * INDEX)
    return R * (e * (D + 4 * F) + 2 * INDEX) + M * (e * (2 * D + 1) + 2 * INDEX)


def choices(r: Rank) -> int:
    """M: rows that this rank's tokens send to experts, at most: a capacity may drop more."""
    cfg, T = r.model, r.cfg.sequence_length
    every = r.at.tokens * cfg.top_k
    if cfg.capacity_factor == 0:
        return every
    of_one = math.ceil(cfg.capacity_factor * T * cfg.top_k / cfg.experts)
    return min(every, r.at.batch * cfg.experts * of_one)


def arrivals(r: Rank) -> int:
    """R: rows that come to this rank's experts, if all experts are chosen alike."""
    if r.mesh.ep == 1:
        return choices(r)
    return choices(r) * r.mesh.ep * experts_here(r.model, r.mesh, r.place) // r.model.experts


def _shared(r: Rank) -> int:
    """The expert of all tokens."""
    F = part(r.model.shared_experts * r.model.ffn_size, r.mesh.tp, r.place.tp)
    return (3 if r.kernels else 4) * r.at.element * r.at.tokens * F


# ---- the ends of the model


def embedding(r: Rank, words: bool = False) -> int:
    """Places of words among this rank's, and which are; dropout.

    words   of a vocabulary split over the pipeline: without dropout, which is the first stage's
    """
    split = words or (r.mesh.tp > 1 and r.mesh.vocabulary(r.cfg.impl) != "none")
    places = (INDEX + FLAG) * r.at.tokens if split else 0
    if not split and r.mesh.sequence_parallel:
        places = INDEX * r.at.own_tokens  # of own tokens, a copy
    return places + (0 if words else dropout_of_embedding(r))


def dropout_of_embedding(r: Rank) -> int:
    """Which elements stay."""
    return FLAG * r.at.own_tokens * r.model.hidden_size * (r.cfg.dropout > 0)


def head(r: Rank) -> dict[str, int]:
    """Norm, output layer and loss."""
    at, D, V = r.at, r.model.hidden_size, r.model.vocab_size
    e, w, N, own = at.element, at.wide, at.tokens, at.own_tokens
    found = {"last norm": (w + e) * own * D + w * own}
    if r.mesh.tp > 1 and r.mesh.vocabulary(r.cfg.impl) != "none":
        algorithm = r.mesh.vocabulary(r.cfg.impl)
        return found | split_head(r, algorithm, r.mesh.tp, r.place.tp, early=r.fused)
    if r.mesh.tp == 1 and r.fused:
        return found | {"gradients of head": e * N * D + w * V * D, "loss": w}
    return found | {"input": e * own * D, "log probabilities": w * N * V, "loss": w}


def head_logits(r: Rank) -> int:
    """w N V, or of this rank's words: the gradient of the logits on the plain path."""
    split = r.mesh.tp > 1 and r.mesh.vocabulary(r.cfg.impl) != "none"
    rows = part(r.model.vocab_size, r.mesh.tp, r.place.tp) if split else r.model.vocab_size
    return r.at.wide * r.at.tokens * rows


def gradients_in_layer(r: Rank) -> int:
    """The largest of what backward makes between two saved tensors of a layer: gradients of scores
    and softmax, or of gate, up and their product."""
    at, mlp = r.at, 3 * r.at.element * r.at.tokens * r.columns
    if r.fused:
        return mlp
    H, _ = activations.own_heads(r.model, r.mesh.tp)
    return max(mlp, 2 * at.wide * at.batch * H * at.length * (r.whole or at.length))


def split_head(
    r: Rank, algorithm: str, ranks: int, rank: int, early: bool = False
) -> dict[str, int]:
    """Of a vocabulary that `ranks` share: what is kept between the passes of vocab_parallel.py.

    early   gradients are made in forward: chunks of the fused path
    """
    at, D, rows = r.at, r.model.hidden_size, part(r.model.vocab_size, ranks, rank)
    e, w, N = at.element, at.wide, at.tokens
    statistics = {"naive": 3 * w, "1": 6 * w, "2": 5 * w}[algorithm]
    found = {"labels": (INDEX + FLAG + statistics) * N, "loss": w}
    if early:
        return found | {"gradients of head": e * N * D + w * rows * D}
    kept = (w if algorithm == "naive" else e) * N * rows
    found |= {"input": e * N * D, "logits": kept}
    return found | ({"gradient of input": e * N * D} if algorithm == "2" else {})


# ---- a stage


def stage(r: Rank, layers: int, first: bool, last: bool, words: bool = False) -> dict[str, int]:
    """Bytes that F of a stage leaves for backward, by operator.

    words   the vocabulary is split over the pipeline, and its passes keep what embedding and head
            would
    """
    at, found = r.at, {name: layers * size for name, size in layer(r).items()}
    if first:
        found["embedding"] = dropout_of_embedding(r) if words else embedding(r)
        if words and r.cfg.dropout > 0:
            found["received"] = r.stream  # beside what dropout leaves
    elif at.element < at.wide and not r.kernels and r.cfg.recompute != "full":
        found["received"] = r.stream  # beside the norm's widened copy
    if layers and (r.kernels or at.element == ANGLE_BYTES or r.cfg.recompute == "full"):
        found["angles"] = activations.angle_bytes(r.model, at)
    if last:
        norm = {k: v for k, v in head(r).items() if not words or k == "last norm"}
        found |= {name: size + found.get(name, 0) for name, size in norm.items()}
    return found


def waiting(r: Rank, layers: int, first: bool, last: bool) -> int:
    """Bytes between B and W: x and dy of matmuls, and gradients that came by the way, as wide as
    they add up."""
    e, g, N = r.at.element, r.at.wide, r.at.tokens
    D, C = r.model.hidden_size, r.model.head_width
    H, K = (n * C for n in activations.own_heads(r.model, r.mesh.tp))
    each = e * N * (2 * H + 2 * K + 2 * D) + _waiting_mlp(r) + 2 * g * D
    split = r.mesh.tp > 1 and r.mesh.vocabulary(r.cfg.impl) != "none"
    rows = part(r.model.vocab_size, r.mesh.tp if split else 1, r.place.tp if split else 0)
    total = layers * each + first * g * rows * D
    if last and not split and (r.mesh.tp > 1 or not r.fused):
        return total + e * N * (D + r.model.vocab_size)
    return total + last * g * rows * D


def _waiting_mlp(r: Rank) -> int:
    """Of one layer: gate, up and down, or router and experts, which wait only on the plain path."""
    e, N, D, F = r.at.element, r.at.tokens, r.model.hidden_size, r.columns
    if not r.model.experts:
        return e * N * (2 * D + 3 * F)
    shared = part(r.model.shared_experts * r.model.ffn_size, r.mesh.tp, r.place.tp)
    total = e * N * (2 * D + 3 * shared) * (shared > 0) + r.at.wide * r.model.experts * D
    if r.fused:
        return total + 3 * r.at.wide * D * F * experts_here(r.model, r.mesh, r.place)
    return total + e * arrivals(r) * (2 * D + 3 * F)
