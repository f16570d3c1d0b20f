"""One row of train_one_gpu.py, in a process of its own; its last line is the result as JSON.

    python -m benchmarks.one_gpu_row ours-fused --model llama3.2-1b --micro-batch-size 4

All rows share the data, the optimizer (fused AdamW on float32 master weights, float32 gradients,
clipping) and the loop. Only the model differs, and in ours-fused weight gradients: there matmuls
add them to the float32 sum themselves, which torch.compile cannot follow.
After the timed steps come two that cost time: one in which torch tells where the CPU waited for the
GPU, one that torch.profiler records. The figures are printed before them and again, complete,
after them: a profiler that fails loses nothing.
Dims    B micro-batch  T sequence
"""

import argparse
import json
import math
import re
import statistics
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from picotron_lab import data_parallel, mesh, optim, precision, profile, sharding
from picotron_lab.alone import Alone
from picotron_lab.analysis import cost, hardware, meter, trace_time
from picotron_lab.comm import Axis
from picotron_lab.config import PRESETS, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.ledger import Ledger
from picotron_lab.model import Llama, initial_value
from picotron_lab.pipeline_parallel import Executor, FusedExecutor
from picotron_lab.schedules.basic import one_f_one_b

ROWS = (
    "ours-plain", "ours-fused", "ours-fused-compiled",
    "hugging-face", "hugging-face-compiled", "hugging-face-liger",
)  # fmt: skip
ATTENTION = {  # by kind of event: what computes attention, by its name
    "kernel": re.compile(r"sdpa|flash|fmha", re.I),
    "cpu_op": re.compile(r"aten::_scaled_dot_product"),
}
SEED = 0


# ---- the models


class HuggingFace(nn.Module):
    """transformers' Llama of the same size, with random weights; called as our own is."""

    def __init__(self, cfg: ModelConfig, device: torch.device):
        from transformers import AutoModelForCausalLM, LlamaConfig

        super().__init__()
        rotary = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        theirs = LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.ffn_size,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, head_dim=cfg.head_width,
            num_key_value_heads=cfg.kv_heads, rms_norm_eps=cfg.norm_eps, rope_parameters=rotary,
            tie_word_embeddings=cfg.tied, attn_implementation="sdpa",
        )  # fmt: skip
        with device:  # weights in bf16; rotary frequencies stay in float32, as ours do
            self.llama = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16)
        sharding.attach(self)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, where: Where) -> Tensor:
        """The sum of the token losses: num_items_in_batch is what transformers, and Liger's loss
        in its place, divides it by; without it they would give the mean."""
        out = self.llama(
            tokens_BT, labels=labels_BT, shift_labels=labels_BT, num_items_in_batch=1,
            use_cache=False,
        )  # fmt: skip
        return out.loss


def build(row: str, cfg: ModelConfig, device: torch.device) -> nn.Module:
    """The model of a row; compiled layer by layer: equal layers share one compilation."""
    if row == "hugging-face-liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # it changes transformers' classes, so it comes before the model
        apply_liger_kernel_to_llama(
            rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True
        )
    if row.startswith("hugging-face"):
        model = HuggingFace(cfg, device)
        layers = model.llama.model.layers
    else:
        model = ours(cfg, row != "ours-plain", device)
        layers = model.layers
    for layer in layers if row.endswith("compiled") else ():
        layer.compile()
    return model


def ours(cfg: ModelConfig, fused: bool, device: torch.device) -> Llama:
    """What build.py makes for one rank, but with weights drawn on the device: the CPU would need
    half a minute for a billion of them."""

    def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        there = torch.Generator(device).manual_seed(generator.initial_seed())
        with device:
            return initial_value(name, shape, there)

    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    if fused:
        fuse(model)
    sharding.materialise(model, SEED, draw, device, torch.bfloat16)
    return model


# ---- the loop


@dataclass(frozen=True)
class Loop:
    """Trains `model`; one call is one optimizer step."""

    model: nn.Module
    axes: mesh.Mesh
    executor: Executor
    masters: precision.MasterWeights
    optimizer: torch.optim.Optimizer

    @staticmethod
    def around(row: str, model: nn.Module, micro_batches: int) -> "Loop":
        """What the trainer sets up on one rank with --impl fused, around the model of a row."""
        axes = mesh.build(Axis("world", [0], 0, Alone(), Ledger()), MeshConfig())
        cfg = TrainConfig(dtype="bfloat16", impl="fused", lr=1e-4, min_lr=0)
        parameters = list(model.parameters())
        precision.accumulate_in(parameters, torch.float32)
        masters = precision.MasterWeights(parameters)
        sync = data_parallel.synchroniser("silent", parameters, axes.replica)
        kind = FusedExecutor if row == "ours-fused" else Executor
        executor = kind({0: model}, one_f_one_b(1, micro_batches), axes.pp, {0: sync})
        return Loop(model, axes, executor, masters, optim.build(masters.weights, cfg))

    def step(self, batches: list[tuple[Tensor, Tensor, Where]]) -> Tensor:
        """Train on some micro-batches; the mean token loss before the step, left on the device."""
        tokens = sum(labels_BT.numel() for _, labels_BT, _ in batches)
        loss_sum = self.executor.run(batches, tokens)
        with record_function("optimizer"):
            everywhere = self.axes.world, self.axes.axes
            optim.clip(list(self.model.parameters()), 1.0, *everywhere, self.optimizer)
            self.masters.take_gradients()
            self.optimizer.step()
            self.masters.publish()
        return loss_sum / tokens


def make_batches(
    step: int, vocabulary: int, shape: tuple[int, int, int], device: torch.device
) -> list[tuple[Tensor, Tensor, Where]]:
    """Random tokens, never zeros: a GPU that multiplies zeros draws less power and is faster.

    shape    (micro-batches, sequences in each, tokens per sequence)
    """
    dice = torch.Generator().manual_seed(step)
    text = torch.randint(vocabulary, (*shape[:2], shape[2] + 1), generator=dice).to(device)
    parts = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in text]
    return [(tokens_BT, labels_BT, Where.first(tokens_BT)) for tokens_BT, labels_BT in parts]


def timed_steps(loop: Loop, steps: list[list], device: torch.device) -> tuple[list, list]:
    """Losses and seconds of every step; on CUDA between events, so that the CPU may run ahead."""
    losses, marks = [], [mark(device)]
    for batches in steps:
        losses.append(loop.step(batches))
        marks.append(mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        return losses, [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
    return losses, [b - a for a, b in zip(marks, marks[1:], strict=False)]


def mark(device: torch.device) -> float | torch.cuda.Event:
    """This moment: as an event on the GPU's stream, or in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def check_first_loss(loss: float, vocabulary: int) -> None:
    """An untrained model knows nothing: its loss is close to log V, or it is not the same model."""
    if abs(loss - math.log(vocabulary)) > 1:
        raise ValueError(f"the first loss is {loss:.2f}, and log V is {math.log(vocabulary):.2f}")


# ---- where the time of a step goes


def host_synchronisations(loop: Loop, batches: list, device: torch.device) -> int | None:
    """How often the CPU waits for the GPU in one step, as torch tells; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        loop.step(batches)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in heard)


def profiled_step(row: str, loop: Loop, steps: list[list], device: torch.device) -> dict:
    """The second of two steps under torch.profiler: seconds by category (analysis/trace_time.py),
    and what computed attention, by the time that it took. The first step wakes the profiler."""
    cuda, names = device.type == "cuda", profile.Names()
    if not row.endswith("compiled"):  # hooks would compile the layers anew
        profile.name_modules(loop.model, names)
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    names.active = True
    with torch_profile(activities=kinds) as recorder:
        for number, batches in enumerate(steps[:2]):
            wait(device)
            with names(trace_time.step_name(0, number) if number else "warm-up"):
                loop.step(batches)
                wait(device)  # its kernels belong to this step
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        return read_profile(json.loads(path.read_text())["traceEvents"], cuda)


def wait(device: torch.device) -> None:
    """Until the GPU has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_profile(events: list[dict], cuda: bool) -> dict:
    """{seconds: {category: of the step}, attention: [names of kernels, or on a CPU of operators]}.

    events  of torch.profiler, with one step that is called as trace_time.py has it
    """
    step, kind = trace_time.steps_of(events)[0], "kernel" if cuda else "cpu_op"
    spent = Counter()
    for event in events:
        inside = event.get("cat") == kind and step.start <= event["ts"] < step.end
        if inside and ATTENTION[kind].search(event["name"]):
            spent[event["name"]] += event["dur"]
    seconds = trace_time.time_by_category(events)[0]
    return {
        "seconds": dict(zip(trace_time.CATEGORIES, seconds, strict=True)),
        "attention": [name for name, _ in spent.most_common()],
    }


# ---- one row


def measure(args: argparse.Namespace) -> None:
    """Build, warm up, time; print the figures, then once more with those of the profiled step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = PRESETS[args.model]
    cfg = replace(cfg, vocab_size=cfg.vocab_size or 320, layers=args.layers or cfg.layers)
    shape = (args.micro_batches, args.micro_batch_size, args.sequence_length)
    count = args.warm_up + args.steps
    steps = [make_batches(i, cfg.vocab_size, shape, device) for i in range(count)]
    loop = Loop.around(args.row, build(args.row, cfg, device), shape[0])
    # torch.compile traces now: it would break the graph at a bf16 weight with a float32 gradient
    loop.model(*steps[0][0])
    warm, _ = timed_steps(loop, steps[: args.warm_up], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what building and compiling took is over
    losses, seconds = timed_steps(loop, steps[args.warm_up :], device)
    first = float([*warm, *losses][0])
    check_first_loss(first, cfg.vocab_size)
    figures = speed(cfg, shape, seconds, device) | {
        "row": args.row, "model": args.model, "layers": cfg.layers, "batch": list(shape),
        "peak_memory_bytes": meter.peak_memory_bytes(device),
        "first_loss": first, "last_loss": float(losses[-1]),
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    waits = host_synchronisations(loop, steps[0], device)
    found = profiled_step(args.row, loop, steps, device)
    print(json.dumps(figures | {"host_synchronisations": waits, "profile": found}))


def speed(
    cfg: ModelConfig, shape: tuple[int, int, int], seconds: list[float], device: torch.device
) -> dict:
    """Tokens per second of the median step, and the share of the device's peak that it is."""
    rate, name = math.prod(shape) / statistics.median(seconds), hardware.device_name(device)
    peak = hardware.peak_flops(name, torch.bfloat16)
    full, causal = (cost.flops_per_token(cfg, shape[2], half) for half in (False, True))
    return {
        "tokens_per_second": rate, "step_seconds": seconds, "device": name, "peak_flops": peak,
        "mfu": cost.model_flops_utilisation(rate, full, peak, 1),
        "mfu_causal": cost.model_flops_utilisation(rate, causal, peak, 1),
    }  # fmt: skip


def main() -> None:
    """Measure one row and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--model", choices=PRESETS, required=True)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
