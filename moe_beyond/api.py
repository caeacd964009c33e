"""What ``import moe_beyond as mb`` offers in a script or a notebook."""

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from functools import wraps
from numbers import Integral, Number, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_beyond.collect.collect import collect
from moe_beyond.collect.config import Collection, Rank
from moe_beyond.collect.prompts import Prompt, as_prompts
from moe_beyond.errors import UserError, unknown
from moe_beyond.evaluation.checkpoints import find_source, find_trained, load_trained
from moe_beyond.evaluation.options import (
    Conditions,
    Request,
    asked_combinations,
    asked_conditions,
    asked_strategies,
    text_to_measure,
)
from moe_beyond.evaluation.run import evaluate as measure_and_replay
from moe_beyond.evaluation.sources import ScoreSource, from_predictor
from moe_beyond.evaluation.strategies import beside
from moe_beyond.fields import shown
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.training_text import MeasuredText
from moe_beyond.pretrained import CONFIG_FILE, list_pretrained
from moe_beyond.report.plots.replay import budgets_figure, frontier_figure
from moe_beyond.report.tables.results import metrics_table, results_table
from moe_beyond.simulator import Result
from moe_beyond.traces.manifest import MANIFEST_FILE
from moe_beyond.traces.reader import TraceSet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOTEBOOK_WIDTH = 120
NOTEBOOK_CODE = '<pre style="font-family: ui-monospace, Menlo, Consolas, monospace; line-height: 1.2">{code}</pre>'


@dataclass(frozen=True)
class Replayed:
    """Results of a replay, one line per strategy; a notebook displays them as a table.

    Attributes:
        results: One record per strategy, with LRU, Belady and the best fixed choice at every budget.
        geometry: The model.
        title: Model and source of the traces.
        metrics: Figures of the predictor, one row per lookahead; empty where none was measured.
        measured_on: The split, and how its text relates to the training text of the predictor.
    """

    results: Sequence[Result]
    geometry: Geometry
    title: str
    metrics: Sequence[dict[str, Any]] = ()
    measured_on: MeasuredText = field(default_factory=lambda: MeasuredText(None))

    def table(self) -> Table:
        """Return the replay as a table, as ``moe-beyond replay`` prints it."""
        return results_table(self.results, self.geometry)

    def metrics_table(self) -> Table:
        """Return the predictor's figures by lookahead, as ``moe-beyond evaluate`` prints them.

        Raises:
            UserError: Nothing was measured: `replay` does not, `evaluate` does.
        """
        if not self.metrics:
            raise UserError("metrics_table: a replay measures no predictor; moe_beyond.evaluate does")
        return metrics_table(self.metrics)

    def plot(self) -> "Figure":
        """Draw hits and bytes against the budget, or, of a single budget, against each other."""
        several = len({result.budget_slots for result in self.results if result.policy != "all_resident"}) > 1
        return (budgets_figure if several else frontier_figure)(self.results, self.title)

    def to_pandas(self) -> "pd.DataFrame":
        """Return a data frame with one row per strategy, without the counts by layer.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise UserError("to_pandas: pandas is not installed; pip install pandas") from error

        return pd.DataFrame(self.to_json()["results"]).drop(columns="per_layer")

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        content: dict[str, Any] = {"measured_on": self.measured_on.to_json()}
        content |= {"metrics": list(self.metrics)} if self.metrics else {}
        return content | {"results": [result.to_json() for result in self.results]}

    def _repr_html_(self) -> str:
        # In a notebook rich would display the tables by itself as well.
        console = Console(record=True, width=NOTEBOOK_WIDTH, file=io.StringIO(), force_jupyter=False)
        for line in self.measured_on.lines:
            console.print(line, highlight=False, markup=False)
        if self.metrics:
            console.print(self.metrics_table())
        console.print(self.table())
        return console.export_html(inline_styles=True, code_format=NOTEBOOK_CODE)


Options = ParamSpec("Options")
Returned = TypeVar("Returned")


def _one_line(function: Callable[Options, Returned]) -> Callable[Options, Returned]:
    """Turn the system's error about a path that cannot be read or written into a `UserError`."""

    @wraps(function)
    def wrapped(*arguments: Options.args, **options: Options.kwargs) -> Returned:
        try:
            return function(*arguments, **options)
        except OSError as error:
            name = str(error.filename or "")
            where = f"{name if len(name) < 100 else name[:100] + '...'}: " if name else ""
            raise UserError(f"{function.__name__}: {where}{error.strerror or error}") from error

    return wrapped


@_one_line
def record(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Prompt]",
    out: str | Path,
    **options: Any,
) -> TraceSet:
    """Run a model over prompts, optionally let it answer, and write its routing as a trace set.

    Args:
        model: A transformers mixture of experts, on any device, offloaded or not.
        tokenizer: Its tokenizer.
        prompts: Texts; chats, each a list of messages with ``role`` and ``content``; records as a ``.jsonl`` file holds
            them; or `Prompt` objects with names, sources and splits of their own.
        out: The trace set to make.
        **options: Fields of `moe_beyond.collect.config.Collection`: ``generate``, ``batch_size``, ``max_tokens``,
            ``steering``, ...

    Raises:
        UserError: The model is no mixture of experts, a prompt is empty, too long or no text, an option is unknown, or
            ``out`` exists.

    Warns:
        UserWarning: Something that the options request cannot be recorded.

    Example:
        >>> import moe_beyond as mb
        >>> chats = [[{"role": "user", "content": "hi"}]]
        >>> mb.record(model, tokenizer, chats, "traces/mine", generate=64)  # doctest: +SKIP
    """
    _check_names(options, (field.name for field in fields(Collection)))
    _check_loaded(model, tokenizer)
    notices: list[str] = []
    traces = collect(
        model, tokenizer, as_prompts(prompts), _path(out, "out"), Collection(**options), rank=Rank(0, 1),
        notice=notices.append,
    )  # fmt: skip
    for line in notices:
        warnings.warn(line, stacklevel=3)
    assert traces is not None
    return traces


def _check_loaded(model: Any, tokenizer: Any) -> None:
    """Refuse what is no loaded model and no tokenizer, and name the right order if they are swapped.

    Raises:
        UserError: They are something else, or weights of the model are on no device.
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


@_one_line
def load_traces(folder: str | Path) -> TraceSet:
    """Open a trace set.

    Args:
        folder: A folder, ``hf:ORG/REPO``, or a URL that fsspec reads.

    Raises:
        UserError: It is not a trace set.
    """
    return TraceSet(_path(folder, "traces"))


@_one_line
def load_predictor(name: str | Path) -> Predictor:
    """Load a predictor, ready to score.

    Args:
        name: A predictor folder, a name that ``moe-beyond list`` shows, ``hf:ORG/REPO``, or a run's folder: its
            exported predictor, else its best checkpoint, else its last.

    Raises:
        UserError: It is none, or it is damaged.
    """
    return load_trained(find_trained(_path(name, "predictor")))[0]


@_one_line
def replay(
    traces: TraceSet | str | Path,
    predictor: Predictor | str | Path | None = None,
    *,
    split: str | None = None,
    **options: Any,
) -> Replayed:
    """Replay traces through a cache under a memory budget, with LRU, Belady and the best fixed choice for comparison.

    Args:
        traces: A trace set.
        predictor: The predictor whose scores are used, if any; a loaded one, or a name as `load_predictor` takes it.
        split: One split of the trace set. By default all; with a predictor, one that it was not fitted on, if there is
            one. A warning says where the text may flatter the predictor.
        **options: The options of ``moe-beyond replay`` by their names, one value or several: ``budget="10%"``,
            ``policy=["lru", "belief"]``, ``prefetch="top6"``, ``device="rtx4060-laptop"``, ``strategy="all"``, ...
            (`moe_beyond.evaluation.options.Request` has them all). A budget may be a number: a float up to 1.0 is a
            share of all experts (0.1 and ``"10%"`` are the same, 1.0 is all of them), an int is slots (1 is one slot).

    Raises:
        UserError: An option cannot be read, or the predictor does not fit the traces.

    Example:
        >>> import moe_beyond as mb
        >>> traces = mb.load_traces("traces/webglm")  # doctest: +SKIP
        >>> mb.replay(traces, "cross_layer.deepseek-v2-lite-puffin", budget=[0.1, 0.2]).plot()  # doctest: +SKIP
    """
    opened, source, request = _opened(traces, "replay"), _source(predictor, "replay"), _request(options)
    conditions = asked_conditions(request, opened)
    asked = asked_strategies(request, opened, conditions, source)
    text = _text(opened, split, conditions, asked.sources)
    lines = beside(asked.strategies, conditions.common, opened.geometry, conditions.quotas)
    found = measure_and_replay(opened, lines, text.split, asked.sources, profile=conditions.profile)
    return Replayed(found.results, opened.geometry, _title(opened), measured_on=text)


@_one_line
def evaluate(
    traces: TraceSet | str | Path, predictor: Predictor | str | Path, *, split: str | None = None, **options: Any
) -> Replayed:
    """Measure a predictor by lookahead, and replay with each lookahead under a memory budget.

    Args:
        traces: A trace set.
        predictor: The predictor to measure, as in `replay`.
        split: As in `replay`.
        **options: As in `replay`, but for ``strategy``.

    Raises:
        UserError: An option cannot be read, or the predictor does not fit the traces.
    """
    opened, source = _opened(traces, "evaluate"), _source(predictor, "evaluate")
    if source is None:
        raise UserError("evaluate: a predictor is missing; write evaluate(traces, predictor), or use replay without")
    if "strategy" in options:
        raise UserError("evaluate: measures one predictor and takes no strategy; replay(traces, strategy=...) does")
    request = _request(options)
    conditions = asked_conditions(request, opened)
    lookaheads = [lookahead for lookahead in source.lookaheads if lookahead != "next"]
    asked = asked_combinations(request, opened, conditions, source, lookaheads)
    text = _text(opened, split, conditions, [source])
    lines = beside(asked, conditions.common, opened.geometry, conditions.quotas)
    found = measure_and_replay(opened, lines, text.split, [source], measure=source, profile=conditions.profile)
    return Replayed(found.results, opened.geometry, _title(opened), found.metrics, text)


def _opened(traces: TraceSet | str | Path, function: str) -> TraceSet:
    """Open a trace set, and name the right order if a predictor was given instead."""
    if isinstance(traces, TraceSet):
        return traces
    order = f"write {function}(traces, predictor)"
    if isinstance(traces, Predictor):
        raise UserError(f"{function}: traces is a predictor ({traces.architecture}); {order}")
    path = _path(traces, f"{function}: traces")
    if path in list_pretrained() or (Path(path) / CONFIG_FILE).is_file():
        raise UserError(f"{function}: traces is a predictor ({path}); {order}")
    return load_traces(path)


def _source(predictor: Predictor | str | Path | None, function: str) -> ScoreSource | None:
    """Open a predictor as a source of scores, and name the right order if a trace set was given instead."""
    if predictor is None:
        return None
    if isinstance(predictor, Predictor):
        return from_predictor(predictor, predictor.architecture)
    order = f"write {function}(traces, predictor)"
    if isinstance(predictor, TraceSet):
        raise UserError(f"{function}: predictor is a trace set ({predictor.folder}); {order}")
    path = _path(predictor, f"{function}: predictor")
    if (Path(path) / MANIFEST_FILE).is_file():
        raise UserError(f"{function}: predictor is a trace set ({path}); {order}")
    return find_source(path)


def _path(value: Any, what: str) -> str:
    if not isinstance(value, str | Path):
        raise UserError(f"{what} is a name or a path (got {shown(value)})")
    if not str(value).strip() or "\0" in str(value):
        raise UserError(f"{what} is a name or a path (got {shown(str(value))})")
    return str(value)


def _check_names(options: Mapping[str, Any], known: Iterable[str]) -> None:
    names = list(known)
    for name in options:
        if name not in names:
            raise unknown("option", name, names)


SEVERAL = frozenset(("budget", "strategy", "policy", "prefetch", "lookahead"))
"""Options that take one value or several."""
UNITS = (str, Path, Number, bytes, bytearray, memoryview, Mapping)
"""Types that can be iterated over, and yet are one value."""
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("warm_start", "carry_over", "sequential", "no_first_layer_prefetch"), (bool,)),
    **dict.fromkeys(("prefill_chunk", "batch_size", "warmup_tokens"), (Integral,)),
    "quantization": (Real,),
    **dict.fromkeys(("device", "scope", "quotas", "profile", "strategy", "policy", "prefetch"), (str, Path)),
    "lookahead": (str, Integral),
}
"""Types of the values of each option that the command line reads as text."""
NAMES = {bool: "True or False", Integral: "a whole number", Real: "a number", str: "text"}


def _request(options: dict[str, Any]) -> Request:
    """Turn keyword arguments into a request.

    Raises:
        UserError: An option is unknown, or its value is of another kind.
    """
    _check_names(options, (field.name for field in fields(Request)))
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name in SEVERAL:
            single = isinstance(value, UNITS) or not isinstance(value, Iterable)
            values = [_value(name, each) for each in ([value] if single else value)]
            if not values and name == "budget":
                raise UserError("budget: names no budget; write 0.1 or '10%'")
            given[name] = values
        elif value is not None:  # None means that the option is absent
            given[name] = _value(name, value)
    return Request(**given)


def _value(name: str, value: Any) -> Any:
    """Check one value, and bring it into the form that the command line has."""
    if name == "budget":
        return _budget(value)
    kinds = KINDS[name]
    if isinstance(value, np.bool_):
        value = bool(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(
            f"{name}: is {' or '.join(NAMES[kind] for kind in kinds if kind in NAMES)} (got {shown(value)})"
        )
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | str):
        return value
    number: Any = value
    return float(number) if Real in kinds else int(number)


def _budget(value: Any) -> str:
    """Write a budget as the command line has it: a float up to 1.0 is a share, an int is slots."""
    if isinstance(value, str):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1:
        return f"{Decimal(str(value)) * 100:f}%"
    raise UserError(
        f"budget: is a share (a float above 0 and up to 1.0), slots (an int), or text such as '10%' and '2.9GB' "
        f"(got {shown(value)})"
    )


def _text(traces: TraceSet, split: str | None, conditions: Conditions, sources: Sequence[ScoreSource]) -> MeasuredText:
    """Settle the split; warn in Python's way where its text may flatter a predictor."""
    if not isinstance(split, str | None):
        raise UserError(f"split: is the name of a split (got {shown(split)})")
    text = text_to_measure(traces, split, conditions, sources)
    for line in text.lines:
        warnings.warn(line, stacklevel=4)
    return text


def _title(traces: TraceSet) -> str:
    return f"{traces.geometry.model}, {traces.manifest.source}"
