"""Cases: what `run.py verify` compares with one device: every technique, and products of them.

Sizes   small, and odd where they may be: nothing should divide by luck
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from picotron_lab.config import MeshConfig, ModelConfig
from picotron_lab.schedules.actions import ScheduleError
from picotron_lab.schedules.registry import NAMES, build


@dataclass(frozen=True)
class Case:
    """One mesh, one model, and which training options differ from those of verify.py."""

    technique: str
    mesh: MeshConfig
    model: ModelConfig
    changes: dict[str, Any]


DENSE = ModelConfig(vocab_size=320, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=72)
EXPERTS = dataclasses.replace(DENSE, experts=3, top_k=2)
TIED = dataclasses.replace(DENSE, tied=True)
BALANCED = dataclasses.replace(
    EXPERTS, experts=8, router="sigmoid", shared_experts=1, expert_groups=4, top_groups=2,
    balance_loss=0.1, balance_speed=0.01, z_loss=0.01,
)  # fmt: skip
DROPPING = dataclasses.replace(EXPERTS, capacity_factor=0.8)


def cases() -> list[Case]:
    """The rows that are always shown: every technique, plain and fused, and a few products."""
    one_axis = [*_one_device(), *_data_parallel(), *_zero(), *_tensor_parallel()]
    return [*one_axis, *_context_parallel(), *_expert_parallel(), *_pipeline(), *_products()]


def _one_device() -> list[Case]:
    one, two, fused = {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"impl": "fused"}
    mesh, four = MeshConfig(), {"micro_batch_size": 3}
    return [
        Case("gradient accumulation, 4 micro-batches", mesh, DENSE, four),
        Case("gradient accumulation, 12 micro-batches", mesh, DENSE, one),
        Case("dropout 0.3, 4 micro-batches", mesh, DENSE, {**four, "dropout": 0.3}),
        Case("fused model", mesh, DENSE, fused),
        Case("fused model", mesh, DENSE, {**fused, "dtype": "float32"}),
        Case("fused model, experts", mesh, EXPERTS, {**fused, **two}),
        Case("fused model, tied embedding", mesh, TIED, {**fused, **two}),
        Case("bfloat16, float32 gradients and masters", mesh, DENSE, {"dtype": "bfloat16"}),
        Case("recompute selective", mesh, DENSE, {**four, "recompute": "selective"}),
        Case("recompute full", mesh, DENSE, {**four, "recompute": "full", "dropout": 0.3}),
        Case("recompute full, fused, experts", mesh, EXPERTS, {**fused, "recompute": "full"}),
    ]


def _data_parallel() -> list[Case]:
    one, two, fused = {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"impl": "fused"}
    bf16, adamw = {"dtype": "bfloat16"}, {"optimizer": "adamw", "lr": 0.01}
    lesson = [
        Case(f"dp, {step}", MeshConfig(dp=n), DENSE, {**one, "bucket_mib": 0.02, "dp_step": step})
        for step in ("naive", "overlapped", "bucketed", "silent")
        for n in (2, 3, 4)
    ]
    dp2, dp3, dp4 = (MeshConfig(dp=n) for n in (2, 3, 4))
    return [
        *lesson,
        Case("dp, fused, dropout 0.3", dp3, DENSE, {**two, **fused, "dropout": 0.3}),
        Case("dp, fused", dp4, DENSE, {**one, **fused, "dtype": "float32"}),
        Case("dp, fused, AdamW", dp3, DENSE, {**two, **fused, **adamw}),
        Case("dp, fused, experts", dp4, EXPERTS, {**one, **fused}),
        Case("dp, fused, tied embedding", dp4, TIED, {**one, **fused}),
        Case("dp, bfloat16", dp2, DENSE, {**two, **fused, **bf16}),
        Case("dp, bfloat16, gradients sent in bfloat16", dp2, DENSE,
             {**two, **fused, **bf16, "reduce_dtype": "bfloat16"}),
    ]  # fmt: skip


def _zero() -> list[Case]:
    two, adamw = {"micro_batch_size": 2}, {"optimizer": "adamw", "lr": 0.01}
    stages = [
        Case(f"ZeRO-{stage}, {impl}", MeshConfig(dp=n, zero=stage), DENSE, {**two, "impl": impl})
        for stage in (1, 2, 3)
        for impl, n in (("plain", 2), ("fused", 3))
    ]
    more = [
        Case(f"ZeRO-{stage}, fused, {what}", MeshConfig(dp=2, zero=stage), model,
             {**two, "impl": "fused", **changes})
        for stage in (1, 2, 3)
        for what, model, changes in (("AdamW, tied", TIED, adamw), ("experts", EXPERTS, {}),
                                     ("bfloat16", DENSE, {"dtype": "bfloat16"}))
    ]  # fmt: skip
    return [*stages, *more]


def _tensor_parallel() -> list[Case]:
    mesh = MeshConfig(tp=2)
    return [
        Case(
            f"tp{n}{', sp' if sp else ''}, vocabulary {vocab}, {impl}",
            MeshConfig(tp=n, sequence_parallel=sp, vocab_parallel=vocab),
            DENSE,
            {"impl": impl},
        )
        for impl in ("plain", "fused")
        for n, sp, vocab in ((2, False, "none"), (4, False, "naive"), (2, False, "1"),
                             (4, True, "2"), (2, True, "naive"), (4, True, "none"))
    ] + [
        Case("tp, fused, tied embedding", mesh, TIED, {"impl": "fused"}),
        Case("tp, fused, experts", mesh, EXPERTS, {"impl": "fused"}),
        Case("tp, fused", mesh, DENSE, {"impl": "fused", "dtype": "float32"}),
        Case("tp, sp, fused, bfloat16", MeshConfig(tp=4, sequence_parallel=True), DENSE,
             {"impl": "fused", "dtype": "bfloat16"}),
    ]  # fmt: skip


def _context_parallel() -> list[Case]:
    kinds = ("ring", "zigzag", "all-gather", "ulysses")
    alone = [
        Case(f"cp{n}, {kind}, {impl}", MeshConfig(cp=n, cp_kind=kind), DENSE,
             {"micro_batch_size": 4, "impl": impl})
        for kind in kinds
        for impl, n in (("plain", 2), ("fused", 4))
    ]  # fmt: skip
    long = {"sequence_length": 24, "micro_batch_size": 2, "impl": "fused"}
    bf16 = {"dtype": "bfloat16", "impl": "fused"}
    return [
        *alone,
        Case("cp3, ring, fused", MeshConfig(cp=3, cp_kind="ring"), DENSE, {**long, "dropout": 0.3}),
        Case("cp3, zigzag, fused, experts", MeshConfig(cp=3), BALANCED, long),
        Case("cp8, zigzag, fused", MeshConfig(cp=8), DENSE, {"impl": "fused", "dtype": "float32"}),
        Case("cp2, ring, plain, bfloat16", MeshConfig(cp=2), DENSE, {"dtype": "bfloat16"}),
        Case("cp4, zigzag, fused, bfloat16", MeshConfig(cp=4), DENSE, bf16),
    ]


def _expert_parallel() -> list[Case]:
    one, two = {"micro_batch_size": 1}, {"micro_batch_size": 2}
    fused = {"impl": "fused"}
    return [
        Case("router: sigmoid, groups, shared, balance", MeshConfig(), BALANCED, two),
        Case("ep2 of dp2, plain", MeshConfig(dp=2, ep=2), EXPERTS, two),
        Case("ep3 of dp3, fused", MeshConfig(dp=3, ep=3), EXPERTS, {**two, **fused}),
        Case("ep4 of dp4, plain, balance", MeshConfig(dp=4, ep=4), BALANCED, one),
        Case("ep2 of dp4, fused, balance", MeshConfig(dp=4, ep=2), BALANCED, {**one, **fused}),
        Case("ep2 of dp2, plain, dropping", MeshConfig(dp=2, ep=2), DROPPING, two),
        Case("ep2 of dp2, fused, dropping", MeshConfig(dp=2, ep=2), DROPPING, {**two, **fused}),
        Case("ep2 of dp2, fused, balance", MeshConfig(dp=2, ep=2), BALANCED,
             {**two, **fused, "dtype": "float32"}),
    ]  # fmt: skip


def _pipeline() -> list[Case]:
    one, two, fused = {"micro_batch_size": 1}, {"micro_batch_size": 2}, {"impl": "fused"}
    four, eight = (dataclasses.replace(DENSE, layers=layers) for layers in (4, 8))
    straight = ("afab", "1f1b", "eager-1f1b", "zb-h1", "zb-h2", "zb-auto", "1f1b-vocab1",
                "1f1b-vocab2", "1f1b-interlaced")  # fmt: skip
    double = ("interleaved", "interleaved-zb", "zb-v", "v-half", "v-min", "v-1f1b", "dualpipe",
              "dualpipe-v", "v-half-vocab1", "v-half-vocab2")  # fmt: skip
    schedules = [
        Case(f"pp2, {name}, {impl}", MeshConfig(pp=2, schedule=name), four, {**one, "impl": impl})
        for names, impls in ((straight, ("plain", "fused")), (double, ("fused", "plain")))
        for name, impl in zip(names, impls * 5, strict=False)
    ]
    tied, sliced = dataclasses.replace(TIED, layers=4), [
        Case(f"pp2, {name}, token slices {slices}, {impl}",
             MeshConfig(pp=2, schedule=name, token_slices=slices), four, {**one, "impl": impl})
        for name, slices, impl in (("1f1b", "7,5,4", "plain"), ("terapipe", "3", "fused"),
                                   ("seq1f1b", "4", "plain"), ("zb-v", "9,7", "fused"))
    ]
    clipped = {**one, "post_validation": True, "clip": 1.6}  # the first stage alone is below it
    return [
        *schedules, *sliced,
        Case("pp4, 1f1b, fused", MeshConfig(pp=4), eight, {**one, **fused, "dropout": 0.3}),
        Case("pp4, zb-v, plain", MeshConfig(pp=4, schedule="zb-v"), eight, one),
        Case("pp4, 1f1b, balanced, fused", MeshConfig(pp=4, pp_layers="balanced"), eight,
             {**two, **fused}),
        Case("pp2, zb-h1, fused", MeshConfig(pp=2, schedule="zb-h1"), DENSE,
             {**one, **fused, "dtype": "float32"}),
        Case("pp2, 1f1b, plain, tied", MeshConfig(pp=2), TIED, two),
        Case("pp2, zb-v, fused, tied", MeshConfig(pp=2, schedule="zb-v"), tied, {**one, **fused}),
        Case("pp2, dualpipe, fused, experts", MeshConfig(pp=2, schedule="dualpipe"),
             dataclasses.replace(BALANCED, layers=2), {**one, **fused}),
        Case("pp2, zb-h2, post-validation", MeshConfig(pp=2, schedule="zb-h2"), TIED, clipped),
        Case("pp2, zb-h1, fused, bfloat16", MeshConfig(pp=2, schedule="zb-h1"), DENSE,
             {**one, **fused, "dtype": "bfloat16"}),
    ]  # fmt: skip


def _products() -> list[Case]:
    both = {"micro_batch_size": 2, "impl": "fused", "dropout": 0.3}
    meshes = [MeshConfig(dp=2, tp=2, zero=stage, sequence_parallel=stage > 1) for stage in range(4)]
    return [
        Case(f"{describe(mesh, kind)}, dropout 0.3", mesh, DENSE, {**both, "recompute": kind})
        for mesh, kind in zip(meshes, ("none", "selective", "none", "full"), strict=True)
    ] + [
        Case(f"{describe(mesh, 'none')}, a rank without columns of the MLP", mesh,
             dataclasses.replace(DENSE, ffn_size=9), {"micro_batch_size": 2, "impl": "fused"})
        for mesh in (MeshConfig(dp=2, tp=4, zero=stage) for stage in (1, 2, 3))
    ]  # fmt: skip


SHAPES = (  # (pp, dp, cp, tp): at most 8 ranks
    (1, 3, 1, 1), (1, 4, 1, 1), (1, 1, 1, 2), (1, 2, 1, 2), (1, 3, 1, 2), (1, 4, 1, 2),
    (1, 2, 1, 3), (1, 2, 1, 4), (1, 1, 1, 8), (1, 1, 2, 1), (1, 1, 3, 1), (1, 1, 4, 1),
    (1, 1, 8, 1), (1, 2, 2, 1), (1, 3, 2, 1), (1, 2, 4, 1), (1, 1, 2, 2), (1, 2, 2, 2),
    (1, 1, 4, 2), (1, 1, 2, 4), (1, 2, 3, 1), (1, 1, 3, 2),
)  # fmt: skip
PIPELINES = (
    (2, 1, 1, 1), (3, 1, 1, 1), (4, 1, 1, 1), (2, 2, 1, 1), (2, 3, 1, 1), (3, 2, 1, 1),
    (2, 1, 1, 2), (2, 1, 2, 1), (2, 2, 1, 2), (2, 2, 2, 1), (2, 1, 2, 2), (4, 2, 1, 1),
    (4, 1, 2, 1), (4, 1, 1, 2), (2, 4, 1, 1), (2, 1, 4, 1), (2, 1, 1, 4),
)  # fmt: skip
WHOLE = ("zb-auto", *(name for name in NAMES if "vocab" in name or "interlaced" in name))
SLICED = {"1f1b": "seq1f1b", "afab": "terapipe"}  # the same for whole sequences
SCHEDULES = tuple(sorted(set(NAMES) - {"auto", *SLICED.values()}))  # auto is slow


def sample(count: int, shapes: tuple = SHAPES, seed: int = 144) -> list[Case]:
    """Random products of everything, always the same ones: rows 1 to `count` of --all.

    With this seed the first dozen, which the tests run, hold every stage, kind and algorithm; and
    the first dozen of PIPELINES every axis.
    """
    dice, more = random.Random(seed), random.Random(seed + 1)
    return [_draw_slices(more, _draw(dice, dice.choice(shapes))) for _ in range(count)]


def _draw_slices(dice: random.Random, case: Case) -> Case:
    """The same, with sequences cut into slices, where that is possible."""
    mesh, model, slices = case.mesh, case.model, dice.choice(["1", "2", "3"])
    whole = mesh.cp > 1 or model.balance_loss or model.capacity_factor or mesh.schedule in WHOLE
    if mesh.pp == 1 or slices == "1" or whole:
        return case
    schedule = SLICED.get(mesh.schedule, mesh.schedule)
    mesh = dataclasses.replace(mesh, schedule=schedule, token_slices=slices)
    what = f"{case.technique.replace(case.mesh.schedule, schedule, 1)}, slices {slices}"
    return dataclasses.replace(case, technique=what, mesh=mesh)


def _draw(dice: random.Random, shape: tuple[int, int, int, int]) -> Case:
    """Sizes are odd where they may be: nothing should divide by luck."""
    pp, dp, cp, tp = shape
    model = _draw_model(dice, pp, cp, tp)
    sp = tp > 1 and dice.random() < 0.6
    splits = ["naive", "1", "2"] + ["none"] * (not model.tied)
    sizes = [n for n in range(1, model.experts + 1) if dp * cp % n == 0]
    mesh = MeshConfig(
        pp=pp, dp=dp, cp=cp, tp=tp,
        zero=dice.choice([0, 1, 2, 3][: 4 if pp == 1 else 3]) if dp * cp > 1 else 0,
        ep=dice.choice(sizes or [1]), sequence_parallel=sp,
        cp_kind=dice.choice(_kinds(model, cp, tp)) if cp > 1 else "",
        vocab_parallel=dice.choice(splits) if tp > 1 else "",
    )  # fmt: skip
    changes = {
        "impl": dice.choice(["plain", "fused"]), "dropout": dice.choice([0.0, 0.2]),
        "micro_batch_size": dice.choice([n for n in (2, 3, 4, 6, 12) if 12 % (n * dp) == 0]),
        "recompute": dice.choice(["none", "selective", "full"]), "bucket_mib": 0.02,
        "sequence_length": 24 if 3 in (tp, cp) else 16,
        "dtype": dice.choice(["float64", "float64", "float32"]),
    }  # fmt: skip
    if pp > 1:
        changes["micro_batch_size"] = 1
        fitting = [name for name in SCHEDULES if _fits(name, pp, 12 // dp, tp)]
        mesh = dataclasses.replace(mesh, schedule=dice.choice(fitting))
    what = [f"kv {model.kv_heads}", changes["impl"]]
    what += [f"{model.experts} experts"] * (model.experts > 0) + ["tied"] * model.tied
    what += ["dropout"] * (changes["dropout"] > 0)
    return Case(f"{describe(mesh, changes['recompute'])}, {', '.join(what)}", mesh, model, changes)


def _fits(name: str, pp: int, microbatches: int, tp: int) -> bool:
    """Whether the schedule exists for these sizes, and may be trained with tensor parallelism."""
    try:
        schedule = build(name, pp, microbatches)
    except ScheduleError:
        return False
    return tp == 1 or not schedule.vocabulary


def _draw_model(dice: random.Random, pp: int, cp: int, tp: int) -> ModelConfig:
    heads = {3: 6, 8: 8}.get(tp, 4)
    shared = [n for n in range(1, heads + 1) if heads % n == 0 and (n % tp == 0 or tp % n == 0)]
    model = ModelConfig(
        vocab_size=323, hidden_size=48, layers=2 * pp, heads=heads, kv_heads=dice.choice(shared),
        ffn_size=50, experts=dice.choice([0, 0, 3, 5]), tied=dice.random() < 0.3,
    )  # fmt: skip
    if not model.experts:
        return model
    return dataclasses.replace(
        model, router=dice.choice(["softmax", "sigmoid"]), shared_experts=dice.choice([0, 1]),
        balance_loss=dice.choice([0.0, 0.1]), balance_speed=0.01, z_loss=0.01,
        capacity_factor=dice.choice([0.0, 0.9]) if cp == 1 else 0.0,
    )  # fmt: skip


def _kinds(model: ModelConfig, cp: int, tp: int) -> list[str]:
    """Ways to cross the parts of a sequence that these heads allow."""
    heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
    heads_suffice = heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0)
    return ["ring", "zigzag", "all-gather"] + ["ulysses"] * heads_suffice


def describe(mesh: MeshConfig, recompute: str) -> str:
    """A mesh in a few words: 'dp2 zero3 tp2 sp vocab-2 recompute-full'."""
    words = [f"pp{mesh.pp} {mesh.schedule}"] * (mesh.pp > 1)
    words += [f"dp{mesh.dp}"] * (mesh.dp > 1) + [f"cp{mesh.cp} {mesh.cp_kind}"] * (mesh.cp > 1)
    words += [f"ep{mesh.ep}"] * (mesh.ep > 1) + [f"zero{mesh.zero}"] * (mesh.zero > 0)
    words += [f"tp{mesh.tp}"] * (mesh.tp > 1) + ["sp"] * mesh.sequence_parallel
    words += [f"vocab-{mesh.vocab_parallel}"] * bool(mesh.vocab_parallel)
    words += [f"recompute-{recompute}"] * (recompute != "none")
    return " ".join(words)
