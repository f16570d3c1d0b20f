"""Hugging Face folders: transformers' own Llama and ours give the same logits, both ways."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from picotron_lab import hugging_face
from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.model import Llama

VOCABULARY = 96
TOKENS_BT = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
KINDS = {  # hidden size, heads, kv heads, head width, tied
    "grouped": (64, 4, 2, 16, False),
    "tied": (64, 4, 4, 16, True),
    "wide heads": (48, 4, 1, 20, False),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def their_model(kind):
    """A LlamaForCausalLM with random weights of deviation 0.1, norm weights too."""
    transformers = pytest.importorskip("transformers")
    hidden, heads, kv_heads, width, tied = KINDS[kind]
    config = transformers.LlamaConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": width, "tie_word_embeddings": tied, "rms_norm_eps": 1e-3,
        "rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    })  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return randomise(model)


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = noise + ("norm" in name)
    return model


def our_config(kind):
    hidden, heads, kv_heads, width, tied = KINDS[kind]
    return ModelConfig(
        "mine", VOCABULARY, hidden, 3, heads, kv_heads, 80, tied=tied, rope_theta=500.0,
        norm_eps=1e-3, head_size=width,
    )  # fmt: skip


def our_model(cfg, tensors):
    model = Llama(cfg)
    if cfg.tied:
        tensors = {**tensors, "head.weight": tensors["embed.weight"]}
    model.load_state_dict(tensors)
    return model


def their_logits(model):
    with torch.no_grad():
        return model(TOKENS_BT).logits


def assert_same_logits(ours, theirs):
    with torch.no_grad():
        got = ours(TOKENS_BT)
    assert got.std() > 0.1
    torch.testing.assert_close(got, their_logits(theirs), rtol=1e-5, atol=1e-5)


def read(folder):
    cfg = hugging_face.read_config(folder)
    return our_model(cfg, hugging_face.read_tensors(folder, cfg))


# ---- import


@EVERY_KIND
def test_their_folder_read_by_us_gives_their_logits(tmp_path, kind):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path / "hf")
    assert_same_logits(read(tmp_path / "hf"), theirs)


@EVERY_KIND
def test_a_folder_of_several_files_is_read_too(tmp_path, kind):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_logits(read(tmp_path), theirs)


def test_config_of_transformers_4(tmp_path):
    """rope_theta beside null rope_scaling, no head_dim, as the Llama files of 2024 have it."""
    fields = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 288, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 768,
        "rms_norm_eps": 1e-5, "rope_theta": 2000.0, "rope_scaling": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = ModelConfig(tmp_path.name, 32000, 288, 6, 6, 6, 768, rope_theta=2000.0)
    assert hugging_face.read_config(tmp_path) == expected
    del fields["rope_theta"], fields["num_key_value_heads"]  # the first Llama: theta was fixed
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert hugging_face.read_config(tmp_path).rope_theta == 10_000.0
    assert hugging_face.read_config(tmp_path).kv_heads == 6


# ---- export


@EVERY_KIND
def test_our_folder_opened_by_transformers_gives_our_logits(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    cfg = our_config(kind)
    ours = randomise(Llama(cfg))
    hugging_face.export(cfg, dict(ours.named_parameters()), tmp_path / "new" / "hf")
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "new" / "hf", output_loading_info=True, local_files_only=True
    )
    assert not any(report.values()), report  # no weight is missing, unknown or misshapen
    assert theirs.dtype == torch.float32
    assert_same_logits(ours, theirs)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]


@EVERY_KIND
def test_export_then_import_is_the_identity(tmp_path, kind):
    cfg = our_config(kind)
    tensors = {name: p.data.bfloat16() for name, p in randomise(Llama(cfg)).named_parameters()}
    folder = tmp_path / "mine"
    folder.mkdir()  # an empty folder may be filled
    hugging_face.export(cfg, tensors, folder)
    again = hugging_face.read_config(folder)
    assert again.head_width == cfg.head_width
    assert {**vars(again), "head_size": 0} == {**vars(cfg), "head_size": 0}
    read = hugging_face.read_tensors(folder, again)
    assert list(read) == list(tensors)
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, tensors[n]) for n, x in read.items())
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not cfg.tied)


def test_config_json_speaks_to_transformers_4_and_5(tmp_path):
    cfg = our_config("grouped")
    hugging_face.export(cfg, dict(Llama(cfg).named_parameters()), tmp_path / "hf", None, 512)
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 500.0
    assert fields["torch_dtype"] == fields["dtype"] == "float32"
    assert fields["max_position_embeddings"] == 512
    assert fields["bos_token_id"] is None and fields["eos_token_id"] is None


def test_the_tokenizer_goes_along(tmp_path):
    """Without tokenizer_config.json, transformers 4 would put Llama's own space before the text."""
    transformers = pytest.importorskip("transformers")
    tokenizer = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the old man and the sea"] * 5, 270, show_progress=False)
    tokenizer.save(str(tmp_path / "bpe.json"))
    cfg = our_config("tied")
    weights = dict(Llama(cfg).named_parameters())
    hugging_face.export(cfg, weights, tmp_path / "hf", tmp_path / "bpe.json")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert opened("the sea")["input_ids"] == tokenizer.encode("the sea").ids


# ---- sentences


def exported(folder, kind="grouped"):
    cfg = our_config(kind)
    hugging_face.export(cfg, dict(randomise(Llama(cfg)).named_parameters()), folder)
    return cfg, folder


def refused(words, function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_export_overwrites_nothing(tmp_path):
    cfg, folder = exported(tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = dict(Llama(cfg).named_parameters())
    refused(f"--hf {folder} exists", hugging_face.export, cfg, weights, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    file = folder / "config.json"
    refused(f"--hf {file} exists", hugging_face.export, cfg, weights, file)
    refused("could not be written", hugging_face.export, cfg, weights, file / "below")


def test_export_refuses_what_a_llama_cannot_hold(tmp_path):
    folder, cfg = tmp_path / "hf", our_config("grouped")
    weights = dict(Llama(cfg).named_parameters())
    experts = ModelConfig("moe", VOCABULARY, experts=4)
    refused("a model with 4 experts", hugging_face.export, experts, {}, folder)
    odd = ModelConfig("odd", VOCABULARY, 66, heads=4, head_size=16)
    refused("hidden size 66 is not a multiple of its 4 heads", hugging_face.export, odd, {}, folder)
    wrong = {**weights, "norm.weight": torch.zeros(63)}
    refused("norm.weight is (63,), but", hugging_face.export, cfg, wrong, folder)
    del wrong["norm.weight"]
    refused("norm.weight is missing, but", hugging_face.export, cfg, wrong, folder)
    assert not list(tmp_path.iterdir())


CHANGES = [
    ({"model_type": "mistral"}, "model_type 'mistral', but only 'llama'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "of type 'yarn'"),
    ({"attention_bias": True}, "sets attention_bias"),
    ({"mlp_bias": True}, "sets mlp_bias"),
    ({"quantization_config": {"quant_method": "fp8"}}, "sets quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu', but only 'silu'"),
    ({"hidden_size": None}, "hidden_size None, where a positive integer is needed"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers '3', where a positive integer"),
    ({"num_key_value_heads": 3}, "--kv-heads 3 must divide --heads 4"),
]


@pytest.mark.parametrize("changes, words", CHANGES)
def test_config_that_is_not_our_llama_is_refused(tmp_path, changes, words):
    _, folder = exported(tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(words, hugging_face.read_config, folder)


def test_missing_or_damaged_files_are_named(tmp_path):
    refused("nowhere/config.json cannot be read", hugging_face.read_config, tmp_path / "nowhere")
    cfg, folder = exported(tmp_path / "hf")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused("model.safetensors gives no weight", hugging_face.read_tensors, folder, cfg)
    weights.unlink()
    refused("index.json cannot be read", hugging_face.read_tensors, folder, cfg)
    (folder / "config.json").write_text("[1, 2")
    refused("config.json cannot be read", hugging_face.read_config, folder)


def test_missing_and_misshapen_weights_are_named(tmp_path):
    cfg, folder = exported(tmp_path / "hf")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**stored, name: torch.zeros(80, 63)}, folder / "model.safetensors")
    refused(f"{name} is (80, 63), but config.json needs (80, 64)",
            hugging_face.read_tensors, folder, cfg)  # fmt: skip
    del stored[name]
    save_file(stored, folder / "model.safetensors")
    refused(f"model.safetensors gives no weight {name}", hugging_face.read_tensors, folder, cfg)


def test_a_gap_in_a_folder_of_several_files_is_named(tmp_path):
    their_model("grouped").save_pretrained(tmp_path, max_shard_size="50KB")
    cfg = hugging_face.read_config(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("lm_head.weight")
    shutil.move(tmp_path / file, tmp_path / "elsewhere")
    refused(f"{file} gives no weight", hugging_face.read_tensors, tmp_path, cfg)
    shutil.move(tmp_path / "elsewhere", tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("index.json gives no weight lm_head", hugging_face.read_tensors, tmp_path, cfg)
