"""From an ordinary loss function to pipeline tasks: cut a recorded step where its stages end.

Paper   Xhebraj et al. 2024, "Scaling Deep Learning Training with MPMD Pipeline Parallelism"
        (JaxPP, 2412.14374)
Idea    A stage is one segment between two pipeline_yields, or several in a row. Its equations are
        its tasks: forward F, and backward BW, whole or in two parts: B, what other stages wait
        for, and W, all else. What one task makes and another reads has a name, and is sent if the
        two run on two devices. Of a weight that several stages use, each stage keeps the sum of
        its own part of the gradient; the sums meet once a step, not once a micro-batch (JaxPP's
        loop commuting).
Read    Task, Body -> trace, merge -> cut -> partial_sums -> Plan
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

from picotron_lab.config import require
from picotron_lab.mpmd_record import Record, record
from picotron_lab.mpmd_record import pipeline_yield as pipeline_yield  # for who imports trace

ADD = torch.ops.aten.add.Tensor
Places = dict[Node, tuple[str, int]]  # of each equation: "F", "BW" or "copied", and its stage


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
    record      of what the tasks were cut; for merge
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
    record: Record


def trace(loss_fn: Callable[[Any, Any], Tensor], params: Any, batch: Any) -> Body:
    """Tasks of loss_fn(params, batch) -> scalar and its backward; each pipeline_yield ends a stage.

    params, batch   pytrees of tensors, of which shape, dtype, strides and device count, values not;
                    all params get a gradient
    Raises ConfigError for what cannot be cut, see mpmd_record.py.
    """
    found = record(loss_fn, params, batch)
    return cut(found, [1] * found.segments)


def merge(body: Body, counts: Sequence[int]) -> Body:
    """The same step in fewer stages, each of counts[s] of the stages that trace() found, in a row.

    So a loss function may yield after every layer, and another cut needs no other program.
    """
    segments = body.record.segments
    require(
        sum(counts) == segments and min(counts) > 0,
        f"counts {[*counts]} for merge() must be 1 or more and add up to the {segments} stages "
        f"that trace() found; try {[segments]}.",
    )
    return cut(body.record, counts)


# ---- from equations to tasks


def cut(found: Record, counts: Sequence[int]) -> Body:
    """Tasks of stages of counts[s] segments each."""
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    graph, new = Graph(), {}
    graph.graph_copy(found.module.graph, new)
    places = {new[n]: (phase, stage_of[found.segment[n]]) for n, phase in found.phase.items()}
    parts = [partial_sums(graph, new.get(grad), places) for grad in found.grads]
    outputs = {new[found.loss], *itertools.chain(*parts)}
    drop_unused(graph, outputs, places)
    names = found.parameters + found.batch
    leaves = dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))
    tasks = Plan(found.module, places, leaves, outputs).tasks(len(counts))
    made = {name for task in tasks.values() for name in task.makes}
    known = [node for node in graph.nodes if node in leaves or node.name in made]
    values = {leaves.get(node, node.name): node.meta["val"] for node in known}
    gradients = [tuple((places[part][1], part.name) for part in sums) for sums in parts]
    return Body(
        stages=len(counts),
        tasks=tasks,
        parameters=found.parameters,
        batch=found.batch,
        loss=new[found.loss].name,
        gradients=dict(zip(found.parameters, gradients, strict=True)),
        bytes={name: x.numel() * x.element_size() for name, x in values.items()},
        shapes={name: (tuple(x.shape), x.dtype) for name, x in values.items()},
        params_spec=found.specs[0],
        batch_spec=found.specs[1],
        record=found,
    )


def partial_sums(graph: Graph, grad: Node | None, places: Places) -> list[Node]:
    """The parts of a gradient, one of each stage that has any."""
    sums: dict[int, Node] = {}
    for term in terms(grad, places) if grad else ():
        stage = places[term][1]
        if stage in sums:
            total = graph.call_function(ADD, (sums[stage], term))
            total.meta["val"], term = term.meta["val"], total
        sums[stage], places[term] = term, ("BW", stage)
    return [*sums.values()]


def terms(node: Node, places: Places) -> list[Node]:
    """What a gradient adds up, as far down as its sums join stages."""
    inputs = node.args if node.target is ADD and len(node.args) == 2 and not node.kwargs else ()
    if not inputs or not all(i in places and alike(i, node) for i in inputs):
        return [node]
    found = [term for i in inputs for term in terms(i, places)]
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
        """What these equations read, and they themselves with all that is copied for them."""
        reads, equations, waiting = set(), {*nodes}, [*nodes]
        while waiting:
            for i in waiting.pop().all_input_nodes:
                if i in self.leaves or self.places[i][0] != "copied":
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
