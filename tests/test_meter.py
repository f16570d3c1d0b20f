"""The meter counts what a hand would count: every expected number here is worked out by hand."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from picotron_lab.analysis.meter import CATEGORIES, Meter, peak_memory_bytes
from picotron_lab.lab import run_ranks
from picotron_lab.processes import run_processes


def activations(meter):
    """What is counted as activation, when nothing else is counted."""
    assert meter.live_bytes == meter.live["activation"]
    return meter.live_bytes


# ---- one tensor after another


def test_a_matmul():
    """Inputs made before do not count, the result does: 3 x 5 elements of 4 bytes."""
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Meter() as meter:
        c = a @ b
        assert activations(meter) == c.numel() * 4 == 60
        del c
        assert activations(meter) == 0
    assert meter.peak_bytes == 60


def test_views_and_changes_in_place_count_once():
    with Meter() as meter:
        x = torch.zeros(6, 4)
        parts = x.view(4, 6), x.t(), x[1:3], *x.split(2), x.detach(), x.expand(7, 6, 4)
        x.add_(1).mul_(2).t_()
        torch.add(x, 1, out=x)
        assert activations(meter) == 96
        del x
        assert activations(meter) == 96, "its views keep the storage alive"
        del parts
        assert activations(meter) == 0
    assert meter.peak_bytes == 96


def test_views_and_changes_of_what_was_made_before_count_nothing():
    weight, out = torch.ones(4, 4), torch.empty(4, 4)
    with Meter() as meter:
        view = weight.t()
        weight.add_(1)
        torch.add(view, 1, out=out)
        torch._foreach_add_([weight, out], 1)
        assert activations(meter) == meter.peak_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.bool, 1)]
)
def test_element_sizes(dtype, size):
    with Meter() as meter:
        x = torch.zeros(5, 3, dtype=dtype)
        assert activations(meter) == x.numel() * size == 15 * size


def test_every_way_to_make_a_tensor():
    with Meter() as meter:
        made = [torch.tensor([1.0, 2.0]), torch.arange(3), torch.empty(1), torch.ones(2).clone()]
        made += torch.ones(2, 2).split(1)  # one storage
        made += torch.ones(4).topk(2)  # values and indices: 8 + 16 bytes
        made += torch._foreach_mul(made[:1], 2)  # 8 bytes
        assert activations(meter) == 8 + 24 + 4 + 8 + 16 + 24 + 8
        del made
        assert activations(meter) == 0


UNSAID = torch.library.Library("picotron_lab_unsaid", "DEF")
UNSAID.define("itself(Tensor x) -> Tensor")  # should say Tensor(a) twice
UNSAID.impl("itself", lambda x: x, "CompositeExplicitAutograd")


SHOWN = [
    lambda x: torch.ops.aten._unsafe_view(x, [16]),
    lambda x: x.unsafe_split(2),
    lambda x: torch.ops.picotron_lab_unsaid.itself(x),
    lambda x: torch.dropout(x, 0.5, False),
    lambda x: torch.einsum("ij->ji", x),
]


@pytest.mark.parametrize("show", SHOWN)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_an_operator_need_not_say_that_it_returns_its_input(show, without):
    """In inference mode the meter sees whole functions such as dropout."""
    old = torch.ones(4, 4)
    with without(), Meter() as meter:
        shown = show(old)
        assert activations(meter) == meter.peak_bytes == 0
        new = old + 1
        shown = show(new)
        assert activations(meter) == meter.peak_bytes == 64
        del new
        assert activations(meter) == 64
        del shown
        assert activations(meter) == 0


def test_what_no_operation_made_counts_once_it_is_labelled():
    old = torch.ones(16)
    with Meter() as meter:
        made = copy.deepcopy(old), torch.frombuffer(bytearray(32), dtype=torch.float32)
        made[0].add_(1)
        assert activations(meter) == 0
        meter.label("buffer", made)
        assert meter.live["buffer"] == meter.live_bytes == 96


def test_the_peak_is_the_largest_total_not_the_last():
    with Meter() as meter:
        a = torch.zeros(100)
        meter.label("buffer", [a])
        b = torch.zeros(50)
        del b
        c = torch.zeros(20)
        assert meter.live_bytes == 480
        assert meter.peak_bytes == 600
        assert meter.peak == {**dict.fromkeys(CATEGORIES, 0), "buffer": 400, "activation": 200}
        meter.reset_peak()
        assert meter.peak_bytes == 480
        del a, c
        torch.zeros(130)
        assert meter.peak["activation"] == meter.peak_bytes == 520
        assert meter.peak["buffer"] == meter.live_bytes == 0


def test_storages_that_are_resized():
    old = torch.empty(2, dtype=torch.long)
    with Meter() as meter:
        x = torch.zeros(10)
        storage = x.untyped_storage()
        storage.resize_(0)
        assert activations(meter) == 0
        storage.resize_(400)
        x.zero_()
        assert activations(meter) == meter.peak_bytes == 400
        x.resize_(200)
        assert activations(meter) == meter.peak_bytes == 800
        torch.topk(torch.ones(4), 2, out=(torch.empty(0), old))  # 16 bytes, and 8 in place of 0
        assert meter.peak_bytes == 824
        del x, storage
        assert activations(meter) == 0


def test_what_is_freed_after_the_meter_ended():
    with Meter() as meter:
        kept, freed = torch.zeros(3), torch.zeros(5)
    late = torch.zeros(7)
    assert activations(meter) == 32
    del freed, late
    assert activations(meter) == 12
    del kept


def test_the_meter_keeps_nothing_alive_and_nothing_keeps_it():
    weight = nn.Parameter(torch.ones(3))
    with Meter() as meter:
        meter.watch([weight])
        x = torch.zeros(3)
        (weight * x).sum().backward()
        tensor = weakref.ref(x)
        del x
        assert tensor() is None
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
    weight.sum().backward()  # its hook is gone too


# ---- categories


def test_labels():
    old = torch.zeros(2)
    with Meter() as meter:
        new = torch.zeros(3)
        meter.label("parameter", [old, new.view(3, 1), None])
        assert meter.live == {**dict.fromkeys(CATEGORIES, 0), "parameter": 20}
        meter.label("optimizer", [new])
        assert (meter.live["parameter"], meter.live["optimizer"]) == (8, 12)
        del old, new
        assert meter.live_bytes == 0
        with pytest.raises(AssertionError, match="cannot label tensors 'weights': choose one of"):
            meter.label("weights", [])


def adam_step(axis, width):
    """Live bytes by category after a training step of two linear layers; saved activations; peak.

    Axis may be None: nothing is sent.
    """
    torch.manual_seed(0)
    with Meter() as meter:
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        meter.watch(model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        loss = model(torch.ones(8, width)).sum()
        saved = meter.live["activation"]
        loss.backward()
        del loss
        if axis is not None:
            for parameter in model.parameters():
                axis.all_reduce(parameter.grad, out=parameter.grad)
        optimizer.step()
        state = optimizer.state.values()
        meter.label("optimizer", [s[key] for s in state for key in ("exp_avg", "exp_avg_sq")])
        meter.label("buffer", [s["step"] for s in state])
        return meter.live, saved, meter.peak_bytes


def test_training_state_is_16_bytes_per_parameter():
    """Weights 4, gradients 4, moments 8; and a counter of 4 bytes for each of three tensors.

    Saved for backward: the input (8 x 16) and the result of tanh (8 x 16); and the loss is alive.
    """
    live, saved, _ = adam_step(None, 16)
    n = 16 * 16 + 16 + 16
    assert live == {"parameter": 4 * n, "gradient": 4 * n, "optimizer": 8 * n, "buffer": 12,
                    "activation": 0}  # fmt: skip
    assert live["parameter"] + live["gradient"] + live["optimizer"] == 16 * n
    assert saved == 4 * (128 + 128 + 1)


def test_gradients_are_labelled_when_they_are_accumulated():
    """Also the second time, when they are added in place, and while backward still runs."""
    first, second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    seen = []
    with Meter() as meter:
        meter.watch([first, second, frozen])
        first.register_post_accumulate_grad_hook(lambda _: seen.append(meter.live["gradient"]))
        for _ in range(2):
            (torch.ones(1, 4) @ first @ second).sum().backward()
    assert seen == [128, 128], "second's gradient comes first, then first's"
    assert meter.live == {**dict.fromkeys(CATEGORIES, 0), "parameter": 136, "gradient": 128}


# ---- saved activations


def test_saved_activations_of_an_mlp():
    """8 x 16 hidden values before silu, as many after it, and the 8 x 3 that are squared; the loss.

    x and the weights were there before.
    """
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=dice)
    w1 = torch.randn(4, 16, generator=dice, requires_grad=True)
    w2 = torch.randn(16, 3, generator=dice, requires_grad=True)
    with Meter() as meter:
        loss = (F.silu(x @ w1) @ w2).square().sum()
        assert activations(meter) == 4 * (8 * 16 + 8 * 16 + 8 * 3 + 1)
        with torch.no_grad():
            (F.silu(x @ w1) @ w2).square().sum()
        assert activations(meter) == 4 * (8 * 16 + 8 * 16 + 8 * 3 + 1)
        loss.backward()
        del loss
        assert activations(meter) == 4 * (4 * 16 + 16 * 3), "the gradients, which nobody labelled"


class Cube(torch.autograd.Function):
    """Saves x and a temporary that it makes; makes two temporaries in backward."""

    @staticmethod
    def forward(ctx, x):
        square = x * x
        ctx.save_for_backward(x, square)
        return square * x

    @staticmethod
    def backward(ctx, grad):
        _, square = ctx.saved_tensors
        return 3 * square * grad


def test_inside_an_autograd_function():
    x = torch.ones(10, requires_grad=True)
    with Meter() as meter:
        y = Cube.apply(x)
        assert activations(meter) == 80, "the saved square and the result"
        y.backward(torch.ones(10))
        assert meter.peak_bytes == 200, "these two, the ones, 3 * square, and its product with them"
        del y
        assert activations(meter) == 40, "the gradient"


@torch.library.custom_op("picotron_lab_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    scratch = torch.zeros(1000)
    return x * 2 + scratch[0]


def test_a_custom_operator_counts_by_its_result():
    x = torch.ones(10)
    with Meter() as meter:
        y = twice(x)
        assert activations(meter) == meter.peak_bytes == 40
        del y


# ---- ranks


def test_ranks_do_not_see_each_other():
    """Rank r makes r + 1 numbers, and all meet while all of them are alive."""

    def make(axis):
        with Meter() as meter:
            x = torch.zeros(axis.rank + 1)
            axis.barrier()
            return activations(meter), meter.peak_bytes, x

    assert [seen[:2] for seen in run_ranks(make, 3)] == [(4, 4), (8, 8), (12, 12)]


NEXT, LAST = (1, 2, 0), (2, 0, 1)
COLLECTIVES = {  # with bytes of the result of 12 numbers on each of 3 ranks
    "all_reduce": (lambda axis, x: axis.all_reduce(x), 48),
    "all_reduce in place": (lambda axis, x: axis.all_reduce(x, out=x), 0),
    "all_gather": (lambda axis, x: axis.all_gather(x), 144),
    "reduce_scatter": (lambda axis, x: axis.reduce_scatter(x), 16),
    "all_to_all": (lambda axis, x: axis.all_to_all(x), 48),
    "broadcast": (lambda axis, x: axis.broadcast(x, 1), 48),
    "broadcast in place": (lambda axis, x: axis.broadcast(x, 1, out=x), 0),
    "exchange": (lambda axis, x: axis.exchange([(x, NEXT[axis.rank])], [(x, LAST[axis.rank])]), 48),
}


def meet(axis):
    """Bytes after each of them, and the most while it went on."""
    seen = {}
    for name, (call, _) in COLLECTIVES.items():
        x = torch.ones(12)
        with Meter() as meter:
            result = call(axis, x)
            seen[name] = activations(meter), meter.peak_bytes
            del result
    return seen


@pytest.mark.parametrize("run", [run_ranks, run_processes])
def test_results_of_collectives_count_and_what_the_world_needs_does_not(run):
    """Nothing but the result is ever there: no copy of the lab, no note of processes."""
    for seen in run(meet, 3):
        assert seen == {name: (live, live) for name, (_, live) in COLLECTIVES.items()}


def test_a_collective_inside_backward_is_seen_by_its_rank():
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, axis):
            ctx.axis = axis
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return ctx.axis.all_reduce(grad), None

    def run(axis):
        x = torch.ones(12, requires_grad=True)
        with Meter() as meter:
            y = Sum.apply(x, axis)
            y.backward(torch.ones(12))
            del y
            return activations(meter), meter.peak_bytes, x.grad.tolist()

    expected = 48, 3 * 48, [2.0] * 12  # y, the ones, their sum; what stays is the sum
    assert run_ranks(run, 2) == [expected] * 2


@pytest.mark.parametrize("run", [run_ranks, pytest.param(run_processes, marks=pytest.mark.slow)])
def test_a_rank_has_the_figures_of_a_program_that_is_alone(run):
    assert run(adam_step, 2, 16) == [adam_step(None, 16)] * 2


# ---- the machine


def test_peak_memory_of_the_process():
    """64 MiB that were written to must show, in bytes."""
    before = peak_memory_bytes(torch.device("cpu"))
    x = torch.ones(16 * 2**20)
    after = peak_memory_bytes(torch.device("cpu"))
    assert x[-1] == 1 and after >= max(before, 64 * 2**20)
    assert after < 2**40
