"""The passes of a vocabulary that is split over the ranks of a pipeline: IF, S, T and IB.

Paper   Yeung et al. 2024 (2411.05288), section 5: vocabulary parallelism in pipelines
Idea    Embedding and output layer belong to no stage: each rank holds some words of both, and their
        passes are actions of the schedule like any other, placed where ranks would wait for
        transformer layers. What they compute is in vocab_parallel.py.
Steps   IF  rows of this rank's words; their sum over ranks is what the first stage starts from
        C0  the last stage's output to all ranks
        S   logits of this rank's words, and their statistics, which start to travel (C1)
        T   Algorithm 1: what is left of the loss and its gradients, whose sum starts to travel
            (C2); Algorithm 2: the weight's gradient, for which nobody waits; interlaced: naive,
            all ranks at once
        B   of the last stage waits for the gradient of its output: C2, Algorithm 2: C1
        IB  the gradient of the first stage's input to all ranks, rows of this rank's words
Wire    per micro-batch: IF all_reduce(N D), C0 and IB (p-1) N D from one rank, C1 and C2 as in
        vocab_parallel.py
Order   All ranks come to these passes in one order (schedules/validator.py), so they meet in the
        same calls. Algorithm 2 starts to sum the gradient when the statistics of all ranks are
        there, and no rank should wait for them: each does so before the first action that, in a
        simulation, starts after the last rank's S. All ranks follow one simulated time, so they
        never wait in a circle; but each comes to it between other passes, so it has a channel of
        its own
Dims    B micro-batch  T sequence  N = B*T  D width  p ranks
Read    Words.run -> _look_up, _scores, _rest, _rows -> give -> gradient -> go_on -> plan
Tests   tests/test_pipeline_vocabulary.py
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from picotron_lab.comm import Axis, Handle
from picotron_lab.schedules.actions import Action, Schedule
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import simulate

ALGORITHM = {1: "1", 2: "2", 3: "naive"}  # of Schedule.vocabulary


class Words:
    """This rank's words, and what their passes leave for each other in a step.

    embed, head  a VocabEmbedding and a VocabHead over `axis`, all ranks of the pipeline
    plan         of Algorithm 2: by number of action, whose gradients are summed before it; made
                 for equal times, one for measured ones may be put in its place
    """

    def __init__(self, embed: Any, head: Any, axis: Axis, schedule: Schedule):
        self.embed, self.head, self.axis = embed, head, axis
        self.early = schedule.vocabulary == 2  # the gradient of x starts to travel before T
        self.together = schedule.vocabulary == 3  # interlaced: all ranks start a pass at once
        self.first, self.last = schedule.rank_of(0), schedule.rank_of(schedule.stages - 1)
        everyone = [list(axis.ranks)]
        # what one rank gives to all, forward and back: a channel for each, as between stages
        self.channels = {kind: axis.split(f"pp.all.{kind}", everyone) for kind in ("F", "B")}
        self.second = axis.split("pp.all.dx", everyone) if self.early else axis
        self.plan = plan(schedule, axis.rank, Costs()) if self.early else {}
        self.do = {"IF": self._look_up, "S": self._scores, "T": self._rest, "IB": self._rows}

    def begin(self, batches: Sequence[tuple], share: Tensor) -> None:
        """A step begins. share: factor of the gradient of the sum of token losses."""
        self.batches, self.share = batches, share
        self.sums: dict[int, Handle] = {}  # of IF, under way
        self.edges: dict[int, GradientEdge] = {}  # of IF, for IB
        self.passes: dict[int, Any] = {}  # from S until T
        self.results: dict[int, Any] = {}  # the same, from S until the gradient of x is there
        self.given: dict[tuple[str, int], Tensor] = {}  # by this rank, to all others and itself
        self.sent: list[Handle] = []
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=share.device)

    def run(self, action: Action, received: Tensor | None) -> None:
        """IF, S, T or IB of one micro-batch."""
        self.do[action.kind](action.microbatch, received)

    def receive(self, action: Action) -> Tensor | None:
        """Wait for what a pass needs: S the last stage's output, IB the gradient of the first one's
        input, [B, T, D]; T the statistics of all ranks."""
        if self.together:
            self.axis.barrier()
        if action.kind == "T" and not self.early:
            self.loss_sum += self.passes[action.microbatch].c1()
        if action.kind in ("IF", "T"):
            return None
        kind, source = ("F", self.last) if action.kind == "S" else ("B", self.first)
        if source == self.axis.rank:
            return self.given.pop((kind, action.microbatch))
        tokens_BT = self.batches[action.microbatch][0]
        like = self.head.weight.detach().new_empty(1).expand(*tokens_BT.shape, self.width)
        return self.channels[kind].recv(like, source)

    @property
    def width(self) -> int:
        """D."""
        return self.head.weight.shape[1]

    def give(self, kind: str, microbatch: int, x_BTD: Tensor) -> None:
        """To all ranks: the last stage's output (F), or the gradient of the first one's input
        (B)."""
        self.given[kind, microbatch] = x_BTD
        others = [rank for rank in range(self.axis.size) if rank != self.axis.rank]
        sends = [(x_BTD, rank) for rank in others]
        self.sent = [handle for handle in self.sent if not handle.done()]
        self.sent.append(self.channels[kind].exchange(sends, [], wait=False))

    def embedded(self, microbatch: int) -> Tensor:
        """The first stage's input [B, T, D]: the sum of all ranks' rows."""
        return self.sums.pop(microbatch).wait()

    def gradient(self, microbatch: int) -> Tensor:
        """The gradient of the last stage's output [B, T, D]."""
        tokens_BT = self.batches[microbatch][0]
        return self.results.pop(microbatch).c2().view(*tokens_BT.shape, self.width)

    def go_on(self, at: int) -> None:
        """Before action number `at`: with Algorithm 2, start the sums of gradients that are due."""
        for i in self.plan.get(at, ()):
            self.results[i].axis = self.second
            self.loss_sum += self.results[i].c1()

    def finish(self) -> Tensor:
        """All calls are over. Returns the sum of token losses on one rank, 0 on the others."""
        left = [*self.passes, *self.given, *self.edges]
        assert not left, (
            f"micro-batches {left} had not all of IF, S, T and IB: add what is missing."
        )
        for passes in self.results.values():
            passes.c2()
        for handle in [*self.sums.values(), *self.sent]:
            handle.wait()
        self.results, self.sums, self.sent = {}, {}, []
        return self.loss_sum if self.axis.rank == self.last else torch.zeros_like(self.loss_sum)

    # ---- the passes

    def _look_up(self, i: int, _: None) -> None:
        x_BTD = self.embed.look_up(self.batches[i][0])
        assert x_BTD.requires_grad, (
            "a frozen embedding has no backward: leave it unfrozen, or do not split the vocabulary "
            "over the pipeline's ranks."
        )
        self.edges[i] = get_gradient_edge(x_BTD)
        values_BTD = x_BTD.detach()
        self.sums[i] = self.axis.all_reduce(values_BTD, out=values_BTD, wait=False)
        if self.axis.rank != self.first:  # it has no use for a sum, but must not drop it before
            for j in [j for j, handle in self.sums.items() if handle.done()]:
                self.sums.pop(j).wait()

    def _scores(self, i: int, x_BTD: Tensor) -> None:
        labels_N = self.batches[i][1].flatten()
        passes = self.head.passes(x_BTD.flatten(0, 1), labels_N, self.share)
        self.passes[i] = self.results[i] = passes
        passes.s_pass()

    def _rest(self, i: int, _: None) -> None:
        passes = self.passes.pop(i)
        passes.t_pass(self.head.weight.grad)
        if self.axis.rank != self.last:  # it has no use for the sum, but must not drop it before
            for j in [j for j in self.results if j not in self.passes]:
                if self.results[j].summed.done():
                    self.results.pop(j).c2()

    def _rows(self, i: int, grad_BTD: Tensor) -> None:
        torch.autograd.backward((self.edges.pop(i),), (grad_BTD,))


def plan(schedule: Schedule, rank: int, costs: Costs) -> dict[int, list[int]]:
    """Before which of its actions this rank takes part in the sums of which micro-batches."""
    said = simulate(schedule, costs)
    known = [0.0] * schedule.microbatches  # when S of all ranks is done
    for items, ends in zip(schedule.lists, said.ends, strict=True):
        for item, end in zip(items, ends, strict=True):
            if isinstance(item, Action) and item.kind == "S":
                known[item.microbatch] = max(known[item.microbatch], end + costs.barrier)
    found: dict[int, list[int]] = {}
    for i, moment in enumerate(known):
        found.setdefault(bisect_left(said.starts[rank], moment), []).append(i)
    return found
