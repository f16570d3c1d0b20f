"""What a rank sends in a training step, told before it runs: calls and bytes by axis, exactly.

Idea    Every technique says what it sends for one layer and one micro-batch: its contract. A step
        adds them up: layers of a stage, micro-batches and slices that pass through it, what runs
        again in backward, and what happens once. No model is built and nothing is traced, so the
        ledger of a real run can be held against it.
Once    tokens counted, losses summed over replicas and stages (8 bytes each); the gradient norm
        over the world (8 bytes), or along the pipeline (post_validation.py); routing counts
Again   --recompute full: what the layers' forward sends is sent twice. Fused, the second run ends
        with the last tensor that backward needs: a mixture of experts then spares the sum over tp
        that comes last, unless dropout keeps its mask after it
Even    experts are taken one after the other, choice by choice, each as often as the others, as
        when balance is perfect; a capacity drops what is too much even so. Routers choose by
        values: with expert parallelism a real run sends other numbers of rows (the same calls);
        without it choices change nothing here
Not     evaluation, checkpoints, and --token-slices auto, whose first rank tells all others once
Dims    as in model.py; e bytes of an element, w of a sum, at least 4; N tokens of this rank
Read    predict -> layer -> tensor_parallel_regions, attention, experts -> embedding, head, loss ->
        messages, words -> once; gradients: traffic_gradients.py
Tests   tests/test_traffic.py: equal to the ledger of every rank
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from picotron_lab import expert_parallel, sequence_parallel, tensor_parallel, vocab_parallel
from picotron_lab.analysis import activations, context
from picotron_lab.analysis.in_flight import ALGORITHM
from picotron_lab.analysis.parameters import Place, experts_here, matrices, part
from picotron_lab.analysis.saved import INDEX, Rank
from picotron_lab.analysis.traffic_gradients import Held, Sent, parts, replica_axis, replicas
from picotron_lab.checks import check_run, layers_of, schedule_of, slices_of
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.pipeline_channels import routes
from picotron_lab.schedules import actions
from picotron_lab.schedules.actions import Schedule
from picotron_lab.schedules.simulate import INTERLACED

Traffic = dict[str, dict[str, tuple[int, int]]]
FIRST = Place()
NUMBER = 8  # bytes of a count, and of a loss or a norm that is summed


def predict(
    model: ModelConfig,
    mesh: MeshConfig,
    cfg: TrainConfig,
    place: Place = FIRST,
    on_gpu: bool = False,
) -> Traffic:
    """{axis: {operation: (calls, payload bytes)}} of one rank and step, payload as in ledger.py.

    place    where the rank is on each axis
    on_gpu   the fused loss works on larger chunks of tokens there, in fewer calls
    raises   ConfigError for configs that do not fit together, and for what only values and times
             can tell
    """
    check_run(model, mesh, cfg)
    _check_told(model, mesh)
    lengths = slices_of(mesh, cfg)
    schedule, counts = schedule_of(mesh, cfg, len(lengths)), layers_of(model, mesh, cfg)
    r = Rank(model, mesh, cfg, place, on_gpu)
    passes = Counter(
        (a.kind, a.stage, a.slice)
        for item in schedule.lists[place.pp]
        for a in actions.parts(item)
        if a.kind == "F"
    )
    here = sorted(schedule.placement[place.pp])
    rounds = [sum(n for (_, s, _), n in passes.items() if s == stage) for stage in here]
    mine = matrices(model, mesh, cfg, schedule, counts, place)
    held = Held(r, schedule, counts, mine, rounds)
    sent = [*replicas(held), *parts(held), *messages(r, schedule), *once(held)]
    for (_, s, k), times in passes.items():
        sliced = replace(r, cfg=replace(cfg, sequence_length=lengths[k]))
        sent += repeated(of_stage(sliced, schedule, counts[s], s), times)
    if schedule.vocabulary:
        sent += repeated(words(r, schedule), schedule.microbatches)
    return together(sent)


def _check_told(model: ModelConfig, mesh: MeshConfig) -> None:
    assert model.vocab_size > 0, (
        "what is sent cannot be told while vocab_size is 0: open the tokenizer first, then give "
        "its vocabulary size."
    )
    require(
        mesh.token_slices != "auto",
        "--token-slices auto is decided by times, so that messages cannot be told before; try "
        "--token-slices 4.",
    )


def repeated(sent: Iterable[Sent], times: int) -> list[Sent]:
    """All of it, so often."""
    return [Sent(axis, op, times * calls, times * size) for axis, op, calls, size in sent]


def together(sent: Iterable[Sent]) -> Traffic:
    """Added up by axis and operation."""
    found: Traffic = {}
    for axis, op, calls, size in sent:
        if calls:
            of_axis = found.setdefault(axis, {})
            before = of_axis.get(op, (0, 0))
            of_axis[op] = before[0] + calls, before[1] + size
    return found


def passed(contract: dict[str, tuple[int, int]], axis: str, forwards: int = 1) -> Iterator[Sent]:
    """A technique's contract, {"forward all_reduce": (calls, bytes), ...}, forward so often."""
    for name, (calls, size) in contract.items():
        direction, op = name.split()
        times = forwards if direction == "forward" else 1
        yield Sent(axis, op, times * calls, times * size)


# ---- layers, of one micro-batch or slice


def of_stage(r: Rank, schedule: Schedule, layers: int, stage: int) -> list[Sent]:
    """What a stage of so many layers sends inside, forward and backward."""
    found = repeated(layer(r), layers)
    if schedule.vocabulary:
        return found
    if stage == 0:
        found += embedding(r)
    if stage == schedule.stages - 1:
        found += head(r)
    return found


def layer(r: Rank) -> list[Sent]:
    """One layer, on all axes."""
    found = [*attention(r), *tensor_parallel_regions(r)]
    return [*found, *balance(r), *experts(r)] if r.model.experts else found


def forwards(r: Rank) -> int:
    """How often a layer runs forward: once more where backward recomputes it."""
    return 2 if r.cfg.recompute == "full" else 1


def stream(r: Rank) -> int:
    """S: bytes of [B, T, D], all tokens of a tensor-parallel region."""
    return r.at.element * r.at.tokens * r.model.hidden_size


def tensor_parallel_regions(r: Rank) -> Iterator[Sent]:
    """Two regions, attention and MLP: 1909.08053, section 3; 2205.05198, section 4.2."""
    n, S, mixture = r.mesh.tp, stream(r), int(r.model.experts > 0)
    if n == 1:
        return
    if r.mesh.sequence_parallel:
        contract, last = sequence_parallel.contract(2, S, n, r.cfg.impl, mixture), "reduce_scatter"
    else:
        contract, last = tensor_parallel.contract(2, S), "all_reduce"
    yield from passed(contract, "tp", forwards(r))
    if mixture and r.fused and r.cfg.recompute == "full" and not r.cfg.dropout:
        yield Sent("tp", last, -1, -S)  # nothing is kept after it: the second run ends before


def attention(r: Rank) -> Iterator[Sent]:
    """Keys and values of other parts of the sequence: the contract of context_parallel.py."""
    (H, K), at = activations.own_heads(r.model, r.mesh.tp), r.at
    core = context.Layer(
        r.mesh.context(r.cfg.impl), r.cfg.impl, r.mesh.cp, at.batch, at.length, H, K,
        r.model.head_width, at.element,
    )  # fmt: skip
    yield from passed(context.contract(core), "cp", forwards(r))


def balance(r: Rank) -> Iterator[Sent]:
    """How often each sequence chose each expert, where ranks have parts of it: router.py.

    Counted only while there is a graph, which the plain path's recomputed forward has not.
    """
    if r.mesh.cp > 1 and r.model.balance_loss > 0:
        times = forwards(r) if r.fused else 1
        yield Sent("cp", "all_reduce", times, times * INDEX * r.at.batch * r.model.experts)


def experts(r: Rank) -> Iterator[Sent]:
    """Rows to experts and back, if all are chosen alike: the contract of expert_parallel.py."""
    E, n, place = r.model.experts, r.mesh.ep, r.place
    if n == 1:
        return
    first = (place.dp * r.mesh.cp + place.cp) % n * E // n
    rows = routed(r)
    come = n * sum(rows[first : first + experts_here(r.model, r.mesh, place)])
    width = r.at.element * r.model.hidden_size
    yield from passed(expert_parallel.contract(sum(rows), come, width, n, E), "ep", forwards(r))


def routed(r: Rank) -> list[int]:
    """How many of this rank's choices each expert takes. They go to one expert after the other; of
    a sequence an expert takes no more than its capacity (router.keep)."""
    E, batch = r.model.experts, r.at.batch
    each = r.at.tokens // batch * r.model.top_k  # choices of a sequence
    limit = math.ceil(r.model.capacity_factor * each / E) or each
    firsts = [[(e - b * each) % E for b in range(batch)] for e in range(E)]
    return [sum(min(limit, len(range(first, each, E))) for first in of) for of in firsts]


# ---- around the layers


def embedding(r: Rank) -> Iterator[Sent]:
    """A table that is split over tp: rows of each rank's words, added up; with sequence parallelism
    their gradients are gathered: vocab_parallel.py, sequence_parallel.SplitEmbedding."""
    if r.mesh.tp == 1 or r.mesh.vocabulary(r.cfg.impl) == "none":
        return
    yield Sent("tp", "all_reduce", 1, stream(r))
    if r.mesh.sequence_parallel:
        yield Sent("tp", "all_gather", 1, stream(r))


def head(r: Rank) -> Iterator[Sent]:
    """Gathered logits (tensor_parallel.ParallelHead), or a split loss of all tokens
    (vocab_parallel.py), which sequence parallelism gathers first."""
    n, S = r.mesh.tp, stream(r)
    algorithm = r.mesh.vocabulary(r.cfg.impl)
    if n == 1:
        return
    if algorithm != "none":
        yield from (Sent("tp", "all_gather", 1, S),) * r.mesh.sequence_parallel
        yield from loss(r, algorithm, n, _chunks(r))
        return
    logits = r.at.element * r.at.tokens * n * part(r.model.vocab_size, n, 0)
    if r.mesh.sequence_parallel:
        contract = sequence_parallel.contract(0, S, n, r.cfg.impl, 0, logits)
    else:
        contract = tensor_parallel.contract(0, S, logits)
    yield from passed(contract, "tp")


def loss(r: Rank, algorithm: str, n: int, chunks: int = 1, dx_axis: str = "tp") -> Iterator[Sent]:
    """Statistics of N tokens and the gradient of x, in so many chunks of tokens: 2411.05288,
    sections 3 and 4. Naive: largest logits, then sums; else m, s, z of all ranks at once."""
    axis = "tp" if dx_axis == "tp" else "pp"
    number = r.at.wide * r.at.tokens
    if algorithm == "naive":
        yield Sent(axis, "all_reduce", 2 * chunks, 3 * number)
    else:
        yield Sent(axis, "all_gather", chunks, 3 * n * number)
    yield Sent(dx_axis, "all_reduce", chunks, stream(r))


def _chunks(r: Rank) -> int:
    """Into how many the fused loss over tp cuts the tokens: vocab_parallel.chunk_rows."""
    if not r.fused:
        return 1
    elements = vocab_parallel.CHUNK_ELEMENTS["cuda" if r.kernels else "cpu"]
    rows = max(elements * r.mesh.tp // r.model.vocab_size, r.model.hidden_size)
    return -(-r.at.tokens // rows)


# ---- pipelines


def messages(r: Rank, schedule: Schedule) -> Iterator[Sent]:
    """Activations to the next stage, gradients to the one before; a receive has no payload:
    pipeline_parallel.contract, by direction."""
    mine = r.place.pp
    for (source, to, kind), count in routes(schedule).items():
        if source == mine:
            yield Sent(f"pp.{kind}", "send", count, count // schedule.slices * r.stream)
        if to == mine:
            yield Sent(f"pp.{kind}", "recv", count, 0)


def words(r: Rank, schedule: Schedule) -> Iterator[Sent]:
    """Passes of a micro-batch over a vocabulary that the pipeline's ranks share: 2411.05288,
    section 5; pipeline_vocabulary.py.

    IF adds up rows of words; the last stage's output and the gradient of the first one's input go
    to all others; Algorithm 2 sums the gradient of x on a channel of its own.
    """
    p, S, mine = schedule.ranks, stream(r), r.place.pp
    algorithm = ALGORITHM[schedule.vocabulary]
    yield Sent("pp", "all_reduce", 1, S)
    givers = {"F": schedule.rank_of(schedule.stages - 1), "B": schedule.rank_of(0)}
    for kind, giver in givers.items():
        if giver == mine:
            yield Sent(f"pp.all.{kind}", "exchange", 1, (p - 1) * S)
        else:
            yield Sent(f"pp.all.{kind}", "recv", 1, 0)
    yield from loss(r, algorithm, p, dx_axis="pp.all.dx" if algorithm == "2" else "pp")
    if schedule.vocabulary == INTERLACED:  # all ranks begin each of IF, S, T and IB at once
        yield Sent("pp", "barrier", 4, 0)


# ---- once per step


def once(held: Held) -> Iterator[Sent]:
    """Tokens, losses, the norm of the gradient; what routers chose."""
    r, axis = held.rank, replica_axis(held.rank)
    if r.mesh.dp * r.mesh.cp > 1:
        yield Sent(axis, "all_reduce", 2, 2 * NUMBER)  # tokens, then losses
    if r.mesh.pp > 1:
        yield Sent("pp", "all_reduce", 1, NUMBER)
    yield from validation(r) if r.cfg.post_validation else norm(r)
    if r.model.experts:
        yield from routing(held)


def norm(r: Rank) -> Iterator[Sent]:
    """Its square, over all ranks: sharding.squared_norm."""
    if r.mesh.size > 1:
        yield Sent("world", "all_reduce", 1, NUMBER)


def validation(r: Rank) -> Iterator[Sent]:
    """The square over the ranks of a stage, then up the pipeline and down: post_validation.py."""
    others = (r.place.pp > 0) + (r.place.pp < r.mesh.pp - 1)
    if r.mesh.size > r.mesh.pp:
        yield Sent("stage", "all_reduce", 1, NUMBER)
    yield Sent("validation", "send", others, others * NUMBER)
    yield Sent("validation", "recv", others, 0)


def routing(held: Held) -> Iterator[Sent]:
    """Counts of each expert, of what was dropped, and the balance loss, of each layer; then, over
    the pipeline, three sums and the busiest expert: router.settle."""
    r = held.rank
    size = NUMBER * held.layers * (r.model.experts + 2)
    calls = min(1, held.layers)
    if r.mesh.dp * r.mesh.cp > 1:
        yield Sent(replica_axis(r), "all_reduce", calls, size)
    if held.schedule.replicated:
        yield Sent("mirror", "all_reduce", calls, size)
    if r.mesh.pp > 1:
        yield Sent("pp", "all_reduce", 2, 4 * NUMBER)
