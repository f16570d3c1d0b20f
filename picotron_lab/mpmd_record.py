"""Record one training step as a flat list of operators, with marks where its stages end.

Paper   Xhebraj et al. 2024, "Scaling Deep Learning Training with MPMD Pipeline Parallelism"
        (JaxPP, 2412.14374)
Idea    loss_fn and its backward run once, on tensors without memory. The list of operators
        (equations) has a marker wherever pipeline_yield was called, and one wherever a gradient
        came back through it. mpmd_trace.py tells by these in which stage an equation lies.
Not     possible: Python that branches on values, as one path is recorded; random numbers; shapes
        that depend on values (nonzero, masks as indices); changing parameters or batch in place
Read    pipeline_yield -> Record -> record -> equations -> what is refused
Tests   tests/test_mpmd_record.py
"""

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
    Raises ConfigError if anything else than tensors is given.
    """
    require(bool(values), "pipeline_yield() is given nothing: give it the tensors that go on.")
    others = [type(x).__name__ for x in values if not isinstance(x, Tensor)]
    require(
        not others,
        f"pipeline_yield is given what is no tensor ({', '.join(others)}): give tensors one by "
        "one, such as x, y = pipeline_yield(x, y), and leave out all else.",
    )
    *marked, _ = stage_end([*values])
    return marked[0] if len(values) == 1 else tuple(marked)


def _forward(values: list[Tensor]) -> list[Tensor]:
    """Copies, and a ticket.

    Forward's marker and backward's belong together, but the graph of equations does not say so:
    a gradient that comes back is no function of what went on. So the marker of forward also gives
    an empty tensor, the ticket, which that of backward takes.
    """
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
    """One step, equation by equation, markers among them.

    module      takes the parameters, then the leaves of the batch; see result for what it gives
    yields      how many there are: as many markers of forward
    parameters, batch   names of the leaves
    specs       pytree structures of parameters and batch
    """

    module: GraphModule
    yields: int
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
    return Record(module, watch.yields, names, batch_names, (params_spec, batch_spec))


def leaves(what: str, tree: Any) -> tuple[list[Tensor], tuple[str, ...], pytree.TreeSpec]:
    """The tensors of a pytree, and names that say where they are, such as params.layers.0.

    what    "params", of which there must be some, and of floating point; else a name of a batch
    Raises  ConfigError, which names the leaf that is none
    """
    found, spec = pytree.tree_flatten_with_path(tree)
    names = tuple(".".join([what, *map(_key, path)]) for path, _ in found)
    require(
        bool(found) or what != "params",
        "params are empty: give at least one tensor that is to be trained.",
    )
    for name, (_, leaf) in zip(names, found, strict=True):
        check_leaf(name, leaf, what == "params")
    require(
        len({*names}) == len(names),
        f"Two leaves of {what} have one name ({', '.join(names)}): use keys without dots.",
    )
    return [leaf for _, leaf in found], names, spec


def check_leaf(name: str, leaf: Any, trained: bool) -> None:
    """Raise ConfigError unless it is a tensor, and of floating point if it is to be trained."""
    require(
        not isinstance(leaf, torch.nn.Module),
        f"{name} is a module ({type(leaf).__name__}), and only tensors are taken: give "
        "dict(module.named_parameters()) as params, and let loss_fn call "
        "torch.func.functional_call(module, params, x).",
    )
    is_tensor = isinstance(leaf, Tensor)
    given = f"a tensor of {leaf.dtype}" if is_tensor else repr(leaf)
    mend = "put it into the batch" if is_tensor else "make it a tensor, or a constant of loss_fn"
    require(
        is_tensor and (leaf.is_floating_point() or not trained),
        f"{name} is {given}; leaves of batch must be tensors, those of params of floating point: "
        f"{mend}.",
    )


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
            f"loss_fn uses tensors from outside, of shape {real}, such as buffers of a module: "
            "give them in params if they are trained, else in the batch.",
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
    copy_known_gradients(module.graph)
    module.graph.eliminate_dead_code()
    return module


def copy_known_gradients(graph: Graph) -> None:
    """A gradient that is there before backward begins, as a weight may be, becomes a copy of it.

    So it is backward that makes every gradient. Only an autograd.Function of a user gives such.
    """
    loss, seed, *grads = result(graph)
    nodes, copies = [*graph.nodes], {}
    early = {*nodes[: nodes.index(seed)]}
    with graph.inserting_before(graph.output_node()):
        for grad in (grad for grad in dict.fromkeys(grads) if grad in early):
            copies[grad] = graph.call_function(torch.ops.aten.clone.default, (grad,))
            copies[grad].meta["val"] = grad.meta["val"]
    graph.output_node().args = ((loss, seed, tuple(copies.get(g, g) for g in grads)),)


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
        not is_in_place(node) and not keeps_statistics(node),
        f"loss_fn changes a parameter or a tensor of the batch in place ({node.target}), which "
        "other tasks read: change its clone(), or call eval() of a BatchNorm, which changes its "
        "buffers.",
    )
    require(
        "mkldnn_rnn" not in str(node.target),
        f"loss_fn calls an LSTM of oneDNN ({node.target}), which hides from recording what it "
        "keeps for backward: call it inside of torch.backends.mkldnn.flags(enabled=False).",
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
        "shapes only: use what has a fixed shape, such as torch.where(condition, a, b), or "
        "output_size of repeat_interleave.",
    )


def keeps_statistics(node: Node) -> bool:
    """Whether it is a batch norm that changes its running mean, of which its schema is silent."""
    name = str(node.target)
    if "batch_norm" not in name or "backward" in name or len(node.args) < 6:
        return False
    running_mean, training = node.args[3], node.args[5]
    return running_mean is not None and bool(training)


def is_random(node: Node) -> bool:
    """Whether an equation draws random numbers: not, if its rate of dropout is 0."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            default = node.kwargs.get("dropout_p", argument.default_value)
            return (node.args[i] if i < len(node.args) else default) != 0
    return True
