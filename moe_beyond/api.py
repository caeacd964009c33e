"""Python API of ``import moe_beyond``, for scripts and notebooks; each function gives what its command prints.

Functions import torch and transformers only if they need them: a replay without a predictor needs neither.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import wraps
from numbers import Integral, Number, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar

import numpy as np

from moe_beyond import pretrained
from moe_beyond.errors import UserError, unknown
from moe_beyond.evaluation.options import DEFAULT_BUDGET, ReplayOptions
from moe_beyond.evaluation.run import ReplayOutcome, run_evaluation, run_replay
from moe_beyond.safe_text import shown
from moe_beyond.traces.manifest import MANIFEST_FILE
from moe_beyond.traces.reader import TraceSet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_beyond.collect.prompts import Prompt
    from moe_beyond.evaluation.sizing import SizingReport
    from moe_beyond.evaluation.sources import ScoreSource
    from moe_beyond.predictors.base import Predictor
    from moe_beyond.predictors.training_text import MeasuredText
    from moe_beyond.traces.steering import Steering

    TracesLike: TypeAlias = TraceSet | str | Path
    PredictorLike: TypeAlias = Predictor | str | Path
    Budget: TypeAlias = str | int | float

NOTEBOOK_WIDTH = 120
NOTEBOOK_CODE = '<pre style="font-family: ui-monospace, Menlo, Consolas, monospace; line-height: 1.2">{code}</pre>'


class ReplayReport(ReplayOutcome):
    """Results of a replay, one record per strategy; a notebook displays them as tables."""

    @classmethod
    def of(cls, outcome: ReplayOutcome) -> ReplayReport:
        """Make the report of an outcome."""
        return cls(outcome.evaluation, outcome.replay)

    def table(self) -> Table:
        """Return the results as a table, as ``moe-beyond replay`` prints them."""
        from moe_beyond.report.tables.results import results_table

        return results_table(self.results, self.geometry)

    def metrics_table(self) -> Table:
        """Return the metrics of the predictor by lookahead, as ``moe-beyond evaluate`` prints them.

        Raises:
            UserError: Nothing was measured: `replay` measures no predictor.
        """
        from moe_beyond.report.tables.results import metrics_table

        if not self.metrics:
            raise UserError("metrics_table: a replay measures no predictor; call moe_beyond.evaluate")
        return metrics_table(self.metrics)

    def parts(self) -> list[RenderableType]:
        """Return everything that the command prints: notices about the text, tables, and unavailable strategies."""
        from moe_beyond.report.tables.intervals import intervals_tables
        from moe_beyond.report.tables.results import unavailable_lines

        metrics = [self.metrics_table()] if self.metrics else []
        intervals = intervals_tables(self.metrics, self.results, self.bootstrap_draws) if self.bootstrap_draws else []
        return [
            *self.measured_on.lines, *metrics, self.table(), *intervals, *unavailable_lines(self.unavailable),
        ]  # fmt: skip

    def plot(self) -> Figure:
        """Draw hit rate and bytes over the budget; with a single budget, against each other."""
        from moe_beyond.report.plots.replay import budgets_plot, frontier_plot

        several = len({result.budget_slots for result in self.results if result.policy != "all_resident"}) > 1
        return (budgets_plot if several else frontier_plot)(self.results, self.title)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per strategy, without the counts by layer.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise UserError("to_pandas: pandas is not installed; pip install pandas") from error

        return pd.DataFrame(self.to_json()["results"]).drop(columns="per_layer")

    def _repr_html_(self) -> str:
        from rich.console import Console

        # rich would display the tables in a notebook once more, without force_jupyter.
        console = Console(record=True, width=NOTEBOOK_WIDTH, file=io.StringIO(), force_jupyter=False)
        for part in self.parts():
            if isinstance(part, str):
                console.print(part, highlight=False, markup=False)
            else:
                console.print(part)
        return console.export_html(inline_styles=True, code_format=NOTEBOOK_CODE)


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")
_FUNCTIONS: dict[str, list[str]] = {}
"""Name of each function of the API -> names of its parameters."""


def _public(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Turn an unknown argument, and an error of the system about a path, into a `UserError` of one line."""
    _FUNCTIONS[function.__name__] = list(inspect.signature(function).parameters)

    @wraps(function)
    def wrapped(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
        _check_names(function.__name__, options)
        try:
            return function(*arguments, **options)
        except OSError as error:
            name = str(error.filename or "")
            location = f"{name if len(name) < 100 else name[:100] + '...'}: " if name else ""
            raise UserError(f"{function.__name__}: {location}{error.strerror or error}") from error

    return wrapped


def _check_names(function: str, options: Mapping[str, Any]) -> None:
    """Check the names of a function's arguments.

    Raises:
        UserError: The function has no such parameter.
    """
    for name in options:
        if name in _FUNCTIONS[function]:
            continue
        others = [other for other, names in _FUNCTIONS.items() if name in names]
        if others:
            raise UserError(f"{function}: takes no {name}; moe_beyond.{others[0]} does")
        raise UserError(f"{function}: {unknown('argument', name, _FUNCTIONS[function])}")


@_public
def record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Prompt],
    out: str | Path,
    *,
    generate: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    val_blocks: str | None = None,
    test_blocks: str | None = None,
    tokens: bool = True,
    gate_weights: bool | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    shard_tokens: int = 65536,
    hidden_states: bool = False,
    steering: Steering | None = None,
    state_dtype: str = "float16",
    state_layers: int | tuple[int, ...] | Literal["all"] = "all",
    state_width: int | None = None,
) -> TraceSet:
    """Run a model over prompts, optionally generate, and write its routing as a trace set: ``moe-beyond collect``.

    Args:
        model: Loaded transformers mixture-of-experts model, on any device, offloaded or not.
        tokenizer: Loaded tokenizer of the model.
        prompts: Texts; chats, each a list of messages with ``role`` and ``content``; records as in a ``.jsonl`` file;
            or `Prompt` objects with their own names, sources and splits.
        out: Trace set to write.
        generate: Tokens to generate after each prompt (default: 0, the model only reads).
        temperature: Temperature of sampling; 0 takes the most probable token (default: 0).
        seed: Random seed for sampling; results also depend on the batch size (default: 0).
        val_blocks: ``SIZE:EVERY`` moves blocks of consecutive prompts to the split ``validation`` (default: no split).
        test_blocks: ``SIZE:EVERY`` moves blocks to the split ``test``, before ``val_blocks`` (default: no split).
        tokens: Whether token ids, the tokenizer and the names of the prompts are recorded; without them, the set holds
            only expert ids, lengths and splits (default: True).
        gate_weights: Whether gate weights are recorded (default: as ``tokens``).
        batch_size: Prompts per batch (default: 8).
        max_tokens: Length to which prompts are truncated, in tokens (default: no truncation; a prompt longer than the
            model's positions is an error).
        shard_tokens: Tokens at which a shard is closed (default: 65536).
        hidden_states: Whether hidden states and router weights are recorded; takes a hundred to a thousand times the
            bytes of the experts (default: False).
        steering: Experts that are forced on or off (default: none).
        state_dtype: Data type of stored hidden states, ``"float16"`` or ``"int8"`` (default: float16).
        state_layers: MoE layers whose hidden states are recorded: ``"all"``, a number of evenly spaced
            layers, or a tuple of layers (default: all).
        state_width: Width of stored hidden states, projected onto what the next routers read (default: the model's).

    Raises:
        UserError: The model is no mixture-of-experts model, a prompt is empty or too long, an option is out of range,
            or ``out`` exists.

    Warns:
        UserWarning: Something requested cannot be recorded.

    Example:
        >>> import moe_beyond as mb
        >>> chats = [[{"role": "user", "content": "hi"}]]
        >>> mb.record(model, tokenizer, chats, "traces/mine", generate=64)  # doctest: +SKIP
    """
    from moe_beyond.collect.collection import collect
    from moe_beyond.collect.config import CollectConfig, ProcessRank
    from moe_beyond.collect.prompts import as_prompts

    _check_loaded(model, tokenizer)
    config = CollectConfig(
        generate=generate,
        temperature=temperature,
        seed=seed,
        val_blocks=val_blocks,
        test_blocks=test_blocks,
        tokens=tokens,
        gate_weights=gate_weights,
        batch_size=batch_size,
        max_tokens=max_tokens,
        shard_tokens=shard_tokens,
        hidden_states=hidden_states,
        steering=steering,
        state_dtype=state_dtype,
        state_layers=state_layers,
        state_width=state_width,
    )
    notices: list[str] = []
    traces = collect(
        model, tokenizer, as_prompts(prompts), _path(out, "out"), config, rank=ProcessRank(0, 1), notice=notices.append
    )
    for line in notices:
        warnings.warn(line, stacklevel=3)
    assert traces is not None
    return traces


def _check_loaded(model: Any, tokenizer: Any) -> None:
    """Check that a model and a tokenizer are loaded and in this order.

    Raises:
        UserError: They are something else, or the model has no weights.
    """
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    if isinstance(model, PreTrainedTokenizerBase) and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError("record: model is a tokenizer; write record(model, tokenizer, prompts, out)")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UserError(
            f"record: model must be a loaded transformers model (got {shown(model)}); "
            "AutoModelForCausalLM.from_pretrained(NAME) loads one"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"record: tokenizer must be a loaded tokenizer (got {shown(tokenizer)}); "
            "AutoTokenizer.from_pretrained(NAME) loads one"
        )
    offloaded = any(getattr(module, "_hf_hook", None) is not None for module in model.modules())
    if not offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("record: the model is on the meta device and has no weights; load it with from_pretrained")


@_public
def load_traces(folder: str | Path) -> TraceSet:
    """Open a trace set.

    Args:
        folder: Folder, ``hf:ORG/REPO``, or a URL that fsspec reads.

    Raises:
        UserError: There is no trace set.
    """
    return TraceSet(_path(folder, "traces"))


@_public
def load_predictor(name: str | Path) -> Predictor:
    """Load a fitted predictor.

    Args:
        name: Predictor folder, pretrained name (`list_pretrained`), ``hf:ORG/REPO``, or folder of a run (its exported
            predictor, otherwise its best checkpoint, otherwise its last one).

    Raises:
        UserError: There is no such predictor, or it is damaged.
    """
    from moe_beyond.evaluation.checkpoints import find_trained, load_trained

    return load_trained(find_trained(_path(name, "predictor")))[0]


@_public
def list_pretrained(architecture: str | None = None) -> list[str]:
    """List the names of the pretrained predictors, ``architecture.model-data[-size]``.

    Args:
        architecture: Architecture to list, such as ``cross_layer`` (default: all).

    Example:
        >>> import moe_beyond as mb
        >>> mb.list_pretrained("history")
        ['history.deepseek-v2-lite-puffin']
    """
    return [name for name in pretrained.list_pretrained() if architecture in (None, name.partition(".")[0])]


@_public
def replay(
    traces: TracesLike,
    predictor: PredictorLike | None = None,
    *,
    split: str | None = None,
    budget: Budget | Iterable[Budget] = DEFAULT_BUDGET,
    strategy: str | Iterable[str] = (),
    policy: str | Iterable[str] = (),
    prefetch: str | Iterable[str] = (),
    lookahead: str | int | Iterable[str | int] = (),
    misses: str | Iterable[str] = (),
    device: str | Path | None = None,
    scope: str = "global",
    quotas: str | None = None,
    profile: str | Path | None = None,
    warm_start: bool = False,
    carry_over: bool = False,
    cold_host: bool = False,
    prefill_chunk: int = 0,
    batch_size: int = 1,
    sequential: bool = False,
    warmup_tokens: int = 0,
    no_first_layer_prefetch: bool = False,
    quantization: float | None = None,
) -> ReplayReport:
    """Replay traces through a cache under a memory budget, next to LRU, Belady and the best static choice.

    Args:
        traces: Trace set, its folder, ``hf:ORG/REPO``, or a URL that fsspec reads.
        predictor: Predictor whose scores are used, or a name as in `load_predictor` (default: none).
        split: Split to measure, or ``all`` (default: all; with a predictor, a split that it was not fitted on, if any).
        budget: Memory budget or budgets. A float up to 1.0 is a share of all experts; an int is a number of slots.
            Text is ``"10%"``, ``"166"``, ``"2.9GB"`` or ``"2.7GiB"`` (default: 10%).
        strategy: Named strategy or strategies, or ``"all"``, in place of policy and prefetch (default: none).
        policy: Eviction policy or policies (default: lru).
        prefetch: Prefetcher or prefetchers, such as ``"top6"`` or ``"p>0.5"`` (default: ``top<K>`` with a predictor).
        lookahead: Lookahead or lookaheads of the scores that prefetchers select by (default: the predictor's first).
        misses: Miss handling or handlings on a device: ``"move"``, ``"cpu"`` or ``"best"`` (default: move).
        device: Device preset or JSON file; enables the timing model (default: no timing).
        scope: Scope of the cache, ``"global"`` or ``"per-layer"`` (default: global).
        quotas: Slots per layer with ``"per-layer"``: ``"even"``, ``"proportional"`` or ``"10,8,8"`` (default: even).
        profile: Fitted ``history`` or ``popularity`` predictor for policies that need a usage profile (default: none;
            with ``strategy``, the pretrained history predictor).
        warm_start: Whether every sequence starts with the profile's most popular experts (default: False).
        carry_over: Whether to keep the cache from the previous sequence (default: False).
        cold_host: Whether host memory before flash starts empty (default: False).
        prefill_chunk: Prompt tokens per step; 0 makes every token a step (default: 0).
        batch_size: Sequences decoded together (default: 1).
        sequential: Whether every access is its own event, as in libCacheSim (default: False).
        warmup_tokens: Tokens at the start of each sequence that do not count (default: 0).
        no_first_layer_prefetch: Whether to skip prefetching, at a token's start, for layers that have no earlier layer
            at the lookahead (default: False).
        quantization: Bits per parameter (default: as recorded in the trace set).

    Raises:
        UserError: An option cannot be read, or the predictor does not fit the traces.

    Warns:
        UserWarning: The predictor may have been fitted on the measured text.

    Example:
        >>> import moe_beyond as mb
        >>> traces = mb.load_traces("traces/webglm")  # doctest: +SKIP
        >>> mb.replay(traces, "cross_layer.deepseek-v2-lite-puffin-small", budget=[0.1, 0.2]).plot()  # doctest: +SKIP
    """
    opened = _traces(traces, "replay")
    options = _options(
        budget=budget,
        strategy=strategy,
        policy=policy,
        prefetch=prefetch,
        lookahead=lookahead,
        misses=misses,
        device=device,
        scope=scope,
        quotas=quotas,
        profile=profile,
        warm_start=warm_start,
        carry_over=carry_over,
        cold_host=cold_host,
        prefill_chunk=prefill_chunk,
        batch_size=batch_size,
        sequential=sequential,
        warmup_tokens=warmup_tokens,
        no_first_layer_prefetch=no_first_layer_prefetch,
        quantization=quantization,
    )
    report = ReplayReport.of(run_replay(options, opened, _source(predictor, "replay"), split=_split(split)))
    _warn(report.measured_on)
    return report


@_public
def evaluate(
    traces: TracesLike,
    predictor: PredictorLike,
    *,
    split: str | None = None,
    bootstrap: int = 0,
    budget: Budget | Iterable[Budget] = DEFAULT_BUDGET,
    policy: str | Iterable[str] = (),
    prefetch: str | Iterable[str] = (),
    lookahead: str | int | Iterable[str | int] = (),
    misses: str | Iterable[str] = (),
    device: str | Path | None = None,
    scope: str = "global",
    quotas: str | None = None,
    profile: str | Path | None = None,
    warm_start: bool = False,
    carry_over: bool = False,
    cold_host: bool = False,
    prefill_chunk: int = 0,
    batch_size: int = 1,
    sequential: bool = False,
    warmup_tokens: int = 0,
    no_first_layer_prefetch: bool = False,
    quantization: float | None = None,
) -> ReplayReport:
    """Measure a predictor by lookahead, and replay it under a memory budget at every lookahead.

    Args:
        traces: Trace set, as in `replay`.
        predictor: Predictor, or a name as in `load_predictor`.
        split: Split to measure, or ``all`` (default: a split that the predictor was not fitted on, if any).
        bootstrap: Bootstrap draws for 95 % intervals over sequences; 0 for none (default: 0).
        budget: Memory budget or budgets, as in `replay` (default: 10%).
        policy: Eviction policy or policies (default: lru).
        prefetch: Prefetcher or prefetchers (default: ``top<K>``).
        lookahead: Lookahead or lookaheads that prefetchers select by (default: each of the predictor's,
            except ``next``).
        misses: Miss handling or handlings on a device: ``"move"``, ``"cpu"`` or ``"best"`` (default: move).
        device: Device preset or JSON file; enables the timing model (default: no timing).
        scope: Scope of the cache, ``"global"`` or ``"per-layer"`` (default: global).
        quotas: Slots per layer with ``"per-layer"``, as in `replay` (default: even).
        profile: Fitted ``history`` or ``popularity`` predictor, as in `replay` (default: none).
        warm_start: Whether every sequence starts with the profile's most popular experts (default: False).
        carry_over: Whether to keep the cache from the previous sequence (default: False).
        cold_host: Whether host memory before flash starts empty (default: False).
        prefill_chunk: Prompt tokens per step; 0 makes every token a step (default: 0).
        batch_size: Sequences decoded together (default: 1).
        sequential: Whether every access is its own event, as in libCacheSim (default: False).
        warmup_tokens: Tokens at the start of each sequence that do not count in the replay (default: 0).
        no_first_layer_prefetch: Whether to skip prefetching, at a token's start, for layers that have no earlier layer
            at the lookahead (default: False).
        quantization: Bits per parameter (default: as recorded in the trace set).

    Raises:
        UserError: An option cannot be read, or the predictor does not fit the traces.

    Warns:
        UserWarning: The predictor may have been fitted on the measured text.

    Example:
        >>> import moe_beyond as mb
        >>> traces = mb.load_traces("traces/webglm")  # doctest: +SKIP
        >>> mb.evaluate(traces, "history.deepseek-v2-lite-puffin", bootstrap=10_000).metrics_table()  # doctest: +SKIP
    """
    opened, source = _traces(traces, "evaluate"), _source(predictor, "evaluate")
    if source is None:
        raise UserError("evaluate: a predictor is missing; write evaluate(traces, predictor)")
    options = _options(
        budget=budget,
        policy=policy,
        prefetch=prefetch,
        lookahead=lookahead,
        misses=misses,
        device=device,
        scope=scope,
        quotas=quotas,
        profile=profile,
        warm_start=warm_start,
        carry_over=carry_over,
        cold_host=cold_host,
        prefill_chunk=prefill_chunk,
        batch_size=batch_size,
        sequential=sequential,
        warmup_tokens=warmup_tokens,
        no_first_layer_prefetch=no_first_layer_prefetch,
        quantization=quantization,
    )
    draws = _value("bootstrap", bootstrap)
    report = ReplayReport.of(run_evaluation(options, opened, source, split=_split(split), bootstrap_draws=draws))
    _warn(report.measured_on)
    return report


@_public
def plan(
    traces: TracesLike,
    target: str,
    predictor: PredictorLike | None = None,
    *,
    split: str | None = None,
    strategy: str | Iterable[str] = (),
    policy: str | Iterable[str] = (),
    prefetch: str | Iterable[str] = (),
    lookahead: str | int | Iterable[str | int] = (),
    misses: str | Iterable[str] = (),
    device: str | Path | None = None,
    scope: str = "global",
    quotas: str | None = None,
    profile: str | Path | None = None,
    warm_start: bool = False,
    carry_over: bool = False,
    cold_host: bool = False,
    prefill_chunk: int = 0,
    batch_size: int = 1,
    sequential: bool = False,
    warmup_tokens: int = 0,
    no_first_layer_prefetch: bool = False,
    quantization: float | None = None,
) -> SizingReport:
    """Find the smallest budget at which each strategy reaches a target, or its bottleneck: ``moe-beyond plan``.

    On a device, budgets stay within its memory. Strategies and conditions are those of `replay`.

    Args:
        traces: Trace set, as in `replay`.
        target: Hit rate, such as ``"90%"``, or speed on a device, such as ``"10tok/s"``.
        predictor: Predictor whose scores are used, or a name as in `load_predictor` (default: none).
        split: Split to measure, as in `replay`.
        strategy: Named strategy or strategies, or ``"all"``, in place of policy and prefetch (default: none).
        policy: Eviction policy or policies (default: lru).
        prefetch: Prefetcher or prefetchers (default: ``top<K>`` with a predictor).
        lookahead: Lookahead or lookaheads of the scores that prefetchers select by (default: the predictor's first).
        misses: Miss handling or handlings on a device: ``"move"``, ``"cpu"`` or ``"best"`` (default: move).
        device: Device preset or JSON file; enables the timing model (default: no timing).
        scope: Scope of the cache, ``"global"`` or ``"per-layer"`` (default: global).
        quotas: Slots per layer with ``"per-layer"``: ``"even"`` or ``"proportional"`` (default: even).
        profile: Fitted ``history`` or ``popularity`` predictor, as in `replay`.
        warm_start: Whether every sequence starts with the profile's most popular experts (default: False).
        carry_over: Whether to keep the cache from the previous sequence (default: False).
        cold_host: Whether host memory before flash starts empty (default: False).
        prefill_chunk: Prompt tokens per step; 0 makes every token a step (default: 0).
        batch_size: Sequences decoded together (default: 1).
        sequential: Whether every access is its own event, as in libCacheSim (default: False).
        warmup_tokens: Tokens at the start of each sequence that do not count (default: 0).
        no_first_layer_prefetch: Whether to skip first-layer prefetching, as in `replay` (default: False).
        quantization: Bits per parameter (default: as recorded in the trace set).

    Raises:
        UserError: The target or an option cannot be read, or the predictor does not fit the traces.

    Warns:
        UserWarning: The predictor may have been fitted on the measured text.

    Example:
        >>> import moe_beyond as mb
        >>> mb.plan("traces/webglm", "10tok/s", device="rtx4060-laptop", strategy="all").sizings  # doctest: +SKIP
    """
    from moe_beyond.evaluation.sizing import parse_target, run_sizing

    opened = _traces(traces, "plan")
    if not isinstance(target, str):
        raise UserError(f"target: must be text such as '90%' or '10tok/s' (got {shown(target)})")
    options = _options(
        budget=DEFAULT_BUDGET,
        strategy=strategy,
        policy=policy,
        prefetch=prefetch,
        lookahead=lookahead,
        misses=misses,
        device=device,
        scope=scope,
        quotas=quotas,
        profile=profile,
        warm_start=warm_start,
        carry_over=carry_over,
        cold_host=cold_host,
        prefill_chunk=prefill_chunk,
        batch_size=batch_size,
        sequential=sequential,
        warmup_tokens=warmup_tokens,
        no_first_layer_prefetch=no_first_layer_prefetch,
        quantization=quantization,
    )
    source = _source(predictor, "plan")
    report = run_sizing(options, opened, parse_target(target), source, split=_split(split))
    _warn(report.measured_on)
    return report


@_public
def import_traces(
    format: str,
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    val_blocks: str | None = None,
    quantization: float | None = None,
    format_options: Mapping[str, Any] | None = None,
) -> TraceSet:
    """Convert another tool's recording into a trace set: ``moe-beyond import``.

    Args:
        format: Name of the format, such as ``"vllm"`` (`moe_beyond.traces.formats.readable_formats`).
        source: Recording: a file, or a folder of files.
        out: Trace set to write.
        model: Model that was recorded: a preset, a folder with a ``config.json``, a ``config.json``, or a geometry
            file (default: the description in the recording, for ``route-trace``).
        tokenizer: Tokenizer of the token ids: a ``tokenizer.json``, a folder with one, or a name on the Hub (default:
            the tokenizer of the preset or of the model's folder).
        val_blocks: ``SIZE:EVERY`` moves blocks of consecutive sequences to the split ``validation`` (default: no
            split).
        quantization: Bits per parameter of the model that was recorded (default: 16; ``moe-beyond-csv``: 8).
        format_options: Options of the format, such as ``{"sequence_tokens": 2048}`` of ``flame-moe`` (default: none).

    Raises:
        UserError: There is no such format, or the recording does not fit the model or the tokenizer.

    Example:
        >>> import moe_beyond as mb
        >>> mb.import_traces("vllm", "engine", "traces/engine", model="deepseek-v2-lite")  # doctest: +SKIP
    """
    from moe_beyond.geometry import load_preset
    from moe_beyond.traces.formats import FORMATS, format_reader

    read = format_reader(format)
    options = dict(format_options or {})
    accepted = [option.name for option in FORMATS[format].options]
    for name in options:
        if name not in accepted:
            raise UserError(f"format_options: {format} has no option {name!r} (known: {', '.join(accepted) or 'none'})")
    if quantization is not None:
        options["quantization_bits"] = _bits(quantization)
    if model is None and not FORMATS[format].describes_model:
        raise UserError(f"import_traces: {format} does not describe its model; name it with model=")
    return read(
        _path(source, "import_traces: source"),
        _path(out, "import_traces: out"),
        None if model is None else load_preset(_path(model, "import_traces: model")),
        tokenizer=None if tokenizer is None else _path(tokenizer, "import_traces: tokenizer"),
        val_blocks=val_blocks,
        **options,
    )


def _bits(quantization: Any) -> float:
    """Check a number of bits per parameter.

    Raises:
        UserError: It is no number above 0.
    """
    bits: float = _value("quantization", quantization)
    if not bits > 0:
        raise UserError(f"quantization: bits per parameter must be more than 0 (got {bits:g})")
    return bits


def _traces(traces: TracesLike, function: str) -> TraceSet:
    """Open a trace set; if it is a predictor, name the right order of arguments.

    Raises:
        UserError: There is no trace set.
    """
    if isinstance(traces, TraceSet):
        return traces
    order = f"write {function}(traces, predictor)"
    if not isinstance(traces, str | Path) and _is_predictor(traces):
        raise UserError(f"{function}: traces is a predictor ({traces.architecture}); {order}")
    path = _path(traces, f"{function}: traces")
    if path in pretrained.list_pretrained() or (Path(path) / pretrained.CONFIG_FILE).is_file():
        raise UserError(f"{function}: traces is a predictor ({path}); {order}")
    return TraceSet(path)


def _source(predictor: PredictorLike | None, function: str) -> ScoreSource | None:
    """Open a predictor as a source of scores; if it is a trace set, name the right order of arguments.

    Raises:
        UserError: There is no predictor.
    """
    if predictor is None:
        return None
    order = f"write {function}(traces, predictor)"
    if isinstance(predictor, TraceSet):
        raise UserError(f"{function}: predictor is a trace set ({predictor.folder}); {order}")
    # Imported here, because a replay without a predictor does not need torch.
    from moe_beyond.evaluation.checkpoints import find_source
    from moe_beyond.evaluation.sources import from_predictor

    if not isinstance(predictor, str | Path) and _is_predictor(predictor):
        return from_predictor(predictor, predictor.architecture)
    path = _path(predictor, f"{function}: predictor")
    if (Path(path) / MANIFEST_FILE).is_file():
        raise UserError(f"{function}: predictor is a trace set ({path}); {order}")
    return find_source(path)


def _is_predictor(value: Any) -> bool:
    from moe_beyond.predictors.base import Predictor

    return isinstance(value, Predictor)


def _path(value: Any, what: str) -> str:
    """Check a name or a path.

    Raises:
        UserError: The value is neither, or is empty.
    """
    if not isinstance(value, str | Path):
        raise UserError(f"{what} must be a name or a path (got {shown(value)})")
    if not str(value).strip() or "\0" in str(value):
        raise UserError(f"{what} must be a name or a path (got {shown(str(value))})")
    return str(value)


def _split(split: Any) -> str | None:
    """Check the name of a split.

    Raises:
        UserError: It is no text.
    """
    if not isinstance(split, str | None):
        raise UserError(f"split: must be the name of a split (got {shown(split)})")
    return split


def _warn(text: MeasuredText) -> None:
    """Warn about the measured text at the line that called the public function."""
    for line in text.lines:
        warnings.warn(line, stacklevel=4)


SEVERAL = frozenset(("budget", "strategy", "policy", "prefetch", "lookahead", "misses"))
"""Options that take one value or several."""
SINGLE = (str, Path, Number, bytes, bytearray, memoryview, Mapping)
"""Iterable types that are a single value."""
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("warm_start", "carry_over", "cold_host", "sequential", "no_first_layer_prefetch"), (bool,)),
    **dict.fromkeys(("prefill_chunk", "batch_size", "warmup_tokens", "bootstrap"), (Integral,)),
    "quantization": (Real,),
    **dict.fromkeys(("device", "scope", "quotas", "profile", "strategy", "policy", "prefetch", "misses"), (str, Path)),
    "lookahead": (str, Integral),
}
"""Types of the values of each option but the budget."""
TYPE_NAMES = {bool: "True or False", Integral: "a whole number", Real: "a number", str: "text"}


def _options(**values: Any) -> ReplayOptions:
    """Convert arguments to the options of a replay.

    Raises:
        UserError: A value has another type.
    """
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name in SEVERAL:
            single = isinstance(value, SINGLE) or not isinstance(value, Iterable)
            options[name] = [_value(name, each) for each in ([value] if single else value)]
        elif value is not None:  # None is the default of an absent option
            options[name] = _value(name, value)
    if not options["budget"]:
        raise UserError("budget: names no budget; write 0.1 or '10%'")
    return ReplayOptions(**options)


def _value(name: str, value: Any) -> Any:
    """Check one value, and convert it to the type of the command line.

    Raises:
        UserError: The value has another type.
    """
    if name == "budget":
        return _budget(value)
    types = TYPES[name]
    if isinstance(value, np.bool_):
        value = bool(value)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(TYPE_NAMES[kind] for kind in types if kind in TYPE_NAMES)
        raise UserError(f"{name}: must be {names} (got {shown(value)})")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | str):
        return value
    number: Any = value
    return float(number) if Real in types else int(number)


def _budget(value: Any) -> str:
    """Convert a budget to text: a float up to 1.0 is a share, an int is slots.

    Raises:
        UserError: The value is no budget.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1:
        return f"{Decimal(str(value)) * 100:f}%"
    raise UserError(
        f"budget: must be a share (a float above 0 and up to 1.0), slots (an int), or text such as '10%' and '2.9GB' "
        f"(got {shown(value)})"
    )
