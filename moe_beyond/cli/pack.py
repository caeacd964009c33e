"""``moe-beyond pack``."""

from pathlib import Path

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import MODEL_HELP, REVISION_HELP, Output, command_parser, progress_bar
from moe_beyond.collect.config import DTYPES
from moe_beyond.collect.out_folder import check_out
from moe_beyond.errors import unknown


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "pack",
        "Copy a model so that every expert is one contiguous, aligned range of a file, which the disk reads fastest. "
        "The copy is a model folder for commands that run a model under a budget.",
        "moe-beyond pack small-moe small-moe-packed --dtype bfloat16",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP,
    )
    parser.add_argument("out", metavar="OUT", help="model folder to write, which must not exist")
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        help=REVISION_HELP,
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        default="auto",
        help=f"data type of the experts: {', '.join(DTYPES)} (default: auto, as stored)",
    )
    return parser


def main(argv: list[str]) -> None:
    """Pack a model.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    if args.dtype not in DTYPES:
        raise unknown("--dtype", args.dtype, DTYPES)
    out = Path(args.out)
    check_out(out)
    output = Output(args)
    from moe_beyond.collect.load import open_checkpoint
    from moe_beyond.runtime.storage.pack import pack

    checkpoint = open_checkpoint(args.model, args.revision)
    with progress_bar(f"packing {args.out}", quiet=args.quiet) as bar:
        result = pack(checkpoint, out, dtype=args.dtype, progress=bar)
    output.show(
        f"{args.out}: {result.experts:,} experts in {result.dtype}, {result.expert_bytes / 1e9:.3g} GB; other weights: "
        f"{result.other_bytes / 1e9:.3g} GB"
    )
    output.result(result.to_json())
