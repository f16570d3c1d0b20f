"""Cuts into stages against hand-worked ones, an exhaustive search, and published choices."""

import itertools
import math

import pytest

from picotron_lab import partition
from picotron_lab.config import ConfigError, ModelConfig

PLACEMENTS = {
    "one stage each": lambda p: [*range(p)],
    "looped": lambda p: [*range(p)] * 2,
    "folded": lambda p: [*range(p), *reversed(range(p))],
}
# Vocabulary Parallelism, 32 layers on 8 ranks: layers that are left on the last one
PUBLISHED = {32_000: 4, 64_000: 3, 128_000: 2, 256_000: 0}


def busiest_first(counts, layer, embedding, head, rank_of):
    """What each rank has to do, the busiest rank first."""
    work = dict.fromkeys(rank_of, 0.0)
    for stage, count in enumerate(counts):
        last = stage == len(counts) - 1
        work[rank_of[stage]] += layer * count + embedding * (stage == 0) + head * last
    return sorted(work.values(), reverse=True)


def every_cut(layers, stages):
    for ends in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        counts = tuple(b - a for a, b in itertools.pairwise((0, *ends, layers)))
        if all(counts[1:-1]):
            yield counts


def paper_model(vocabulary):
    """Its 8-GPU model: an MLP of 8/3 h, gated, has as many weights as the paper's of 4 h."""
    return ModelConfig("", vocabulary, 3072, 32, 24, 24, 8192)


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [
        (32, 4, (8, 8, 8, 8)),
        (5, 1, (5,)),
        (7, 2, (4, 3)),
        (1, 2, (1, 0)),
        (10, 4, (2, 3, 3, 2)),
        (3, 4, (1, 1, 1, 0)),
        (2, 4, (0, 1, 1, 0)),
    ],
)
def test_even_by_hand(layers, stages, counts):
    assert partition.even(layers, stages) == counts


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_cut_is_better_than_the_balanced_one(ranks, placement):
    rank_of = PLACEMENTS[placement](ranks)
    stages, compared = len(rank_of), 0
    for layers in range(max(1, stages - 2), 8):
        for embedding, head in itertools.product((0.0, 0.25, 2.5), (0.0, 0.75, 1.0, 3.25)):
            price = 1.0, embedding, head
            ours = partition.balanced(*price, layers, stages, rank_of)
            cuts = {*every_cut(layers, stages)}
            best = min(busiest_first(cut, *price, rank_of) for cut in cuts)
            assert ours in cuts and busiest_first(ours, *price, rank_of) == best
            compared += 1
    assert compared >= 12 * 4


def test_ties_go_to_later_stages_and_the_stages_of_a_rank_are_alike():
    assert partition.balanced(1, 0, 0, 6, 4, range(4)) == (1, 1, 2, 2)
    assert partition.balanced(1, 0, 0, 12, 4, [0, 1, 0, 1]) == (3, 3, 3, 3)
    # rank 0 holds the stages with embedding and head, which weigh two layers together
    assert partition.balanced(1, 0.5, 1.5, 10, 4, [0, 1, 1, 0]) == (2, 3, 3, 2)


def test_a_large_model_is_cut_too():
    ranks = [s % 16 for s in range(64)]
    counts = partition.balanced(1.0, 0.1, 6.25, 200, 64, ranks)
    # rank 15: 6 and 6.25; then 194 for 15 ranks: 13 for each but rank 0, whose 12 come to 12.1
    assert sum(counts) == 200 and counts[15::16] == (2, 2, 2, 0)
    assert busiest_first(counts, 1.0, 0.1, 6.25, ranks) == [13.0] * 14 + [12.25, 12.1]


def test_costs_are_those_of_table_4():
    s, h, V = 2048, 3072, 256_000
    expected = s * h * (72 * h + 12 * s), 3 * s * h, 6 * s * h * V
    assert partition.costs(paper_model(V), s) == expected


@pytest.mark.parametrize("vocabulary", PUBLISHED)
@pytest.mark.parametrize("sequence", [2048, 4096])
def test_at_most_as_slow_as_the_published_redistribution(vocabulary, sequence):
    k = PUBLISHED[vocabulary]
    size, longer = divmod(32 - k, 7)
    published = (*[size] * (7 - longer), *[size + 1] * longer, k)
    price = partition.costs(paper_model(vocabulary), sequence)
    ours = partition.balanced(*price, 32, 8, range(8))
    assert busiest_first(ours, *price, range(8)) <= busiest_first(published, *price, range(8))


def test_the_published_redistribution_where_it_is_and_is_not_the_best():
    """In layers, at s = 2048, where a head costs V / (12 h + 2 s) of them."""
    slowest = {}
    for vocabulary in PUBLISHED:
        head = vocabulary / (12 * 3072 + 2 * 2048)
        counts = partition.balanced(1, 0, head, 32, 8, range(8))
        slowest[vocabulary] = busiest_first(counts, 1, 0, head, range(8))[0]
        bound = min(max(k + head, math.ceil((32 - k) / 7)) for k in range(33))
        assert slowest[vocabulary] == bound
    # its own choice for 128k, k = 2, takes 2 + 3.125
    assert slowest == {32_000: 4.78125, 64_000: 5, 128_000: 5, 256_000: 6.25}
    assert partition.balanced(1, 0, 6.25, 32, 8, range(8)) == (4, 4, 4, 5, 5, 5, 5, 0)


def test_explicit_counts_and_the_layers_of_stages():
    assert partition.explicit("4, 4,4,5", 17, 4) == (4, 4, 4, 5)
    assert partition.explicit("0,2,0", 2, 3) == (0, 2, 0)
    assert partition.layers_of((1, 3, 0)) == [range(0, 1), range(1, 4), range(4, 4)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("4,x,4,5", "whole numbers"),
        ("", "whole numbers"),
        ("4,4,4,-5", "whole numbers"),
        ("4,4,4.0,5", "whole numbers"),
        ("4,4,9", "one number for each pipeline stage, 4 in all"),
        ("4,4,4,4", "add up to --layers 17, not to 16"),
        ("8,0,4,5", "between the first and the last empty"),
    ],
)
def test_wrong_counts_get_one_sentence_with_a_value_that_works(text, rule):
    with pytest.raises(ConfigError) as error:
        partition.explicit(text, 17, 4)
    sentence = str(error.value)
    assert sentence.startswith(f"--pp-layers {text} ") and rule in sentence
    assert sentence.endswith("try --pp-layers 4,4,5,4.")
    assert partition.explicit("4,4,5,4", 17, 4) == (4, 4, 5, 4)


def test_too_few_layers_get_a_sentence():
    cuts = (
        lambda n: partition.even(n, 8),
        lambda n: partition.balanced(1, 0, 0, n, 8, range(8)),
        lambda n: partition.explicit("0,1,1,1,1,1,1,0", n, 8),
    )
    for cut in cuts:
        assert cut(6) == (0, 1, 1, 1, 1, 1, 1, 0)
        with pytest.raises(ConfigError, match=r"^--layers 5 .* 8 pipeline .* try --layers 8 or"):
            cut(5)
