"""What model, mesh and training ask of each other, each rule one sentence.

Rules   as in config.py: option, value, rule, a value that works
Read    check_run -> one function per axis
Tests   tests/test_config.py
"""

import math
from functools import lru_cache

from picotron_lab import partition
from picotron_lab.config import (
    TWO_CHUNKS,
    ConfigError,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    require,
)
from picotron_lab.schedules import registry
from picotron_lab.schedules.actions import Schedule, ScheduleError
from picotron_lab.schedules.costs import Options


def check_run(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> None:
    """What model, mesh and training ask of each other."""
    cfg.micro_batches(mesh.dp)
    require(
        not (mesh.zero and cfg.dp_step),
        f"--dp-step {cfg.dp_step} sums gradients on every rank, and --zero {mesh.zero} has its own "
        "way; leave --dp-step out.",
    )
    require(
        not cfg.post_validation or mesh.pp > 1,
        "--post-validation checks a step that pipeline stages took by themselves, and there is one "
        "stage; try --pp 2 on 2 ranks (--ranks 2), or leave it out.",
    )
    _check_sequence(mesh, cfg)
    if mesh.tp > 1:
        _check_tensor_parallel(model, mesh, cfg)
    if mesh.cp > 1:
        _check_context_parallel(model, mesh, cfg)
    if mesh.ep > 1:
        _check_expert_parallel(model, mesh)
    if mesh.pp > 1:
        _check_pipeline(model, mesh, cfg)


def _check_sequence(mesh: MeshConfig, cfg: TrainConfig) -> None:
    """Every rank has as many tokens of a sequence, in one chunk or in two."""
    kind = mesh.context(cfg.impl)
    parts, why = mesh.cp, [f"--cp {mesh.cp} --cp-kind {kind}"] * (mesh.cp > 1)
    if mesh.cp > 1 and kind in TWO_CHUNKS:
        parts *= 2
    if mesh.sequence_parallel:
        parts = math.lcm(parts, mesh.cp * mesh.tp)
        why += [f"--tp {mesh.tp} --sequence-parallel"]
    longer = -(-cfg.sequence_length // parts) * parts
    require(
        cfg.sequence_length == longer,
        f"--sequence-length {cfg.sequence_length} must be a multiple of {parts} with "
        f"{' '.join(why)}; try --sequence-length {longer}.",
    )


def _check_tensor_parallel(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> None:
    tp, heads, kv_heads = mesh.tp, model.heads, model.kv_heads
    divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0 and _shares(kv_heads, n)]
    advice = f"try --tp {' or '.join(divisors[-2:])}"
    require(
        heads % tp == 0, f"--tp {tp} must divide the model's {heads} attention heads; {advice}."
    )
    require(
        _shares(kv_heads, tp),
        f"--tp {tp} must divide the model's {kv_heads} key/value heads, or be a multiple of their "
        f"number; {advice}.",
    )
    require(
        model.vocab_size == 0 or model.vocab_size >= tp,
        f"--tp {tp} splits a vocabulary of {model.vocab_size}, which has too few entries; try "
        f"--tp {max(1, model.vocab_size)} or a larger --vocab-size.",
    )
    require(
        not model.tied or mesh.vocabulary(cfg.impl) != "none",
        f"--vocab-parallel none cannot split an output layer that is tied to the embedding over "
        f"--tp {tp}; try --vocab-parallel 2.",
    )


def _check_context_parallel(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> None:
    heads, kv_heads = model.heads // mesh.tp, max(1, model.kv_heads // mesh.tp)
    require(
        model.capacity_factor == 0 or not model.experts,
        f"--capacity-factor {model.capacity_factor:g} drops tokens in the order of their sequence, "
        f"which --cp {mesh.cp} cuts; leave one of them out.",
    )
    if mesh.context(cfg.impl) == "ulysses":
        require(
            heads % mesh.cp == 0 and _shares(kv_heads, mesh.cp),
            f"--cp {mesh.cp} with --cp-kind ulysses must divide the {heads} attention heads of a "
            f"tensor-parallel rank, and divide its {kv_heads} key/value heads or be a multiple of "
            "their number; try --cp-kind zigzag.",
        )


def _check_expert_parallel(model: ModelConfig, mesh: MeshConfig) -> None:
    require(
        model.experts > 0,
        f"--ep {mesh.ep} shares experts out, and this model has none; try --experts 8, or leave "
        "--ep out.",
    )
    require(
        mesh.ep <= model.experts,
        f"--ep {mesh.ep} is more than there are experts; try --ep {model.experts} or --experts "
        f"{mesh.ep}.",
    )
    sizes = [n for n in range(1, mesh.ep + 1) if mesh.dp * mesh.cp % n == 0]
    works = max(n for n in sizes if _end_together(model, n))  # 1 always does
    require(
        model.top_groups == model.expert_groups or mesh.ep == works,
        f"--top-groups {model.top_groups} limits the ranks that a token reaches, so each of "
        f"--expert-groups {model.expert_groups} needs whole ranks, or each rank whole groups, "
        f"which --ep {mesh.ep} with --experts {model.experts} does not give; try --ep {works}.",
    )


def _end_together(model: ModelConfig, ep: int) -> bool:
    """Each group of experts is on whole ranks, or each rank has whole groups."""
    E, G = model.experts, model.expert_groups
    ranks = {(rank + 1) * E // ep for rank in range(ep)}  # where sharding.share_out ends them
    groups = {(group + 1) * E // G for group in range(G)}
    return groups <= ranks or ranks <= groups


def _shares(kv_heads: int, tp: int) -> bool:
    """Each rank has whole key/value heads, or whole groups of ranks share one."""
    return kv_heads % tp == 0 or tp % kv_heads == 0


# ---- pipelines


@lru_cache(maxsize=4)  # one run asks for it many times
def schedule_of(mesh: MeshConfig, cfg: TrainConfig, slices: int = 1) -> Schedule:
    """The schedule of one step; ConfigError where there is none for so many ranks and batches, or
    for that many slices of each sequence."""
    microbatches = cfg.micro_batches(mesh.dp)
    options = Options(virtual_stages=mesh.virtual_stages, slices=slices)
    try:
        return registry.build(mesh.schedule, mesh.pp, microbatches, options)
    except ScheduleError as error:
        raise ConfigError(
            f"--schedule {mesh.schedule} with --pp {mesh.pp} and {microbatches} micro-batches "
            f"(--global-batch-size / --micro-batch-size / --dp) cannot be: {error}"
        ) from None


def layers_of(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> tuple[int, ...]:
    """How many layers each stage of the pipeline has (--pp-layers)."""
    schedule = schedule_of(mesh, cfg)
    if mesh.pp_layers == "even":
        return partition.even(model.layers, schedule.stages)
    if mesh.pp_layers == "balanced":
        last = schedule.stages - 1
        homes = [schedule.rank_of(stage) for stage in range(last + 1)]
        if schedule.replicated:  # ranks r and last - r hold the same stages
            homes = [min(rank, last - rank) for rank in homes]
        layer, embedding, head = partition.costs(model, cfg.sequence_length)
        if schedule.vocabulary:  # all ranks share embedding and head
            embedding = head = 0.0
        return partition.balanced(layer, embedding, head, model.layers, schedule.stages, homes)
    counts = partition.explicit(mesh.pp_layers, model.layers, schedule.stages)
    good = ",".join(map(str, partition.even(model.layers, schedule.stages)))
    require(
        all(counts) or not schedule.vocabulary,
        f"--pp-layers {mesh.pp_layers} leaves a stage empty, for --schedule {mesh.schedule} takes "
        f"embedding and head out of the stages; try --pp-layers {good}.",
    )
    return counts


def slices_of(mesh: MeshConfig, cfg: TrainConfig) -> tuple[int, ...] | None:
    """The tokens of each slice of a sequence (--token-slices); None for auto: to be measured."""
    if mesh.token_slices == "auto":
        return None
    multiple = mesh.tp if mesh.sequence_parallel else 1
    return partition.token_slices(mesh.token_slices, cfg.sequence_length, multiple)


def _check_token_slices(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> None:
    lengths = slices_of(mesh, cfg)
    if lengths is not None and len(lengths) == 1:
        return
    given = f"--token-slices {mesh.token_slices}"
    require(
        mesh.cp == 1,
        f"{given} cuts a sequence in time, and --cp {mesh.cp} over ranks; leave one of them out.",
    )
    for option, value in (
        ("--balance-loss", model.balance_loss), ("--capacity-factor", model.capacity_factor)
    ):  # fmt: skip
        require(
            value == 0,
            f"{option} {value:g} counts the tokens of whole sequences, which {given} cuts; leave "
            "one of them out (--balance-speed works with both).",
        )
    schedule_of(mesh, cfg, len(lengths or (1, 1)))


def _check_pipeline(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> None:
    schedule = schedule_of(mesh, cfg)
    _check_token_slices(model, mesh, cfg)
    require(
        model.layers >= schedule.stages or mesh.pp_layers not in ("even", "balanced"),
        f"--layers {model.layers} are too few for the {schedule.stages} stages of --schedule "
        f"{mesh.schedule} with --pp {mesh.pp}; try --layers {schedule.stages}.",
    )
    require(
        mesh.zero < 3,
        f"--zero 3 gathers weights for every action of --pp {mesh.pp}, which costs more than it "
        "saves, and is not built; try --zero 2.",
    )
    require(
        not schedule.vocabulary or mesh.tp == 1,
        f"--schedule {mesh.schedule} splits the vocabulary over the pipeline ranks, and --tp "
        f"{mesh.tp} over its own; try --schedule 1f1b, or --tp 1.",
    )
    if model.vocab_size or mesh.pp_layers != "balanced":  # else it is not known yet
        layers_of(model, mesh, cfg)


# ---- the command line

SEVERAL_NODES = """
several machines: start this on every node (NODES machines of 8 GPUs; HEAD is the first one's name)
  torchrun --nnodes NODES --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 \\
      run.py --model llama3-8b --dp $((NODES * 8))

the same as a SLURM job: save as job.sh, then sbatch job.sh
  #!/bin/bash
  #SBATCH --nodes 4 --ntasks-per-node 1 --gpus-per-node 8
  HEAD=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
  srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-backend c10d \\
      --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $HEAD:29500 \\
      run.py --dp 32 --save-dir runs/job --save-every 500 --resume
"""


def check_ranks(threads: int | None, launched: bool) -> None:
    """--ranks, where it was given; under torchrun (`launched`) there are ranks already."""
    good = threads is None or threads >= 1
    require(good, f"--ranks {threads} must be at least 1; try --ranks 2.")
    require(
        threads is None or not launched,
        f"--ranks {threads} starts threads, but torchrun has started the ranks; leave --ranks out.",
    )


def check_not_empty(given: dict[str, object]) -> None:
    """No option was given an empty string, as an unset shell variable would."""
    for field, value in given.items():
        option = "--" + field.replace("_", "-")
        require(value != "", f"{option} was given an empty value; name one or leave it out.")
