"""benchmarks/pictures.py draws all its pictures, here of fewer lengths than the repository has."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PNG, CORNER = b"\x89PNG\r\n\x1a\n", slice(16, 24)  # how a file begins; where width and height are


@pytest.fixture
def pictures(monkeypatch):
    """The script, as a module."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pictures")


@pytest.mark.slow
def test_every_picture_is_drawn_and_named(pictures, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "not there yet"
    monkeypatch.setattr(pictures, "LENGTHS", (1024, 2048))
    monkeypatch.setattr(pictures, "LONG", (4096, 8192))
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--folder", str(folder)])
    pictures.main()
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(drawn) == sorted(f"{picture.__name__}.png" for picture in pictures.PICTURES)
    assert capsys.readouterr().out.split("\n")[:-1] == [
        str(folder / f"{picture.__name__}.png") for picture in pictures.PICTURES
    ]
    for name, data in drawn.items():
        width, height = (int.from_bytes(data[CORNER][i : i + 4], "big") for i in (0, 4))
        assert data.startswith(PNG) and min(width, height) >= 300, name
    assert len(set(drawn.values())) == len(drawn), "no two are alike"


def test_the_repository_has_these_pictures_and_no_others(pictures):
    there = {path.name for path in (BENCHMARKS / "pictures").glob("*.png")}
    assert there == {f"{picture.__name__}.png" for picture in pictures.PICTURES}


def test_lines_are_rows_of_the_published_tables(pictures):
    """The playbook's sequence-parallel rows are apart from the others, and none is lost."""
    table = pictures.published_rows.playbook_tensor()
    split = pictures.published(table), pictures.published(table, parallel=True)
    assert sum(map(len, split)) == len(table.rows) and all(split)
    assert {run.mesh.sequence_parallel for run in split[0]} == {False}
    assert {run.mesh.sequence_parallel for run in split[1]} == {True}


def test_the_zero_model_is_as_large_as_the_papers(pictures):
    """1910.02054, figure 1: 7.5 billion parameters, counted here by hand: embedding, and in each
    layer 4 D D for attention, 3 D F for the MLP, 2 D for norms; a last norm."""
    V, D, L, F = 50_257, 4096, 36, 10_923
    counted = V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D
    model = pictures.ZERO_MODEL
    assert (model.vocab_size, model.hidden_size, model.layers, model.ffn_size) == (V, D, L, F)
    assert counted == pytest.approx(pictures.ZERO_PARAMETERS, rel=0.01)
