"""How much memory a training step will take, from configs and a schedule: no model is built.

Idea    What lies on a rank is state, which stays, and activations, which come and go as the
        schedule says: F leaves bytes for backward (saved.py), B trades them for what W needs, BW
        and W free them. The most that is held at a time along the rank's list (in_flight.py) is the
        prediction; on top comes what an operator needs while it runs.
Exact   state: to the byte. Activations, also of token slices: within 3 %, of experts if routing is
        even (the tests say where not). Temporaries: the largest of a few; the peak may be 28 %
        higher, if it is small
Not     what kernels allocate for themselves and what an allocator cannot reuse (meter.py); AdamW's
        step counters; copies of gradients in data_parallel's steps 2 and 3, overlapped and
        bucketed; --token-slices auto, which times decide
Slides  the Ultra-Scale Playbook's forms for GPT are below, as its text has them. Copies in
        circulation print 3/4 where it is 34, and 1/2 h^2 + 1/3 h where it is 12 h^2 + 13 h.
Dims    as in model.py
Read    predict -> Footprint -> temporaries; the playbook's forms
Tests   tests/test_memory_prediction.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from picotron_lab.analysis import in_flight, saved
from picotron_lab.analysis.parameters import (
    BYTES,
    Matrix,
    Place,
    State,
    matrices,
    part,
    state,
)  # fmt: skip
from picotron_lab.analysis.saved import Rank
from picotron_lab.checks import check_run, layers_of, schedule_of, slices_of
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig, require

FIRST = Place()
# logits of a chunk (CPU, Triton kernels): in fused.py, and over tp in vocab_parallel.py
CHUNK, SPLIT_CHUNK = (2**21, 2**27), (2**20, 2**27)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, by category.

    activations  the most that F and B leave for later, between actions
    temporaries  what comes on top while the loss is computed or backward runs
    update       what the optimizer takes while it steps, when there are no activations
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    buffers: int
    activations: int
    temporaries: int
    update: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.masters + self.moments + self.buffers

    @property
    def peak(self) -> int:
        """All that is there at the worst moment."""
        return self.state + max(self.activations + self.temporaries, self.update)


def predict(
    model: ModelConfig,
    mesh: MeshConfig,
    cfg: TrainConfig,
    rank_of_pipeline: int = 0,
    place: Place = FIRST,
    kernels: bool = False,
) -> Footprint:
    """Bytes of a rank; `vocab_size` must be known.

    place     where the rank is on the other axes; parts are largest on the first
    kernels   whether Triton kernels serve: on CUDA, fused, not float64
    raises    ConfigError for configs that do not fit together
    """
    check_run(model, mesh, cfg)
    assert model.vocab_size > 0, (
        "the memory of a model cannot be told while vocab_size is 0: open the tokenizer first, "
        "then give its vocabulary size."
    )
    place, lengths = replace(place, pp=rank_of_pipeline), _slices(mesh, cfg)
    schedule = schedule_of(mesh, cfg, max(1, len(lengths)))
    counts = layers_of(model, mesh, cfg)
    mine = matrices(model, mesh, cfg, schedule, counts, place)
    stays = state(mine, mesh, cfg, place)
    rank = Rank(model, mesh, cfg, place, kernels and cfg.impl == "fused" and cfg.dtype != "float64")
    each = rank.at.element + rank.at.wide * rank.narrow  # a gradient, and its cast to float32
    largest = each * max(m.size for stage in mine for m in stage)
    ends = schedule.stages - 1 in schedule.placement[place.pp] and not schedule.vocabulary
    longest = rank.slice_of(max(lengths)) if lengths else rank
    return Footprint(
        stays.parameters, stays.gradients, stays.masters, stays.moments, stays.buffers,
        activations=max(in_flight.over_time(rank, schedule, counts, lengths)),
        temporaries=max(temporaries(longest, ends, _unit_bytes(rank, mine), largest).values()),
        update=update(rank, stays),
    )  # fmt: skip


def _slices(mesh: MeshConfig, cfg: TrainConfig) -> tuple[int, ...]:
    """Tokens of each slice of a sequence; none if it is not cut."""
    lengths = slices_of(mesh, cfg)
    require(
        lengths is not None,
        "--token-slices auto is decided by times that are measured when training begins; try "
        "--token-slices 4.",
    )
    return lengths if len(lengths) > 1 else ()


# ---- what comes on top


def temporaries(r: Rank, ends: bool, unit: int, largest: int) -> dict[str, int]:
    """Bytes while the loss is computed or backward runs, by moment; the largest counts.

    ends      whether this rank has the head
    unit      bytes of the largest unit that ZeRO-3 gathers, else 0
    largest   bytes of the largest gradient, as backward makes it and casts it

    loss      fused: logits of a chunk of tokens, or of two where tp splits the words, in forward
    head      the gradients of its logits, w N V, and of its weight; all else is still there
    layer     what is recomputed of one layer, its gathered weights (ZeRO-3, plain) and their
              gradients, the largest weight's gradient before it is added, and the gradients of
              scores (w B H T T, twice) or of gate, up and their product (3 e N F), while what the
              head kept is free again
    """
    kept = sum(saved.head(r).values()) if ends else 0
    again = replace(r, cfg=replace(r.cfg, recompute="none"))
    recomputed = sum(saved.layer(again).values()) - sum(saved.layer(r).values())
    layer = recomputed + 2 * unit + largest + saved.gradients_in_layer(r)
    loss = loss_in_chunks(r) if ends else 0
    end = _head_in_backward(r, largest) if ends else 0
    return {"loss": loss, "head": end, "layer": max(0, layer - kept)}


def _in_chunks(r: Rank) -> bool:
    """Whether the loss makes its gradients in forward, of chunks of tokens."""
    return r.fused and (r.mesh.tp == 1 or r.mesh.vocabulary(r.cfg.impl) != "none")


def _head_in_backward(r: Rank, largest: int) -> int:
    """Gradients of logits, whole: of log probabilities and, until these are free, of logits."""
    if _in_chunks(r):  # the weight's is made: it is rounded to a narrow weight's dtype, and added
        return largest if r.narrow else 0
    logits, whole = saved.head_logits(r), r.mesh.vocabulary(r.cfg.impl) == "none"
    return logits + (max(logits, largest) if whole or r.mesh.tp == 1 else largest)


def loss_in_chunks(r: Rank) -> int:
    """Bytes while the fused loss makes dX and dW, beside these: fused.py's LinearCrossEntropy, over
    tp vocab_parallel.py's Loss. 0 where all logits are made at once.

    Alone   a chunk's logits, widened where narrow; on a CPU a narrow chunk's part of dW is made
            before it is added
    Over tp the next chunk's S runs before T of this one
    """
    model, tp, N = r.model, r.mesh.tp, r.at.tokens
    if not _in_chunks(r):
        return 0
    if tp > 1:
        rows = SPLIT_CHUNK[r.kernels] * tp // model.vocab_size
        first = min(N, max(rows, model.hidden_size))
        return _split_chunks(r, first, min(N - first, first))
    first = min(N, max(1, CHUNK[r.kernels] // model.vocab_size))
    one = r.at.wide + r.at.element * r.narrow
    product = r.at.element * model.hidden_size if r.narrow and not r.kernels else 0
    return model.vocab_size * (one * first + product)


def _split_chunks(r: Rank, n: int, following: int) -> int:
    """Of a chunk of n tokens and the following one, on words that the ranks of tp share."""
    e, w, narrow = r.at.element, r.at.wide, r.narrow
    rows = part(r.model.vocab_size, r.mesh.tp, r.place.tp)
    naive = r.mesh.vocabulary(r.cfg.impl) == "naive"
    kept = w if naive else e  # bytes of a logit from S to T
    scoring = w + e * narrow if naive else e + w * (1 + narrow)
    turning = kept + (e if naive else w + e) * narrow
    if r.kernels and not naive:
        scoring = turning = e  # in place
    s_pass = max(scoring * n, kept * n + scoring * following)
    t_pass = kept * following + max(turning * n, e * n + e * r.model.hidden_size)
    return rows * max(s_pass, t_pass)


def update(r: Rank, stays: State) -> int:
    """Bytes while the optimizer steps: foreach AdamW makes a square root of every second moment,
    and adds to it; fused AdamW, and SGD, work in place."""
    return stays.moments // 2 if r.cfg.optimizer == "adamw" and not r.fused else 0


def _unit_bytes(r: Rank, stages: Sequence[Sequence[Matrix]]) -> int:
    """Of ZeRO-3's plain path, which has no buffers: the largest unit, whole."""
    if r.mesh.zero < 3 or r.fused:
        return 0
    every = [m for stage in stages for m in stage]
    sizes = (sum(m.size for m in every if m.unit == i) for i in {m.unit for m in every})
    return BYTES[r.cfg.dtype] * max(sizes)


# ---- the playbook's forms, for GPT


def playbook_state(parameters: int, ranks: int = 1, stage: int = 0) -> float:
    """Bytes of a rank: 2 weights, 2 gradients, 12 optimizer (float32 master and moments) of each
    parameter, shared out among ranks from ZeRO's `stage` on. Source: 1910.02054, section 5."""
    optimizer, gradients, weights = (ranks if stage >= least else 1 for least in (1, 2, 3))
    return parameters * (2 / weights + 2 / gradients + 12 / optimizer)


def playbook_activations(layers: int, seq: int, bs: int, h: int, heads: int) -> float:
    """L seq bs h (34 + 5 heads seq / h) bytes in 16 bit. Source: 2205.05198, equation 2."""
    return layers * seq * bs * h * (34 + 5 * heads * seq / h)


def playbook_parameters(h: int, v: int, layers: int) -> int:
    """h v + L (12 h^2 + 13 h) + 2 h: GPT with a tied head, no learned positions."""
    return h * v + layers * (12 * h**2 + 13 * h) + 2 * h
