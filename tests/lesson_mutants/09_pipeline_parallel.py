"""Wrong answers to lesson 09: schedules that hold or wait too much, executors, fake splits."""

from types import ModuleType
from typing import Any

import torch

from lessons.kit import mutant
from picotron_lab.schedules import basic, zero_bubble
from picotron_lab.schedules.actions import Action


def _one_stage(p: int, m: int, first: Any) -> list[list[Action]]:
    """One stage per rank, first(r) forwards ahead."""
    lists = []
    for r in range(p):
        passes = [[Action(kind, r, i) for i in range(m)] for kind in ("F", "BW")]
        lists.append(list(basic.alternate(*passes, first(r))))
    return lists


@mutant("09.1", "too many forwards come before it")
def afab_posing_as_1f1b(solution: ModuleType) -> dict:
    """All forwards first give the same bubble."""
    return {"one_f_one_b": solution.afab}


@mutant("09.1", "micro-batches held by rank 0")
def one_forward_too_many(solution: ModuleType) -> dict:
    """p - r forwards, and then a forward and a backward in turn."""
    return {"one_f_one_b": lambda p, m: _one_stage(p, m, lambda r: p - r)}


@mutant("09.1", "too few forwards come first")
def no_warm_up(solution: ModuleType) -> dict:
    """A backward after each forward holds least."""
    return {"one_f_one_b": lambda p, m: _one_stage(p, m, lambda r: 0)}


@mutant("09.1", "deadlock")
def warm_up_reversed(solution: ModuleType) -> dict:
    """Later ranks need more forwards, as they come later."""
    return {"one_f_one_b": lambda p, m: _one_stage(p, m, lambda r: r)}


@mutant("09.1", "one_f_one_b")
def few_micro_batches_forgotten(solution: ModuleType) -> dict:
    """There are always more micro-batches than ranks."""

    def one_f_one_b(p: int, m: int) -> list[list[Action]]:
        lists = []
        for r in range(p):
            first = p - 1 - r
            actions = [Action("F", r, i) for i in range(first)]
            for i in range(m - first):
                actions += [Action("F", r, first + i), Action("BW", r, i)]
            lists.append(actions + [Action("BW", r, i) for i in range(m - first, m)])
        return lists

    return {"one_f_one_b": one_f_one_b}


@mutant("09.2", "in the order of the list")
def forwards_first_whatever_the_list(solution: ModuleType) -> dict:
    """All forwards, then all backwards: the list is a recommendation."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        order = sorted(actions, key=lambda action: action.kind == "BW")
        solution.run_list(order, stage, axis, batches)

    return {"run_list": run_list}


@mutant("09.2", "milliseconds of the step")
def one_micro_batch_at_a_time(solution: ModuleType) -> dict:
    """Forward and backward of a micro-batch belong together."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        order = sorted(actions, key=lambda action: (action.microbatch, action.kind == "BW"))
        solution.run_list(order, stage, axis, batches)

    return {"run_list": run_list}


class _Changed:
    """An axis that sends in another way."""

    def __init__(self, axis: Any):
        self.axis, self.rank, self.size = axis, axis.rank, axis.size

    def recv(self, like: torch.Tensor, source: int) -> torch.Tensor:
        return self.axis.recv(like, source)


class _Over:
    """A handle of something that is over."""

    def wait(self) -> None:
        """At once."""


class _Waiting(_Changed):
    """Waits until what it sends was taken."""

    def send(self, x: torch.Tensor, to: int, wait: bool) -> _Over:
        self.axis.send(x, to)
        return _Over()


class _WithShape(_Changed):
    """A header before every tensor."""

    def send(self, x: torch.Tensor, to: int, wait: bool) -> Any:
        self.axis.send(torch.tensor([x.shape[0]]), to, wait=False)
        return self.axis.send(x, to, wait=False)

    def recv(self, like: torch.Tensor, source: int) -> torch.Tensor:
        rows = int(self.axis.recv(torch.empty(1, dtype=torch.int64), source))
        return self.axis.recv(like.new_empty(rows, *like.shape[1:]), source)


class _Padded(_Changed):
    """Messages of one size."""

    def send(self, x: torch.Tensor, to: int, wait: bool) -> Any:
        padded = torch.zeros(8, x.shape[1], dtype=x.dtype)
        padded[: len(x)] = x.detach()
        return self.axis.send(padded, to, wait=False)

    def recv(self, like: torch.Tensor, source: int) -> torch.Tensor:
        return self.axis.recv(like.new_empty(8, like.shape[1]), source)[: len(like)].clone()


@mutant("09.2", "at its BW (pop)")
def notes_are_kept(solution: ModuleType) -> dict:
    """held[i]: the dictionary goes when the function ends."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        held = []

        def noted(x: torch.Tensor, i: int) -> torch.Tensor:
            held.append(x)
            return stage(x, i)

        solution.run_list(actions, noted, axis, batches)

    return {"run_list": run_list}


@mutant("09.1", "afab returned None: a list of lists is wanted")
def no_lists(solution: ModuleType) -> dict:
    """Forgot the return."""
    return {"afab": lambda p, m: None}


@mutant("09.3", "LinearLater.forward returned None, a tensor is wanted")
def no_output(solution: ModuleType) -> dict:
    """Forgot the return."""

    class LinearLater(solution.LinearLater):
        """No y."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, queue: list) -> None:
            solution.LinearLater.forward(ctx, x, weight, queue)

    return {"LinearLater": LinearLater}


@mutant("09.2", "no rank can make progress")
def sends_that_wait(solution: ModuleType) -> dict:
    """axis.send(x, to) sends, and that is that."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        solution.run_list(actions, stage, _Waiting(axis), batches)

    return {"run_list": run_list}


@mutant("09.2", "the receiver knows shapes beforehand")
def shapes_travel_too(solution: ModuleType) -> dict:
    """A receiver must be told the shape first."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        solution.run_list(actions, stage, _WithShape(axis), batches)

    return {"run_list": run_list}


@mutant("09.2", "only activations and their gradients cross")
def padded_messages(solution: ModuleType) -> dict:
    """Messages of one size are simpler."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        solution.run_list(actions, stage, _Padded(axis), batches)

    return {"run_list": run_list}


@mutant("09.2", "a mean where a sum belongs")
def mean_over_micro_batches(solution: ModuleType) -> dict:
    """Gradients are averaged over micro-batches."""

    def run_list(actions: list, stage: Any, axis: Any, batches: list) -> None:
        solution.run_list(actions, stage, axis, batches)
        for parameter in stage.parameters():
            parameter.grad /= len(batches)

    return {"run_list": run_list}


@mutant("09.3", "dW = dy^T x is for W")
def weight_gradient_in_b(solution: ModuleType) -> dict:
    """Compute dW in backward, and only add it up later."""

    class LinearLater(solution.LinearLater):
        """dx and dW now."""

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple:
            (x,) = ctx.saved_tensors
            ctx.queue.append((ctx.weight, grad.flatten(0, -2).T @ x.flatten(0, -2)))
            return grad @ ctx.weight, None, None

    def weight_gradients(queue: list) -> None:
        for weight, found in queue:
            weight.grad = found if weight.grad is None else weight.grad + found
        queue.clear()

    return {"LinearLater": LinearLater, "weight_gradients": weight_gradients}


@mutant("09.3", "do not compute it again")
def input_gradient_twice(solution: ModuleType) -> dict:
    """W is a second backward."""

    def weight_gradients(queue: list) -> None:
        for weight, x, grad in queue:
            x, leaf = x.detach().requires_grad_(), weight.detach().requires_grad_()
            _, found = torch.autograd.grad(x @ leaf.T, [x, leaf], grad)
            weight.grad = found if weight.grad is None else weight.grad + found
        queue.clear()

    return {"weight_gradients": weight_gradients}


@mutant("09.3", "add to what is there")
def gradient_replaced(solution: ModuleType) -> dict:
    """weight.grad is dW."""

    def weight_gradients(queue: list) -> None:
        for weight, x, grad in queue:
            weight.grad = grad.flatten(0, -2).T @ x.flatten(0, -2)
        queue.clear()

    return {"weight_gradients": weight_gradients}


@mutant("09.3", "entries left in each queue")
def queue_never_emptied(solution: ModuleType) -> dict:
    """Somebody else will drop x and dy."""
    return {"weight_gradients": lambda queue: solution.weight_gradients([*queue])}


@mutant("09.4", "which W could fill a gap later")
def w_right_after_b(solution: ModuleType) -> dict:
    """Split, but in the same place."""

    def both(action: Action) -> list[Action]:
        kinds = ("B", "W") if action.kind == "BW" else (action.kind,)
        return [action._replace(kind=kind) for kind in kinds]

    def tight(p: int, m: int) -> list[list[Action]]:
        return [[b for a in actions for b in both(a)] for actions in solution.one_f_one_b(p, m)]

    return {"tight": tight}


@mutant("09.4", "activations wait for W")
def all_w_at_the_end(solution: ModuleType) -> dict:
    """Nobody waits for W, so it comes last."""

    def tight(p: int, m: int) -> list[list[Action]]:
        lists = []
        for r, actions in enumerate(solution.one_f_one_b(p, m)):
            early = [a._replace(kind="B") if a.kind == "BW" else a for a in actions]
            lists.append(early + [Action("W", r, i) for i in range(m)])
        return lists

    return {"tight": tight}


@mutant("09.4", "micro-batches held by rank")
def twice_the_memory(solution: ModuleType) -> dict:
    """ZB-H2 has no bubble at all."""
    return {"tight": lambda p, m: [list(a) for a in zero_bubble.zb_h2(p, m).lists]}


@mutant("09.4", "no training step")
def w_forgotten(solution: ModuleType) -> dict:
    """B is the backward."""
    lists = solution.one_f_one_b
    return {
        "tight": lambda p, m: [
            [a._replace(kind="B") if a.kind == "BW" else a for a in actions]
            for actions in lists(p, m)
        ]
    }
