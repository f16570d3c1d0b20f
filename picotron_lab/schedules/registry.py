"""Every schedule by its name: build("1f1b", 4, 8) gives the lists of 4 ranks, 8 micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass

from picotron_lab.schedules import (
    auto,
    basic,
    dual_pipe,
    search,
    sliced,
    v_shape,
    vocab,
    zero_bubble,
)
from picotron_lab.schedules.actions import Schedule, ScheduleError
from picotron_lab.schedules.costs import Options


@dataclass(frozen=True)
class Entry:
    """A function (p, m, the options named in takes ...) -> Schedule, and its stages per rank.

    takes   fields of Options, in the order of the function's parameters
    stages  per rank: the only choice, or the default if takes names virtual_stages
    """

    function: Callable[..., Schedule]
    stages: int = 1
    takes: tuple[str, ...] = ()


ENTRIES = {
    "afab": Entry(basic.afab),
    "1f1b": Entry(basic.one_f_one_b),
    "eager-1f1b": Entry(basic.eager_1f1b),
    "interleaved": Entry(basic.interleaved, 2, ("virtual_stages",)),
    "zb-h1": Entry(zero_bubble.zb_h1),
    "zb-h2": Entry(zero_bubble.zb_h2),
    "interleaved-zb": Entry(zero_bubble.interleaved_zb, 2, ("virtual_stages",)),
    "zb-v": Entry(v_shape.zb_v, 2),
    "v-half": Entry(v_shape.v_half, 2),
    "v-min": Entry(v_shape.v_min, 2),
    "v-1f1b": Entry(v_shape.v_1f1b, 2),
    "dualpipe": Entry(dual_pipe.dual_pipe, 2),
    "dualpipe-v": Entry(dual_pipe.dual_pipe_v, 2),
    "seq1f1b": Entry(sliced.seq1f1b, 1, ("slices",)),
    "terapipe": Entry(sliced.terapipe, 1, ("slices",)),
    "1f1b-vocab1": Entry(vocab.vocab_1, 1, ("costs",)),
    "1f1b-vocab2": Entry(vocab.vocab_2, 1, ("costs",)),
    "1f1b-interlaced": Entry(vocab.interlaced),
    "v-half-vocab1": Entry(vocab.v_half_vocab_1, 2),
    "v-half-vocab2": Entry(vocab.v_half_vocab_2, 2),
    "zb-auto": Entry(search.zb_auto, 1, ("costs", "memory_limit", "kept")),
    "auto": Entry(auto.auto, 1, ("virtual_stages", "costs", "memory_limit", "vocabulary")),
}
NAMES = tuple(ENTRIES)
DEFAULTS = Options()


def build(name: str, ranks: int, microbatches: int, options: Options = DEFAULTS) -> Schedule:
    """The schedule of that name for so many ranks and micro-batches.

    Raises  ScheduleError, one sentence with option, value, rule and a value that works
    """
    if name not in ENTRIES:
        raise ScheduleError(f"schedule '{name}' is unknown: choose one of {', '.join(NAMES)}.")
    for option, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value < 1:
            raise ScheduleError(f"{option} {value} is too small for {name}: give 1 or more.")
    entry = ENTRIES[name]
    _check(name, entry, options)
    chosen = {"virtual_stages": options.virtual_stages or entry.stages}
    values = [chosen.get(field, getattr(options, field)) for field in entry.takes]
    schedule = entry.function(ranks, microbatches, *values)
    return schedule if "slices" in entry.takes else sliced.within(schedule, options.slices)


def _check(name: str, entry: Entry, options: Options) -> None:
    """Refuse a choice that the schedule would ignore."""
    v, n = options.virtual_stages, options.slices
    if v < 0 or n < 1:
        wrong = f"virtual stages {v}" if v < 0 else f"token slices {n}"
        raise ScheduleError(f"{wrong} are too few for {name}: give 1 or more.")
    if v not in (0, entry.stages) and "virtual_stages" not in entry.takes:
        raise ScheduleError(
            f"virtual stages {v} do not fit {name}, whose ranks hold {entry.stages}: "
            "leave them out, or choose interleaved."
        )
    if options.vocabulary and "vocabulary" not in entry.takes:
        raise ScheduleError(
            f"vocabulary {options.vocabulary} does not fit {name}: choose auto, or a schedule made "
            f"for it, such as 1f1b-vocab2."
        )
    if not options.memory_limit >= 0:
        raise ScheduleError(
            f"memory_limit {options.memory_limit:g} is no number of activations: give 0 for no "
            f"limit, or one for {name} to keep, such as 4."
        )
    if n > 1 and "costs" in entry.takes:
        raise ScheduleError(
            f"token slices {n} do not fit {name}, which runs whole sequences: choose seq1f1b, or "
            "1f1b."
        )
