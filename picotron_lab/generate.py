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

    Everything is computed again for each token, so the time grows with count * context. A shorter
    window is padded behind: later tokens do not change earlier logits, and a mesh may need this
    length. All ranks that hold a part of the model call this, and get the same ids.
    """
    dice = torch.Generator().manual_seed(seed)
    ids = prompt_T.tolist()
    model.eval()
    for _ in range(count):
        window = ids[-context:]
        padded = window + [0] * (context - len(window))
        window_BT = torch.tensor([padded], device=prompt_T.device)
        logits_V = model(window_BT)[0, len(window) - 1].float().cpu()
        chances_V = (logits_V / temperature).softmax(-1)
        ids.append(int(torch.multinomial(chances_V, 1, generator=dice)))
    model.train()
    return ids[len(prompt_T) :]
