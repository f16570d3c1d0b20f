"""Hugging Face Llama folders: our models written into them, theirs read from them.

Idea    Both sides are the same model under other names: HF's rotary embedding, like ours, turns
        channel i together with channel i + C/2, so that no weight needs a permutation.
Disk    config.json                    the sizes, for transformers 4 and 5, whose keys differ
        model.safetensors              all weights; or, only when reading, several files and
        model.safetensors.index.json   which weight is in which of them
        tokenizer.json                 copied, where the model was trained with one
Atomic  An export is written into FOLDER.partial, then renamed. Nothing is overwritten.
Not     experts, biases, scaled rotary positions, quantised weights: refused by name
Read    LAYER -> export; read_config -> read_tensors
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from picotron_lab.config import ConfigError, ModelConfig
from picotron_lab.model import Llama

# ours: theirs, of single modules, of those in a layer, and of sizes
WHOLE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "ffn_size": "intermediate_size",
}  # fmt: skip


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


def _their_name(name: str) -> str:
    """layers.3.mlp.up.weight -> model.layers.3.mlp.up_proj.weight"""
    module = name.removesuffix(".weight")
    if module in WHOLE:
        return f"{WHOLE[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{our name: shape} of every weight; with tied embeddings there is no head."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(cfg).named_parameters()}


# ---- export


def export(
    cfg: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    tokenizer_file: Path | None = None,
    max_positions: int = 2048,
) -> None:
    """Write a folder that LlamaForCausalLM.from_pretrained opens.

    tensors         the full weights under the names of model.named_parameters(), in one dtype
    tokenizer_file  a tokenizer.json to copy
    max_positions   tokens, what config.json promises; the model itself sets no limit
    Raises ConfigError for what Llama cannot hold, and for a folder that is not empty.
    """
    _check_export(cfg, tensors, folder)
    partial = folder.absolute().with_name(f"{folder.absolute().name}.partial")
    theirs = {_their_name(name): tensors[name].detach().cpu().contiguous() for name in _shapes(cfg)}
    fields = _config(cfg, str(tensors["embed.weight"].dtype)[6:], max_positions)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(theirs, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(fields, indent=2))
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial / "tokenizer.json")
            kind = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
            (partial / "tokenizer_config.json").write_text(kind)
        partial.rename(folder.absolute())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--hf {folder} could not be written ({error}): choose a folder with room, such as "
            "--hf my-llama."
        ) from None


def _check_export(cfg: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    _require(free, f"--hf {folder} exists, and an export overwrites nothing: name a new folder.")
    _require(cfg.experts == 0, f"a model with {cfg.experts} experts cannot be exported: a Llama of "
             "Hugging Face has none; train one with --experts 0.")  # fmt: skip
    _require(cfg.hidden_size % cfg.heads == 0, f"transformers opens no Llama whose hidden size "
             f"{cfg.hidden_size} is not a multiple of its {cfg.heads} heads.")  # fmt: skip
    for name, shape in _shapes(cfg).items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        _require(found == shape, f"the weight {name} is {found}, but the model needs {shape}.")


def _config(cfg: ModelConfig, dtype: str, max_positions: int) -> dict:
    """config.json; transformers 4 reads rope_theta and torch_dtype, 5 rope_parameters and dtype."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "max_position_embeddings": max_positions,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": cfg.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# ---- import


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a Hugging Face Llama; ConfigError for what our Llama does not do."""
    path = folder / "config.json"
    fields = _read_json(path)
    kind = fields.get("model_type")
    _require(kind == "llama", f"{path} has model_type {kind!r}, but only 'llama' can be read.")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        _require(not fields.get(key), f"{path} sets {key}, but only Llamas without it can be read.")
    act = fields.get("hidden_act", "silu")
    _require(act == "silu", f"{path} has hidden_act {act!r}, but only 'silu' can be read.")
    sizes = {ours: fields.get(theirs) for ours, theirs in SIZES.items()}
    for ours, size in sizes.items():
        good = type(size) is int and size > 0
        _require(good, f"{path} has {SIZES[ours]} {size!r}, where a positive integer is needed.")
    width = fields.get("head_dim") or 0
    return ModelConfig(
        name=folder.absolute().name,
        **sizes,
        kv_heads=fields.get("num_key_value_heads") or sizes["heads"],
        head_size=0 if width * sizes["heads"] == sizes["hidden_size"] else width,
        tied=bool(fields.get("tie_word_embeddings", False)),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(fields, path),
    )


def _rope_theta(fields: dict, path: Path) -> float:
    """The base of the rotary angles, unless these are scaled."""
    theta = fields.get("rope_theta") or 10_000.0
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.get(key) or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        _require(kind == "default", f"{path} has {key} of type {kind!r}, but rotary positions can "
                 "be read only unscaled, as type 'default'.")  # fmt: skip
        theta = rope.get("rope_theta") or theta
    return float(theta)


def read_tensors(folder: Path, cfg: ModelConfig) -> dict[str, Tensor]:
    """The weights under our names, in their stored dtype; ConfigError for one that does not fit."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = {} if single.exists() else _read_json(index).get("weight_map", {})
    tensors = {}
    for name, shape in _shapes(cfg).items():
        theirs = _their_name(name)
        path = single if single.exists() else folder / files.get(theirs, index.name)
        try:
            with safe_open(path, "pt") as file:
                found = tuple(file.get_slice(theirs).get_shape())
                tensors[name] = file.get_tensor(theirs)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} gives no weight {theirs} ({error}).") from None
        _require(found == shape, f"{path}: {theirs} is {found}, but config.json needs {shape}.")
    return tensors


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): --hf must be a folder with config.json and "
            "model.safetensors, as save_pretrained writes it."
        ) from None
