"""The table that proves everything must itself be able to say BAD."""

import math

import torch

from picotron_lab import trainer, verify
from picotron_lab.verify import DENSE, deviation, relative


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
    good = {"numbers": [1.0, 2.0], "tensors": {"w": (record, torch.ones(2))}}
    assert deviation(good, good) == 0
    assert deviation({**good, "numbers": [1.0, math.nan]}, good) == math.inf
    bad = {"w": (record, torch.tensor([1.0, math.nan]))}
    assert verify.Row("x", 1, "float64", deviation({**good, "tensors": bad}, good), 0).good is False


def test_ranks_count_different_numbers_of_labels():
    """Else a mean of means would pass: see the mutant of that name."""
    assert len(verify.TEXT) >= verify.TEXT_BYTES and (verify.TEXT_BYTES - 1) % 16 == 4


def test_a_mean_of_means_is_bad(monkeypatch):
    original = trainer.OneStage.run

    def run(self, actions, batches, tokens):
        own = sum(int((labels != -100).sum()) for _, labels, _ in batches)
        return original(self, actions, batches, own * self.synchroniser.axis.size)

    monkeypatch.setattr(trainer.OneStage, "run", run)
    case = ("data parallel, naive", 3, DENSE, {"micro_batch_size": 1, "dp_step": "naive"})
    monkeypatch.setattr(verify, "cases", lambda: [case])
    assert not verify.verify()[0].good
