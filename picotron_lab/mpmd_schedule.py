"""Which schedule a traced program runs by: one that the user gives, names or writes, or the best.

Idea    A schedule is data, so that users can write their own: a list of tasks for each actor, in
        which F1.0 is the forward of stage 1 on micro-batch 0. It is checked before anything runs.
        "auto" starts from yields after every layer: neighbouring layers are merged into as many
        stages as there are actors, by the operations that were recorded, and of all schedules that
        schedules/auto.py tries the one with the shortest simulated step is taken.
Read    choose -> resolve -> costs_of -> balanced
Tests   tests/test_mpmd_program.py
"""

from collections.abc import Sequence

from picotron_lab.config import ConfigError, require
from picotron_lab.mpmd_trace import Body, merge
from picotron_lab.schedules.actions import Action, Pair, Schedule, ScheduleError, parse, parts
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import ENTRIES, build
from picotron_lab.schedules.validator import validate

YOURS = "your schedule"  # the name of one that is given as lists
LEAST = 1e-3  # of a mean stage: what a stage takes at least, so that it ends after it starts
Lists = Sequence[Sequence[str | Action | Pair]]


def choose(
    wanted: Schedule | str | Lists, body: Body, actors: int, microbatches: int
) -> tuple[Body, Schedule, Costs]:
    """The body with its final stages, a checked schedule for it, and the times of its tasks.

    Raises  ConfigError: a sentence with what does not fit
    """
    if isinstance(wanted, str) and wanted == "auto":
        require(
            body.stages >= actors,
            f"schedule auto needs a stage for each of {actors} actors, and the loss function has "
            f"{body.stages - 1} yields, so {body.stages}: call pipeline_yield {actors - 1} times, "
            f"or start Controller(actors={body.stages}).",
        )
        work = [body.tasks["F", s].flops + body.tasks["BW", s].flops for s in range(body.stages)]
        body = merge(body, balanced(work, actors))
    costs = costs_of(body)
    return body, resolve(wanted, actors, body.stages, microbatches, costs), costs


def resolve(
    wanted: Schedule | str | Lists,
    actors: int,
    stages: int,
    microbatches: int,
    costs: Costs = Costs(),  # noqa: B008
) -> Schedule:
    """A checked schedule from one, from a name, or from lists such as [["F0.0", "BW0.0"], ...].

    stages  of the program: one more than it has yields
    Raises  ConfigError: a sentence with what does not fit
    """
    try:
        if isinstance(wanted, str):
            schedule = _named(wanted, actors, stages, microbatches, costs)
        else:
            schedule = wanted if isinstance(wanted, Schedule) else _from_lists(wanted)
        _check(schedule, actors, stages, microbatches)
        validate(schedule)
    except ScheduleError as error:
        sentence = str(error).removeprefix("schedule ")
        colon = ":" if sentence == str(error) else ""
        raise ConfigError(f"schedule{colon} {sentence}") from error
    return schedule


def _named(name: str, actors: int, stages: int, microbatches: int, costs: Costs) -> Schedule:
    free = name in ENTRIES and "virtual_stages" in ENTRIES[name].takes
    takes_costs = name in ENTRIES and "costs" in ENTRIES[name].takes
    options = Options(
        virtual_stages=-(-stages // actors) if free else 0, costs=costs if takes_costs else Costs()
    )
    return build(name, actors, microbatches, options)


def _from_lists(lists: Lists) -> Schedule:
    """Each stage lives where the lists use it."""
    _check_lists(lists)
    items = tuple(tuple(parse(x) if isinstance(x, str) else x for x in one) for one in lists)
    actions = [[action for item in one for action in parts(item)] for one in items]
    placement = tuple(tuple(sorted({action.stage for action in one})) for one in actions)
    require(
        any(placement), "schedule: the lists are empty: give one list of tasks for each actor, "
        'such as [["F0.0", "BW0.0"]] for one actor.'
    )  # fmt: skip
    used = {action.microbatch: action for one in actions for action in one}
    missing = next(i for i in range(len(used) + 1) if i not in used)
    require(
        max(used) < missing,
        f"schedule: {used[max(used)]} is of micro-batch {max(used)}, and no task is of "
        f"{missing}: number micro-batches from 0 without a gap, here 0 to {len(used) - 1}.",
    )
    return Schedule(YOURS, items, placement, len(used))


def _check_lists(lists: Lists) -> None:
    """A list of tasks for each actor, and a task a string or an Action."""
    form = 'give a list for each actor, such as [["F0.0", "BW0.0"]] for one'
    require(
        isinstance(lists, Sequence),
        f"schedule {lists!r} is no name, no Schedule and no list: give a name such as '1f1b', or "
        f"{form}.",
    )
    for one in lists:
        is_list = isinstance(one, Sequence) and not isinstance(one, str | Action)
        require(is_list, f"schedule: {one!r} stands where an actor's list must be: {form}.")
        wrong = [x for x in one if not isinstance(x, str | Action | Pair)]
        require(not wrong, f"schedule: {wrong[:1]} holds no task: write it like 'F0.0'; {form}.")


def _check(schedule: Schedule, actors: int, stages: int, microbatches: int) -> None:
    """What a schedule must share with the program and with the actors."""
    name = YOURS if schedule.name == YOURS else f"schedule {schedule.name}"
    require(
        not schedule.replicated and not schedule.vocabulary and schedule.slices == 1,
        f"{name} keeps two copies of stages, splits the vocabulary or cuts sequences, "
        "which tasks cut from a loss function do not know: choose one that runs F, BW, B and W of "
        "every stage on one actor, such as 1f1b or dualpipe-v.",
    )
    require(
        schedule.ranks == actors,
        f"{name} has lists for {schedule.ranks} actors, and there are {actors}: start "
        f"Controller(actors={schedule.ranks}), or give {actors} lists.",
    )
    placed = {stage for one in schedule.placement for stage in one}
    missing = sorted({*range(stages)} - placed)
    require(
        not missing,
        f"{name} runs stage {', '.join(map(str, missing))} on no actor, and the loss "
        f"function has {stages - 1} yields, so stages 0 to {stages - 1}: give every stage to an "
        f"actor, or take out yields until {len(placed)} stages are left.",
    )
    require(
        schedule.stages == stages,
        f"{name} has {schedule.stages} stages, and the loss function {stages - 1} yields, "
        f"so {stages}: call pipeline_yield {schedule.stages - 1} times, or change the number of "
        "actors.",
    )
    require(
        schedule.microbatches == microbatches,
        f"{name} has {schedule.microbatches} micro-batches, and {microbatches} were "
        f"given: give {schedule.microbatches}.",
    )


def costs_of(body: Body) -> Costs:
    """What the tasks of each stage take, in floating-point operations; the mean forward is 1."""
    kinds = ("F", "B", "W")
    flops = [[body.tasks[kind, stage].flops for kind in kinds] for stage in range(body.stages)]
    mean = sum(of[0] for of in flops) / len(flops) or 1.0
    return Costs(factors=tuple(tuple(max(LEAST, f / mean) for f in of) for of in flops))


def balanced(work: Sequence[float], parts: int) -> list[int]:
    """How many neighbours make up each part, so that the part with most work has least.

    best[k]: for so many first items in the parts so far, the work of the busiest, and the counts
    """
    best = {0: (0.0, [])}
    for _ in range(parts):
        longer: dict[int, tuple[float, list[int]]] = {}
        for begin, (busiest, counts) in best.items():
            for end in range(begin + 1, len(work) + 1):
                found = max(busiest, sum(work[begin:end])), [*counts, end - begin]
                longer[end] = min(found, longer.get(end, found))
        best = longer
    return best[len(work)][1]
