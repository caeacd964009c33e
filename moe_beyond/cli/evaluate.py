"""``moe-beyond evaluate``."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from moe_beyond.cli.options import add_json, console_for, parser, write_result
from moe_beyond.cli.replay_options import (
    add_budgets,
    add_combinations,
    add_conditions,
    asked_combinations,
    asked_conditions,
    showing_progress,
)
from moe_beyond.errors import UserError
from moe_beyond.evaluation.evaluate import Evaluation, evaluate
from moe_beyond.evaluation.runs import evaluate_run, is_run, validation_data
from moe_beyond.evaluation.sources import ScoreSource, from_predictor_folder
from moe_beyond.evaluation.strategies import beside
from moe_beyond.lookahead import Lookahead
from moe_beyond.predictors.card import around_figures, record_figures
from moe_beyond.published import find_predictor
from moe_beyond.report.results import checkpoints_table, metrics_table, results_table
from moe_beyond.traces.reader import TraceSet

RECORDED = ("strategy", "predictor", "lookahead", "budget_slots", "budget_share", "hit_rate", "bytes_ratio")
"""Of a replay's record, what a predictor's card shows."""
TABLES = ("by_layer", "reliability")
"""Of a metrics' record, what is too long for a card."""


def run(words: list[str]) -> None:
    """Parse the options, evaluate a predictor or all checkpoints of a run."""
    options = parser(
        "evaluate",
        "Measure a predictor on a trace set, by lookahead, and replay what it is worth under a budget; "
        "or compare all checkpoints of a run (on the split it validated on, unless --traces says otherwise).",
        "moe-beyond evaluate runs/predictor/version_0/predictor --traces traces/webglm --budget 10%",
    )
    options.add_argument(
        "predictor", metavar="PREDICTOR", help="a predictor folder, a published name, or a run's folder"
    )
    options.add_argument("--traces", metavar="DIR", help="trace set: a folder or a URL fsspec knows")
    options.add_argument("--split", metavar="S", help="one split of the trace set; all by default")
    add_budgets(options)
    add_combinations(options)
    add_conditions(options)
    options.add_argument(
        "--record", action="store_true", help="write the figures into the predictor folder's config and card"
    )
    add_json(options)
    args = options.parse_args(words[1:])
    if is_run(args.predictor):
        if args.record:
            raise UserError(f"--record is for a predictor folder; {args.predictor} is a run")
        _run_folder(args)
    else:
        _predictor(args, words)


def _predictor(args: Namespace, words: Sequence[str]) -> None:
    folder = find_predictor(args.predictor)
    if args.traces is None:
        raise UserError("evaluate needs a trace set; give --traces DIR")
    traces = TraceSet(args.traces)
    if args.record:
        around_figures(folder)  # is there a place for them?
    source = from_predictor_folder(folder)
    asked_by = [lookahead for lookahead in source.lookaheads if lookahead != "next"]
    found = _evaluate(args, traces, args.split, source, asked_by)
    if args.json != "-":
        console = console_for(args.json)
        console.print(metrics_table(found.metrics))
        console.print(results_table(found.results, traces.geometry))
    write_result(found.to_json(), args.json)
    if args.record:
        manifest = traces.manifest
        figures = {
            "source": manifest.source,
            "fingerprint": manifest.fingerprint,
            "split": args.split,
            "command": _command(words[1:], args.predictor, folder.name),
            "metrics": [{n: value for n, value in row.items() if n not in TABLES} for row in found.metrics],
            "replay": [{n: value for n, value in row.to_json().items() if n in RECORDED} for row in found.results],
        }
        record_figures(folder, figures)


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
        elif word != "--record":
            kept.append(Path(word).name if Path(word).is_dir() else word)
    return shlex.join(kept)


def _run_folder(args: Namespace) -> None:
    folder, split = (args.traces, args.split) if args.traces else validation_data(args.predictor)
    split = args.split or split
    traces = TraceSet(folder)
    # One lookahead is enough to compare checkpoints by; --lookahead asks for others.
    found = list(evaluate_run(args.predictor, lambda one: _evaluate(args, traces, split, one, one.lookaheads[:1])))
    if args.json != "-":
        console_for(args.json).print(checkpoints_table(found, traces.geometry))
    rows = [
        {"checkpoint": one.checkpoint, "epoch": one.epoch, "step": one.step, **one.evaluation.to_json()}
        for one in found
    ]
    write_result({"checkpoints": rows}, args.json)


def _evaluate(
    args: Namespace, traces: TraceSet, split: str | None, source: ScoreSource, lookaheads: Sequence[Lookahead]
) -> Evaluation:
    shared = asked_conditions(args, traces)
    found = asked_combinations(args, traces, shared, source, lookaheads)
    asked = beside(found, shared.common, traces.geometry, shared.quotas)
    with showing_progress(traces, split, f"evaluating {source.name}", len(asked)) as progress:
        return evaluate(traces, asked, split, [source], measure=source, profile=shared.profile, progress=progress)
