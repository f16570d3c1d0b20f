"""Wrong answers to lesson 07 that a student may give."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons.kit import mutant
from picotron_lab.comm import Axis
from picotron_lab.model import IGNORED
from picotron_lab.tensor_parallel import Leave


@mutant("07.1", "must count as zeros")
def other_words_looked_up(solution: ModuleType) -> dict:
    """Indices must be valid, so they are clamped; that is all."""

    def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:
        x_BTD = F.embedding((tokens_BT - start).clamp(0, len(w_RD) - 1), w_RD)
        return Leave.apply(x_BTD, axis)

    return {"embed": embed}


def masked(tokens_BT: Tensor, w_RD: Tensor, start: int) -> Tensor:
    """Rows of own words, zeros for others."""
    local_BT = tokens_BT - start
    here_BT = (local_BT >= 0) & (local_BT < len(w_RD))
    return F.embedding(local_BT.clamp(0, len(w_RD) - 1), w_RD) * here_BT[..., None]


@mutant("07.1", "nothing was added up")
def other_words_zero(solution: ModuleType) -> dict:
    """Words that are not here are zeros, as the task says."""

    def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:
        return masked(tokens_BT, w_RD, start)

    return {"embed": embed}


@mutant("07.1", "which every rank already has whole")
def embedding_summed_back(solution: ModuleType) -> dict:
    """The dual of an all_reduce is an all_reduce."""

    class Both(Leave):
        @staticmethod
        def forward(ctx, x_BTD: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return axis.all_reduce(x_BTD)

        @staticmethod
        def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
            return ctx.axis.all_reduce(grad_BTD), None

    def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:
        return Both.apply(masked(tokens_BT, w_RD, start), axis)

    return {"embed": embed}


@mutant("07.1", "the table stays where it is")
def table_gathered(solution: ModuleType) -> dict:
    """With the whole table the look-up is that of one device."""

    def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:
        longest = axis.all_reduce(torch.tensor([len(w_RD)]), "max").item()
        padded = F.pad(w_RD.detach(), (0, 0, 0, longest - len(w_RD)))
        whole_BTD = F.embedding(tokens_BT, axis.all_gather(padded))
        mine_BTD = masked(tokens_BT, w_RD, start)
        return whole_BTD + mine_BTD - mine_BTD.detach()

    return {"embed": embed}


ALL_WORDS = 100  # more than any case has


def softmax_loss(y_NR: Tensor, labels_N: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """(label's logit if it is here, its place, whether it is here)"""
    local_N = labels_N - start
    here_N = (local_N >= 0) & (local_N < y_NR.shape[1])
    place_N = local_N.clamp(0, y_NR.shape[1] - 1)
    return y_NR.gather(1, place_N[:, None])[:, 0] * here_N, place_N, here_N


def written_out(
    x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int, axis: Axis, mistake: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Three barriers by hand, with at most one mistake."""
    y_NR = x_ND @ w_RD.T
    z_N, place_N, here_N = softmax_loss(y_NR, labels_N, start)
    own_N = y_NR.amax(1)
    m_N = axis.all_reduce(own_N, "max")
    m_N = torch.zeros_like(m_N) if mistake == "no maximum" else m_N
    relative_N = own_N if mistake == "own maximum" else m_N
    p_NR = (y_NR - relative_N[:, None]).exp()
    if mistake == "one-hot":
        wide_NV = F.one_hot(labels_N.clamp(min=0), ALL_WORDS) * (labels_N != IGNORED)[:, None]
        here_N = wide_NV[:, start : start + len(w_RD)].sum(1)
    if mistake == "four calls":
        s_N, z_N = axis.all_reduce(p_NR.sum(1)), axis.all_reduce(z_N)
    else:
        s_N, z_N = axis.all_reduce(torch.stack([p_NR.sum(1), z_N]))
    counted_N = torch.ones_like(here_N) if mistake == "ignored" else labels_N != IGNORED
    loss = ((s_N.log() + m_N - z_N) * counted_N).sum()
    d_NR = p_NR / s_N[:, None] * counted_N[:, None]
    one_N = torch.ones_like(z_N) if mistake == "label anywhere" else here_N.double()
    d_NR[torch.arange(len(d_NR)), place_N] -= one_N
    dx_ND = d_NR @ w_RD
    dx_ND = dx_ND if mistake == "dx alone" else axis.all_reduce(dx_ND)
    return loss, dx_ND, d_NR.T @ x_ND


def with_mistake(mistake: str) -> dict:
    """three_barriers, written out, with a mistake."""

    def three_barriers(
        x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int, axis: Axis
    ) -> tuple[Tensor, Tensor, Tensor]:
        return written_out(x_ND, w_RD, labels_N, start, axis, mistake)

    return {"three_barriers": three_barriers}


@mutant("07.2", "overflows")
def no_maximum(solution: ModuleType) -> dict:
    """log sum exp is log of the sum of exp."""
    return with_mistake("no maximum")


@mutant("07.2", "relative to different largest logits")
def own_maximum(solution: ModuleType) -> dict:
    """Any maximum keeps exp from overflowing, so each rank takes its own."""
    return with_mistake("own maximum")


@mutant("07.2", "ignored labels count")
def ignored_labels(solution: ModuleType) -> dict:
    """A label that no rank has adds no logit."""
    return with_mistake("ignored")


@mutant("07.2", "only a label that is here counts")
def label_anywhere(solution: ModuleType) -> dict:
    """The index is clamped so that it is valid, and 1 is subtracted there."""
    return with_mistake("label anywhere")


@mutant("07.2", "from its own words alone")
def dx_alone(solution: ModuleType) -> dict:
    """The softmax is right on every rank, so its gradients are."""
    return with_mistake("dx alone")


@mutant("07.2", "sums and label's logits do")
def four_calls(solution: ModuleType) -> dict:
    """A call for each thing that is summed."""
    return with_mistake("four calls")


@mutant("07.2", "columns for its own words only")
def one_hot_of_all_words(solution: ModuleType) -> dict:
    """The label as a row of zeros and a one, of which each rank cuts out its columns."""
    return with_mistake("one-hot")


@mutant("07.2", "logits never travel")
def logits_gathered(solution: ModuleType) -> dict:
    """With all logits it is the loss of one device."""

    def three_barriers(
        x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int, axis: Axis
    ) -> tuple[Tensor, Tensor, Tensor]:
        longest, V = axis.all_reduce(torch.tensor([len(w_RD), start + len(w_RD)]), "max").tolist()
        padded_RN = F.pad(w_RD @ x_ND.T, (0, 0, 0, longest - len(w_RD)))
        y_NV = axis.all_gather(padded_RN)[:V].T.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(y_NV, labels_N, ignore_index=IGNORED, reduction="sum")
            (dy_NV,) = torch.autograd.grad(loss, [y_NV])
        d_NR = dy_NV[:, start : start + len(w_RD)]
        return loss.detach(), axis.all_reduce(d_NR @ w_RD), d_NR.T @ x_ND

    return {"three_barriers": three_barriers}


@mutant("07.3", "a second barrier")
def two_barriers(solution: ModuleType) -> dict:
    """Algorithm 1: the product with w waits for the true sums, and everybody waits for it."""

    def local_pass(x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int) -> Any:
        return solution.local_pass(x_ND, w_RD, labels_N, start), w_RD

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        inner, w_RD = state
        inner.a_ND = inner.p_NR @ w_RD
        return solution.meet(inner, axis)

    def weight_gradient(state: Any) -> Tensor:
        return solution.weight_gradient(state[0])

    return {"local_pass": local_pass, "meet": meet, "weight_gradient": weight_gradient}


@mutant("07.3", "a second barrier")
def two_barriers_in_a_loop(solution: ModuleType) -> dict:
    """The same product, word by word, which is no matmul."""
    found = two_barriers(solution)

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        inner, w_RD = state
        inner.a_ND = sum(p[:, None] * w for p, w in zip(inner.p_NR.T, w_RD, strict=True))
        return solution.meet(inner, axis)

    return found | {"meet": meet}


@mutant("07.3", "m, s and z can travel together")
def three_calls(solution: ModuleType) -> dict:
    """First the largest logit, then the sums that are relative to it, then dx."""

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        own_m, own_s, z_N = state.mine_3N
        m_N = axis.all_reduce(own_m, "max")
        share_N = own_s * (own_m - m_N).exp()
        s_N, z_N = axis.all_reduce(torch.stack([share_N, z_N]))
        loss = ((s_N.log() + m_N - z_N) * state.counted_N).sum()
        state.scale_N = share_N / s_N * state.counted_N
        return loss, axis.all_reduce(state.scale_N[:, None] * state.a_ND - state.b_ND)

    return {"meet": meet}


@mutant("07.2", "three_barriers returned a tensor of shape")
def loss_and_dx_only(solution: ModuleType) -> dict:
    """The gradient of w is somebody else's."""
    return {"three_barriers": lambda *given: solution.three_barriers(*given)[:2]}


@mutant("07.3", "relative to different largest logits")
def sums_not_rescaled(solution: ModuleType) -> dict:
    """The sums are there: add them up."""

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        own_m, own_s, _ = state.mine_3N
        m_N = axis.all_reduce(own_m, "max")
        s_N, z_N = axis.all_reduce(state.mine_3N[1:])
        loss = ((s_N.log() + m_N - z_N) * state.counted_N).sum()
        state.scale_N = own_s / s_N * state.counted_N
        return loss, axis.all_reduce(state.scale_N[:, None] * state.a_ND - state.b_ND)

    return {"meet": meet}


@mutant("07.3", "has scaled the row of the label, too")
def label_scaled_too(solution: ModuleType) -> dict:
    """(P - onehot) W is one matmul; the factor comes afterwards."""

    def local_pass(x_ND: Tensor, w_RD: Tensor, labels_N: Tensor, start: int) -> Any:
        state = solution.local_pass(x_ND, w_RD, labels_N, start)
        state.a_ND, state.b_ND = state.a_ND - state.b_ND, torch.zeros_like(state.b_ND)
        return state

    return {"local_pass": local_pass}


@mutant("07.3", "own words alone")
def dx_not_met(solution: ModuleType) -> dict:
    """One barrier is one exchange: of the statistics."""

    class Statistics:
        def __init__(self, axis: Axis):
            self.size, self.all_gather = axis.size, axis.all_gather

        def all_reduce(self, x: Tensor) -> Tensor:
            """Nothing is sent."""
            return x

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        return solution.meet(state, Statistics(axis))

    return {"meet": meet}


@mutant("07.3", "logits never travel")
def probabilities_gathered(solution: ModuleType) -> dict:
    """With everybody's P the rest is easy."""

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        found = solution.meet(state, axis)
        longest = axis.all_reduce(torch.tensor([state.p_NR.shape[1]]), "max").item()
        axis.all_gather(F.pad(state.p_NR, (0, longest - state.p_NR.shape[1])).T)
        return found

    return {"meet": meet}


@mutant("07.3", "nobody waits for this pass")
def statistics_asked_again(solution: ModuleType) -> dict:
    """The weights' gradient needs the sums, so it asks for them."""

    def meet(state: Any, axis: Axis) -> tuple[Tensor, Tensor]:
        state.axis = axis
        return solution.meet(state, axis)

    def weight_gradient(state: Any) -> Tensor:
        state.axis.all_gather(state.mine_3N)
        return solution.weight_gradient(state)

    return {"meet": meet, "weight_gradient": weight_gradient}


@mutant("07.3", "columns for its own words only")
def one_hot_in_last_pass(solution: ModuleType) -> dict:
    """P - onehot, as in the formula: of all words, then the own ones."""

    def weight_gradient(state: Any) -> Tensor:
        wide_NV = F.one_hot(state.local_N.clamp(min=0), ALL_WORDS)
        label_NR = wide_NV[:, : state.p_NR.shape[1]] * (state.local_N >= 0)[:, None]
        return (state.scale_N[:, None] * state.p_NR - label_NR).T @ state.x_ND

    return {"weight_gradient": weight_gradient}


@mutant("07.1", "its rows take what is theirs")
def embedding_averaged_back(solution: ModuleType) -> dict:
    """Better to see to it that the gradient is alike on all ranks."""

    class Both(Leave):
        @staticmethod
        def forward(ctx, x_BTD: Tensor, axis: Axis) -> Tensor:
            ctx.axis = axis
            return axis.all_reduce(x_BTD)

        @staticmethod
        def backward(ctx, grad_BTD: Tensor) -> tuple[Tensor, None]:
            return ctx.axis.all_reduce(grad_BTD, "mean"), None

    def embed(tokens_BT: Tensor, w_RD: Tensor, start: int, axis: Axis) -> Tensor:
        return Both.apply(masked(tokens_BT, w_RD, start), axis)

    return {"embed": embed}
