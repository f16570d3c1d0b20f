"""Likely mistakes in lesson 01, each with the task and the words that must catch it."""

import torch

from lessons.kit import mutant


@mutant("01.1", "no rank can make progress")
def receive_first(solution):
    """All ranks sent first, which was wrong: so receive first."""

    def shift(x, axis):
        received = axis.recv(x, source=(axis.rank - 1) % axis.size)
        axis.send(x, to=(axis.rank + 1) % axis.size)
        return received

    return {"shift": shift}


@mutant("01.1", "which neighbour you send to")
def wrong_way_round(solution):
    """From the next, to the previous: a ring is a ring."""

    def shift(x, axis):
        following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        return axis.exchange([(x, previous)], [(x, following)])[0]

    return {"shift": shift}


@mutant("01.1", "that is what this lesson builds")
def gather_and_choose(solution):
    """All have all, and take what they need."""

    def shift(x, axis):
        return axis.all_gather(x[None])[axis.rank - 1].clone()

    return {"shift": shift}


@mutant("01.2", "one rank too early")
def ends_one_early(solution):
    """Rank r begins with chunk r, for that is its number."""

    def ring_reduce_scatter(x, axis):
        n, r = axis.size, axis.rank
        chunks = x.chunk(n)
        carry = chunks[r]
        for step in range(n - 1):
            carry = solution.shift(carry, axis) + chunks[(r - 1 - step) % n]
        return carry

    return {"ring_reduce_scatter": ring_reduce_scatter}


@mutant("01.2", "missing from its sum")
def own_rows_missing(solution):
    """The last chunk that comes is complete."""

    def ring_reduce_scatter(x, axis):
        n, r = axis.size, axis.rank
        chunks = x.chunk(n)
        carry = chunks[(r - 1) % n]
        for step in range(n - 1):
            carry = solution.shift(carry, axis)
            carry = carry + chunks[(r - 2 - step) % n] if step < n - 2 else carry
        return carry

    return {"ring_reduce_scatter": ring_reduce_scatter}


@mutant("01.2", "x was written to")
def sums_into_its_input(solution):
    """A new tensor for every sum is waste."""

    def ring_reduce_scatter(x, axis):
        n, r = axis.size, axis.rank
        chunks = x.chunk(n)
        carry = chunks[(r - 1) % n]
        for step in range(n - 1):
            carry = chunks[(r - 2 - step) % n].add_(solution.shift(carry, axis))
        return carry

    return {"ring_reduce_scatter": ring_reduce_scatter}


@mutant("01.2", "chunks were collected")
def straight_to_the_owner(solution):
    """Each rank sends every chunk to the rank that wants it: as many bytes, and no detour."""

    def ring_reduce_scatter(x, axis):
        chunks = x.chunk(axis.size)
        others = [r for r in range(axis.size) if r != axis.rank]
        mine = chunks[axis.rank]
        sends, receives = [(chunks[r], r) for r in others], [(mine, r) for r in others]
        return mine + sum(axis.exchange(sends, receives))

    return {"ring_reduce_scatter": ring_reduce_scatter}


@mutant("01.2", "does more than that travel")
def the_whole_tensor_travels(solution):
    """Everybody's x comes by: add it up, and keep the own rows."""

    def ring_reduce_scatter(x, axis):
        total, carry = x, x
        for _ in range(axis.size - 1):
            carry = solution.shift(carry, axis)
            total = total + carry
        return total.chunk(axis.size)[axis.rank].clone()

    return {"ring_reduce_scatter": ring_reduce_scatter}


@mutant("01.3", "in the order in which they came")
def order_of_arrival(solution):
    """Put together what came, own rows first."""

    def ring_all_gather(x, axis):
        parts = [x]
        for _ in range(axis.size - 1):
            parts.append(solution.shift(parts[-1], axis))
        return torch.cat(parts)

    return {"ring_all_gather": ring_all_gather}


@mutant("01.3", "bytes that the busiest rank sends")
def grows_on_the_way(solution):
    """Send on all that one has."""

    def ring_all_gather(x, axis):
        n, r = axis.size, axis.rank
        have = x
        for _ in range(n - 1):
            have = torch.cat([x, solution.shift(have, axis)])
        parts = have.split(len(x))
        return torch.cat([parts[(r - k) % n] for k in range(n)])

    return {"ring_all_gather": ring_all_gather}


@mutant("01.3", "on a ring every rank sends to the next one")
def straight_to_everybody(solution):
    """In step s rank r sends its rows to rank r + s: as many messages, as many bytes."""

    def ring_all_gather(x, axis):
        n, r = axis.size, axis.rank
        parts = [x] * n
        for step in range(1, n):
            to, source = (r + step) % n, (r - step) % n
            (parts[source],) = axis.exchange([(x, to)], [(x, source)])
        return torch.cat(parts)

    return {"ring_all_gather": ring_all_gather}


@mutant("01.2", "on a ring every rank sends to the next one")
def the_other_way_round(solution):
    """A ring has two directions."""

    def ring_reduce_scatter(x, axis):
        n, r = axis.size, axis.rank
        chunks = x.chunk(n)
        carry = chunks[(r + 1) % n]
        for step in range(n - 1):
            (carry,) = axis.exchange([(carry, (r - 1) % n)], [(carry, (r + 1) % n)])
            carry = carry + chunks[(r + 2 + step) % n]
        return carry

    return {"ring_reduce_scatter": ring_reduce_scatter}


@mutant("01.4", "so fill up with zeros")
def the_rest_is_lost(solution):
    """Sizes are multiples of the number of ranks."""

    def ring_all_reduce(x, axis):
        flat = x.flatten()
        even = flat[: x.numel() // axis.size * axis.size].contiguous()
        total = torch.zeros_like(flat)
        part = solution.ring_reduce_scatter(even, axis)
        total[: even.numel()] = solution.ring_all_gather(part, axis)
        return total.view(x.shape)

    return {"ring_all_reduce": ring_all_reduce}


@mutant("01.4", "does more than that travel")
def star(solution):
    """Rank 0 adds up, and tells the others."""

    def ring_all_reduce(x, axis):
        others = range(1, axis.size)
        if axis.rank:
            axis.send(x, to=0)
            return axis.recv(x, source=0)
        total = x + sum(axis.recv(x, source=r) for r in others)
        for r in others:
            axis.send(total, to=r)
        return total

    return {"ring_all_reduce": ring_all_reduce}


@mutant("01.4", "does more than that travel")
def the_whole_tensor_goes_round(solution):
    """Everybody's x comes by: add it up."""

    def ring_all_reduce(x, axis):
        total, carry = x, x
        for _ in range(axis.size - 1):
            carry = solution.shift(carry, axis)
            total = total + carry
        return total

    return {"ring_all_reduce": ring_all_reduce}


@mutant("01.4", "that is what this lesson builds")
def the_axis_can_do_it(solution):
    """There is a method of that name."""

    def ring_all_reduce(x, axis):
        return axis.all_reduce(x)

    return {"ring_all_reduce": ring_all_reduce}


@mutant("01.4", "some receive before they send")
def even_ranks_first(solution):
    """Even ranks send, then receive; odd ones receive, then send: no deadlock."""

    def shift(x, axis):
        following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        if axis.rank % 2 == 0:
            axis.send(x, to=following)
            return axis.recv(x, source=previous)
        received = axis.recv(x, source=previous)
        axis.send(x, to=following)
        return received

    return {"shift": shift}
