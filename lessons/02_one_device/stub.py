"""Lesson 02, one device. Read README.md first; this is the only file that you edit."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lessons import TODO


def state_bytes(parameters: int, dtype: str, optimizer: str) -> dict[str, int]:  # Task 02.1
    """Bytes that stay on a device from step to step, whatever the batch.

    parameters  how many numbers the model has
    dtype       of the weights that forward and backward use: bfloat16 | float32 | float64
    optimizer   adamw | sgd (without momentum)

    After   {"weights": ..., "gradients": ..., "masters": ..., "moments": ...}
            gradients   added up in the dtype of the weights, but in at least 32 bit
            masters     float32 copies that the optimizer steps, only where weights are narrower
            moments     two of AdamW, each in the dtype of what the optimizer steps
    """
    raise TODO("02.1")


def saved_bytes(forward: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> int:
    """Run forward() and count the bytes that it leaves for backward.  Task 02.2

    torch.autograd.graph.saved_tensors_hooks(pack, unpack) calls pack with every tensor that an
    operator keeps, and unpack with what pack returned, when backward wants it.

    Before  nothing ran; nothing but pack tells you what is kept
    After   bytes of the storages that pack has seen: each once, whole, however many tensors are
            views of it; the storages of parameters do not count, for they are there anyway. Here
            nothing that was kept is dropped before forward() has returned, so as long as you hold
            its result, a storage is known by its data_ptr()
    """
    raise TODO("02.2")


def accumulate(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:  # Task 02.3
    """Leave in every .grad the gradient of the whole batch, which comes in micro-batches.

    The loss of a batch is the mean over its counted tokens; a label of -100 does not count, and
    micro-batches have different numbers of counted tokens, some none.

    Before  batches: (tokens [B, T], labels [B, T]) of each micro-batch; every p.grad is None;
            model(tokens, labels) is the *sum* of the losses of its counted tokens
    After   p.grad: the gradient of the mean loss of all micro-batches together; returns that loss
    Budget  activations of one micro-batch at a time
    """
    raise TODO("02.3")


def recompute(module: nn.Module, x: Tensor) -> Tensor:  # Task 02.4
    """module(x), which keeps nothing but x: backward runs the module again.

    The module holds dropout, which draws from torch's random state (torch.get_rng_state,
    torch.set_rng_state): the second run must draw the same mask, and must leave the state as if it
    had not taken place. Write a torch.autograd.Function of your own: torch.utils.checkpoint, which
    does all of this, is not allowed.

    Before  x [B, T, D], which wants a gradient
    After   module(x); once backward has run, x and all parameters of the module have the gradients
            that they have without recomputation
    Budget  between forward and backward: x and the random state; the module runs twice in all
    """
    raise TODO("02.4")
