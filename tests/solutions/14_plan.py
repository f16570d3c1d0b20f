"""Solution of lesson 14, written out: the library's forms serve all techniques at once, and the
tests compare with them."""

from collections.abc import Callable, Sequence

from picotron_lab.config import MeshConfig, ModelConfig


def state_bytes(model: ModelConfig, mesh: MeshConfig) -> dict[str, int]:
    """2 + 4 + 4 + 8 bytes of each parameter, shared out as the stage says."""
    count = parameters(model, mesh)
    sizes = {"parameters": (2, 3), "gradients": (4, 2), "masters": (4, 1), "moments": (8, 1)}
    return {
        name: each * count // (mesh.dp if mesh.zero >= stage else 1)
        for name, (each, stage) in sizes.items()
    }


def parameters(model: ModelConfig, mesh: MeshConfig) -> int:
    """Of a rank of the first stage."""
    D, C, tp = model.hidden_size, model.head_width, mesh.tp
    H, K = model.heads // tp, max(1, model.kv_heads // tp)
    layer = 2 * H * C * D + 2 * K * C * D + 3 * model.ffn_size // tp * D + 2 * D
    words = model.vocab_size // tp * D
    ends = words + (D + words if mesh.pp == 1 else 0)
    return model.layers // mesh.pp * layer + ends


def activation_bytes(
    model: ModelConfig, mesh: MeshConfig, tokens: int, micro_batches: int, full: bool
) -> int:
    """Of a layer, times layers, times micro-batches in flight."""
    D, C, tp = model.hidden_size, model.head_width, mesh.tp
    H, K = model.heads // tp, max(1, model.kv_heads // tp)
    own = tokens // tp if mesh.sequence_parallel else tokens
    norms = 2 * (2 * 2 * own * D + 4 * own)
    attention = 2 * tokens * (2 * H + 2 * K) * C + 4 * tokens * H
    mlp = 3 * 2 * tokens * model.ffn_size // tp
    layer = 2 * own * D if full else norms + attention + mlp
    return layer * (model.layers // mesh.pp) * min(micro_batches, mesh.pp)


def legal_meshes(model: ModelConfig, gpus: int, node: int, batch: int) -> list[MeshConfig]:
    """Of all products."""
    found = []
    for tp in range(1, min(gpus, node) + 1):
        for pp in range(1, min(gpus // tp, model.layers) + 1):
            dp = gpus // (tp * pp)
            fits = tp * pp * dp == gpus and batch % dp == 0 and model.heads % tp == 0
            if fits and (model.kv_heads % tp == 0 or tp % model.kv_heads == 0):
                found.append(MeshConfig(pp=pp, dp=dp, tp=tp))
    return found


def choose(
    meshes: Sequence[MeshConfig],
    memory: Callable[[MeshConfig], float],
    seconds: Callable[[MeshConfig], dict[str, float]],
    limit: float,
) -> tuple[MeshConfig, MeshConfig, str] | None:
    """Memory first."""
    times = {mesh: seconds(mesh) for mesh in meshes if memory(mesh) <= 0.9 * limit}
    if len(times) < 2:
        return None
    best, second = sorted(times, key=lambda mesh: sum(times[mesh].values()))[:2]
    loss = {part: time - times[best].get(part, 0.0) for part, time in times[second].items()}
    return best, second, max(loss, key=loss.get)
