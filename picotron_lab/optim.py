"""The update: AdamW or SGD, a learning rate that rises and falls, one clipping for the mesh.

Paper   AdamW: Loshchilov and Hutter 2019 (1711.05101), algorithm 2; cosine: 1608.03983, equation 5
Idea    The optimizer itself is torch's, but for fused AdamW on CUDA. What a mesh changes is the
        gradient norm: every parameter counts once, wherever its shards and replicas are.
Fused   Memory bounds an update. On CUDA one kernel clips, steps and rounds master weights: 30 bytes
        a bf16 parameter instead of 8 + 28 + 6 = 42
Read    learning_rate -> clip -> KernelAdamW -> build -> moments
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis
from picotron_lab.config import TrainConfig
from picotron_lab.sharding import Record, squared_norm

BETAS = (0.9, 0.95)


# ---- 1. the idea


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Rises linearly over warmup_steps, then falls by a half cosine to final_lr at the last step,
    if there is a step after the warm-up."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - 1 - cfg.warmup_steps)
    height = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return cfg.final_lr + (cfg.lr - cfg.final_lr) * height


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- 2. plain path


@torch.no_grad()
def clip(
    parameters: Sequence[nn.Parameter],
    limit: float,
    world: Axis,
    axes: dict[str, Axis],
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """Scale all gradients so that their norm over the whole mesh is at most `limit`; 0: leave them.

    optimizer  that steps with them; a KernelAdamW scales them itself, as it reads them
    Returns the norm before clipping, a float64 scalar that is the same on every rank.
    """
    norm = squared_norm(parameters, world, axes).sqrt()
    if isinstance(optimizer, KernelAdamW):
        optimizer.scale = None  # of a step that was not taken
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        if isinstance(optimizer, KernelAdamW):
            optimizer.scale = scale.float()
            return norm
        for parameter in parameters:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm


# ---- 3. fused path


def has_kernel(weight: Tensor) -> bool:
    """Whether the Triton kernel serves this weight."""
    return weight.is_cuda and weight.dtype == torch.float32


class KernelAdamW(torch.optim.AdamW):
    """AdamW in one pass over memory, a launch for each weight; its state is torch's.

    A master weight is rounded into its parameter in passing, before anybody calls publish: not for
    steps that may be taken back.

    scale  by which the next step multiplies gradients, a float32 scalar on the device; None: 1
    """

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, lr=lr, betas=BETAS, foreach=False, fused=False)
        self.scale: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """Step all weights that have a gradient."""
        make_state(self)
        for group in self.param_groups:
            alike: dict[tuple[int, bool], list[nn.Parameter]] = {}
            for weight in (w for w in group["params"] if w.grad is not None):
                self.state[weight]["step"] += 1  # on the host: nobody waits for the device
                key = int(self.state[weight]["step"]), hasattr(weight, "rounded")
                alike.setdefault(key, []).append(weight)
            for (step, narrow), weights in alike.items():
                self._step_together(weights, group, step, narrow)
        self.scale = None

    def _step_together(
        self, weights: list[nn.Parameter], group: dict[str, Any], step: int, narrow: bool
    ) -> None:
        from picotron_lab.kernels.adamw import Update, adamw_

        update = Update(step, group["lr"], group["betas"], group["eps"], group["weight_decay"])
        states = [self.state[weight] for weight in weights]
        moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
        copies = [weight.rounded for weight in weights] if narrow else []
        adamw_(weights, [weight.grad for weight in weights], moments, copies, self.scale, update)
        for weight in weights if narrow else ():
            weight.is_published = True


# ---- 4. contract


def build(weights: Sequence[nn.Parameter], cfg: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over `weights`; matrices decay, norm weights do not."""
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, foreach=True)
    fused = cfg.impl == "fused"
    final = not cfg.post_validation  # a step that may be taken back must not be published
    if fused and final and all(map(has_kernel, weights)):
        return KernelAdamW(groups, cfg.lr)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=BETAS, fused=fused, foreach=not fused)


def make_state(optimizer: torch.optim.AdamW) -> None:
    """Give every weight AdamW's state, where there is none yet."""
    for group in optimizer.param_groups:
        for weight in (w for w in group["params"] if not optimizer.state[w]):
            step = torch.zeros((), device=weight.device if group["fused"] else "cpu")
            first, second = torch.zeros_like(weight), torch.zeros_like(weight)
            optimizer.state[weight] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


def moments(optimizer: torch.optim.Optimizer) -> list[tuple[Record, Tensor]]:
    """AdamW's two moments of every weight with their records, for checkpoints; made if need be."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return []
    make_state(optimizer)
    return [
        (replace(weight.record, name=f"adamw.{key}/{weight.record.name}"), state[key])
        for weight, state in optimizer.state.items()
        for key in ("exp_avg", "exp_avg_sq")
    ]


def set_step_count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Tell AdamW how many steps its moments have seen, for their bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)
