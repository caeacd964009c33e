"""The upload of a trace set: shards, manifest, tokenizer and card."""

import re
from pathlib import Path

from huggingface_hub import DatasetCard

from moe_beyond.errors import UserError
from moe_beyond.files import file_in, read_text
from moe_beyond.hub.card import add_tags, add_usage, read_card
from moe_beyond.pretrained import CARD_FILE
from moe_beyond.traces.card import configs, language_creators, traces_card
from moe_beyond.traces.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.traces.router_weights import ROUTERS_FILE
from moe_beyond.traces.state_projection import PROJECTION_FILE

SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
"""Split names that `datasets` accepts."""
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
"""Smallest number of rows that is too large -> size category of the Hub."""


def trace_files(folder: Path, repository: str) -> dict[str, Path | bytes]:
    """Return the files to upload, after a check of every shard.

    Args:
        folder: Folder of the trace set.
        repository: Target repository, ``ORG/REPO``.

    Returns:
        File name -> path, or content of the file.

    Raises:
        UserError: A shard is damaged, `datasets` does not accept the name of a split, or the metadata of the local card
            cannot be read.
    """
    traces = TraceSet(str(folder))
    for split in traces.manifest.splits:
        if not SPLIT_NAME.fullmatch(split):
            raise UserError(
                f"{folder}: `datasets` accepts only letters, digits, _ and inner . (got split {split!r}); rename it"
            )
    states = traces.manifest.hidden_size is not None
    for shard in traces.manifest.shards:
        traces.read(shard, hidden_states=states)
    path = file_in(folder, CARD_FILE)
    text = read_text(path) if path.exists() else traces_card(traces.manifest)
    files: dict[str, Path | bytes] = {shard.file: folder / shard.file for shard in traces.manifest.shards}
    if states:
        files |= {shard.states_file: folder / shard.states_file for shard in traces.manifest.shards}
    if traces.routers is not None:
        files[ROUTERS_FILE] = folder / ROUTERS_FILE
    if traces.projection is not None:
        files[PROJECTION_FILE] = folder / PROJECTION_FILE
    files[MANIFEST_FILE] = folder / MANIFEST_FILE
    if traces.token_strings is not None:
        files[TOKENIZER_FILE] = folder / TOKENIZER_FILE
    return files | {CARD_FILE: hub_traces_card(text, traces.manifest, repository, source=str(path)).encode()}


def hub_traces_card(text: str, manifest: Manifest, repository: str, *, source: str) -> str:
    """Return the card for the Hub.

    Args:
        text: Content of the local card, whose prose is kept.
        manifest: Manifest of the trace set.
        repository: Target repository, ``ORG/REPO``.
        source: Path of the local card, for error messages.

    Raises:
        UserError: The metadata of the local card cannot be read.
    """
    card = read_card(DatasetCard, text, source)
    data, sequences = card.data, sum(shard.sequences for shard in manifest.shards)
    add_tags(card, "expert-routing", "traces")
    data["pretty_name"] = data.get("pretty_name") or f"Routing of {manifest.model_id} on {manifest.source}"
    data["language_creators"] = language_creators(manifest.author)
    data["size_categories"] = next((size for limit, size in SIZES.items() if sequences < limit), "n>10M")
    data["configs"] = configs(manifest)
    add_usage(card, _usage(manifest, repository))
    return str(card)


def _usage(manifest: Manifest, repository: str) -> str:
    geometry = manifest.geometry
    return f"""
## Usage

```python
import numpy as np
from datasets import load_dataset

rows = load_dataset("{repository}", split="{manifest.splits[0]}")
experts = np.array(rows[0]["experts"]).reshape(-1, {geometry.num_layers}, {geometry.top_k})  # tokens, layers, ids
```

The command line reads it like any other trace set:

```sh
moe-beyond inspect hf:{repository}
moe-beyond replay --traces hf:{repository} --budget 10%
```
"""
