"""Wrong mends of lesson 13: the six programs as they stand are wrong too, which a gate proves."""

import torch

from lessons.kit import mutant


@mutant("13.1", "a sum where a mean belongs")
def only_the_printed_error_is_divided(solution):
    """The loss that is shown is right; what goes backward is not (Picotron)."""

    def pipeline_step(stage, inputs, labels, pp):
        error = solution.pipeline_step(stage, inputs, labels, pp)
        for parameter in stage.parameters():
            parameter.grad *= len(inputs)
        return error

    return {"pipeline_step": pipeline_step}


@mutant("13.1", "every stage divides once more")
def every_stage_divides(solution):
    """What comes from the right was divided there already."""

    def pipeline_step(stage, inputs, labels, pp):
        stages_to_the_right = pp.size - 1 - pp.rank
        error = solution.pipeline_step(stage, inputs, labels, pp)
        for parameter in stage.parameters():
            parameter.grad /= len(inputs) ** stages_to_the_right
        return error

    return {"pipeline_step": pipeline_step}


@mutant("13.2", "before or after the gradient is added")
def summed_before_it_is_accumulated(solution):
    """A tensor's hook sees this micro-batch's gradient alone (Picotron's tutorial, step 5)."""

    def backward_and_sum(losses, parameters, dp):
        for loss in losses[:-1]:
            loss.backward()
        hooks = [parameter.register_hook(dp.all_reduce) for parameter in parameters]
        losses[-1].backward()
        for hook in hooks:
            hook.remove()

    return {"backward_and_sum": backward_and_sum}


@mutant("13.2", "is handed the parameter, not its grad")
def parameter_taken_for_its_gradient(solution):
    """The hook's argument is the parameter (Picotron's DataParallelNaive)."""

    def backward_and_sum(losses, parameters, dp):
        def reduce(parameter):
            dp.all_reduce(parameter.data, out=parameter.data)

        sum(losses[1:], losses[0]).backward()
        for parameter in parameters:
            reduce(parameter)

    return {"backward_and_sum": backward_and_sum}


@mutant("13.2", "summed before")
def summed_again(solution):
    """All of p.grad is summed after every backward."""

    def backward_and_sum(losses, parameters, dp):
        for loss in losses:
            solution.backward_and_sum([loss], parameters, dp)

    return {"backward_and_sum": backward_and_sum}


@mutant("13.2", "only the last micro-batch need send")
def every_microbatch_sends(solution):
    """Each micro-batch's own gradient is summed: right, at m times the price."""

    def backward_and_sum(losses, parameters, dp):
        hooks = [parameter.register_hook(dp.all_reduce) for parameter in parameters]
        for loss in losses:
            loss.backward()
        for hook in hooks:
            hook.remove()

    return {"backward_and_sum": backward_and_sum}


@mutant("13.3", "nothing was summed")
def context_parallel_alone_is_forgotten(solution):
    """Gradients are summed only where there is data parallelism (Picotron)."""

    def synchronise(parameters, dp, cp):
        if dp.size > 1:
            solution.synchronise(parameters, dp, cp)

    return {"synchronise": synchronise}


@mutant("13.3", "a mean where a sum belongs")
def mean_over_context_parallel_ranks(solution):
    """Parts of one sequence are averaged as if each were a sequence."""

    def synchronise(parameters, dp, cp):
        solution.synchronise(parameters, dp, cp)
        for parameter in parameters:
            parameter.grad /= cp.size

    return {"synchronise": synchronise}


@mutant("13.3", "summed over dp, not over cp")
def either_axis(solution):
    """One axis or the other, never both."""

    def synchronise(parameters, dp, cp):
        axis = dp if dp.size > 1 else cp
        for parameter in parameters:
            parameter.grad = axis.all_reduce(parameter.grad)

    return {"synchronise": synchronise}


@mutant("13.3", "nobody needs everybody's gradients")
def gathered_and_added(solution):
    """Right, at the price of n tensors for each."""

    def synchronise(parameters, dp, cp):
        for parameter in parameters:
            rows = cp.all_gather(parameter.grad[None]).sum(0)
            parameter.grad = dp.all_gather(rows[None]).sum(0)

    return {"synchronise": synchronise}


@mutant("13.4", "all ranks drew the same numbers")
def every_rank_draws_its_part(solution):
    """One seed, one part: all parts are copies (Picotron)."""

    def weight_shard(shape, dim, seed, tp):
        outputs, inputs = shape
        part = (outputs // tp.size, inputs) if dim == 0 else (outputs, inputs // tp.size)
        return solution.full_weight(part, seed)

    return {"weight_shard": weight_shard}


@mutant("13.4", "no device alone would have drawn them")
def a_seed_for_each_rank(solution):
    """Parts differ, but a mesh of another size starts from other weights."""

    def weight_shard(shape, dim, seed, tp):
        outputs, inputs = shape
        part = (outputs // tp.size, inputs) if dim == 0 else (outputs, inputs // tp.size)
        return solution.full_weight(part, seed + tp.rank)

    return {"weight_shard": weight_shard}


@mutant("13.4", "the same seed is everywhere")
def rank_0_draws_for_all(solution):
    """Right, and sends what everybody could draw."""

    def weight_shard(shape, dim, seed, tp):
        full = tp.broadcast(solution.full_weight(shape, seed), 0)
        return full.chunk(tp.size, dim)[tp.rank].clone()

    return {"weight_shard": weight_shard}


@mutant("13.4", "keeps the whole weight alive")
def a_view_of_the_full_weight(solution):
    """The part is right, and the rest is not freed."""

    def weight_shard(shape, dim, seed, tp):
        return solution.full_weight(shape, seed).chunk(tp.size, dim)[tp.rank]

    return {"weight_shard": weight_shard}


@mutant("13.5", "which names does your condition miss?")
def final_norm_is_forgotten(solution):
    """Norms of layers, and biases, but not the last norm (Megatron-LM issue 1446)."""

    def finish_gradients(parameters, cut, tp):
        layers = {name: p for name, p in parameters.items() if name.startswith("layers.")}
        solution.finish_gradients(layers, cut, tp)

    return {"finish_gradients": finish_gradients}


@mutant("13.5", "which are of different rows")
def everything_is_summed(solution):
    """Cut weights too, of which each rank has other rows."""

    def finish_gradients(parameters, cut, tp):
        solution.finish_gradients(parameters, set(), tp)

    return {"finish_gradients": finish_gradients}


@mutant("13.5", "they are few: send them flat")
def a_call_for_every_gradient(solution):
    """Right, one message after the other."""

    def finish_gradients(parameters, cut, tp):
        for name in parameters:
            if name not in cut:
                solution.finish_gradients({name: parameters[name]}, cut, tp)

    return {"finish_gradients": finish_gradients}


@mutant("13.5", "8 bytes for each shared number")
def cut_gradients_travel_too(solution):
    """Everything is summed in one call, and what is not partial is put back."""

    def finish_gradients(parameters, cut, tp):
        own = {name: parameters[name].grad.clone() for name in cut}
        solution.finish_gradients(parameters, set(), tp)
        for name, gradient in own.items():
            parameters[name].grad = gradient

    return {"finish_gradients": finish_gradients}


@mutant("13.6", "when the two ends met")
def data_parallel_first(solution):
    """The stages exchange what has been reduce-scattered before (Megatron-LM issue 844)."""

    def reduce_with_tied(buffer, tied, dp, ends):
        size = len(buffer) // dp.size
        mine = slice(dp.rank * size, (dp.rank + 1) * size)
        buffer[mine] = dp.reduce_scatter(buffer)
        buffer[tied] = ends.all_reduce(buffer[tied])
        return buffer[mine]

    return {"reduce_with_tied": reduce_with_tied}


@mutant("13.6", "were never added")
def stages_never_meet(solution):
    """Each stage takes its own gradient of the shared weight."""

    def reduce_with_tied(buffer, tied, dp, ends):
        return dp.reduce_scatter(buffer)

    return {"reduce_with_tied": reduce_with_tied}


@mutant("13.6", "an all_reduce brings every rank all parts")
def summed_everywhere_first(solution):
    """Right: the whole sum over dp, then over ends, then my part."""

    def reduce_with_tied(buffer, tied, dp, ends):
        total = dp.all_reduce(buffer)
        total[tied] = ends.all_reduce(total[tied])
        return total.chunk(dp.size)[dp.rank].clone()

    return {"reduce_with_tied": reduce_with_tied}


@mutant("13.6", "need not travel between them")
def the_whole_buffer_meets(solution):
    """Right: zeros travel where the stages share nothing."""

    def reduce_with_tied(buffer, tied, dp, ends):
        wide = torch.zeros(2 * len(buffer), dtype=buffer.dtype)
        wide[: tied.stop - tied.start] = buffer[tied]
        buffer[tied] = ends.all_reduce(wide)[: tied.stop - tied.start]
        return dp.reduce_scatter(buffer)

    return {"reduce_with_tied": reduce_with_tied}
