"""The weights of a model folder, in one safetensors file or in those of an index."""

from pathlib import Path
from typing import Any

from moe_beyond.errors import UserError
from moe_beyond.files import file_in, read_json
from moe_beyond.pretrained import WEIGHTS_FILE
from moe_beyond.safe_text import shown
from moe_beyond.safetensors_header import StoredTensor, read_header

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


def stored_tensors(folder: Path, where: str) -> dict[str, StoredTensor]:
    """Find all weights of a model folder, in one file or in those of an index.

    Args:
        folder: Folder of the model.
        where: Name of the model, for messages.

    Raises:
        UserError: A file is missing or damaged.
    """
    files = {WEIGHTS_FILE: None}
    names: dict[str, Any] = {}
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        content = read_json(folder / INDEX_FILE)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{where}: {INDEX_FILE} has no weight_map; download the model again")
        if not isinstance(content.get("metadata"), dict):  # transformers reads it
            raise UserError(f'{where}: {INDEX_FILE} has no metadata; add "metadata": {{}}, or download the model again')
        names, files = weight_map, dict.fromkeys(sorted(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        path = file_in(folder, name)
        if not path.is_file():
            raise UserError(f"{where}: has no {name}; give the complete checkpoint of the model")
        tensors |= read_header(path)[0]
    if lacking := [name for name in names if name not in tensors]:
        raise UserError(
            f"{where}: its files lack {shown(lacking[0])}, which {INDEX_FILE} lists; give the complete checkpoint of "
            "the model"
        )
    return tensors
