"""The update: AdamW or SGD, a learning rate that rises and falls, one clipping for the mesh.

Paper   AdamW: Loshchilov and Hutter 2019 (1711.05101), algorithm 2; cosine: 1608.03983, equation 5
Idea    The optimizer itself is torch's (fused where it has a fused kernel). What a mesh changes is
        the gradient norm: every parameter counts once, wherever its shards and replicas are.
Read    build -> moments -> learning_rate -> clip
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis
from picotron_lab.config import TrainConfig
from picotron_lab.sharding import Record, squared_norm


def build(weights: Sequence[nn.Parameter], cfg: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over `weights`; matrices decay, norm weights do not."""
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, foreach=True)
    fused = cfg.impl == "fused"
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=fused, foreach=not fused)


def moments(optimizer: torch.optim.Optimizer) -> list[tuple[Record, Tensor]]:
    """AdamW's two moments of every weight with their records, for checkpoints; made if need be."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return []
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not optimizer.state[weight]:
                step = torch.zeros((), device=weight.device if group["fused"] else "cpu")
                first, second = torch.zeros_like(weight), torch.zeros_like(weight)
                optimizer.state[weight] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return [
        (replace(weight.record, name=f"adamw.{key}/{weight.record.name}"), state[key])
        for weight, state in optimizer.state.items()
        for key in ("exp_avg", "exp_avg_sq")
    ]


def set_step_count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Tell AdamW how many steps its moments have seen, for their bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


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


@torch.no_grad()
def clip(
    parameters: Sequence[nn.Parameter], limit: float, world: Axis, axes: dict[str, Axis]
) -> Tensor:
    """Scale all gradients so that their norm over the whole mesh is at most `limit`; 0: leave them.

    Returns the norm before clipping, a float64 scalar that is the same on every rank.
    """
    norm = squared_norm(parameters, world, axes).sqrt()
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm
