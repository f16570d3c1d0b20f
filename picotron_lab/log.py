"""What a run shows while it goes on: a live line for people, metrics.jsonl for programs."""

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

MIB = 2**20


class Log:
    """Rank 0's log. Other ranks use it too and nothing happens.

    Line of metrics.jsonl, one per step: step, loss, grad_norm (before clipping), lr, tokens
    (counted labels of the global batch), tokens_per_second, mfu or null, peak_memory_bytes,
    sent_bytes {axis: payload bytes of this rank}, and validation_loss after steps that were
    validated.
    """

    def __init__(self, path: Path, first_step: int, steps: int, active: bool):
        self.path, self._active = path, active
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_before(path, first_step)
        self._file = path.open("a")
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, metrics: dict[str, Any]) -> None:
        """One step is done."""
        if not self._active:
            return
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(summary(metrics), refresh=False)
        self._bar.update()

    def say(self, sentence: str) -> None:
        """Print a sentence above the live line."""
        if self._active:
            self._bar.write(sentence)

    def close(self) -> None:
        """The run is over."""
        if self._active:
            self._bar.close()
            self._file.close()


def summary(metrics: dict[str, Any]) -> str:
    """The live line's text."""
    words = [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tok/s"]
    if metrics["mfu"] is not None:
        words.append(f"MFU {metrics['mfu']:.1%}")
    words.append(f"mem {metrics['peak_memory_bytes'] / MIB:,.0f} MiB")
    if metrics.get("dropped_choices"):
        words.append(f"dropped {metrics['dropped_choices']} choices")
    sent = sum(metrics["sent_bytes"].values())
    if sent:
        words.append(f"payload {sent / MIB:,.1f} MiB/step")
    return "  ".join(words)


def _keep_before(path: Path, step: int) -> None:
    """Drop lines of steps that will be done again after a resume, and a half-written last line."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if _step_of(line) < step))


def _step_of(line: str) -> float:
    """The step of a line; infinite if it is half-written or not ours."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
