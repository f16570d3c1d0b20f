"""Compile every Triton kernel for sm_90 (H100, H200), with or without a GPU; print JSON facts.

Runs as a program of its own, because a kernel decorated under TRITON_INTERPRET=1 cannot be
compiled. Per case: registers per thread, bytes of stack and local memory (spilled registers), how
often the machine code's PTX names each kind of global load and store, and the order of global
accesses and barriers.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import test_kernels_adamw
import test_kernels_merge
import test_kernels_permute
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from picotron_lab.kernels import norm, rope, swiglu, vocab

BF16, FP32 = "*bf16", "*fp32"


def norm_cases() -> dict:
    """Name -> (kernel, argument types, constants, warps), for small and large widths."""
    cases = {}
    for dtype, width in ((BF16, 2048), (BF16, 3072), (BF16, 16384), (FP32, 16384)):
        block, warps = norm._block_and_warps(width)
        constants = {"D": width, "BLOCK": block}
        types = dict.fromkeys(norm._forward_kernel.arg_names, dtype)
        types |= {"rstd_ptr": FP32, "eps": "fp32"}
        cases[f"add_rms_norm {dtype} {width}"] = (norm._forward_kernel, types, constants, warps)
        types = dict.fromkeys(norm._backward_kernel.arg_names, dtype)
        types |= {"rstd_ptr": FP32, "partial_ptr": FP32, "n_rows": "i32"}
        cases[f"rms_norm_backward {dtype} {width}"] = (
            norm._backward_kernel, types, constants, warps
        )
    constants = {"D": 2048, "BLOCK": 2048, "delta_ptr": None, "s_ptr": None}
    types = dict.fromkeys(norm._forward_kernel.arg_names, BF16) | {"rstd_ptr": FP32, "eps": "fp32"}
    cases["rms_norm"] = (norm._forward_kernel, types, constants, 4)
    return cases


def rope_cases() -> dict:
    """Multi-head and grouped-query shapes."""
    cases = {}
    types = dict.fromkeys(rope._rope_kernel.arg_names, BF16)
    types |= {"cos_ptr": FP32, "sin_ptr": FP32, "T": "i32"}
    for heads, kv_heads, width in ((32, 32, 64), (32, 8, 64), (64, 8, 128)):
        block_h, block_k, half, warps = rope._blocks_and_warps(heads, kv_heads, width // 2)
        constants = {"INVERSE": False, "H": heads, "K": kv_heads, "C": width}
        constants |= {"BLOCK_H": block_h, "BLOCK_K": block_k, "BLOCK_HALF": half}
        cases[f"rope {heads}/{kv_heads} {width}"] = (rope._rope_kernel, types, constants, warps)
    return cases


def swiglu_cases() -> dict:
    """Both directions, and a length that is no multiple of 16: n declared as a plain integer."""
    constants, cases = {"BLOCK": swiglu.BLOCK}, {}
    for name, kernel in (
        ("swiglu", swiglu._forward_kernel),
        ("swiglu_backward", swiglu._backward_kernel),
    ):
        types = dict.fromkeys(kernel.arg_names, BF16)
        cases[name] = (kernel, types | {"n": "i32 / 16"}, constants, swiglu.NUM_WARPS)
        cases[f"{name} odd length"] = (kernel, types | {"n": "i32"}, constants, swiglu.NUM_WARPS)
    return cases


def vocab_cases() -> dict:
    """Shards of large vocabularies, logits and probabilities, and a width that is odd."""
    cases = {}
    for dtype, width in ((BF16, 16032), (BF16, 131072), (FP32, 16032), (BF16, 6283)):
        block, warps = vocab._block_and_warps(width)
        constants, odd = {"V": width, "BLOCK": block}, " odd length" if width % 8 else ""
        types = {"y_ptr": dtype, "label_ptr": "*i64", "out_ptr": FP32, "n_rows": "i32"}
        types |= dict.fromkeys(("m_ptr", "f_ptr", "c_ptr"), FP32)
        kernels = (("statistics", vocab._statistics_kernel), ("gradient", vocab._gradient_kernel))
        for name, kernel in kernels:
            cases[f"{name} {dtype} {width}{odd}"] = (kernel, types, constants, warps)
        scaled = vocab._gradient_kernel, types, constants | {"m_ptr": None}, warps
        cases[f"scale {dtype} {width}{odd}"] = scaled
    return cases


def compile_case(kernel, types: dict, constants: dict, warps: int) -> dict:
    """Compile as Triton's launcher would for 16-byte aligned tensors; return the facts."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n].split()[0] for n in names}
    positions = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    aligned = [n not in constants and (types[n][0] == "*" or "/ 16" in types[n]) for n in names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    compiled = triton.compile(
        ASTSource(kernel, signature, positions, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    usage = resource_usage(compiled.asm["cubin"])
    accesses = re.findall(r"\b(?:ld|st)\.global\S*", compiled.asm["ptx"])
    order = re.findall(r"\b(?:ld\.global|st\.global|bar\.sync)", compiled.asm["ptx"])
    facts = {"accesses": Counter(accesses), "order": order}
    return {key: int(value) for key, value in usage} | facts


def resource_usage(cubin: bytes) -> list[tuple[str, str]]:
    """Ask the cuobjdump that Triton brings along."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    return re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)


if __name__ == "__main__":
    groups = {
        "norm, rope, swiglu": norm_cases() | rope_cases() | swiglu_cases(),
        "vocab": vocab_cases(),
        "merge": test_kernels_merge.cases(),
        "permute": test_kernels_permute.cases(),
        "adamw": test_kernels_adamw.cases(),
    }
    facts = {
        group: {name: compile_case(*case) for name, case in cases.items()}
        for group, cases in groups.items()
    }
    print(json.dumps(facts))
