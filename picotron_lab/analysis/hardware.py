"""What a device and its neighbours can do: peak, matmuls, memory, links; by name, with sources.

Peaks     the makers' data sheets, without sparsity: A100, H100, H200 of SXM modules, HGX B200
Matmuls   the best share of the peak that any shape reached, measured: the MAMF tables of Stas
          Bekman's ML Engineering: A100 271 of 312, H100 794.5 of 989, B200 1745 of 2250; H200: 788
          for 8192 cubed of random numbers, measured for this project
Memory    the makers' GB, taken as 10^9 bytes; drivers report up to 7 % more
Links     bus bandwidth of an all_reduce of so many bytes over a node of 8 H200, as NCCL's tests
          measure it (ML Engineering, chapter network): `ledger.wire_bytes` / time, so latency is in
          it. Others with the same table scaled by their NVLink: 300 GB/s each way in A100, 450 in
          H100 and H200, 900 in B200 (data sheets): nobody's measurement
Rings     all_gather 361, reduce_scatter 363, ring all_reduce 367 where all_reduce in the switch
          reached 481: three quarters (same source). The switch helps groups of 5 GPUs or more
Network   one network adapter for each GPU: DGX A100 200 Gbit/s, DGX H100, H200, B200 400 Gbit/s
          (data sheets). 5 microseconds from node to node for a step of a ring: an estimate,
          nobody's measurement
Try       hardware("H100").bandwidth(2**25) / 1e9    this machine: this_machine.py
Tests     tests/test_hardware.py
"""

import math
from dataclasses import dataclass

import torch

from picotron_lab.config import require

TERA, GIGA, MIB = 1e12, 1e9, 2**20
BUS_BANDWIDTH = tuple(  # (MiB of payload, GB/s) of all_reduce over 8 H200
    (size * MIB, rate * GIGA)
    for size, rate in (
        (1, 40), (4, 107), (8, 156), (16, 220), (32, 276),
        (64, 347), (128, 402), (256, 436), (512, 450), (1024, 464),
    )  # fmt: skip
)


@dataclass(frozen=True)
class Hardware:
    """One device, its node and its network. Rates in FLOP/s and bytes/s, times in seconds.

    peak               {dtype: FLOP/s} of the data sheet
    matmul_share       of the peak that the best matmul reaches
    memory_bandwidth   of the data sheet; reads and writes count alike
    links              (payload bytes, bus bandwidth) of an all_reduce over `links_ranks` devices of
                       a node, ascending
    ring_share         of that bandwidth for whatever is no all_reduce in a switch
    node               devices that these links join
    network_bandwidth  between nodes, of each device
    network_latency    of a step from node to node
    """

    name: str
    peak: dict[torch.dtype, float]
    matmul_share: float
    memory_bytes: float
    memory_bandwidth: float
    links: tuple[tuple[float, float], ...]
    links_ranks: int = 8
    ring_share: float = 0.75
    node: int = 8
    network_bandwidth: float = 50 * GIGA
    network_latency: float = 5e-6

    def bandwidth(self, payload: float) -> float:
        """Bus bandwidth of an all_reduce of so many bytes: between two measured sizes on a straight
        line over the logarithm of the size, above them the last. Below them all take equally long.
        """
        (least, slowest), (most, fastest) = self.links[0], self.links[-1]
        if payload <= least:
            return slowest * payload / least
        if payload >= most:
            return fastest
        at = next(i for i, (size, _) in enumerate(self.links) if size >= payload)
        (small, low), (large, high) = self.links[at - 1 : at + 1]
        return low + (high - low) * math.log(payload / small) / math.log(large / small)


def nvlink(times: float) -> tuple[tuple[float, float], ...]:
    """The table of bus bandwidths for links that are so many times as fast as an H200's."""
    return tuple((size, rate * times) for size, rate in BUS_BANDWIDTH)


BF16, FP32 = torch.bfloat16, torch.float32
KNOWN = {
    "A100": Hardware(
        "A100", {BF16: 312 * TERA, FP32: 19.5 * TERA}, 0.869, 80 * GIGA, 2.039 * TERA,
        nvlink(300 / 450), network_bandwidth=25 * GIGA,
    ),
    "H100": Hardware(
        "H100", {BF16: 989 * TERA, FP32: 67 * TERA}, 0.803, 80 * GIGA, 3.35 * TERA, nvlink(1)
    ),
    "H200": Hardware(
        "H200", {BF16: 989 * TERA, FP32: 67 * TERA}, 0.797, 141 * GIGA, 4.8 * TERA, nvlink(1)
    ),
    "B200": Hardware(
        "B200", {BF16: 2250 * TERA, FP32: 80 * TERA}, 0.776, 180 * GIGA, 8 * TERA, nvlink(2)
    ),
}  # fmt: skip


def hardware(name: str) -> Hardware:
    """The device of that name, in small or capital letters; ConfigError for an unknown one."""
    require(
        name.upper() in KNOWN,
        f"--hardware {name} is not one of {', '.join(KNOWN)}; try --hardware h100.",
    )
    return KNOWN[name.upper()]


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak of a device such as 'NVIDIA H200', or None where we do not know it (any CPU; PCIe and
    NVL cards, which are slower than the modules of the same name)."""
    words = device_name.replace("-", " ").split()
    if "PCIe" in words or "NVL" in words:
        return None
    known = [device.peak for name, device in KNOWN.items() if name in words]
    return known[0].get(dtype) if known else None


def device_name(device: torch.device) -> str:
    """The name of a CUDA device, or 'CPU'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
