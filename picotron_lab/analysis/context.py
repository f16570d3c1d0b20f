"""What context parallelism sends, keeps and computes in one attention: closed forms, and a meter.

Paper   as in context_parallel.py, which prints these next to what it measures
Forms   KV = 2 e B T K C bytes of one rank's K and V, dKV of their gradients, e at least 4;
        Q = e B T H C. T is a rank's own: 1/n of the sequence.
        sent    ring, zigzag: (n-1) KV, backward + n dKV; all-gather: n KV, backward + n dKV;
                ulysses: 2Q + KV, each way
        saved   q, k, v, out and lse: 2Q + KV + 4 B H T; ulysses: what the core inside keeps, of
                1/n of the heads, and out in both orders
        labels  with documents L = 8 B T more of each block travel; who keeps a batch keeps them
        work    largest of a rank / smallest. Ring: rank r has r blocks and a square on the
                diagonal: (r + 1) with all of the square's scores, as the plain path computes them,
                (r + 1/2) without the hidden half: n, or 2n - 1. Others: 1
Dims    B micro-batch  T queries, a rank's tokens  H/K query/kv heads  C head width
Tests   tests/test_context_contract.py
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab.analysis.activations import Setting, layer_bytes
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import ModelConfig


@dataclass(frozen=True)
class Layer:
    """One attention, with a rank's T tokens of each sequence; sizes as in Dims."""

    kind: str
    impl: str
    n: int
    B: int
    T: int
    H: int
    K: int
    C: int
    element: int = 4  # bytes: 2 for bfloat16, 4 for float32, 8 for float64
    documents: bool = False

    def __post_init__(self) -> None:
        assert self.element in (2, 4, 8), (
            f"no element has {self.element} bytes here: give 2 (bfloat16), 4 (float32) or 8 "
            "(float64)."
        )

    @property
    def wide(self) -> int:
        """Bytes of an element of a sum."""
        return max(self.element, 4)

    @property
    def kv(self) -> int:
        """KV."""
        return 2 * self.element * self.B * self.T * self.K * self.C

    @property
    def dkv(self) -> int:
        """dKV."""
        return self.kv * self.wide // self.element

    @property
    def q(self) -> int:
        """Q."""
        return self.element * self.B * self.T * self.H * self.C

    @property
    def labels(self) -> int:
        """L; 0 without documents."""
        return 8 * self.B * self.T * self.documents


def contract(at: Layer) -> dict[str, tuple[int, int]]:
    """{"forward exchange": (calls, payload bytes), ...} of one micro-batch on one rank."""
    n, fused = at.n, at.impl == "fused"
    labels, tensors = at.labels, 3 if at.documents else 2
    if n == 1:
        return {}
    if at.kind == "ulysses":
        moved = 2 if fused else 4, 2 * at.q + at.kv * max(1, n // at.K)
        sent = {"forward all_to_all": moved, "backward all_to_all": moved}
        return sent | ({"forward all_gather": (1, n * labels)} if labels else {})
    if at.kind == "all-gather":
        halves = 2 if fused else 1
        gathered = halves * tensors, n * (at.kv + labels)
        sent = {"forward all_gather": gathered, "backward all_gather": gathered}
        return sent | {"backward reduce_scatter": (halves * 2, n * at.dkv)}
    hops = (n - 1) * (at.kv + labels)
    back = n + 1 if fused else n
    return {"forward exchange": (n - 1, hops), "backward exchange": (back, hops + n * at.dkv)}


def visitors(at: Layer) -> int:
    """Most K/V blocks that have come from other ranks and are here at a time, in forward."""
    return at.n if at.kind == "all-gather" and at.n > 1 else min(2, at.n - 1)


def saved_bytes(at: Layer, flash: bool = False) -> int:
    """What is kept for backward, from q, k and v to out, which the next matmul keeps.

    flash    the core inside ulysses keeps lse, as fused.py's does, instead of scores, as model.py's
    """
    lse = at.wide * at.B * at.H * at.T
    if at.kind != "ulysses":
        return 2 * at.q + at.kv + lse
    cfg = ModelConfig(hidden_size=at.H * at.C, heads=at.H, kv_heads=at.K)
    assert not (flash and at.documents), (
        "what a fused core inside ulysses keeps of documents is not predicted: ask for "
        "flash=False, or for documents=False."
    )
    inside = layer_bytes(cfg, Setting(at.B, at.n * at.T, at.element, ranks=at.n))
    masks = (at.B - 1) * (at.n * at.T) ** 2 if at.documents else 0  # each sequence has its own
    return inside["q, k, v"] + (at.q + lse if flash else inside["scores"] + masks) + at.q


def imbalance(at: Layer) -> int:
    """Work of the busiest rank / that of the idlest."""
    if at.kind != "ring":
        return 1
    return at.n if at.impl == "plain" else 2 * at.n - 1


def predictions(at: Layer) -> dict[str, tuple[str, Any]]:
    """{what: (formula, value)}: names as `contract` has them, "visitors", "saved" and "work".

    With model.py's core inside ulysses; its fused path expects fused.py's, and "saved" is left out.
    So is "work" of a fused path with documents: what a mask hides is computed in part.
    """
    block = "(KV + L)" if at.documents else "KV"
    there, back, heads = f"(n-1) {block}", " + n dKV", "2Q + max(1, n/K) KV"
    forms = {
        "ring": [there, there + back], "zigzag": [there, there + back],
        "all-gather": [f"n {block}"] * 2 + ["n dKV"],
        "ulysses": [heads, heads] + ["n L"] * at.documents,
    }  # fmt: skip
    sent = contract(at)  # nothing, if n is 1
    pairs = zip(sent.items(), forms[at.kind] if sent else (), strict=True)
    told = {name: (form, f"{calls} {size}") for (name, (calls, size)), form in pairs}
    if at.kind != "ulysses":
        here = "n" if at.kind == "all-gather" and at.n > 1 else "min(2, n-1)"
        told["visitors"] = here, visitors(at)
        told["saved"] = "2Q + KV + 4 B H T", saved_bytes(at)
    elif at.impl == "plain":
        told["saved"] = "q, k, v, scores, Q", saved_bytes(at)
    lopsided = "n" if at.impl == "plain" else "2n - 1"
    if at.impl == "plain" or not at.documents:
        told["work"] = lopsided if at.kind == "ring" else "1", imbalance(at)
    return told


# ---- what is measured beside them


def measure(core: nn.Module, ledger: Any, at: Layer) -> dict[str, Any]:
    """One attention on this rank, forward and backward; names as in `predictions`, but "work":
    operations of this rank's forward.

    ledger   of the axis on which `core` speaks (an Axis's ledger)
    Documents are one for all tokens: what their labels cost, whatever they hide.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[at.element]
    shapes = ((at.B, at.T, heads, at.C) for heads in (at.H, at.K, at.K))
    leaves = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    documents_BT = torch.zeros(at.B, at.T, dtype=torch.int64) if at.documents else None
    with Watch() as watch, Meter() as meter:
        out_BTHC = core(*(x * 1 for x in leaves), documents_BT)
        kept = meter.live["activation"]
    guests = f"{watch.most_received / (at.kv + at.labels):g}"
    seen = {"visitors": guests, "saved": kept, "work": watch.operations}
    for direction in ("forward", "backward"):
        for op in {call.op for call in ledger.calls}:
            seen[f"{direction} {op}"] = f"{len(ledger.select(op))} {ledger.bytes(op)}"
        ledger.clear()
        if direction == "forward":
            out_BTHC.sum().backward()
    return seen


class Watch(TorchDispatchMode):
    """Operations of matmuls, and the most bytes alive that were made empty, to be received into.

    torch counts a causal flash attention as whole, and knows none for CPUs; here it counts half.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.most_received = 0, 0
        self._rooms: list[weakref.ref] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        result, aten = func(*args, **(kwargs or {})), torch.ops.aten
        if func is aten.new_empty.default:
            self._rooms.append(weakref.ref(result.untyped_storage()))
            alive = [room().nbytes() for room in self._rooms if room() is not None]
            self.most_received = max(self.most_received, sum(alive))
        if func is aten.bmm.default:
            self.operations += 2 * args[0].numel() * args[1].shape[-1]
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            whole = 4 * args[0].numel() * args[1].shape[2]
            self.operations += whole // 2 if args[4:5] == (True,) else whole
        return result
