"""Lesson 14, plan. Read README.md first; this is the only file that you edit.

ModelConfig: vocab_size V, hidden_size D, layers L, heads H, kv_heads K, head_width C, ffn_size F.
MeshConfig: sizes pp, dp, tp; zero, a stage of ZeRO over dp; sequence_parallel. Models here are
dense and not tied, and all sizes can be shared out evenly.
"""

from collections.abc import Callable, Sequence

from lessons import TODO
from picotron_lab.config import MeshConfig, ModelConfig


def state_bytes(model: ModelConfig, mesh: MeshConfig) -> dict[str, int]:  # Task 14.1
    """Bytes that stay on a rank of the first pipeline stage, in bfloat16 with AdamW.

    A layer has q [H C, D], k and v [K C, D], o [D, H C], gate and up [F, D], down [D, F], and two
    norms [D]. The embedding [V, D] is on the first stage; the last norm [D] and the head [V, D] on
    the last one. tp shares out heads (a rank has at least one of K), F and V, but no norms.

    After   {"parameters": ..., "gradients": ..., "masters": ..., "moments": ...}: 2, 4, 4 and 8
            bytes each. ZeRO shares masters and moments out over dp, stage 2 gradients as well,
            stage 3 everything
    """
    raise TODO("14.1")


def activation_bytes(
    model: ModelConfig, mesh: MeshConfig, tokens: int, micro_batches: int, full: bool
) -> int:  # Task 14.2
    """Bytes of activations that a rank of the first pipeline stage holds at most, with 1F1B.

    What a layer keeps for backward of the N tokens of a micro-batch, in bfloat16, fused:
        two norms, each: its input and its result, 2 bytes, [N, D]; and 4 bytes for each token
        attention: q [N, H C], k and v [N, K C], its result [N, H C], 2 bytes; and 4 bytes for each
                   token and head of H
        mlp: gate, up and their product [N, F], 2 bytes
    tp shares out heads and F; of norms, tokens with sequence parallelism, otherwise nothing. The
    embedding keeps next to nothing, and the head is left out here.

    tokens  N, of a micro-batch       micro_batches  of a step
    full    recompute whole layers: each keeps its input alone (shared out as norms are), 2 bytes;
            what a layer makes again during backward is left out here

    After   bytes, at the moment when the rank holds most micro-batches
    """
    raise TODO("14.2")


def legal_meshes(  # Task 14.3
    model: ModelConfig, gpus: int, node: int, batch: int
) -> list[MeshConfig]:
    """Every MeshConfig(pp=..., dp=..., tp=...) that uses all GPUs and that run.py would start.

    node    GPUs of a node: tensor parallelism stays inside one, tp at most that
    batch   sequences of a step, in micro-batches of 1: every replica gets as many
    Rules   tp divides H; tp divides K or is a multiple of K; every stage has a layer
    After   each of them once, in any order
    """
    raise TODO("14.3")


def choose(
    meshes: Sequence[MeshConfig],
    memory: Callable[[MeshConfig], float],
    seconds: Callable[[MeshConfig], dict[str, float]],
    limit: float,
) -> tuple[MeshConfig, MeshConfig, str] | None:  # Task 14.4
    """The fastest mesh that fits, and why it is better than the next one.

    memory   bytes that a mesh takes on its fullest GPU: cheap
    seconds  the parts of a step's time, such as {"matmuls": 2.1, "bubble": 0.6}; their sum is the
             step: expensive
    limit    bytes of a GPU, of which a plan may fill 9/10: CUDA, its libraries and an allocator's
             gaps take the rest
    After    (the fastest that fits, the second fastest that fits, the part of the time in which the
             second loses most against the first); None if fewer than two fit
    Budget   seconds is asked once about every mesh that fits, and about no other
    """
    raise TODO("14.4")
