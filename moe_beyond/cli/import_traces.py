"""``moe-beyond import``."""

import shutil

from jsonargparse import ArgumentParser

from moe_beyond.cli.options import Output, parser, progress_bar
from moe_beyond.errors import UserError, unknown
from moe_beyond.geometry import load_preset
from moe_beyond.traces.copies import describe_copies
from moe_beyond.traces.importers import IMPORTERS


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "import",
        "Turn another tool's recording into a trace set.",
        "moe-beyond import moe-beyond-csv puffin --out traces/puffin --model deepseek-v2-lite --val-blocks 20:10",
    )
    known.add_argument("format", help=f"one of: {', '.join(IMPORTERS)}")
    known.add_argument("source", metavar="SRC", help="the recording: a file, or a folder of files")
    known.add_argument("--out", metavar="DIR", required=True, help="the trace set to make")
    known.add_argument("--model", metavar="MODEL", required=True, help="a model preset, or a geometry or config.json")
    known.add_argument("--tokenizer", metavar="FILE_OR_NAME", help="the model's tokenizer; the preset's by default")
    known.add_argument(
        "--quantization",
        type=float,
        metavar="BITS",
        help="bits per parameter that the model ran with; 16 by default (moe-beyond-csv: 8)",
    )
    known.add_argument(
        "--val-blocks", metavar="SIZE:EVERY", help="blocks of SIZE consecutive prompts, one in EVERY for validation"
    )
    known.add_argument(
        "--sequence-tokens", type=int, metavar="N", help="rows that make a sequence (flame-moe alone); 2048 by default"
    )
    known.add_argument(
        "--predictions",
        metavar="DIR",
        help="MoE-Beyond's released predictions for the same prompts (moe-beyond-csv, with --scores)",
    )
    known.add_argument("--scores", metavar="DIR", help="folder to write them to, for `moe-beyond replay --scores`")
    return known


def run(words: list[str]) -> None:
    """Import."""
    args = options().parse_args(words[1:])
    if args.format not in IMPORTERS:
        raise unknown("format", args.format, IMPORTERS)
    if (args.predictions is None) != (args.scores is None):
        raise UserError("--predictions and --scores belong together; give both or neither")
    for option, only in (("predictions", "moe-beyond-csv"), ("sequence_tokens", "flame-moe")):
        if args[option] is not None and args.format != only:
            raise UserError(f"--{option.replace('_', '-')} is for {only} alone")
    if args.quantization is not None and not args.quantization > 0:
        raise UserError(f"--quantization {args.quantization:g}: bits per parameter must be more than 0")
    named = {"quantization_bits": args.quantization, "sequence_tokens": args.sequence_tokens}
    preset = load_preset(args.model)
    with progress_bar(f"importing {args.source}", quiet=args.quiet) as progress:
        traces = IMPORTERS[args.format](
            args.source,
            args.out,
            preset,
            tokenizer=args.tokenizer,
            val_blocks=args.val_blocks,
            progress=progress,
            **{name: value for name, value in named.items() if value is not None},
        )
    if args.scores is not None:
        from moe_beyond.predictors.released import import_released_predictions

        try:
            import_released_predictions(args.predictions, args.scores, traces)
        except UserError:
            shutil.rmtree(args.out)  # one command makes both or neither
            raise
    manifest = traces.manifest
    entries = manifest.tokens * manifest.geometry.num_layers
    size = sum(shard.bytes for shard in manifest.shards)
    splits = manifest.to_json()["splits"]
    output = Output(args)
    output.show(f"{args.out}: {entries:,} entries in = {entries:,} entries out, {size / entries:.2f} bytes an entry")
    for split, counts in splits.items():
        output.show(f"  {split}: {counts['sequences']:,} sequences, {counts['tokens']:,} tokens")
    copies = traces.copies()
    output.show(f"  exact copies: {describe_copies(copies)}")
    output.show(f"  text: {manifest.source} (author: {manifest.author})")
    if not manifest.has_token_ids:
        output.show("  no token ids: the recording tells none, and nothing that reads them can be fitted on it")
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
            "token_ids": manifest.has_token_ids,
        }
    )
