"""Wrong answers to lesson 10: lost keys, lost gradients, graphs that never end, slow pipelines."""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons.kit import mutant


class _Wrapped:
    """A layer with other projections."""

    def __init__(self, layer: Any, project: Any):
        self.project, self.finish = project, layer.finish


def _with_layer(solution: ModuleType, project: Any) -> dict:
    """The solution, whose layer projects by project(layer, x, first)."""

    class SlicedAttention(solution.SlicedAttention):
        """The solution with another layer."""

        def __init__(self, layer: Any):
            super().__init__(_Wrapped(layer, lambda x, first: project(layer, x, first)))

    return {"SlicedAttention": SlicedAttention}


@mutant("10.1", "positions start at 0 in every slice")
def positions_restart(solution: ModuleType) -> dict:
    """Each slice is a short sequence."""
    return _with_layer(solution, lambda layer, x, first: layer.project(x, 0))


@mutant("10.1", "a slice sees only its own keys")
def own_keys_only(solution: ModuleType) -> dict:
    """Attention as always."""

    class SlicedAttention(solution.SlicedAttention):
        """Forgets."""

        def forward(self, x_BTD: Tensor) -> Tensor:
            q, k, v = self.layer.project(x_BTD, self.filled)
            self.filled += x_BTD.shape[1]
            return self.layer.finish(solution.attend(q, k, v))

    return {"SlicedAttention": SlicedAttention}


def _attend(hidden: Any) -> Any:
    """Attention that hides hidden(T, S)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
        mask = hidden(q.shape[1], k.shape[1])
        return torch.einsum("bhts,bshc->bthc", scores.masked_fill(mask, -math.inf).softmax(-1), v)

    return attend


@mutant("10.1", "as in a square mask")
def top_left_mask(solution: ModuleType) -> dict:
    """is_causal=True of torch's operator, whose mask starts at the top left."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return {"attend": attend}


@mutant("10.1", "sees the tokens after a query too")
def no_mask(solution: ModuleType) -> dict:
    """The slice comes last, so it may see all keys so far."""
    return {"attend": _attend(lambda T, S: torch.zeros(T, S, dtype=torch.bool))}


@mutant("10.1", "keep keys and values, not inputs")
def project_all_again(solution: ModuleType) -> dict:
    """Keep inputs, and compute keys and values when they are needed."""

    class SlicedAttention(solution.SlicedAttention):
        """Joins inputs."""

        def forward(self, x_BTD: Tensor) -> Tensor:
            self.slices.append(x_BTD)
            q, k, v = self.layer.project(torch.cat(self.slices, 1), 0)
            return self.layer.finish(solution.attend(q, k, v))[:, -x_BTD.shape[1] :]

    return {"SlicedAttention": SlicedAttention}


@mutant("10.2", "learns nothing from later ones")
def keys_are_constants(solution: ModuleType) -> dict:
    """Keys of earlier slices are a cache, and caches are detached."""

    class SlicedAttention(solution.SlicedAttention):
        """Drops what leaves have gathered."""

        def backward(self, grad_BTD: Tensor) -> Tensor:
            for leaf in self.slices[-1][3]:
                leaf.grad = None
            return super().backward(grad_BTD)

    return {"SlicedAttention": SlicedAttention}


class _Connected:
    """Keys keep the graphs that they came from."""

    def __init__(self, layer: Any, attend: Any):
        self.layer, self.attend, self.slices = layer, attend, []

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.detach().requires_grad_()
        q, *own = self.layer.project(x, sum(s[0].shape[1] for s in self.slices))
        pasts = [[s[2][i] for s in self.slices] for i in (0, 1)]
        keys, values = (torch.cat([*past, y], 1) for past, y in zip(pasts, own, strict=True))
        out = self.layer.finish(self.attend(q, keys, values))
        self.slices.append((x, out, own))
        return out.detach()


@mutant("10.2", "cut them there")
def one_long_graph(solution: ModuleType) -> dict:
    """retain_graph=True makes the error go away."""

    class SlicedAttention(_Connected):
        """Every backward runs through all earlier slices."""

        def __init__(self, layer: Any):
            super().__init__(layer, solution.attend)

        def backward(self, grad_BTD: Tensor) -> Tensor:
            x, out, _ = self.slices.pop()
            out.backward(grad_BTD, retain_graph=True)
            return x.grad

    return {"SlicedAttention": SlicedAttention}


@mutant("10.2", "backward through the graph a second time")
def one_long_graph_freed(solution: ModuleType) -> dict:
    """The same without retain_graph."""

    class SlicedAttention(_Connected):
        """The first backward frees what the second needs."""

        def __init__(self, layer: Any):
            super().__init__(layer, solution.attend)

        def backward(self, grad_BTD: Tensor) -> Tensor:
            x, out, _ = self.slices.pop()
            out.backward(grad_BTD)
            return x.grad

    return {"SlicedAttention": SlicedAttention}


@mutant("10.2", "let go of what only that slice")
def nothing_goes(solution: ModuleType) -> dict:
    """Count down instead of taking out of the list."""

    class SlicedAttention(solution.SlicedAttention):
        """Remembers every slice."""

        def backward(self, grad_BTD: Tensor) -> Tensor:
            self.done = [*getattr(self, "done", []), self.slices[-1]]
            return super().backward(grad_BTD)

    return {"SlicedAttention": SlicedAttention}


@mutant("10.2", "only from the one right after it")
def newest_gradient_only(solution: ModuleType) -> dict:
    """The next slice's gradient for my keys replaces that of slices after it."""

    class SlicedAttention(solution.SlicedAttention):
        """Overwrites."""

        def backward(self, grad_BTD: Tensor) -> Tensor:
            for *_, leaves in self.slices[:-1]:
                for leaf in leaves:
                    leaf.grad = None
            return super().backward(grad_BTD)

    return {"SlicedAttention": SlicedAttention}


@mutant("10.1", "is None")
def nothing_returned(solution: ModuleType) -> dict:
    """Forgot the return."""

    class SlicedAttention(solution.SlicedAttention):
        """Keeps it all to itself."""

        def forward(self, x_BTD: Tensor) -> None:
            super().forward(x_BTD)

    return {"SlicedAttention": SlicedAttention}


@mutant("10.4", "(list of int, number) is wanted")
def slices_alone(solution: ModuleType) -> dict:
    """The latency follows from the slices."""
    return {"best_slices": lambda *given: solution.best_slices(*given)[0]}


@mutant("10.3", "give it each slice as soon as that is done")
def whole_sequence_at_a_time(solution: ModuleType) -> dict:
    """Receive all, compute all, send all."""

    def run_slices(stage: Any, axis: Any, slices: list[Tensor]) -> None:
        first, last = axis.rank == 0, axis.rank == axis.size - 1
        xs = slices if first else [axis.recv(x, axis.rank - 1) for x in slices]
        outs = [stage.forward(x) for x in xs]
        handles = [] if last else [axis.send(out, axis.rank + 1, wait=False) for out in outs]
        grads = [None if last else axis.recv(x, axis.rank + 1) for x in reversed(slices)]
        dxs = [stage.backward(grad) for grad in grads]
        handles += [] if first else [axis.send(dx, axis.rank - 1, wait=False) for dx in dxs]
        for handle in handles:
            handle.wait()

    return {"run_slices": run_slices}


@mutant("10.3", "from the last slice to the first")
def first_slice_first(solution: ModuleType) -> dict:
    """Backward in the order of forward."""

    def run_slices(stage: Any, axis: Any, slices: list[Tensor]) -> None:
        first, last = axis.rank == 0, axis.rank == axis.size - 1
        for x in slices:
            out = stage.forward(x if first else axis.recv(x, axis.rank - 1))
            if not last:
                axis.send(out, axis.rank + 1)
        for x in slices:
            dx = stage.backward(None if last else axis.recv(x, axis.rank + 1))
            if not first:
                axis.send(torch.zeros_like(x) + dx.mean(), axis.rank - 1)

    return {"run_slices": run_slices}


@mutant("10.3", "each slice is a message")
def values_and_shape(solution: ModuleType) -> dict:
    """Tell the next rank how long the slice is, and then the slice."""

    class Told:
        """An axis that sends lengths too."""

        def __init__(self, axis: Any):
            self.axis, self.rank, self.size = axis, axis.rank, axis.size

        def send(self, x: Tensor, to: int, wait: bool) -> Any:
            self.axis.send(torch.tensor([x.shape[1]]), to, wait=False)
            return self.axis.send(x, to, wait=False)

        def recv(self, like: Tensor, source: int) -> Tensor:
            self.axis.recv(torch.zeros(1, dtype=torch.int64), source)
            return self.axis.recv(like, source)

    return {"run_slices": lambda stage, axis, xs: solution.run_slices(stage, Told(axis), xs)}


@mutant("10.3", "run all slices forward first")
def backward_at_once(solution: ModuleType) -> dict:
    """The last stage goes backward with a slice as soon as it was forward."""

    def run_slices(stage: Any, axis: Any, slices: list[Tensor]) -> None:
        if axis.rank < axis.size - 1:
            solution.run_slices(stage, axis, slices)
            return
        dxs = []
        for x in slices:
            stage.forward(axis.recv(x, axis.rank - 1))
            dxs.append(stage.backward(None))
        for handle in [axis.send(dx, axis.rank - 1, wait=False) for dx in reversed(dxs)]:
            handle.wait()

    return {"run_slices": run_slices}


def _dynamic(length: int, cost: Any) -> list[int]:
    """Shortest path over places to cut."""
    best = [(0.0, [])]
    for end in range(1, length + 1):
        ways = [
            (best[end - l][0] + cost(l, end - l), [*best[end - l][1], l]) for l in range(1, end + 1)
        ]
        best.append(min(ways))
    return best[length][1]


def _latency(slices: list[int], count: int, time: Any) -> float:
    """sum + count * max."""
    times = [time(l, sum(slices[:i])) for i, l in enumerate(slices)]
    return sum(times) + count * max(times)


def _table(length: int, time: Any) -> Any:
    """Every time, asked once."""
    known = {(l, c): time(l, c) for c in range(length) for l in range(1, length - c + 1)}
    return lambda l, c: known[l, c]


@mutant("10.4", "try every t_max")
def without_the_bound(solution: ModuleType) -> dict:
    """S(i) = min over k of S(i-k) + t(k, i-k), and that is the answer."""

    def best_slices(length: int, stages: int, time: Any) -> tuple:
        time = _table(length, time)
        slices = _dynamic(length, time)
        return slices, _latency(slices, stages - 1, time)

    return {"best_slices": best_slices}


@mutant("10.4", "later slices see more and take longer")
def equal_slices(solution: ModuleType) -> dict:
    """The best number of slices of one length."""

    def best_slices(length: int, stages: int, time: Any) -> tuple:
        time, ways = _table(length, time), []
        for n in range(1, length + 1):
            small, more = divmod(length, n)
            for slices in (
                [small + (i < more) for i in range(n)],
                [small + (i >= n - more) for i in range(n)],
            ):
                ways.append((_latency(slices, stages - 1, time), slices))
        latency, slices = min(ways)
        return slices, latency

    return {"best_slices": best_slices}


@mutant("10.4", "max counts K-1 times")
def all_stages_times_max(solution: ModuleType) -> dict:
    """T = sum + K max."""

    def best_slices(length: int, stages: int, time: Any) -> tuple:
        return solution.best_slices(length, stages + 1, time)

    return {"best_slices": best_slices}


@mutant("10.4", "your latency")
def bound_for_the_longest(solution: ModuleType) -> dict:
    """Right slices, and the time of one stage as latency."""

    def best_slices(length: int, stages: int, time: Any) -> tuple:
        time = _table(length, time)
        slices, _ = solution.best_slices(length, stages, time)
        return slices, _latency(slices, 0, time)

    return {"best_slices": best_slices}


@mutant("10.4", "keep what you have asked for")
def measured_again_and_again(solution: ModuleType) -> dict:
    """Ask time wherever it is needed."""

    def best_slices(length: int, stages: int, time: Any) -> tuple:
        bounds = {time(l, c) for c in range(length) for l in range(1, length - c + 1)}
        ways = []
        for bound in sorted(bounds):
            within = lambda l, c, b=bound: t if (t := time(l, c)) <= b else math.inf  # noqa: E731
            slices = _dynamic(length, within)
            ways.append((_latency(slices, stages - 1, time), slices))
        latency, slices = min(ways)
        return slices, latency

    return {"best_slices": best_slices}
