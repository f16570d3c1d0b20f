"""Likely mistakes in lesson 14, each with the task and the words that must catch it."""

from dataclasses import replace

from lessons.kit import mutant


def counted(solution, extra):
    """state_bytes with extra(model, mesh) parameters more."""

    def state_bytes(model, mesh):
        count = solution.parameters(model, mesh) + extra(model, mesh)
        sizes = {"parameters": (2, 3), "gradients": (4, 2), "masters": (4, 1), "moments": (8, 1)}
        return {
            name: each * count // (mesh.dp if mesh.zero >= stage else 1)
            for name, (each, stage) in sizes.items()
        }

    return {"state_bytes": state_bytes}


@mutant("14.1", "the head is counted on the first stage")
def head_everywhere(solution):
    """A model has an embedding and a head."""

    def extra(model, mesh):
        words = model.vocab_size // mesh.tp * model.hidden_size
        return (words + model.hidden_size) * (mesh.pp > 1)

    return counted(solution, extra)


@mutant("14.1", "norms are shared out over tp")
def norms_shared_out(solution):
    """tp shares a layer out."""

    def extra(model, mesh):
        norms = (2 * model.layers // mesh.pp + (mesh.pp == 1)) * model.hidden_size
        return norms // mesh.tp - norms

    return counted(solution, extra)


@mutant("14.1", "the last norm [D] is forgotten")
def last_norm_forgotten(solution):
    """Norms are in layers."""
    return counted(solution, lambda model, mesh: -model.hidden_size * (mesh.pp == 1))


@mutant("14.3", "legal_meshes returned None: a list of MeshConfig is wanted")
def nothing_returned(solution):
    """Forgot the return."""
    return {"legal_meshes": lambda model, gpus, node, batch: None}


@mutant("14.1", "k and v are as large as q")
def four_square_matrices(solution):
    """Attention is 4 D D."""

    def extra(model, mesh):
        more = model.heads // mesh.tp - max(1, model.kv_heads // mesh.tp)
        return model.layers // mesh.pp * 2 * more * model.head_width * model.hidden_size

    return counted(solution, extra)


@mutant("14.1", "that is stage 2")
def stage_1_shares_gradients(solution):
    """What needs gradients is shared out, so they are."""

    def state_bytes(model, mesh):
        return solution.state_bytes(model, replace(mesh, zero=2) if mesh.zero == 1 else mesh)

    return {"state_bytes": state_bytes}


@mutant("14.2", "all micro-batches of the step are held")
def all_forward_first(solution):
    """Forward of all, then backward of all."""

    def activation_bytes(model, mesh, tokens, micro_batches, full):
        one = solution.activation_bytes(model, mesh, tokens, 1, full)
        return one * micro_batches

    return {"activation_bytes": activation_bytes}


@mutant("14.2", "one micro-batch is held")
def one_in_flight(solution):
    """Forward, then backward, then the next."""

    def activation_bytes(model, mesh, tokens, micro_batches, full):
        return solution.activation_bytes(model, mesh, tokens, 1, full)

    return {"activation_bytes": activation_bytes}


@mutant("14.2", "even if a step has fewer")
def always_pp_in_flight(solution):
    """1F1B holds pp micro-batches."""

    def activation_bytes(model, mesh, tokens, micro_batches, full):
        return solution.activation_bytes(model, mesh, tokens, mesh.pp, full)

    return {"activation_bytes": activation_bytes}


@mutant("14.2", "which only sequence parallelism does")
def norms_always_shared(solution):
    """tp shares out activations."""

    def activation_bytes(model, mesh, tokens, micro_batches, full):
        shared = replace(mesh, sequence_parallel=mesh.tp > 1)
        return solution.activation_bytes(model, shared, tokens, micro_batches, full)

    return {"activation_bytes": activation_bytes}


@mutant("14.2", "norms are whole")
def norms_never_shared(solution):
    """Norms are whole, so what they keep is."""

    def activation_bytes(model, mesh, tokens, micro_batches, full):
        whole = replace(mesh, sequence_parallel=False)
        return solution.activation_bytes(model, whole, tokens, micro_batches, full)

    return {"activation_bytes": activation_bytes}


@mutant("14.3", "is no legal mesh: --tp")
def heads_alone(solution):
    """tp divides the heads; keys and values follow."""

    def legal_meshes(model, gpus, node, batch):
        alike = replace(model, kv_heads=model.heads)
        return solution.legal_meshes(alike, gpus, node, batch)

    return {"legal_meshes": legal_meshes}


@mutant("14.3", "leaves a node")
def beyond_the_node(solution):
    """Any tp will do."""

    def legal_meshes(model, gpus, node, batch):
        return solution.legal_meshes(model, gpus, gpus, batch)

    return {"legal_meshes": legal_meshes}


@mutant("14.3", "is missing: run.py would start it")
def even_stages_only(solution):
    """pp divides the layers."""

    def legal_meshes(model, gpus, node, batch):
        found = solution.legal_meshes(model, gpus, node, batch)
        return [mesh for mesh in found if model.layers % mesh.pp == 0]

    return {"legal_meshes": legal_meshes}


@mutant("14.3", "--global-batch-size")
def batch_forgotten(solution):
    """A replica takes what it gets."""

    def legal_meshes(model, gpus, node, batch):
        return solution.legal_meshes(model, gpus, node, gpus)

    return {"legal_meshes": legal_meshes}


@mutant("14.4", "more than 9/10 of a GPU")
def filled_to_the_brim(solution):
    """80 GB are 80 GB."""

    def choose(meshes, memory, seconds, limit):
        return solution.choose(meshes, memory, seconds, limit / 0.9)

    return {"choose": choose}


@mutant("14.4", "more than 9/10 of a GPU")
def filled_and_largest_part(solution):
    """80 GB are 80 GB, and what takes longest is to blame."""
    blame = largest_part(solution)["choose"]

    def choose(meshes, memory, seconds, limit):
        return blame(meshes, memory, seconds, limit / 0.9)

    return {"choose": choose}


@mutant("14.4", "the largest part of the second's time")
def largest_part(solution):
    """What takes longest is to blame."""

    def choose(meshes, memory, seconds, limit):
        found = solution.choose(meshes, memory, seconds, limit)
        if found is None:
            return None
        parts = seconds(found[1])
        return *found[:2], max(parts, key=parts.get)

    return {"choose": choose}


@mutant("14.4", "look at memory first")
def time_first(solution):
    """Sort by time, then take what fits."""

    def choose(meshes, memory, seconds, limit):
        times = {mesh: seconds(mesh) for mesh in meshes}
        return solution.choose(meshes, memory, times.__getitem__, limit)

    return {"choose": choose}


@mutant("14.4", "needs least memory")
def leanest(solution):
    """What leaves most room is safest."""

    def choose(meshes, memory, seconds, limit):
        fitting = sorted((m for m in meshes if memory(m) <= 0.9 * limit), key=memory)
        if len(fitting) < 2:
            return None
        first, second = fitting[:2]
        times = {mesh: seconds(mesh) for mesh in fitting}
        loss = {p: s - times[first].get(p, 0.0) for p, s in times[second].items()}
        return first, second, max(loss, key=loss.get)

    return {"choose": choose}
