"""Likely mistakes in lesson 02, each with the task and the words that must catch it."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from lessons.kit import mutant

IGNORED = -100


@mutant("02.1", "gradients of 16 bit")
def narrow_gradients(solution):
    """A gradient has the dtype of its weight."""

    def state_bytes(parameters, dtype, optimizer):
        found = solution.state_bytes(parameters, dtype, optimizer)
        return found | {"gradients": found["weights"]}

    return {"state_bytes": state_bytes}


@mutant("02.1", "moments of 16 bit")
def narrow_moments(solution):
    """The moments have the dtype of the weight."""

    def state_bytes(parameters, dtype, optimizer):
        found = solution.state_bytes(parameters, dtype, optimizer)
        return found | {"moments": 2 * found["weights"] if optimizer == "adamw" else 0}

    return {"state_bytes": state_bytes}


@mutant("02.1", "only bfloat16 weights need a float32 copy")
def always_masters(solution):
    """The optimizer always has a copy."""

    def state_bytes(parameters, dtype, optimizer):
        found = solution.state_bytes(parameters, dtype, optimizer)
        return found | {"masters": 4 * parameters}

    return {"state_bytes": state_bytes}


@mutant("02.1", "gradients of 16 bit")
def everything_narrow(solution):
    """A model of 16 bit has 16 bit everywhere, and no copies."""

    def state_bytes(parameters, dtype, optimizer):
        weights = solution.state_bytes(parameters, dtype, optimizer)["weights"]
        moments = 2 * weights if optimizer == "adamw" else 0
        return {"weights": weights, "gradients": weights, "masters": 0, "moments": moments}

    return {"state_bytes": state_bytes}


@mutant("02.1", "an update that is small")
def no_masters(solution):
    """The optimizer steps the weights."""

    def state_bytes(parameters, dtype, optimizer):
        return solution.state_bytes(parameters, dtype, optimizer) | {"masters": 0}

    return {"state_bytes": state_bytes}


def counting(measure):
    """saved_bytes that adds up measure(tensor, parameters, seen), a dict of bytes by key."""

    def saved_bytes(forward, parameters):
        kept = {}

        def pack(tensor):
            kept.update(measure(tensor, list(parameters), len(kept)))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        del loss
        return sum(kept.values())

    return {"saved_bytes": saved_bytes}


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@mutant("02.2", "so compare storages, not tensors")
def weights_are_counted(solution):
    """A parameter is known by its identity."""

    def measure(tensor, parameters, seen):
        known = any(tensor is p for p in parameters)
        return {} if known else {address(tensor): tensor.untyped_storage().nbytes()}

    return counting(measure)


@mutant("02.2", "it counts once")
def kept_twice(solution):
    """Every call of pack is another tensor."""

    def measure(tensor, parameters, seen):
        known = any(address(tensor) == address(p) for p in parameters)
        return {} if known else {seen: tensor.untyped_storage().nbytes()}

    return counting(measure)


@mutant("02.2", "a view keeps its whole storage alive")
def what_the_view_shows(solution):
    """A tensor takes as many bytes as it has elements."""

    def measure(tensor, parameters, seen):
        known = any(address(tensor) == address(p) for p in parameters)
        key = (address(tensor), tensor.storage_offset())
        return {} if known else {key: tensor.numel() * tensor.element_size()}

    return counting(measure)


@mutant("02.3", "a mean of means")
def mean_of_means(solution):
    """Each micro-batch has its mean, and the batch the mean of these."""

    def accumulate(model, batches):
        total = 0.0
        for tokens, labels in batches:
            loss = model(tokens, labels) / (labels != IGNORED).sum() / len(batches)
            loss.backward()
            total += loss.item()
        return total

    return {"accumulate": accumulate}


@mutant("02.3", "a sum where a mean belongs")
def never_divided(solution):
    """model(...) is the loss."""

    def accumulate(model, batches):
        total = 0.0
        for tokens, labels in batches:
            loss = model(tokens, labels)
            loss.backward()
            total += loss.item()
        return total

    return {"accumulate": accumulate}


@mutant("02.3", "labels of -100 do not count")
def over_all_positions(solution):
    """A mean is over all positions."""

    def accumulate(model, batches):
        count, total = sum(labels.numel() for _, labels in batches), 0.0
        for tokens, labels in batches:
            loss = model(tokens, labels) / count
            loss.backward()
            total += loss.item()
        return total

    return {"accumulate": accumulate}


@mutant("02.3", "only the last micro-batch is there")
def zeroed_each_time(solution):
    """Every backward begins with zero_grad."""

    def accumulate(model, batches):
        counted, total = sum(int((y != IGNORED).sum()) for _, y in batches), 0.0
        for tokens, labels in batches:
            model.zero_grad()
            loss = model(tokens, labels) / counted
            loss.backward()
            total += loss.item()
        return total

    return {"accumulate": accumulate}


@mutant("02.3", "call backward on each")
def one_backward(solution):
    """The loss is a sum, so it has one backward."""

    def accumulate(model, batches):
        counted = sum(int((y != IGNORED).sum()) for _, y in batches)
        loss = sum(model(tokens, labels) for tokens, labels in batches) / counted
        loss.backward()
        return loss.item()

    return {"accumulate": accumulate}


@mutant("02.3", "or they were joined into one")
def all_joined(solution):
    """One large micro-batch has the right gradient."""

    def accumulate(model, batches):
        whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        loss = model(*whole) / (whole[1] != IGNORED).sum()
        loss.backward()
        return loss.item()

    return {"accumulate": accumulate}


@mutant("02.4", "recompute returned None, a tensor is wanted")
def nothing_returned(solution):
    """Forgot the return."""

    def recompute(module, x):
        solution.recompute(module, x)

    return {"recompute": recompute}


@mutant("02.4", "without a graph")
def no_graph(solution):
    """Keep nothing."""

    def recompute(module, x):
        with torch.no_grad():
            return module(x)

    return {"recompute": recompute}


@mutant("02.4", "the second run drew another dropout mask")
def another_mask(solution):
    """Running the module again gives the same."""

    class Again(solution.RunTwice):
        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.module(x)
            torch.autograd.backward(y, grad)
            return None, x.grad

    return {"recompute": lambda module, x: Again.apply(module, x)}


@mutant("02.4", "put it back as backward found it")
def state_is_left(solution):
    """The mask is the same, so all is well."""

    class Again(solution.RunTwice):
        @staticmethod
        def backward(ctx, grad):
            found = solution.RunTwice.backward(ctx, grad)
            torch.set_rng_state(ctx.state)
            return found

    return {"recompute": lambda module, x: Again.apply(module, x)}


@mutant("02.4", "the graph of the module was built")
def nothing_is_recomputed(solution):
    """It gives the right gradients."""
    return {"recompute": lambda module, x: module(x)}


@mutant("02.4", "the parameters got no gradient")
def parameters_forgotten(solution):
    """backward returns the gradient of x."""

    class Again(solution.RunTwice):
        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            x, now = x.detach().requires_grad_(), torch.get_rng_state()
            torch.set_rng_state(ctx.state)
            with torch.enable_grad():
                y = ctx.module(x)
            torch.set_rng_state(now)
            return None, torch.autograd.grad(y, x, grad)[0]

    return {"recompute": lambda module, x: Again.apply(module, x)}


@mutant("02.4", "a third run costs another forward")
def three_runs(solution):
    """One run for the gradient of x, one for those of the parameters."""

    class Again(solution.RunTwice):
        @staticmethod
        def backward(ctx, grad):
            now = torch.get_rng_state()
            ctx.module(ctx.saved_tensors[0])
            torch.set_rng_state(now)
            return solution.RunTwice.backward(ctx, grad)

    return {"recompute": lambda module, x: Again.apply(module, x)}
