"""Activation recomputation: keep a module's inputs, run it again when backward needs the rest.

Paper   Chen et al. 2016, section 4 (1604.06174): full; Korthikanti et al. 2022, section 5
        (2205.05198): selective
Idea    What backward needs from forward can be computed twice instead of kept. full: each layer
        keeps its input only; backward runs the layer's forward again and then goes back through it,
        one layer at a time. selective: only what is large and cheap, the T x T scores of attention:
        most of the memory of long sequences for few operations.
        Run again must mean the same numbers: dropout masks here are functions of the place of an
        element (dropout.py), so that no random state need be kept. Nor may weights, inputs or
        train/eval change between forward and backward.
Before  a layer keeps what each operator needs: norms, angles, q, k, v, scores, mixed values, mlp,
        dropout. The forms and their derivation: analysis/activations.py
After   selective: all but scores   full: one input, e N D bytes a layer, and all of one layer at a
        time in backward
Wire    nothing of its own; but what runs again sends again. full: as many calls as the layers'
        forward makes, in tensor parallelism 2 all_reduces a layer, with sequence parallelism 2
        all_gathers and 2 reduce_scatters; `run_partly` says when the last one is spared. ZeRO-3
        gathers weights for backward anyway: no more. Context parallelism sends all of its forward
        again: fused, on 2 ranks, 5 exchanges a layer instead of 4. selective: nothing
Axes    none: every rank runs its own part again
Dims    B micro-batch  T sequence  D width  H/K query/kv heads  C head width  F feed-forward width
        N = B*T tokens
Read    apply -> Recompute -> RunTwice -> Replay -> contract
Try     python -m picotron_lab.recompute
Tests   tests/test_recompute.py, tests/test_activations.py
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import sharding
from picotron_lab.analysis import cost
from picotron_lab.analysis.activations import Setting, layer_bytes, model_bytes
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import RECOMPUTE, ConfigError, ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.model import AttentionCore, Llama, initial_value

# ---- 1. the idea


def apply(model: Llama, kind: str, impl: str = "plain") -> None:
    """Let parts of a model, however parallel, be recomputed in backward: the last step of building.

    kind    none | selective: the core of every attention | full: every layer
    impl    "plain" | "fused"
    raises  ConfigError for another kind

    A fused core (scaled_dot_product_attention) is selective by itself: its kernel keeps q, k, v and
    the result, and forms the scores again. So selective leaves a fused model as it is.
    """
    if kind not in RECOMPUTE:
        raise ConfigError(f"--recompute {kind} is not one of {', '.join(RECOMPUTE)}.")
    if kind == "full":
        for i, layer in enumerate(model.layers):
            model.layers[i] = Recompute(layer, impl)
    if kind == "selective":
        for module in list(model.modules()):  # attention may sit inside parallel regions
            if type(getattr(module, "core", None)) is AttentionCore:  # not a fused one
                module.core = Recompute(module.core, impl)


class Recompute(nn.Module):
    """`module`, which keeps nothing but its inputs for backward.

    Inputs may be tensors, and anything that holds tensors without gradients; the result is one
    tensor. Without gradients it is the module itself. One may lie inside another; but a fused one
    inside a fused one keeps its own inputs as well.
    """

    def __init__(self, module: nn.Module, impl: str):
        super().__init__()
        self.module, self.run = module, {"plain": run_twice, "fused": run_partly}[impl]

    def forward(self, *inputs: Any) -> Tensor:
        return self.run(self.module, inputs)


def detached(inputs: Sequence[Any]) -> list[Any]:
    """The inputs as leaves of a new graph, which wants the same gradients."""
    return [
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
    ]


# ---- 2. plain path


def run_twice(module: nn.Module, inputs: Sequence[Any]) -> Tensor:
    """Call the module, in forward without a graph, in backward with one.

    One node is left, with inputs and parameters as its inputs, so that backward() and
    torch.autograd.grad find them: the gradients of all parameters come out together, the last
    parameter's first. It has no second derivatives.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]  # others may replace them
    learns = parameters or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if not (learns and torch.is_grad_enabled()):
        return module(*inputs)
    views = (p.view_as(p) for p in parameters)  # autograd serves leaves in no certain order
    return RunTwice.apply(module, parameters, *inputs, *views)


class RunTwice(torch.autograd.Function):
    """Forward keeps the inputs; backward runs the module again and back-propagates through it."""

    @staticmethod
    def forward(ctx, module: nn.Module, parameters: Sequence[nn.Parameter], *both: Any) -> Tensor:
        inputs = both[: len(both) - len(parameters)]
        ctx.module, ctx.parameters, ctx.inputs = module, parameters, list(inputs)
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        for i in ctx.places:
            ctx.inputs[i] = None  # saved above, where torch notices changes in place
        return module(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), (
            "create_graph=True asks for second derivatives, which the plain path of recomputation "
            'drops: use impl="fused", or do not recompute this module.'
        )
        inputs = list(ctx.inputs)
        for i, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[i] = saved
        inputs = detached(inputs)
        learns = [i for i in ctx.places if inputs[i].requires_grad]
        wanted = [*(inputs[i] for i in learns), *ctx.parameters]
        with torch.enable_grad():
            for i in learns:  # torch's counters of operations cannot watch a leaf that is wanted
                inputs[i] = inputs[i].view_as(inputs[i])
            result = ctx.module(*inputs)
        found = torch.autograd.grad(result, wanted, grad, allow_unused=True)
        of_inputs = dict(zip(learns, found[: len(learns)], strict=True))
        grads = (of_inputs.get(i) for i in range(len(inputs)))
        return None, None, *grads, *found[len(learns) :]


# ---- 3. fused path


def run_partly(module: nn.Module, inputs: Sequence[Any]) -> Tensor:
    """Call the module, and again in backward up to the last tensor that backward needs.

    What follows that tensor is skipped: in attention the product of weights and values, in a layer
    the last matmul and, in plain tensor parallelism, its all_reduce. Nothing is skipped where the
    last operator itself keeps a tensor: dropout keeps its mask, and a fused region of
    tensor_parallel.py is one operator, all_reduce included.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)
    return Replay(module, inputs).run()


class Replay:
    """One call whose graph keeps numbers instead of tensors: the k-th tensor it wanted to keep.

    The graph is the ordinary one, so that torch.autograd.grad works. A module that acquires
    something must release it in a `finally`, for the second run is broken off.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Any]):
        self.module, self.inputs = module, inputs
        self.versions = versions(inputs)
        self.shapes: list[torch.Size] = []  # of the tensors that it wanted to keep
        self.again: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        """The result of the module."""
        with saved_tensors_hooks(self._number, self._fetch):
            return self.module(*self.inputs)

    def _number(self, tensor: Tensor) -> int:
        self.shapes.append(tensor.shape)
        return len(self.shapes) - 1

    def _fetch(self, k: int) -> Tensor:
        if k not in self.again:
            self._run_again()
        return self.again.pop(k)

    def _run_again(self) -> None:
        assert versions(self.inputs) == self.versions, (
            "an input of a recomputed module was changed in place before backward: make a new "
            "tensor instead."
        )
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            kept.append(tensor.detach())
            if len(kept) == len(self.shapes):
                raise Enough

        def never(_: None) -> Tensor:
            raise AssertionError("the graph of a second run has no backward: use the first one's.")

        hooks = saved_tensors_hooks(keep, never)
        with torch.enable_grad(), suppress(Enough), hooks:
            self.module(*detached(self.inputs))
        assert [tensor.shape for tensor in kept] == self.shapes, (
            "a recomputed module wanted to keep other tensors the second time: leave train/eval "
            "and requires_grad alone between forward and backward."
        )
        self.again = dict(enumerate(kept))


class Enough(Exception):
    """All that backward needs is there again."""


def versions(inputs: Sequence[Any]) -> list[int]:
    """How often each tensor among the inputs was changed in place, as torch counts it."""
    return [x._version for x in inputs if isinstance(x, Tensor)]


# ---- 4. contract


def flops_again(cfg: ModelConfig, batch: int, sequence: int, kind: str, impl: str) -> int:
    """Operations of matmuls that a training step of a plain model runs once more, without dropout.

    full        one forward of the layers: 3 become 4, where forward is 1 and backward is 2
    selective   4 N T H C a layer, scores and values
    impl        of the recomputation: "fused" spares values, and of full the matmul `down`
    """
    N, fused = batch * sequence, impl == "fused"
    values = 2 * N * sequence * cfg.heads * cfg.head_width
    if kind == "selective":
        return cfg.layers * values * (1 if fused else 2)
    if kind == "none":
        return 0
    weights = cost.matmul_parameters(cfg) - cfg.vocab_size * cfg.hidden_size
    down = 2 * N * cfg.hidden_size * cfg.ffn_size
    return 2 * N * weights + cfg.layers * (2 * values - (down if fused else 0))


def main() -> None:
    """A small model with each kind, printing its contract: formula, predicted, measured."""
    cfg = ModelConfig(vocab_size=64, hidden_size=32, layers=3, heads=4, kv_heads=2, ffn_size=88)
    B, T = 2, 48
    once = cost.flops_per_token(cfg, T) * B * T
    print(f"{cfg.layers} layers, B = {B}, T = {T}, D = {cfg.hidden_size}, float32: e = 4")
    print("bytes kept for backward: parts of a layer (layer_bytes)      layers and rest of model")
    print(f"{'':64} predicted measured")
    for kind in RECOMPUTE:
        at = Setting(B, T, 4)
        parts = [part for part, kept in layer_bytes(cfg, at, kind).items() if kept]
        for impl in ("plain", "fused"):
            predicted, measured = model_bytes(cfg, at, kind), _kept(cfg, B, T, kind, impl)
            print(f"{kind:10} {impl:6} {' + '.join(parts):48} {predicted:7} {measured:8}")
    print("operations of matmuls     formula                  predicted measured   of a step")
    formulas = ("0", "L 4NTHC", "forward of layers", "L 2NTHC", "... without down")
    cases = [("none", "plain"), *((k, i) for i in ("plain", "fused") for k in RECOMPUTE[1:])]
    plain = _operations(cfg, B, T, "none", "plain")
    for (kind, impl), formula in zip(cases, formulas, strict=True):
        predicted = flops_again(cfg, B, T, kind, impl)
        measured = _operations(cfg, B, T, kind, impl) - plain
        print(f"{kind:10} {impl:8} {'+ ' + formula:>23}", end="")
        print(f" {predicted:17} {measured:8} {1 + predicted / once:10.2f}")


def _build(cfg: ModelConfig, kind: str, impl: str) -> Llama:
    model = Llama(cfg)
    sharding.attach(model)
    apply(model, kind, impl)
    sharding.materialise(model, 0, initial_value)
    return model


def _batch(cfg: ModelConfig, batch: int, sequence: int) -> tuple[Tensor, Tensor, Where]:
    tokens_BT = torch.arange(batch * sequence).view(batch, sequence) % cfg.vocab_size
    return tokens_BT, tokens_BT, Where.first(tokens_BT)


def _kept(cfg: ModelConfig, batch: int, sequence: int, kind: str, impl: str) -> int:
    """Bytes alive between forward and backward, beside the weights."""
    model, inputs = _build(cfg, kind, impl), _batch(cfg, batch, sequence)
    with Meter() as meter:
        loss = model(*inputs)  # its graph holds what was kept
        kept = meter.live["activation"]
    loss.backward()
    return kept


def _operations(cfg: ModelConfig, batch: int, sequence: int, kind: str, impl: str) -> int:
    """Operations of matmuls in forward and backward, as torch counts them."""
    model, inputs = _build(cfg, kind, impl), _batch(cfg, batch, sequence)
    with _Operations() as counter:
        model(*inputs).backward()
    return counter.total


class _Operations(TorchDispatchMode):
    """torch's FlopCounterMode, but without the import of its compiler, which takes 1.5 s."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports more than training needs

        super().__init__()
        self.total, self.counts = 0, flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        result, count = func(*args, **(kwargs or {})), self.counts.get(func.overloadpacket)
        self.total += count(*args, out_val=result) if count else 0
        return result


if __name__ == "__main__":
    main()
