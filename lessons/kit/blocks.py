"""Blocks: two transformer blocks on one device, and what each rank should have of them.

The first block has fewer key/value heads than there are ranks. Lesson 05 cuts them.
Read    draw_stack -> Stack -> through -> part_of        Tests  tests/test_lessons.py
"""

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor, nn

from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.model import Block, rotary_angles

MATRICES = ("attention.q", "attention.o", "mlp.gate", "mlp.up", "mlp.down")
SHARED = ("attention.k", "attention.v")


def bounds(length: int, ranks: int, rank: int) -> slice:
    """Part of ceil(length / ranks); the last may be shorter."""
    size = -(-length // ranks)
    return slice(rank * size, min((rank + 1) * size, length))


@dataclass
class Stack:
    """Blocks with their weights, and what goes through them."""

    configs: list[ModelConfig]
    states: list[dict[str, Tensor]]
    x: Tensor
    gain: Tensor
    documents: Tensor | None  # [B, T]: document of each token


def plain_blocks(case: Stack) -> nn.ModuleList:
    """The blocks of one device."""
    blocks = nn.ModuleList(Block(cfg, 0, 0.0) for cfg in case.configs).double()
    for block, state in zip(blocks, case.states, strict=True):
        block.load_state_dict(state)
    return blocks


def through(case: Stack, blocks: nn.ModuleList, x_BTD: Tensor) -> Tensor:
    """x through all of them."""
    where = Where.first(torch.zeros(x_BTD.shape[:2], dtype=torch.long))
    where = replace(where, documents_BT=case.documents)
    angles = rotary_angles(where.positions_T, case.configs[0].head_width, 1e4)
    for block in blocks:
        x_BTD = block(x_BTD, angles, where)
    return x_BTD


def gradients(blocks: nn.ModuleList, names: tuple[str, ...]) -> list[Tensor]:
    """Of these weights in all blocks, in order."""
    return [block.get_submodule(name).weight.grad for block in blocks for name in names]


def part_of(name: str, grad: Tensor, n: int, rank: int) -> Tensor:
    """What a rank should have of the gradient of a matrix."""
    dim = int(name in ("attention.o", "mlp.down"))
    mine = bounds(grad.shape[dim], n, rank)
    return grad[:, mine] if dim else grad[mine]


def kv_parts(case: Stack, grads: list[Tensor], n: int, rank: int) -> list[Tensor]:
    """What a rank should have of the gradients of k and v of every block."""
    found = []
    for i, grad in enumerate(grads):
        kv_heads, width = case.configs[i // 2].kv_heads, case.configs[0].head_width
        many, first = max(1, kv_heads // n), rank * kv_heads // n
        found.append(grad[first * width : (first + many) * width])
    return found


def own_heads(case: Stack, homes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of k and v of the first block, if every rank had a key/value head for
    itself: a copy of that in `homes`."""
    cfg, state = case.configs[0], dict(case.states[0])
    for name in SHARED:
        heads = state[f"{name}.weight"].unflatten(0, (cfg.kv_heads, -1))
        state[f"{name}.weight"] = heads[homes].flatten(0, 1)
    wide = ModelConfig(**{**vars(cfg), "kv_heads": len(homes)})
    other = replace(case, configs=[wide, case.configs[1]], states=[state, case.states[1]])
    blocks = plain_blocks(other)
    y_BTD = through(other, blocks, case.x)
    (y_BTD * case.gain).sum().backward()
    return y_BTD.detach(), gradients(blocks, SHARED)[:2]


def draw_stack(rng: Random, generator: torch.Generator) -> tuple[Stack, int]:
    """Two blocks and the number of ranks; a sequence is of two documents, or of three."""
    n, H, few, many = rng.choice([(4, 8, 2, 4), (4, 4, 2, 4), (6, 6, 2, 6), (4, 8, 2, 8)])
    width, D = n * 3 - rng.choice([1, 2]), H * 2
    configs = [
        ModelConfig(vocab_size=1, hidden_size=D, heads=H, kv_heads=kv_heads, ffn_size=width)
        for kv_heads in (few, many)
    ]
    states = []

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for cfg in configs:
        shapes = {name: p.shape for name, p in Block(cfg, 0, 0.0).named_parameters()}
        states.append({name: draw(*shape) / 2 for name, shape in shapes.items()})
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    return Stack(configs, states, draw(2, 5, D), draw(2, 5, D), documents), n
