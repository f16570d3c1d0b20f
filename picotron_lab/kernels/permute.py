"""What experts need besides matmuls: rows sorted by expert, activated, weighted and added up.

Source   Gale et al. 2022, "MegaBlocks" (2211.15841), section 4: choices sorted by expert are the
         rows of a grouped matmul. Sort: counting sort, Knuth, TAOCP 3, 5.2, algorithm D.
Idea     A choice's place in the list sorted by expert is: how many choose a smaller expert, plus
         how many before it choose the same. Both follow from counts of blocks of choices; ranks
         within a block come from comparing each with each. No atomics: the same bits in every run.
         With its places, a token can write all its rows itself, and add them up afterwards.
Fused    spread            rows[place[n, j]] = x[n]
         collect           out[n] = sum over j of gate[n, j] * rows[place[n, j]], or without gates
         collect_backward  drows[place[n, j]] = gate[n, j] * dout[n];  dgate[n, j] = dout[n] . row
         activate          h = silu(gate) * up of rows that hold both, gate | up
         activate_backward d(gate | up), and h once more, for the matmul that made dh needs it
         Arithmetic in fp32, rounded once. A place of -1 is a dropped choice: nothing there.
Bytes    per row of D numbers, k rows a token, e = bytes of one stored number (2 for bf16):
           spread, collect          read or write every row, and the tokens:  (1 + 1/k) e D
           collect in torch         gather, multiply, index_add:               7e D and more
           collect_backward         read rows and tokens, write drows:         (2 + 1/k) e D
         per row of F columns: activate 3e F; its backward 6e F, and nothing kept but gate | up
Dims     N tokens, k choices of each, L = N * k choices, E experts, M rows = choices not dropped,
         D width, F feed-forward width, G = 2F columns of gate | up, P programs of the sort.
Reading  _count_kernel, _place_kernel; _spread_kernel, _collect_kernel and its backward;
         _activate_kernel and its backward; the operators that launch them; the functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SORT_BLOCK = 128  # choices per program: each is compared with each of them
MAX_BLOCK = 2048  # numbers that a program reads at a time: 8 per thread of 8 warps


# ---- 1. the kernels


@triton.jit
def _count_kernel(
    expert_ptr, count_ptr, n, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program p counts how often each expert is chosen in block p; bin E takes the dropped."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + i, mask=i < n, other=E).to(tl.int32)
    tl.store(count_ptr + block * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit
def _place_kernel(
    expert_ptr, first_ptr, place_ptr, n, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """first_ptr [P, BINS]: the place of the first choice of each expert in each block."""
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    i = block * BLOCK + within
    expert = tl.load(expert_ptr + i, mask=i < n, other=E).to(tl.int32)
    earlier = (expert[:, None] == expert[None, :]) & (within[None, :] < within[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    place = tl.load(first_ptr + block * BINS + expert) + rank
    tl.store(place_ptr + i, tl.where(expert < E, place, -1), mask=i < n)


@triton.jit
def _spread_kernel(
    x_ptr, place_ptr, rows_ptr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (n, b) reads block b of token n once and writes it to each of its K rows."""
    token = tl.program_id(0).to(tl.int64)  # M * D may exceed 2^31; places are int64
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * D + cols, mask=cols < D, other=0.0)
    for j in tl.static_range(K):
        place = tl.load(place_ptr + token * K + j)
        tl.store(rows_ptr + place * D + cols, x, mask=(cols < D) & (place >= 0))


@triton.jit
def _collect_kernel(
    rows_ptr, place_ptr, gate_ptr, out_ptr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (n, b) adds block b of the K rows of token n. gate_ptr is None for a plain sum."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(K):
        place = tl.load(place_ptr + token * K + j)
        there = (cols < D) & (place >= 0)
        row = tl.load(rows_ptr + place * D + cols, mask=there, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            row *= tl.load(gate_ptr + token * K + j).to(tl.float32)
        total += row
    tl.store(out_ptr + token * D + cols, total, mask=cols < D)


@triton.jit
def _collect_backward_kernel(
    dout_ptr, rows_ptr, place_ptr, gate_ptr, drows_ptr, dgate_ptr,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for one token: its gradient comes from the cache again for each of its rows."""
    token = tl.program_id(0).to(tl.int64)
    for j in range(K):
        place = tl.load(place_ptr + token * K + j)
        gate = tl.load(gate_ptr + token * K + j).to(tl.float32)
        dot = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, D, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            there = (cols < D) & (place >= 0)
            dout = tl.load(dout_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
            row = tl.load(rows_ptr + place * D + cols, mask=there, other=0.0).to(tl.float32)
            dot += dout * row
            tl.store(drows_ptr + place * D + cols, gate * dout, mask=there)
        tl.store(dgate_ptr + token * K + j, tl.sum(dot))


@triton.jit
def _activate_kernel(gu_ptr, h_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    """Program (m, b): block b of row m. A row of gu holds F gates, then F ups."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(gu_ptr + row * 2 * F + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gu_ptr + row * 2 * F + F + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * F + cols, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _activate_backward_kernel(dh_ptr, gu_ptr, dgu_ptr, h_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    """As above; the gradients of silu are those in swiglu.py."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(gu_ptr + row * 2 * F + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gu_ptr + row * 2 * F + F + cols, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    silu = gate * sigma
    dgate = dh * up * sigma * (1.0 + gate * (1.0 - sigma))
    tl.store(dgu_ptr + row * 2 * F + cols, dgate, mask=mask)
    tl.store(dgu_ptr + row * 2 * F + F + cols, dh * silu, mask=mask)
    tl.store(h_ptr + row * F + cols, silu * up, mask=mask)


# ---- 2. the operators: allocate, launch, and tell torch the shapes


def _block_and_warps(width: int) -> tuple[int, int]:
    """Numbers per program and its warps: 8 numbers per thread, one 128-bit load of bf16."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return block, max(1, block // 256)


@torch.library.custom_op("picotron_lab::sort_choices", mutates_args=())
def _sort_choices(expert_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    expert_Nk = expert_Nk.contiguous()
    n, bins = expert_Nk.numel(), triton.next_power_of_2(experts + 1)
    programs = triton.cdiv(n, SORT_BLOCK)
    sizes = {"E": experts, "BINS": bins, "BLOCK": SORT_BLOCK}
    count_PE = expert_Nk.new_empty(programs, bins, dtype=torch.int32)
    place_Nk = torch.empty_like(expert_Nk, dtype=torch.int64)
    _count_kernel[(programs,)](expert_Nk, count_PE, n, **sizes)
    total_E = count_PE.sum(0)
    earlier_PE = count_PE.cumsum(0) - count_PE
    first_PE = (earlier_PE + (total_E.cumsum(0) - total_E)).int()
    _place_kernel[(programs,)](expert_Nk, first_PE, place_Nk, n, **sizes)
    return place_Nk, total_E[:experts].clone()


@torch.library.custom_op("picotron_lab::spread_rows", mutates_args=())
def _spread(x_ND: Tensor, place_Nk: Tensor, rows: int) -> Tensor:
    x_ND, place_Nk = x_ND.contiguous(), place_Nk.contiguous()
    (tokens, width), k = x_ND.shape, place_Nk.shape[1]
    rows_MD = x_ND.new_empty(rows, width)
    block, warps = _block_and_warps(width)
    _spread_kernel[(tokens, triton.cdiv(width, block))](
        x_ND, place_Nk, rows_MD, K=k, D=width, BLOCK=block, num_warps=warps
    )
    return rows_MD


@torch.library.custom_op("picotron_lab::collect_rows", mutates_args=())
def _collect(rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor | None) -> Tensor:
    rows_MD, place_Nk = rows_MD.contiguous(), place_Nk.contiguous()
    gate_Nk = None if gate_Nk is None else gate_Nk.contiguous()
    (tokens, k), width = place_Nk.shape, rows_MD.shape[1]
    out_ND = rows_MD.new_empty(tokens, width)
    block, warps = _block_and_warps(width)
    _collect_kernel[(tokens, triton.cdiv(width, block))](
        rows_MD, place_Nk, gate_Nk, out_ND, K=k, D=width, BLOCK=block, num_warps=warps
    )
    return out_ND


@torch.library.custom_op("picotron_lab::collect_rows_backward", mutates_args=())
def _collect_backward(
    dout_ND: Tensor, rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor
) -> tuple[Tensor, Tensor]:
    dout_ND, rows_MD = dout_ND.contiguous(), rows_MD.contiguous()
    place_Nk, gate_Nk = place_Nk.contiguous(), gate_Nk.contiguous()
    (tokens, k), width = place_Nk.shape, rows_MD.shape[1]
    drows_MD, dgate_Nk = torch.empty_like(rows_MD), torch.empty_like(gate_Nk)
    block, warps = _block_and_warps(width)
    _collect_backward_kernel[(tokens,)](
        dout_ND, rows_MD, place_Nk, gate_Nk, drows_MD, dgate_Nk,
        K=k, D=width, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return drows_MD, dgate_Nk


@torch.library.custom_op("picotron_lab::activate_rows", mutates_args=())
def _activate(gu_MG: Tensor) -> Tensor:
    gu_MG = gu_MG.contiguous()
    rows, width = gu_MG.shape[0], gu_MG.shape[1] // 2
    h_MF = gu_MG.new_empty(rows, width)
    block, warps = _block_and_warps(width)
    _activate_kernel[(rows, triton.cdiv(width, block))](
        gu_MG, h_MF, F=width, BLOCK=block, num_warps=warps
    )
    return h_MF


@torch.library.custom_op("picotron_lab::activate_rows_backward", mutates_args=())
def _activate_backward(dh_MF: Tensor, gu_MG: Tensor) -> tuple[Tensor, Tensor]:
    dh_MF, gu_MG = dh_MF.contiguous(), gu_MG.contiguous()
    dgu_MG, h_MF = torch.empty_like(gu_MG), torch.empty_like(dh_MF)
    rows, width = dh_MF.shape
    block, warps = _block_and_warps(width)
    _activate_backward_kernel[(rows, triton.cdiv(width, block))](
        dh_MF, gu_MG, dgu_MG, h_MF, F=width, BLOCK=block, num_warps=warps
    )
    return dgu_MG, h_MF


@_sort_choices.register_fake
def _sort_choices_fake(expert_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    wide = {"dtype": torch.int64}
    return expert_Nk.new_empty(expert_Nk.shape, **wide), expert_Nk.new_empty(experts, **wide)


@_spread.register_fake
def _spread_fake(x_ND: Tensor, place_Nk: Tensor, rows: int) -> Tensor:
    return x_ND.new_empty(rows, x_ND.shape[1])


@_collect.register_fake
def _collect_fake(rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor | None) -> Tensor:
    return rows_MD.new_empty(place_Nk.shape[0], rows_MD.shape[1])


@_collect_backward.register_fake
def _collect_backward_fake(
    dout_ND: Tensor, rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor
) -> tuple[Tensor, Tensor]:
    return rows_MD.new_empty(rows_MD.shape), gate_Nk.new_empty(gate_Nk.shape)


@_activate.register_fake
def _activate_fake(gu_MG: Tensor) -> Tensor:
    return gu_MG.new_empty(gu_MG.shape[0], gu_MG.shape[1] // 2)


@_activate_backward.register_fake
def _activate_backward_fake(dh_MF: Tensor, gu_MG: Tensor) -> tuple[Tensor, Tensor]:
    return gu_MG.new_empty(gu_MG.shape), dh_MF.new_empty(dh_MF.shape)


# ---- 3. the public functions: none is differentiable, grouped_experts.py pairs them


def _check(rows: Tensor, *per_choice: Tensor | None) -> None:
    if rows.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(
            f"The kernels around experts compute in float32 and were given {rows.dtype}; give them "
            "bfloat16, float16 or float32, or use torch's own operators."
        )
    tables = [table for table in per_choice if table is not None]
    good = all(table.dim() == 2 and table.shape == tables[0].shape for table in tables)
    if rows.dim() != 2 or not good or any(table.dtype != torch.int64 for table in tables[:1]):
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (rows, *tables))
        raise ValueError(
            f"The kernels around experts were given {given}; they need rows [M, D] and, of each "
            "choice, its place [N, k] of torch.int64 and its gate [N, k]."
        )


def sort_choices(expert_Nk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the place of each choice in the list sorted by expert [N, k], and counts [experts].

    expert_Nk  integers 0..experts; `experts` is a dropped choice, whose place is -1
    Both are int64. Equal experts keep the order of n, then of j.
    """
    return _sort_choices(expert_Nk, experts)


def spread(x_ND: Tensor, place_Nk: Tensor, rows: int) -> Tensor:
    """Return rows [rows, D]: row place[n, j] is x[n].

    x_ND       bfloat16, float16 or float32
    place_Nk   int64: each number of 0..rows-1 once, and -1 for what is dropped
    Raises TypeError for another dtype, ValueError for shapes that do not fit.
    """
    _check(x_ND, place_Nk)
    return _spread(x_ND, place_Nk, rows)


def collect(rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor | None) -> Tensor:
    """Return out [N, D]: sum over j of gate[n, j] * rows[place[n, j]], gates of None being 1.

    Places, dtypes and errors as in spread. This is also the gradient of spread.
    """
    _check(rows_MD, place_Nk, gate_Nk)
    return _collect(rows_MD, place_Nk, gate_Nk)


def collect_backward(
    dout_ND: Tensor, rows_MD: Tensor, place_Nk: Tensor, gate_Nk: Tensor
) -> tuple[Tensor, Tensor]:
    """Return drows [M, D] and dgate [N, k] of collect; a dropped choice's gate gets 0."""
    _check(rows_MD, place_Nk, gate_Nk)
    return _collect_backward(dout_ND, rows_MD, place_Nk, gate_Nk)


def activate(gu_MG: Tensor) -> Tensor:
    """Return h [M, F] = silu(gate) * up of rows gate | up [M, 2F]; dtypes and errors as above."""
    _check(gu_MG)
    return _activate(gu_MG)


def activate_backward(dh_MF: Tensor, gu_MG: Tensor) -> tuple[Tensor, Tensor]:
    """Return d(gate | up) [M, 2F] for dh [M, F], and h [M, F] itself once more."""
    _check(gu_MG)
    return _activate_backward(dh_MF, gu_MG)
