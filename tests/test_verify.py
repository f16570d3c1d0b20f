"""The table that proves everything must itself be able to say BAD."""

import math

import pytest
import torch

from picotron_lab import pipeline_parallel, verify
from picotron_lab.cases import DENSE, Case, sample
from picotron_lab.config import MeshConfig
from picotron_lab.verify import deviation, relative


def test_relative_difference():
    ones = torch.ones(3)
    assert relative(ones, ones) == 0
    assert relative(ones * 1.5, ones) == 0.5
    assert relative(torch.zeros(3), torch.zeros(3)) == 0
    assert relative(ones, torch.zeros(3)) == math.inf
    assert relative(torch.tensor([1.0, math.nan, 1.0]), ones) == math.inf
    assert relative(ones, torch.tensor([1.0, math.inf, 1.0])) == math.inf


def test_one_bad_number_makes_a_row_bad():
    record = type("Record", (), {"index": slice(None)})
    good = {"numbers": [1.0, 2.0], "tensors": [("w", record, torch.ones(2))]}
    assert deviation(good, good) == 0
    assert deviation({**good, "numbers": [1.0, math.nan]}, good) == math.inf
    bad = {**good, "tensors": [("w", record, torch.tensor([1.0, math.nan]))]}
    assert verify.Row("x", 1, "float64", deviation(bad, good), 0, 0).good is False


def test_a_shard_is_compared_with_its_part():
    """Rows 1:2 of a tensor whose largest element is 4, off by 1; an empty shard is right."""
    whole = {"numbers": [], "tensors": [("w", None, torch.tensor([4.0, 2.0, 1.0]))]}
    whole["numbers"] = [1.0]
    for rows, values, expected in ((slice(1, 2), [3.0], 0.25), (slice(3, 3), [], 0.0)):
        record = type("Record", (), {"index": rows})
        mine = {"numbers": [1.0], "tensors": [("w", record, torch.tensor(values))]}
        assert deviation(mine, whole) == expected


def test_rows_that_no_rank_holds_are_noticed():
    whole = {"tensors": [("w", None, torch.ones(4, 2)), ("v", None, torch.ones(3))]}

    def rank(*slices):
        records = [type("Record", (), {"index": part}) for part in slices]
        return {"tensors": list(zip("wv", records, (None, None), strict=True))}

    everything = slice(None)
    top, bottom = rank(slice(0, 2), everything), rank(slice(2, 4), everything)
    assert verify.covers([top, bottom], whole)
    assert not verify.covers([top, rank(slice(3, 4), everything)], whole)
    assert not verify.covers([rank(everything, slice(1, 3))], whole)


def test_the_sample_is_always_the_same_and_covers_everything():
    cases = sample(40)
    assert cases == sample(40) and cases[:12] == sample(12)
    assert len({(case.mesh, case.model) for case in cases}) > 35
    for field, values in (("zero", {0, 1, 2, 3}), ("tp", {1, 2, 3, 4, 8}), ("dp", {1, 2, 3, 4}),
                          ("vocab_parallel", {"", "none", "naive", "1", "2"})):  # fmt: skip
        assert {getattr(case.mesh, field) for case in cases} == values, field
    assert {case.changes["recompute"] for case in cases} == {"none", "selective", "full"}


@pytest.mark.slow  # left to CI; what always runs of it: test_products_equal_one_device
@pytest.mark.parametrize("case", sample(12), ids=lambda case: case.technique)
def test_a_random_product_equals_one_device(case):
    """The first rows of `run.py verify --all`; the others run there."""
    assert verify.verify([case])[0].good


def test_ranks_count_different_numbers_of_labels():
    """Else a mean of means would pass: see the mutant of that name."""
    assert len(verify.TEXT) >= verify.TEXT_BYTES and (verify.TEXT_BYTES - 1) % 16 == 4


def test_a_mean_of_means_is_bad(monkeypatch):
    original = pipeline_parallel.Executor.run

    def run(self, batches, tokens):
        own = sum(int((labels != -100).sum()) for _, labels, _ in batches)
        return original(self, batches, own * self.synchronisers[0].axis.size)

    monkeypatch.setattr(pipeline_parallel.Executor, "run", run)
    changes = {"micro_batch_size": 1, "dp_step": "naive"}
    case = Case("dp, naive", MeshConfig(dp=3), DENSE, changes)
    assert not verify.verify([case])[0].good
