"""``moe-beyond export``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import TRACES_HELP, Output, command_parser
from moe_beyond.errors import unknown
from moe_beyond.traces.exporters import EXPORTERS


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "export",
        "Write a trace set for another tool: accesses for libCacheSim (oracleGeneral), routed_experts "
        "arrays of vLLM (an "
        ".npz file or a folder of .npy files), or a profile for llama.cpp (CSV).",
        "moe-beyond export libcachesim traces/webglm webglm.oracleGeneral",
    )
    parser.add_argument("format", help=f"format to write: {', '.join(EXPORTERS)}")
    parser.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    parser.add_argument("out", metavar="OUT", help="file or folder to write")
    parser.add_argument("--split", metavar="S", help="split of the trace set (default: all)")
    return parser


def main(argv: list[str]) -> None:
    """Export a trace set.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    from moe_beyond.traces.reader import TraceSet

    if args.format not in EXPORTERS:
        raise unknown("format", args.format, EXPORTERS)
    traces = TraceSet(args.traces)
    EXPORTERS[args.format](traces, args.out, args.split)
    shards = traces.shards(args.split)
    sequences, tokens = sum(shard.sequences for shard in shards), sum(shard.tokens for shard in shards)
    output = Output(args)
    output.show(f"{args.out}: {sequences:,} sequences, {tokens:,} tokens")
    output.result(
        {"out": args.out, "format": args.format, "split": args.split, "sequences": sequences, "tokens": tokens}
    )
