"""Lesson 08: plausible wrong answers, each with the task and the words that must catch it."""

import torch

from lessons.kit import mutant


@mutant("08.1", "late tokens see more keys than early ones")
def tokens_in_order(solution):
    """Chunk r for rank r: the plain ring, whose first rank is idle."""

    def positions(rank, size, length):
        return torch.arange(length).view(size, -1)[rank]

    return {"positions": positions}


@mutant("08.1", "positions rise on each rank")
def late_chunk_first(solution):
    """The right chunks, the late one in front."""

    def positions(rank, size, length):
        return solution.positions(rank, size, length).view(2, -1).flip(0).flatten()

    return {"positions": positions}


@mutant("08.2", "the mean of two means")
def plain_mean(solution):
    """Forgets that blocks weigh differently."""

    def merge(out, lse, other_out, other_lse):
        return (out + other_out) / 2, torch.logaddexp(lse, other_lse)

    return {"merge": merge}


@mutant("08.2", "exp of a large lse is inf")
def without_the_larger_one(solution):
    """The formula as it stands on paper."""

    def merge(out, lse, other_out, other_lse):
        a, b = lse.exp()[:, None], other_lse.exp()[:, None]
        mean = (a * out + b * other_out) / (a + b)
        return mean.where(a + b > 0, 0), torch.logaddexp(lse, other_lse)

    return {"merge": merge}


@mutant("08.2", "-inf minus -inf is NaN")
def blind_row_is_nan(solution):
    """Never met a row that sees nothing."""

    def merge(out, lse, other_out, other_lse):
        total = torch.logaddexp(lse, other_lse)
        a, b = (lse - total).exp()[:, None], (other_lse - total).exp()[:, None]
        return a * out + b * other_out, total

    return {"merge": merge}


@mutant("08.3", "queries met the keys of their own rank only")
def stays_at_home(solution):
    """Attention without communication."""

    def ring_forward(q, k, v, places, cp):
        return solution.attend(q, k, v, places, places)

    return {"ring_forward": ring_forward}


@mutant("08.3", "all keys are held at once")
def gathers_all_keys(solution):
    """Sends no more than a ring, but holds n blocks."""

    def ring_forward(q, k, v, places, cp):
        blocks = [[k, v, places]]
        for _ in range(cp.size - 1):
            blocks.append(solution.pass_on(blocks[-1], cp))
        keys, values, where = (torch.cat(x) for x in zip(*blocks, strict=True))
        return solution.attend(q, keys, values, places, where)

    return {"ring_forward": ring_forward}


@mutant("08.3", "n - 1 times, not n")
def one_hop_too_many(solution):
    """Sends every block home again."""

    def ring_forward(q, k, v, places, cp):
        found = solution.ring_forward(q, k, v, places, cp)
        solution.pass_on([k, v, places], cp)
        return found

    return {"ring_forward": ring_forward}


@mutant("08.4", "stopped one hop before home")
def sums_left_next_door(solution):
    """n stops, n - 1 hops: the last hop, home, is missing."""

    def ring_backward(grad, qkv, row, places, cp):
        dq, dk, dv = solution.ring_backward(grad, qkv, row, places, cp)
        for _ in range(cp.size - 1):
            dk, dv = solution.pass_on([dk, dv], cp)
        return dq, dk, dv

    return {"ring_backward": ring_backward}


@mutant("08.4", "sums from the queries of this rank only")
def never_told(solution):
    """Keys are used elsewhere, their gradients stay there; dq is right."""

    def ring_backward(grad, qkv, row, places, cp):
        q, k, v = qkv
        dq = solution.ring_backward(grad, qkv, row, places, cp)[0]
        return dq, *solution.attend_backward(grad, (q, k, v), row, places, places)[1:]

    return {"ring_backward": ring_backward}


@mutant("08.4", "not to everybody")
def sums_by_all_reduce(solution):
    """Right, and n times what is needed: every rank adds up the gradients of all keys."""

    def ring_backward(grad, qkv, row, places, cp):
        found = solution.ring_backward(grad, qkv, row, places, cp)
        cp.all_reduce(torch.zeros(cp.size, *found[1].shape, dtype=found[1].dtype))
        return found

    return {"ring_backward": ring_backward}


@mutant("08.1", "int64 [")
def positions_are_floats(solution):
    """Divides where it should count."""

    def positions(rank, size, length):
        return solution.positions(rank, size, length) / 1

    return {"positions": positions}


@mutant("08.3", "at this rank's own positions")
def own_positions_for_all(solution):
    """Forgets that keys of another rank are elsewhere in the sequence."""

    def ring_forward(q, k, v, places, cp):
        block, (out, lse) = [k, v], solution.attend(q, k, v, places, places)
        for _ in range(cp.size - 1):
            block = solution.pass_on(block, cp)
            out, lse = solution.merge(out, lse, *solution.attend(q, *block, places, places))
        return out, lse

    return {"ring_forward": ring_forward}


@mutant("08.3", "the last block never came")
def one_hop_too_few(solution):
    """n - 1 blocks with the own one."""

    def ring_forward(q, k, v, places, cp):
        block, (out, lse) = [k, v, places], solution.attend(q, k, v, places, places)
        for _ in range(cp.size - 2):
            block = solution.pass_on(block, cp)
            found = solution.attend(q, *block[:2], places, block[2])
            out, lse = solution.merge(out, lse, *found)
        return out, lse

    return {"ring_forward": ring_forward}


@mutant("08.4", "use the lse of the whole row")
def softmax_of_a_block(solution):
    """A softmax over the keys that are here."""

    def ring_backward(grad, qkv, row, places, cp):
        q, k, v = qkv
        block, sums, dq = [k, v, places], [torch.zeros_like(k), torch.zeros_like(v)], 0
        for hops in range(cp.size):
            lse = solution.attend(q, *block[:2], places, block[2])[1].nan_to_num(neginf=1e9)
            now = solution.attend_backward(grad, (q, *block[:2]), (row[0], lse), places, block[2])
            dq, sums = dq + now[0], [sums[0] + now[1], sums[1] + now[2]]
            if hops < cp.size - 1:
                *block, sums[0], sums[1] = solution.pass_on([*block, *sums], cp)
        return dq, *solution.pass_on(sums, cp)

    return {"ring_backward": ring_backward}
