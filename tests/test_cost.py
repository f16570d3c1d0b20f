"""Where ranks of an axis lie, and how long a message takes: numbers worked by hand."""

from dataclasses import replace

import pytest

from picotron_lab import mesh
from picotron_lab.analysis.cost import axis_size, collective_time, neighbours
from picotron_lab.analysis.hardware import MIB, hardware
from picotron_lab.config import MeshConfig

AXES = ("pp", "dp", "cp", "tp", "ep", "replica", "expert_replica")
# 100 bytes/s whatever the size, 3/4 of it without a switch; 30 bytes/s and 2 s between nodes
TOY = replace(
    hardware("h100"), links=((1.0, 100.0), (2.0, 100.0)), node=4, network_bandwidth=30.0,
    network_latency=2.0,
)  # fmt: skip


@pytest.mark.parametrize("node", [2, 4, 8])
@pytest.mark.parametrize(
    "sizes",
    [
        MeshConfig(2, 4, 2, 2, ep=4), MeshConfig(1, 3, 1, 4), MeshConfig(3, 2, 1, 3, ep=2),
        MeshConfig(1, 16, ep=8), MeshConfig(4, 1, 4, 1),
    ],
)  # fmt: skip
def test_neighbours_are_those_of_the_mesh(sizes, node):
    for axis, groups in mesh.groups(sizes).items():
        if axis not in AXES:
            continue
        homes = [[rank // node for rank in group] for group in groups]
        fewest = min(home.count(n) for home in homes for n in set(home))
        assert (axis_size(sizes, axis), neighbours(sizes, axis, node)) == (len(groups[0]), fewest)


@pytest.mark.parametrize(
    ("op", "ranks", "per_node", "seconds"),
    [
        ("all_reduce", 4, 4, 2 * 3 / 4 * 600 / 75),  # a ring, at 3/4 of 100
        ("all_reduce", 6, 6, 2 * 5 / 6 * 600 / 100),  # in the switch
        ("all_gather", 6, 6, 5 / 6 * 600 / 75),
        ("all_to_all", 6, 6, 5 / 6 * 600 / 75),
        ("send", 2, 2, 600 / 75),
        ("send", 2, 1, 2 + 600 / 30),
        ("exchange", 8, 4, 2 + 600 / 30),  # one adapter, whoever else is on the node
        ("all_gather", 8, 1, 7 * 2 + 7 / 8 * 600 / 30),
        ("all_gather", 8, 2, 7 * 2 + 7 / 8 * 600 / 60),  # two adapters
        ("all_gather", 8, 4, 7 * 2 + 7 / 8 * 600 / 75),  # four could do 120, the links 75
        ("all_reduce", 2, 1, 2 * 2 + 600 / 30),  # a ring of two
        ("all_reduce", 16, 1, 2 * 4 * 2 + 2 * 600 / 30),  # a tree of depth 4, a ring takes 97.5
        ("all_to_all", 8, 4, 7 * 2 + 4 / 8 * 600 / 30),  # half of it leaves the node
        ("recv", 2, 2, 0),
        ("all_reduce", 1, 1, 0),
    ],
)
def test_messages_by_hand(op, ranks, per_node, seconds):
    assert collective_time(op, 600, ranks, TOY, per_node) == pytest.approx(seconds)


def test_the_measured_all_reduce_of_a_node():
    """64 MiB over 8 H200 at 347 GB/s of bus bandwidth: 7/4 of it on the wire, 0.338 ms."""
    time = collective_time("all_reduce", 64 * MIB, 8, hardware("h200"), 8)
    assert time == pytest.approx(0.3384e-3, rel=1e-3)


def test_fewer_ranks_send_larger_pieces():
    """Two ranks exchange halves of 8 MiB as eight would exchange eighths of 32: at 3/4 of 276."""
    time = collective_time("all_reduce", 8 * MIB, 2, hardware("h200"), 2)
    assert time == pytest.approx(8 * MIB / (0.75 * 276e9))


def test_nothing_is_sent_in_no_time():
    assert collective_time("all_gather", 0, 8, TOY, 1) == 0


def test_impossible_neighbours():
    with pytest.raises(AssertionError, match="give 1 to as many as there are"):
        collective_time("all_reduce", 1, 2, TOY, 3)
    with pytest.raises(AssertionError, match="ask for one of tp, cp"):
        neighbours(MeshConfig(), "kv", 8)
