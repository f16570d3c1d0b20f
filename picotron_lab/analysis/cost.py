"""What a training step costs: floating-point operations, and the time of one message.

Convention  a multiply and an add are 2 operations; backward is twice forward, so a weight costs 6
            per token. Counted: every matmul weight (the embedding is a look-up and costs nothing; a
            tied one counts once, as the head), and attention scores with the full T x T square:
            "6N + 12 L H C T".
Source      PaLM (2204.02311), appendix B; with causal=True the upper triangle is left out, as it
            need not be computed.
Messages    S bytes of payload, n ranks, g of them on each node, L seconds from node to node, B(S)
            the bus bandwidth of an all_reduce of S over the 8 devices of a node (hardware.py). What
            counts is the piece that travels from rank to rank, S/8: fewer ranks, or two, send
            larger pieces, and get B(8S/n), B(8S). Where no switch adds up, 3/4 of B: all but an
            all_reduce of 5 ranks or more
              inside a node    wire / B, latency is in B
              ring over nodes  steps L + wire / min(3/4 B(S), g N): a ring crosses each border once,
                               and the g ranks of a node bring an adapter each, of N bytes/s.
                               steps: 2(n-1) of an all_reduce, n-1 of others
              tree over nodes  2 (g - 1 + ceil(log2 of nodes)) L + 2 S / the same bandwidth: sums
                               go up two trees, each of half of the message, and down again
              all_to_all       (n-1) L + the larger of wire / B and what leaves the node, (n-g)/n S,
                               over N
              send, exchange   S / B, between nodes L + S / N: through one adapter
            all_reduce over nodes: ring or tree, whichever is faster, as NCCL chooses
Source      rings, trees: Thakur et al. 2005, section 4; two trees: Sanders, Speck and Traeff 2009
Tests       tests/test_cost.py, tests/test_optim.py
"""

import math
from typing import TYPE_CHECKING

from picotron_lab.config import MeshConfig, ModelConfig
from picotron_lab.ledger import wire_bytes

if TYPE_CHECKING:  # it imports torch
    from picotron_lab.analysis.hardware import Hardware

SWITCH = 5  # ranks from which on a node's switch adds up an all_reduce itself


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


# ---- messages


def neighbours(mesh: MeshConfig, axis: str, node: int) -> int:
    """How many ranks of the axis share a node of `node` ranks; of uneven ones, the fewest.

    World ranks lie as mesh.py has them, tp fastest, then cp, dp, pp, and fill node after node. As
    many as the axis has ranks: none of its messages leaves a node.
    """
    apart = {"tp": 1, "cp": mesh.tp, "dp": mesh.cp * mesh.tp, "pp": mesh.dp * mesh.cp * mesh.tp}
    apart |= {"replica": mesh.tp, "ep": mesh.tp, "expert_replica": mesh.tp * mesh.ep}
    assert axis in apart, f"there is no axis '{axis}': ask for one of {', '.join(apart)}."
    stride, size = apart[axis], axis_size(mesh, axis)
    if size == 1 or stride >= node:
        return 1
    block = stride * size
    if node % stride == 0 and (node % block == 0 or block % node == 0):
        return min(size, node // stride)
    blocks = range(0, min(mesh.size, node * block), block)  # they lie alike again after `node`
    starts = {(first + i) % node for first in blocks for i in range(stride)}
    return min(_fewest(start, stride, size, node) for start in starts)


def _fewest(start: int, stride: int, size: int, node: int) -> int:
    """Of ranks start, start + stride, ... the fewest that share a node which has any."""

    def before(rank: int) -> int:
        return min(size, max(0, -(-(rank - start) // stride)))

    last = (start + (size - 1) * stride) // node
    nodes = {*range(min(last, stride + 1)), last}  # those between lie as `stride` nodes before
    return min(before(node * (n + 1)) - before(node * n) for n in nodes)


def axis_size(mesh: MeshConfig, axis: str) -> int:
    """Ranks of an axis of mesh.py: one of MeshConfig's, replica or expert_replica."""
    sizes = {"replica": mesh.dp * mesh.cp, "expert_replica": mesh.dp * mesh.cp // mesh.ep}
    return sizes[axis] if axis in sizes else getattr(mesh, axis)


def collective_time(
    op: str, payload: float, ranks: int, hardware: "Hardware", per_node: int
) -> float:
    """Seconds of one call with `payload` bytes S, as the ledger counts them: see Messages above.

    op        as in ledger.py: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send,
              exchange; recv takes no time of its own
    per_node  ranks of the group on each node (see `neighbours`); `ranks`: no node is left
    """
    assert ranks >= 1 and 1 <= per_node <= ranks, (
        f"{per_node} of {ranks} ranks cannot share a node: give 1 to as many as there are."
    )
    if ranks == 1 or payload == 0:
        return 0.0
    wire, pair = wire_bytes(op, payload, ranks), op in ("send", "exchange")
    pieces = 1 if pair else min(ranks, hardware.links_ranks)
    full = hardware.bandwidth(payload * hardware.links_ranks / pieces)
    switched = op == "all_reduce" and ranks >= SWITCH
    rate = full * (1.0 if switched and per_node == ranks else hardware.ring_share)
    if per_node == ranks:
        return wire / rate
    network, delay = hardware.network_bandwidth, hardware.network_latency
    if pair:
        return delay + wire / network
    if op == "all_to_all":
        outside = payload * (ranks - per_node) / ranks
        return delay * (ranks - 1) + max(wire / rate, outside / network)
    rate = min(rate, per_node * network)
    steps = 2 * (ranks - 1) if op == "all_reduce" else ranks - 1
    ring = steps * delay + wire / rate
    if op != "all_reduce":
        return ring
    depth = per_node - 1 + math.ceil(math.log2(-(-ranks // per_node)))
    return min(ring, 2 * depth * delay + 2 * payload / rate)
