"""Mutants of the model, its initial weights, the data, the optimizer's choice and the reports."""

import torch

from mutants import killed_by
from picotron_lab import data, fused, model, optim, sharding, state
from picotron_lab.analysis import cost


@killed_by("test_model.py::test_logits_equal_hugging_face_llama")
def rotary_tables_in_bfloat16(patch):
    """Angles lose their digits, also in float32 runs (Picotron's unset DTYPE variable)."""
    original = model.rotary_angles

    def rotary_angles(*args):
        return tuple(table.bfloat16().float() for table in original(*args))

    patch.setattr(model, "rotary_angles", rotary_angles)


@killed_by("test_model.py::test_attention_equals_torch")
def attention_sees_the_future(patch):
    """The mask forgets the diagonal's side: each token also sees the next one."""
    original = torch.Tensor.triu
    patch.setattr(torch.Tensor, "triu", lambda self, diagonal=0: original(self, diagonal + 1))


@killed_by("test_sharding.py::test_a_shard_is_a_slice_of_the_full_parameter")
def every_shard_drawn_from_the_same_seed(patch):
    """Shards are initialised by themselves: all ranks hold copies (Picotron, TP)."""

    def materialise(m, seed, draw, device="cpu", dtype=torch.float32):
        for module in m.modules():
            for key, old in list(module._parameters.items()):
                shape = tuple(stop - start for start, stop in old.record.slices)
                part = draw(old.record.name, shape, torch.Generator().manual_seed(seed))
                new = torch.nn.Parameter(part.to(dtype))
                new.record = old.record
                setattr(module, key, new)

    patch.setattr(sharding, "materialise", materialise)


@killed_by("test_sharding.py::test_initial_weights_do_not_depend_on_order_or_dtype")
def weights_drawn_in_order_from_one_stream(patch):
    """A model with fewer layers, or a stage of it, starts from other weights (Picotron, PP)."""
    stream = torch.Generator().manual_seed(0)
    patch.setattr(sharding, "generator_of", lambda seed, name: stream)


@killed_by("test_run.py::test_resume_continues_exactly")
def data_restarts_on_resume(patch):
    """The resumed run trains on the first batches again (Picotron)."""
    original = state.load

    def load(trainer, manifest):
        original(trainer, manifest)
        micro_batch = trainer.batches.micro_batch
        trainer.batches.micro_batch = lambda step, *rest: micro_batch(step - manifest.step, *rest)

    patch.setattr(state, "load", load)


@killed_by("test_run.py::test_resume_continues_exactly")
def moments_forgotten_on_resume(patch):
    """AdamW starts again from zero moments."""
    patch.setattr(optim, "set_step_count", lambda optimizer, steps: None)


@killed_by("test_data.py::test_one_epoch_predicts_every_token_once")
def last_window_dropped(patch):
    """A ragged end of the text is never trained on."""
    length = data.TokenWindows.__len__
    patch.setattr(data.TokenWindows, "__len__", lambda self: length(self) - 1)


@killed_by("test_optim.py::test_flops_by_hand")
def mfu_counts_the_embedding_lookup(patch):
    """A look-up is counted as a matmul (Picotron)."""
    original = cost.matmul_parameters
    patch.setattr(
        cost, "matmul_parameters", lambda cfg: original(cfg) + cfg.vocab_size * cfg.hidden_size
    )


@killed_by("test_optim.py::test_fused_optimizer_is_really_chosen")
def fused_optimizer_never_chosen(patch):
    """A device is compared with a string, which is never true (Picotron)."""
    original = torch.optim.AdamW
    patch.setattr(
        torch.optim,
        "AdamW",
        lambda *args, fused, foreach, **more: original(*args, foreach=True, **more),
    )


@killed_by("test_model.py::test_chunked_loss_equals_torch[5]")
def chunked_loss_forgets_the_factor(patch):
    """Gradients made in the forward ignore what the loss is multiplied with afterwards."""

    def backward(ctx, factor):
        dx, dw = ctx.saved_tensors
        return dx, dw, None, None, None

    patch.setattr(fused.LinearCrossEntropy, "backward", staticmethod(backward))
