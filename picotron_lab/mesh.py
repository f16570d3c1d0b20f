"""Mesh: ranks arranged in a grid with named axes; a technique is given the one axis it works on.

Idea    World rank = ((pp * DP + dp) * CP + cp) * TP + tp: tp runs fastest, so tensor-parallel ranks
        are neighbours and share a node's fast links; pp runs slowest, it sends least. Expert
        parallelism has no ranks of its own: ep splits the dp x cp ranks, its members as near to
        each other as can be.
Axes    pp pipeline stages        dp replicas of the model      cp parts of the sequence
        tp parts of each layer    ep parts of the experts, inside dp x cp
        replica = dp x cp         ranks with the same weights and other tokens: they sum gradients
                                  and loss; without cp it is the dp axis itself
        expert_replica            ranks of a replica axis that hold the same experts: replica / ep;
                                  without ep it is the replica axis itself
        kv                        ranks of a tp axis that hold the same key/value head, where there
                                  are fewer such heads than ranks; else this rank alone
Source  the order is Megatron-LM's (2104.04473, section 3); ep inside dp follows DeepSpeed-MoE
        (2201.05596)
Try     print(grid(dp=2, tp=2)) shows the world rank at every coordinate
Tests   tests/test_mesh.py
"""

from dataclasses import dataclass

import numpy as np
from einops import rearrange

from picotron_lab.comm import Axis
from picotron_lab.config import MeshConfig


@dataclass(frozen=True)
class Mesh:
    """This rank's axes. An axis of size 1 exists too and sends nothing."""

    world: Axis
    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    ep: Axis
    replica: Axis
    expert_replica: Axis
    kv: Axis

    @property
    def axes(self) -> dict[str, Axis]:
        """{name: axis}, as the records of parameters name them."""
        axes = (self.pp, self.dp, self.cp, self.tp, self.ep)
        axes += (self.replica, self.expert_replica, self.kv)
        return {axis.name: axis for axis in axes}

    def __str__(self) -> str:
        """Where this rank sits, such as 'pp 0/1 dp 2/4 cp 0/1 tp 1/2 (rank 5)'."""
        axes = (self.pp, self.dp, self.cp, self.tp)
        return " ".join(f"{a.name} {a.rank}/{a.size}" for a in axes) + f" (rank {self.world.rank})"


def grid(pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1) -> np.ndarray:
    """World ranks laid out as [pp, dp, cp, tp]."""
    return np.arange(pp * dp * cp * tp).reshape(pp, dp, cp, tp)


def groups(sizes: MeshConfig, kv: int = 1) -> dict[str, list[list[int]]]:
    """For each axis the groups of world ranks that form it; each rank is in one group of each.

    kv  tensor-parallel ranks that share a key/value head
    """
    ranks = grid(sizes.pp, sizes.dp, sizes.cp, sizes.tp)
    experts = rearrange(ranks, "pp dp cp tp -> pp tp (dp cp)")
    experts = rearrange(experts, "pp tp (outer ep) -> pp tp outer ep", ep=sizes.ep)
    lines = {
        "pp": rearrange(ranks, "pp dp cp tp -> (dp cp tp) pp"),
        "dp": rearrange(ranks, "pp dp cp tp -> (pp cp tp) dp"),
        "cp": rearrange(ranks, "pp dp cp tp -> (pp dp tp) cp"),
        "tp": rearrange(ranks, "pp dp cp tp -> (pp dp cp) tp"),
        "replica": rearrange(ranks, "pp dp cp tp -> (pp tp) (dp cp)"),
        "ep": rearrange(experts, "pp tp outer ep -> (pp tp outer) ep"),
        "expert_replica": rearrange(experts, "pp tp outer ep -> (pp tp ep) outer"),
        "kv": rearrange(ranks, "pp dp cp (heads kv) -> (pp dp cp heads) kv", kv=kv),
    }
    return {name: array.tolist() for name, array in lines.items()}


def build(world: Axis, sizes: MeshConfig, kv_heads: int | None = None) -> Mesh:
    """Cut the world into axes. Every rank calls this, with the same sizes.

    kv_heads  key/value heads of the model; None: as many as there are tensor-parallel ranks
    Raises ConfigError unless pp x dp x cp x tp is world.size.
    """
    sizes.check_world(world.size)
    members = groups(sizes, max(1, sizes.tp // (kv_heads or sizes.tp)))
    names = ("pp", "dp", "cp", "tp", "ep", "kv")
    axes = {name: world.split(name, members[name]) for name in names}
    axes["replica"] = world.split("replica", members["replica"]) if sizes.cp > 1 else axes["dp"]
    axes["expert_replica"] = axes["replica"]
    if sizes.ep > 1:
        axes["expert_replica"] = world.split("expert_replica", members["expert_replica"])
    return Mesh(world=world, **axes)
