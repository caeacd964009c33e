"""``moe-beyond replay``."""

from moe_beyond.cli.options import add_json, add_traces, console_for, parser, write_result
from moe_beyond.cli.replay_options import add_replay, asked_strategies, showing_progress
from moe_beyond.errors import UserError
from moe_beyond.evaluation.evaluate import evaluate
from moe_beyond.evaluation.sources import from_predictor_folder, from_scores_folder
from moe_beyond.published import find_predictor
from moe_beyond.report.results import results_table
from moe_beyond.traces.reader import TraceSet


def run(words: list[str]) -> None:
    """Parse the options, replay."""
    options = parser(
        "replay",
        "Replay traces through a cache under a memory budget; LRU and Belady stand beside every result.",
        "moe-beyond replay --traces traces/webglm --budget 10% --budget 20% --policy lru --policy lfu",
    )
    add_traces(options)
    options.add_argument("--predictor", metavar="P", help="predictor whose scores prefetch: a folder or published name")
    options.add_argument(
        "--scores", metavar="DIR", help="scores that `moe-beyond predict` wrote, instead of --predictor"
    )
    add_replay(options)
    add_json(options)
    args = options.parse_args(words[1:])
    if args.predictor and args.scores:
        raise UserError("--predictor and --scores exclude each other; give one")
    traces = TraceSet(args.traces)
    source = None
    if args.predictor:
        source = from_predictor_folder(find_predictor(args.predictor))
    elif args.scores:
        source = from_scores_folder(args.scores)
    lookaheads = source.lookaheads if source else ()
    asked = asked_strategies(
        args,
        traces,
        lookaheads=lookaheads,
        predictor=source.name if source else None,
        causal=source.causal if source else True,
        prefetches=(f"top{traces.geometry.top_k}",) if source else ("none",),
        default_lookaheads=lookaheads[:1],
    )
    with showing_progress(traces, args.split, "replaying") as progress:
        found = evaluate(traces, asked, args.split, source, progress)
    if args.json != "-":
        console_for(args.json).print(results_table(found.results, traces.geometry))
    write_result({"results": [result.to_json() for result in found.results]}, args.json)
