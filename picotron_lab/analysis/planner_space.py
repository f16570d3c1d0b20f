"""What a planner may choose from: every mesh, schedule and way to train that so many GPUs allow.

Idea     The GPUs are a product pp x dp x cp x tp; model, sequence and batch say which factors are
         legal. For each mesh: sequence parallelism or not, experts shared out or not, a few
         schedules, sizes of micro-batches, recomputation and stages of ZeRO.
Left out schedules that one of FAMILIES beats in time and memory; cuts of layers other than even;
         other kinds of context parallelism than the default; dropout; plain paths
Read     Question -> Family -> Candidate -> candidates
Tests    tests/test_planner.py
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from picotron_lab.analysis.hardware import Hardware
from picotron_lab.checks import check_run
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.schedules import basic

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "full")  # selective: fused attention keeps no scores that it could leave out
BATCH_TOKENS = 2**22  # of a step, at least, where nobody says; and for every so many GPUs
GPUS_PER_SEQUENCE = 8  # one sequence: both as in Llama 3's training (2407.21783, table 4)
MOST_GPUS = 2**20


@dataclass(frozen=True)
class Question:
    """What is to be trained, and on what. Lengths in tokens, the batch in sequences.

    given   how the command line names the model; empty: by its preset
    """

    model: ModelConfig
    gpus: int
    hardware: Hardware
    sequence_length: int = 8192
    global_batch_size: int = 0  # 0: `usual_batch`
    dtype: str = "bfloat16"
    given: str = ""

    def __post_init__(self) -> None:
        require(
            1 <= self.gpus <= MOST_GPUS,
            f"--gpus {self.gpus} must lie between 1 and {MOST_GPUS}; try --gpus 8.",
        )
        require(
            self.model.vocab_size > 0,
            f"--model {self.model.name} takes the size of its vocabulary from a tokenizer, and a "
            "plan has none; add --vocab-size 32000.",
        )
        require(
            self.sequence_length >= 1,
            f"--sequence-length {self.sequence_length} must be at least 1; try "
            f"--sequence-length {Question.sequence_length}.",
        )
        self.training()  # which checks lengths, batch and dtype

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.global_batch_size or usual_batch(self.gpus, self.sequence_length)

    def training(self, micro_batch_size: int = 1, recompute: str = "none") -> TrainConfig:
        """The options of a run that answers it."""
        return TrainConfig(
            global_batch_size=self.batch, micro_batch_size=micro_batch_size,
            sequence_length=self.sequence_length, dtype=self.dtype, recompute=recompute,
        )  # fmt: skip


def usual_batch(gpus: int, sequence_length: int) -> int:
    """Sequences of a step that many meshes can share: at least 4 Mi tokens, and one sequence for
    every 8 GPUs; a multiple of as large a part of `gpus` as there are sequences."""
    least = max(-(-BATCH_TOKENS // sequence_length), gpus // GPUS_PER_SEQUENCE, 1)
    share = max(n for n in divisors(gpus) if n <= least)
    return -(-least // share) * share


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


@dataclass(frozen=True)
class Family:
    """A schedule: where its stages are, and what its first rank holds.

    placement   (ranks, stages per rank) -> stages of each rank
    held        (ranks, micro-batches, stages per rank) -> activations of one stage and micro-batch
                that rank 0 holds between F and B, at least
    merged      B and W are one action, so that what a rank ends with is the backward of its first
                stage
    """

    name: str
    placement: Callable[[int, int], tuple[tuple[int, ...], ...]]
    held: Callable[[int, int, int], int]
    merged: bool = True

    def stages(self, layers: int, pp: int) -> list[int]:
        """Stages per rank to try."""
        own = len(self.placement(1, 1)[0])
        several = (2, 3, 4, 5, 8, 10, 16) if self.name == "interleaved" else (own,)
        return [v for v in several if v * pp <= layers]


def _held_interleaved(p: int, m: int, v: int) -> int:
    group = m // max(1, m // p)
    return min(m * v, (v - 1) * group + 2 * p - 1)


FAMILIES = (  # what rank 0 holds: the docstrings of schedules/
    Family("1f1b", lambda p, v: basic.straight(p), lambda p, m, v: min(m, p)),
    Family("interleaved", basic.looped, _held_interleaved),
    Family("zb-h1", lambda p, v: basic.straight(p), lambda p, m, v: min(m, p), False),
    Family("zb-v", lambda p, v: basic.folded(p), lambda p, m, v: min(m + 1, 2 * p), False),
    Family("v-half", lambda p, v: basic.folded(p), lambda p, m, v: min(m, p) + 1, False),
)


@dataclass(frozen=True)
class Candidate:
    """A mesh and the options to train on it; `virtual`: stages per pipeline rank."""

    mesh: MeshConfig
    cfg: TrainConfig
    family: Family
    virtual: int

    @property
    def rounds(self) -> int:
        """Micro-batches of a step."""
        return self.cfg.micro_batches(self.mesh.dp)

    def options(self) -> str:
        """As run.py takes them: what differs from its defaults, and differs between candidates."""
        words, plain = [], MeshConfig(dp=self.mesh.dp)
        for field in fields(MeshConfig):
            value = getattr(self.mesh, field.name)
            option = "--" + field.name.replace("_", "-")
            if field.name == "dp" or value != getattr(plain, field.name):
                words.append(option if value is True else f"{option} {value}")
        words.append(f"--micro-batch-size {self.cfg.micro_batch_size}")
        if self.cfg.recompute != "none":
            words.append(f"--recompute {self.cfg.recompute}")
        return " ".join(words)


def legal(ask: Question, mesh: MeshConfig, cfg: TrainConfig) -> bool:
    """Whether run.py would start it."""
    try:
        check_run(ask.model, mesh, cfg)
    except ConfigError:
        return False
    return True


def meshes(ask: Question, most_tp: int) -> Iterator[MeshConfig]:
    """Every legal mesh without pipeline and replicas: tp, cp, sequence parallel."""
    cfg = replace(ask.training(), global_batch_size=1)
    pairs = (
        (tp, cp)
        for tp in divisors(ask.gpus)
        for cp in divisors(ask.gpus // tp)
        if tp <= min(most_tp, ask.model.heads) and cp <= ask.sequence_length
    )
    for tp, cp in pairs:
        for split in (False, True)[: min(tp, 2)]:
            mesh = MeshConfig(cp=cp, tp=tp, sequence_parallel=split)
            if legal(ask, mesh, cfg):
                yield mesh


def candidates(ask: Question, most_tp: int) -> Iterator[Candidate]:
    """All of them; a schedule may still refuse its number of micro-batches, and memory any.

    most_tp   tensor-parallel ranks at most: those of a node, unless nothing else fits
    """
    runs = [
        ask.training(size, recompute)
        for size in MICRO_BATCHES
        for recompute in RECOMPUTE
        if ask.batch % size == 0
    ]
    for one, pp in shapes(ask, most_tp):
        chosen = [cfg for cfg in runs if ask.batch % (cfg.micro_batch_size * one.dp) == 0]
        for mesh, family, virtual in pipelines(ask, one, pp):
            yield from (Candidate(mesh, cfg, family, virtual) for cfg in chosen)


def shapes(ask: Question, most_tp: int) -> Iterator[tuple[MeshConfig, int]]:
    """Every mesh of all GPUs that shares out the batch, with its pipeline ranks apart."""
    for one in meshes(ask, most_tp):
        for pp in divisors(ask.gpus // one.size):
            base = replace(one, dp=ask.gpus // (one.size * pp))
            if pp <= ask.model.layers and ask.batch % base.dp == 0:
                yield from ((replace(base, ep=ep), pp) for ep in expert_ranks(ask.model, base))


def expert_ranks(model: ModelConfig, mesh: MeshConfig) -> list[int]:
    """Sizes of ep that give each rank as many experts; 1 without experts."""
    shared = [n for n in divisors(mesh.dp * mesh.cp) if n <= model.experts]
    return [n for n in shared if model.experts % n == 0] or [1]


def pipelines(ask: Question, mesh: MeshConfig, pp: int) -> Iterator[tuple[MeshConfig, Family, int]]:
    """The mesh with so many pipeline ranks, every schedule and every stage of ZeRO."""
    replicas = mesh.dp * mesh.cp
    stages = range(1) if replicas == 1 else range(4 if pp == 1 else 3)
    for family in FAMILIES if pp > 1 else FAMILIES[:1]:
        for virtual in family.stages(ask.model.layers, pp):
            given = {"virtual_stages": virtual} if family.name == "interleaved" else {}
            name = {"schedule": family.name} if pp > 1 else {}
            for zero in stages:
                yield replace(mesh, pp=pp, zero=zero, **name, **given), family, virtual
