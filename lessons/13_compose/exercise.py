"""Lesson 13: six programs that run, send little, and train under AdamW. All of them are wrong.

Nothing is missing here: mend what is there. Every docstring is right, every body has one fault.
Let the check tell you which gradient is off, and by how much, before you look for the reason.
"""

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis


def pipeline_step(  # Task 13.1
    stage: nn.Module, inputs: list[Tensor], labels: list[Tensor], pp: Axis
) -> float:
    """One step of a pipeline: m forwards, then m backwards.

    stage           this rank's part of the model, [N, D] -> [N, D]
    inputs, labels  m micro-batches [N, D], of which the first and the last stage use the values
    Before  no gradients
    After   p.grad is that of the mean squared error over the whole batch, all m micro-batches;
            the last rank returns that error, the others 0.0
    Budget  2m messages on each boundary
    """
    first, last = pp.rank == 0, pp.rank == pp.size - 1
    received, made, error = [], [], 0.0
    for x, y in zip(inputs, labels, strict=True):
        if not first:
            x = pp.recv(x, pp.rank - 1).requires_grad_()
        out = stage(x)
        if last:
            out = (out - y).square().mean()
            error += out.item() / len(inputs)
        else:
            pp.send(out, pp.rank + 1)
        received.append(x)
        made.append(out)
    for x, out in zip(received, made, strict=True):
        out.backward(None if last else pp.recv(out, pp.rank + 1))
        if not first:
            pp.send(x.grad, pp.rank - 1)
    return error


def backward_and_sum(  # Task 13.2
    losses: list[Tensor], parameters: list[nn.Parameter], dp: Axis
) -> None:
    """Backward of m micro-batches; hooks in the last one sum the gradients over the ranks of dp.

    Before  no gradients; every loss uses every parameter
    After   p.grad is the sum over all n*m losses, alike on all ranks
    Budget  one all_reduce for each parameter, payload 8Ψ, whatever m
    """
    for loss in losses[:-1]:
        loss.backward()
    hooks = [parameter.register_hook(dp.all_reduce) for parameter in parameters]
    losses[-1].backward()
    for hook in hooks:
        hook.remove()


def synchronise(parameters: list[nn.Parameter], dp: Axis, cp: Axis) -> None:  # Task 13.3
    """Sum gradients over all ranks that hold the same weights and saw other tokens.

    dp, cp  data parallel ranks saw other sequences, context parallel ranks other parts of the same
    Before  p.grad on each rank: of its own tokens
    After   p.grad is the sum over all ranks of both axes, alike on all of them
    Budget  at most one all_reduce for each parameter and axis; an axis of one rank sends nothing
    """
    if dp.size > 1:
        for parameter in parameters:
            parameter.grad = cp.all_reduce(dp.all_reduce(parameter.grad))


def full_weight(shape: tuple[int, int], seed: int) -> Tensor:
    """The initial weight of one device, uniform within 1 / sqrt(inputs). This one is right.

    Before  shape (outputs, inputs)
    After   float64, the same for the same seed
    Budget  nothing is sent
    """
    bound = shape[1] ** -0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)


def weight_shard(shape: tuple[int, int], dim: int, seed: int, tp: Axis) -> Tensor:  # Task 13.4
    """This rank's part of a weight that is cut along `dim`: rows (0) or columns (1).

    Before  shape of the full weight, (outputs, inputs); shape[dim] is a multiple of tp.size
    After   the parts of all ranks, joined in their order along dim, are full_weight(shape, seed)
    Budget  nothing is sent, and what stays alive is the part
    """
    outputs, inputs = shape
    part = (outputs // tp.size, inputs) if dim == 0 else (outputs, inputs // tp.size)
    return full_weight(part, seed)


def finish_gradients(  # Task 13.5
    parameters: dict[str, nn.Parameter], cut: set[str], tp: Axis
) -> None:
    """Tensor and sequence parallelism: sum what is partial, after backward.

    parameters  by name, in the same order on all ranks
    cut     names of weights of which every rank holds another part: their gradients are complete.
            Others are held by all ranks, and each rank's gradient is that of its tokens alone
    Before  p.grad as backward left it
    After   p.grad is complete for every parameter
    Budget  one all_reduce of all the gradients that are partial, and of no others
    """
    names = [name for name in parameters if name.startswith("layers.") and "norm" in name]
    partial = [parameters[name].grad for name in names]
    total = tp.all_reduce(torch.cat([gradient.flatten() for gradient in partial]))
    sums = total.split([gradient.numel() for gradient in partial])
    for gradient, part in zip(partial, sums, strict=True):
        gradient.copy_(part.view_as(gradient))


def reduce_with_tied(buffer: Tensor, tied: slice, dp: Axis, ends: Axis) -> Tensor:  # Task 13.6
    """ZeRO on a pipeline whose first and last stage hold the same weight: embedding and head.

    buffer  flat gradients of all parameters of this stage, of this rank's tokens; may be written
    tied    where the shared weight lies in it: elsewhere on the last stage than on the first
    dp      ranks with this stage; each steps one of dp.size equal parts of the buffer, in order
    ends    the two ranks that hold the shared weight, one of each stage
    Before  partial over dp; the shared weight's gradient also over ends
    After   this rank's part of the sums
    Budget  one reduce_scatter of the buffer over dp, one all_reduce of the shared part over ends
    """
    size = len(buffer) // dp.size
    mine = slice(dp.rank * size, (dp.rank + 1) * size)
    buffer[mine] = dp.reduce_scatter(buffer)
    buffer[tied] = ends.all_reduce(buffer[tied])
    return buffer[mine]
