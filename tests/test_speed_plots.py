"""Pictures of time show what is predicted, and what was published."""

import re

import pytest

from picotron_lab.analysis import speed_plots
from picotron_lab.analysis.hardware import hardware
from picotron_lab.analysis.speed_plots import Run
from picotron_lab.analysis.step_time import predict
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
MODEL = ModelConfig("some model", 64_000, 1024, 8, 8, 8, 2816)
H100 = hardware("h100")


def lines(axes):
    """Points of each curve by its name."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_throughput_beside_what_was_published():
    cfg = TrainConfig(32, 1, 2048, dtype="bfloat16")
    alone = [Run(MODEL, MeshConfig(tp=n), cfg, 1000.0 / n) for n in (2, 4)]
    parallel = [Run(MODEL, MeshConfig(tp=n, sequence_parallel=True), cfg) for n in (2, 4)]
    figure = speed_plots.throughput({"alone": alone, "parallel": parallel}, "tp", H100, "nobody")
    axes = figure.axes[0]
    found = lines(axes)
    for name, runs in (("alone", alone), ("parallel", parallel)):
        steps = [predict(MODEL, run.mesh, cfg, H100) for run in runs]
        per_gpu = [cfg.global_batch_size * 2048 / s.seconds / s.ranks for s in steps]
        expected = [[2, per_gpu[0]], [4, per_gpu[1]]]
        assert found[f"{name}: predicted"] == [pytest.approx(pair) for pair in expected]
    assert found["alone: published"] == [[2, 500], [4, 250]]
    assert "parallel: published" not in found, "nobody measured it"
    assert axes.get_title("left") == "some model on H100: predicted, and published by nobody"
    assert axes.get_xlabel() == "ranks of tp" and axes.get_ylabel() == "tokens/s of one GPU"
    assert any(line.get_xdata()[0] == 8 for line in axes.lines), "a node of H100 has 8"


def test_bubbles_are_the_papers():
    """1F1B (p-1)/(m+p-1), interleaved (p-1)/(v m+p-1) [2104.04473]; ZB-H1 with F = B = W: p - 1 of
    3 m + p - 1 [2401.10241]."""
    schedules = [("afab", 0), ("1f1b", 0), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 0)]
    figure = speed_plots.bubbles((2, 4), (1, 3), schedules)
    assert [axes.get_title() for axes in figure.axes] == ["p = 2 ranks", "p = 4 ranks"]
    for axes, p in zip(figure.axes, (2, 4), strict=True):
        forms = {
            "afab and 1f1b": 1, "interleaved, v = 2": 2, "interleaved, v = 4": 4, "zb-h1": 3,
        }  # fmt: skip
        found = lines(axes)
        assert set(found) == set(forms)
        for name, times in forms.items():
            expected = [[m, 100 * (p - 1) / (times * m + p - 1)] for m in (p, 3 * p)]
            assert found[name] == [pytest.approx(pair) for pair in expected], name


def pipeline(schedule="1f1b", cut="even", words=64_000):
    mesh = MeshConfig(pp=4, schedule=schedule, pp_layers=cut)
    model = ModelConfig("some model", words, 1024, 8, 8, 8, 2816)
    return Run(model, mesh, TrainConfig(8, 1, 2048, dtype="bfloat16"))


@pytest.mark.parametrize("schedule, cut", [
    ("1f1b", "even"), ("1f1b", "balanced"), ("1f1b-vocab1", "even"), ("zb-v", "even"),
])  # fmt: skip
def test_the_busiest_rank_is_that_of_the_predicted_step(schedule, cut):
    """A step that has no replicas is the busiest rank's work, its bubble and its optimizer."""
    run = pipeline(schedule, cut)
    step = predict(run.model, run.mesh, run.cfg, H100)
    work = step.seconds - step.parts["bubble"] - step.parts["optimizer"] - step.parts["replica"]
    times = speed_plots.rank_seconds(run, H100)
    assert 8 * max(map(sum, times)) == pytest.approx(work)
    assert all(layers >= 0 and ends > -1e-12 for layers, ends in times)


def test_imbalance_of_a_large_vocabulary():
    runs = {"even": pipeline(), "balanced": pipeline(cut="balanced")}
    runs["shared"] = pipeline("1f1b-vocab2")
    figure = speed_plots.imbalance(runs, H100)
    worst = {}
    for axes, (name, run) in zip(figure.axes, runs.items(), strict=True):
        layers, ends = axes.containers
        times = speed_plots.rank_seconds(run, H100)
        assert [bar.get_height() for bar in layers] == pytest.approx([1e3 * a for a, _ in times])
        assert [bar.get_height() for bar in ends] == pytest.approx([1e3 * b for _, b in times])
        tops = [bar.get_y() + bar.get_height() for bar in ends]
        assert axes.lines[0].get_ydata()[0] == pytest.approx(sum(tops) / 4), "the mean"
        worst[name] = float(re.search(r"([\d.]+)$", axes.get_title())[1])
        assert worst[name] == pytest.approx(4 * max(tops) / sum(tops), abs=0.005)
    assert worst["even"] > worst["balanced"] > worst["shared"] == 1.0
    heights = [[bar.get_height() for bar in axes.containers[1]] for axes in figure.axes]
    assert heights[0][1:3] == pytest.approx([0, 0], abs=1e-9), "only layers between the ends"
    assert heights[2] == pytest.approx([heights[2][0]] * 4), "all ranks have as many words"


def test_marks_tell_lines_apart_without_colours():
    schedules = [("interleaved", v) for v in range(1, 7)]
    (axes,) = speed_plots.bubbles((2,), (1,), schedules).axes
    assert len({line.get_marker() for line in axes.lines}) == 6
    assert len({line.get_color() for line in axes.lines}) == 6
    with pytest.raises(AssertionError, match="7 lines cannot be told apart: draw 6 at most"):
        speed_plots.bubbles((2,), (1,), [*schedules, ("interleaved", 7)])
