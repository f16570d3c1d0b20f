"""TeraPipe's ten settings again: our slices beside the published ones, simulated beside measured.

    python benchmarks/terapipe.py             tables; a CPU, 10 seconds
    python benchmarks/terapipe.py --fit       how the three fitted constants were found
    python benchmarks/terapipe.py --json      the same as data

Nothing is run: the authors had 48 machines of 8 V100. A latency is the closed form of
schedules/slicing.py, sum of t_i + (K-1) max t_i, plus what follows a step's last slice; the tests
compare it with the simulator of schedules, and with a pipeline played through slice by slice.

Measured  Li et al. 2021 (2102.07988), its tables: seconds of a step, sequences of 2048 tokens
Cost      of a slice of l tokens after c others, forward and backward, on a stage of n layers:
              n max(floor, (72 D^2 l + 12 D l (c + l)) / (op * matmul)) + n sums + 2 message
          sums      4 all-reduces of 2 l D bytes over the op GPUs of a stage
          message   a time of its own + 2 l D bytes over the wire
          Once a step, the same with and without slices: all-reduce of gradients among the replicas,
          where 8 GPUs share a machine's wire; update of a GPU's parameters
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from common import describe, markdown

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.schedules.slicing import Time, best_slices, latency  # noqa: E402

# ---- what was published


@dataclass(frozen=True)
class Model:
    """A GPT-3: no vocabulary in any of the measurements."""

    layers: int
    width: int


MODELS = {
    "1B": Model(24, 2048), "13B": Model(40, 5120), "44B": Model(96, 6144), "175B": Model(96, 12288),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A row of the paper's tables: seconds of a step without slices, and with these."""

    model: str
    batch: int  # sequences of a step
    data: int  # replicas
    pipe: int  # stages
    op: int  # GPUs that share a stage's matmuls
    without: float
    sliced: float
    slices: tuple[int, ...] = ()
    length: int = 2048

    @property
    def sequences(self) -> int:
        """That go through one pipeline in a step, one by one."""
        return self.batch // self.data


# slices of 1, 4, 6, 7 and 10 were not read in the paper itself: each adds up to 2048 tokens
SETTINGS = (
    Setting("1B", 128, 8, 24, 1, 1.517, 1.254, (776, 640, 632)),
    Setting("1B", 72, 2, 12, 8, 1.018, 1.018, (2048,)),
    Setting("1B", 72, 1, 24, 8, 0.913, 0.913, (2048,)),
    Setting("13B", 32, 2, 20, 8, 2.637, 1.891, (1024, 1024)),
    Setting("13B", 32, 1, 40, 8, 1.863, 1.328, (704, 688, 656)),
    Setting("44B", 8, 4, 96, 1, 13.319, 7.103, (64,) * 26 + (56,) * 6 + (48,)),
    Setting("44B", 8, 2, 24, 8, 4.311, 2.771, (368, 384, 384, 368, 256, 288)),
    Setting("44B", 8, 1, 48, 8, 2.662, 1.111, (384, 384, 368, 320, 296, 296)),
    Setting("175B", 2, 1, 96, 4, 9.990, 1.481, (120,) * 4 + (112,) * 6 + (104,) * 8 + (64,)),
    Setting("175B", 2, 1, 48, 8, 5.822, 1.160, (128,) * 16),
)
UNIFORM = {  # setting -> number of equal slices -> seconds
    8: {1: 2.662, 4: 1.241, 8: 1.255, 16: 1.241},
    9: {1: 9.990, 4: 2.902, 8: 1.892, 16: 1.547, 32: 1.593, 64: 2.227, 128: 3.252},
}
# 13B as in setting 5, longer sequences, as many as the authors' code plans for; slices unknown
LONGER = (
    Setting("13B", 32, 1, 40, 8, 1.863, 1.328, length=2048),
    Setting("13B", 8, 1, 40, 8, 2.526, 0.913, length=4096),
    Setting("13B", 4, 1, 40, 8, 3.754, 0.756, length=6144),
    Setting("13B", 2, 1, 40, 8, 4.978, 0.636, length=8192),
)
FAR = 0.15  # a speed-up further than this from the published one gets a sentence
REASONS = {
    4: "Two slices that take half the time each would give 35 / 25.5 = 1.37 if nothing else took "
    "any; the published 1.39 leaves no room for the gradients' all-reduce between 2 replicas and "
    "for messages, which our cost has.",
    5: "The two published latencies give a slice 1.7 ms beyond its share of a sequence; here it is "
    "5.4 ms, a message each way, a constant found on all settings, and mostly on wider models.",
    6: "The two published latencies leave about 6 s that slices do not shorten, ours 4.5 s: among "
    "4 replicas the all-reduce of gradients was slower than 8 GPUs' share of our wire.",
}
ON_EQUAL = """Setting 9: few slices are too slow, as one is already: long messages took less there.
64 and more are too fast: the thinnest slices took 9 ms a stage there, and 7 ms here.
Setting 8: 16 slices are too slow, since messages of half the width cost as much here."""
ON_LONGER = """Our speed-ups are lower for the reason of setting 5: a message's own time is too long
for the 13B, and so are our slices."""

# ---- the machine


@dataclass(frozen=True)
class Machine:
    """V100s, 8 to a machine. Seconds, bytes and operations per second.

    Given    matmul: 0.7 of the 112e12 that the authors count for fp16. sums: NVLink's bus.
             floor_tokens: the paper's figure, fewer take as long on a layer of the 1B
    Fitted   wire, message, update, together, in logarithms: to the 10 latencies without slices and
             the 9 with equal ones. No latency with planned slices was used. Of a wire 25 Gbit/s,
             3.1e9, are advertised. With `matmul` fitted too, it would exceed the peak
    """

    matmul: float = 0.7 * 112e12
    sums: float = 130e9
    floor_tokens: int = 256
    wire: float = 2.5e9
    message: float = 2.7e-3
    update: float = 3e-10  # of one parameter

    @property
    def floor(self) -> float:
        """Seconds of a layer for the thinnest slice, forward and backward."""
        return 72 * MODELS["1B"].width ** 2 * self.floor_tokens / self.matmul


def stage_time(setting: Setting, machine: Machine) -> Time:
    """Seconds of a stage, forward and backward: backward is twice forward, so that one function is
    exact (see best_slices)."""
    model = MODELS[setting.model]
    layers, D, op = model.layers // setting.pipe, model.width, setting.op

    def time(l: int, c: int) -> float:
        operations = 72 * D**2 * l + 12 * D * l * (c + l)
        sums = 4 * 2 * (op - 1) / op * 2 * l * D / machine.sums
        layer = max(machine.floor, operations / op / machine.matmul) + sums
        return layers * layer + 2 * (machine.message + 2 * l * D / machine.wire)

    return time


def rest(setting: Setting, machine: Machine) -> float:
    """Seconds of a step that slices do not change."""
    model = MODELS[setting.model]
    mine = 12 * model.width**2 * model.layers / setting.pipe / setting.op
    share = 2 * (setting.data - 1) / setting.data
    return mine * machine.update + share * 8 * 2 * mine / machine.wire


def seconds(setting: Setting, machine: Machine, slices: tuple[int, ...]) -> float:
    """A step, each of whose sequences is cut like this."""
    time = stage_time(setting, machine)
    return latency(slices, setting.pipe, time, setting.sequences) + rest(setting, machine)


def plan(setting: Setting, machine: Machine) -> tuple[int, ...]:
    """The best slices in multiples of 8 tokens, as in the paper's code; of long sequences more."""
    time, grain = stage_time(setting, machine), max(8, setting.length // 256)
    return best_slices(setting.length, setting.pipe, time, grain, 0.0, setting.sequences)[0]


def equal(setting: Setting, count: int) -> tuple[int, ...]:
    """That many equal slices."""
    return (setting.length // count,) * count


# ---- where the constants come from


def known(machine: Machine) -> Iterator[tuple[float, float]]:
    """(simulated, measured) of the latencies that constants are fitted to."""
    for setting in SETTINGS:
        yield seconds(setting, machine, equal(setting, 1)), setting.without
    for number, rows in UNIFORM.items():
        setting = SETTINGS[number - 1]
        for count, measured in rows.items():
            if count > 1:
                yield seconds(setting, machine, equal(setting, count)), measured


def error(machine: Machine) -> float:
    """Root mean square of the logarithms of simulated / measured."""
    logs = [math.log(simulated / measured) for simulated, measured in known(machine)]
    return math.sqrt(sum(log**2 for log in logs) / len(logs))


def fit(start: Machine, names: tuple[str, ...]) -> Machine:
    """Multiply and divide one constant after the other, by less and less, while that helps."""
    best, factor = start, 2.0
    while factor > 1.0005:
        tries = [
            replace(best, **{name: getattr(best, name) * by})
            for name in names
            for by in (factor, 1 / factor)
        ]
        found = min(tries, key=error)
        if error(found) < error(best):
            best = found
        else:
            factor = math.sqrt(factor)
    return best


def show_fit() -> None:
    """Print the constants that fit best, and what other choices would give."""
    rows = []
    for words, start, names in (
        ("as used, before rounding", Machine(), ("wire", "message", "update")),
        ("matmul fitted too", Machine(), ("wire", "message", "update", "matmul")),
        ("messages cost bytes only", Machine(message=0.0), ("wire", "update")),
    ):
        found = fit(start, names)
        values = (found.matmul, found.wire, found.message, found.update, error(found))
        rows.append([words, *(f"{value:.3g}" for value in values)])
    rows.append(["the tables' constants", *(f"{v:.3g}" for v in (
        Machine().matmul, Machine().wire, Machine().message, Machine().update, error(Machine())
    ))])  # fmt: skip
    header = ("", "matmul", "wire", "message", "update", "rms of log error")
    print(markdown(header, rows))


# ---- tables


def all_rows(machine: Machine) -> list[dict]:
    """The ten settings, as data."""
    found = []
    for number, setting in enumerate(SETTINGS, 1):
        ours = plan(setting, machine)
        without = seconds(setting, machine, equal(setting, 1))
        sliced = seconds(setting, machine, setting.slices)
        row = asdict(setting) | {
            "setting": number,
            "speedup": setting.without / setting.sliced,
            "simulated_without": without,
            "simulated_sliced": sliced,
            "simulated_speedup": without / sliced,
            "our_slices": ours,
            "simulated_ours": seconds(setting, machine, ours),
            "rest": rest(setting, machine),
        }
        row["ratio"] = row["simulated_speedup"] / row["speedup"]
        found.append(row)
    return found


def uniform_rows(machine: Machine) -> list[dict]:
    """Equal slices, as data; the last row of each setting has the planned ones."""
    found = []
    for number, known_rows in UNIFORM.items():
        setting = SETTINGS[number - 1]
        cases = [(str(n), equal(setting, n), measured) for n, measured in known_rows.items()]
        cases.append(("planned", setting.slices, setting.sliced))
        for name, slices, measured in cases:
            simulated = seconds(setting, machine, slices)
            found.append(
                {"setting": number, "slices": name, "measured": measured, "simulated": simulated}
            )
    return found


def longer_rows(machine: Machine) -> list[dict]:
    """Sequence lengths, as data."""
    found = []
    for setting in LONGER:
        slices = plan(setting, machine)
        without = seconds(setting, machine, equal(setting, 1))
        sliced = seconds(setting, machine, slices)
        found.append(asdict(setting) | {
            "slices": slices, "simulated_without": without, "simulated_sliced": sliced,
            "speedup": setting.without / setting.sliced, "simulated_speedup": without / sliced,
        })  # fmt: skip
    return found


def short(slices: tuple[int, ...]) -> str:
    """Such as 64x26 56x6 48."""
    runs = ((length, len(list(run))) for length, run in groupby(slices))
    return " ".join(f"{length}x{count}" if count > 1 else f"{length}" for length, count in runs)


def print_settings(rows: list[dict]) -> None:
    """The ten settings: speed-ups, slices, reasons."""
    print("Seconds of a step, published / simulated, with the paper's slices unless it says ours; "
          "ratio: simulated over published speed-up\n")  # fmt: skip
    header = ("setting", "data x pipe x op", "without", "with", "with ours", "speed-up", "ours",
              "ratio", "ratio of without", "ratio of with")  # fmt: skip
    table = [[
        f"{r['setting']} {r['model']}", f"{r['data']} x {r['pipe']} x {r['op']}",
        f"{r['without']:.3f} / {r['simulated_without']:.3f}",
        f"{r['sliced']:.3f} / {r['simulated_sliced']:.3f}", f"{r['simulated_ours']:.3f}",
        f"{r['speedup']:.2f} / {r['simulated_speedup']:.2f}",
        f"{r['simulated_without'] / r['simulated_ours']:.2f}", f"{r['ratio']:.2f}",
        f"{r['simulated_without'] / r['without']:.2f}",
        f"{r['simulated_sliced'] / r['sliced']:.2f}",
    ] for r in rows]  # fmt: skip
    print(markdown(header, table), "\n")
    table = [[str(r["setting"]), short(r["slices"]), short(r["our_slices"])] for r in rows]
    print(markdown(("setting", "published slices", "our slices"), table), "\n")
    for row in rows:
        if abs(row["ratio"] - 1) > FAR:
            reason = REASONS.get(row["setting"], "No reason is known.")
            print(f"Setting {row['setting']}, ratio {row['ratio']:.2f}: {reason}")
    print()


def print_others(machine: Machine) -> None:
    """Equal slices, and longer sequences."""
    print("Equal slices; planned: the published ones\n")
    table = [[
        f"{r['setting']}", r["slices"], f"{r['measured']:.3f}", f"{r['simulated']:.3f}",
        f"{r['simulated'] / r['measured']:.2f}",
    ] for r in uniform_rows(machine)]  # fmt: skip
    header = ("setting", "slices", "published, s", "simulated, s", "simulated / published")
    print(f"{markdown(header, table)}\n\n{ON_EQUAL}\n")
    print("Longer sequences (13B, 40 stages of 8 GPUs), with our slices\n")
    table = [[
        f"{r['length']}", f"{r['batch']}", f"{r['without']:.3f} / {r['simulated_without']:.3f}",
        f"{r['sliced']:.3f} / {r['simulated_sliced']:.3f}",
        f"{r['speedup']:.2f} / {r['simulated_speedup']:.2f}", short(r["slices"]),
    ] for r in longer_rows(machine)]  # fmt: skip
    header = ("tokens", "sequences", "without, s", "with, s", "speed-up", "our slices")
    print(f"{markdown(header, table)}\n\n{ON_LONGER}")


def main() -> int:
    """Print tables, data, or the fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="find the constants again")
    parser.add_argument("--json", action="store_true", help="data instead of tables")
    args = parser.parse_args()
    machine = Machine()
    tables: dict[str, Callable] = {
        "settings": all_rows, "uniform": uniform_rows, "longer": longer_rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps({"machine": asdict(machine)} | {k: f(machine) for k, f in tables.items()}))
    elif args.fit:
        show_fit()
    else:
        print(f"{describe('Simulated')}\n")
        print_settings(all_rows(machine))
        print_others(machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
