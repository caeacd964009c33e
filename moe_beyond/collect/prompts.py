"""The texts that a model is given: from a file, or from a data set."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_beyond.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("messages", "conversations", "prompt", "text", "question", "instruction")
"""Where a record's text is looked for, in this order, if no column is named."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Prompt:
    """A text to read, and perhaps to go on from.

    Attributes:
        text: The text, or the messages of a chat, each with ``role`` and ``content``.
        sequence_id: Its name; one of a kind in a trace set.
        source: Where it is from.
        split: Where its trace goes.
    """

    text: str | tuple[Mapping[str, str], ...]
    sequence_id: str
    source: str = "prompts"
    split: str = "train"


def read_prompts(named: str) -> Iterator[Prompt]:
    """Read prompts, in their order.

    Args:
        named: A ``.txt`` file, a line a prompt; a ``.jsonl`` file, a record a line (text under one of `COLUMNS`, or
            chat messages, and perhaps ``id``); or a data set that ``datasets`` loads: ``NAME[:SPLIT[:COLUMN]]``.

    Raises:
        UserError: There is no such file or data set, or a record has no text; the line is named.
    """
    path = Path(named)
    if path.suffix in (".txt", ".jsonl", ".json") and path.exists():
        try:
            yield from (_lines if path.suffix == ".txt" else _records)(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text") from error
    elif path.is_file():
        raise UserError(f"{path}: is neither .txt (a line a prompt) nor .jsonl (a record a line)")
    elif path.suffix in (".txt", ".jsonl", ".json"):
        raise UserError(f"{path}: not found")
    else:
        yield from _data_set(named)


def token_ids_of(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize a prompt; a chat goes through the model's own template, ready for its answer.

    Raises:
        UserError: It is empty, or the tokenizer has no template.
    """
    if isinstance(prompt.text, str):
        found = list(tokenizer(prompt.text).input_ids) if prompt.text.strip() else []
    elif tokenizer.chat_template is None:
        raise UserError(f"{prompt.sequence_id}: is a chat, and the tokenizer has no chat template")
    else:
        messages = [dict(message) for message in prompt.text]
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        found = list(tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, return_dict=False))
    if not found:
        raise UserError(f"{prompt.sequence_id}: is empty; the model has nothing to read")
    return found


def _lines(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            raise UserError(f"{path}: line {number} is empty; a line is a prompt")
        yield Prompt(line, f"{path.stem}-{number}", f"{path.name}:{number}")


def _records(path: Path) -> Iterator[Prompt]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON ({error})") from error
            yield _prompt(record, f"{path.stem}-{number}", f"{path.name}:{number}", f"{path}: line {number}")


def _data_set(named: str) -> Iterator[Prompt]:
    import datasets

    name, split, column = (*named.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, record in enumerate(rows):
            where = f"{name}:{split or 'train'}:{number}"
            yield _prompt(record, f"{Path(name).name}-{number}", where, f"{named}: row {number}", column)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{named}: neither a .txt or .jsonl file nor a data set that can be loaded ({told})") from error


def _prompt(record: Any, name: str, source: str, where: str, column: str = "") -> Prompt:
    """Find a record's text.

    Raises:
        UserError: It has none, or an empty one.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: is not a record with a text under one of {', '.join(COLUMNS)}")
    named = [column] if column else [key for key in COLUMNS if key in record]
    if not named or named[0] not in record:
        raise UserError(f"{where}: has no {column or ' or '.join(COLUMNS)}; it has {', '.join(record)}")
    text = record[named[0]]
    if isinstance(text, list):
        text = tuple(_message(message, where) for message in text)
    elif not isinstance(text, str):
        raise UserError(f"{where}: {named[0]} is {type(text).__name__}, not text or a list of messages")
    if not text or (isinstance(text, str) and not text.strip()):
        raise UserError(f"{where}: {named[0]} is empty")
    return Prompt(text, str(record.get("id", name)), source)


def _message(message: Any, where: str) -> dict[str, str]:
    """Return a message as chat templates read it, from either spelling in use."""
    if isinstance(message, Mapping):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role in ROLES and isinstance(content, str):
            return {"role": ROLES[role], "content": content}
    raise UserError(f"{where}: a message is a record with role ({', '.join(ROLES)}) and content")
