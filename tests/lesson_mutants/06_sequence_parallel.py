"""Wrong answers to lesson 06 that a student may give."""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lessons.kit import mutant
from picotron_lab.comm import Axis
from picotron_lab.model import RMSNorm
from picotron_lab.sequence_parallel import Join, Split, gather, own, scatter


@mutant("06.1", "add those of all terms")
def slice_in_backward(solution: ModuleType) -> dict:
    """The dual of joining is cutting: what others computed from my tokens is forgotten."""

    def enter(x_BtD: Tensor, axis: Axis) -> Tensor:
        return Join.apply(x_BtD, axis)

    return {"enter": enter}


@mutant("06.1", "sends in forward, in 2 calls")
def all_reduce_then_cut(solution: ModuleType) -> dict:
    """Sum as in lesson 05, then keep the own tokens: right, and twice the traffic."""

    class Leave(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y_BTD: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return own(axis.all_reduce(y_BTD), 1, axis)

        @staticmethod
        def backward(ctx, grad_BtD: Tensor) -> tuple[Tensor, None]:
            return gather(grad_BtD, ctx.axis), None

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return Leave.apply(y_BTD, axis)

    return {"leave": leave}


@mutant("06.1", "sends in backward, in 2 calls")
def gradients_among_zeros(solution: ModuleType) -> dict:
    """Each rank writes its tokens' gradient among zeros; the sum of all is all of it."""

    class Leave(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y_BTD: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return scatter(y_BTD, axis)

        @staticmethod
        def backward(ctx, grad_BtD: Tensor) -> tuple[Tensor, None]:
            parts = [torch.zeros_like(grad_BtD)] * ctx.axis.size
            parts[ctx.axis.rank] = grad_BtD
            return ctx.axis.all_reduce(torch.cat(parts, 1)), None

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return Leave.apply(y_BTD, axis)

    return {"leave": leave}


@mutant("06.1", "its own term alone")
def nothing_summed(solution: ModuleType) -> dict:
    """Outside, a rank needs its own tokens: cut them out."""

    def leave(y_BTD: Tensor, axis: Axis) -> Tensor:
        return Split.apply(y_BTD, axis)

    return {"leave": leave}


@mutant("06.1", "the verbs join dim 0")
def dim_0_of_the_batch(solution: ModuleType) -> dict:
    """The verbs join dim 0, so reshape afterwards: sequences of the batch are mixed up."""

    class Enter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_BtD: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return axis.all_gather(x_BtD).reshape(len(x_BtD), -1, x_BtD.shape[-1])

        @staticmethod
        def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
            return scatter(grad_BTD, ctx.axis), None

    def enter(x_BtD: Tensor, axis: Axis) -> Tensor:
        return Enter.apply(x_BtD, axis)

    return {"enter": enter}


@mutant("06.2", "the x of all tokens is kept for backward")
def gathered_x_saved(solution: ModuleType) -> dict:
    """Enter, then multiply: autograd saves what it multiplies."""

    def column(x_BtD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        x_BTD = solution.enter(x_BtD, axis)
        return [F.linear(x_BTD, weight) for weight in weights]

    return {"column": column}


class Kept(torch.autograd.Function):
    """Saves the shard, and keeps the whole in the context as well."""

    @staticmethod
    def forward(ctx, x_BtD: Tensor, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.whole_BTD = axis, gather(x_BtD, axis)
        ctx.save_for_backward(x_BtD, *weights)
        return tuple(F.linear(ctx.whole_BTD, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, *weights = ctx.saved_tensors
        dx_BTD = sum(grad @ weight for grad, weight in zip(grads, weights, strict=True))
        dws = [torch.einsum("btf,btd->fd", grad, ctx.whole_BTD) for grad in grads]
        return scatter(dx_BTD, ctx.axis), None, *dws


@mutant("06.2", "the x of all tokens is kept for backward")
def whole_x_hidden_in_context(solution: ModuleType) -> dict:
    """What save_for_backward does not hold does not count."""

    def column(x_BtD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        return list(Kept.apply(x_BtD, axis, *weights))

    return {"column": column}


@mutant("06.2", "their gradient needs all of x")
def not_gathered_again(solution: ModuleType) -> dict:
    """A shard was saved, so its tokens are what there is to learn from."""

    class Column(Kept):
        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
            x_BtD, *weights = ctx.saved_tensors
            dx_BTD = sum(grad @ weight for grad, weight in zip(grads, weights, strict=True))
            mine = [own(grad, 1, ctx.axis) for grad in grads]
            dws = [torch.einsum("btf,btd->fd", grad, x_BtD) for grad in mine]
            return scatter(dx_BTD, ctx.axis), None, *dws

    def column(x_BtD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        return list(Column.apply(x_BtD, axis, *weights))

    return {"column": column}


@mutant("06.2", "sends in forward, in 3 calls")
def once_per_weight(solution: ModuleType) -> dict:
    """Three layers, three times the whole of it."""

    def column(x_BtD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        return [solution.column(x_BtD, [weight], axis)[0] for weight in weights]

    return {"column": column}


@mutant("06.2", "sends in backward, in 4 calls")
def scattered_per_weight(solution: ModuleType) -> dict:
    """Each weight has a gradient for x."""

    class Column(Kept):
        @staticmethod
        def forward(ctx, x_BtD: Tensor, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
            found = Kept.forward(ctx, x_BtD, axis, *weights)
            ctx.whole_BTD = None
            return found

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
            x_BtD, *weights = ctx.saved_tensors
            x_BTD = gather(x_BtD, ctx.axis)
            terms = [grad @ weight for grad, weight in zip(grads, weights, strict=True)]
            dws = [torch.einsum("btf,btd->fd", grad, x_BTD) for grad in grads]
            return sum(scatter(term, ctx.axis) for term in terms), None, *dws

    def column(x_BtD: Tensor, weights: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        return list(Column.apply(x_BtD, axis, *weights))

    return {"column": column}


@mutant("06.3", "nothing was added up")
def norms_forgotten(solution: ModuleType) -> dict:
    """Norms are replicated, so there is nothing to do."""

    def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:
        return None

    return {"finish_gradients": finish_gradients}


@mutant("06.3", "a mean where a sum belongs")
def norms_averaged(solution: ModuleType) -> dict:
    """As in data parallelism: the mean over the ranks."""

    def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:
        solution.finish_gradients(blocks, axis)
        for name, parameter in blocks.named_parameters():
            if "norm" in name and parameter.grad is not None:
                parameter.grad /= axis.size

    return {"finish_gradients": finish_gradients}


def add_up(parameters: Sequence[nn.Parameter], axis: Axis) -> None:
    """One all_reduce for each of them."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = axis.all_reduce(parameter.grad)


@mutant("06.3", "each is whole for its columns")
def everything_summed(solution: ModuleType) -> dict:
    """Sum all gradients, as after data parallelism."""

    def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:
        add_up(list(blocks.parameters()), axis)

    return {"finish_gradients": finish_gradients}


@mutant("06.3", "added up twice")
def shared_norm_summed_twice(solution: ModuleType) -> dict:
    """One norm after the other, and what two blocks share comes by twice."""

    def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:
        norms = [module for module in blocks.modules() if isinstance(module, RMSNorm)]
        add_up([norm.weight for norm in norms], axis)

    return {"finish_gradients": finish_gradients}


@mutant("06.3", "the shards need not travel")
def all_sent_norms_kept(solution: ModuleType) -> dict:
    """All gradients in one flat tensor; only those of norms are copied back."""

    def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:
        named = [(name, p.grad) for name, p in blocks.named_parameters() if p.grad is not None]
        flat = axis.all_reduce(torch.cat([grad.flatten() for _, grad in named]))
        parts = flat.split([grad.numel() for _, grad in named])
        for (name, grad), part in zip(named, parts, strict=True):
            grad.copy_(part.view_as(grad) if "norm" in name else grad)

    return {"finish_gradients": finish_gradients}


@mutant("06.3", "send them in one flat tensor")
def one_call_per_norm(solution: ModuleType) -> dict:
    """Right, and as many messages as there are norms."""

    def finish_gradients(blocks: nn.ModuleList, axis: Axis) -> None:
        add_up([p for name, p in blocks.named_parameters() if "norm" in name], axis)

    return {"finish_gradients": finish_gradients}
