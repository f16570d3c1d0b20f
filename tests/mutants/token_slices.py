"""Mutants of token slices: what one slice leaves for the others."""

from dataclasses import replace

from mutants import killed_by
from picotron_lab import token_pipeline, token_slices

TRAINS = "test_token_schedules.py::test_trains_as_one_device"


@killed_by(f"{TRAINS}[zb-h1 p2 m2 plain dense even slices 1,2,1]")
def keys_of_earlier_slices_are_constants(patch):
    """A slice learns nothing from the queries of later ones: its loss still falls."""
    original = token_pipeline.Parts.settle

    def settle(self, first, found):
        self.sums = []
        return original(self, first, found)

    patch.setattr(token_pipeline.Parts, "settle", settle)


@killed_by(f"{TRAINS}[zb-h2 p2 m3 fused dense even slices 2]")
def fused_slices_forget_what_later_ones_sent(patch):
    """The same in the fused path: the buffer of gradients is never read."""
    patch.setattr(token_pipeline.Buffer, "add", lambda self, found: None)


@killed_by(f"{TRAINS}[zb-h1 p2 m2 plain dense even slices 1,2,1]")
def every_slice_starts_at_position_0(patch):
    """Rotary positions count anew in each slice."""
    original = token_slices.cut

    def cut(batch, lengths):
        return [
            (tokens, labels, replace(where, positions_T=where.positions_T - where.first))
            for tokens, labels, where in original(batch, lengths)
        ]

    patch.setattr(token_slices, "cut", cut)


@killed_by(f"{TRAINS}[zb-h1 p2 m2 plain dense even slices 1,2,1]")
def a_slice_sees_its_own_future(patch):
    """The causal mask is left out inside a slice."""
    original = token_pipeline.SliceCore.blocks

    class Open(type(original)):
        def attend(self, q, k, v, causal, documents=None):
            return original.attend(q, k, v, False, documents)

    patch.setattr(token_pipeline.SliceCore, "blocks", Open())
