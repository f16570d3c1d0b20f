"""Notebooks: what is committed is what its source says, runs in a clean kernel, and only calls."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="jupyter is not installed")
import nbformat

HERE = Path(__file__).parent.parent / "notebooks"
CELLS, FIGURE_BYTES = 25, 300_000
DRAWING = re.compile(r"\b(matplotlib|plt|pyplot|subplots|axes|imshow|scatter|barh?)\b|\.plot\(")


def _builder():
    spec = importlib.util.spec_from_file_location("build_notebooks", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _builder()
SOURCES = build.sources()
each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def outputs(page):
    return [output for cell in page.cells for output in cell.get("outputs", [])]


def figures(page):
    """The base64 text of every picture."""
    every = [output.get("data", {}).get("image/png") for output in outputs(page)]
    return [png for png in every if png]


def check_outputs(page):
    kinds = {(output.output_type, output.get("name")) for output in outputs(page)}
    assert not any(kind == "error" or name == "stderr" for kind, name in kinds), kinds
    assert "Warning" not in "".join(output.get("text", "") for output in outputs(page))
    assert max(map(len, figures(page)), default=0) * 3 / 4 <= FIGURE_BYTES


@each
def test_the_page_is_that_of_the_source(source):
    page = nbformat.read(build.target(source), 4)
    nbformat.validate(page)
    told = [(cell.cell_type, cell.source) for cell in page.cells]
    assert told == build.cells(source.read_text()), f"python notebooks/build.py {source.name[:2]}"
    assert len(told) <= CELLS
    check_outputs(page)


@each
def test_cells_call_and_do_not_draw(source):
    code = [text for kind, text in build.cells(source.read_text()) if kind == "code"]
    assert code[0].startswith("import start"), "the first code cell finds picotron_lab"
    for text in code:
        found = DRAWING.search(text)
        assert not found, f"'{found.group()}' draws: call a function of picotron_lab.analysis"
        assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]


@each
def test_the_first_cell_draws_and_the_last_shows_a_contract(source):
    page = nbformat.read(build.target(source), 4)
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for output in code[0].outputs)
    assert re.search(r"contract|\.main\(\)", code[-1].source), "end with the technique's contract"
    assert code[-1].outputs


@pytest.mark.slow
@each
def test_it_runs_from_a_clean_kernel(source):
    """Figures are as many as in the committed page; what is printed may hold times."""
    page = build.run(build.notebook(source.read_text()))
    check_outputs(page)
    assert len(figures(page)) == len(figures(nbformat.read(build.target(source), 4)))


def test_cells_of_a_source():
    text = '"""Said nowhere."""\n# %% [markdown]\n# # A title\n#\n# $x$\n# %%\nimport start\n\n'
    assert build.cells(text) == [("markdown", "# A title\n\n$x$"), ("code", "import start")]
