"""The house rules: what keeps every file readable in one sitting. One test per rule, for all files.

A rule is a function from a file to what it finds there; its docstring says why and what to do, and
ends its messages. Change a limit here, with a reason. test_house_examples.py shows what is caught.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("picotron_lab", "tests", "benchmarks", "lessons", "notebooks", ".github")
SUFFIXES = (".py", ".md", ".txt", ".toml", ".yml", ".yaml", ".json", ".ipynb")
LINES = {"picotron_lab/model.py": 200, "picotron_lab/trainer.py": 250}  # others 400, better 300
COLUMNS, FUNCTION_LINES, PARAMETERS, NESTING = 100, 40, 6, 3
FIELDS = ("Paper", "Idea", "Before", "After", "Wire", "Axes", "Dims", "Read", "Try")
BANNERS = [f"# ---- {s}" for s in ("1. the idea", "2. plain path", "3. fused path", "4. contract")]
TECHNIQUES = (
    "data_parallel zero tensor_parallel sequence_parallel context_parallel vocab_parallel "
    "expert_parallel pipeline_parallel token_pipeline mpmd"
)
# A file imports only from rows below its own. A package is one entry, but for the files named here.
LAYERS = (
    "run",
    "verify session analysis.speed_plots analysis.dryrun_show analysis.program_plots",
    "profile analysis.dryrun_time analysis.planner_show",
    "analysis.dryrun analysis.planner_plots",
    "analysis.planner",
    "analysis.planner_bounds",
    "trainer analysis.step_time",
    "build state generate analysis.layer_time analysis.this_machine analysis.planner_space",
    "token_times analysis.traffic",
    f"{TECHNIQUES} recompute fused",
    "zero_units hugging_face diagnose attention_blocks grouped_experts ulysses deferred",
    "pipeline_channels pipeline_vocabulary mpmd_actors mpmd_schedule",
    "pipeline_stages token_slices mpmd_worker",
    "optim precision checkpoint corpus data lab processes post_validation mpmd_program",
    "zero_rows mpmd_trace",
    "mesh sharding model log mpmd_record nobody analysis.clock_plots",
    "router",
    "comm options analysis.memory_plots",
    "analysis.memory",
    "heartbeat notes cases checks",
    "alone buffers baton clock partition",
    "analysis",
    "schedules",
    "config ledger dropout kernels __init__",
)
BUILDS_ON = ("sequence_parallel", "tensor_parallel")  # the one technique that extends another
RESERVED = {  # name -> the files that may use it
    "torch.distributed": "comm", "os.environ": "run comm", "os.getenv": "run comm",
    "triton": "kernels",
}  # fmt: skip
LIBRARY = r"picotron_lab/.*\.py|run\.py"
PROGRAM = LIBRARY + r"|(benchmarks|lessons)/.*\.py"
PYTHON, PROSE, ANY = r".*\.py", r".*\.md", r".*"
TECHNIQUE = rf"picotron_lab/({TECHNIQUES.replace(' ', '|')})\.py"
CHANGES = r"append|extend|insert|pop|popitem|remove|clear|update|setdefault|add|discard|sort"
CONTAINERS = r"list|dict|set|defaultdict|deque|Counter|OrderedDict|bytearray"
CONSTANT = r"_?[A-Z][A-Z0-9_]+"
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
Findings = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class Source:
    """One text file of the project."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def module(self) -> str:
        return self.name.removeprefix("picotron_lab/").removesuffix(".py").replace("/", ".")

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @cached_property
    def every_node(self) -> list[ast.AST]:
        return [*ast.walk(self.tree)]

    def nodes(self, *kinds: type) -> list:
        return [node for node in self.every_node if isinstance(node, kinds)]


# ---- what is imported


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import among the nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@cache
def layer(dotted: str) -> tuple[int, str]:
    """Row and entry of LAYERS for a name such as analysis.cost.flops_per_token; row -1: none."""
    rows = [row for row, names in enumerate(LAYERS) if dotted in names.split()]
    if rows or not dotted:
        return (rows[0], dotted) if rows else (-1, "")
    return layer(dotted.rpartition(".")[0])


def imports_go_down(source: Source) -> Findings:
    """A file should need only simpler ones: move the shared part down a layer (see LAYERS)."""
    row, mine = layer(source.module)
    if row < 0:
        yield 1, f"{source.module} has no place in LAYERS of tests/test_house.py"
    for line, name in imports(source.every_node):
        below, theirs = layer(name.removeprefix("picotron_lab."))
        down = below > row or theirs == mine or (mine, theirs) == BUILDS_ON
        if name.startswith(".") or (name.startswith("picotron_lab.") and not down):
            yield line, f"{mine} imports {name}, which is not below it"
        if mine == "schedules" and name.split(".")[0] == "torch":
            yield line, f"a schedule, which is plain data, imports {name}"


def kernels_are_lazy(source: Source) -> Findings:
    """Triton is absent on many machines: import a kernel in the fused function that calls it."""
    functions = source.nodes(ast.FunctionDef)
    lazy = {line for function in functions for line, _ in imports(ast.walk(function))}
    third = [i for i, text in enumerate(source.lines, 1) if text.startswith((*BANNERS[2:],))]
    for line, name in imports(source.every_node):
        fused = source.module == "fused" or third and third[0] < line < third[-1]
        inside = source.module.startswith("kernels") or (line in lazy and fused)
        if name.startswith("picotron_lab.kernels") and not inside:
            yield line, f"{name} is imported outside a function of fused code"


def reserved_names(source: Source) -> Findings:
    """Few files know the outside, so that all others run anywhere: call those, or take a value."""
    attributes = {(node.lineno, ast.unparse(node)) for node in source.nodes(ast.Attribute)}
    for line, name in sorted(attributes | {*imports(source.every_node)}):
        for reserved, files in RESERVED.items():
            mine = layer(source.module)[1] in files.split()
            if f"{name}.".startswith(f"{reserved}.") and not mine:
                yield line, f"{name} belongs to {files.replace(' ', ' and ')}"


def failures_are_seen(source: Source) -> Findings:
    """What is caught unnamed is lost: name the exception; import in the function that needs it."""
    for node in source.nodes(ast.Try, ast.With, ast.ExceptHandler):
        if isinstance(node, ast.ExceptHandler):
            found = [] if node.type else [(node.lineno, "except without a type")]
        else:
            guards = isinstance(node, ast.Try) or "suppress(" in ast.unparse(node.items[0])
            parts = [child for part in node.body for child in ast.walk(part)] if guards else []
            found = [(line, "an import whose failure is caught") for line, _ in imports(parts)]
        yield from found


# ---- state


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run once, for all ranks: of the module, its classes, its ifs and loops."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from run_at_import(getattr(node, "body", []) + getattr(node, "orelse", []))


def name_of(node: ast.AST | None) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


def no_shared_state(source: Source) -> Findings:
    """Ranks are threads that share every module: give and return values, or make it a CONSTANT."""
    yield from ((n.lineno, f"global {', '.join(n.names)}") for n in source.nodes(ast.Global))
    for node in run_at_import(source.tree.body):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        call = name_of(value.func) if isinstance(value, ast.Call) else ""
        mutable = isinstance(value, DISPLAYS) or re.fullmatch(CONTAINERS, call)
        for target in (getattr(node, "targets", None) or [node.target]) if mutable else ():
            if not re.fullmatch(rf"{CONSTANT}|__\w+__", name_of(target)):
                yield node.lineno, f"'{name_of(target)}' can change, and all ranks share it"


def constants_stay(source: Source) -> Findings:
    """Ranks are threads that share every constant: change a copy."""
    for node in source.nodes(ast.Subscript, ast.Call, ast.AugAssign):
        changed = None
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            changed = node.value
        elif isinstance(node, ast.Call) and re.fullmatch(CHANGES, name_of(node.func)):
            changed = getattr(node.func, "value", None)
        elif isinstance(node, ast.AugAssign):
            changed = node.target
        if re.fullmatch(CONSTANT, name_of(changed)):
            yield node.lineno, f"the constant {name_of(changed)} is changed"


# ---- size


def text_is_plain(source: Source) -> Findings:
    """Every screen and every machine should show and find the same: reword it."""
    for i, line in enumerate(source.lines, 1):
        if len(line) > COLUMNS and source.name.endswith(".py"):
            yield i, f"{len(line)} columns, at most {COLUMNS}"
        if "\t" in line:
            yield i, "a tab"
        if re.search(r"/(work|farm|root)/", line):
            yield i, "a path of somebody's machine"


def short_file(source: Source) -> Findings:
    """It is read in one sitting, better in 300 lines: find the second idea and give it a file."""
    limit = LINES.get(source.name, 400)
    if len(source.lines) > limit:
        yield limit + 1, f"{len(source.lines)} lines, at most {limit}"


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """Everything that a caller gives, *args and **kwargs too; not self, cls, ctx."""
    a = function.args
    every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return [arg for arg in every if arg and arg.arg not in ("self", "cls", "ctx")]


def depth(body: list[ast.stmt]) -> int:
    """How deep blocks are nested; elif is no deeper than its if."""
    deepest = 0
    for node in (node for node in body if isinstance(node, BLOCKS)):
        rest = getattr(node, "orelse", [])
        chain = isinstance(node, ast.If) and [n.col_offset for n in rest] == [node.col_offset]
        others = getattr(node, "handlers", []) + getattr(node, "cases", [])
        inner = [getattr(part, "body", []) for part in (node, *others)]
        inner += [getattr(node, "finalbody", []), [] if chain else rest]
        deepest = max(deepest, 1 + max(map(depth, inner)), depth(rest) if chain else 0)
    return deepest


def small_functions(source: Source) -> Findings:
    """A function is understood at a glance: name a part of it and make that a function."""
    for node in source.nodes(ast.FunctionDef):
        measures = (
            ("lines", node.end_lineno - node.lineno + 1, FUNCTION_LINES),
            ("parameters", len(parameters(node)), PARAMETERS),
            ("nested blocks", depth(node.body), NESTING),
        )
        for what, count, limit in measures if not is_kernel(node) else ():
            if count > limit:
                yield node.lineno, f"{node.name} has {count} {what}, at most {limit}"


# ---- what a reader is told


def techniques_read_alike(source: Source) -> Findings:
    """Who has read one technique finds the way in all: see data_parallel.py for the form."""
    for field in FIELDS:
        if not re.search(rf"(^| {{2,}}){field} ", source.docstring, re.M):
            yield 1, f"the header has no field {field}"
    if f"python -m picotron_lab.{source.module}" not in source.docstring:
        yield 1, f"the field Try does not say python -m picotron_lab.{source.module}"
    found = [line for line in source.lines if re.match(r"# ---- \d", line)]
    if len(found) != len(BANNERS) or not all(map(str.startswith, found, BANNERS)):
        yield 1, f"the banners are {found} instead of {BANNERS}"


def dims(source: Source) -> set[str]:
    """Capital letters of the Dims field, and of the file that it points to."""
    field = re.search(r"(?:^| {2,})Dims\b(.*(?:\n .*)*)", source.docstring, re.M)
    letters = set(re.findall(r"\b[A-Z]\b", field[1] if field else ""))
    for other in re.findall(r"as in (\w+\.py)", field[1] if field else ""):
        letters |= dims(read(ROOT / "picotron_lab" / other))
    return letters


def suffixes_are_defined(source: Source) -> Findings:
    """x_BTD tells its shape only to who knows the letters: add them to Dims in the header."""
    known = dims(source)
    for node in source.nodes(ast.Name, ast.arg):
        name = getattr(node, "id", None) or node.arg
        suffix = re.fullmatch(r"[a-z][a-z0-9_]*_([A-Za-z]*[A-Z][A-Za-z]*)", name)
        unknown = sorted(set(filter(str.isupper, suffix[1])) - known) if suffix else []
        if unknown:
            known |= {*unknown}  # each letter is reported once
            yield node.lineno, f"{', '.join(unknown)} of {name} is not in the field Dims"


def public(body: list[ast.stmt]) -> list[ast.FunctionDef]:
    """Public functions of a module or class, __init__ too; not Triton's kernels."""
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and not is_kernel(node)]
    return [node for node in functions if node.name[0] != "_" or node.name == "__init__"]


def classes(source: Source) -> list[ast.ClassDef]:
    return [n for n in source.tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]


def methods(source: Source) -> list[ast.FunctionDef]:
    return [method for owner in classes(source) for method in public(owner.body)]


def typed(source: Source) -> Findings:
    """Types are the part of the documentation that tools check: annotate it."""
    for function in public(source.tree.body) + methods(source):
        bare = [arg.arg for arg in parameters(function) if arg.annotation is None]
        if function.returns is None and function.name != "__init__":
            bare.append("the result")
        if bare:
            yield function.lineno, f"{function.name}: no type for {', '.join(bare)}"


def documented(source: Source) -> Findings:
    """Say shapes, units and errors once: here or, of a method, in its class, namesake or verb."""
    for node in public(source.tree.body) + classes(source):
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"
    verbs = methods(read(ROOT / "picotron_lab" / "comm.py"))
    told = {method.name for method in methods(source) + verbs if ast.get_docstring(method)}
    told |= set(re.findall(r"\w+", " ".join(ast.get_docstring(c) or "" for c in classes(source))))
    for method in methods(source):
        if method.name not in {*told, "forward", "__init__"}:
            yield method.lineno, f"method {method.name} has no docstring"


def asserts_speak(source: Source) -> Findings:
    """Who meets it asks what was given, what is needed and how to mend it: add a sentence."""
    silent = [node for node in source.nodes(ast.Assert) if node.msg is None]
    return ((node.lineno, "an assert without a message") for node in silent)


def names_existing_files(source: Source) -> Findings:
    """A wrong name stops a newcomer: mend the path (repository names go without backticks)."""
    prose = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), source.text, flags=re.S)
    folders = (ROOT, ROOT / "picotron_lab", (ROOT / source.name).parent)
    for match in re.finditer(r"`([^`\s]+)`|\]\(([^)\s]+)\)", prose):
        path = re.split(r"[:#]", match[1] or match[2])[0]
        made_or_meant = re.match(r"runs/|\.cache/|[/~]", path) or re.search(r"[<>*{}$…]|\bN", path)
        is_path = path.endswith((".py", ".md")) or "/" in path
        if is_path and not made_or_meant and not any((f / path).exists() for f in folders):
            yield prose.count("\n", 0, match.start()) + 1, f"{path} does not exist"


RULES = {
    imports_go_down: LIBRARY, kernels_are_lazy: LIBRARY, reserved_names: LIBRARY,
    failures_are_seen: PYTHON, no_shared_state: LIBRARY, constants_stay: LIBRARY,
    text_is_plain: ANY, short_file: PYTHON,
    small_functions: PYTHON, techniques_read_alike: TECHNIQUE, suffixes_are_defined: LIBRARY,
    typed: PROGRAM, documented: PROGRAM, asserts_speak: LIBRARY, names_existing_files: PROSE,
}  # fmt: skip


@cache
def read(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def complaints(rule, source: Source) -> list[str]:
    """What a rule finds in a file, as sentences."""
    try:
        return [f"{source.name}:{line}: {what}. {rule.__doc__}" for line, what in rule(source)]
    except SyntaxError as error:
        return [f"{source.name}: is not Python: {error}"]


PATHS = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
FILES = [read(path) for path in sorted(PATHS) if path.suffix in SUFFIXES and path.is_file()]


@pytest.fixture(scope="module")
def files():
    """Copies: their trees are large, and gone when the last rule has seen them."""
    return [replace(file) for file in FILES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule, files):
    seen = [file for file in files if re.fullmatch(RULES[rule], file.name)]
    assert seen, f"{rule.__name__} looks at no file: mend its pattern in RULES"
    found = [line for file in seen for line in complaints(rule, file)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)
