"""Build: from the plain model to this rank's part of it, one technique after the other.

Idea    The plain model is made on the meta device, without memory. Each technique replaces what it
        must and writes into the parameters' records which slice is here and who else has a say.
        Only then are weights drawn: each full parameter from its own stream, of which this rank
        keeps its slice. So no rank ever holds more than its part and one full parameter, and all
        meshes start alike.
Order   inside layers: fused parts; tensor, vocabulary and sequence parallelism over tp; attention
        over cp; experts over ep. All parameters: replicas over dp x cp, experts over those of them
        with the same experts. Around layers: ZeRO-3, which gathers a layer's weights, and outermost
        recomputation, which runs all of it again
Read    build_model -> split_layers -> synchroniser -> positions; what a record says: sharding.py
Tests   tests/test_build.py
"""

import torch
from torch import Tensor, nn

from picotron_lab import (
    context_parallel,
    data_parallel,
    expert_parallel,
    grouped_experts,
    precision,
    recompute,
    sequence_parallel,
    sharding,
    tensor_parallel,
    vocab_parallel,
    zero,
)  # fmt: skip
from picotron_lab.comm import Axis
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
    if mesh.cp.size > 1:
        context_parallel.parallelize(model, mesh.cp, cfg.impl, mesh_cfg.context(cfg.impl))
    if model_cfg.experts and (mesh.ep.size > 1 or cfg.impl == "fused"):
        expert_parallel.parallelize(model, mesh.ep, cfg.impl)
    experts = expert_parallel.expert_parameters(model)
    data_parallel.parallelize(model, mesh.replica, experts, mesh.expert_replica)
    if mesh_cfg.zero == 3:
        zero.shard_model(model, mesh.replica, cfg.impl, mesh.expert_replica)
    recompute.apply(model, cfg.recompute, cfg.impl)
    dtype = precision.DTYPES[cfg.dtype]
    sharding.materialise(model, cfg.seed, initial_value, device, dtype)
    grouped_experts.pack(model)
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


def synchroniser(
    model: nn.Module, mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh
) -> data_parallel.Synchroniser:
    """Who sums the gradients of a real model, over each of its axes of replicas."""
    dtype = precision.DTYPES[cfg.reduce_dtype] if cfg.reduce_dtype else None
    size, stage = cfg.bucket_mib * data_parallel.MIB, mesh_cfg.zero
    parameters = [p for p in model.parameters() if p.requires_grad]
    if stage == 3:  # its units know their axes
        return zero.make(3, parameters, mesh.replica, cfg.impl, size, dtype)

    def make(group: list[nn.Parameter], axis: Axis) -> data_parallel.Synchroniser:
        if stage > 0:
            return zero.make(stage, group, axis, cfg.impl, size, dtype)
        return data_parallel.synchroniser(cfg.sync_step, group, axis, size, dtype)

    return data_parallel.over_axes(parameters, (mesh.replica, mesh.expert_replica), make)


def positions(mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh) -> Tensor:
    """Which positions of every sequence this rank's tokens have: int64, T/cp of them."""
    if mesh.cp.size == 1:
        return torch.arange(cfg.sequence_length)
    return context_parallel.positions(mesh_cfg.context(cfg.impl), cfg.sequence_length, mesh.cp)
