"""What is published of a predictor folder: weights, configuration, a picture, and a card with figures as metadata."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moe_beyond.download import REPOSITORY
from moe_beyond.errors import UserError
from moe_beyond.hub.card import add_tags, add_usage, read_card
from moe_beyond.predictors.io.card import card
from moe_beyond.predictors.io.folder import read_config, read_predictor
from moe_beyond.predictors.training_text import mark_relation, relation_of_figures
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from moe_beyond.report.plots.recorded import recorded_figure, recorded_name
from moe_beyond.report.plots.replay import png
from moe_beyond.report.tables.results import lookahead_words

LIBRARY, TASK = "moe-beyond", "expert-prediction"
PICTURE_FILE = "replay.png"


def predictor_files(folder: Path, repository: str, dataset: str | None) -> dict[str, Path | bytes]:
    """Gather what is published of a predictor folder, once it was found whole.

    Args:
        folder: The predictor's.
        repository: Where it goes: ``ORG/REPO``.
        dataset: Repository of the trace set that it was fitted on, if that is published.

    Returns:
        The files by their names: where they lie, or what they hold.

    Raises:
        UserError: It is damaged, or its card's metadata cannot be read.
    """
    predictor, config = read_predictor(folder), read_config(folder)
    path = folder / CARD_FILE
    summary = next(iter((type(predictor).__doc__ or "").splitlines()), "")
    text = path.read_text(encoding="utf-8") if path.exists() else card(summary, config)
    files: dict[str, Path | bytes] = {WEIGHTS_FILE: folder / WEIGHTS_FILE, CONFIG_FILE: folder / CONFIG_FILE}
    try:
        files[CARD_FILE] = predictor_card(text, config, repository, dataset, source=str(path)).encode()
        if config.get("figures"):
            files[PICTURE_FILE] = _picture(config, repository)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: a field is missing or wrong ({error!r})") from error
    return files


def predictor_card(text: str, config: dict[str, Any], repository: str, dataset: str | None, *, source: str) -> str:
    """Write the card that the Hub shows.

    Args:
        text: The local card, whose prose is kept.
        config: The folder's configuration.
        repository: Where it goes.
        dataset: Repository of the trace set that it was fitted on, if that is published.
        source: The local card's file, for error messages.

    Raises:
        UserError: The local card's metadata cannot be read.
    """
    shown = read_card(ModelCard, text, source)
    data, model = cast(ModelCardData, shown.data), config.get("training", {}).get("model_id", "")
    data.library_name = LIBRARY
    add_tags(shown, TASK, config["architecture"])
    if not data.base_model and REPOSITORY.fullmatch(model):
        data.base_model = model
    if dataset is not None:
        named = data.datasets or []
        data.datasets = list(dict.fromkeys([*([named] if isinstance(named, str) else named), dataset]))
    if results := list(_results(config)):
        replaced = {result.unique_identifier for result in results}
        kept = [result for result in data.eval_results or [] if result.unique_identifier not in replaced]
        data.model_name, data.eval_results = repository.split("/")[1], [*kept, *results]
    add_usage(shown, _usage(config, repository))
    return str(shown)


def _results(config: dict[str, Any]) -> Iterator[EvalResult]:
    """Yield recorded figures as a model index has them: recall by lookahead, and the replay's hits and bytes."""
    for one in config.get("figures", []):
        source = mark_relation(one["source"], relation_of_figures(config.get("training"), one))
        about = {
            "task_type": TASK,
            "task_name": "Prediction of the experts that a mixture of experts routes to",
            "dataset_type": re.sub(r"[^\w.-]+", "-", source).strip("-").lower() or "traces",
            "dataset_name": f"{source}, {one['metrics'][0]['tokens']:,} tokens",
            "dataset_split": one["split"],
            "dataset_revision": one["fingerprint"],
        }
        for row in one["metrics"]:
            name = f"recall@{row['k']}, lookahead {lookahead_words(row['lookahead'], row['causal'])}"
            yield EvalResult(**about, metric_type="recall", metric_name=name, metric_value=round(row["recall_at_k"], 4))
        for row in one["replay"]:
            what = f"{row['budget_slots']:,} slots ({row['budget_share']:.0%}), {recorded_name(row)}"
            hits, moved = round(row["hit_rate"], 4), round(row["bytes_ratio"], 4)
            yield EvalResult(**about, metric_type="hit_rate", metric_name=f"hits, {what}", metric_value=hits)
            moved_name = f"bytes moved / demanded, {what}"
            yield EvalResult(**about, metric_type="bytes_ratio", metric_name=moved_name, metric_value=moved)


def _usage(config: dict[str, Any], repository: str) -> str:
    stepping = """
stepper = predictor.stepper()  # for one sequence, as it is decoded
stepper.observe_token(token_id)
stepper.observe_layer(0, experts)  # what the router chose; then layer 1, 2, ...
stepper.scores()  # (layers, experts): probabilities of what is known of each layer's next run, NaN for nothing"""
    picture = f"""
![Hits against bytes moved, as recorded]({PICTURE_FILE})
"""
    return f"""
## From the Hub

```python
from moe_beyond.predictors import from_pretrained

predictor = from_pretrained("{repository}"){stepping if config["causal"] else ""}
```

On the command line it is a predictor like any other:

```sh
moe-beyond evaluate hf:{repository} --traces TRACES --budget 10%
```
{picture if config.get("figures") else ""}"""


def _picture(config: dict[str, Any], repository: str) -> bytes:
    title = f"{repository}: {config['architecture']} for {config['geometry']['model']}"
    training = config.get("training")
    shown = [
        {**one, "source": mark_relation(one["source"], relation_of_figures(training, one))} for one in config["figures"]
    ]
    return png(recorded_figure(shown, title))
