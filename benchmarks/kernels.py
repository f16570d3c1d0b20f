"""The Triton kernels beside torch's operators, plain and compiled: forward and backward of each.

    python benchmarks/kernels.py                                    on a CUDA GPU, in bf16
    TRITON_INTERPRET=1 python benchmarks/kernels.py --smoke         that it runs, on any machine

    add_rms_norm   s = x + delta and RMSNorm(s)        swiglu   silu(gate) * up
    rope           queries and keys turned             loss     cross-entropy of given logits

"bytes" are those that a kernel must move at least, each input read and each output written once;
GB/s is that over the time, to be held against what a copy reaches on the same GPU (first row).
Ratios are to eager torch. Results are compared with eager torch in float32 before they are timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import cpu_hardware, describe, markdown
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.kernels import norm, rope, swiglu, vocab  # noqa: E402
from picotron_lab.model import Rotate  # noqa: E402

EPS = 1e-5
HEADER = ("operation", "path", "ms", "ratio", "GB/s")
Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """An operation, its inputs, and how often each of their numbers must travel.

    shapes   of the inputs: those that need gradients first
    moves    numbers read or written, forward and backward, per number of the first input
    """

    eager: Function
    kernel: Function
    shapes: tuple[tuple[int, ...], ...]
    moves: float


def add_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Residual addition, then torch's RMSNorm."""
    s = x + delta
    return s, F.rms_norm(s, weight.shape, weight, EPS)


def tables(like_BTHC: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE, [T, C] in float32."""
    (_, T, _, C), device = like_BTHC.shape, like_BTHC.device
    turns = torch.arange(T, device=device)[:, None] * torch.linspace(1, 0, C // 2, device=device)
    angles = torch.cat([turns, turns], -1)
    return angles.cos(), angles.sin()


def turn(q_BTHC: Tensor, k_BTKC: Tensor) -> tuple[Tensor, Tensor]:
    """The plain model's rotation."""
    return Rotate()(q_BTHC, k_BTKC, tables(q_BTHC))


def cross_entropy(y_NV: Tensor) -> Tensor:
    """Sum of the losses of the labels 0, 1, 2, ..."""
    labels_N = torch.arange(len(y_NV), device=y_NV.device) % y_NV.shape[1]
    return F.cross_entropy(y_NV.float(), labels_N, reduction="sum")


class FusedCrossEntropy(torch.autograd.Function):
    """The same with the vocabulary kernels; the gradient overwrites a copy of the logits."""

    @staticmethod
    def forward(ctx, y_NV: Tensor) -> Tensor:
        labels_N = torch.arange(len(y_NV), device=y_NV.device) % y_NV.shape[1]
        m_N, s_N, z_N = vocab.statistics(y_NV, labels_N)
        ctx.save_for_backward(y_NV, m_N, s_N, labels_N)
        return (s_N.log() + (m_N - z_N)).sum()

    @staticmethod
    def backward(ctx, factor: Tensor) -> Tensor:
        y_NV, m_N, s_N, labels_N = ctx.saved_tensors
        c_N = factor.expand_as(s_N)
        return vocab.gradient_(y_NV.clone(), m_N, c_N / s_N, c_N, labels_N)


def cases(smoke: bool) -> dict[str, Case]:
    """Name -> case, at the sizes of billion-parameter models."""
    rows, widths, ffn = (7, (48,), 80) if smoke else (16384, (2048, 4096, 8192), 8192)
    heads, C, words = (3, 8, 96) if smoke else (32, 128, 131072)
    found = {}
    for width in widths:
        shapes = (rows, width), (rows, width), (width,)
        found[f"add_rms_norm {rows} x {width}"] = Case(
            add_norm, lambda x, d, w: norm.add_rms_norm(x, d, w, EPS), shapes, 8
        )
    found[f"swiglu {rows} x {ffn}"] = Case(
        lambda gate, up: F.silu(gate) * up, swiglu.swiglu, ((rows, ffn),) * 2, 8
    )
    q, k = (1, rows, heads, C), (1, rows, 1, C)
    found[f"rope {rows} x {heads}/1 x {C}"] = Case(
        turn, lambda q, k: rope.rope_qk(q, k, *tables(q)), (q, k), 4 * (1 + 1 / heads)
    )
    logits = rows // 2, words
    found[f"loss {logits[0]} x {words}"] = Case(
        cross_entropy, FusedCrossEntropy.apply, (logits,), 5
    )
    return found


def run(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    results = function(*inputs)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def seconds_of(work: Callable[[], object], steps: int, device: str) -> float:
    """Median over `steps` calls after 3 more; the GPU's time if there is one."""
    found = []
    for _ in range(3 + steps):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found[3:])


def make_inputs(case: Case, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs, bf16 on CUDA and float32 else, and gradients of the outputs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dice = torch.Generator(device).manual_seed(0)
    values = [torch.randn(s, generator=dice, device=device).to(dtype) for s in case.shapes]
    results = case.eager(*values)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    grads = [torch.randn(o.shape, generator=dice, device=device).to(o.dtype) for o in outputs]
    return [x.requires_grad_() for x in values], grads


def check(name: str, case: Case, inputs: list[Tensor], grads: list[Tensor]) -> None:
    """Nothing wrong is timed."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = run(case.eager, exact, [g.float() for g in grads])
    for mine, theirs in zip(run(case.kernel, inputs, grads), expected, strict=True):
        off = (mine.float() - theirs).abs().max() / theirs.abs().max()
        if not off < 2e-2:
            raise SystemExit(f"{name}: the kernel is off by {float(off):.1e}")


def measure(name: str, case: Case, steps: int, device: str) -> list[list[str]]:
    """Rows of one case: eager, ours, compiled (on CUDA)."""
    inputs, grads = make_inputs(case, device)
    check(name, case, inputs, grads)
    paths = {"eager": case.eager, "ours": case.kernel}
    if device == "cuda":
        paths["compiled"] = torch.compile(case.eager)
    moved = case.moves * inputs[0].nbytes
    times = {
        path: seconds_of(lambda f=function: run(f, inputs, grads), steps, device)
        for path, function in paths.items()
    }
    return [
        [name, path, f"{t * 1e3:.3f}", f"{t / times['eager']:.2f}", f"{moved / t / 1e9:,.0f}"]
        for path, t in times.items()
    ]


def copy_row(smoke: bool, steps: int, device: str) -> list[str]:
    """What a copy reaches, read and written bytes."""
    source = torch.randn(2**10 if smoke else 2**30, device=device)
    target = torch.empty_like(source)
    t = seconds_of(lambda: target.copy_(source), steps, device)
    return ["copy", "torch", f"{t * 1e3:.3f}", "", f"{2 * source.nbytes / t / 1e9:,.0f}"]


def main() -> int:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="see that it works, measure nothing")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        print("Nothing was measured: this benchmark needs a CUDA GPU, and torch finds none here.")
        return 0
    lines = [copy_row(args.smoke, args.steps, device)]
    for name, case in cases(args.smoke).items():
        lines += measure(name, case, args.steps, device)
    print(describe(torch.cuda.get_device_name() if device == "cuda" else cpu_hardware()), "\n")
    print(markdown(HEADER, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
