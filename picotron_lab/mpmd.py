"""MPMD: one controller tells actors what to run; the program is cut from an ordinary loss function.

Paper   Xhebraj et al. 2024, "Scaling Deep Learning Training with MPMD Pipeline Parallelism"
        (JaxPP, 2412.14374), sections 3 and 4
Idea    Each actor runs a program of its own (multiple programs, multiple data). Nobody writes them:
        a user marks in the model where stages end, and gives a loss function and a schedule. Loss
        and gradient are recorded once (mpmd_record.py) and cut into tasks (mpmd_trace.py); the
        schedule, which is data, places them; what one task makes and another reads says what must
        be sent, when, and when a buffer is free (mpmd_program.py).
            def loss_fn(params, batch):
                h = pipeline_yield(torch.relu(batch["x"] @ params["a"]))
                return ((h @ params["b"] - batch["y"]) ** 2).sum()
            step = accumulate_grads(loss_fn, schedule="1f1b")
            loss, grads = step(params, batches)                 # here, one batch after the other
            with Controller(actors=2) as controller:
                remote = controller.compile(step, params, batches)
                loss, grads = remote(batches)                   # there, as a pipeline: the same
                remote.apply(sgd)
Before  one device runs all micro-batches one after the other
After   an actor holds the parameters of its stages, their gradients, and the values that its list
        still needs, of so many micro-batches as the schedule has under way
Wire    per micro-batch one message for each value and each other actor that reads it: on a chain
        of stages one forward and one back for every boundary between actors. After the last one a
        message for each copy of a shared weight, with its gradient; after an update another
Words   An instruction is one thing that an actor does: run a task, send, receive, add, free. A
        block is as many as it can do without waiting: receives, then work, up to the next receive.
        A dispatch is one message of the controller to an actor: do this
Control plain: a dispatch for each instruction.  fused: one for each block, at most actors +
        messages. Either way the controller waits once a step
Same    bit for bit, if no weight is shared and every stage ends its micro-batches in order; a sum
        over stages of a shared weight, or in another order, is rounded otherwise
Axes    none: actors are no ranks, they have no axis and run no collectives
Dims    none: the program knows values by name
Read    accumulate_grads -> Controller.compile -> Remote -> dispatch_plain -> dispatch_fused; then
        mpmd_record.py, mpmd_trace.py, mpmd_schedule.py, mpmd_program.py, mpmd_worker.py,
        mpmd_actors.py
Try     python -m picotron_lab.mpmd    Tests   tests/test_mpmd.py, _processes.py, _refused.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from picotron_lab.config import IMPLS, require
from picotron_lab.mpmd_actors import Actors, ProcessActors, ThreadActors
from picotron_lab.mpmd_program import LOSS, Feed, Program, Run, Value, gradient, program, project
from picotron_lab.mpmd_record import check_loss, leaves
from picotron_lab.mpmd_schedule import Lists, choose
from picotron_lab.mpmd_trace import Body, pipeline_yield, trace
from picotron_lab.mpmd_worker import Job, Leaves, Report, Update
from picotron_lab.schedules.actions import Schedule

KINDS = ("threads", "processes")
Tree = Any  # a pytree of tensors

# ---- 1. the idea


@dataclass(frozen=True)
class Step:
    """A training step without its update: loss and gradients, summed over micro-batches.

    loss_fn   (params, batch) -> a scalar: the sum of what it counts, so that sums are right
    schedule  for actors: a Schedule, a name of schedules/registry.py, lists of tasks for each actor
              such as [["F0.0", "BW0.0"], ...], or "auto". On this device it is ignored
    """

    loss_fn: Callable[[Tree, Tree], Tensor]
    schedule: Schedule | str | Lists

    def __call__(self, params: Tree, batches: Sequence[Tree]) -> tuple[Tensor, Tree]:
        """On this device: an ordinary loop. Gives the loss, and gradients as a tree like params.

        Raises  ConfigError for params that cannot be trained and for what is no loss
        """
        _check_batches(batches)
        flat, _, spec = leaves("params", params)
        sums: list[Tensor] = []
        for batch in batches:
            weights = [weight.detach().requires_grad_() for weight in flat]
            loss = self.loss_fn(pytree.tree_unflatten(weights, spec), batch)
            check_loss(loss)
            grads = torch.autograd.grad(loss, weights, materialize_grads=True)
            found = [loss.detach(), *grads]
            if sums:
                sums = [a + b for a, b in zip(sums, found, strict=True)]
            else:
                sums = [x.clone() for x in found]  # two gradients may be one tensor
        return sums[0], pytree.tree_unflatten(sums[1:], spec)


def accumulate_grads(
    loss_fn: Callable[[Tree, Tree], Tensor], schedule: Schedule | str | Lists = "auto"
) -> Step:
    """The loop over micro-batches, as something that this device or a Controller can run."""
    return Step(loss_fn, schedule)


def _check_batches(batches: Sequence[Tree]) -> None:
    require(
        isinstance(batches, Sequence),
        f"batches are a {type(batches).__name__}, and must be counted and may be read twice: give "
        "list(batches), a list of micro-batches.",
    )
    require(len(batches) > 0, "batches are empty: give a list of at least one micro-batch.")


def _dense(tree: Tree) -> Tree:
    """The tree with a copy of each tensor that is expanded or has gaps: actors have such copies."""

    def dense(x: Any) -> Any:
        if not isinstance(x, Tensor) or torch.empty_like(x, device="meta").stride() == x.stride():
            return x
        return x.detach().clone()

    return pytree.tree_map(dense, tree)


# ---- 2. plain path


class Controller:
    """Starts actors, and gives them programs; closes them at the end of its with block.

    actors   how many
    kind     "threads" of this process, or "processes" of this machine
    impl     "plain" or "fused": how many instructions a dispatch holds
    devices  of threads, one for each actor; None: the CPU
    """

    def __init__(
        self,
        actors: int,
        kind: str = "threads",
        impl: str = "fused",
        devices: Sequence[str | torch.device] | None = None,
    ):
        require(type(actors) is int, f"actors {actors!r} is no whole number: give one such as 2.")
        require(actors > 0, f"actors {actors} is too small: give 1 or more.")
        require(impl in IMPLS, f"impl '{impl}' is unknown: choose plain or fused.")
        require(
            kind in KINDS,
            f"kind '{kind}' is unknown: choose threads or processes, both of this machine; for "
            "several machines start run.py under torchrun.",
        )
        require(
            devices is None or kind == "threads",
            f"devices {devices} are for actors of kind threads, processes use the CPU: leave them "
            "out, or choose kind threads.",
        )
        self.dispatches, self.programs = 0, 0
        self.dispatch = {"plain": dispatch_plain, "fused": dispatch_fused}[impl]
        self.actors: Actors = (
            ThreadActors(actors, devices) if kind == "threads" else ProcessActors(actors)
        )

    def __enter__(self) -> "Controller":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all actors."""
        self.actors.close()

    def compile(self, step: Step, params: Tree, batches: Sequence[Tree]) -> "Remote":
        """Record the step, place its tasks, and load parameters onto the actors.

        batches  examples: their number, and the shapes and types of the first, which all must have
        Raises   ConfigError, a sentence about what does not fit
        """
        require(
            isinstance(step, Step),
            f"compile is given a {type(step).__name__}, and needs a step: give "
            "accumulate_grads(loss_fn, schedule='1f1b').",
        )
        _check_batches(batches)
        params, example = _dense(params), _dense(batches[0])
        body = trace(step.loss_fn, params, example)
        body, schedule, costs = choose(step.schedule, body, self.actors.size, len(batches))
        self.programs += 1
        return Remote(self, self.programs, body, program(body, schedule, costs), params, example)


class Remote:
    """A step whose program and parameters lie on the actors. Their copies are their own."""

    def __init__(
        self, controller: Controller, number: int, body: Body, program: Program, params: Tree,
        example: Tree,
    ):  # fmt: skip
        self.controller, self.number, self.body, self.program = controller, number, body, program
        self.like, self.spec = pytree.tree_flatten(params)
        self.strides = [x.stride() for x in pytree.tree_leaves(example)]
        self.has_gradients = False
        self.controller.actors.ask("load", [(number, job) for job in self._jobs()])

    def _jobs(self) -> Iterator[Job]:
        """Each actor's part of the program."""
        weights = dict(zip(self.body.parameters, self.like, strict=True))
        publish = project(self.program.publish, self.controller.actors.size)
        for actor, names in enumerate(self.program.holds):
            runs = [item for item in self.program.lists[actor] if isinstance(item, Run)]
            tasks = {(run.kind, run.stage) for run in runs}
            yield Job(
                {key: self.body.tasks[key].run for key in tasks},
                self.program.blocks[actor],
                publish[actor],
                {name: weights[name] for name in names},
                tuple(name for name in names if self.program.homes[Value(name)] == actor),
            )

    def __call__(self, batches: Sequence[Tree]) -> tuple[Tensor, Tree]:
        """One step. Gives the loss, and gradients as a tree like params, on its devices.

        Raises  ConfigError for batches of other number or shapes than compiled; ActorError if a
                task fails: a sentence that names it, after which the controller can only be closed
        """
        feeds = self._feeds(batches)
        actors, controller = self.controller.actors, self.controller
        with actors.whole():
            controller.dispatches += controller.dispatch(actors, self.number, self.program, feeds)
        self.has_gradients = True
        found = self._fetch([LOSS, *map(gradient, self.body.parameters)])
        grads = [found.get(gradient(name)) for name in self.body.parameters]
        return found[LOSS].to(self.like[0].device), self._tree(grads)

    def apply(self, update: Update) -> None:
        """Call update(params, grads), dicts of tensors, on every actor for what is at home there.

        It changes params in place. Their names say where they are in the tree: "params.a". Those
        without gradient are left out. Copies of a shared weight on other actors follow.
        It is called once on every actor, with empty dicts where nothing is at home: what it counts,
        it counts as often as there are actors. State such as Adam's moments is its own: keep it by
        name, of which no two actors have one.
            threads     update may be any function, or an object with a dict of moments
            processes   it must be a function at the top level of a .py file. An object is copied
                        anew for every call, and what the copy learns is lost; what lasts is what
                        its module holds, which every process has for itself, such as an attribute
                        of the function: update.moments = {}
        """
        require(self.has_gradients, "apply needs gradients: call remote(batches) before it.")
        jobs = [(self.number, update)] * self.controller.actors.size
        self.controller.actors.ask("apply", jobs)

    def parameters(self) -> Tree:
        """Copies of the parameters, as a tree like params, on its devices."""
        names = self.body.parameters
        found = self._fetch([Value(name) for name in names])
        return self._tree([found[Value(name)] for name in names])

    def reports(self) -> list[Report]:
        """What each actor has seen since compile."""
        return self.controller.actors.ask("report", [(self.number,)] * self.controller.actors.size)

    def _fetch(self, values: list[Value]) -> Leaves:
        """Values from where they are at home."""
        wanted = [
            (self.number, [value for value in values if self.program.homes[value] == actor])
            for actor in range(self.controller.actors.size)
        ]
        found: Leaves = {}
        for part in self.controller.actors.ask("fetch", wanted):
            found |= part
        return found

    def _tree(self, found: list[Tensor | None]) -> Tree:
        pairs = zip(found, self.like, strict=True)
        flat = [torch.zeros_like(y) if x is None else x.to(y.device) for x, y in pairs]
        return pytree.tree_unflatten(flat, self.spec)

    def _feeds(self, batches: Sequence[Tree]) -> Leaves:
        """What the actors' Feeds take."""
        _check_batches(batches)
        m, found = self.program.schedule.microbatches, {}
        require(
            len(batches) == m,
            f"{len(batches)} batches do not fit a program compiled for {m}: give {m}, or compile.",
        )
        for i, batch in enumerate(batches):
            flat, names, spec = leaves(f"batches.{i}", batch)
            require(
                spec == self.body.batch_spec,
                f"batch {i} is of {', '.join(names)}, and the program was compiled for "
                f"{', '.join(self.body.batch)}: give all micro-batches one form, or compile again.",
            )
            shapes = [(tuple(x.shape), x.dtype) for x in flat]
            compiled = [self.body.shapes[name] for name in self.body.batch]
            require(
                shapes == compiled,
                f"batch {i} has shapes {shapes}, and the program was compiled for {compiled}: give "
                "all micro-batches one shape, or compile again.",
            )
            given = zip(self.body.batch, flat, self.strides, strict=True)
            found |= {Value(name, i): _with_strides(x, strides) for name, x, strides in given}
        return found


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x with the strides of the example, which views in the tasks may rely on."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def dispatch_plain(actors: Actors, number: int, program: Program, feeds: Leaves) -> int:
    """One dispatch for each instruction, in the order of the program; gives their number."""
    for actor, item in program.order:
        given = {item.value: feeds[item.value]} if isinstance(item, Feed) else {}
        actors.tell(actor, "run", number, (item,), given)
    return len(program.order)


# ---- 3. fused path


def dispatch_fused(actors: Actors, number: int, program: Program, feeds: Leaves) -> int:
    """One dispatch for each block: its number, as the actor has known the block since compile."""
    for actor, block in program.block_order:
        items = program.blocks[actor][block]
        given = {item.value: feeds[item.value] for item in items if isinstance(item, Feed)}
        actors.tell(actor, "run_block", number, block, given)
    return len(program.block_order)


# ---- 4. contract


def contract(schedule: Schedule, size: int) -> tuple[int, int, int]:
    """(messages, their bytes, the most dispatches if fused) of a step of stages in a chain.

    size  bytes of what a stage gives to the next; its gradient has as many
    """
    pairs = [(schedule.rank_of(s), schedule.rank_of(s + 1)) for s in range(schedule.stages - 1)]
    messages = 2 * schedule.microbatches * sum(a != b for a, b in pairs)
    return messages, messages * size, schedule.ranks + messages


def main() -> None:
    """Three layers on 3 actors: contract, predicted and measured."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(16, 16, generator=generator) for name in "abc"}
    batches = [torch.randn(8, 16, generator=generator) for _ in range(6)]
    expected = accumulate_grads(three_layers)(params, batches)
    print("3 layers of 16 x 16 on 3 actors (threads), 6 micro-batches of 8 rows, float32; by actor")
    print("the most bytes of micro-batches that it holds; predicted, measured")
    print(f"{'schedule':9} {'messages':>9} {'bytes':>12} {'dispatches':>14} ", end="")
    print(f"{'bytes held':>26}   equal")
    for name, impl in (("1f1b", "plain"), ("1f1b", "fused"), ("afab", "fused"), ("zb-h1", "fused")):
        _row(name, impl, params, batches, expected)


def three_layers(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The example of the paper: three layers, two yields."""
    x = pipeline_yield(torch.relu(x @ params["a"]))
    x = pipeline_yield(torch.relu(x @ params["b"]))
    return (x @ params["c"]).square().sum()


def _row(name: str, impl: str, params: Tree, batches: list[Tensor], expected: tuple) -> None:
    """One schedule and impl, as a line of the table."""
    with Controller(3, impl=impl) as controller:
        remote = controller.compile(accumulate_grads(three_layers, name), params, batches)
        loss, grads = remote(batches)
        seen, program = remote.reports(), remote.program
    messages, size, most = contract(program.schedule, batches[0].nbytes)
    same = all(torch.equal(grads[key], expected[1][key]) for key in params)
    rule = f"<={most}" if impl == "fused" else str(len(program.order))
    columns = [
        f"{messages} {sum(report.messages for report in seen)}",
        f"{size} {sum(report.message_bytes for report in seen)}",
        f"{rule} {controller.dispatches}",
        " ".join(f"{p.bytes} {s.peak.bytes}" for p, s in zip(program.peak, seen, strict=True)),
    ]
    print("{:9} {:>9} {:>12} {:>14} {:>26}".format(name, *columns), end="")
    print(f"   {'yes' if same and torch.equal(loss, expected[0]) else 'no'}  {impl}")


if __name__ == "__main__":
    main()
