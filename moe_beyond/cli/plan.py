"""``moe-beyond plan``."""

from dataclasses import replace
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from moe_beyond.cli.options import Output, add_traces, command_parser
from moe_beyond.cli.replay_options import (
    add_budgets,
    add_conditions,
    add_strategies,
    asked_source,
    request_of,
    showing_progress,
)
from moe_beyond.errors import UserError
from moe_beyond.evaluation.options import Conditions, asked_conditions, asked_slots, asked_strategies, text_to_measure
from moe_beyond.evaluation.run import evaluate
from moe_beyond.evaluation.sizing import Answer, Target, parse_target, pins, plan
from moe_beyond.evaluation.strategies import CLAIRVOYANT, REFERENCES, evenly, in_windows, strategy
from moe_beyond.evaluation.systems import Unavailable
from moe_beyond.files import write_json
from moe_beyond.predictors.training_text import MeasuredText
from moe_beyond.report.tables.results import unavailable_lines
from moe_beyond.report.tables.sizing import plan_table
from moe_beyond.simulator import ReplaySettings, Result
from moe_beyond.simulator.devices import device_slots
from moe_beyond.traces.reader import TraceSet


def build_parser() -> ArgumentParser:
    """Return the parser of this command's options."""
    parser = command_parser(
        "plan",
        "Find the smallest budget at which each strategy reaches a target, or what binds; and the experts to pin. On a "
        "device budgets stay within its memory, less its other weights and an eighth for the rest. The budget found is "
        "the smallest where a larger one is never worse; lfu_in_cache can be worse with more.",
        "moe-beyond plan --traces traces/webglm --device rtx4060-laptop --target 10tok/s --strategy all",
    )
    add_traces(parser)
    parser.add_argument("--target", metavar="T", help="90% (of hits), or 10tok/s (on --device)")
    parser.add_argument("--pins", metavar="FILE", help="write the experts to pin at --budget, by model layer, as JSON")
    add_budgets(parser)
    add_strategies(parser)
    add_conditions(parser)
    return parser


def main(argv: list[str]) -> None:
    """Plan."""
    args = build_parser().parse_args(argv[1:])
    output = Output(args)
    if args.target is None and args.pins is None:
        raise UserError("plan needs a --target to reach, or --pins FILE to write")
    target = None if args.target is None else parse_target(args.target)
    if target is not None and args.quotas not in (None, "even", "proportional"):
        raise UserError(f"--quotas {args.quotas} is of one budget, and a plan tries all; write even or proportional")
    if target is not None and target.tokens_per_second is not None and args.device is None:
        raise UserError(f"--target {args.target} is a matter of time; give --device")
    traces = TraceSet(args.traces)
    shared = asked_conditions(request_of(args), traces)
    chosen = None if args.pins is None else _pins(args, traces, shared)
    if target is None:
        _write_pins(args, chosen, output)
        return
    answers, missing, text = _answers(args, traces, shared, target)
    _write_pins(args, chosen, output)
    bytes_per_expert = traces.geometry.params_per_expert * shared.common.bits / 8
    output.show(
        *text.lines, plan_table(answers, target, traces.geometry, bytes_per_expert), *unavailable_lines(missing)
    )
    content = {
        "target": target.text,
        "measured_on": text.to_json(),
        "answers": [answer.to_json(bytes_per_expert) for answer in answers],
        "unavailable": [{"strategy": one.strategy, "why": one.why} for one in missing],
    }
    output.result(content)


def _pins(args: Namespace, traces: TraceSet, shared: Conditions) -> dict[str, Any]:
    """Choose the experts to pin by the profile that is named, or by the traces themselves."""
    slots = asked_slots(request_of(args), traces)
    if len(slots) != 1:
        raise UserError("--pins is for one --budget")
    popularity = None if shared.profile is None or args.profile is None else shared.profile.popularity
    chosen = pins(traces, args.split, slots[0], args.scope, shared.quotas, popularity)
    return {
        "model": traces.manifest.model_id,
        "budget_slots": slots[0],
        "counted_on": args.profile or traces.manifest.source,
        "layers": chosen,
    }


def _write_pins(args: Namespace, chosen: dict[str, Any] | None, output: Output) -> None:
    if chosen is not None:
        write_json(args.pins, chosen)
        output.show(f"pins: {args.pins}")


def _answers(
    args: Namespace, traces: TraceSet, shared: Conditions, target: Target
) -> tuple[list[Answer], list[Unavailable], MeasuredText]:
    """Plan for what is asked for, with LRU, Belady and, on a device, clairvoyant prefetch beside it."""
    geometry = traces.geometry
    request = replace(request_of(args), budget=[str(geometry.total_experts)])  # any: a strategy is the same at all
    asked = asked_strategies(request, traces, replace(shared, quotas=evenly), asked_source(args))
    text = text_to_measure(traces, args.split, shared, asked.sources)
    common = shared.common
    cold = replace(common, warm_start=False)
    lines = [line for line in asked.strategies if line.policy != "od_moe"]
    missing = asked.missing + [
        Unavailable(line.strategy, "it keeps no cache, so it has no budget")
        for line in asked.strategies
        if line not in lines
    ]
    lines += [strategy(cold, geometry.total_experts, policy) for policy in REFERENCES]
    lines += in_windows(lines, cold, geometry.total_experts)
    clairvoyant = strategy(cold, geometry.total_experts, "belady", "oracle", name=CLAIRVOYANT)
    if common.device is not None:
        lines.append(clairvoyant)

    def at(line: ReplaySettings, slots: int) -> ReplaySettings:
        return replace(line, slots=slots, quotas=shared.quotas(slots))

    def replayed(settings: list[ReplaySettings]) -> list[Result]:
        with showing_progress(traces, text.split, "planning", len(settings), quiet=args.quiet) as progress:
            return evaluate(
                traces, settings, text.split, asked.sources, profile=shared.profile, progress=progress
            ).results

    def bounds() -> dict[str, Result]:
        names = {"lru": strategy(cold, geometry.total_experts, "lru")}
        if common.device is not None:
            names["clairvoyant"] = clairvoyant
            names["all_resident"] = replace(cold, slots=geometry.total_experts, policy="all_resident", scope="global")
        return dict(zip(names, replayed(list(names.values())), strict=True))

    fewest = geometry.top_k * (geometry.num_layers if common.scope == "per-layer" else 1)
    ladders = [partial(at, line) for line in dict.fromkeys(lines)]
    most = None if common.device is None else device_slots(common.device, geometry, common.bits)
    return plan(geometry, target, ladders, replayed, fewest, bounds, most), missing, text
