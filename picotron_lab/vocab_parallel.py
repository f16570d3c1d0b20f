"""Vocabulary parallelism: each rank holds some words of embedding, output layer and loss.

Paper   Yeung et al. 2024 (2411.05288), sections 3 and 4, Algorithms 1 and 2; the split embedding:
        Megatron-LM, Shoeybi et al. 2019 (1909.08053), section 3
Idea    Logits never travel. A softmax needs three numbers per token from each rank's words: the
        largest logit m, the sum s of exp(y - m), and the label's logit z (0 if it is another
        rank's). All s e^(m - M) add up to S, where M is the largest m. What differs is how often
        ranks wait for each other between two passes over their logits: barriers.
Steps   naive  F1: largest |max| F2: sums |sum| B: gradients |dX|                        3 barriers
        1      S: m, s, z |C1: all three| T: gradients |C2: dX|                          2 barriers
        2      S: m, s, z, P, A = P W |C1: all three, dX| T: dW                          1 barrier:
               dX is the sum over ranks of f A - (1 - f) W[own label], f = s e^(m - M)/S, so that
               nobody but the optimizer waits for T. P is softmax - onehot(label) of own words:
               bf16 keeps the digits of what little is left of tokens that the model is sure of.
               (In the paper P is softmax alone, and W[label] is subtracted from f A.)
Before  each rank holds both [V, D] matrices and [N, V] logits
After   rank k holds R = ceil(V/n) rows of each (the last ranks fewer, or none), [N, R] logits
Wire    N tokens, b bytes per activation; fused: in chunks of tokens. Embedding: all_reduce(N D b).
        Loss, statistics in float32: naive all_reduce(4N), all_reduce(8N), all_reduce(N D b); 1, 2
        all_gather(12 n N) (paper: all_reduces of 12 N), all_reduce(N D b). Logits: all_gather(nRNb)
Axes    any: tp, or pp, whose first and last stage would do more; x and its gradient are whole
Dims    B micro-batch  T sequence  N = B*T tokens  D width  V vocabulary  R rows of this rank
Read    parallelize -> VocabEmbedding, VocabHead -> Passes -> Naive, Algorithm1, Algorithm2 -> Loss
Try     python -m picotron_lab.vocab_parallel    Tests   tests/test_vocab_*.py
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis
from picotron_lab.config import ConfigError
from picotron_lab.lab import run_ranks
from picotron_lab.model import IGNORED, Llama, wide
from picotron_lab.sharding import bounds, narrow

# ---- 1. the idea


def parallelize(model: Llama, axis: Axis, impl: str, algorithm: str) -> None:
    """Split embedding and head of a model on the meta device by rows over `axis`.

    impl     "plain": whole micro-batches, torch's operators; "fused": chunks, overlap, kernels
    raises   ConfigError for another impl, or an algorithm that is not "naive", "1" or "2"
    """
    if impl not in ("plain", "fused") or algorithm not in ALGORITHMS:
        raise ConfigError(
            f"vocabulary parallelism was given impl '{impl}' and algorithm '{algorithm}': give "
            f"'plain' or 'fused', and one of {', '.join(ALGORITHMS)}."
        )
    rows_VD, tied = model.embed.weight, model.head.weight is model.embed.weight
    shard = Shard(axis, rows_VD.shape[0], impl == "fused")
    embed_RD = narrow(rows_VD, 0, *shard.bounds)
    head_RD = embed_RD if tied else narrow(model.head.weight, 0, *shard.bounds)
    model.embed = VocabEmbedding(embed_RD, shard)
    model.head = VocabHead(head_RD, shard, algorithm)


@dataclass(frozen=True)
class Shard:
    """This rank's part of `vocabulary` words over `axis`: `bounds` (start, stop), maybe empty."""

    axis: Axis
    vocabulary: int
    fused: bool

    @property
    def bounds(self) -> tuple[int, int]:
        return bounds(self.vocabulary, self.axis.size, self.axis.rank)

    def local(self, ids: Tensor) -> Tensor:
        """The row of each word here; -1 for words of other ranks."""
        start, stop = self.bounds
        return torch.where((start <= ids) & (ids < stop), ids - start, -1)

    def check(self, ids: Tensor, what: str) -> None:
        """A word that no rank holds is an error on all of them. On CUDA nobody waits for this."""
        known = (ids >= 0) & (ids < self.vocabulary) | (ids == IGNORED) & (what == "label")
        torch._assert_async(
            known.all(),
            f"a {what} is not among the {self.vocabulary} words 0 to {self.vocabulary - 1} (labels "
            f"may also be {IGNORED}, ignored): use the tokenizer that vocab_size was made for.",
        )


class VocabEmbedding(nn.Module):
    """tokens [B, T] -> [B, T, D]: partial -> replicated (all_reduce, N*D); backward: identity."""

    def __init__(self, weight: nn.Parameter, shard: Shard):
        super().__init__()
        self.weight, self.shard = weight, shard

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.look_up(tokens_BT)
        values_BTD = x_BTD.detach()  # written in place, unseen by autograd: the identity
        self.shard.axis.all_reduce(values_BTD, out=values_BTD)
        return x_BTD

    def look_up(self, tokens_BT: Tensor) -> Tensor:
        """Rows of this rank's words, zeros for all others: what forward adds up over the ranks."""
        self.shard.check(tokens_BT, "token")
        local_BT = self.shard.local(tokens_BT)
        return rows_of(self.weight, local_BT).masked_fill((local_BT < 0)[..., None], 0)


class VocabHead(nn.Module):
    """x [B, T, D] -> sum of token losses; without labels logits [B, T, V] (all_gather, n*R*N)."""

    def __init__(self, weight: nn.Parameter, shard: Shard, algorithm: str):
        super().__init__()
        self.weight, self.shard, self.algorithm = weight, shard, algorithm

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        if labels_BT is None:
            return self._logits(x_ND.detach()).unflatten(0, x_BTD.shape[:2])
        learning = torch.is_grad_enabled() and (x_ND.requires_grad or self.weight.requires_grad)
        kind = ALGORITHMS["1" if self.algorithm == "2" and not learning else self.algorithm]
        size = chunk_rows(self.shard, x_ND) if self.shard.fused else max(1, len(x_ND))
        pairs = zip(x_ND.split(size), labels_BT.flatten().split(size), strict=True)
        chunks = [kind(self.shard, x_nD, self.weight, labels_n, 1.0) for x_nD, labels_n in pairs]
        return Loss.apply(x_ND, self.weight, chunks, learning)

    def passes(self, x_ND: Tensor, labels_N: Tensor, factor: float = 1.0) -> "Passes":
        """The loss of one micro-batch, for a schedule that says itself when each pass runs."""
        return ALGORITHMS[self.algorithm](self.shard, x_ND, self.weight, labels_N, factor)

    def _logits(self, x_ND: Tensor) -> Tensor:
        y_RN = x_ND.new_zeros(-(-self.shard.vocabulary // self.shard.axis.size), len(x_ND))
        y_RN[: self.weight.shape[0]] = self.weight.detach() @ x_ND.T  # the last fill it in part
        return self.shard.axis.all_gather(y_RN)[: self.shard.vocabulary].T


# ---- 2. plain path


class Passes:
    """The loss of N tokens and its gradients, pass by pass; every rank makes the same calls.

    s_pass   computes with this rank's words and starts C1
    c1       waits for C1; the sum of token losses
    t_pass   adds the gradient of the weight to dw_RD (float32 at least), once; starts C2
    c2       waits for C2; the gradient of x, whole on every rank
    Order    s_pass, c1, t_pass, c2, those of other micro-batches in between. Algorithm 2 starts
             its sum in c1: c2 may come before t_pass, and t_pass as late as one likes
    factor   of both gradients, not of the loss; c_N: factor for counted tokens, 0 for ignored
    Holds    x_ND; S to T one [N, R] (naive: float32); S to C1 [3n, N] (naive: [2, N]), 2 also
             A [N, D]; T (2: C1) to C2 dX [N, D]
    """

    def __init__(self, shard: Shard, x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, factor: float):
        shard.check(labels_N, "label")
        self.axis, self.fused = shard.axis, shard.fused
        self.x_ND, self.w_RD = x_ND.detach(), w_RD.detach()
        self.local_N = shard.local(labels_N)
        self.counted_N = labels_N != IGNORED
        self.c_N = wide(self.counted_N.to(self.x_ND.dtype)) * factor
        self.m_N = None  # needed until kept_NR are exponentials

    def t_pass(self, dw_RD: Tensor) -> None:
        d_NR = self._gradient(self.m_N, self.c_N / self._take("s_N"), self.c_N)
        self._send_dx(d_NR @ self.w_RD)
        dw_RD += d_NR.T @ self.x_ND  # while dX travels

    def c2(self) -> Tensor:
        return self._take("summed").wait()

    def _take(self, name: str) -> Any:
        """What an earlier pass has left: it is needed once, and may be large."""
        assert name in vars(self), (
            f"a pass of the split loss found no {name}: call s_pass, c1, t_pass, c2 in this order, "
            "each once (with algorithm 2, t_pass may be the last)."
        )
        return vars(self).pop(name)

    def _send_dx(self, dx_ND: Tensor) -> None:
        dx_ND = dx_ND.to(self.x_ND.dtype)
        self.summed = self.axis.all_reduce(dx_ND, out=dx_ND, wait=False)

    def _gradient(self, m_N: Tensor | None, f_N: Tensor, c_N: Tensor) -> Tensor:
        y_NR = self._take("kept_NR")
        d_NR = arithmetic(self.fused, y_NR).gradient_(y_NR, m_N, f_N, c_N, self.local_N)
        return d_NR.to(self.x_ND.dtype)


class Naive(Passes):
    """Three barriers: largest logit, sums, gradient of x."""

    def s_pass(self) -> None:
        y_NR = wide(self.x_ND @ self.w_RD.T)
        m_N = self.axis.all_reduce(Torch.largest(y_NR), "max")
        y_NR.sub_(m_N[:, None])
        z_N = Torch.picked(y_NR, self.local_N)
        self.kept_NR = y_NR.exp_()
        self.sums_2N = torch.stack([self.kept_NR.sum(-1), z_N])

    def c1(self) -> Tensor:
        self.s_N, z_N = self.axis.all_reduce(self._take("sums_2N"))
        return (self.s_N.log() - z_N).masked_fill(~self.counted_N, 0).sum()


class Algorithm1(Passes):
    """Two barriers: statistics relative to each rank's own largest logit; gradient of x."""

    def s_pass(self) -> None:
        y_NR = self.kept_NR = self.x_ND @ self.w_RD.T
        self.mine_3N = arithmetic(self.fused, y_NR).statistics(y_NR, self.local_N)
        self.theirs = self.axis.all_gather(self.mine_3N, wait=False)

    def c1(self) -> Tensor:
        self.m_N, self.s_N, z_N = merge(self._take("theirs").wait(), self.axis.size)
        return (self.s_N.log() + (self.m_N - z_N)).masked_fill(~self.counted_N, 0).sum()


class Algorithm2(Algorithm1):
    """One barrier: P W is computed before it, so that the gradient of x needs no other."""

    def s_pass(self) -> None:
        super().s_pass()
        m_N, s_N, _ = self.mine_3N
        self.kept_NR = self._gradient(m_N, 1 / s_N, torch.ones_like(s_N))  # P - onehot(label)
        self.a_ND = self.kept_NR @ self.w_RD  # while the statistics travel

    def c1(self) -> Tensor:
        loss, (m_N, s_N, _) = super().c1(), self._take("mine_3N")
        f_N = (m_N - self.m_N).exp() * s_N / self.s_N  # the part of the softmax that is here
        self.scale_N, self.rest_N = self.c_N * f_N, self.c_N * (1 - f_N)
        here_N = self.rest_N * (self.local_N >= 0)
        labels_ND = here_N[:, None] * rows_of(self.w_RD, self.local_N)
        self._send_dx(self.scale_N[:, None] * self._take("a_ND") - labels_ND)
        return loss

    def t_pass(self, dw_RD: Tensor) -> None:
        dw_RD += self._gradient(None, self._take("scale_N"), self.rest_N).T @ self.x_ND


ALGORITHMS = {"naive": Naive, "1": Algorithm1, "2": Algorithm2}


class Loss(torch.autograd.Function):
    """Sum of token losses. Plain: S and C1 in forward, T and C2 in backward.

    Fused: in chunks, and T in forward too, so that logits live briefly: the gradient of a sum needs
    only one number from above. Until backward it keeps dX, and dW [R, D] in float32.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_RD: Tensor, chunks: list[Passes], learning: bool) -> Tensor:
        early = chunks[0].fused and learning
        ctx.save_for_backward(*(() if early else (x_ND, w_RD)))
        ctx.chunks, ctx.dw_RD = chunks, wide(torch.zeros_like(w_RD)) if early else None
        loss = wide(x_ND.new_zeros(()))
        ahead = int(chunks[0].axis.size > 1)  # chunks whose S runs early; alone, nothing travels
        for chunk in chunks[:ahead]:
            chunk.s_pass()
        for chunk, following in zip_longest(chunks, chunks[ahead:]):
            if following is not None:
                following.s_pass()
            loss += chunk.c1()
            if early:
                chunk.t_pass(ctx.dw_RD)
            elif not learning:
                del chunk.kept_NR
            chunk.x_ND = chunk.w_RD = None  # autograd keeps them, as zero.py wants it
        return loss

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.chunks and not torch.is_grad_enabled(), (
            "the split loss has gradients for one backward, and no second derivative: call the "
            "model again before the next backward, and do not set create_graph."
        )
        passes, dw_RD = ctx.chunks[0], ctx.dw_RD
        if dw_RD is None:
            passes.x_ND, passes.w_RD = ctx.saved_tensors
            dw_RD = wide(torch.zeros_like(passes.w_RD))
            passes.t_pass(dw_RD)
        dx_ND = torch.cat([chunk.c2() for chunk in ctx.chunks]).mul_(factor)
        ctx.chunks = ctx.dw_RD = None  # once: both are overwritten
        return dx_ND, dw_RD.mul_(factor).to(dx_ND.dtype), None, None


class Torch:
    """With [N, R] logits, R >= 0: largest (of none -inf), picked (the label's, 0 if not here)."""

    @staticmethod
    def largest(y_NR: Tensor) -> Tensor:
        return y_NR.amax(-1) if y_NR.shape[1] else y_NR.new_full(y_NR.shape[:1], float("-inf"))

    @staticmethod
    def picked(y_NR: Tensor, local_N: Tensor) -> Tensor:
        if not y_NR.shape[1]:
            return y_NR.new_zeros(y_NR.shape[0])
        return y_NR.gather(1, local_N.clamp(min=0)[:, None]).squeeze(1).masked_fill(local_N < 0, 0)

    @staticmethod
    def statistics(y_NR: Tensor, local_N: Tensor) -> Tensor:
        """[3, N] of float32 at least: m, sum of exp(y - m), and the label's logit."""
        y_NR = wide(y_NR)
        m_N = Torch.largest(y_NR)
        s_N = (y_NR - m_N[:, None]).exp_().sum(-1)
        return torch.stack([m_N, s_N, Torch.picked(y_NR, local_N)])

    @staticmethod
    def gradient_(
        y_NR: Tensor, m_N: Tensor | None, f_N: Tensor, c_N: Tensor, local_N: Tensor
    ) -> Tensor:
        """f exp(y - m) - c onehot(label), without m f y - c onehot(label); overwrites a wide y."""
        y_NR = wide(y_NR)
        if m_N is not None:
            y_NR.sub_(m_N[:, None]).exp_()
        y_NR.mul_(f_N[:, None])
        index_NR = local_N.clamp(min=0)[:, None][:, : y_NR.shape[1]]  # one column, or none if R = 0
        return y_NR.scatter_add_(1, index_NR, -(c_N * (local_N >= 0))[:, None])


def rows_of(w_RD: Tensor, local: Tensor) -> Tensor:
    """Rows of the weight, where `local` is -1 another one; of none, zeros that depend on it."""
    if w_RD.shape[0]:
        return F.embedding(local.clamp(min=0), w_RD)
    return w_RD.sum() + w_RD.new_zeros(*local.shape, w_RD.shape[1])


def merge(theirs: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [ranks * 3, N] of all ranks -> m, s, z of the whole vocabulary, each [N]."""
    m_nN, s_nN, z_nN = theirs.view(ranks, 3, -1).unbind(1)
    m_N = m_nN.amax(0)
    return m_N, (s_nN * (m_nN - m_N).exp()).sum(0), z_nN.sum(0)


# ---- 3. fused path

CHUNK_ELEMENTS = {"cuda": 2**27, "cpu": 2**20}  # logits of a chunk; two chunks are under way


def chunk_rows(shard: Shard, x_ND: Tensor) -> int:
    """Tokens per chunk, alike on all ranks. Up to D of them need less room than dW in float32."""
    elements = CHUNK_ELEMENTS["cuda" if x_ND.is_cuda else "cpu"]
    return max(elements * shard.axis.size // shard.vocabulary, x_ND.shape[1])


def arithmetic(fused: bool, y_NR: Tensor) -> Any:
    """What has `statistics` and `gradient_` for these logits: class Torch, or the kernels."""
    if not fused or not y_NR.is_cuda or y_NR.dtype == torch.float64 or not y_NR.numel():
        return Torch
    from picotron_lab.kernels import vocab

    return vocab


# ---- 4. contract


def contract(algorithm: str, N: int, D: int, ranks: int, chunks: int = 1) -> tuple[int, int, int]:
    """(barriers per chunk, calls, payload bytes) of loss and gradients of N tokens in float32."""
    calls, numbers = (3, 3 * N) if algorithm == "naive" else (2, 3 * ranks * N)
    return {"naive": 3, "1": 2, "2": 1}[algorithm], chunks * calls, 4 * (numbers + N * D)


def peak(algorithm: str, impl: str, chunk: int) -> tuple[int, int]:
    """(tokens, widths): beside x and W at most R (tokens + widths D) float32 numbers live.

    naive in T: logits, dW, what is added to it; 1 and 2 in S: logits, exp(y - m). Fused: also the
    next chunk's logits, and dW in S. For chunks of 2D tokens or more; fused: two of D or more.
    """
    fused, split = int(impl == "fused"), int(algorithm != "naive")
    return (1 + fused + split) * chunk, fused if split else 2


def main() -> None:
    """Every algorithm and path on 4 threads, its contract: formula, predicted, measured."""
    N, D, V, n, R, c = 512, 8, 17_001, 4, 4251, 246
    print(f"N = {N}, D = {D}, V = {V}, {n} ranks, R = {R}, float32; fused: chunks of {c} tokens")
    print("Bytes and calls, predicted and measured; payload: naive 12N + 4ND, 1 and 2 12nN + 4ND")
    for algorithm, impl in [(a, i) for a in ALGORITHMS for i in ("plain", "fused")]:
        chunk = N if impl == "plain" else c
        barriers, calls, payload = contract(algorithm, N, D, n, -(-N // chunk))
        tokens, widths = peak(algorithm, impl, chunk)
        ledger, most = run_ranks(_demo, n, algorithm, impl, N, D, V)[0]
        line = f"{algorithm:5} {impl}  barriers {barriers}  calls {calls} {len(ledger.calls)}  "
        line += f"payload {payload} {ledger.bytes()}  peak 4R({tokens} + {widths}D) "
        print(f"{line}{4 * R * (tokens + widths * D)} {most}")


def _demo(axis: Axis, algorithm: str, impl: str, N: int, D: int, V: int) -> tuple:
    start, stop = bounds(V, axis.size, axis.rank)
    weight = nn.Parameter(torch.ones(stop - start, D))
    x_BTD, labels_BT = torch.ones(1, N, D, requires_grad=True), torch.arange(N)[None]
    with Meter() as meter:
        VocabHead(weight, Shard(axis, V, impl == "fused"), algorithm)(x_BTD, labels_BT).backward()
    return axis.ledger, meter.peak_bytes


if __name__ == "__main__":
    main()
