"""What benchmarks/kernels.py measures: of every Triton kernel its inputs, paths and bytes.

A case names one operation and says how to compute it in several ways, all of the same tensors:

    exact    in float64, from its definition or by torch's operator
    eager    what a model without kernels does, one operator after another
    torch    torch's own operator for the whole of it, where there is one
    ours     picotron_lab/kernels

Bytes are those that a kernel must move at least: each input read once, each output written once.
A new kernel is one more function that returns cases, named in BUILDERS at the end.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from kernels import Case, Dice, Function
from torch import Tensor

from picotron_lab.kernels import adamw, merge, norm, permute, rope, swiglu, vocab
from picotron_lab.model import Rotate, rotary_angles

EPS = 1e-5
# a rate far above a real one: what is wrong with an update must show beside the weight
UPDATE = adamw.Update(3, 0.1, (0.9, 0.95), 1e-8, 0.1)


def normals(*shapes: tuple[int, ...]) -> Callable[[Dice], list[Tensor]]:
    """A Case's draw of tensors of these shapes."""
    return lambda dice: [dice.normal(*shape) for shape in shapes]


# ---- norms


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in single operators, rounded where Hugging Face Llama rounds."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return weight * (wide * scale).to(x.dtype)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """torch's operator."""
    return F.rms_norm(x, weight.shape, weight, EPS)


def after_adding(normed: Function) -> Function:
    """x, delta, weight -> the sum, and the norm of it."""

    def both(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, normed(total, weight)

    return both


def norms(smoke: bool, e: int) -> list[Case]:
    """x -> y; dy, x -> dx. With the residual: x, delta -> s, y; ds, dy, s -> dx, also ddelta."""
    rows, widths = (5, (67,)) if smoke else (16384, (2048, 4096, 8192))
    plain = {
        "eager": plain_norm,
        "torch": torch_norm,
        "ours": lambda x, weight: norm.rms_norm(x, weight, EPS),
    }
    added = {
        "eager": after_adding(plain_norm),
        "torch": after_adding(torch_norm),
        "ours": lambda x, delta, weight: norm.add_rms_norm(x, delta, weight, EPS),
    }
    found = []
    for width in widths:
        row, size, n = (rows, width), f"{rows} x {width}", rows * width * e
        draws, moves = (normals(row, (width,)), normals(row, row, (width,))), (2 * n, 3 * n)
        found += [
            Case("rms_norm", size, draws[0], torch_norm, plain, moves, 2),
            Case("add_rms_norm", size, draws[1], added["torch"], added, (4 * n, 4 * n), 3),
        ]
    return found


# ---- rotary positions, SwiGLU


def by_complex_numbers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Each pair (i, i + C/2) of q and k [B, T, heads, C] is a complex number that is turned."""
    half = cos.shape[1] // 2
    turn = torch.complex(cos[:, :half], sin[:, :half])[:, None]
    turned = [torch.complex(*x.chunk(2, -1)) * turn for x in (q, k)]
    return [torch.cat([x.real, x.imag], -1) for x in turned]


def rope_case(shape: tuple[int, int, int, int], kv_heads: int, e: int) -> Case:
    """q [B, T, H, C] and k, read and written; half of each row of cos and sin, in float32."""
    B, T, H, C = shape

    def draw(dice: Dice) -> list[Tensor]:
        positions = torch.arange(T, device=dice.generator.device)
        q, k = dice.normal(*shape), dice.normal(B, T, kv_heads, C)
        return [q, k, *rotary_angles(positions, C, 10_000.0)]

    paths = {"eager": lambda q, k, cos, sin: Rotate()(q, k, (cos, sin)), "ours": rope.rope_qk}
    moves = 2 * B * T * (H + kv_heads) * C * e + 4 * T * C
    size = f"{B} x {T} x {H}/{kv_heads} x {C}"
    return Case("rope", size, draw, by_complex_numbers, paths, (moves, moves), 2)


def ropes(smoke: bool, e: int) -> list[Case]:
    """As many key heads as query heads, and groups of query heads that share one."""
    if smoke:
        return [rope_case((2, 2, 3, 8), 3, e), rope_case((1, 3, 4, 6), 2, e)]
    return [rope_case((4, 4096, 32, 64), 32, e), rope_case((4, 4096, 32, 128), 8, e)]


def exact_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """From its definition."""
    return gate / (1 + (-gate).exp()) * up


def swiglus(smoke: bool, e: int) -> list[Case]:
    """gate, up -> out; dout, gate, up -> dgate, dup."""
    paths, found = {"eager": lambda gate, up: F.silu(gate) * up, "ours": swiglu.swiglu}, []
    for shape in ((30, 50),) if smoke else ((16384, 8192), (16384, 14336)):
        n, size = shape[0] * shape[1] * e, f"{shape[0]} x {shape[1]}"
        moves = 3 * n, 5 * n
        found.append(Case("swiglu", size, normals(shape, shape), exact_swiglu, paths, moves, 2))
    return found


# ---- the loss of given logits


class Loss(torch.autograd.Function):
    """Sum of losses; the gradient overwrites the logits. A label of -1 is another shard's word."""

    @staticmethod
    def forward(ctx, y_NV: Tensor, label_N: Tensor) -> Tensor:
        m_N, s_N, z_N = vocab.statistics(y_NV, label_N)
        ctx.save_for_backward(y_NV, m_N, s_N, label_N)
        return (s_N.log() + (m_N - z_N)).sum()

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor, None]:
        y_NV, m_N, s_N, label_N = ctx.saved_tensors
        c_N = factor.expand_as(s_N)
        return vocab.gradient_(y_NV.detach(), m_N, c_N / s_N, c_N, label_N), None


def plain_loss(y_NV: Tensor, label_N: Tensor) -> Tensor:
    """Sum over rows of log sum exp(y) - y[label], in float32 at least."""
    wide_NV = y_NV.to(torch.promote_types(y_NV.dtype, torch.float32))
    z_N = wide_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0].masked_fill(label_N < 0, 0)
    return (wide_NV.logsumexp(-1) - z_N).sum()


def cross_entropy(y_NV: Tensor, label_N: Tensor) -> Tensor:
    """torch's operator, of logits in float32 at least."""
    wide_NV = y_NV.to(torch.promote_types(y_NV.dtype, torch.float32))
    return F.cross_entropy(wide_NV, label_N, reduction="sum")


def loss_case(rows: int, words: int, ranks: int, e: int) -> Case:
    """All words on one rank, or one of several shards; logits read; read and overwritten."""

    def draw(dice: Dice) -> list[Tensor]:
        label_N = (1e6 * dice.normal(rows, dtype=torch.float32)).long() % (ranks * words)
        return [dice.normal(rows, words), label_N.masked_fill(label_N >= words, -1)]

    whole = {"torch": cross_entropy} if ranks == 1 else {}
    paths = {"eager": plain_loss, **whole, "ours": Loss.apply}
    shard, exact = ("", cross_entropy) if ranks == 1 else (f" of 1/{ranks}", plain_loss)
    numbers = rows * words * e
    moves = numbers, 2 * numbers
    return Case("vocab" + shard, f"{rows} x {words}", draw, exact, paths, moves, 1)


def losses(smoke: bool, e: int) -> list[Case]:
    """Small and large vocabularies, and an eighth of the large one, where most labels are not."""
    if smoke:
        return [loss_case(3, 97, 1, e), loss_case(8, 40, 4, e)]
    whole = [loss_case(8192, words, 1, e) for words in (49152, 131072)]
    return [*whole, loss_case(8192, 16384, 8, e)]


# ---- two partial softmaxes


def exact_merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> list[Tensor]:
    """Weights are the softmax of both log-sum-exps."""
    both = torch.stack([lse, block_lse])
    first, second = both.softmax(0).transpose(2, 3)[..., None]
    return [first * out + second * block_out, both.logsumexp(0)]


def plain_merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> list[Tensor]:
    """Cast, subtract, multiply, add; in place as ours."""
    weight = (block_lse - lse).sigmoid().transpose(1, 2)[..., None]
    out += (block_out.to(out.dtype) - out) * weight
    return [out, lse.copy_(torch.logaddexp(lse, block_lse))]


def our_merge(out: Tensor, lse: Tensor, *block: Tensor) -> list[Tensor]:
    """Returns what merge_ overwrites."""
    merge.merge_(out, lse, *block)
    return [out, lse]


def merges(smoke: bool, e: int) -> list[Case]:
    """out, block_out and out again; lse and block_lse [B, H, T] likewise, all in float32."""
    B, T, H, C = (1, 70, 2, 66) if smoke else (2, 8192, 32, 128)
    wide = torch.float32

    def draw(dice: Dice) -> list[Tensor]:
        out, lse = dice.normal(B, T, H, C, dtype=wide), dice.normal(B, H, T, dtype=wide)
        return [out, lse, dice.normal(B, T, H, C), dice.normal(B, H, T, dtype=wide)]

    paths = {"eager": plain_merge, "ours": our_merge}
    moves = B * T * H * (C * (8 + e) + 12)
    return [Case("merge", f"{B} x {T} x {H} x {C}", draw, exact_merge, paths, (moves, 0))]


# ---- rows of experts: N tokens, k rows of each, width D


class Paired(torch.autograd.Function):
    """Two kernels as one operation: forward(*inputs), backward(gradient, *inputs)."""

    @staticmethod
    def forward(ctx, forward: Function, backward: Function, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.gradients = backward
        return forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(grad, *ctx.saved_tensors)


def plain_sort(expert_Nk: Tensor, experts: int) -> list[Tensor]:
    """Place of each choice in the list sorted by expert, and how many choose each."""
    chosen = expert_Nk.flatten()
    order = chosen.argsort(stable=True)
    here = torch.arange(len(order), device=order.device)
    place = torch.empty_like(order).scatter_(0, order, here)
    counts = chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    return [place.view_as(expert_Nk), counts]


def exact_sort(expert_Nk: Tensor, experts: int) -> list[Tensor]:
    """Keys that are all different; the place is the rank among them."""
    chosen = expert_Nk.flatten()
    keys = chosen * len(chosen) + torch.arange(len(chosen), device=chosen.device)
    return [keys.argsort().argsort().view_as(expert_Nk), chosen.bincount(minlength=experts)]


def exact_dispatch(x_ND: Tensor, place_Nk: Tensor, token_M: Tensor) -> Tensor:
    """Each token k times, each copy to its place."""
    copies_MD = x_ND.repeat_interleave(place_Nk.shape[1], 0)
    return torch.zeros_like(copies_MD).index_copy(0, place_Nk.flatten(), copies_MD)


def plain_combine(rows_MD: Tensor, gate_Nk: Tensor, place_Nk: Tensor) -> Tensor:
    """Fetch, multiply, add."""
    rows_NkD = rows_MD.index_select(0, place_Nk.flatten()).view(*place_Nk.shape, -1)
    return (rows_NkD * gate_Nk[..., None]).sum(1)


def exact_combine(rows_MD: Tensor, gate_Nk: Tensor, place_Nk: Tensor) -> Tensor:
    """As a batch of products of a row vector and a matrix."""
    return torch.einsum("nk,nkd->nd", gate_Nk, rows_MD[place_Nk])


def experts_paths(experts: int) -> dict[str, dict[str, Function]]:
    """Operation -> its paths."""
    dispatch = partial(
        Paired.apply,
        lambda x, place, token: permute.spread(x, place, len(token)),
        lambda grad, x, place, token: (permute.collect(grad, place, None), None, None),
    )
    activate = partial(
        Paired.apply, permute.activate, lambda grad, gu: permute.activate_backward(grad, gu)[:1]
    )
    combine = partial(
        Paired.apply,
        lambda rows, gate, place: permute.collect(rows, place, gate),
        lambda grad, rows, gate, place: (*permute.collect_backward(grad, rows, place, gate), None),
    )
    return {
        "sort": {
            "eager": lambda choice: plain_sort(choice, experts),
            "ours": lambda choice: permute.sort_choices(choice, experts),
        },
        "dispatch": {"eager": lambda x, place, token: x[token], "ours": dispatch},
        "activate": {
            "eager": lambda gu: F.silu(gu.chunk(2, -1)[0]) * gu.chunk(2, -1)[1],
            "ours": activate,
        },
        "combine": {"eager": plain_combine, "ours": combine},
    }


def expert_rows(smoke: bool, e: int) -> list[Case]:
    """Sort, dispatch, activate, combine of a layer of experts; places and choices are int64."""
    N, k, D, width, experts = (4, 2, 24, 20, 4) if smoke else (16384, 8, 2048, 1024, 64)
    M, paths = N * k, experts_paths(experts)

    def choices(dice: Dice) -> Tensor:
        return dice.normal(N, experts, dtype=torch.float32).topk(k).indices

    def places(dice: Dice) -> Tensor:
        return exact_sort(choices(dice), experts)[0]

    def to_dispatch(dice: Dice) -> list[Tensor]:
        place_Nk = places(dice)
        return [dice.normal(N, D), place_Nk, place_Nk.flatten().argsort() // k]

    def to_combine(dice: Dice) -> list[Tensor]:
        return [dice.normal(M, D), dice.normal(N, k), places(dice)]

    size, once, n = f"{N} x {k} x {D}", (N + M) * D * e + 8 * M, M * width * e
    return [
        Case("sort", f"{N} x {k} of {experts}", lambda dice: [choices(dice)],
             lambda choice: exact_sort(choice, experts), paths["sort"], (16 * M, 0),
             streaming=False),
        Case("dispatch", size, to_dispatch, exact_dispatch, paths["dispatch"], (once, once), 1),
        Case("activate", f"{M} x {width}", normals((M, 2 * width)),
             lambda gu: exact_swiglu(*gu.chunk(2, -1)), paths["activate"], (3 * n, 6 * n), 1),
        Case("combine", size, to_combine, exact_combine, paths["combine"],
             (once, once + M * D * e), 2),
    ]  # fmt: skip


# ---- the optimizer: weight, gradient, moments, narrow copy of the weight, clipping factor


def exact_adamw(weight: Tensor, grad: Tensor, first: Tensor, *rest: Tensor) -> list[Tensor]:
    """Loshchilov and Hutter 2019, algorithm 2."""
    (second, _, scale), (b1, b2) = rest, UPDATE.betas
    first = b1 * first + (1 - b1) * scale * grad
    second = b2 * second + (1 - b2) * (scale * grad).square()
    root = (second / (1 - b2**UPDATE.step)).sqrt() + UPDATE.eps
    change = first / (1 - b1**UPDATE.step) / root + UPDATE.weight_decay * weight
    weight = weight - UPDATE.lr * change
    return [weight, first, second, weight]


def plain_adamw(weight: Tensor, grad: Tensor, first: Tensor, *rest: Tensor) -> list[Tensor]:
    """In single operators, in place where they can be."""
    (second, copy, scale), (b1, b2) = rest, UPDATE.betas
    grad = grad * scale
    first.lerp_(grad, 1 - b1)
    second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
    root = (second / (1 - b2**UPDATE.step)).sqrt_().add_(UPDATE.eps)
    weight.mul_(1 - UPDATE.lr * UPDATE.weight_decay)
    weight.addcdiv_(first, root, value=-UPDATE.lr / (1 - b1**UPDATE.step))
    return [weight, first, second, copy.copy_(weight)]


def torch_adamw(weight: Tensor, grad: Tensor, first: Tensor, *rest: Tensor) -> list[Tensor]:
    """torch's fused optimizer, between the scaling of gradients and the copy of weights."""
    (second, copy, scale), shared = rest, UPDATE._asdict()
    done = torch.full((), shared.pop("step") - 1.0, device=weight.device)
    optimizer = torch.optim.AdamW([weight], **shared, fused=True)
    optimizer.state[weight] = {"step": done, "exp_avg": first, "exp_avg_sq": second}
    weight.grad = grad * scale
    optimizer.step()
    return [weight, first, second, copy.copy_(weight)]


def our_adamw(weight: Tensor, grad: Tensor, first: Tensor, *rest: Tensor) -> list[Tensor]:
    """Returns what adamw_ overwrites."""
    adamw.adamw_([weight], [grad], [(first, rest[0])], [rest[1]], rest[2], UPDATE)
    return [weight, first, *rest[:2]]


def optimizers(smoke: bool, e: int) -> list[Case]:
    """float32 but for the copy, which is bfloat16, or float16 where activations are float32."""
    n, wide = 1500 if smoke else 2**26, torch.float32

    def draw(dice: Dice) -> list[Tensor]:
        narrow = torch.float16 if dice.storage == wide else dice.storage
        weight, grad, first, second = (dice.normal(n, dtype=wide) for _ in range(4))
        scale = torch.full((1,), 0.3, device=weight.device)
        return [weight, grad, first, second.square() + 0.01, dice.normal(n, dtype=narrow), scale]

    paths = {"eager": plain_adamw, "torch": torch_adamw, "ours": our_adamw}
    return [Case("adamw", f"{n}", draw, exact_adamw, paths, (30 * n, 0))]


# ---- all of them


BUILDERS = (norms, ropes, swiglus, losses, merges, expert_rows, optimizers)


def make_cases(smoke: bool, e: int) -> list[Case]:
    """All cases at the sizes of billion-parameter models; e: bytes of a stored number."""
    return [case for builder in BUILDERS for case in builder(smoke, e)]
