"""Overhead of recording over a model's bare forward pass, and the speed of `moe-beyond collect`.

    python tools/bench_collect.py [--model checkpoints/small-moe] [--batch-size 8] [--dtype auto] [--hidden-states]
        [--json FILE]

Prompts are read and answered in batches of one length, so that nothing is padded. The bare model and the model with
hooks run in turn; the recorded values are collected. The results are medians over all batches and repeats, and the
median ratio of two consecutive runs of one batch. They are processor times on one core, so that other processes
disturb them little. `collect` as a whole is timed by the clock. Its time outside the model is writing, and work that
is done once per collection.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_beyond.collect.collection import collect
from moe_beyond.collect.config import CollectConfig, ProcessRank
from moe_beyond.collect.load import load_model
from moe_beyond.collect.prompts import Prompt, read_prompts
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.router_probe import find_routers
from moe_beyond.files import write_json
from moe_beyond.pretrained import shipped_folder

SMALL = shipped_folder("small-moe")


def main() -> None:
    """Parse the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMALL), help="model folder (default: small-moe)")
    parser.add_argument(
        "--prompts",
        default=str(SMALL / "prompts.jsonl"),
        help="prompts, as for moe-beyond collect (default: those of small-moe)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per batch (default: 8)")
    parser.add_argument("--batches", type=int, default=8, help="number of batches (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per batch (default: 5)")
    parser.add_argument("--dtype", default="auto", help="floating-point type (default: auto, as stored)")
    parser.add_argument("--read", type=int, default=128, help="tokens per prompt that is read (default: 128)")
    parser.add_argument("--answer", type=int, default=16, help="tokens per prompt that is answered (default: 16)")
    parser.add_argument("--generate", type=int, default=32, help="generated tokens per answer (default: 32)")
    parser.add_argument("--hidden-states", action="store_true", help="also record hidden states")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    model, tokenizer, _ = load_model(args.model, dtype=args.dtype)
    model.eval()
    count = args.batch_size * args.batches
    figures = {}
    for name, length, generate in (("reading", args.read, 0), ("generating", args.answer, args.generate)):
        prompts = [p for p in read_prompts(args.prompts) if len(tokenizer(p.text).input_ids) >= length][:count]
        if len(prompts) < count:
            raise SystemExit(
                f"{args.prompts}: {len(prompts)} prompts of {length} tokens (need {count}); lower --batches"
            )
        asked = CollectConfig(generate, batch_size=args.batch_size, max_tokens=length, hidden_states=args.hidden_states)
        figures[name] = measure(model, tokenizer, prompts, asked, args.repeats)
    states = ", hidden states" if args.hidden_states else ""
    table = Table(title=f"{Path(args.model).name}, {args.dtype}, batches of {args.batch_size}, one core{states}")
    for column in ("", *figures):
        table.add_column(column, justify="right" if column else "left")
    for title, key, shown in (
        ("tokens per batch", "tokens", "{:,.0f}"),
        ("bare forward, ms per batch", "forward_ms", "{:,.1f}"),
        ("hooks, ms per batch", "hooks_ms", "{:,.1f}"),
        ("writing, ms per batch", "writing_ms", "{:,.1f}"),
        ("recorded over bare forward", "recorded_over_bare", "{:.3f}"),
        ("  quartiles", "quartiles", "{0[0]:.3f} .. {0[1]:.3f}"),
        ("tokens/s of collect", "tokens_per_second", "{:,.0f}"),
    ):
        table.add_row(title, *(shown.format(found[key]) for found in figures.values()))
    Console(width=120).print(table)
    if args.json:
        settings = {"model": Path(args.model).name, "dtype": args.dtype, "batch_size": args.batch_size}
        write_json(args.json, {**settings, "hidden_states": args.hidden_states, "repeats": args.repeats, **figures})


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    asked: CollectConfig,
    repeats: int,
) -> dict[str, object]:
    """Time the bare and the recorded model in turn, and `collect`."""
    texts = [tokenizer(prompt.text).input_ids[: asked.max_tokens] for prompt in prompts]
    batches = torch.tensor(texts).split(asked.batch_size)
    routers = find_routers(model) if asked.hidden_states else None
    readers = None if routers is None else {layer: router.module for layer, router in routers.items()}

    def bare(ids: Tensor) -> float:
        with torch.inference_mode():
            return seconds(lambda: run(model, ids, asked.generate))

    def recorded(ids: Tensor) -> float:
        def record() -> None:
            run(model, ids, asked.generate)
            recorder.pop()

        with recording(model, readers) as recorder, torch.inference_mode():
            return seconds(record)

    bare(batches[0]), recorded(batches[0])  # to warm up
    pairs = []
    for repeat in range(repeats):
        for number, ids in enumerate(batches):
            if (repeat + number) % 2:  # alternate: the second run has its weights in the processor's cache
                pairs.append((bare(ids), recorded(ids)))
            else:
                pairs.append((recorded(ids), bare(ids))[::-1])
    wholes, tokens = [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, timing(model) as inside:
            began = time.perf_counter()
            traces = collect(model, tokenizer, prompts, Path(folder) / "traces", asked, rank=ProcessRank(0, 1))
            whole = time.perf_counter() - began
        assert traces is not None
        wholes.append((whole, whole - sum(inside)))
        tokens = traces.manifest.tokens
    ratios = [with_hooks / without for without, with_hooks in pairs]
    ratio, forward = statistics.median(ratios), statistics.median(without for without, _ in pairs)
    return {
        "tokens": tokens / len(batches),
        "forward_ms": 1e3 * forward,
        "hooks_ms": 1e3 * (ratio - 1) * forward,
        "writing_ms": 1e3 * statistics.median(rest for _, rest in wholes) / len(batches),
        "recorded_over_bare": ratio,
        "quartiles": statistics.quantiles(ratios)[::2],
        "tokens_per_second": tokens / statistics.median(whole for whole, _ in wholes),
    }


@contextmanager
def timing(model: PreTrainedModel) -> Iterator[list[float]]:
    """Yield a list that receives the seconds of every outer call of the model."""
    found: list[float] = []
    inside = False

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def after(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return call(*args, **kwargs)
            inside, began = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                inside = False
                found.append(time.perf_counter() - began)

        return functools.wraps(call)(after)

    before = model.forward, model.generate
    model.forward, model.generate = map(timed, before)
    try:
        yield found
    finally:
        model.forward, model.generate = before


def run(model: PreTrainedModel, ids: Tensor, generate: int) -> None:
    """Run the model over prompts, or let it answer greedily, as `collect` does."""
    mask = torch.ones_like(ids)
    if generate:
        model.generate(ids, attention_mask=mask, max_new_tokens=generate, do_sample=False, pad_token_id=0)
    else:
        model(ids, attention_mask=mask, use_cache=False)


def seconds(way: Callable[[], None]) -> float:
    """Return the processor time of a call."""
    began = time.process_time()
    way()
    return time.process_time() - began


if __name__ == "__main__":
    main()
