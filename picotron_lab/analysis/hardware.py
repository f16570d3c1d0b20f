"""What a device can do at most, by its name. Source: the makers' data sheets, without sparsity."""

import torch

TERA = 1e12
# a word of the name that the driver reports -> {dtype: floating-point operations per second};
# the SXM modules: the slower PCIe and NVL cards of the same name are left out
PEAK_FLOPS = {
    "A100": {torch.bfloat16: 312 * TERA, torch.float32: 19.5 * TERA},
    "H100": {torch.bfloat16: 989 * TERA, torch.float32: 67 * TERA},
    "H200": {torch.bfloat16: 989 * TERA, torch.float32: 67 * TERA},
    "B200": {torch.bfloat16: 2250 * TERA, torch.float32: 80 * TERA},
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak of a device such as 'NVIDIA H200', or None where we do not know it (any CPU)."""
    words = device_name.replace("-", " ").split()
    if "PCIe" in words or "NVL" in words:
        return None
    known = [peaks for name, peaks in PEAK_FLOPS.items() if name in words]
    return known[0].get(dtype) if known else None


def device_name(device: torch.device) -> str:
    """The name of a CUDA device, or 'CPU'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
