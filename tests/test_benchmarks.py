"""benchmarks/kernels.py refuses wrong kernels, and says what it did not measure."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the fused kernels need Triton; the plain path does not")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def kernels(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernels")


@pytest.fixture
def kernel_cases(kernels):
    """Its cases."""
    return importlib.import_module("kernel_cases")


@pytest.fixture
def with_kernel(kernel_cases):
    """The case of SwiGLU, 30 rows of 50, with another function in the place of our kernel."""
    (case,) = kernel_cases.swiglus(True, 4)
    return lambda kernel: replace(case, paths=case.paths | {"ours": kernel})


def plain(gate, up):
    return F.silu(gate) * up


# ---- what is refused


def test_numbers_that_no_program_writes_are_refused(kernels, kernel_cases, with_kernel, device):
    """One program of 1024 numbers where 1500 need two."""
    swiglu = kernel_cases.swiglu

    def one_program(gate, up):
        out = torch.empty_like(gate)
        swiglu._forward_kernel[(1,)](gate, up, out, gate.numel(), BLOCK=swiglu.BLOCK)
        return out

    case = replace(with_kernel(one_program), learned=0)
    with pytest.raises(SystemExit, match="result 0 of our kernel, .* is off by nan"):
        kernels.check(case, device)


def test_a_result_off_by_one_per_cent_is_refused(kernels, with_kernel):
    case = with_kernel(lambda gate, up: 1.01 * plain(gate, up))
    with pytest.raises(SystemExit, match="swiglu 30 x 50: result 0 of our kernel, .* by 1.0e-02"):
        kernels.check(case, "cpu")


def test_a_gradient_off_by_one_per_cent_is_refused(kernels, with_kernel):
    def steeper(gate, up):
        out = plain(gate, up)
        return 1.01 * out - 0.01 * out.detach()

    with pytest.raises(SystemExit, match="gradient 0 of our kernel, .* is off by 1.0e-02"):
        kernels.check(with_kernel(steeper), "cpu")


def test_another_dtype_is_refused(kernels, with_kernel):
    case = with_kernel(lambda gate, up: plain(gate, up).double())
    with pytest.raises(SystemExit, match="of our kernel, torch.float64, is off by .*e-0[78]"):
        kernels.check(case, "cpu")


def test_what_is_right_passes_and_leaves_torch_as_it_was(kernels, with_kernel):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    found = kernels.check(with_kernel(plain), "cpu")
    assert [error.result for error in found] == ["result 0", "gradient 0", "gradient 1"]
    assert all(0 < error.ours == error.eager < 1e-6 for error in found)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


# ---- by hand


def test_error_is_that_of_a_row_beside_its_own_largest_number(kernels):
    exact = torch.tensor([[100.0, 1.0], [0.0, -0.02], [0.0, 0.0]])
    off = kernels.error(exact + torch.tensor([1.0, 0.0]), exact)
    assert off == pytest.approx(50, rel=1e-6), "1 beside 0.02"
    assert kernels.error(exact * 1.01, exact) == pytest.approx(0.01, rel=1e-4)
    assert kernels.error(exact, exact) == 0
    assert kernels.error(exact[:1], exact) != 0, "another shape is no match"
    assert not kernels.error(exact * torch.nan, exact) <= 1


def test_bounds(kernels):
    assert kernels.bound(0.5, torch.bfloat16) == 0.5 + 1 / 256 + 2**-18
    assert kernels.bound(0.5, torch.float32) == 0.5 + 2**-18
    assert kernels.bound(0.5, torch.int64) == 0


def test_bytes_of_full_sizes(kernel_cases):
    """16384 x 2048 numbers of 2 bytes are 64 MiB; 8192 x 16384 are 256 MiB."""
    moves = {case.name: case.moves for case in kernel_cases.make_cases(False, 2)}
    assert moves["rms_norm 16384 x 2048"] == (128 * 2**20, 192 * 2**20)
    assert moves["add_rms_norm 16384 x 2048"] == (256 * 2**20, 256 * 2**20)
    assert moves["vocab of 1/8 8192 x 16384"] == (256 * 2**20, 512 * 2**20)
    assert moves["adamw 67108864"] == (30 * 2**26, 0)


def test_slow_streaming_kernels_of_ours_are_named(kernels):
    def at(operation, path, streaming, of_copy):
        return kernels.Time(operation, path, streaming, 1.0, 1.0, 1e12, of_copy, [1.0])

    others = [at("a", "eager", True, 20.0), at("sort", "ours", False, 3.0)]
    (line,) = kernels.below_bar([at("a", "ours", True, 85.0), *others])
    assert line == "bar: 85 % of the copy's bandwidth; all 1 streaming rows reach it."
    lines = kernels.below_bar([at("a", "ours", True, 84.9), at("b", "ours", True, 90.0), *others])
    assert lines[0] == "bar: 85 % of the copy's bandwidth; 1 of 2 are below:"
    assert lines[1:] == ["- a: 84.9 %"]


# ---- the whole of it


def test_every_kernel_has_a_case(kernel_cases):
    """A case calls its kernel by the module's name."""
    modules = {path.stem for path in (ROOT / "picotron_lab" / "kernels").glob("[!_]*.py")}
    assert modules <= {*vars(kernel_cases)}
    seeds = [case.name for case in kernel_cases.make_cases(False, 2)]
    assert len(seeds) == len({*seeds}), "a case's name is its seed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_nothing_is_measured(kernels, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert kernels.main() == 0
    assert capsys.readouterr().out.startswith("Nothing was measured: this benchmark needs a CUDA")


@pytest.mark.slow
def test_smoke_checks_every_case_and_prints_no_times(
    kernels, kernel_cases, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--smoke", "--json", str(tmp_path / "all")])
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.main() == 0
    printed, saved = capsys.readouterr(), json.loads((tmp_path / "all").read_text())
    names = [case.name for case in kernel_cases.make_cases(True, 4)]
    assert [line.split(" | ")[0][2:] for line in printed.out.splitlines()[4:]] == names
    assert "GB/s" not in printed.out and printed.err == ""
    assert saved["times"] == [] and {row["operation"] for row in saved["errors"]} == {*names}
    assert all(row["ours"] <= row["bound"] < 1e-2 for row in saved["errors"])
