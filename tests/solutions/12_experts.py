"""Lesson 12, solved."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from picotron_lab import expert_parallel, router
from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig


class Travel(torch.autograd.Function):
    """The library's, with its arguments in another order."""

    @staticmethod
    def forward(ctx, rows_MD: Tensor, send: list[int], receive: list[int], ep: Axis) -> Tensor:
        return expert_parallel.Travel.forward(ctx, rows_MD, ep, send, receive)

    backward = staticmethod(expert_parallel.Travel.backward)


def moe(
    x_ND: Tensor, expert_Nk: Tensor, gate_Nk: Tensor, experts: Sequence[nn.Module], ep: Axis
) -> Tensor:
    e, k = len(experts), expert_Nk.shape[1]
    order_M = expert_Nk.flatten().argsort(stable=True)
    counts_nE = ep.all_gather(expert_Nk.flatten().bincount(minlength=e * ep.size)[None])
    deal = expert_parallel.Deal.of(counts_nE, ep)
    came_RD = Travel.apply(x_ND[order_M // k], deal.send, deal.receive, ep)
    by_expert_R = deal.arrivals().argsort(stable=True)
    out_RD = expert_parallel.Experts(experts)(came_RD[by_expert_R], deal.counts_ne.sum(0))
    back_MD = Travel.apply(out_RD[by_expert_R.argsort()], deal.receive, deal.send, ep)
    rows_MD = back_MD * gate_Nk.flatten()[order_M, None]
    return torch.zeros_like(x_ND).index_add(0, order_M // k, rows_MD)


def within_capacity(expert_Tk: Tensor, experts: int, capacity: int) -> Tensor:
    T, k = expert_Tk.shape
    factor = (capacity - 0.5) * experts / (T * k)  # the library rounds up
    cfg = ModelConfig(experts=experts, top_k=k, capacity_factor=factor)
    return router.keep(expert_Tk[None], cfg)[0]


def moved_bias(bias_E: Tensor, expert_Nk: Tensor, speed: float, ep: Axis) -> Tensor:
    counts_E = expert_Nk.flatten().bincount(minlength=len(bias_E)).to(bias_E.dtype)
    total_E = ep.all_reduce(counts_E)
    return bias_E + speed * (total_E.mean() - total_E).sign()
