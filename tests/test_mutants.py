"""Tests of the tests: every mutant must be noticed by the test that it names."""

from pathlib import Path

import pytest
from mutants import (
    Mutant,
    context_and_experts,
    context_paths,
    gradients,
    model_and_run,
    splitting,
)  # fmt: skip

TESTS = Path(__file__).parent
MUTANTS = [
    mutant
    for module in (gradients, model_and_run, splitting, context_and_experts, context_paths)
    for mutant in vars(module).values()
    if isinstance(mutant, Mutant)
]


def run_test(node: str) -> int:
    """pytest's exit code of one test: 0 passed, 1 failed, others not run at all."""
    quiet = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return int(pytest.main([*quiet, "-m", "", str(TESTS / node)]))


def needs_hugging_face(mutant: Mutant) -> bool:
    return "hugging_face" in mutant.killed_by


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant, capsys):
    if needs_hugging_face(mutant):
        pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        mutant.breaks(patch)
        code = run_test(mutant.killed_by)
    assert code != 0, f"{mutant.name} survived {mutant.killed_by}: {mutant.what}"
    assert code == 1, f"{mutant.killed_by} could not be run (pytest's exit code {code})"
