"""``moe-beyond package``."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser
from moe_beyond.evaluation.package import package
from moe_beyond.predictors.io.folder import read_config


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "package",
        "Make a predictor folder (safetensors, config, card) out of a checkpoint, or out of a run: its exported "
        "predictor, else its best checkpoint, else its last.",
        "moe-beyond package runs/predictor/version_0/checkpoints/last.ckpt --out my-predictor",
    )
    known.add_argument(
        "checkpoint", metavar="CKPT_OR_RUN", help="a checkpoint that `moe-beyond fit` wrote, or a run's folder"
    )
    known.add_argument("--out", metavar="DIR", required=True, help="predictor folder to make; it must not exist")
    known.add_argument("--half", action="store_true", help="store float16 weights, half the size")
    return known


def run(words: list[str]) -> None:
    """Make the folder."""
    args = options().parse_args(words[1:])
    package(args.checkpoint, args.out, half=args.half)
    output = Output(args)
    output.show(f"{args.out}: predictor folder")
    output.result({"predictor": str(Path(args.out)), "config": read_config(args.out)})
