"""The mesh: which ranks form which axis, worked by hand; what they then sum is in test_comm.py."""

import numpy as np
import pytest

from picotron_lab import mesh
from picotron_lab.comm import Axis
from picotron_lab.config import ConfigError, MeshConfig
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.nobody import Nobody

NAMES = {"pp", "dp", "cp", "tp", "ep", "replica", "expert_replica", "kv"}


def alone(*ranks):
    return [[r] for r in ranks]


def test_grid():
    """World rank = ((pp * DP + dp) * CP + cp) * TP + tp."""
    ranks = mesh.grid(pp=2, dp=3, cp=2, tp=2)
    assert ranks.shape == (2, 3, 2, 2)
    assert ranks[0, 0, 0].tolist() == [0, 1]
    assert ranks[0, 0, :, 0].tolist() == [0, 2]
    assert ranks[0, :, 0, 0].tolist() == [0, 4, 8]
    assert ranks[:, 0, 0, 0].tolist() == [0, 12]
    assert ranks[1, 2, 0, 1] == ((1 * 3 + 2) * 2 + 0) * 2 + 1 == 21


def test_two_of_each():
    """pp2 dp2 cp2 tp2: the bits of the rank are pp dp cp tp."""
    found = mesh.groups(MeshConfig(pp=2, dp=2, cp=2, tp=2))
    assert found["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
    assert found["cp"] == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert found["dp"] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert found["pp"] == [[r, r + 8] for r in range(8)]
    assert found["replica"] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert found["ep"] == alone(
        *range(0, 8, 2), *range(1, 8, 2), *range(8, 16, 2), *range(9, 16, 2)
    )
    assert found["expert_replica"] == found["replica"]


def test_experts_beside_tensor_parallelism():
    """dp4 tp2 ep2: rank = 2 dp + tp. Experts are split over neighbouring replicas."""
    found = mesh.groups(MeshConfig(dp=4, tp=2, ep=2))
    assert found["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found["dp"] == found["replica"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found["ep"] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert found["expert_replica"] == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert found["pp"] == found["cp"] == alone(*range(8))


def test_experts_across_context_parallelism():
    """dp2 cp2 ep4: all four ranks hold different experts, and each is its only replica."""
    found = mesh.groups(MeshConfig(dp=2, cp=2, ep=4))
    assert found["ep"] == found["replica"] == [[0, 1, 2, 3]]
    assert found["expert_replica"] == alone(0, 1, 2, 3)
    assert (found["dp"], found["cp"]) == ([[0, 2], [1, 3]], [[0, 1], [2, 3]])


def test_experts_in_pipeline_stages():
    """pp2 dp2 ep2: a stage is a half of the ranks."""
    found = mesh.groups(MeshConfig(pp=2, dp=2, ep=2))
    assert found["ep"] == found["dp"] == [[0, 1], [2, 3]]
    assert found["pp"] == [[0, 2], [1, 3]]


ALL = [
    MeshConfig(pp=p, dp=d, cp=c, tp=t, ep=e)
    for p in (1, 2, 3) for d in (1, 2, 4) for c in (1, 2) for t in (1, 2, 4)
    for e in (1, 2, 4, 8) if d * c % e == 0
]  # fmt: skip


@pytest.mark.parametrize("sizes", ALL, ids=str)
def test_every_rank_is_in_one_group_of_each_axis(sizes):
    found = mesh.groups(sizes)
    assert set(found) == NAMES
    shape = dict(pp=sizes.pp, dp=sizes.dp, cp=sizes.cp, tp=sizes.tp, ep=sizes.ep)
    shape["replica"] = sizes.dp * sizes.cp
    shape["expert_replica"] = sizes.dp * sizes.cp // sizes.ep
    shape["kv"] = 1
    for name, groups in found.items():
        assert sorted(np.concatenate(groups).tolist()) == list(range(sizes.size)), name
        assert {len(group) for group in groups} == {shape[name]}, name
        assert all(group == sorted(group) for group in groups), name


@pytest.mark.parametrize("sizes", [MeshConfig(dp=4, tp=2, ep=2), MeshConfig(tp=4, dp=2)], ids=str)
def test_busy_axes_stay_on_one_node(sizes):
    """2 nodes x 4 ranks: tp and ep talk in every layer, so their groups must not cross nodes."""
    for name in ("tp", "ep"):
        for group in mesh.groups(sizes)[name]:
            assert len({rank // 4 for rank in group}) == 1, (name, group)


# ---- the axes of one rank


def test_build():
    def where(axis):
        axes = mesh.build(axis, MeshConfig(pp=2, dp=2, tp=2, ep=2))
        ranks = {name: sub.ranks for name, sub in axes.axes.items()}
        return str(axes), ranks, axes.replica is axes.dp

    text, ranks, same = run_ranks(where, 8)[5]
    assert text == "pp 1/2 dp 0/2 cp 0/1 tp 1/2 (rank 5)"
    assert ranks == {
        "pp": (1, 5), "dp": (5, 7), "cp": (5,), "tp": (4, 5), "ep": (5, 7), "expert_replica": (5,),
        "kv": (5,),
    }  # fmt: skip
    assert same  # without cp the replicas of the model are the dp axis


def test_ranks_that_share_a_key_value_head():
    """dp2 tp4 and 2 such heads: tensor-parallel neighbours share one; with 1 head all four do."""
    assert mesh.groups(MeshConfig(dp=2, tp=4), kv=2)["kv"] == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def where(axis, kv_heads):
        return mesh.build(axis, MeshConfig(dp=2, tp=4), kv_heads).kv.ranks

    assert run_ranks(where, 8, 2)[5] == (4, 5)
    assert run_ranks(where, 8, 1)[5] == (4, 5, 6, 7)
    assert run_ranks(where, 8, 4)[5] == run_ranks(where, 8, 8)[5] == (5,)


def test_replicas_with_context_parallelism():
    def where(axis):
        axes = mesh.build(axis, MeshConfig(dp=2, cp=2))
        return axes.replica.name, axes.replica.ranks, axes.expert_replica is axes.replica

    assert run_ranks(where, 4) == [("replica", (0, 1, 2, 3), True)] * 4


def test_one_rank_of_a_large_job():
    """Rank 639 of pp10 dp8 tp8, without the other 639."""
    world = Axis("world", range(640), 639, Nobody(), Ledger())
    axes = mesh.build(world, MeshConfig(pp=10, dp=8, tp=8, ep=4))
    assert str(axes) == "pp 9/10 dp 7/8 cp 0/1 tp 7/8 (rank 639)"
    assert axes.tp.ranks == tuple(range(632, 640))
    assert axes.dp.ranks == tuple(range(583, 640, 8))
    assert axes.pp.ranks == tuple(range(63, 640, 64))
    assert axes.ep.ranks == (615, 623, 631, 639)


def test_wrong_number_of_ranks():
    with pytest.raises(ConfigError, match="makes a mesh of 4 ranks, but there are 3"):
        run_ranks(lambda axis: mesh.build(axis, MeshConfig(dp=2, tp=2)), 3)


def test_experts_must_divide_the_replicas():
    with pytest.raises(ConfigError, match="--ep 3 must divide --dp 2 times --cp 2"):
        MeshConfig(dp=2, cp=2, ep=3)
