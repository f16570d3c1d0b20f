"""AdamW in one kernel: against torch's in float64, by hand, within the trainer, and as machine
code."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

from picotron_lab import checkpoint, optim, precision, state  # noqa: E402
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from picotron_lab.kernels import adamw  # noqa: E402
from picotron_lab.kernels.adamw import Update, adamw_  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.post_validation import undo_adamw  # noqa: E402
from picotron_lab.trainer import Trainer  # noqa: E402

BETAS, EPS, FENCE = (0.9, 0.95), 1e-8, 4096
FP32 = torch.finfo(torch.float32).eps
# one number, a masked tail, whole blocks, two blocks of which the second has a tail
every_shape = pytest.mark.parametrize("shape", [(1,), (67,), (2, 1024), (3, 5, 71)], ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty starts as NaN: a number that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all() and torch.empty(1).new_empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def fenced(values):
    """The same values with NaNs before and after, and all of that memory."""
    memory = values.new_full((values.numel() + 2 * FENCE,), math.nan)
    memory[FENCE:-FENCE] = values.flatten()
    return memory[FENCE:-FENCE].view(values.shape), memory


def rounded(weight, dtype):
    """What a kernel makes of a float32 number: the nearest one of `dtype`. Triton's interpreter
    cuts the other bits of a bfloat16 off."""
    if dtype == torch.bfloat16 and not weight.is_cuda:
        weight = (weight.detach().view(torch.int32) & -(2**16)).view(torch.float32)
    return weight.to(dtype)


def gradient(shape, step):
    """Large and tiny numbers, and one that is zero throughout."""
    dice = torch.Generator().manual_seed(step)
    values = torch.randn(shape, generator=dice) * 10 ** torch.randint(-6, 2, shape, generator=dice)
    values.view(-1)[-1] = 0 if values.numel() > 1 else 0.3
    return values


def step_(weight, grad, moments, copy, scale, update):
    """Of one weight."""
    return adamw_([weight], [grad], [moments], [] if copy is None else [copy], scale, update)


# ---- against float64


@every_shape
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_five_steps_equal_torch(shape, decay, scale, dtype, device):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    exact = nn.Parameter(start.double())
    theirs = torch.optim.AdamW([exact], betas=BETAS, eps=EPS, weight_decay=decay)
    pairs = [fenced(x.to(device)) for x in (start, torch.zeros(shape), torch.zeros(shape))]
    (weight, first, second), memories = zip(*pairs, strict=True)
    factor = None if scale is None else torch.tensor(scale, device=device)
    for step in range(1, 6):
        theirs.param_groups[0]["lr"] = lr = 0.1 / step
        values = gradient(shape, step)
        exact.grad = values.double() * (1.0 if scale is None else float(torch.tensor(scale)))
        theirs.step()
        grad, _ = fenced(values.to(device))
        poison = torch.full(shape, math.nan, device=device)
        copy, copy_memory = fenced(poison.to(dtype)) if dtype else (None, None)
        update = Update(step, lr, BETAS, EPS, decay)
        assert step_(weight, grad, (first, second), copy, factor, update) is None
        assert torch.equal(grad.cpu(), values)
        if dtype is not None:
            assert torch.equal(copy, rounded(weight, dtype))
            assert int(copy_memory.isnan().sum()) == 2 * FENCE
    m, v = (theirs.state[exact][key] for key in ("exp_avg", "exp_avg_sq"))
    sums = torch.stack([gradient(shape, step) for step in range(1, 6)]).abs().amax(0)
    # each number by its own size and that of the terms it sums
    for mine, wanted, terms in ((first, m, sums), (second, v, 0), (weight, exact, start.abs())):
        error = (mine.cpu().double() - wanted.detach()).abs()
        assert (error <= 8 * FP32 * (wanted.detach().abs() + terms)).all()
    assert all(int(memory.isnan().sum()) == 2 * FENCE for memory in memories)


def test_numbers_by_hand(device):
    """g = 3 / 2, so m = 0.15 and v = 0.1125; corrected they are g and g^2, and the step is lr. Of
    the weight a twentieth, lr times decay, goes before. Where g is 0 it is that alone."""
    weight, grad = torch.tensor([[2.0, 4.0]], device=device), torch.tensor([[3.0, 0.0]])
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    copy = torch.zeros(1, 2, device=device, dtype=torch.float16)
    half = torch.tensor([0.5], device=device)
    step_(weight, grad.to(device), moments, copy, half, Update(1, 0.1, BETAS, 1e-12, 0.5))
    assert weight[0].tolist() == pytest.approx([2 * 0.95 - 0.1, 4 * 0.95])
    assert moments[0][0].tolist() == pytest.approx([0.15, 0.0])
    assert moments[1][0].tolist() == pytest.approx([0.1125, 0.0])
    assert copy[0].tolist() == pytest.approx([1.8, 3.8], rel=1e-3)


def test_bias_correction_of_a_late_step_is_computed_in_float64():
    """1 - 0.999^t by hand; in float32 the first would be 0.0010000467."""
    factors = [Update(t, 1.0, (0.999, 0.999), EPS, 0.0).factors() for t in (1, 2)]
    assert factors[0][5] == pytest.approx(1 / 0.001, rel=1e-12)
    assert factors[1][6] == pytest.approx(1 / math.sqrt(0.001999), rel=1e-12)
    assert all(f[:5] == pytest.approx([1, 0.999, 0.001, 0.999, 0.001], rel=1e-12) for f in factors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 39 GB of GPU memory")
def test_more_than_two_to_the_31_numbers():
    weight, grad, first, second = (torch.zeros(2**31 + 7, device="cuda") for _ in range(4))
    copy = torch.zeros_like(weight, dtype=torch.bfloat16)
    grad[-1] = grad[0] = 3
    step_(weight, grad, (first, second), copy, None, Update(1, 0.5, BETAS, EPS, 0.0))
    for values in (weight, copy):
        assert float(values[-1]) == pytest.approx(-0.5) == pytest.approx(float(values.sum() / 2))


# ---- as torch sees it


def some(device, shape=(3, 5)):
    dice = torch.Generator().manual_seed(0)
    weight, grad, first, second = (torch.rand(shape, generator=dice).to(device) for _ in range(4))
    return weight, grad, (first, second), weight.bfloat16(), torch.tensor(0.5, device=device)


UPDATE = Update(3, 0.1, BETAS, EPS, 0.5)


def test_gradients_need_not_lie_side_by_side(device):
    weight, grad, moments, copy, scale = some(device)
    other = weight.clone(), tuple(m.clone() for m in moments), copy.clone()
    step_(weight, grad, moments, copy, scale, UPDATE)
    step_(other[0], grad.T.contiguous().T, other[1], other[2], scale, UPDATE)
    assert torch.equal(weight, other[0]) and all(map(torch.equal, moments, other[1]))


def test_no_numbers(device):
    """ZeRO leaves the last ranks without rows."""
    weight, grad, moments, copy, scale = some(device, (0, 5))
    assert step_(weight, grad, moments, copy, scale, UPDATE) is None


@pytest.mark.parametrize("both", [True, False])
def test_torch_accepts_the_operator(both, device):
    """It also learns what is overwritten: zero.py's units gather weights whose version is new."""
    weight, grad, moments, copy, scale = some(device)
    given = ([weight], [grad], list(moments), [copy] * both, scale if both else None)
    torch.library.opcheck(torch.ops.picotron_lab.adamw_.default, (*given, UPDATE.factors()))
    versions = [x._version for x in (weight, grad, *moments, copy)]
    step_(weight, grad, moments, copy, scale, UPDATE)
    after = [x._version for x in (weight, grad, *moments, copy)]
    assert [b - a for a, b in zip(versions, after, strict=True)] == [1, 0, 1, 1, 1]


def test_refusals(device):
    weight, grad, (first, second), copy, scale = some(device)
    for given in (
        (weight.double(), grad, (first, second), copy, scale),
        (weight, grad.bfloat16(), (first, second), copy, scale),
        (weight, grad, (first, second.bfloat16()), copy, scale),
        (weight, grad, (first, second), weight.clone(), scale),
        (weight, grad, (first, second), copy, scale.double()),
    ):
        with pytest.raises(TypeError, match="in float32, and copies in bfloat16 or float16"):
            step_(*given, UPDATE)
    for given in (
        (weight, grad[:2], (first, second), copy, scale),
        (weight, grad, (first.T, second), copy, scale),
        (weight, grad, (first, second), copy[:, :4], scale),
        (weight, grad, (first, second), None, grad),
    ):
        with pytest.raises(ValueError, match="need one shape, and scale is a single number"):
            step_(*given, UPDATE)
    with pytest.raises(ValueError, match="2 weights, 1 grads, 1 pairs of moments and 0 copies"):
        adamw_([weight, weight], [grad], [(first, second)], [], scale, UPDATE)
    with pytest.raises(ValueError, match="give it tensors that are contiguous"):
        step_(weight.T, grad.T, (first.T, second.T), None, scale, UPDATE)


# ---- within the trainer, which without a GPU uses torch's: here it is told otherwise

MODEL = ModelConfig(vocab_size=64, hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=24)


@pytest.fixture
def cfg(tmp_path):
    """Gradients of norm 1 and more, so that clipping does something; odd lengths of shards."""
    tokens = np.random.default_rng(1).integers(0, 64, 29 * 7 + 4).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    return TrainConfig(
        global_batch_size=4, micro_batch_size=2, sequence_length=7, steps=6, lr=0.003, min_lr=0.003,
        warmup_steps=0, weight_decay=0.1, clip=0.1, dtype="bfloat16", impl="fused",
        data=str(tmp_path / "tokens.npy"), cache_dir=str(tmp_path), validation_fraction=0,
        save_dir=str(tmp_path / "run"),
    )  # fmt: skip


def use_kernel(patch, yes):
    patch.setattr(optim, "has_kernel", lambda weight: yes and weight.dtype == torch.float32)


def publish_as_the_kernel_rounds(patch):
    """So that both paths see the same parameters; changes nothing on a GPU."""

    @torch.no_grad()
    def publish(self):
        for parameter, weight in self._narrow():
            parameter.copy_(rounded(weight, parameter.dtype))
            weight.grad = None

    patch.setattr(precision.MasterWeights, "publish", publish)


def snapshot(trainer):
    """Weights as used, weights as stepped, moments."""
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    masters = [w.detach().clone() for w in trainer.masters.weights]
    return weights, masters, [m.clone() for _, m in optim.moments(trainer.optimizer)]


def three_steps(world, mesh_cfg, cfg):
    trainer = Trainer(MODEL, mesh_cfg, cfg, world)
    norms = [trainer.train_step(step)["grad_norm"] for step in range(3)]
    return type(trainer.optimizer), norms, snapshot(trainer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("dp", "zero"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_trainer_trains_as_with_torch(dp, zero, dtype, cfg, monkeypatch):
    mesh_cfg, cfg = MeshConfig(dp=dp, zero=zero), dataclasses.replace(cfg, dtype=dtype)
    with monkeypatch.context() as patch:
        use_kernel(patch, False)
        publish_as_the_kernel_rounds(patch)
        expected = run_ranks(three_steps, dp, mesh_cfg, cfg)
    use_kernel(monkeypatch, True)
    found = run_ranks(three_steps, dp, mesh_cfg, cfg)
    for (kind, norms, mine), (other, their_norms, theirs) in zip(found, expected, strict=True):
        assert (kind, other) == (optim.KernelAdamW, torch.optim.AdamW)
        assert min(norms) > 2 * cfg.clip, "clipping must do something"
        assert norms == pytest.approx(their_norms, rel=1e-5)
        torch.testing.assert_close(mine[0], theirs[0], rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(mine[2], theirs[2], rtol=1e-4, atol=1e-8)


def go_on(world, cfg, path, first, last):
    """Steps of a trainer that begins with a checkpoint, if a path is given, and saves one."""
    trainer = Trainer(MODEL, MeshConfig(dp=2, zero=1), cfg, world)
    if path:
        state.load(trainer, checkpoint.read_manifest(path))
    for step in range(first, last):
        trainer.train_step(step)
    return state.save(trainer, last), snapshot(trainer)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(kernel, cfg, monkeypatch):
    """To the last bit; with torch's optimizer, which reads the same state, but for rounding."""
    use_kernel(monkeypatch, True)
    whole = run_ranks(go_on, 2, cfg, None, 0, 3)
    cfg = dataclasses.replace(cfg, save_dir=f"{cfg.save_dir}/parts")
    path = run_ranks(go_on, 2, cfg, None, 0, 2)[0][0]
    use_kernel(monkeypatch, kernel)
    for (_, mine), (_, theirs) in zip(run_ranks(go_on, 2, cfg, path, 2, 3), whole, strict=True):
        torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=0 if kernel else 1e-6)
        torch.testing.assert_close(mine[0], theirs[0], rtol=0 if kernel else 2**-7, atol=0)


# ---- the optimizer by itself


def master_of(values, device):
    """A bfloat16 parameter with a gradient, and its master weight."""
    parameter = nn.Parameter(torch.tensor(values, device=device, dtype=torch.bfloat16))
    parameter.record = None
    precision.accumulate_in([parameter], torch.float32)
    parameter.grad = torch.linspace(-2, 1, parameter.numel(), device=device).view(parameter.shape)
    masters = precision.MasterWeights([parameter])
    masters.take_gradients()
    return parameter, masters, masters.weights[0]


def test_the_parameter_is_written_by_the_step_and_once(device):
    parameter, masters, weight = master_of([[1.0, -3.0, 0.25]], device)
    optimizer = optim.KernelAdamW([{"params": [weight], "weight_decay": 0.5}], 0.1)
    optimizer.step()
    assert torch.equal(parameter, rounded(weight, torch.bfloat16)) and parameter[0, 0] != 1
    with torch.no_grad():
        parameter.zero_()
    masters.publish()
    assert not parameter.any() and weight.grad is None  # nothing was left to write
    masters.publish()  # of weights that something else changed since
    assert torch.equal(parameter, weight.bfloat16())


def test_the_factor_serves_one_step(device):
    parameter, _, weight = master_of([1.0, -3.0, 0.25], device)
    optimizer = optim.KernelAdamW([{"params": [weight], "weight_decay": 0.0}], 0.1)
    optimizer.scale = torch.tensor(0.5, device=device)
    optimizer.step()
    once = optimizer.state[weight]["exp_avg"].clone()
    torch.testing.assert_close(once, 0.05 * parameter.grad)
    optimizer.step()
    twice = optimizer.state[weight]
    torch.testing.assert_close(twice["exp_avg"], 0.9 * once + 0.1 * parameter.grad)
    assert twice["step"] == 2 and not twice["step"].is_cuda


def test_weights_without_a_gradient_stay(device):
    weights = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    weights[0].grad = torch.ones(3, device=device)
    optimizer = optim.KernelAdamW([{"params": weights, "weight_decay": 0.5}], 0.1)
    optimizer.step()
    assert weights[1].tolist() == [1, 1, 1] and weights[0].tolist() == pytest.approx([0.85] * 3)


def test_post_validation_can_take_its_step_back(device):
    """Its arithmetic alone: optim.build gives it torch's, see test_optim.py."""
    weight = nn.Parameter(torch.linspace(-1, 1, 67, device=device))
    before = weight.detach().clone()
    weight.grad = torch.linspace(1, -3, 67, device=device)
    optimizer = optim.KernelAdamW([{"params": [weight], "weight_decay": 0.5}], 0.1)
    optimizer.step()
    assert not torch.isclose(weight, before).any()
    undo_adamw(weight, optimizer.param_groups[0], optimizer.state[weight])
    torch.testing.assert_close(weight.detach(), before, rtol=1e-5, atol=1e-6)
    moments = optimizer.state[weight]
    assert moments["step"] == 0 and moments["exp_avg"].abs().max() < 1e-6


# ---- compiled for a GPU that need not be there


def cases() -> dict:
    """Name -> (kernel, argument types, constants, warps): with everything, without, odd, large."""
    kernel, pointers = adamw._adamw_kernel, ("weight_ptr", "grad_ptr", "first_ptr", "second_ptr")
    types = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(pointers, "*fp32")
    types |= {"copy_ptr": "*bf16", "scale_ptr": "*fp32", "n": "i32 / 16"}
    constants = {"BLOCK": adamw.BLOCK}
    kinds = {
        "all": (types, constants),
        "without copy": (types, constants | {"copy_ptr": None}),
        "without scale": (types, constants | {"scale_ptr": None}),
        "odd length": (types | {"n": "i32"}, constants),
        "more than 2^31": (types | {"n": "i64 / 16"}, constants),
    }
    return {name: (kernel, *kind, adamw.NUM_WARPS) for name, kind in kinds.items()}


@pytest.fixture
def compiled(compiled_kernels) -> dict:
    """What the compiler made of the kernel for sm_90, in a process without the interpreter."""
    return compiled_kernels["adamw"]


def test_compiled_kernel_keeps_everything_in_registers(compiled):
    """32 registers let all 64 warps of an SM live, eight programs: many loads are under way."""
    assert set(compiled) == set(cases())
    assert not {k: v for k, v in compiled.items() if v["STACK"] or v["LOCAL"]}
    assert all(v["REG"] <= 64 for v in compiled.values())


def count(accesses, kind):
    return sum(n for name, n in accesses.items() if name.startswith(kind))


def test_compiled_kernel_reads_and_writes_each_number_once_128_bits_at_a_time(compiled):
    """4 numbers per thread: of fp32 one access each, 4 loads and 3 stores; of the copy half of one.
    All else is the scale. An odd length takes a number at a time. No thread waits for another: each
    writes what it read."""
    for name, facts in compiled.items():
        assert "bar.sync" not in facts["order"], name
        wide = {k: n for k, n in facts["accesses"].items() if re.search(r"\.v4\.[buf]32$", k)}
        loads, stores = (
            [count(found, kind) for found in (wide, facts["accesses"])] for kind in ("ld", "st")
        )
        scale, copy = name != "without scale", name != "without copy"
        odd = name == "odd length"
        assert loads == ([0, 4 * 4 + 1] if odd else [4, 4 + scale]), name
        assert stores == ([0, 4 * 4] if odd else [3, 3 + copy]), name
