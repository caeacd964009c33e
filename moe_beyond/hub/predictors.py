"""The upload of a predictor folder: weights, configuration, a plot, and a card with its evaluations as metadata."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moe_beyond.download import REPOSITORY
from moe_beyond.files import file_in, read_text
from moe_beyond.hub.card import add_tags, add_usage, read_card
from moe_beyond.predictors.io.card import card, card_with_figures
from moe_beyond.predictors.io.folder import read_config, read_predictor
from moe_beyond.predictors.training_text import mark_relation, relation_of_figures
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from moe_beyond.report.labels import BYTES_AXIS, metric_lookahead, recorded_label
from moe_beyond.report.plots.recorded import recorded_plot
from moe_beyond.report.plots.replay import render_png

LIBRARY, TASK = "moe-beyond", "expert-prediction"
PICTURE_FILE = "replay.png"


def predictor_files(folder: Path, repository: str, dataset: str | None) -> dict[str, Path | bytes]:
    """Collect the files of a predictor folder to upload, after checking the folder.

    Args:
        folder: Folder with the predictor.
        repository: Repository on the Hub, ``ORG/REPO``.
        dataset: Repository of the uploaded trace set that the predictor was fitted on; None if there is none.

    Returns:
        File name -> local path, or content.

    Raises:
        UserError: The folder is damaged, or the metadata of its card cannot be read.
    """
    predictor, config = read_predictor(folder), read_config(folder)
    path = file_in(folder, CARD_FILE)
    files: dict[str, Path | bytes] = {WEIGHTS_FILE: folder / WEIGHTS_FILE, CONFIG_FILE: folder / CONFIG_FILE}
    text = card(predictor, config)
    if path.exists():  # with the figures of the configuration, also after a kill between the two files
        text = card_with_figures(folder, config) if config.get("figures") else read_text(path)
    files[CARD_FILE] = predictor_card(text, config, repository, dataset, source=str(path)).encode()
    if config.get("figures"):
        files[PICTURE_FILE] = _picture(config, repository)
    return files


def predictor_card(text: str, config: dict[str, Any], repository: str, dataset: str | None, *, source: str) -> str:
    """Return the card for the Hub.

    The text and the metadata of the local card stay, including its licence; a licence is never added, because only the
    author can choose it.

    Args:
        text: Text of the local card.
        config: Configuration of the predictor folder.
        repository: Repository on the Hub, ``ORG/REPO``.
        dataset: Repository of the uploaded trace set that the predictor was fitted on; None if there is none.
        source: File name of the local card for error messages.

    Raises:
        UserError: The metadata of the local card cannot be read.
    """
    hub_card = read_card(ModelCard, text, source)
    data, model = cast(ModelCardData, hub_card.data), config.get("training", {}).get("model_id", "")
    data.library_name = LIBRARY
    add_tags(hub_card, TASK, config["architecture"])
    if not data.base_model and REPOSITORY.fullmatch(model):
        data.base_model = model
    if dataset is not None:
        own = data.datasets or []
        data.datasets = list(dict.fromkeys([*([own] if isinstance(own, str) else own), dataset]))
    if results := list(_results(config)):
        replaced = {result.unique_identifier for result in results}
        kept = [result for result in data.eval_results or [] if result.unique_identifier not in replaced]
        data.model_name, data.eval_results = repository.split("/")[1], [*kept, *results]
    add_usage(hub_card, _usage(config, repository))
    return str(hub_card)


def _results(config: dict[str, Any]) -> Iterator[EvalResult]:
    """Yield recorded evaluations as entries of a model index: recall by lookahead, hit rate and bytes of replays."""
    for evaluation in config.get("figures", []):
        source = mark_relation(evaluation["source"], relation_of_figures(config.get("training"), evaluation))
        common = {
            "task_type": TASK,
            "task_name": "Expert prediction for mixture-of-experts models",
            "dataset_type": re.sub(r"[^\w.-]+", "-", source).strip("-").lower() or "traces",
            "dataset_name": f"{source}, {evaluation['metrics'][0]['tokens']:,} tokens",
            "dataset_split": evaluation["split"],
            "dataset_revision": evaluation["fingerprint"],
        }
        for row in evaluation["metrics"]:
            name = f"recall@{row['k']}, lookahead {metric_lookahead(row['lookahead'], row['causal'])}"
            recall = round(row["recall_at_k"], 4)
            yield EvalResult(**common, metric_type="recall", metric_name=name, metric_value=recall)
        for row in evaluation["replay"]:
            replay = f"{row['budget_slots']:,} slots ({row['budget_share']:.0%}), {recorded_label(row)}"
            for metric, name in (("hit_rate", "hit rate"), ("bytes_ratio", BYTES_AXIS)):
                value = round(row[metric], 4)
                yield EvalResult(**common, metric_type=metric, metric_name=f"{name}, {replay}", metric_value=value)


def _usage(config: dict[str, Any], repository: str) -> str:
    stepping = """
stepper = predictor.stepper()  # decodes one sequence
stepper.observe_token(token_id)
stepper.observe_layer(0, experts)  # the router's experts in MoE layer 0; then layers 1, 2, ...
stepper.scores()  # (layers, experts): probabilities for each layer's next run, NaN where unknown"""
    picture = f"""
![Hit rate and bytes of recorded replays]({PICTURE_FILE})
"""
    return f"""
## Usage

```python
from moe_beyond.predictors import from_pretrained

predictor = from_pretrained("{repository}"){stepping if config["causal"] else ""}
```

On the command line, write `hf:` before the repository:

```sh
moe-beyond evaluate hf:{repository} --traces TRACES --budget 10%
```
{picture if config.get("figures") else ""}"""


def _picture(config: dict[str, Any], repository: str) -> bytes:
    title = f"{repository}: {config['architecture']} for {config['geometry']['model']}"
    training = config.get("training")
    evaluations = [
        {**evaluation, "source": mark_relation(evaluation["source"], relation_of_figures(training, evaluation))}
        for evaluation in config["figures"]
    ]
    return render_png(recorded_plot(evaluations, title))
