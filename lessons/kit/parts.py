"""Parts: what stands between a student's functions and a model that trains (lessons/mine.py).

Each class takes the place of one module of the plain model and calls what a lesson asked for.
Dims    as in picotron_lab/model.py; R words of this rank
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab import tensor_parallel
from picotron_lab.comm import Axis
from picotron_lab.dropout import Where
from picotron_lab.mesh import Mesh
from picotron_lab.model import Head, Llama, MoE, rotary_angles


def put_in(model: Llama, axes: Mesh, students: dict[str, ModuleType], length: int) -> None:
    """Replace parts of the plain model by those that use the students' code of some lessons."""
    for layer in model.layers:
        if "08" in students:
            layer.attention.core = RingCore(axes.cp, students["08"], length)
        if "12" in students:
            layer.mlp = SpreadExperts(layer.mlp, axes.dp, students["12"])
    if "05" in students:
        _cut(model, axes, students["05"], "07" not in students)
    if "06" in students:
        _cut_between(model, axes, students["06"])
    if "07" in students:
        model.embed = Words(model.embed.weight, axes.tp, students["07"])
        model.head = WordsLoss(model.head.weight, axes.tp, students["07"])


def _cut(model: Llama, axes: Mesh, student: ModuleType, vocabulary: bool) -> None:
    for layer in model.layers:
        layer.attention = student.ParallelAttention(layer.attention, axes.tp, axes.kv)
        layer.mlp = student.ParallelMLP(layer.mlp, axes.tp)
    if vocabulary:
        model.head = LogitsLoss(model.head, student.ParallelHead, axes.tp)


def _cut_between(model: Llama, axes: Mesh, student: ModuleType) -> None:
    borders = Borders(axes.tp, student)
    for layer in model.layers:
        layer.attention = tensor_parallel.ParallelAttention(layer.attention, axes.kv, borders)
        layer.mlp = tensor_parallel.ParallelMLP(layer.mlp, borders)
    model.embed = OwnTokens(model.embed, axes.tp)
    model.head = tensor_parallel.ParallelHead(model.head, borders)


class Borders(tensor_parallel.Crossing):
    """The borders of a tensor-parallel region, as lesson 06 writes them."""

    def __init__(self, axis: Axis, student: ModuleType):
        super().__init__(axis)
        self.student = student

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Lesson 06's."""
        return self.student.enter(x_BTD, self.axis)

    def leave(self, y_BTD: Tensor) -> Tensor:
        """Lesson 06's."""
        return self.student.leave(y_BTD, self.axis)

    def column(self, x_BTD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Lesson 06's."""
        return self.student.column(x_BTD, weights, self.axis)


class OwnTokens(nn.Module):
    """An embedding of which this rank keeps its part of the sequence."""

    def __init__(self, whole: nn.Module, axis: Axis):
        super().__init__()
        self.whole, self.axis = whole, axis

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.whole(tokens_BT).chunk(self.axis.size, 1)[self.axis.rank]


class Words(nn.Module):
    """Rows of a table of words: lesson 07's embedding."""

    def __init__(self, weight_VD: Tensor, axis: Axis, student: ModuleType):
        super().__init__()
        rows = -(-len(weight_VD) // axis.size)
        self.start, self.axis, self.student = axis.rank * rows, axis, student
        self.weight = nn.Parameter(weight_VD[self.start : self.start + rows].detach().clone())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.student.embed(tokens_BT, self.weight, self.start, self.axis)


class WordsLoss(Words):
    """Lesson 07's loss."""

    def forward(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        return Barrier.apply(x_BTD, self.weight, labels_BT, self)


class LogitsLoss(nn.Module):
    """Lesson 05's head, and the loss that all ranks compute from its logits."""

    def __init__(self, whole: Head, make: Callable[[Head, Axis], nn.Module], axis: Axis):
        super().__init__()
        self.head = make(whole, axis)

    def forward(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        logits_NV = self.head(x_BTD).flatten(0, 1)
        return F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="sum")


class Barrier(torch.autograd.Function):
    """Pass S and the barrier in forward, pass T in backward."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, w_RD: Tensor, labels_BT: Tensor, at: Words) -> Tensor:
        state = at.student.local_pass(x_BTD.flatten(0, 1), w_RD, labels_BT.flatten(), at.start)
        loss, dx_ND = at.student.meet(state, at.axis)
        ctx.left = at.student, state, dx_ND.view_as(x_BTD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, state, dx_BTD = ctx.left
        return grad * dx_BTD, grad * student.weight_gradient(state), None, None


class RingCore(nn.Module):
    """Attention as lesson 08 writes it, one sequence and head after the other."""

    def __init__(self, cp: Axis, student: ModuleType, length: int):
        super().__init__()
        self.cp, self.student = cp, student
        self.places_T = student.positions(cp.rank, cp.size, length)

    def forward(
        self, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None = None
    ) -> Tensor:
        rows = [
            torch.stack([Ring.apply(self, q[:, h], k[:, h], v[:, h]) for h in range(q.shape[1])], 1)
            for q, k, v in zip(q_BTHC, k_BTKC, v_BTKC, strict=True)
        ]
        return torch.stack(rows)


class Ring(torch.autograd.Function):
    """One head of one sequence."""

    @staticmethod
    def forward(ctx: Any, core: RingCore, *qkv: Tensor) -> Tensor:
        out_TC, lse_T = core.student.ring_forward(*qkv, core.places_T, core.cp)
        ctx.core = core
        ctx.save_for_backward(*qkv, out_TC, lse_T)
        return out_TC

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        (*qkv, out_TC, lse_T), core = ctx.saved_tensors, ctx.core
        back = core.student.ring_backward
        return None, *back(grad_TC, tuple(qkv), (out_TC, lse_T), core.places_T, core.cp)


class SpreadExperts(nn.Module):
    """A mixture of experts of which this rank has its part: lesson 12."""

    def __init__(self, whole: MoE, ep: Axis, student: ModuleType):
        super().__init__()
        each = len(whole.experts) // ep.size
        self.router, self.ep, self.student = whole.router, ep, student
        self.experts = whole.experts[ep.rank * each : (ep.rank + 1) * each]

    def forward(self, x_BTD: Tensor) -> Tensor:
        routed = self.router(x_BTD)
        x_ND = x_BTD.flatten(0, 1)
        return self.student.moe(x_ND, *routed, list(self.experts), self.ep).view_as(x_BTD)


def layers_of(model: Llama, pp: Axis) -> nn.ModuleList:
    """The layers of this rank's stage."""
    each = len(model.layers) // pp.size
    return model.layers[pp.rank * each : (pp.rank + 1) * each]


def stage_parameters(model: Llama, pp: Axis) -> list[nn.Parameter]:
    """All weights of this rank's stage."""
    first = [model.embed] * (pp.rank == 0)
    last = [model.norm, model.head] * (pp.rank == pp.size - 1)
    return list(nn.ModuleList([*first, *layers_of(model, pp), *last]).parameters())


class Stage(nn.Module):
    """Some layers of the model; the first stage looks words up, the last has the loss."""

    def __init__(self, model: Llama, pp: Axis, micro: list[Tensor], count: int):
        super().__init__()
        self.model, self.pp, self.micro, self.count = [model], pp, micro, count
        self.layers = layers_of(model, pp)
        self.seen: list[float] = []

    def forward(self, x_BTD: Tensor, i: int) -> Tensor:
        (model,), tokens_BT = self.model, self.micro[i][:, :-1]
        if self.pp.rank == 0:
            x_BTD = model.embed(tokens_BT)
        x_BTD = run_layers(model, self.layers, x_BTD, tokens_BT)
        if self.pp.rank < self.pp.size - 1:
            return x_BTD
        loss = model.head(model.norm(x_BTD), self.micro[i][:, 1:]) / self.count
        self.seen.append(float(loss.detach()))
        return loss


def run_layers(model: Llama, layers: nn.ModuleList, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """x through some of the model's layers."""
    where = Where.first(tokens_BT)
    angles = rotary_angles(where.positions_T, model.cfg.head_width, model.cfg.rope_theta)
    for layer in layers:
        x_BTD = layer(x_BTD, angles, where)
    return x_BTD
