"""Every Triton kernel beside torch: its error against float64, then its time and bandwidth.

    python benchmarks/kernels.py                                  on a CUDA GPU, in bf16
    TRITON_INTERPRET=1 python benchmarks/kernels.py --smoke       tiny and untimed, on any machine

Cases are in kernel_cases.py. Error: of a row, the largest difference from float64 over the largest
number, and of all rows the largest of these. While ours are checked, torch fills new memory with
NaN, so that a number that no program writes is seen. Where eager torch is off by x, ours may be by

    x + u + 2^-18    u = 2^-8 for bfloat16, 2^-11 for float16, 0 for float32; integers: equal

for both round the same number last, by u at most. 2^-18 is for float32 inside: the rounding of an
exponent below 32 makes 2^-19 of its exponential, and a sum in a tree of 32 levels as much.

Time: between two CUDA events, the median of --steps. Before each step the inputs are restored, for
some paths overwrite them, and 4 GiB are written: this flushes the L2 cache, and while it lasts the
host gets ahead of the GPU, so that launching does not count. GB/s: the bytes that must move over
the time; "of copy" compares with a copy of 4 GiB in the same run.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common import GIB, cpu_hardware, describe, markdown
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

BAR = 85  # per cent of the copy's bandwidth
WARMUP = 5
FLOAT32_INSIDE = 2**-18
OTHER = 2**-4  # who is off by more computes something else
ERRORS = ("operation", "of its results, the nearest to its bound", "eager", "ours", "bound")
TIMES = ("operation", "path", "ms", "ratio to eager", "GB/s", "of copy, %")
Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Dice:
    """Random numbers on the generator's device; `storage` is the dtype of activations."""

    generator: torch.Generator
    storage: torch.dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, in storage's dtype unless told."""
        dice = self.generator
        return torch.randn(shape, generator=dice, device=dice.device).to(dtype or self.storage)


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    operation   its name without the size
    draw        fresh inputs; the first `learned` of them get gradients (0: forward only)
    moves       bytes that forward and backward must move at least
    streaming   held to the bar: it only reads and writes long runs of numbers
    """

    operation: str
    size: str
    draw: Callable[[Dice], list[Tensor]]
    exact: Function
    paths: dict[str, Function]
    moves: tuple[int, int]
    learned: int = 0
    streaming: bool = True

    @property
    def name(self) -> str:
        """Operation and size."""
        return f"{self.operation} {self.size}"


@dataclass(frozen=True)
class Error:
    """One result of one case: how far eager torch and our kernel are off, and may be."""

    operation: str
    result: str
    eager: float
    ours: float
    bound: float


@dataclass(frozen=True)
class Time:
    """One path of one case, one way: median and every step in ms, bytes per second, per cent."""

    operation: str
    path: str
    streaming: bool
    ms: float
    ratio_to_eager: float
    speed: float
    of_copy: float
    samples_ms: list[float]

    def row(self) -> list[str]:
        """A line of the table."""
        speeds = f"{self.speed / 1e9:,.0f}", f"{self.of_copy:.0f}"
        return [self.operation, self.path, f"{self.ms:.3f}", f"{self.ratio_to_eager:.2f}", *speeds]


# ---- errors


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, or the largest integer, until the end."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def listed(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One result or several."""
    return [results] if isinstance(results, Tensor) else list(results)


def run(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results of the function, and the gradients of those inputs that require one."""
    results = listed(function(*inputs))
    if not grads:
        return results
    grads = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    learned = [x for x in inputs if x.requires_grad]
    return results + list(torch.autograd.grad(results, learned, grads))


def copies(case: Case, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Inputs that a path may overwrite, those with gradients first; floating ones in dtype."""
    fresh = [x.to(dtype if x.is_floating_point() else None, copy=True) for x in inputs]
    return [x.requires_grad_(i < case.learned) for i, x in enumerate(fresh)]


def draw(case: Case, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, and gradients of the results: 1 of a loss, else random. Each case has its seed."""
    storage = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
    dice = Dice(generator, storage)
    inputs = case.draw(dice)
    with torch.no_grad():
        results = listed(case.paths["eager"](*copies(case, inputs)))
    if not case.learned:
        return inputs, []
    return inputs, [dice.normal(*r.shape, dtype=r.dtype) if r.dim() else r / r for r in results]


def exactly(case: Case, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results and gradients in float64."""
    wide = copies(case, inputs, torch.float64), [g.double() for g in grads]
    return [x.detach() for x in run(case.exact, *wide)]


def error(given: Tensor, exact: Tensor) -> float:
    """Of a row the largest difference over the largest number; of all rows the largest."""
    if given.shape != exact.shape:
        return float("nan")
    given, exact = (x.detach().double().reshape(-1, *x.shape[-1:]) for x in (given, exact))
    largest = exact.abs().amax(-1)
    return float(((given - exact).abs().amax(-1) / largest.where(largest > 0, 1)).max())


def bound(eager: float, dtype: torch.dtype) -> float:
    """What is allowed beside an error of eager torch (see above)."""
    if not dtype.is_floating_point:
        return 0.0
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return eager + rounding + FLOAT32_INSIDE


def check(case: Case, device: str) -> list[Error]:
    """How far eager torch and ours are off; SystemExit if ours is wrong."""
    inputs, grads = draw(case, device)
    exact = exactly(case, inputs, grads)
    eager = run(case.paths["eager"], copies(case, inputs), grads)
    with poisoned():
        assert torch.empty(1).isnan(), "this torch leaves new memory as it is; take 2.2 or later"
        ours = run(case.paths["ours"], copies(case, inputs), grads)
    names = [f"gradient {i}" for i in range(case.learned)]
    names = [f"result {i}" for i in range(len(exact) - len(names))] + names
    found = []
    for name, mine, theirs, truth in zip(names, ours, eager, exact, strict=True):
        off = error(theirs, truth)
        last = Error(case.name, name, off, error(mine, truth), bound(off, mine.dtype))
        if not (last.ours <= last.bound and last.eager <= OTHER and mine.dtype == theirs.dtype):
            raise SystemExit(
                f"{case.name}: {name} of our kernel, {mine.dtype}, is off by {last.ours:.1e} where "
                f"eager torch, {theirs.dtype}, is off by {last.eager:.1e} and {last.bound:.1e} is "
                "allowed; nothing wrong is timed, so mend the kernel or the case."
            )
        found.append(last)
    return found


def worst(errors: list[Error]) -> list[str]:
    """A line of the table: the result that is nearest to its bound."""
    e = max(errors, key=lambda e: e.ours / e.bound if e.bound else 0)
    return [e.operation, e.result, *(f"{x:.1e}" for x in (e.eager, e.ours, e.bound))]


# ---- times


def samples_ms(
    work: Callable[[], object], restore: Callable[[], object], steps: int, device: str
) -> list[float]:
    """Milliseconds of each of `steps` calls after some more; on CUDA those of the GPU."""
    if device != "cuda":
        restore()
        began = time.perf_counter()
        work()
        return [1e3 * (time.perf_counter() - began)]
    flush, pairs = torch.empty(GIB, device=device), []
    for step in range(WARMUP + steps):
        restore()
        flush.fill_(step)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs[WARMUP:]]


def copy_speed(smoke: bool, steps: int, device: str) -> float:
    """Bytes per second, read and written, that a copy reaches."""
    source = torch.randn(1024 if smoke else GIB, device=device)
    target = torch.empty_like(source)
    samples = samples_ms(lambda: target.copy_(source), lambda: None, steps, device)
    return 2 * source.nbytes / statistics.median(samples) * 1e3


def liger_paths() -> dict[str, Function]:
    """Operation -> Liger-Kernel's function (0.8), where it is installed and there is a GPU."""
    if not torch.cuda.is_available() or not importlib.util.find_spec("liger_kernel"):
        return {}
    from kernel_cases import EPS
    from liger_kernel.transformers import functional as liger

    def add_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, s = liger.liger_fused_add_rms_norm(x, delta, weight, EPS, in_place=False)
        return s, y

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        turned = liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None])
        return [x.transpose(1, 2) for x in turned]

    return {
        "rms_norm": lambda x, weight: liger.liger_rms_norm(x, weight, EPS, in_place=False),
        "add_rms_norm": add_norm,
        "rope": turn,
        "swiglu": liger.liger_swiglu,
        "vocab": lambda y, label: liger.liger_cross_entropy(y, label, reduction="sum"),
    }


def paths_of(case: Case, device: str) -> dict[str, Function]:
    """All paths that this machine can time."""
    paths, liger = dict(case.paths), liger_paths().get(case.operation)
    if device == "cuda":
        torch.compiler.reset()  # or many cases of one function would count as recompilations
        paths["torch.compile"] = torch.compile(case.paths["eager"], dynamic=False)
    return paths | ({"liger": liger} if liger else {})


def samples_of(
    case: Case, function: Function, drawn: tuple[list[Tensor], list[Tensor]], steps: int
) -> dict[str, list[float]]:
    """Way -> milliseconds of every step: forward, and forward + backward where there is one."""
    device = drawn[0][0].device.type
    inputs, grads = copies(case, drawn[0]), [g.clone() for g in drawn[1]]
    frozen = [x.detach() for x in inputs]

    def restore() -> None:
        for mine, original in zip(frozen + grads, drawn[0] + drawn[1], strict=True):
            mine.copy_(original)

    with torch.no_grad():
        found = {"forward": samples_ms(partial(function, *frozen), restore, steps, device)}
    if case.learned:
        both = partial(run, function, inputs, grads)
        found["forward + backward"] = samples_ms(both, restore, steps, device)
    return found


def measure(case: Case, steps: int, device: str, speed: float) -> list[Time]:
    """Times of all paths of a case beside a copy's speed in bytes per second."""
    inputs, grads = drawn = draw(case, device)
    exact, samples = exactly(case, inputs, grads), {}
    for path, function in paths_of(case, device).items():
        off = []
        if path not in ("eager", "ours"):  # they have been checked
            results = run(function, copies(case, inputs), [g.clone() for g in grads])
            off = [error(*pair) for pair in zip(results, exact, strict=True)]
        if all(x <= OTHER for x in off):
            samples[path] = samples_of(case, function, drawn, steps)
        else:
            print(f"{case.name}: {path} is left out, its results are off by {off}", file=sys.stderr)
    moved, times = {"forward": case.moves[0], "forward + backward": sum(case.moves)}, []
    for way, eager in samples["eager"].items():
        for path, ways in samples.items():
            ms = statistics.median(ways[way])
            reached, ratio = moved[way] / ms * 1e3, ms / statistics.median(eager)
            about = f"{case.name}, {way}", path, case.streaming
            times.append(Time(*about, ms, ratio, reached, 100 * reached / speed, ways[way]))
    return times


# ---- the report


def below_bar(times: list[Time]) -> list[str]:
    """The last lines: which streaming kernels of ours move less than the bar."""
    ours = [t for t in times if t.path == "ours" and t.streaming]
    slow = [f"- {t.operation}: {t.of_copy:.1f} %" for t in ours if t.of_copy < BAR]
    if not slow:
        return [f"bar: {BAR} % of the copy's bandwidth; all {len(ours)} streaming rows reach it."]
    return [f"bar: {BAR} % of the copy's bandwidth; {len(slow)} of {len(ours)} are below:", *slow]


def refusal(device: str, smoke: bool) -> str:
    """Why nothing can run here, in one sentence; empty if it can."""
    if device == "cpu" and not smoke:
        return "Nothing was measured: this benchmark needs a CUDA GPU, and torch finds none here."
    if not importlib.util.find_spec("triton"):
        return "Nothing was checked: the kernels need Triton, which is not installed here."
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Nothing was checked: without a GPU the kernels need TRITON_INTERPRET=1."
    return ""


def timed(cases: list[Case], steps: int, device: str, smoke: bool) -> list[Time]:
    """Measure all cases; each one's rows are printed at once, so that none is lost. Smoke: none."""
    speed, times = copy_speed(smoke, steps, device), []
    say = print if not smoke else lambda *_, **__: None
    say(f"\nA copy reaches {speed / 1e9:,.0f} GB/s.\n\n{markdown(TIMES, [])}", flush=True)
    for case in cases:
        found = measure(case, steps, device, speed)
        times += found
        say(*markdown(TIMES, [t.row() for t in found]).splitlines()[2:], sep="\n", flush=True)
    return [] if smoke else times


def main() -> int:
    """Check every case, then measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="errors at tiny sizes, no times")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of every path")
    parser.add_argument("--json", type=Path, help="file for all errors and times")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := refusal(device, args.smoke):
        print(reason)
        return 0
    from kernel_cases import make_cases

    about = describe(torch.cuda.get_device_name() if device == "cuda" else cpu_hardware())
    cases = make_cases(args.smoke, 2 if device == "cuda" else 4)
    found = [check(case, device) for case in cases]
    print(f"{about}\n\n{markdown(ERRORS, map(worst, found))}", flush=True)
    times = timed(cases, args.steps, device, args.smoke)
    if times:
        print("", *below_bar(times), sep="\n")
    if args.json:
        errors = [asdict(e) for errors in found for e in errors]
        everything = {"about": about, "errors": errors, "times": [asdict(t) for t in times]}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
