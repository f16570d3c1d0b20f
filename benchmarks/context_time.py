"""The time that attention takes on context-parallel ranks: what `context.py --time` prints.

Ranks   take turns on one device, forward and backward. A rank's clock stands still while it
        communicates: what is timed is what n devices would compute, and copies that they would make
Beside  one scaled_dot_product_attention of the whole sequence, which is the same work
Ratios  of one operator   its time over that of all ranks: 1 if blocks and merges cost nothing
        of ideal          its time over n times that of the busiest rank: 1 if nobody waits, too
        merges            their share of the time of all ranks
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import cpu_hardware, describe, markdown
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.attention_blocks import FusedBlocks  # noqa: E402
from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.context_parallel import make_core, positions  # noqa: E402
from picotron_lab.fused import SDPA  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402

Table = list[list[str]]


class Clock:
    """Seconds of a rank's own work, and of parts of it; on a CPU those that it gave this thread."""

    def __init__(self, device: str):
        self.device, self.seconds, self.began = device, 0.0, 0.0
        self.parts: list[Callable[[], float]] = []

    def start(self) -> None:
        """Go on."""
        self.began = self._now()

    def stop(self) -> None:
        """Stand still."""
        self.seconds += self._now() - self.began

    @contextmanager
    def part(self) -> Iterator[None]:
        """What runs inside counts as a part."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.parts.append(lambda: start.elapsed_time(end) / 1e3)
        else:
            began = self._now()
            yield
            seconds = self._now() - began
            self.parts.append(lambda: seconds)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()


class Pausing:
    """An axis, or a handle, in whose calls a clock stands still."""

    def __init__(self, inner: Any, clock: Clock):
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._paused(found) if callable(found) else found

    def _paused(self, call: Callable) -> Callable:
        def paused(*args: Any, **options: Any) -> Any:
            self._clock.stop()
            answer = call(*args, **options)
            self._clock.start()
            return Pausing(answer, self._clock) if hasattr(answer, "wait") else answer

        return paused


class TimedBlocks(FusedBlocks):
    """The fused arithmetic, whose merges are a part."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def merge(self, *tensors: Tensor) -> None:
        """As always."""
        with self.clock.part():
            super().merge(*tensors)


@dataclass(frozen=True)
class Case:
    """A sequence of T tokens on n ranks, H query and K key/value heads of width C."""

    n: int
    T: int
    H: int
    K: int
    C: int

    @property
    def name(self) -> str:
        """Such as '4 x 1024 tokens, 8/2 heads of 64'."""
        return f"{self.n} x {self.T // self.n} tokens, {self.H}/{self.K} heads of {self.C}"


def cases(device: str, smoke: bool) -> list[Case]:
    """Short sequences, where merges weigh most, and long ones."""
    if smoke:
        return [Case(4, 64, 4, 2, 8)]
    if device == "cpu":
        return [Case(4, 1024, 8, 2, 64), Case(4, 4096, 8, 2, 64)]
    return [Case(8, T, 32, 8, 128) for T in (2**14, 2**16)]


def tensors(case: Case, device: str) -> list[Tensor]:
    """q, k, v, and the gradient of out, of the whole sequence."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dice = torch.Generator(device).manual_seed(0)
    shapes = [(1, case.T, heads, case.C) for heads in (case.H, case.K, case.K, case.H)]
    return [torch.randn(s, generator=dice, device=device).to(dtype) for s in shapes]


def there_and_back(core: Any, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = core(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def rank_main(axis: Axis, kind: str, whole: list[Tensor]) -> tuple[float, float, list[Tensor]]:
    """(seconds, those of merges, results) of a rank."""
    device = whole[0].device.type
    mine_T = positions(kind, whole[0].shape[1], axis).to(device)
    mine, clock = [x[:, mine_T] for x in whole], Clock(device)
    core = make_core(SDPA(), Pausing(axis, clock), "fused", kind)
    core.arithmetic = TimedBlocks(clock)
    clock.start()
    results = there_and_back(core, *mine)
    clock.stop()
    return clock.seconds, sum(part() for part in clock.parts), results


def check(kind: str, n: int, found: list[list[Tensor]], expected: list[Tensor]) -> None:
    """Nothing wrong is timed."""
    places = run_ranks(lambda axis: positions(kind, expected[0].shape[1], axis), n)
    for places_T, results in zip(places, found, strict=True):
        for mine, whole in zip(results, expected, strict=True):
            theirs = whole[:, places_T.to(whole.device)].float()
            off = (mine.float() - theirs).abs().max() / theirs.abs().max()
            if not off < 3e-2:
                raise SystemExit(f"{kind} on {n} ranks is off by {float(off):.1e}")


def measure(case: Case, steps: int, device: str) -> Table:
    """Rows of one case. The ways take turns, so that they meet the same machine."""
    kinds = ("ring", "zigzag", "all-gather")
    whole, alone = tensors(case, device), []
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for step in range(steps + 2):
        clock = Clock(device)
        clock.start()
        expected = there_and_back(SDPA(), *whole)
        clock.stop()
        alone.append(clock.seconds)
        for kind in kinds:
            seconds, merges, results = zip(*run_ranks(rank_main, case.n, kind, whole), strict=True)
            if step == 0:
                check(kind, case.n, results, expected)
            found[kind].append((sum(seconds), max(seconds), sum(merges)))
    one = statistics.median(alone[2:])
    rows = [[f"{case.name}: one operator", f"{one * 1e3:.1f}", "", "", "1.00", "1.00"]]
    for kind, times in found.items():
        every, busiest, merges = (statistics.median(x) for x in zip(*times[2:], strict=True))
        cells = f"{every * 1e3:.1f}", f"{busiest * 1e3:.1f}", f"{merges / every:.1%}"
        ratios = f"{one / every:.2f}", f"{one / (case.n * busiest):.2f}"
        rows.append([f"{case.name}: {kind}", *cells, *ratios])
    return rows


def timing(steps: int, smoke: bool) -> None:
    """Measure every case and print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # each rank's thread would start others
    rows = [row for case in cases(device, smoke) for row in measure(case, steps, device)]
    print(describe(torch.cuda.get_device_name() if device == "cuda" else cpu_hardware()), "\n")
    header = ("case", "all ranks, ms", "busiest, ms", "merges", "of one operator", "of ideal")
    print(markdown(header, rows))
