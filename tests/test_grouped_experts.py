"""Grouped experts against one MLP after the other in float64; sorting against Python's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from picotron_lab import grouped_experts
from picotron_lab.config import ModelConfig
from picotron_lab.fused import FusedSwiGLU
from picotron_lab.grouped_experts import GroupedExperts, combine, pack, permute, sort_choices
from picotron_lab.model import MLP, MoE

COUNTS = {
    "some idle": [3, 0, 4, 1, 0], "all to one": [0, 0, 9, 0], "no rows": [0, 0, 0],
    "one expert": [5], "one row": [0, 1],
}  # fmt: skip
SIZES = {"aligned": (16, 8), "odd": (7, 5), "narrow": (1, 3)}  # D, F
at_once = pytest.mark.parametrize("path", [True], indirect=True)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty starts as NaN, so that what nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["one by one", "at once"])
def path(request, monkeypatch):
    """Both paths, on any device."""
    monkeypatch.setattr(grouped_experts, "pays_at_once", lambda x: request.param)


def experts(count: int, size: tuple[int, int], dtype: torch.dtype, device: str) -> GroupedExperts:
    """Experts with random weights, the same ones each time."""
    torch.manual_seed(0)
    module = GroupedExperts([MLP(*size) for _ in range(count)])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(device, dtype)


def rows_like(counts: list[int], size: tuple[int, int], dtype: torch.dtype, device: str):
    """x, and the gradient of the result."""
    dice = torch.Generator().manual_seed(1)
    both = torch.randn(2, sum(counts), size[0], generator=dice, dtype=torch.float64)
    return both.to(device, dtype).unbind()


def one_by_one(module: GroupedExperts, x: Tensor, dy: Tensor, counts: list[int]):
    """The result and all gradients, in float64: each MLP on its own rows."""
    mlps = copy.deepcopy(module.experts).double()
    x = x.detach().double().requires_grad_()
    y = torch.cat([mlp(part) for mlp, part in zip(mlps, x.split(counts), strict=True)])
    y.backward(dy.double())
    return [y.detach(), x.grad, *(p.grad for p in mlps.parameters())]


def grouped(module: GroupedExperts, x: Tensor, dy: Tensor, counts: list[int]):
    """The same from the module itself."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x, torch.tensor(counts, device=x.device))
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_equal(found: list, exact: list, dtype: torch.dtype) -> None:
    """Tensor by tensor, relative to the largest number of each."""
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        if theirs.numel():
            off = (mine.double() - theirs).abs().max()
            assert off <= TOLERANCES[dtype] * max(theirs.abs().max(), 1e-30)


# ---- the experts


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("packed", [False, True])
def test_experts_equal_one_after_the_other(counts, size, dtype, packed, path, device):
    module = experts(len(counts), size, dtype, device)
    x, dy = rows_like(counts, size, dtype, device)
    exact = one_by_one(module, x, dy, counts)
    if packed:
        pack(module)
    found = grouped(module, x, dy, counts)
    assert_equal(found, exact, dtype)
    idle = [not gradient.any() for gradient in found[2::3]]
    assert idle == [count == 0 for count in counts]


def test_no_experts(device):
    module, x = GroupedExperts([]), torch.zeros(0, 16, device=device, requires_grad=True)
    pack(module)
    y = module(x, torch.zeros(0, dtype=torch.int64, device=device))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 16)


@at_once
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0]])
@pytest.mark.parametrize("layout, served", [("transposed", 6), ("shifted", 2), ("one for all", 6)])
def test_grouped_matmul_gets_what_a_gpu_takes(counts, layout, served, path, device, monkeypatch):
    """Rows that begin at 16 bytes, one after the other: else one by one, or a copy of the rows."""
    real, size, dtype, calls = F.grouped_mm, (16, 8), torch.float32, []

    def picky(a, b, offs):
        calls.append(1)
        rows = [a, b] if b.dim() == 3 else [a.T, b]
        assert a.numel() and all(x.data_ptr() % 16 == 0 for x in rows)
        assert all(x.is_contiguous() for x in rows if x.dim() == 2)
        return real(a, b, offs=offs)

    module = experts(3, size, dtype, device)
    x, dy = rows_like(counts, size, dtype, device)
    x, dy = {
        "transposed": [t.T.contiguous().T for t in (x, dy)],
        "shifted": [x, F.pad(dy.flatten(), (1, 0))[1:].view_as(dy)],
        "one for all": [x, torch.ones(1, 1, device=device).expand_as(dy)],
    }[layout]
    exact = one_by_one(module, x, dy, counts)
    monkeypatch.setattr(F, "grouped_mm", picky)
    assert_equal(grouped(module, x, dy, counts), exact, dtype)
    assert len(calls) == (served if any(counts) else 0)


def test_packed_weights_learn(path, device):
    """Gradients add up over micro-batches, and the optimizer's step is seen."""
    size, dtype, exact = (16, 8), torch.float64, []
    module = experts(3, size, dtype, device)
    pack(module)
    for counts in ([2, 0, 3], [0, 4, 1]):
        x, dy = rows_like(counts, size, dtype, device)
        exact.append(one_by_one(module, x, dy, counts)[2:])
        module(x, torch.tensor(counts, device=device)).backward(dy)
    sums = [first + second for first, second in zip(*exact, strict=True)]
    assert_equal([p.grad for p in module.parameters()], sums, dtype)
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    assert_equal(grouped(module, x, dy, counts), one_by_one(module, x, dy, counts), dtype)


@at_once
def test_what_the_kernel_leaves_unset_is_zero(path, device, monkeypatch):
    counts, size, real = [2, 0, 3, 0], (16, 8), F.grouped_mm

    def unset(a, b, offs):
        out = real(a, b, offs=offs)
        if out.dim() == 3:
            out[1], out[3] = torch.nan, torch.nan
        return out

    module = experts(4, size, torch.float32, device)
    x, dy = rows_like(counts, size, torch.float32, device)
    exact = one_by_one(module, x, dy, counts)
    monkeypatch.setattr(F, "grouped_mm", unset)
    monkeypatch.setattr(grouped_experts, "leaves_idle_unset", lambda x: True)
    assert_equal(grouped(module, x, dy, counts), exact, torch.float32)


def test_counts_of_other_experts_are_refused(device):
    module, x = experts(2, (16, 8), torch.float32, device), torch.zeros(3, 16, device=device)
    with pytest.raises(AssertionError, match="2 experts were given 3 counts: give the number"):
        module(x, torch.tensor([1, 1, 1], device=device))


# ---- where the weights lie


class Copies(TorchDispatchMode):
    """Counts concatenations of matrices with 8 or 16 rows: weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.cat.default and args[0][0].shape[0] in (8, 16)
        return function(*args, **(kwargs or {}))


def copies(module: GroupedExperts, device: str) -> int:
    """How often forward and backward copy the weights of experts (D 16, F 8)."""
    x, dy = rows_like([3, 1], (16, 8), torch.bfloat16, device)
    with Copies() as seen:
        module(x, torch.tensor([3, 1], device=device)).backward(dy)
    return seen.count


def test_pack_moves_weights_and_nothing_else(device):
    module = experts(2, (16, 8), torch.bfloat16, device)
    assert copies(module, device) == 4  # gate | up, down, in both directions
    before = [(p, p.detach().clone()) for p in module.parameters()]
    pack(nn.Sequential(nn.Linear(3, 3), nn.Sequential(module)))
    for (parameter, value), now in zip(before, module.parameters(), strict=True):
        assert now is parameter and now.requires_grad and torch.equal(now, value)
    storages = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, module.parameters())}
    assert sorted(storages.values()) == [2 * 2 * 128, 2 * 2 * 256]
    assert copies(module, device) == 0
    places = [p.data_ptr() for p in module.parameters()]
    pack(module)
    assert places == [p.data_ptr() for p in module.parameters()]


LOANS = [("gud", 1, 0), ("dgu", 1, 0), ("ugd", 1, 2), ("gdu", 1, 2), ("gud", 6, 4)]


@pytest.mark.parametrize("order, buffers, copied", LOANS)
def test_weights_lent_from_buffers(order, buffers, copied, device):
    """gate, up and down of an expert, one after the other: up must follow gate, and be as near in
    memory as it looks."""
    module = experts(2, (16, 8), torch.bfloat16, device)
    names = {"g": "gate", "u": "up", "d": "down"}
    keys = [f"experts.{e}.{names[letter]}.weight" for e in range(2) for letter in order]
    values = dict(module.named_parameters())
    whole = torch.cat([values[key].detach().flatten() for key in keys])
    homes = [whole if buffers == 1 else whole.clone() for _ in keys]
    views = [home[128 * i :][:128].view_as(values[keys[i]]) for i, home in enumerate(homes)]
    lent = {k: view.requires_grad_() for k, view in zip(keys, views, strict=True)}
    x, dy = rows_like([3, 1], (16, 8), torch.bfloat16, device)
    with Copies() as seen:
        y = functional_call(module, lent, (x, torch.tensor([3, 1], device=device)))
        gradients = torch.autograd.grad(y, [lent[key] for key in values], dy)
    assert seen.count == copied
    exact = one_by_one(module, x, dy, [3, 1])
    assert_equal([y.detach(), *gradients], [exact[0], *exact[2:]], torch.bfloat16)


def test_pack_leaves_shards_alone(device):
    """Rows of gate, up and down, as ZeRO-3 keeps them."""
    module = experts(2, (16, 8), torch.float32, device)
    for parameter in module.parameters():
        parameter.data = parameter.data[: len(parameter) // 2].clone()
    places = [p.data_ptr() for p in module.parameters()]
    pack(module)
    assert places == [p.data_ptr() for p in module.parameters()]


# ---- what it takes


def kept_bytes(run, weights: list) -> int:
    """Bytes of all storages that backward keeps, but those of the weights."""
    own, kept = {w.untyped_storage().data_ptr() for w in weights}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def test_backward_keeps_no_more_than_one_after_the_other(path, device):
    counts, size = [30, 0, 10], (16, 8)
    module = experts(3, size, torch.bfloat16, device)
    x, _ = rows_like(counts, size, torch.bfloat16, device)
    x = x.clone().requires_grad_()  # in a storage of its own
    weights = list(module.parameters())
    ours = kept_bytes(lambda: module(x, torch.tensor(counts, device=device)), weights)
    for mlp in module.experts:
        mlp.activation = FusedSwiGLU()
    parts = list(zip(module.experts, x.split(counts), strict=True))
    theirs = kept_bytes(lambda: torch.cat([mlp(rows) for mlp, rows in parts]), weights)
    assert ours - 3 * 4 == grouped_experts.contract(40, *size, 2)["kept"] == 40 * 32 * 2  # ends
    assert ours < 40 * (16 + 3 * 8) * 2 <= theirs  # who keep silu(gate) * up too, and more on CPU


def test_flops(device):
    module = experts(3, (16, 8), torch.float64, device)
    x, dy = rows_like([3, 0, 4], (16, 8), torch.float64, device)
    with FlopCounterMode(display=False) as forward:
        y = module(x.requires_grad_(), torch.tensor([3, 0, 4], device=device))
    with FlopCounterMode(display=False) as backward:
        y.backward(dy)
    expected = grouped_experts.contract(7, 16, 8, 8)
    assert forward.get_total_flops() == expected["forward"] == 2 * 7 * (16 * 8) * 3
    assert backward.get_total_flops() == expected["backward"]


# ---- sorting


def sorted_by_hand(expert: Tensor, experts: int) -> tuple[list, list]:
    """Places and counts with Python's sort, which is stable."""
    chosen = expert.flatten().tolist()
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    place = [-1] * len(chosen)
    for row, choice in enumerate(order):
        place[choice] = row if chosen[choice] < experts else -1
    return place, [chosen.count(e) for e in range(experts)]


@pytest.mark.parametrize("shape", [(50, 3), (1, 1), (7, 8), (0, 2)])
@pytest.mark.parametrize("experts", [0, 1, 4, 9])
def test_sort(shape, experts, device):
    expert = torch.randint(0, experts + 1, shape, generator=torch.Generator().manual_seed(0))
    place, counts = sort_choices(expert.to(device), experts)
    assert (place.flatten().tolist(), counts.tolist()) == sorted_by_hand(expert, experts)
    assert place.shape == shape and place.dtype == counts.dtype == torch.int64


def test_sort_by_hand(device):
    """Tokens choose (1, 0), (2, 1), (dropped, 1): expert 0 has one row, 1 three, 2 one."""
    expert = torch.tensor([[1, 0], [2, 1], [3, 1]], device=device)
    place, counts = sort_choices(expert, 3)
    assert (place.tolist(), counts.tolist()) == ([[1, 0], [4, 2], [-1, 3]], [1, 3, 1])


# ---- permute and combine


PLACES = {
    "all": [[4, 1], [0, 3], [5, 2]], "dropped": [[-1, 1], [0, -1], [-1, 2], [-1, -1]],
    "nothing": [[-1, -1]], "no tokens": [],
}  # fmt: skip


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_permute_and_combine(places, device):
    """Against products with matrices of zeros and ones, gradients included."""
    place = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2)
    M, dice = int((place >= 0).sum()), torch.Generator().manual_seed(0)
    shapes = (len(place), 3), (len(place), 2), (M, 3)
    drawn = (torch.randn(shape, generator=dice, dtype=torch.float64) for shape in shapes)
    x, gate, rows = (values.to(device).requires_grad_() for values in drawn)
    table = (place[..., None] == torch.arange(M, device=device)).double()  # [N, k, M]
    for found, exact, inputs in (
        (permute(x, place, M), table.sum(1).T @ x, [x]),
        (combine(rows, place, gate), (table * gate[..., None]).sum(1) @ rows, [rows, gate]),
    ):
        torch.testing.assert_close(found, exact)
        grad = torch.randn(found.shape, generator=dice, dtype=torch.float64).to(device)
        mine, theirs = (torch.autograd.grad(y, inputs, grad) for y in (found, exact))
        torch.testing.assert_close(mine, theirs)


def test_gradcheck(device):
    place = torch.tensor(PLACES["dropped"], device=device)
    dice = torch.Generator().manual_seed(0)
    drawn = (torch.randn(4, n, generator=dice, dtype=torch.float64) for n in (3, 2))
    x, gate = (values.to(device).requires_grad_() for values in drawn)
    torch.autograd.gradcheck(lambda x, g: combine(permute(x, place, 3).sin(), place, g), (x, gate))


def test_sums_are_taken_in_float32(device):
    """256 + 1 + 1 is 256 in bf16, term by term, and 258 if it is rounded once."""
    place = torch.tensor([[0, 1, 2]], device=device)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16, device=device)
    gate = torch.ones(1, 3, dtype=torch.bfloat16, device=device)
    assert combine(rows, place, gate).tolist() == [[258]]
    x = torch.zeros(1, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    permute(x, place, 3).backward(rows)
    assert x.grad.tolist() == [[258]]


def test_wrong_number_of_rows_is_refused():
    with pytest.raises(AssertionError, match="4 rows were asked for 3 places: rows must be"):
        permute(torch.zeros(4, 3), torch.tensor(PLACES["dropped"]), 4)


# ---- all together


@pytest.mark.parametrize("capacity", [0.0, 0.7])
def test_a_whole_mixture(capacity, device):
    """The plain MoE, router and gates included, in float64."""
    cfg = ModelConfig(hidden_size=16, ffn_size=8, experts=6, top_k=3, capacity_factor=capacity)
    torch.manual_seed(0)
    moe = MoE(cfg).to(device)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    moe = moe.double()
    module = GroupedExperts(copy.deepcopy(moe.experts))
    x = torch.randn(2, 9, 16, dtype=torch.float64).to(device).requires_grad_()
    expert_Nk, gate_Nk = moe.router(x)
    place, counts = sort_choices(expert_Nk, 6)
    rows = permute(x.flatten(0, 1), place, int(counts.sum()))
    found = combine(module(rows, counts), place, gate_Nk).view_as(x)
    exact = moe(x)
    assert (int(counts.sum()) < 54) == (capacity > 0)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    dy, weight = torch.randn_like(x), moe.router.weight
    mine = torch.autograd.grad(found, [x, weight, *module.parameters()], dy)
    theirs = torch.autograd.grad(exact, [x, weight, *moe.experts.parameters()], dy)
    for pair in zip(mine, theirs, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)
