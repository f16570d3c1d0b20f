"""Tasks cut from a loss function, run one by one, give what torch.autograd gives, bit for bit."""

import itertools
import pickle
import random
import re
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.model import Llama, rotary_angles
from picotron_lab.mpmd_trace import merge, pipeline_yield, trace

WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


PARAMS = {"a": draw(4, 4, seed=1), "b": draw(4, 4, seed=2), "c": draw(4, seed=3)}
BATCH = (draw(3, 4, seed=4), draw(3, 4, seed=5))


# ---- programs; all have three stages


def three_layers(p, batch):
    x, y = batch
    x = pipeline_yield(torch.tanh(x @ p["a"]))
    x = pipeline_yield(torch.relu(x @ p["b"]))
    return ((x * p["c"] - y) ** 2).sum()


def skip(p, batch):
    """The first stage gives one part to both others, the other part to the last."""
    h, g = torch.tanh(batch[0] @ torch.cat([p["a"], p["b"]], 1)).chunk(2, -1)
    x = pipeline_yield(torch.tanh(pipeline_yield(h) @ p["b"]))
    return ((x + h * p["c"] - batch[1] * g) ** 2).sum()


def tied(p, batch):
    x = pipeline_yield(torch.relu(batch[0] @ p["a"]))
    x = pipeline_yield(torch.relu(x @ p["b"]))
    return ((x @ p["a"].T - batch[1]) ** 2).mean() + p["c"].sum() * 0.5


def without_parameters(p, batch):
    x = pipeline_yield(batch[0] @ p["a"])
    x = pipeline_yield(torch.softmax(x, -1) + batch[1].sign())
    return (x @ p["b"]).cos().sum()


def tuples(p, batch):
    """Several values over a cut: integers too, one of no use, one through a normalisation."""
    x, rows = batch[0] @ p["a"], torch.arange(3)
    x, rows, y, _ = pipeline_yield(x.sin(), rows, x.cos(), x * 2)
    x, y = pipeline_yield(x * y + rows[:, None], y * p["c"])
    return F.layer_norm(x @ p["b"] + y, (4,), p["c"]).square().sum()


def side_by_side(p, batch):
    """The second stage takes nothing from the first."""
    x = pipeline_yield(torch.tanh(batch[0] @ p["a"]))
    y = pipeline_yield(torch.tanh(batch[1] @ p["b"]))
    return (x - y * p["c"]).square().sum()


def shapes(p, batch):
    """Other dims and dtypes from stage to stage; torch's own attention."""
    x = pipeline_yield((batch[0] @ p["a"])[None, None].repeat(1, 2, 1, 1).float())
    q = x @ p["b"].float()
    x = pipeline_yield(F.scaled_dot_product_attention(q, x, x, is_causal=True))
    return (x.flatten(1).sum(0)[:4].double() * p["c"]).sum()


def in_place(p, batch):
    """Within a stage, and of what came over the cut."""
    x = pipeline_yield((batch[0] @ p["a"]).relu_())
    x[:, 0] = x[:, 1] * 3
    x = pipeline_yield(x.add_(p["c"]))
    return (x @ p["b"]).sin_().sum()


def computed_again(p, batch):
    """Two stages need what the first one computes again."""

    def layer(x, w):
        y = x @ w
        return y.tanh(), y.sin()

    x, z = checkpoint(layer, batch[0], p["a"], use_reentrant=False)
    x, _ = checkpoint(layer, pipeline_yield(x), p["b"], use_reentrant=False)
    return (pipeline_yield(x) * p["c"] * z).square().sum()


def constants(p, batch):
    """Weights in another dtype, a causal mask, numbers written into the program."""
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    x = pipeline_yield(batch[0].float() @ p["a"].float())
    x = pipeline_yield(x @ p["b"].float().masked_fill(mask, 0))
    return (x.double() * torch.tensor([1.0, -2.0, 3.0, 0.5]) * p["c"]).sum()


PROGRAMS = (
    three_layers, skip, tied, without_parameters, tuples, side_by_side, shapes, in_place,
    computed_again, constants,
)  # fmt: skip


class Staged(nn.Module):
    """A Llama whose stages end after each layer but the last."""

    def __init__(self, cfg, dropout):
        super().__init__()
        self.llama = Llama(cfg, dropout).to(WIDE)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = draw(*parameter.shape, seed=i) * 0.3

    def forward(self, tokens, labels):
        llama, where = self.llama, Where.first(tokens)
        x = llama.embed_dropout(llama.embed(tokens), where)
        angles = rotary_angles(where.positions_T, llama.cfg.head_width, llama.cfg.rope_theta)
        for i, layer in enumerate(llama.layers):
            x = layer(x if i == 0 else pipeline_yield(x), angles, where)
        return llama.head(llama.norm(x), labels)


# ---- running tasks by hand


def orders(stages):
    """Forward, then backward; backward in two parts: each W as early, then as late as it may be."""
    forward, down = [("F", s) for s in range(stages)], range(stages - 1, -1, -1)
    yield forward + [("BW", s) for s in down]
    yield forward + [(kind, s) for s in down for kind in ("B", "W")]
    yield forward + [("B", s) for s in down] + [("W", s) for s in range(stages)]


def run(body, params, batch, order):
    """Loss and gradients by parameter's name. Each value has the size that body says."""
    flat = pytree.tree_leaves(params) + pytree.tree_leaves(batch)
    values = dict(zip(body.parameters + body.batch, flat, strict=True))
    with torch.no_grad():
        for task in map(body.tasks.get, order):
            made = task.run(*(values[name] for name in task.reads))
            values.update(zip(task.makes, made, strict=True))
    for name, x in values.items():
        assert (tuple(x.shape), x.dtype) == body.shapes[name]
        assert prod(x.shape) * x.dtype.itemsize == body.bytes[name]
    sums = {name: [values[v] for _, v in parts] for name, parts in body.gradients.items()}
    return values[body.loss], {name: sum(parts) for name, parts in sums.items()}


def expected(loss_fn, params, batch):
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = loss_fn(pytree.tree_unflatten(leaves, spec), batch)
    return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)


def same(found, wanted, exact=True):
    """Loss and all gradients; 0 stands for the gradient of what the loss does not use."""
    pairs = [(found[0], wanted[0]), *zip(found[1].values(), wanted[1], strict=True)]
    for x, y in pairs:
        if y is None:
            assert isinstance(x, int) and x == 0
        elif exact:
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def bodies():
    return {program: trace(program, PARAMS, BATCH) for program in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_tasks_equal_autograd_bit_for_bit(bodies, program):
    body, wanted = bodies[program], expected(program, PARAMS, BATCH)
    assert body.stages == 3
    for order in orders(3):
        same(run(body, PARAMS, BATCH, order), wanted)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_tasks_hold_for_another_batch(bodies, program):
    """Nothing of the values that were traced is kept."""
    params = {name: x + draw(*x.shape, seed=7) for name, x in PARAMS.items()}
    batch = (draw(3, 4, seed=8), draw(3, 4, seed=9))
    order = next(orders(3))
    same(run(bodies[program], params, batch, order), expected(program, params, batch))


@pytest.mark.exhaustive  # left to a run after a change
def test_llama():
    """Shared key heads, a tied embedding, dropout, labels that do not count."""
    cfg = ModelConfig(
        vocab_size=19, hidden_size=16, layers=3, heads=4, kv_heads=2, ffn_size=24, tied=True
    )
    model = Staged(cfg, dropout=0.3)
    tokens = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(0))
    params, batch = dict(model.named_parameters()), (tokens[:, :-1], tokens[:, 1:].clone())
    batch[1][0, :3] = -100

    def loss_fn(params, batch):
        return functional_call(model, params, batch)

    body, wanted = trace(loss_fn, params, batch), expected(loss_fn, params, batch)
    for order in orders(3):
        same(run(body, params, batch, order), wanted)
    assert [stage for stage, _ in body.gradients["params.llama.embed.weight"]] == [2, 0]
    same(run(merge(body, [1, 2]), params, batch, next(orders(2))), wanted)


def random_program(seed):
    """Up to 12 steps, each on any two earlier values, and 3 yields, of some of them or all."""
    draws = random.Random(seed)
    steps = draws.choices(["matmul", "add", "multiply", "tanh"], k=12)
    picks = [(draws.random(), draws.random(), draws.choice("ab")) for _ in steps]
    ends, sides = draws.sample(range(2, 12), 3), [draws.random() for _ in steps]

    def loss_fn(p, batch):
        values = [batch[0] * p["c"], torch.tanh(batch[1] @ p["b"])]
        for i, (kind, (first, second, name)) in enumerate(zip(steps, picks, strict=True)):
            x, y = values[int(first * len(values))], values[int(second * len(values))]
            made = {"matmul": x @ p[name], "add": x + y, "multiply": x * y, "tanh": x.tanh()}
            values.append(made[kind] / 2)
            if i in ends:  # what lies before `side` goes past the cut
                side = int(sides[i] * len(values))
                values[side:] = pytree.tree_leaves(pipeline_yield(*values[side:]))
                values[-1] = values[-1].sin()  # each stage has something to do
        return sum((value * (i + 1)).sum() for i, value in enumerate(values))

    return loss_fn


@pytest.mark.parametrize("seed", range(2))
def test_random_programs_and_all_their_mergers(seed):
    """Values go past any number of cuts. Three terms of a sum may be added in another order."""
    loss_fn = random_program(seed)
    body, wanted = trace(loss_fn, PARAMS, BATCH), expected(loss_fn, PARAMS, BATCH)
    assert body.stages == 4
    for cuts in itertools.chain(*(itertools.combinations((1, 2, 3), n) for n in range(4))):
        counts = [b - a for a, b in itertools.pairwise((0, *cuts, 4))]
        merged = merge(body, counts)
        assert merged.stages == len(counts)
        for order in orders(merged.stages):
            same(run(merged, PARAMS, BATCH, order), wanted, exact=False)
        check_names(merged)


# ---- what tasks read and make


def check_names(body):
    """Each value is made once, before it is read, and read by another task or a result."""
    results = {body.loss} | {v for parts in body.gradients.values() for _, v in parts}
    for order in orders(body.stages):
        known, read = {*body.parameters, *body.batch}, set()
        for task in map(body.tasks.get, order):
            assert known.issuperset(task.reads)
            assert known.isdisjoint(task.makes) and len({*task.makes}) == len(task.makes)
            known.update(task.makes)
            read.update(task.reads)
        assert known - results - {*body.parameters, *body.batch} <= read
        assert results <= known
    for parts in body.gradients.values():
        assert len({stage for stage, _ in parts}) == len(parts)
        for stage, value in parts:
            assert value in body.tasks["BW", stage].makes


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_reads_and_makes(bodies, program):
    check_names(bodies[program])


def operators(task):
    return [node.target for node in task.run.graph.nodes]


def test_matmuls_are_where_they_belong():
    """Two layers a stage. W has the weights' gradients; of the first stage, whose inputs nobody
    asks for, it has all of backward, which is one product less."""

    def loss_fn(weights, x):
        for i, weight in enumerate(weights):
            x = torch.tanh((pipeline_yield(x) if i in (2, 4) else x) @ weight)
        return x.sum()

    body = trace(loss_fn, [draw(4, 4)] * 6, draw(3, 4))
    matmul = torch.ops.aten.mm.default
    count = {key: operators(task).count(matmul) for key, task in body.tasks.items()}
    assert [count["F", s] for s in range(3)] == [2, 2, 2]
    assert [count["BW", s] for s in range(3)] == [3, 4, 4]
    assert [count["B", s] for s in range(3)] == [0, 2, 2]
    assert [count["W", s] for s in range(3)] == [3, 2, 2]


def test_flops_by_hand(bodies):
    """A product of 3 x 4 with 4 x 4: 2 * 48; any other equation: its elements, here 12."""
    tasks = bodies[three_layers].tasks
    assert tasks["F", 0].flops == 96 + 12  # tanh
    assert tasks["B", 1].flops == 96 + 12  # backward of relu
    assert tasks["W", 1].flops == 96
    assert tasks["F", 2].flops == 3 * 12 + 1  # product, difference, square; their sum


def test_values_by_hand(bodies):
    """What goes over the cuts of three layers: x [3, 4] on and its gradient back."""
    body = bodies[three_layers]
    made = {key: {*task.makes} for key, task in body.tasks.items()}
    read = {key: {*task.reads} for key, task in body.tasks.items()}
    for s in (0, 1):
        (forward,), (back,) = made["F", s] & read["F", s + 1], made["BW", s + 1] & read["BW", s]
        assert body.bytes[forward] == body.bytes[back] == 3 * 4 * 8
    assert not made["F", 0] & read["F", 2]
    assert read["F", 1] & {*body.parameters} == {"params.b"}
    assert read["F", 2] & {*body.batch} == {"batch.1"}
    assert body.parameters == ("params.a", "params.b", "params.c")


def test_a_skip_connection_goes_past_a_stage(bodies):
    body = bodies[skip]
    assert {*body.tasks["F", 0].makes} & {*body.tasks["F", 2].reads}
    assert {*body.tasks["BW", 2].makes} & {*body.tasks["BW", 0].reads}


def test_nothing_comes_back_for_what_is_of_no_use(bodies):
    for stage in range(3):
        assert torch.ops.aten.zeros.default not in operators(bodies[tuples].tasks["BW", stage])


def test_masks_and_views_are_copied_not_sent():
    def loss_fn(p, batch):
        mask, double = batch[1] > 0, p["b"] * 2
        x = pipeline_yield(batch[0] @ p["a"])
        return ((x * mask).t() @ (x @ double)).sum()

    body = trace(loss_fn, PARAMS, BATCH)
    (x,) = body.tasks["F", 0].makes
    assert {*body.tasks["F", 1].reads} == {x, "batch.1", "params.b"}
    kept = [v for v in body.tasks["F", 1].makes if v != body.loss]
    assert [body.shapes[v][0] for v in kept] == [(3, 4), (3, 4)]  # neither transposed nor a mask


def test_shared_weights_keep_a_sum_on_each_stage(bodies):
    """So no gradient of theirs crosses; and a merged stage has one sum."""
    body = bodies[tied]
    assert [stage for stage, _ in body.gradients["params.a"]] == [2, 0]
    assert body.bytes[body.gradients["params.a"][0][1]] == 4 * 4 * 8
    assert body.gradients["params.a"][0][1] not in body.tasks["BW", 0].reads
    assert [stage for stage, _ in merge(body, [3]).gradients["params.a"]] == [0]


def test_parameters_that_the_loss_does_not_use():
    body = trace(lambda p, x: (x @ p["a"]).sum(), PARAMS, draw(3, 4))
    assert body.gradients["params.b"] == () and len(body.gradients["params.a"]) == 1
    assert body.stages == 1 and not body.tasks["B", 0].makes


def test_tasks_travel_to_another_process(bodies):
    for task in bodies[constants].tasks.values():
        copied = pickle.loads(pickle.dumps(task))
        shapes = [bodies[constants].shapes[name] for name in task.reads]
        inputs = [torch.ones(shape, dtype=dtype) for shape, dtype in shapes]
        assert (copied.reads, copied.makes) == (task.reads, task.makes)
        assert all(map(torch.equal, copied.run(*inputs), task.run(*inputs)))


def test_tracing_needs_no_memory():
    """Tensors without memory do: 16 TiB of weights, from shapes alone."""
    size = 2**20
    weights = [torch.empty(size, size, device="meta") for _ in range(2)]
    body = trace(lambda w, x: (pipeline_yield(x @ w[0]) @ w[1]).sum(), weights, weights[0][:8])
    assert body.tasks["F", 1].flops == 2 * 8 * size**2 + 1
    assert body.bytes["params.0"] == 4 * size**2


@pytest.mark.parametrize("counts", [[2, 2], [3, 0], []])
def test_refused_mergers(bodies, counts):
    message = re.escape(f"counts {counts}") + r".*add up to the 3 stages.*try \[3\]"
    with pytest.raises(ConfigError, match=message):
        merge(bodies[three_layers], counts)
