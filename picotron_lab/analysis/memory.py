"""How much memory was used, as the machine saw it."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: most bytes ever allocated for tensors. CPU: most bytes this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
