"""Lesson 09, pipelines: schedules as lists of actions, and an executor that walks such a list.

Letters  p ranks in a chain, rank r holds stage r   m micro-batches
         F forward   B backward for the input   W backward for the weights   BW both at once
         tF, tB, tW what they take             N rows, D width in, F width out
Action   Action("F", 2, 5) is the forward of stage 2 on micro-batch 5; a tuple (kind, stage,
         microbatch, slice), whose slice stays 0 here
"""

import torch
from torch import Tensor, nn

from lessons import TODO
from picotron_lab.comm import Axis
from picotron_lab.schedules.actions import Action


def afab(p: int, m: int) -> list[list[Action]]:  # Task 09.1
    """All forwards, then all backwards: one list of F and BW actions for each rank.

    Budget  bubble (p-1)(tF+tB+tW), m micro-batches held
    """
    raise TODO("09.1")


def one_f_one_b(p: int, m: int) -> list[list[Action]]:  # Task 09.1
    """1F1B: as few forwards first as keep all ranks busy, then a forward and a backward in turn.

    For any m, also m < p.
    Budget  bubble (p-1)(tF+tB+tW), as afab; at most min(m, p-r) micro-batches held by rank r
    """
    raise TODO("09.1")


def run_list(  # Task 09.2
    actions: list[Action], stage: nn.Module, axis: Axis, batches: list[Tensor]
) -> None:
    """Walk the list of this rank, whose actions are F and BW of stage axis.rank.

    stage    stage(x, i) -> output for micro-batch i, or on the last rank its loss, which knows its
             labels. Backward through it fills p.grad
    batches  the input of each micro-batch on rank 0. Micro-batches differ in rows; what crosses
             from stage to stage has the shape and dtype of batches[i]. On ranks after 0 nothing
             else is right about them
    Before   no p.grad
    After    p.grad of every parameter: that of the sum of all losses
    Budget   one message per micro-batch, boundary and direction; what backward of a micro-batch
             needs, its input too, is held from its F to its BW and no longer; the time is that of
             the schedule: nobody waits for what it sends
    """
    raise TODO("09.2")


class LinearLater(torch.autograd.Function):  # Task 09.3
    """y = x W^T, whose backward gives dx at once and leaves dW to weight_gradients.

    LinearLater.apply(x, weight, queue): x [..., D], weight [F, D] a parameter, queue a list
    Budget  one matmul in forward, one in backward
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, queue: list) -> Tensor:
        """x [..., D] -> [..., F]."""
        raise TODO("09.3")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """grad [..., F] -> dx [..., D], nothing for the weight, nothing for the queue."""
        raise TODO("09.3")


def weight_gradients(queue: list) -> None:  # Task 09.3
    """Do what backwards have left in the queue.

    Before  queue: what backward has put there
    After   dW [F, D] is added to weight.grad (which may be None); the queue is empty
    Budget  one matmul for each layer that was backward
    """
    raise TODO("09.3")


def tight(p: int, m: int) -> list[list[Action]]:  # Task 09.4
    """A schedule of F, B and W (or BW) with a shorter bubble, in the memory of 1F1B's rank 0.

    Given   m >= 2p, tW no longer than tF and than tB
    Budget  bubble (p-1)(tF+tB-tW); on every rank at most p micro-batches between F and W
    """
    raise TODO("09.4")
