"""Training speed on one CUDA GPU: 1B-class Llamas in bf16, our paths and Hugging Face's.

    python benchmarks/train_one_gpu.py --json results.json
    python benchmarks/train_one_gpu.py --smoke              a tiny model, 2 steps, on any device

MFU = tokens/s * FLOPs per token / peak of the GPU, with FLOPs per token = 6 N + 12 L H C T:
N weights that a token is multiplied with (a tied embedding counts once, as the head), L layers,
H heads of width C, T tokens per sequence. "causal" counts half of the second term, the half that
must be computed.
Every row is a fresh process: 5 steps of warm-up, 15 timed by CUDA events, random tokens.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import GIB, ROOT, cpu_hardware, describe, markdown

ROWS = ("ours-plain", "ours-fused", "ours-fused-compiled", "hugging-face-sdpa")
# preset -> (micro-batches for the plain path, sequences per step, tokens per sequence): plain
# attention keeps all T x T scores, and those of a whole batch fit on no GPU
MODELS = {"llama3.2-1b": (4, 4, 4096), "smollm-1.7b": (4, 8, 2048)}
SMOKE = {"tiny": (2, 4, 64)}
HEADER = ("row", "model", "micro-batches x sequences x tokens", "tokens/s", "MFU", "causal",
          "peak GiB", "first loss", "last loss")  # fmt: skip


def run_row(row: str, model: str, batch: tuple[int, int, int], steps: list[str]) -> dict:
    """The figures of a row, from a process of its own; {row, model, skipped} if there are none."""
    if row == "hugging-face-sdpa" and importlib.util.find_spec("transformers") is None:
        return {"row": row, "model": model, "skipped": "pip install transformers"}
    print(f"running {row} on {model}", file=sys.stderr)
    module = [sys.executable, "-m", "benchmarks.one_gpu_row", row, "--model", model]
    parts = batch[0] if row == "ours-plain" else 1
    sizes = ["--micro-batches", str(parts), "--micro-batch-size", str(batch[1] // parts)]
    sizes += ["--sequence-length", str(batch[2])]
    done = subprocess.run([*module, *sizes, *steps], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr else "no reason given"
        return {"row": row, "model": model, "skipped": f"failed: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])


def table_line(result: dict) -> list[str]:
    """One line of the table."""
    if "skipped" in result:
        return [result["row"], result["model"], result["skipped"], *[""] * (len(HEADER) - 3)]
    shares = ["unknown" if result[k] is None else f"{result[k]:.1%}" for k in ("mfu", "mfu_causal")]
    batch, memory = " x ".join(map(str, result["batch"])), result["peak_memory_bytes"] / GIB
    losses = [f"{result['first_loss']:.3f}", f"{result['last_loss']:.3f}"]
    speed = f"{result['tokens_per_second']:,.0f}"
    return [result["row"], result["model"], batch, speed, *shares, f"{memory:.1f}", *losses]


def main() -> int:
    """Run all rows and print the table, then the JSON; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="see that it works, measure nothing")
    parser.add_argument("--json", type=Path, help="a file for all figures, of every step")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.smoke:
        print("Nothing was measured: this benchmark needs a CUDA GPU, and torch finds none here.")
        return 0
    steps = ["--warm-up", "1", "--steps", "2"] if args.smoke else []
    models = SMOKE if args.smoke else MODELS
    results = [run_row(r, model, batch, steps) for model, batch in models.items() for r in ROWS]
    print(describe(torch.cuda.get_device_name() if cuda else cpu_hardware()), "\n")
    print(markdown(HEADER, [table_line(result) for result in results]), "\n")
    print(json.dumps(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in result.get("skipped", "") for result in results))


if __name__ == "__main__":
    sys.exit(main())
