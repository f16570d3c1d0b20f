"""Slices know their places; wrong lengths, and slices in a wrong order, are told in a sentence."""

import re

import pytest
import torch

from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.context_parallel import Ring
from picotron_lab.dropout import Where
from picotron_lab.model import AttentionCore, Llama
from picotron_lab.partition import token_slices as lengths_of
from picotron_lab.token_pipeline import CORES, contract, parallelize
from picotron_lab.token_slices import SliceOf, cut

IMPLS = ("plain", "fused")


def batch(T=9):
    tokens_BT = torch.arange(2 * T).view(2, T)
    documents_BT = torch.tensor([[0] * T, [*range(T)]])
    where = Where(torch.arange(T), torch.tensor([4, 7]), 3, 5, documents_BT)
    return tokens_BT, tokens_BT + 1, where


# ---- places


def test_a_slice_knows_its_place():
    tokens_BT, labels_BT, where = batch()
    slices = cut((tokens_BT, labels_BT, where), (4, 3, 2))
    for (tokens, labels, place), first, end in zip(slices, (0, 4, 7), (4, 7, 9), strict=True):
        assert torch.equal(tokens, tokens_BT[:, first:end])
        assert torch.equal(labels, labels_BT[:, first:end])
        assert torch.equal(place.documents_BT, where.documents_BT[:, first:end])
        assert place.positions_T.tolist() == [*range(first, end)]
        assert place.rows_B.tolist() == [4, 7] and (place.step, place.seed) == (3, 5)
        assert (place.first, place.last) == (first, end == 9) and isinstance(place, SliceOf)
        assert place.sequence is slices[0][2].sequence


def test_every_micro_batch_has_a_sequence_of_its_own():
    a, b = (cut(batch(), [9])[0][2].sequence for _ in range(2))
    assert a is not b and a.length == 9 and a.held == {}


def test_labels_and_documents_may_be_missing():
    tokens_BT, _, _ = batch()
    (_, labels, where), _ = cut((tokens_BT, None, Where.first(tokens_BT)), [8, 1])
    assert labels is None and where.documents_BT is None and where.documents(8) is None


@pytest.mark.parametrize("lengths", [[4, 4], [5, 5], [9, 0], [10, -1], []])
def test_lengths_that_do_not_make_a_sequence(lengths):
    with pytest.raises(AssertionError, match=r"do not make up a sequence of 9: give lengths"):
        cut(batch(), lengths)


# ---- the option


@pytest.mark.parametrize(
    ("text", "T", "multiple", "lengths"),
    [
        ("1", 7, 1, (7,)),
        ("4", 128, 1, (32, 32, 32, 32)),
        ("3", 128, 1, (43, 43, 42)),
        ("5", 7, 1, (2, 2, 1, 1, 1)),
        ("7", 7, 1, (1,) * 7),
        ("3", 128, 8, (48, 40, 40)),
        ("2", 12, 4, (8, 4)),
        ("48,40,40", 128, 1, (48, 40, 40)),
        ("1,6", 7, 1, (1, 6)),
        ("8,4", 12, 4, (8, 4)),
    ],
)
def test_lengths(text, T, multiple, lengths):
    assert lengths_of(text, T, multiple) == lengths


@pytest.mark.parametrize(
    ("text", "T", "multiple", "rule"),
    [
        ("0", 8, 1, "must lie between 1 and 8"),
        ("9", 8, 1, "must lie between 1 and 8"),
        ("5", 8, 2, "must lie between 1 and 4"),
        ("two", 8, 1, "number of slices, or their lengths"),
        ("", 8, 1, "number of slices, or their lengths"),
        ("-1", 8, 1, "number of slices, or their lengths"),
        ("4,4,", 8, 1, "number of slices, or their lengths"),
        ("4;4", 8, 1, "number of slices, or their lengths"),
        ("4,3", 8, 1, "adds up to 7 tokens"),
        ("4,5", 8, 1, "adds up to 9 tokens"),
        ("8,0", 8, 1, "lengths above 0"),
        ("5,3", 8, 2, "multiples of 2"),
        ("2,6", 8, 4, "multiples of 4"),
        ("9", 1, 1, "must lie between 1 and 1"),
    ],
)
def test_wrong_lengths_say_what_works(text, T, multiple, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        lengths_of(text, T, multiple)
    sentence = str(caught.value)
    assert sentence.startswith(f"--token-slices {text} ")
    works = re.search(r"try --token-slices (\S+)\.$", sentence)[1]
    assert sum(lengths_of(works, T, multiple)) == T


def test_a_sequence_that_ranks_cannot_share_out():
    with pytest.raises(ConfigError, match=r"^--sequence-length 10 .* try --sequence-length 12\.$"):
        lengths_of("2", 10, 4)
    assert lengths_of("2", 12, 4) == (8, 4)


# ---- order


def started(impl, T=6):
    """A core, and a function that runs a slice forward and gives its result."""
    core = CORES[impl](AttentionCore())
    slices = cut(batch(T), [2] * (T // 2))
    x_BTHC = torch.ones(2, 2, 1, 4, requires_grad=True)

    def forward(k):
        core.where = slices[k][2]
        return core(x_BTHC, x_BTHC, x_BTHC).sum()

    return forward


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_out_of_order(impl):
    forward = started(impl)
    forward(0)
    with pytest.raises(AssertionError, match="at token 4 came when keys were known up to token 2"):
        forward(2)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_out_of_order(impl):
    forward = started(impl)
    losses = [forward(k) for k in range(3)]
    with pytest.raises(AssertionError, match="tokens 2 to 4 went backward .* up to 6 was due"):
        losses[1].backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [0, 2])
def test_backward_twice(k, impl):
    forward = started(impl)
    losses = [forward(each) for each in range(3)]
    for loss in reversed(losses[k:]):
        loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="run backwards once each, from the last slice"):
        losses[k].backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_second_derivatives(impl):
    x_BTHC = torch.ones(2, 2, 1, 4, requires_grad=True)
    core = CORES[impl](AttentionCore())
    _, _, core.where = cut(batch(2), [2])[0]
    loss = core(x_BTHC, x_BTHC, x_BTHC).sum()
    with pytest.raises(AssertionError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(loss, x_BTHC, create_graph=True)


def test_no_slices_of_parts_of_a_sequence():
    model = Llama(ModelConfig(vocab_size=8, hidden_size=8, layers=2, heads=2, kv_heads=2))
    model.layers[1].attention.core = Ring(None, "ring")
    with pytest.raises(AssertionError, match="layer 1 has no attention over whole sequences"):
        parallelize(model, "plain")


# ---- contract


def test_contract_by_hand():
    """2 rows of 4 + 2 tokens, 3 heads of 5 channels, D = 7, bfloat16."""
    assert contract([4, 2], B=2, K=3, C=5, D=7, e=2) == {
        "keys, values": 720,  # (4 + 2) * 2 * 3 * 5 numbers of 2 bytes, twice
        "gradients": 960,  # 4 * 2 * 3 * 5 numbers of 4 bytes, twice
        "messages": 4,
        "bytes": 336,  # 6 * 2 * 7 numbers of 2 bytes, twice
        "pairs": 42,  # 2 * (1 + 2 + 3 + 4 + 5 + 6)
    }


def test_one_slice_keeps_no_gradients():
    assert contract([6], B=1, K=1, C=1, D=1, e=8)["gradients"] == 0
