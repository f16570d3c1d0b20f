"""A profile of real steps: which technique, stage and collective took the time, as a trace.

Idea    torch.profiler writes down every operation. While it does, ranges with names of this project
        surround them, so that the trace speaks of micro-batches and ranks as schedules do:
          rank 0 step 2                    a step, with everything below inside
          F0.3, BW1.2, ...                 actions, as `run.py schedule` draws them
          attention layers.0.attention.core SDPA    modules, with the class that a technique put
          loss head ChunkedHead                     there
          comm all_reduce tp 4096 B tensor_parallel.py:88     collectives: axis, payload, caller
          comm wait ...                    the same, where its result is waited for
          reduce gradients 0, optimizer
Where   ranks as threads: one file, each rank a thread of it. Processes: one file per rank. Perfetto
        (ui.perfetto.dev) opens them, as it opens the simulated step of `run.py schedule --trace`
When    two steps after the first two, which warm up. All ranks begin and end them together
Cost    a Trainer without --profile has none of this: no hook, no wrapper
Read    choose -> ProfiledTrainer -> Names -> NamedWorld; the table: analysis/trace_time.py
Tests   tests/test_profile.py
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from picotron_lab.alone import Work
from picotron_lab.analysis import trace_time
from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.ledger import Call
from picotron_lab.trainer import Trainer

WARM_UP, STEPS = 2, 2  # steps before those that are recorded, and how many these are by default


# ---- what the user asks for


@dataclass(frozen=True)
class Profile:
    """Steps to record, and the file to write.

    threads  whether all ranks are threads of this process, which then writes one file
    """

    path: Path
    first: int
    steps: int = STEPS
    threads: bool = False

    @property
    def last(self) -> int:
        """The last step that is recorded."""
        return self.first + self.steps - 1

    def file_of(self, rank: int, size: int) -> Path:
        """What a rank of `size` writes, if it writes: trace.json, or trace.rank3.json."""
        if self.threads or size == 1:
            return self.path
        return self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")


def choose(given: dict, first_step: int, steps: int) -> Profile | None:
    """What --profile and --profile-steps ask of a run from `first_step` up to `steps`; None:
    nothing. Raises ConfigError, one sentence."""
    count = given.get("profile_steps", STEPS)
    if "profile" not in given:
        require(
            "profile_steps" not in given,
            f"--profile-steps {count} needs a file for the trace; add --profile trace.json.",
        )
        return None
    path = Path(given["profile"])
    require(count >= 1, f"--profile-steps {count} must be at least 1; try --profile-steps {STEPS}.")
    require(
        path.parent.is_dir(),
        f"--profile {path} needs a folder that exists, and {path.parent} does not; try --profile "
        f"{path.name}.",
    )
    require(
        not path.is_dir(),
        f"--profile {path} must be a file, and it is a folder; try --profile "
        f"{path / 'trace.json'}.",
    )
    needed, left = first_step + WARM_UP + count, steps - first_step - WARM_UP
    fewer = f" or --profile-steps {left}" if left > 0 else ""
    require(
        left >= count,
        f"--profile records {count} steps after {WARM_UP} that warm up, and --steps {steps} ends "
        f"before; try --steps {needed}{fewer}.",
    )
    _wake()
    return Profile(path, first_step + WARM_UP, count, "ranks" in given)


def _wake() -> None:
    """torch sets its profiler up in the thread that imported it, and ranks may be other threads."""
    recorder = torch_profile(activities=[ProfilerActivity.CPU])
    recorder.start()
    recorder.stop()


# ---- names


class Names:
    """Makes named ranges while `active`, and none otherwise; one per rank."""

    def __init__(self) -> None:
        self.active = False

    def __call__(self, name: str) -> AbstractContextManager:
        """A range of this name around what a `with` block does."""
        return record_function(name) if self.active else nullcontext()

    def around(self, function: Callable, name: Callable[..., str]) -> Callable:
        """The function, inside a range called name(its arguments)."""

        def named(*args: Any) -> Any:
            with self(name(*args)):
                return function(*args)

        return named


class ModuleRange:
    """Two hooks: a range from the start of a module's forward to its end."""

    def __init__(self, names: Names, name: str):
        self._names, self._name = names, name
        self._open: list[AbstractContextManager] = []

    def enter(self, module: nn.Module, inputs: tuple) -> None:
        """Before forward."""
        opened = self._names(self._name)
        opened.__enter__()
        self._open.append(opened)

    def leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """After forward, also after one that was left early, as recomputation does."""
        self._open.pop().__exit__(None, None, None)


def name_modules(model: nn.Module, names: Names) -> None:
    """A range around each module; its first word says what its time counts as."""
    words = {"core": "attention", "head": "loss"}
    for path, module in model.named_modules():
        word = words.get(path.rpartition(".")[2], "module")
        hooks = ModuleRange(names, f"{word} {path} {type(module).__name__}")
        module.register_forward_pre_hook(hooks.enter)
        module.register_forward_hook(hooks.leave, always_call=True)


class NamedSynchroniser:
    """Who sums gradients, with a name; methods as in data_parallel.py: begin_step, before_backward,
    finish."""

    def __init__(self, synchroniser: Any, names: Names, stage: int):
        self._inner, self._names, self._name = synchroniser, names, f"reduce gradients {stage}"

    def begin_step(self) -> None:
        self._inner.begin_step()

    def before_backward(self, last: bool) -> None:
        self._inner.before_backward(last)

    def finish(self) -> None:
        with self._names(self._name):
            self._inner.finish()


class NamedWorld:
    """A world (see comm.py) whose calls have names, as those of all that are split from it."""

    def __init__(self, names: Names, world: Any):
        self._names, self._world = names, world

    def all_reduce(self, call: Call, out: Tensor, op: str) -> Work:
        return self._named(call, lambda: self._world.all_reduce(call, out, op))

    def all_gather(self, call: Call, out: Tensor, x: Tensor) -> Work:
        return self._named(call, lambda: self._world.all_gather(call, out, x))

    def reduce_scatter(self, call: Call, out: Tensor, x: Tensor, op: str) -> Work:
        return self._named(call, lambda: self._world.reduce_scatter(call, out, x, op))

    def all_to_all(
        self, call: Call, out: Tensor, x: Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> Work:
        rows = receive_rows, send_rows
        return self._named(call, lambda: self._world.all_to_all(call, out, x, *rows))

    def broadcast(self, call: Call, out: Tensor, source: int) -> Work:
        return self._named(call, lambda: self._world.broadcast(call, out, source))

    def barrier(self, call: Call) -> Work:
        return self._named(call, lambda: self._world.barrier(call))

    def exchange(self, call: Call, sends: list, receives: list) -> Work:
        return self._named(call, lambda: self._world.exchange(call, sends, receives))

    def split(self, call: Call, mine: list[int]) -> "NamedWorld":
        return NamedWorld(self._names, self._world.split(call, mine))

    def _named(self, call: Call, begin: Callable[[], Work]) -> Work:
        name = call_name(call)
        with self._names(f"comm {name}"):
            work = begin()
        return NamedWork(work, self._names, f"comm wait {name}")


class NamedWork:
    """Work under way, whose wait has a name."""

    def __init__(self, work: Work, names: Names, name: str):
        self._work, self._names, self._name = work, names, name

    def wait(self) -> None:
        """Return when it is over."""
        with self._names(self._name):
            self._work.wait()

    def done(self) -> bool:
        return self._work.done()


def call_name(call: Call) -> str:
    """Operation, axis, payload and place of a call, as the trace names it."""
    return f"{call.op} {call.axis} {call.bytes} B {call.place}"


# ---- the trainer


class ProfiledTrainer(Trainer):
    """A Trainer that records some of its steps.

    report  a table of time by category, on rank 0 after the last of these steps; else empty
    """

    def __init__(
        self, model_cfg: ModelConfig, mesh_cfg: MeshConfig, cfg: TrainConfig, world: Axis,
        wanted: Profile,
    ):  # fmt: skip
        self.names, self.wanted, self.report = Names(), wanted, ""
        world = world.watched(partial(NamedWorld, self.names))
        super().__init__(model_cfg, mesh_cfg, cfg, world)
        name_modules(self.model, self.names)
        executor = self.executor
        executor.do = {
            kind: self.names.around(function, lambda action, received: str(action))
            for kind, function in executor.do.items()
        }
        executor.synchronisers = {
            stage: NamedSynchroniser(inner, self.names, stage)
            for stage, inner in executor.synchronisers.items()
        }
        self._recorder: torch_profile | None = None

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step, recorded if it is one of those; returns its metrics."""
        if step == self.wanted.first:
            self._begin()
        try:
            with self.names(trace_time.step_name(self.mesh.world.rank, step)):
                metrics = super().train_step(step)
                if self.names.active and self.device.type == "cuda":
                    torch.cuda.synchronize()  # its kernels belong to this step
        except BaseException:
            self._stop()  # a profiler is one for the process: others may want it
            raise
        if step == self.wanted.last:
            self._end()
        return metrics

    def update(self, step: int) -> float:
        """Clip, step, publish the weights; returns the gradient norm before clipping."""
        with self.names("optimizer"):
            return super().update(step)

    def _begin(self) -> None:
        """All ranks begin together; a process has one profiler, which sees all of its threads."""
        world, kinds = self.mesh.world, [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        world.barrier()
        if world.rank == 0 or not self.wanted.threads:
            everywhere = _ExperimentalConfig(profile_all_threads=True)
            self._recorder = torch_profile(activities=kinds, experimental_config=everywhere)
            self._recorder.start()
        world.barrier()
        self.names.active = True

    def _stop(self) -> None:
        self.names.active = False
        if self._recorder is not None:
            self._recorder.stop()

    def _end(self) -> None:
        """Write the trace, and on rank 0 the table."""
        world = self.mesh.world
        self.names.active = False
        world.barrier()
        self._stop()
        times: dict[int, list[float]] = {}
        if self._recorder is not None:
            events = write(self._recorder, self.wanted.file_of(world.rank, world.size))
            times = trace_time.time_by_category(events)
            self._recorder = None
        if not self.wanted.threads:
            times = self._gather(times[world.rank])
        if world.rank == 0:
            self.report = self._tell(times)

    def _gather(self, mine: list[float]) -> dict[int, list[float]]:
        """What each process has found about itself."""
        world = self.mesh.world
        mine = torch.tensor([mine], dtype=torch.float64, device=self.device)
        return dict(enumerate(world.all_gather(mine).tolist()))

    def _tell(self, times: dict[int, list[float]]) -> str:
        wanted, size = self.wanted, self.mesh.world.size
        files = str(wanted.file_of(0, size))
        if wanted.file_of(0, size) != wanted.path:
            files += f" ... {wanted.file_of(size - 1, size).name}"
        lines = [f"steps {wanted.first} to {wanted.last}, traces for ui.perfetto.dev: {files}"]
        lines.append(trace_time.show(times))
        if wanted.threads and size > 1:
            lines.append("ranks are threads that take turns: communication includes others' turns")
        return "\n".join(lines)


def write(recorder: torch_profile, path: Path) -> list[dict[str, Any]]:
    """Write the trace of a profiler that has stopped, its threads named by rank; gives its events.

    path  of a file in a folder that exists
    """
    raw = path.with_name(f"{path.name}.part")
    recorder.export_chrome_trace(str(raw))
    trace = json.loads(raw.read_text(encoding="utf-8"))
    raw.unlink()
    trace["traceEvents"] = trace_time.name_ranks(trace["traceEvents"])
    path.write_text(json.dumps(trace), encoding="utf-8")
    return trace["traceEvents"]
