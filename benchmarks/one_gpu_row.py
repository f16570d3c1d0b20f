"""One row of train_one_gpu.py, in a process of its own; its last line is the result as JSON.

    python -m benchmarks.one_gpu_row ours-fused --model llama3.2-1b --micro-batch-size 4

All rows share the data, the optimizer (fused AdamW on float32 master weights, float32 gradients,
clipping) and the loop. Only the model differs.
Dims    B micro-batch  T sequence
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from picotron_lab import data_parallel, mesh, optim, precision, sharding
from picotron_lab.alone import Alone
from picotron_lab.analysis import cost, hardware, meter
from picotron_lab.build import build_model
from picotron_lab.comm import Axis
from picotron_lab.config import PRESETS, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.dropout import Where
from picotron_lab.ledger import Ledger
from picotron_lab.pipeline_parallel import FusedExecutor
from picotron_lab.schedules.basic import one_f_one_b

ROWS = ("ours-plain", "ours-fused", "ours-fused-compiled", "hugging-face-sdpa")


class HuggingFace(nn.Module):
    """transformers' Llama of the same size, with random weights; called as our own is."""

    def __init__(self, cfg: ModelConfig, device: torch.device):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        theirs = LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.ffn_size,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, head_dim=cfg.head_width,
            num_key_value_heads=cfg.kv_heads, rms_norm_eps=cfg.norm_eps,
            tie_word_embeddings=cfg.tied, attn_implementation="sdpa",
        )  # fmt: skip
        with device:
            self.llama = LlamaForCausalLM(theirs).to(torch.bfloat16)
        sharding.attach(self)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, where: Where) -> Tensor:
        """The sum of the token losses: num_items_in_batch is what transformers divides it by."""
        out = self.llama(
            tokens_BT, labels=labels_BT, shift_labels=labels_BT, num_items_in_batch=1,
            use_cache=False,
        )  # fmt: skip
        return out.loss


def build(
    row: str, model_cfg: ModelConfig, cfg: TrainConfig, axes: mesh.Mesh, device: torch.device
) -> nn.Module:
    """The model of a row; compiled block by block: equal blocks share one compilation."""
    if row == "hugging-face-sdpa":
        return HuggingFace(model_cfg, device)
    cfg = replace(cfg, impl="plain" if row == "ours-plain" else "fused")
    model = build_model(model_cfg, MeshConfig(), cfg, axes, one_f_one_b(1, 1), device)
    if row == "ours-fused-compiled":
        for block in model.layers:
            block.compile()
    return model


@dataclass(frozen=True)
class Loop:
    """Trains `model`; one call is one optimizer step."""

    model: nn.Module
    axes: mesh.Mesh
    executor: FusedExecutor
    masters: precision.MasterWeights
    optimizer: torch.optim.Optimizer

    @staticmethod
    def around(model: nn.Module, cfg: TrainConfig, axes: mesh.Mesh, micro_batches: int) -> "Loop":
        """What the trainer sets up with --impl fused, around any model."""
        parameters = list(model.parameters())
        precision.accumulate_in(parameters, torch.float32)
        masters = precision.MasterWeights(parameters)
        sync = data_parallel.synchroniser("silent", parameters, axes.replica)
        schedule = one_f_one_b(1, micro_batches)
        executor = FusedExecutor({0: model}, schedule, axes.pp, {0: sync})
        return Loop(model, axes, executor, masters, optim.build(masters.weights, cfg))

    def step(self, batches: list[tuple[Tensor, Tensor, Where]]) -> Tensor:
        """Train on some micro-batches; the mean token loss before the step, left on the device."""
        tokens = sum(labels_BT.numel() for _, labels_BT, _ in batches)
        loss_sum = self.executor.run(batches, tokens)
        optim.clip(list(self.model.parameters()), 1.0, self.axes.world, self.axes.axes)
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


def measure(args: argparse.Namespace) -> dict:
    """Build, warm up, time; figures of the row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_cfg = PRESETS[args.model]
    model_cfg = replace(model_cfg, vocab_size=model_cfg.vocab_size or 320)
    cfg = TrainConfig(dtype="bfloat16", impl="fused", lr=1e-4, min_lr=0)
    shape = (args.micro_batches, args.micro_batch_size, args.sequence_length)
    count = args.warm_up + args.steps
    steps = [make_batches(i, model_cfg.vocab_size, shape, device) for i in range(count)]
    axes = mesh.build(Axis("world", [0], 0, Alone(), Ledger()), MeshConfig())
    loop = Loop.around(build(args.row, model_cfg, cfg, axes, device), cfg, axes, shape[0])
    # torch.compile traces now: it would break the graph at a bf16 weight with a float32 gradient
    loop.model(*steps[0][0])
    losses, seconds = timed_steps(loop, steps, device)
    check_first_loss(float(losses[0]), model_cfg.vocab_size)
    speed = math.prod(shape) / statistics.median(seconds[args.warm_up :])
    peak = hardware.peak_flops(hardware.device_name(device), torch.bfloat16)
    full, causal = (cost.flops_per_token(model_cfg, shape[2], half) for half in (False, True))
    return {
        "row": args.row, "model": args.model, "batch": list(shape), "tokens_per_second": speed,
        "step_seconds": seconds[args.warm_up :],
        "mfu": cost.model_flops_utilisation(speed, full, peak, 1),
        "mfu_causal": cost.model_flops_utilisation(speed, causal, peak, 1),
        "peak_memory_bytes": meter.peak_memory_bytes(device),
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]),
        "device": hardware.device_name(device), "peak_flops": peak,
    }  # fmt: skip


def main() -> None:
    """Measure one row and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--model", choices=PRESETS, required=True)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
