"""``moe-beyond collect``."""

import math
import time
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import Output, parser, progress_bar
from moe_beyond.errors import UserError, unknown
from moe_beyond.traces.copies import describe_copies
from moe_beyond.traces.steering import read_steering

DTYPES = ("auto", "float32", "bfloat16", "float16")
COLDEST = 0.001  # colder, numbers overflow
RECORDED = ("experts", "gate_weights", "hidden_states")


def options() -> ArgumentParser:
    """Return the parser of this verb's options."""
    known = parser(
        "collect",
        "Run a transformers mixture of experts over prompts, and record its routing as a trace set. Killed at any "
        "moment, the same command goes on; under torchrun every rank takes its part.",
        "moe-beyond collect --model checkpoints/small-moe --prompts prompts.txt --out traces/mine --generate 64",
    )
    known.add_argument("--model", metavar="M", required=True, help="a folder, or a name on the Hugging Face Hub")
    known.add_argument("--revision", metavar="R", help="of the model: a branch, tag or commit")
    known.add_argument(
        "--prompts",
        metavar="P",
        required=True,
        help="a .txt file (a line a prompt), a .jsonl file (a record a line; chat messages go through the model's own "
        "template), or a data set: NAME[:SPLIT[:COLUMN]]",
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
    known.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, mps")
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
    from itertools import islice

    from moe_beyond.collect.asked import Collection
    from moe_beyond.collect.collect import collect
    from moe_beyond.collect.load import load_model
    from moe_beyond.collect.prompts import read_prompts

    output = Output(args)
    prompts = list(islice(read_prompts(args.prompts), args.max_prompts))
    model, tokenizer, bits = load_model(
        args.model, revision=args.revision, dtype=args.dtype, device=args.device, load_in=args.load_in
    )
    record = _recorded(args.record)
    asked = Collection(
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
    began, recorded = time.monotonic(), 0
    with progress_bar(f"collecting {args.out}", quiet=args.quiet) as bar:

        def progress(done: int, total: int, tokens: int) -> None:
            nonlocal recorded
            recorded += tokens
            bar(done, total, f"{recorded / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")

        traces = collect(
            model, tokenizer, prompts, args.out, asked, name=args.model, revision=args.revision, source=args.prompts,
            quantization_bits=bits, progress=progress,
        )  # fmt: skip
    if traces is None:
        return  # the first rank tells
    manifest = traces.manifest
    splits: dict[str, Any] = manifest.to_json()["splits"]
    for split, counts in splits.items():
        output.show(f"{args.out}: {split}: {counts['sequences']:,} sequences, {counts['tokens']:,} tokens")
    copies = traces.copies()
    output.show(f"{args.out}: exact copies: {describe_copies(copies)}")
    if steering is not None:
        output.show(f"{args.out}: steered: {steering}")
    output.result({"traces": args.out, "fingerprint": manifest.fingerprint, "splits": splits, "copies": copies})


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
    if args.temperature and not COLDEST <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature} is neither 0, for the most probable, nor {COLDEST} or more")
    if args.temperature and not args.generate:
        raise UserError("--temperature draws what --generate N writes; give it as well")
    for name, least in (("generate", 0), ("batch_size", 1), ("max_tokens", 1), ("max_prompts", 1), ("shard_tokens", 1)):
        if args[name] is not None and args[name] < least:
            raise UserError(f"--{name.replace('_', '-')} {args[name]} is less than {least}")
