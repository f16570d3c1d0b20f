"""Expert parallelism sends what was routed and no more, when it should, and holds its share."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from tensor_programs import Events, scaled_value
from torch import nn

from picotron_lab import expert_parallel, recompute, sharding
from picotron_lab.checks import check_run
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.expert_parallel import contract, ranks_per_token, tally
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, MoE

IMPLS = pytest.mark.parametrize("impl", ["plain", "fused"])
B, T, D = 2, 6, 8
ROW = D * 8  # bytes, float64
CFG = ModelConfig(hidden_size=D, ffn_size=6, experts=8, top_k=2, shared_experts=1)


def first_experts(name, shape, generator):
    """A router of zeros, so that all tokens go to the first experts; others as they come."""
    return torch.zeros(shape) if "router" in name else scaled_value(name, shape, generator)


def layer(axis, cfg, impl, draw=scaled_value):
    """The expert-parallel layer of one rank."""
    with torch.device("meta"):
        model = nn.Sequential(MoE(cfg))
    sharding.attach(model)
    expert_parallel.parallelize(model, axis, impl)
    sharding.materialise(model, 1, draw, dtype=torch.float64)
    return model[0]


def tokens(axis):
    """x [B, T, D] of this rank."""
    dice = torch.Generator().manual_seed(axis.rank)
    x_BTD = torch.randn(B, T, D, generator=dice, dtype=torch.float64)
    return x_BTD.requires_grad_()


def traffic(axis, cfg, impl, draw=scaled_value):
    """(what forward and backward send, their calls, choices of each expert [E])."""
    model = layer(axis, cfg, impl, draw)
    y_BTD = model(tokens(axis))
    sent, calls = tally(axis.ledger, "forward"), axis.ledger.calls[:]
    axis.ledger.clear()
    y_BTD.square().sum().backward()
    sent |= tally(axis.ledger, "backward")
    return sent, calls + axis.ledger.calls, model.router.counts_E


# ---- payload


@IMPLS
def test_what_all_ranks_send_to_one(impl):
    """12 tokens a rank choose experts 0 and 1 of 8: 24 rows leave each of 4 ranks, and rank 0 sends
    all 96 back. Backward the same. Counts: 4 ranks, 8 experts, 8 bytes."""
    expected = [24 + 96, 24, 24, 24]
    for rows, (sent, calls, _) in zip(
        expected, run_ranks(traffic, 4, CFG, impl, first_experts), strict=True
    ):
        assert sent == {
            "forward all_gather": (1, 4 * 8 * 8),
            "forward all_to_all": (2, rows * ROW),
            "backward all_to_all": (2, rows * ROW),
        }
        assert sent == contract(24, rows - 24, ROW, 4, 8)
        assert [call.op for call in calls] == ["all_gather"] + ["all_to_all"] * 4
        assert [call.bytes for call in calls[1:3]] == [24 * ROW, (rows - 24) * ROW]
        assert [call.bytes for call in calls[3:]] == [24 * ROW, (rows - 24) * ROW]


@IMPLS
@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("top_k", [1, 3])
def test_what_each_rank_sends_follows_its_tokens(n, impl, top_k):
    """A rank sends its tokens' choices, and what all chose of its own experts: none is padded, none
    is lost. Choices as the plain router counts them."""
    cfg = replace(CFG, top_k=top_k)
    ranks = run_ranks(traffic, n, cfg, impl)
    chosen_E = sum(counts_E for *_, counts_E in ranks)
    assert int(chosen_E.sum()) == n * B * T * top_k
    for rank, (sent, _, counts_E) in enumerate(ranks):
        mine = slice(rank * 8 // n, (rank + 1) * 8 // n)
        rows = int(counts_E.sum()), int(chosen_E[mine].sum())
        assert rows[0] == B * T * top_k
        assert sent == contract(*rows, ROW, n, 8)
    assert sum(sent["forward all_to_all"][1] for sent, _, _ in ranks) == (
        2 * n * B * T * top_k * ROW
    )


@IMPLS
def test_dropped_choices_are_not_sent(impl):
    """Each of 2 sequences may send ceil(1 * 6 * 2 / 8) = 2 tokens to an expert: of experts 0 and 1
    that is 8 rows a rank, not 24. All 32 are rank 0's."""
    cfg = replace(CFG, capacity_factor=1.0)
    for rank, (sent, _, _) in enumerate(run_ranks(traffic, 4, cfg, impl, first_experts)):
        rows = 8 + (32 if rank == 0 else 0)
        assert sent["forward all_to_all"] == sent["backward all_to_all"] == (2, rows * ROW)


@IMPLS
def test_one_rank_sends_nothing(impl):
    assert run_ranks(traffic, 1, CFG, impl)[0][:2] == ({}, [])


@IMPLS
def test_a_layer_that_runs_again_sends_again(impl):
    """Full recomputation: the counts and two all_to_alls, then the two of backward."""

    def calls(axis):
        cfg = replace(CFG, vocab_size=9, layers=1, heads=2, kv_heads=1)
        with torch.device("meta"):
            model = Llama(cfg)
        sharding.attach(model)
        expert_parallel.parallelize(model, axis, impl)
        recompute.apply(model, "full", impl)
        sharding.materialise(model, 1, scaled_value, dtype=torch.float64)
        tokens_BT = torch.arange(12).view(2, 6) % 9
        loss = model(tokens_BT, tokens_BT)
        axis.ledger.clear()
        loss.backward()
        return [call.op for call in axis.ledger.calls]

    assert run_ranks(calls, 3) == [["all_gather"] + ["all_to_all"] * 4] * 3


def test_the_demonstration_measures_what_it_predicts(capsys):
    expert_parallel.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    pairs = [row[-4:] for row in rows if row[:1] in (["forward"], ["backward"], ["rows"])]
    assert len(pairs) == 3 * 4
    for calls, size, *measured in pairs:
        assert [calls, size] == measured


# ---- how far a token goes


def test_ranks_per_token():
    """8 experts on 3 ranks: 0 1, 2 3 4, 5 6 7. A dropped choice, 8, goes nowhere."""
    expert_Nk = torch.tensor([[0, 1, 2], [0, 3, 7], [5, 6, 4], [8, 7, 6], [8, 8, 8], [2, 8, 3]])
    assert ranks_per_token(expert_Nk, 8, 3).tolist() == [2, 3, 2, 1, 0, 1]


@IMPLS
@pytest.mark.parametrize("top_groups", [1, 2, 4])
def test_groups_limit_the_ranks_of_a_token(top_groups, impl):
    """A group of 2 experts to a rank: 2 choices reach at most top_groups ranks, and without a limit
    2. What is sent stays a row per choice."""
    cfg = replace(CFG, top_k=2, expert_groups=4, top_groups=top_groups)

    def reached(axis):
        model = layer(axis, cfg, impl)
        expert_Nk, _ = model.router(tokens(axis))
        model(tokens(axis))
        return ranks_per_token(expert_Nk, 8, 4), axis.ledger.bytes("all_to_all")

    ranks = run_ranks(reached, 4)
    assert torch.cat([reached_N for reached_N, _ in ranks]).max() == min(top_groups, 2)
    assert sum(size for _, size in ranks) == 2 * 4 * B * T * 2 * ROW


FAR = {  # experts, groups, ranks: the most ranks that the experts of one group lie on
    (8, 4, 4): 1,
    (8, 4, 2): 1,  # two groups to a rank
    (12, 6, 4): None,  # ranks end at 3, 6, 9, 12, groups at 2, 4, 6
    (8, 2, 4): 2,  # two ranks to a group
    (8, 8, 3): 1,  # ranks end at 2, 5, 8, and groups everywhere
    (10, 2, 4): 2,  # ranks end at 2, 5, 7, 10, groups at 5, 10
    (8, 4, 6): 2,  # ranks end at 1, 2, 4, 5, 6, 8, groups at 2, 4, 6, 8
    (9, 3, 9): 3,
    (8, 4, 3): None,  # ranks end at 2, 5, 8, groups at 2, 4, 6, 8
    (9, 3, 4): None,  # ranks end at 2, 4, 6, 9, groups at 3, 6, 9
    (12, 4, 3): None,  # ranks end at 4, 8, 12, groups at 3, 6, 9, 12
    (6, 3, 2): None,  # ranks end at 3, 6, groups at 2, 4, 6
}


def check(experts, groups, ranks, top_groups=1):
    """Raises ConfigError where these do not go together, on a mesh of 4 times as many ranks."""
    cfg = ModelConfig(experts=experts, expert_groups=groups, top_groups=top_groups, top_k=1)
    mesh = MeshConfig(dp=4 * ranks, ep=ranks)
    check_run(cfg, mesh, TrainConfig(global_batch_size=4 * ranks, micro_batch_size=1))


@pytest.mark.parametrize(("experts", "groups", "ranks"), [case for case in FAR if FAR[case]])
def test_groups_that_end_where_ranks_end(experts, groups, ranks):
    check(experts, groups, ranks)
    group_Ge = torch.arange(experts).view(groups, -1)
    assert ranks_per_token(group_Ge, experts, ranks).max() == FAR[experts, groups, ranks]


@pytest.mark.parametrize(("experts", "groups", "ranks"), [case for case in FAR if not FAR[case]])
def test_groups_that_do_not_are_refused_with_a_value_that_works(experts, groups, ranks):
    """Unless all groups are open, which limits nothing."""
    with pytest.raises(ConfigError, match="needs whole ranks, or each rank whole groups") as caught:
        check(experts, groups, ranks)
    assert f"--ep {ranks} with --experts {experts} does" in str(caught.value)
    mended = int(str(caught.value).removesuffix(".").split("try --ep ")[1])
    assert 1 <= mended < ranks
    check(experts, groups, mended)
    check(experts, groups, ranks, top_groups=groups)


# ---- when


def events(axis, cfg, impl):
    """Calls and matmuls of forward and of backward, in order; neighbouring matmuls count as one."""
    model = layer(axis, cfg, impl)
    x_BTD = tokens(axis)
    with Events(axis, ("all_gather", "all_to_all")) as seen:
        y_BTD = model(x_BTD)
        forward = [event for event, _ in groupby(seen.seen)]
        seen.seen.clear()
        y_BTD.backward(torch.ones_like(y_BTD))
        return forward, [event for event, _ in groupby(seen.seen)]


def test_the_fused_path_sends_while_the_shared_expert_computes():
    """Forward the rows are on their way during its matmuls, backward their gradients. The router's
    own matmuls come first, and last."""
    shared = ["all_to_all", "mm", "all_to_all done"]
    for forward, backward in run_ranks(events, 2, CFG, "fused"):
        counts = ["mm", "all_gather", "all_gather done"]
        assert forward == [*counts, *shared, "mm", "all_to_all"]
        assert backward == ["all_to_all", "mm", *shared, "mm"]


def test_without_a_shared_expert_nothing_hides_the_dispatch():
    for forward, backward in run_ranks(events, 2, replace(CFG, shared_experts=0), "fused"):
        assert forward[3:] == ["all_to_all", "all_to_all done", "mm", "all_to_all"]
        assert backward == ["all_to_all", "mm", "all_to_all", "all_to_all done", "mm"]


def test_the_plain_path_waits_for_each_call():
    for forward, backward in run_ranks(events, 2, CFG, "plain"):
        assert forward == ["mm", "all_gather", "all_to_all", "mm", "all_to_all", "mm"]
        assert [event for event in backward if event != "mm"] == ["all_to_all"] * 2


@pytest.mark.parametrize(("impl", "waits"), [
    ("plain", [True] * 5), ("fused", [False, False, True, True, False]),
])  # fmt: skip
def test_what_the_ledger_says_of_waiting(impl, waits):
    for _, calls, _ in run_ranks(traffic, 2, CFG, impl):
        assert [call.waits for call in calls] == waits


# ---- memory


@IMPLS
@pytest.mark.parametrize(
    ("n", "held"), [(1, [8]), (2, [4, 4]), (3, [2, 3, 3]), (5, [1, 2, 1, 2, 2])]
)
def test_a_rank_holds_its_experts_only(impl, n, held):
    """An expert is 3 matrices of 8 x 6; router and shared expert are whole: 8 x 8 and 3 x 8 x 6."""

    def numbers(axis):
        model = layer(axis, CFG, impl)
        experts = sum(p.numel() for p in expert_parallel.expert_parameters(model))
        return experts, sum(p.numel() for p in model.parameters())

    expected = [(144 * experts, 144 * experts + 64 + 144) for experts in held]
    assert run_ranks(numbers, n) == expected
