"""Embedding, output layer and loss over a split vocabulary, against one device and by hand."""

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picotron_lab import fused, sharding, vocab_parallel
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value
from picotron_lab.vocab_parallel import ALGORITHMS, Shard, VocabEmbedding, VocabHead, contract

rare = partial(pytest.param, marks=pytest.mark.exhaustive)  # left to a run after a change
every_way = pytest.mark.parametrize("impl", ["plain", "fused"])
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few tokens per chunk, so that the fused path has several of them."""
    monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, "cpu", 64)


def rows_of(axis, full_VD):
    start, stop = sharding.bounds(full_VD.shape[0], axis.size, axis.rank)
    return torch.nn.Parameter(full_VD[start:stop].clone())


def make_case(V, N=11, D=3, dtype=torch.float64, size=1.0):
    """x [1, N, D], weight [V, D] and labels [1, N], of which every fourth is ignored."""
    dice = torch.Generator().manual_seed(V)
    x = torch.randn(1, N, D, generator=dice, dtype=torch.float64) * size
    weight = torch.randn(V, D, generator=dice, dtype=torch.float64)
    labels = torch.randint(V, (1, N), generator=dice)
    labels[:, ::4] = -100
    return x.to(dtype), weight.to(dtype), labels


def torch_loss(x, weight, labels, factor=1.0):
    """Loss and gradients by torch alone, in float64."""
    x, weight = (t.detach().double().clone().requires_grad_() for t in (x, weight))
    logits = F.linear(x.flatten(0, 1), weight)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    (loss * factor).backward()
    return loss.detach(), x.grad, weight.grad


def loss_on_ranks(axis, case, impl, algorithm, factor=0.25):
    x, weight, labels = case
    x, weight = x.clone().requires_grad_(), rows_of(axis, weight)
    head = VocabHead(weight, Shard(axis, case[1].shape[0], impl == "fused"), algorithm)
    loss = head(x, labels)
    (loss * factor).backward()
    return loss.detach(), x.grad, weight.grad


def assert_equals_torch(results, case, tolerance, factor=0.25):
    """Loss and dX of every rank, and dW put together from all."""
    loss, dx, dw = torch_loss(*case, factor)
    scale = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    for my_loss, my_dx, _ in results:
        torch.testing.assert_close(my_loss, loss, **scale)
        torch.testing.assert_close(my_dx, dx, **scale)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), dw, **scale)


# ---- the same as cross_entropy


@every_way
@every_algorithm
@pytest.mark.parametrize("ranks", [1, rare(2), 3, rare(4), 8])
@pytest.mark.parametrize("V", [37, 64, 9])  # over 8 ranks: 9 words leave the last three without
def test_loss_and_gradients_equal_cross_entropy(impl, algorithm, ranks, V):
    case = make_case(V)
    results = run_ranks(loss_on_ranks, ranks, case, impl, algorithm)
    assert_equals_torch(results, case, 1e-10)
    if (V, ranks) == (9, 8):
        assert [r[2].shape[0] for r in results] == [2, 2, 2, 2, 1, 0, 0, 0]


@every_way
@every_algorithm
def test_float32(impl, algorithm):
    case = make_case(37, dtype=torch.float32)
    assert_equals_torch(run_ranks(loss_on_ranks, 3, case, impl, algorithm), case, 1e-5)


@every_way
@every_algorithm
def test_bfloat16_weights(impl, algorithm):
    """Inputs rounded to bfloat16 are given to both; a result is off by some roundings of 2^-8."""
    case = make_case(37, dtype=torch.bfloat16)
    results = run_ranks(loss_on_ranks, 3, case, impl, algorithm)
    assert results[0][0].dtype == torch.float32
    assert {r[1].dtype for r in results} == {r[2].dtype for r in results} == {torch.bfloat16}
    assert_equals_torch(results, case, 3e-2)


@every_way
@every_algorithm
@pytest.mark.parametrize("sign", [rare(1), -1])
def test_huge_logits_do_not_overflow(impl, algorithm, sign):
    """Logits up to 1e4, where exp overflows from 89 on; also the label may be at either end."""
    x, weight, labels = make_case(9, D=4, dtype=torch.float32, size=3000.0 * sign)
    logits = F.linear(x, weight)
    assert logits.abs().max() > 1e4 and logits.abs().max() < 1e5
    results = run_ranks(loss_on_ranks, 8, (x, weight, labels), impl, algorithm)
    loss, dx, dw = torch_loss(x, weight, labels, 0.25)
    torch.testing.assert_close(results[0][0], loss.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], dx.float(), rtol=1e-3, atol=1e-3)
    found = torch.cat([r[2] for r in results])
    torch.testing.assert_close(found, dw.float(), rtol=1e-3, atol=1e-3 * float(dw.abs().max()))


@every_way
@every_algorithm
@pytest.mark.parametrize("logit", [1e4, rare(-1e4)])
def test_huge_equal_logits(impl, algorithm, logit):
    """Nine equal logits: the loss of a token is log 9, and no digit of it is lost beside 1e4."""
    x, weight = torch.full((1, 2, 4), logit / 4), torch.ones(9, 4)
    case = x, weight, torch.tensor([[0, 8]])
    results = run_ranks(loss_on_ranks, 8, case, impl, algorithm, 1.0)
    for loss, dx, _ in results:
        assert float(loss) == pytest.approx(2 * math.log(9), rel=1e-6)
        assert dx.abs().max() < 1e-6
    # softmax - onehot, summed over both tokens: 2/9 - 1 for words 0 and 8, 2/9 for the others
    slopes = torch.cat([dw for _, _, dw in results])[:, 0] / (logit / 4)
    assert slopes.tolist() == pytest.approx([-7 / 9] + 7 * [2 / 9] + [-7 / 9], rel=1e-5)


@every_way
@every_algorithm
def test_words_of_one_rank_only(impl, algorithm):
    """All labels are words of rank 1: the others have none to pick, and still have gradients."""
    x, weight, labels = make_case(37)
    labels = torch.where(labels >= 0, 19 + labels % 3, labels)
    assert sharding.bounds(37, 2, 1) == (19, 37)
    results = run_ranks(loss_on_ranks, 2, (x, weight, labels), impl, algorithm)
    assert_equals_torch(results, (x, weight, labels), 1e-10)
    assert results[0][2].abs().min() > 0


@every_way
@every_algorithm
def test_all_labels_ignored(impl, algorithm):
    x, weight, labels = make_case(37)
    labels = torch.full_like(labels, -100)
    for loss, dx, dw in run_ranks(loss_on_ranks, 3, (x, weight, labels), impl, algorithm):
        assert loss == 0 and dx.count_nonzero() == 0 and dw.count_nonzero() == 0


@every_way
@every_algorithm
def test_no_tokens(impl, algorithm):
    case = make_case(37, N=0)
    for loss, dx, dw in run_ranks(loss_on_ranks, 2, case, impl, algorithm):
        assert loss == 0 and dx.shape == (1, 0, 3) and dw.count_nonzero() == 0


@every_way
@every_algorithm
@pytest.mark.parametrize("seed", [0, *map(rare, range(1, 4))])
def test_whatever_rank_runs_next(impl, algorithm, seed):
    case = make_case(37)
    results = run_ranks(loss_on_ranks, 4, case, impl, algorithm, seed=seed)
    assert_equals_torch(results, case, 1e-10)


@every_way
@every_algorithm
@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_only_numbers_per_token_travel(impl, algorithm, frozen):
    case = make_case(37)

    def evaluate(axis):
        weight = rows_of(axis, case[1]).requires_grad_(not frozen)
        head = VocabHead(weight, Shard(axis, 37, impl == "fused"), algorithm)
        with torch.set_grad_enabled(frozen):
            return head(case[0], case[2]), axis.ledger.bytes()

    for loss, payload in run_ranks(evaluate, 3):
        torch.testing.assert_close(loss, torch_loss(*case)[0], rtol=1e-10, atol=0)
        assert payload == 8 * 11 * (3 if algorithm == "naive" else 9)


# ---- calls, bytes, memory


@every_way
@every_algorithm
@pytest.mark.parametrize("ranks", [2, 3])
def test_calls_and_bytes_equal_the_contract(impl, algorithm, ranks):
    case = make_case(37, dtype=torch.float32)

    def ledger_of(axis):
        loss_on_ranks(axis, case, impl, algorithm)
        return axis.ledger

    # 64 logits of 19 or 13 words: 3 or 4 tokens per chunk
    chunks = {"plain": 1, "fused": {2: 4, 3: 3}[ranks]}[impl]
    _, calls, payload = contract(algorithm, 11, 3, ranks, chunks)
    for ledger in run_ranks(ledger_of, ranks):
        assert (len(ledger.calls), ledger.bytes()) == (calls, payload)
        waiting = [c for c in ledger.calls if c.waits]
        assert len(waiting) == (2 * chunks if algorithm == "naive" else 0)
        if impl == "fused" and algorithm != "naive":  # the next S runs before this chunk's C1
            order = ["all_gather"] + (chunks - 1) * ["all_gather", "all_reduce"] + ["all_reduce"]
            assert [c.op for c in ledger.calls] == order


def test_contract_by_hand():
    """10 tokens of width 6 on 4 ranks: 4 bytes times 30 or 120 statistics, plus 240 for dX."""
    assert contract("naive", 10, 6, 4) == (3, 3, 360)
    assert contract("1", 10, 6, 4) == (2, 2, 720)
    assert contract("2", 10, 6, 4, chunks=5) == (1, 10, 720)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest result."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return results


@every_way
@pytest.mark.parametrize("algorithm", [rare("naive"), "1", "2"])
def test_memory(impl, algorithm, monkeypatch):
    """Plain: a rank's part of the logits, twice; fused: a third of that, in 8 chunks; never all."""
    N, V, R = 64, 1000, 250
    monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, "cpu", R * N // 8)
    case = make_case(V, N=N, D=2, dtype=torch.float32)

    def measure(axis):
        with LargestTensor() as watch, Meter() as meter:
            loss_on_ranks(axis, case, impl, algorithm)
        head = VocabHead(rows_of(axis, case[1]), Shard(axis, V, impl == "fused"), algorithm)
        with torch.no_grad(), Meter() as evaluating:
            head(case[0], case[2])
        return watch.largest, meter.peak_bytes, evaluating.peak_bytes

    part = 4 * R * N
    for largest, peak, evaluation in run_ranks(measure, 4):
        assert evaluation <= peak
        assert largest == (R * N if impl == "plain" else R * N // 8)
        if impl == "plain":
            assert part < peak < 2.2 * part < 4 * V * N
        else:
            assert 2 * part / 8 < peak < 0.6 * part


# ---- the whole model

CFG = ModelConfig(vocab_size=37, hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=24)


def make_model(cfg, parallelize=None, dropout=0.2, dtype=torch.float64):
    with torch.device("meta"):
        model = Llama(cfg, dropout)
    sharding.attach(model)
    if parallelize is not None:
        parallelize(model)
    sharding.materialise(model, 0, initial_value, dtype=dtype)
    return model


def make_batch(V):
    dice = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(V, (2, 2, 7), generator=dice)
    labels[0, :3] = -100
    return tokens, labels


def train(axis, cfg, impl, algorithm, fuse):
    def split(model):
        if fuse:
            fused.fuse(model)
        vocab_parallel.parallelize(model, axis, impl, algorithm)

    model = make_model(cfg, split)
    loss = model(*make_batch(cfg.vocab_size))
    loss.backward()
    with torch.no_grad():
        logits = model.eval()(make_batch(cfg.vocab_size)[0])
    tied = model.head.weight is model.embed.weight
    return loss.detach(), {p.record: p.grad for p in model.parameters()}, logits, tied


@every_way
@every_algorithm
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks, V", [rare(1, 37), rare(2, 37), (3, 37), rare(8, 9)])
def test_model_equals_one_device(impl, algorithm, tied, ranks, V):
    cfg = dataclasses.replace(CFG, tied=tied, vocab_size=V)
    plain = make_model(cfg)
    loss = plain(*make_batch(V))
    loss.backward()
    expected = {p.record.name: p.grad for p in plain.parameters()}
    logits = plain.eval()(make_batch(V)[0])
    close = {"rtol": 1e-10, "atol": 1e-12}
    for rank, result in enumerate(run_ranks(train, ranks, cfg, impl, algorithm, impl == "fused")):
        torch.testing.assert_close(result[0], loss.detach(), **close)
        torch.testing.assert_close(result[2], logits.detach(), **close)
        assert result[3] == tied and {r.name for r in result[1]} == {*expected}
        for record, gradient in result[1].items():
            whole = expected[record.name]
            torch.testing.assert_close(gradient, whole[record.index], **close)
            split = record.name in ("embed.weight", "head.weight")
            rows = sharding.bounds(V, ranks, rank) if split else (0, whole.shape[0])
            assert record.slices[0] == rows and record.replicas == record.partial == ()


def test_any_axis():
    """Two groups of two ranks, each a model of its own."""

    def of_a_group(axis):
        return train(axis.split("pp", [[0, 2], [1, 3]]), CFG, "fused", "2", True)[0]

    assert len(set(map(float, run_ranks(of_a_group, 4)))) == 1


def test_embedding_sends_one_sum():
    def look_up(axis):
        embed = VocabEmbedding(rows_of(axis, torch.arange(74.0).view(37, 2)), Shard(axis, 37, True))
        return embed(torch.tensor([[0, 36, 18]])), axis.ledger.calls

    for x, calls in run_ranks(look_up, 4):
        assert x.tolist() == [[[0, 1], [72, 73], [36, 37]]]
        assert [(c.op, c.bytes) for c in calls] == [("all_reduce", 3 * 2 * 4)]


def test_a_nan_of_one_word_is_not_everybodys():
    """A rank looks up its first row for other ranks' tokens, and must not let it through."""
    full = torch.tensor([[torch.nan] * 2, [2, 3], [torch.nan] * 2, [6, 7]])

    def look_up(axis):
        embed = VocabEmbedding(rows_of(axis, full), Shard(axis, 4, True))
        x = embed(torch.tensor([[1, 3]]))
        (x * torch.tensor([torch.nan, 1])[:, None]).sum().backward()
        return x, embed.weight.grad

    for rank, (x, gradient) in enumerate(run_ranks(look_up, 2)):
        assert x.tolist() == [[[2, 3], [6, 7]]] and gradient[0].tolist() == [0, 0]
        assert bool(gradient[1].isnan().all()) == (rank == 0)


# ---- mistakes


@every_way
@every_algorithm
def test_gradients_once_and_no_second_derivative(impl, algorithm):
    case = make_case(9)

    def learn(axis):
        x, weight = case[0].clone().requires_grad_(), rows_of(axis, case[1])
        loss = VocabHead(weight, Shard(axis, 9, impl == "fused"), algorithm)(x, case[2])
        with pytest.raises(AssertionError, match="and no second derivative: .* create_graph"):
            torch.autograd.grad(loss, x, create_graph=True)
        loss.backward(retain_graph=True)
        with pytest.raises(AssertionError, match="for one backward, .* call the model again"):
            loss.backward()

    run_ranks(learn, 3)


@every_way
@pytest.mark.parametrize("what, word", [("label", 37), ("label", -1), ("token", 37), ("token", -1)])
def test_a_word_that_nobody_has(impl, what, word):
    """F.cross_entropy and F.embedding refuse it too, on the rank that would look it up."""

    def of_every_rank(axis):
        model = make_model(CFG, lambda m: vocab_parallel.parallelize(m, axis, impl, "1"))
        tokens, labels = make_batch(37)
        (labels if what == "label" else tokens)[1, 2] = word
        sentence = f"a {what} is not among the 37 words 0 to 36"
        with pytest.raises(RuntimeError, match=sentence):
            model(tokens, labels)
        return True

    assert run_ranks(of_every_rank, 3) == [True] * 3


def test_words_that_name_nothing():
    with pytest.raises(ConfigError, match="'plain' or 'fused', and one of naive, 1, 2"):
        vocab_parallel.parallelize(None, None, "plain", "3")
    with pytest.raises(ConfigError, match="given impl 'fast' and algorithm '1'"):
        vocab_parallel.parallelize(None, None, "fast", "1")
