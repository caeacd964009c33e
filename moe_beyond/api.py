"""What ``import moe_beyond as mb`` offers in a script or a notebook."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from rich.console import Console
from rich.table import Table

from moe_beyond.collect.asked import Collection, Rank
from moe_beyond.collect.collect import collect
from moe_beyond.collect.prompts import Prompt, as_prompts
from moe_beyond.errors import unknown
from moe_beyond.evaluation.asked import Request, asked_combinations, asked_conditions, asked_strategies
from moe_beyond.evaluation.evaluate import evaluate as measure_and_replay
from moe_beyond.evaluation.sources import ScoreSource, from_predictor, from_predictor_folder
from moe_beyond.evaluation.strategies import beside
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.folder import load_predictor as load_folder
from moe_beyond.published import find_predictor
from moe_beyond.report.plots import budgets_figure, frontier_figure
from moe_beyond.report.results import metrics_table, results_table
from moe_beyond.simulator import Result
from moe_beyond.traces.reader import TraceSet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOTEBOOK_WIDTH = 120
NOTEBOOK_CODE = '<pre style="font-family: ui-monospace, Menlo, Consolas, monospace; line-height: 1.2">{code}</pre>'


@dataclass(frozen=True)
class Replayed:
    """What a replay found, a line a strategy; in a notebook it shows itself as a table.

    Attributes:
        results: One record a strategy, with LRU, Belady and the best fixed choice beside every budget.
        geometry: The model.
        title: What was replayed.
        metrics: Of the predictor by lookahead, where it was measured.
    """

    results: Sequence[Result]
    geometry: Geometry
    title: str
    metrics: Sequence[dict[str, Any]] = ()

    def table(self) -> Table:
        """Return the replay as a table, as ``moe-beyond replay`` prints it."""
        return results_table(self.results, self.geometry)

    def metrics_table(self) -> Table:
        """Return the predictor's figures by lookahead, as ``moe-beyond evaluate`` prints them.

        Raises:
            ValueError: Nothing was measured: `replay` does not, `evaluate` does.
        """
        if not self.metrics:
            raise ValueError("nothing was measured; moe_beyond.evaluate does")
        return metrics_table(self.metrics)

    def plot(self) -> "Figure":
        """Draw hits and bytes against the budget, or, of a single budget, against each other."""
        several = len({result.budget_slots for result in self.results if result.policy != "all_resident"}) > 1
        return (budgets_figure if several else frontier_figure)(self.results, self.title)

    def to_pandas(self) -> "pd.DataFrame":
        """Return a data frame, a row a strategy, without the counts by layer."""
        import pandas as pd

        return pd.DataFrame(self.to_json()["results"]).drop(columns="per_layer")

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        found: dict[str, Any] = {"metrics": list(self.metrics)} if self.metrics else {}
        return found | {"results": [result.to_json() for result in self.results]}

    def _repr_html_(self) -> str:
        console = Console(record=True, width=NOTEBOOK_WIDTH, file=io.StringIO())
        if self.metrics:
            console.print(self.metrics_table())
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format=NOTEBOOK_CODE)


def record(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Prompt]",
    out: str | Path,
    **asked: Any,
) -> TraceSet:
    """Let a model read prompts, and perhaps answer them, and write its routing as a trace set.

    Args:
        model: A transformers mixture of experts, on any device, offloaded or not.
        tokenizer: Its tokenizer.
        prompts: Texts; chats, each a list of messages with ``role`` and ``content``; records as a ``.jsonl`` file holds
            them; or `Prompt` objects with names, sources and splits of their own.
        out: The trace set to make.
        **asked: Fields of `moe_beyond.collect.asked.Collection`: ``generate``, ``batch_size``, ``max_tokens``,
            ``steering``, ...

    Raises:
        UserError: The model is no mixture of experts, a prompt is empty or too long or no text, an option is not known,
            or ``out`` exists.

    Warns:
        UserWarning: Something that was asked for cannot be recorded.

    Example:
        >>> import moe_beyond as mb
        >>> chats = [[{"role": "user", "content": "hi"}]]
        >>> mb.record(model, tokenizer, chats, "traces/mine", generate=64)  # doctest: +SKIP
    """
    names = [field.name for field in fields(Collection)]
    for name in asked:
        if name not in names:
            raise unknown("option", name, names)
    options = Collection(**asked)
    notices: list[str] = []
    traces = collect(model, tokenizer, as_prompts(prompts), out, options, rank=Rank(0, 1), notice=notices.append)
    for line in notices:
        warn(line, stacklevel=2)
    assert traces is not None
    return traces


def load_traces(folder: str | Path) -> TraceSet:
    """Open a trace set.

    Args:
        folder: A folder, or a URL that fsspec knows.

    Raises:
        UserError: It is not a trace set.
    """
    return TraceSet(str(folder))


def load_predictor(name: str | Path) -> Predictor:
    """Load a predictor, ready to score.

    Args:
        name: A predictor folder, or a name that ``moe-beyond list`` shows.

    Raises:
        UserError: It is none, or it is damaged.
    """
    return load_folder(find_predictor(str(name)))


def replay(
    traces: TraceSet | str | Path,
    predictor: Predictor | str | Path | None = None,
    *,
    split: str | None = None,
    **options: Any,
) -> Replayed:
    """Replay traces through a cache under a memory budget; LRU, Belady and the best fixed choice stand beside.

    Args:
        traces: A trace set.
        predictor: Whose scores serve, if any.
        split: One split of the trace set; all by default.
        **options: The options of ``moe-beyond replay`` by their names, one value or several: ``budget="10%"``,
            ``policy=["lru", "belief"]``, ``prefetch="top6"``, ``device="rtx4060-laptop"``, ``strategy="all"``, ...
            (`moe_beyond.evaluation.asked.Request` has them all).

    Raises:
        UserError: An option cannot be read, or the predictor does not fit the traces.

    Example:
        >>> import moe_beyond as mb
        >>> traces = mb.load_traces("traces/webglm")  # doctest: +SKIP
        >>> mb.replay(traces, "cross_layer.deepseek-v2-lite-puffin", budget=["10%", "20%"]).plot()  # doctest: +SKIP
    """
    opened, source, request = _opened(traces), _source(predictor), _request(options)
    conditions = asked_conditions(request, opened)
    asked = asked_strategies(request, opened, conditions, source)
    lines = beside(asked.strategies, conditions.common, opened.geometry, conditions.quotas)
    found = measure_and_replay(opened, lines, split, asked.sources, profile=conditions.profile)
    return Replayed(found.results, opened.geometry, _title(opened))


def evaluate(
    traces: TraceSet | str | Path, predictor: Predictor | str | Path, *, split: str | None = None, **options: Any
) -> Replayed:
    """Measure a predictor by lookahead, and replay what it is worth at each under a memory budget.

    Args:
        traces: A trace set.
        predictor: What to measure.
        split: One split of the trace set; all by default.
        **options: As of `replay`, but for ``strategy``.

    Raises:
        UserError: An option cannot be read, or the predictor does not fit the traces.
    """
    opened, source, request = _opened(traces), _source(predictor), _request(options)
    assert source is not None
    conditions = asked_conditions(request, opened)
    lookaheads = [lookahead for lookahead in source.lookaheads if lookahead != "next"]
    asked = asked_combinations(request, opened, conditions, source, lookaheads)
    lines = beside(asked, conditions.common, opened.geometry, conditions.quotas)
    found = measure_and_replay(opened, lines, split, [source], measure=source, profile=conditions.profile)
    return Replayed(found.results, opened.geometry, _title(opened), found.metrics)


def _opened(traces: TraceSet | str | Path) -> TraceSet:
    return traces if isinstance(traces, TraceSet) else load_traces(traces)


def _source(predictor: Predictor | str | Path | None) -> ScoreSource | None:
    if predictor is None:
        return None
    if isinstance(predictor, Predictor):
        return from_predictor(predictor, predictor.architecture)
    return from_predictor_folder(find_predictor(str(predictor)))


def _request(options: dict[str, Any]) -> Request:
    """Take single values where several may stand; numbers where the command line has text."""
    several = {field.name for field in fields(Request) if field.default == () or field.name == "budget"}
    names = {field.name for field in fields(Request)}
    for name in options:
        if name not in names:
            raise unknown("option", name, names)
    given: dict[str, Any] = {
        name: [value] if name in several and isinstance(value, str | int) else value for name, value in options.items()
    }
    if "budget" in given:
        given["budget"] = [str(budget) for budget in given["budget"]]
    return Request(**given)


def _title(traces: TraceSet) -> str:
    return f"{traces.geometry.model}, {traces.manifest.source}"
