"""``moe-beyond export pins``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, command_parser
from moe_beyond.errors import unknown
from moe_beyond.evaluation.pin_formats import PIN_FORMATS


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "export pins",
        "Write the experts that plan --pins chose in the form of another engine. llama.cpp places all experts of a "
        "layer together, so for it the pins become a choice of layers, which take no more memory.",
        "moe-beyond export pins pins.json pins.txt --to llama.cpp",
    )
    formats = [f"  {name}: {entry.summary}" for name, entry in PIN_FORMATS.items()]
    parser.epilog = "\n".join([str(parser.epilog), "", "engines:", *formats])
    parser.add_argument("pins", metavar="PINS", help="JSON file of moe-beyond plan --pins")
    parser.add_argument("out", metavar="OUT", help="file to write")
    parser.add_argument("--to", metavar="ENGINE", required=True, help=f"engine: {', '.join(PIN_FORMATS)}")
    return parser


def main(argv: list[str]) -> None:
    """Export the experts to pin.

    Args:
        argv: ``pins`` and the options.
    """
    args = build_parser().parse_args(argv[1:])
    if args.to not in PIN_FORMATS:
        raise unknown("engine", args.to, PIN_FORMATS)
    from moe_beyond.evaluation.pins import read_pins

    output, pins = Output(args), read_pins(args.pins)
    placement = PIN_FORMATS[args.to].write(pins, args.out)
    experts = sum(placement.layers.values())
    output.show(
        f"{args.out}: {experts:,} experts in {len(placement.layers)} of {len(pins.layers)} layers",
        f"They have {placement.share:.1%} of all uses; the {pins.experts:,} pinned experts have {pins.uses_share:.1%}.",
        f"{args.to}: {placement.usage}",
    )
    output.result(
        {
            "out": args.out,
            "engine": args.to,
            "experts": experts,
            "layers": {str(layer): count for layer, count in placement.layers.items()},
            "uses_share": placement.share,
            "pinned_uses_share": pins.uses_share,
            "usage": placement.usage,
        }
    )
