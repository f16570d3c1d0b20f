"""What a user may ask for: model, mesh and training, each a frozen dataclass, and every check of
it.

Rules   A check that fails raises ConfigError with one sentence: option, value, rule, a value that
        works. All checks of options live here; data.py and checkpoint.py check what they find in
        files.
Read    ModelConfig -> PRESETS -> MeshConfig -> TrainConfig -> check_run
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float64")
IMPLS = ("plain", "fused")
OPTIMIZERS = ("adamw", "sgd")
DP_STEPS = ("naive", "overlapped", "bucketed", "silent")


class ConfigError(Exception):
    """A sentence about something the user can mend: option, value, rule, a value that works."""


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)


def _require_positive(config: object, **options: str) -> None:
    """Every named field must be at least 1."""
    for field, option in options.items():
        value = getattr(config, field)
        _require(value >= 1, f"{option} {value} must be at least 1; try {option} 1.")


# ---- the model


@dataclass(frozen=True)
class ModelConfig:
    """A Llama; experts > 0 makes every MLP a mixture of experts. Sizes in elements."""

    name: str = "custom"
    vocab_size: int = 0  # 0: as many as the tokenizer needs
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn_size: int = 352
    experts: int = 0
    top_k: int = 2
    tied: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    head_size: int = 0  # 0: hidden_size / heads

    def __post_init__(self) -> None:
        _require_positive(
            self, hidden_size="--hidden-size", layers="--layers", heads="--heads",
            kv_heads="--kv-heads", ffn_size="--ffn-size",
        )  # fmt: skip
        _require(
            self.vocab_size >= 0,
            f"--vocab-size {self.vocab_size} must not be negative; 0 takes the tokenizer's own.",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"--kv-heads {self.kv_heads} must divide --heads {self.heads}; try --kv-heads 1.",
        )
        _require(
            self.head_size > 0 or self.hidden_size % self.heads == 0,
            f"--heads {self.heads} must divide --hidden-size {self.hidden_size}; "
            f"try --hidden-size {-(-self.hidden_size // self.heads) * self.heads}.",
        )
        _require(
            self.head_width % 2 == 0,
            f"--heads {self.heads} makes heads {self.head_width} wide, and rotary positions need "
            f"an even width; try --hidden-size {self.heads * (self.head_width + 1)}.",
        )
        _require(
            self.experts == 0 or 1 <= self.top_k <= self.experts,
            f"--top-k {self.top_k} must be between 1 and --experts {self.experts}; try --top-k 1.",
        )

    @property
    def head_width(self) -> int:
        """Elements of one attention head."""
        return self.head_size or self.hidden_size // self.heads


PRESETS = {
    "tiny": ModelConfig("tiny"),
    "small": ModelConfig("small", 0, 512, 8, 8, 4, 1408),
    "medium": ModelConfig("medium", 0, 1024, 16, 16, 8, 2816),
    "moe-small": ModelConfig("moe-small", 0, 128, 4, 4, 2, 352, experts=8, top_k=2),
    "llama3-8b": ModelConfig("llama3-8b", 128_256, 4096, 32, 32, 8, 14_336, rope_theta=5e5),
    "llama3-70b": ModelConfig("llama3-70b", 128_256, 8192, 80, 64, 8, 28_672, rope_theta=5e5),
    "llama3-405b": ModelConfig("llama3-405b", 128_256, 16_384, 126, 128, 8, 53_248, rope_theta=5e5),
    # GPT-3's width, depth and heads; ffn 8/3 d, not 4 d: a gated MLP has three matrices
    "gpt3-175b": ModelConfig("gpt3-175b", 50_257, 12_288, 96, 96, 96, 32_768),
    "smollm-1.7b": ModelConfig("smollm-1.7b", 49_152, 2048, 24, 32, 32, 8192, tied=True),
    "llama3.2-1b": ModelConfig(
        "llama3.2-1b", 128_256, 2048, 16, 32, 8, 8192, tied=True, rope_theta=5e5
    ),
}  # fmt: skip


def model_from_file(path: str) -> ModelConfig:
    """Read --config FILE.json: the fields of ModelConfig, others take their defaults."""
    try:
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} must be a readable JSON file: {error}.") from None
    known = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    _require(
        isinstance(fields, dict) and set(fields) <= set(known),
        f"--config {path} must hold an object with only these keys: {', '.join(known)}.",
    )
    for key, value in fields.items():
        good = isinstance(value, known[key]) or (known[key] is float and isinstance(value, int))
        _require(good, f"--config {path}: {key} {value!r} must be of type {known[key].__name__}.")
    return ModelConfig(**fields)


# ---- the mesh


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; ep lies inside dp x cp."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        _require_positive(self, pp="--pp", dp="--dp", cp="--cp", tp="--tp", ep="--ep")
        _require(
            self.dp * self.cp % self.ep == 0,
            f"--ep {self.ep} must divide --dp {self.dp} times --cp {self.cp}; try --ep 1.",
        )

    @property
    def size(self) -> int:
        """How many ranks the mesh has."""
        return self.pp * self.dp * self.cp * self.tp

    def check_world(self, ranks: int) -> None:
        """The mesh must use exactly the ranks there are."""
        rest = self.size // self.dp
        advice = (
            f"--dp {ranks // rest}"
            if ranks % rest == 0
            else f"{rest} ranks or a multiple of {rest}"
        )
        how = "torchrun --nproc-per-node N run.py, or --ranks N, starts N ranks"
        _require(
            self.size == ranks,
            f"--dp {self.dp} with the other axes makes a mesh of {self.size} ranks, "
            f"but there are {ranks}; try {advice} ({how}).",
        )


def check_ranks(threads: int | None) -> None:
    """--ranks, where it was given."""
    good = threads is None or threads >= 1
    _require(good, f"--ranks {threads} must be at least 1; try --ranks 2.")


# ---- training


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Batch sizes in sequences, lengths in tokens, times in seconds."""

    global_batch_size: int = 32
    micro_batch_size: int = 8
    sequence_length: int = 128
    steps: int = 300
    optimizer: str = "adamw"
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0  # 0: no clipping
    dropout: float = 0.0
    dtype: str = "float32"
    reduce_dtype: str = ""  # dtype of gradients on the wire; empty: as they are accumulated
    impl: str = "fused"
    dp_step: str = ""  # empty: naive for plain, silent for fused
    bucket_mib: float = 64.0
    seed: int = 0
    data: str | None = None
    tokenizer: str = "bytes"
    cache_dir: str = ".cache"
    validation_fraction: float = 0.01
    validate_every: int = 0  # 0: only after the last step
    save_dir: str | None = None
    save_every: int = 0  # 0: only after the last step
    resume: str | None = None  # "latest" or the folder of a checkpoint
    log_file: str | None = None
    sample_tokens: int = 200
    timeout: float = 300.0

    def __post_init__(self) -> None:
        _require_positive(
            self, global_batch_size="--global-batch-size", micro_batch_size="--micro-batch-size",
            sequence_length="--sequence-length", steps="--steps",
        )  # fmt: skip
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        choices = {
            "optimizer": OPTIMIZERS, "dtype": DTYPES, "impl": IMPLS,
            "reduce_dtype": ("", *DTYPES), "dp_step": ("", *DP_STEPS),
        }  # fmt: skip
        for field, allowed in choices.items():
            value, option = getattr(self, field), "--" + field.replace("_", "-")
            names = ", ".join(filter(None, allowed))
            _require(value in allowed, f"{option} {value} is not one of {names}.")

    def _check_ranges(self) -> None:
        for field in ("lr", "timeout", "bucket_mib"):
            value, option = getattr(self, field), "--" + field.replace("_", "-")
            _require(value > 0, f"{option} {value:g} must be above 0; try {option} 1.")
        counts = ("warmup_steps", "validate_every", "save_every", "sample_tokens", "seed")
        for field in (*counts, "min_lr", "weight_decay", "clip"):
            value, option = getattr(self, field), "--" + field.replace("_", "-")
            _require(value >= 0, f"{option} {value:g} must not be negative; try {option} 0.")
        for field in ("dropout", "validation_fraction"):
            value, option = getattr(self, field), "--" + field.replace("_", "-")
            _require(
                0 <= value < 1,
                f"{option} {value:g} must be at least 0 and below 1; try {option} 0.1.",
            )
        _require(
            self.min_lr <= self.lr,
            f"--min-lr {self.min_lr:g} must not exceed --lr {self.lr:g}; "
            f"try --min-lr {self.lr / 10:g}.",
        )
        _require(
            not self.reduce_dtype or self.sync_step in ("bucketed", "silent"),
            f"--reduce-dtype {self.reduce_dtype} needs buckets, which --dp-step {self.sync_step} "
            "has not; try --dp-step silent.",
        )
        _require(
            self.save_every == 0 or self.save_dir is not None,
            f"--save-every {self.save_every} needs a folder; add --save-dir runs/mine.",
        )
        _require(
            self.resume != "latest" or self.save_dir is not None,
            "--resume without a folder looks into --save-dir; add --save-dir runs/mine, or name "
            "the checkpoint.",
        )

    @property
    def sync_step(self) -> str:
        """The step of data_parallel.py that sums the gradients."""
        return self.dp_step or {"plain": "naive", "fused": "silent"}[self.impl]

    def micro_batches(self, replicas: int) -> int:
        """Micro-batches per rank and step when `replicas` ranks share the global batch."""
        share = self.micro_batch_size * replicas
        _require(
            self.global_batch_size % share == 0,
            f"--global-batch-size {self.global_batch_size} must be a multiple of "
            f"--micro-batch-size {self.micro_batch_size} times {replicas} data-parallel ranks; "
            f"try --global-batch-size {max(1, self.global_batch_size // share) * share}.",
        )
        return self.global_batch_size // share
