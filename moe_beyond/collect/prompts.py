"""Prompts from a file, a data set or a script."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_beyond.download import REPOSITORY, hub_errors, looks_local, no_such_file
from moe_beyond.errors import UserError, unknown
from moe_beyond.json_fields import TEXT, is_plain_name
from moe_beyond.safe_text import brief, printable, shown

COLUMNS = ("messages", "conversations", "prompt", "text", "question", "instruction")
"""Fields in which the text of a record is searched, in this order, unless one is given."""
CHATS = ("messages", "conversations")
"""Fields with the messages of a chat: a list or, in a table, its JSON."""
ADDED = {"instruction": ("input", "context")}
"""Fields whose text is appended to another after a blank line: inputs of Alpaca's and Dolly's instructions."""
SHAREGPT = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles, and their names in chat templates."""
SPLIT, TRAINING = "split", "train"
"""Field with the split of a record's trace, and its default."""
TEXT_FILES = (".txt",)
RECORD_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_CELL = 2**31 - 1
"""Largest number of characters in a table's cell; the standard library's default is 131,072."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can encode, but no tokenizer and no file."""
BOM = "\ufeff"
"""Byte order mark."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""First bytes of UTF-16 text, and of little-endian UTF-32."""

Notice = Callable[[str], None]
"""Called with one line about fields or lines that were not read."""


@dataclass(frozen=True)
class Prompt:
    """A text for the model to read.

    Attributes:
        text: The text, or the messages of a chat for the model's chat template: mappings with ``role``, ``content``
            and further fields that the template reads.
        sequence_id: Name, unique in a trace set.
        source: File or data set, and position in it (default: ``"prompts"``).
        split: Split of its trace (default: ``"train"``).
    """

    text: str | tuple[Mapping[str, Any], ...]
    sequence_id: str
    source: str = "prompts"
    split: str = TRAINING


def read_prompts(name: str, notice: Notice = lambda line: None) -> Iterator[Prompt]:
    """Read prompts in order.

    Args:
        name: Text file (``.txt``, one prompt per line); file of records (`RECORD_FILES`: text in one of `COLUMNS`, or
            chat messages, and optionally ``id`` and ``split``); ``FILE:COLUMN``; or data set that ``datasets`` loads:
            a folder or ``ORG/NAME``, then ``[:SPLIT[:COLUMN]]``.
        notice: Callback with lines about blank lines and unread fields.

    Raises:
        UserError: There is no such file or data set, or a record has no text; the message names the line.
    """
    path, column = _file_and_column(name)
    if path is None:
        yield from _data_set(name, notice)
        return
    stem, file = printable(path.stem), printable(path.name)  # file names may contain bytes that are no text
    if path.suffix.lower() in TEXT_FILES:
        for number, line in _lines(path, notice):
            yield Prompt(line, f"{stem}-{number}", f"{file}:{number}")
    elif path.suffix.lower() in RECORD_FILES:
        fields = _Fields(str(path), column, notice)
        for number, location, record in _records(path, notice):
            yield fields.prompt(record, f"{stem}-{number}", f"{file}:{number}", f"{path}: {location}")
        fields.report_unread()
    else:
        raise UserError(
            f"{path}: prompts cannot be read from this kind of file (got {path.suffix or 'no suffix'}); give one of: "
            f"{', '.join((*TEXT_FILES, *RECORD_FILES))}"
        )


def as_prompts(items: Any) -> list[Prompt]:
    """Convert the prompts of a script.

    Args:
        items: Texts, chats (lists of messages), records or `Prompt` objects.

    Raises:
        UserError: An item has another type; the message names it.
    """
    if isinstance(items, str | bytes | Mapping | Prompt) or not isinstance(items, Iterable):
        raise UserError(f"prompts: must be a list of prompts (got one {type(items).__name__}); write [...] around it")
    prompts = []
    for number, item in enumerate(items, start=1):
        location = f"prompts[{number - 1}]"
        if isinstance(item, Mapping) and "role" in item and "content" in item:
            raise UserError(f"{location}: is a message; a chat is a list of messages, so give [[message, ...], ...]")
        if isinstance(item, Prompt):
            prompts.append(_checked(item, location))
        elif isinstance(item, str):
            prompts.append(_checked(Prompt(item, f"prompt-{number}"), location))
        else:
            record = list(item) if isinstance(item, tuple) else item
            prompts.append(_Fields("prompts").prompt(record, f"prompt-{number}", "prompts", location))
    return prompts


class _Fields:
    """Finds the text in each record of one source, and remembers the unread fields.

    Args:
        source: File or data set, for notices.
        column: Field that holds the text (default: the first of `COLUMNS` that a record has).
        notice: Callback of `report_unread` with one line.
    """

    def __init__(self, source: str, column: str = "", notice: Notice = lambda line: None) -> None:
        self._source, self._column, self._notice = source, column, notice
        self._read: dict[str, None] = {}
        self._unread: dict[str, None] = {}

    def prompt(self, record: Any, name: str, source: str, location: str) -> Prompt:
        """Find a record's text.

        Args:
            record: Record, chat or text.
            name: Default name of the sequence.
            source: File or data set, and position in it.
            location: Position for error messages.

        Raises:
            UserError: The record has no text, or an empty one.
        """
        if isinstance(record, list) and record and all(_is_message(item) for item in record):
            return _checked(Prompt(tuple(_message(item, location) for item in record), name, source), location)
        if isinstance(record, str) and not self._column:
            if not record.strip():
                raise UserError(f"{location}: is empty")
            return _checked(Prompt(record, name, source), location)
        if not isinstance(record, Mapping):
            raise UserError(
                f"{location}: must be a record with a text in one of {', '.join(COLUMNS)} "
                f"(got {json.dumps(record, default=str)[:60]})"
            )
        if self._column and self._column not in record:
            raise unknown(f"column of {location}", self._column, (printable(str(name)) for name in record))
        field = self._column or next((field for field in COLUMNS if record.get(field) is not None), None)
        if field is None:
            raise UserError(
                f"{location}: has no {' or '.join(COLUMNS)}; it has {brief(', '.join(map(str, record)))}; "
                "rename one, or select it: FILE:COLUMN"
            )
        text = record[field]
        if field in CHATS and isinstance(text, str):
            text = _chat(text, field, location)
        if isinstance(text, list):
            text = tuple(_message(message, location) for message in text)
        elif not isinstance(text, str):
            raise UserError(f"{location}: {field} must be text or a list of messages (got {type(text).__name__})")
        if not text or (isinstance(text, str) and not text.strip()):
            raise UserError(f"{location}: {field} is empty")
        fields = [field]
        if isinstance(text, str):
            for added in ADDED.get(field, ()):
                if not isinstance(record.get(added), str | None):
                    raise UserError(
                        f"{location}: {added} must be text, because it follows {field} (got {shown(record[added])})"
                    )
                if record.get(added) is not None and record[added].strip():
                    text, fields = f"{text}\n\n{record[added]}", [*fields, added]
        self._read.update(dict.fromkeys(fields))
        identity = record.get("id")
        if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int | float)):
            raise UserError(f"{location}: id must be text or a number (got {shown(identity)})")
        split = record.get(SPLIT)
        read = {*fields, *ADDED.get(field, ()), SPLIT, *([] if identity is None else ["id"])}
        self._unread.update(dict.fromkeys(str(key) for key, value in record.items() if value and key not in read))
        identity = name if identity is None else str(identity)
        return _checked(Prompt(text, identity, source, TRAINING if split is None else split), location)

    def report_unread(self) -> None:
        """Report which fields were read and which were not, if any was not."""
        if self._unread:
            read, unread = (", ".join(fields) for fields in (self._read, self._unread))
            self._notice(f"{self._source}: prompts are the text of {read}; not read: {unread}")


def _checked(prompt: Prompt, location: str) -> Prompt:
    """Return a prompt if a tokenizer can read it and a trace set can store it.

    Raises:
        UserError: The name is empty or contains control characters, the split is no plain name, or a text contains
            half a character.
    """
    name = prompt.sequence_id
    if any(SURROGATE.search(text) for text in (*_strings(prompt.text), *_strings(name))):
        raise UserError(f"{location}: has half a character (a lone surrogate); write the whole character, or remove it")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{location}: its id must be text (got {shown(name)}); give every prompt an id, or none")
    if not TEXT.accepts(name):
        raise UserError(f"{location}: its id must be {TEXT.description} (got {shown(name)})")
    if not TEXT.accepts(prompt.source):
        raise UserError(f"{location}: its source must be {TEXT.description} (got {shown(prompt.source)})")
    if not is_plain_name(prompt.split):
        raise UserError(f"{location}: its split must be a plain name (got {shown(prompt.split)})")
    return prompt


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, including keys."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            stack += value


def _file_and_column(name: str) -> tuple[Path | None, str]:
    """Distinguish a file from a data set, and split the column off the name of a file.

    Returns:
        The file, or None for a data set; and the column, ``""`` if none is given.

    Raises:
        UserError: The name is neither a file, nor a folder, nor a valid name on the Hub.
    """
    before, colon, column = name.rpartition(":")
    path = Path(name).expanduser()
    if not name.strip():
        raise UserError("--prompts: must not be empty (got an empty text); give a file of prompts, or a data set")
    for special in (path, Path(before).expanduser() if colon else path):
        if special.exists() and not special.is_file() and not special.is_dir():
            raise UserError(
                f"{special}: is no regular file, and prompts are read twice; save the prompts in a file (.txt, .jsonl)"
            )
    if path.is_file():
        return path, ""
    if colon and Path(before).expanduser().is_file():
        return Path(before).expanduser(), column
    data_set = name.partition(":")[0]
    if Path(data_set).is_dir():
        if not any(Path(data_set).iterdir()):
            raise UserError(f"{data_set}: is an empty folder; give a file of prompts, or a folder of a data set")
        return None, ""
    if looks_local(data_set) or not REPOSITORY.fullmatch(data_set):
        hint = "give a file of prompts (.txt, .jsonl, ...), or a data set of the Hub as ORG/NAME"
        raise no_such_file(name, "file of prompts", hint=hint)
    return None, ""


def _lines(path: Path, notice: Notice) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file that are not blank, with their numbers from 1.

    Raises:
        UserError: The file is not UTF-8 text.
    """
    blank = 0
    for number, line in _all_lines(path):
        if line.strip():
            yield number, line.removesuffix("\n").removesuffix("\r")
        else:
            blank += 1
    if blank:
        notice(f"{path}: {blank:,} blank line{'s' if blank > 1 else ''} skipped")


def _all_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their ends, with their numbers from 1; only a line feed ends a line.

    Raises:
        UserError: The file is not UTF-8 text.
    """
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise UserError(f"{path}: line {number} has NUL bytes; save it as UTF-8 text")
                yield number, line.removeprefix(BOM)  # joined files may each have started with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (after line {number}); save it as UTF-8") from error


def _records(path: Path, notice: Notice) -> Iterator[tuple[int, str, Any]]:
    """Yield the records of a file, with their numbers from 1 and their positions in the file.

    Raises:
        UserError: The file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: is not a Parquet file ({brief(error)})") from error
        yield from ((number, f"row {number}", row) for number, row in enumerate(rows, start=1))
    elif suffix in (".csv", ".tsv"):
        csv.field_size_limit(MAX_CELL)
        lines = (line for _, line in _all_lines(path))
        try:
            table = csv.DictReader(lines, delimiter="," if suffix == ".csv" else "\t", strict=True)
            for number, row in enumerate(table, start=1):
                if None in row or None in row.values():
                    raise UserError(f"{path}: row {number} has more or fewer cells than the header; mend the row")
                yield number, f"row {number}", row
        except csv.Error as error:
            raise UserError(f"{path}: is not a readable table ({brief(error)})") from error
    else:
        yield from _json_records(path, notice)


def _json_records(path: Path, notice: Notice) -> Iterator[tuple[int, str, Any]]:
    """Yield the records of JSON lines, or of one JSON value over several lines: an array, or a single record."""
    lines = _lines(path, notice)
    first = next(lines, None)
    if first is None:
        return
    if path.suffix.lower() == ".json" or first[1].lstrip().startswith("["):
        text = "\n".join(line for _, line in _lines(path, lambda line: None))
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"):  # more values: JSON lines
                raise UserError(f"{path}: is not JSON ({brief(error)})") from error
        else:
            is_chat = isinstance(document, list) and document and all(map(_is_message, document))
            records = document if isinstance(document, list) and not is_chat else [document]
            yield from ((number, f"record {number}", record) for number, record in enumerate(records, start=1))
            return
    for number, line in (first, *lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a .jsonl file has one record per line, so save a record over several lines as .json"
            raise UserError(
                f"{path}: line {number} is not JSON ({brief(error)}){hint if line.strip() in ('{', '[') else ''}"
            ) from error
        yield number, f"line {number}", record


def _data_set(name: str, notice: Notice) -> Iterator[Prompt]:
    """Stream a data set from a folder or the Hub; one query checks its name, because ``datasets`` retries for long."""
    import datasets

    repository, split, column = (*name.split(":"), "", "")[:3]
    split = split or "train"
    if not Path(repository).is_dir():
        with hub_errors(f"--prompts {repository}"):
            from huggingface_hub import HfApi

            HfApi().dataset_info(repository)
    fields = _Fields(name, column, notice)
    try:
        for number, record in enumerate(datasets.load_dataset(repository, split=split, streaming=True)):
            source = f"{repository}:{split}:{number}"
            yield fields.prompt(record, f"{Path(repository).name}-{number}", source, f"{name}: row {number}")
    except UserError:
        raise
    except Exception as error:  # for folders and files that are no data set, the library raises any exception
        raise UserError(f"{name}: cannot be loaded as a data set ({brief(error)})") from error
    fields.report_unread()


def _chat(text: str, field: str, location: str) -> Any:
    """Parse a chat in JSON; other text is returned unchanged.

    Raises:
        UserError: The text starts like JSON and cannot be parsed.
    """
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location}: {field} starts like JSON and cannot be parsed ({brief(error)}); give a list of messages, or "
            "put plain text in a field named text"
        ) from error
    return messages if isinstance(messages, list) else [messages]


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())


def _message(message: Any, location: str) -> dict[str, Any]:
    """Return a message with the field names of chat templates, from either spelling; other fields are kept.

    Raises:
        UserError: The message has no role, or neither content nor tool calls.
    """
    if not isinstance(message, Mapping):
        raise UserError(f"{location}: a message must be a record with role and content, or from and value")
    others = {key: value for key, value in message.items() if value is not None}  # a column of a table has Nones
    role, content = others.pop("role", others.pop("from", None)), others.pop("content", others.pop("value", None))
    if not isinstance(role, str):
        raise UserError(
            f"{location}: a message has no role (or from); it has {', '.join(map(str, message)) or 'nothing'}"
        )
    if content is None and not others.get("tool_calls"):
        raise UserError(f"{location}: a message of role {role!r} has no content (or value)")
    if content is not None and not isinstance(content, str | list):
        raise UserError(
            f"{location}: the content of a message of role {role!r} must be text (got {type(content).__name__})"
        )
    return {"role": SHAREGPT.get(role, role), "content": content, **others}
