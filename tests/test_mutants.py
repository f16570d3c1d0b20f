"""Tests of the tests: every mutant must be noticed by the test that it names."""

from pathlib import Path

import pytest
from mutants import (
    Mutant,
    context_and_experts,
    context_paths,
    gradients,
    model_and_run,
    pipelines,
    programs,
    splitting,
    token_slices,
)  # fmt: skip

pytestmark = pytest.mark.slow  # nothing of the library is tested here
TESTS = Path(__file__).parent
MUTANTS = [
    mutant
    for module in (
        gradients, model_and_run, splitting, context_and_experts, context_paths, pipelines,
        token_slices, programs,
    )
    for mutant in vars(module).values()
    if isinstance(mutant, Mutant)
]  # fmt: skip
QUIET = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", ""]


class OneAfterTheOther:
    """A plugin of pytest: runs the tests that mutants name, each while the library is broken.

    One run for all, since pytest takes longer to start and to end than most tests take.
    """

    def __init__(self, mutants):
        self.mutants, self.reports = mutants, {}

    def pytest_runtestloop(self, session):
        for mutant in self.mutants:
            self.now = self.reports[mutant.name] = []
            with pytest.MonkeyPatch.context() as patch:
                mutant.breaks(patch)
                for item in filter(mutant.is_killed_by, session.items):
                    # no next item: what its fixtures hold is made again under the next mutant
                    item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return True

    def pytest_runtest_logreport(self, report):
        self.now.append(report)


@pytest.fixture(scope="module")
def reports(request):
    """Of every chosen mutant, what pytest reports of the test that it names."""
    cases = [item for item in request.session.items if item.path == request.path]
    plugin = OneAfterTheOther([item.callspec.params["mutant"] for item in cases])
    nodes = sorted({str(TESTS / mutant.killed_by) for mutant in plugin.mutants})
    code = pytest.main([*QUIET, *nodes], plugins=[plugin])
    assert code in (0, 1), f"pytest finds no such tests (exit code {code}): see what it prints"
    return plugin.reports


def needs_hugging_face(mutant: Mutant) -> bool:
    return "hugging_face" in mutant.killed_by


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant, reports):
    if needs_hugging_face(mutant):
        pytest.importorskip("transformers")
    outcomes = {report.outcome for report in reports[mutant.name] if report.when == "call"}
    assert outcomes & {"passed", "failed"}, f"{mutant.killed_by} could not be run"
    assert "failed" in outcomes, f"{mutant.name} survived {mutant.killed_by}: {mutant.what}"
