"""What lesson 14 asks for, as tests: models, meshes and limits are drawn from the seed.

The planner is imported where it is asked, for the process that runs an exercise needs none of it.
"""

import itertools
from dataclasses import replace
from random import Random
from types import ModuleType
from typing import Any

from lessons.kit import Lesson, task
from lessons.kit.compare import short
from picotron_lab.comm import Axis
from picotron_lab.config import PRESETS, ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.ledger import CommError

LESSON = Lesson(
    title="Plan",
    builds="a planner: what fits, which meshes there are, which one is fastest, and why",
    allowed=("picotron_lab.config",),
)
ROOM = 0.9


# ---- programs


def state(axis: Axis, student: ModuleType, cases: list) -> dict[str, dict[str, int]]:
    """Bytes that stay, of every case."""
    return {_named(mesh): student.state_bytes(model, mesh) for model, mesh in cases}


def activations(axis: Axis, student: ModuleType, cases: list) -> dict[str, int]:
    """Bytes that are held, of every case."""
    return {_case(*case[1:]): student.activation_bytes(*case) for case in cases}


def enumerated(axis: Axis, student: ModuleType, *question: Any) -> list[tuple[int, int, int]]:
    """(pp, dp, tp) of every mesh, in order."""
    found = student.legal_meshes(*question)
    items = found if isinstance(found, list) else [None]
    wrong = [m for m in items if not isinstance(m, MeshConfig)]
    if wrong:
        raise CommError(f"legal_meshes returned {short(found)}: a list of MeshConfig is wanted")
    return sorted((m.pp, m.dp, m.tp) for m in found)


def chosen(
    axis: Axis, student: ModuleType, peaks: dict, times: dict, limit: float
) -> dict[str, Any]:
    """What the student chooses from tables, and for which meshes it asked the time."""
    asked = []

    def seconds(mesh: MeshConfig) -> dict[str, float]:
        asked.append(mesh)
        return dict(times[mesh])

    names = found = student.choose(list(peaks), peaks.__getitem__, seconds, limit)
    if found is not None:
        kinds = [type(item) for item in found] if isinstance(found, tuple | list) else []
        if kinds != [MeshConfig, MeshConfig, str]:
            words = "(fastest, second, part of the time) or None is wanted"
            raise CommError(f"choose returned {short(found)}: {words}")
        names = dict(best=_named(found[0]), second=_named(found[1])) | {"loses on": found[2]}
    return {"choice": names, "asked": len(asked), "twice": len(asked) - len(set(asked))}


# ---- cases


def _named(mesh: MeshConfig) -> str:
    words = f"pp {mesh.pp}, dp {mesh.dp}, tp {mesh.tp}"
    words += f", zero {mesh.zero}" if mesh.zero else ""
    return words + (", sequence parallel" if mesh.sequence_parallel else "")


def _case(mesh: MeshConfig, tokens: int, micro_batches: int, full: bool) -> str:
    return f"{_named(mesh)}, N {tokens}, {micro_batches} micro-batches{', full' * full}"


def _model(rng: Random) -> ModelConfig:
    """Sizes that 1, 2 or 4 times 2, 3 or 4 ranks share out evenly."""
    heads, width = 12, rng.choice([24, 48])
    return ModelConfig(
        "drawn", rng.choice([1200, 2400]), heads * width, rng.choice([12, 24]), heads,
        rng.choice([2, 4]), rng.choice([480, 720, 960]),
    )  # fmt: skip


def _meshes(rng: Random) -> list[MeshConfig]:
    """One of each stage of ZeRO, with and without a pipeline, with and without tp."""
    found = [MeshConfig(dp=rng.choice([2, 3, 4]), zero=3, tp=rng.choice([1, 2]))]
    found += [MeshConfig(pp=3, dp=2, tp=4), MeshConfig(pp=1, dp=1, tp=4, sequence_parallel=True)]
    for zero in (1, 2):
        pp, dp, tp = rng.choice([2, 3, 4]), rng.choice([2, 3, 4]), rng.choice([2, 4])
        found.append(MeshConfig(pp=pp, dp=dp, tp=tp, zero=zero, sequence_parallel=tp == 2))
    return found


def _training(mesh: MeshConfig, micro_batches: int = 8, tokens: int = 64) -> TrainConfig:
    return TrainConfig(
        global_batch_size=micro_batches * mesh.dp, micro_batch_size=1, sequence_length=tokens,
        dtype="bfloat16",
    )  # fmt: skip


# ---- tasks


@task("14.1", points=3, minutes=15, core=True, compare="picotron_lab.analysis.parameters:state")
def test_state(attempt: Any) -> None:
    """Bytes that stay on a rank."""
    from picotron_lab.analysis import memory

    model, found = _model(attempt.rng), {}
    meshes = _meshes(attempt.rng)
    for mesh in meshes:
        print_of = memory.predict(model, mesh, _training(mesh))
        names = ("parameters", "gradients", "masters", "moments")
        found[_named(mesh)] = {name: getattr(print_of, name) for name in names}
    got = attempt.run(state, 1, [(model, mesh) for mesh in meshes]).values[0]
    # of 18 bytes: 2 weights, 4 gradients, 4 masters, 8 moments
    suspects = {
        "the head is counted on the first stage: with a pipeline it lies on the last one": (
            _changed(found, model, meshes, _head_too)
        ),
        "norms are shared out over tp: every rank has them whole": (
            _changed(found, model, meshes, _norms_shared)
        ),
        "the last norm [D] is forgotten: without a pipeline it is on the only stage": (
            _changed(found, model, meshes, _no_last_norm)
        ),
        "k and v are as large as q: they have kv_heads heads": (
            _changed(found, model, meshes, _all_heads)
        ),
        "gradients are shared out from stage 1 on: that is stage 2": {
            _named(mesh): one | (
                {"gradients": one["gradients"] // mesh.dp} if mesh.zero == 1 else {}
            )
            for mesh, one in zip(meshes, found.values(), strict=True)
        },
    }  # fmt: skip
    attempt.same(f"with {_sizes(model)}, bytes", got, found, suspects=suspects)
    mesh, total = _named(meshes[0]), sum(got[_named(meshes[0])].values())
    attempt.equal(f"with {mesh}, bytes in all", total, sum(found[mesh].values()), "18 P / dp")


def _sizes(model: ModelConfig) -> str:
    return (
        f"V {model.vocab_size}, D {model.hidden_size}, L {model.layers}, H {model.heads}, "
        f"K {model.kv_heads}, F {model.ffn_size}"
    )


def _changed(found: dict, model: ModelConfig, meshes: list, extra: Any) -> dict:
    """The right bytes, with so many parameters more."""
    changed = {}
    for mesh, one in zip(meshes, found.values(), strict=True):
        more = extra(model, mesh)
        shares = [mesh.dp if mesh.zero >= least else 1 for least in (3, 2, 1, 1)]
        keys = zip(one, (2, 4, 4, 8), shares, strict=True)
        changed[_named(mesh)] = {key: one[key] + size * more // n for key, size, n in keys}
    return changed


def _head_too(model: ModelConfig, mesh: MeshConfig) -> int:
    D = model.hidden_size
    return (model.vocab_size // mesh.tp * D + D) * (mesh.pp > 1)


def _no_last_norm(model: ModelConfig, mesh: MeshConfig) -> int:
    return -model.hidden_size if mesh.pp == 1 else 0


def _norms_shared(model: ModelConfig, mesh: MeshConfig) -> int:
    norms = 2 * model.layers // mesh.pp + (mesh.pp == 1)
    whole = norms * model.hidden_size
    return whole // mesh.tp - whole


def _all_heads(model: ModelConfig, mesh: MeshConfig) -> int:
    more = model.heads // mesh.tp - max(1, model.kv_heads // mesh.tp)
    return model.layers // mesh.pp * 2 * more * model.head_width * model.hidden_size


@task("14.2", points=5, minutes=20, compare="picotron_lab.analysis.fused_activations:layer_bytes")
def test_activations(attempt: Any) -> None:
    """Bytes of activations that a rank holds."""
    rng, model, cases = attempt.rng, _model(attempt.rng), []
    tokens = 48 * rng.randint(1, 4)
    for mesh, full in itertools.product(_meshes(rng), (False, True)):
        cases.append((model, mesh, tokens, rng.choice([1, 2, 8]), full))
    run = attempt.run(activations, 1, cases)

    def held(flights: Any, spread: Any = lambda mesh: mesh, stages: int = 0) -> dict[str, int]:
        """Bytes if flights(rounds, pp) micro-batches are held, of a layer on the mesh spread(mesh).

        stages  among which layers are shared out; 0: pp
        """
        return {
            _case(*case[1:]): _of_layer(model, spread(case[1]), *case[2:])
            * (model.layers // (stages or case[1].pp))
            * flights(case[3], case[1].pp)
            for case in cases
        }

    suspects = {
        "all micro-batches of the step are held: 1F1B begins backward as soon as it can, and "
        "holds at most pp": held(lambda rounds, pp: rounds),
        "one micro-batch is held: the first stage has begun pp of them before the first comes "
        "back": held(lambda rounds, pp: 1),
        "pp micro-batches are held, even if a step has fewer": held(lambda rounds, pp: pp),
        "all layers are counted: a stage has L / pp": held(min, stages=1),
        "norms are shared out over tp, which only sequence parallelism does": (
            held(min, lambda mesh: replace(mesh, sequence_parallel=mesh.tp > 1))
        ),
        "norms are whole: sequence parallelism shares their tokens out": (
            held(min, lambda mesh: replace(mesh, sequence_parallel=False))
        ),
    }
    attempt.same(f"with {_sizes(model)}, bytes", run.values[0], held(min), suspects=suspects)


def _of_layer(
    model: ModelConfig, mesh: MeshConfig, tokens: int, micro_batches: int, full: bool
) -> int:
    """What the library says of one layer and micro-batch."""
    from picotron_lab.analysis import saved
    from picotron_lab.analysis.parameters import Place

    recompute = "full" if full else "none"
    cfg = replace(_training(mesh, micro_batches, tokens), recompute=recompute)
    return sum(saved.layer(saved.Rank(model, mesh, cfg, Place(), kernels=True)).values())


@task("14.3", points=3, minutes=10, core=True, compare="picotron_lab.analysis.planner_space:shapes")
def test_legal_meshes(attempt: Any) -> None:
    """Every mesh that would start, and no other."""
    rng = attempt.rng
    gpus = rng.choice([24, 36, 48])
    model = replace(_model(rng), layers=rng.choice([8, 10, 16]))
    node = rng.choice([4, 8])
    not_shared_by_all = {24: [36, 60], 36: [24, 60], 48: [24, 36, 60]}
    batch = rng.choice(not_shared_by_all[gpus])
    got = attempt.run(enumerated, 1, model, gpus, node, batch).values[0]
    reasons = {}
    for pp, dp, tp in itertools.product(_divisors(gpus), repeat=3):
        if pp * dp * tp == gpus:
            reasons[pp, dp, tp] = _refused(model, MeshConfig(pp=pp, dp=dp, tp=tp), node, batch)
    want = sorted(mesh for mesh, why in reasons.items() if not why)
    suspects = {}
    for mesh in {*got, *want}:
        if mesh not in want:
            why = reasons.get(mesh, f"that mesh does not have {gpus} ranks")
            suspects[f"(pp, dp, tp) = {mesh} is no legal mesh: {why}"] = got
        elif mesh not in got:
            suspects[f"(pp, dp, tp) = {mesh} is missing: run.py would start it"] = got
    suspects = dict(sorted(suspects.items())) if len(got) == len(set(got)) else {
        "a mesh is there twice": got
    }  # fmt: skip
    what = f"with {gpus} GPUs, nodes of {node}, batch {batch}, {_sizes(model)}, meshes"
    attempt.same(what, got, want, suspects=suspects)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _refused(model: ModelConfig, mesh: MeshConfig, node: int, batch: int) -> str:
    """Why run.py would not start it; empty: it would."""
    from picotron_lab.checks import check_run

    if mesh.tp > node:
        return f"tp {mesh.tp} leaves a node of {node}"
    cfg = TrainConfig(global_batch_size=batch, micro_batch_size=1, sequence_length=64)
    try:
        check_run(model, mesh, cfg)
    except ConfigError as error:
        return str(error)
    return ""


@task("14.4", points=4, minutes=15, compare="picotron_lab.analysis.planner:Search.best")
def test_choose(attempt: Any) -> None:
    """The fastest mesh that fits, defended."""
    peaks, times = _tables(attempt.rng)
    speed = sorted(times, key=lambda mesh: sum(times[mesh].values()))
    leanest = sorted(peaks.values())[2]
    # it fits into the GPU, but not into what a plan may fill of it
    limit = max(1.05 * peaks[speed[0]], 1.01 * leanest / ROOM)
    run = attempt.run(chosen, 1, peaks, times, limit)
    fitting = [mesh for mesh in speed if peaks[mesh] <= ROOM * limit]
    want = _choice(fitting, times)
    largest = max(times[fitting[1]], key=times[fitting[1]].get)
    suspects = {
        f"`{largest}` is the largest part of the second's time; asked is the part that exceeds the "
        "first's most": want | {"loses on": largest},
        "that is the one which needs least memory; asked is the fastest that fits": (
            _choice(sorted(fitting, key=peaks.get), times)
        ),
    }
    # words differ as structure does, so the wrong choice is found by itself
    got = run.values[0]
    cause = _too_large(got["choice"], peaks, limit)
    cause = next((s for s, value in suspects.items() if value == got["choice"] != want), cause)
    wrong = {cause: got["choice"]} if cause else {}
    attempt.same("choice", got["choice"], want, suspects=wrong)
    none = attempt.run(chosen, 1, peaks, times, 0.5 * min(peaks.values())).values[0]
    attempt.same("choice when nothing fits", none["choice"], None)
    attempt.equal(
        "meshes whose time was asked", got["asked"], len(fitting),
        "one question per mesh that fits",
        because="look at memory first, for time is expensive; and remember the answers",
    )  # fmt: skip


def _too_large(choice: dict[str, str] | None, peaks: dict, limit: float) -> str:
    """A sentence, if what was chosen does not fit."""
    for place in ("best", "second") if choice else ():
        peak = next((peaks[mesh] for mesh in peaks if _named(mesh) == choice[place]), 0)
        if peak > ROOM * limit:
            much = "more than a GPU has" if peak > limit else "more than 9/10 of a GPU"
            return f"the {place} one needs {much}: {peak / 1e9:.1f} of {limit / 1e9:.1f} GB"
    return ""


def _choice(order: list[MeshConfig], times: dict) -> dict[str, str]:
    """The first two, and what the second loses on."""
    first, second = order[:2]
    loss = {part: s - times[first].get(part, 0.0) for part, s in times[second].items()}
    worst = max(loss, key=loss.get)
    return {"best": _named(first), "second": _named(second), "loses on": worst}


def _tables(rng: Random) -> tuple[dict, dict]:
    """What the library's planner says of a model on H100s: bytes, and parts of a step's time."""
    from picotron_lab.analysis import memory, step_time
    from picotron_lab.analysis.hardware import hardware

    model, gpus = PRESETS[rng.choice(["llama3-8b", "llama3.2-1b"])], rng.choice([16, 32])
    cfg = TrainConfig(
        global_batch_size=64, micro_batch_size=1, sequence_length=rng.choice([4096, 8192]),
        dtype="bfloat16",
    )  # fmt: skip
    peaks, times = {}, {}
    for pp, tp in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        dp = gpus // (pp * tp)
        if dp:
            mesh = MeshConfig(pp=pp, dp=dp, tp=tp, zero=int(dp > 1), sequence_parallel=tp > 1)
            peaks[mesh] = memory.predict(model, mesh, cfg, kernels=True).peak
            parts = step_time.predict(model, mesh, cfg, hardware("h100")).parts
            times[mesh] = {part: float(seconds) for part, seconds in parts.items()}
    return peaks, times
