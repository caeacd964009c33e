"""``moe-beyond report``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import Output, add_traces, command_parser
from moe_beyond.cli.replay_options import showing_progress
from moe_beyond.errors import UserError
from moe_beyond.evaluation.profiles import load_profile
from moe_beyond.evaluation.run import evaluate
from moe_beyond.evaluation.sources import from_predictor_folder, published_for
from moe_beyond.geometry import budget_slots
from moe_beyond.predictors.training_text import measured_text
from moe_beyond.report.html.build import write_page
from moe_beyond.report.html.source import find_subject
from moe_beyond.report.html.strategies import DEVICES, SHARES, default_slots, page_strategies
from moe_beyond.simulator import ReplaySettings
from moe_beyond.simulator.devices import load_device
from moe_beyond.traces.reader import TraceSet


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "report",
        "Write a page to look at: what a predictor was fitted on, how well it predicts a trace set, and what that is "
        "worth under budgets and on devices. One HTML file that needs nothing else.",
        "moe-beyond report runs/predictor/version_0 --traces traces/webglm --out report.html",
    )
    parser.add_argument(
        "predictor", metavar="RUN_OR_PREDICTOR", help="a run's folder, a predictor folder, or a published name"
    )
    add_traces(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the HTML file to write")
    shares = ", ".join(f"{share}%" for share in SHARES)
    parser.add_argument(
        "--budget",
        action="append",
        metavar="B",
        help=f"10%, 166 (slots), 2.9GB or 2.7GiB; repeat for more (default: {shares})",
    )
    parser.add_argument(
        "--device",
        action="append",
        metavar="D",
        help=f"a preset of `moe-beyond devices`, or a JSON file; repeat for more (default: {', '.join(DEVICES)})",
    )
    parser.add_argument(
        "--warmup-tokens", type=int, default=0, metavar="N", help="tokens of a sequence that replays do not count (0)"
    )
    return parser


def main(argv: list[str]) -> None:
    """Measure, write the page."""
    args = build_parser().parse_args(argv[1:])
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file, {Path(args.out) / 'report.html'} for example")
    _report(args)


def _report(args: Namespace) -> None:
    subject, traces = find_subject(args.predictor), TraceSet(args.traces)
    geometry, bits = traces.geometry, traces.manifest.quantization_bits
    devices = [load_device(text) for text in dict.fromkeys(args.device or DEVICES)]
    slots = [budget_slots(budget, geometry, bits) for budget in args.budget or ()] or default_slots(geometry)
    source = from_predictor_folder(subject.folder)
    common = ReplaySettings(geometry.total_experts, warmup_tokens=args.warmup_tokens, bits=bits)
    lines = page_strategies(common, slots, source, geometry, devices)
    history = published_for("history", traces)
    profile = None if history is None else load_profile(history, traces)
    text = measured_text(traces, args.split, [(source.name, source.training)])
    with showing_progress(traces, text.split, f"replaying {source.name}", len(lines), quiet=args.quiet) as progress:
        found = evaluate(traces, lines, text.split, [source], measure=source, profile=profile, progress=progress)
    write_page(
        args.out,
        subject,
        traces,
        text.split,
        found,
        notes=text.lines,
        source=source,
        devices=devices,
        bits=bits,
        warmup_tokens=args.warmup_tokens,
        profile=None if history is None else history.name,
    )
    output = Output(args)
    output.show(*text.lines, f"page: {args.out}")
    output.result({"measured_on": text.to_json(), **found.to_json()})
