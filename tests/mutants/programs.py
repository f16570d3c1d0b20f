"""Mutants of one controller with many programs: what is placed where, summed, and freed."""

from dataclasses import replace

from mutants import killed_by
from picotron_lab import mpmd_program

MODELS = "test_mpmd.py::test_other_models"


@killed_by(f"{MODELS}[tied-1f1b]")
def parts_of_a_shared_gradient_stay_where_they_are(patch):
    """A weight of two stages learns from the one that is its home alone."""
    patch.setattr(mpmd_program.Placing, "bring_home", lambda self: None)


@killed_by("test_mpmd.py::test_three_layers_are_exactly_those_of_one_device[1f1b-fused]")
def every_micro_batch_begins_a_new_sum(patch):
    """Gradients of the last micro-batch only."""
    original = mpmd_program.Placing._add

    def add(self, actor, total, value):
        self.begun.discard(total)
        original(self, actor, total, value)

    patch.setattr(mpmd_program.Placing, "_add", add)


@killed_by("test_mpmd_program.py::test_values_are_there_when_used_and_gone_at_the_end")
def nothing_is_ever_freed(patch):
    """All activations of a step stay until its end."""
    patch.setattr(mpmd_program, "freed", lambda order, kept: order)


@killed_by("test_mpmd.py::test_five_steps_of_sgd[tied]")
def copies_of_shared_weights_grow_old(patch):
    """After an update the other users of a weight go on with the old one."""
    original = mpmd_program.program

    def program(*args):
        return replace(original(*args), publish=())

    patch.setattr("picotron_lab.mpmd.program", program)
