"""The Triton kernels against torch's own operators in float64, on a GPU or in the interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

from picotron_lab.kernels import norm, rope, swiglu  # noqa: E402

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty starts as NaN: a number that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all() and torch.empty(1).new_empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# ---- memory beyond the end: first, because later tests may crash where this one fails


def fenced(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor to write to, and the memory around it, filled with 7."""
    memory = torch.full((math.prod(shape) + 4096,), 7.0, device=device)
    return memory[2048:-2048].view(shape), memory


def test_kernels_write_only_their_own_tensors(device):
    x, up, weight = (torch.rand(s, device=device) for s in ((3, 67), (3, 67), (67,)))
    rstd = torch.ones(3, device=device)
    outs, memories = zip(*(fenced((3, 67), device) for _ in range(8)), strict=True)
    block = {"D": 67, "BLOCK": 128}
    norm._forward_kernel[(3,)](x, up, weight, outs[0], outs[1], rstd, EPS, **block)
    norm._backward_kernel[(3,)](x, up, x, weight, rstd, outs[2], outs[3], 3, **block)
    swiglu._forward_kernel[(1,)](x, up, outs[4], 201, BLOCK=1024)
    swiglu._backward_kernel[(1,)](x, x, up, outs[5], outs[6], 201, BLOCK=1024)
    q, k = torch.rand(1, 3, 5, 6, device=device), torch.rand(1, 3, 3, 6, device=device)
    table = torch.ones(3, 6, device=device)
    (q_out, q_memory), (k_out, k_memory) = fenced(q.shape, device), fenced(k.shape, device)
    sizes = {"H": 5, "K": 3, "C": 6, "BLOCK_H": 8, "BLOCK_K": 4, "BLOCK_HALF": 4}
    rope._rope_kernel[(3,)](q, k, table, table, q_out, k_out, 3, INVERSE=False, **sizes)
    for memory in (*memories[:7], q_memory, k_memory):
        assert (memory[:2048] == 7).all() and (memory[-2048:] == 7).all()
        assert (memory[2048:-2048] != 7).any(), "this kernel wrote nothing"


# ---- the cases: name -> (kernel under test, float64 reference, input shapes)


def rope_reference(q, k, angles):
    """Each pair (i, i + C/2) as a complex number, turned by multiplication with exp(i angle)."""
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    turned = [torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k)]
    return [torch.cat([x.real, x.imag], dim=-1) for x in turned]


def rope_fused(q, k, angles):
    table = torch.cat([angles, angles], dim=-1).float()
    return rope.rope_qk(q, k, table.cos(), table.sin())


def add_norm_reference(x, delta, weight):
    return x + delta, F.rms_norm(x + delta, weight.shape, weight, EPS)


CASES = {
    "rms_norm": (
        lambda x, w: [norm.rms_norm(x, w, EPS)],
        lambda x, w: [F.rms_norm(x, w.shape, w, EPS)],
        [(3, 5, 67), (67,)],
    ),
    "add_rms_norm": (
        lambda x, delta, w: norm.add_rms_norm(x, delta, w, EPS),
        add_norm_reference,
        [(3, 5, 67), (3, 5, 67), (67,)],
    ),
    "add_rms_norm many rows": (  # three rows for some programs, two for others, on one SM
        lambda x, delta, w: norm.add_rms_norm(x, delta, w, EPS),
        add_norm_reference,
        [(70, 9), (70, 9), (9,)],
    ),
    "add_rms_norm wide": (
        lambda x, delta, w: norm.add_rms_norm(x, delta, w, EPS),
        add_norm_reference,
        [(3, 3001), (3, 3001), (3001,)],
    ),
    "swiglu": (
        lambda gate, up: [swiglu.swiglu(gate, up)],
        lambda gate, up: [F.silu(gate) * up],
        [(3, 5, 67), (3, 5, 67)],
    ),
    "swiglu many blocks": (
        lambda gate, up: [swiglu.swiglu(gate, up)],
        lambda gate, up: [F.silu(gate) * up],
        [(2, 1300), (2, 1300)],
    ),
    "rope": (rope_fused, rope_reference, [(2, 3, 5, 6), (2, 3, 2, 6), (3, 3)]),
    "rope many heads": (rope_fused, rope_reference, [(1, 2, 20, 128), (1, 2, 1, 128), (2, 64)]),
}
BASIC = ["rms_norm", "add_rms_norm", "swiglu", "rope"]


def draw(name: str) -> list[torch.Tensor]:
    """Float64 inputs of a case; the gradients of its outputs come from grads_like."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in CASES[name][2]
    ]


def grads_like(tensors) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in tensors]


def among_nans(x: torch.Tensor, strided: bool) -> torch.Tensor:
    """The same values between NaNs: contiguous, or (strided) with a NaN after every number."""
    if strided:
        room = x.new_full((*x.shape, 2), math.nan)
        room[..., 0] = x
        return room[..., 0]
    room = x.new_full((x.numel() + 256,), math.nan)
    room[128:-128] = x.flatten()
    return room[128:-128].view(x.shape)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str):
    """Four units in the last place of the largest number.

    Half would do for one rounding to nearest; but a result passes up to three roundings, and
    Triton's interpreter rounds bfloat16 towards zero, which is one unit each time.
    """
    expected = expected.to(actual.device)
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    limit = 4 * torch.finfo(dtype).eps
    assert actual.dtype == dtype and worst <= limit, f"{name}: off by {worst:.1e} > {limit:.1e}"


def compare(name: str, dtype: torch.dtype, device: str, strided: bool) -> None:
    """Outputs and all gradients of one case, kernel against float64."""
    fused, reference, _ = CASES[name]
    values = [x.to(dtype) for x in draw(name)]
    exact = [x.double().requires_grad_() for x in values]
    given = [among_nans(x.to(device), strided).requires_grad_() for x in values]
    if name.startswith("rope"):  # the angles are no learned input, and stay in fp32
        exact[2], given[2] = draw(name)[2], draw(name)[2].to(device)
    exact_outputs, outputs = reference(*exact), fused(*given)
    grads = [g.to(dtype) for g in grads_like(exact_outputs)]
    exact_grads = torch.autograd.grad(
        exact_outputs, [x for x in exact if x.requires_grad], [g.double() for g in grads]
    )
    given_grads = torch.autograd.grad(
        outputs,
        [x for x in given if x.requires_grad],
        [among_nans(g.to(device), strided) for g in grads],
    )
    for i, pair in enumerate(zip(outputs, exact_outputs, strict=True)):
        assert_close(*pair, dtype, f"{name} output {i}")
        assert pair[0].is_contiguous()
    for i, pair in enumerate(zip(given_grads, exact_grads, strict=True)):
        assert_close(*pair, dtype, f"{name} gradient of input {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_match_float64(name, dtype, device):
    compare(name, dtype, device, strided=False)


@pytest.mark.parametrize("name", BASIC)
def test_non_contiguous_inputs_and_gradients(name, device):
    compare(name, torch.float32, device, strided=True)


def test_add_rms_norm_rounds_where_hugging_face_llama_rounds(device):
    """In float16, which the interpreter rounds to nearest as a GPU does: the same bits.

    Up to one in a hundred may differ, where fp32 sums in another order meet a rounding boundary.
    """
    x, delta, weight = (a.half().to(device) for a in draw("add_rms_norm"))
    hidden = (x + delta).float()
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    expected = weight * (hidden * scale).half()
    s, y = norm.add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(s, x + delta)
    assert (y == expected).double().mean() > 0.99


# ---- numbers worked by hand


def test_rms_norm_by_hand(device):
    """mean(7^2, 1^2) = 25, so (7, 1) becomes (7, 1) / 5, times the weight (10, 5)."""
    x = torch.tensor([[7.0, 1.0]], device=device)
    weight = torch.tensor([10.0, 5.0], device=device)
    s, y = norm.add_rms_norm(x - 2.0, torch.full_like(x, 2.0), weight, 0.0)
    assert s.tolist() == [[7.0, 1.0]]
    assert y[0].tolist() == pytest.approx([14.0, 1.0])
    assert norm.rms_norm(x, weight, 0.0)[0].tolist() == pytest.approx([14.0, 1.0])
    assert norm.rms_norm(x, weight, 75.0)[0].tolist() == pytest.approx([7.0, 0.5])


def test_rope_by_hand(device):
    """A quarter turn sends the pair (a, b) = (x[i], x[i + C/2]) to (-b, a)."""
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 4, device=device), torch.ones(1, 4, device=device)
    q_turned, k_turned = rope.rope_qk(q, 10 * q, cos, sin)
    assert q_turned.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]
    assert k_turned.flatten().tolist() == [-30.0, -40.0, 10.0, 20.0]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # wanted: 1 / (1 + inf) = 0
def test_swiglu_by_hand_and_far_from_zero(device):
    """silu(0) = 0, silu(log 3) = 3/4 log 3, silu(-1000) = 0 and silu(1000) = 1000."""
    gate = torch.tensor([0.0, math.log(3.0), -1000.0, 1000.0], device=device, requires_grad=True)
    out = swiglu.swiglu(gate, torch.full_like(gate, 2.0))
    assert out.tolist() == pytest.approx([0.0, 1.5 * math.log(3.0), 0.0, 2000.0])
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    slope = 0.75 * (1.0 + 0.25 * math.log(3.0))
    assert dgate.tolist() == pytest.approx([1.0, 2 * slope, 0.0, 2.0])


# ---- outputs that are not used, tensors without elements, more than 2^31 numbers


@pytest.mark.parametrize("used", [0, 1], ids=["only the sum", "only the norm"])
def test_add_rms_norm_with_one_output_used(used, device):
    values = draw("add_rms_norm")
    given = [x.float().to(device).requires_grad_() for x in values]
    exact = [x.float().double().requires_grad_() for x in values]
    (grad,) = grads_like(values[:1])
    norm.add_rms_norm(*given, EPS)[used].backward(grad.float().to(device))
    add_norm_reference(*exact)[used].backward(grad.float().double())
    for mine, theirs, name in zip(given, exact, ["x", "delta", "weight"], strict=True):
        if theirs.grad is None:
            assert mine.grad is None, f"{name} was not used and needs no gradient"
        else:
            assert_close(mine.grad, theirs.grad, torch.float32, name)


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("rms_norm", [(0, 67), (67,)]),
        ("add_rms_norm", [(0, 67), (0, 67), (67,)]),
        ("swiglu", [(0, 67), (0, 67)]),
        ("rope", [(0, 3, 5, 6), (0, 3, 2, 6), (3, 3)]),
    ],
)
def test_no_rows(name, shapes, device):
    """An expert without tokens: empty results, and a gradient of zero for the weight."""
    inputs = [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]
    outputs = CASES[name][0](*inputs)
    assert [out.shape for out in outputs] == [x.shape for x in inputs[: len(outputs)]]
    sum(out.sum() for out in outputs).backward()
    if "norm" in name:
        assert inputs[-1].grad.tolist() == [0.0] * 67


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 30 GB of GPU memory")
def test_more_than_two_to_the_31_numbers():
    x = torch.zeros(2**31 // 4096 + 1, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    assert (norm.rms_norm(x, torch.ones_like(x[0]), EPS)[-1] == 1.0).all()
    assert (swiglu.swiglu(x, x)[-1] > 3.5).all()
    q = x.view(1, -1, 32, 128)
    cos = torch.full((q.shape[1], 128), 0.5, device="cuda")
    q_turned, _ = rope.rope_qk(q, q[:, :, :1], cos, torch.zeros_like(cos))
    assert (q_turned[0, -1] == 1.0).all()
