"""Parameters of one rank, and what is kept for them, from configs alone: no model is built.

Idea    model.py's matrices, cut as the techniques cut them. A rank's share follows from its place:
            tp      H/n, K/n heads (at least 1), F/n columns, of each layer and of each expert
            vocab   ceil(V/n) rows of embedding and head, over tp or, in a pipeline, over pp
            ep      neighbouring experts, numbers that differ by one at most
            pp      the layers of its stages; a tied weight that two stages use, on both
            zero    ceil(rows/n) rows of each matrix, over dp x cp, of experts over those / ep
Order   as model.parameters() gives them, because buckets are filled in that order
Bytes   weights w, gradients g, masters and moments per element of what this rank's optimizer
        steps: 1910.02054, section 3.1. (2, 2, 12) there; ours are in zero_state.py
Dims    as in model.py
Read    Place -> Matrix -> matrices -> State -> state
Tests   tests/test_memory_prediction.py: equal to what the meter counts, to the byte
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.schedules.actions import Schedule

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
MIB = 2**20


@dataclass(frozen=True)
class Place:
    """Where a rank sits on each axis, counted from 0."""

    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp: int = 0


@dataclass(frozen=True)
class Matrix:
    """A parameter of this rank, before ZeRO cuts it.

    unit     what ZeRO-3 gathers with it: a number in the order of forward
    expert   routed ones are shared out among dp x cp ranks
    shared   several stages use it, or it lies on two ranks as a tied copy: outside of ZeRO
    """

    rows: int
    columns: int = 1
    unit: int = 0
    expert: bool = False
    shared: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns


def part(length: int, parts: int, index: int) -> int:
    """Of `length` things cut into parts of ceil(length / parts), how many the index-th has."""
    each = -(-length // parts)
    return max(0, min(each, length - index * each))


def experts_here(model: ModelConfig, mesh: MeshConfig, place: Place) -> int:
    """Routed experts of this rank, in each layer."""
    E, at = model.experts, (place.dp * mesh.cp + place.cp) % mesh.ep
    return (at + 1) * E // mesh.ep - at * E // mesh.ep


def matrices(
    model: ModelConfig,
    mesh: MeshConfig,
    cfg: TrainConfig,
    schedule: Schedule,
    layers: Sequence[int],
    place: Place,
) -> list[list[Matrix]]:
    """Parameters of each stage of this rank; last those of a vocabulary split over the pipeline.

    layers   how many each stage of the schedule has
    """
    last, homes = schedule.stages - 1, (schedule.rank_of(0), schedule.rank_of(schedule.stages - 1))
    split = mesh.tp > 1 and mesh.vocabulary(cfg.impl) != "none"
    D, V = model.hidden_size, model.vocab_size
    word_rows = part(V, mesh.tp, place.tp) if mesh.tp > 1 else V
    tie = model.tied and last > 0
    embed = Matrix(word_rows if split else V, D, shared=tie)
    head = Matrix(word_rows, D, unit=model.layers + 2, shared=tie)
    both_here = homes[0] == homes[1] or schedule.replicated
    found = []
    for stage in sorted(schedule.placement[place.pp]):
        first = sum(layers[:stage])
        here = [embed] * (stage == 0 and not schedule.vocabulary)
        for i in range(first, first + layers[stage]):
            here += layer_matrices(model, mesh, cfg, place, unit=i + 1)
        here += [Matrix(D, unit=model.layers + 1)] * (stage == last)
        again = model.tied and both_here and 0 in schedule.placement[place.pp]
        if stage == last and not schedule.vocabulary and not again:
            here.append(head)
        found.append(here)
    if schedule.vocabulary:
        words = Matrix(part(V, mesh.pp, place.pp), D, shared=True)
        found.append([words] * (1 if model.tied else 2))
    return found


def layer_matrices(
    model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, place: Place, unit: int = 0
) -> list[Matrix]:
    """Parameters of one layer."""
    D, C, tp = model.hidden_size, model.head_width, mesh.tp
    H, K = model.heads // tp * C, max(1, model.kv_heads // tp) * C
    qkvo = [Matrix(H, D), Matrix(K, D), Matrix(K, D), Matrix(D, H)]
    mlp = _mlp(D, part(model.ffn_size, tp, place.tp))
    if model.experts:
        routed = [replace(m, expert=True) for m in mlp * experts_here(model, mesh, place)]
        width = part(model.shared_experts * model.ffn_size, tp, place.tp)
        shared = _mlp(D, width) if model.shared_experts else []
        moved = mesh.ep > 1 or cfg.impl == "fused"  # expert_parallel.py registers them last
        mlp = [Matrix(model.experts, D), *(shared + routed if moved else routed + shared)]
    return [replace(m, unit=unit) for m in (Matrix(D), *qkvo, Matrix(D), *mlp)]


def _mlp(D: int, F: int) -> list[Matrix]:
    """gate, up, down."""
    return [Matrix(F, D), Matrix(F, D), Matrix(D, F)]


# ---- what is kept for them


@dataclass(frozen=True)
class State:
    """Bytes that lie on one rank from step to step."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    buffers: int


@dataclass(frozen=True)
class Shares:
    """Ranks that share state out, and which of them this is: of most parameters, of experts."""

    ranks: int
    rank: int
    expert_ranks: int
    expert_rank: int

    @staticmethod
    def of(mesh: MeshConfig, place: Place) -> "Shares":
        """dp x cp ranks; those of them that hold the same experts."""
        ranks, rank = mesh.dp * mesh.cp, place.dp * mesh.cp + place.cp
        return Shares(ranks, rank, ranks // mesh.ep, rank // mesh.ep)

    def axis(self, matrix: Matrix) -> tuple[int, int]:
        """(ranks, rank) among whom the state of a matrix is shared."""
        if matrix.expert:
            return self.expert_ranks, self.expert_rank
        return self.ranks, self.rank

    def held(self, matrix: Matrix) -> int:
        """Elements of this rank's rows."""
        return part(matrix.rows, *self.axis(matrix)) * matrix.columns

    def wire(self, group: Sequence[Matrix]) -> int:
        """Elements of a call for these matrices, with padding."""
        return sum(-(-m.rows // self.axis(m)[0]) * self.axis(m)[0] * m.columns for m in group)


def state(
    stages: Sequence[Sequence[Matrix]], mesh: MeshConfig, cfg: TrainConfig, place: Place
) -> State:
    """Bytes of parameters, gradients, masters, moments and flat buffers, exactly."""
    shares, w = Shares.of(mesh, place), BYTES[cfg.dtype]
    g = max(4, w)
    every = [m for stage in stages for m in stage]
    full = sum(m.size for m in every)
    apart = [m for m in every if not m.shared]
    rest = full - sum(m.size for m in apart)
    held = rest + (sum(map(shares.held, apart)) if mesh.zero else full - rest)
    return State(
        parameters=w * (held if mesh.zero == 3 else full),
        gradients=g * (held if mesh.zero >= 2 else full),
        masters=4 * held if w < 4 else 0,
        moments=2 * g * held if cfg.optimizer == "adamw" else 0,
        buffers=buffers(stages, mesh, cfg, shares),
    )


def buffers(
    stages: Sequence[Sequence[Matrix]], mesh: MeshConfig, cfg: TrainConfig, shares: Shares
) -> int:
    """Flat memory that stays, on the fused path: ZeRO-1, -2: two wires per stage and axis, each for
    its largest bucket. ZeRO-3: of each axis a unit that arrives and one in use; one of gradients.

    The buckets of plain data parallelism are the gradients themselves.
    """
    if cfg.impl == "plain" or mesh.zero == 0:
        return 0
    w, g = BYTES[cfg.dtype], max(4, BYTES[cfg.dtype])
    wire = BYTES[cfg.reduce_dtype] if cfg.reduce_dtype else g
    if mesh.zero == 3:
        return _unit_buffers(stages[0], shares, w, wire)
    total = 0
    for stage in stages:
        for expert in (False, True) if mesh.ep > 1 else (None,):
            group = [m for m in stage if not m.shared and expert in (None, m.expert)]
            if group and shares.axis(group[0])[0] > 1:
                sizes = [shares.wire(b) for b in buckets(group, g, cfg.bucket_mib * MIB)]
                total += min(2, len(sizes)) * max(w, wire) * max(sizes)
    return total


def _unit_buffers(group: Sequence[Matrix], shares: Shares, w: int, wire: int) -> int:
    """Of ZeRO-3. Experts that fewer ranks hold are units of their own, with buffers of their own;
    where one rank holds them, they stay whole."""
    apart = shares.expert_ranks != shares.ranks
    total, gradients = 0, 0
    for expert in (False, True) if apart else (None,):
        chosen = [m for m in group if expert in (None, m.expert)]
        if not chosen or shares.axis(chosen[0])[0] == 1:
            continue
        units = [[m for m in chosen if m.unit == i] for i in {m.unit for m in chosen}]
        wires, wholes = map(shares.wire, units), (sum(m.size for m in u) for u in units)
        widest = max(wires)
        total += w * (widest + max(wholes))
        gradients = max(gradients, widest)
    return total + wire * gradients


def buckets(group: Sequence[Matrix], g: int, size: float) -> list[list[Matrix]]:
    """As sharding.group_by_size: last parameters first, a larger one by itself."""
    found: list[list[Matrix]] = []
    room = 0.0
    for matrix in reversed(group):
        if g * matrix.size > room or not found:
            found.append([])
            room = size
        found[-1].append(matrix)
        room -= g * matrix.size
    return found
