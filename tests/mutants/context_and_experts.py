"""Mutants of context and expert parallelism, and of the router."""

import torch
import torch.nn.functional as F

from mutants import killed_by
from picotron_lab import (
    context_parallel,
    data_parallel,
    expert_parallel,
    optim,
    router,
    sharding,
    tensor_parallel,
)  # fmt: skip
from picotron_lab.attention_blocks import PlainBlocks
from picotron_lab.comm import Alone, Axis
from picotron_lab.ledger import Ledger

STEPS = "test_build.py::test_three_clipped_steps_equal_one_device"
TRAFFIC = "test_context_contract.py::test_traffic_is_the_contract_of_each_layer"
ONE_DEVICE = "test_context_parallel.py::test_loss_and_gradients_equal_one_device"


# ---- context parallelism


@killed_by(f"{STEPS}[cp-plain]")
def parts_of_a_sequence_do_not_sum_gradients(patch):
    """Without data parallelism nobody sums gradients over cp: the ranks drift apart (Picotron)."""
    original = data_parallel.synchroniser

    def synchroniser(step, parameters, axis, *options):
        return original(step, parameters, Axis(axis.name, [0], 0, Alone(), Ledger()), *options)

    patch.setattr(data_parallel, "synchroniser", synchroniser)


@killed_by(f"{STEPS}[cp-fused]")
def positions_start_at_zero_on_every_rank(patch):
    """Tokens are dealt rightly, but each rank takes its own for the beginning of the sequence:
    rotary angles and dropout masks are those of other tokens."""
    original = context_parallel.positions

    def positions(kind, length, axis):
        mine = original(kind, length, axis)
        return torch.arange(len(mine))

    patch.setattr(context_parallel, "positions", positions)


@killed_by(f"{TRAFFIC}[3 ranks, 1 kv head, documents-ring-plain]")
def heads_are_expanded_before_they_travel(patch):
    """Every query head's own copy of K and V goes round the ring (Picotron)."""
    original = context_parallel.Ring.forward

    def forward(self, q, k, v, documents=None):
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        return original(self, q, k, v, documents)

    patch.setattr(context_parallel.Ring, "forward", forward)


@killed_by("test_attention_blocks.py::test_huge_scores_do_not_overflow[plain-torch.float32]")
def sums_are_merged_without_their_largest_score(patch):
    """Blocks are added up with weights exp(lse), which overflow."""

    def merge(self, out, lse, block_out, block_lse):
        old, new = lse.exp(), block_lse.exp()
        share = (new / (old + new)).transpose(1, 2)[..., None]
        out += share * (block_out - out)
        lse.copy_((old + new).log())

    patch.setattr(PlainBlocks, "merge", merge)


@killed_by(f"{ONE_DEVICE}[2 ranks-ring-plain]")
def a_rank_sees_the_future_of_its_own_chunk(patch):
    """The block on the diagonal is taken for one of the past: no mask."""
    original = context_parallel.pairs_of_chunks

    def pairs_of_chunks(*args):
        return [piece._replace(causal=False) for piece in original(*args)]

    patch.setattr(context_parallel, "pairs_of_chunks", pairs_of_chunks)


@killed_by("test_context_contract.py::test_work_of_the_busiest_rank[zigzag-plain-4]")
def both_chunks_of_a_rank_are_neighbours(patch):
    """Zigzag in name only: the plain path's numbers stay right, and all wait for the last rank."""

    def chunks(kind, rank, size):
        return (2 * rank, 2 * rank + 1) if kind == "zigzag" and size > 1 else (rank,)

    patch.setattr(context_parallel, "chunks", chunks)


@killed_by(f"{ONE_DEVICE}[2 ranks-zigzag-plain]")
def gradients_of_keys_do_not_come_home(patch):
    """The sums of dK and dV travel with their block, but not the last hop."""

    def visit_again(self, queries, block):
        sums = [torch.zeros_like(x) for x in block[:2]]
        for hops in range(self.axis.size):
            context_parallel.add(sums, queries.meet(block, self.pieces(hops, queries)))
            if hops < self.axis.size - 1:
                *block, sums[0], sums[1] = self.pass_on([*block, *sums])
        return sums

    patch.setattr(context_parallel.Ring, "visit_again", visit_again)


@killed_by(f"{ONE_DEVICE}[2 ranks-ring-plain]")
def backward_takes_each_blocks_own_softmax(patch):
    """Probabilities of the second look are normalised over one block, not over the whole row."""
    original = PlainBlocks.attend_backward

    def attend_backward(self, grad, qkv, whole, causal, documents=None):
        own = self.attend(*qkv, causal, documents)
        return original(self, grad, qkv, own, causal, documents)

    patch.setattr(PlainBlocks, "attend_backward", attend_backward)


# ---- expert parallelism


@killed_by(f"{STEPS}[ep-plain]")
def other_experts_gradients_are_added(patch):
    """Gradients of experts are summed over all data-parallel ranks, who hold other experts."""
    patch.setattr(expert_parallel, "expert_parameters", lambda model: [])


@killed_by("test_expert_models.py::test_inside_tensor_parallelism[none-False-plain]")
def every_rank_answers_for_the_whole_balance_loss(patch):
    """Tensor-parallel ranks each compute the balance loss, and their gradients are summed."""
    original = tensor_parallel.ParallelMoE.__init__

    def init(self, whole, crossing):
        original(self, whole, crossing)
        whole.router.share = 1.0

    patch.setattr(tensor_parallel.ParallelMoE, "__init__", init)


@killed_by("test_expert_contract.py::test_what_all_ranks_send_to_one[plain]")
def rows_are_padded_to_the_busiest_expert(patch):
    """Every rank gets as many rows, some of them empty: equal splits, and the known waste."""
    original = expert_parallel.Travel.forward

    def forward(ctx, rows, axis, send, receive):
        longest = int(axis.all_reduce(torch.tensor(max(send)), "max"))
        padded = torch.cat([F.pad(x, (0, 0, 0, longest - len(x))) for x in rows.split(list(send))])
        arrived = axis.all_to_all(padded).view(axis.size, longest, -1)
        real = torch.cat([x[:n] for x, n in zip(arrived, receive, strict=True)])
        assert torch.equal(real, original(ctx, rows, axis, send, receive))
        return real

    patch.setattr(expert_parallel.Travel, "forward", staticmethod(forward))


@killed_by("test_expert_parallel.py::test_all_tokens_to_one_expert[2-plain]")
def a_full_expert_drops_what_comes(patch):
    """Nobody asked for a capacity, and choices above twice the fair share are dropped."""
    original = expert_parallel.run_plain

    def run_plain(layer, x, expert, gate):
        E = layer.router.cfg.experts
        chosen = F.one_hot(expert.flatten(), E)
        place = (chosen.cumsum(0) * chosen).sum(-1).view_as(expert)
        return original(layer, x, expert.masked_fill(place > 2 * len(x) / E, E), gate)

    patch.setattr(expert_parallel, "run_plain", run_plain)


@killed_by(f"{STEPS}[ep-fused]")
def a_replica_counts_in_the_norm_as_often_as_it_is_held(patch):
    """Experts, which fewer ranks hold, count less than others in the gradient norm."""
    original = sharding.squared_norm

    def squared_norm(parameters, world, axes):
        return original(parameters, world, axes | {"expert_replica": axes["dp"]})

    patch.setattr(optim, "squared_norm", squared_norm)


# ---- the router


@killed_by("test_router.py::test_of_equal_experts_the_first_win[softmax-dtype0]")
def of_equal_experts_the_last_wins(patch):
    """The order of equal scores is left to chance: meshes may choose different experts."""

    def largest(score, count):
        return score.shape[-1] - 1 - score.flip(-1).sort(dim=-1, descending=True, stable=True)[1][
            ..., :count
        ]

    patch.setattr(router, "largest", largest)


@killed_by("test_router_penalties.py::test_only_backward_counts")
def what_runs_twice_counts_twice(patch):
    """Choices are counted in forward: validation counts, and recomputation counts again."""
    original = router.Attach.forward

    def forward(ctx, gate, penalty, mine, seen):
        mine.counts_E = mine.counts_E + seen["counts_E"]
        return original(ctx, gate, penalty, mine, seen)

    patch.setattr(router.Attach, "forward", staticmethod(forward))
