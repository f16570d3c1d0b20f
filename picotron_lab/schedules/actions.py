"""Action: one thing that a rank does in a training step; a schedule lists them for every rank.

Kinds   F forward   B backward for the input   W backward for the weights   BW both at once
        S, T the output-vocabulary passes   IF, IB the input-embedding passes
        G gather parameters   R reduce gradients (data parallelism)
Written F2.3 is the forward of stage 2 on micro-batch 3, F2.3/1 of its slice 1; S.3 has no stage;
        R0 and G0 have no micro-batch
"""

from dataclasses import dataclass

KINDS = ("F", "B", "W", "BW", "S", "T", "IF", "IB", "G", "R")


@dataclass(frozen=True)
class Action:
    """What to do (kind), to which part of the model (stage), with which part of the batch."""

    kind: str
    stage: int = 0
    microbatch: int = 0
    slice: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"an action's kind is one of {', '.join(KINDS)}, not '{self.kind}'.")

    def __str__(self) -> str:
        if self.kind in ("G", "R"):
            return f"{self.kind}{self.stage}"
        stage = "" if self.kind in ("S", "T", "IF", "IB") else self.stage
        part = f"/{self.slice}" if self.slice else ""
        return f"{self.kind}{stage}.{self.microbatch}{part}"


def last_backwards(actions: list[Action]) -> set[int]:
    """Indices of the actions that complete a stage's gradients: its last BW or W of the list."""
    last = {a.stage: i for i, a in enumerate(actions) if a.kind in ("BW", "W")}
    return set(last.values())
