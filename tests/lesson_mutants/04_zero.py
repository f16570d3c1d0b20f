"""Wrong answers to lesson 04. The first ones are right, and save no memory at all."""

import torch

from lessons.kit import mutant


@mutant("04.2", "every rank keeps every moment")
def unsharded_posing_as_stage1(solution):
    """Plain data parallelism under another name: every weight and every gradient is right."""

    class Stage1:
        def __init__(self, parameters, axis):
            self.shards = self.parameters = list(parameters)
            self.axis = axis

        def begin_step(self):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

        def before_backward(self, last):
            pass

        def finish(self):
            for parameter in self.parameters:
                self.axis.all_reduce(parameter.grad, out=parameter.grad)

        def publish(self):
            pass

    return {"Stage1": Stage1}


@mutant("04.3", "full gradients are still alive")
def stage1_posing_as_stage2(solution):
    """Moments are cut, gradients are not."""
    return {"Stage2": solution.Stage1}


@mutant("04.3", "full gradients wait for each other")
def freed_when_all_are_there(solution):
    """After backward nothing is left, but during it all full gradients were alive."""

    class Stage2(solution.Stage2):
        def _reduce(self, shard, parameter):
            if all(p.grad is not None for p in self.parameters):
                for p, s in zip(self.parameters, self.shards, strict=True):
                    super()._reduce(s, p)

    return {"Stage2": Stage2}


@mutant("04.4", "gathered weights are still alive")
def gathered_weight_is_saved(solution):
    """Autograd keeps the whole weight for backward: no stage 3 at all."""

    class ShardedLinear(solution.ShardedLinear):
        @staticmethod
        def forward(ctx, x_NI, shard_RI, rows, axis):
            whole = solution.gather_rows(shard_RI, rows, axis)
            ctx.save_for_backward(x_NI, whole)
            ctx.axis = axis
            return x_NI @ whole.T

        @staticmethod
        def backward(ctx, dy):
            x_NI, whole = ctx.saved_tensors
            return dy @ whole, solution.scatter_sum(dy.T @ x_NI, ctx.axis), None, None

    return {"ShardedLinear": ShardedLinear}


@mutant("04.4", "at twice the price of a reduce_scatter")
def all_reduce_then_cut(solution):
    """The whole gradient is summed everywhere, then all rows but mine are dropped."""

    class ShardedLinear(solution.ShardedLinear):
        @staticmethod
        def backward(ctx, dy):
            x_NI, shard_RI = ctx.saved_tensors
            whole = solution.gather_rows(shard_RI, ctx.rows, ctx.axis)
            total = ctx.axis.all_reduce(dy.T @ x_NI)
            return dy @ whole, total[solution.mine(total, ctx.axis)], None, None

    return {"ShardedLinear": ShardedLinear}


@mutant("04.4", "two all_gathers and one reduce_scatter of every weight")
def gathered_for_its_shape(solution):
    """Backward gathers once for dx, and once more to know the shape of dW."""

    class ShardedLinear(solution.ShardedLinear):
        @staticmethod
        def backward(ctx, dy):
            x_NI, shard_RI = ctx.saved_tensors
            dw = torch.zeros_like(solution.gather_rows(shard_RI, ctx.rows, ctx.axis))
            dx = dy @ solution.gather_rows(shard_RI, ctx.rows, ctx.axis)
            return dx, solution.scatter_sum(dw + dy.T @ x_NI, ctx.axis), None, None

    return {"ShardedLinear": ShardedLinear}


@mutant("04.4", "nothing was summed over ranks")
def gradient_of_own_tokens(solution):
    """The gradient is cut, but never summed."""

    class ShardedLinear(solution.ShardedLinear):
        @staticmethod
        def backward(ctx, dy):
            x_NI, shard_RI = ctx.saved_tensors
            whole = solution.gather_rows(shard_RI, ctx.rows, ctx.axis)
            part = dy.T @ x_NI
            return dy @ whole, part[solution.mine(part, ctx.axis)], None, None

    return {"ShardedLinear": ShardedLinear}


@mutant("04.2", "the others' never came, see publish()")
def weights_not_published(solution):
    """Every rank steps its rows, and nobody hears of it."""

    class Stage1(solution.Stage1):
        def publish(self):
            pass

    return {"Stage1": Stage1}


@mutant("04.2", "full gradients can add up over micro-batches")
def reduced_for_every_microbatch(solution):
    """Stage 2's traffic in stage 1."""
    return {"Stage1": solution.Stage2}


@mutant("04.2", "weights change once per step")
def published_before_every_microbatch(solution):
    """As if weights had changed since the last one."""

    class Stage1(solution.Stage1):
        def before_backward(self, last):
            self.publish()

    return {"Stage1": Stage1}


@mutant("04.2", "a mean where a sum belongs")
def mean_over_ranks(solution):
    """The loss was divided by the global count, and now again by n."""

    class Stage1(solution.Stage1):
        def finish(self):
            super().finish()
            for shard in self.shards:
                shard.grad /= self.axis.size

    return {"Stage1": Stage1}


@mutant("04.2", "at twice the price of a reduce_scatter")
def all_reduced_gradients(solution):
    """Moments are cut, gradients travel to everybody."""

    class Stage1(solution.Stage1):
        def finish(self):
            for parameter, shard in zip(self.parameters, self.shards, strict=True):
                total = self.axis.all_reduce(parameter.grad)
                shard.grad.copy_(total[solution.mine(total, self.axis)])

    return {"Stage1": Stage1}


@mutant("04.3", "only the last micro-batch is in it")
def overwritten_by_the_last(solution):
    """shard.grad is set where it should be added to."""

    class Stage2(solution.Stage2):
        def _reduce(self, shard, parameter):
            shard.grad.zero_()
            super()._reduce(shard, parameter)

    return {"Stage2": Stage2}


@mutant("04.3", "see begin_step()")
def never_zeroed(solution):
    """Shards keep the gradients of the step before."""

    class Stage2(solution.Stage2):
        def begin_step(self):
            if self.shards[0].grad is None:
                super().begin_step()

    return {"Stage2": Stage2}


@mutant("04.1", "rounds up")
def rows_rounded_down(solution):
    """Integer division, and what is left over goes to the last rank."""

    def mine(full, axis):
        each = len(full) // axis.size
        return slice(axis.rank * each, (axis.rank + 1) * each)

    return {"mine": mine}


@mutant("04.1", "rounds up")
def rest_on_the_last(solution):
    """Integer division, and what is left over goes to the last rank."""

    def mine(full, axis):
        each, last = len(full) // axis.size, axis.rank == axis.size - 1
        return slice(axis.rank * each, len(full) if last else (axis.rank + 1) * each)

    return {"mine": mine}


@mutant("04.4", "every rank has tokens of its own")
def gradient_of_inputs_summed(solution):
    """What a layer sends back is summed over ranks."""

    class ShardedLinear(solution.ShardedLinear):
        @staticmethod
        def backward(ctx, dy):
            dx, dw, *_ = solution.ShardedLinear.backward(ctx, dy)
            return ctx.axis.all_reduce(dx), dw, None, None

    return {"ShardedLinear": ShardedLinear}


@mutant("04.4", "a mean where a sum belongs")
def mean_of_gradients(solution):
    """Data parallelism averages."""

    class ShardedLinear(solution.ShardedLinear):
        @staticmethod
        def backward(ctx, dy):
            dx, dw, *_ = solution.ShardedLinear.backward(ctx, dy)
            return dx, dw / ctx.axis.size, None, None

    return {"ShardedLinear": ShardedLinear}


@mutant("04.1", "equal shards")
def padding_forgotten(solution):
    """Works wherever rows divide."""

    def scatter_sum(part, axis):
        return axis.reduce_scatter(part)

    return {"scatter_sum": scatter_sum}


@mutant("04.1", "at twice the price of a reduce_scatter")
def all_reduced_rows(solution):
    """All rows come, mine are kept."""

    def scatter_sum(part, axis):
        return axis.all_reduce(part)[solution.mine(part, axis)]

    return {"scatter_sum": scatter_sum}


@mutant("04.1", "one reduce_scatter and one all_gather of every tensor")
def gathered_parts(solution):
    """Everybody's whole parts come, and are added here."""

    def scatter_sum(part, axis):
        total = axis.all_gather(part[None]).sum(0)
        return total[solution.mine(part, axis)]

    return {"scatter_sum": scatter_sum}
