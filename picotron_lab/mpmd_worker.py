"""What an actor does: a worker that holds values by name and interprets lists of instructions.

Idea    Everything is known before the step: an actor runs its list, whose Recvs say from whom the
        next value comes and whose Frees say what nobody needs any more. So it is a small loop. What
        tells it to (a controller), and what carries its values (mail), may be of any kind.
Read    Mail, Queues -> Job -> Share -> Actor -> serve
Tests   tests/test_mpmd.py
"""

import copy
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from picotron_lab.mpmd_program import (
    STEP,
    Add,
    Feed,
    Free,
    Instruction,
    Peak,
    Recv,
    Run,
    Send,
    Value,
    gradient,
)

Parameters = dict[str, Tensor]
Update = Callable[[Parameters, Parameters], None]
Leaves = dict[Value, Tensor]


class Stopped(Exception):
    """No more values come, because actors stop."""


class Mail(Protocol):
    """What carries values from actor to actor, first in, first out for every sender and receiver.

    stop  wakes up who waits: receive raises Stopped
    """

    def send(self, source: int, to: int, value: Value, x: Tensor) -> None: ...

    def receive(self, source: int, to: int) -> tuple[Value, Tensor]: ...

    def stop(self) -> None: ...


class Queues(Mail):
    """Mail inside one process. A send does not wait: a queue holds the tensor until it is taken."""

    def __init__(self, size: int):
        pairs = [(a, b) for a in range(size) for b in range(size)]
        self.queues = {pair: queue.SimpleQueue() for pair in pairs}

    def send(self, source: int, to: int, value: Value, x: Tensor) -> None:
        self.queues[source, to].put((value, x))

    def receive(self, source: int, to: int) -> tuple[Value, Tensor]:
        message = self.queues[source, to].get()
        if message is None:
            raise Stopped
        return message

    def stop(self) -> None:
        for one in self.queues.values():
            one.put(None)


# ---- what an actor does


@dataclass(frozen=True)
class Job:
    """An actor's part of a program, given once.

    tasks       by kind and stage
    blocks      its list in pieces, each of which can be asked for by its number
    publish     what it does after an update, so that all users of a shared weight have the new one
    parameters  all that it needs; updates: those of them that it updates
    """

    tasks: dict[tuple[str, int], Callable[..., tuple[Tensor, ...]]]
    blocks: tuple[tuple[Instruction, ...], ...]
    publish: tuple[Instruction, ...]
    parameters: Parameters
    updates: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What an actor has seen: its peak, values left of micro-batches, what it sent."""

    peak: Peak
    left: tuple[str, ...]
    messages: int
    message_bytes: int


class Share:
    """A job, and the values that an actor holds for it."""

    def __init__(self, job: Job, device: torch.device):
        self.job = job
        self.tasks = {key: _on_device(task, device) for key, task in job.tasks.items()}
        self.values = {
            Value(name): x.detach().to(device, copy=True) for name, x in job.parameters.items()
        }
        self.live = self.live_bytes = self.messages = self.message_bytes = 0
        self.peak = Peak(0, 0)

    def keep(self, value: Value, x: Tensor) -> None:
        """Hold a value, and see how many are held."""
        self.values[value] = x
        if value.microbatch == STEP:
            return
        self.live += 1
        self.live_bytes += x.nbytes
        values, size = max(self.peak.values, self.live), max(self.peak.bytes, self.live_bytes)
        self.peak = Peak(values, size)

    def free(self, value: Value) -> None:
        """Let a value go."""
        x = self.values.pop(value)
        if value.microbatch != STEP:
            self.live -= 1
            self.live_bytes -= x.nbytes


def _on_device(task: Callable, device: torch.device) -> Callable:
    """The task with all that it creates on this device: a trace has the device of its example."""
    if not isinstance(task, GraphModule):
        return task
    task = copy.deepcopy(task).to(device)
    for node in task.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    task.recompile()
    return task


class Actor:
    """Interprets instructions. Every method is a command; `number` says of which program."""

    def __init__(self, rank: int, mail: Mail, device: torch.device):
        self.rank, self.mail, self.device = rank, mail, device
        self.shares: dict[int, Share] = {}
        self.doing = ""  # for the sentence, if it fails

    def load(self, number: int, job: Job) -> None:
        """Take a part of a program."""
        self.doing = "loading the program"
        self.shares[number] = Share(job, self.device)

    def run(self, number: int, items: Sequence[Instruction], leaves: Leaves) -> None:
        """Run these instructions; leaves are what their Feeds take."""
        share = self.shares[number]
        for item in items:
            self._one(share, item, leaves)

    def run_block(self, number: int, block: int, leaves: Leaves) -> None:
        """Run a block of the job."""
        self.run(number, self.shares[number].job.blocks[block], leaves)

    def fetch(self, number: int, values: Sequence[Value]) -> Leaves:
        """Copies of values."""
        self.doing = "fetching results"
        held = self.shares[number].values
        return {value: held[value].clone() for value in values if value in held}

    def apply(self, number: int, update: Update) -> None:
        """Update the parameters that are at home here, in place; their copies elsewhere follow."""
        self.doing = "the update"
        share = self.shares[number]
        names = [name for name in share.job.updates if gradient(name) in share.values]
        parameters = {name: share.values[Value(name)] for name in names}
        update(parameters, {name: share.values[gradient(name)] for name in names})
        self.run(number, share.job.publish, {})

    def report(self, number: int) -> Report:
        """Peaks and messages since the program was loaded."""
        share = self.shares[number]
        left = tuple(str(value) for value in share.values if value.microbatch != STEP)
        return Report(share.peak, left, share.messages, share.message_bytes)

    def _one(self, share: Share, item: Instruction, leaves: Leaves) -> None:
        """One instruction."""
        if isinstance(item, Run):
            self.doing = f"task {item}"
            made = share.tasks[item.kind, item.stage](*(share.values[v] for v in item.reads))
            for value, x in zip(item.makes, made, strict=True):
                share.keep(value, x)
        elif isinstance(item, Free):
            for value in item.values:
                share.free(value)
        elif isinstance(item, Add):
            self.doing = f"adding up {item.total}"
            self._add(share, item)
        elif isinstance(item, Send):
            self._send(share, item)
        elif isinstance(item, Recv):
            self._receive(share, item)
        elif isinstance(item, Feed):
            share.keep(item.value, leaves[item.value].to(self.device))

    def _add(self, share: Share, item: Add) -> None:
        """The sum is this actor's own from the start: its first value may be, or lie in the memory
        of, another gradient or a value that another actor holds, and updates work in place."""
        x = share.values[item.value]
        if item.first:
            share.values[item.total] = x.clone()
        else:
            share.values[item.total] += x

    def _send(self, share: Share, item: Send) -> None:
        self.doing = f"sending {item.value}"
        x = share.values[item.value]
        share.messages += 1
        share.message_bytes += x.nbytes
        self.mail.send(self.rank, item.to, item.value, x)

    def _receive(self, share: Share, item: Recv) -> None:
        self.doing = f"receiving {item.value}"
        value, x = self.mail.receive(item.source, self.rank)
        assert value == item.value, (
            f"actor {item.source} sent {value} where {item.value} was to come: sends and receives "
            "of a pair must have the same order, so take both lists from one program."
        )
        if item.value in share.values:
            share.values[item.value].copy_(x)  # a weight: the sender goes on to use its own
        else:
            share.keep(item.value, x.to(self.device))


Command = tuple[str, tuple, bool]  # method of Actor, arguments, whether to answer
Answer = tuple[bool, Any]  # well, result; not well, a sentence


@torch.no_grad()
def serve(
    actor: Actor, take: Callable[[], Command | None], answer: Callable[[Answer], None]
) -> None:
    """Do what commands say until there is None; after a failure only wait for that."""
    running = True
    while True:
        actor.doing = "taking a command"
        try:
            command = take()
            if command is None:
                return
            name, arguments, wanted = command
            result = getattr(actor, name)(*arguments) if running else None
        except Stopped:
            running = False
        except BaseException as error:  # tasks and updates are the user's, and may call sys.exit
            why = f"{type(error).__name__}: {error}"
            if running:
                answer((False, f"{actor.doing} on actor {actor.rank} failed: {why}"))
            running = False
        else:
            if running and wanted:
                answer((True, result))
