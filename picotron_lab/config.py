"""What a user may ask for: model, mesh and training, each a frozen dataclass, with its checks.

Rules   A check that fails raises ConfigError with one sentence: option, value, rule, a value that
        works. What model, mesh and training ask of each other: checks.py; data.py and checkpoint.py
        check what they find in files.
Read    ModelConfig -> PRESETS -> MeshConfig -> TrainConfig
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float64")
IMPLS = ("plain", "fused")
OPTIMIZERS = ("adamw", "sgd")
DP_STEPS = ("naive", "overlapped", "bucketed", "silent")
VOCABULARY = ("none", "naive", "1", "2")
RECOMPUTE = ("none", "selective", "full")
ROUTERS = ("softmax", "sigmoid")
CP_KINDS = ("ring", "zigzag", "all-gather", "ulysses")
TWO_CHUNKS = ("zigzag", "all-gather")  # kinds of which a rank holds an early and a late chunk


class ConfigError(Exception):
    """A sentence about something the user can mend: option, value, rule, a value that works."""


def require(holds: bool, sentence: str) -> None:
    """Raise ConfigError with this sentence unless the rule holds."""
    if not holds:
        raise ConfigError(sentence)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _require_ranges(config: object, ranges: dict[str, tuple[float, float, float]]) -> None:
    """Every field must lie in its range (smallest, largest, a value that works)."""
    for field, (low, high, example) in ranges.items():
        value, option = getattr(config, field), _option(field)
        require(
            low <= value <= high,  # also false for NaN
            f"{option} {value:g} must lie between {low:g} and {high:g}; try {option} {example:g}.",
        )


# ---- the model

MODEL_RANGES = {
    "vocab_size": (0, 2**24, 0), "hidden_size": (1, 2**18, 128), "layers": (1, 10_000, 4),
    "heads": (1, 2**14, 4), "kv_heads": (1, 2**14, 2), "ffn_size": (1, 2**20, 352),
    "experts": (0, 2**14, 0), "top_k": (1, 2**14, 2), "rope_theta": (1, 1e12, 1e4),
    "norm_eps": (1e-12, 1, 1e-5), "head_size": (0, 2**14, 0), "shared_experts": (0, 2**10, 0),
    "expert_groups": (1, 2**14, 1), "top_groups": (1, 2**14, 1), "capacity_factor": (0, 1e6, 1.25),
    "balance_loss": (0, 1e6, 0.001), "balance_speed": (0, 1e3, 0.001), "z_loss": (0, 1e6, 0.001),
}  # fmt: skip
ROUTING = (
    "top_k", "router", "shared_experts", "expert_groups", "top_groups", "capacity_factor",
    "balance_loss", "balance_speed", "z_loss",
)  # fmt: skip


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
    router: str = "softmax"  # scores of experts: softmax or sigmoid (router.py has the options)
    shared_experts: int = 0  # experts that every token goes through, beside its top_k
    expert_groups: int = 1  # neighbouring experts form groups, such as those on one node
    top_groups: int = 1  # groups that a token's experts may lie in
    capacity_factor: float = 0.0  # 0: no token is dropped
    balance_loss: float = 0.0
    balance_speed: float = 0.0  # by which an expert's bias moves per step
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _require_ranges(self, MODEL_RANGES)
        require(
            self.heads % self.kv_heads == 0,
            f"--kv-heads {self.kv_heads} must divide --heads {self.heads}; try --kv-heads 1.",
        )
        require(
            self.head_size > 0 or self.hidden_size % self.heads == 0,
            f"--heads {self.heads} must divide --hidden-size {self.hidden_size}; "
            f"try --hidden-size {-(-self.hidden_size // self.heads) * self.heads}.",
        )
        size = self.heads * (self.head_width + 1)
        advice = f"head_size {self.head_size + 1}" if self.head_size else f"--hidden-size {size}"
        require(
            self.head_width % 2 == 0,
            f"--heads {self.heads} makes heads {self.head_width} wide, and rotary positions need "
            f"an even width; try {advice}.",
        )
        require(
            self.experts == 0 or 1 <= self.top_k <= self.experts,
            f"--top-k {self.top_k} must be between 1 and --experts {self.experts}; try --top-k 1.",
        )
        require(
            self.router in ROUTERS, f"--router {self.router} is not one of {', '.join(ROUTERS)}."
        )
        if self.experts:
            self._check_routing()
        else:
            self._check_no_routing()

    def _check_no_routing(self) -> None:
        for field in ROUTING:
            value = getattr(self, field)
            require(
                value == getattr(ModelConfig, field),  # the default
                f"{_option(field)} {value} is about experts, and the model has none; "
                f"add --experts 8, or leave it out.",
            )

    def _check_routing(self) -> None:
        E, G, M = self.experts, self.expert_groups, self.top_groups
        divisor = max(n for n in range(1, G + 1) if E % n == 0)
        require(
            E % G == 0,
            f"--expert-groups {G} must divide --experts {E}; try --expert-groups {divisor}.",
        )
        require(
            M <= G,
            f"--top-groups {M} cannot be more than --expert-groups {G}; try --top-groups {G}.",
        )
        require(
            self.top_k <= M * (E // G),
            f"--top-k {self.top_k} asks for more experts than --top-groups {M} of {E // G} each "
            f"have; try --top-groups {-(-self.top_k * G // E)}.",
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
    require(
        isinstance(fields, dict) and set(fields) <= set(known),
        f"--config {path} must hold an object with only these keys: {', '.join(known)}.",
    )
    for key, value in fields.items():
        good = type(value) is known[key] or (known[key] is float and type(value) is int)
        require(good, f"--config {path}: {key} {value!r} must be of type {known[key].__name__}.")
    return ModelConfig(**fields)


# ---- the mesh


MESH_RANGES = {
    "zero": (0, 3, 1), "virtual_stages": (0, 1024, 2),
    **dict.fromkeys(("pp", "dp", "cp", "tp", "ep"), (1, 2**20, 1)),
}  # fmt: skip


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, ep inside dp x cp; and what else is split over them."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 0  # stage of ZeRO, over dp x cp
    cp_kind: str = ""  # of attention over cp; empty: ring for plain, zigzag for fused
    sequence_parallel: bool = False  # over tp
    vocab_parallel: str = ""  # over tp; empty: naive for plain, 2 for fused
    schedule: str = "1f1b"  # of the pipeline
    virtual_stages: int = 0  # stages per pipeline rank; 0: the schedule's own number
    pp_layers: str = "even"  # even, balanced, or the layers of every stage, such as 4,4,4,2
    token_slices: str = "1"  # of every sequence in the pipeline: a number, their lengths, or auto

    def __post_init__(self) -> None:
        _require_ranges(self, MESH_RANGES)
        require(
            self.dp * self.cp % self.ep == 0,
            f"--ep {self.ep} must divide --dp {self.dp} times --cp {self.cp}; try --ep 1.",
        )
        require(
            self.cp_kind in ("", *CP_KINDS),
            f"--cp-kind {self.cp_kind} is not one of {', '.join(CP_KINDS)}.",
        )
        require(
            self.cp_kind == "" or self.cp > 1,
            f"--cp-kind {self.cp_kind} shares the sequence out among context-parallel ranks, and "
            "there is one; try --cp 2 on 2 ranks (--ranks 2), or leave it out.",
        )
        more = 2 * self.pp * self.tp
        require(
            self.zero == 0 or self.dp * self.cp > 1,
            f"--zero {self.zero} shares weights out among data-parallel ranks, and there is one; "
            f"start more ranks, such as --ranks {more}, or leave --zero out.",
        )
        require(
            not self.sequence_parallel or self.tp > 1,
            "--sequence-parallel shares the sequence out among tensor-parallel ranks, and there is "
            "one; try --tp 2 on 2 ranks (--ranks 2), or leave it out.",
        )
        require(
            self.vocab_parallel in ("", *VOCABULARY),
            f"--vocab-parallel {self.vocab_parallel} is not one of {', '.join(VOCABULARY)}.",
        )
        require(
            self.vocab_parallel in ("", "none") or self.tp > 1,
            f"--vocab-parallel {self.vocab_parallel} shares the vocabulary out among "
            "tensor-parallel ranks, and there is one; try --tp 2 on 2 ranks (--ranks 2), or leave "
            "it out.",
        )
        self._check_pipeline()

    def _check_pipeline(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field in ("schedule", "virtual_stages", "pp_layers", "token_slices"):
            value = getattr(self, field)
            require(
                self.pp > 1 or value == defaults[field],
                f"{_option(field)} {value} is about pipeline stages, and there is one; try --pp 2 "
                "on 2 ranks (--ranks 2), or leave it out.",
            )

    def vocabulary(self, impl: str) -> str:
        """How the output layer is split over tp: none (logits gathered), naive, 1 or 2."""
        return self.vocab_parallel or {"plain": "naive", "fused": "2"}[impl]

    def context(self, impl: str) -> str:
        """How attention crosses the parts of a sequence: ring, zigzag, all-gather or ulysses."""
        return self.cp_kind or {"plain": "ring", "fused": "zigzag"}[impl]

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
        sizes = {axis: getattr(self, axis) for axis in ("pp", "dp", "cp", "tp")}
        given = " ".join(f"--{axis} {size}" for axis, size in sizes.items() if size > 1)
        how = "torchrun --nproc-per-node N run.py, or --ranks N, starts N ranks"
        require(
            self.size == ranks,
            f"{given or '--dp 1'} makes a mesh of {self.size} ranks, but there are {ranks}; "
            f"try {advice} ({how}).",
        )


# ---- training

TRAIN_RANGES = {
    "global_batch_size": (1, 2**24, 32), "micro_batch_size": (1, 2**24, 8),
    "sequence_length": (1, 2**24, 128), "steps": (1, 1e9, 300), "lr": (1e-12, 1e4, 0.003),
    "warmup_steps": (0, 1e9, 20), "weight_decay": (0, 100, 0.1), "clip": (0, 1e9, 1),
    "dropout": (0, 0.99, 0.1), "bucket_mib": (1e-6, 1e6, 64), "seed": (0, 2**32 - 1, 0),
    "validation_fraction": (0, 0.99, 0.01), "validate_every": (0, 1e9, 100),
    "save_every": (0, 1e9, 100), "sample_tokens": (0, 1e6, 200), "timeout": (1, 1e6, 300),
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Batch sizes in sequences, lengths in tokens, times in seconds."""

    global_batch_size: int = 32
    micro_batch_size: int = 8
    sequence_length: int = 128
    steps: int = 300
    optimizer: str = "adamw"
    lr: float = 3e-3
    min_lr: float | None = None  # None: a tenth of lr
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0  # 0: no clipping
    post_validation: bool = False  # of the clipped step, in pipelines
    dropout: float = 0.0
    recompute: str = "none"
    dtype: str = "float32"
    reduce_dtype: str = ""  # dtype of gradients on the wire; empty: as they are accumulated
    impl: str = "fused"
    dp_step: str = ""  # empty: naive for plain, silent for fused
    bucket_mib: float = 64.0
    seed: int = 0
    data: str | None = None
    tokenizer: str = "bytes"
    tokenizer_file: str = ""  # where a resumed run finds the tokenizer that it began with
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
        _require_ranges(self, TRAIN_RANGES)
        self._check_choices()
        self._check_pairs()

    def _check_choices(self) -> None:
        choices = {
            "optimizer": OPTIMIZERS, "dtype": DTYPES, "impl": IMPLS,
            "reduce_dtype": ("", *DTYPES), "dp_step": ("", *DP_STEPS), "recompute": RECOMPUTE,
        }  # fmt: skip
        for field, allowed in choices.items():
            value, option = getattr(self, field), _option(field)
            names = ", ".join(filter(None, allowed))
            require(value in allowed, f"{option} {value} is not one of {names}.")

    def _check_pairs(self) -> None:
        require(
            0 <= self.final_lr <= self.lr,
            f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr:g}; "
            f"try --min-lr {self.lr / 10:g}.",
        )
        choice, buckets = f"--impl {self.impl}", "--impl fused"
        if self.dp_step:
            choice, buckets = f"--dp-step {self.dp_step}", "--dp-step silent"
        require(
            not self.reduce_dtype or self.sync_step in ("bucketed", "silent"),
            f"--reduce-dtype {self.reduce_dtype} needs buckets, which {choice} has not; try "
            f"{buckets}.",
        )
        require(
            self.save_every == 0 or self.save_dir is not None,
            f"--save-every {self.save_every} needs a folder; add --save-dir runs/mine.",
        )
        require(
            self.resume != "latest" or self.save_dir is not None,
            "--resume without a folder looks into --save-dir; add --save-dir runs/mine, or name "
            "the checkpoint.",
        )

    @property
    def final_lr(self) -> float:
        """The learning rate at the end of the cosine."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def sync_step(self) -> str:
        """The step of data_parallel.py that sums the gradients."""
        return self.dp_step or {"plain": "naive", "fused": "silent"}[self.impl]

    def micro_batches(self, replicas: int) -> int:
        """Micro-batches per rank and step when `replicas` ranks share the global batch."""
        share = self.micro_batch_size * replicas
        require(
            self.global_batch_size % share == 0,
            f"--global-batch-size {self.global_batch_size} must be a multiple of "
            f"--micro-batch-size {self.micro_batch_size} times {replicas} data-parallel ranks; "
            f"try --global-batch-size {max(1, self.global_batch_size // share) * share}.",
        )
        return self.global_batch_size // share
