"""Expert parallelism: each rank keeps some experts; tokens travel to theirs, and back.

Paper   Lepikhin et al. 2020, "GShard", sections 2.2 and 3.1 (2006.16668); top-1: Switch
        (2101.03961), section 2.1. Groups of experts, a shared one: DeepSeek-V3 (2412.19437),
        sections 2.1.2 and 3.2. Nothing padded, nothing dropped: MegaBlocks (2211.15841)
Idea    A mixture of experts computes with k of E experts per token, but all E want room. Ranks have
        other tokens each: let them share the experts out, and move the tokens:
            count     how many rows go to each expert: every rank tells every rank
            dispatch  a row per choice, sorted by expert, goes to the rank of that expert
            compute   every expert has the rows of all ranks, and so the gradient of one device
            combine   rows go back the way they came; a token adds up its k, weighted by its gates
        Shards of an all_to_all are uneven here: as long as the routing makes them. What is sent is
        what was routed. With groups of experts, whole groups to a rank, a token reaches at most
        top_groups ranks; checks.py asks that groups and ranks end together.
        The usual mistakes: experts' gradients summed over ranks once more; rows padded to a
        capacity, or dropped by it unasked; rows that came by source taken for sorted by expert; a
        rank or an expert without rows that leaves backward out, while the others wait for it.
Before  every rank: E experts, 3 E D F weights; N k rows go through them
After   rank r of n: E/n experts, rounded up or down, and as many rows of all ranks as chose them.
        Router, shared expert, and all else are whole
Wire    M rows leave a rank, R come, e bytes per element: forward all_gather(n E counts of 8 bytes),
        all_to_all(M D e), all_to_all(R D e); backward the same two. M = N k, if none is dropped;
        so is R, if all experts are liked alike
Axes    ep: parts of the experts; its ranks have other tokens each
Dims    B micro-batch  T sequence  N = B*T tokens  k experts of a token  D width  F feed-forward
        width  E experts, e of them this rank's  M rows sent  R rows received  n ranks
Read    ExpertParallel -> Deal -> Travel -> run_plain -> parallelize -> Trip -> run_fused ->
        contract; who chooses: router.py. Matmuls of the fused path: grouped_experts.py; torch's
        grouped_mm where that pays, on CUDA, else a loop over experts
Try     python -m picotron_lab.expert_parallel
Tests   tests/test_expert_parallel.py, tests/test_expert_models.py, tests/test_expert_contract.py
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from picotron_lab import sharding
from picotron_lab.comm import Axis, Handle
from picotron_lab.config import ModelConfig
from picotron_lab.grouped_experts import GroupedExperts, combine, permute, sort_choices
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.model import MLP, MoE, initial_value

# ---- 1. the idea


class ExpertParallel(nn.Module):
    """A MoE that keeps this rank's experts: x [B, T, D] of its own tokens -> [B, T, D].

    impl     "plain" | "fused"
    experts  one module: (rows [R, D], sorted by expert; counts [e], int64) -> [R, D]
    """

    def __init__(self, whole: MoE, axis: Axis, impl: str):
        super().__init__()
        self.router, self.shared, self.axis = whole.router, whole.shared, axis
        make, self.run = {"plain": (Experts, run_plain), "fused": (GroupedExperts, run_fused)}[impl]
        first, last = sharding.share_out(len(whole.experts), axis.size, axis.rank)
        self.experts = make(list(whole.experts)[first:last])

    def forward(self, x_BTD: Tensor) -> Tensor:
        expert_Nk, gate_Nk = self.router(x_BTD)
        return self.run(self, x_BTD.flatten(0, 1), expert_Nk, gate_Nk).view_as(x_BTD)


class Deal(NamedTuple):
    """How many rows go where: send[j] to rank j, receive[i] from rank i."""

    send: list[int]
    receive: list[int]
    counts_ne: Tensor  # what each rank has for each of this rank's experts

    @staticmethod
    def of(counts_nE: Tensor, axis: Axis) -> "Deal":
        """From what each rank has for each expert. Here, once per layer, the host waits for the
        device: it must know how many rows will come."""
        n, E = counts_nE.shape
        table, parts = counts_nE.tolist(), [sharding.share_out(E, n, rank) for rank in range(n)]
        first, last = parts[axis.rank]
        send = [sum(table[axis.rank][start:stop]) for start, stop in parts]
        receive = [sum(row[first:last]) for row in table]
        return Deal(send, receive, counts_nE[:, first:last])

    def arrivals(self) -> Tensor:
        """The expert of each row that came, sorted by source and then by expert: [R], counted from
        this rank's first."""
        n, e = self.counts_ne.shape
        expert_ne = torch.arange(e, device=self.counts_ne.device).repeat(n)
        times, rows = self.counts_ne.flatten(), sum(self.receive)
        return expert_ne.repeat_interleave(times, output_size=rows)


class Travel(torch.autograd.Function):
    """Waits: shard -> shard (all_to_all, M D: row i goes where `send` says), backward R D, the way
    back. What overlaps is the pair of Depart and Arrive.

    Every rank comes, with or without rows: an empty shard has a gradient as well."""

    @staticmethod
    def forward(
        ctx, rows_MD: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return axis.all_to_all(rows_MD, send, receive)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.all_to_all(grad_RD, ctx.receive, ctx.send), None, None, None


# ---- 2. plain path


class Experts(nn.Module):
    """This rank's experts, one after the other. One without rows is called, too: its gradient is
    zero, not missing."""

    def __init__(self, experts: Sequence[MLP]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x_RD: Tensor, counts_e: Tensor) -> Tensor:
        if len(self.experts) == 0:
            return x_RD  # there are no rows
        parts = zip(self.experts, x_RD.split(counts_e.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts])


def run_plain(layer: ExpertParallel, x_ND: Tensor, expert_Nk: Tensor, gate_Nk: Tensor) -> Tensor:
    """Sort, send, compute, send back, add up: [N, D]."""
    axis, E, k = layer.axis, layer.router.cfg.experts, expert_Nk.shape[1]
    counts_E = expert_Nk.flatten().bincount(minlength=E + 1)[:E]
    choice_M = expert_Nk.flatten().argsort(stable=True)[: counts_E.sum()]  # dropped ones are last
    token_M = choice_M // k
    deal = Deal.of(axis.all_gather(counts_E[None]), axis)

    arrived_RD = Travel.apply(x_ND[token_M], axis, deal.send, deal.receive)
    by_expert_R = deal.arrivals().argsort(stable=True)
    out_RD = layer.experts(arrived_RD[by_expert_R], deal.counts_ne.sum(0))
    by_source_R = by_expert_R.argsort()  # the inverse
    back_MD = Travel.apply(out_RD[by_source_R], axis, deal.receive, deal.send)

    out_ND = torch.zeros_like(x_ND) if layer.shared is None else layer.shared(x_ND)
    return out_ND.index_add(0, token_M, back_MD * gate_Nk.flatten()[choice_M, None])


def parallelize(model: nn.Module, axis: Axis, impl: str) -> None:
    """Replace every MoE inside a model on the meta device, parts of other techniques included.

    axis     ranks that hold the same model and other tokens
    impl     "plain" | "fused"

    Call it before any replicas over `axis` are recorded: it leaves records as they are, for each of
    those ranks will hold other experts, with whole gradients. Afterwards call
    data_parallel.parallelize and name the experts, which fewer ranks hold; it would take them for
    replicas like all else. Freeze parameters on all ranks alike; and everything below a layer only
    if each rank has an expert, for one without any gradient to compute would miss backward's calls.
    AssertionError after such replicas, and for a MoE by itself, which no parent holds.
    """
    assert not isinstance(model, MoE), (
        "a MoE by itself cannot be replaced in place: give a module that contains it, such as "
        "nn.Sequential(moe)."
    )
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, MoE):
                check_held_once(part, axis)
                setattr(module, name, ExpertParallel(part, axis, impl))


def check_held_once(whole: MoE, axis: Axis) -> None:
    """Nobody may have said of an expert that all ranks of `axis` hold it: one of them will."""
    for parameter in whole.experts.parameters():
        record = parameter.record
        assert axis.name not in record.replicas + record.partial, (
            f"{record.name} is recorded as a replica over {axis.name}, among whose ranks experts "
            "are to be shared out: call expert_parallel.parallelize first, then sharding.add_axis, "
            "for experts over the ranks that hold the same ones."
        )


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that belongs to experts a token chooses; shared ones and routers do not."""
    layers = [module for module in model.modules() if isinstance(module, ExpertParallel | MoE)]
    return [parameter for layer in layers for parameter in layer.experts.parameters()]


# ---- 3. fused path


class Trip:
    """What the overlapping pair, Depart and Arrive, shares: one all_to_all, under way while the
    shared expert computes, forward and backward.

    Autograd goes back first through what was made last: Arrive, shared expert, Depart.
    """

    def __init__(self, axis: Axis, deal: Deal):
        self.axis, self.deal = axis, deal
        self.under_way: Handle | None = None

    def land(self) -> Tensor:
        """What has arrived."""
        handle, self.under_way = self.under_way, None
        return handle.wait()


class Depart(torch.autograd.Function):
    """Begins what Arrive ends, without waiting: shard -> shard (all_to_all, M D). Rows [M, D] -> a
    ticket, for Arrive alone.

    backward: waits until the gradients of the rows have come."""

    @staticmethod
    def forward(ctx, rows_MD: Tensor, trip: Trip) -> Tensor:
        ctx.trip, deal = trip, trip.deal
        trip.under_way = trip.axis.all_to_all(rows_MD, deal.send, deal.receive, wait=False)
        return rows_MD.new_empty(0)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.land(), None


class Arrive(torch.autograd.Function):
    """Ends what Depart began, and waits for it: a ticket -> rows [R, D].

    backward: begins shard -> shard (all_to_all, R D), without waiting."""

    @staticmethod
    def forward(ctx, ticket: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.land()

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None]:
        trip, deal = ctx.trip, ctx.trip.deal
        trip.under_way = trip.axis.all_to_all(grad_RD, deal.receive, deal.send, wait=False)
        return grad_RD.new_empty(0), None


def run_fused(layer: ExpertParallel, x_ND: Tensor, expert_Nk: Tensor, gate_Nk: Tensor) -> Tensor:
    """The same with one kernel to sort, one to copy rows, one to add them up, and the matmuls of
    all experts in one."""
    cfg = layer.router.cfg
    place_Nk, counts_E = sort_choices(expert_Nk, cfg.experts)
    rows = expert_Nk.numel() if cfg.capacity_factor == 0 else int(counts_E.sum())
    if layer.axis.size == 1:  # nothing to send, and nothing to wait for
        back_MD = layer.experts(permute(x_ND, place_Nk, rows), counts_E)
        shared_ND = shared_part(layer, x_ND)
    else:
        counts_nE = layer.axis.all_gather(counts_E[None], wait=False)
        rows_MD = permute(x_ND, place_Nk, rows)  # while the counts travel
        deal = Deal.of(counts_nE.wait(), layer.axis)
        back_MD, shared_ND = there_and_back(layer, x_ND, rows_MD, deal)
    out_ND = combine(back_MD, place_Nk, gate_Nk)
    return out_ND if shared_ND is None else out_ND + shared_ND


def there_and_back(
    layer: ExpertParallel, x_ND: Tensor, rows_MD: Tensor, deal: Deal
) -> tuple[Tensor, Tensor | None]:
    """(what experts make of the rows [M, D], what the shared one makes of the tokens [N, D])."""
    trip = Trip(layer.axis, deal)
    ticket = Depart.apply(rows_MD, trip)
    shared_ND = shared_part(layer, x_ND)
    arrived_RD = Arrive.apply(ticket, trip)
    e, R = deal.counts_ne.shape[1], len(arrived_RD)
    by_expert_R1, counts_e = sort_choices(deal.arrivals()[:, None], e)
    rows_R1 = torch.arange(R, device=by_expert_R1.device)[:, None]
    by_source_R1 = torch.empty_like(by_expert_R1).scatter_(0, by_expert_R1, rows_R1)  # inverse
    out_RD = layer.experts(permute(arrived_RD, by_expert_R1, R), counts_e)
    back_RD = permute(out_RD, by_source_R1, R)
    return Travel.apply(back_RD, layer.axis, deal.receive, deal.send), shared_ND


def shared_part(layer: ExpertParallel, x_ND: Tensor) -> Tensor | None:
    """What the expert of all tokens adds, if there is one."""
    return None if layer.shared is None else layer.shared(x_ND)


# ---- 4. contract


def contract(
    sent: int, received: int, width: int, n: int, experts: int
) -> dict[str, tuple[int, int]]:
    """{"forward all_to_all": (calls, payload bytes), ...} of one rank, layer and micro-batch.

    sent      rows M: choices of this rank's tokens that were kept
    received  rows R: choices of this rank's experts. Over all ranks both add up to the same
    width     bytes of a row: D times those of an element
    """
    moved = 2, (sent + received) * width
    counts = 1, n * experts * 8
    return {
        "forward all_gather": counts, "forward all_to_all": moved, "backward all_to_all": moved
    }  # fmt: skip


def ranks_per_token(expert_Nk: Tensor, experts: int, n: int) -> Tensor:
    """How many of n ranks each token's choices go to: int64 [N]."""
    rank_E = torch.empty(experts + 1, dtype=torch.int64)
    for rank in range(n):
        rank_E[slice(*sharding.share_out(experts, n, rank))] = rank
    rank_E[experts] = n  # of a dropped choice: nobody
    reached = torch.zeros(len(expert_Nk), n + 1, dtype=torch.int64)
    reached.scatter_(1, rank_E[expert_Nk], 1)
    return reached[:, :n].sum(1)


DEMO = ModelConfig(hidden_size=16, ffn_size=32, experts=8, top_k=4, shared_experts=1)
FORMULAS = {
    "forward all_gather": "n, n n E 8", "forward all_to_all": "2n, 2n N k D 4",
    "backward all_to_all": "2n, 2n N k D 4", "rows to experts, back": "n N k, n N k",
    "experts, bytes": "E, 3 E D F 4",
}  # fmt: skip


def main() -> None:
    """A layer on 4 threads whose tokens may go to any expert, or to 2 groups, one on each rank."""
    n, (B, T) = 4, (2, 12)
    N, D, F, E, k = B * T, DEMO.hidden_size, DEMO.ffn_size, DEMO.experts, DEMO.top_k
    print(f"{n} ranks of N {N} tokens each, k {k} of E {E} experts, D {D}, F {F}, float32")
    one = contract(N * k, N * k, 4 * D, n, E)
    predicted = {name: (n * calls, n * size) for name, (calls, size) in one.items()}
    predicted["rows to experts, back"] = n * N * k, n * N * k
    predicted["experts, bytes"] = E, 3 * E * D * F * 4
    for impl, groups, most in (("plain", 1, 1), ("fused", 1, 1), ("plain", n, 2)):
        cfg = replace(DEMO, expert_groups=groups, top_groups=most)
        seen = run_ranks(demo, n, cfg, impl, (B, T))
        print(f"\n{impl:24} {'all ranks':16} {'predicted':>12} {'measured':>12}")
        for name, formula in FORMULAS.items():
            total = [sum(counts) for counts in zip(*(rank[name] for rank in seen), strict=True)]
            columns = ("{} {:7}".format(*counts) for counts in (predicted[name], total))
            print(f"{name:24} {formula:16}", *(f"{column:>12}" for column in columns))
        formula, reach = ("min(k, n)", min(k, n)) if groups == 1 else ("top_groups", most)
        found = max(rank["ranks of a token"][0] for rank in seen)
        print(f"{'ranks of a token, most':24} {formula:16} {reach:12} {found:12}")


def demo(axis: Axis, cfg: ModelConfig, impl: str, shape: tuple[int, int]) -> dict[str, tuple]:
    """What one rank sends, computes and holds in a layer with tokens of its own."""
    with torch.device("meta"):
        model = nn.Sequential(MoE(cfg))  # in something: parallelize replaces it there
    sharding.attach(model)
    parallelize(model, axis, impl)
    sharding.materialise(model, 0, initial_value)
    held, measured = expert_parameters(model), {}
    measured["experts, bytes"] = len(held) // 3, sum(p.nbytes for p in held)

    def note_rows(_: nn.Module, inputs: tuple, out_RD: Tensor) -> None:
        measured["rows to experts, back"] = len(inputs[0]), len(out_RD)

    def note_ranks(_: nn.Module, inputs: tuple, chosen: tuple) -> None:
        reached_N = ranks_per_token(chosen[0], cfg.experts, axis.size)
        measured["ranks of a token"] = (int(reached_N.max()),)

    model[0].experts.register_forward_hook(note_rows)
    model[0].router.register_forward_hook(note_ranks)
    dice = torch.Generator().manual_seed(axis.rank)
    x_BTD = torch.randn(*shape, cfg.hidden_size, generator=dice).requires_grad_()
    loss = model(x_BTD).square().sum()
    measured |= tally(axis.ledger, "forward")
    axis.ledger.clear()
    loss.backward()
    return measured | tally(axis.ledger, "backward")


def tally(ledger: Ledger, direction: str) -> dict[str, tuple[int, int]]:
    """What a ledger holds, in the form of `contract`."""
    ops = sorted({call.op for call in ledger.calls})
    return {f"{direction} {op}": (len(ledger.select(op)), ledger.bytes(op)) for op in ops}


if __name__ == "__main__":
    main()
