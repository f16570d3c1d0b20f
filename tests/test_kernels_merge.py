"""The merge kernel: against float64, by hand, against the whole softmax, and as machine code."""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

from picotron_lab.kernels import merge  # noqa: E402

NOTHING = -math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# B, T, H, C: one number; tails of queries and of columns; whole blocks; a head wider than a block
SHAPES = [(1, 1, 1, 1), (2, 37, 3, 24), (1, 70, 2, 66), (2, 32, 3, 64), (1, 3, 2, 2049)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty starts as NaN: a number that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all() and torch.empty(1).new_empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(shape, dtype, device):
    """(out, lse) and (block_out, block_lse); each fifth row of either has seen nothing."""
    B, T, H, C = shape
    dice = torch.Generator().manual_seed(T)
    sides = []
    for side, side_dtype in enumerate((torch.float32, dtype)):
        out, lse = torch.randn(shape, generator=dice), torch.randn(B, H, T, generator=dice) * 3
        blind = (torch.arange(B * H * T).view(B, H, T) * (side + 2)) % 5 == 1
        out[blind.transpose(1, 2)] = 0
        lse[blind] = NOTHING
        sides.append((out.to(device, side_dtype), lse.to(device)))
    return sides


def inside(values, dims):
    """The values within memory that is NaN before and after, along some dims; that memory."""
    size = [n + 3 * (d in dims) for d, n in enumerate(values.shape)]
    memory = values.new_full(size, math.nan)
    part = memory[tuple(slice(d in dims, n + (d in dims)) for d, n in enumerate(values.shape))]
    return part.copy_(values), memory


def exact(side, block):
    """The softmax over both sets of keys, in float64, straight from its definition."""
    (out, lse), (block_out, block_lse) = ([x.double() for x in pair] for pair in (side, block))
    both = torch.stack([lse, block_lse])
    weights = torch.nan_to_num((both - both.logsumexp(0)).exp())  # neither has seen anything: 0
    first, second = weights.transpose(2, 3)[..., None]
    return first * out + second * block_out, both.logsumexp(0)


def assert_close(actual, expected):
    """Eight units in the last place of the largest float32 number; -inf where it should be."""
    assert torch.equal(actual == NOTHING, expected == NOTHING)
    actual, expected = (x.double().masked_fill(expected == NOTHING, 0) for x in (actual, expected))
    worst = (actual - expected).abs().max()
    largest = max(1.0, float(expected.abs().max()))
    assert worst <= 8 * torch.finfo(torch.float32).eps * largest, f"off by {worst:.1e}"


# ---- against float64


@every_dtype
@every_shape
def test_merge(shape, dtype, device):
    side, block = draw(shape, dtype, device)
    wanted_out, wanted_lse = exact(side, block)
    out, out_memory = inside(side[0], (1, 3))
    lse, lse_memory = inside(side[1], (2,))
    block_out, _ = inside(block[0], (0, 2))
    block_lse, _ = inside(block[1], (0,))
    assert merge.merge_(out, lse, block_out, block_lse) is None
    assert_close(out, wanted_out)
    assert_close(lse, wanted_lse)
    assert torch.equal(block_out, block[0]) and torch.equal(block_lse, block[1])
    for written, memory in ((out, out_memory), (lse, lse_memory)):
        assert int(memory.isnan().sum()) == memory.numel() - written.numel()


@every_dtype
def test_half_of_the_queries(dtype, device):
    """The other half, their lse too, stays as it is; the lse of a head need not lie in a row."""
    side, block = draw((2, 40, 3, 16), dtype, device)
    out, lse = side[0].clone(), side[1].transpose(1, 2).contiguous().transpose(1, 2)
    late = out[:, 20:], lse[..., 20:]
    wanted = exact(late, (block[0][:, :20], block[1][..., :20]))
    merge.merge_(*late, block[0][:, :20], block[1][..., :20])
    assert_close(late[0], wanted[0])
    assert_close(late[1], wanted[1])
    assert torch.equal(out[:, :20], side[0][:, :20]) and torch.equal(
        lse[..., :20], side[1][..., :20]
    )


def test_blocks_of_keys_add_up_to_the_whole_softmax(device):
    """Seven keys in blocks of 3, 0 visible, 1 and 3, in two orders."""
    dice = torch.Generator().manual_seed(0)
    scores_THS = torch.randn(5, 2, 7, generator=dice) * 5
    v_SHC = torch.randn(7, 2, 8, generator=dice)
    wanted = torch.einsum("ths,shc->thc", scores_THS.double().softmax(-1), v_SHC.double())
    for order in ((0, 1, 2, 3), (1, 3, 2, 0)):
        out, lse = torch.zeros(1, 5, 2, 8).to(device), torch.full((1, 2, 5), NOTHING).to(device)
        for i in order:
            keys = (slice(0, 3), slice(0, 0), slice(3, 4), slice(4, 7))[i]
            some = scores_THS[..., keys]
            block_out = torch.einsum("ths,shc->thc", some.softmax(-1), v_SHC[keys])[None]
            block_lse = some.logsumexp(-1).T[None]
            merge.merge_(out, lse, block_out.to(device), block_lse.to(device))
        assert_close(out[0].cpu(), wanted)
        assert_close(lse[0].T.cpu(), scores_THS.double().logsumexp(-1))


# lse, out and the block's -> merged: weights 1 to 3, equal, one side blind, both, far apart
BY_HAND = [
    (0, 0, math.log(3), 4, math.log(4), 3),
    (5, 2, 5, 4, 5 + math.log(2), 3),
    (NOTHING, 0, -3, 4, -3, 4),
    (-3, 4, NOTHING, 0, -3, 4),
    (NOTHING, 0, NOTHING, 0, NOTHING, 0),
    (1e4, 1, -1e4, 7, 1e4, 1),
    (-1e4, 1, 1e4, 7, 1e4, 7),
    (1e38, 1, -1e38, 7, 1e38, 1),
    (1e4, 1, 1e4, 7, 1e4 + math.log(2), 4),
]


@every_dtype
def test_numbers_by_hand(dtype, device):
    lse, out, block_lse, block_out, new_lse, new_out = torch.tensor(BY_HAND, device=device).T
    out, block_out = (x[None, :, None, None].repeat(1, 1, 2, 3) for x in (out, block_out))
    lse, block_lse = (x.repeat(1, 2, 1) for x in (lse, block_lse))
    merge.merge_(out, lse, block_out.to(dtype), block_lse)
    for i in range(len(BY_HAND)):
        assert lse[0, :, i].tolist() == pytest.approx([float(new_lse[i])] * 2, rel=1e-6)
        assert out[0, i].flatten().tolist() == pytest.approx([float(new_out[i])] * 6, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 13 GB of GPU memory")
def test_more_than_two_to_the_31_numbers():
    out = torch.zeros(1, 2**17 + 16, 128, 128, device="cuda")
    block = torch.zeros_like(out, dtype=torch.bfloat16)
    lse = torch.zeros(1, 128, 2**17 + 16, device="cuda")
    block[0, -1, -1], block[0, 0, 0] = 4, 8
    merge.merge_(out, lse, block, torch.full_like(lse, math.log(3)))
    assert float(out.sum()) == pytest.approx(128 * (3 + 6))
    assert float(out[0, -1, -1, -1]) == pytest.approx(3) and float(
        out[0, 0, 0, 0]
    ) == pytest.approx(6)
    assert float(lse.min()) == pytest.approx(math.log(4)) == pytest.approx(float(lse.max()))


# ---- as torch sees it


def test_shapes_without_data(device):
    with FakeTensorMode():
        out, lse = torch.empty(2, 5, 3, 8, device=device), torch.empty(2, 3, 5, device=device)
        assert merge.merge_(out, lse, out.bfloat16(), lse) is None


@every_dtype
def test_torch_accepts_the_operator(dtype, device):
    side, block = draw((2, 5, 3, 8), dtype, device)
    torch.library.opcheck(torch.ops.picotron_lab.merge_.default, (*side, *block))


def test_refusals(device):
    (out, lse), (block_out, block_lse) = draw((2, 5, 3, 8), torch.float32, device)
    for call in (
        lambda: merge.merge_(out.double(), lse, block_out, block_lse),
        lambda: merge.merge_(out.bfloat16(), lse, block_out, block_lse),
        lambda: merge.merge_(out, lse, block_out.double(), block_lse),
        lambda: merge.merge_(out, lse, block_out, block_lse.bfloat16()),
    ):
        with pytest.raises(TypeError, match="give it out, lse and block_lse in float32"):
            call()
    for call in (
        lambda: merge.merge_(out, lse, block_out[:, :4], block_lse),
        lambda: merge.merge_(out, lse, block_out, block_lse[..., :4]),
        lambda: merge.merge_(out, lse.transpose(1, 2), block_out, block_lse.transpose(1, 2)),
    ):
        with pytest.raises(ValueError, match=r"it needs out and block_out \[B, T, H, C\]"):
            call()
    with pytest.raises(ValueError, match="must lie side by side"):
        merge.merge_(out[..., ::2], lse, block_out[..., ::2], block_lse)


# ---- compiled for a GPU that need not be there


def cases() -> dict:
    """Name -> (kernel, argument types, constants, warps): usual head widths, and an odd one."""
    found = {}
    kernel = merge._merge_kernel
    for C, block in ((128, "*bf16"), (128, "*fp32"), (96, "*fp16"), (66, "*bf16")):
        block_t, block_c = merge._blocks(C)
        strides = "i32" if C % 8 else "i32 / 16"
        types = dict.fromkeys(kernel.arg_names, strides) | {"T": "i32", "block_out_ptr": block}
        types |= dict.fromkeys(("out_ptr", "lse_ptr", "block_lse_ptr"), "*fp32")
        constants = {"C": C, "BLOCK_T": block_t, "BLOCK_C": block_c, "lse_t": 1}
        name = f"{block} {C}{' odd width' if C % 8 else ''}"
        found[name] = kernel, types, constants, merge.NUM_WARPS
    return found


@pytest.fixture
def compiled(compiled_kernels) -> dict:
    """What the compiler made of the kernel for sm_90, in a process without the interpreter."""
    return compiled_kernels["merge"]


def test_compiled_kernel_keeps_everything_in_registers(compiled):
    """64 registers let 32 warps, eight programs, live on one SM; an odd width half as many."""
    assert len(compiled) == 4
    assert not {k: v for k, v in compiled.items() if v["STACK"] or v["LOCAL"]}
    assert all(v["REG"] <= (128 if "odd" in k else 64) for k, v in compiled.items())


def test_compiled_kernel_reads_and_writes_each_number_once_128_bits_at_a_time(compiled):
    """16 numbers per thread: out 4 loads and 4 stores, the block 4 loads of fp32, 2 of others. All
    else is lse. An odd width takes a number at a time."""
    for name, facts in compiled.items():
        wide = {k: n for k, n in facts["accesses"].items() if re.search(r"\.v4\.[buf]32$", k)}
        loads = sum(n for k, n in wide.items() if k.startswith("ld"))
        stores = sum(n for k, n in wide.items() if k.startswith("st"))
        narrow = sum(n for k, n in facts["accesses"].items() if k.startswith("st")) - stores
        if "odd width" in name:
            assert (loads, stores, narrow) == (0, 0, 17), name
        else:
            assert (loads, stores, narrow) == (8 if "fp32" in name else 6, 4, 1), name


def test_no_lse_is_overwritten_before_every_warp_has_read_it(compiled):
    """Several warps read a row's lse, and one writes it: last of all, after all have met."""
    for name, facts in compiled.items():
        assert facts["order"][-2:] == ["bar.sync", "st.global"], name
