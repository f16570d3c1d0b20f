"""What replicas send each other in a step, from configs alone: gradients, and the weights of ZeRO.

Idea    Two kinds of sums, once or several times a step:
          over replicas   ranks with the same weights and other tokens: data_parallel.py, zero.py.
                          m: backwards of a stage, Ψ: its parameters of g bytes while gradients add
                          up, w as weights, s on the wire (--reduce-dtype, else g); padded: rows
                          up to a multiple of the ranks
                            naive       Ψ in a call per tensor   overlapped  the same, m times
                            silent      Ψ s in buckets           bucketed    the same, m times
                            ZeRO-1      reduce_scatter of s, all_gather of w, both padded; plain: a
                                        call per tensor, fused: per bucket
                            ZeRO-2      the same, reduce_scatter m times
                            ZeRO-3      m times, per unit: all_gather of w for forward, again where
                                        backward reads the weights, reduce_scatter of s
          inside a model  ranks that see the same tokens, each with a part of a gradient: one
                          all_reduce per axis (sharding.reduce_gradients) of all such gradients
                            tp      routers; with sequence parallelism norms, and a whole embedding
                            kv      k and v, where ranks share a key/value head
                            tie     a tied weight on the first and on the last stage
                            mirror  everything, on DualPipe's two ranks with the same stages
Experts over expert_replica, apart from all others, where there is expert parallelism
Shared  parameters of several stages, words of a pipeline: outside of ZeRO, a call each
Source  the contracts in data_parallel.py, zero.py, zero_state.py; 1910.02054, section 7
Dims    as in model.py
Read    Sent -> Held -> replicas -> summed, zero_1_and_2, zero_3 -> parts
Tests   tests/test_traffic.py: equal to the ledger of every rank
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from picotron_lab.analysis.parameters import BYTES, MIB, Matrix, Shares, buckets
from picotron_lab.analysis.saved import Rank
from picotron_lab.schedules.actions import Schedule

Group = Sequence[Matrix]


class Sent(NamedTuple):
    """Calls of one operation on one axis, and the payload of all of them, in bytes."""

    axis: str
    op: str
    calls: int
    size: int


@dataclass(frozen=True)
class Held:
    """What a rank holds, and how often backward passes through it.

    stages   parameters of each stage, and of words that are split over a pipeline, as
             parameters.matrices gives them
    rounds   backwards of each stage in a step, of slices one by one
    counts   layers of every stage of the schedule
    """

    rank: Rank
    schedule: Schedule
    counts: Sequence[int]
    stages: Sequence[Group]
    rounds: Sequence[int]

    @cached_property
    def shares(self) -> Shares:
        """Who shares state."""
        return Shares.of(self.rank.mesh, self.rank.place)

    @property
    def here(self) -> list[int]:
        """Stages of this rank."""
        return sorted(self.schedule.placement[self.rank.place.pp])

    @property
    def layers(self) -> int:
        """Layers of this rank."""
        return sum(self.counts[stage] for stage in self.here)

    @property
    def wire(self) -> int:
        """Bytes of an element of a gradient on its way."""
        cfg = self.rank.cfg
        return BYTES[cfg.reduce_dtype] if cfg.reduce_dtype else self.rank.at.wide

    def optimized(self, matrix: Matrix) -> int:
        """Elements of a parameter that this rank's optimizer steps."""
        whole = matrix.shared or self.rank.mesh.zero == 0
        return matrix.size if whole else self.shares.held(matrix)


# ---- over replicas


def replica_axis(r: Rank) -> str:
    """The name of the axis of ranks with the same weights and other tokens: mesh.py."""
    return "replica" if r.mesh.cp > 1 else "dp"


def replicas(held: Held) -> Iterator[Sent]:
    """Gradients of all parameters, and with ZeRO weights, over dp x cp and over expert_replica."""
    zero = held.rank.mesh.zero
    scheme = (summed, zero_1_and_2, zero_1_and_2, zero_3)[zero]
    for stage, rounds in zip(held.stages, held.rounds, strict=False):  # the words have no rounds
        for axis, group in by_axis(held, [m for m in stage if not m.shared]):
            yield from scheme(held, axis, group, rounds)
    shared = [m for stage in held.stages for m in stage if m.shared]
    if held.shares.ranks > 1:
        size = held.rank.at.wide * sum(m.size for m in shared)
        yield Sent(replica_axis(held.rank), "all_reduce", len(shared), size)


def by_axis(held: Held, group: Group) -> Iterator[tuple[str, list[Matrix]]]:
    """Axes of more than one rank, and the parameters whose gradients are partial over each."""
    apart = held.rank.mesh.ep > 1
    if held.shares.ranks > 1:
        rest = [m for m in group if not (apart and m.expert)]
        yield replica_axis(held.rank), rest
    if apart and held.shares.expert_ranks > 1:
        yield "expert_replica", [m for m in group if m.expert]


def summed(held: Held, axis: str, group: Group, rounds: int) -> Iterator[Sent]:
    """Data parallelism: data_parallel.py, its four steps."""
    step, wide = held.rank.cfg.sync_step, held.rank.at.wide
    times = rounds if step in ("overlapped", "bucketed") else 1
    flat = step in ("bucketed", "silent")
    calls, element = (len(in_buckets(held, group)), held.wire) if flat else (len(group), wide)
    yield Sent(axis, "all_reduce", times * calls, times * element * sum(m.size for m in group))


def in_buckets(held: Held, group: Group) -> list[list[Matrix]]:
    """What travels together on the fused paths."""
    return buckets(group, held.rank.at.wide, held.rank.cfg.bucket_mib * MIB)


def zero_1_and_2(held: Held, axis: str, group: Group, rounds: int) -> Iterator[Sent]:
    """Sums of own rows once or after every backward, then the weights of all: zero.py, stages 1
    and 2."""
    r, elements = held.rank, held.shares.wire(group)
    calls = len(in_buckets(held, group)) if r.fused else len(group)
    times = rounds if r.mesh.zero == 2 else 1
    yield Sent(axis, "reduce_scatter", times * calls, times * held.wire * elements)
    yield Sent(axis, "all_gather", calls, r.at.element * elements)


def zero_3(held: Held, axis: str, group: Group, rounds: int) -> Iterator[Sent]:
    """Unit by unit, for every micro-batch: zero.py, stage 3, and zero_units.py.

    Recomputation changes nothing: what it gathers again stays for backward, which follows.
    """
    r = held.rank
    first, last = 0, r.model.layers + 2
    for unit, members in units(r, group).items():
        read = unit != first and (unit != last or head_is_read(r))
        calls = 1 if r.fused else len(members)
        elements, gathers = held.shares.wire(members), rounds * (2 if read else 1)
        yield Sent(axis, "all_gather", gathers * calls, gathers * r.at.element * elements)
        yield Sent(axis, "reduce_scatter", rounds * calls, rounds * held.wire * elements)


def units(r: Rank, group: Group) -> dict[int, list[Matrix]]:
    """Parameters by unit; a tied weight is in the first and in the last one."""
    found: dict[int, list[Matrix]] = {}
    for matrix in group:
        found.setdefault(matrix.unit, []).append(matrix)
    if r.model.tied and 0 in found:  # not among experts
        found[r.model.layers + 2] = found[0]
    return found


def head_is_read(r: Rank) -> bool:
    """Whether backward reads the weight of the head: not where forward makes its gradients."""
    gathers_logits = r.mesh.tp > 1 and r.mesh.vocabulary(r.cfg.impl) == "none"
    return not r.fused or gathers_logits


# ---- inside a model


def parts(held: Held) -> Iterator[Sent]:
    """Sums of gradients of which ranks that see the same tokens have a part each."""
    each = {"tp": over_tp(held), "kv": over_kv(held), **over_copies(held)}
    for axis, group in each.items():
        if group:
            size = held.rank.at.wide * sum(map(held.optimized, group))
            yield Sent(axis, "all_reduce", 1, size)


def over_tp(held: Held) -> list[Matrix]:
    """Routers, whose every rank has its own term of the experts (tensor_parallel.ParallelMoE);
    what sees only a rank's own tokens (sequence_parallel.py)."""
    r, model = held.rank, held.rank.model
    if r.mesh.tp == 1:
        return []
    found = [Matrix(model.experts, model.hidden_size)] * (held.layers if model.experts else 0)
    if not r.mesh.sequence_parallel:
        return found
    norms = 2 * held.layers + (held.schedule.stages - 1 in held.here)
    found += [Matrix(model.hidden_size)] * norms
    whole = r.mesh.vocabulary(r.cfg.impl) == "none" and 0 in held.here
    return found + [Matrix(model.vocab_size, model.hidden_size)] * whole


def over_kv(held: Held) -> list[Matrix]:
    """k and v of one head, where several ranks hold it (tensor_parallel.ParallelAttention)."""
    model = held.rank.model
    if held.rank.mesh.tp <= model.kv_heads:
        return []
    return [Matrix(model.head_width, model.hidden_size)] * (2 * held.layers)


def over_copies(held: Held) -> dict[str, list[Matrix]]:
    """What lies on two pipeline ranks (pipeline_stages.copies)."""
    schedule, mine = held.schedule, held.rank.place.pp
    if schedule.replicated:
        return {"mirror": [m for stage in held.stages for m in stage]}
    ends = {schedule.rank_of(0), schedule.rank_of(schedule.stages - 1)}
    tied = held.rank.model.tied and not schedule.vocabulary
    if not tied or len(ends) == 1 or mine not in ends:
        return {}
    return {"tie": [m for stage in held.stages for m in stage if m.shared]}
