"""Partition: how the layers of a model are cut into pipeline stages.

Paper   layer redistribution, a baseline of Vocabulary Parallelism (2411.05288); costs: Table 4
Idea    The slowest rank sets the pace of a pipeline, and a stage may hold more than layers: the
        first the embedding, the last the head. With a vocabulary of 256k and a width of 3072 the
        head costs as much as 6 layers; so its stage gets fewer, down to none.
Counts  a cut is a tuple: how many layers each stage has, first stage first. Between the first and
        the last stage none may be empty: it would hold nothing at all.
Not     memory: with 1F1B the first rank keeps the activations of p micro-batches, the last of one;
        so where ranks are equally busy, the later one gets the extra layer
Read    even -> balanced -> costs -> explicit -> layers_of; of sequences: token_slices
Tests   tests/test_partition.py
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from picotron_lab.analysis import cost
from picotron_lab.config import ModelConfig, require


def even(layers: int, stages: int) -> tuple[int, ...]:
    """Numbers of layers that differ by one at most; the longer stages are just before the last.

    Raises ConfigError if a stage between the first and the last would be empty.
    """
    _check_filled(layers, stages)
    size, longer = divmod(layers, stages)
    first = stages - 1 - longer
    return tuple(size + (first <= stage < stages - 1) for stage in range(stages))


def balanced(
    layer: float, embedding: float, head: float, layers: int, stages: int, rank_of: Sequence[int]
) -> tuple[int, ...]:
    """The cut whose busiest rank has least to do, then its second busiest, and so on.

    layer, embedding, head  what each costs, in any one unit; the embedding is on stage 0, the head
                            on the last
    rank_of                 the rank of each stage; a rank may hold several. DualPipe: the two ranks
                            that hold the same two stages are one here, min(s, stages - 1 - s)
    Raises ConfigError if a stage between the first and the last would be empty.

    Layers cost the same, so only their numbers matter: each goes to the rank that has least to do
    so far, there to the stage with least to do; ties to the later stage. No other cut is better:
    none of these layers can move without making its new rank at least as busy as its old one was.
    Transfers and the order of actions are not looked at.
    """
    _check_filled(layers, stages)
    assert len(rank_of) == stages, (
        f"rank_of names the ranks of {len(rank_of)} stages, and there are {stages}: name one each."
    )
    assert layer > 0 and embedding >= 0 and head >= 0, (
        f"costs layer={layer}, embedding={embedding}, head={head} do not say which cut is best: "
        "give a layer more than 0, the others 0 or more."
    )
    fixed = [0.0] * stages
    fixed[0] += embedding
    fixed[-1] += head
    counts = [int(0 < stage < stages - 1) for stage in range(stages)]
    on_rank = {r: [s for s in range(stages) if rank_of[s] == r] for r in rank_of}

    def work(held: Sequence[int]) -> float:
        return sum(fixed[s] for s in held) + layer * sum(counts[s] for s in held)

    for _ in range(layers - sum(counts)):
        load = {rank: work(held) for rank, held in on_rank.items()}
        least = min(range(stages), key=lambda s: (load[rank_of[s]], work([s]), -s))
        counts[least] += 1
    return tuple(counts)


def costs(cfg: ModelConfig, sequence: int) -> tuple[float, float, float]:
    """(layer, embedding, head): FLOPs of forward and backward of one sequence of this many tokens.

    Layer and head are those of analysis/cost.py; the embedding, a look-up that counts nothing
    there, takes Table 4's 3 additions per element. In that table's letters, per sequence: a layer
    s h (72 h + 12 s), the embedding 3 s h, the head 6 s h V.
    """
    assert cfg.vocab_size > 0, (
        "the cost of a head cannot be told while vocab_size is 0: open the tokenizer first, then "
        "give its vocabulary size."
    )
    layer = cost.flops_per_token(replace(cfg, layers=1, vocab_size=0), sequence)
    head = cost.flops_per_token(replace(cfg, layers=1), sequence) - layer
    return sequence * layer, 3.0 * sequence * cfg.hidden_size, sequence * head


def explicit(text: str, layers: int, stages: int) -> tuple[int, ...]:
    """The cut that --pp-layers names, such as 4,4,4,5. Raises ConfigError if it is none."""
    example = "--pp-layers " + ",".join(map(str, even(layers, stages)))
    parts = [part.strip() for part in text.split(",")]
    require(
        all(re.fullmatch("[0-9]{1,9}", part) for part in parts),
        f"--pp-layers {text} must be whole numbers with commas between them; try {example}.",
    )
    counts = tuple(map(int, parts))
    require(
        len(counts) == stages,
        f"--pp-layers {text} must give one number for each pipeline stage, {stages} in all; "
        f"try {example}.",
    )
    require(
        sum(counts) == layers,
        f"--pp-layers {text} must add up to --layers {layers}, not to {sum(counts)}; "
        f"try {example}.",
    )
    require(
        all(counts[1:-1]),
        f"--pp-layers {text} leaves a stage between the first and the last empty, and each needs "
        f"a layer; try {example}.",
    )
    return counts


def layers_of(counts: Sequence[int]) -> list[range]:
    """The layers of each stage, numbered from 0 through the whole model."""
    return [range(sum(counts[:s]), sum(counts[: s + 1])) for s in range(len(counts))]


def token_slices(text: str, T: int, multiple: int = 1) -> tuple[int, ...]:
    """Lengths of the slices of T tokens that --token-slices asks for.

    text      their number, "4": nearly equal, longer ones first; or their lengths, "48,40,40"
    multiple  all lengths are multiples of it: the ranks of sequence parallelism
    raises    ConfigError
    """
    require(
        T % multiple == 0 and T > 0,
        f"--sequence-length {T} must be a multiple of {multiple}, the ranks that share every slice "
        f"out (--sequence-parallel); try --sequence-length {max(1, -(-T // multiple)) * multiple}.",
    )
    most = T // multiple
    works = f"try --token-slices {min(2, most)}."
    require(
        re.fullmatch("(0|[1-9][0-9]{0,8})(,(0|[1-9][0-9]{0,8}))*", text) is not None,
        f"--token-slices {text} must be the number of slices, or their lengths with commas between "
        f"them; {works}",
    )
    lengths = [int(number) for number in text.split(",")]
    if len(lengths) == 1:
        count = lengths[0]
        require(
            1 <= count <= most,
            f"--token-slices {count} must lie between 1 and {most}, for a slice of "
            f"--sequence-length {T} has at least {multiple} tokens; {works}",
        )
        return tuple(multiple * (most // count + (i < most % count)) for i in range(count))
    require(
        all(length > 0 and length % multiple == 0 for length in lengths),
        f"--token-slices {text} must be lengths above 0, multiples of {multiple}; {works}",
    )
    require(
        sum(lengths) == T,
        f"--token-slices {text} adds up to {sum(lengths)} tokens, and must to --sequence-length "
        f"{T}; {works}",
    )
    return tuple(lengths)


def _check_filled(layers: int, stages: int) -> None:
    assert stages >= 1, f"a model cannot be cut into {stages} stages: ask for 1 or more."
    require(
        layers >= stages - 2,
        f"--layers {layers} must fill {stages} pipeline stages, of which only the first and the "
        f"last can do without a layer; try --layers {stages} or fewer stages.",
    )
