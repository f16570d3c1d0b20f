"""Lesson 11, programs: from a schedule of tasks to what each actor is told to do.

Words  An actor runs tasks and holds values, which have names such as "h1.3". An instruction is
       ("run", task name)   ("send", value, to)   ("recv", value, source)   ("free", value)
"""

from typing import NamedTuple

from lessons import TODO

Instruction = tuple


class Task(NamedTuple):
    """One task: who runs it, for how long, and which values it reads and makes (given)."""

    name: str
    actor: int
    seconds: float
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def one_order(lists: list[list[Task]]) -> list[tuple[float, Task]]:  # Task 11.1
    """When every task starts: (start, task) of all actors' tasks, by rising start.

    An actor runs its list in order. A task starts at 0, or as soon as the task before it in its
    list has ended and all values that it reads have been made, here or on another actor.

    Before  each actor knows its own list, and nobody when a value comes
    After   one order for all, which no actor has to wait against
    Raises  ValueError if no actor can go on: a sentence that names the tasks which wait
    """
    raise TODO("11.1")


def transfers(order: list[tuple[float, Task]], actors: int) -> list[list[Instruction]]:  # 11.2
    """Each actor's program: its tasks in that order, and the sends and receives between them.

    A task finds the values that it reads on its actor. What it makes can be sent when the task
    *ends*, not when it starts. A send waits until its receive is called, so two actors must meet in
    the same order, and nobody may wait in a circle.
    Budget  one message for each value and each other actor that reads it, in however many tasks.
            The step takes as long as the order says: no actor waits in a receive while it could
            begin its next task
    """
    raise TODO("11.2")


def lifetimes(  # Task 11.3
    items: list[Instruction], tasks: dict[str, Task], keep: set[str]
) -> list[Instruction]:
    """One actor's program with a ("free", value) for every value that it ever holds, but `keep`.

    tasks   by name
    Budget  a value is freed right behind the last instruction that reads, sends, makes or receives
            it: the actor never holds more values than that leaves
    """
    raise TODO("11.3")


def blocks(items: list[Instruction]) -> list[list[Instruction]]:  # Task 11.4
    """One actor's program in pieces, each of which a controller can ask for with one message.

    Inside a block the actor waits for nobody: receives may stand only at its beginning.
    Budget  as few blocks as possible
    """
    raise TODO("11.4")
