"""Grouped experts: rows sorted by expert, and the matmuls of all experts at once.

Paper   Gale et al. 2022, "MegaBlocks", sections 2.3 and 4 (2211.15841): experts as one product of
        sorted rows and stacked weights, nothing padded, nothing dropped
Idea    Experts differ in how many rows they get, and the router decides that anew each time. One by
        one they are many small matmuls, which leave most of a GPU idle; padded to the busiest they
        are one, most of it zeros. Grouped they are one with a list of where each expert's rows end:
            sort      place of each choice among all, ordered by expert
            permute   a token is copied to the places of its k choices
            experts   gate | up of all experts in one matmul, silu(gate) * up, down in another
            combine   a token adds up its k results, weighted by its gates
        Backward keeps the rows, and gate and up of each; silu(gate) * up is computed once more.
        Weights must lie in one storage for that: pack() moves those of a model there, once. Where
        they do not, a matmul works on a copy of them.
Plain   Torch, one_by_one: torch's operators, an expert after the other. For float64, and on CPU
Fused   kernels/permute.py, at_once: on CUDA
Dims    N tokens  k choices of each  M rows: choices that were not dropped  D width  F feed-forward
        width  G = 2F: gate | up  e experts of this rank  E experts in all  K, L: any two widths
Read    sort_choices -> permute, combine -> GroupedExperts -> Torch -> forward_one_by_one ->
        forward_at_once -> pack
Tests   tests/test_grouped_experts.py, tests/test_kernels_permute.py
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab.model import MLP, wide

# ---- 1. the idea


def sort_choices(expert_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(place of each choice in the list of all, sorted by expert [N, k]; counts [experts]).

    expert_Nk  integers 0..experts; `experts` is a dropped choice, whose place is -1
    Both are int64. Equal experts keep the order of the tokens, then of a token's choices.
    """
    return operators(expert_Nk).sort_choices(expert_Nk, experts)


def permute(x_ND: Tensor, place_Nk: Tensor, rows: int) -> Tensor:
    """Rows [rows, D] in which place[n, j] is x[n]; backward adds up the rows of a token.

    place_Nk   int64: each number of 0..rows-1 once, and -1 for what is dropped; on CUDA nobody
               looks whether it is so, for the host would wait
    """
    return Permute.apply(x_ND, place_Nk, rows)


def combine(rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor) -> Tensor:
    """[N, D]: sum over j of gate[n, j] * rows[place[n, j]], in float32 at least."""
    return Combine.apply(rows_MD, place_Nk, gate_Nk)


class Permute(torch.autograd.Function):
    """Tokens -> rows; backward: collect without gates."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, place_Nk: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(place_Nk)
        return operators(x_ND).spread(x_ND, place_Nk, rows)

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        return operators(grad_MD).collect(grad_MD, *ctx.saved_tensors, None), None, None


class Combine(torch.autograd.Function):
    """Rows and gates -> tokens; backward: a token's gradient times each gate, and dot each row."""

    @staticmethod
    def forward(ctx, rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MD, place_Nk, gate_Nk)
        return operators(rows_MD).collect(rows_MD, place_Nk, gate_Nk)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        drows_MD, dgate_Nk = operators(grad_ND).collect_backward(grad_ND, *ctx.saved_tensors)
        return drows_MD, None, dgate_Nk


class GroupedExperts(nn.Module):
    """Experts as one module: (rows [M, D], sorted by expert; counts [e], int64) -> [M, D].

    experts   MLPs of one size, or none at all, who have no rows; their own forward is not called
    counts    how many rows each has, M together, on the device of the rows. Not looked at on CUDA,
              where that would make the host wait; wrong ones give wrong results there
    """

    def __init__(self, experts: Sequence[MLP]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def weights(self) -> list[Tensor]:
        """gate, up, down of each expert. Asked for at each call: others may have taken their
        place."""
        return [part.weight for mlp in self.experts for part in (mlp.gate, mlp.up, mlp.down)]

    def forward(self, x_MD: Tensor, counts_e: Tensor) -> Tensor:
        assert len(counts_e) == len(self.experts), (
            f"{len(self.experts)} experts were given {len(counts_e)} counts: give the number of "
            "rows of each expert, also where it is 0."
        )
        return Grouped.apply(x_MD, counts_e, *self.weights()) if self.experts else x_MD


class Grouped(torch.autograd.Function):
    """x -> silu(x gate^T) * (x up^T) down^T, each row with its expert's weights."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, counts_e: Tensor, *weights: Tensor) -> Tensor:
        x_MD, ends_e, stacked = x_MD.contiguous(), counts_e.cumsum(0).int(), join(weights)
        run = forward_at_once if suits_grouped_mm(x_MD, *stacked) else forward_one_by_one
        y_MD, gu_MG = run(x_MD, *stacked, ends_e)
        ctx.save_for_backward(x_MD, gu_MG, ends_e, *weights)
        return y_MD

    @staticmethod
    def backward(ctx, dy_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gu_MG, ends_e, *weights = ctx.saved_tensors
        dy_MD, stacked = dy_MD.contiguous(), join(weights)
        suited = suits_grouped_mm(dy_MD, x_MD, *stacked)
        run = backward_at_once if suited else backward_one_by_one
        dx_MD, *gradients = run(dy_MD, x_MD, gu_MG, *stacked, ends_e)
        return dx_MD, None, *apart(*gradients)


# ---- 2. plain path


class Torch:
    """What kernels/permute.py does, with torch's operators."""

    @staticmethod
    def sort_choices(expert_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """See the function of this name."""
        chosen = expert_Nk.flatten().long()
        order = chosen.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place = place.masked_fill(chosen == experts, -1)  # the dropped are last
        counts = chosen.new_zeros(experts + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
        return place.view_as(expert_Nk), counts[:experts]

    @staticmethod
    def spread(x_ND: Tensor, place_Nk: Tensor, rows: int) -> Tensor:
        """Row place[n, j] is x[n]."""
        kept_Nk = place_Nk >= 0
        found = int(kept_Nk.sum())
        assert found == rows, (
            f"{rows} rows were asked for {found} places: rows must be the number of choices that "
            "were not dropped."
        )
        token_N1 = torch.arange(len(x_ND), device=x_ND.device)[:, None]
        token_M = place_Nk.new_empty(rows)
        token_M[place_Nk[kept_Nk]] = token_N1.expand_as(place_Nk)[kept_Nk]
        return x_ND.index_select(0, token_M)

    @staticmethod
    def collect(rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor | None) -> Tensor:
        """Sum over j of gate[n, j] * rows[place[n, j]]."""
        out_ND = wide(rows_MD.new_zeros(len(place_Nk), rows_MD.shape[1]))
        for j, place_N in enumerate(place_Nk.T):
            row_ND = pick(rows_MD, place_N)
            if gate_Nk is None:
                out_ND += row_ND
            else:
                out_ND.addcmul_(row_ND, gate_Nk[:, j, None])
        return out_ND.to(rows_MD.dtype)

    @staticmethod
    def collect_backward(
        dout_ND: Tensor, rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """drows and dgate."""
        kept_Nk = place_Nk >= 0
        place_M, gate_M = place_Nk[kept_Nk], gate_Nk.new_empty(len(rows_MD))
        gate_M[place_M] = gate_Nk[kept_Nk]
        drows_MD = Torch.spread(dout_ND, place_Nk, len(rows_MD))
        dots_M = torch.linalg.vecdot(wide(drows_MD), wide(rows_MD))
        dgate_Nk = torch.zeros_like(gate_Nk)
        dgate_Nk[kept_Nk] = dots_M[place_M].to(gate_Nk.dtype)
        return drows_MD.mul_(gate_M[:, None]), dgate_Nk

    @staticmethod
    def activate(gu_MG: Tensor) -> Tensor:
        """silu(gate) * up."""
        gate_MF, up_MF = gu_MG.chunk(2, -1)
        return F.silu(gate_MF) * up_MF

    @staticmethod
    def activate_backward(dh_MF: Tensor, gu_MG: Tensor) -> tuple[Tensor, Tensor]:
        """d(gate | up), and silu(gate) * up once more."""
        dgu_MG = torch.empty_like(gu_MG)
        (gate_MF, up_MF), (dgate_MF, dup_MF) = gu_MG.chunk(2, -1), dgu_MG.chunk(2, -1)
        silu_MF = F.silu(gate_MF)
        torch.mul(dh_MF, silu_MF, out=dup_MF)
        torch.mul(dh_MF, up_MF, out=dgate_MF)
        torch.ops.aten.silu_backward.grad_input(dgate_MF, gate_MF, grad_input=dgate_MF)
        return dgu_MG, silu_MF.mul_(up_MF)


def pick(rows_MD: Tensor, place_N: Tensor) -> Tensor:
    """Rows at these places, zeros where there is none: [N, D]."""
    nowhere_N = place_N < 0
    if nowhere_N.all():  # there may be no row at all
        return rows_MD.new_zeros(len(place_N), rows_MD.shape[1])
    picked_ND = rows_MD.index_select(0, place_N.clamp(min=0))
    return picked_ND.masked_fill_(nowhere_N[:, None], 0) if nowhere_N.any() else picked_ND


def forward_one_by_one(
    x_MD: Tensor, gu_eGD: Tensor, down_eDF: Tensor, ends_e: Tensor
) -> tuple[Tensor, Tensor]:
    """(y [M, D], gate and up of each row [M, 2F]).

    ends_e   int32: where each expert's rows end; the host waits for them
    """
    y_MD, gu_MG = torch.empty_like(x_MD), x_MD.new_empty(len(x_MD), gu_eGD.shape[1])
    activate = operators(x_MD).activate
    for e, rows in enumerate(row_ranges(ends_e)):
        torch.mm(x_MD[rows], gu_eGD[e].T, out=gu_MG[rows])
        torch.mm(activate(gu_MG[rows]), down_eDF[e].T, out=y_MD[rows])
    return y_MD, gu_MG


def backward_one_by_one(
    dy_MD: Tensor, x_MD: Tensor, gu_MG: Tensor, gu_eGD: Tensor, down_eDF: Tensor, ends_e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of gate | up and of down, zeros for an expert without rows."""
    dx_MD, dgu_eGD, ddown_eDF = (torch.empty_like(t) for t in (x_MD, gu_eGD, down_eDF))
    activate_backward = operators(dy_MD).activate_backward
    for e, rows in enumerate(row_ranges(ends_e)):
        dgu, h = activate_backward(dy_MD[rows] @ down_eDF[e], gu_MG[rows])
        torch.mm(dy_MD[rows].T, h, out=ddown_eDF[e])
        torch.mm(dgu.T, x_MD[rows], out=dgu_eGD[e])
        torch.mm(dgu, gu_eGD[e], out=dx_MD[rows])
    return dx_MD, dgu_eGD, ddown_eDF


def row_ranges(ends_e: Tensor) -> list[slice]:
    """The rows of each expert."""
    return [slice(start, end) for start, end in pairwise([0, *ends_e.tolist()])]


# ---- 3. fused path


def operators(x: Tensor) -> Any:
    """The kernels where they serve, else torch's operators."""
    if not x.is_cuda or x.dtype == torch.float64:
        return Torch
    from picotron_lab.kernels import permute as kernels

    return kernels


def forward_at_once(
    x_MD: Tensor, gu_eGD: Tensor, down_eDF: Tensor, ends_e: Tensor
) -> tuple[Tensor, Tensor]:
    """As forward_one_by_one, and the host need not wait."""
    gu_MG = F.grouped_mm(x_MD, gu_eGD.mT, offs=ends_e)
    return F.grouped_mm(operators(gu_MG).activate(gu_MG), down_eDF.mT, offs=ends_e), gu_MG


def backward_at_once(
    dy_MD: Tensor, x_MD: Tensor, gu_MG: Tensor, gu_eGD: Tensor, down_eDF: Tensor, ends_e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As backward_one_by_one."""
    activate_backward = operators(gu_MG).activate_backward
    dgu_MG, h_MF = activate_backward(F.grouped_mm(dy_MD, down_eDF, offs=ends_e), gu_MG)
    dx_MD = F.grouped_mm(dgu_MG, gu_eGD, offs=ends_e)
    return dx_MD, outer(dgu_MG, x_MD, ends_e), outer(dy_MD, h_MF, ends_e)


def outer(dy_ML: Tensor, x_MK: Tensor, ends_e: Tensor) -> Tensor:
    """[e, L, K]: each expert's dy^T x."""
    dw_eLK = F.grouped_mm(dy_ML.T, x_MK, offs=ends_e)
    if leaves_idle_unset(x_MK):
        idle_e = ends_e.diff(prepend=ends_e.new_zeros(1)) == 0
        dw_eLK.masked_fill_(idle_e[:, None, None], 0)
    return dw_eLK


def leaves_idle_unset(x: Tensor) -> bool:
    """Whether grouped_mm writes no gradient for an expert without rows: on Blackwell (issue 172439
    of PyTorch). A dry run's tensors have no device to ask."""
    return x.is_cuda and not x.is_meta and torch.cuda.get_device_capability(x.device) >= (10, 0)


def suits_grouped_mm(*operands: Tensor) -> bool:
    """Whether torch's grouped matmul takes them: no float64, and all rows begin at 16 bytes."""
    for x in operands:
        _, *steps = sorted(x.stride())
        starts = (step * x.element_size() for step in (x.storage_offset(), *steps))
        if x.dtype == torch.float64 or x.numel() == 0 or any(start % 16 for start in starts):
            return False
    return pays_at_once(operands[0])


def pays_at_once(x: Tensor) -> bool:
    """Whether one matmul for all experts is faster. On a CPU it is not: one by one, the rows of an
    expert stay in the cache from each matmul to the next."""
    return x.is_cuda


def join(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """gate, up, down of each expert -> gate | up of all [e, 2F, D], down of all [e, D, F]."""
    of_gate_and_up = [w for i, w in enumerate(weights) if i % 3 < 2]
    return together(of_gate_and_up, 2), together(weights[2::3], 1)


def together(weights: Sequence[Tensor], each: int) -> Tensor:
    """e * each matrices [K, L] -> [e, each * K, L]: a view if they lie so, else a copy."""
    first = weights[0]
    (K, L), e, size = first.shape, len(weights) // each, first.numel()
    starts = [w.storage_offset() for w in weights]
    step = starts[each] - starts[0] if e > 1 else each * size
    regular = [starts[0] + i // each * step + i % each * size for i in range(len(weights))]
    one_home = len({w.untyped_storage()._cdata for w in weights}) == 1
    plain = all(w.is_contiguous() for w in weights)
    if one_home and plain and starts == regular and step >= each * size:
        return first.as_strided((e, each * K, L), (step, L, 1))
    return torch.cat(list(weights)).view(e, each * K, L)


def apart(gu_eGD: Tensor, down_eDF: Tensor) -> list[Tensor]:
    """The inverse of join, as views."""
    return [w for gu, down in zip(gu_eGD, down_eDF, strict=True) for w in (*gu.chunk(2), down)]


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Lay the weights of grouped experts side by side: values stay, and parameters the same.

    After materialise, before any gradient. Weights that are sharded by ZeRO-3 are left alone: what
    it lends to a layer lies side by side anyway, if it lends it from one buffer.
    """
    for module in model.modules():
        weights = module.weights() if isinstance(module, GroupedExperts) else []
        if weights and weights[0].shape == weights[2].shape[::-1]:  # else sharded
            for parameter, place in zip(weights, apart(*join(weights)), strict=True):
                parameter.data = place


# ---- 4. contract


def contract(rows: int, width: int, hidden: int, element: int) -> dict[str, int]:
    """What GroupedExperts takes for `rows` rows: bytes kept for backward, FLOPs of each direction.

    element  bytes of one stored number
    """
    product = 2 * rows * width * hidden
    return {
        "kept": rows * (width + 2 * hidden) * element,
        "forward": 3 * product,
        "backward": 6 * product,
    }
