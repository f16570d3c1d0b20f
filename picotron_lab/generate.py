"""Let a model write: one token after the other, each drawn from the softmax of the last logits.

Dims    B one sequence  T sequence  V vocabulary
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_T: Tensor,
    count: int,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt_T` (int64 ids) by `count` ids; the model sees the last `context` tokens.

    Everything is computed again for each token, so the time grows with count * context.
    """
    dice = torch.Generator().manual_seed(seed)
    ids = prompt_T.tolist()
    model.eval()
    for _ in range(count):
        window_BT = torch.tensor([ids[-context:]], device=prompt_T.device)
        logits_V = model(window_BT)[0, -1].float().cpu()
        chances_V = (logits_V / temperature).softmax(-1)
        ids.append(int(torch.multinomial(chances_V, 1, generator=dice)))
    model.train()
    return ids[len(prompt_T) :]
