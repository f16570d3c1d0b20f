"""The command line: parses, then calls.

python run.py                                train a tiny model on this Python's own library
python run.py --ranks 4                      the same with 4 data-parallel ranks as threads
torchrun --nproc-per-node 4 run.py --dp 4    the same with 4 processes, one per GPU if any
torchrun --nproc-per-node 4 run.py --tp 2 --sequence-parallel --zero 1
torchrun --nproc-per-node 4 run.py --cp 4 --model moe-small --ep 4
torchrun --nproc-per-node 4 run.py --pp 4 --schedule zb-h1 --micro-batch-size 2
python run.py verify                         every technique beside one device
python run.py schedule zb-h1 --pp 4          what each pipeline rank does when, and holds
python run.py plan --model llama3-70b --gpus 640 --hardware h100    the fastest meshes that fit
python run.py dryrun --model llama3-70b --gpus 640 --tp 8 --pp 4 --dtype bfloat16

Torch is imported by the commands that compute, so that the others answer at once.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from picotron_lab import checks, config
from picotron_lab.cases import PIPELINES, cases, sample
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from picotron_lab.ledger import CommError

if TYPE_CHECKING:
    from picotron_lab.checkpoint import Manifest

ANALYSES = {"schedule": "show", "plan": "planner_show"}  # command -> file of analysis/
COMMANDS = ("train", "verify", *ANALYSES, "dryrun", "export", "import")
MODEL_OPTIONS = {
    "--vocab-size": (int, "entries of the vocabulary (default: the tokenizer's, rounded up to 64)"),
    "--hidden-size": (int, "width of the residual stream"),
    "--layers": (int, "transformer blocks"),
    "--heads": (int, "query heads"),
    "--kv-heads": (int, "key and value heads"),
    "--ffn-size": (int, "width inside the MLP"),
    "--experts": (int, "experts per layer, 0 for a dense model"),
    "--top-k": (int, "experts that each token is sent to"),
    "--router": (str, "scores of experts: softmax or sigmoid"),
    "--shared-experts": (int, "experts that every token goes through, beside its top-k"),
    "--expert-groups": (int, "groups of neighbouring experts, such as those of one node"),
    "--top-groups": (int, "groups that the experts of one token may lie in"),
    "--capacity-factor": (float, "an expert takes this times its fair share of a sequence, 0: all"),
    "--balance-loss": (float, "weight of the loss that is least when experts are chosen alike"),
    "--balance-speed": (float, "by which an expert's bias moves per step towards a fair share"),
    "--z-loss": (float, "weight of the loss that keeps the router's logits small"),
}
TRAIN_OPTIONS = {
    "--global-batch-size": (int, "sequences per optimizer step, over all ranks"),
    "--micro-batch-size": (int, "sequences that one rank computes at a time"),
    "--sequence-length": (int, "tokens per sequence"),
    "--steps": (int, "optimizer steps, counted from the start of the run, not of a resumed part"),
    "--optimizer": (str, "adamw or sgd"),
    "--lr": (float, "highest learning rate"),
    "--min-lr": (float, "learning rate of the last step"),
    "--warmup-steps": (int, "steps until the highest learning rate"),
    "--weight-decay": (float, "of matrices; norm weights do not decay"),
    "--clip": (float, "largest gradient norm, 0 for no limit"),
    "--dropout": (float, "share of the residual stream's updates that is zeroed"),
    "--recompute": (str, "activations that backward computes again: none, selective or full"),
    "--dtype": (str, "float32, float64, or bfloat16 with float32 masters (slow on most CPUs)"),
    "--reduce-dtype": (str, "dtype of gradients on the wire (default: as they are accumulated)"),
    "--impl": (str, "plain (to be read) or fused (to be fast)"),
    "--dp-step": (str, "data parallelism: naive, overlapped, bucketed or silent"),
    "--bucket-mib": (float, "size of a gradient bucket in MiB"),
    "--seed": (int, "decides weights, order of the data and dropout"),
    "--data": (str, "text file, folder, or .npy token file (default: Python's standard library)"),
    "--tokenizer": (str, "bytes, bpe:N (trained here) or a tokenizer.json"),
    "--cache-dir": (str, "where tokens are kept between runs"),
    "--validation-fraction": (float, "share of the text that is held out"),
    "--validate-every": (int, "steps between validations, 0 for the end only"),
    "--save-dir": (str, "folder of the checkpoints"),
    "--save-every": (int, "steps between checkpoints, 0 for the end only"),
    "--log-file": (str, "metrics, one JSON line per step (default: beside the checkpoints)"),
    "--sample-tokens": (int, "tokens that the trained model writes at the end"),
    "--timeout": (float, "seconds after which a lost or stuck rank ends the run"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> None:
        """Raise ConfigError, with the option that was probably meant."""
        wrong = (message.removeprefix("unrecognized arguments: ").split() or [""])[0]
        known = [option for action in self._actions for option in action.option_strings]
        known += COMMANDS
        close = difflib.get_close_matches(wrong, known, 1)
        hint = f"did you mean {close[0]}?" if close else "see --help."
        raise ConfigError(f"{message}; {hint}")


def train_parser() -> Parser:
    """All options of `run.py train`; those not given stay absent, so that a checkpoint can
    decide."""
    parser = Parser(
        "run.py [train]", description="Train a Llama on any number of ranks.",
        epilog=checks.SEVERAL_NODES, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"one of {', '.join(config.PRESETS)} (default: tiny)")
    model.add_argument("--config", metavar="FILE.json", help="a model of your own")
    model.add_argument("--tied", action="store_true", help="output layer shares the embedding")
    for option, (kind, text) in MODEL_OPTIONS.items():
        model.add_argument(option, type=kind, help=text, metavar=kind.__name__.upper())
    add_mesh_options(parser)
    training = parser.add_argument_group("training")
    defaults = TrainConfig()
    for option, (kind, text) in TRAIN_OPTIONS.items():
        default = getattr(defaults, option[2:].replace("-", "_"))
        shown = "" if default in (None, "", 0) else f" (default: {default})"
        training.add_argument(option, type=kind, help=text + shown, metavar=kind.__name__.upper())
    training.add_argument(
        "--post-validation", action="store_true",
        help="pipeline stages clip by what they know and step at once; a wrong step is taken back",
    )
    training.add_argument(
        "--resume", nargs="?", const="latest", metavar="CHECKPOINT",
        help="go on from a checkpoint (default: the newest one in --save-dir, if there is any)",
    )  # fmt: skip
    return parser


def add_mesh_options(parser: Parser) -> None:
    """How ranks are arranged, and what is split over them."""
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--dp", type=int, metavar="N", help="data-parallel ranks (default: all)")
    mesh.add_argument(
        "--zero", type=int, metavar="STAGE",
        help="share out over dp: 1 optimizer state, 2 also gradients, 3 also weights (default: 0)",
    )
    mesh.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: 1)")
    mesh.add_argument(
        "--sequence-parallel", action="store_true",
        help="between tensor-parallel regions each rank has 1/tp of the sequence",
    )
    mesh.add_argument(
        "--vocab-parallel", metavar="STR",
        help="output layer over tp: naive, 1 or 2 (the paper's algorithms), or none, which gathers "
        "all logits (default: naive for plain, 2 for fused)",
    )
    mesh.add_argument("--cp", type=int, metavar="N", help="context-parallel ranks (default: 1)")
    mesh.add_argument(
        "--cp-kind", metavar="STR",
        help="attention over cp: ring, zigzag, all-gather or ulysses (default: ring for plain, "
        "zigzag for fused)",
    )
    mesh.add_argument(
        "--ep", type=int, metavar="N",
        help="share the experts out among N of the dp x cp ranks (default: 1)",
    )
    add_pipeline_options(mesh)
    mesh.add_argument("--ranks", type=int, metavar="N", help="N ranks as threads of this process")


def add_pipeline_options(mesh: argparse._ArgumentGroup) -> None:
    """How layers are dealt to pipeline ranks, and who computes what when."""
    mesh.add_argument("--pp", type=int, metavar="N", help="pipeline ranks (default: 1)")
    mesh.add_argument(
        "--schedule", metavar="NAME",
        help="of the pipeline, see run.py schedule --help (default: 1f1b)",
    )
    mesh.add_argument(
        "--virtual-stages", type=int, metavar="V",
        help="stages per pipeline rank, for interleaved and interleaved-zb (default: 2)",
    )
    mesh.add_argument(
        "--token-slices", metavar="STR",
        help="cut sequences, which then flow through the stages slice by slice: how many slices "
        "(one number), their lengths, such as 72,56, or auto, by times measured at the start "
        "(default: 1)",
    )
    mesh.add_argument(
        "--pp-layers", metavar="STR",
        help="layers of each stage: even, balanced (embedding and head counted), or their numbers, "
        "such as 4,4,4,2 (default: even)",
    )


def find_checkpoint(given: dict) -> "Manifest | None":
    """The checkpoint to resume from; refuses a folder that already holds another run."""
    from picotron_lab import checkpoint

    if "resume" in given and given["resume"] != "latest":
        return checkpoint.read_manifest(Path(given["resume"]))
    folder = given.get("save_dir")
    newest = checkpoint.latest(Path(folder)) if folder else None
    if newest and "resume" not in given:
        raise ConfigError(
            f"--save-dir {folder} already holds {newest.name}: add --resume to go on from it, or "
            f"choose another folder, such as --save-dir {folder}-2."
        )
    return checkpoint.read_manifest(newest) if newest else None


def choose(kind: type, given: dict, base: object) -> object:
    """`base` with the fields of `kind` that were given on the command line."""
    names = {field.name for field in dataclasses.fields(kind)}
    return dataclasses.replace(base, **{k: v for k, v in given.items() if k in names})


def choose_model(given: dict, manifest: "Manifest | None") -> ModelConfig:
    """The model: preset, file or checkpoint, changed by single options."""
    from picotron_lab import state

    name = given.get("model", "tiny")
    if name not in config.PRESETS:
        raise ConfigError(f"--model {name} is not one of {', '.join(config.PRESETS)}.")
    base = config.model_from_file(given["config"]) if "config" in given else config.PRESETS[name]
    if manifest and not {"model", "config"} & set(given):
        base = state.model_of(manifest)
    model_cfg = choose(ModelConfig, given, base)
    if manifest and not model_cfg.vocab_size:
        vocab_size = state.model_of(manifest).vocab_size
        model_cfg = dataclasses.replace(model_cfg, vocab_size=vocab_size)
    return model_cfg


def choose_files(cfg: TrainConfig, resumed: bool) -> TrainConfig:
    """Where metrics go, unless the user said so; every folder can be written to."""
    if cfg.log_file is None:
        name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        cfg = dataclasses.replace(cfg, log_file=f"{cfg.save_dir or name}/metrics.jsonl")
    elif Path(cfg.log_file).exists() and not resumed:
        raise ConfigError(
            f"--log-file {cfg.log_file} already exists, and a new run would overwrite it: choose "
            "another name, or move the file away."
        )
    folders = {"--save-dir": cfg.save_dir, "--cache-dir": cfg.cache_dir}
    folders["--log-file"] = Path(cfg.log_file).parent
    for option, folder in folders.items():
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror.lower()
            raise ConfigError(
                f"{option} needs a folder that can be written to, and {folder} is none ({reason}); "
                f"try {option} runs/mine."
            ) from None
    return cfg


def choose_ranks(given: dict) -> tuple[int, MeshConfig]:
    """How many ranks there are, and their mesh."""
    checks.check_ranks(given.get("ranks"), launched="RANK" in os.environ)
    ranks = given.get("ranks") or int(os.environ.get("WORLD_SIZE", "1"))
    others = math.prod(max(1, given.get(axis, 1)) for axis in ("pp", "cp", "tp"))
    dp = given.get("dp", max(1, ranks // others))
    mesh_cfg = choose(MeshConfig, given, MeshConfig(dp=dp))
    mesh_cfg.check_world(ranks)
    return ranks, mesh_cfg


def choose_options(given: dict, manifest: "Manifest | None") -> TrainConfig:
    """Defaults, or the options of the run to go on with, changed by those given."""
    from picotron_lab import state

    if manifest is None:
        return choose(TrainConfig, given, TrainConfig())
    tokenizer = state.choose_tokenizer(manifest, given.get("tokenizer"))
    before = state.options_of(manifest)
    if given.get("zero"):  # which sums gradients in its own way
        before = dataclasses.replace(before, dp_step="")
    return choose(TrainConfig, {**given, **tokenizer}, before)


def run_train(arguments: list[str]) -> None:
    """run.py [train]: check everything first, then start the ranks."""
    from picotron_lab import state
    from picotron_lab.comm import connect
    from picotron_lab.lab import run_ranks
    from picotron_lab.session import train

    given = vars(train_parser().parse_args(arguments))
    checks.check_not_empty(given)
    manifest = find_checkpoint(given)
    cfg = choose_options(given, manifest)
    model_cfg = choose_model(given, manifest)
    ranks, mesh_cfg = choose_ranks(given)
    checks.check_run(model_cfg, mesh_cfg, cfg)
    if manifest:
        state.check_resume(manifest, model_cfg, cfg)
    cfg = choose_files(cfg, manifest is not None)
    if "ranks" in given:
        run_ranks(lambda world: train(model_cfg, mesh_cfg, cfg, world, manifest), ranks)
        return
    with connect(cfg.timeout) as world:
        train(model_cfg, mesh_cfg, cfg, world, manifest)


def run_verify(arguments: list[str]) -> int:
    """run.py verify: exit code 0 if every row equals one device."""
    from picotron_lab.verify import verify

    parser = Parser("run.py verify", description="Compare every technique with one device.")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--all", action="store_true", help="also 100 random products of everything")
    args = parser.parse_args(arguments)
    chosen = [*cases(), *sample(40), *sample(60, PIPELINES)] if args.all else cases()
    rows = verify(chosen, show=(lambda line: None) if args.json else print)
    if args.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    return 0 if all(row.good for row in rows) else 1


def run_analysis(command: str, arguments: list[str]) -> None:
    """run.py schedule, run.py plan: what a file of analysis/ answers."""
    module = importlib.import_module(f"picotron_lab.analysis.{ANALYSES[command]}")
    about = module.__doc__.splitlines()[0]
    parser = Parser(f"run.py {command}", description=about, allow_abbrev=False)
    module.add_options(parser)
    module.show(parser.parse_args(arguments))


def run_dryrun(arguments: list[str]) -> None:
    """run.py dryrun: what ranks of a job of any size hold, compute and send, without running it."""
    from picotron_lab.analysis import dryrun

    parser = train_parser()
    dryrun.add_options(parser)
    given = vars(parser.parse_args(arguments))
    checks.check_not_empty(given)
    mesh_cfg = choose_ranks({**given, "ranks": given["gpus"]})[1]
    dryrun.show(choose_model(given, None), mesh_cfg, choose_options(given, None), given)


def run_export(arguments: list[str]) -> None:
    """run.py export: a checkpoint becomes a Hugging Face Llama folder."""
    from picotron_lab import state

    parser = Parser("run.py export", description=run_export.__doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or a folder of them")
    parser.add_argument("--hf", required=True, metavar="DIR", help="the folder to write")
    args = parser.parse_args(arguments)
    state.export_checkpoint(Path(args.checkpoint), Path(args.hf))
    print(f"wrote {args.hf}")


def run_import(arguments: list[str]) -> None:
    """run.py import: a Hugging Face Llama folder becomes a checkpoint to train from."""
    from picotron_lab import state

    parser = Parser("run.py import", description=run_import.__doc__)
    parser.add_argument("--hf", required=True, metavar="DIR", help="a Hugging Face Llama folder")
    parser.add_argument("--save-dir", required=True, help="a new folder for the checkpoint")
    args = parser.parse_args(arguments)
    path = state.import_folder(Path(args.hf), Path(args.save_dir))
    print(f"wrote {path}; go on with: python run.py --save-dir {args.save_dir} --resume --data ...")


def training_errors() -> tuple[type[Exception], ...]:
    """What a run on good options may still meet, to be told without a traceback."""
    from picotron_lab.diagnose import TrainingError

    return CommError, TrainingError


def main(arguments: list[str]) -> int:
    """Call the command; turn what the user can mend into a sentence and an exit code."""
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "train"
    rest = arguments[1:] if arguments and arguments[0] in COMMANDS else arguments
    run = {"train": run_train, "verify": run_verify, "dryrun": run_dryrun}
    run |= {name: functools.partial(run_analysis, name) for name in ANALYSES}
    run |= {"export": run_export, "import": run_import}
    rank = int(os.environ.get("RANK", "0"))
    try:
        return run[command](rest) or 0
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except training_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
