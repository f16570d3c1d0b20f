"""Wrong answers to lesson 03. The first two are right, and no more than naive data parallelism."""

import torch

from lessons.kit import mutant


@mutant("03.3", "nothing overlaps: buckets leave too late")
def naive_posing_as_overlapped(solution):
    """All buckets leave when backward is over: the gradients are right."""

    class Bucketed(solution.Bucketed):
        def _count_down(self, parameter):
            pass

    return {"Bucketed": Bucketed}


@mutant("03.4", "nothing overlaps: buckets leave too late")
def naive_posing_as_silent(solution):
    """One all-reduce for each bucket after the last micro-batch: also right."""

    class Silent(solution.Silent):
        def _count_down(self, parameter):
            pass

    return {"Silent": Silent}


@mutant("03.3", "pass wait=False")
def waits_inside_the_hook(solution):
    """Each bucket leaves in time, but backward stands still until it is back."""

    class Waiting:
        def __init__(self, axis):
            self.axis = axis

        def all_reduce(self, x, op="sum", out=None, wait=True):
            total = self.axis.all_reduce(x, op, out)
            return type("Arrived", (), {"wait": lambda self: total})()

    class Bucketed(solution.Bucketed):
        def __init__(self, parameters, axis, bucket_bytes):
            super().__init__(parameters, Waiting(axis), bucket_bytes)

    return {"Bucketed": Bucketed}


@mutant("03.3", "a call for every tensor")
def a_call_for_every_tensor(solution):
    """Overlapped, but without buckets."""

    class Bucketed(solution.Bucketed):
        def __init__(self, parameters, axis, bucket_bytes):
            super().__init__(parameters, axis, 0)

    return {"Bucketed": Bucketed}


@mutant("03.3", "ranks disagree")
def buckets_leave_in_any_order(solution):
    """A rank that does not use a parameter meets the others in another bucket."""

    class Bucketed(solution.Bucketed):
        def _count_down(self, parameter):
            bucket = self.owner[parameter]
            bucket.missing -= 1
            if bucket.missing == 0:
                self.waiting.remove(bucket)
                bucket.send(self.axis, self.dtype)

    return {"Bucketed": Bucketed}


@mutant("03.3", "still in it")
def never_cleared(solution):
    """The buffers keep the gradients of the step before."""

    class Bucketed(solution.Bucketed):
        def begin_step(self):
            if not self.totals:
                super().begin_step()

    return {"Bucketed": Bucketed}


@mutant("03.4", "every gradient travels once per step")
def every_microbatch_travels_whole(solution):
    """The right gradient at m times the price: one flat bucket for each micro-batch."""

    class Silent(solution.Bucketed):
        def __init__(self, parameters, axis, bucket_bytes):
            size = sum(p.numel() * p.element_size() for p in parameters)
            super().__init__(parameters, axis, size)

    return {"Silent": Silent}


@mutant("03.4", "only the last micro-batch sends")
def every_microbatch_sends(solution):
    """Gradients are summed after every backward."""
    return {"Silent": solution.Bucketed}


@mutant("03.4", "only the last micro-batch is in it")
def cleared_before_every_microbatch(solution):
    """Buffers are cleared when a backward begins, not when a step does."""

    class Silent(solution.Silent):
        def before_backward(self, last):
            self.begin_step()
            super().before_backward(last)

    return {"Silent": Silent}


@mutant("03.4", "what earlier ones had summed already")
def summed_again(solution):
    """After every backward the whole gradient so far is all-reduced."""

    class Silent(solution.Silent):
        def before_backward(self, last):
            self._reduce()

        def finish(self):
            self._reduce()

        def _count_down(self, parameter):
            pass

        def _reduce(self):
            for bucket in self.buckets:
                self.axis.all_reduce(bucket.flat, out=bucket.flat)

    return {"Silent": Silent}


@mutant("03.3", "fewer calls: a bucket holds more than bucket_bytes")
def buckets_too_large(solution):
    """A bucket is closed when it is full, not before."""

    class Bucketed(solution.Bucketed):
        def __init__(self, parameters, axis, bucket_bytes):
            super().__init__(parameters, axis, 2 * bucket_bytes)

    return {"Bucketed": Bucketed}


@mutant("03.3", "hooks are registered again in every step")
def hooks_in_every_step(solution):
    """Hooks belong to a step; what older ones do comes too late to harm."""

    class Bucketed(solution.Bucketed):
        def begin_step(self):
            super().begin_step()
            for parameter in self.shards:
                parameter.register_post_accumulate_grad_hook(lambda parameter: None)

    return {"Bucketed": Bucketed}


@mutant("03.3", "a call that others leave out")
def unused_parameter_holds_a_bucket_back(solution):
    """Every bucket is complete when backward is over."""

    class Bucketed(solution.Bucketed):
        def _send_rest(self):
            self.waiting = []

    return {"Bucketed": Bucketed}


@mutant("03.3", "at least of some buckets")
def a_bucket_never_leaves(solution):
    """The last bucket is full only when backward is over, and then nobody looks."""

    class Bucketed(solution.Bucketed):
        def _expect_gradients(self):
            super()._expect_gradients()
            self.left_behind = self.waiting.pop()

        def _collect(self):
            super()._collect()
            if self.totals:
                self.totals[-1] += self.buckets[-1].flat

    return {"Bucketed": Bucketed}


@mutant("03.4", "else they are summed once more")
def step_begins_with_old_sums(solution):
    """zero_grad is the optimizer's business."""

    class Silent(solution.Silent):
        def begin_step(self):
            if self.shards[0].grad is None:
                super().begin_step()

    return {"Silent": Silent}


@mutant("03.4", "only the first micro-batch was sent")
def first_microbatch_sends(solution):
    """Buckets leave in the first backward; what the others add stays here."""

    class Silent(solution.Silent):
        def begin_step(self):
            super().begin_step()
            self.begun = False

        def before_backward(self, last):
            if self.begun:
                self.bring_home()
            else:
                self._expect_gradients()
            self.begun = True

        def bring_home(self):
            self._send_rest()
            for bucket in (bucket for bucket in self.buckets if bucket.reduced is not None):
                bucket.receive()

        def finish(self):
            self.bring_home()

    return {"Silent": Silent}


@mutant("03.1", "the sums were thrown away")
def sum_thrown_away(solution):
    """all_reduce works in place."""

    def sum_gradients(parameters, dp):
        for parameter in (p for p in parameters if p.requires_grad):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dp.all_reduce(parameter.grad)

    return {"sum_gradients": sum_gradients}


@mutant("03.2", "counted tokens in the global batch: a sum where a mean belongs")
def undivided(solution):
    """Gradients are added, so nothing need be divided."""

    def parts_of_mean(losses, counts, dp):
        dp.all_reduce(torch.tensor(float(sum(counts))))
        return losses

    return {"parts_of_mean": parts_of_mean}


@mutant("03.2", "up to 16.7 million tokens only")
def counts_in_float32(solution):
    """A count is a small number."""

    def parts_of_mean(losses, counts, dp):
        total = dp.all_reduce(torch.tensor(float(sum(counts))))
        return [loss / total for loss in losses]

    return {"parts_of_mean": parts_of_mean}


@mutant("03.1", "a mean where a sum belongs")
def mean_of_gradients(solution):
    """Ranks are averaged, although the loss was divided by the whole batch already."""

    def sum_gradients(parameters, dp):
        solution.sum_gradients(parameters, dp)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= dp.size

    return {"sum_gradients": sum_gradients}


@mutant("03.1", "the weights were summed, not their gradients")
def parameters_summed(solution):
    """The parameter that a hook hands over is taken for its gradient (Picotron)."""

    def sum_gradients(parameters, dp):
        for parameter in parameters:
            dp.all_reduce(parameter.data, out=parameter.data)

    return {"sum_gradients": sum_gradients}


@mutant("03.1", "ranks disagree")
def unused_parameters_skipped(solution):
    """Who has no gradient does not come to the call."""

    def sum_gradients(parameters, dp):
        for parameter in parameters:
            if parameter.grad is not None:
                dp.all_reduce(parameter.grad, out=parameter.grad)

    return {"sum_gradients": sum_gradients}


@mutant("03.1", "gathering everybody's gradients")
def gathered_and_added(solution):
    """Everybody gets everybody's gradients, and adds."""

    def sum_gradients(parameters, dp):
        for parameter in (p for p in parameters if p.requires_grad):
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = dp.all_gather(mine[None]).sum(0)

    return {"sum_gradients": sum_gradients}


@mutant("03.2", "every rank divided by its own count: a mean of means")
def mean_of_means(solution):
    """Each rank takes its own mean, then ranks are averaged."""

    def parts_of_mean(losses, counts, dp):
        return [loss / (sum(counts) * dp.size) for loss in losses]

    return {"parts_of_mean": parts_of_mean}


@mutant("03.2", "the counts of all micro-batches can be added before they travel")
def a_call_for_every_microbatch(solution):
    """The counts travel one by one."""

    def parts_of_mean(losses, counts, dp):
        totals = [dp.all_reduce(torch.tensor(float(count))) for count in counts]
        return [loss / sum(totals) for loss in losses]

    return {"parts_of_mean": parts_of_mean}


@mutant("03.2", "only their sum")
def counts_gathered(solution):
    """Everybody learns everybody's count."""

    def parts_of_mean(losses, counts, dp):
        total = dp.all_gather(torch.tensor([float(sum(counts))])).sum()
        return [loss / total for loss in losses]

    return {"parts_of_mean": parts_of_mean}
