"""Lesson 04: the library's rows and stages, and stage 3 of a single layer."""

import torch

from picotron_lab.zero import Stage1, Stage2
from picotron_lab.zero_rows import gather_rows, mine, scatter_sum

__all__ = ["ShardedLinear", "Stage1", "Stage2", "gather_rows", "mine", "scatter_sum"]


class ShardedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, shard_RI, rows, axis):
        ctx.save_for_backward(x_NI, shard_RI)
        ctx.rows, ctx.axis = rows, axis
        return x_NI @ gather_rows(shard_RI, rows, axis).T

    @staticmethod
    def backward(ctx, dy):
        x_NI, shard_RI = ctx.saved_tensors
        dx_NI = dy @ gather_rows(shard_RI, ctx.rows, ctx.axis)
        return dx_NI, scatter_sum(dy.T @ x_NI, ctx.axis), None, None
