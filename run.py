"""The command line: parses, then calls.

python run.py                                train a tiny model on this Python's own library
python run.py --ranks 4                      the same with 4 data-parallel ranks as threads
torchrun --nproc-per-node 4 run.py --dp 4    the same with 4 processes, one per GPU if any
torchrun --nproc-per-node 4 run.py --tp 2 --sequence-parallel --zero 1
torchrun --nproc-per-node 4 run.py --cp 4 --model moe-small --ep 4
torchrun --nproc-per-node 4 run.py --pp 4 --schedule zb-h1 --micro-batch-size 2
python run.py --ranks 4 --mine 03,05         the same with your own code of lessons 03 and 05
python run.py --ranks 4 --profile trace.json    what took the time, for ui.perfetto.dev
python run.py verify                         every technique beside one device
python run.py schedule zb-h1 --pp 4          what each pipeline rank does when, and holds
python run.py plan --model llama3-70b --gpus 640 --hardware h100    the fastest meshes that fit
python run.py dryrun --model llama3-70b --gpus 640 --tp 8 --pp 4 --dtype bfloat16

Torch is imported by the commands that compute, so that the others answer at once.
"""

import dataclasses
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
from picotron_lab.options import Parser, add_profile_options, train_parser

if TYPE_CHECKING:
    from picotron_lab.checkpoint import Manifest

ANALYSES = {"schedule": "show", "plan": "planner_show"}  # command -> file of analysis/
COMMANDS = ("train", "verify", *ANALYSES, "dryrun", "export", "import")


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


def run_train(arguments: list[str]) -> int:
    """run.py [train]: check everything first, then start the ranks."""
    if any(word.startswith("--mine") for word in arguments):
        from lessons import mine

        return mine.main(arguments)
    from picotron_lab import profile, state
    from picotron_lab.comm import connect
    from picotron_lab.lab import run_ranks
    from picotron_lab.session import train

    parser = train_parser(COMMANDS)
    add_profile_options(parser)
    given = vars(parser.parse_args(arguments))
    checks.check_not_empty(given)
    manifest = find_checkpoint(given)
    cfg = choose_options(given, manifest)
    model_cfg = choose_model(given, manifest)
    ranks, mesh_cfg = choose_ranks(given)
    checks.check_run(model_cfg, mesh_cfg, cfg)
    if manifest:
        state.check_resume(manifest, model_cfg, cfg)
    if "profile" in given:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch need not say when it begins
    wanted = profile.choose(given, manifest.step if manifest else 0, cfg.steps)
    cfg = choose_files(cfg, manifest is not None)
    if "ranks" in given:
        run_ranks(lambda world: train(model_cfg, mesh_cfg, cfg, world, manifest, wanted), ranks)
        return 0
    with connect(cfg.timeout) as world:
        train(model_cfg, mesh_cfg, cfg, world, manifest, wanted)
    return 0


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
    from picotron_lab.analysis import dryrun_show

    parser = train_parser(COMMANDS)
    dryrun_show.add_options(parser)
    given = vars(parser.parse_args(arguments))
    checks.check_not_empty(given)
    mesh = dryrun_show.mesh_of(given, choose_ranks)
    dryrun_show.show(choose_model(given, None), mesh, choose_options(given, None), given)


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
