"""How good a candidate can be at best: closed forms, a thousand times cheaper than a prediction.

Idea     A planner looks at 100,000 candidates and predicts a hundred. So it needs bounds that no
         prediction is below: then whatever is left out was worse for certain.
Time     the busiest rank's work; or that of any rank, with the forwards of all stages before its
         first one, and their backwards after, where B and W are one action; then the replicas'
         messages and the optimizer, as step_time.py has them. 1F1B takes exactly that, if stages
         take equally long
Memory   parameters, gradients and optimizer state of rank 0, as parameters.py has them, and of
         activations those between F and B, as many as its schedule holds there (planner_space.py),
         each of its shortest stage
Read     Bounds.seconds, Bounds.memory
Tests    tests/test_planner.py: no prediction is below
"""

from dataclasses import dataclass, field, replace

from picotron_lab.analysis import parameters, saved, step_time
from picotron_lab.analysis.layer_time import Passes, Place
from picotron_lab.analysis.planner_space import Candidate, Question
from picotron_lab.config import MeshConfig
from picotron_lab.partition import even
from picotron_lab.schedules.actions import Schedule

SINGLE = Schedule("parts", (), ((0,), (1,), (2,)), 1)  # embedding, one layer, head
FIRST = parameters.Place()


@dataclass
class Bounds:
    """Bounds for the candidates of one question; remembers what many of them share."""

    ask: Question
    passes: dict[tuple, tuple[float, ...]] = field(default_factory=dict)
    spans: dict[tuple, tuple[float, int, float]] = field(default_factory=dict)
    held: dict[tuple, list[list[parameters.Matrix]]] = field(default_factory=dict)
    states: dict[tuple, int] = field(default_factory=dict)
    layers: dict[tuple, tuple[int, int]] = field(default_factory=dict)

    def seconds(self, one: Candidate) -> float:
        """The step takes at least so long."""
        mesh, shell = one.mesh, self._shell(one)
        key = (self._work_key(one), mesh.pp, mesh.dp, one.family.name, one.virtual)
        if key not in self.spans:
            self.spans[key] = self._span(one, shell)
        span, busiest, backward = self.spans[key]
        at = Place(self.ask.model, mesh, one.cfg, self.ask.hardware)
        counts = even(self.ask.model.layers, shell.stages)
        own = step_time.held(at, shell, busiest, counts)
        return span + sum(step_time.replicas(at, own, backward))

    def memory(self, one: Candidate) -> int:
        """The rank that needs most needs at least so many bytes."""
        mesh, family, layers = one.mesh, one.family, self.ask.model.layers
        first = family.placement(mesh.pp, one.virtual)[0]
        key = (mesh.pp, mesh.dp, mesh.cp, mesh.tp, mesh.ep, mesh.zero, first)
        if key not in self.states:
            self.states[key] = self._state(one, first)
        activations = family.held(mesh.pp, one.cfg.micro_batches(mesh.dp), one.virtual)
        each, last = self._saved(one)
        shortest = layers // (mesh.pp * one.virtual)
        return self.states[key] + activations * shortest * each + (last if mesh.pp == 1 else 0)

    # ---- parts

    def _state(self, one: Candidate, first: tuple[int, ...]) -> int:
        """Bytes that stay on rank 0, whose stages are `first`."""
        mesh, shell = one.mesh, self._shell(one)
        key = (mesh.tp, mesh.ep, mesh.pp, first)
        if key not in self.held:
            counts = even(self.ask.model.layers, shell.stages)
            model = self.ask.model
            self.held[key] = parameters.matrices(model, mesh, one.cfg, shell, counts, FIRST)
        found = parameters.state(self.held[key], mesh, one.cfg, FIRST)
        kept = found.parameters + found.gradients + found.masters + found.moments
        return kept + found.buffers

    @staticmethod
    def _shell(one: Candidate) -> Schedule:
        """The schedule without its lists: where stages are."""
        placement = one.family.placement(one.mesh.pp, one.virtual)
        rounds = one.cfg.micro_batches(one.mesh.dp)
        return Schedule(one.family.name, (), placement, rounds)

    @staticmethod
    def _work_key(one: Candidate) -> tuple:
        """What the time and the memory of a layer depend on."""
        mesh, cfg = one.mesh, one.cfg
        full = mesh.dp if mesh.zero == 3 else 0
        shape = (mesh.tp, mesh.cp, mesh.ep, mesh.sequence_parallel)
        return (*shape, cfg.micro_batch_size, cfg.recompute, full)

    def _alike(self, mesh: MeshConfig) -> MeshConfig:
        """A mesh without pipeline on which a layer takes as long."""
        zero = mesh.zero if mesh.zero == 3 else 0
        alone = {"schedule": "1f1b", "virtual_stages": 0}
        return replace(mesh, pp=1, dp=mesh.dp * mesh.pp, zero=zero, **alone)

    def _passes(self, one: Candidate) -> tuple[float, ...]:
        """Seconds of F, and of B and W, of embedding, a layer and head: six numbers."""
        key = self._work_key(one)
        if key not in self.passes:
            mesh = self._alike(one.mesh)
            at = Place(self.ask.model, mesh, one.cfg, self.ask.hardware)
            found: list[Passes] = step_time.stage_passes(at, SINGLE, (0, 1, 0))
            total = [{kind: each[kind].total() for kind in "FBW"} for each in found]
            self.passes[key] = tuple(x for t in total for x in (t["F"], t["B"] + t["W"]))
        return self.passes[key]

    def _span(self, one: Candidate, shell: Schedule) -> tuple[float, int, float]:
        """(seconds from the first forward to the last backward, at least; the busiest rank; seconds
        of one micro-batch's backward on its stages)."""
        early_f, early_b, layer_f, layer_b, late_f, late_b = self._passes(one)
        counts = even(self.ask.model.layers, shell.stages)
        forward, backward = [n * layer_f for n in counts], [n * layer_b for n in counts]
        forward[0], backward[0] = forward[0] + early_f, backward[0] + early_b
        forward[-1], backward[-1] = forward[-1] + late_f, backward[-1] + late_b
        work = [
            shell.microbatches * sum(forward[s] + backward[s] for s in stages)
            for stages in shell.placement
        ]
        busiest, before, longest = work.index(max(work)), 0.0, 0.0
        for rank, own in enumerate(work):  # rank r begins with stage r in every family
            longest = max(longest, own + before)
            before += forward[rank] + (backward[rank] if one.family.merged else 0.0)
        return longest, busiest, sum(backward[s] for s in shell.placement[busiest])

    def _saved(self, one: Candidate) -> tuple[int, int]:
        """Bytes that forward of a layer leaves, and the head's."""
        key = self._work_key(one)
        if key not in self.layers:
            mesh = self._alike(one.mesh)
            rank = saved.Rank(self.ask.model, mesh, one.cfg, FIRST, kernels=on_triton(one))
            kept = sum(saved.layer(rank).values()), sum(saved.head(rank).values())
            self.layers[key] = kept
        return self.layers[key]


def on_triton(one: Candidate) -> bool:
    """Whether Triton kernels serve: not for float64."""
    return one.cfg.dtype != "float64"
