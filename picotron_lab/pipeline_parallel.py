"""Pipeline parallelism: each rank holds some layers; micro-batches travel from rank to rank.

Paper   GPipe, Huang et al. 2018 (1811.06965), section 2; 1F1B and interleaving: Megatron-LM
        (2104.04473), section 2.2; backward in two parts: Zero Bubble (2401.10241), section 2
Idea    The model is cut into stages of consecutive layers, and a rank holds one or more of them.
        Only what flows between layers crosses from rank to rank: an activation forward, its
        gradient backward. So that ranks need not wait for each other, the batch is cut into
        micro-batches, and several are under way at once. Who computes what, and when, is a list of
        actions (schedules/): an executor walks its rank's list. What must be sent follows from it.
Steps   F   the stage's forward on what came from the stage before; its input and graph are kept
        BW  backward through that graph: weight gradients add up, the input's gradient is sent back
        B   BW without the matmuls of weight gradients: (input, output gradient) of each is queued
        W   those matmuls, from the queue (deferred.py); no other rank waits for them
Before  each rank holds the model, and activations of one micro-batch
After   a rank holds 1/p of the layers, and activations of several micro-batches: 1F1B of up to p,
        other schedules from p/3 to all m
Wire    per micro-batch and stage boundary between ranks: N D forward, N D back, in the activations'
        dtype. v stages per rank: v times as many boundaries. Once per step an all_reduce of a tied
        embedding's gradient over the 2 ranks that use it; DualPipe: of all gradients (2/p of the
        model) over the 2 ranks that hold the same stages
Order   One channel for each sender, receiver and kind, first in, first out
        (pipeline_channels.py). Nobody waits for what it sends, and a schedule is checked before it
        runs (schedules/validator.py), so ranks never wait in a circle
Axes    pp; what a stage does over dp, cp, tp, ep it does with the ranks that hold the same stages
Dims    B micro-batch  T tokens of it on this rank  N = B*T  D width
        p ranks  m micro-batches  v stages per rank
Read    pipeline_stages.py -> Kept, Owed -> Executor.run -> _run -> _forward, _backward, ... ->
        FusedExecutor -> contract; with a split vocabulary pipeline_vocabulary.py
Try     python -m picotron_lab.pipeline_parallel    Tests   tests/test_pipeline_parallel.py
"""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from picotron_lab import deferred, sharding
from picotron_lab.clock import Network
from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.model import Llama, initial_value
from picotron_lab.pipeline_channels import Channels, PostedChannels, Route, routes
from picotron_lab.pipeline_stages import split
from picotron_lab.schedules.actions import (
    VOCABULARY,
    Action,
    Item,
    Schedule,
    last_backwards,
    parts,
)
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.registry import build
from picotron_lab.schedules.simulate import peaks, simulate
from picotron_lab.sharding import at_least_float32

# ---- 1. the idea

Spot = tuple[int, int, int]  # stage, micro-batch, slice of it


class Kept(NamedTuple):
    """What F leaves for backward: the stage's input, and where its output was in the graph.

    The output itself is not kept: once sent, it can be freed.
    """

    x: Tensor
    edge: GradientEdge


class Owed(NamedTuple):
    """What B leaves for W: gradients that came by the way, and matmuls to do."""

    gradients: dict[nn.Parameter, Tensor]
    jobs: list[deferred.Job]


# ---- 2. plain path


class Executor:
    """Runs one rank's list of a schedule, as training steps.

    stages         this rank's, by number: a Stage, or a whole model where there is one stage
    synchronisers  by stage, who sums gradients over replicas (data_parallel.py, zero.py); under
                   another key those of several stages, complete after the last action
    words          the passes of a split vocabulary (pipeline_vocabulary.py), or None
    peak           most activations held at a time, from F until BW or W
    trace          None, or a list to which (item, start, end) of each item is added, in axis.now()
    pretend        seconds that an item takes, beside its computation, if somebody wants to see one
    """

    make_channels, at_once = Channels, False

    def __init__(
        self,
        stages: dict[int, nn.Module],
        schedule: Schedule,
        axis: Axis,
        synchronisers: dict[int, Any],
        words: Any = None,
    ):
        assert schedule.slices == 1 or words is None, (
            f"{schedule.name} cuts sequences into {schedule.slices} slices, and passes of a split "
            "vocabulary take whole ones: give slices=1, or no words."
        )
        self.stages, self.schedule, self.axis = stages, schedule, axis
        self.items = schedule.lists[axis.rank]
        actions = [action for item in self.items for action in parts(item)]
        self.completes = {actions[i] for i in last_backwards(actions)}
        self.synchronisers, self.words = synchronisers, words
        self.channels = self.make_channels(axis, schedule)
        apart = {action.stage for action in actions if action.kind == "W"}
        prepared = stages if self.at_once else apart
        self.later = {s: deferred.prepare(stages[s], self.at_once) for s in sorted(prepared)}
        self.kept: dict[Spot, Kept] = {}
        self.owed: dict[Spot, Owed] = {}
        self.local: dict[tuple[str, Spot], Tensor] = {}  # for a stage of this rank
        self.batches: Sequence[tuple] = ()
        self.peak, self.trace, self.pretend = 0, None, None
        self.do = {"F": self._forward, "B": self._backward_inputs, "W": self._backward_weights}
        self.do |= {"BW": self._backward, **{kind: self._pass for kind in VOCABULARY}}

    def run(self, batches: Sequence[tuple], tokens: float) -> Tensor:
        """One step: gradients of the sum of token losses / tokens. `batches`: the arguments of the
        model for each micro-batch, or for each of its slices (token_pipeline.cut), if there are
        several. Returns the sum of the token losses that this rank knows."""
        first, stage = next(iter(self.stages.items()))
        self.batches, dtype = batches, at_least_float32(next(stage.parameters()).dtype)
        device = self._batch(Action("F", first))[0].device
        self.share = torch.full((), 1 / tokens, dtype=dtype, device=device)  # no wait, as a copy
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for synchroniser in self.synchronisers.values():
            synchroniser.begin_step()
        if self.axis.size > 1:
            self.channels.begin(self._messages())
        if self.words is not None:
            self.words.begin(batches, self.share)
        for at, item in enumerate(self.items):
            if self.words is not None:
                self.words.go_on(at)
            self._run(item)
        self.channels.finish()
        if self.words is not None:
            self.words.go_on(len(self.items))
            self.loss_sum += self.words.finish()
        for synchroniser in self.synchronisers.values():
            synchroniser.finish()
        left = [*self.kept, *self.owed]
        assert not left, f"(stage, micro-batch, slice) {left} had no backward: add BW, or B and W."
        left = [*self.local]
        assert not left, f"nobody took (kind, (stage, micro-batch, slice)) {left}: add a reader."
        return self.loss_sum

    def _run(self, item: Item) -> None:
        """A pair has received for both members before it computes, and sends for both at last."""
        actions = parts(item)
        received = [self._receive(action) for action in actions]
        start = self.axis.now()
        if self.pretend is not None:  # before passes of the vocabulary start to send
            self.axis.spend(self.pretend(item))
        made = [self._compute(a, x) for a, x in zip(actions, received, strict=True)]
        if self.trace is not None:
            self.trace.append((item, start, self.axis.now()))
        for action, tensor in zip(actions, made, strict=True):
            if tensor is not None:
                self._send(action, tensor)

    def _compute(self, action: Action, received: Tensor | None) -> Tensor | None:
        made = self.do[action.kind](action, received)
        self.peak = max(self.peak, len(self.kept) + len(self.owed))
        return made

    # ---- what an action needs, and where its result goes

    def _receive(self, action: Action) -> Tensor | None:
        """From the stage before (F) or after (B, BW); the first and the last one from outside."""
        kind, i = action.kind, action.microbatch
        if kind in VOCABULARY:
            return self.words.receive(action)
        wanted = self._wanted(action)
        if wanted is None and kind == "F":
            return self._batch(action)[0] if self.words is None else self.words.embedded(i)
        if wanted is None and kind != "W":
            return self.share if self.words is None else self.words.gradient(i)
        if wanted is None:
            return None
        kind, spot, source = wanted
        if source == self.axis.rank:
            return self.local.pop((kind, spot))
        return self.channels.receive(kind, source, self._like(action))

    def _wanted(self, action: Action) -> tuple[str, Spot, int] | None:
        """Kind, spot and rank of the result that an action takes from another stage, if any."""
        kind, stage, i, part = action
        step = {"F": -1, "B": 1, "BW": 1}.get(kind)
        if step is None or not 0 <= stage + step < self.schedule.stages:
            return None
        return kind[0], (stage + step, i, part), self.schedule.rank_of(stage + step, i)

    def _messages(self) -> dict[Route, deque[Tensor]]:
        """What comes on each route in this step, in order."""
        likes: dict[Route, deque[Tensor]] = defaultdict(deque)
        for action in (action for item in self.items for action in parts(item)):
            wanted = self._wanted(action)
            if wanted is not None and wanted[2] != self.axis.rank:
                route = wanted[2], self.axis.rank, wanted[0]
                likes[route].append(self._like(action))
        return likes

    def _batch(self, action: Action) -> tuple:
        """The arguments of the model for the micro-batch of an action, or for its slice."""
        batch = self.batches[action.microbatch]
        return batch[action.slice] if self.schedule.slices > 1 else batch

    def _like(self, action: Action) -> Tensor:
        """What flows between stages; micro-batches, and slices, may differ in size."""
        return next(iter(self.stages.values())).boundary(self._batch(action)[0])

    def _send(self, action: Action, tensor: Tensor) -> None:
        """To the stage after (F) or before (B, BW); of the first and the last one to all words."""
        kind, s, i, _ = action
        kind, other = ("F", s + 1) if kind == "F" else ("B", s - 1)
        if not 0 <= other < self.schedule.stages:
            self.words.give(kind, i, tensor)
        elif (to := self.schedule.rank_of(other, i)) == self.axis.rank:
            self.local[kind, action[1:]] = tensor
        else:
            self.channels.send(kind, tensor, to)

    # ---- what an action computes: each gives what there is to send

    def _forward(self, action: Action, x: Tensor) -> Tensor | None:
        if x.is_floating_point():
            x.requires_grad_()
        out = self.stages[action.stage](x, *self._batch(action)[1:])
        assert out.requires_grad, (
            f"nothing in stage {action.stage} or before it learns, so it has no backward: leave a "
            "parameter of the first stage unfrozen."
        )
        self.kept[action[1:]] = Kept(x, get_gradient_edge(out))
        if out.dim() > 0:
            return out.detach()
        self.loss_sum += out.detach()
        return None

    def _backward(self, action: Action, grad: Tensor) -> Tensor | None:
        x, edge = self.kept.pop(action[1:])
        self.synchronisers[action.stage].before_backward(action in self.completes)
        torch.autograd.backward((edge,), (grad,))
        return x.grad

    def _backward_inputs(self, action: Action, grad: Tensor) -> Tensor | None:
        """Only the gradient of x, and what comes by the way; no hook of a parameter runs."""
        x, edge = self.kept.pop(action[1:])
        inputs = [x] if x.requires_grad else []
        parameters = [p for p in self.stages[action.stage].parameters() if p.requires_grad]
        wanted = [*inputs, *parameters]
        with self.later[action.stage].waits() as jobs:
            found = torch.autograd.grad((edge,), wanted, (grad,), allow_unused=True)
        pairs = zip(parameters, found[len(inputs) :], strict=True)
        self.owed[action[1:]] = Owed({p: g for p, g in pairs if g is not None}, jobs)
        return found[0] if inputs else None

    def _backward_weights(self, action: Action, _: None) -> None:
        """All gradients of the micro-batch, or its slice, arrive now, as in one backward."""
        gradients, jobs = self.owed.pop(action[1:])
        last = action in self.completes
        self.synchronisers[action.stage].before_backward(last)
        jobs.reverse()
        while jobs:  # each is freed when it is done
            self._multiply(jobs.pop(), gradients, last)
        for parameter in reversed(list(self.stages[action.stage].parameters())):
            if parameter in gradients:
                parameter.backward(gradients.pop(parameter))

    def _multiply(self, job: deferred.Job, gradients: dict, last: bool) -> None:
        """Add what a matmul owes to the gradients of its micro-batch; last: of this stage."""
        gradient, before = deferred.gradient(job), gradients.get(job.weight)
        gradients[job.weight] = gradient if before is None else before + gradient

    def _pass(self, action: Action, received: Tensor | None) -> None:
        self.words.run(action, received)

    @torch.no_grad()
    def forward(self, batch: tuple) -> Tensor | None:
        """One micro-batch through all stages, without backward: the sum of token losses, or without
        labels logits [B, T, V], on one of the ranks; None on the others. All of them call it."""
        (x, *rest), last = batch, self.schedule.stages - 1
        homes = [self.schedule.rank_of(s) for s in range(last + 1)]
        if self.words is not None:
            x = self.words.embed(x)
        for s in [s for s in self.stages if homes[s] == self.axis.rank]:
            if s > 0 and homes[s - 1] != self.axis.rank:
                x = self.channels.receive("F", homes[s - 1], self.stages[s].boundary(batch[0]))
            x = self.stages[s](x, *rest)
            if s < last and homes[s + 1] != self.axis.rank:
                self.channels.send("F", x, homes[s + 1])
        self.channels.finish()
        if self.words is not None:
            x = self.words.head(self.axis.broadcast(x, homes[last]), rest[0])
        return x if homes[last] == self.axis.rank else None


# ---- 3. fused path


class FusedExecutor(Executor):
    """Posts receives ahead. Matmuls add dW straight to weight.grad, in its dtype. Hooks that start
    the reduction run where a backward reaches the weight; W has none, so its last one makes one."""

    make_channels, at_once = PostedChannels, True

    def _multiply(self, job: deferred.Job, gradients: dict, last: bool) -> None:
        if last or job.weight.grad is None:
            super()._multiply(job, gradients, last)
        else:
            deferred.accumulate(job)


# ---- 4. contract


def contract(schedule: Schedule, size: int) -> list[tuple[int, int]]:
    """(messages, bytes) that each rank sends from stage to stage in a step, if an activation of a
    micro-batch has `size` bytes; not gradients of copies, nor passes of the vocabulary."""
    sent: Counter[int] = Counter()
    for (source, _, _), count in routes(schedule).items():
        sent[source] += count
    n = schedule.slices
    return [(sent[rank], sent[rank] // n * size) for rank in range(schedule.ranks)]


def main() -> None:
    """Some schedules on 4 threads with a virtual clock: contract, predicted and measured."""
    p, m, D = 4, 8, 16
    print(f"{p} ranks, {m} micro-batches, N = 8, D = {D}, float32; F, B, W of 1/p of the model: 1")
    print("predicted, measured: messages sent by all, bytes of messages of rank 0 (N D 4 each),")
    print("most activations held (of a micro-batch in 1/p of the model), time of the step")
    print(f"{'schedule':12} {'messages':>12} {'bytes':>14} {'activations':>12} {'time':>14}")
    for name in ("afab", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"):
        schedule = build(name, p, m)
        v = schedule.stages // p  # stages per rank, each a v-th as large
        said = contract(schedule, 4 * 8 * D)
        seen = run_ranks(_demo, p, schedule, D, network=Network())
        calls = [ledger.select("send") for ledger, _, _ in seen]
        pairs = [
            (sum(messages for messages, _ in said), sum(map(len, calls))),
            (said[0][1], sum(call.bytes for call in calls[0])),
            (max(peaks(schedule)) / v, max(peak for _, peak, _ in seen) / v),
            (simulate(schedule).makespan / v, max(end for _, _, end in seen) / v),
        ]
        columns = [f"{predicted:g} {measured:g}" for predicted, measured in pairs]
        print("{:12} {:>12} {:>14} {:>12} {:>14}".format(name, *columns))


class NoReplicas:
    """Gradients that nobody else has a part of."""

    def begin_step(self) -> None:
        """Nothing to prepare."""

    def before_backward(self, last: bool) -> None:
        """Nothing to send."""

    def finish(self) -> None:
        """Nothing to wait for."""


def _demo(axis: Axis, schedule: Schedule, D: int) -> tuple[Ledger, int, float]:
    """One step of a small Llama with a layer per stage: what was sent, held, and how long."""
    cfg = ModelConfig(
        vocab_size=32, hidden_size=D, layers=schedule.stages, heads=2, kv_heads=1, ffn_size=24
    )
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    part = split(model, axis, schedule, [1] * schedule.stages)
    sharding.materialise(part, 0, initial_value)
    stages = {int(number): stage for number, stage in part.stages.items()}
    alone = dict.fromkeys(stages, NoReplicas())
    executor = Executor(stages, schedule, axis, alone)
    executor.pretend, executor.trace = Costs().of, []
    tokens_BT = torch.arange(8)[None]
    batch = tokens_BT, tokens_BT, Where.first(tokens_BT)
    executor.run([batch] * schedule.microbatches, 8 * schedule.microbatches)
    return axis.ledger, executor.peak, executor.trace[-1][2]


if __name__ == "__main__":
    main()
