"""Lesson 13: the six programs, mended."""

import torch


def pipeline_step(stage, inputs, labels, pp):
    first, last = pp.rank == 0, pp.rank == pp.size - 1
    received, made, error = [], [], 0.0
    for x, y in zip(inputs, labels, strict=True):
        if not first:
            x = pp.recv(x, pp.rank - 1).requires_grad_()
        out = stage(x)
        if last:
            out = (out - y).square().mean() / len(inputs)  # what goes backward is divided
            error += out.item()
        else:
            pp.send(out, pp.rank + 1)
        received.append(x)
        made.append(out)
    for x, out in zip(received, made, strict=True):
        out.backward(None if last else pp.recv(out, pp.rank + 1))
        if not first:
            pp.send(x.grad, pp.rank - 1)
    return error


def backward_and_sum(losses, parameters, dp):
    def reduce(parameter):  # after the gradient was added to those of earlier micro-batches
        dp.all_reduce(parameter.grad, out=parameter.grad)

    for loss in losses[:-1]:
        loss.backward()
    hooks = [p.register_post_accumulate_grad_hook(reduce) for p in parameters]
    losses[-1].backward()
    for hook in hooks:
        hook.remove()


def synchronise(parameters, dp, cp):
    for parameter in parameters:
        parameter.grad = cp.all_reduce(dp.all_reduce(parameter.grad))


def full_weight(shape, seed):
    bound = shape[1] ** -0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)


def weight_shard(shape, dim, seed, tp):
    return full_weight(shape, seed).chunk(tp.size, dim)[tp.rank].clone()


def finish_gradients(parameters, cut, tp):
    partial = [parameter.grad for name, parameter in parameters.items() if name not in cut]
    total = tp.all_reduce(torch.cat([gradient.flatten() for gradient in partial]))
    sums = total.split([gradient.numel() for gradient in partial])
    for gradient, part in zip(partial, sums, strict=True):
        gradient.copy_(part.view_as(gradient))


def reduce_with_tied(buffer, tied, dp, ends):
    buffer[tied] = ends.all_reduce(buffer[tied])  # first, while every rank has its own tokens' all
    return dp.reduce_scatter(buffer)
