"""Mutants of ZeRO, tensor, sequence and vocabulary parallelism, and of recomputation."""

import torch
import torch.nn.functional as F

from mutants import killed_by
from picotron_lab import (
    optim,
    recompute,
    sequence_parallel,
    sharding,
    tensor_parallel,
    vocab_parallel,
)
from picotron_lab import zero as zero_module
from picotron_lab.dropout import Dropout

STEPS = "test_build.py::test_three_clipped_steps_equal_one_device"


@killed_by("test_build.py::test_initial_weights_are_slices_of_one_devices[tp]")
def every_rank_starts_from_the_same_shard(patch):
    """Shards are drawn by themselves from one seed: the ranks stay copies of each other, and row
    shards are too wide by the square root of n (Picotron, TP)."""
    original = sharding.materialise

    def materialise(model, seed, draw, device="cpu", dtype=torch.float32):
        def draw_shard(name, shape, generator):
            record = next(p.record for p in model.parameters() if p.record.name == name)
            local = tuple(stop - start for start, stop in record.slices)
            full = torch.empty(shape)
            full[record.index] = draw(name, local, generator)
            return full

        original(model, seed, draw_shard, device, dtype)

    patch.setattr(sharding, "materialise", materialise)


@killed_by("test_tensor_parallel.py::test_traffic_equals_the_contract[0-plain-1]")
def one_sum_for_each_column_layer(patch):
    """q, k, v, gate and up each enter by themselves: 5 sums in backward, not 2 (Picotron, TP)."""

    def column(self, x, weights):
        return [F.linear(self.enter(x), weight) for weight in weights]

    patch.setattr(tensor_parallel.Crossing, "column", column)


@killed_by("test_tensor_parallel.py::test_weights_of_a_rank[2]")
def the_output_head_stays_whole(patch):
    """Every rank holds and multiplies all of V; the values are right (Picotron, issue 23)."""

    def split_head(model, axis, impl="plain"):
        for parameter in (model.head.weight, model.embed.weight):
            sharding.add_axis(parameter, axis, partial=False)

    patch.setattr(tensor_parallel, "split_head", split_head)


@killed_by(f"{STEPS}[tp-plain]")
def no_sum_on_the_way_back(patch):
    """Without f, what lies before a region learns from this rank's term alone."""
    backward = staticmethod(lambda ctx, grad: (grad, None))
    patch.setattr(tensor_parallel.Enter, "backward", backward)


@killed_by(f"{STEPS}[tp-plain]")
def summed_on_both_ways(patch):
    """g sums the gradient again, which every rank has already: n times too large."""
    forward = tensor_parallel.Leave.forward

    def remember(ctx, y, axis):
        ctx.axis = axis
        return forward(ctx, y, axis)

    patch.setattr(tensor_parallel.Leave, "forward", staticmethod(remember))
    backward = staticmethod(lambda ctx, grad: (ctx.axis.all_reduce(grad), None))
    patch.setattr(tensor_parallel.Leave, "backward", backward)


@killed_by(f"{STEPS}[tp-fused]")
def shared_key_value_heads_are_not_summed(patch):
    """Ranks with the same key/value head each keep the gradient of their own query heads."""
    original = sharding.add_axis

    def add_axis(parameter, axis, partial):
        original(parameter, axis, partial and axis.name != "kv")

    patch.setattr(sharding, "add_axis", add_axis)


@killed_by(f"{STEPS}[tp sp, all logits-plain]")
def norms_learn_from_their_own_tokens(patch):
    """Sequence parallelism forgets that the norms' gradients are sums over the whole sequence."""
    original = sharding.update

    def update(parameter, **changes):
        sp = "tp" in changes.get("partial", ())
        original(parameter, **({} if sp and parameter.dim() == 1 else changes))

    patch.setattr(sharding, "update", update)


@killed_by(f"{STEPS}[tp sp, all logits-fused]")
def every_shard_drops_like_the_first(patch):
    """Dropout takes a shard's first token for the sequence's."""

    def forward(self, x, where):
        return Dropout.forward(self.whole, x, type(where)(
            where.positions_T[: x.shape[1]], where.rows_B, where.step, where.seed))  # fmt: skip

    patch.setattr(sequence_parallel.LocalDropout, "forward", forward)


@killed_by(f"{STEPS}[zero2 tp sp-plain]")
def the_heads_gradient_is_summed_twice(patch):
    """The head gives every rank the whole gradient, and the border sums it once more."""
    backward = sequence_parallel.Gather.backward

    def remember(ctx, x, axis):
        ctx.axis = axis
        return sequence_parallel.gather(x, axis)

    patch.setattr(sequence_parallel.Join, "forward", staticmethod(remember))
    patch.setattr(sequence_parallel.Join, "backward", staticmethod(backward))


# ---- vocabulary


@killed_by("test_vocab_parallel.py::test_loss_and_gradients_equal_cross_entropy[37-3-1-plain]")
def every_rank_its_own_softmax(patch):
    """Sums relative to different largest logits are added as they are."""

    def merge(theirs, ranks):
        m, s, z = theirs.view(ranks, 3, -1).unbind(1)
        return m.amax(0), s.sum(0), z.sum(0)

    patch.setattr(vocab_parallel, "merge", merge)


@killed_by("test_vocab_parallel.py::test_loss_and_gradients_equal_cross_entropy[37-3-2-fused]")
def words_of_others_count_as_the_first(patch):
    """A label that another rank holds is taken for this rank's word 0."""
    patch.setattr(vocab_parallel.Shard, "local", lambda self, ids: (ids - self.bounds[0]).clamp(0))


# ---- ZeRO


@killed_by("test_zero_contract.py::test_calls_and_payload_are_the_contract[odd sizes-1-plain]")
def zero_is_data_parallelism(patch):
    """All gradients go to all ranks, which then forget most of them: the known cheat, right in
    every number and twice as expensive."""

    def scatter_sum(part, axis):
        return axis.all_reduce(part)[zero_module.mine(part, axis)]

    patch.setattr(zero_module, "scatter_sum", scatter_sum)


@killed_by("test_zero_contract.py::test_live_and_peak_bytes_are_the_contract[w0-g0-2-plain]")
def full_gradients_are_kept(patch):
    """Stage 2 reduces every gradient and forgets to free it."""

    def reduce(self, shard, parameter):
        shard.grad += zero_module.scatter_sum(parameter.grad, self.axis)
        parameter.grad.zero_()

    patch.setattr(zero_module.Stage2, "_reduce", reduce)


@killed_by("test_zero_contract.py::test_units_gathered_at_any_moment[plain]")
def gathered_weights_are_not_freed(patch):
    """Stage 3 keeps every layer that it has gathered."""
    patch.setattr(zero_module.Sharded, "close", lambda self: None)


@killed_by(f"{STEPS}[zero2-plain]")
def only_the_last_reduction_counts(patch):
    """Each micro-batch's gradient shard takes the place of the sum."""

    def reduce(self, shard, parameter):
        gradient, parameter.grad = parameter.grad, None
        shard.grad.copy_(zero_module.scatter_sum(gradient, self.axis))

    patch.setattr(zero_module.Stage2, "_reduce", reduce)


@killed_by(f"{STEPS}[zero1-fused]")
def new_weights_stay_at_home(patch):
    """The rows that a rank has stepped never reach the others."""
    patch.setattr(zero_module.Buckets, "publish", lambda self: None)


@killed_by(f"{STEPS}[zero1-plain]")
def the_norm_of_one_shard(patch):
    """Each rank clips by the norm of the rows that it holds."""
    patch.setattr(
        optim, "squared_norm",
        lambda parameters, world, axes: sum(p.grad.double().square().sum() for p in parameters),
    )  # fmt: skip


# ---- recomputation


@killed_by("test_activations.py::test_saved_bytes_equal_the_formula[grouped-dtype0-0.3-full-plain]")
def nothing_is_recomputed(patch):
    """All activations are kept, and the gradients are right."""
    patch.setattr(recompute, "run_twice", lambda module, inputs: module(*inputs))
