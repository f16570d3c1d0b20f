"""From an ordinary loss function to pipeline tasks: cut a recorded step where its stages end.

Paper   Xhebraj et al. 2024, "Scaling Deep Learning Training with MPMD Pipeline Parallelism"
        (JaxPP, 2412.14374)
Idea    The markers of pipeline_yield part a recorded step into segments. An equation of
            forward   lies behind the last marker that it depends on
            backward  lies where the gradients that it needs have come back to
            either    lies where it is first used, if it depends on no marker and no gradient
        Two kinds lie nowhere; each task that needs them computes them again, which is cheaper than
        to send: what depends on parameters alone or on the batch alone, and views of all elements.
        Two yields, three segments; g is the gradient of what has the same number in forward:
            x = pipeline_yield(x @ a)  mm            segment 0 | backward:
            x = pipeline_yield(x @ b)  mm_1          segment 1 | g_2, dc = mm_1.t @ g_2   segment 2
            loss = (x @ c).sum()       mm_2, sum     segment 2 | g_1 = g_2 @ c.t          segment 2
                                                               | db = mm.t @ g_1          segment 1
            c.t, mm.t, ...             recomputed              | g_0 = g_1 @ b.t          segment 1
                                                               | da = batch.t @ g_0       segment 0
Tasks   A stage is one segment, or several in a row. Its equations are its tasks: forward F, and
        backward BW, whole or in two parts: B, what other stages wait for, and W, all else. What one
        task makes and another reads has a name, and is sent if the two run on two devices. Of a
        weight that several stages use, each stage keeps the sum of its own part of the gradient;
        the sums meet once a step, not once a micro-batch (JaxPP's loop commuting).
Read    Task, Body -> trace, merge -> segments_of -> phases -> cut -> partial_sums -> Plan
Tests   tests/test_mpmd_trace.py
"""

import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from picotron_lab.config import ConfigError, require
from picotron_lab.mpmd_record import BACKWARD, FORWARD, Record, calls, record, result
from picotron_lab.mpmd_record import pipeline_yield as pipeline_yield  # for who imports trace

ADD = torch.ops.aten.add.Tensor
Places = dict[Node, tuple[str, int]]  # of each equation: "F", "BW" or "recomputed"; its stage


@dataclass(frozen=True)
class Task:
    """What one stage does at once for one micro-batch.

    kind   "F" forward; "BW" backward; "B" the part of it that other stages wait for, "W" the rest
    run    from the tensors `reads`, in this order, to a tuple of the tensors `makes`; call it under
           torch.no_grad(). It changes no tensor in place
    flops  of its matmuls, convolutions and attention; any other equation counts its elements
    """

    kind: str
    stage: int
    run: GraphModule
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    flops: float


@dataclass(frozen=True)
class Body:
    """A step on one micro-batch, as tasks: F of all stages, then BW, or B and W, from the last.

    tasks       by kind and stage: F, BW, B and W of each; B and W may be empty
    parameters, batch   names of the leaves, such as params.layers.0, in the pytree's order
    loss        name of the loss, which F of the last stage makes
    gradients   of each parameter: (stage, value)s, one of a stage at most, whose sum in this order
                is its gradient; empty if the loss does not use it: its gradient is zero. A value
                may serve two parameters and may be an expanded view: add to a copy of it
    bytes, shapes   of leaves and of all that tasks make
    located     of what the tasks were cut; for merge
    """

    stages: int
    tasks: dict[tuple[str, int], Task]
    parameters: tuple[str, ...]
    batch: tuple[str, ...]
    loss: str
    gradients: dict[str, tuple[tuple[int, str], ...]]
    bytes: dict[str, int]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    params_spec: pytree.TreeSpec
    batch_spec: pytree.TreeSpec
    located: "Located"


def trace(loss_fn: Callable[[Any, Any], Tensor], params: Any, batch: Any) -> Body:
    """Tasks of loss_fn(params, batch) -> scalar and its backward; each pipeline_yield ends a stage.

    params, batch   pytrees of tensors, of which shape, dtype, strides and device count, values not;
                    all params get a gradient
    Raises ConfigError for what cannot be cut, see mpmd_record.py.
    """
    found = locate(record(loss_fn, params, batch))
    return cut(found, [1] * found.segments)


def merge(body: Body, counts: Sequence[int]) -> Body:
    """The same step in fewer stages, each of counts[s] of the stages that trace() found, in a row.

    So a loss function may yield after every layer, and another cut needs no other program.
    """
    segments = body.located.segments
    require(
        sum(counts) == segments and min(counts) > 0,
        f"counts {[*counts]} for merge() must be 1 or more and add up to the {segments} stages "
        f"that trace() found; try {[segments]}.",
    )
    return cut(body.located, counts)


# ---- where each equation lies


@dataclass(frozen=True)
class Located:
    """A recorded step without its markers, and where its equations lie.

    phase       of each equation: "F" forward, "BW" backward, or "recomputed" wherever needed
    segment     of each equation, counted from 0
    segments    how many there are: one more than yields
    loss, grads equations: the loss; the gradient of each parameter, None if it has none
    record      the step as it was recorded
    """

    phase: dict[Node, str]
    segment: dict[Node, int]
    segments: int
    loss: Node
    grads: tuple[Node | None, ...]
    record: Record


def locate(record: Record) -> Located:
    """Where the equations lie; takes the markers out. Raises ConfigError for a segment of none."""
    graph = record.module.graph
    segment = segments_of(graph)
    erase_markers(graph)
    loss, _, *grads = result(graph)
    phase = phases(graph, len(record.parameters))
    segments = record.yields + 1
    check_segments({segment[node] for node, of in phase.items() if of == "F"}, segments)
    return Located(phase, segment, segments, loss, tuple(grads), record)


def segments_of(graph: Graph) -> dict[Node, int]:
    """The segment of each equation; that of a marker is the one behind it.

    max: of several values, forward needs the last to come. min: backward goes from the last segment
    to the first, so there the last to come is the one with the smallest number.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    seed = nodes.index(result(graph)[1])
    before = {marker: k for k, marker in enumerate(calls(graph, FORWARD))}
    after = {marker: k + 1 for marker, k in before.items()}
    last = len(before)
    for node in calls(graph, BACKWARD):
        before[node] = after[node] = before[node.args[0].args[0]]
    found = spread(nodes[:seed], after, max)
    found |= spread(nodes[seed:], {nodes[seed]: last, **after}, min)
    for i, node in reversed([*enumerate(nodes)]):
        if node not in found:  # no marker decides: where it is needed first; backward begins at max
            users = [u for u in node.users if u in found]
            used_in = [before.get(user, found[user]) for user in users]
            found[node] = (min if i < seed else max)(used_in, default=last)
    for node in nodes:
        if node.target is operator.getitem:  # results of one equation stay together
            found[node] = found[node.args[0]]
    return found


def spread(nodes: list[Node], known: dict[Node, int], choose: Callable) -> dict[Node, int]:
    """Segments of the known nodes, and of those after them, which choose from their inputs'."""
    found = {}
    for node in nodes:
        inputs = [found[i] for i in node.all_input_nodes if i in found]
        if node in known or inputs:
            found[node] = known[node] if node in known else choose(inputs)
    return found


def erase_markers(graph: Graph) -> None:
    """Who uses what a marker gives uses what it took."""
    for node in reversed(graph.nodes):
        is_given = node.target is operator.getitem and node.args[0].target in (FORWARD, BACKWARD)
        if is_given:
            values, index = node.args[0].args[-1], node.args[1]
            if index < len(values):  # else the ticket, which has no user any more
                node.replace_all_uses_with(values[index])
        if is_given or node.target in (FORWARD, BACKWARD):
            graph.erase_node(node)


def phases(graph: Graph, parameters: int) -> dict[Node, str]:
    """Of each equation "F", "BW" or "recomputed".

    The seed, with which backward begins, is a constant. It counts as what needs params and batch,
    or all that comes of it and of params alone would be recomputed, much of backward.
    """
    loss, seed, *grads = result(graph)
    needs, found, phase, leaf = {}, {}, "F", itertools.count()
    for node in graph.nodes:
        if node.op == "placeholder":
            needs[node] = {"params" if next(leaf) < parameters else "batch"}
            continue
        needs[node] = set().union(*(needs[i] for i in node.all_input_nodes))
        if node is seed:
            needs[node], phase = {"params", "batch"}, "BW"
        free = len(needs[node]) < 2 or is_whole_view(node)
        found[node] = "recomputed" if free and node not in (loss, *grads) else phase
    del found[graph.output_node()]
    return found


def is_whole_view(node: Node) -> bool:
    """Whether an equation shows all elements of a tensor in another shape, and moves none."""
    value = node.meta.get("val")
    if not getattr(node.target, "is_view", False) or not isinstance(value, Tensor):
        return False
    return value.numel() >= node.args[0].meta["val"].numel()


def check_segments(busy: set[int], segments: int) -> None:
    """Raise ConfigError if nothing is left for a stage to do."""
    require(
        bool(busy) or segments > 1,
        "The loss is itself a leaf of params, so that there is nothing to compute: compute it from "
        "params and batch, such as (params * batch).sum().",
    )
    for idle in sorted({*range(segments)} - busy):
        where = "after" if idle == 0 else "before"
        raise ConfigError(
            f"Stage {idle} of {segments} has nothing to compute from both parameters and batch: "
            f"leave out the pipeline_yield {where} it."
        )


# ---- from equations to tasks


def cut(found: Located, counts: Sequence[int]) -> Body:
    """Tasks of stages of counts[s] segments each."""
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    graph, new = Graph(), {}
    graph.graph_copy(found.record.module.graph, new)
    places = {new[n]: (phase, stage_of[found.segment[n]]) for n, phase in found.phase.items()}
    after = itertools.dropwhile(lambda node: places[node][0] != "BW", places)  # from the seed on
    backward = {*after}
    parts = [partial_sums(graph, new.get(grad), places, backward) for grad in found.grads]
    outputs = {new[found.loss], *itertools.chain(*parts)}
    drop_unused(graph, outputs, places)
    names = found.record.parameters + found.record.batch
    leaves = dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))
    tasks = Plan(found.record.module, places, leaves, outputs).tasks(len(counts))
    made = {name for task in tasks.values() for name in task.makes}
    known = [node for node in graph.nodes if node in leaves or node.name in made]
    values = {leaves.get(node, node.name): node.meta["val"] for node in known}
    gradients = [tuple((places[part][1], part.name) for part in sums) for sums in parts]
    return Body(
        stages=len(counts),
        tasks=tasks,
        parameters=found.record.parameters,
        batch=found.record.batch,
        loss=new[found.loss].name,
        gradients=dict(zip(found.record.parameters, gradients, strict=True)),
        bytes={name: x.numel() * x.element_size() for name, x in values.items()},
        shapes={name: (tuple(x.shape), x.dtype) for name, x in values.items()},
        params_spec=found.record.specs[0],
        batch_spec=found.record.specs[1],
        located=found,
    )


def partial_sums(
    graph: Graph, grad: Node | None, places: Places, backward: set[Node]
) -> list[Node]:
    """The parts of a gradient, one of each stage that has any.

    w1 + w2 + w3 of stages 2, 0 and 2 becomes w1 + w3 of stage 2, and w2 of stage 0.
    """
    sums: dict[int, Node] = {}
    for term in terms(grad, places, backward) if grad else ():
        stage = places[term][1]
        if stage in sums:
            total = graph.call_function(ADD, (sums[stage], term))
            total.meta["val"], term = term.meta["val"], total
        sums[stage], places[term] = term, ("BW", stage)
    return [*sums.values()]


def terms(node: Node, places: Places, backward: set[Node]) -> list[Node]:
    """What a gradient adds up, as far down as its sums join stages.

    (w1 + w2) + w3 of stages 2, 0 and 2 are three terms; were all of stage 2, it is one.
    """
    inputs = node.args if node.target is ADD and len(node.args) == 2 and not node.kwargs else ()
    if not inputs or not all(i in backward and alike(i, node) for i in inputs):
        return [node]
    found = [term for i in inputs for term in terms(i, places, backward)]
    return found if len({places[term][1] for term in found}) > 1 else [node]


def alike(a: Node, b: Node) -> bool:
    """Whether two equations make tensors of one shape and dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return x.shape == y.shape and x.dtype == y.dtype


def drop_unused(graph: Graph, outputs: Collection[Node], places: Places) -> None:
    """Sums that were taken apart are of no more use."""
    for node in reversed(graph.nodes):
        if node in places and not node.users and node not in outputs:
            graph.erase_node(node)
            del places[node]


@dataclass(frozen=True)
class Plan:
    """Equations and their places; what they read from outside; what must come out of them."""

    module: GraphModule
    places: Places
    leaves: dict[Node, str]
    outputs: set[Node]

    def tasks(self, stages: int) -> dict[tuple[str, int], Task]:
        """All kinds of all stages."""
        own = {(kind, stage): [] for stage in range(stages) for kind in ("F", "BW")}
        for node, place in self.places.items():
            if place in own:
                own[place].append(node)
        reads = {place: {*self.needs(nodes)[0]} for place, nodes in own.items()}
        found = {}
        for (kind, stage), nodes in own.items():
            asked = set().union(*(reads[p] for p in reads if p != (kind, stage)))
            found[kind, stage] = self.task(kind, stage, nodes, asked)
            if kind == "BW":
                b, w = self.halves(nodes, asked)
                found["B", stage] = self.task("B", stage, b, asked.union(self.needs(w)[0]))
                found["W", stage] = self.task("W", stage, w, set())
        return found

    def needs(self, nodes: Iterable[Node]) -> tuple[list[Node], list[Node]]:
        """What these equations read, and they themselves with all that is recomputed for them."""
        reads, equations, waiting = set(), {*nodes}, [*nodes]
        while waiting:
            for i in waiting.pop().all_input_nodes:
                if i in self.leaves or self.places[i][0] != "recomputed":
                    reads.add(i)
                elif i not in equations:
                    equations.add(i)
                    waiting.append(i)
        return sorted(reads - equations), sorted(equations)

    def halves(self, nodes: list[Node], asked: set[Node]) -> tuple[list[Node], list[Node]]:
        """The equations of a backward that lead to what others ask for, and the others."""
        own, leading = {*nodes}, set()
        waiting = [node for node in nodes if node in asked]
        while waiting:
            node = waiting.pop()
            if node not in leading:
                leading.add(node)
                waiting += own.intersection(self.needs([node])[0])
        # an equation of several results goes with all of them: a tuple of tensors is no value
        leading |= {n for n in nodes if n.target is operator.getitem and n.args[0] in leading}
        return [n for n in nodes if n in leading], [n for n in nodes if n not in leading]

    def task(self, kind: str, stage: int, nodes: list[Node], asked: set[Node]) -> Task:
        """These equations as a task that makes what is asked for, and outputs."""
        reads, equations = self.needs(nodes)
        makes = [node for node in nodes if node in asked or node in self.outputs]
        graph = Graph()
        new = {node: graph.placeholder(node.name) for node in reads}
        for node in equations:
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node in makes))
        return Task(
            kind, stage, GraphModule(self.module, graph),
            tuple(self.leaves.get(node, node.name) for node in reads),
            tuple(node.name for node in makes), sum(map(flops, equations)),
        )  # fmt: skip


def flops(node: Node) -> float:
    """Multiplications and additions of a matmul, convolution or attention, else elements made."""
    value = node.meta.get("val")
    count = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if count:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        return float(count(*args, **kwargs, out_val=value))
    if node.target is operator.getitem or getattr(node.target, "is_view", False):
        return 0.0
    return float(sum(x.numel() for x in pytree.tree_leaves(value) if isinstance(x, Tensor)))
