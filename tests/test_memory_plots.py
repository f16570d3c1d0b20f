"""Pictures of memory: over time, as a meter records it; by model, length and mesh, as predicted."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from picotron_lab.analysis import memory_plots
from picotron_lab.analysis.memory import predict
from picotron_lab.analysis.memory_plots import COLOURS, memory_timeline
from picotron_lab.analysis.meter import CATEGORIES, Meter
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig


def four_steps():
    """AdamW on a matrix of 10 x 10 float32, so 400 bytes, whose product with 5 rows is 200."""
    weight, x = nn.Parameter(torch.ones(10, 10)), torch.ones(5, 10)
    optimizer = torch.optim.AdamW([weight], foreach=False)
    with Meter(record=True) as meter:
        meter.watch([weight])
        for step in range(4):
            meter.mark(f"step {step + 1}")
            optimizer.zero_grad()
            (x @ weight).sum().backward()
            with meter.making("optimizer"):
                optimizer.step()
    return meter


def test_the_first_steps_over_time():
    """Gradients come and go; the moments come with the first update, and stay."""
    meter = four_steps()
    marks = [i for i, moment in enumerate(meter.history) if moment.name]
    assert [meter.history[i].name for i in marks] == [f"step {n}" for n in (1, 2, 3, 4)]
    assert all(moment.live["parameter"] == 400 for moment in meter.history)
    updated = next(i for i, moment in enumerate(meter.history) if moment.live["optimizer"] >= 800)
    assert marks[0] < updated < marks[1]
    for i, moment in enumerate(meter.history):
        assert (moment.live["optimizer"] >= 800) == (i >= updated)
        assert moment.live["gradient"] in (0, 400)
    for first, last in zip(marks, [*marks[1:], len(meter.history)], strict=True):
        step = meter.history[first:last]
        assert max(moment.live["activation"] for moment in step) >= 200  # x @ weight
        assert {moment.live["gradient"] for moment in step} == {0, 400}
    assert max(sum(moment.live.values()) for moment in meter.history) == meter.peak_bytes
    assert [m.operations for m in meter.history] == sorted(m.operations for m in meter.history)


def test_a_meter_records_only_if_it_is_asked():
    with Meter() as meter:
        torch.zeros(3)
        meter.mark("nothing")
    assert meter.history == []


def test_a_picture_of_memory_over_time():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    figure = memory_timeline(four_steps())
    axes = figure.axes[0]
    assert [text.get_text().strip() for text in axes.texts] == [
        "step 1",
        "step 2",
        "step 3",
        "step 4",
    ]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [*CATEGORIES[::-1]]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert len(tops) == len(CATEGORIES) and tops == sorted(tops)
    assert tops[0] == pytest.approx(400 / 1024), "weights are at the bottom, in KiB"
    with pytest.raises(AssertionError, match="has recorded nothing"):
        memory_timeline(Meter(record=True))


def test_colours_differ_in_grey():
    """Luma (Rec. 601) rises from each category to the next by a twelfth at least."""
    luma = [
        sum(
            weight * int(colour[i : i + 2], 16)
            for i, weight in ((1, 0.299), (3, 0.587), (5, 0.114))
        )
        for colour in COLOURS
    ]
    assert all(after - before > 255 / 12 for before, after in zip(luma, luma[1:], strict=False))


# ---- predicted


MODEL = ModelConfig("some model", 1000, 256, 2, 4, 4, 704)
STEP = TrainConfig(1, 1, 1024, dtype="bfloat16", impl="plain")


def heights(axes, label):
    """Of the bars with this name; none are left out where all would be 0."""
    found = [each for each in axes.containers if each.get_label() == label]
    return [bar.get_height() for bar in found[0]] if found else []


def numbers(axes):
    return [text.get_text() for text in axes.texts]


def test_stacks_by_model_and_length():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    runs = {kind: replace(STEP, recompute=kind) for kind in ("none", "full")}
    lengths, limit = (1024, 1536), 2e9
    figure = memory_plots.memory_by_length([MODEL, replace(MODEL, layers=4)], lengths, runs, limit)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["some model", "some model"]
    for axes, (kind, layers) in zip(
        figure.axes, [("none", 2), ("none", 4), ("full", 2), ("full", 4)], strict=True
    ):
        found = [
            predict(replace(MODEL, layers=layers), MeshConfig(), replace(
                runs[kind], sequence_length=length), kernels=True)
            for length in lengths
        ]  # fmt: skip
        parameters = 2 * 1000 * 256 + 256 + layers * (4 * 256**2 + 3 * 256 * 704 + 2 * 256)
        for part, each in (("parameters", 2), ("gradients", 4), ("optimizer", 12)):
            expected = [each * parameters / 2**30] * 2
            assert heights(axes, part) == pytest.approx(expected), "bytes of each parameter"
        for part in ("activations", "temporaries"):
            expected = [getattr(step, part) / 2**30 for step in found]
            assert heights(axes, part) == pytest.approx(expected)
        assert heights(axes, "buffers") == [], "there are none: not in the legend either"
        tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
        sums = [(18 * parameters + f.activations + f.temporaries) / 2**30 for f in found]
        assert tops == pytest.approx(sums)
        assert numbers(axes) == [f"{f.peak / 2**30:.1f}" for f in found]
        (line,) = (each for each in axes.lines if each.get_label().startswith("a GPU of 2 GB"))
        assert line.get_ydata()[0] == pytest.approx(limit / 2**30)
        assert axes.get_ylim() == (0, pytest.approx(2 * limit / 2**30))
    below = figure.axes[-1].get_xticklabels()
    assert [tick.get_text() for tick in below] == ["1k", "1,536"]


def test_an_update_that_needs_more_than_backward():
    """The plain AdamW makes a second moment's square root: 4 more bytes of a parameter."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    model, cfg = replace(MODEL, vocab_size=50_000), replace(STEP, recompute="full")
    (axes,) = memory_plots.memory_by_length([model], [16], {"short": cfg}, 1e9).axes
    (line,) = (each for each in axes.lines if each.get_label() == "while AdamW steps")
    parameters = 2 * 50_000 * 256 + 256 + 2 * (4 * 256**2 + 3 * 256 * 704 + 2 * 256)
    assert list(line.get_ydata()) == pytest.approx([22 * parameters / 2**30] * 2)


def test_zero_beside_the_paper():
    """Figure 1 of 1910.02054: 120, 31.4, 16.6 and 1.9 GB."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    model = replace(MODEL, vocab_size=1024)
    cfg = replace(STEP, global_batch_size=64, impl="fused")
    (axes,) = memory_plots.zero_state(model, 64, cfg, 7.5e9).axes
    paper = heights(axes, "the paper's formula")
    assert [round(size, 1) for size in paper] == [120.0, 31.4, 16.6, 1.9]
    assert numbers(axes)[:4] == ["120", "31.4", "16.6", "1.9"]
    norms = 5 * 256
    rows = 2 * 1024 * 256 + norms + 2 * (4 * 256**2 + 3 * 256 * 704)  # all divide by 64
    assert heights(axes, "parameters") == pytest.approx([2 * rows / 1e9] * 3 + [2 * rows / 64e9])
    shared = 4 * rows / 64e9
    assert heights(axes, "gradients") == pytest.approx([4 * rows / 1e9] * 2 + [shared] * 2)
    assert heights(axes, "optimizer") == pytest.approx([12 * rows / 1e9] + [3 * shared] * 3)
    assert heights(axes, "activations") == [], "the paper's figure is of state"


def test_sequence_parallelism_cuts_what_tensor_parallelism_does_not():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    cfg = replace(STEP, impl="fused")
    figure = memory_plots.tensor_parallel_activations(MODEL, (1024, 2048), (1, 2, 4), cfg)
    for axes, length in zip(figure.axes, (1024, 2048), strict=True):
        each = replace(cfg, sequence_length=length)
        alone, parallel = heights(axes, "tp"), heights(axes, "tp and sequence parallelism")
        for n, one, other in zip((1, 2, 4), alone, parallel, strict=True):
            meshes = [MeshConfig(tp=n), MeshConfig(tp=n, sequence_parallel=n > 1)]
            held = [predict(MODEL, mesh, each, kernels=True).activations for mesh in meshes]
            assert [one, other] == pytest.approx([size / 2**30 for size in held])
        assert alone[0] == parallel[0], "one rank has nothing to share"
        assert alone[1] > parallel[1] and alone[2] > parallel[2]


def test_context_parallel_stacks_are_cut_off_and_say_so():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    meshes = [MeshConfig(dp=4, zero=3), MeshConfig(cp=4, zero=3)]
    cfg, lengths, limit = replace(STEP, impl="fused"), (1024, 262_144), 1e9
    figure = memory_plots.context_parallel_stacks(MODEL, lengths, meshes, cfg, limit)
    for axes, mesh in zip(figure.axes, meshes, strict=True):
        found = [
            predict(MODEL, mesh, replace(
                cfg, sequence_length=length, global_batch_size=mesh.dp), kernels=True)
            for length in lengths
        ]  # fmt: skip
        held = [each.activations / 2**30 for each in found]
        assert heights(axes, "activations") == pytest.approx(held)
        assert axes.get_ylim() == (0, pytest.approx(2 * limit / 2**30))
        assert [float(text) for text in numbers(axes)] == [
            pytest.approx(each.peak / 2**30, abs=0.05) for each in found
        ]
        assert axes.texts[1].xy[1] == pytest.approx(min(found[1].peak / 2**30, 2 * limit / 2**30))
    assert [axes.get_title()[:4] for axes in figure.axes] == ["cp 1", "cp 4"]
