"""What model, mesh and training ask of each other, each rule one sentence.

Rules   as in config.py: option, value, rule, a value that works
Read    check_run -> one function per axis
Tests   tests/test_config.py
"""

import math

from picotron_lab.config import TWO_CHUNKS, MeshConfig, ModelConfig, TrainConfig, require


def check_run(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> None:
    """What model, mesh and training ask of each other."""
    cfg.micro_batches(mesh.dp)
    require(
        not (mesh.zero and cfg.dp_step),
        f"--dp-step {cfg.dp_step} sums gradients on every rank, and --zero {mesh.zero} has its own "
        "way; leave --dp-step out.",
    )
    _check_sequence(mesh, cfg)
    if mesh.tp > 1:
        _check_tensor_parallel(model, mesh, cfg)
    if mesh.cp > 1:
        _check_context_parallel(model, mesh, cfg)
    if mesh.ep > 1:
        _check_expert_parallel(model, mesh)


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
