"""The vocabulary kernels: against float64, by hand, within the fused loss, and as machine code."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

from picotron_lab import sharding, vocab_parallel  # noqa: E402
from picotron_lab.kernels import vocab  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.vocab_parallel import ALGORITHMS, Shard, VocabHead  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
# a masked tail, one number, a whole block, two blocks of which the second has a tail
every_width = pytest.mark.parametrize("width", [67, 1, 512, vocab.MAX_BLOCK + 43])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty starts as NaN: a number that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all() and torch.empty(1).new_empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def fenced(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values with NaNs before and after, and all of that memory."""
    memory = values.new_full((values.numel() + 32768,), math.nan)
    memory[16384:-16384] = values.flatten()
    return memory[16384:-16384].view(values.shape), memory


def only_written_inside(memory: torch.Tensor) -> bool:
    return bool(memory[:16384].isnan().all() and memory[-16384:].isnan().all())


def draw(width: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [5, width] and labels: the first word, the last, one in between, two elsewhere."""
    dice = torch.Generator().manual_seed(width)
    y = torch.randn(5, width, generator=dice) * 4
    labels = torch.tensor([0, width - 1, width // 2, -1, -1])
    return y.to(device, dtype), labels.to(device)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Four units in the last place of the largest number (see test_kernels.py)."""
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    assert worst <= 4 * torch.finfo(dtype).eps, f"off by {worst:.1e}"


# ---- against float64


@every_dtype
@every_width
def test_statistics(dtype, width, device):
    y, labels = draw(width, dtype, device)
    given, memory = fenced(y)
    out = vocab.statistics(given, labels)
    exact = y.double()
    largest = exact.amax(-1)
    sums = (exact - largest[:, None]).exp().sum(-1)
    picked = [float(exact[i, j]) if j >= 0 else 0.0 for i, j in enumerate(labels.tolist())]
    assert out.dtype == torch.float32 and torch.equal(out[0].double(), largest)
    assert out[2].tolist() == picked
    assert_close(out[1], sums, torch.float32)
    assert torch.equal(given, y) and only_written_inside(memory)


@every_dtype
@every_width
@pytest.mark.parametrize("logits", [True, False])
def test_gradient(dtype, width, logits, device):
    y, labels = draw(width, dtype, device)
    dice = torch.Generator().manual_seed(1)
    f, c = torch.rand(2, 5, generator=dice).to(device) / width
    m = y.float().amax(-1) if logits else None
    given, memory = fenced(y)
    result = vocab.gradient_(given, m, f, c, labels)
    exact = (y.double() - m[:, None].double()).exp() if logits else y.double()
    exact = exact * f[:, None].double()
    for i, j in enumerate(labels.tolist()):
        if j >= 0:
            exact[i, j] -= float(c[i])
    assert result is given and result.dtype == dtype
    assert_close(result, exact, dtype)
    assert only_written_inside(memory)


@every_dtype
def test_softmax_minus_onehot_is_the_gradient_of_cross_entropy(dtype, device):
    y, labels = draw(67, dtype, device)
    labels[labels < 0] = 3
    exact = y.double().requires_grad_()
    F.cross_entropy(exact, labels, reduction="sum").backward()
    m, s, _ = vocab.statistics(y, labels)
    assert_close(vocab.gradient_(y, m, 1 / s, torch.ones_like(s), labels), exact.grad, dtype)


def test_statistics_by_hand(device):
    """Row 1: max 0, 1 + 1/4 + 1/2; row 2: 1e4 does not overflow, its neighbours vanish."""
    y = torch.tensor([[-math.log(4), 0, -math.log(2)], [-1e4, 1e4, 0]], device=device)
    out = vocab.statistics(y, torch.tensor([2, 0], device=device))
    assert out.flatten().tolist() == pytest.approx([0, 1e4, 1.75, 1, -math.log(2), -1e4])


def test_a_larger_number_in_a_later_block(device):
    """The sum of the first block is scaled down: 8192 e^-5 + e^-5 + 1, and up it is not."""
    y = torch.zeros(2, vocab.MAX_BLOCK + 2, device=device)
    y[0, -1], y[1, 0] = 5, 5
    out = vocab.statistics(y, torch.tensor([-1, -1], device=device))
    total = (vocab.MAX_BLOCK + 1) * math.exp(-5) + 1
    assert out.tolist() == [[5, 5], pytest.approx([total, total]), [0, 0]]


def test_a_first_block_of_minus_infinity(device):
    """exp(-inf - -inf) is no number: two zeros after a block that counts nothing make s = 2."""
    y = torch.full((1, vocab.MAX_BLOCK + 2), -math.inf, device=device)
    y[0, -2:] = 0
    out = vocab.statistics(y, torch.tensor([vocab.MAX_BLOCK], device=device))
    assert out.flatten().tolist() == [0, 2, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 10 GB of GPU memory")
def test_more_than_two_to_the_31_numbers():
    y = torch.zeros(2**31 // 131072 + 1, 131072, dtype=torch.bfloat16, device="cuda")
    y[-1, 7] = 20
    labels = torch.full((len(y),), 7, device="cuda")
    m, s, z = vocab.statistics(y, labels)
    assert (float(m[-1]), float(z[-1]), float(s[0])) == (20, 20, 131072)
    vocab.gradient_(y, m, 1 / s, torch.ones_like(s), labels)
    assert float(y[-1, 7].abs()) < 1e-3 and float(y[0, 7]) == pytest.approx(-1, rel=1e-2)


# ---- within the fused loss


@pytest.fixture
def kernel_calls(monkeypatch, device):
    """The fused path takes the kernels on any device; the names of those that ran."""
    calls = []

    def note(name):
        kernel = getattr(vocab, name)

        def noted(y, *others):
            calls.append(name)
            return kernel(y, *others)

        monkeypatch.setattr(vocab, name, noted)

    note("statistics")
    note("gradient_")
    monkeypatch.setattr(
        vocab_parallel, "arithmetic", lambda _, y: vocab if y.numel() else vocab_parallel.Torch
    )
    monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, device, 40)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ranks, V", [(1, 13), (3, 13), (4, 5)])  # the last of 4 has no word
def test_fused_loss_with_kernels(ranks, V, algorithm, dtype, device, kernel_calls):
    dice = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 6, generator=dice).to(device, dtype) for n in (7, V))
    labels = torch.arange(7, device=device) * 3 % V
    labels[2] = -100

    def on_rank(axis):
        mine = slice(*sharding.bounds(V, axis.size, axis.rank))
        mine_x, mine_w = x[None].clone().requires_grad_(), torch.nn.Parameter(weight[mine].clone())
        loss = VocabHead(mine_w, Shard(axis, V, True), algorithm)(mine_x, labels[None])
        (loss / 4).backward()
        return loss.detach(), mine_x.grad[0], mine_w.grad

    exact_x, exact_w = (t.double().requires_grad_() for t in (x, weight))
    loss = F.cross_entropy(exact_x @ exact_w.T, labels, ignore_index=-100, reduction="sum")
    (loss / 4).backward()
    results = run_ranks(on_rank, ranks)
    close = {"check_dtype": False} | dict.fromkeys(
        ("rtol", "atol"), 1e-5 if dtype == torch.float32 else 3e-2
    )
    for mine, dx, _ in results:
        torch.testing.assert_close(mine, loss.detach(), **close)
        torch.testing.assert_close(dx, exact_x.grad, **close)
    torch.testing.assert_close(torch.cat([dw for _, _, dw in results]), exact_w.grad, **close)
    expected = {"gradient_"} if algorithm == "naive" else {"gradient_", "statistics"}
    assert set(kernel_calls) == expected


# ---- as torch sees them


def test_shapes_without_data(device):
    with FakeTensorMode():
        y = torch.empty(5, 67, dtype=torch.bfloat16, device=device)
        rows = torch.empty(5, device=device)
        labels = torch.empty(5, dtype=torch.int64, device=device)
        out = vocab.statistics(y, labels)
        assert (out.shape, out.dtype, out.device.type) == ((3, 5), torch.float32, device)
        assert vocab.gradient_(y, rows, rows, rows, labels) is y


@pytest.mark.parametrize("logits", [True, False])
def test_torch_accepts_the_operators(logits, device):
    y, labels = draw(67, torch.float32, device)
    rows = torch.ones(5, device=device)
    torch.library.opcheck(torch.ops.picotron_lab.vocab_statistics.default, (y, labels))
    arguments = (y, rows if logits else None, rows, rows, labels)
    torch.library.opcheck(torch.ops.picotron_lab.vocab_gradient_.default, arguments)


def test_refusals(device):
    y, labels = draw(67, torch.float32, device)
    rows = torch.ones(5, device=device)
    with pytest.raises(TypeError, match="given torch.float64; give them bfloat16"):
        vocab.statistics(y.double(), labels)
    for call in (
        lambda: vocab.statistics(y, labels[:4]),
        lambda: vocab.statistics(y, labels.int()),
        lambda: vocab.gradient_(y, None, rows.double(), rows, labels),
        lambda: vocab.gradient_(y, rows[:4], rows, rows, labels),
    ):
        with pytest.raises(ValueError, match=r"they need logits \[N, V\], labels \[N\]"):
            call()
    with pytest.raises(ValueError, match="give a contiguous tensor"):
        vocab.gradient_(y[:, ::2], rows, rows, rows, labels)


# ---- compiled for a GPU that need not be there


@pytest.fixture
def compiled(compiled_kernels) -> dict:
    """What the compiler made of the kernels for sm_90, in a process without the interpreter."""
    return compiled_kernels["vocab"]


def test_compiled_kernels_keep_everything_in_registers(compiled):
    """64 registers let 32 warps, so two programs of 16, live on one SM at least."""
    assert len(compiled) == 12
    assert not {k: v for k, v in compiled.items() if v["STACK"] or v["LOCAL"]}
    assert max(facts["REG"] for facts in compiled.values()) <= 64


def test_compiled_kernels_move_128_bits_at_a_time(compiled):
    """All but the numbers of a row: label, label's logit, m, s, f, c; an odd width cannot."""
    for name, facts in compiled.items():
        wide = {k: n for k, n in facts["accesses"].items() if re.search(r"\.v4\.[buf]32$", k)}
        narrow = sum(facts["accesses"].values()) - sum(wide.values())
        if "odd length" in name:
            assert not wide, name
        else:
            # 16 numbers per thread: 2 loads of bf16, 4 of fp32; as many stores where y is written
            each = 2 if "bf16" in name else 4
            loads = sum(n for k, n in wide.items() if k.startswith("ld"))
            stores = sum(n for k, n in wide.items() if k.startswith("st"))
            assert (loads, stores) == (each, 0 if "statistics" in name else each), name
            assert narrow <= 5, name
