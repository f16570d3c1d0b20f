"""Router: which experts a token goes to, with what weight, and what keeps the experts busy alike.

Paper   softmax, top-k: Shazeer et al. 2017 (1701.06538), Mixtral (2401.04088), section 2.1.
        Sigmoid, bias, nodes, balance per sequence: DeepSeek-V3 (2412.19437), section 2.1.2.
        Capacity: GShard (2006.16668), algorithm 1; Switch (2101.03961), section 2.2. z: ST-MoE
        (2202.08906), equation 5
Idea    score     s = softmax or sigmoid of (x W^T), in float32 at least, for every expert
        choose    the k experts with the largest s + b; of equal ones the first. With groups: only
                  from the M groups whose k/M best experts add up to most
        gate      s of the chosen ones, divided by their sum: b decides who, never how much. With
                  k = 1 s itself (Switch, equation 2): divided it is 1, and teaches W nothing
        Left alone, few experts win, learn most, and win more. Against that:
        balance   loss + balance_loss * mean over sequences of sum_e f_e P_e. f_e: how often e was
                  chosen in the sequence, 1 if all are chosen alike; P_e: mean of its s / sum of s
        bias      after a step, b_e rises by balance_speed if e had fewer tokens than the mean of
                  the global batch, falls if it had more: no gradient, no loss
        z         loss + z_loss * mean over tokens of (log sum exp of the logits)^2: they stay small
        capacity  each sequence may send ceil(factor T k / E) tokens to an expert; later ones are
                  dropped there: first come, first served, and no token sees a later one. (GShard
                  serves every first choice before any second one, so that a later token may take
                  the place of an earlier one.) The other gates stay as they were
        All of it is a function of whole sequences, or of the global batch: no mesh changes it, up
        to rounding. But a choice is discrete: where two scores differ by less than rounding, a
        token may go elsewhere on another mesh. In bfloat16 it happens, and gradients of
        experts agree less well there than all others.
        A token without a label is routed and counted like any other; documents of one sequence
        share its balance and its capacity.
Dims    B micro-batch  T sequence  D width  E experts  N = B*T tokens  k experts of a token
        G groups of e = E/G experts, M of them open to a token  L layers
Read    Router.forward -> choose -> keep -> Router.penalty -> Attach -> settle
Tests   tests/test_router.py
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab.config import ModelConfig


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: sums over many elements need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalised(score: Tensor) -> Tensor:
    """Scores divided by their sum over the last dim; 0 where all of them are too small for it."""
    tiny = torch.finfo(score.dtype).tiny
    return score / score.sum(-1, keepdim=True).clamp_min(tiny)


class Router(nn.Module):
    """x [B, T, D] -> (experts [N, k] as integers, gates [N, k]); a dropped choice is expert E.

    A mesh changes three things, and no other: `scale` turns the sum of the penalties into a mean,
    1 / positions of the global batch; `share` is the part of them that this rank answers for;
    `over_sequence` adds up counts over the ranks that have parts of a sequence.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.experts, cfg.hidden_size))
        self.register_buffer("bias", torch.zeros(cfg.experts, dtype=torch.float64))
        self.scale, self.share, self.over_sequence = 1.0, 1.0, no_change
        self.forget()

    def forget(self) -> None:
        """Start to count anew: choices of each expert, choices dropped, sum of the balance loss."""
        self.counts_E, self.dropped, self.balance = 0, 0, 0.0

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        logits_BTE = F.linear(wide(x_BTD), wide(self.weight))
        score_BTE = logits_BTE.softmax(-1) if cfg.router == "softmax" else logits_BTE.sigmoid()
        expert_BTk = choose(score_BTE.detach() + self.bias, cfg)
        gate_BTk = score_BTE.gather(-1, expert_BTk)
        if cfg.top_k > 1:
            gate_BTk = normalised(gate_BTk)
        kept_BTk = keep(expert_BTk, cfg)
        gate_BTk = gate_BTk * kept_BTk
        if torch.is_grad_enabled():  # else there is no backward to penalise or to count
            penalty, seen = self.penalty(logits_BTE, score_BTE, expert_BTk)
            seen["dropped"] = (~kept_BTk).sum()
            gate_BTk = Attach.apply(gate_BTk, penalty, self, seen)
        expert_BTk = expert_BTk.masked_fill(~kept_BTk, cfg.experts)
        return expert_BTk.flatten(0, 1), gate_BTk.flatten(0, 1).to(x_BTD.dtype)

    def penalty(
        self, logits_BTE: Tensor, score_BTE: Tensor, expert_BTk: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar to add to the sum of token losses, what was counted on the way).

        Summed over positions, as losses are, f_e P_e of a sequence counts T times.
        """
        counts_BE = count(expert_BTk, self.cfg.experts)
        balance = logits_BTE.new_zeros(())
        if self.cfg.balance_loss > 0:  # over_sequence may send
            whole_BE = self.over_sequence(counts_BE).to(score_BTE.dtype)
            often_BE = whole_BE / whole_BE.mean(-1, keepdim=True)
            balance = (often_BE * normalised(score_BTE).sum(1)).sum()
        z = logits_BTE.logsumexp(-1).square().sum()
        penalty = self.cfg.balance_loss * balance + self.cfg.z_loss * z
        return penalty, {"counts_E": counts_BE.sum(0), "balance": balance.detach().double()}


def no_change(counts_BE: Tensor) -> Tensor:
    """On one device, all of a sequence is here."""
    return counts_BE


def count(expert_BTk: Tensor, experts: int) -> Tensor:
    """How often each sequence chose each expert: int64 [B, E]."""
    chosen = expert_BTk.flatten(1)
    counts_BE = chosen.new_zeros(len(chosen), experts)
    return counts_BE.scatter_add(1, chosen, torch.ones_like(chosen))


def choose(score_BTE: Tensor, cfg: ModelConfig) -> Tensor:
    """[B, T, E] -> the experts with the largest scores [B, T, k], best first, of equal ones the
    first; from cfg.top_groups of the cfg.expert_groups neighbouring groups of experts."""
    if cfg.top_groups < cfg.expert_groups:
        score_BTGe = score_BTE.unflatten(-1, (cfg.expert_groups, -1))
        few = max(1, cfg.top_k // cfg.top_groups)  # as many as a group gives on average
        group_BTG = score_BTGe.sort(-1, descending=True).values[..., :few].sum(-1)
        open_BTG = torch.zeros_like(group_BTG, dtype=torch.bool)
        open_BTG = open_BTG.scatter(-1, largest(group_BTG, cfg.top_groups), True)
        score_BTE = score_BTGe.masked_fill(~open_BTG[..., None], -math.inf).flatten(-2)
    return largest(score_BTE, cfg.top_k)


def largest(score_BTE: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last dim. torch.topk may return any of equal ones,
    and meshes must agree."""
    return score_BTE.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def keep(expert_BTk: Tensor, cfg: ModelConfig) -> Tensor:
    """[B, T, k] -> which choices the capacity leaves, first come, first served; all without it."""
    if cfg.capacity_factor == 0:
        return torch.ones_like(expert_BTk, dtype=torch.bool)
    T, k = expert_BTk.shape[1:]
    capacity = math.ceil(cfg.capacity_factor * T * k / cfg.experts)
    chosen = F.one_hot(expert_BTk.flatten(1), cfg.experts)  # [B, T*k, E]
    place = (chosen.cumsum(1) * chosen).sum(-1)  # 1 for the first choice of an expert
    return place.view_as(expert_BTk) <= capacity


class Attach(torch.autograd.Function):
    """Gates, unchanged; backward also starts one at the penalty, and counts what was seen.

    So the penalty needs no way through the layers above, and what recomputation runs twice counts
    once: backward passes here exactly once per micro-batch.
    """

    @staticmethod
    def forward(ctx, gate_BTk: Tensor, penalty: Tensor, router: Router, seen: dict) -> Tensor:
        ctx.router, ctx.seen, ctx.like = router, seen, penalty.new_ones(())
        return gate_BTk.view_as(gate_BTk)

    @staticmethod
    def backward(ctx, grad_BTk: Tensor) -> tuple[Tensor | None, ...]:
        router = ctx.router
        router.counts_E = router.counts_E + ctx.seen["counts_E"]
        router.dropped = router.dropped + ctx.seen["dropped"]
        router.balance = router.balance + ctx.seen["balance"]
        return grad_BTk, ctx.like * (router.scale * router.share), None, None


# ---- once per step


def routers(model: nn.Module) -> list[Router]:
    """All routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def begin_step(model: nn.Module, scale: float) -> None:
    """Before the forwards of a step whose penalties, summed over positions, count `scale` times."""
    for router in routers(model):
        router.scale = scale
        router.forget()


def settle(
    model: nn.Module, axis: Any, positions: int, copies: Any = None, pipeline: Any = None
) -> dict[str, float]:
    """After the backwards of a step: move every bias, and say how balanced the experts were.

    axis       over which counts are summed: ranks with other tokens (an Axis, all_reduce of
               L (E + 2))
    positions  in the global batch: the sum of the balance loss over them becomes a mean
    copies     over which they are summed again: ranks with copies of these layers, or None
    pipeline   over whose ranks the layers are dealt, or None
    Returns {} without experts; else balance_loss (mean over layers; about 1 is perfect; 0 unless
    asked for), busiest_expert (tokens of the busiest expert of any layer / mean), dropped_choices
    (choices, of which a token has k in each layer, all layers together).
    """
    layers = [r for r in routers(model) if isinstance(r.counts_E, Tensor)]
    if not layers and pipeline is None:
        return {}
    sums_3 = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    busiest = sums_3[0]
    if layers:
        rows = [torch.cat([r.counts_E.double(), r.dropped.double()[None], r.balance[None]])
                for r in layers]  # fmt: skip
        seen = axis.all_reduce(torch.stack(rows))
        seen = seen if copies is None else copies.all_reduce(seen)
        counts_LE, dropped, balance = seen[:, :-2], seen[:, -2], seen[:, -1]
        mean = counts_LE.mean(-1, keepdim=True)
        for router, move_E in zip(layers, (mean - counts_LE).sign(), strict=True):
            router.bias += router.cfg.balance_speed * move_E
        busiest = (counts_LE.amax(-1) / mean[:, 0]).max()
        if copies is None or copies.rank == 0:  # its copy would tell the same
            sums_3 = torch.stack([balance.sum(), balance.new_tensor(len(layers)), dropped.sum()])
    if pipeline is not None:
        sums_3, busiest = pipeline.all_reduce(sums_3), pipeline.all_reduce(busiest, "max")
    total, number, drops = sums_3.tolist()
    return {
        "balance_loss": total / number / positions,
        "busiest_expert": float(busiest),
        "dropped_choices": int(drops),
    }
