"""Grouped experts beside experts one by one, and beside one dense MLP of equal FLOPs.

    python benchmarks/experts.py            on a CUDA GPU in bf16, else small and in fp32
    python benchmarks/experts.py --smoke    that it runs, on any machine

    experts   rows that are sorted already, through the experts:
              dense    one MLP for all rows: what so many FLOPs take if there are no experts
              loop     one expert after the other
              grouped  the weights packed; on CUDA all experts in one matmul, on a CPU one by one
    layer     tokens with given choices, from sorting to the weighted sum:
              plain    the MoE of model.py;   grouped  sort, permute, grouped experts, combine;
              dense as above

Forward and backward together. The paths of a case take turns, so that they meet the same machine;
"of dense" is the time of dense over that of the path, medians of both: 1 is as fast. The grouped
path is compared with the loop before it is timed.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import cpu_hardware, describe, markdown
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab import grouped_experts as grouped  # noqa: E402
from picotron_lab.config import ModelConfig  # noqa: E402
from picotron_lab.fused import FusedSwiGLU  # noqa: E402
from picotron_lab.model import MLP, MoE  # noqa: E402

HEADER = ("case", "path", "ms", "of dense", "TFLOP/s")
Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """N tokens, k choices of each, among `experts` of width D and F.

    liking  how much the first expert is liked more than the last: chances fall evenly, 1 is alike
    """

    tokens: int
    top_k: int
    experts: int
    size: tuple[int, int]
    liking: float

    @property
    def name(self) -> str:
        """Such as '4096 x 2 to 8 of 2048 x 1408, uneven'."""
        width, hidden = self.size
        uneven = "" if self.liking == 1 else ", uneven"
        return f"{self.tokens} x {self.top_k} to {self.experts} of {width} x {hidden}{uneven}"


def cases(device: str, smoke: bool) -> list[Case]:
    """At 1024 rows per expert, alike and uneven; small ones; large ones."""
    if smoke:
        return [Case(32, 2, 4, (16, 24), 3.0)]
    if device == "cpu":
        return [
            Case(1024, 2, 8, (256, 512), 1.0),
            Case(1024, 2, 8, (256, 512), 8.0),
            Case(512, 2, 32, (128, 128), 8.0),
        ]
    return [
        Case(4096, 2, 8, (2048, 1408), 1.0),
        Case(4096, 2, 8, (2048, 1408), 8.0),
        Case(2048, 8, 64, (2048, 1408), 8.0),
        Case(8192, 2, 8, (4096, 14336), 8.0),
    ]


class Given(nn.Module):
    """In place of a router: choices that were made before."""

    def __init__(self, expert_Nk: Tensor, gate_Nk: Tensor):
        super().__init__()
        self.choices = expert_Nk, gate_Nk

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.choices


class Setting:
    """Experts, tokens, choices and the gradients of the results of one case."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype):
        dice = torch.Generator().manual_seed(0)
        chances = torch.linspace(case.liking, 1, case.experts).expand(case.tokens, -1)
        expert_Nk = torch.multinomial(chances, case.top_k, generator=dice)
        N, D = case.tokens, case.size[0]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=dice).to(device, dtype)

        self.expert_Nk, gate_Nk = expert_Nk.to(device), random(N, case.top_k)
        cfg = ModelConfig(hidden_size=D, ffn_size=case.size[1], experts=case.experts)
        self.moe = MoE(cfg).to(device, dtype)
        self.dense = MLP(*case.size).to(device, dtype)
        for part in (self.moe, self.dense):
            for module in part.modules():
                if isinstance(module, MLP):
                    module.activation = FusedSwiGLU()
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.02)
        self.moe.router = Given(self.expert_Nk, gate_Nk.requires_grad_())
        self.grouped = grouped.GroupedExperts(self.moe.experts)
        grouped.pack(self.grouped)
        self.counts_E = torch.bincount(expert_Nk.flatten(), minlength=case.experts).to(device)
        self.counts = self.counts_E.tolist()
        M = N * case.top_k
        self.x_ND, self.dout_ND = random(N, D).requires_grad_(), random(N, D)
        self.rows_MD, self.drows_MD = random(M, D).requires_grad_(), random(M, D)

    def loop(self, rows_MD: Tensor) -> Tensor:
        """One expert after the other."""
        parts = zip(self.moe.experts, rows_MD.split(self.counts), strict=True)
        return torch.cat([mlp(part) for mlp, part in parts])

    def layer(self, x_ND: Tensor) -> Tensor:
        """From choices to the weighted sum."""
        expert_Nk, gate_Nk = self.moe.router.choices
        place_Nk, counts_E = grouped.sort_choices(expert_Nk, len(self.grouped.experts))
        rows_MD = grouped.permute(x_ND, place_Nk, expert_Nk.numel())
        return grouped.combine(self.grouped(rows_MD, counts_E), place_Nk, gate_Nk)

    def runs(self) -> dict[str, dict[str, Run]]:
        """What is timed: {"experts" or "layer": {path: forward and backward}}."""
        weights, gates = list(self.moe.experts.parameters()), self.moe.router.choices[1]

        def run(function: Callable, x: Tensor, others: list[Tensor], grad: Tensor) -> list[Tensor]:
            y = function(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *others], grad)]

        rows, drows, learned = self.rows_MD, self.drows_MD, [gates, *weights]
        dense_weights = list(self.dense.parameters())

        def dense() -> list[Tensor]:
            return run(self.dense, rows, dense_weights, drows)

        return {
            "experts": {
                "dense": dense,
                "loop": lambda: run(self.loop, rows, weights, drows),
                "grouped": lambda: run(
                    lambda x: self.grouped(x, self.counts_E), rows, weights, drows
                ),
            },
            "layer": {
                "dense": dense,
                "plain": lambda: run(
                    lambda x: self.moe(x[None])[0], self.x_ND, learned, self.dout_ND
                ),
                "grouped": lambda: run(self.layer, self.x_ND, learned, self.dout_ND),
            },
        }


def seconds_of(work: Run, device: str) -> float:
    """Of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(paths: dict[str, Run], steps: int, device: str) -> dict[str, float]:
    """Median seconds of each path after 3 calls; the paths take turns."""
    found: dict[str, list[float]] = {path: [] for path in paths}
    for _, (path, work) in itertools.product(range(3 + steps), paths.items()):
        found[path].append(seconds_of(work, device))
    return {path: statistics.median(times[3:]) for path, times in found.items()}


def check(name: str, mine: list[Tensor], theirs: list[Tensor]) -> None:
    """Nothing wrong is timed."""
    for a, b in zip(mine, theirs, strict=True):
        off = (a.float() - b.float()).abs().max() / b.float().abs().max()
        if not off < 3e-2:
            raise SystemExit(f"{name}: grouped experts are off by {float(off):.1e}")


def measure(case: Case, steps: int, device: str) -> list[list[str]]:
    """Rows of one case."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    setting, lines = Setting(case, device, dtype), []
    cost = grouped.contract(case.tokens * case.top_k, *case.size, dtype.itemsize)
    flops = cost["forward"] + cost["backward"]
    for what, paths in setting.runs().items():
        other = paths["loop" if what == "experts" else "plain"]
        check(f"{case.name}, {what}", paths["grouped"](), other())
        times = medians(paths, steps, device)
        lines += [
            [f"{what}: {case.name}", path, f"{t * 1e3:.2f}", f"{times['dense'] / t:.2f}",
             f"{flops / t / 1e12:.3g}"]
            for path, t in times.items()
        ]  # fmt: skip
    return lines


def main() -> int:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="see that it works, measure nothing")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    for case in cases(device, args.smoke):
        lines += measure(case, args.steps, device)
    print(describe(torch.cuda.get_device_name() if device == "cuda" else cpu_hardware()), "\n")
    print(markdown(HEADER, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
