"""Actors: the workers of one controller, which tells them what to do and does not wait for each.

Idea    An actor (mpmd_worker.py) takes commands from a queue, so the controller is ahead of it;
        values go from actor to actor without the controller. Only a question (ask) makes the
        controller wait.
Kinds   ThreadActors   threads of this process, each with a device of its own if there are several;
                       a value is handed over, or copied to the receiver's device
        ProcessActors  processes of this machine, joined by pipes; values are copied through memory
Why     pipes, not torch.distributed.rpc: a pipe ends when its process does, so that the death of an
        actor is known at once, and they start in the time of a fork. But they end at the border of
        the machine; actors on several machines need the training loop of run.py under torchrun
Ends    A task that raises ends the step: the controller hears of it with its next question, and all
        actors stop. One that waits for a value is woken up. An actor whose controller has gone ends
Not     for Windows: ProcessActors need a forkserver
Read    Actors -> ThreadActors -> ProcessActors -> Packer -> Pipes -> _child
Tests   tests/test_mpmd.py, tests/test_mpmd_processes.py, tests/test_mpmd_refused.py
"""

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from picotron_lab.config import ConfigError, require
from picotron_lab.mpmd_program import Value
from picotron_lab.mpmd_worker import Actor, Answer, Command, Mail, Queues, Stopped, serve

ENDED = object()


class ActorError(RuntimeError):
    """What stopped the actors: the task, the actor, and what went wrong there."""


# ---- what the controller has


class Actors(ABC):
    """Several actors as the controller sees them."""

    def __init__(self, size: int):
        self.size, self.failure = size, ""

    def tell(self, rank: int, command: str, *arguments: Any) -> None:
        """Give an actor a command, and do not wait for it."""
        self._put(rank, self._packed((command, arguments, False)))

    def ask(self, command: str, arguments: Sequence[tuple]) -> list[Any]:
        """Give each actor the command with its arguments; wait for all answers.

        Raises  ActorError if anything that an actor was told has failed; then all actors stop
        """
        commands = [self._packed((command, given, True)) for given in arguments]
        with self.whole():
            for rank, one in enumerate(commands):
                self._put(rank, one)
            return self._answers(len(commands))

    def _answers(self, count: int) -> list[Any]:
        """One of each actor."""
        answers: dict[int, Any] = {}
        while len(answers) < count:
            rank, (well, result) = self._next()
            if not well:
                self.failure = result
                self.close()
                raise ActorError(result)
            answers[rank] = result
        return [answers[rank] for rank in range(count)]

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """What is done whole or not at all: if it is interrupted (Ctrl-C), all actors stop.

        Else the next step would find half a step there, and take the answers to its questions.
        """
        try:
            yield
        except BaseException as error:
            if not self.failure:
                self.failure = f"the controller was interrupted ({type(error).__name__})"
                self.close()
            raise

    @abstractmethod
    def close(self) -> None:
        """Stop all actors: processes at once; threads after the commands that they were given, but
        one that waits for another actor's value gives up there."""

    def _put(self, rank: int, packed: Any) -> None:
        if self.failure:
            why = self.failure.removesuffix(".")
            raise ActorError(f"the actors have stopped, because {why}: start another Controller.")
        self._post(rank, packed)

    def _packed(self, command: Command) -> Any:
        """A command as it is sent. What cannot be sent is refused here, before anything is."""
        return command

    @abstractmethod
    def _post(self, rank: int, packed: Any) -> None:
        """Put a command, as packed, into the actor's queue."""

    @abstractmethod
    def _next(self) -> tuple[int, Answer]:
        """The next answer, whoever gives it; an actor that has ended answers that it has."""


class ThreadActors(Actors):
    """A thread per actor.

    devices  of each actor, such as ["cuda:0", "cuda:1"]; None: the CPU for all
    mail     how values travel; None: Queues
    """

    def __init__(
        self,
        size: int,
        devices: Sequence[str | torch.device] | None = None,
        mail: Mail | None = None,
    ):
        super().__init__(size)
        require(
            devices is None or (isinstance(devices, list | tuple) and len(devices) == size),
            f"devices {devices} must name one device for each of {size} actors: give {size}, such "
            f"as {['cpu'] * size}.",
        )
        self.mail = mail or Queues(size)
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.commands = [queue.SimpleQueue() for _ in range(size)]
        self.threads = []
        for rank, device in enumerate(devices or ["cpu"] * size):
            actor = Actor(rank, self.mail, _device(device))
            self.threads.append(threading.Thread(target=self._main, args=(actor,), daemon=True))
        for thread in self.threads:
            thread.start()

    def _main(self, actor: Actor) -> None:
        rank = actor.rank
        serve(actor, self.commands[rank].get, lambda answer: self.answers.put((rank, answer)))

    def _post(self, rank: int, packed: Command) -> None:
        self.commands[rank].put(packed)

    def _next(self) -> tuple[int, Answer]:
        return self.answers.get()

    def close(self) -> None:
        self.failure = self.failure or "the controller was closed."
        self.mail.stop()
        for commands in self.commands:
            commands.put(None)
        for thread in self.threads:
            thread.join()  # a thread cannot be stopped in the middle of a task: it ends after it


def _device(name: str | torch.device) -> torch.device:
    """A device that this machine has."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"devices name {name!r}, which this machine does not have: give devices such as 'cpu' "
            "or 'cuda:0'."
        ) from error


class ProcessActors(Actors):
    """A process per actor, on the CPU, with a pipe to the controller and to each other actor."""

    def __init__(self, size: int):
        super().__init__(size)
        require(
            "forkserver" in multiprocessing.get_all_start_methods(),
            "kind processes needs a forkserver, which this system lacks: choose kind threads.",
        )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "numpy", "picotron_lab.mpmd_actors"])
        self.lines, theirs = zip(*(context.Pipe() for _ in range(size)), strict=True)
        ends: list[dict[int, Connection]] = [{} for _ in range(size)]
        for a in range(size):
            for b in range(a):
                ends[a][b], ends[b][a] = context.Pipe()
        threads = max(1, torch.get_num_threads() // size)
        self.processes = [
            context.Process(target=_child, args=(rank, theirs[rank], ends[rank], threads))
            for rank in range(size)
        ]
        for process in self.processes:
            process.daemon = True
            process.start()
        for end in (*theirs, *(end for of in ends for end in of.values())):
            end.close()  # so that a pipe ends when its processes have

    def _packed(self, command: Command) -> bytes:
        try:
            return packed(command)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{command[0]} was given what other processes cannot import ({error}): define it "
                "at the top level of a .py file, or choose kind threads."
            ) from error

    def _post(self, rank: int, packed: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, and _next will say so
            self.lines[rank].send_bytes(packed)

    def _next(self) -> tuple[int, Answer]:
        ready = multiprocessing.connection.wait(self.lines)
        lost = []
        for rank in (self.lines.index(line) for line in ready):
            try:
                return rank, pickle.loads(self.lines[rank].recv_bytes())
            except (EOFError, OSError):
                lost.append(rank)
        process = self.processes[lost[0]]
        process.join()
        why = f"actor {lost[0]} ended with exit code {process.exitcode}"
        if process.exitcode == 1:
            why += ", as it does if the script that starts it is not guarded: put what it does "
            why += "under if __name__ == '__main__', or choose kind threads"
        return lost[0], (False, why + ".")

    def close(self) -> None:
        self.failure = self.failure or "the controller was closed."
        for process in self.processes:
            process.kill()
            process.join()
        for line in self.lines:
            line.close()


# ---- what goes through pipes


class Packer(pickle.Pickler):
    """Sends of a tensor that is a part of another only this part; and all strides as they are,
    because tasks were recorded with them."""

    def reducer_override(self, one: Any) -> Any:
        """How to pickle it: for most, as is usual."""
        if type(one) is not Tensor or one.untyped_storage().nbytes() <= one.nbytes:
            return NotImplemented
        once = one.detach()[tuple(slice(None if step else 1) for step in one.stride())]
        elements = once.clone(memory_format=torch.contiguous_format)
        return unpacked, (elements, one.shape, one.stride())


def packed(message: Any) -> bytes:
    """As bytes; pickle.loads is the way back."""
    buffer = io.BytesIO()
    Packer(buffer).dump(message)
    return buffer.getvalue()


def unpacked(elements: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """A tensor of this shape and these strides; where one is 0, elements has one for all."""
    once = torch.empty_strided(elements.shape, strides, dtype=elements.dtype)
    return once.copy_(elements).expand(shape)


class Pipes(Queues):
    """Mail of one process: a thread (_postman) puts what comes through pipes into queues."""

    def __init__(self, size: int, ends: dict[int, Connection]):
        super().__init__(size)
        self.ends = ends

    def send(self, source: int, to: int, value: Value, x: Tensor) -> None:
        try:
            self.ends[to].send_bytes(packed((value, x)))
        except OSError as error:
            raise Stopped from error

    def receive(self, source: int, to: int) -> tuple[Value, Tensor]:
        """The next value; what the postman put there is bytes."""
        return pickle.loads(super().receive(source, to))


def _child(rank: int, line: Connection, ends: dict[int, Connection], threads: int) -> None:
    """Be an actor until the controller ends it."""
    torch.set_num_threads(threads)
    mail = Pipes(len(ends) + 1, ends)
    commands: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_postman, args=(rank, line, mail, commands), daemon=True).start()
    actor = Actor(rank, mail, torch.device("cpu"))
    serve(actor, lambda: _command(commands.get()), lambda answer: line.send_bytes(packed(answer)))


def _command(message: bytes) -> Command:
    try:
        return pickle.loads(message)
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"an actor cannot import what it was given ({error}): define it at the top level of a "
            ".py file, and not under if __name__ == '__main__', or choose kind threads."
        ) from error


def _postman(rank: int, line: Connection, mail: Pipes, commands: queue.SimpleQueue) -> None:
    """Sort what comes, so that no sender has to wait."""
    targets = {end: mail.queues[other, rank] for other, end in mail.ends.items()}
    targets[line] = commands
    while True:
        for end in multiprocessing.connection.wait([*targets]):
            message = _message(end)
            if message is ENDED and end is line:
                os._exit(1)  # nobody is there to whom results matter
            if message is ENDED:
                targets.pop(end).put(None)
            else:
                targets[end].put(message)


def _message(end: Connection) -> Any:
    """The next one, as bytes; ENDED if nobody is at the other end any more."""
    try:
        return end.recv_bytes()
    except (EOFError, OSError):
        return ENDED
