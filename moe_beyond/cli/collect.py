"""``moe-beyond collect``."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import Output, parser, progress_bar
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.out_folder import check_out, parts_folder
from moe_beyond.collect.prompts import COLUMNS, read_prompts
from moe_beyond.errors import UserError, unknown
from moe_beyond.files import is_taken
from moe_beyond.traces.copies import describe_copies
from moe_beyond.traces.steering import read_steering

DTYPES = ("auto", "float32", "bfloat16", "float16")
RECORDED = ("experts", "gate_weights", "hidden_states")


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "collect",
        "Run a transformers mixture of experts over prompts, and record its routing as a trace set. Killed at any "
        "moment, the same command goes on; under torchrun every rank takes its part.",
        "moe-beyond collect --model checkpoints/small-moe --prompts prompts.txt --out traces/mine --generate 64",
    )
    known.add_argument(
        "--model",
        metavar="M",
        required=True,
        help="a folder, ORG/REPO on the Hugging Face Hub, or a model that ships with this package (small-moe). Code "
        "that comes with a model is never run",
    )
    known.add_argument(
        "--revision", metavar="R", help="branch, tag or commit on the Hub, for all files of the model (main)"
    )
    known.add_argument(
        "--prompts",
        metavar="P",
        required=True,
        help="a .txt file (one prompt per line; blank lines are skipped); records in a .jsonl, .json, .csv, .tsv "
        f"or .parquet file, FILE[:COLUMN], with the text under one of {', '.join(COLUMNS)}; or a data set, "
        "ORG/NAME[:SPLIT[:COLUMN]]. Chat messages (role and content, or from and value) go through the model's chat "
        "template. The input of an Alpaca record follows its instruction after a blank line",
    )
    known.add_argument("--out", metavar="DIR", required=True, help="the trace set to make")
    known.add_argument("--generate", type=int, default=0, metavar="N", help="tokens to write after each prompt (0)")
    known.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw them from the model's distribution at this temperature; 0 (default) takes the most probable",
    )
    known.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of drawing (0); what comes depends on the batches"
    )
    known.add_argument(
        "--record",
        default="experts,gate_weights",
        metavar="WHAT",
        help=f"of {', '.join(RECORDED)}; by default the first two. Hidden states are some hundred times as large, and "
        "bring the model's routers along",
    )
    known.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts at once (8)")
    known.add_argument("--dtype", default="auto", help=f"to compute in: {', '.join(DTYPES)} (as stored)")
    known.add_argument(
        "--device",
        metavar="D",
        help="cpu, cuda, cuda:1, mps; auto spreads a model that does not fit over GPUs, host memory and disk (with "
        "accelerate), FILE.json as its device map says. Default: a GPU if there is one, or else cpu",
    )
    known.add_argument("--max-tokens", type=int, metavar="M", help="cut longer prompts; they are refused without")
    known.add_argument("--max-prompts", type=int, metavar="N", help="take the first N prompts alone")
    known.add_argument("--val-blocks", metavar="SIZE:EVERY", help="hold blocks of SIZE prompts out, one in EVERY")
    known.add_argument("--shard-tokens", type=int, default=65536, metavar="S", help="tokens of a shard (65536)")
    known.add_argument(
        "--steer",
        metavar="FILE",
        help='force experts on or off in all that is read and written: a JSON file, {"on": [[layer, expert], ...], '
        '"off": [[layer, expert], ...]}',
    )
    known.add_argument("--load-in", metavar="BITS", help="8bit or 4bit, by bitsandbytes (not tested here)")
    return known


def run(words: list[str]) -> None:
    """Collect."""
    args = options().parse_args(words[1:])
    _check(args)
    steering = None if args.steer is None else read_steering(args.steer)
    record = _recorded(args.record)
    asked = CollectConfig(
        generate=args.generate,
        temperature=args.temperature,
        seed=args.seed if args.temperature else 0,
        val_blocks=args.val_blocks,
        gate_weights="gate_weights" in record,
        hidden_states="hidden_states" in record,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        shard_tokens=args.shard_tokens,
        steering=steering,
    )
    out = Path(args.out)
    if is_taken(out) and ProcessRank().number:
        return  # the first rank has made it, or says why it cannot
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
    tokenize_prompts(prompts, checkpoint.tokenizer, checkpoint.config, asked, args.prompts)  # before weights are loaded
    if checkpoint.has_code:
        notices.append(f"{args.model}: its own code (auto_map) is not run; transformers' own model is used")
    began, recorded, batches = time.monotonic(), 0, (0, 0)
    with offloading(out, device) as folder:
        model = checkpoint.load(dtype=args.dtype, device=device, load_in=args.load_in, offload_folder=folder)
        place = describe(model)
        with progress_bar(f"collecting {args.out} on {place}", quiet=args.quiet) as bar:

            def progress(done: int, total: int, tokens: int) -> None:
                nonlocal recorded, batches
                recorded, batches = recorded + tokens, (done, total)
                bar(done, total, f"{recorded / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")

            try:
                traces = collect(
                    model, checkpoint.tokenizer, prompts, out, asked, name=checkpoint.model_id,
                    revision=checkpoint.revision, source=args.prompts, quantization_bits=bits(args.load_in),
                    progress=progress, notice=notices.append,
                )  # fmt: skip
            except KeyboardInterrupt:
                done, total = batches
                print(
                    f"moe-beyond: {done} of {total} batches are kept in {parts_folder(out)}; the same command goes on",
                    file=sys.stderr,
                )
                raise
    if traces is None:
        return  # the first rank says so
    manifest = traces.manifest
    splits: dict[str, Any] = manifest.to_json()["splits"]
    for split, counts in splits.items():
        output.show(f"{args.out}: {split}: {counts['sequences']:,} sequences, {counts['tokens']:,} tokens, on {place}")
    copies = traces.copies()
    output.show(f"{args.out}: exact copies: {describe_copies(copies)}")
    if steering is not None:
        output.show(f"{args.out}: steered: {steering}")
    output.show(*notices)
    output.result({"traces": args.out, "fingerprint": manifest.fingerprint, "splits": splits, "copies": copies})


@contextmanager
def offloading(out: Path, device: str | dict[str, Any]) -> Iterator[Path | None]:
    """Yield a folder next to the trace set for weights that go to disk, None if none can; remove it at the end."""
    if isinstance(device, str) and device != "auto":
        yield None
        return
    folder = out.parent / f".{out.name}.offload"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _recorded(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


def _check(args: Namespace) -> None:
    """Refuse what cannot be, before a model is loaded.

    Raises:
        UserError: An option cannot be read.
    """
    for what in _recorded(args.record):
        if what not in RECORDED:
            raise unknown("--record", what, RECORDED)
    if args.dtype not in DTYPES:
        raise unknown("--dtype", args.dtype, DTYPES)
    if args.load_in not in (None, "8bit", "4bit"):
        raise unknown("--load-in", args.load_in, ("8bit", "4bit"))
    if args.json not in (None, "-") and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file, or - for standard output")
    if args.max_prompts is not None and args.max_prompts < 1:
        raise UserError(f"--max-prompts {args.max_prompts} is less than 1")
