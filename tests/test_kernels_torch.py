"""The kernels as torch sees them (fake tensors, tracing, refusals), and as sm_90 machine code."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

from picotron_lab.kernels import norm, rope, swiglu  # noqa: E402

EPS = 1e-5


# ---- operators of torch


def rope_by_angles(q, k, angles):
    table = torch.cat([angles, angles], dim=-1).float()
    return rope.rope_qk(q, k, table.cos(), table.sin())


FUSED = {  # name -> (outputs, input shapes)
    "rms_norm": (lambda x, w: [norm.rms_norm(x, w, EPS)], [(3, 5, 67), (67,)]),
    "add_rms_norm": (
        lambda x, delta, w: norm.add_rms_norm(x, delta, w, EPS),
        [(3, 5, 67), (3, 5, 67), (67,)],
    ),
    "swiglu": (lambda gate, up: [swiglu.swiglu(gate, up)], [(3, 5, 67), (3, 5, 67)]),
    "rope": (rope_by_angles, [(2, 3, 5, 6), (2, 3, 2, 6), (3, 3)]),
}


@pytest.mark.parametrize("name", FUSED)
def test_shapes_without_data(name, device):
    """The dry run needs shape, dtype and strides of every result, and of the gradients."""
    fused, shapes = FUSED[name]
    with FakeTensorMode():
        inputs = [
            torch.empty(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes
        ]
        inputs[0] = torch.empty_like(inputs[0].mT.contiguous()).mT.requires_grad_()
        outputs = fused(*inputs)
        for out, x in zip(outputs, inputs, strict=False):
            assert out.shape == x.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
        learned = inputs[: 2 if name == "rope" else None]
        grads = torch.autograd.grad([out.sum() for out in outputs], learned)
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in learned]


@pytest.mark.parametrize(
    "operator, shapes, extra",
    [
        ("rms_norm", [(3, 5, 67), (67,)], [EPS]),
        ("add_rms_norm", [(3, 5, 67), (3, 5, 67), (67,)], [EPS]),
        ("rms_norm_backward", [(3, 67), (3, 67), (3, 67), (67,), (3,)], []),
        ("swiglu", [(3, 67), (3, 67)], []),
        ("swiglu_backward", [(3, 67), (3, 67), (3, 67)], []),
        ("rope_qk", [(2, 3, 5, 6), (2, 3, 2, 6), (3, 6), (3, 6)], [False]),
    ],
)
def test_torch_accepts_the_operator(operator, shapes, extra, device):
    """Schema, functionality, fake results equal to real ones, autograd under tracing."""
    learned = 0 if "backward" in operator else 2 if operator == "rope_qk" else len(shapes)
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, device=device, requires_grad=i < learned)
        for i, shape in enumerate(shapes)
    ]
    torch.library.opcheck(getattr(torch.ops.picotron_lab, operator).default, (*tensors, *extra))


def test_torch_compile_sees_no_graph_break(device):
    def block(x, delta, weight):
        s, y = norm.add_rms_norm(x, delta, weight, EPS)
        return swiglu.swiglu(s, norm.rms_norm(y, weight, EPS))

    torch.manual_seed(0)
    shapes = ((5, 67), (5, 67), (67,))
    given = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    exact_x, exact_delta, exact_weight = [x.detach().double().requires_grad_() for x in given]
    s = exact_x + exact_delta
    y = F.rms_norm(s, (67,), exact_weight, EPS)
    (F.silu(s) * F.rms_norm(y, (67,), exact_weight, EPS)).sum().backward()
    torch.compile(block, backend="aot_eager", fullgraph=True)(*given).sum().backward()
    for mine, theirs in zip(given, (exact_x, exact_delta, exact_weight), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


# ---- refusals


def test_float64_is_refused_with_a_way_out(device):
    x = torch.ones(1, 2, 3, 4, dtype=torch.float64, device=device)
    table = torch.ones(2, 4, device=device)
    for call in (
        lambda: norm.rms_norm(x, x[0, 0, 0], EPS),
        lambda: norm.add_rms_norm(x, x, x[0, 0, 0], EPS),
        lambda: swiglu.swiglu(x, x),
        lambda: rope.rope_qk(x, x, table, table),
    ):
        with pytest.raises(TypeError, match=r"given torch.float64; give it bfloat16.* or \w+"):
            call()


def test_tensors_that_do_not_fit_are_refused(device):
    x, table = torch.ones(1, 2, 3, 4, device=device), torch.ones(2, 4, device=device)
    weight = torch.ones(4, device=device)
    wide = torch.ones(1, norm.MAX_WIDTH + 1, device=device)
    for call, needed in (
        (lambda: norm.rms_norm(x, weight[:3], EPS), "the length of the last dim"),
        (lambda: norm.rms_norm(x, weight.half(), EPS), "one dtype"),
        (lambda: norm.rms_norm(wide, wide[0], EPS), "at most 16384"),
        (lambda: norm.add_rms_norm(x, x[:, :1], weight, EPS), "one shape"),
        (lambda: swiglu.swiglu(x, x[..., :1]), "one shape"),
        (lambda: swiglu.swiglu(x, x.half()), "one dtype"),
        (lambda: rope.rope_qk(x, x, table[:1], table[:1]), r"\[T, C\]"),
        (lambda: rope.rope_qk(x, x[:, :1], table, table), r"\[B, T, K, C\]"),
        (lambda: rope.rope_qk(x[..., :3], x[..., :3], table[:, :3], table[:, :3]), "even C"),
    ):
        with pytest.raises(ValueError, match=needed):
            call()
    with pytest.raises(TypeError, match="cos and sin need torch.float32"):
        rope.rope_qk(x.half(), x.half(), table.half(), table.half())


# ---- compiled for a GPU that need not be there


@pytest.fixture
def compiled(compiled_kernels) -> dict:
    """What the compiler made of these kernels for sm_90, in a process without the interpreter."""
    return compiled_kernels["norm, rope, swiglu"]


def test_compiled_kernels_keep_everything_in_registers(compiled):
    spilled = {k: v for k, v in compiled.items() if v["STACK"] or v["LOCAL"]}
    assert len(compiled) == 16 and not spilled
    backward = {k: v["REG"] for k, v in compiled.items() if k.startswith("rms_norm_backward")}
    assert len(backward) == 4 and max(backward.values()) <= 64, "32 warps must fit on one SM"


def test_compiled_kernels_move_128_bits_at_a_time(compiled):
    """All but rstd and the two RoPE tables, one 32-bit number a thread; an odd length cannot."""
    for name, facts in compiled.items():
        widths = {"load": set(), "store": set()}
        scalars = 0
        for access, count in facts["accesses"].items():
            kind = "load" if access.startswith("ld") else "store"
            wide = re.search(r"\.v4\.[buf]32$", access) is not None
            widths[kind].add(wide)
            scalars += 0 if wide else count
        if "odd length" in name:
            assert widths == {"load": {False}, "store": {False}}, name
        else:
            assert True in widths["load"] and True in widths["store"] and scalars <= 2, name
