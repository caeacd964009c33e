"""``moe-beyond export``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import TRACES_HELP, Output, parser
from moe_beyond.traces.formats import format_writer, writable_formats
from moe_beyond.traces.reader import TraceSet


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "export",
        "Write a trace set in the format of another tool.",
        "moe-beyond export libcachesim traces/webglm webglm.oracleGeneral",
    )
    formats = writable_formats()
    known.epilog = "\n".join([str(known.epilog), "", "formats:", *(f"  {n}: {f.summary}" for n, f in formats.items())])
    known.add_argument("format", help=f"one of: {', '.join(formats)}")
    known.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    known.add_argument("out", metavar="OUT", help="the file or folder to make")
    known.add_argument("--split", metavar="S", help="one split of the trace set; all by default")
    return known


def run(words: list[str]) -> None:
    """Export."""
    args = options().parse_args(words[1:])
    write = format_writer(args.format)
    traces = TraceSet(args.traces)
    write(traces, args.out, args.split)
    shards = traces.shards(args.split)
    sequences, tokens = sum(shard.sequences for shard in shards), sum(shard.tokens for shard in shards)
    output = Output(args)
    output.show(f"{args.out}: {sequences:,} sequences, {tokens:,} tokens")
    output.result(
        {"out": args.out, "format": args.format, "split": args.split, "sequences": sequences, "tokens": tokens}
    )
