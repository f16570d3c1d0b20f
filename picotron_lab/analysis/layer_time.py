"""How long one rank takes for one layer and for the head: their F, B and W, from their shapes.

Idea     A pass is a sum of parts, each bound by one thing:
           matmuls         2 operations per weight and token, at the rate that real shapes reach
           attention       4 T T H C per sequence forward, twice that in backward. Fused: half of
                           it, under a causal mask; backward 5/2, for scores are formed again
           memory          what norms, rotary positions, activations and losses read and write, and
                           adding a gradient to the sum of gradients, over the memory's bandwidth
           kernels         a moment for each kernel, in which the device does nothing
           tp, cp, ep ...  messages of that axis that nothing hides
Overlap  What the fused paths start before they compute hides under what is computed meanwhile, up
         to the share `overlap` of it: both want the same memory and some of the same cores. A plain
         path waits for every message.
Wire     from the contracts of the techniques, never counted here again
Dims     B micro-batch  T sequence  N = B*T/cp tokens  D width  H/K query/kv heads and F columns of
         this rank  C head width  V vocabulary
Read     Constants -> Place -> layer -> head -> embedding
Tests    tests/test_step_time.py
"""

from collections import Counter
from dataclasses import dataclass

import torch

from picotron_lab import expert_parallel, sequence_parallel, tensor_parallel
from picotron_lab.analysis import activations, context
from picotron_lab.analysis.cost import axis_size, collective_time, neighbours
from picotron_lab.analysis.hardware import Hardware
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.precision import DTYPES

Parts = Counter[str]  # seconds of each part
Passes = dict[str, Parts]  # of F, B and W
MATMULS, ATTENTION, MEMORY, KERNELS = "matmuls", "attention", "memory", "kernels"
CAUSAL = 0.5  # share of scores under the mask
BACKWARD, AGAIN = 2.0, 2.5  # matmuls of attention's backward over its forward's; of a fused one


@dataclass(frozen=True)
class Constants:
    """What no data sheet says; one set for all models, meshes and devices.

    Calibrated ones were fitted to the rows that benchmarks/published.py names.

    matmuls    share of the best matmul rate that a model's shapes reach: at width 2048 an H200
               does 650 to 720 of 790 TFLOP/s
    attention  share of the peak, of operations under the mask: FlashAttention-2 on an H100 does 335
               of 989 TFLOP/s forward; newer kernels, and any on an A100, up to 0.6
    operators  share of the data sheet's memory bandwidth at which that least traffic passes which
               norms, activations and sums of gradients need: they start and end often, and most
               programs fuse less than we count. Calibrated
    copies     the same for long streams, such as AdamW: an H200 copies at 4.3 of 4.8 TB/s
    kernel     seconds in which a kernel starts and ends, an estimate
    overlap    share of computing time under which messages hide: they want the same memory, and
               matmuls slow down. Calibrated
    links      share of the bus bandwidth, measured in an idle node, that a training step gets: its
               ranks come late. Calibrated; `network` likewise, between nodes
    unfused    memory traffic of separate operators over that of fused ones: 70 and 22 ms of norms,
               SwiGLU and rotary positions in a 1.7B Llama on an H200, by a count of both
    """

    matmuls: float = 0.87
    attention: float = 0.34
    operators: float = 0.44
    copies: float = 0.9
    kernel: float = 5e-6
    overlap: float = 0.45
    links: float = 0.47
    network: float = 0.67
    unfused: float = 3.2


CONSTANTS = Constants()


@dataclass(frozen=True)
class Place:
    """All that the time of a pass depends on."""

    model: ModelConfig
    mesh: MeshConfig
    cfg: TrainConfig
    hardware: Hardware
    constants: Constants = CONSTANTS

    @property
    def fused(self) -> bool:
        """Whether the fused paths run."""
        return self.cfg.impl == "fused"

    @property
    def element(self) -> int:
        """Bytes of an activation, e."""
        return DTYPES[self.cfg.dtype].itemsize

    @property
    def wide(self) -> int:
        """Bytes of a gradient that adds up."""
        return max(4, self.element)

    @property
    def tokens(self) -> int:
        """N."""
        return self.cfg.micro_batch_size * self.cfg.sequence_length // self.mesh.cp

    @property
    def stream(self) -> int:
        """S: bytes of [B, T, D]."""
        return self.tokens * self.model.hidden_size * self.element

    @property
    def rounds(self) -> int:
        """Micro-batches of a step."""
        return self.cfg.micro_batches(self.mesh.dp)

    @property
    def between(self) -> int:
        """Tokens of a rank outside tensor-parallel regions."""
        return self.tokens // (self.mesh.tp if self.mesh.sequence_parallel else 1)

    def peak(self) -> float:
        """FLOP/s of the data sheet; float64 is taken for half of float32."""
        dtype, peaks = DTYPES[self.cfg.dtype], self.hardware.peak
        known = peaks.get(dtype) or peaks.get(torch.float32, 0.0) * 4 / dtype.itemsize
        return known

    def matmul(self, operations: float) -> float:
        """Seconds of so many operations in matmuls."""
        rate = self.peak() * self.hardware.matmul_share * self.constants.matmuls
        return operations / rate

    def traffic(self, size: float) -> float:
        """Seconds in which operators read or write so many bytes."""
        return size / (self.hardware.memory_bandwidth * self.constants.operators)

    def message(self, op: str, payload: float, axis: str) -> float:
        """Seconds of one call on that axis."""
        near = neighbours(self.mesh, axis, self.hardware.node)
        ranks = axis_size(self.mesh, axis)
        share = self.constants.links if near == ranks else self.constants.network
        return collective_time(op, payload, ranks, self.hardware, near) / share

    def messages(self, contract: dict[str, tuple[int, int]], axis: str) -> dict[str, float]:
        """Seconds of a technique's contract, {"forward": ..., "backward": ...}."""
        seconds = dict.fromkeys(("forward", "backward"), 0.0)
        for name, (calls, payload) in contract.items():
            direction, op = name.split()
            if calls:
                seconds[direction] += calls * self.message(op, payload / calls, axis)
        return seconds

    def left(self, seconds: float, under: float) -> float:
        """What of a message is waited for that travels while `under` seconds are computed."""
        hidden = self.constants.overlap * under if self.fused else 0.0
        return max(0.0, seconds - hidden)


# ---- a layer


def layer(at: Place) -> Passes:
    """Seconds of one micro-batch in one layer: F, B without and W with weight gradients."""
    operations = 2 * at.tokens * weights_met(at)
    held = dense_parameters(at) + expert_parameters(at)
    scores = _scores(at)
    kernels = 10 if at.fused else 30  # a norm, rotary, SwiGLU: one kernel each, or several
    moved, again = at.traffic(_moved(at)), AGAIN if at.fused else BACKWARD
    passes = {
        "F": Parts({ATTENTION: scores, MEMORY: moved, KERNELS: kernels * at.constants.kernel}),
        "B": Parts(
            {ATTENTION: again * scores, MEMORY: moved, KERNELS: kernels * at.constants.kernel}
        ),
        "W": Parts({MEMORY: accumulated(at, held), KERNELS: 7 * at.constants.kernel}),
    }
    for parts in passes.values():
        parts[MATMULS] = at.matmul(operations)
    if not at.fused:
        for kind in "FB":  # scores, masked, softmax, narrow: each written and read
            passes[kind][MEMORY] += at.traffic(8 * at.wide * scores_of(at) / at.mesh.cp)
    _add_messages(at, passes)
    if at.cfg.recompute == "full":
        passes["B"] += passes["F"]
    if at.cfg.recompute == "selective" and not at.fused:
        passes["B"] += Parts({ATTENTION: passes["F"][ATTENTION]})
    return passes


def weights_met(at: Place) -> float:
    """Weights of a layer, on this rank, that a token is multiplied with."""
    model = at.model
    if not model.experts:
        return attention_weights(at) + mlp_weights(at)
    met = model.top_k + model.shared_experts
    return attention_weights(at) + model.hidden_size * model.experts + met * mlp_weights(at)


def attention_weights(at: Place) -> int:
    """Weights of attention on this rank: q and o, k and v."""
    H, K = activations.own_heads(at.model, at.mesh.tp)
    return at.model.hidden_size * at.model.head_width * 2 * (H + K)


def mlp_weights(at: Place) -> int:
    """Weights of one MLP, or expert, on this rank: gate, up and down."""
    return 3 * at.model.hidden_size * activations.own_columns(at.model, at.mesh.tp)


def expert_parameters(at: Place) -> float:
    """Parameters of a layer's experts that this rank holds (ZeRO aside)."""
    return mlp_weights(at) * at.model.experts / at.mesh.ep


def dense_parameters(at: Place) -> float:
    """All other parameters of a layer that this rank holds (ZeRO aside)."""
    model = at.model
    always = attention_weights(at) + 2 * model.hidden_size  # and two norms
    if not model.experts:
        return always + mlp_weights(at)
    return always + model.hidden_size * model.experts + model.shared_experts * mlp_weights(at)


def accumulated(at: Place, parameters: float) -> float:
    """Seconds in which gradients are written, read, and added to their sums."""
    return at.traffic(parameters * 2 * (at.element + at.wide))


def scores_of(at: Place) -> float:
    """Scores of a micro-batch on this rank, the masked ones too; cp not yet taken off."""
    H, _ = activations.own_heads(at.model, at.mesh.tp)
    return at.cfg.micro_batch_size * H * at.cfg.sequence_length**2


def _scores(at: Place) -> float:
    """Seconds of attention forward, on the busiest of the cp ranks."""
    n, kind = at.mesh.cp, at.mesh.context(at.cfg.impl)
    share = CAUSAL if at.fused else 1.0
    if n > 1 and kind == "ring":  # the last rank has n blocks, of the last one half
        share = (n - CAUSAL) / n if at.fused else 1.0
    operations = 4 * scores_of(at) * at.model.head_width * share / n
    return operations / (at.peak() * at.constants.attention)


def _moved(at: Place) -> float:
    """Bytes that norms, rotary positions and SwiGLU read and write in one direction.

    Fused forward: add + norm reads two and writes two [N, D], twice; rotary reads and writes q and
    k; SwiGLU reads two and writes one [N, F]. Backward moves about as much; of SwiGLU more.
    """
    (H, K), F = activations.own_heads(at.model, at.mesh.tp), at.model.ffn_size / at.mesh.tp
    rows = at.model.top_k + at.model.shared_experts if at.model.experts else 1
    inside = at.tokens * (2 * (H + K) * at.model.head_width + 4 * rows * F)
    if at.model.experts:  # permuted, and added up again
        inside += 4 * at.tokens * at.model.top_k * at.model.hidden_size
    outside = 8 * at.between * at.model.hidden_size
    return at.element * (inside + outside) * (1.0 if at.fused else at.constants.unfused)


def _add_messages(at: Place, passes: Passes) -> None:
    """What the axes add: contracts of the techniques, less what hides (see Overlap)."""
    mesh, experts = at.mesh, int(at.model.experts > 0)
    forward, backward = (passes[kind][MATMULS] for kind in "FB")
    if mesh.tp > 1 and mesh.sequence_parallel:  # rings of shards pass by while they are multiplied
        sent = sequence_parallel.contract(2, at.stream, mesh.tp, at.cfg.impl, experts)
        told = at.messages(sent, "tp")
        passes["F"]["tp"] = at.left(told["forward"], forward)
        passes["B"]["tp"] = at.left(told["backward"], 2 * backward)
    elif mesh.tp > 1:  # the input's gradient is summed while that of the weights is computed
        told = at.messages(tensor_parallel.contract(2, at.stream), "tp")
        passes["F"]["tp"] = told["forward"]
        passes["B"]["tp"] = at.left(told["backward"], passes["W"][MATMULS])
    if mesh.cp > 1:
        told = at.messages(context.contract(_attention(at)), "cp")
        hides = mesh.context(at.cfg.impl) in ("ring", "zigzag")
        passes["F"]["cp"] = at.left(told["forward"], hides * passes["F"][ATTENTION])
        passes["B"]["cp"] = at.left(told["backward"], hides * passes["B"][ATTENTION])
    if mesh.ep > 1:  # as many rows come as go, if all experts are liked alike
        rows = at.tokens * at.model.top_k
        width = at.model.hidden_size * at.element
        sent = expert_parallel.contract(rows, rows, width, mesh.ep, at.model.experts)
        told = at.messages(sent, "ep")
        passes["F"]["ep"], passes["B"]["ep"] = told["forward"], told["backward"]


def _attention(at: Place) -> context.Layer:
    H, K = activations.own_heads(at.model, at.mesh.tp)
    kind, length = at.mesh.context(at.cfg.impl), at.cfg.sequence_length // at.mesh.cp
    return context.Layer(
        kind, at.cfg.impl, at.mesh.cp, at.cfg.micro_batch_size, length, H, K,
        at.model.head_width, at.element,
    )  # fmt: skip


# ---- around the layers


def head(at: Place, parts: int = 0) -> Passes:
    """Seconds of one micro-batch in the last norm, the output layer and the loss.

    parts  ranks that share the vocabulary: 0: those of tp
    """
    words, D = at.model.vocab_size / (parts or at.mesh.tp), at.model.hidden_size
    logits = at.element * at.tokens * words  # written, read for the sums, made gradients
    moved = at.traffic(3 * logits * (1.0 if at.fused else at.constants.unfused))
    compute = {MATMULS: at.matmul(2 * at.tokens * D * words), KERNELS: 5 * at.constants.kernel}
    passes = {
        "F": Parts(compute | {MEMORY: moved}),
        "B": Parts(compute | {MEMORY: moved / 2}),
        "W": Parts(compute | {MEMORY: accumulated(at, words * D)}),
    }
    if at.mesh.tp > 1:
        passes["B"]["tp"] = at.message("all_reduce", at.stream, "tp")
    if at.mesh.tp > 1 and at.mesh.vocabulary(at.cfg.impl) == "none":
        logits = at.element * at.tokens * at.model.vocab_size
        passes["F"]["tp"] = at.message("all_gather", logits, "tp")
    return passes


def embedding(at: Place, parts: int = 0) -> Passes:
    """Seconds of one micro-batch in the look-up, and of adding up its gradients; a tied weight's
    are added by the head, where there is one on the same rank."""
    words, D = at.model.vocab_size / (parts or at.mesh.tp), at.model.hidden_size
    split = at.mesh.tp > 1 and at.mesh.vocabulary(at.cfg.impl) != "none"
    passes = {
        "F": Parts({MEMORY: at.traffic(2 * at.stream)}),
        "B": Parts(),
        "W": Parts({MEMORY: accumulated(at, words * D) + at.traffic(2 * at.stream)}),
    }
    if split:
        passes["F"]["tp"] = at.message("all_reduce", at.stream, "tp")
    return passes
