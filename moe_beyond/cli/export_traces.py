"""``moe-beyond export``."""

from contextlib import nullcontext

from jsonargparse import ArgumentParser

from moe_beyond.cli import export_pins
from moe_beyond.cli.options import TRACES_HELP, Output, command_parser
from moe_beyond.traces.formats import format_writer, writable_formats

PINS = "moe-beyond export pins writes the experts to keep in GPU memory for other engines; see its --help."


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "export",
        "Write a trace set in the format of another tool.",
        "moe-beyond export libcachesim traces/webglm webglm.oracleGeneral",
    )
    formats = writable_formats()
    lines = [f"  {name}: {entry.summary}" for name, entry in formats.items()]
    parser.epilog = "\n".join([str(parser.epilog), "", "formats:", *lines, "", PINS])
    parser.add_argument("format", metavar="FORMAT", help=f"format to write: {', '.join(formats)}")
    parser.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    parser.add_argument("out", metavar="OUT", help="file or folder to write")
    parser.add_argument("--split", metavar="SPLIT", help="split of the trace set (default: all)")
    parser.add_argument(
        "--drop-tokens",
        action="store_true",
        help="write only expert ids, lengths and splits: no token ids, tokenizer, gate weights or names of sequences",
    )
    return parser


def main(argv: list[str]) -> None:
    """Export a trace set, or the experts to pin.

    Args:
        argv: The command and its options.
    """
    if argv[1:2] == ["pins"]:
        export_pins.main(argv[1:])
        return
    args = build_parser().parse_args(argv[1:])
    from moe_beyond.traces.formats.trace_set import without_tokens
    from moe_beyond.traces.reader import TraceSet

    write = format_writer(args.format)
    traces = TraceSet(args.traces)
    with without_tokens(traces, args.out, args.split) if args.drop_tokens else nullcontext(traces) as exported:
        write(exported, args.out, args.split)
    shards = traces.shards(args.split)
    sequences, tokens = sum(shard.sequences for shard in shards), sum(shard.tokens for shard in shards)
    output = Output(args)
    output.show(f"{args.out}: {sequences:,} sequences, {tokens:,} tokens")
    output.result(
        {"out": args.out, "format": args.format, "split": args.split, "sequences": sequences, "tokens": tokens}
    )
