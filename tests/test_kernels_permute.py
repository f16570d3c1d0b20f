"""The kernels around experts: against float64, within the experts, and as machine code."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

from picotron_lab import grouped_experts  # noqa: E402
from picotron_lab.grouped_experts import GroupedExperts, combine, sort_choices  # noqa: E402
from picotron_lab.kernels import permute  # noqa: E402
from picotron_lab.model import MLP  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# a masked tail, also with a NaN after every number; one number; a whole block; two, with a tail
LAYOUTS = [(67, False), (67, True), (1, False), (64, False), (permute.MAX_BLOCK + 43, False)]
every_width = pytest.mark.parametrize("width, strided", LAYOUTS)
# rows of tokens 0..3, some choices dropped; a place for every row from 0 to 5
PLACES = [[4, -1, 1], [-1, -1, -1], [0, 5, 2], [-1, 3, -1]]
FENCE = 4096


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty starts as NaN, or as the largest integer: what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all() and torch.empty(1).new_empty(1).isnan().all()
    assert torch.empty(1, dtype=torch.int64) == torch.iinfo(torch.int64).max
    yield
    torch.use_deterministic_algorithms(False)


def draw(shapes: list[tuple], dtype: torch.dtype, device: str, strided: bool = False) -> list:
    """Random numbers, between NaNs, which a load beyond the end would find, or a wrong stride."""
    dice, found, step = torch.Generator().manual_seed(0), [], 1 + strided
    for shape in shapes:
        size = step * math.prod(shape) + 2 * FENCE
        memory = torch.full((size,), math.nan, dtype=dtype, device=device)
        values = memory[FENCE:-FENCE:step].view(shape)
        found.append(values.copy_(torch.randn(shape, generator=dice)))
    return found


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Four units in the last place of the largest number (see test_kernels.py)."""
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    assert worst <= 4 * torch.finfo(dtype).eps, f"off by {worst:.1e}"


def table_of(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Places, not contiguous, and the same as zeros and ones [N, k, M] in float64."""
    place = torch.tensor(PLACES, device=device).T.contiguous().T
    return place, (place[..., None] == torch.arange(6, device=device)).double()


# ---- the sort


def sorted_by_hand(expert: torch.Tensor, experts: int) -> tuple[list, list]:
    """Places and counts with Python's sort, which is stable."""
    chosen = expert.flatten().tolist()
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    place = [-1] * len(chosen)
    for row, choice in enumerate(order):
        place[choice] = row if chosen[choice] < experts else -1
    return place, [chosen.count(e) for e in range(experts)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("experts", [1, 3, 4, 31, 200])
@pytest.mark.parametrize("shape", [(1, 1), (43, 3), (128, 2), (65, 8)])
def test_sort(shape, experts, dtype, device):
    """Within one block, one and a part, whole blocks only, and several with a tail."""
    dice = torch.Generator().manual_seed(experts)
    expert = torch.randint(0, experts + 1, shape, generator=dice)
    place, counts = permute.sort_choices(expert.to(device, dtype), experts)
    assert (place.flatten().tolist(), counts.tolist()) == sorted_by_hand(expert, experts)
    assert place.shape == shape and place.dtype == counts.dtype == torch.int64


@pytest.mark.parametrize("chosen", [0, 2, 3])
def test_sort_of_equal_choices(chosen, device):
    """All to the first expert, to the last, and all dropped: the order stays as it is."""
    expert = torch.full((100, 2), chosen, device=device)
    place, counts = permute.sort_choices(expert, 3)
    expected = torch.arange(200) if chosen < 3 else torch.full((200,), -1)
    assert torch.equal(place.flatten().cpu(), expected)
    assert counts.tolist() == [200 * (e == chosen) for e in range(3)]


def test_sort_reads_strided_choices(device):
    expert = torch.tensor([[1, 9, 0, 9], [0, 9, 2, 9]], device=device)[:, ::2]
    place, counts = permute.sort_choices(expert, 3)
    assert (place.tolist(), counts.tolist()) == ([[2, 0], [1, 3]], [2, 1, 1])


# ---- rows and tokens


@every_dtype
@every_width
def test_spread(width, strided, dtype, device):
    place, table = table_of(device)
    (x,) = draw([(4, width)], dtype, device, strided)
    rows = permute.spread(x, place, 6)
    assert torch.equal(rows.double(), table.sum(1).T @ x.double())
    assert rows.dtype == dtype and rows.is_contiguous()


@every_dtype
@every_width
@pytest.mark.parametrize("gates", [True, False])
def test_collect(width, strided, dtype, gates, device):
    place, table = table_of(device)
    rows, gate = draw([(6, width), (4, 3)], dtype, device, strided)
    out = permute.collect(rows, place, gate if gates else None)
    weights = table * gate.double()[..., None] if gates else table
    assert_close(out, weights.sum(1) @ rows.double(), dtype)
    assert not out[1].any(), "a token without rows is zero"


@every_dtype
@every_width
def test_collect_backward(width, strided, dtype, device):
    place, table = table_of(device)
    rows, dout, gate = draw([(6, width), (4, width), (4, 3)], dtype, device, strided)
    drows, dgate = permute.collect_backward(dout, rows, place, gate)
    exact_rows, exact_gate = (t.double().requires_grad_() for t in (rows, gate))
    exact = (table * exact_gate[..., None]).sum(1) @ exact_rows
    exact.backward(dout.double())
    assert_close(drows, exact_rows.grad, dtype)
    assert_close(dgate, exact_gate.grad, dtype)
    assert not dgate[place < 0].any()


def test_sums_are_taken_in_float32(device):
    """256 + 1 + 1 is 256 in bf16, term by term, and 258 if it is rounded once."""
    rows = torch.tensor([[256.0], [1], [1]], dtype=torch.bfloat16, device=device)
    place = torch.tensor([[0, 1, 2]], device=device)
    assert permute.collect(rows, place, None).tolist() == [[258]]


# ---- the activation


@every_dtype
@every_width
def test_activate(width, strided, dtype, device):
    gu, dh = draw([(3, 2 * width), (3, width)], dtype, device, strided)
    exact = gu.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    h = F.silu(gate) * up
    h.backward(dh.double())
    assert_close(permute.activate(gu), h.detach(), dtype)
    dgu, again = permute.activate_backward(dh, gu)
    assert_close(dgu, exact.grad, dtype)
    assert_close(again, h.detach(), dtype)


# ---- memory beyond the end


def fenced(shape: tuple[int, ...], dtype: torch.dtype, device: str):
    """A tensor to write to, and the memory around it, filled with 7."""
    memory = torch.full((math.prod(shape) + 2 * FENCE,), 7, dtype=dtype, device=device)
    return memory[FENCE:-FENCE].view(shape), memory


def test_kernels_write_only_their_own_tensors(device):
    place, _ = table_of(device)
    ints, floats = (torch.int32, torch.int64), (torch.float32,) * 7
    shapes = [(1, 4), (4, 3), (6, 67), (4, 67), (6, 67), (4, 3), (6, 67), (6, 134), (6, 67)]
    pairs = [fenced(s, t, device) for s, t in zip(shapes, ints + floats, strict=True)]
    outs, memories = zip(*pairs, strict=True)
    x, rows, gu = (torch.rand(s, device=device) for s in ((4, 67), (6, 67), (6, 134)))
    gate, first = torch.rand(4, 3, device=device), torch.zeros(1, 4, dtype=torch.int32).to(device)
    expert, sizes = place.clamp(0, 3), {"E": 3, "BINS": 4, "BLOCK": 128}
    permute._count_kernel[(1,)](expert, outs[0], 12, **sizes)
    permute._place_kernel[(1,)](expert, first, outs[1], 12, **sizes)
    wide = {"K": 3, "D": 67, "BLOCK": 128}
    permute._spread_kernel[(4, 1)](x, place, outs[2], **wide)
    permute._collect_kernel[(4, 1)](rows, place, gate, outs[3], **wide)
    permute._collect_backward_kernel[(4,)](x, rows, place, gate, outs[4], outs[5], **wide)
    permute._activate_kernel[(6, 1)](gu, outs[6], F=67, BLOCK=128)
    permute._activate_backward_kernel[(6, 1)](rows, gu, outs[7], outs[8], F=67, BLOCK=128)
    for memory in memories:
        assert (memory[:FENCE] == 7).all() and (memory[-FENCE:] == 7).all()
        assert (memory[FENCE:-FENCE] != 7).any(), "this kernel wrote nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of GPU memory")
def test_more_than_two_to_the_31_numbers():
    x = torch.zeros(2**31 // 4096 + 1, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    place = torch.arange(len(x), device="cuda")[:, None]
    assert (permute.spread(x, place, len(x))[-1] == 2).all()
    assert (permute.collect(x, place, None)[-1] == 2).all()
    assert (permute.activate(x)[-1] > 3.5).all()


# ---- within the experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chosen", [[[0, 2], [2, 3], [0, 0], [3, 2], [2, 0]], [[3, 3]]])
def test_experts_with_kernels(chosen, dtype, device, monkeypatch):
    """Four of five tokens' rows, none for expert 1; and no row at all. 3 is a dropped choice."""
    monkeypatch.setattr(grouped_experts, "operators", lambda x: permute)
    monkeypatch.setattr(grouped_experts, "pays_at_once", lambda x: True)
    torch.manual_seed(0)
    module = GroupedExperts([MLP(16, 8) for _ in range(3)]).to(device, dtype)
    grouped_experts.pack(module)
    expert = torch.tensor(chosen, device=device)
    x, gate = (torch.randn(len(expert), n).to(device, dtype).requires_grad_() for n in (16, 2))
    place, counts = sort_choices(expert, 3)
    rows = grouped_experts.permute(x, place, int(counts.sum()))
    out = combine(module(rows, counts), place, gate)
    dout = torch.randn(out.shape).to(device, dtype)
    found = torch.autograd.grad(out, [x, gate, *module.parameters()], dout)

    inputs = [t.detach().double().requires_grad_() for t in (x, gate, *module.parameters())]
    terms = 0 * inputs[0]
    for e in range(3):
        w_gate, w_up, w_down = inputs[2 + 3 * e : 5 + 3 * e]
        y = (F.silu(inputs[0] @ w_gate.T) * (inputs[0] @ w_up.T)) @ w_down.T
        terms = terms + ((expert == e) * inputs[1]).sum(1, keepdim=True) * y
    exact = torch.autograd.grad(terms, inputs, dout.double())
    close = dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 3e-2)
    for mine, theirs in zip([out, *found], [terms, *exact], strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False, **close)


def test_no_tokens_and_no_rows(device):
    """A rank without tokens, and one whose experts nobody chose."""
    none, place = torch.zeros(0, 8, device=device), torch.full((2, 3), -1, device=device)
    nobody = torch.zeros(0, 3, dtype=torch.int64, device=device)
    places, counts = permute.sort_choices(nobody, 2)
    assert places.shape == (0, 3) and counts.tolist() == [0, 0]
    assert permute.sort_choices(nobody, 0)[1].shape == (0,)
    assert permute.spread(none, nobody, 0).shape == (0, 8)
    assert permute.spread(torch.ones(2, 8, device=device), place, 0).shape == (0, 8)
    assert permute.collect(none, place, None).tolist() == [[0] * 8] * 2
    dout, gate = torch.ones(2, 8, device=device), torch.ones(2, 3, device=device)
    drows, dgate = permute.collect_backward(dout, none, place, gate)
    assert drows.shape == (0, 8) and not dgate.any()
    assert permute.activate(none).shape == (0, 4)
    assert [t.shape for t in permute.activate_backward(none[:, :4], none)] == [(0, 8), (0, 4)]


# ---- as torch sees them


def examples(device: str) -> dict[str, tuple]:
    """Arguments of each operator."""
    place, _ = table_of(device)
    x, rows, gate = draw([(4, 67), (6, 67), (4, 3)], torch.float32, device)
    gu, dh = draw([(5, 14), (5, 7)], torch.float32, device)
    return {
        "sort_choices": (place.clamp(0, 3), 3),
        "spread_rows": (x, place, 6),
        "collect_rows": (rows, place, gate),
        "collect_rows_backward": (x, rows, place, gate),
        "activate_rows": (gu,),
        "activate_rows_backward": (dh, gu),
    }


@pytest.mark.parametrize("name", examples("cpu"))
def test_torch_accepts_the_operators(name, device):
    """Shapes without data among other things."""
    torch.library.opcheck(getattr(torch.ops.picotron_lab, name).default, examples(device)[name])


def test_shapes_without_data(device):
    """The dry run needs shape and dtype of every result."""
    with FakeTensorMode():
        x, gate = (torch.empty(5, n, dtype=torch.bfloat16, device=device) for n in (16, 2))
        place, counts = permute.sort_choices(torch.empty(5, 2, device=device).long(), 3)
        out = permute.collect(permute.spread(x, place, 10), place, gate)
        assert (place.shape, place.dtype, counts.shape) == ((5, 2), torch.int64, (3,))
        assert (out.shape, out.dtype) == ((5, 16), torch.bfloat16)
        assert permute.activate(out).shape == (5, 8)


def test_refusals(device):
    place, _ = table_of(device)
    x, rows, gate = draw([(4, 67), (6, 67), (4, 3)], torch.float32, device)
    with pytest.raises(TypeError, match="given torch.float64; give them bfloat16"):
        permute.spread(x.double(), place, 6)
    for call in (
        lambda: permute.spread(x[0], place, 6),
        lambda: permute.spread(x, place.int(), 6),
        lambda: permute.collect(rows, place, gate[:, :2]),
        lambda: permute.collect_backward(x, rows, place, gate[:3]),
    ):
        with pytest.raises(ValueError, match=r"they need rows \[M, D\] and, of each choice"):
            call()


# ---- compiled for a GPU that need not be there


def cases() -> dict:
    """Name -> (kernel, argument types, constants, warps): large models, and widths that are odd."""
    found = {}
    for experts in (8, 256):
        constants = {"E": experts, "BINS": 2 * experts, "BLOCK": permute.SORT_BLOCK}
        types = {"expert_ptr": "*i64", "count_ptr": "*i32", "first_ptr": "*i32", "n": "i32"}
        types["place_ptr"] = "*i64"
        found[f"count {experts}"] = (permute._count_kernel, types, constants, 4)
        found[f"place {experts}"] = (permute._place_kernel, types, constants, 4)
    for dtype, width in (("*bf16", 7168), ("*fp32", 1536), ("*bf16", 1419)):
        block, warps = permute._block_and_warps(width)
        for name in ("spread", "collect", "collect_backward", "activate", "activate_backward"):
            kernel = getattr(permute, f"_{name}_kernel")
            sizes = {"F": width} if "activate" in name else {"K": 8, "D": width}
            types = dict.fromkeys(kernel.arg_names, dtype) | {"place_ptr": "*i64"}
            odd = " odd" if width % 8 else ""
            constants = sizes | {"BLOCK": block}
            found[f"{name} {dtype} {width}{odd}"] = (kernel, types, constants, warps)
    sums, types, constants, warps = found["collect *bf16 7168"]
    found["collect without gates"] = sums, types, constants | {"gate_ptr": None}, warps
    return found


@pytest.fixture
def compiled(compiled_kernels) -> dict:
    """What the compiler made of the kernels for sm_90, in a process without the interpreter."""
    return compiled_kernels["permute"]


def test_compiled_kernels_keep_everything_in_registers(compiled):
    """64 registers let 32 warps live on one SM; the sort compares 128 choices with 128."""
    assert len(compiled) == 20
    assert not {k: v for k, v in compiled.items() if v["STACK"] or v["LOCAL"]}
    most = {name.split()[0]: facts["REG"] for name, facts in compiled.items()}
    assert most.pop("place") <= 168 and max(most.values()) <= 64


def test_compiled_kernels_move_128_bits_at_a_time(compiled):
    """All but places, gates and their gradients; rows of an odd width cannot."""
    for name, facts in compiled.items():
        wide = {k: n for k, n in facts["accesses"].items() if re.search(r"\.v4\.[buf]32$", k)}
        narrow = sum(facts["accesses"].values()) - sum(wide.values())
        if "odd" in name:
            assert not wide, name
        elif not name.startswith(("count", "place")):
            # gathered and written rows: at least one access for 8 numbers, two in fp32
            assert sum(wide.values()) >= (2 if "bf16" in name or "gates" in name else 4), name
            assert narrow <= (0 if "activate" in name else 16), name
