"""Data parallelism: every rank has the whole model and a share of the batch; gradients are summed.

Paper   Li et al. 2020, "PyTorch Distributed", sections 3.2 and 3.3 (2006.15704)
Idea    The loss is a sum over tokens, so its gradient is a sum over ranks of what each computes
        from its own tokens. Each rank divides by the token count of the *global* batch; one
        all-reduce then gives every rank the gradient of one device. Not a mean: ranks with fewer
        counted tokens must weigh less.
Steps   naive       after backward, one all-reduce per parameter: all of it is waiting
        overlapped  each gradient leaves as soon as it exists, but for every micro-batch again
        bucketed    gradients travel together in flat buffers: few large messages, not many small
        silent      micro-batches add up in the buffers; only the last one sends: the fused path
Before  one rank computes all G sequences of the batch
After   n ranks compute G/n sequences each and all hold the same gradient
Wire    per optimizer step, Ψ trainable parameters of 4 bytes, m micro-batches: naive, silent
        all_reduce(4Ψ); overlapped, bucketed m all_reduce(4Ψ). Calls: naive #parameters, silent
        #buckets, the others m times
Axes    dp: replicas of the model; of experts only expert_replica, ranks that hold the same ones
Dims    none: gradients are flat here
Read    Naive -> Overlapped -> Bucketed -> Silent -> synchroniser -> over_axes -> contract
Try     python -m picotron_lab.data_parallel    Tests   tests/test_data_parallel.py
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis, Handle
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.sharding import add_axis, group_by_size, zero_gradient

MIB = 2**20

# ---- 1. the idea


def parallelize(
    model: nn.Module,
    axis: Axis,
    experts: Iterable[nn.Parameter] = (),
    expert_axis: Axis | None = None,
) -> None:
    """Every rank of `axis` keeps the whole model; all gradients become partial over it.

    experts  parameters that fewer ranks keep, those of expert_axis: partial over that axis instead
    """
    apart = set(experts)
    for parameter in model.parameters():
        add_axis(parameter, expert_axis if parameter in apart else axis, partial=True)


class Synchroniser(Protocol):
    """How the gradients of one step are summed; afterwards `shard.grad` is the whole sum.

    shards  what this rank's optimizer steps: here whole parameters, with ZeRO a part of each
    """

    shards: Sequence[nn.Parameter]

    @property
    def buffers(self) -> list[Tensor]:
        """Flat memory that stays between steps, beside the gradients."""
        return []

    def begin_step(self) -> None:
        """Gradients are zero."""

    def before_backward(self, last: bool) -> None:
        """One micro-batch's backward comes; `last` says that no other will add to the gradients."""

    def finish(self) -> None:
        """partial -> replicated (all_reduce, 4Ψ): all ranks hold the same gradients."""

    def publish(self) -> None:
        """The optimizer has stepped the shards; here they are the parameters, so that is all."""


# ---- 2. plain path


class Naive(Synchroniser):
    """Step 1: when all backwards are over, all-reduce one gradient after the other."""

    def __init__(self, parameters: Sequence[nn.Parameter], axis: Axis):
        self.shards = self.parameters = parameters
        self.axis = axis

    def begin_step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = zero_gradient(parameter)

    def before_backward(self, last: bool) -> None:
        pass

    def finish(self) -> None:
        for parameter in self.parameters:
            self.axis.all_reduce(parameter.grad, "sum", out=parameter.grad)


class Overlapped(Synchroniser):
    """Step 2: a hook starts each gradient's all-reduce while backward computes the earlier layers.

    The hook runs after the gradient was accumulated and gets the *parameter*: the gradient is in
    its .grad. What is sent must be this micro-batch's alone, or earlier ones would be summed again.
    Every rank must use every parameter, else ranks would meet in different calls (see Bucketed).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], axis: Axis):
        self.shards = self.parameters = parameters
        self.axis = axis
        self.under_way: list[tuple[nn.Parameter, Handle]] = []
        self.totals: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._send)

    def begin_step(self) -> None:
        self.totals = {parameter: zero_gradient(parameter) for parameter in self.parameters}
        for parameter in self.parameters:
            parameter.grad = None

    def _send(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        handle = self.axis.all_reduce(gradient, "sum", out=gradient, wait=False)
        self.under_way.append((parameter, handle))

    def before_backward(self, last: bool) -> None:
        self._collect()

    def finish(self) -> None:
        self._collect()
        for parameter, total in self.totals.items():
            parameter.grad = total

    def _collect(self) -> None:
        for parameter, reduced in self.under_way:
            self.totals[parameter] += reduced.wait()
        self.under_way.clear()


# ---- 3. fused path


class Bucket:
    """Gradients of some parameters in one flat buffer, of which each `parameter.grad` is a view."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        size = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(size, dtype=parameters[0].grad_dtype, device=parameters[0].device)
        self.missing = 0  # gradients that the current backward still owes
        self.reduced: Handle | None = None

    def lend_views(self, flat: Tensor) -> None:
        """Let the parameters' gradients lie in `flat`, where backward adds to them in place."""
        parts = flat.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def send(self, axis: Axis, dtype: torch.dtype) -> None:
        """Start the all-reduce, in `dtype` on the wire."""
        wire = self.flat.to(dtype)  # the buffer itself if it has that dtype
        self.reduced = axis.all_reduce(wire, "sum", out=wire, wait=False)

    def receive(self) -> None:
        """Wait for the all-reduce; the sum lies in `flat`."""
        self.flat.copy_(self.reduced.wait())
        self.reduced = None


class Bucketed(Synchroniser):
    """Step 3: a bucket leaves when its last gradient is there.

    Buckets are filled in the order in which backward produces gradients, last layer first, and
    leave in that order on every rank: a rank that does not use a parameter must not change who
    meets whom.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        axis: Axis,
        bucket_bytes: float = 64 * MIB,
        reduce_dtype: torch.dtype | None = None,
    ):
        self.shards, self.axis = parameters, axis
        self.dtype = reduce_dtype or parameters[0].grad_dtype
        self.buckets = [Bucket(group) for group in group_by_size(parameters, bucket_bytes)]
        self.owner = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.waiting: list[Bucket] = []  # buckets of the current backward that have not left
        self.totals: list[Tensor] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._count_down)

    def begin_step(self) -> None:
        self.totals = [torch.zeros_like(bucket.flat) for bucket in self.buckets]

    def before_backward(self, last: bool) -> None:
        self._collect()
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.lend_views(bucket.flat)
        self._expect_gradients()

    def finish(self) -> None:
        self._collect()
        for bucket, total in zip(self.buckets, self.totals, strict=True):
            bucket.lend_views(total)

    def _expect_gradients(self) -> None:
        self.waiting = list(self.buckets)
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def _count_down(self, parameter: nn.Parameter) -> None:
        self.owner[parameter].missing -= 1
        while self.waiting and self.waiting[0].missing == 0:
            self.waiting.pop(0).send(self.axis, self.dtype)

    def _send_rest(self) -> None:
        """Buckets with a gradient that backward never produced: it is zero here, not elsewhere."""
        while self.waiting:
            self.waiting.pop(0).send(self.axis, self.dtype)

    def _collect(self) -> None:
        self._send_rest()
        for bucket, total in zip(self.buckets, self.totals, strict=True):
            if bucket.reduced is not None:
                bucket.receive()
                total += bucket.flat


class Silent(Bucketed):
    """Step 4: all micro-batches add to the same buffers, and only the last one's backward sends."""

    def begin_step(self) -> None:
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.lend_views(bucket.flat)

    def before_backward(self, last: bool) -> None:
        if last:
            self._expect_gradients()

    def finish(self) -> None:
        self._send_rest()
        for bucket in self.buckets:
            bucket.receive()


class Several(Synchroniser):
    """Synchronisers of several axes as one: a call goes to all of them, in one order everywhere."""

    def __init__(self, parts: Sequence[Synchroniser]):
        self.parts = list(parts)
        self.shards = [shard for part in parts for shard in part.shards]

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for part in self.parts for buffer in part.buffers]

    def begin_step(self) -> None:
        for part in self.parts:
            part.begin_step()

    def before_backward(self, last: bool) -> None:
        for part in self.parts:
            part.before_backward(last)

    def finish(self) -> None:
        for part in self.parts:
            part.finish()

    def publish(self) -> None:
        for part in self.parts:
            part.publish()


def over_axes(
    parameters: Sequence[nn.Parameter],
    axes: Sequence[Axis],
    make: Callable[[list[nn.Parameter], Axis], Synchroniser],
) -> Synchroniser:
    """Sum each gradient over the one of these axes that its record calls partial.

    axes  in the order of the calls, the same on every rank; one may be given twice
    make  (parameters, axis) -> their synchroniser; an axis without parameters needs none
    """
    groups: dict[str, list[nn.Parameter]] = {axis.name: [] for axis in axes}
    for parameter in parameters:
        names = [name for name in parameter.record.partial if name in groups]
        assert len(names) == 1, (
            f"{parameter.record.name} is partial over {parameter.record.partial}, but must be over "
            f"exactly one of {', '.join(groups)}: call sharding.add_axis once for it."
        )
        groups[names[0]].append(parameter)
    by_name = {axis.name: axis for axis in axes}
    return together([make(group, by_name[name]) for name, group in groups.items() if group])


def together(parts: Sequence[Synchroniser]) -> Synchroniser:
    """Several synchronisers as one."""
    return parts[0] if len(parts) == 1 else Several(parts)


def synchroniser(
    step: str,
    parameters: Sequence[nn.Parameter],
    axis: Axis,
    bucket_bytes: float = 64 * MIB,
    reduce_dtype: torch.dtype | None = None,
) -> Synchroniser:
    """The step of the lesson by its name: naive, overlapped, bucketed or silent."""
    if step in ("naive", "overlapped"):
        return {"naive": Naive, "overlapped": Overlapped}[step](parameters, axis)
    kinds = {"bucketed": Bucketed, "silent": Silent}
    return kinds[step](parameters, axis, bucket_bytes, reduce_dtype)


# ---- 4. contract


def contract(step: str, parameters: int, tensors: int, buckets: int, microbatches: int) -> tuple:
    """(calls, payload bytes) that one optimizer step of float32 gradients makes."""
    rounds = microbatches if step in ("overlapped", "bucketed") else 1
    calls = tensors if step in ("naive", "overlapped") else buckets
    return rounds * calls, rounds * 4 * parameters


def main() -> None:
    """The four steps on 4 threads, each printing its contract: formula, predicted, measured."""
    tensors, side, m, ranks = 6, 10, 3, 4
    size, buckets = tensors * side * side, tensors // 2
    print(f"{tensors} matrices, Ψ = {size}, {buckets} buckets, {ranks} ranks, m = {m}")
    print(f"{'step':11} calls: predicted measured   payload: formula predicted measured  (bytes)")
    for step in ("naive", "overlapped", "bucketed", "silent"):
        calls, payload = contract(step, size, tensors, buckets, m)
        formula = "4Ψ" if payload == 4 * size else "m 4Ψ"
        ledger = run_ranks(_demo, ranks, step, tensors, side, m)[0]
        print(f"{step:11} {calls:16} {len(ledger.calls):8}", end="")
        print(f" {formula:>18} {payload:9} {ledger.bytes():8}")


def _demo(axis: Axis, step: str, tensors: int, side: int, microbatches: int) -> Ledger:
    """One step of a chain of matrices on one rank's data; returns what was sent."""
    weights = [nn.Parameter(torch.eye(side) + i / 100) for i in range(tensors)]
    sync = synchroniser(step, weights, axis, bucket_bytes=2 * 4 * side**2)
    sync.begin_step()
    for i in range(microbatches):
        x = torch.full((1, side), float(axis.rank + i))
        sync.before_backward(last=i == microbatches - 1)
        for weight in weights:
            x = x @ weight
        x.sum().backward()
    sync.finish()
    return axis.ledger


if __name__ == "__main__":
    main()
