"""Lesson 03: the library's buckets, and two functions that it has inside other ones."""

import torch
from torch import Tensor, nn

from picotron_lab import data_parallel
from picotron_lab.comm import Axis


def sum_gradients(parameters: list[nn.Parameter], dp: Axis) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dp.all_reduce(parameter.grad, out=parameter.grad)


def parts_of_mean(losses: list[Tensor], counts: list[int], dp: Axis) -> list[Tensor]:
    total = dp.all_reduce(torch.tensor(float(sum(counts)), dtype=torch.float64))
    return [loss / total for loss in losses]


class Bucketed(data_parallel.Bucketed):
    def __init__(self, parameters: list[nn.Parameter], axis: Axis, bucket_bytes: int):
        super().__init__(parameters, axis, bucket_bytes)


class Silent(data_parallel.Silent):
    def __init__(self, parameters: list[nn.Parameter], axis: Axis, bucket_bytes: int):
        super().__init__(parameters, axis, bucket_bytes)
