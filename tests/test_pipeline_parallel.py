"""Every schedule trains as one device does, holds and sends what it says, and refuses the rest."""

import re
from collections import Counter
from functools import cache

import pipeline_programs as programs
import pytest
import torch
from pipeline_programs import FLAVOURS, SIZES, Case, D, T, deviation

from picotron_lab.checks import check_run
from picotron_lab.comm import Alone, Axis
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.pipeline_parallel import Executor, NoReplicas
from picotron_lab.processes import run_processes
from picotron_lab.schedules import registry
from picotron_lab.schedules.actions import Pair
from picotron_lab.schedules.simulate import peaks

FOLDED = ("zb-v", "v-half", "v-min", "v-1f1b", "dualpipe-v", "v-half-vocab1", "v-half-vocab2")
SHAPES = {  # where the stages are; all others: stage r on rank r
    "interleaved": "looped", "interleaved-zb": "looped", "dualpipe": "mirrored",
    **dict.fromkeys(FOLDED, "folded"),
}  # fmt: skip
VOCABULARY = {  # algorithm
    "1f1b-vocab1": "1", "1f1b-vocab2": "2", "1f1b-interlaced": "naive", "v-half-vocab1": "1",
    "v-half-vocab2": "2",
}  # fmt: skip
# p -> m: fewer than ranks, a multiple and no multiple of them
QUICK, SLOW = {2: 3, 3: 2, 4: 2}, {2: 1, 3: 4, 4: 5, 8: 2}
MORE = {  # the two that need 2p
    "dualpipe": ({2: 4, 4: 8}, {2: 6, 4: 8, 8: 16}),
    "dualpipe-v": ({2: 5, 3: 6}, {2: 4, 3: 7, 4: 9, 8: 16}),
}
STAGES = {2: 3, 3: 2, 4: 2, 8: 2}  # p -> per rank, where they can be chosen
QUICK_FLAVOURS = {2: "recompute, experts", 3: "tied, dropout", 4: "dense"}
SLOW_FLAVOURS = {2: "tied, experts", 3: "recompute, dropout", 4: "dense", 8: "dense"}


def level(name, slow, p, k):
    """Of every schedule one case always, of 2 ranks or of 4, but those of test_token_schedules.py;
    of 4 every other of the larger ones slow; all others after a change."""
    if p == 4 and slow and k % 2:
        return [pytest.mark.slow]
    always = not slow and p == (2, 4)[k // 2 % 2] and name not in ("seq1f1b", "terapipe")
    return [] if always else [pytest.mark.exhaustive]


def matrix():
    """Quick and slow together: every schedule x p with both impls, and with every flavour."""
    for k, name in enumerate(registry.NAMES[:-1]):
        for slow, sizes in enumerate(MORE.get(name, (QUICK, SLOW))):
            for p, m in sizes.items():
                impl = ("plain", "fused")[(k + p + slow) % 2]
                flavour = (QUICK_FLAVOURS, SLOW_FLAVOURS)[slow][p]
                v = STAGES[p] if SHAPES.get(name) == "looped" else 0
                case = Case(name, p, m, impl, flavour, v)
                yield pytest.param(case, id=str(case), marks=level(name, slow, p, k))
    yield pytest.param(Case("auto", 3, 4, v=2), id="auto", marks=pytest.mark.slow)


@cache
def reference(model_cfg, flavour, m):
    """One device."""
    return programs.alone(model_cfg, FLAVOURS[flavour][1].get("dropout", 0.0), m)


def one_device(case, schedule):
    return reference(case.model(schedule.stages), case.flavour, case.m)


@pytest.mark.parametrize("case", list(matrix()))
def test_trains_as_one_device_and_keeps_the_contract(case):
    """Loss, norm, every gradient of every step, weights; then what was held and sent."""
    schedule = case.schedule()
    seed = None if case.p == 3 else len(str(case))  # of who runs next
    found = run_ranks(programs.train, case.p, case, seed=seed)
    assert deviation(found, one_device(case, schedule)) < 1e-10
    for rank, (mine, most) in enumerate(zip(found, peaks(schedule), strict=True)):
        pairs = any(isinstance(item, Pair) for item in schedule.lists[rank])
        assert 0 < mine.peak <= most
        assert mine.peak == most or pairs, rank  # a pair's two actions count as one moment
        if case.name != "auto":
            assert sent(mine.calls) == expected(case, rank), rank


# ---- what is sent


def sent(calls):
    """{(operation, axis): (calls, bytes)}; receives are counted where they are sent."""
    counts, sizes = Counter(), Counter()
    for call in calls:
        if call.op not in ("recv", "barrier"):
            counts[call.op, call.axis] += 1
            sizes[call.op, call.axis] += call.bytes
    return {key: (counts[key], sizes[key]) for key in counts}


def expected(case, rank):
    """By hand, of a micro-batch of T tokens in float64."""
    x, found = T * D * 8, {}
    for axis, count in zip(("pp.F", "pp.B"), messages(case, rank), strict=True):
        if count:
            found["send", axis] = (count, count * x)
    if case.name not in VOCABULARY:
        return found
    p, m, algorithm = case.p, case.m, VOCABULARY[case.name]
    last = 0 if SHAPES.get(case.name) == "folded" else p - 1
    if rank == last:  # its output to all, C0
        found["exchange", "pp.all.F"] = (m, m * (p - 1) * x)
    if rank == 0:  # the first stage's gradient to all
        found["exchange", "pp.all.B"] = (m, m * (p - 1) * x)
    if algorithm == "naive":  # IF; largest, sums of exponentials and label's logit, dX
        found["all_reduce", "pp"] = (4 * m, m * (2 * x + 8 * T + 16 * T))
    else:  # IF, dX; three numbers per token and rank
        found["all_reduce", "pp"] = (2 * m, m * 2 * x)
        found["all_gather", "pp"] = (m, m * 3 * 8 * T * p)
    if algorithm == "2":  # dX has a channel of its own
        found["all_reduce", "pp"] = found["all_reduce", "pp.all.dx"] = (m, m * x)
    return found


def messages(case, rank):
    """Activations and gradients that a rank sends: a stage's F but the last one's, its B but the
    first one's, each micro-batch; unless the next stage is here."""
    p, m, shape = case.p, case.m, SHAPES.get(case.name)
    first, last = rank == 0, rank == p - 1
    if shape == "looped":
        return (case.v - last) * m, (case.v - first) * m
    if shape == "folded":  # stages p-1 and p are on the last rank, 2p-1 on the first
        return (2 - first - last) * m, (2 - first - last) * m
    if shape == "mirrored":  # half of the micro-batches each way
        return ((2 - first - last) * m // 2,) * 2
    return (1 - last) * m, (1 - first) * m


@pytest.mark.parametrize(
    ("case", "total"),
    [
        (Case("afab", 4, 8), 48),  # published: specifications of the schedules, p = 4, m = 8
        (Case("1f1b", 4, 8), 48),
        (Case("interleaved", 4, 8, v=2), 112),
        (Case("interleaved", 4, 8, v=4), 240),
        (Case("zb-v", 4, 8), 96),
        (Case("v-min", 4, 8), 96),
        (Case("dualpipe", 4, 8), 48),
        (Case("dualpipe-v", 4, 8), 96),
    ],
    ids=str,
)
def test_messages_by_hand(case, total):
    """The count above gives the numbers of the literature."""
    assert sum(sum(messages(case, rank)) for rank in range(4)) == total


# ---- who runs next


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("interleaved-zb", 3, 2, "fused", v=2), marks=pytest.mark.exhaustive),
        Case("dualpipe", 2, 4, "plain", "tied, dropout"),
        Case("1f1b-vocab2", 3, 2, "fused", "tied, dropout"),
    ],
    ids=str,
)
def test_who_runs_next_changes_no_bit(case):
    runs = [run_ranks(programs.train, case.p, case, 1, seed=seed) for seed in (None, 0, 1)]
    for found in runs[1:]:
        for mine, first in zip(found, runs[0], strict=True):
            assert mine.numbers == first.numbers
            pairs = zip(mine.tensors, first.tensors, strict=True)
            assert all(torch.equal(a[2], b[2]) for a, b in pairs)


# ---- stages of other sizes


@pytest.mark.parametrize(
    "case",
    [
        Case("1f1b", 3, 2, "fused", "tied, experts", layers="2,1,0"),
        pytest.param(
            Case("zb-h1", 3, 4, "plain", "experts", layers="0,1,3"), marks=pytest.mark.exhaustive
        ),
        Case("dualpipe-v", 2, 4, "plain", "tied, dropout", layers="1,2,1,0"),
        Case("v-half-vocab1", 2, 3, "fused", "experts", layers="1,2,1,2"),
    ],
    ids=str,
)
def test_layers_that_are_shared_out_unevenly(case):
    found = run_ranks(programs.train, case.p, case, seed=1)
    assert deviation(found, one_device(case, case.schedule())) < 1e-10


def test_one_stage_whose_tied_matrix_owes_two_gradients():
    """The embedding gives one in B, the head's matmul another in W; of three micro-batches."""
    cfg = Case("zb-h1", 1, 3, flavour="tied, dropout").model(1)
    model, right = programs.whole(cfg, 0.3), programs.whole(cfg, 0.3)
    schedule, axis = registry.build("zb-h1", 1, 3), Axis("one", [0], 0, Alone(), Ledger())
    tokens_BT, labels_BT = programs.batches(0, 3)
    rows = torch.arange(3).split(1)
    given = [(tokens_BT[i], labels_BT[i], programs.where(0, i)) for i in rows]
    loss_sum = Executor({0: model}, schedule, axis, {0: NoReplicas()}).run(given, 5)
    expected = right(tokens_BT, labels_BT, programs.where(0, torch.arange(3)))
    (expected / 5).backward()
    torch.testing.assert_close(loss_sum, expected.detach(), atol=1e-12, rtol=1e-12)
    for mine, theirs in zip(model.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-12)


# ---- without backward


def predict(axis, case):
    """Logits, before and between steps."""
    rank = programs.prepare(axis, case)
    tokens_BT, labels_BT = programs.batches(0, case.m)
    batch = tokens_BT, None, programs.where(0, torch.arange(case.m))
    before = rank.executor.forward(batch)
    rank.executor.run(rank.microbatches(0), 1)
    loss = rank.executor.forward((tokens_BT, labels_BT, batch[2]))
    return before, rank.executor.forward(batch), loss


@pytest.mark.parametrize(
    ("name", "impl"),
    [("interleaved", "fused"), ("zb-v", "plain"), ("dualpipe", "fused"), ("1f1b-vocab2", "plain")],
)
def test_forward_is_that_of_one_device(name, impl):
    """On one rank; the others get nothing. A step in between does not disturb it."""
    case = Case(name, 2, 4, impl)
    model = programs.whole(case.model(case.schedule().stages))
    tokens_BT, labels_BT = programs.batches(0, case.m)
    right = model(tokens_BT).detach(), model(tokens_BT, labels_BT).detach()
    found = [results for results in run_ranks(predict, 2, case) if results[0] is not None]
    assert len(found) == 1
    for logits_BTV in found[0][:2]:
        torch.testing.assert_close(logits_BTV, right[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found[0][2], right[1], atol=1e-12, rtol=1e-12)


# ---- real processes

GLOO = {
    2: [
        Case("afab", 2, 3, "plain", "recompute, experts"),
        Case("eager-1f1b", 2, 3, "fused", "tied, dropout"),
        Case("interleaved", 2, 4, "fused", "experts", v=3),
        Case("dualpipe", 2, 4, "fused", "tied, experts"),
        Case("1f1b-interlaced", 2, 3, "plain", "tied, dropout"),
    ],
    3: [
        Case("zb-h2", 3, 4, "fused", "recompute, tied"),
        Case("interleaved-zb", 3, 2, "plain", v=2),
        Case("dualpipe-v", 3, 6, "fused", "tied, dropout"),
        Case("1f1b-vocab1", 3, 2, "fused", "experts"),
        Case("v-half-vocab2", 3, 2, "plain", "tied, dropout"),
    ],
}


def in_processes(p, cases):
    results = run_processes(programs.train_all, p, cases)
    for case, found in zip(cases, zip(*results, strict=True), strict=True):
        assert deviation(found, one_device(case, case.schedule())) < 1e-10, case


def test_processes():
    in_processes(2, [Case("1f1b", 2, 3, "fused", "tied, dropout"), Case("zb-v", 2, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("p", GLOO)
def test_more_schedules_in_processes(p):
    in_processes(p, GLOO[p])


# ---- what is refused


def check(mesh, layers=16, microbatches=8):
    model = ModelConfig(**{**SIZES, "layers": layers})
    dp = mesh.get("dp", 1)
    cfg = TrainConfig(global_batch_size=dp * microbatches, micro_batch_size=1, sequence_length=T)
    check_run(model, MeshConfig(**mesh), cfg)


def refusal(*args):
    """The one sentence."""
    with pytest.raises(ConfigError) as caught:
        check(*args)
    sentence = str(caught.value)
    assert sentence.endswith(".") and not re.search(r"[.!?] [A-Z]|\n", sentence), sentence
    return sentence


@pytest.mark.parametrize(
    ("name", "p", "m", "advice", "works"),
    [
        ("interleaved", 4, 9, "choose a multiple of 4, such as 8.", (4, 8)),
        ("interleaved-zb", 2, 7, "choose a multiple of 2, such as 6.", (2, 6)),
        ("dualpipe", 3, 8, "choose dualpipe-v, or the even number 4.", (4, 8)),
        ("dualpipe", 4, 9, "choose 10.", (4, 10)),
        ("dualpipe", 2, 2, "choose 4.", (2, 4)),
        ("dualpipe-v", 3, 5, "choose 6.", (3, 6)),
    ],
)
def test_numbers_that_a_schedule_refuses(name, p, m, advice, works):
    said = refusal({"pp": p, "schedule": name}, 16, m)
    assert said.startswith(f"--schedule {name} with --pp {p} and {m} micro-batches")
    assert said.endswith(advice)
    check({"pp": works[0], "schedule": name}, 16, works[1])


@pytest.mark.parametrize("name", registry.NAMES)
def test_stages_per_rank(name):
    """A choice for the schedules that have one; for all others a sentence."""
    mesh = {"pp": 2, "schedule": name, "virtual_stages": 3}
    if name in ("interleaved", "interleaved-zb", "auto"):
        return check(mesh)
    said = refusal(mesh)
    assert said.startswith(f"--schedule {name} ") and "virtual stages 3 do not fit" in said
    check({**mesh, "virtual_stages": 0})
    check({**mesh, "schedule": "interleaved"})


@pytest.mark.parametrize(
    ("mesh", "layers", "said", "works"),
    [
        ({"schedule": "zb-v"}, 16, "--schedule zb-v is about pipeline stages", {"pp": 2}),
        ({"virtual_stages": 2}, 16, "--virtual-stages 2 is about pipeline stages",
         {"pp": 2, "schedule": "interleaved"}),
        ({"pp_layers": "8,8"}, 16, "--pp-layers 8,8 is about pipeline stages", {"pp": 2}),
        ({"pp": 2, "schedule": "2f2b"}, 16, "schedule '2f2b' is unknown: choose one of afab, ",
         {"schedule": "afab"}),
        ({"pp": 2, "pp_layers": "8,7"}, 16, "must add up to --layers 16, not to 15; try", {}),
        ({"pp": 2, "pp_layers": "8,4,4"}, 16, "one number for each pipeline stage, 2 in all", {}),
        ({"pp": 2, "pp_layers": "8;8"}, 16, "--pp-layers 8;8 must be whole numbers", {}),
        ({"pp": 3, "pp_layers": "8,0,8"}, 16, "leaves a stage between the first and the last", {}),
        ({"pp": 2, "pp_layers": "0,16", "schedule": "1f1b-vocab1"}, 16, "leaves a stage empty", {}),
        ({"pp": 2, "dp": 2, "zero": 3}, 16, "--zero 3 gathers weights", {"zero": 2}),
        ({"pp": 2, "tp": 2, "schedule": "1f1b-vocab2"}, 16,
         "--schedule 1f1b-vocab2 splits the vocabulary over the pipeline ranks, and --tp 2 over",
         {"schedule": "1f1b"}),
        ({"pp": 2, "tp": 2, "schedule": "v-half-vocab1"}, 16, "and --tp 2 over its own",
         {"tp": 1}),
        ({"pp": 8, "schedule": "zb-v"}, 15, "--layers 15 are too few for the 16 stages", {}),
        ({"pp": 3}, 2, "--layers 2 are too few for the 3 stages of --schedule 1f1b", {}),
    ],
)  # fmt: skip
def test_choices_that_do_not_fit(mesh, layers, said, works):
    sentence = refusal(mesh, layers)
    assert said in sentence
    advised = re.search(r"try --(pp-)?layers ([\d,]+)\.", sentence)
    if advised and advised[1]:
        works = {"pp_layers": advised[2]}
    elif advised:
        layers = int(advised[2])
    check({**mesh, **works}, layers)
