"""A Llama with expert parallelism equals one device, whatever else is split or recomputed."""

from dataclasses import dataclass, replace

import pytest
import torch
from tensor_programs import scaled_value
from test_expert_parallel import off

from picotron_lab import (
    expert_parallel,
    mesh,
    optim,
    recompute,
    router,
    sequence_parallel,
    sharding,
    tensor_parallel,
)
from picotron_lab.alone import Alone
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.model import IGNORED, Llama

SMALL = ModelConfig(
    vocab_size=23, hidden_size=8, layers=2, heads=4, kv_heads=2, ffn_size=6, experts=4, top_k=2,
    balance_loss=0.1, z_loss=0.05, balance_speed=0.1,
)  # fmt: skip
DEEPSEEK = replace(
    SMALL, experts=8, top_k=4, router="sigmoid", expert_groups=4, top_groups=2, shared_experts=1
)


@dataclass(frozen=True)
class Job:
    """A Llama, its mesh, and how it is built."""

    cfg: ModelConfig = SMALL
    mesh: MeshConfig = MeshConfig(dp=2, ep=2)
    impl: str = "plain"
    fused_model: bool = False
    recompute: str = "none"
    dropout: float = 0.0
    T: int = 6
    clip: bool = False

    @property
    def rows(self):
        return 2 * self.mesh.dp


def batch(job, first, last):
    """(tokens, labels, where) of some rows of the global batch; counted tokens of all of it."""
    dice = torch.Generator().manual_seed(5)
    tokens_BT, labels_BT = torch.randint(23, (2, job.rows, job.T), generator=dice)
    labels_BT[torch.rand(job.rows, job.T, generator=dice) < 0.3] = IGNORED
    where = Where(torch.arange(job.T), torch.arange(first, last), step=3, seed=7)
    inputs = tokens_BT[first:last], labels_BT[first:last], where
    return inputs, int((labels_BT != IGNORED).sum())


def llama(job, axes=None):
    """The plain model of one device, or this rank's part of it, in the order of the trainer."""
    with torch.device("meta"):
        model = Llama(job.cfg, job.dropout)
    sharding.attach(model)
    if axes is not None:
        split(model, job, axes)
        recompute.apply(model, job.recompute, job.impl)
    sharding.materialise(model, 1, scaled_value, dtype=torch.float64)
    return model


def split(model, job, axes):
    if job.fused_model:
        fuse(model)
    if job.mesh.tp > 1:
        tensor_parallel.parallelize(model, axes.tp, axes.kv, job.impl)
        tensor_parallel.split_head(model, axes.tp, job.impl)
    if job.mesh.sequence_parallel:
        sequence_parallel.parallelize(model, axes.tp, job.impl)
    expert_parallel.parallelize(model, axes.ep, job.impl)
    experts = set(expert_parallel.expert_parameters(model))
    for parameter in model.parameters():
        replica = axes.expert_replica if parameter in experts else axes.replica
        sharding.add_axis(parameter, replica, partial=True)


LIMIT = 0.05  # of the gradient's norm, which every step exceeds


def train(model, inputs, count, replica, steps, finish):
    """[(loss, norm, statistics of the routers, gradients)] of steps of SGD with a rate of 1.

    finish(parameters) completes the gradients, and gives their norm, if they are to be clipped.
    """
    parameters, seen = list(model.parameters()), []
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        router.begin_step(model, 1 / count)
        loss = model(*inputs) / count
        loss.backward()
        norm = float(finish(parameters))
        gradients = [p.grad.clone() for p in parameters]
        said = router.settle(model, replica, count)
        seen.append((float(replica.all_reduce(loss.detach())), norm, said, gradients))
        optimizer.step()
    return seen, [p.record for p in parameters], [p.detach() for p in parameters]


def one_device(job, steps=1):
    """What one device sees that has all rows."""

    def finish(parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, LIMIT) if job.clip else 1

    alone = Axis("dp", [0], 0, Alone(), Ledger())
    return train(llama(job), *batch(job, 0, job.rows), alone, steps, finish)


def one_rank(world, job, steps=1):
    """The same of one rank, which has some rows, and some of the weights."""
    axes = mesh.build(world, job.mesh, job.cfg.kv_heads)
    mine = sharding.bounds(job.rows, job.mesh.dp, axes.dp.rank)

    def finish(parameters):
        sharding.reduce_gradients(parameters, axes.axes)
        return optim.clip(parameters, LIMIT, world, axes.axes) if job.clip else 1

    return train(llama(job, axes), *batch(job, *mine), axes.dp, steps, finish)


def assert_equals_one_device(job, steps=1, **how):
    expected, records, weights = one_device(job, steps)
    names = [record.name for record in records]
    assert min(norm for _, norm, *_ in expected) > LIMIT, "nothing would be clipped"
    for seen, mine, my_weights in run_ranks(one_rank, job.mesh.size, job, steps, **how):
        places = [names.index(record.name) for record in mine]
        for (loss, norm, said, gradients), (one, all_norm, all_said, wholes) in zip(
            seen, expected, strict=True
        ):
            numbers = [loss, norm, *said.values()]
            assert numbers == pytest.approx([one, all_norm, *all_said.values()], rel=1e-10)
            for record, i, gradient in zip(mine, places, gradients, strict=True):
                assert off(gradient, wholes[i][record.index]) < 1e-10, record.name
        for record, i, weight in zip(mine, places, my_weights, strict=True):
            assert off(weight, weights[i][record.index]) < 1e-10, record.name


MODELS = {
    "2 ranks": Job(),
    "4 ranks, experts twice": Job(mesh=MeshConfig(dp=4, ep=2), dropout=0.2),
    "3 ranks, unequal shares": Job(mesh=MeshConfig(dp=3, ep=3)),
    "4 ranks, as DeepSeek-V3": Job(DEEPSEEK, MeshConfig(dp=4, ep=4)),
    "4 ranks, capacity": Job(replace(SMALL, capacity_factor=0.6), MeshConfig(dp=4, ep=4)),
    "8 ranks, tied": Job(replace(SMALL, experts=8, tied=True), MeshConfig(dp=8, ep=8)),
    "replicas alone": Job(mesh=MeshConfig(dp=2, ep=1)),
}
RARE = pytest.mark.exhaustive  # more of what the others sample
PATHS = {"plain": {}, "fused": {"impl": "fused", "fused_model": True}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[RARE] * (name == "8 ranks, tied")) for name in MODELS]
)
def test_a_model_equals_one_device(name, path):
    assert_equals_one_device(replace(MODELS[name], **PATHS[path]))


@pytest.mark.parametrize(
    "changes", [{"impl": "fused"}, {"fused_model": True}], ids=["in a plain model", "plain layer"]
)
def test_paths_may_be_mixed(changes):
    assert_equals_one_device(replace(MODELS["4 ranks, as DeepSeek-V3"], **changes))


@pytest.mark.parametrize("path", PATHS)
def test_three_clipped_steps_of_sgd(path):
    """A rate of 1 and biases that move: a gradient that counts twice shows at once."""
    job = replace(MODELS["4 ranks, experts twice"], clip=True, **PATHS[path])
    assert_equals_one_device(job, steps=3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [pytest.param("selective", marks=RARE), "full"])
@pytest.mark.parametrize(
    "name", [pytest.param("3 ranks, unequal shares", marks=RARE), "4 ranks, as DeepSeek-V3"]
)
def test_recomputation(name, kind, path):
    """Rows travel a second time; penalties and choices count once."""
    assert_equals_one_device(replace(MODELS[name], recompute=kind, **PATHS[path]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sequence", [pytest.param(False, marks=RARE), True])
@pytest.mark.parametrize("kind", ["none", "full"])
def test_inside_tensor_parallelism(path, sequence, kind):
    """A grid of 2 x 2: each expert on one rank of ep, and its columns on both ranks of tp."""
    grid = MeshConfig(dp=2, tp=2, ep=2, sequence_parallel=sequence)
    job = Job(replace(SMALL, shared_experts=1), grid, recompute=kind, dropout=0.2, **PATHS[path])
    assert_equals_one_device(job)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_inside_tensor_parallelism_with_expert_replicas(path):
    grid = MeshConfig(dp=4, tp=2, ep=2)
    cfg = replace(SMALL, experts=5, ffn_size=5, kv_heads=1)
    assert_equals_one_device(Job(cfg, grid, clip=True, **PATHS[path]), steps=2)


# ---- who holds what


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_experts_are_held_once_and_everything_else_by_all(impl):
    """5 experts on 4 ranks: 1, 1, 1, 2. Names and values are those of one device."""
    job = Job(replace(SMALL, experts=5, layers=1), MeshConfig(dp=4, ep=4), impl)
    wholes = {p.record.name: p.detach() for p in llama(job).parameters()}

    def held(world):
        model = llama(job, mesh.build(world, job.mesh, job.cfg.kv_heads))
        experts = set(expert_parallel.expert_parameters(model))
        return {p.record.name: (p.record, p.detach(), p in experts) for p in model.parameters()}

    ranks = run_ranks(held, 4)
    assert [sum(mine for *_, mine in rank.values()) for rank in ranks] == [3, 3, 3, 6]
    for name, whole in wholes.items():
        holders = [rank[name] for rank in ranks if name in rank]
        is_expert = ".experts." in name
        assert len(holders) == (1 if is_expert else 4), name
        for record, weight, counted_as_expert in holders:
            assert counted_as_expert == is_expert
            assert torch.equal(weight, whole)
            assert record.partial == (("expert_replica",) if is_expert else ("dp",))


def test_experts_of_a_plain_model_are_known_too():
    names = {p.record.name for p in expert_parallel.expert_parameters(llama(Job()))}
    assert len(names) == 2 * 4 * 3
    assert all(".experts." in name for name in names)
