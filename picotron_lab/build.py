"""Build: from the plain model to this rank's part of it, one technique after the other.

Idea    The plain model is made on the meta device, without memory. Each technique replaces what it
        must and writes into the parameters' records which slice is here and who else has a say.
        Only then are weights drawn: each full parameter from its own stream, of which this rank
        keeps its slice. So no rank ever holds more than its part and one full parameter, and all
        meshes start alike.
Order   inside layers: fused parts, then tensor, vocabulary and sequence parallelism over tp. All
        parameters: replicas over dp x cp. Around layers: ZeRO-3, which gathers a layer's weights,
        and outermost recomputation, which runs all of it again
Read    build_model -> split_layers; what a record says: sharding.py
Tests   tests/test_build.py
"""

import torch

from picotron_lab import (
    data_parallel,
    precision,
    recompute,
    sequence_parallel,
    sharding,
    tensor_parallel,
    vocab_parallel,
    zero,
)  # fmt: skip
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.fused import fuse
from picotron_lab.mesh import Mesh
from picotron_lab.model import Llama, initial_value


def build_model(
    model_cfg: ModelConfig, mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh, device: torch.device
) -> Llama:
    """The model that this rank computes, with its slices of the initial weights."""
    with torch.device("meta"):
        model = Llama(model_cfg, cfg.dropout)
    sharding.attach(model)
    if cfg.impl == "fused":
        fuse(model)
    if mesh.tp.size > 1:
        split_layers(model, mesh_cfg, cfg, mesh)
    data_parallel.parallelize(model, mesh.replica)
    if mesh_cfg.zero == 3:
        zero.shard_model(model, mesh.replica, cfg.impl)
    recompute.apply(model, cfg.recompute, cfg.impl)
    dtype = precision.DTYPES[cfg.dtype]
    sharding.materialise(model, cfg.seed, initial_value, device, dtype)
    return model


def split_layers(model: Llama, mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh) -> None:
    """Tensor, vocabulary and sequence parallelism, all over the tp axis."""
    tensor_parallel.parallelize(model, mesh.tp, mesh.kv, cfg.impl)
    algorithm = mesh_cfg.vocabulary(cfg.impl)
    if algorithm == "none":
        tensor_parallel.split_head(model, mesh.tp, cfg.impl)
    else:
        vocab_parallel.parallelize(model, mesh.tp, cfg.impl, algorithm)
    if mesh_cfg.sequence_parallel:
        sequence_parallel.parallelize(model, mesh.tp, cfg.impl)
