"""``moe-beyond evaluate``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import Output, add_workers, check_workers, command_parser, progress_bar
from moe_beyond.cli.replay_options import (
    UNFITTED,
    add_budgets,
    add_conditions,
    add_grid,
    add_measured_traces,
    add_online,
    check_online,
    options_from_args,
)
from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.pretrained import find_predictor
from moe_beyond.urls import without_secrets

if TYPE_CHECKING:
    from moe_beyond.traces.reader import TraceSet


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "evaluate",
        "Measure a predictor on a trace set by lookahead, and replay it under a memory budget; or compare all "
        "checkpoints of a run, by default on the split that it validated on.",
        "moe-beyond evaluate runs/predictor/version_0/predictor --traces traces/webglm --budget 10%",
    )
    parser.add_argument(
        "predictor",
        metavar="PREDICTOR",
        help="predictor folder, pretrained name, hf:ORG/REPO, or the folder of a run, whose checkpoints are compared",
    )
    add_measured_traces(
        parser,
        default="required unless PREDICTOR is a run (default for a run: the trace set that it validated on)",
        split_default=f"{UNFITTED}; for a run without --traces, the split that it validated on",
    )
    add_budgets(parser)
    add_grid(parser, "each of the predictor's, except next")
    add_conditions(parser)
    add_online(parser, "the trace set; the figures without updates are shown, too")
    add_workers(parser)
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="N",
        help="bootstrap draws, with a fixed seed, for 95 percent intervals over sequences of all figures and of their "
        "differences from LRU; 10000 draws take seconds (default: 0, no intervals)",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the figures into the configuration and the card of the predictor folder; training text is an error",
    )
    parser.add_argument(
        "--record-training-text",
        action="store_true",
        help="like --record, but also for text that the predictor was, or may have been, fitted on; marks the figures",
    )
    return parser


def main(argv: list[str]) -> None:
    """Evaluate a predictor, or all checkpoints of a run."""
    args = build_parser().parse_args(argv[1:])
    check_workers(args.workers)
    # Imported here, so that help and completion do not wait for it.
    from moe_beyond.run_folder import is_run

    args.record = args.record or args.record_training_text
    check_online(args, ["record"])
    if is_run(args.predictor):
        _checkpoints(args)
    else:
        _predictor(args, argv)


def _predictor(args: Namespace, arguments: Sequence[str]) -> None:
    """Evaluate one predictor, and record its figures on request."""
    from moe_beyond.evaluation.recording import check_recordable, record_outcome
    from moe_beyond.evaluation.run import resolve_evaluation, run_evaluation
    from moe_beyond.evaluation.sources import from_predictor_folder, save_online, with_online
    from moe_beyond.report.tables.intervals import intervals_tables
    from moe_beyond.report.tables.results import metrics_table, results_table

    if args.record and is_hub_name(args.predictor):
        raise UserError(
            f"--record: {args.predictor} is on the Hub, not in a folder; get it by `hf download --local-dir DIR`"
        )
    folder = find_predictor(args.predictor)
    traces = _traces(args)
    if traces is None:
        raise UserError("evaluate: a trace set is missing; give --traces DIR")
    source = from_predictor_folder(folder)
    replay = resolve_evaluation(
        options_from_args(args), traces, source, split=args.split, bootstrap_draws=args.bootstrap
    )
    if args.record:
        check_recordable(folder, replay.measured_on, training_text=args.record_training_text)
    output, updated = Output(args), None
    if args.online:
        online = with_online(source, args.online_state)  # a wrong file is refused before anything is measured
    with progress_bar(f"evaluating {source.name}", quiet=args.quiet) as progress:
        outcome = replay.run(progress, args.workers)
        if args.online:
            settings = options_from_args(args)
            updated = run_evaluation(
                settings, traces, online, split=args.split, bootstrap_draws=args.bootstrap, progress=progress
            )
    output.show(*outcome.measured_on.lines, metrics_table(outcome.metrics))
    rows, content = list(outcome.results), outcome.to_json()
    if updated is not None:
        output.show(metrics_table(updated.metrics, ", with online updates"))
        rows += [replace(row, strategy=f"{row.strategy}, online") for row in updated.results if row.predictor]
        rows.sort(key=lambda row: (row.budget_slots, row.predictor is None))
        content = {**updated.to_json(), "without_updates": {name: content[name] for name in ("metrics", "results")}}
    output.show(results_table(rows, outcome.geometry))
    if args.bootstrap:
        shown = outcome if updated is None else updated
        output.show(*intervals_tables(shown.metrics, shown.results, args.bootstrap))
    output.result(content)
    if args.online_state is not None:
        save_online(online, args.online_state)
    if args.record:
        record_outcome(folder, outcome, _command(arguments[1:], args.predictor, folder.name))


def _checkpoints(args: Namespace) -> None:
    """Evaluate all checkpoints of a run."""
    from moe_beyond.evaluation.checkpoints import evaluate_run
    from moe_beyond.report.tables.conditions import format_conditions
    from moe_beyond.report.tables.results import checkpoints_table

    for option in ("record", "bootstrap", "online"):
        if args[option]:
            raise UserError(f"--{option}: {args.predictor} is a run of several checkpoints; name one predictor")
    output = Output(args)
    with progress_bar(f"evaluating {args.predictor}", quiet=args.quiet) as progress:
        evaluation = evaluate_run(
            options_from_args(args),
            args.predictor,
            traces=_traces(args),
            split=args.split,
            progress=progress,
            workers=args.workers,
        )
    output.show(
        *evaluation.measured_on.lines,
        checkpoints_table(evaluation.checkpoints, evaluation.geometry),
        f"conditions: {format_conditions(evaluation.checkpoints[0].evaluation.results)}",
    )
    output.result(evaluation.to_json())


def _traces(args: Namespace) -> TraceSet | None:
    from moe_beyond.traces.reader import TraceSet

    return None if args.traces is None else TraceSet(args.traces)


def _command(arguments: Sequence[str], predictor: str, name: str) -> str:
    """Return the command line that prints the figures elsewhere: without paths and without options of the output.

    Args:
        arguments: Arguments after the name of the command.
        predictor: The predictor among them.
        name: Name of the predictor folder.
    """
    kept, remaining = ["moe-beyond", "evaluate", name, "--traces", "DIR"], list(arguments)
    remaining.remove(predictor)  # only once: an option may have the same value
    rest = iter(remaining)
    for argument in rest:
        option, joined, _ = argument.partition("=")
        if option in ("--traces", "--json", "--workers"):
            if not joined:
                next(rest, None)
        elif argument not in ("--record", "--record-training-text", "--quiet"):
            kept.append(Path(argument).name if Path(argument).is_dir() else without_secrets(argument))
    return shlex.join(kept)
