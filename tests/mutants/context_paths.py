"""Mutants of context parallelism: its plain and its fused paths, and its table."""

import torch

from mutants import killed_by
from picotron_lab import context_parallel, ulysses
from picotron_lab.analysis import context
from picotron_lab.attention_blocks import CpuFlash, FusedBlocks

BY_TORCH = "test_context_parallel.py::test_attention_equals_torchs"
TABLE = "test_context_parallel.py::test_the_table_predicts_what_it_measures"


@killed_by(f"{BY_TORCH}[3 ranks, 1 kv head-False-ring-fused]")
def late_sums_are_taken_for_the_next_blocks(patch):
    """The fused ring's sums are one step behind, and what a rank finds is added one step early: to
    the sums of the block before."""

    def visit_again(self, queries, block):
        sums = [context_parallel.wide_zeros(x) for x in block[:2]]
        for hops in range(self.axis.size):
            further = block if hops < self.axis.size - 1 else []
            context_parallel.add(sums, queries.meet(block, self.pieces(hops, queries)))
            arrived = self.pass_on([*further, *(sums if hops else [])], wait=False).wait()
            sums, block = arrived[len(further) :] or sums, arrived[: len(further)]
        return self.pass_on(sums)

    patch.setattr(context_parallel.FusedRing, "visit_again", visit_again)


@killed_by(f"{BY_TORCH}[4 ranks, 2 kv heads-False-all-gather-fused]")
def early_chunks_are_gathered_first(patch):
    """Keys lie as early, late, and are looked for as late, early."""

    def start(self, block):
        gathered, coming = [], []
        for x in block:
            halves = [self.axis.all_gather(half) for half in x.transpose(0, 1).chunk(2)]
            gathered.append(torch.cat(halves).transpose(0, 1))
        return gathered, coming

    patch.setattr(context_parallel.FusedGather, "start", start)


@killed_by(f"{BY_TORCH}[4 ranks, 2 kv heads-False-ulysses-fused]")
def key_value_heads_take_turns(patch):
    """Copies of heads a, b lie as a, b, a, b instead of a, a, b, b: queries meet others' keys."""
    original = ulysses.Ulysses.forward

    def forward(self, q, k, v, documents=None):
        copies = self._copies(q.shape[2], k.shape[2])
        return original(self, q, *(x.repeat(1, 1, copies, 1) for x in (k, v)), documents)

    patch.setattr(ulysses.Ulysses, "forward", forward)


@killed_by(f"{BY_TORCH}[2 ranks-True-zigzag-fused]")
def fused_blocks_see_other_documents(patch):
    """Documents reach the fused path, and forward ignores them."""
    original = FusedBlocks.attend

    def attend(self, q, k, v, causal, documents=None):
        return original(self, q, k, v, causal, None)

    patch.setattr(FusedBlocks, "attend", attend)


@killed_by(f"{BY_TORCH}[4 ranks, 2 kv heads-True-ring-fused]")
def blind_rows_count(patch):
    """A row that sees nothing of a block has lse 0, as torch's operator says: e^0, one key."""
    original = CpuFlash.mask
    patch.setattr(CpuFlash, "mask", lambda *given: (original(*given)[0], None))


@killed_by(f"{BY_TORCH}[2 ranks-True-zigzag-plain]")
def documents_stay_at_home(patch):
    """A block arrives without its documents, and is taken to be of the receiver's."""
    original = context_parallel.Queries.meet

    def meet(self, block, pieces):
        return original(self, [*block[:2], *self.documents], pieces)

    patch.setattr(context_parallel.Queries, "meet", meet)


@killed_by("test_context_parallel.py::test_pieces_are_all_that_is_not_future[FusedRing-zigzag-3]")
def mirrored_chunks_are_one(patch):
    """The fused path forgets that a rank of a zigzag holds two chunks."""
    original = context_parallel.FusedRing.pieces

    def pieces(self, hops, queries):
        ring = context_parallel.FusedRing(self.axis, "ring")
        return original(ring, hops, queries)

    patch.setattr(context_parallel.FusedRing, "pieces", pieces)


@killed_by("test_context_contract.py::test_no_tensor_has_scores_of_two_ranks[ring-fused-True]")
def documents_bring_the_whole_mask(patch):
    """Documents of all queries and keys are compared at once: T * S of them."""
    patch.setattr("picotron_lab.attention_blocks.Masked.most_rows", lambda *_: 2**30)


# ---- the table


@killed_by(TABLE)
def causal_attention_counts_as_whole(patch):
    """The meter takes a square of which half is hidden for all of it."""
    original = context.Watch.__torch_dispatch__

    def dispatch(self, func, types, args=(), kwargs=None):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        if func is flash and args[4:5] == (True,):
            self.operations += 2 * args[0].numel() * args[1].shape[2]
        return original(self, func, types, args, kwargs)

    patch.setattr(context.Watch, "__torch_dispatch__", dispatch)


@killed_by(TABLE)
def seven_bytes_are_received(patch):
    """The meter of what has come from other ranks shows a constant."""
    constant = property(lambda self: 7, lambda self, value: None)
    patch.setattr(context.Watch, "most_received", constant, raising=False)
