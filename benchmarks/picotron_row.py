"""One Picotron row of cpu.py: its model, its parallel code and its training steps, on a CPU.

    git clone https://github.com/huggingface/picotron picotron-checkout      # commit 59714b1
    torchrun --standalone --nproc-per-node 2 benchmarks/picotron_row.py picotron-checkout \\
        --data tokens.npy --tp 2

Imported  everything that a step runs, from the checkout: Llama, apply_tensor_parallel,
          PipelineParallel, apply_context_parallel, DataParallelBucket, train_step,
          train_step_pipeline_1f1b, average_loss_across_dp_cp_ranks. The loop around them does what
          the one in its train.py does, with torch's AdamW as that makes it on a CPU: not fused
Absent    flash_attn, wandb, datasets, huggingface_hub, transformers, safetensors: imported at the
          top of its files, not needed here. Those not installed are replaced by empty modules
Patched   torch.cuda.synchronize, called after every transfer of pp and cp, also on a CPU: does
          nothing here, for a CPU build of torch has no CUDA to wait for
Set       DEVICE=cpu and FLASH_ATTEN=0, its defaults being CUDA and flash attention: so attention
          is torch's scaled_dot_product_attention, with cp its own ring; DTYPE=float32, which its
          trainer never sets: else its rotary tables are bf16, and so is what is computed with them.
          CONTEXT_PARALLEL is set by apply_context_parallel
Not used  its data loader, which needs a tokenizer and downloads: batches are cut from a token file
          before the first step, so that loading costs it nothing. Its weights come from
          reset_parameters, as in its trainer, without the file that it reads for shapes first. Its
          parameter count allocates on CUDA, and is left out
Reduce    with cp and no dp its trainer sums no gradients, and the ranks drift apart. As shipped it
          is faster than it could be if it were right; --reduce wraps the model in its
          DataParallelBucket, which sums over dp x cp
Prints    a JSON line per step, as run.py logs it: step, loss, tokens, seconds, tokens_per_second
"""

import argparse
import datetime
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from cpu_rows import MICRO_BATCH, PEER, SEQUENCE
from torch import Tensor, nn

SETTINGS = {"DEVICE": "cpu", "FLASH_ATTEN": "0", "DTYPE": "float32"}
ABSENT = (
    "transformers", "safetensors", "huggingface_hub", "datasets", "wandb", "flash_attn",
    "flash_attn.flash_attn_interface", "flash_attn.layers", "flash_attn.layers.rotary",
    "flash_attn.ops", "flash_attn.ops.triton", "flash_attn.ops.triton.layer_norm",
)  # fmt: skip
LEARNING_RATE, SEED = 3e-4, 42  # those of Picotron's create_config.py
CPU = torch.device("cpu")


class Empty(ModuleType):
    """A module that lets any public name be imported from it; none may be called."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_given: object, **_named: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is needed after all: install it.")

        return missing


def is_installed(name: str) -> bool:
    """Whether Python finds the package that a module belongs to."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def import_picotron(path: Path) -> SimpleNamespace:
    """Its modules, after the preparations that the header lists."""
    for name in [name for name in ABSENT if not is_installed(name)]:
        sys.modules[name] = Empty(name)
    os.environ.update(SETTINGS)
    torch.cuda.synchronize = lambda: None
    sys.path.insert(0, str(path))
    return SimpleNamespace(
        train=importlib.import_module("train"),
        groups=importlib.import_module("picotron.process_group_manager"),
        utils=importlib.import_module("picotron.utils"),
    )


class Loader:
    """Picotron's micro-batches: every rank of dp its own sequences, every rank of cp its tokens.

    Its training steps call next() grad_acc_steps times and take the dictionary's four entries.
    """

    def __init__(self, tokens: np.ndarray, groups: SimpleNamespace, micro_batches: int, steps: int):
        self.grad_acc_steps = micro_batches
        share = SEQUENCE // groups.cp_world_size
        columns = groups.cp_rank * share + np.arange(share + 1)
        batches = []
        for first in range(0, micro_batches * steps * MICRO_BATCH, MICRO_BATCH):
            mine = np.arange(first, first + MICRO_BATCH) * groups.dp_world_size + groups.dp_rank
            starts = mine % ((len(tokens) - 1) // SEQUENCE) * SEQUENCE
            text = tokens[starts[:, None] + columns].astype(np.int64)
            batches.append(self._batch(torch.from_numpy(text), torch.from_numpy(columns[:-1])))
        self._batches = iter(batches)

    def _batch(self, text: Tensor, positions: Tensor) -> dict[str, Tensor | None]:
        return {
            "input_ids": text[:, :-1].contiguous(), "target_ids": text[:, 1:].contiguous(),
            "position_ids": positions.expand(MICRO_BATCH, -1).contiguous(), "hidden_states": None,
        }  # fmt: skip

    def __next__(self) -> dict[str, Tensor | None]:
        return next(self._batches)


def build_model(theirs: SimpleNamespace, reduce: bool) -> nn.Module:
    """Picotron's Llama, wrapped in the order of its train.py."""
    train, groups = theirs.train, theirs.groups.process_group_manager
    cfg = SimpleNamespace(
        vocab_size=PEER.vocab_size, hidden_size=PEER.hidden_size, intermediate_size=PEER.ffn_size,
        num_hidden_layers=PEER.layers, num_attention_heads=PEER.heads, rope_theta=PEER.rope_theta,
        num_key_value_heads=PEER.kv_heads, rms_norm_eps=PEER.norm_eps,
        max_position_embeddings=SEQUENCE,
    )  # fmt: skip
    model = train.Llama(config=cfg)
    if groups.tp_world_size > 1:
        model = train.apply_tensor_parallel(model)
    if groups.pp_world_size > 1:
        model = train.PipelineParallel(model, cfg)
    model.reset_parameters()
    if groups.cp_world_size > 1:
        model = train.apply_context_parallel(model)
    model.to(torch.float32)
    return train.DataParallelBucket(model) if groups.dp_world_size > 1 or reduce else model


def step_function(theirs: SimpleNamespace, model: nn.Module, loader: Loader) -> Callable[[], float]:
    """What Picotron calls for one step's gradients; gives the loss of this rank."""
    train, groups = theirs.train, theirs.groups.process_group_manager
    if groups.pp_world_size == 1:
        return lambda: train.train_step(model, loader, CPU)
    shape = (MICRO_BATCH, SEQUENCE // groups.cp_world_size, PEER.hidden_size)
    return lambda: train.train_step_pipeline_1f1b(model, loader, shape, CPU, torch.float32)


def timed_steps(
    theirs: SimpleNamespace, model: nn.Module, loader: Loader, steps: int
) -> list[tuple[float, float]]:
    """Loss and seconds of every step, from zero_grad to reset, as its train.py times it."""
    compute = step_function(theirs, model, loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    told = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = theirs.utils.average_loss_across_dp_cp_ranks(compute(), CPU)
        optimizer.step()
        if hasattr(model, "reset"):
            model.reset()
        told.append((loss, time.perf_counter() - start))
    return told


def check_losses(losses: list[float]) -> None:
    """An untrained model knows nothing, so its loss is close to log V; then it learns."""
    known = math.log(PEER.vocab_size)
    if abs(losses[0] - known) > 1 or losses[-1] >= losses[0]:
        raise SystemExit(
            f"Picotron's loss went from {losses[0]:.3f} to {losses[-1]:.3f}; it should begin "
            f"within 1 of log V = {known:.3f}, and fall: give the checkout of commit 59714b1."
        )


def train(args: argparse.Namespace) -> None:
    """Train on all ranks; the last one, which has the loss, checks and prints."""
    theirs = import_picotron(args.path)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=3))
    theirs.groups.setup_process_group_manager(args.tp, args.cp, args.pp, args.dp)
    theirs.utils.set_all_seed(SEED)
    groups = theirs.groups.process_group_manager
    loader = Loader(np.load(args.data), groups, args.micro_batches, args.steps)
    told = timed_steps(theirs, build_model(theirs, args.reduce), loader, args.steps)
    if dist.get_rank() == dist.get_world_size() - 1:
        check_losses([loss for loss, _ in told])
        tokens = MICRO_BATCH * args.micro_batches * args.dp * SEQUENCE
        for step, (loss, seconds) in enumerate(told):
            line = {"step": step, "loss": loss, "tokens": tokens, "seconds": seconds}
            print(json.dumps(line | {"tokens_per_second": tokens / seconds}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Train one row and print its steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkout of Picotron")
    parser.add_argument("--data", type=Path, required=True, help="a .npy file of token ids")
    for axis in ("dp", "tp", "pp", "cp"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="ranks")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--reduce", action="store_true", help="sum the gradients of cp ranks")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
