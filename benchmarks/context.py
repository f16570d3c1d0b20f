"""Context parallelism: pictures of memory and balance, and the time that blocks of attention take.

    python benchmarks/context.py            draws benchmarks/context_memory.png and
                                            benchmarks/context_balance.png; a CPU, 20 seconds
    python benchmarks/context.py --time     context_time.py: on a CUDA GPU, else small
    python benchmarks/context.py --time --smoke     that it runs, on any machine

Memory   bytes of one GPU between forward and backward: closed forms (analysis/), and what a meter
         sees of a small model on this machine.
Balance  operations of attention per rank and step of the ring, counted as ranks do them.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import GIB, markdown
from context_time import timing

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab import precision, sharding, zero_units  # noqa: E402
from picotron_lab.analysis import activations, fused_activations, zero_state  # noqa: E402
from picotron_lab.analysis.activations import Setting  # noqa: E402
from picotron_lab.analysis.context import Watch  # noqa: E402
from picotron_lab.analysis.meter import Meter  # noqa: E402
from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.config import PRESETS, ModelConfig  # noqa: E402
from picotron_lab.context_parallel import FusedRing, Piece, parallelize, positions  # noqa: E402
from picotron_lab.dropout import Where  # noqa: E402
from picotron_lab.fused import fuse  # noqa: E402
from picotron_lab.lab import run_ranks  # noqa: E402
from picotron_lab.model import Llama, initial_value  # noqa: E402

HERE = Path(__file__).parent


def pyplot() -> Any:
    """matplotlib, which draws into files; timing does without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ---- memory, by arithmetic

GPUS, CARD = 16, 80 * GIB
CONTEXT = (1, 2, 4, 8, 16)
LENGTHS = tuple(1024 * k for k in (4, 8, 16, 32, 64, 128))
COLOURS = {
    "parameters": "C0", "gradients": "C2", "optimizer": "C4", "buffers of ZeRO-3": "0.6",
    "activations": "C1",
}  # fmt: skip
AGAIN = "full recomputation"


def meta_model(cfg: ModelConfig) -> Llama:
    """A model without memory."""
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    return model


def state_bytes(cfg: ModelConfig) -> dict[str, int]:
    """What lies on each of GPUS ranks, whatever is computed: bf16, gradients and masters in
    float32, ZeRO-3 over all of them."""
    model = meta_model(cfg).to(torch.bfloat16)
    precision.accumulate_in(list(model.parameters()), torch.float32)
    units = [list(unit.parameters()) for unit in zero_units.units_of(model)]
    again = [False] + [True] * (len(units) - 1)
    said = zero_state.contract(3, "fused", zero_state.Job(units, GPUS, again))
    parts = said.parameter, said.gradient, said.optimizer, said.buffer
    return dict(zip(COLOURS, parts, strict=False))


def predicted(cfg: ModelConfig, state: dict[str, int], T: int, cp: int) -> dict[str, int]:
    """Bytes by category, and all of them with full recomputation, where backward has one layer at a
    time. One sequence, the fused path with its kernels."""
    at = Setting(1, T, 2, context_ranks=cp)
    kept = fused_activations.model_bytes(cfg, at, kernels=True)
    layer = sum(fused_activations.layer_bytes(cfg, at, kernels=True).values())
    less = fused_activations.model_bytes(cfg, at, "full", kernels=True) + layer
    return {**state, "activations": kept, AGAIN: sum(state.values()) + less}


# ---- memory, measured

SMALL = ModelConfig("small", 64, 64, layers=2, heads=4, kv_heads=2, ffn_size=176)
MEASURED = {  # (path, cp): lengths
    ("plain", 1): (256, 512, 1024, 2048), ("plain", 4): (256, 512, 1024, 2048, 4096),
    ("fused", 1): (256, 512, 1024, 2048, 4096), ("fused", 2): (256, 512, 1024, 2048, 4096),
    ("fused", 4): (256, 512, 1024, 2048, 4096),
}  # fmt: skip


def kept(axis: Axis, impl: str, T: int) -> int:
    """Bytes that forward of SMALL leaves for backward on this rank."""
    model = meta_model(SMALL)
    if impl == "fused":
        fuse(model)
    kind = "zigzag" if impl == "fused" else "ring"
    if axis.size > 1:
        parallelize(model, axis, impl, kind)
    sharding.materialise(model, 0, initial_value)
    positions_T = positions(kind, T, axis)
    tokens_BT = positions_T[None] % SMALL.vocab_size
    with Meter() as meter:
        meter.label("parameter", model.parameters())
        loss = model(tokens_BT, tokens_BT, Where(positions_T, torch.zeros(1)))
        assert loss.requires_grad, "without a graph nothing is kept: do not call it in no_grad."
        return meter.live["activation"]


def small_bytes(impl: str, T: int, cp: int) -> int:
    """The same, predicted."""
    forms = {"plain": activations, "fused": fused_activations}[impl]
    return forms.model_bytes(SMALL, Setting(1, T, 4, context_ranks=cp))


def measure_small() -> dict[tuple[str, int], list[int]]:
    """Bytes of rank 0, by path and ranks, one for each length."""
    return {
        (impl, cp): [run_ranks(kept, cp, impl, T)[0] for T in lengths]
        for (impl, cp), lengths in MEASURED.items()
    }


def memory() -> None:
    """Tables and picture of memory."""
    cfg = PRESETS["llama3-8b"]
    state, measured = state_bytes(cfg), measure_small()
    said = {(cp, T): predicted(cfg, state, T, cp) for cp in CONTEXT for T in LENGTHS}
    header = ("cp", "T", *COLOURS, "all", f"all, {AGAIN}")
    rows = []
    for (cp, T), parts in said.items():
        sizes = [parts[name] for name in COLOURS]
        sizes += [sum(sizes), parts[AGAIN]]
        rows.append([str(cp), f"{T:,}", *(f"{size / GIB:.1f}" for size in sizes)])
    print(f"{cfg.name} on {GPUS} GPUs, GiB of one between forward and backward\n")
    print(markdown(header, rows), "\n")
    rows = [
        [impl, str(cp), f"{T:,}", f"{small_bytes(impl, T, cp):,}", f"{found:,}"]
        for (impl, cp), sizes in measured.items()
        for T, found in zip(MEASURED[impl, cp], sizes, strict=True)
    ]
    print(markdown(("path", "cp", "T", "bytes predicted", "bytes measured"), rows), "\n")
    draw_memory(said, measured)


def draw_memory(
    said: dict[tuple[int, int], dict[str, int]], measured: dict[tuple[str, int], list[int]]
) -> None:
    """A panel of stacked bars for each number of ranks, and one of what was measured."""
    plt = pyplot()
    widths = [1] * len(CONTEXT) + [0.12, 2.1]
    figure, panels = plt.subplots(
        1, len(widths), figsize=(14, 4.4), layout="constrained", width_ratios=widths
    )
    for panel, cp in zip(panels, CONTEXT, strict=False):
        draw_bars(panel, [said[cp, T] for T in LENGTHS])
        panel.set_title("without" if cp == 1 else f"cp = {cp}", fontsize=10, pad=14)
        if cp > 1:
            panel.set_yticklabels([])
    panels[0].set_ylabel("GiB of one GPU, by arithmetic")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=7, fontsize=8, frameon=False, loc="outside lower left")
    figure.suptitle(
        f"Llama 3 8B, one sequence of T tokens on cp of {GPUS} GPUs: bf16, gradients and masters "
        "in fp32, ZeRO-3 over all, tp 1",
        fontsize=10, x=0.005, ha="left",
    )  # fmt: skip
    panels[-2].set_axis_off()
    draw_measured(panels[-1], measured)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "context_memory.png", dpi=110)


def draw_bars(panel: Any, sizes: list[dict[str, int]]) -> None:
    """Categories one on the other, cut off at the top; there the sum is written."""
    top, places = 160, range(len(LENGTHS))
    bottom = [0.0] * len(LENGTHS)
    for name, colour in COLOURS.items():
        heights = [size[name] / GIB for size in sizes]
        panel.bar(places, heights, 0.75, bottom, color=colour, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    again = [size[AGAIN] / GIB for size in sizes]
    panel.plot(places, again, "k_", markersize=9, markeredgewidth=2, label=f"all, with {AGAIN}")
    panel.axhline(CARD / GIB, color="C3", linestyle="--", linewidth=1, label="a GPU of 80 GiB")
    for place, total in enumerate(bottom):
        if total > top:
            panel.text(place, top + 2, f"{total:.0f}", ha="center", fontsize=7)
    panel.set_ylim(0, top)
    panel.set_xlabel("T")
    panel.set_xticks(places, [f"{T // 1024}k" for T in LENGTHS], fontsize=7)


def draw_measured(panel: Any, measured: dict[tuple[str, int], list[int]]) -> None:
    """Lines are predicted, marks measured."""
    for i, ((impl, cp), sizes) in enumerate(measured.items()):
        lengths, plain = MEASURED[impl, cp], impl == "plain"
        label = f"{impl}, " + ("without" if cp == 1 else f"cp = {cp}")
        lines = [small_bytes(impl, T, cp) / 2**20 for T in lengths]
        panel.plot(lengths, lines, f"C{i}", linewidth=3 if plain else 1.2, label=label)
        found, style = [size / 2**20 for size in sizes], {"markersize": 9 if plain else 4}
        panel.plot(lengths, found, f"C{i}" + "so"[not plain], fillstyle="full", **style)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_yticks([1, 10, 100], ["1", "10", "100"])
    panel.set_xticks(MEASURED["fused", 1], [f"{T:,}" for T in MEASURED["fused", 1]], fontsize=7)
    panel.set(xlabel="T", ylabel="MiB of activations of one rank")
    panel.set_title("small model: lines predicted, marks measured", fontsize=10, pad=14)
    panel.legend(fontsize=8, frameon=False)


# ---- balance

RING = 8


class Marked(FusedRing):
    """A ring that notes the operations of each step."""

    def __init__(self, axis: Axis, kind: str, watch: Watch):
        super().__init__(axis, kind)
        self.watch, self.begun = watch, []

    def pieces(self, hops: int, queries: Any) -> list[Piece]:
        """Asked for once in each step, before it is computed."""
        self.begun.append(self.watch.operations)
        return super().pieces(hops, queries)


def operations(axis: Axis, kind: str) -> list[int]:
    """Of attention, forward, in each step of this rank: 128 tokens, 4 heads of 16."""
    q_BTHC, k_BTKC, v_BTKC = (torch.ones(1, 128, heads, 16) for heads in (4, 2, 2))
    with Watch() as watch:
        ring = Marked(axis, kind, watch)
        ring(q_BTHC, k_BTKC, v_BTKC)
    return [later - earlier for earlier, later in pairwise([*ring.begun, watch.operations])]


def balance() -> None:
    """Table and picture of work. A step lasts as long as its busiest rank."""
    found = {kind: run_ranks(operations, RING, kind) for kind in ("ring", "zigzag")}
    rows = []
    for kind, work in found.items():
        for rank, steps in enumerate(work):
            cells = [f"{step / 1e6:.2f}" for step in (*steps, sum(steps))]
            rows.append([f"{kind}, rank {rank}", *cells])
        ratio, time_lost = imbalance(work)
        print(f"{kind}: busiest rank / idlest {ratio:g}, time / that of equal shares {time_lost:g}")
    header = ("millions of operations", *(f"step {i}" for i in range(RING)), "all")
    print("\n" + markdown(header, rows), "\n")
    draw_balance(found)


def imbalance(work: list[list[int]]) -> tuple[float, float]:
    """(work of the busiest rank over that of the idlest, sum over steps of the busiest rank over
    that of the mean)."""
    totals = [sum(steps) for steps in work]
    lasts = sum(max(step) for step in zip(*work, strict=True))
    return max(totals) / min(totals), lasts * len(totals) / sum(totals)


def draw_balance(found: dict[str, list[list[int]]]) -> None:
    """A field for each rank and step; beside it the sum of each rank."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    block = max(max(steps) for steps in found["ring"])
    for panel, (kind, work) in zip(panels, found.items(), strict=True):
        shares = [[step / block for step in steps] for steps in work]
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        for rank, steps in enumerate(shares):
            for step, share in enumerate(steps):
                colour = {0: "0.6", 1: "w"}.get(share, "k")
                panel.text(step, rank, f"{share:g}", ha="center", va="center", color=colour)
            panel.text(RING - 0.3, rank, f"{sum(steps):g}", va="center", fontweight="bold")
        panel.text(RING - 0.3, -0.75, "all", va="center", fontweight="bold")
        ratio, lasts = imbalance(work)
        title = f"{kind}: busiest / idlest rank {ratio:g}; {lasts:.2f} x the time of equal shares"
        panel.set_title(title, fontsize=10, loc="left", pad=16)
        panel.set(xlabel="step of the ring", ylabel="rank")
        between = [i - 0.5 for i in range(1, RING)]
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_ticks(range(RING))
            axis.set_ticks(between, minor=True)
        panel.grid(which="minor", color="w", linewidth=2)
        panel.tick_params(which="both", length=0)
        panel.spines[:].set_visible(False)
    figure.suptitle(
        f"Attention of {RING} ranks, forward: operations, counted; 1 is a whole block of keys",
        fontsize=10,
    )
    figure.savefig(HERE / "context_balance.png", dpi=110)


def main() -> int:
    """Draw, or time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="time attention, draw nothing")
    parser.add_argument("--smoke", action="store_true", help="small: see that timing works")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    if args.time:
        timing(args.steps, args.smoke)
    else:
        memory()
        balance()
    return 0


if __name__ == "__main__":
    sys.exit(main())
