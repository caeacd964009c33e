"""``moe-beyond export``."""

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import TRACES_HELP, Output, parser
from moe_beyond.errors import unknown
from moe_beyond.traces.exporters import EXPORTERS
from moe_beyond.traces.reader import TraceSet


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "export",
        "Write a trace set for another tool: a stream of requests for libCacheSim (oracleGeneral), arrays as vLLM's "
        "routed_experts (an .npz, or a folder of .npy), or a profile for llama.cpp (CSV).",
        "moe-beyond export libcachesim traces/webglm webglm.oracleGeneral",
    )
    known.add_argument("format", help=f"one of: {', '.join(EXPORTERS)}")
    known.add_argument("traces", metavar="DIR", help=TRACES_HELP)
    known.add_argument("out", metavar="OUT", help="the file or folder to make")
    known.add_argument("--split", metavar="S", help="one split of the trace set; all by default")
    return known


def run(words: list[str]) -> None:
    """Export."""
    args = options().parse_args(words[1:])
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
