"""``moe-beyond package``."""

from moe_beyond.callbacks.export import package
from moe_beyond.cli.options import parser


def run(words: list[str]) -> None:
    """Parse the options, make the folder."""
    options = parser(
        "package",
        "Make a predictor folder (safetensors, config, card) out of a checkpoint.",
        "moe-beyond package runs/predictor/version_0/checkpoints/last.ckpt --out my-predictor",
    )
    options.add_argument("checkpoint", metavar="CKPT", help="a checkpoint that `moe-beyond fit` wrote")
    options.add_argument("--out", metavar="DIR", required=True, help="the predictor folder to make")
    options.add_argument("--half", action="store_true", help="store float16 weights, half the size")
    args = options.parse_args(words[1:])
    package(args.checkpoint, args.out, half=args.half)
    print(f"{args.out}: predictor folder")
