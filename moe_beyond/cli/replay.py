"""``moe-beyond replay``."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from moe_beyond.cli.options import (
    Output,
    add_plots,
    add_workers,
    check_plots,
    check_workers,
    command_parser,
    progress_bar,
)
from moe_beyond.cli.parser import CommandParser
from moe_beyond.cli.replay_options import (
    UNFITTED,
    add_budgets,
    add_conditions,
    add_measured_traces,
    add_online,
    add_strategies,
    check_online,
    open_source,
    options_from_args,
)
from moe_beyond.cli.strategy_config import add_config, apply_config
from moe_beyond.errors import UserError
from moe_beyond.runtime.options import RUN_FILE

if TYPE_CHECKING:
    from moe_beyond.traces.reader import TraceSet

AS_RUN = ("traces", "as_run", "predictor", "profile", "json", "quiet")
"""Options that go with ``--as-run``; the run has chosen all others."""
REPEATED = ("budget", "policy", "prefetch", "lookahead", "misses")
"""Options of a strategy that are lists."""


def build_parser() -> CommandParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "replay",
        "Replay traces through a cache under a memory budget, and on a device with times. Every result is shown "
        "next to LRU, Belady and the best static choice.",
        "moe-beyond replay --traces traces/webglm --budget 10% --strategy all --device rtx4060-laptop",
    )
    add_measured_traces(parser, split_default=f"all; with a predictor, {UNFITTED}")
    add_budgets(parser)
    add_config(parser)
    add_strategies(parser)
    add_conditions(parser)
    add_online(parser, "the trace set")
    add_workers(parser)
    add_plots(parser)
    parser.add_argument(
        "--as-run",
        action="store_true",
        help="replay a run that `moe-beyond run --trace` recorded, with its strategy and the recorded moments of "
        "prefetches, and compare every event; exit code 1 if one differs; --predictor and --profile name those of the "
        "run if they are not found",
    )
    return parser


def main(argv: list[str]) -> None:
    """Replay traces."""
    parser = build_parser()
    args = parser.parse_args(argv[1:])
    output = Output(args)
    check_workers(args.workers)
    if args.as_run:
        _check_as_run(args, parser.get_defaults())
        _replay_as_run(args, output)
        return
    apply_config(args, parser.given, REPEATED)
    check_plots(args.plots)
    check_online(args, ["strategy"])
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.evaluation.run import run_replay
    from moe_beyond.evaluation.sources import save_online
    from moe_beyond.report.tables.results import results_table, unavailable_lines
    from moe_beyond.traces.reader import TraceSet

    traces, source = TraceSet(args.traces), open_source(args)
    with progress_bar("replaying", quiet=args.quiet) as progress:
        outcome = run_replay(
            options_from_args(args),
            traces,
            source,
            split=args.split,
            progress=progress,
            workers=args.workers,
        )
    output.show(
        *outcome.measured_on.lines,
        results_table(outcome.results, outcome.geometry),
        *unavailable_lines(outcome.unavailable),
        *_run_lines(args, traces),
    )
    if args.plots:
        from moe_beyond.report.plots.files import replay_plots, write_plots

        replay = outcome.replay
        plots = replay_plots(
            traces, replay.strategies, outcome.results, replay.sources, replay.profile, outcome.measured_on.split
        )
        output.show(*(f"picture: {path}" for path in write_plots(args.plots, plots)))
    output.result(outcome.to_json())
    if source is not None and args.online_state is not None:
        save_online(source, args.online_state)


def _run_lines(args: Namespace, traces: "TraceSet") -> list[str]:
    """Return the line that names the options for the counts of a recorded run; none if the replay has its steps."""
    if not (Path(args.traces) / RUN_FILE).is_file():
        return []
    longest = max((trace.decode_start for trace in traces), default=0)
    if args.carry_over and args.prefill_chunk >= longest:
        return []
    return [
        "recorded run: it kept its cache between prompts and read each prompt in one step; --as-run repeats it, and "
        f"--carry-over --prefill-chunk {longest} gives a replay its steps"
    ]


def _check_as_run(args: Namespace, defaults: Namespace) -> None:
    """Refuse options that a replay as the run would ignore.

    Raises:
        UserError: One is given.
    """
    for name, default in defaults.items():
        if name not in AS_RUN and args[name] != default:
            raise UserError(
                f"--{name.replace('_', '-')}: --as-run repeats the choice of the run; leave one of them out"
            )


def _replay_as_run(args: Namespace, output: Output) -> None:
    """Replay a recorded run as it ran, and compare.

    Raises:
        UserError: The folder is no recording of a run, or its predictor is not found.
    """
    from moe_beyond.runtime.records.as_run import replay_as_run
    from moe_beyond.runtime.records.recording import read_recording

    recording = read_recording(args.traces)
    named = {name: args[name] for name in ("predictor", "profile") if args[name] is not None}
    replayed = replay_as_run(replace(recording, options=replace(recording.options, **named)))
    output.show(str(replayed))
    output.result(asdict(replayed))
    if replayed.difference is not None:
        raise SystemExit(1)
