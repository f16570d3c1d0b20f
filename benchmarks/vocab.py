"""Output layer and loss, forward and backward: time and peak memory for growing vocabularies.

    python benchmarks/vocab.py                    on a CUDA GPU: bf16, 8192 tokens of width 4096
    python benchmarks/vocab.py                    without one: float32, small, torch's operators

Every row computes the loss and the gradients of x and of the weight from the same numbers, after
its loss was compared with that of F.cross_entropy in float32. Ratios are to the first row of the
same run. Rows "1/8" are one of eight ranks: a share of the words, all of the tokens. Nobody answers
it, so its time is that of computing alone, and its loss is not checked.
Peak: bytes allocated beyond x, weight and labels, with both gradients.
GFLOP/s: 6 N D V (three matmuls) over the time; what is computed twice does not count twice.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import cpu_hardware, describe, markdown
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.alone import Alone  # noqa: E402
from picotron_lab.analysis.meter import Meter  # noqa: E402
from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.ledger import Ledger  # noqa: E402
from picotron_lab.nobody import Nobody  # noqa: E402
from picotron_lab.vocab_parallel import Shard, VocabHead  # noqa: E402

GPU_SIZES = ((8192, 4096), (32_768, 131_072, 262_144))  # (tokens, width), vocabularies
CPU_SIZES = ((256, 128), (4096, 16_384))
RANKS = 8
MIB = 2**20
BASE = "linear + cross_entropy"
HEADER = ("vocabulary", "loss", "ms", "time ratio", "peak MiB", "memory ratio", "GFLOP/s")
Loss = Callable[[Tensor, nn.Parameter, Tensor], Tensor]


def by_torch(x_ND: Tensor, w_VD: nn.Parameter, labels_N: Tensor) -> Tensor:
    """What a training script writes: all logits, in float32 for the softmax."""
    return F.cross_entropy(F.linear(x_ND, w_VD).float(), labels_N, reduction="sum")


def by_torch_fused(x_ND: Tensor, w_VD: nn.Parameter, labels_N: Tensor) -> Tensor:
    """torch's own chunked operator, from 2.13 on."""
    chunked = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x_ND, w_VD, labels_N, reduction="sum", options=chunked)


def by_liger(x_ND: Tensor, w_VD: nn.Parameter, labels_N: Tensor) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(w_VD, x_ND, labels_N)


def by_us(impl: str, algorithm: str, ranks: int) -> Loss:
    """Rank 0 of `ranks`, its weight holding its share of the words."""
    world = Nobody() if ranks > 1 else Alone()
    axis = Axis("tp", range(ranks), 0, world, Ledger())

    def loss(x_ND: Tensor, w_RD: nn.Parameter, labels_N: Tensor) -> Tensor:
        shard = Shard(axis, w_RD.shape[0] * ranks, impl == "fused")
        return VocabHead(w_RD, shard, algorithm)(x_ND[None], labels_N[None])

    return loss


def losses() -> dict[str, tuple[Loss, int]]:
    """Name -> (loss, number of ranks) of everything that can run here."""
    found = {BASE: (by_torch, 1)}
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy, chunked"] = by_torch_fused, 1
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        found["Liger fused linear cross-entropy"] = by_liger, 1
    for ranks in (1, RANKS):
        share = "" if ranks == 1 else f", 1/{ranks}"
        found[f"ours, plain{share}"] = by_us("plain", "1", ranks), ranks
        found[f"ours, fused{share}"] = by_us("fused", "1", ranks), ranks
    found[f"ours, fused, algorithm 2, 1/{RANKS}"] = by_us("fused", "2", RANKS), RANKS
    return found


def make_inputs(sizes: tuple[int, int, int], device: str) -> tuple[Tensor, nn.Parameter, Tensor]:
    """Random x [N, D], weight [V, D] and labels [N]: never zeros, which a GPU multiplies faster."""
    N, D, V = sizes
    dice = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x_ND = torch.randn(N, D, generator=dice, device=device).to(dtype).requires_grad_()
    w_VD = nn.Parameter((torch.randn(V, D, generator=dice, device=device) * 0.02).to(dtype))
    return x_ND, w_VD, torch.randint(V, (N,), generator=dice, device=device)


def share_of(
    inputs: tuple[Tensor, nn.Parameter, Tensor], ranks: int
) -> tuple[Tensor, nn.Parameter, Tensor]:
    """The inputs of rank 0: its words only."""
    x_ND, w_VD, labels_N = inputs
    return x_ND, nn.Parameter(w_VD.detach()[: w_VD.shape[0] // ranks].clone()), labels_N


def once(loss: Loss, inputs: tuple[Tensor, nn.Parameter, Tensor]) -> float:
    """Forward and backward with fresh gradients; seconds, the GPU's if there is one."""
    for tensor in inputs[:2]:
        tensor.grad = None
    cuda = inputs[0].is_cuda
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(*inputs).backward()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - began


def peak_bytes(loss: Loss, inputs: tuple[Tensor, nn.Parameter, Tensor]) -> int:
    """Most bytes alive beyond the inputs: by the allocator on CUDA, by our meter on a CPU."""
    for tensor in inputs[:2]:
        tensor.grad = None
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    with Meter() as meter:
        once(loss, inputs)
    return meter.peak_bytes


def check(name: str, loss: Loss, inputs: tuple[Tensor, nn.Parameter, Tensor]) -> None:
    """Nothing wrong is timed: the whole vocabulary's loss must be that of F.cross_entropy."""
    with torch.no_grad():
        expected = sum(
            F.cross_entropy(F.linear(x.float(), inputs[1].float()), labels, reduction="sum")
            for x, labels in zip(inputs[0].split(512), inputs[2].split(512), strict=True)
        )
        found = loss(*inputs)
    if abs(float(found) / float(expected) - 1) > 1e-2:
        raise SystemExit(f"{name} gives the loss {float(found)} instead of {float(expected)}")


def measure(sizes: tuple[int, int, int], device: str, steps: int) -> list[list[str]]:
    """The rows of one vocabulary."""
    whole, found = make_inputs(sizes, device), {}
    for name, (loss, ranks) in losses().items():
        if ranks == 1:
            check(name, loss, whole)
        inputs = share_of(whole, ranks)
        seconds = [once(loss, inputs) for _ in range(3 + steps)][3:]
        found[name] = statistics.median(seconds), peak_bytes(loss, inputs), ranks
    lines = []
    for name, (seconds, peak, ranks) in found.items():
        ratios = f"{seconds / found[BASE][0]:.2f}", f"{peak / found[BASE][1]:.2f}"
        figures = f"{seconds * 1e3:.2f}", ratios[0], f"{peak / MIB:,.0f}", ratios[1]
        flops = 6 * sizes[0] * sizes[1] * sizes[2] / ranks
        lines.append([f"{sizes[2]:,}", name, *figures, f"{flops / seconds / 1e9:,.0f}"])
    return lines


def main() -> None:
    """Measure all vocabularies and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps per row, after 3 more")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    shape, vocabularies = GPU_SIZES if cuda else CPU_SIZES
    device = "cuda" if cuda else "cpu"
    lines = [row for V in vocabularies for row in measure((*shape, V), device, args.steps)]
    print(describe(torch.cuda.get_device_name() if cuda else cpu_hardware()), "\n")
    print(f"{shape[0]:,} tokens of width {shape[1]:,}\n")
    print(markdown(HEADER, lines))


if __name__ == "__main__":
    main()
