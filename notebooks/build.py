"""Builds the notebooks: python notebooks/build.py [01 05 ...], all without arguments.

Idea    A notebook is hard to review and to merge, a Python file is not. So the source of notebook
        NN is src/NN_name.py, cells between lines `# %%` (code) and `# %% [markdown]`; this program
        runs the cells in a clean kernel, in this folder, and writes NN_name.ipynb with all they
        print and draw. Edit the source, build, look at the page, commit both.
Errors  a cell that raises stops the build, with its traceback, and the old notebook stays
Needs   nbformat and nbclient, which jupyter brings
Tests   tests/test_notebooks.py
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SECONDS = 120  # that one cell may take
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """Every notebook's source, in order."""
    return sorted(HERE.glob("src/[0-9][0-9]_*.py"))


def target(source: Path) -> Path:
    """Where the notebook of a source is."""
    return HERE / f"{source.stem}.ipynb"


def cells(text: str) -> list[tuple[str, str]]:
    """("code" or "markdown", source) of each cell; what comes before the first is left out."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        elif found:
            found[-1][1].append(line)
    return [(kind, _source(kind, lines)) for kind, lines in found]


def _source(kind: str, lines: list[str]) -> str:
    """Markdown is written in comments."""
    if kind == "markdown":
        lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
    return "\n".join(lines).strip()


def notebook(text: str) -> nbformat.NotebookNode:
    """The notebook of a source, before it is run."""
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    page = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    page.cells = [make[kind](source) for kind, source in cells(text)]
    for number, cell in enumerate(page.cells):
        cell["id"] = f"cell-{number}"  # not a random one: a rebuilt notebook differs where it must
    return page


def run(page: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in a clean kernel and keep what they print and draw."""
    NotebookClient(
        page, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": str(HERE)}}
    ).execute()
    page.metadata = {"kernelspec": KERNEL}  # not the version of whoever built it
    return page


def main() -> None:
    """Build the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description="Run the notebooks and write them with outputs.")
    parser.add_argument("numbers", nargs="*", help="such as 01 05; without: all")
    numbers = parser.parse_args().numbers
    known = {source.name[:2]: source for source in sources()}
    if unknown := [number for number in numbers if number not in known]:
        parser.error(f"there is no notebook {unknown[0]}: choose from {', '.join(known)}.")
    for number in numbers or known:
        start = time.perf_counter()
        page = run(notebook(known[number].read_text()))
        nbformat.write(page, target(known[number]))
        print(f"{target(known[number]).name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
