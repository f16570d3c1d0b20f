"""Mutants of data parallelism, gradient accumulation and the loss."""

import torch

from mutants import killed_by
from picotron_lab import data_parallel, optim, pipeline_parallel, sharding, trainer

EVERY_STEP = "test_trainer.py::test_every_step_of_the_lesson_equals_one_device"
SUMS = "test_data_parallel.py::test_sum_over_ranks_and_microbatches"


@killed_by(f"{SUMS}[2-naive]")
def parameter_reduced_instead_of_gradient(patch):
    """The hook's argument is the parameter, taken for its gradient (Picotron's
    DataParallelNaive)."""

    def finish(self):
        for p in self.parameters:
            self.axis.all_reduce(p.data, "sum", out=p.data)

    patch.setattr(data_parallel.Naive, "finish", finish)


@killed_by(f"{SUMS}[3-overlapped]")
def accumulated_gradient_reduced_again(patch):
    """Each micro-batch reduces what earlier ones had reduced already (Picotron tutorial, step
    5)."""

    def send(self, p):
        handle = self.axis.all_reduce(p.grad, "sum", out=p.grad, wait=False)
        self.under_way.append((p, handle))

    patch.setattr(data_parallel.Overlapped, "_send", send)


@killed_by(f"{SUMS}[4-silent]")
def only_the_last_microbatch_counts(patch):
    """Buffers are cleared before every micro-batch, not before every step."""
    original = data_parallel.Silent.before_backward

    def before_backward(self, last):
        for bucket in self.buckets:
            bucket.flat.zero_()
        original(self, last)

    patch.setattr(data_parallel.Silent, "before_backward", before_backward)


@killed_by("test_data_parallel.py::test_calls_and_bytes_equal_the_contract[5-silent]")
def sends_after_every_microbatch(patch):
    """The right gradient at m times the price."""
    patch.setattr(data_parallel.Silent, "begin_step", data_parallel.Bucketed.begin_step)
    patch.setattr(data_parallel.Silent, "before_backward", data_parallel.Bucketed.before_backward)
    patch.setattr(data_parallel.Silent, "finish", data_parallel.Bucketed.finish)


@killed_by(
    "test_data_parallel.py::test_first_collective_leaves_before_the_last_gradient_exists[silent]"
)
def nothing_overlaps(patch):
    """All buckets leave after backward: right, and slow."""
    patch.setattr(data_parallel.Bucketed, "_count_down", lambda self, p: None)


@killed_by("test_data_parallel.py::test_a_parameter_that_one_rank_does_not_use[None-silent]")
def buckets_leave_when_full_in_any_order(patch):
    """A rank that skips a parameter meets the others in another bucket."""

    def count_down(self, p):
        bucket = self.owner[p]
        bucket.missing -= 1
        if bucket.missing == 0 and bucket in self.waiting:
            self.waiting.remove(bucket)
            bucket.send(self.axis, self.dtype)

    patch.setattr(data_parallel.Bucketed, "_count_down", count_down)


@killed_by(f"{SUMS}[4-naive]")
def mean_over_ranks_of_a_sum(patch):
    """The loss is divided by the global count already: a mean divides by n once more."""

    def finish(self):
        for p in self.parameters:
            self.axis.all_reduce(p.grad, "mean", out=p.grad)

    patch.setattr(data_parallel.Naive, "finish", finish)


@killed_by(f"{EVERY_STEP}[naive-plain]")
def loss_not_divided_by_microbatches(patch):
    """Each micro-batch is normalised by itself, so gradients are m times too large (Picotron,
    PP)."""

    original = pipeline_parallel.Executor.run

    def run(self, batches, tokens):  # 6 micro-batches in all: 2 on each of 3 ranks
        return original(self, batches, tokens / 6)

    patch.setattr(pipeline_parallel.Executor, "run", run)


@killed_by("test_trainer.py::test_ranks_without_counted_labels")
def mean_of_means(patch):
    """Every rank divides by its own token count, then gradients are averaged."""
    original = pipeline_parallel.Executor.run

    def run(self, batches, tokens):
        own = sum(int((labels != -100).sum()) for _, labels, _ in batches)
        return original(self, batches, max(own, 1) * self.synchronisers[0].axis.size)

    patch.setattr(pipeline_parallel.Executor, "run", run)


@killed_by(f"{EVERY_STEP}[silent-fused]")
def ignored_labels_are_counted(patch):
    """The loss is divided by all positions, counted or not."""
    patch.setattr(trainer, "IGNORED", -1)


@killed_by("test_sharding.py::test_norm_counts_replicas_once_and_shards_each")
def norm_counts_every_replica(patch):
    """The gradient norm grows with the number of ranks, so clipping does too."""

    def squared_norm(parameters, world, axes):
        return world.all_reduce(sum(p.grad.double().square().sum() for p in parameters))

    patch.setattr(sharding, "squared_norm", squared_norm)


@killed_by("test_trainer.py::test_every_split_of_the_batch_equals_one_device[sgd]")
def no_clipping(patch):
    """The norm is measured and nothing is scaled."""
    original = optim.clip
    patch.setattr(optim, "clip", lambda parameters, limit, *rest: original(parameters, 0.0, *rest))


@killed_by("test_optim.py::test_tiny_updates_add_up_in_master_weights")
def no_master_weights(patch):
    """bf16 weights are stepped themselves: small updates are lost (Picotron)."""
    from picotron_lab import precision

    def take_gradients(self):
        for p in self._parameters:
            p.grad_dtype = p.dtype
            p.grad = p.grad.to(p.dtype)

    patch.setattr(precision, "_master", lambda p: p)
    patch.setattr(precision.MasterWeights, "take_gradients", take_gradients)


@killed_by("test_data_parallel.py::test_bfloat16_parameters_add_up_in_float32")
def gradients_add_up_in_bfloat16(patch):
    """The accumulation dtype is the parameter's (Picotron without data parallelism)."""
    original = data_parallel.Bucket.__init__

    def init(self, parameters):
        for p in parameters:
            p.grad_dtype = p.dtype
        original(self, parameters)

    patch.setattr(data_parallel.Bucket, "__init__", init)


@killed_by("test_trainer.py::test_dropout_masks_do_not_depend_on_the_mesh")
def dropout_from_call_order(patch):
    """Masks come from the default random stream, so they depend on who draws when."""
    from picotron_lab.dropout import Dropout

    drop = torch.nn.functional.dropout
    patch.setattr(Dropout, "forward", lambda self, x, where: drop(x, self.rate, self.training))
