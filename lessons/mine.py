"""Your own code trains a model: python run.py --ranks 4 --mine 03,05

Idea    Each lesson that you name takes the place of the library's technique in a tiny training run:
        your buckets sum the gradients, your matrices are cut, your blocks go round. Beside it the
        plain model trains on one device. One seed, one loss curve: yours must lie on it.
Ranks   03, 04, 12 work on dp; 05, 06, 07 on tp; 08 on cp; 09 on pp. Ranks are shared out evenly
        over the axes that are needed, and run as threads of this process.
Model   two layers or as many as pp has ranks, float64, SGD: AdamW would hide a wrong factor
Data    the text of Python's own argparse, as bytes: nothing is downloaded
Read    main -> plan -> one_device -> on_ranks -> Run -> tell; adapters: kit/parts.py
"""

import argparse
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lessons.kit import parts
from lessons.kit.tasks import LESSONS, BadUse, load
from lessons.todo import TODO
from picotron_lab import mesh, sharding
from picotron_lab.comm import Axis
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, require
from picotron_lab.dropout import Where
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import CommError
from picotron_lab.model import Llama, initial_value
from picotron_lab.options import Parser

AXES = {
    "03": "dp", "04": "dp", "05": "tp", "06": "tp", "07": "tp", "08": "cp", "09": "pp", "12": "dp",
}  # fmt: skip
APART = {  # what cannot be tried together, and why
    ("03", "04"): "both sum the gradients over dp",
    ("03", "09"): "a pipeline's list says when backward runs, and 03 wants to be told",
    ("04", "06"): "06 needs whole gradients at the end, and 04 has none",
    ("04", "09"): "a pipeline's list says when backward runs, and 04 wants to be told",
    ("05", "06"): "06 is 05 with other borders",
    ("08", "09"): "stages of a pipeline here have whole sequences",
    ("06", "07"): "06 leaves tokens apart where 07 wants all of them",
    ("05", "12"): "experts here are whole",
    ("06", "12"): "experts here are whole",
}  # fmt: skip
BATCH, MICRO_BATCHES, LENGTH, BUCKET_BYTES = 12, 3, 24, 4096
TOLERANCE = 1e-9  # of a loss, relative


@dataclass(frozen=True)
class Plan:
    """Which lessons serve, from where, on which mesh, for how long.

    files  {"03": path of exercise.py}, or "mutants.py::name"
    """

    files: dict[str, str]
    sizes: MeshConfig
    steps: int
    lr: float

    @property
    def model(self) -> ModelConfig:
        """A model that every axis can cut."""
        layers = max(2, self.sizes.pp)
        cfg = ModelConfig("mine", 128, 32, layers, heads=8, kv_heads=8, ffn_size=48)
        if "12" not in self.files:
            return cfg
        return ModelConfig(
            "mine, experts", 128, 32, layers, heads=8, kv_heads=8, ffn_size=48,
            experts=2 * self.sizes.dp, top_k=2,
        )  # fmt: skip


# ---- the plan


def plan(numbers: Sequence[str], ranks: int, steps: int, lr: float, folder: Path) -> Plan:
    """Raises ConfigError, one sentence, for lessons or ranks that do not fit."""
    for number in numbers:
        require(
            number in AXES,
            f"--mine {number} has no code that trains a model; those that have are "
            f"{', '.join(sorted(AXES))}.",
        )
    for (one, other), reason in APART.items():
        require(
            not {one, other} <= set(numbers),
            f"--mine {one},{other} cannot be tried together: {reason}; try one after the other.",
        )
    axes = sorted({AXES[number] for number in numbers})
    each = round(ranks ** (1 / len(axes)))
    require(
        each > 1 and each ** len(axes) == ranks,
        f"--ranks {ranks} cannot be shared out evenly over {' and '.join(axes)}, which --mine "
        f"{','.join(numbers)} needs; try --ranks {2 ** len(axes)}.",
    )
    require(each in (2, 4), f"--ranks {ranks} gives {each} ranks to an axis: take 2 or 4.")
    files = {number: file_of(number, folder) for number in numbers}
    return Plan(files, MeshConfig(**dict.fromkeys(axes, each)), steps, lr)


def file_of(number: str, folder: Path) -> str:
    """exercise.py of a lesson, or NN_name.py in a folder of such files."""
    found = [*folder.glob(f"{number}_*/exercise.py"), *folder.glob(f"{number}_*.py")]
    require(
        len(found) == 1,
        f"--exercises {folder} has {len(found)} files for lesson {number}: it needs one, as "
        f"{number}_name/exercise.py.",
    )
    return str(found[0])


def batches(steps: int) -> list[Tensor]:
    """[BATCH, LENGTH + 1] tokens of each step, in order."""
    text = Path(argparse.__file__).read_bytes()
    tokens = torch.tensor([byte % 128 for byte in text])
    per_step = BATCH * (LENGTH + 1)
    places = [step * per_step % (len(tokens) - per_step) for step in range(steps)]
    return [tokens[first : first + per_step].view(BATCH, LENGTH + 1) for first in places]


def fresh(cfg: ModelConfig) -> Llama:
    """The plain model with all its weights, the same on every rank."""
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    sharding.materialise(model, 0, initial_value, dtype=torch.float64)
    return model


# ---- one device


def one_device(todo: Plan) -> list[float]:
    """The loss of each step, of the plain model."""
    model, losses = fresh(todo.model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=todo.lr)
    for tokens in batches(todo.steps):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (BATCH * LENGTH)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# ---- many ranks, your code


class Plainly:
    """Sums gradients over dp one after the other, where no lesson does it."""

    def __init__(self, parameters: list[nn.Parameter], axis: Axis):
        self.shards, self.axis = parameters, axis

    def begin_step(self) -> None:
        """Gradients are none."""
        for parameter in self.shards:
            parameter.grad = None

    def before_backward(self, last: bool) -> None:
        """Nothing leaves during backward."""

    def finish(self) -> None:
        """partial -> replicated."""
        for parameter in self.shards:
            parameter.grad = self.axis.all_reduce(parameter.grad)

    def publish(self) -> None:
        """All weights are here."""


def synchroniser(students: dict[str, ModuleType], parameters: list[nn.Parameter], dp: Axis) -> Any:
    """Who sums gradients over dp: lesson 03, 04, or nobody's."""
    if "04" in students:
        return students["04"].Stage1(parameters, dp)
    if "03" not in students:
        return Plainly(parameters, dp)
    sync = students["03"].Silent(parameters, dp, BUCKET_BYTES)
    sync.shards, sync.publish = parameters, lambda: None
    return sync


class Run:
    """One rank of a training run that uses the code of some lessons."""

    def __init__(self, todo: Plan, students: dict[str, ModuleType], world: Axis):
        self.axes, self.students, self.todo = mesh.build(world, todo.sizes, 8), students, todo
        self.model = fresh(todo.model)
        parts.put_in(self.model, self.axes, students, LENGTH)
        experts = [m for m in self.model.modules() if isinstance(m, parts.SpreadExperts)]
        mine = [p for m in experts for p in m.experts.parameters()]
        ours = [p for p in self.model.parameters() if all(p is not q for q in mine)]
        if todo.sizes.pp > 1:
            ours = parts.stage_parameters(self.model, self.axes.pp)
        self.sync = synchroniser(students, ours, self.axes.dp)
        self.optimizer = torch.optim.SGD([*self.sync.shards, *mine], lr=todo.lr)
        self.experts = mine

    def step(self, tokens_BT: Tensor) -> float:
        """Loss of the whole batch [BATCH, LENGTH + 1], before the step."""
        dp = self.axes.dp
        micro = tokens_BT.chunk(dp.size)[dp.rank].chunk(MICRO_BATCHES)
        for parameter in self.experts:
            parameter.grad = None
        self.sync.begin_step()
        loss = self.pipeline(micro) if self.axes.pp.size > 1 else self.backward(micro)
        self.sync.finish()
        self.finish()
        self.optimizer.step()
        self.sync.publish()
        world = self.axes.world.all_reduce(torch.tensor(loss, dtype=torch.float64))
        return float(world) / self.axes.tp.size

    def backward(self, micro: Sequence[Tensor]) -> float:
        """Forward and backward of this rank's micro-batches; their part of the loss."""
        places, loss = torch.arange(LENGTH), 0.0
        if "08" in self.students:
            cp = self.axes.cp
            places = self.students["08"].positions(cp.rank, cp.size, LENGTH)
        for i, tokens_BT in enumerate(micro):
            inputs, labels = tokens_BT[:, places], tokens_BT[:, places + 1]
            where = Where(places, torch.arange(len(inputs)))
            part = self.model(inputs, labels, where) / (BATCH * LENGTH)
            self.sync.before_backward(i == len(micro) - 1)
            part.backward()
            loss += float(part.detach())
        return loss

    def pipeline(self, micro: Sequence[Tensor]) -> float:
        """The same, as the list of lesson 09 says."""
        pp, student = self.axes.pp, self.students["09"]
        stage = parts.Stage(self.model, pp, list(micro), BATCH * LENGTH)
        width = self.todo.model.hidden_size
        shapes = [torch.zeros(len(x), LENGTH, width, dtype=torch.float64) for x in micro]
        actions = student.one_f_one_b(pp.size, len(micro))[pp.rank]
        student.run_list(actions, stage, pp, shapes)
        return sum(stage.seen)

    def finish(self) -> None:
        """Gradients that are partial over other axes than dp."""
        if "06" in self.students:
            self.students["06"].finish_gradients(self.model.layers, self.axes.tp)
            for parameter in (self.model.embed.whole.weight, self.model.norm.weight):
                parameter.grad = self.axes.tp.all_reduce(parameter.grad)
        if self.axes.cp.size > 1:  # ranks with other tokens of the same sequences
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = self.axes.cp.all_reduce(parameter.grad)


def on_ranks(todo: Plan) -> list[float]:
    """The loss of each step, of the code of the lessons. Raises TODO, and whatever that raises."""

    def rank_main(world: Axis) -> list[float]:
        names = {number: f"mine_{number}_{world.rank}" for number in todo.files}  # nothing shared
        students = {n: load(file, names[n]) for n, file in todo.files.items()}
        run = Run(todo, students, world)
        return [run.step(tokens) for tokens in batches(todo.steps)]

    return run_ranks(rank_main, todo.sizes.size)[0]


# ---- the command line


def draw(theirs: Sequence[float], yours: Sequence[float], title: str, path: Path) -> None:
    """Both curves in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(theirs, color="0.75", linewidth=6, label="plain model, one device")
    axes.plot(yours, color="#0072B2", linewidth=1.5, marker=".", label=title)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="SGD, float64, one seed")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of run.py --mine."""
    parser = Parser("run.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--mine", required=True, metavar="NN[,NN]", help="lessons, such as 03,05")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="default: 40")
    parser.add_argument("--lr", type=float, default=0.5, metavar="RATE", help="default: 0.5")
    parser.add_argument("--plot", default="mine.png", metavar="FILE", help="default: mine.png")
    parser.add_argument(
        "--exercises", default=str(LESSONS), metavar="DIR", help="where your files are"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Train twice, compare, draw. 0: the curves agree; 1: they do not; 2: a sentence says why."""
    args = parse(arguments)
    numbers = list(dict.fromkeys(args.mine.split(",")))
    require(args.steps >= 1, f"--steps {args.steps} trains nothing; try --steps 40.")
    path = Path(args.plot)
    require(
        path.parent.is_dir() and path.suffix in (".png", ".pdf", ".svg"),
        f"--plot {path} must end in .png, .pdf or .svg and lie in a folder that exists; try "
        "--plot mine.png.",
    )
    todo = plan(numbers, args.ranks, args.steps, args.lr, Path(args.exercises))
    theirs = one_device(todo)
    try:
        yours = on_ranks(todo)
    except TODO as unfinished:
        raise ConfigError(
            f"task {unfinished} is not started, and --mine {args.mine} needs it; go on with: "
            f"python -m lessons check {str(unfinished)[:2]}."
        ) from None
    except BadUse as error:
        raise ConfigError(str(error)) from None
    except (CommError, ConfigError):
        raise
    except Exception as error:
        raise ConfigError(broken(error, todo)) from error
    return tell(theirs, yours, todo, path)


def broken(error: Exception, todo: Plan) -> str:
    """A sentence about what the code of a lesson raised: where in its file, and what to do next."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename in todo.files.values()]
    where = f" at line {own[-1].lineno} of {own[-1].filename}" if own else ""
    lessons = " and ".join(todo.files)
    return (
        f"your code of lesson {lessons} raised {type(error).__name__}{where}: {error}; go on with: "
        f"python -m lessons check {next(iter(todo.files))}."
    )


def tell(theirs: Sequence[float], yours: Sequence[float], todo: Plan, path: Path) -> int:
    """Print and draw what came out."""
    named = " and ".join(f"lesson {number}" for number in todo.files)
    draw(theirs, yours, f"your {named}, {todo.sizes.size} ranks", path)
    pairs = zip(yours, theirs, strict=True)
    apart = [abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in pairs]
    for who, losses in (("one device", theirs), (f"your {named}", yours)):
        print(f"loss of {who}: {losses[0]:.4f} -> {losses[-1]:.4f} in {todo.steps} steps")
    print(f"picture: {path}")
    first = next((step for step, far in enumerate(apart) if not far < TOLERANCE), None)
    if first is None:
        print(f"one curve: they differ by {max(apart):.0e} at most")
        return 0
    when = "before any step: look at forward" if first == 0 else "so a gradient is wrong"
    print(f"they part at step {first}, {when}; go on with: python -m lessons check")
    return 1
