"""Stepping at once and mending it later against torch's own clipping and optimizers, in float64."""

import math

import pytest
import torch
from torch import nn

from picotron_lab import mesh, optim, precision, sharding
from picotron_lab.config import MeshConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.post_validation import PostValidation, clip_scale, undo_adamw
from picotron_lab.processes import run_processes

RANKS, LIMIT = 4, 1.0
RARE = pytest.mark.exhaustive  # more of what the others sample
OPTIMIZERS = [("sgd", "plain"), ("adamw", "plain"), ("adamw", "fused")]
# norm of each rank's gradient, and the ranks that have to take a step back when LIMIT is 1
STEPS = [
    ((0.4, 0.3, 0.2, 0.9), (0, 1, 2)),  # whole norm 1.05: only the last rank can know
    ((0.3, 0.3, 0.2, 0.1), ()),  # 0.48
    ((0.5, 30.0, 0.2, 7.0), (0,)),  # rank 1 sees that it is too much, and the others after it
    ((3.0, 0.1, 0.1, 0.1), ()),
    ((0.2, 0.1, 4.0, 0.0), (0, 1)),
]


def config(name, impl, **changes):
    """A large learning rate, so that a wrong step shows, and decay."""
    return TrainConfig(optimizer=name, impl=impl, lr=0.1, weight_decay=0.5, **changes)


def weights_of(rank, dtype=torch.float64):
    draw = torch.Generator().manual_seed(rank)
    shapes = ((3, 4), (5,), (2, 2))  # the one with one dim does not decay
    return [nn.Parameter(torch.randn(s, generator=draw, dtype=dtype)) for s in shapes]


def give_gradients(weights, rank, step, norm):
    draw = torch.Generator().manual_seed(100 * step + rank)
    gradients = [torch.randn(w.shape, generator=draw, dtype=torch.float64) for w in weights]
    length = torch.cat([g.flatten() for g in gradients]).norm()
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient * (norm / length)


def squared(weights):
    return sum(w.grad.double().square().sum() for w in weights)


def values(weights, optimizer):
    """Weights and optimizer state, as copies."""
    held = [value for w in weights for value in optimizer.state[w].values()]
    return [x.detach().double().clone() for x in (*weights, *held)]


def rank_program(axis, cfg, steps, limit):
    """[(norm, changed, weights and state) of each step], rollbacks."""
    weights = weights_of(axis.rank)
    optimizer = optim.build(weights, cfg)
    validation = PostValidation(optimizer, axis, lambda: squared(weights))
    history = []
    for i, norms in enumerate(steps):
        give_gradients(weights, axis.rank, i, norms[axis.rank])
        validation.step(limit)
        norm = validation.validate()
        history.append((norm, validation.changed, values(weights, optimizer)))
    return history, validation.rollbacks


def synchronised(cfg, steps, limit, ranks=RANKS):
    """[(norm, [weights and state of each rank]) of each step]: torch clips, then torch steps."""
    stages = [weights_of(r) for r in range(ranks)]
    optimizers = [optim.build(weights, cfg) for weights in stages]
    history = []
    for i, norms in enumerate(steps):
        for rank, weights in enumerate(stages):
            give_gradients(weights, rank, i, norms[rank])
        everything = [w for weights in stages for w in weights]
        norm = nn.utils.clip_grad_norm_(everything, limit or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        history.append((norm.item(), list(map(values, stages, optimizers))))
    return history


def assert_close(ours, theirs, tolerance=1e-12):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "impl"), OPTIMIZERS)
@pytest.mark.parametrize("seed", [pytest.param(None, marks=RARE), 3])
def test_equals_clipping_over_all_ranks_then_stepping(name, impl, seed):
    cfg, steps = config(name, impl), [norms for norms, _ in STEPS]
    ranks = run_ranks(rank_program, RANKS, cfg, steps, LIMIT, seed=seed)
    for i, (norm, stages) in enumerate(synchronised(cfg, steps, LIMIT)):
        for rank, (history, _) in enumerate(ranks):
            assert history[i][0] == pytest.approx(norm, rel=1e-12)
            assert_close(history[i][2], stages[rank])
    expected = [sum(rank in back for _, back in STEPS) for rank in range(RANKS)]
    assert [rollbacks for _, rollbacks in ranks] == expected == [3, 2, 1, 0]


def test_who_waits_for_the_whole_norm_steps_in_validate():
    cfg = config("sgd", "plain")
    ranks = run_ranks(rank_program, RANKS, cfg, [STEPS[2][0], STEPS[1][0]], LIMIT)
    changed = [[step[1] for step in history] for history, _ in ranks]
    # rank 0 undoes and redoes, ranks 1 and 2 waited, the last knew; then nobody has to clip
    assert changed == [[True, False], [True, False], [True, False], [False, False]]


@pytest.mark.parametrize("limit", [0.0, 100.0])
def test_without_clipping_nothing_is_taken_back_and_every_bit_is_torchs(limit):
    cfg, steps = config("adamw", "plain"), [norms for norms, _ in STEPS]
    ranks = run_ranks(rank_program, RANKS, cfg, steps, limit)
    assert [rollbacks for _, rollbacks in ranks] == [0] * RANKS
    for i, (_, stages) in enumerate(synchronised(cfg, steps, 0.0)):
        for rank, (history, _) in enumerate(ranks):
            assert not history[i][1] and all(map(torch.equal, history[i][2], stages[rank]))


@pytest.mark.parametrize(("name", "impl"), OPTIMIZERS)
@pytest.mark.parametrize("limit", [0.0, LIMIT])
@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=RARE)])
def test_a_nan_on_the_last_stage_leaves_all_weights_as_they_were(name, impl, limit, bad):
    cfg = config(name, impl)
    small = (0.3, 0.3, 0.2, 0.1)
    steps = [STEPS[0][0], (*small[:3], bad), small]
    ranks = run_ranks(rank_program, RANKS, cfg, steps, limit)
    for history, _ in ranks:
        assert not math.isfinite(history[1][0])
        assert_close(history[1][2], history[0][2])
    assert all(map(torch.equal, ranks[3][0][1][2], ranks[3][0][0][2]))  # it did not step
    undone = 2 if limit else 1
    assert [rollbacks for _, rollbacks in ranks] == [undone] * 3 + [0]
    # the state is whole again: the last step goes on as if the bad one had never been
    expected = synchronised(cfg, [steps[0], small], limit)[0][1]
    for rank, (history, _) in enumerate(ranks):
        assert_close(history[0][2], expected[rank])
        assert history[2][0] == pytest.approx(math.sqrt(0.23), rel=1e-12)


def test_a_nan_on_the_first_stage_stops_everybody_at_once():
    ranks = run_ranks(rank_program, RANKS, config("adamw", "plain"), [(math.nan, 1, 1, 1)], LIMIT)
    for rank, (history, rollbacks) in enumerate(ranks):
        norm, changed, held = history[0]
        assert math.isnan(norm) and not changed and rollbacks == 0
        assert all(map(torch.equal, held, weights_of(rank))) and len(held) == 3


def after_a_bad_step(axis, cfg):
    """Weights after a step that all ranks refuse and a good one with the same gradients."""
    weights = weights_of(axis.rank)
    optimizer = optim.build(weights, cfg)
    bad = [torch.tensor(math.nan if axis.rank == RANKS - 1 else 0.0, dtype=torch.float64)]
    validation = PostValidation(optimizer, axis, lambda: squared(weights) + sum(bad))
    for _ in range(2):
        give_gradients(weights, axis.rank, 0, STEPS[0][0][axis.rank])
        validation.step(LIMIT)
        validation.validate()
        bad.clear()
    return values(weights, optimizer)


@pytest.mark.parametrize(("name", "impl"), OPTIMIZERS)
def test_the_very_first_step_can_be_taken_back(name, impl):
    cfg = config(name, impl)
    expected = synchronised(cfg, [STEPS[0][0]], LIMIT)[0][1]
    for ours, theirs in zip(run_ranks(after_a_bad_step, RANKS, cfg), expected, strict=True):
        assert_close(ours, theirs)


def test_rounding_leaves_no_second_moment_below_zero():
    """Its root is taken in the next step."""
    weight = nn.Parameter(torch.zeros(10_000))
    optimizer = optim.build([weight], config("adamw", "plain"))
    draw = torch.Generator().manual_seed(0)
    weight.grad = torch.randn(10_000, generator=draw)
    optimizer.step()
    undo_adamw(weight, optimizer.param_groups[1], optimizer.state[weight])
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].min() >= 0 and state["exp_avg_sq"].max() < 1e-6
    assert state["exp_avg"].abs().max() < 1e-6 and state["step"] == 0 and weight.abs().max() < 1e-6


# ---- messages


def sent_bytes(axis):
    rank_program(axis, config("sgd", "plain"), [STEPS[0][0]], LIMIT)
    return [call.bytes for call in axis.ledger.calls if call.op == "send"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_two_messages_of_8_bytes_between_neighbours(ranks):
    sent = [size for calls in run_ranks(sent_bytes, ranks) for size in calls]
    assert sent == [8] * (2 * (ranks - 1))


def early_program(world, name):
    """Rank 1 has its gradient only when rank 0 has stepped: an all_reduce would wait for ever."""
    axis = world.split("validation", [[0, 1]])
    weights = weights_of(world.rank)
    before = [w.detach().clone() for w in weights]
    validation = PostValidation(
        optim.build(weights, config(name, "plain")), axis, lambda: squared(weights)
    )
    if world.rank == 1:
        world.recv(torch.zeros(1), 0)
    give_gradients(weights, world.rank, 0, 0.5)
    validation.step(LIMIT)
    stepped = not any(map(torch.equal, weights, before))
    if world.rank == 0:
        world.send(torch.zeros(1), 1)
    norm = validation.validate()
    validation.finish()
    return stepped, norm, validation.pending


# processes too: with one that ends, what it has not yet delivered is gone
@pytest.mark.parametrize("run", [run_ranks, pytest.param(run_processes, marks=pytest.mark.slow)])
def test_a_stage_steps_before_later_ones_have_gradients(run):
    for stepped, norm, pending in run(early_program, 2, "adamw"):
        assert stepped and norm == pytest.approx(math.sqrt(0.5)) and not pending


# ---- with the rest of a trainer


def mesh_program(world, validates):
    """Two stages of two tensor-parallel ranks: a shard and a replica each, in bfloat16."""
    axes = mesh.build(world, MeshConfig(pp=2, tp=2))
    tp, pp = axes.tp, axes.pp
    full = torch.randn(4, 6, generator=torch.Generator().manual_seed(pp.rank)).bfloat16()
    shard, norm = nn.Parameter(full.chunk(2)[tp.rank].clone()), nn.Parameter(full[0].clone())
    rows = (2 * tp.rank, 2 * tp.rank + 2)
    shard.record = sharding.Record(f"{pp.rank}.w", (4, 6), (rows, (0, 6)))
    norm.record = sharding.Record(f"{pp.rank}.n", (6,), ((0, 6),), replicas=("tp",))
    parameters = [shard, norm]
    precision.accumulate_in(parameters, torch.float32)
    masters = precision.MasterWeights(parameters)
    optimizer = optim.build(masters.weights, config("adamw", "plain"))
    validation = PostValidation(
        optimizer, pp, lambda: sharding.squared_norm(parameters, tp, axes.axes)
    )
    norms = []
    for scales in ((0.01, 0.01), (0.05, 0.5), (0.01, 0.01)):  # too much on stage 1, once
        for p in parameters:
            p.grad = p.detach().float() * scales[pp.rank]
        if not validates:
            norms.append(float(optim.clip(parameters, LIMIT, world, axes.axes)))
        masters.take_gradients()
        if validates:
            validation.step(LIMIT)
            norms.append(validation.validate())
        else:
            optimizer.step()
        masters.publish()
    return norms, [w.detach() for w in masters.weights], validation.rollbacks


def test_shards_replicas_and_master_weights():
    ours, theirs = run_ranks(mesh_program, 4, True), run_ranks(mesh_program, 4, False)
    for (norms, weights, _), (expected_norms, expected, _) in zip(ours, theirs, strict=True):
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert [rollbacks for _, _, rollbacks in ours] == [1, 1, 0, 0]


# ---- what it cannot do is said


def test_the_scale_is_that_of_torch():
    for norm in (0.5, 2.0, 1e9):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        weight.grad = torch.tensor([norm], dtype=torch.float64)
        nn.utils.clip_grad_norm_([weight], 1.5)
        assert norm * clip_scale(norm**2, 1.5) == pytest.approx(weight.grad.item(), rel=1e-12)
    assert clip_scale(1e9, 0.0) == 1.0
    assert clip_scale(math.inf, 0.0) is None and clip_scale(math.nan, 1.0) is None


def misuse(axis, how):
    weights = weights_of(axis.rank)
    optimizer = optim.build(weights, config("sgd", "plain"))
    validation = PostValidation(optimizer, axis, lambda: squared(weights))
    if how == "early":
        return validation.validate()
    give_gradients(weights, axis.rank, 0, 0.9)
    validation.step(LIMIT)
    if how == "twice":
        return validation.step(LIMIT)
    if how == "gradient":
        weights[0].grad = None
    if how == "rate":
        optim.set_learning_rate(optimizer, 0.2)
    return validation.validate()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("early", "call step.. before validate"),
        ("twice", "call validate.. before step"),
        ("gradient", "change them after validate"),
        ("rate", "change them after validate"),
    ],
)
def test_misuse_is_told(how, sentence):
    with pytest.raises(AssertionError, match=sentence):
        run_ranks(misuse, 2, how)


def test_optimizers_that_cannot_be_taken_back_are_refused():
    weights = weights_of(0)
    for optimizer in (
        torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        torch.optim.AdamW(weights, amsgrad=True),
        torch.optim.SGD(weights, lr=0.1, maximize=True),
        torch.optim.Adagrad(weights),
    ):
        with pytest.raises(AssertionError, match="cannot be taken back: use optim.build"):
            PostValidation(optimizer, None, lambda: squared(weights))
