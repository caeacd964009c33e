"""Compare the recall and the hits of a running small-moe with an offline evaluation of the same tokens.

    python tools/compare_run_recall.py PREDICTOR [--prompts N] [--new-tokens N] [--budget B] [--text LIB] [--json FILE]

The predictor may read hidden states. small-moe generates greedily after the first token of texts that it never saw:
once with the predictor scoring only, then with `belief` by its scores, and with `lru` and top-K prefetching. The
unmodified model generates the same prompts, and its hidden states are recorded. Offline, the predictor scores the
sequences in one pass, and replays without times repeat the caches; prefetches of a run take time. Exit code 1: a recall
differs by more than 0.2 points, or hits differ without prefetches.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compare_predictors import SMALL, add_text, excerpts
from rich.console import Console
from rich.table import Table

import moe_beyond as mb
from moe_beyond.cache.steps import EventRecord
from moe_beyond.collect.load import load_model
from moe_beyond.collect.recorder import recording
from moe_beyond.collect.router_probe import find_routers
from moe_beyond.files import write_json
from moe_beyond.lookahead import format_lookahead
from moe_beyond.metrics.routing import RoutingMetrics
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.batch import collate
from moe_beyond.predictors.io.folder import read_predictor
from moe_beyond.pretrained import find_predictor
from moe_beyond.runtime.run import OffloadedRun
from moe_beyond.simulator import Replay
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.traces.hidden_states import HiddenStates
from moe_beyond.traces.trace import Trace
from moe_beyond.validation.stepped_scores import stepped_scores

Scores = npt.NDArray[np.float32]

EVENTS = [EventRecord.HITS, EventRecord.LATE_HITS, EventRecord.MISSES]


def main() -> None:
    """Parse the options, run, evaluate offline, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictor", help="predictor folder or pretrained name")
    parser.add_argument("--prompts", type=int, default=40, help="number of prompts (default: 40)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate per prompt (default: 64)")
    parser.add_argument("--budget", default="25%", help="memory for experts (default: 25%%)")
    add_text(parser)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    predictor = read_predictor(find_predictor(args.predictor))
    model, tokenizer, _ = load_model(str(SMALL), dtype="float32")
    held_out = (each.text for each in excerpts(args.text, tokenizer, 10**9) if each.split == "validation")
    texts = (tokenizer(text, add_special_tokens=False).input_ids for text in held_out if text is not None)
    # One token, because scores of a layer's next run come later after a prompt of several tokens than in a replay.
    prompts = [ids[:1] for ids in islice(texts, args.prompts)]
    options: dict[str, Any] = {"budget": args.budget, "predictor": predictor, "keep_rows": True}
    with mb.offload(model, predict_only=True, **options) as run:
        generate(model, prompts, args.new_tokens)
    assert run.predictions is not None
    in_run = {
        format_lookahead(lookahead): sum(each.found for each in layers) / sum(each.chosen for each in layers)
        for lookahead, layers in run.predictions.agreement().items()
        if lookahead != "next"  # a run has no such score of a sequence's first token
    }
    traces = recorded(model, prompts, args.new_tokens, run)
    scores = [probabilities(predictor, trace) for trace in traces]
    offline = recalls(predictor, traces, scores)
    table = Table(
        title=f"{args.predictor} on small-moe: {len(prompts)} prompts, {args.new_tokens} generated tokens each"
    )
    for name in ("figure", "in the run", "offline"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for lookahead, recall in in_run.items():
        table.add_row(f"recall@k, lookahead {lookahead}", f"{recall:.2%}", f"{offline[lookahead]:.2%}")
    figures: dict[str, Any] = {"recall": {"run": in_run, "offline": offline}, "hits": {}}
    for policy, prefetch in (("belief", "none"), ("lru", f"top{predictor.geometry.top_k}")):
        with mb.offload(model, policy=policy, prefetch=prefetch, **options) as run:
            generate(model, prompts, args.new_tokens)
        events = [[event.hits, event.late_hits, event.misses] for event in run.telemetry.events]
        replayed = replay(predictor, traces, scores, run)
        equal = sum(ours == theirs for ours, theirs in zip(events, replayed, strict=True))
        rates = [hit_rate(each) for each in (events, replayed)]
        name = f"{policy} + {prefetch}"
        table.add_row(f"hit rate, {name}", *(f"{rate:.2%}" for rate in rates))
        table.add_row(f"events of equal hits, {name}", f"{equal:,}", f"{len(events):,}")
        figures["hits"][name] = {"run": rates[0], "offline": rates[1], "events": len(events), "equal events": equal}
    Console(width=110).print(table)
    if args.json:
        write_json(args.json, figures)
    apart = [abs(recall - offline[name]) / 0.002 for name, recall in in_run.items()]
    without = figures["hits"]["belief + none"]
    if max(apart) > 1 or without["equal events"] < without["events"]:
        raise SystemExit(1)


def generate(model: Any, prompts: Sequence[list[int]], tokens: int) -> None:
    """Let a model continue each prompt greedily by a number of tokens."""
    for prompt in prompts:
        with torch.inference_mode():
            model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def recorded(model: Any, prompts: Sequence[list[int]], tokens: int, run: OffloadedRun) -> list[Trace]:
    """Record the hidden states of the unmodified model, and return a run's sequences with them."""
    readers = {layer: router.module for layer, router in find_routers(model).items()}
    traces = []
    for number, prompt in enumerate(prompts):
        calls: list[HiddenStates] = []
        with recording(model, readers) as recorder:
            handle = model.register_forward_hook(lambda *_: calls.append(recorder.pop()[0].hidden_states))  # noqa: B023
            generate(model, [prompt], tokens)
            handle.remove()
        states = HiddenStates(*(np.concatenate([getattr(call, kind) for call in calls])
                                for kind in ("router_inputs", "layer_inputs")))  # fmt: skip
        sequence = run.log.sequences[number]
        ids = np.concatenate(sequence.token_ids).astype(np.int32)
        routing = sequence.routing(run.geometry.num_layers)
        traces.append(Trace(str(number), "small-moe", ids, routing, len(prompt), hidden_states=states))
    return traces


@torch.inference_mode()
def probabilities(predictor: Predictor, trace: Trace) -> Scores:
    """Return the scores ``(T, H, L, E)`` of a sequence."""
    batch = collate([trace])
    return np.asarray(predictor.probabilities(predictor(batch))[0].numpy(), np.float32)


def recalls(predictor: Predictor, traces: Sequence[Trace], scores: Sequence[Scores]) -> dict[str, float]:
    """Return the recall of the generated tokens by lookahead."""
    lookaheads, shape = predictor.information.lookaheads, predictor.geometry.shape()
    metrics = RoutingMetrics(len(lookaheads), *shape)
    for trace, each in zip(traces, scores, strict=True):
        batch = collate([trace])
        metrics.update(torch.from_numpy(each)[None], batch.targets(shape[1]), batch.mask, None)
    rows = metrics.rows(lookaheads, predictor.geometry.moe_layers)
    return {format_lookahead(row.lookahead): row.recall_at_k for row in rows if row.lookahead != "next"}


def replay(
    predictor: Predictor, traces: Sequence[Trace], scores: Sequence[Scores], run: OffloadedRun
) -> list[list[int]]:
    """Return the hits, late hits and misses of each event of a replay without times."""
    settings = replace(run.strategy.settings, measured_times=False)
    replaying, counts = Replay(run.geometry, settings, run.strategy.profile), list[list[int]]()
    for trace, each in zip(traces, scores, strict=True):
        _, after = stepped_scores(predictor, trace, each)  # lookahead next reads no hidden states
        sequence = ReplaySequence(run.geometry, trace.experts, each, scores_after=after)
        counts += replaying.watch(sequence)[0][:, EVENTS].astype(int).tolist()
    return counts


def hit_rate(events: Sequence[Sequence[float]]) -> float:
    """Return the share of demanded experts that were in the cache or in transit."""
    hits, late, misses = np.sum(events, 0)
    return float((hits + late) / (hits + late + misses))


if __name__ == "__main__":
    main()
