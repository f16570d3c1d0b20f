"""Build: from the plain model to this rank's part of it, one technique after the other.

Idea    The plain model is made on the meta device, without memory. Each technique replaces what it
        must and writes into the parameters' records which slice is here and who else has a say.
        Only then are weights drawn: each full parameter from its own stream, of which this rank
        keeps its slice. So no rank ever holds more than its part and one full parameter, and all
        meshes start alike.
Order   inside layers: fused parts; tensor, vocabulary and sequence parallelism over tp; attention
        over cp; experts over ep. All parameters: replicas over dp x cp, experts over those of them
        with the same experts. Around layers: ZeRO-3, which gathers a layer's weights, and outermost
        recomputation, which runs all of it again. At last the cut into pipeline stages, of which
        this rank keeps its own
Read    build_model -> split_layers -> synchronisers -> executor; what a record says: sharding.py
Tests   tests/test_build.py
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from picotron_lab import (
    context_parallel,
    data_parallel,
    expert_parallel,
    grouped_experts,
    pipeline_parallel,
    pipeline_stages,
    precision,
    recompute,
    sequence_parallel,
    sharding,
    tensor_parallel,
    token_pipeline,
    token_times,
    vocab_parallel,
    zero,
)  # fmt: skip
from picotron_lab.checks import layers_of, schedule_of, slices_of
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.fused import fuse
from picotron_lab.mesh import Mesh, grid, groups
from picotron_lab.model import Llama, initial_value
from picotron_lab.pipeline_stages import Part
from picotron_lab.pipeline_vocabulary import ALGORITHM, Words
from picotron_lab.post_validation import PostValidation
from picotron_lab.schedules.actions import Schedule

SHARED = -1  # in the place of a stage: parameters that several stages, or none, have


def build_model(
    model_cfg: ModelConfig,
    mesh_cfg: MeshConfig,
    cfg: TrainConfig,
    mesh: Mesh,
    schedule: Schedule,
    device: torch.device,
) -> Llama | Part:
    """What of the model this rank computes, with its slices of the initial weights."""
    with torch.device("meta"):
        model = Llama(model_cfg, cfg.dropout)
    sharding.attach(model)
    if cfg.impl == "fused":
        fuse(model)
    if mesh.tp.size > 1:
        split_layers(model, mesh_cfg, cfg, mesh)
    if schedule.vocabulary:
        vocab_parallel.parallelize(model, mesh.pp, cfg.impl, ALGORITHM[schedule.vocabulary])
    if mesh.cp.size > 1:
        context_parallel.parallelize(model, mesh.cp, cfg.impl, mesh_cfg.context(cfg.impl))
    if model_cfg.experts and (mesh.ep.size > 1 or cfg.impl == "fused"):
        expert_parallel.parallelize(model, mesh.ep, cfg.impl)
    experts = expert_parallel.expert_parameters(model)
    data_parallel.parallelize(model, mesh.replica, experts, mesh.expert_replica)
    if mesh_cfg.zero == 3:
        zero.shard_model(model, mesh.replica, cfg.impl, mesh.expert_replica)
    if mesh_cfg.token_slices != "1":
        token_pipeline.parallelize(model, cfg.impl)
    recompute.apply(model, cfg.recompute, cfg.impl)
    if schedule.stages > 1:
        counts = layers_of(model_cfg, mesh_cfg, cfg)
        sequence_parts = mesh.tp.size if mesh_cfg.sequence_parallel else 1
        model = pipeline_stages.split(model, mesh.pp, schedule, counts, sequence_parts)
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


def synchronisers(
    model: Llama | Part, mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh
) -> dict[int, data_parallel.Synchroniser]:
    """Who sums the gradients of each stage: their sums travel while other stages compute."""
    if not isinstance(model, Part):
        return {0: synchroniser(model.parameters(), mesh_cfg, cfg, mesh)}
    shared, found = model.shared(), {}
    for name, stage in model.stages.items():
        own = [p for p in stage.parameters() if p not in set(shared)]
        found[int(name)] = synchroniser(own, mesh_cfg, cfg, mesh)
    if shared:
        found[SHARED] = data_parallel.Naive(shared, mesh.replica)
    return found


def choose_slices(
    model_cfg: ModelConfig,
    mesh_cfg: MeshConfig,
    cfg: TrainConfig,
    mesh: Mesh,
    device: torch.device,
) -> tuple[int, ...]:
    """Tokens of the slices into which every sequence is cut; one slice: not at all.

    auto: rank 0 times slices on one layer; all take those that the schedule runs fastest.
    """
    lengths = slices_of(mesh_cfg, cfg)
    if lengths is not None:
        return lengths
    T, multiple = cfg.sequence_length, mesh.tp.size if mesh_cfg.sequence_parallel else 1
    where = token_times.places(T, multiple)
    seconds = torch.zeros(len(where), dtype=torch.float64, device=device)
    if mesh.world.rank == 0:
        dtype = precision.DTYPES[cfg.dtype]
        layer = token_times.of_layer(model_cfg, cfg.micro_batch_size, cfg.impl, dtype, device)
        seconds[:] = torch.tensor([s for *_, s in token_times.measure(layer, T, device, multiple)])
    seconds = mesh.world.broadcast(seconds, 0).tolist()
    times = token_times.fit([(*place, s) for place, s in zip(where, seconds, strict=True)])
    return token_times.choose_under(partial(schedule_of, mesh_cfg, cfg), times, T, multiple)


def executor(
    model: Llama | Part,
    schedule: Schedule,
    mesh: Mesh,
    impl: str,
    found: dict[int, data_parallel.Synchroniser],
) -> pipeline_parallel.Executor:
    """Who runs the schedule; `found` are the synchronisers."""
    stages, words = {0: model}, None
    if isinstance(model, Part):
        stages = {int(name): stage for name, stage in model.stages.items()}
    if schedule.vocabulary:
        words = Words(model.embed, model.head, mesh.pp, schedule)
    kind = {"plain": pipeline_parallel.Executor, "fused": pipeline_parallel.FusedExecutor}[impl]
    return kind(stages, schedule, mesh.pp, found, words)


def synchroniser(
    parameters: Iterable[nn.Parameter], mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh
) -> data_parallel.Synchroniser:
    """Who sums these gradients, over each of their axes of replicas."""
    dtype = precision.DTYPES[cfg.reduce_dtype] if cfg.reduce_dtype else None
    size, stage = cfg.bucket_mib * data_parallel.MIB, mesh_cfg.zero
    parameters = [p for p in parameters if p.requires_grad]
    if stage == 3:  # its units know their axes
        return zero.make(3, parameters, mesh.replica, cfg.impl, size, dtype)

    def make(group: list[nn.Parameter], axis: Axis) -> data_parallel.Synchroniser:
        if stage > 0:
            return zero.make(stage, group, axis, cfg.impl, size, dtype)
        return data_parallel.synchroniser(cfg.sync_step, group, axis, size, dtype)

    return data_parallel.over_axes(parameters, (mesh.replica, mesh.expert_replica), make)


def post_validation(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    mesh_cfg: MeshConfig,
    mesh: Mesh,
    axes: dict[str, Axis],
) -> PostValidation:
    """Who steps before all stages have told their gradient norms; `axes` as records name them."""
    ranks = grid(mesh_cfg.pp, mesh_cfg.dp, mesh_cfg.cp, mesh_cfg.tp).reshape(mesh_cfg.pp, -1)
    stage = mesh.world.split("stage", ranks.tolist())
    chain = mesh.world.split("validation", groups(mesh_cfg)["pp"])
    within = partial(sharding.squared_norm, parameters, stage, axes)
    return PostValidation(optimizer, chain, within)


def positions(mesh_cfg: MeshConfig, cfg: TrainConfig, mesh: Mesh) -> Tensor:
    """Which positions of every sequence this rank's tokens have: int64, T/cp of them."""
    if mesh.cp.size == 1:
        return torch.arange(cfg.sequence_length)
    return context_parallel.positions(mesh_cfg.context(cfg.impl), cfg.sequence_length, mesh.cp)
