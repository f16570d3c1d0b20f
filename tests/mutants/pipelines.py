"""Mutants of pipelines: the executor, its stages, their copies, the vocabulary's passes."""

import torch

from mutants import killed_by
from picotron_lab import (
    build,
    pipeline_channels,
    pipeline_parallel,
    pipeline_stages,
    pipeline_vocabulary,
    post_validation,
    sharding,
)
from picotron_lab.model import initial_value

TRAINS = "test_pipeline_parallel.py::test_trains_as_one_device_and_keeps_the_contract"
PRODUCT = "test_pipeline_trainer.py::test_products_equal_one_device"


@killed_by(f"{TRAINS}[1f1b p4 m2 fused dense even]")
def every_stage_draws_the_first_layers(patch):
    """Each stage seeds anew and counts its layers from 0, so that all stages begin alike
    (Picotron)."""
    original = build.build_model

    def build_model(*args):
        part = original(*args)
        for stage in part.stages.values():
            local = {old: str(new) for new, old in enumerate(stage.layers)}
            for p in stage.parameters():
                words = p.record.name.split(".")
                name = ".".join(local.get(word, word) for word in words)
                drawn = initial_value(name, p.record.shape, sharding.generator_of(0, name))
                with torch.no_grad():
                    p.copy_(drawn)
        return part

    patch.setattr(build, "build_model", build_model)


@killed_by(f"{TRAINS}[zb-h1 p4 m2 plain dense even]")
def loss_of_pipelines_not_divided_by_microbatches(patch):
    """Every micro-batch counts as if it were the only one (Picotron)."""
    original = pipeline_parallel.Executor.run

    def run(self, batches, tokens):
        return original(self, batches, tokens / len(batches))

    patch.setattr(pipeline_parallel.Executor, "run", run)


@killed_by("test_pipeline_trainer.py::test_micro_batches_of_different_sizes[1f1b-Executor]")
def all_messages_have_the_first_ones_shape(patch):
    """A ragged last batch breaks the receive (Picotron)."""

    def like(self, i):
        return next(iter(self.stages.values())).boundary(self.batches[0][0])

    patch.setattr(pipeline_parallel.Executor, "_like", like)


@killed_by(f"{TRAINS}[1f1b p3 m2 plain tied, dropout even]")
def tied_copies_do_not_add_up(patch):
    """First and last stage each train a copy of the tied embedding with half of its gradient."""
    patch.setattr(pipeline_stages, "copies", lambda model, axis, schedule: {})


@killed_by(f"{TRAINS}[dualpipe p2 m6 plain tied, experts even]")
def directions_of_dualpipe_do_not_add_up(patch):
    """Each copy of a stage learns from its own direction's micro-batches only."""
    patch.setattr(pipeline_stages, "copies", lambda model, axis, schedule: {})


@killed_by(f"{TRAINS}[zb-h1 p3 m2 fused tied, dropout even]")
def matmuls_that_waited_are_forgotten(patch):
    """W does what came by the way, norm weights and such, and nothing else."""
    for executor in (pipeline_parallel.Executor, pipeline_parallel.FusedExecutor):
        patch.setattr(executor, "_multiply", lambda *args: None)


@killed_by(f"{TRAINS}[zb-v p3 m2 plain tied, dropout even]")
def one_channel_for_both_kinds(patch):
    """What comes first is taken for what is wanted, be it an activation or a gradient."""
    original = pipeline_channels.pair_up
    patch.setattr(
        pipeline_channels, "pair_up", lambda axis, name, pairs: original(axis, "pp", pairs)
    )


@killed_by(f"{PRODUCT}[dp zero1]")
def sums_leave_after_the_first_backward(patch):
    """Data parallelism sends the gradients of the first micro-batch, and never the others."""

    def first_backwards(actions):
        firsts = {}
        for i, action in enumerate(actions):
            if action.kind in ("BW", "W"):
                firsts.setdefault(action.stage, i)
        return set(firsts.values())

    patch.setattr(pipeline_parallel, "last_backwards", first_backwards)


@killed_by(f"{PRODUCT}[dp ep]")
def copies_of_a_router_count_by_themselves(patch):
    """Each copy of DualPipe moves its bias by the tokens of its own direction."""
    original = build.pipeline_stages.copies

    def copies(model, axis, schedule):
        return {f"not {name}": other for name, other in original(model, axis, schedule).items()}

    patch.setattr(build.pipeline_stages, "copies", copies)


@killed_by(f"{TRAINS}[1f1b-vocab1 p3 m2 plain tied, dropout even]")
def first_stage_sees_its_own_words_only(patch):
    """The embedding starts from the rows of rank 0, and tokens of other ranks are zeros."""
    original = pipeline_vocabulary.Words._look_up

    def look_up(self, i, received):
        original(self, i, received)
        own = self.embed.look_up(self.batches[i][0]).detach()
        handle = self.sums[i]
        handle.wait()
        self.sums[i] = type("Handle", (), {"wait": lambda self: own})()

    patch.setattr(pipeline_vocabulary.Words, "_look_up", look_up)


@killed_by("test_pipeline_trainer.py::test_post_validation_equals_clipping_together[sgd]")
def wrong_steps_stay(patch):
    """A stage that stepped with too large gradients learns it, and steps once more."""
    patch.setattr(post_validation.PostValidation, "_undo", lambda self: None)
