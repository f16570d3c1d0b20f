"""Wrong answers to lesson 11: circles of waits, needless messages, values lost or kept too long."""

from types import ModuleType
from typing import NamedTuple

from lessons.kit import mutant


def _flat(order: list) -> list:
    """Tasks only."""
    return [task for _, task in order]


@mutant("11.1", "before what it reads has been made")
def transfers_take_no_thought(solution: ModuleType) -> dict:
    """A task starts when its actor is free."""

    def one_order(lists: list) -> list:
        found = []
        for _, task in solution.one_order(lists):
            earlier = [t.seconds for _, t in found if t.actor == task.actor]
            found.append((sum(earlier), task))
        return sorted(found, key=lambda one: one[0])

    return {"one_order": one_order}


@mutant("11.1", "as an item: write (start, task)")
def tasks_alone(solution: ModuleType) -> dict:
    """The order is what counts."""
    return {"one_order": lambda lists: [task for _, task in solution.one_order(lists)]}


@mutant("11.3", "lifetimes returned None, a list of instructions is wanted")
def changed_in_place(solution: ModuleType) -> dict:
    """The list is given, so it can be changed."""

    def lifetimes(items: list, tasks: dict, keep: set) -> None:
        items[:] = solution.lifetimes(items, tasks, keep)

    return {"lifetimes": lifetimes}


@mutant("11.1", "only the order is not")
def order_of_discovery(solution: ModuleType) -> dict:
    """Whoever can go on goes on: that is an order in which one worker could run them."""

    def one_order(lists: list) -> list:
        starts = {task.name: start for start, task in solution.one_order(lists)}
        made, at, found = set(), [0] * len(lists), []
        while len(found) < len(starts):
            for actor, tasks in enumerate(lists):
                while at[actor] < len(tasks) and made.issuperset(tasks[at[actor]].reads):
                    task = tasks[at[actor]]
                    found.append((starts[task.name], task))
                    made.update(task.makes)
                    at[actor] += 1
        return found

    return {"one_order": one_order}


@mutant("11.1", "ValueError that names")
def silent_about_circles(solution: ModuleType) -> dict:
    """When nobody can go on, that is all there is."""

    def one_order(lists: list) -> list:
        try:
            return solution.one_order(lists)
        except ValueError:
            return []

    return {"one_order": one_order}


def _items(order: list, actors: int, plan: str) -> list:
    """Programs whose receives stand right before their first use, or behind the task that makes."""
    tasks, lists, there = _flat(order), [[] for _ in range(actors)], set()
    home = {value: task.actor for task in tasks for value in task.makes}
    for task in tasks:
        away = [v for v in task.reads if home[v] != task.actor and (task.actor, v) not in there]
        if plan == "late":
            lists[task.actor] += [("recv", value, home[value]) for value in away]
            there.update((task.actor, value) for value in away)
        lists[task.actor].append(("run", task.name))
        for value, reader in _moves(task, tasks):
            lists[task.actor].append(("send", value, reader))
            if plan == "early":
                lists[reader].append(("recv", value, task.actor))
    return lists


def _moves(task: NamedTuple, tasks: list) -> list[tuple[str, int]]:
    """(value, other actor) for all that a task makes and others read."""
    readers = [(v, t.actor) for v in task.makes for t in tasks if v in t.reads]
    return [pair for pair in dict.fromkeys(readers) if pair[1] != task.actor]


@mutant("11.2", "waits at: send h")
def receive_when_needed(solution: ModuleType) -> dict:
    """Send when it is made, receive when it is read."""
    return {"transfers": lambda order, actors: _items(order, actors, "late")}


@mutant("11.2", "a value is there at its task's end")
def receive_at_the_start(solution: ModuleType) -> dict:
    """A transfer stands right behind its task in the order."""
    return {"transfers": lambda order, actors: _items(order, actors, "early")}


@mutant("11.2", "what is there already need not come again")
def a_message_for_each_reader(solution: ModuleType) -> dict:
    """A task that reads a value of another actor needs a message."""

    def transfers(order: list, actors: int) -> list:
        uses = {}
        for task in _flat(order):
            for value in task.reads:
                uses[value, task.actor] = uses.get((value, task.actor), 0) + 1
        lists = []
        for actor, items in enumerate(solution.transfers(order, actors)):
            lists.append([])
            for item in items:
                to = item[2] if item[0] == "send" else actor
                again = 1 if item[0] == "run" else uses[item[1], to]
                lists[-1] += [item] * again
        return lists

    return {"transfers": transfers}


@mutant("11.2", "nobody needs what it does not read")
def everything_to_everybody(solution: ModuleType) -> dict:
    """Somebody may want it."""

    def transfers(order: list, actors: int) -> list:
        last = order[-1][0] + order[-1][1].seconds
        everything = tuple(value for task in _flat(order) for value in task.makes)
        reader = type(order[0][1])
        eager = [(last, reader(f"?{a}", a, 0.0, everything, ())) for a in range(actors)]
        lists = solution.transfers([*order, *eager], actors)
        return [[item for item in items if item[1][0] != "?"] for items in lists]

    return {"transfers": transfers}


@mutant("11.2", "is not there")
def first_reader_only(solution: ModuleType) -> dict:
    """A value goes to the actor that reads it: one."""

    def transfers(order: list, actors: int) -> list:
        target = {}
        for items in solution.transfers(order, actors):
            for item in items:
                if item[0] == "send":
                    target.setdefault(item[1], item[2])
        return [
            [item for item in items
             if item[0] == "run" or target[item[1]] == (item[2] if item[0] == "send" else actor)]
            for actor, items in enumerate(solution.transfers(order, actors))
        ]  # fmt: skip

    return {"transfers": transfers}


@mutant("11.3", "right behind the last use")
def free_at_the_end(solution: ModuleType) -> dict:
    """Free everything when the step is over."""

    def lifetimes(items: list, tasks: dict, keep: set) -> list:
        found = solution.lifetimes(items, tasks, keep)
        return sorted(found, key=lambda item: item[0] == "free")

    return {"lifetimes": lifetimes}


@mutant("11.3", "in use while it is sent")
def sends_do_not_count(solution: ModuleType) -> dict:
    """A value is free once the last task has read it."""

    def lifetimes(items: list, tasks: dict, keep: set) -> list:
        quiet = solution.lifetimes([i for i in items if i[0] != "send"], tasks, keep)
        sends, found = [*items], []
        for item in quiet:
            while item[0] != "free" and sends[0] != item:
                found.append(sends.pop(0))
            found.append(item)
            if item[0] != "free":
                sends.pop(0)
        return found + sends

    return {"lifetimes": lifetimes}


@mutant("11.3", "is never freed")
def what_nobody_reads_stays(solution: ModuleType) -> dict:
    """Values are freed behind their last reader."""

    def lifetimes(items: list, tasks: dict, keep: set) -> list:
        read = {value for item in items if item[0] == "run" for value in tasks[item[1]].reads}
        read |= {item[1] for item in items if item[0] == "send"}
        found = solution.lifetimes(items, tasks, keep)
        return [item for item in found if item[0] != "free" or item[1] in read]

    return {"lifetimes": lifetimes}


@mutant("11.3", "among those to keep")
def results_are_freed(solution: ModuleType) -> dict:
    """Nobody reads them here any more."""
    return {"lifetimes": lambda items, tasks, keep: solution.lifetimes(items, tasks, set())}


@mutant("11.4", "needs no message of its own")
def one_message_each(solution: ModuleType) -> dict:
    """A dispatch for every instruction."""
    return {"blocks": lambda items: [[item] for item in items]}


@mutant("11.4", "the actor would wait there")
def one_message_in_all(solution: ModuleType) -> dict:
    """Send the whole program."""
    return {"blocks": lambda items: [items]}


@mutant("11.4", "receives in a row are one wait")
def cut_at_every_receive(solution: ModuleType) -> dict:
    """A receive begins a block."""

    def blocks(items: list) -> list:
        found = [[]]
        for item in items:
            if item[0] == "recv" and found[-1]:
                found.append([])
            found[-1].append(item)
        return found

    return {"blocks": blocks}
