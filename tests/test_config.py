"""Every wrong option gives one sentence that names option, value, rule and a value that works."""

import json

import pytest

from picotron_lab.checks import check_run
from picotron_lab.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    model_from_file,
)


def together(model=None, mesh=None, **training):
    """Check a model (8 heads, 4 of keys and values), a mesh and training options together."""
    model = {"hidden_size": 64, "heads": 8, "kv_heads": 4, **(model or {})}
    training = {"global_batch_size": 24, "micro_batch_size": 1, **training}
    check_run(ModelConfig(**model), MeshConfig(**(mesh or {})), TrainConfig(**training))


WRONG = {
    "--kv-heads 3 must divide --heads 4": lambda: ModelConfig(heads=4, kv_heads=3),
    "--heads 3 must divide --hidden-size 128; try --hidden-size 129": lambda: ModelConfig(
        heads=3, kv_heads=1
    ),
    "--heads 4 makes heads 3 wide": lambda: ModelConfig(hidden_size=12, heads=4, kv_heads=1),
    "--layers 0 must lie between 1 and 10000; try --layers 4": lambda: ModelConfig(layers=0),
    "--vocab-size -1 must lie between 0": lambda: ModelConfig(vocab_size=-1),
    "--top-k 5 must be between 1 and --experts 4": lambda: ModelConfig(experts=4, top_k=5),
    "--dp 0 must lie between 1": lambda: MeshConfig(dp=0),
    "--ep 3 must divide --dp 4": lambda: MeshConfig(dp=4, ep=3),
    "--dp 4 makes a mesh of 4 ranks, but there are 2; try --dp 2": lambda: (
        MeshConfig(dp=4).check_world(2)
    ),
    "--tp 2 makes a mesh of 2 ranks, but there are 3; try 2 ranks or a multiple of 2": lambda: (
        MeshConfig(tp=2).check_world(3)
    ),
    "--steps 0 must lie between 1 and 1e+09; try --steps 300": lambda: TrainConfig(steps=0),
    "--optimizer lion is not one of adamw, sgd": lambda: TrainConfig(optimizer="lion"),
    "--dtype float16 is not one of float32, bfloat16, float64": lambda: TrainConfig(
        dtype="float16"
    ),
    "--dp-step fast is not one of naive, overlapped": lambda: TrainConfig(dp_step="fast"),
    "--lr 0 must lie between": lambda: TrainConfig(lr=0),
    "--clip -1 must lie between 0": lambda: TrainConfig(clip=-1),
    "--dropout 1 must lie between 0 and 0.99": lambda: TrainConfig(dropout=1),
    "--min-lr 0.1 must lie between 0 and --lr 0.01; try --min-lr 0.001": lambda: TrainConfig(
        lr=0.01, min_lr=0.1
    ),
    "--lr nan must lie between": lambda: TrainConfig(lr=float("nan")),
    "--timeout inf must lie between": lambda: TrainConfig(timeout=float("inf")),
    "--seed 1e+23 must lie between 0 and 4.29497e+09": lambda: TrainConfig(seed=10**23),
    "--experts -1 must lie between 0": lambda: ModelConfig(experts=-1),
    "--hidden-size 1e+12 must lie between": lambda: ModelConfig(hidden_size=10**12),
    "--rope-theta nan must lie between": lambda: ModelConfig(rope_theta=float("nan")),
    "--norm-eps -1 must lie between": lambda: ModelConfig(norm_eps=-1.0),
    "an even width; try head_size 4": lambda: ModelConfig(head_size=3),
    "--save-every 5 needs a folder; add --save-dir": lambda: TrainConfig(save_every=5),
    "--resume without a folder": lambda: TrainConfig(resume="latest"),
    "--reduce-dtype bfloat16 needs buckets, which --dp-step naive has not; try --dp-step silent": (
        lambda: TrainConfig(reduce_dtype="bfloat16", dp_step="naive")
    ),
    "--reduce-dtype bfloat16 needs buckets, which --impl plain has not; try --impl fused": (
        lambda: TrainConfig(reduce_dtype="bfloat16", impl="plain")
    ),
    "must be a multiple of --micro-batch-size 5 times 3 data-parallel ranks; "
    "try --global-batch-size 30": lambda: TrainConfig(
        global_batch_size=32, micro_batch_size=5
    ).micro_batches(3),
    "try --global-batch-size 8": lambda: TrainConfig(
        global_batch_size=4, micro_batch_size=8
    ).micro_batches(1),
    "--recompute some is not one of none, selective, full": lambda: TrainConfig(recompute="some"),
    "--zero 4 must lie between 0 and 3; try --zero 1": lambda: MeshConfig(dp=2, zero=4),
    "--zero 2 shares weights out among data-parallel ranks, and there is one; start "
    "more ranks, such as --ranks 4, or leave --zero out": lambda: (
        MeshConfig(tp=2, zero=2)
    ),
    "--sequence-parallel shares the sequence out among tensor-parallel ranks, and there is one; "
    "try --tp 2 on 2 ranks": lambda: MeshConfig(dp=2, sequence_parallel=True),
    "--vocab-parallel 3 is not one of none, naive, 1, 2": lambda: MeshConfig(
        tp=2, vocab_parallel="3"
    ),
    "--vocab-parallel 2 shares the vocabulary out among tensor-parallel ranks, and there is one; "
    "try --tp 2 on 2 ranks": lambda: MeshConfig(vocab_parallel="2"),
    "--tp 3 must divide the model's 8 attention heads; try --tp 4 or 8": lambda: together(
        mesh={"tp": 3}
    ),
    "--tp 3 must divide the model's 2 key/value heads, or be a multiple of their number; "
    "try --tp 2 or 6": lambda: together(
        {"hidden_size": 48, "heads": 6, "kv_heads": 2}, {"tp": 3}
    ),
    "--tp 4 splits a vocabulary of 3, which has too few entries; try --tp 3": lambda: together(
        {"vocab_size": 3}, {"tp": 4}
    ),
    "--vocab-parallel none cannot split an output layer that is tied to the embedding over --tp 2; "
    "try --vocab-parallel 2": lambda: together(
        {"tied": True}, {"tp": 2, "vocab_parallel": "none"}
    ),
    "--sequence-length 30 must be a multiple of 4 with --tp 4 --sequence-parallel; "
    "try --sequence-length 32": lambda: together(
        None, {"tp": 4, "sequence_parallel": True}, sequence_length=30
    ),
    "--cp-kind spiral is not one of ring, zigzag, all-gather, ulysses": lambda: MeshConfig(
        cp=2, cp_kind="spiral"
    ),
    "--cp-kind ring shares the sequence out among context-parallel ranks, and there is one; "
    "try --cp 2 on 2 ranks": lambda: MeshConfig(dp=2, cp_kind="ring"),
    "--sequence-length 20 must be a multiple of 8 with --cp 4 --cp-kind zigzag; "
    "try --sequence-length 24": lambda: together(None, {"cp": 4}, sequence_length=20),
    "--sequence-length 4 must be a multiple of 8 with --cp 2 --cp-kind ring "
    "--tp 4 --sequence-parallel; try --sequence-length 8": lambda: together(
        None, {"cp": 2, "cp_kind": "ring", "tp": 4, "sequence_parallel": True}, sequence_length=4
    ),
    "--sequence-length 20 must be a multiple of 3 with --cp 3 --cp-kind ring; "
    "try --sequence-length 21": lambda: together(
        None, {"cp": 3, "cp_kind": "ring"}, sequence_length=20
    ),
    "--sequence-length 20 must be a multiple of 12 with --cp 3 --cp-kind zigzag "
    "--tp 4 --sequence-parallel; try --sequence-length 24": lambda: together(
        None, {"cp": 3, "tp": 4, "sequence_parallel": True}, sequence_length=20
    ),
    "--cp 4 with --cp-kind ulysses must divide the 2 attention heads of a tensor-parallel rank, "
    "and divide its 1 key/value heads or be a multiple of their number; try --cp-kind zigzag":
    lambda: together({"kv_heads": 2}, {"cp": 4, "tp": 4, "cp_kind": "ulysses"}),
    "--capacity-factor 1.5 drops tokens in the order of their sequence, which --cp 2 cuts":
    lambda: together({"experts": 4, "capacity_factor": 1.5}, {"cp": 2}),
    "--ep 2 shares experts out, and this model has none; try --experts 8": lambda: together(
        None, {"dp": 2, "ep": 2}
    ),
    "--ep 4 is more than there are experts; try --ep 2": lambda: together(
        {"experts": 2}, {"dp": 4, "ep": 4}
    ),
    "--dp-step naive sums gradients on every rank, and --zero 1 has its own way": lambda: together(
        None, {"dp": 2, "zero": 1}, dp_step="naive"
    ),
    "micro-batch-size 1 times 5 data-parallel ranks": lambda: together(None, {"dp": 5}),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_options_get_a_sentence(sentence):
    with pytest.raises(ConfigError) as caught:
        WRONG[sentence]()
    message = str(caught.value)
    assert sentence in message
    assert message.endswith((".", ").")) and "\n" not in message


def test_a_lower_lr_needs_no_min_lr():
    assert TrainConfig(lr=1e-5).final_lr == pytest.approx(1e-6)
    assert TrainConfig(lr=1e-5, min_lr=0).final_lr == 0


def test_micro_batches():
    assert TrainConfig(global_batch_size=24, micro_batch_size=2).micro_batches(3) == 4


def test_model_from_file(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"layers": 3, "rope_theta": 500000}))
    assert model_from_file(str(path)).layers == 3
    for text, sentence in [
        ('{"layer": 3}', "only these keys: name, vocab_size"),
        ('{"layers": "3"}', "layers '3' must be of type int"),
        ('{"layers": true}', "layers True must be of type int"),
        ('{"head_size": -2}', "--head-size -2 must lie between 0"),
        ("{", "must be a readable JSON file"),
        ("[]", "must hold an object"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            model_from_file(str(path))
    with pytest.raises(ConfigError, match="must be a readable JSON file"):
        model_from_file(str(tmp_path / "none.json"))


def test_meshes_that_work():
    """Heads shared by 1, 2, 4 and 8 ranks; with 4 key/value heads, 8 ranks share them in pairs."""
    for tp in (1, 2, 4, 8):
        together(None, {"tp": tp, "sequence_parallel": tp > 1})
    together({"hidden_size": 48, "heads": 6, "kv_heads": 1}, {"tp": 3, "dp": 2, "zero": 3})
    together({"tied": True, "vocab_size": 4}, {"tp": 4})
