"""Wrong programs that train and whose AdamW loss goes down: most shipped in a well-known
repository.

Each mutant is a function that breaks the library in one place, with `kills` naming the test that
must fail. tests/test_mutants.py applies one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Mutant:
    """A way to break the library, and the test that notices."""

    name: str
    what: str
    breaks: Callable[[pytest.MonkeyPatch], None]
    killed_by: str

    def is_killed_by(self, item: pytest.Item) -> bool:
        """Whether it names this test, or its function with any parameters."""
        node = f"{item.path.name}::{item.name}"
        return self.killed_by in (node, node.partition("[")[0])


def killed_by(test: str) -> Callable[[Callable], Mutant]:
    """Turn a breaking function into a Mutant; its docstring says what is wrong."""
    return lambda function: Mutant(function.__name__, function.__doc__, function, test)
