"""``moe-beyond import``."""

import json
import shutil
import textwrap

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, check_workers, command_parser, progress_bar
from moe_beyond.errors import UserError
from moe_beyond.geometry import PRESETS, Geometry, load_preset
from moe_beyond.traces.copies import describe_copies
from moe_beyond.traces.formats import Option, format_reader, readable_formats


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "import",
        "Convert another tool's recording into a trace set.",
        "moe-beyond import vllm engine --out traces/engine --model deepseek-v2-lite",
    )
    parser.epilog = "\n".join([str(parser.epilog), "", *describe_formats(), "", *describe_models()])
    parser.add_argument(
        "format",
        metavar="FORMAT",
        help=f"format of the recording: {', '.join(readable_formats())}; described below",
    )
    parser.add_argument("source", metavar="RECORDING", help="recording: a file, or a folder of files")
    parser.add_argument("--out", metavar="DIR", required=True, help="trace set to write")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="model that was recorded: a preset (below), a folder with a config.json, a config.json, or "
        f"a geometry file; optional for {', '.join(self_describing())}",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE_OR_NAME",
        help="tokenizer of the token ids: a tokenizer.json, a folder with one, or a name on the Hub "
        "(default: the tokenizer "
        "of the preset or of the model's folder)",
    )
    parser.add_argument(
        "--quantization",
        type=float,
        metavar="BITS",
        help="bits per parameter of the model that was recorded (default: 16; moe-beyond-csv: 8)",
    )
    parser.add_argument(
        "--val-blocks",
        metavar="SIZE:EVERY",
        help="validation split: one in EVERY blocks of SIZE consecutive sequences (default: none)",
    )
    for option, names in format_options().values():
        parser.add_argument(
            option.flag, type=option.type, metavar=option.metavar, help=f"{option.help}; only for {', '.join(names)}"
        )
    parser.add_argument(
        "--predictions",
        metavar="DIR",
        help="MoE-Beyond's released predictions for the same prompts, for moe-beyond-csv only, with --scores",
    )
    parser.add_argument(
        "--scores", metavar="DIR", help="folder for these predictions, which `moe-beyond replay --scores` reads"
    )
    return parser


def format_options() -> dict[str, tuple[Option, list[str]]]:
    """Return the options that only some formats have, each with the names of these formats."""
    options: dict[str, tuple[Option, list[str]]] = {}
    for name, recording_format in readable_formats().items():
        for option in recording_format.options:
            options.setdefault(option.name, (option, []))[1].append(name)
    return options


def self_describing() -> list[str]:
    """Return the formats whose recordings describe their model."""
    return [name for name, recording_format in readable_formats().items() if recording_format.describes_model]


def describe_formats() -> list[str]:
    """Return the lines of the help text about formats."""
    lines = ["formats (K: experts per token and layer; NAME: the file's name without its ending):"]
    for name, recording_format in readable_formats().items():
        lines += ["", *(f"  {line}" for line in recording_format.describe(name))]
    return lines


def describe_models() -> list[str]:
    """Return the lines of the help text about ``--model``."""
    names = textwrap.wrap(", ".join(PRESETS), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    example = Geometry("mine", (1, 2, 3), num_experts=64, top_k=6, params_per_expert=8650752, other_params_per_layer=0)
    return [
        "model presets:",
        *names,
        "Any other model: its folder, or its config.json. A geometry file is a .json file such as",
        f"  {json.dumps(example.to_json())}",
    ]


def main(argv: list[str]) -> None:
    """Import a recording.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    read, own_options = format_reader(args.format), format_options()
    if (args.predictions is None) != (args.scores is None):
        raise UserError("--predictions and --scores belong together; give both or neither")
    only_for = {"predictions": ["moe-beyond-csv"], **{name: names for name, (_, names) in own_options.items()}}
    for name, names in only_for.items():
        if args[name] is not None and args.format not in names:
            raise UserError(f"--{name.replace('_', '-')} is only for {', '.join(names)} (got {args.format}); remove it")
    if args.quantization is not None and not args.quantization > 0:
        raise UserError(f"--quantization {args.quantization:g}: bits per parameter must be more than 0")
    if args.workers is not None:
        check_workers(args.workers)
    optional = {"quantization_bits": args.quantization, **{name: args[name] for name in own_options}}
    if args.model is None and args.format not in self_describing():
        raise UserError(f"import needs --model with {args.format}; name the model that was recorded")
    preset = None if args.model is None else load_preset(args.model)
    with progress_bar(f"importing {args.source}", quiet=args.quiet) as progress:
        traces = read(
            args.source,
            args.out,
            preset,
            tokenizer=args.tokenizer,
            val_blocks=args.val_blocks,
            progress=progress,
            **{name: value for name, value in optional.items() if value is not None},
        )
    if args.scores is not None:
        from moe_beyond.evaluation.released_predictions import import_released_predictions

        try:
            import_released_predictions(args.predictions, args.scores, traces)
        except UserError:
            shutil.rmtree(args.out)  # the command writes both or neither
            raise
    manifest = traces.manifest
    entries = manifest.tokens * manifest.geometry.num_layers
    size = sum(shard.bytes for shard in manifest.shards)
    splits = manifest.to_json()["splits"]
    output = Output(args)
    output.show(f"{args.out}: {entries:,} entries in = {entries:,} entries out, {size / entries:.2f} bytes per entry")
    for split, counts in splits.items():
        output.show(f"  {split}: {counts['sequences']:,} sequences, {counts['tokens']:,} tokens")
    copies = traces.copies()
    output.show(f"  exact copies: {describe_copies(copies)}")
    text, *notes = manifest.source.split("; ")
    output.show(f"  text: {text} (author: {manifest.author})")
    for note in notes:
        output.show(f"  {note}")
    if manifest.engine_log_sha256 is not None:
        output.show("  log of the engine: residency of every access, and its metrics if given")
    if not manifest.has_token_ids:
        output.show("  no token ids: predictors that read token ids cannot be fitted on this trace set")
    if args.scores is not None:
        output.show(f"{args.scores}: released predictions, lookahead 0")
    output.result(
        {
            "traces": args.out,
            "scores": args.scores,
            "fingerprint": manifest.fingerprint,
            "entries": entries,
            "bytes": size,
            "splits": splits,
            "copies": copies,
            "source": manifest.source,
            "token_ids": manifest.has_token_ids,
        }
    )
