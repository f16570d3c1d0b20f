"""Every schedule: its lists by hand, the published table, closed forms of bubble and peak."""

from hashlib import sha256
from itertools import product

import pytest

from picotron_lab.schedules import squeeze, v_shape
from picotron_lab.schedules.actions import (
    Action,
    Pair,
    Schedule,
    ScheduleError,
    last_backwards,
    parse,
    parts,
)
from picotron_lab.schedules.costs import Costs, Options
from picotron_lab.schedules.registry import NAMES, build
from picotron_lab.schedules.simulate import peaks, simulate
from picotron_lab.schedules.validator import validate

UNIT = Costs()


def bubbles(schedule: Schedule, costs: Costs = UNIT) -> tuple[float, float]:
    """Of the makespan; and of the stage: the longest idle time between first start and last end."""
    line = simulate(schedule, costs)
    work = [sum(map(costs.of, items)) for items in schedule.lists]
    spans = zip(line.starts, line.ends, work, strict=True)
    idle = max(ends[-1] - starts[0] - busy for starts, ends, busy in spans)
    return line.makespan - max(work), idle


def messages(schedule: Schedule) -> int:
    """Results of F, B and BW that another rank needs."""
    count = 0
    for rank, items in enumerate(schedule.lists):
        for action in (action for item in items for action in parts(item)):
            to = action.stage + {"F": 1, "W": schedule.stages}.get(action.kind, -1)
            inside = 0 <= to < schedule.stages
            count += inside and schedule.rank_of(to, action.microbatch) != rank
    return count


# ---- lists worked by hand


@pytest.mark.parametrize(
    ("name", "size", "lists"),
    [
        ("afab", (2, 2), ["F0.0 F0.1 BW0.0 BW0.1", "F1.0 F1.1 BW1.0 BW1.1"]),
        ("1f1b", (2, 3), ["F0.0 F0.1 BW0.0 F0.2 BW0.1 BW0.2", "F1.0 BW1.0 F1.1 BW1.1 F1.2 BW1.2"]),
        (
            "eager-1f1b", (2, 4),
            [
                "F0.0 F0.1 F0.2 BW0.0 F0.3 BW0.1 BW0.2 BW0.3",
                "F1.0 BW1.0 F1.1 BW1.1 F1.2 BW1.2 F1.3 BW1.3",
            ],
        ),
        (
            "zb-h1", (2, 3),
            [
                "F0.0 F0.1 B0.0 W0.0 F0.2 B0.1 W0.1 B0.2 W0.2",
                "F1.0 B1.0 F1.1 B1.1 W1.0 F1.2 B1.2 W1.1 W1.2",
            ],
        ),
        (
            "zb-h2", (2, 4),
            [
                "F0.0 F0.1 F0.2 B0.0 W0.0 F0.3 B0.1 W0.1 B0.2 W0.2 B0.3 W0.3",
                "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 W1.0 F1.3 B1.3 W1.1 W1.2 W1.3",
            ],
        ),
        (
            "dualpipe", (2, 4),
            [
                "F0.0 F1.2 F0.1 BW1.2 F1.3&BW0.0 BW1.3 B0.1 W0.1",
                "F0.2 F1.0 F0.3 BW1.0 F1.1&BW0.2 BW1.1 B0.3 W0.3",
            ],
        ),
        (  # what the authors' code calls in turn
            "dualpipe", (4, 8),
            [
                "F0.0 F0.1 F0.2 F3.4 B3.4 W3.4 F3.5 F0.3&BW3.5 F3.6&BW0.0 BW3.6 F3.7&BW0.1 BW3.7 "
                "B0.2 W0.2 B0.3 W0.3",
                "F1.0 F2.4 F1.1 F2.5 F1.2 BW2.4 F2.6&BW1.0 F1.3&BW2.5 F2.7&BW1.1 BW2.6 BW1.2 B2.7 "
                "B1.3 W2.7 W1.3",
                "F1.4 F2.0 F1.5 F2.1 F1.6 BW2.0 F2.2&BW1.4 F1.7&BW2.1 F2.3&BW1.5 BW2.2 BW1.6 B2.3 "
                "B1.7 W2.3 W1.7",
                "F0.4 F0.5 F0.6 F3.0 B3.0 W3.0 F3.1 F0.7&BW3.1 F3.2&BW0.4 BW3.2 F3.3&BW0.5 BW3.3 "
                "B0.6 W0.6 B0.7 W0.7",
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_small_lists(name, size, lists):
    assert [" ".join(map(str, items)) for items in build(name, *size).lists] == lists


def test_dual_pipe_of_more_sizes_is_that_of_the_authors():
    digest = sha256()  # of the lists that their repository deepseek-ai/DualPipe gives
    for p in (2, 4, 6, 8, 12):
        for m in (2 * p, 2 * p + 2, 4 * p + 2):
            lists = build("dualpipe", p, m).lists
            digest.update("\n".join(" ".join(map(str, items)) for items in lists).encode())
    assert digest.hexdigest()[:32] == "c339eb1b60acb08801a6f2c69b2013b2"


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("1f1b", ((0,), (1,), (2,), (3,))),
        ("interleaved", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("zb-v", ((0, 7), (1, 6), (2, 5), (3, 4))),
        ("dualpipe", ((0, 3), (1, 2), (2, 1), (3, 0))),
        ("dualpipe-v", ((0, 7), (1, 6), (2, 5), (3, 4))),
    ],
)
def test_placement(name, placement):
    schedule = build(name, 4, 8)
    assert schedule.placement == placement
    assert (schedule.ranks, schedule.stages) == (4, 1 + max(map(max, placement)))
    assert schedule.rank_of(1, 3) == 1
    assert schedule.rank_of(1, 4) == (2 if schedule.replicated else 1)


# ---- the published table: p = 4, m = 8, F = B = W = 1 for a chunk


TABLE = """
afab 1 33 9 9 .2727 8,8,8,8 48
1f1b 1 33 9 9 .2727 4,3,2,1 48
eager-1f1b 1 33 9 9 .2727 7,5,3,1 48
interleaved 2 57 9 9 .1579 11,9,7,5 112
interleaved 4 105 9 9 .0857 19,17,15,13 240
zb-h1 1 27 3 3 .1111 4,4,4,4 48
zb-h2 1 27 3 0 .1111 7,7,7,7 48
interleaved-zb 2 51 3 3 .0588 8,8,8,8 112
zb-v 2 51 3 0 .0588 8,8,8,8 96
v-half 2 53 5 5 .0943 6,6,6,6 96
v-min 2 59 11 11 .1864 4,4,4,4 96
v-1f1b 2 63 15 15 .2381 6,6,6,6 96
dualpipe 2 26 2 2 .0769 5,5,5,5 48
dualpipe-v 2 54 6 6 .1111 9,9,9,9 96
"""


@pytest.mark.parametrize("row", TABLE.split("\n")[1:-1])
def test_published_table(row):
    name, v, makespan, *idle, ratio, peak, sent = row.split()
    schedule = build(name, 4, 8, Options(virtual_stages=int(v)))
    validate(schedule, memory_limit=max(map(float, peak.split(","))))
    assert simulate(schedule).makespan == float(makespan)
    assert bubbles(schedule) == tuple(map(float, idle))
    assert f"{bubbles(schedule)[0] / float(makespan):.4f}".lstrip("0") == ratio
    assert peaks(schedule) == tuple(map(float, peak.split(",")))
    assert messages(schedule) == int(sent)


# ---- closed forms of bubble and peak, for all sizes


COSTS = [Costs(), Costs(F=3, B=4, W=2), Costs(F=1.25, B=1.0, W=0.5)]
EQUAL = [Costs(F=t, B=t, W=t) for t in (1, 2.5)]
PAIRS = [Costs(F=t, B=t, W=w) for t, w in ((1, 1), (3, 2), (2, 0.5))]
FORMS = {  # schedule -> (smallest m, bubble of the makespan or stage, peak of rank r, costs)
    "afab": (lambda p: 1, 0, lambda p, r, m, v: m, COSTS),
    "1f1b": (lambda p: 1, 0, lambda p, r, m, v: min(m, p - r), COSTS),
    "eager-1f1b": (lambda p: 1, 0, lambda p, r, m, v: min(m, 2 * (p - r) - 1), COSTS),
    "interleaved": (
        lambda p: p, 0, lambda p, r, m, v: min(m * v, (v - 1) * p + 2 * (p - 1 - r) + 1), COSTS
    ),
    "zb-h1": (lambda p: p, 0, lambda p, r, m, v: p, COSTS),
    "zb-h2": (lambda p: 2 * p - 1, 1, lambda p, r, m, v: 2 * p - 1, COSTS),
    "interleaved-zb": (lambda p: p, 0, lambda p, r, m, v: v * p, COSTS),
    "zb-v": (lambda p: 2 * p - 1, 1, lambda p, r, m, v: 2 * p, EQUAL),
    "dualpipe": (lambda p: 2 * p, 0, lambda p, r, m, v: p + 1, PAIRS),
    "dualpipe-v": (lambda p: 2 * p, 0, lambda p, r, m, v: min(2 * p + 1, 2 * m), PAIRS),
    "seq1f1b": (lambda p: 1, 0, lambda p, r, m, v: min(m * v, p - r - 1 + v) / v, COSTS),
    "terapipe": (lambda p: 1, 0, lambda p, r, m, v: m, COSTS),
}  # fmt: skip


def bubble(name: str, p: int, costs: Costs) -> float:
    """In times of one stage of the schedule, or one slice."""
    f, b, w = costs.F, costs.B, costs.W
    if name in ("zb-h1", "interleaved-zb"):
        return (p - 1) * (f + b - w)
    if name == "zb-h2":
        return (p - 1) * (f + b - 2 * w)
    if name.startswith("dualpipe"):  # a pair takes the sum, and so does BW
        return (p / 2 - 1 if name == "dualpipe" else p - 1) * ((f + b + w) + (b + w) - 3 * w)
    return 0 if name == "zb-v" else (p - 1) * (f + b + w)


def sizes(name: str, ps, more=()):
    """(p, m, v or n) that the closed forms cover: m around the multiples of p where they change."""
    least = FORMS[name][0]
    several = name in ("interleaved", "interleaved-zb", "seq1f1b", "terapipe")
    for p in ps:
        near = {p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p, 4 * p}
        for m in sorted({1, 2, 3, *near, *more}):
            grouped = not name.startswith("interleaved") or m % p == 0
            even = name != "dualpipe" or p % 2 == m % 2 == 0
            if m >= max(1, least(p)) and grouped and even:
                yield from ((p, m, v) for v in ((2, 3) if several else (1,)))


def check_forms(name: str, p: int, m: int, v: int) -> None:
    _, which, peak, times = FORMS[name]
    sliced = name in ("seq1f1b", "terapipe")
    options = Options(slices=v) if sliced else Options(virtual_stages=v if v > 1 else 0)
    schedule = build(name, p, m, options)
    validate(schedule)
    assert peaks(schedule) == pytest.approx([peak(p, r, m, v) for r in range(p)]), (p, m, v)
    for costs in times:
        assert bubbles(schedule, costs)[which] == pytest.approx(bubble(name, p, costs)), (p, m, v)


@pytest.mark.parametrize("name", FORMS)
def test_closed_forms(name):
    for size in sizes(name, (1, 2, 3, 4, 7)):
        check_forms(name, *size)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMS if name != "terapipe"])
def test_closed_forms_of_every_size(name):
    for size in sizes(name, range(1, 17), (63, 64)):
        check_forms(name, *size)


def test_pairs_that_gain():
    """DeepSeek-V3, table 2: the formula is that of the rank with least work, as it pairs most."""
    for p, m, pair in product((2, 4, 8), (16, 34), (2, 2.5)):
        costs = Costs(F=1, B=1, W=0.75, pair=pair)
        for name, ranks in (("dualpipe", p // 2), ("dualpipe-v", p)):
            made = build(name, p, m)
            least = min(sum(map(costs.of, items)) for items in made.lists)
            idle = simulate(made, costs).makespan - least
            assert idle == pytest.approx((ranks - 1) * (pair + 1.75 - 3 * 0.75)), (name, p, m)


def test_memory_between_b_and_w():
    """Zero Bubble, table 2: (p-r) M_B + r M_W for ZB-H1, (2(p-r)-1) M_B + 2r M_W for ZB-H2."""
    for p, m, kept in product((1, 2, 3, 4, 8), (16, 21), (0, 0.5, 32 / 34, 1)):
        one, two = (peaks(build(name, p, m), kept) for name in ("zb-h1", "zb-h2"))
        assert one == pytest.approx([p - r + r * kept for r in range(p)])
        assert two == pytest.approx([2 * (p - r) - 1 + 2 * r * kept for r in range(p)])


def test_zb_with_few_micro_batches():
    """For m <= p any zero-bubble schedule takes (m+p-1)(tF+tB)+tW (Zero Bubble, appendix)."""
    costs = Costs(F=3, B=4, W=2)
    for p, m, name in product((2, 3, 5, 8), (1, 2, 3, 5, 8), ("zb-h1", "zb-h2")):
        if m <= p:
            assert simulate(build(name, p, m), costs).makespan == (m + p - 1) * 7 + 2, (name, p, m)


@pytest.mark.parametrize(
    "ranks", [range(2, 9), pytest.param(range(9, 17), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_controllable_memory(ranks):
    """V-Half: half of 1F1B's peak; V-Min: a third; published bubbles for p = 4 and 8."""
    published = {"v-half": {4: 5, 8: 17}, "v-min": {4: 11, 8: 27}, "v-1f1b": {4: 15, 8: 33}}
    for p in ranks:
        held = {
            "v-half": p + 2 - p % 2,
            "v-min": 2 * -(-(p + 2) // 3),
            "v-1f1b": 2 * ((2 * p + 2) // 3 + (p % 3 == 0)),
        }
        most = {"v-half": 3 * p - 4 if p % 2 else max(1, 3 * p - 7), "v-min": 4 * p - 5}
        most["v-1f1b"] = 5 * (p - 1)
        for name, m in product(held, (2 * p, 3 * p + 5)):
            schedule = build(name, p, m)
            assert peaks(schedule) == (held[name],) * p, (name, p, m)
            idle = bubbles(schedule)[0]
            assert idle <= published[name].get(p, most[name]), (name, p, m)
            assert name != "v-half" or idle == most[name]


def test_stretching_a_schedule_is_making_a_longer_one():
    for p in (1, 2, 3, 4, 6, 7):
        straight = tuple((r, 2 * p - 1 - r, 2 * p + r, 4 * p - 1 - r) for r in range(p))
        blocks = [v_shape.v_half_block(p)] + [squeeze.Block(straight)] * (p % 3 > 0)
        for block, m in product(blocks, (3 * p + 3, 5 * p)):
            lists = squeeze.run(block, *squeeze.squeeze(block, m))
            made = squeeze.finite("any", block, m).lists
            for r, passes in enumerate(lists):
                assert squeeze._actions(block, r, passes) == made[r]


def test_all_sizes_run():
    """Every m, less than p and no multiple of it too, or a sentence with one that works."""
    strict = ("interleaved", "interleaved-zb", "dualpipe", "dualpipe-v")
    handmade = [name for name in NAMES if "auto" not in name]
    for name, p, m in product(handmade, (1, 2, 3, 8), (1, 2, 3, 5, 8, 17)):
        try:
            schedule = build(name, p, m)
        except ScheduleError as error:
            assert name in strict
            better = int(str(error).rstrip(".").split()[-1])
            size = (better, 4 * better) if "number of ranks" in str(error) else (p, better)
            schedule = build(name, *size)
        validate(schedule)


# ---- choices


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("2f2b", 4, 8), "schedule '2f2b' is unknown: choose one of afab, 1f1b"),
        (("1f1b", 0, 8), "ranks 0 is too small for 1f1b: give 1 or more"),
        (("1f1b", 4, 0), "microbatches 0 is too small"),
        (("1f1b", 4, 8, Options(virtual_stages=2)), "virtual stages 2 do not fit 1f1b"),
        (("zb-v", 4, 8, Options(virtual_stages=3)), "whose ranks hold 2: leave"),
        (("interleaved", 4, 8, Options(virtual_stages=-1)), "virtual stages -1 are too few"),
        (("1f1b-interlaced", 4, 8, Options(slices=2)), "token slices 2 do not fit .* 1f1b"),
        (("zb-auto", 4, 8, Options(slices=2)), "token slices 2 do not fit zb-auto, .* seq1f1b"),
        (("seq1f1b", 4, 8, Options(slices=0)), "token slices 0 are too few"),
        (("interleaved", 4, 9), "cannot group 9 micro-batches .* multiple of 4, such as 8"),
        (("dualpipe", 3, 8), "even number of ranks.* not 3: .*-v, or the even number 4"),
        (("dualpipe", 4, 9), "8 or more, not 9: choose 10"),
        (("dualpipe-v", 4, 7), "8 or more micro-batches, not 7: choose 8"),
        (("1f1b", 4, 8, Options(memory_limit=-1)), "memory_limit -1 is no number .* give 0 for no"),
        (("auto", 4, 8, Options(memory_limit=float("nan"))), "memory_limit nan is no number"),
    ],
)
def test_wrong_choices(arguments, sentence):
    with pytest.raises(ScheduleError, match=sentence):
        build(*arguments)


def test_strings():
    texts = "F2.3 B0.1 W1.0 BW2.3/1 S.3 T.0 IF.3 IB.12 R0 G1 F0.4&BW7.1"
    assert " ".join(map(str, map(parse, texts.split()))) == texts


def test_what_strings_mean():
    assert parse("BW2.3/1") == Action("BW", 2, 3, 1)
    assert parse("S.3") == Action("S", 0, 3)
    assert parse("F0.4&BW7.1") == Pair(Action("F", 0, 4), Action("BW", 7, 1))
    assert parts(parse("F0.4&BW7.1")) == (Action("F", 0, 4), Action("BW", 7, 1))
    assert parts(parse("W0.4")) == (Action("W", 0, 4),)


@pytest.mark.parametrize("text", ["", "F", "F2", "F.3", "S1.3", "F2.3/", "F2.3&", "f2.3", "F2.3 "])
def test_wrong_strings(text):
    with pytest.raises(ScheduleError, match="is no action: write it like F2.3"):
        parse(text)


def test_unknown_kinds():
    with pytest.raises(ScheduleError, match="kind is one of F, B, W, BW.*, not 'X'"):
        Action("X", 0, 1)
    with pytest.raises(ScheduleError, match="not 'X'"):
        parse("X0.1")


def test_last_backwards():
    texts = "F0.0 BW0.0 F0.1 F1.0 B1.0 W1.0 B0.1 W0.1 R0"
    assert last_backwards(list(map(parse, texts.split()))) == {5, 7}
