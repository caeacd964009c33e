"""``moe-beyond package``."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "package",
        "Convert a checkpoint or a run into a predictor folder (safetensors, config, card). A run gives its exported "
        "predictor, otherwise its best checkpoint, otherwise its last.",
        "moe-beyond package runs/predictor/version_0/checkpoints/last.ckpt --out my-predictor",
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT_OR_RUN", help="checkpoint that `moe-beyond fit` wrote, or folder of a run"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="predictor folder to write, which must not exist")
    parser.add_argument(
        "--half", action="store_true", help="store weights in float16, at half the size (default: float32)"
    )
    return parser


def main(argv: list[str]) -> None:
    """Write a predictor folder.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    from moe_beyond.evaluation.package import package
    from moe_beyond.predictors.io.folder import read_config

    package(args.checkpoint, args.out, half=args.half)
    output = Output(args)
    output.show(f"{args.out}: predictor folder")
    output.result({"predictor": str(Path(args.out)), "config": read_config(args.out)})
