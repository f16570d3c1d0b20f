"""Lesson 12: plausible wrong answers, each with the task and the words that must catch it."""

import torch

from lessons.kit import mutant


@mutant("12.1", "the gradients of a rank's own rows never left it")
def gradients_from_own_rows(solution):
    """Backward as if the rows had stayed."""

    class Travel(solution.Travel):
        @staticmethod
        def forward(ctx, rows, send, receive, ep):
            ctx.rows, ctx.factor = rows, 2.0 * (ep.rank + 1)
            return ep.all_to_all(rows, send, receive)

        @staticmethod
        def backward(ctx, grad):
            return ctx.rows * ctx.factor, None, None, None

    return {"Travel": Travel}


@mutant("12.1", "padded, or sent twice")
def rows_of_everybody(solution):
    """Takes its rows out of everybody's."""

    class Travel(solution.Travel):
        @staticmethod
        def forward(ctx, rows, send, receive, ep):
            ep.all_to_all(rows, send, receive)
            return solution.Travel.forward(ctx, rows, send, receive, ep)

    return {"Travel": Travel}


@mutant("12.2", "gates were left out")
def without_gates(solution):
    """A token adds up what its experts say, whatever its gates."""

    def moe(x, expert, gate, experts, ep):
        return solution.moe(x, expert, gate * 0 + 1, experts, ep)

    return {"moe": moe}


@mutant("12.2", "rows come sorted by source")
def rows_as_they_came(solution):
    """Splits what came among its experts without sorting."""

    def moe(x, expert, gate, experts, ep):
        e, k, n = len(experts), expert.shape[1], ep.size
        order = expert.flatten().argsort(stable=True)
        counts = ep.all_gather(expert.flatten().bincount(minlength=e * n)[None])
        mine = counts[:, ep.rank * e : (ep.rank + 1) * e]
        send, receive = counts[ep.rank].view(n, e).sum(1).tolist(), mine.sum(1).tolist()
        came = solution.Travel.apply(x[order // k], send, receive, ep)
        parts = zip(experts, came.split(mine.sum(0).tolist()), strict=True)
        out = torch.cat([one(part) for one, part in parts])
        back = solution.Travel.apply(out, receive, send, ep)
        rows = back * gate.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // k, rows)

    return {"moe": moe}


@mutant("12.2", "mixes different experts")
def experts_as_replicas(solution):
    """Sums the gradients of experts over ep, as data parallelism does."""

    def moe(x, expert, gate, experts, ep):
        for one in experts:
            one.weight.register_hook(ep.all_reduce)
        return solution.moe(x, expert, gate, experts, ep)

    return {"moe": moe}


@mutant("12.2", "counts of rows are all that must be known")
def everybody_has_all_tokens(solution):
    """Gathers all tokens as well."""

    def moe(x, expert, gate, experts, ep):
        ep.all_gather(x.detach())
        return solution.moe(x, expert, gate, experts, ep)

    return {"moe": moe}


@mutant("12.3", "last come, first served")
def counted_from_the_end(solution):
    """Counts from the wrong end."""

    def within_capacity(expert, experts, capacity):
        turned = solution.within_capacity(expert.flip(0).flip(1), experts, capacity)
        return turned.flip(0).flip(1)

    return {"within_capacity": within_capacity}


@mutant("12.3", "every first choice was served before any second")
def first_choices_first(solution):
    """GShard's order."""

    def within_capacity(expert, experts, capacity):
        flat = expert.T.reshape(-1, 1)
        return solution.within_capacity(flat, experts, capacity).view(expert.T.shape).T

    return {"within_capacity": within_capacity}


@mutant("12.3", "a loop over tokens")
def token_after_token(solution):
    """Right, one choice at a time."""

    def within_capacity(expert, experts, capacity):
        seen = torch.zeros(experts, dtype=torch.int64)
        kept = torch.zeros_like(expert, dtype=torch.bool)
        for t in range(expert.shape[0]):
            for j in range(expert.shape[1]):
                kept[t, j] = seen[expert[t, j]] < capacity
                seen[expert[t, j]] += 1
        return kept

    return {"within_capacity": within_capacity}


@mutant("12.3", "a loop over tokens")
def a_loop_in_python(solution):
    """Right, and no operator counts it."""

    def within_capacity(expert, experts, capacity):
        flat, seen = expert.flatten().tolist(), [0] * experts
        kept = []
        for one in flat:
            kept.append(seen[one] < capacity)
            seen[one] += 1
        return torch.tensor(kept).view(expert.shape)

    return {"within_capacity": within_capacity}


@mutant("12.2", "nobody chose this expert")
def idle_experts_are_skipped(solution):
    """Calls an expert only if it has rows."""

    def moe(x, expert, gate, experts, ep):
        return solution.moe(x, expert, gate, [Idle(one) for one in experts], ep)

    class Idle(torch.nn.Module):
        def __init__(self, one):
            super().__init__()
            self.one = one

        def forward(self, rows):
            return self.one(rows) if len(rows) else rows

    return {"moe": moe}


@mutant("12.4", "just the mean stays where it is")
def never_still(solution):
    """Up or down, never still."""

    def moved_bias(bias, expert, speed, ep):
        total = ep.all_reduce(expert.flatten().bincount(minlength=len(bias)).to(bias.dtype))
        return bias + speed * torch.where(total < total.mean(), 1.0, -1.0)

    return {"moved_bias": moved_bias}


@mutant("12.4", "only this rank's tokens were counted")
def local_counts(solution):
    """Every rank looks at its own tokens."""

    def moved_bias(bias, expert, speed, ep):
        counts = expert.flatten().bincount(minlength=len(bias)).to(bias.dtype)
        return bias + speed * (counts.mean() - counts).sign()

    return {"moved_bias": moved_bias}


@mutant("12.4", "busy experts went up")
def wrong_way(solution):
    """The sign."""

    def moved_bias(bias, expert, speed, ep):
        return solution.moved_bias(bias, expert, -speed, ep)

    return {"moved_bias": moved_bias}
