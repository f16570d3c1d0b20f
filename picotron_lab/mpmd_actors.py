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
Read    Actors -> ThreadActors -> ProcessActors
Tests   tests/test_mpmd.py, tests/test_mpmd_processes.py
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import threading
from collections.abc import Sequence
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


class Actors:
    """Several actors as the controller sees them."""

    def __init__(self, size: int):
        self.size, self.failure = size, ""

    def tell(self, rank: int, command: str, *arguments: Any) -> None:
        """Give an actor a command, and do not wait for it."""
        self._put(rank, command, arguments, False)

    def ask(self, command: str, arguments: Sequence[tuple]) -> list[Any]:
        """Give each actor the command with its arguments; wait for all answers.

        Raises  ActorError if anything that an actor was told has failed; then all actors stop
        """
        for rank, given in enumerate(arguments):
            self._put(rank, command, given, True)
        answers: dict[int, Any] = {}
        while len(answers) < len(arguments):
            rank, (well, result) = self._next()
            if not well:
                self.failure = result
                self.close()
                raise ActorError(result)
            answers[rank] = result
        return [answers[rank] for rank in range(len(arguments))]

    def close(self) -> None:
        """Stop all actors; what they have not done stays undone."""
        raise NotImplementedError

    def _put(self, rank: int, command: str, arguments: tuple, wanted: bool) -> None:
        if self.failure:
            raise ActorError(f"the actors have stopped, because {self.failure}")
        self._post(rank, (command, arguments, wanted))

    def _post(self, rank: int, command: Command) -> None:
        raise NotImplementedError

    def _next(self) -> tuple[int, Answer]:
        raise NotImplementedError


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
            devices is None or len(devices) == size,
            f"devices {devices} must name one device for each of {size} actors: give {size}, such "
            f"as {['cpu'] * size}.",
        )
        self.mail = mail or Queues(size)
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.commands = [queue.SimpleQueue() for _ in range(size)]
        self.threads = []
        for rank, device in enumerate(devices or ["cpu"] * size):
            actor = Actor(rank, self.mail, torch.device(device))
            self.threads.append(threading.Thread(target=self._main, args=(actor,), daemon=True))
            self.threads[-1].start()

    def _main(self, actor: Actor) -> None:
        rank = actor.rank
        serve(actor, self.commands[rank].get, lambda answer: self.answers.put((rank, answer)))

    def _post(self, rank: int, command: Command) -> None:
        self.commands[rank].put(command)

    def _next(self) -> tuple[int, Answer]:
        return self.answers.get()

    def close(self) -> None:
        self.failure = self.failure or "the controller was closed."
        self.mail.stop()
        for commands in self.commands:
            commands.put(None)
        for thread in self.threads:
            thread.join()


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

    def _post(self, rank: int, command: Command) -> None:
        try:
            message = pickle.dumps(command)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{command[0]} was given what other processes cannot import ({error}): define it "
                "at the top level of a .py file, or choose kind threads."
            ) from error
        with contextlib.suppress(OSError):  # it has ended, and _next will say so
            self.lines[rank].send_bytes(message)

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
        return lost[0], (False, f"actor {lost[0]} ended with exit code {process.exitcode}.")

    def close(self) -> None:
        self.failure = self.failure or "the controller was closed."
        for process in self.processes:
            process.kill()
            process.join()
        for line in self.lines:
            line.close()


class Pipes(Queues):
    """Mail of one process: a thread (_postman) puts what comes through pipes into queues."""

    def __init__(self, size: int, ends: dict[int, Connection]):
        super().__init__(size)
        self.ends = ends

    def send(self, source: int, to: int, value: Value, x: Tensor) -> None:
        try:
            self.ends[to].send_bytes(pickle.dumps((value, x.contiguous())))
        except OSError as error:
            raise Stopped from error


def _child(rank: int, line: Connection, ends: dict[int, Connection], threads: int) -> None:
    """Be an actor until the controller ends it."""
    torch.set_num_threads(threads)
    mail = Pipes(len(ends) + 1, ends)
    commands: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_postman, args=(rank, line, mail, commands), daemon=True).start()
    actor = Actor(rank, mail, torch.device("cpu"))
    serve(actor, commands.get, lambda answer: line.send_bytes(pickle.dumps(answer)))


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
    """The next one; ENDED if nobody is at the other end any more."""
    try:
        return pickle.loads(end.recv_bytes())
    except (EOFError, OSError):
        return ENDED
