"""``moe-beyond evaluate``."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import SPLIT_HELP, TRACES_HELP, Output, command_parser
from moe_beyond.cli.replay_options import (
    add_budgets,
    add_combinations,
    add_conditions,
    request_of,
    showing_progress,
)
from moe_beyond.download import is_hub_name
from moe_beyond.errors import UserError
from moe_beyond.evaluation.checkpoints import evaluate_run, is_run, validation_data
from moe_beyond.evaluation.options import asked_combinations, asked_conditions, text_to_measure
from moe_beyond.evaluation.run import Evaluation, evaluate
from moe_beyond.evaluation.sources import ScoreSource, from_predictor_folder
from moe_beyond.evaluation.strategies import beside
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.io.card import around_figures, record_figures
from moe_beyond.predictors.training_text import MeasuredText, Relation
from moe_beyond.pretrained import find_predictor
from moe_beyond.report.tables.intervals import intervals_tables
from moe_beyond.report.tables.results import checkpoints_table, metrics_table, results_table
from moe_beyond.traces.reader import TraceSet

RECORDED = (
    *("strategy", "predictor", "lookahead", "leaks", "causal"),
    *("budget_slots", "budget_share", "hit_rate", "bytes_ratio", "intervals"),
)
"""Of a replay's record, what a predictor's card shows."""
TABLES = ("by_layer", "reliability")
"""Of a metrics' record, what is too long for a card."""


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "evaluate",
        "Measure a predictor on a trace set, by lookahead, and replay what it is worth under a budget; "
        "or compare all checkpoints of a run (on the split it validated on, unless --traces says otherwise).",
        "moe-beyond evaluate runs/predictor/version_0/predictor --traces traces/webglm --budget 10%",
    )
    parser.add_argument(
        "predictor", metavar="PREDICTOR", help="a predictor folder, a published name, hf:ORG/REPO, or a run's folder"
    )
    parser.add_argument("--traces", metavar="DIR", help=TRACES_HELP)
    parser.add_argument("--split", metavar="S", help=SPLIT_HELP)
    add_budgets(parser)
    add_combinations(parser)
    add_conditions(parser)
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="N",
        help="draws of a bootstrap, with a fixed seed, for 95 percent intervals over sequences of all figures and of "
        "their differences from LRU; 10000 take seconds (default: 0, no intervals)",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the figures into the config and the card of the predictor folder; refused for its training text",
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
    args.record = args.record or args.record_training_text
    if is_run(args.predictor):
        if args.record:
            raise UserError(f"--record is for a predictor folder; {args.predictor} is a run")
        if args.bootstrap:
            raise UserError(f"--bootstrap is for one predictor; {args.predictor} is a run of several checkpoints")
        _run_folder(args)
    else:
        _predictor(args, argv)


def _predictor(args: Namespace, words: Sequence[str]) -> None:
    if args.record and is_hub_name(args.predictor):
        raise UserError(f"--record writes into a folder; get one of {args.predictor} by `hf download --local-dir DIR`")
    folder = find_predictor(args.predictor)
    if args.traces is None:
        raise UserError("evaluate needs a trace set; give --traces DIR")
    traces = TraceSet(args.traces)
    if args.record:
        around_figures(folder)  # is there a place for them?
    source = from_predictor_folder(folder)
    asked_by = [lookahead for lookahead in source.lookaheads if lookahead != "next"]
    shared = asked_conditions(request_of(args), traces)
    text = text_to_measure(traces, args.split, shared, [source])
    if args.record and not args.record_training_text:
        _check_recordable(text)
    found = _evaluate(args, traces, text.split, source, asked_by)
    output = Output(args)
    output.show(*text.lines, metrics_table(found.metrics), results_table(found.results, traces.geometry))
    if args.bootstrap:
        output.show(*intervals_tables(found.metrics, found.results, args.bootstrap))
    output.result({"measured_on": text.to_json(), **found.to_json()})
    if args.record:
        manifest = traces.manifest
        figures = {
            "source": manifest.source,
            "fingerprint": manifest.fingerprint,
            "split": text.split,
            "relation": str(text.relation),
            "command": _command(words[1:], args.predictor, folder.name),
            "metrics": [{n: value for n, value in row.items() if n not in TABLES} for row in found.metrics],
            "replay": [{n: value for n, value in row.to_json().items() if n in RECORDED} for row in found.results],
        }
        record_figures(folder, figures)


def _check_recordable(text: MeasuredText) -> None:
    """Refuse to record figures of text that the predictor was fitted on, or may have been.

    Raises:
        UserError: It was, or may have been.
    """
    if text.relation in (Relation.TRAINING, Relation.UNKNOWN):
        why = next(note.sentence for note in text.notes if note.relation is text.relation)
        raise UserError(f"--record: {why}; measure other text, or add --record-training-text, which marks the figures")


def _command(words: Sequence[str], predictor: str, name: str) -> str:
    """Return the command line without what is another's concern: where things lie, and where a copy went."""
    kept, words = ["moe-beyond", "evaluate", name, "--traces", "DIR"], list(words)
    words.remove(predictor)  # once: an option may name the same
    rest = iter(words)
    for word in rest:
        option, joined, _ = word.partition("=")
        if option in ("--traces", "--json"):
            if not joined:
                next(rest, None)
        elif word not in ("--record", "--record-training-text", "--quiet"):
            kept.append(Path(word).name if Path(word).is_dir() else word)
    return shlex.join(kept)


def _run_folder(args: Namespace) -> None:
    folder, split = (args.traces, args.split) if args.traces else validation_data(args.predictor)
    traces = TraceSet(folder)
    shared = asked_conditions(request_of(args), traces)
    texts: list[MeasuredText] = []

    def evaluated(source: ScoreSource) -> Evaluation:
        if not texts:  # all checkpoints of a run were fitted on the same
            of_run = replace(source, name="the run")
            texts.append(text_to_measure(traces, args.split or split, shared, [of_run]))
        # One lookahead is enough to compare checkpoints by; --lookahead asks for others.
        return _evaluate(args, traces, texts[0].split, source, source.lookaheads[:1])

    found = list(evaluate_run(args.predictor, evaluated))
    output = Output(args)
    output.show(*texts[0].lines, checkpoints_table(found, traces.geometry))
    rows = [
        {"checkpoint": one.checkpoint, "epoch": one.epoch, "step": one.step, **one.evaluation.to_json()}
        for one in found
    ]
    output.result({"measured_on": texts[0].to_json(), "checkpoints": rows})


def _evaluate(
    args: Namespace, traces: TraceSet, split: str | None, source: ScoreSource, lookaheads: Sequence[Lookahead]
) -> Evaluation:
    request = request_of(args)
    shared = asked_conditions(request, traces)
    found = asked_combinations(request, traces, shared, source, lookaheads)
    asked = beside(found, shared.common, traces.geometry, shared.quotas)
    with showing_progress(traces, split, f"evaluating {source.name}", len(asked), quiet=args.quiet) as progress:
        return evaluate(
            traces,
            asked,
            split,
            [source],
            measure=source,
            profile=shared.profile,
            resamples=args.bootstrap,
            progress=progress,
        )
