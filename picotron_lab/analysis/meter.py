"""How much memory was used: of one rank by category, and of the machine.

Meter   sees every operation that this thread, so this rank, starts, and remembers the storages that
        come out until they are freed. It counts bytes that tensors asked for, on CPU and CUDA.
Not     what a kernel allocates for itself, and what an allocator rounds up or cannot reuse: on a
        GPU, torch.cuda.max_memory_allocated tells the difference. Results of collectives count; not
        what torch.distributed or the lab allocates for itself.
Time    Meter(record=True) also writes down every change: memory_plots.py draws it.
Read    Meter -> label -> watch
Tests   tests/test_meter.py
"""

import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CATEGORIES = ("parameter", "gradient", "optimizer", "buffer", "activation")
FRESH = torch.ops.aten.lift_fresh.default  # torch.tensor([...]) shows what it has made as an input


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: most bytes ever allocated for tensors. CPU: most bytes this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Moment:
    """What was alive after so many operations, by category; or the name of what begins there."""

    operations: int
    live: dict[str, int]
    name: str = ""


@dataclass
class Counted:
    """A storage that is alive."""

    storage: weakref.ref
    category: str
    bytes: int


class Meter(TorchDispatchMode):
    """Bytes of the storages that this thread makes inside `with Meter() as meter`, by category.

    A storage counts once, however many views it has, from the operation that returns it until its
    last tensor is gone (also after the `with`). Tensors made before, or without an operation
    (torch.frombuffer, torch.load, copy.deepcopy), count once they are labelled. What nobody
    labelled is activation: saved for backward, or a temporary.

    Saved activations: meter.live["activation"] between forward and backward, while the program
    itself holds no other tensor (the loss counts, with its 4 bytes). Operations in backward and
    inside autograd Functions are seen; of a custom operator (torch.library), what it returns. A
    storage that is resized is measured anew when an operation returns it and when `live` is read.

    record   whether `history` gets a Moment whenever bytes have changed, after an operation or a
             label, and at each `mark`. What is freed between operations shows at the next one

    Not together with FlopCounterMode: it keeps activations alive.
    Source  a torch dispatch mode per rank, the way of torch.distributed._tools.mem_tracker
    """

    def __init__(self, record: bool = False) -> None:
        super().__init__()
        self.operations, self._records = 0, record
        self.history: list[Moment] = []
        self._new = "activation"  # what nobody labelled
        self._counted: dict[int, Counted] = {}  # by the address of the storage's C++ object
        self._live = dict.fromkeys(CATEGORIES, 0)
        self._hooks: list[Any] = []
        self.reset_peak()

    @property
    def live(self) -> dict[str, int]:
        """Bytes alive now, by category."""
        for counted in list(self._counted.values()):
            self._measure(counted.storage())
        return dict(self._live)

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        """The largest total after any operation or label."""
        return sum(self.peak.values())

    def reset_peak(self) -> None:
        """Forget the peak: it becomes what is alive now."""
        self.peak = self.live  # by category, as labelled at that moment
        self._highest = self.peak_bytes

    def label(self, category: str, tensors: Iterable[Tensor | None]) -> None:
        """From now on these tensors' storages count as `category`, wherever they were made.

        A None is skipped: a parameter may have no gradient.
        """
        assert category in CATEGORIES, (
            f"a Meter cannot label tensors '{category}': choose one of {', '.join(CATEGORIES)}."
        )
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor.untyped_storage(), category)
        self._note_peak()

    @contextmanager
    def making(self, category: str) -> Iterator[None]:
        """What is made inside, and labelled by nobody, counts as `category` from the beginning."""
        before, self._new = self._new, category
        try:
            yield
        finally:
            self._new = before

    def mark(self, name: str) -> None:
        """Something begins here, such as a step: a Moment of that name, if this meter records."""
        if self._records:
            self.history.append(Moment(self.operations, self.live, name))

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Label parameters, and each gradient as soon as backward has accumulated it.

        The gradient may be a tensor that backward made as an activation. Hooks run in the order in
        which they are registered: watch before anything that takes gradients away in a hook.
        """
        parameters = list(parameters)
        self.label("parameter", parameters)
        for parameter in parameters:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._label_gradient)
                self._hooks.append(hook)

    def __exit__(self, *error: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        super().__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 1.5 s, only to keep out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        storages = list(_storages(results))
        given = set()  # a result in one of these is a view, or was written in place
        if func is not FRESH and any(s._cdata not in self._counted for s in storages):
            # look, for not every schema says that an input is returned: _unsafe_view, collectives
            given = {s._cdata for s in _storages((*args, *kwargs.values()))}
        for storage in storages:
            if storage._cdata in self._counted or storage._cdata not in given:
                self._count(storage, None)
        self.operations += 1
        self._note_peak()
        return results

    def _label_gradient(self, parameter: Tensor) -> None:
        self.label("gradient", [parameter.grad])

    def _count(self, storage: torch.UntypedStorage, category: str | None) -> None:
        """Begin to count a storage, or change its category; None: as it is, or as what is new."""
        key = storage._cdata
        if key not in self._counted:
            ref = weakref.ref(storage, partial(self._forget, key))
            self._counted[key] = Counted(ref, category or self._new, 0)
        counted = self._counted[key]
        self._live[counted.category] -= counted.bytes
        counted.category, counted.bytes = category or counted.category, storage.nbytes()
        self._live[counted.category] += counted.bytes

    def _measure(self, storage: torch.UntypedStorage | None) -> None:
        """Its size may have changed, if it is one that counts."""
        if storage is not None and storage._cdata in self._counted:
            self._count(storage, None)

    def _forget(self, key: int, _: weakref.ref) -> None:
        freed = self._counted.pop(key)
        self._live[freed.category] -= freed.bytes

    def _note_peak(self) -> None:
        """After anything that may have changed the bytes."""
        if sum(self._live.values()) > self._highest:
            self.peak = dict(self._live)
            self._highest = self.peak_bytes
        if self._records and not (self.history and self.history[-1].live == self._live):
            self.history.append(Moment(self.operations, dict(self._live)))


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all dense tensors in nested lists and tuples."""
    if isinstance(tree, Tensor):
        if tree.layout is torch.strided:
            yield tree.untyped_storage()
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _storages(part)
