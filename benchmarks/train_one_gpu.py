"""Training speed on one CUDA GPU: Llamas in bf16, our paths beside Hugging Face's.

    python benchmarks/train_one_gpu.py --json results.json
    python benchmarks/train_one_gpu.py --models A C --rows ours-fused hugging-face
    python benchmarks/train_one_gpu.py --smoke              a tiny model, 2 steps, on any device

Models   A SmolLM-1.7B, B Llama-3.2-1B, C 8 layers as wide as Llama 3 8B; nothing is recomputed
Rows     compiled: each layer by torch.compile, the rest of the model as it is. liger: Liger's rope,
         RMSNorm, SwiGLU and fused linear cross-entropy in Hugging Face's model
MFU      tokens/s * FLOPs per token / peak of the GPU, with FLOPs per token = 6 N + 12 L H C T:
         N weights that a token is multiplied with (a tied embedding counts once, as the head),
         L layers, H heads of width C, T tokens per sequence. "causal" counts half of the second
         term, the half that must be computed
Step     a second table: shares of the time of one step that torch.profiler records. The profiler
         slows the CPU, so idle is more than in the steps that were timed
Bars     what ours-fused should reach beside the others, and whether it did; not from --smoke
Every row is a fresh process: 5 steps of warm-up, 15 timed by CUDA events, random tokens. Expect
about 4 minutes for a model, half of them for the compiled rows.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import GIB, ROOT, cpu_hardware, describe, markdown

sys.path.insert(0, str(ROOT))

from benchmarks.one_gpu_row import ROWS  # noqa: E402
from picotron_lab.analysis import memory, trace_time  # noqa: E402
from picotron_lab.config import PRESETS, MeshConfig, TrainConfig  # noqa: E402

HEADER = ("row", "model", "micro-batches x sequences x tokens", "tokens/s", "MFU", "causal",
          "peak GiB", "first loss", "last loss")  # fmt: skip
SHOWN = tuple(name for name in trace_time.CATEGORIES if not name.startswith("communication"))
STEP_HEADER = ("row", "model", *SHOWN, "ms", "CPU waits for GPU", "attention computed by")
ROW_SECONDS = 240  # after which a row is given up: others may still be measured


@dataclass(frozen=True)
class Setup:
    """A model and what one step trains it on.

    parts    micro-batches for the plain path, which keeps all T x T scores; others take 1
    layers   of the preset's, if not all
    """

    preset: str
    sequences: int
    length: int
    parts: int
    layers: int = 0

    def shape(self, row: str) -> tuple[int, int, int]:
        """(micro-batches, sequences in each, tokens per sequence)."""
        parts = self.parts if row == "ours-plain" else 1
        return parts, self.sequences // parts, self.length

    def plain_bytes(self) -> int:
        """Predicted peak of the plain path (analysis/memory.py)."""
        cfg, (_, size, length) = PRESETS[self.preset], self.shape("ours-plain")
        training = TrainConfig(
            global_batch_size=self.sequences, micro_batch_size=size, sequence_length=length,
            dtype="bfloat16", impl="plain",
        )  # fmt: skip
        cfg = replace(cfg, layers=self.layers or cfg.layers)
        return memory.predict(cfg, MeshConfig(), training, 0, kernels=True).peak


MODELS = {
    "A": Setup("smollm-1.7b", 8, 2048, 4),
    "B": Setup("llama3.2-1b", 4, 4096, 4),
    "C": Setup("llama3-8b", 2, 8192, 2, layers=8),
}
SMOKE = {"tiny": Setup("tiny", 2, 32, 2)}

# ---- rows


def reason_to_skip(row: str, setup: Setup, gpu_bytes: int) -> str:
    """Why a row cannot be measured here, or nothing. gpu_bytes: memory of the GPU; 0: none."""
    needs = ["transformers"] * row.startswith("hugging-face") + ["liger_kernel"] * ("liger" in row)
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"skipped: pip install {' '.join(absent)}"
    if not gpu_bytes:
        never = {"compiled": "compiling takes minutes", "liger": "Liger's kernels need a CUDA GPU"}
        return next((f"left out: {why}" for end, why in never.items() if row.endswith(end)), "")
    if row == "ours-plain" and (need := setup.plain_bytes()) > gpu_bytes:
        return f"does not fit: with all T x T scores {need / GIB:.0f} GiB are predicted"
    return ""


def run_row(row: str, name: str, setup: Setup, steps: Sequence[str]) -> dict:
    """The figures of a row, from a process of its own; {row, setup, model, skipped} if there are
    none."""
    print(f"running {row} on {name}", file=sys.stderr, flush=True)
    parts, size, length = setup.shape(row)
    command = [sys.executable, "-m", "benchmarks.one_gpu_row", row, "--model", setup.preset]
    command += ["--layers", str(setup.layers), "--micro-batches", str(parts)]
    command += ["--micro-batch-size", str(size), "--sequence-length", str(length), *steps]
    said, failure = finish(command)
    found = [line for line in said.splitlines() if line.startswith("{")]
    if not found:
        return {"row": row, "setup": name, "model": setup.preset, "skipped": f"failed: {failure}"}
    result = {"setup": name, **json.loads(found[-1])}
    return result | {"profile_failed": failure} if failure else result


def finish(command: list[str]) -> tuple[str, str]:
    """What a process printed, and why it failed, if it did."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaint:
        try:
            failed = subprocess.run(
                command, cwd=ROOT, timeout=ROW_SECONDS, stdout=said, stderr=complaint
            ).returncode
            late = ""
        except subprocess.TimeoutExpired:
            failed, late = 1, f"not done after {ROW_SECONDS} s"
        said.seek(0)
        complaint.seek(0)
        lines = complaint.read().strip().splitlines() or ["no reason given"]
        return said.read(), (late or lines[-1]) if failed else ""


def measure(
    models: dict[str, Setup], rows: Sequence[str], steps: Sequence[str], path: Path | None
) -> list[dict]:
    """All rows of all models; the file has, after each row, what there is so far."""
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    results = []
    for name, setup in models.items():
        for row in rows:
            reason = reason_to_skip(row, setup, gpu)
            where = {"row": row, "setup": name, "model": setup.preset}
            results.append(
                {**where, "skipped": reason} if reason else run_row(row, name, setup, steps)
            )
            if path:
                path.write_text(json.dumps(for_file(results), indent=1) + "\n")
    return results


def for_file(results: Sequence[dict]) -> list[dict]:
    """As the file has them: scaling.py scales the rows of whole models, so those of a model with
    fewer layers have another name, such as 'ours-fused, 8 layers'."""
    names = [
        f"{r['row']}, {r['layers']} layers"
        if "skipped" not in r and r["layers"] != PRESETS[r["model"]].layers
        else r["row"]
        for r in results
    ]
    return [{**r, "row": name} for r, name in zip(results, names, strict=True)]


# ---- tables


def called(result: dict) -> str:
    """A row's model, such as 'C llama3-8b, 8 layers'."""
    layers = result.get("layers", PRESETS[result["model"]].layers)
    cut = f", {layers} layers" * (layers != PRESETS[result["model"]].layers)
    return f"{result['setup']} {result['model']}{cut}"


def table_line(result: dict) -> list[str]:
    """One line of the table."""
    if "skipped" in result:
        return [result["row"], called(result), result["skipped"], *[""] * (len(HEADER) - 3)]
    shares = ["unknown" if result[k] is None else f"{result[k]:.1%}" for k in ("mfu", "mfu_causal")]
    batch, memory_used = " x ".join(map(str, result["batch"])), result["peak_memory_bytes"] / GIB
    losses = [f"{result['first_loss']:.3f}", f"{result['last_loss']:.3f}"]
    speed = f"{result['tokens_per_second']:,.0f}"
    return [result["row"], called(result), batch, speed, *shares, f"{memory_used:.1f}", *losses]


def step_line(result: dict) -> list[str]:
    """One line of the table of a profiled step."""
    named = [result["row"], called(result)]
    if "profile" not in result:
        reason = result.get("profile_failed", "no profile")
        return [*named, reason, *[""] * (len(STEP_HEADER) - 3)]
    seconds, waits = result["profile"]["seconds"], result["host_synchronisations"]
    whole = sum(seconds.values())
    shares = [f"{seconds[category] / whole:.1%}" for category in SHOWN]
    waited = "no GPU" if waits is None else str(waits)
    return [*named, *shares, f"{1e3 * whole:.1f}", waited, attention(result["profile"])]


def attention(profile: dict) -> str:
    """Who computed attention: whether cuDNN did, and the kernel that took longest."""
    names = profile["attention"]
    if not names:
        return "matrix products and softmax"
    maker = "cuDNN: " if any("cudnn" in name.lower() for name in names) else ""
    return f"{maker}`{names[0][:60]}`".replace("|", "/")


# ---- bars

US, LIGER = "ours-fused", "hugging-face-liger"
SPEED, MEMORY = "tokens_per_second", "peak_memory_bytes"
RATIOS = {  # tokens/s of ours-fused over those of the row, by model
    "hugging-face": {"A": 1.12, "B": 1.12, "C": 1.07},
    LIGER: {"A": 1.0, "B": 1.0, "C": 1.0},
    "hugging-face-compiled": {"A": 0.98, "B": 0.98, "C": 0.98},
}
H200_SPEED = {"A": 47_000}  # tokens/s


def verdicts(results: Sequence[dict]) -> list[str]:
    """A line for each bar: the figure, the bar, reached or missed; or what was not measured."""
    found = {(r["setup"], r["row"]): r for r in results if "skipped" not in r}
    lines = []
    for model in MODELS:
        row_of = {row: found.get((model, row)) for row in (US, *RATIOS)}
        for row, bars in RATIOS.items():
            figure = ratio(row_of[US], row_of[row], SPEED)
            lines.append(say(f"{model}: tokens/s of {US} / {row}", figure, bars[model], ".3f"))
        if model in H200_SPEED:
            figure = row_of[US][SPEED] if row_of[US] and "H200" in row_of[US]["device"] else None
            what = f"{model}: tokens/s of {US} on an H200"
            lines.append(say(what, figure, H200_SPEED[model], ",.0f"))
        figure = ratio(row_of[LIGER], row_of[US], MEMORY)
        lines.append(say(f"{model}: peak memory of {LIGER} / {US}", figure, 1.0, ".3f"))
    return lines


def ratio(first: dict | None, second: dict | None, key: str) -> float | None:
    """One row's figure over another's, or None if one of the rows is missing."""
    return first[key] / second[key] if first and second else None


def say(what: str, figure: float | None, bar: float, form: str) -> str:
    """Figure, bar and verdict, as a sentence."""
    if figure is None:
        return f"{what}: not measured; bar {bar:{form}}"
    return f"{what}: {figure:{form}}, bar {bar:{form}}: {'reached' if figure >= bar else 'missed'}"


# ---- the command


def options() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--smoke", action="store_true", help="see that it works, measure nothing")
    parser.add_argument("--json", type=Path, help="a file for all figures, of every step")
    return parser.parse_args()


def main() -> int:
    """Run all rows, print tables and bars; 1 if a row failed."""
    args = options()
    cuda = torch.cuda.is_available()
    if not cuda and not args.smoke:
        print("Nothing was measured: this benchmark needs a CUDA GPU, and torch finds none here.")
        return 0
    steps = ["--warm-up", "1", "--steps", "2"] if args.smoke else []
    models = SMOKE if args.smoke else {name: MODELS[name] for name in args.models}
    results = measure(models, args.rows, steps, args.json)
    print(describe(torch.cuda.get_device_name() if cuda else cpu_hardware()), "\n")
    print(markdown(HEADER, map(table_line, results)), "\n")
    ran = [result for result in results if "skipped" not in result]
    print(markdown(STEP_HEADER, map(step_line, ran)))
    if not args.smoke:
        print("", *verdicts(results), sep="\n- ")
    failed = [r for r in results if "failed" in r.get("skipped", "") or "profile_failed" in r]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
