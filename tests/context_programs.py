"""What the tests of context parallelism run: on one device, on every rank, and in processes, which
import this file; and what they watch while it runs."""

import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from tensor_programs import Job, batch, plain_model, scaled_value
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import recompute, router, sharding
from picotron_lab.alone import Alone
from picotron_lab.comm import Axis
from picotron_lab.config import CP_KINDS
from picotron_lab.context_parallel import chunks, parallelize, positions
from picotron_lab.fused import fuse
from picotron_lab.ledger import Ledger
from picotron_lab.model import Llama

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
WAYS = [(kind, impl) for kind in CP_KINDS for impl in ("plain", "fused")]
every_way = pytest.mark.parametrize(("kind", "impl"), WAYS)


@dataclass(frozen=True)
class Case:
    """A model and how its attention crosses ranks; chunk: tokens of a chunk of the sequence."""

    job: Job = Job()
    n: int = 4
    chunk: int = 3
    kind: str = "ring"
    impl: str = "plain"
    fused_model: bool = False
    packed: bool = False
    recompute: str = "none"

    @property
    def length(self):
        return self.chunk * self.n * len(chunks(self.kind, 0, self.n))


def case(n, heads=8, kv_heads=8, **changes):
    """Head width 2 or more, so that no head is a single number."""
    job = replace(Job(), B=changes.pop("B", 2), dtype=changes.pop("dtype", torch.float64))
    sizes = {"layers": changes.pop("layers", 1), "experts": changes.pop("experts", 0)}
    job = job.with_model(heads=heads, kv_heads=kv_heads, hidden_size=4 * heads, **sizes)
    return Case(job, n, **changes)


CASES = {
    "2 ranks": case(2),
    "2 ranks, documents": case(2, 4, 2, chunk=4, packed=True),
    "3 ranks, 1 kv head, documents": case(3, 6, 1, chunk=5, packed=True),
    "3 ranks, 3 kv heads": case(3, 3, 3, B=1),
    "4 ranks, 2 kv heads": case(4, 8, 2),
    "4 ranks, 4 kv heads, documents": case(4, 8, 4, chunk=5, B=3, packed=True, layers=2),
    "8 ranks, 2 kv heads, 1 token each": case(8, 8, 2, chunk=1),
    "8 ranks, documents": case(8, chunk=2, packed=True),
    "1 rank, 2 kv heads, documents": case(1, 4, 2, chunk=7, packed=True),
}


def documents_of(B, T, seed=0):
    """Packed rows: documents begin anywhere, each row its own, some with one token."""
    dice = torch.Generator().manual_seed(seed)
    return (torch.rand(B, T, generator=dice) < 0.25).cumsum(1)


def whole_batch(it):
    """(tokens, labels, where) of whole sequences; how many tokens count."""
    job = replace(it.job, T=it.length)
    (tokens_BT, labels_BT, where), count = batch(job)
    documents = documents_of(job.B, it.length) if it.packed else None
    return (tokens_BT, labels_BT, replace(where, documents_BT=documents)), count


def own_part(inputs, positions_T):
    """What a rank sees of a batch."""
    tokens_BT, labels_BT, where = inputs
    documents = where.documents_BT
    documents = None if documents is None else documents[:, positions_T]
    where = replace(where, positions_T=positions_T, documents_BT=documents)
    return tokens_BT[:, positions_T], labels_BT[:, positions_T], where


def parallel_model(axis, it):
    """Built in the order of the trainer."""
    with torch.device("meta"):
        model = Llama(it.job.cfg, it.job.dropout)
    sharding.attach(model)
    if it.fused_model:
        fuse(model)
    parallelize(model, axis, it.impl, it.kind)
    sharding.replicate(model, axis)
    recompute.apply(model, it.recompute, it.impl)
    sharding.materialise(model, 1, scaled_value, dtype=it.job.dtype)
    return model


def backward(model, inputs, count):
    """The loss, and what the routers saw of it."""
    router.begin_step(model, 1 / count)
    loss = model(*inputs) / count
    loss.backward()
    return loss.detach()


def on_rank(axis, it):
    """(loss of all ranks, {name: reduced gradient}, what routers saw)."""
    model, (inputs, count) = parallel_model(axis, it), whole_batch(it)
    loss = backward(model, own_part(inputs, positions(it.kind, it.length, axis)), count)
    sharding.reduce_gradients(model.parameters(), {axis.name: axis})
    seen = router.settle(model, axis, count)
    return axis.all_reduce(loss), {p.record.name: p.grad for p in model.parameters()}, seen


SHARED = CASES["3 ranks, 1 kv head, documents"]
PROCESSES = [
    replace(SHARED, kind=kind, impl=impl, fused_model=impl == "fused") for kind, impl in WAYS
]


def over_gloo(axis):
    """Every kind and path in turn, in one group of processes."""
    return [on_rank(axis, it) for it in PROCESSES]


def one_device(it):
    """The same of the plain model."""
    model, (inputs, count) = plain_model(it.job), whole_batch(it)
    loss = backward(model, inputs, count)
    alone = Axis("world", [0], 0, Alone(), Ledger())
    gradients = {p.record.name: p.grad for p in model.parameters()}
    return loss, gradients, router.settle(model, alone, count)


# ---- attention by itself


def attention_inputs(sizes, dtype=torch.float64, scale=2.0):
    """q, k, v, and the gradient of out, of sizes B, T, H, K, C; scores spread wide, so that softmax
    is far from flat."""
    (B, T, H, K, C), dice = sizes, torch.Generator().manual_seed(3)
    shapes = [(B, T, heads, C) for heads in (H, K, K, H)]
    q, k, v, grad = (torch.randn(s, generator=dice, dtype=torch.float64) for s in shapes)
    return [x.to(dtype) for x in (scale * q, scale * k, v, grad)]


# Torch's attention in float32 is off by 2.3e-7 at least: exponentials and sums, as ours; more, if
# sequences are longer or scores larger. Up to 7 merges round once more, by 0.6e-7 each, and so do
# sums of 8 gradients: sqrt(2.3^2 + 7 * 0.6^2) / 2.3. Seen: 1.10.
MERGED = 1.22


def error(found, exact):
    """Of each tensor: root of the summed squares, relative."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


# ---- what is watched


class Seen(TorchDispatchMode):
    """Shows every operation to `see`."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch imports its compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.see(func.overloadpacket, args, result)
        return result


class Story(Seen):
    """Blocks that were attended to, as (queries, keys, causal), between the calls of an axis."""

    def __init__(self, axis, verbs=("exchange", "all_gather", "reduce_scatter")):
        super().__init__()
        self.seen = []
        for verb in verbs:
            setattr(axis, verb, self._told(verb, getattr(axis, verb)))

    def _told(self, verb, call):
        def told(*args, **options):
            answer = call(*args, **options)
            if verb == "exchange" and not args[0]:
                return answer  # of nothing: not a call
            self.seen.append(verb)
            wait = getattr(answer, "wait", None)
            if wait is not None:
                answer.wait = lambda: (self.seen.append(f"{verb} done"), wait())[1]
            return answer

        return told

    def see(self, operator, args, result):
        if operator is FLASH:
            self.seen.append((args[0].shape[2], args[1].shape[2], args[4:5] == (True,)))
        if operator is FLASH_BACKWARD:
            self.seen.append((args[1].shape[2], args[2].shape[2], args[7]))


class Sizes(Seen):
    """operations   of the matmuls of attention, which are batched: two per multiplication
    most         bytes of bfloat16 alive that were received: keys and values (sums are float32)
    largest      elements of a tensor"""

    def __init__(self):
        super().__init__()
        self.operations, self.most, self.largest, self.rooms = 0, 0, 0, []

    def see(self, operator, args, result):
        if operator is torch.ops.aten.bmm:
            (b, m, inner), (_, _, columns) = args[0].shape, args[1].shape
            self.operations += 2 * b * m * inner * columns
        if operator is torch.ops.aten.new_empty and result.dtype == torch.bfloat16:
            self.rooms.append(weakref.ref(result.untyped_storage()))
        alive = [room() for room in self.rooms]
        self.most = max(self.most, sum(s.nbytes() for s in alive if s is not None))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
