"""Let a model write: one token after the other, each drawn from the softmax of the last logits.

Dims    V vocabulary
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generate(
    predict: Callable[[list[int]], Tensor],
    prompt: Sequence[int],
    count: int,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` by `count` ids; the model sees the last `context` tokens.

    predict  1 to `context` ids -> logits [V] of the next, such as Trainer.predict. All ranks that
             share a model call this, and get the same ids.

    Everything is computed again for each token, so the time grows with count * context.
    """
    dice = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(count):
        logits_V = predict(ids[-context:]).float().cpu()
        chances_V = (logits_V / temperature).softmax(-1)
        ids.append(int(torch.multinomial(chances_V, 1, generator=dice)))
    return ids[len(prompt) :]
