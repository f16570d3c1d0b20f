"""Rules: what exercise.py may import and use, read from its text before anything runs.

Not a wall: a fence that says what the exercise is about. Who needs a wall runs it elsewhere.
Tests  tests/test_lesson_kit.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

DATA_TYPES = (
    "collections", "dataclasses", "typing", "functools", "itertools", "contextlib", "weakref",
    "random", "heapq", "copy", "math", "abc", "enum", "operator", "bisect",
)  # fmt: skip
TENSORS = ("torch", "numpy", "einops")
ANSWERS = (
    "torch.distributed", "torch.nn.parallel", "torch.testing", "torch.utils.checkpoint", "torch._",
)  # fmt: skip
WAYS_OUT = ("importlib", "sys", "os", "_sys", "_os", "f_builtins", "f_globals", "tb_frame")
NAMES = ("__import__", "exec", "eval", "open", "compile", "globals", "__builtins__")
BY_TEXT = ("vars", "getattr", "setattr", "delattr")
ATTRIBUTES = ("ledger", "_world", "_clock", "__globals__", "__builtins__", "__subclasses__")


def broken_rules(path: Path, allowed: tuple[str, ...]) -> list[str]:
    """Sentences about an exercise, with line, what and why; none: it may run.

    allowed  modules of this lesson
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return [f"line {error.lineno} of {path.name} is not Python: {error.msg}."]
    except UnicodeDecodeError:
        return [f"{path.name} is not text in UTF-8: save it so."]
    found = [*_imports(tree, allowed), *_uses(tree), *_changes(tree)]
    return [f"line {line}: {sentence}" for line, sentence in sorted(found)]


def _imports(tree: ast.Module, allowed: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            why = _refusal(name, allowed)
            if why:
                yield node.lineno, f"import of {name}: {why}"


def _refusal(name: str, allowed: tuple[str, ...]) -> str:
    """Why a dotted name may not be imported; empty: it may."""
    if _within(name, (*allowed, "lessons.TODO")):
        return ""
    if name.startswith(ANSWERS) or _within(name, ("picotron_lab",)):
        own = f"; this lesson gives you {', '.join(allowed)}" if allowed else ""
        return f"that import is the answer{own}."
    if _within(name, TENSORS + DATA_TYPES) and name.rpartition(".")[2] not in WAYS_OUT:
        return ""
    known = ", ".join(TENSORS + allowed)
    return f"a lesson needs only {known} and the standard library's data types."


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _changes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Whatever is put into, or taken from, what was imported."""
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    every = [alias.asname or alias.name for node in imports for alias in node.names]
    imported = {name.partition(".")[0] for name in every}
    for node in ast.walk(tree):
        place = isinstance(node, ast.Attribute | ast.Subscript)
        if place and isinstance(node.ctx, ast.Store | ast.Del) and _owner(node) in imported | {""}:
            yield (
                node.lineno,
                f"{ast.unparse(node)} is changed: what is imported, or a type, is the same for all "
                "ranks and for the check; keep what you need in names of your own.",
            )


def _owner(node: ast.expr) -> str:
    """The name at the left of a.b[c].d; empty: a type, as in type(a).b or a.__class__.b."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute) and node.attr == "__class__":
            return ""
        node = node.value
    if isinstance(node, ast.Name):
        return node.id
    return "" if isinstance(node, ast.Call) and ast.unparse(node.func) == "type" else "?"


def _uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in NAMES:
            yield node.lineno, f"{node.id}: an exercise needs no other code, files or names."
        if isinstance(node, ast.Name) and node.id in BY_TEXT:
            yield node.lineno, f"{node.id}: write the attribute's name itself, as in x.name."
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if node.attr in ATTRIBUTES:
                yield node.lineno, f"{dotted}: that is what measures you; use the axis's verbs."
            if node.attr in WAYS_OUT:
                yield node.lineno, f"{dotted}: that leads out of the exercise, which needs nothing."
            if dotted.startswith(ANSWERS):
                yield node.lineno, f"{dotted}: that is the answer; write it with the axis's verbs."
