"""``moe-beyond collect``."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import MODEL_HELP, REVISION_HELP, Output, command_parser, progress_bar
from moe_beyond.collect.config import DTYPES, CollectConfig, ProcessRank, StateLayers
from moe_beyond.collect.out_folder import check_out, parts_folder
from moe_beyond.collect.prompts import COLUMNS, read_prompts
from moe_beyond.errors import UserError, unknown
from moe_beyond.files import is_taken
from moe_beyond.safe_text import shown
from moe_beyond.traces.copies import describe_copies
from moe_beyond.traces.hidden_states import DTYPES as STATE_DTYPES
from moe_beyond.traces.steering import read_steering

RECORDED = ("experts", "gate_weights", "hidden_states")


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "collect",
        "Run a mixture-of-experts model of transformers over prompts and record its routing as a trace set. After an "
        "interruption, the same command resumes. Under torchrun every process takes a part of the prompts.",
        "moe-beyond collect --model small-moe --prompts prompts.txt --out traces/mine --generate 64",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help=MODEL_HELP,
    )
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        help=REVISION_HELP,
    )
    parser.add_argument(
        "--prompts",
        metavar="PROMPTS",
        required=True,
        help="prompts: a .txt file with one prompt per line (blank lines are skipped); a .jsonl, .json, .csv, .tsv or "
        f".parquet file, FILE[:COLUMN] (default column: the first of {', '.join(COLUMNS)}); or a data set, "
        "ORG/NAME[:SPLIT[:COLUMN]]. Chat messages (role and content, or from and value) are formatted by the model's "
        "chat template. The input of an Alpaca record follows its instruction after a blank line. The field split of a "
        "record names its split (default: train)",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="trace set to write")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="tokens to generate per prompt (default: 0)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="TEMPERATURE",
        help="sampling temperature; 0 chooses the most probable token (default: 0)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="SEED",
        help="random seed for sampling (default: 0); results also depend on the batch size",
    )
    parser.add_argument(
        "--record",
        metavar="LIST",
        help=f"comma-separated data to record, out of {', '.join(RECORDED)} (default: experts,gate_weights); hidden "
        "states take a hundred to a thousand times the bytes of the experts, and add the model's router weights",
    )
    parser.add_argument(
        "--state-dtype",
        default="float16",
        metavar="DTYPE",
        help=f"data type of stored hidden states: {', '.join(STATE_DTYPES)} (default: float16); int8 has one scale per "
        "token and layer",
    )
    parser.add_argument(
        "--state-layers",
        default="all",
        metavar="all|N|LIST",
        help="MoE layers whose hidden states are recorded: all, a number of evenly spaced layers, or a comma-separated "
        "list of layers, numbered as in inspect (default: all)",
    )
    parser.add_argument(
        "--state-width",
        type=int,
        metavar="W",
        help="width of stored hidden states, projected onto what the next routers read (default: the model's, not "
        "projected)",
    )
    parser.add_argument(
        "--no-tokens",
        action="store_true",
        help="record only expert ids, lengths and splits: no token ids, tokenizer, gate weights or names of prompts",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts per batch (default: 8)")
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help=f"data type to compute in: {', '.join(DTYPES)} (default: auto, as stored)",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1 or mps; auto spreads a model over GPUs, host memory and disk (needs accelerate); "
        "FILE.json is a device map of accelerate (default: a GPU if there is one, otherwise cpu)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="truncate prompts to N tokens (default: longer prompts are an error)",
    )
    parser.add_argument("--max-prompts", type=int, metavar="N", help="use only the first N prompts (default: all)")
    parser.add_argument(
        "--val-blocks",
        metavar="SIZE:EVERY",
        help="validation split: one in EVERY blocks of SIZE consecutive prompts (default: none)",
    )
    parser.add_argument(
        "--test-blocks",
        metavar="SIZE:EVERY",
        help="test split: one in EVERY blocks of SIZE consecutive prompts, before --val-blocks (default: none)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="tokens per shard of the trace set (default: 65536)",
    )
    parser.add_argument(
        "--steer",
        metavar="FILE",
        help='force experts on or off for every token: a JSON file, {"on": [[layer, expert], ...], "off": [[layer, '
        "expert], ...]} (default: no steering)",
    )
    parser.add_argument(
        "--load-in",
        metavar="8bit|4bit",
        help="quantize the weights with bitsandbytes (default: no quantization; not tested)",
    )
    parser.epilog = f"{parser.epilog}\n\nmoe_beyond.record does the same in Python, with a loaded model."
    return parser


def main(argv: list[str]) -> None:
    """Record the routing of a model.

    Args:
        argv: The command and its options.
    """
    args = build_parser().parse_args(argv[1:])
    _check(args)
    steering = None if args.steer is None else read_steering(args.steer)
    record = None if args.record is None else _parse_list(args.record)
    config = CollectConfig(
        generate=args.generate,
        temperature=args.temperature,
        seed=args.seed if args.temperature else 0,
        val_blocks=args.val_blocks,
        test_blocks=args.test_blocks,
        tokens=not args.no_tokens,
        gate_weights=None if record is None else "gate_weights" in record,
        hidden_states="hidden_states" in (record or ()),
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        shard_tokens=args.shard_tokens,
        steering=steering,
        state_dtype=args.state_dtype,
        state_layers=_parse_layers(args.state_layers),
        state_width=args.state_width,
    )
    out = Path(args.out)
    if is_taken(out) and ProcessRank().number:
        return  # the first process has written it, or reports the error
    check_out(out)
    from itertools import islice

    from moe_beyond.collect.collection import collect
    from moe_beyond.collect.devices import describe, placement
    from moe_beyond.collect.load import bits, open_checkpoint
    from moe_beyond.collect.tokenize import tokenize_prompts

    output, notices = Output(args), list[str]()
    device = placement(args.device)
    prompts = list(islice(read_prompts(args.prompts, notices.append), args.max_prompts))
    checkpoint = open_checkpoint(args.model, args.revision)
    tokenize_prompts(
        prompts, checkpoint.tokenizer, checkpoint.config, config, args.prompts
    )  # before weights are loaded
    if checkpoint.has_code:
        notices.append(f"{args.model}: its code (auto_map) is not run; the model class of transformers is used")
    start, recorded, batches = time.monotonic(), 0, (0, 0)
    with offloading(out, device) as folder:
        model = checkpoint.load(dtype=args.dtype, device=device, load_in=args.load_in, offload_folder=folder)
        place = describe(model)
        with progress_bar(f"collecting {args.out} on {place}", quiet=args.quiet) as bar:

            def progress(done: int, total: int, tokens: int) -> None:
                nonlocal recorded, batches
                recorded, batches = recorded + tokens, (done, total)
                bar(done, total, f"{recorded / max(time.monotonic() - start, 1e-9):,.0f} tokens/s")

            try:
                traces = collect(
                    model, checkpoint.tokenizer, prompts, out, config, name=checkpoint.model_id,
                    revision=checkpoint.revision, source=args.prompts, quantization_bits=bits(args.load_in),
                    progress=progress, notice=notices.append,
                )  # fmt: skip
            except KeyboardInterrupt:
                done, total = batches
                print(
                    f"moe-beyond: {done} of {total} batches are stored in {parts_folder(out)}; run the "
                    f"same command to resume",
                    file=sys.stderr,
                )
                raise
    if traces is None:
        return  # the first process prints the result
    manifest = traces.manifest
    splits: dict[str, Any] = manifest.to_json()["splits"]
    for split, counts in splits.items():
        output.show(f"{args.out}: {split}: {counts['sequences']:,} sequences, {counts['tokens']:,} tokens, on {place}")
    copies = traces.copies()
    output.show(f"{args.out}: exact copies: {describe_copies(copies)}")
    if steering is not None:
        output.show(f"{args.out}: steered: {steering}")
    if manifest.states_description is not None:
        output.show(f"{args.out}: hidden states: {manifest.states_description}")
    output.show(*notices)
    output.result({"traces": args.out, "fingerprint": manifest.fingerprint, "splits": splits, "copies": copies})


@contextmanager
def offloading(out: Path, device: str | dict[str, Any]) -> Iterator[Path | None]:
    """Yield a folder for weights on disk, next to the trace set; None if no weights go there. Remove it at the end."""
    if isinstance(device, str) and device != "auto":
        yield None
        return
    folder = out.parent / f".{out.name}.offload"
    shutil.rmtree(folder, ignore_errors=True)  # from a run that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _parse_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _parse_layers(text: str) -> StateLayers:
    """Parse ``--state-layers``; a comma at the end makes a list of one layer.

    Raises:
        UserError: The value has another form.
    """
    if text == "all":
        return "all"
    numbers = [item.strip() for item in text.removesuffix(",").split(",")]
    if not all(number.isdecimal() and len(number) < 10 for number in numbers):
        raise UserError(
            f"--state-layers: must be all, a number of layers, or a list of layers such as 1,5,9 (got {shown(text)})"
        )
    return tuple(map(int, numbers)) if "," in text else int(text)


def _check(args: Namespace) -> None:
    """Refuse wrong values of options before a model is loaded.

    Raises:
        UserError: A value is wrong.
    """
    for item in _parse_list(args.record or RECORDED[0]):
        if item not in RECORDED:
            raise unknown("--record", item, RECORDED)
    if args.dtype not in DTYPES:
        raise unknown("--dtype", args.dtype, DTYPES)
    if args.load_in not in (None, "8bit", "4bit"):
        raise unknown("--load-in", args.load_in, ("8bit", "4bit"))
    if args.json not in (None, "-") and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file, or - for standard output")
    if args.max_prompts is not None and args.max_prompts < 1:
        raise UserError(f"--max-prompts {args.max_prompts} is less than 1")
