"""Pictures of memory: over time, as a meter has recorded it; by model, length and mesh, predicted.

Recorded   the first steps as the Ultra-Scale Playbook shows them, in "Memory usage in
           Transformers": weights are there from the beginning; activations rise in forward and fall
           in backward, while gradients appear; optimizer state appears when the first step ends,
           and stays
Predicted  memory.predict of the first rank, with the Triton kernels of the fused path. A stack is
           what is there while backward runs; a bar above it: more is there while AdamW steps. It
           holds what a run asks for, not what an allocator cannot use again
Colours    of the map cividis, dark to light: they differ in grey too, and for the colour-blind
Tests      tests/test_memory_plots.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from picotron_lab.analysis.memory import Footprint, playbook_state, predict
from picotron_lab.analysis.meter import CATEGORIES, Meter
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#00224e", "#434e6c", "#7d7c78", "#bcaf6f", "#fee838")  # of CATEGORIES, from below
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
GIB, GB = 2**30, 10**9
PARTS = ("parameters", "gradients", "optimizer", "buffers", "activations", "temporaries")
SHADES = (*COLOURS, "#ffffff")  # of PARTS; the last one is hatched
SIDE, BOTH = "#7d7c78", "#fee838"  # of two bars beside each other


def memory_timeline(meter: Meter) -> "Figure":
    """Bytes alive over operations, by category; lines where `mark` was called, with its names.

    meter   a Meter(record=True) that has seen something
    """
    from matplotlib.figure import Figure

    assert meter.history, (
        "this meter has recorded nothing: make it with Meter(record=True), and run what is to be "
        "drawn inside `with meter:`."
    )
    size, unit = next(pair for pair in UNITS if meter.peak_bytes >= pair[0] or pair[0] == 1)
    times = [moment.operations for moment in meter.history]
    rows = [[moment.live[name] / size for moment in meter.history] for name in CATEGORIES]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(
        times, rows, labels=CATEGORIES, colors=COLOURS, step="post", edgecolor="white", lw=0.2
    )
    top = meter.peak_bytes / size
    for moment in (moment for moment in meter.history if moment.name):
        axes.axvline(moment.operations, color="black", linewidth=0.8, linestyle=":")
        axes.text(moment.operations, 1.02 * top, f" {moment.name}", va="bottom")
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlabel("operations")
    axes.set_ylabel(f"memory alive ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)
    return figure


# ---- predicted


def memory_by_length(
    models: Sequence[ModelConfig],
    lengths: Sequence[int],
    runs: Mapping[str, TrainConfig],
    limit: float,
) -> "Figure":
    """One micro-batch on one device: a column for each model, a row for each run by its name, a
    stack for each sequence length; higher ones are cut off.

    runs    of one dtype and micro-batch size
    limit   bytes of the device, a line; twice as much is shown, or what is needed to show state
    """
    from matplotlib.figure import Figure

    shape = (len(runs), len(models))
    figure = Figure(figsize=(2.5 * shape[1] + 1.2, 1.75 * shape[0] + 0.9), layout="constrained")
    panels = figure.subplots(*shape, sharex=True, sharey="col", squeeze=False)
    for row, (name, cfg) in zip(panels, runs.items(), strict=True):
        for axes, model in zip(row, models, strict=True):
            cfgs = [replace(cfg, sequence_length=length) for length in lengths]
            found = [predict(model, MeshConfig(), each, kernels=True) for each in cfgs]
            axes.set_ylim(0, max(2 * limit, 1.3 * found[0].state) / GIB)
            _limit(axes, limit)
            _stacks(axes, found)
            axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        row[0].set_ylabel(f"{name}\n\nGiB")
    for axes, model in zip(panels[0], models, strict=True):
        axes.set_title(model.name, pad=16)
    for axes in panels[-1]:
        axes.set_xlabel("tokens of a sequence")
    _explain(figure)
    first = next(iter(runs.values()))
    figure.suptitle(
        f"Memory of one GPU, predicted: {first.dtype}, micro-batches of {first.micro_batch_size}"
    )
    return figure


def zero_state(model: ModelConfig, ranks: int, cfg: TrainConfig, parameters: float) -> "Figure":
    """What stays on a rank between steps, by stage of ZeRO: the paper's form for so many
    `parameters`, in 16 bit with 32-bit masters and moments, beside ours. 1910.02054, figure 1."""
    from matplotlib.figure import Figure

    stages = range(4)
    paper = [playbook_state(int(parameters), ranks, stage) / GB for stage in stages]
    found = [predict(model, MeshConfig(dp=ranks, zero=z), cfg, kernels=True) for z in stages]
    ours = [replace(each, activations=0, temporaries=0, update=0) for each in found]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    places = [stage - 0.21 for stage in stages]
    bars = axes.bar(
        places, paper, 0.38, color="white", edgecolor="black", hatch="...", linewidth=0.6,
        label="the paper's formula",
    )  # fmt: skip
    axes.bar_label(bars, [_number(size) for size in paper], fontsize=8, padding=2)
    axes.set_ylim(0, 1.1 * max(paper[0], ours[0].state / GB))
    _stacks(axes, ours, [stage + 0.21 for stage in stages], width=0.38, unit=GB)
    axes.set_xticks(stages, ["none", "1: optimizer", "2: and gradients", "3: and parameters"])
    axes.set_xlabel("stage of ZeRO: what is shared out")
    axes.set_ylabel("GB of one rank (10^9 bytes)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"State of one of {ranks} ranks: left {parameters / 1e9:.1f} billion parameters by the "
        f"paper's\n2 + 2 + 12 bytes, right ours: {model.name}, gradients in 32 bit, with buffers",
        loc="left", fontsize=10,
    )  # fmt: skip
    axes.legend(*_handles(figure), frameon=False)
    return figure


def tensor_parallel_activations(
    model: ModelConfig, lengths: Sequence[int], sizes: Sequence[int], cfg: TrainConfig
) -> "Figure":
    """Activations of a rank by the size of tp, without and with sequence parallelism; a panel for
    each sequence length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(lengths) + 0.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    styles = (("tp", False, SIDE, ""), ("tp and sequence parallelism", True, BOTH, "///"))
    for axes, length in zip(panels, lengths, strict=True):
        each = replace(cfg, sequence_length=length)
        for side, (name, parallel, colour, hatch) in zip((-0.21, 0.21), styles, strict=True):
            meshes = [MeshConfig(tp=n, sequence_parallel=parallel and n > 1) for n in sizes]
            held = [predict(model, mesh, each, kernels=True).activations / GIB for mesh in meshes]
            places = [i + side for i in range(len(sizes))]
            bars = axes.bar(
                places, held, 0.4, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5,
                label=name,
            )  # fmt: skip
            axes.bar_label(bars, [_number(size) for size in held], fontsize=8)
        axes.set_title(f"{length:,} tokens", fontsize=10)
        axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
        axes.set_xlabel("ranks of tp")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("activations of one rank (GiB)")
    figure.legend(*_handles(figure), loc="outside lower center", frameon=False, ncols=2)
    figure.suptitle(
        f"{model.name}, {cfg.dtype}, recomputation: {cfg.recompute}; what tp alone does not cut, "
        "sequence parallelism does"
    )
    return figure


def context_parallel_stacks(
    model: ModelConfig,
    lengths: Sequence[int],
    meshes: Sequence[MeshConfig],
    cfg: TrainConfig,
    limit: float,
) -> "Figure":
    """A panel for each mesh, a stack for each sequence length; higher ones are cut off.

    limit   bytes of the device, a line; twice as much is shown
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(meshes) + 0.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(meshes), sharey=True, squeeze=False)[0]
    for axes, mesh in zip(panels, meshes, strict=True):
        axes.set_ylim(0, 2 * limit / GIB)
        cfgs = [
            replace(cfg, sequence_length=length, global_batch_size=mesh.dp * cfg.micro_batch_size)
            for length in lengths
        ]
        _limit(axes, limit)
        _stacks(axes, [predict(model, mesh, each, kernels=True) for each in cfgs])
        axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        axes.set_xlabel("tokens of a sequence")
        axes.set_title(f"cp {mesh.cp}, dp {mesh.dp}, ZeRO {mesh.zero}", fontsize=10, pad=16)
    panels[0].set_ylabel("GiB of one rank")
    _explain(figure)
    figure.suptitle(
        f"{model.name} on {meshes[0].size} GPUs, {cfg.dtype}, recomputation: {cfg.recompute}; "
        f"micro-batches of {cfg.micro_batch_size}"
    )
    return figure


# ---- parts of a picture


def parts_of(found: Footprint) -> dict[str, int]:
    """Bytes while backward runs, by PARTS."""
    optimizer = found.masters + found.moments
    sizes = (found.parameters, found.gradients, optimizer, found.buffers, found.activations)
    return dict(zip(PARTS, (*sizes, found.temporaries), strict=True))


def _stacks(
    axes: "Axes",
    found: Sequence[Footprint],
    places: Sequence[float] = (),
    width: float = 0.8,
    unit: int = GIB,
) -> None:
    """A stack for each footprint with its peak above, within the limits of y; a line where the
    optimizer's step needs more. Parts that none has are left out."""
    places, highest = places or range(len(found)), axes.get_ylim()[1]
    bottoms = [0.0] * len(found)
    for part, colour in zip(PARTS, SHADES, strict=True):
        heights = [parts_of(each)[part] / unit for each in found]
        if any(heights):
            axes.bar(
                places, heights, width, bottoms, color=colour, edgecolor="black", linewidth=0.4,
                hatch="/////" if part == PARTS[-1] else "", label=part,
            )  # fmt: skip
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    for place, each, top in zip(places, found, bottoms, strict=True):
        peak = each.peak / unit
        if peak > top:
            ends = (place - width / 2, place + width / 2)
            axes.plot(ends, (peak, peak), color="black", linewidth=2, label="while AdamW steps")
        axes.annotate(
            _number(peak), (place, min(peak, highest)), (0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, annotation_clip=False, in_layout=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def _limit(axes: "Axes", size: float) -> None:
    """A line at so many bytes."""
    label = f"a GPU of {size / GB:.0f} GB ({size / GIB:.1f} GiB)"
    axes.axhline(size / GIB, color="#d55e00", linestyle="--", linewidth=1.4, label=label)


def _handles(figure: "Figure") -> tuple[list, list[str]]:
    """Samples and names of all that the figure shows, each once."""
    found = {}
    for axes in figure.axes:
        found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    return list(found.values()), list(found)


def _explain(figure: "Figure") -> None:
    handles, names = _handles(figure)
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=4)


def _number(size: float) -> str:
    return f"{size:.1f}" if size < 100 else f"{size:,.0f}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
