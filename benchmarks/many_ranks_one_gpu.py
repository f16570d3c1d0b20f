"""Every fused path beside its plain twin: ranks as threads on one CUDA GPU, or on the CPU.

    python benchmarks/many_ranks_one_gpu.py                   a table; a CPU, 2 minutes
    python benchmarks/many_ranks_one_gpu.py --dtypes float64  one dtype; --only tp: some techniques

Both compute the loss and every parameter's gradient of one global batch, from the same weights, on
the same mesh, in the same dtype. They form the same sums in other orders, so they may differ by
roundings and by nothing else. Worst: the largest difference of any rank, relative to the largest
element of the whole tensor. That plain paths are right is shown elsewhere: run.py verify.

Bound   6 sqrt(2 v L), in u = eps / 2 of the dtype, the largest relative error of a rounding
        L   roundings on the longest way from a weight through the loss to a gradient. float64 and
            float32: a sum of n numbers rounds n times, so L adds up the lengths of all sums on the
            way, forward, as long again backward, and the sum over all tokens that a weight's
            gradient is. bfloat16: inside a matmul sums are formed in float32, so L counts the
            tensors that are stored on the way
        v   variance of one rounding: uniform up to half a last digit, u^2 / 3 for the mantissa 1,
            and a quarter of it for 2; over mantissas as they are spread, 0.54 u^2 / 3. Inside a sum
            half of that: its partial results grow from nothing to the whole like a random walk
        2   two programs, which round independently: variances add, as they do along the way
        6   standard deviations, for the worst of 10^5 elements
        Taken for granted: roundings are as often up as down, and nothing on the way makes errors
        grow: norms keep sizes, and weights are initial ones. Kernels add in blocks and lanes, so
        their sums round less often than L says; and the bound is for a usual element, while
        deviations are divided by the largest: what is measured should lie well below.
        A gradient that is twice too large deviates by 1.
Experts in bfloat16 all are chosen: where two scores are close, a rounding chooses another expert,
        and that is a jump no bound on roundings can tell
Dims    as in model.py
"""

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import cpu_hardware, describe, markdown
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab import verify  # noqa: E402
from picotron_lab.cases import DENSE, DROPPING, EXPERTS, TIED, Case  # noqa: E402
from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.precision import DTYPES  # noqa: E402
from picotron_lab.schedules.registry import NAMES  # noqa: E402
from picotron_lab.trainer import Trainer  # noqa: E402

NARROW = "bfloat16"
SIGMAS = 6.0  # fewer than one of 10^8 normal numbers is farther out
STORED = 0.54 / 3  # variance of a rounding, in squares of u
SUMMED = STORED / 2  # of one inside a sum
PER_LAYER = 14  # norm, q, rotary, scores, softmax, mix, out, sum; norm, gate, SiLU, product, down,
HEAD = 3  # sum; norm, logits, loss
OTHERS = ("auto", "seq1f1b", "terapipe")  # a search; and for slices, below


def techniques() -> list[Case]:
    """One row for each technique; the training options are those of verify.py, but for these."""
    one, two = {"micro_batch_size": 1}, {"micro_batch_size": 2}
    alone = [("fused model", DENSE), ("fused model, tied", TIED), ("fused model, experts", EXPERTS)]
    rows = [Case(name, MeshConfig(), model, two) for name, model in alone]
    rows += [
        Case("fused model, recompute full", MeshConfig(), DENSE, {**two, "recompute": "full"}),
        Case("dp", MeshConfig(dp=4), DENSE, one),
        *(Case(f"ZeRO-{s}", MeshConfig(dp=3, zero=s), DENSE, two) for s in (1, 2, 3)),
    ]
    for tp, sp in ((2, False), (4, True)):
        mesh = MeshConfig(tp=tp, sequence_parallel=sp)
        for vocabulary in ("none", "naive", "1", "2"):
            name = f"tp{', sp' * sp}, vocabulary {vocabulary}"
            split = dataclasses.replace(mesh, vocab_parallel=vocabulary)
            rows.append(Case(name, split, DENSE, {"micro_batch_size": 4}))
    for kind in ("ring", "zigzag", "all-gather", "ulysses"):
        rows.append(Case(f"cp, {kind}", MeshConfig(cp=4, cp_kind=kind), DENSE, two))
    rows += [
        Case("ep", MeshConfig(dp=3, ep=3), EXPERTS, two),
        Case("ep, dropping", MeshConfig(dp=2, ep=2), DROPPING, two),
    ]
    return [*rows, *_pipelines()]


def _pipelines() -> list[Case]:
    one, four = {"micro_batch_size": 1}, dataclasses.replace(DENSE, layers=4)
    names = [name for name in NAMES if name not in OTHERS]
    rows = [Case(f"pp, {name}", MeshConfig(pp=2, schedule=name), four, one) for name in names]
    for name, slices in (("1f1b", "7,5,4"), ("terapipe", "3"), ("seq1f1b", "4"), ("zb-v", "9,7")):
        mesh = MeshConfig(pp=2, schedule=name, token_slices=slices)
        rows.append(Case(f"pp, {name}, token slices {slices}", mesh, four, one))
    return rows


# ---- the bound


def bound(model: ModelConfig, dtype: str, cfg: TrainConfig) -> float:
    """The bound of the docstring, relative to the largest element."""
    unit = torch.finfo(DTYPES[dtype]).eps / 2
    variance = SUMMED * roundings_of_sums(model, cfg)
    if dtype == NARROW:
        variance = STORED * roundings_stored(model)
    return SIGMAS * unit * math.sqrt(2 * variance)


def roundings_of_sums(model: ModelConfig, cfg: TrainConfig) -> int:
    """L where sums round: their lengths."""
    D, C, T, F = model.hidden_size, model.head_width, cfg.sequence_length, model.ffn_size
    attention = D + D + C + T + T + model.heads * C  # norm, q, scores, softmax, mix, out
    mlp = D + D + F + model.top_k * (model.experts > 0)  # norm, gate, down, mix of experts
    head = D + D + model.vocab_size  # norm, logits, softmax
    return 2 * (model.layers * (attention + mlp) + head) + cfg.global_batch_size * T


def roundings_stored(model: ModelConfig) -> int:
    """L where only what is stored rounds: the number of tensors."""
    return 2 * (model.layers * PER_LAYER + HEAD)


# ---- the two twins


@dataclass(frozen=True)
class Found:
    """A technique in a dtype."""

    case: Case
    dtype: str
    loss: float  # worst deviations
    gradients: float
    bound: float

    @property
    def good(self) -> bool:
        """Whether nothing but roundings tells the twins apart."""
        return max(self.loss, self.gradients) <= self.bound


def compare(case: Case, dtype: str, base: TrainConfig) -> Found:
    """Run both."""
    model = case.model
    if dtype == NARROW and model.experts:
        model = dataclasses.replace(model, top_k=model.experts)
    changes = case.changes | {"dtype": dtype}
    plain, fused = (
        run(model, case.mesh, dataclasses.replace(base, **changes, impl=impl))
        for impl in ("plain", "fused")
    )
    whole = assemble(plain)
    assert verify.covers(fused, {"tensors": whole}), (
        f"the fused ranks of {case.technique} hold fewer gradients than the plain ones: mend it."
    )
    wholes = {name: tensor for name, _, tensor in whole}
    gradients = max(
        verify.relative(tensor, wholes[name][record.index], wholes[name])
        for rank in fused
        for name, record, tensor in rank["tensors"]
    )
    loss = max(abs(f["loss"] / p["loss"] - 1) for f, p in zip(fused, plain, strict=True))
    return Found(case, dtype, loss, gradients, bound(model, dtype, base))


def run(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> list[dict[str, Any]]:
    """Loss and gradients of global batch 0, of each rank: (name, record, tensor)."""

    def rank_main(world: Axis) -> dict[str, Any]:
        trainer = Trainer(model, mesh, cfg, world)
        loss, _ = trainer.compute_gradients(0)
        kept = [(p.record.name, p.record, p.grad.clone()) for p in trainer.parameters]
        return {"loss": loss, "tensors": kept}

    return run_ranks(rank_main, mesh.size)


def assemble(ranks: list[dict[str, Any]]) -> list[tuple[str, Any, Tensor]]:
    """Whole gradients, from the shards of all ranks."""
    whole: dict[str, tuple[str, Any, Tensor]] = {}
    for name, record, tensor in (each for rank in ranks for each in rank["tensors"]):
        if name not in whole:
            empty = torch.full(record.shape, math.nan, dtype=tensor.dtype, device=tensor.device)
            whole[name] = name, record, empty
        whole[name][2][record.index] = tensor
    return list(whole.values())


# ---- what is shown


def cells(found: Found) -> list[str]:
    """Loss, gradients, bound."""
    numbers = [f"{number:.1e}" for number in (found.loss, found.gradients, found.bound)]
    return numbers if found.good else [f"**{number}**" for number in numbers]


def table(found: list[Found], dtypes: list[str]) -> str:
    """A row for each technique; what is beyond its bound is bold."""
    header = ["technique", "ranks"]
    for dtype in dtypes:
        header += [f"{dtype}: loss", "gradients", "bound"]
    rows: dict[str, list[str]] = {}
    for one in found:
        start = [one.case.technique, str(one.case.mesh.size)]
        rows.setdefault(one.case.technique, start).extend(cells(one))
    return markdown(header, rows.values())


def main() -> int:
    """Compare, print; 1 if a fused path differs from its twin by more than roundings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ["float64", "float32", NARROW]
    parser.add_argument("--dtypes", nargs="+", choices=choices, default=choices)
    parser.add_argument("--only", default="", help="techniques whose names begin so")
    args = parser.parse_args()
    cuda, began, found = torch.cuda.is_available(), time.perf_counter(), []
    # a matmul that adds parts in bfloat16 would round inside its sum
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(verify.TEXT[: verify.TEXT_BYTES])
        base = dataclasses.replace(verify.BASE, data=str(text), cache_dir=folder)
        for case in (case for case in techniques() if case.technique.startswith(args.only)):
            print(case.technique, file=sys.stderr)
            found += [compare(case, dtype, base) for dtype in args.dtypes]
    where = torch.cuda.get_device_name() if cuda else f"{cpu_hardware()} (no CUDA GPU here)"
    print(f"{describe(where)}; {time.perf_counter() - began:.0f} s\n")
    print(table(found, args.dtypes), "\n")
    for dtype in args.dtypes:
        ratio, worst = max(
            (max(f.loss, f.gradients) / f.bound, f.case.technique)
            for f in found
            if f.dtype == dtype
        )
        print(f"{dtype}: at most {ratio:.2f} of the bound ({worst})")
    return int(not all(one.good for one in found))


if __name__ == "__main__":
    sys.exit(main())
