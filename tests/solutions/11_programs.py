"""Solution of lesson 11: mpmd_program.py in short, on tuples."""

from typing import NamedTuple

Instruction = tuple


class Task(NamedTuple):
    """As in the exercise."""

    name: str
    actor: int
    seconds: float
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def one_order(lists: list[list[Task]]) -> list[tuple[float, Task]]:
    """Take the next task of any actor whose reads are made, until there is none."""
    made, free, at, found = {}, [0.0] * len(lists), [0] * len(lists), []
    while True:
        heads = [tasks[k] for tasks, k in zip(lists, at, strict=True) if k < len(tasks)]
        ready = [task for task in heads if all(value in made for value in task.reads)]
        if not ready:
            break
        for task in ready:
            start = max([free[task.actor], *(made[value] for value in task.reads)])
            free[task.actor] = start + task.seconds
            made.update(dict.fromkeys(task.makes, free[task.actor]))
            at[task.actor] += 1
            found.append((start, task))
    if heads:
        raise ValueError(f"tasks wait for each other: {', '.join(task.name for task in heads)}.")
    return sorted(found, key=lambda one: one[0])


def transfers(order: list[tuple[float, Task]], actors: int) -> list[list[Instruction]]:
    """A run at its start; a transfer at the end of what makes its value, before runs of then."""
    readers = {value: {} for _, task in order for value in task.makes}
    for _, task in order:
        for value in task.reads:
            readers[value][task.actor] = None
    events = [(start, 1, task.actor, ("run", task.name)) for start, task in order]
    for start, task in order:
        end, home = start + task.seconds, task.actor
        for value, reader in [(v, r) for v in task.makes for r in readers[v] if r != home]:
            events.append((end, 0, home, ("send", value, reader)))
            events.append((end, 0, reader, ("recv", value, home)))
    lists = [[] for _ in range(actors)]
    for _, _, actor, item in sorted(events, key=lambda event: event[:2]):
        lists[actor].append(item)
    return lists


def touched(item: Instruction, tasks: dict[str, Task]) -> tuple[str, ...]:
    """Values that an instruction uses or makes."""
    return tasks[item[1]].reads + tasks[item[1]].makes if item[0] == "run" else (item[1],)


def lifetimes(
    items: list[Instruction], tasks: dict[str, Task], keep: set[str]
) -> list[Instruction]:
    """From the end, the first time that a value is met is its last use."""
    seen, found = set(keep), []
    for item in reversed(items):
        last = [value for value in touched(item, tasks) if value not in seen]
        seen.update(last)
        found += [("free", value) for value in dict.fromkeys(last)]
        found.append(item)
    return found[::-1]


def blocks(items: list[Instruction]) -> list[list[Instruction]]:
    """A new one at each receive that follows something else."""
    found = []
    for item in items:
        if not found or (item[0] == "recv" and found[-1][-1][0] != "recv"):
            found.append([])
        found[-1].append(item)
    return found
