"""Record one training step as a flat list of operators, each with the stage that it belongs to.

Paper   Xhebraj et al. 2024, "Scaling Deep Learning Training with MPMD Pipeline Parallelism"
        (JaxPP, 2412.14374)
Idea    loss_fn and its backward run once, on tensors without memory. The list of operators
        (equations) has a marker wherever pipeline_yield was called, and one wherever a gradient
        came back through it; the markers part it into segments. An equation of
            forward   lies behind the last marker that it depends on; if it depends on none, where
                      it is first used
            backward  where the last marker led that its gradient came back through; what prepares
                      something for it (a saved tensor, transposed), where it is first used
        Two kinds lie nowhere, and each task that needs them has a copy, which is cheaper than to
        send: what depends on parameters alone or on the batch alone, and views of all elements.
Not     possible: Python that branches on values, as one path is recorded; random numbers; shapes
        that depend on values (nonzero, masks as indices); changing parameters or batch in place
Read    pipeline_yield -> Record -> record -> equations -> segments_of -> phases -> what is refused
Tests   tests/test_mpmd_record.py
"""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab.config import ConfigError, require

VALUES_DECIDE = (
    GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException,
)  # fmt: skip


# ---- where a stage ends


def pipeline_yield(*values: Tensor) -> Any:
    """Here a stage ends. Gives back what it is given, one tensor or a tuple; so does backward.

    What later stages use may go through it or past it (a skip connection).
    """
    require(bool(values), "pipeline_yield() is given nothing: give it the tensors that go on.")
    *marked, _ = stage_end([*values])
    return marked[0] if len(values) == 1 else tuple(marked)


def _forward(values: list[Tensor]) -> list[Tensor]:
    """Copies, and an empty tensor: a ticket, by which backward's marker finds this one."""
    return [*(x.clone() for x in values), values[0].new_empty(0, dtype=torch.int64)]


def _backward(ticket: Tensor, grads: list[Tensor]) -> list[Tensor]:
    return [grad.clone() for grad in grads]


def _keep_ticket(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])


def _send_back(ctx: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
    known = [grad for grad in grads if grad is not None]
    marked = iter(stage_end_backward(*ctx.saved_tensors, known) if known else ())
    return [None if grad is None else next(marked) for grad in grads[:-1]]


# An operator's results must not be its inputs: hence the copies, and the tasks have no markers.
stage_end = torch.library.custom_op("picotron_lab::stage_end", _forward, mutates_args=())
stage_end_backward = torch.library.custom_op(
    "picotron_lab::stage_end_backward", _backward, mutates_args=()
)
stage_end.register_fake(_forward)
stage_end_backward.register_fake(_backward)
stage_end.register_autograd(_send_back, setup_context=_keep_ticket)
FORWARD = torch.ops.picotron_lab.stage_end.default
BACKWARD = torch.ops.picotron_lab.stage_end_backward.default


# ---- record


@dataclass(frozen=True)
class Record:
    """One step, equation by equation, without markers.

    module      takes the parameters, then the leaves of the batch
    phase       of each equation: "F" forward, "BW" backward, or "copied"
    segment     of each equation, counted from 0
    segments    how many there are: one more than yields
    loss, grads equations: the loss; the gradient of each parameter, None if it has none
    parameters, batch   names of the leaves
    specs       pytree structures of parameters and batch
    """

    module: GraphModule
    phase: dict[Node, str]
    segment: dict[Node, int]
    segments: int
    loss: Node
    grads: tuple[Node | None, ...]
    parameters: tuple[str, ...]
    batch: tuple[str, ...]
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec]


def record(loss_fn: Callable[[Any, Any], Tensor], params: Any, batch: Any) -> Record:
    """One step of loss_fn(params, batch) -> scalar, and of its backward for all of params.

    params, batch   pytrees of tensors, of which only shape, dtype, strides and device count
    Raises ConfigError for what cannot be recorded.
    """
    weights, names, params_spec = leaves("params", params)
    data, batch_names, batch_spec = leaves("batch", batch)
    watch = Watch()

    def step(weights: list[Tensor], data: list[Tensor]) -> tuple:
        weights = [weight.detach().requires_grad_() for weight in weights]
        given = pytree.tree_unflatten(weights, params_spec), pytree.tree_unflatten(data, batch_spec)
        with watch:
            loss = loss_fn(*given)
        check_loss(loss)
        seed = torch.ones((), dtype=loss.dtype, device=loss.device)
        return loss, seed, torch.autograd.grad(loss, weights, seed, allow_unused=True)

    module = equations(step, weights, data)
    check_yields(module.graph, watch.yields)
    for node in module.graph.nodes:
        check_equation(node)
    segment = segments_of(module.graph)
    erase_markers(module.graph)
    phase, (loss, _, *grads) = phases(module.graph, len(names)), result(module.graph)
    found = Record(
        module, phase, segment, watch.yields + 1, loss, tuple(grads), names, batch_names,
        (params_spec, batch_spec),
    )  # fmt: skip
    check_segments(found)
    return found


def leaves(what: str, tree: Any) -> tuple[list[Tensor], tuple[str, ...], pytree.TreeSpec]:
    """The tensors of a pytree, and names that say where they are, such as params.layers.0."""
    found, spec = pytree.tree_flatten_with_path(tree)
    names = tuple(".".join([what, *map(_key, path)]) for path, _ in found)
    for name, (_, leaf) in zip(names, found, strict=True):
        is_tensor = isinstance(leaf, Tensor)
        given = f"a tensor of {leaf.dtype}" if is_tensor else repr(leaf)
        require(
            is_tensor and (what == "batch" or leaf.is_floating_point()),
            f"{name} is {given}; leaves of batch must be tensors, those of params of floating "
            f"point: {'put it into the batch' if is_tensor else 'make it a constant of loss_fn'}.",
        )
    require(
        len({*names}) == len(names),
        f"Two leaves of {what} have one name ({', '.join(names)}): use keys without dots.",
    )
    return [leaf for _, leaf in found], names, spec


def _key(entry: Any) -> str:
    """One step of the path to a leaf: an index, a key or an attribute."""
    kinds = ("idx", "key", "name")
    return str(next(getattr(entry, kind) for kind in kinds if hasattr(entry, kind)))


class Watch(TorchDispatchMode):
    """Counts yields, as those whose result is of no use are not recorded; refuses real tensors."""

    yields = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.yields += func is FORWARD
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        real = [[*x.shape] for x in given if not isinstance(x, FakeTensor)]
        require(
            not real or func is torch.ops.aten.lift_fresh.default,  # torch.tensor(...) has values
            f"loss_fn uses tensors from outside, of shape {real}: give them in params if they are "
            "trained, else in the batch.",
        )
        return func(*args, **(kwargs or {}))


def equations(step: Callable, weights: list[Tensor], data: list[Tensor]) -> GraphModule:
    """What step does, as operators that change nothing in place; without useless ones."""
    try:
        with torch.autograd.set_multithreading_enabled(False):
            module = make_fx(step, tracing_mode="fake")(weights, data)
    except VALUES_DECIDE as error:
        raise ConfigError(
            "loss_fn asks for the value of a tensor, such as in a branch, and recording has no "
            "values and sees one path only, so that what lies in a branch, a pipeline_yield too, "
            "cannot be cut: use torch.where(condition, a, b), or a loss_fn for each path."
        ) from error
    if any(is_in_place(node) for node in module.graph.nodes):
        module = make_fx(functionalize(module), tracing_mode="fake")(weights, data)
    for node in module.graph.nodes:
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    return module


def is_in_place(node: Node) -> bool:
    """Whether an equation changes one of its inputs."""
    return hasattr(node.target, "_schema") and node.target._schema.is_mutable


def result(graph: Graph) -> list[Node | None]:
    """What step gives: the loss, the seed of backward, which is 1, and parameters' gradients."""
    loss, seed, *grads = pytree.tree_leaves(graph.output_node().args[0])
    return [loss, seed, *grads]


def calls(graph: Graph, target: Callable) -> list[Node]:
    """All equations with one operator, in their order."""
    return graph.find_nodes(op="call_function", target=target)


# ---- where each equation lies


def segments_of(graph: Graph) -> dict[Node, int]:
    """The segment of each equation; that of a marker is where what it gives is used."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    seed = nodes.index(result(graph)[1])
    taken_in = {marker: k for k, marker in enumerate(calls(graph, FORWARD))}
    given_in = {marker: k + 1 for marker, k in taken_in.items()}
    last = len(taken_in)
    for node in calls(graph, BACKWARD):
        taken_in[node] = given_in[node] = taken_in[node.args[0].args[0]]
    found = spread(nodes[:seed], given_in, max)
    found |= spread(nodes[seed:], {nodes[seed]: last, **given_in}, min)
    for i, node in reversed([*enumerate(nodes)]):
        if node not in found:  # no marker decides: who uses it first
            users = [u for u in node.users if u in found]
            used_in = [taken_in.get(user, found[user]) for user in users]
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
    """Of each equation "F", "BW", which begins with the seed, or "copied"."""
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
        found[node] = "copied" if free and node not in (loss, *grads) else phase
    del found[graph.output_node()]
    return found


def is_whole_view(node: Node) -> bool:
    """Whether an equation shows all elements of a tensor in another shape, and moves none."""
    value = node.meta.get("val")
    if not getattr(node.target, "is_view", False) or not isinstance(value, Tensor):
        return False
    return value.numel() >= node.args[0].meta["val"].numel()


# ---- what is refused


def check_loss(loss: Any) -> None:
    """Raise ConfigError unless backward can start from what loss_fn gives."""
    number = isinstance(loss, Tensor) and loss.shape == () and loss.is_floating_point()
    given = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        given = f"a tensor {[*loss.shape]} of {loss.dtype}"
    require(number, f"loss_fn gives {given}, and a loss is one number: give loss.sum().")
    require(loss.requires_grad, "The loss does not depend on params: compute it from them.")


def check_yields(graph: Graph, called: int) -> None:
    """Raise ConfigError unless each call of pipeline_yield left one marker."""
    found = len(calls(graph, FORWARD))
    require(
        found >= called,
        f"{called - found} of {called} pipeline_yields give what the loss does not use, so a stage "
        "would do nothing: use what pipeline_yield gives back, or leave the call out.",
    )
    require(
        found == called,
        "A pipeline_yield lies in what backward computes again (checkpoint), where no stage can "
        "end: put it between two such parts.",
    )


def check_equation(node: Node) -> None:
    """Raise ConfigError if it does something else on another device, at another time or data."""
    require(
        not is_in_place(node),
        f"loss_fn changes a parameter or a tensor of the batch in place ({node.target}), which "
        "other tasks read: change its clone().",
    )
    require(
        not is_random(node),
        f"loss_fn draws random numbers ({node.target}), and a stage elsewhere would draw others: "
        "give them in the batch, or hash positions as Dropout of dropout.py does.",
    )
    values = [x for x in pytree.tree_leaves(node.meta.get("val")) if x is not None]
    sizes = [size for x in values for size in getattr(x, "shape", (x,))]
    require(
        all(type(size) is int for size in sizes),
        f"loss_fn takes a number or a shape from values ({node.target}), and recording knows "
        "shapes only: use what has a fixed shape, such as torch.where(condition, a, b).",
    )


def is_random(node: Node) -> bool:
    """Whether an equation draws random numbers: not, if its rate of dropout is 0."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            default = node.kwargs.get("dropout_p", argument.default_value)
            return (node.args[i] if i < len(node.args) else default) != 0
    return True


def check_segments(found: Record) -> None:
    """Raise ConfigError if nothing is left for a stage to do."""
    busy = {found.segment[node] for node, phase in found.phase.items() if phase == "F"}
    for idle in sorted({*range(found.segments)} - busy):
        where = "after" if idle == 0 else "before"
        raise ConfigError(
            f"Stage {idle} of {found.segments} has nothing to compute from both parameters and "
            f"batch: leave out the pipeline_yield {where} it."
        )
