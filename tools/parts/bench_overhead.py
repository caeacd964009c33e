"""Time that a run in slots adds to each MoE layer, for `bench_run.py --overhead`."""

import itertools
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

from parts.bench_models import Loaded, Options, Text, in_slots, unmodified
from parts.forced_routing import forced_routing

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
"""Clocks; the second one is that of the thread that computes, which other programs do not slow down."""
POLICIES = ["lru", "belief"]
"""Policies by default: one without scores, and one that reads those of the predictor."""


class Timed:
    """A model whose tokens and experts calls are timed.

    Args:
        loaded: Model to time.
        stack: Stack that removes the hooks.

    Attributes:
        tokens: Times of each token by clock, in seconds.
        calls: Times of each call of an experts module by clock, in seconds.
    """

    def __init__(self, loaded: Loaded, stack: ExitStack) -> None:
        self._model = loaded.model
        self._force = stack.enter_context(forced_routing(loaded.model))
        self.tokens: list[dict[str, float]] = []
        self.calls: list[dict[str, float]] = []
        self._began: dict[str, float] = {}
        for name, module in loaded.model.named_modules():
            if name.endswith(".experts"):
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                stack.callback(module.register_forward_hook(self._end, prepend=True).remove)
        self.begin_text()

    def begin_text(self) -> None:
        """Forget the tokens before."""
        self._past = DynamicCache(config=self._model.config)

    def decode(self, token_id: Tensor, experts: Tensor) -> None:
        """Decode a token with forced experts ``(1, L, K)``."""
        self._force(experts)
        began = read_clocks()
        self._model(token_id[None, None], past_key_values=self._past, use_cache=True)
        self.tokens.append(since(began))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._began = read_clocks()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls.append(since(self._began))


def read_clocks() -> dict[str, float]:
    """Return the time of each clock, in seconds."""
    return {name: clock() for name, clock in CLOCKS.items()}


def since(began: Mapping[str, float]) -> dict[str, float]:
    """Return the time that has passed by each clock, in seconds."""
    return {name: clock() - began[name] for name, clock in CLOCKS.items()}


def measure_overhead(
    options: Options, texts: list[Text], repeats: int, policies: list[str]
) -> dict[str, dict[str, float]]:
    """Decode the same tokens with a model in memory and with runs that have slots for all experts, in turns.

    Args:
        options: Options of the run.
        texts: Texts to decode.
        repeats: Number of repeats; one more comes before, in which the slots are filled.
        policies: Policies of the runs.

    Returns:
        Policy -> median differences to the model in memory, in microseconds per MoE layer. ``call_*`` is that of the
        experts call, ``token_*`` that of a whole token, divided by the layers.
    """
    torch.set_num_threads(options.threads)
    geometry = options.geometry
    with ExitStack() as stack, torch.inference_mode():
        models = {"unmodified": Timed(stack.enter_context(unmodified(options)), stack)}
        for policy in policies:
            loaded = stack.enter_context(in_slots(options, geometry.total_experts, policy))
            models[policy] = Timed(loaded, stack)
        for repeat in range(repeats + 1):
            if repeat == 1:
                for timed in models.values():
                    timed.tokens.clear()
                    timed.calls.clear()
            for text in texts:
                for timed in models.values():
                    timed.begin_text()
                for place, token_id in enumerate(text.token_ids):
                    for timed in models.values():
                        timed.decode(token_id, text.experts[place : place + 1])
    base = models.pop("unmodified")
    found: dict[str, dict[str, float]] = {}
    for (policy, timed), clock in itertools.product(models.items(), CLOCKS):
        row = found.setdefault(policy, {})
        row[f"call_{clock}"] = median_gap(timed.calls, base.calls, clock)
        row[f"token_{clock}"] = median_gap(timed.tokens, base.tokens, clock) / geometry.num_layers
    return found


def median_gap(times: list[dict[str, float]], base: list[dict[str, float]], clock: str) -> float:
    """Return the median difference of paired times in microseconds."""
    return 1e6 * statistics.median(time[clock] - other[clock] for time, other in zip(times, base, strict=True))


def show_overhead(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print a table of the result of `measure_overhead`."""
    table = Table(title="time over the model in memory, all experts resident: us per MoE layer")
    table.add_column("policy")
    columns = [f"{part}_{clock}" for part in ("call", "token") for clock in CLOCKS]
    for column in columns:
        table.add_column(
            column.replace("call", "experts call").replace("token", "whole token").replace("_", ", "), justify="right"
        )
    for policy, row in found.items():
        table.add_row(policy, *(f"{row[column]:.0f}" for column in columns))
    console.print(table)
