"""What a device can do at most, by its name. Sources: the makers' data sheets, dense rates, no
sparsity."""

import torch

TERA = 1e12
# device name as the driver reports it -> {dtype: peak floating-point operations per second}
PEAK_FLOPS = {
    "A100": {torch.bfloat16: 312 * TERA, torch.float32: 19.5 * TERA},
    "H100": {torch.bfloat16: 989 * TERA, torch.float32: 67 * TERA},
    "H200": {torch.bfloat16: 989 * TERA, torch.float32: 67 * TERA},
    "B200": {torch.bfloat16: 2250 * TERA, torch.float32: 80 * TERA},
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak of a device such as 'NVIDIA H200', or None where we do not know it (any CPU)."""
    for name, peaks in PEAK_FLOPS.items():
        if name in device_name:
            return peaks.get(dtype)
    return None


def device_name(device: torch.device) -> str:
    """The name of a CUDA device, or 'CPU'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
