"""What the house rules must catch, and leave alone: a rule that cannot fail is none."""

import re

import pytest
from test_house import COLUMNS, FILES, RULES, Source, complaints

ZERO, RUN, README = "picotron_lab/zero.py", "run.py", "README.md"
MACHINE_PATH = "/".join(["see ", "root", "file.txt"])  # in one piece it would break the rule here
LONG = "def f():\n" + "    x = 1\n" * 40
DEEP = "def f():\n for a in b:\n  while a:\n   with a:\n    if a:\n     a()\n"
DEEP_HANDLER = (
    "def f():\n for a in b:\n  try:\n   a()\n  except E:\n   if a:\n    a()\n   else:\n"
    "    if b:\n     a()\n"
)
HEADER = '''"""One technique: a header as it should be.

Paper   somebody
Idea    something
Before  this            After   that
Wire    nothing
Axes    dp: ranks       Dims    B batch, T: sequence
        D width
Read    f
Try     python -m picotron_lab.zero
"""
'''
BANNERS = """# ---- 1. the idea
# ---- 2. plain path (obvious)
# ---- 3. fused path (CUDA)
# ---- 4. contract
"""
LATE_KERNEL = BANNERS + "def f():\n    from picotron_lab.kernels import norm"
BAD = {  # rule -> (file, text) that it must catch
    "imports_go_down": [
        (ZERO, "import picotron_lab.data_parallel"),
        (ZERO, "from picotron_lab import trainer"),
        (ZERO, "def f():\n    from picotron_lab.verify import a"),
        (ZERO, "from . import comm"),
        ("picotron_lab/tensor_parallel.py", "from picotron_lab import sequence_parallel"),
        ("picotron_lab/comm.py", "from picotron_lab.mesh import Mesh"),
        ("picotron_lab/analysis/cost.py", "from picotron_lab.trainer import Trainer"),
        ("picotron_lab/unheard_of.py", "x = 1"),
        ("picotron_lab/schedules/basic.py", "import torch"),
        ("picotron_lab/schedules/basic.py", "from torch import nn"),
    ],
    "kernels_are_lazy": [
        ("picotron_lab/fused.py", "from picotron_lab.kernels import norm"),
        ("picotron_lab/model.py", "def f():\n    import picotron_lab.kernels.norm"),
        (ZERO, LATE_KERNEL),
    ],
    "reserved_names": [
        (ZERO, "import torch.distributed as dist"),
        (ZERO, "from torch import distributed"),
        (ZERO, "rank = torch.distributed.get_rank()"),
        (ZERO, "def f():\n    return os.environ['RANK']"),
        (ZERO, "from os import environ"),
        (ZERO, "rank = os.getenv('RANK')"),
        ("picotron_lab/fused.py", "import triton.language as tl"),
    ],
    "failures_are_seen": [
        (RUN, "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        (RUN, "with suppress(ImportError):\n    import triton"),
        (RUN, "try:\n    f()\nexcept:\n    pass"),
    ],
    "no_shared_state": [
        (ZERO, "def f():\n    global a\n    a = 1"),
        (ZERO, "cache = {}"),
        (ZERO, "cache: dict[str, int] = dict()"),
        (ZERO, "seen = collections.deque()"),
        (ZERO, "if a:\n    seen = [i for i in b]"),
        (ZERO, "class A:\n    seen = set()"),
    ],
    "constants_stay": [
        (ZERO, "def f():\n    CACHE['a'] = 1"),
        (ZERO, "def f():\n    del CACHE['a']"),
        (ZERO, "def f():\n    config.CACHE['a'] += 1"),
        (ZERO, "def f():\n    CACHE.append(1)"),
        (ZERO, "CACHE |= {1: 2}"),
    ],
    "text_is_plain": [(RUN, "x" * (COLUMNS + 1)), (README, "a\tb"), (README, MACHINE_PATH)],
    "short_file": [
        (ZERO, "\n" * 401),
        ("picotron_lab/model.py", "\n" * 201),
        ("picotron_lab/trainer.py", "\n" * 251),
    ],
    "small_functions": [
        (RUN, LONG),
        (RUN, "class A:\n    def f(self, a, b, c, d, *e, f=0, **g): pass"),
        (RUN, DEEP),
        (RUN, DEEP_HANDLER),
    ],
    "techniques_read_alike": [
        (ZERO, BANNERS),
        (ZERO, HEADER),
        (ZERO, HEADER.replace("Wire ", "Sent ") + BANNERS),
        (ZERO, HEADER.replace(".zero", ".mpmd") + BANNERS),
        (ZERO, HEADER + BANNERS.replace("2.", "3.")),
    ],
    "suffixes_are_defined": [
        (ZERO, f"{HEADER}x_BTF = 1"),
        (ZERO, f"{HEADER}def f(x_nF): pass"),
        (ZERO, "x_B = 1"),
    ],
    "typed": [
        (RUN, "def f(a) -> None: pass"),
        (RUN, "def f(a: int): pass"),
        (RUN, "class A:\n    def __init__(self, a): pass"),
        (RUN, "class A:\n    def f(self, *a) -> None: pass"),
    ],
    "documented": [
        (RUN, "def f() -> None: pass"),
        (RUN, "class A: pass"),
        (RUN, "class A:\n    '''A.'''\n    def f(self): pass"),
    ],
    "asserts_speak": [(RUN, "assert x")],
    "names_existing_files": [
        (README, "see `picotron_lab/unheard_of.py`"),
        (README, "see [this](unheard_of.md#part)"),
        (README, "see `lessons/99_unheard_of/`"),
        (README, "see `UNHEARD_OF.md`"),
    ],
}
GOOD_TECHNIQUE = f'''{HEADER}
from picotron_lab import comm

# ---- 1. the idea
_NAMES = {{"a": 1}}
Pieces = list[int]
# ---- 2. plain path (obvious)
# ---- 3. fused path (CUDA)
def f(x_BTD: Tensor, y_nD: Tensor, names: list[str], *rest: int) -> None:
    """All that is needed."""
    from picotron_lab.kernels import norm
    assert names, "names are empty; give one."
    if a: pass
    elif b: pass
    elif c: pass
    elif d: pass
    local = []
    local.append(_NAMES["a"])
# ---- 4. contract
class A(nn.Module):
    """Has one verb, `wait`."""
    def __init__(self, x: int): self.x = [x]
    def forward(self, x_BTD: Tensor) -> Tensor: pass
    def wait(self) -> None: pass
    def all_reduce(self) -> None: pass
    def _inner(self, a): pass
'''
GOOD = {
    ZERO: GOOD_TECHNIQUE,
    "picotron_lab/tensor_parallel.py": "from picotron_lab.schedules.basic import one_f_one_b",
    "picotron_lab/analysis/dryrun.py": "from picotron_lab.trainer import Trainer",
    "picotron_lab/schedules/basic.py": "from picotron_lab.schedules.actions import Action",
    "picotron_lab/fused.py": "def _f():\n    from picotron_lab.kernels import norm",
    "picotron_lab/kernels/norm.py": (
        "import triton\n@triton.jit\ndef f(a, b, c, d, e, f, g):\n" + "    a = 1\n" * 50
    ),
    "picotron_lab/comm.py": "import os\nimport torch.distributed as dist\nos.environ['RANK']",
    README: "`run.py`, [model](picotron_lab/model.py#x), `runs/a/b`, `NN_name/x.md`, `a b/c`",
}
EXAMPLES = [(rule, *example) for rule, examples in BAD.items() for example in examples]


@pytest.mark.parametrize(("rule", "name", "text"), EXAMPLES)
def test_rule_catches(rule, name, text):
    function = next(r for r in RULES if r.__name__ == rule)
    found = complaints(function, Source(name, text))
    assert found, f"{rule} finds nothing wrong in {text!r}"
    assert all(re.match(rf"{name}:\d+: .+\. .+", line) for line in found), found


def test_every_rule_has_an_example():
    assert {rule.__name__ for rule in RULES} == set(BAD)


@pytest.mark.parametrize("name", GOOD)
def test_good_text_passes(name):
    skipped = () if name == ZERO else ("techniques_read_alike",)  # the others show one line only
    rules = [r for r, scope in RULES.items() if re.fullmatch(scope, name)]
    source = Source(name, GOOD[name])
    wrong = [complaints(rule, source) for rule in rules if rule.__name__ not in skipped]
    assert not any(wrong), wrong


def test_files_were_found():
    """With an empty list of files every rule would pass."""
    names = {file.name for file in FILES}
    assert {RUN, "picotron_lab/comm.py", "picotron_lab/schedules/basic.py"} <= names
