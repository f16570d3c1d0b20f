"""Post-validation: step at once with the gradient norm known so far, mend it if that was wrong.

Paper   Zero Bubble Pipeline Parallelism (2401.10241), section 4 and appendix C
Idea    Clipping and the check for NaN need the gradient norm over all stages. An all_reduce makes
        every stage wait for the slowest one, and a zero-bubble schedule loses its staggered end,
        in which early stages begin the next step while late ones finish this one. But clipping is
        rare and NaN rarer. So a stage takes the squared norm of the stages before it, adds its
        own, sends the sum on, and decides by that sum alone. Later the full sum comes back from
        the last stage, and who decided wrongly takes the step back in place and does it anew.
Step    partial norm within the limit: step with the gradients as they are. Beyond the limit, so
        the gradients will be scaled by a number that only the last stage knows: wait for it. NaN
        or infinite: no step, now or later. The last stage knows everything and is always right.
Before  forward and backward -> all_reduce of the squared norm -> clip -> step
After   forward and backward -> partial sum -> step -> ... -> full sum -> keep, or undo and redo
Wire    2 (p - 1) messages of one float64, 8 bytes, per step and line of p ranks: p - 1 up, p - 1
        down. A NaN or an infinity in any gradient makes the sum one: it needs no flag of its own.
Axes    pp. Only a sum over its ranks is asked for, so a rank may hold any stages (V, looped, both
        ends of DualPipe); the staggering that is kept is the one in order of ranks. Ranks of one
        stage (dp, cp, tp) must know the same sum: `within` adds theirs up. Give it an axis of its
        own, mesh.world.split("validation", groups), else its messages queue with activations.
Exact   A step that was right is the synchronised one. One that is undone and redone equals it up
        to rounding: the undo inverts the arithmetic and keeps no copy. It loses about eps times
        what the wrong step wrote: (|w| + |its change|) eps of a weight, (1 - b1) |g| eps of
        AdamW's first moment, (1 - b2) g^2 eps of its second. With a limit, |g| is at most the
        limit; without one, only a NaN undoes, and moments that g^2 made overflow are lost.
Read    clip_scale -> PostValidation.step -> PostValidation.validate -> undo_adamw
Tests   tests/test_post_validation.py
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from picotron_lab.comm import Axis, Handle


def clip_scale(squared: float, limit: float) -> float | None:
    """What optim.clip scales gradients by, at most 1, if their squared norm is this; limit 0: 1.

    None if the norm is NaN or infinite: then there must be no step.
    """
    if not math.isfinite(squared):
        return None
    return min(1.0, limit / (math.sqrt(squared) + 1e-6)) if limit > 0 else 1.0


class PostValidation:
    """The optimizer step of a pipeline without a synchronisation; instead of optim.clip and
    optimizer.step().

    optimizer  of optim.build: torch's AdamW, or SGD without momentum
    pp         the ranks that hold the stages of one model
    within     () -> squared norm of this rank's stages, summed over the ranks that share them; a
               float64 scalar. Parameters that several stages hold count once, as in
               sharding.squared_norm. It is called once in each step.

    In a step: masters.take_gradients(), `step`, masters.publish(). Before this rank uses the
    weights for anything that stays: `validate`; if `changed`, publish once more. In between leave
    gradients and learning rate alone. After the last validate: `finish`.

    changed    whether the last validate altered weights: what was computed with them must be
               computed again
    rollbacks  how many steps were taken back so far
    """

    def __init__(self, optimizer: torch.optim.Optimizer, pp: Axis, within: Callable[[], Tensor]):
        _check_undoable(optimizer)
        self._optimizer, self._pp, self._within = optimizer, pp, within
        self._sends: list[Handle] = []
        self._partial: Tensor | None = None  # of a step that is not validated
        self._limit = 0.0
        self._scale: float | None = None  # of the gradients that were stepped with; None: no step
        self._given: list[Tensor] = []  # the gradients
        self._rates: list[float] = []
        self.changed, self.rollbacks = False, 0

    @property
    def pending(self) -> bool:
        """Whether there was a step that is not validated."""
        return self._partial is not None

    @torch.no_grad()
    def step(self, limit: float) -> None:
        """Step if the stages up to this one know enough; waits for the stage before it only.

        limit  largest gradient norm of the whole model; 0: no clipping
        """
        assert not self.pending, "the last step is not validated: call validate() before step()."
        self.finish()  # the messages of the last step, long since taken
        pp, total = self._pp, self._within()
        assert total.shape == () and total.dtype == torch.float64, (
            f"within() gave {total.dtype} of shape {tuple(total.shape)}: return a float64 scalar."
        )
        if pp.rank > 0:
            total = total + pp.recv(total, pp.rank - 1)
        is_last = pp.rank == pp.size - 1
        if not is_last:
            self._sends.append(pp.send(total, pp.rank + 1, wait=False))
        self._partial, self._limit = total, limit
        self._given, self._rates = self._gradients(), self._learning_rates()
        scale = clip_scale(total.item(), limit)
        self._scale = scale if is_last or scale == 1.0 else None
        self._step_with(self._scale)

    @torch.no_grad()
    def validate(self) -> float:
        """Make the last step the right one; returns the gradient norm before clipping.

        Waits for the stage behind, which must validate too. A norm that is NaN or infinite: the
        weights are what they were before the step, and the caller should end the run.
        Called before the first forward of the next step, it holds this stage until the last one
        has summed its gradients. To keep the stagger, call it after the warm-up forwards; if
        `changed`, they used weights that are no more: run them again.
        """
        assert self.pending, "there is no step to validate: call step() before validate()."
        pp, total = self._pp, self._partial
        if pp.rank < pp.size - 1:
            total = pp.recv(total, pp.rank + 1)
        if pp.rank > 0:
            self._sends.append(pp.send(total, pp.rank - 1, wait=False))
        squared = total.item()
        right = clip_scale(squared, self._limit)
        self.changed = right != self._scale
        if self.changed:
            self._check_inputs()
            if self._scale is not None:
                self._undo()
            self._step_with(right)
        self._partial, self._given = None, []
        return math.sqrt(squared)

    def finish(self) -> None:
        """Wait until all that was sent is taken; a rank that ends before may take it along."""
        while self._sends:
            self._sends.pop(0).wait()

    def _step_with(self, scale: float | None) -> None:
        if scale is None:
            return
        for gradient in self._gradients() if scale != 1.0 else ():
            gradient.mul_(scale)
        self._optimizer.step()

    def _undo(self) -> None:
        """Take back a step, which had the gradients as they are: only a scale of 1 is wrong."""
        self.rollbacks += 1
        for group in self._optimizer.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                if isinstance(self._optimizer, torch.optim.AdamW):
                    undo_adamw(weight, group, self._optimizer.state[weight])
                else:
                    undo_sgd(weight, group)

    def _gradients(self) -> list[Tensor]:
        groups = self._optimizer.param_groups
        return [w.grad for group in groups for w in group["params"] if w.grad is not None]

    def _learning_rates(self) -> list[float]:
        for group in self._optimizer.param_groups:
            assert group["lr"] * group["weight_decay"] < 1, (
                f"lr {group['lr']:g} times weight decay {group['weight_decay']:g} leaves nothing "
                "of a weight, and that cannot be taken back: keep the product below 1."
            )
        return [group["lr"] for group in self._optimizer.param_groups]

    def _check_inputs(self) -> None:
        gradients = self._gradients()
        same = len(gradients) == len(self._given) and all(map(operator.is_, gradients, self._given))
        assert same and self._learning_rates() == self._rates, (
            "gradients or learning rate were replaced between step() and validate(), and the step "
            "must be done anew: change them after validate()."
        )


# ---- taking a step back


@torch.no_grad()
def undo_sgd(weight: nn.Parameter, group: dict[str, Any]) -> None:
    """Invert w <- (1 - lr decay) w - lr g, in place.

    group  of the optimizer: lr and weight_decay
    """
    weight.add_(weight.grad, alpha=group["lr"]).div_(1 - group["lr"] * group["weight_decay"])


@torch.no_grad()
def undo_adamw(weight: nn.Parameter, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Invert AdamW's step t in place, the weight first, for that needs the moments of the step.

    step  m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
          w <- (1 - lr decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    The second moment is kept from falling below 0, where rounding might leave it.
    """
    (b1, b2), lr, t = group["betas"], group["lr"], float(state["step"])
    m, v, gradient = state["exp_avg"], state["exp_avg_sq"], weight.grad
    denominator = (v / (1 - b2**t)).sqrt_().add_(group["eps"])
    weight.addcdiv_(m, denominator, value=lr / (1 - b1**t)).div_(1 - lr * group["weight_decay"])
    m.sub_(gradient, alpha=1 - b1).div_(b1)
    v.addcmul_(gradient, gradient, value=b2 - 1).div_(b2).clamp_(min=0)
    state["step"].sub_(1)


def _check_undoable(optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.defaults
    plain = isinstance(optimizer, torch.optim.SGD) and not group["momentum"]
    adamw = isinstance(optimizer, torch.optim.AdamW) and not group["amsgrad"]
    assert (plain or adamw and min(group["betas"]) > 0) and not group["maximize"], (
        f"a step of this {type(optimizer).__name__} cannot be taken back: use optim.build's AdamW "
        "(betas above 0, no amsgrad) or SGD (no momentum), neither with maximize."
    )
