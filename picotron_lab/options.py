"""The options of `run.py train`, and a parser whose errors are sentences.

Read    train_parser -> add_mesh_options -> Parser        Tests  tests/test_run.py
"""

import argparse
import difflib
from collections.abc import Sequence

from picotron_lab import checks, config
from picotron_lab.config import ConfigError, TrainConfig

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

    also: Sequence[str] = ()  # what else may have been meant than options

    def error(self, message: str) -> None:
        """Raise ConfigError, with the option that was probably meant."""
        wrong = (message.removeprefix("unrecognized arguments: ").split() or [""])[0]
        known = [option for action in self._actions for option in action.option_strings]
        known += self.also
        close = difflib.get_close_matches(wrong, known, 1)
        hint = f"did you mean {close[0]}?" if close else "see --help."
        raise ConfigError(f"{message}; {hint}")


def train_parser(commands: Sequence[str] = ()) -> Parser:
    """All options of `run.py train`; those not given stay absent, so that a checkpoint can
    decide.

    commands  what may have been meant by a word that is no option
    """
    parser = Parser(
        "run.py [train]", description="Train a Llama on any number of ranks.",
        epilog=checks.SEVERAL_NODES, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.also = commands
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


def add_profile_options(parser: Parser) -> None:
    """A trace of some steps."""
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--profile", metavar="FILE.json",
        help="write a trace of some steps for ui.perfetto.dev, and show where their time goes",
    )  # fmt: skip
    group.add_argument(
        "--profile-steps", type=int, metavar="N",
        help="steps to record, after the first two of the run (default: 2)",
    )  # fmt: skip
