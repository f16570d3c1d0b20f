"""Likely mistakes in lesson 00, each with the task and the words that must catch it."""

import math

import torch

from lessons.kit import mutant


@mutant("00.1", "the first axis runs fastest")
def first_axis_fastest(solution):
    """Axes are counted through from the left, as one reads them."""

    def coordinates(rank, sizes):
        found = {}
        for name, size in sizes.items():
            rank, found[name] = divmod(rank, size)
        return found

    return {"coordinates": coordinates}


@mutant("00.2", "these are neighbouring ranks")
def neighbours(solution):
    """A group is a block of neighbours, on whatever axis."""

    def groups(sizes, axis):
        n = sizes[axis]
        return [list(range(i, i + n)) for i in range(0, math.prod(sizes.values()), n)]

    return {"groups": groups}


@mutant("00.2", "these are ranks that are alike on")
def equal_coordinates(solution):
    """All ranks with dp 0 are the group dp 0."""

    def groups(sizes, axis):
        found = {}
        for rank in range(math.prod(sizes.values())):
            found.setdefault(solution.coordinates(rank, sizes)[axis], []).append(rank)
        return list(found.values())

    return {"groups": groups}


@mutant("00.3", "x was written to")
def sum_in_place(solution):
    """A second tensor is waste."""

    def sum_over(world, sizes, axis, x):
        return world.split(axis, solution.groups(sizes, axis)).all_reduce(x, out=x)

    return {"sum_over": sum_over}


@mutant("00.3", "it was called group")
def axis_of_another_name(solution):
    """What an axis is called does not matter."""

    def sum_over(world, sizes, axis, x):
        return world.split("group", solution.groups(sizes, axis)).all_reduce(x)

    return {"sum_over": sum_over}


@mutant("00.3", "the sum over the whole world")
def sum_over_the_world(solution):
    """The other axes will have size 1."""

    def sum_over(world, sizes, axis, x):
        return world.all_reduce(x)

    return {"sum_over": sum_over}


@mutant("00.3", "a mean where a sum belongs")
def mean_over_the_axis(solution):
    """Gradients are averaged, so this is, too."""

    def sum_over(world, sizes, axis, x):
        return world.split(axis, solution.groups(sizes, axis)).all_reduce(x, op="mean")

    return {"sum_over": sum_over}


@mutant("00.3", "one sum, one call")
def gather_and_add(solution):
    """Everybody gets everything, and adds up."""

    def sum_over(world, sizes, axis, x):
        mine = world.split(axis, solution.groups(sizes, axis))
        return mine.all_gather(x[None]).sum(0)

    return {"sum_over": sum_over}


@mutant("00.3", "only the group speaks")
def masked_world(solution):
    """Each group in turn is summed over the world, with zeros from all others."""

    def sum_over(world, sizes, axis, x):
        mine = torch.zeros_like(x)
        for group in solution.groups(sizes, axis):
            here = world.rank in group
            total = world.all_reduce(x if here else torch.zeros_like(x))
            mine = total if here else mine
        return mine

    return {"sum_over": sum_over}


@mutant("00.4", "a pipeline is no ring")
def ring(solution):
    """The neighbours of a stage are those modulo the number of stages."""

    def pass_on(world, sizes, x):
        pp = world.split("pp", solution.groups(sizes, "pp"))
        following, previous = (pp.rank + 1) % pp.size, (pp.rank - 1) % pp.size
        return pp.exchange([(x, following)], [(x, previous)])[0]

    return {"pass_on": pass_on}


@mutant("00.4", "whom does the last stage tell?")
def ring_that_forgets(solution):
    """A ring, and the first stage throws away what it got."""

    def pass_on(world, sizes, x):
        pp = world.split("pp", solution.groups(sizes, "pp"))
        following, previous = (pp.rank + 1) % pp.size, (pp.rank - 1) % pp.size
        received = pp.exchange([(x, following)], [(x, previous)])[0]
        return received if pp.rank else torch.zeros_like(x)

    return {"pass_on": pass_on}


@mutant("00.4", "each rank gave x to world rank + 1")
def next_world_rank(solution):
    """The next stage is the next rank."""

    def pass_on(world, sizes, x):
        sends = [(x, world.rank + 1)] if world.rank + 1 < world.size else []
        receives = [(x, world.rank - 1)] if world.rank > 0 else []
        received = world.exchange(sends, receives)
        return received[0] if received else torch.zeros_like(x)

    return {"pass_on": pass_on}


@mutant("00.4", "the right ranks, but over the world")
def over_the_world(solution):
    """World ranks are arithmetic: no axis is needed."""

    def pass_on(world, sizes, x):
        stride = world.size // sizes["pp"]
        following, previous = world.rank + stride, world.rank - stride
        sends = [(x, following)] if following < world.size else []
        receives = [(x, previous)] if previous >= 0 else []
        received = world.exchange(sends, receives)
        return received[0] if received else torch.zeros_like(x)

    return {"pass_on": pass_on}


@mutant("00.4", "more was sent than one message to the next stage")
def everybody_gets_everything(solution):
    """Gather all stages, and take the one before."""

    def pass_on(world, sizes, x):
        pp = world.split("pp", solution.groups(sizes, "pp"))
        every = pp.all_gather(x[None])
        return every[pp.rank - 1].clone() if pp.rank else torch.zeros_like(x)

    return {"pass_on": pass_on}
