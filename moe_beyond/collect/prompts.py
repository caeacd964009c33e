"""The texts that a model is given: from a file, or from a data set."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_beyond.download import REPOSITORY, hub_errors, looks_local, no_such_file
from moe_beyond.errors import UserError, unknown
from moe_beyond.fields import TEXT, brief, is_plain_name, printable, shown

COLUMNS = ("messages", "conversations", "prompt", "text", "question", "instruction")
"""Fields that a record's text is looked for in, in this order, if none is named."""
CHATS = ("messages", "conversations")
"""Fields that hold the messages of a chat, as a list or, in a table, as its JSON."""
ADDED = {"instruction": ("input", "context")}
"""Fields whose text follows that of another after a blank line: the inputs of Alpaca's and Dolly's instructions."""
SHAREGPT = {"human": "user", "gpt": "assistant"}
"""Roles that ShareGPT spells in its own way, and their names in chat templates."""
TEXT_FILES = (".txt",)
RECORD_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LONGEST_CELL = 2**31 - 1
"""Characters of a cell of a table; the standard library stops at 131,072 by default."""
HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which no tokenizer and no file takes; JSON can spell one."""
BOM = "\ufeff"
"""Byte order mark, which is no text."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""First bytes of UTF-16 text, and of little-endian UTF-32."""

Notice = Callable[[str], None]
"""Called with one line about fields or lines that were not read."""


@dataclass(frozen=True)
class Prompt:
    """A text to read, and perhaps to go on from.

    Attributes:
        text: The text, or the messages of a chat as the model's chat template takes them: mappings with ``role``,
            ``content``, and whatever else the template reads.
        sequence_id: Name, unique in a trace set.
        source: Where it is from.
        split: The split that its trace goes to.
    """

    text: str | tuple[Mapping[str, Any], ...]
    sequence_id: str
    source: str = "prompts"
    split: str = "train"


def read_prompts(named: str, notice: Notice = lambda line: None) -> Iterator[Prompt]:
    """Read prompts, in their order.

    Args:
        named: A text file (``.txt``, one prompt per line), a file of records (`RECORD_FILES`; text under one of
            `COLUMNS`, or chat messages, and perhaps ``id``), ``FILE:COLUMN``, or a data set that ``datasets`` loads:
            a folder or ``ORG/NAME``, then ``[:SPLIT[:COLUMN]]``.
        notice: Called with lines about blank lines and unread fields.

    Raises:
        UserError: There is no such file or data set, or a record has no text; the line is named.
    """
    path, column = _file_and_column(named)
    if path is None:
        yield from _data_set(named, notice)
        return
    stem, file = printable(path.stem), printable(path.name)  # a name of a file may hold bytes that are no text
    if path.suffix.lower() in TEXT_FILES:
        for number, line in _lines(path, notice):
            yield Prompt(line, f"{stem}-{number}", f"{file}:{number}")
    elif path.suffix.lower() in RECORD_FILES:
        fields = _Fields(str(path), column, notice)
        for number, where, record in _records(path, notice):
            yield fields.prompt(record, f"{stem}-{number}", f"{file}:{number}", f"{path}: {where}")
        fields.report_unread()
    else:
        raise UserError(
            f"{path}: is not a kind of file that prompts are read from ({path.suffix or 'no suffix'}); "
            f"known: {', '.join((*TEXT_FILES, *RECORD_FILES))}"
        )


def as_prompts(given: Any) -> list[Prompt]:
    """Turn what a script gives into prompts: texts, chats (lists of messages), records, and `Prompt` alike.

    Raises:
        UserError: It is something else; the item is named.
    """
    if isinstance(given, str | bytes | Mapping | Prompt) or not isinstance(given, Iterable):
        raise UserError(f"prompts: is one {type(given).__name__}, not a list of prompts; write [...] around it")
    prompts = []
    for number, item in enumerate(given, start=1):
        where = f"prompts[{number - 1}]"
        if isinstance(item, Mapping) and "role" in item and "content" in item:
            raise UserError(f"{where}: is a message; a chat is a list of messages, so give [[message, ...], ...]")
        if isinstance(item, Prompt):
            prompts.append(_checked(item, where))
        elif isinstance(item, str):
            prompts.append(_checked(Prompt(item, f"prompt-{number}"), where))
        else:
            record = list(item) if isinstance(item, tuple) else item
            prompts.append(_Fields("prompts").prompt(record, f"prompt-{number}", "prompts", where))
    return prompts


class _Fields:
    """Finds the text in each record of one source, and remembers which fields nothing was read from.

    Args:
        source: The file or data set, for notices.
        column: The field that holds the text; the first of `COLUMNS` that a record has by default.
        notice: Called by `report_unread` with a line.
    """

    def __init__(self, source: str, column: str = "", notice: Notice = lambda line: None) -> None:
        self._source, self._column, self._notice = source, column, notice
        self._read: dict[str, None] = {}
        self._unread: dict[str, None] = {}

    def prompt(self, record: Any, name: str, source: str, where: str) -> Prompt:
        """Find a record's text.

        Raises:
            UserError: It has none, or an empty one.
        """
        if isinstance(record, list) and record and all(_is_message(item) for item in record):
            return _checked(Prompt(tuple(_message(item, where) for item in record), name, source), where)
        if isinstance(record, str) and not self._column:
            if not record.strip():
                raise UserError(f"{where}: is empty")
            return _checked(Prompt(record, name, source), where)
        if not isinstance(record, Mapping):
            raise UserError(
                f"{where}: is not a record with a text under one of {', '.join(COLUMNS)} "
                f"(got {json.dumps(record, default=str)[:60]})"
            )
        if self._column and self._column not in record:
            raise unknown(f"column of {where}", self._column, map(str, record))
        field = self._column or next((field for field in COLUMNS if record.get(field) is not None), None)
        if field is None:
            raise UserError(
                f"{where}: has no {' or '.join(COLUMNS)}; it has {', '.join(map(str, record))}; "
                "rename one, or name it: FILE:COLUMN"
            )
        text = record[field]
        if field in CHATS and isinstance(text, str):
            text = _chat(text, field, where)
        if isinstance(text, list):
            text = tuple(_message(message, where) for message in text)
        elif not isinstance(text, str):
            raise UserError(f"{where}: {field} is {type(text).__name__}, not text or a list of messages")
        if not text or (isinstance(text, str) and not text.strip()):
            raise UserError(f"{where}: {field} is empty")
        fields = [field]
        if isinstance(text, str):
            for added in ADDED.get(field, ()):
                if not isinstance(record.get(added), str | None):
                    raise UserError(f"{where}: {added} is {shown(record[added])}, not text; it follows the {field}")
                if record.get(added) is not None and record[added].strip():
                    text, fields = f"{text}\n\n{record[added]}", [*fields, added]
        self._read.update(dict.fromkeys(fields))
        identity = record.get("id")
        if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int | float)):
            raise UserError(f"{where}: id is {shown(identity)}, not text or a number")
        known = {*fields, *ADDED.get(field, ()), *([] if identity is None else ["id"])}
        self._unread.update(dict.fromkeys(str(key) for key, value in record.items() if value and key not in known))
        return _checked(Prompt(text, name if identity is None else str(identity), source), where)

    def report_unread(self) -> None:
        """Say which fields were read, where records have others that nothing was read from."""
        if self._unread:
            read, unread = (", ".join(fields) for fields in (self._read, self._unread))
            self._notice(f"{self._source}: prompts are the text of {read}; not read: {unread}")


def _checked(prompt: Prompt, where: str) -> Prompt:
    """Return a prompt that a tokenizer can read and a trace set can hold.

    Raises:
        UserError: Its name is empty or holds control characters, its split is no plain name, or a text of it holds half
            a character.
    """
    name = prompt.sequence_id
    if any(HALF.search(text) for text in (*_strings(prompt.text), *_strings(name))):
        raise UserError(f"{where}: holds half a character (a lone surrogate); write the whole character, or remove it")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: its id is no text or empty (got {shown(name)}); give each prompt an id, or none")
    if not TEXT.accepts(name):
        raise UserError(f"{where}: its id must be {TEXT.description} (got {shown(name)})")
    if not TEXT.accepts(prompt.source):
        raise UserError(f"{where}: its source must be {TEXT.description} (got {shown(prompt.source)})")
    if not is_plain_name(prompt.split):
        raise UserError(f"{where}: its split must be a plain name (got {shown(prompt.split)})")
    return prompt


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts within a value of JSON, keys included."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value


def _file_and_column(named: str) -> tuple[Path | None, str]:
    """Distinguish a file from a data set, and take the column off a file's name.

    Returns:
        The file, or None for a data set; and the column, ``""`` if none is named.

    Raises:
        UserError: It is neither a file, nor a folder, nor a name that the Hub could know.
    """
    before, colon, column = named.rpartition(":")
    path = Path(named).expanduser()
    if not named.strip():
        raise UserError("--prompts: names nothing (got an empty text); give a file of prompts, or a data set")
    for special in (path, Path(before).expanduser() if colon else path):
        if special.exists() and not special.is_file() and not special.is_dir():
            raise UserError(
                f"{special}: is no regular file, and is read more than once; save the prompts in a file (.txt, .jsonl)"
            )
    if path.is_file():
        return path, ""
    if colon and Path(before).expanduser().is_file():
        return Path(before).expanduser(), column
    name = named.partition(":")[0]
    if Path(name).is_dir():
        if not any(Path(name).iterdir()):
            raise UserError(f"{name}: is an empty folder; give a file of prompts, or a folder of a data set")
        return None, ""
    if looks_local(name) or not REPOSITORY.fullmatch(name):
        hint = "give a file of prompts (.txt, .jsonl, ...), or a data set of the Hub as ORG/NAME"
        raise no_such_file(named, "file of prompts", hint=hint)
    return None, ""


def _lines(path: Path, notice: Notice) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file that are not blank, each with its number from 1.

    Raises:
        UserError: It is not UTF-8 text.
    """
    blank = 0
    for number, line in _all_lines(path):
        if line.strip():
            yield number, line.removesuffix("\n").removesuffix("\r")
        else:
            blank += 1
    if blank:
        notice(f"{path}: {blank:,} blank line{'s' if blank > 1 else ''} passed over")


def _all_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their ends, each with its number from 1; only a line feed ends a line.

    Raises:
        UserError: It is not UTF-8 text.
    """
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise UserError(f"{path}: line {number} holds NUL bytes; save it as UTF-8 text")
                yield number, line.removeprefix(BOM)  # files with a mark each may have been joined
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (after line {number}); save it as UTF-8") from error


def _records(path: Path, notice: Notice) -> Iterator[tuple[int, str, Any]]:
    """Yield the records of a file, each with its number from 1, and its place in the file.

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
        csv.field_size_limit(LONGEST_CELL)
        lines = (line for _, line in _all_lines(path))
        try:
            table = csv.DictReader(lines, delimiter="," if suffix == ".csv" else "\t", strict=True)
            for number, row in enumerate(table, start=1):
                if None in row or None in row.values():
                    raise UserError(f"{path}: row {number} has not as many cells as the header")
                yield number, f"row {number}", row
        except csv.Error as error:
            raise UserError(f"{path}: is not a table that can be read ({error})") from error
    else:
        yield from _json_records(path, notice)


def _json_records(path: Path, notice: Notice) -> Iterator[tuple[int, str, Any]]:
    """Yield the records of JSON lines, or of one JSON value that may span lines: an array, or a single record."""
    lines = _lines(path, notice)
    first = next(lines, None)
    if first is None:
        return
    if path.suffix.lower() == ".json" or first[1].lstrip().startswith("["):
        text = "\n".join(line for _, line in _lines(path, lambda line: None))
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"):  # more values: JSON lines
                raise UserError(f"{path}: is not JSON ({brief(error)})") from error
        else:
            is_chat = isinstance(whole, list) and whole and all(map(_is_message, whole))
            records = whole if isinstance(whole, list) and not is_chat else [whole]
            yield from ((number, f"record {number}", record) for number, record in enumerate(records, start=1))
            return
    for number, line in (first, *lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a .jsonl file holds one record per line, so name a record over several lines .json"
            raise UserError(
                f"{path}: line {number} is not JSON ({brief(error)}){hint if line.strip() in ('{', '[') else ''}"
            ) from error
        yield number, f"line {number}", record


def _data_set(named: str, notice: Notice) -> Iterator[Prompt]:
    """Stream a data set: a folder, or a name on the Hub, which is asked once before ``datasets`` asks it for long."""
    import datasets

    name, split, column = (*named.split(":"), "", "")[:3]
    split = split or "train"
    if not Path(name).is_dir():
        with hub_errors(f"--prompts {name}"):
            from huggingface_hub import HfApi

            HfApi().dataset_info(name)
    fields = _Fields(named, column, notice)
    try:
        for number, record in enumerate(datasets.load_dataset(name, split=split, streaming=True)):
            where = f"{name}:{split}:{number}"
            yield fields.prompt(record, f"{Path(name).name}-{number}", where, f"{named}: row {number}")
    except UserError:
        raise
    except Exception as error:  # of folders and files that are no data set, the library raises whatever it met
        raise UserError(f"{named}: is not a data set that can be loaded ({brief(error)})") from error
    fields.report_unread()


def _chat(text: str, field: str, where: str) -> Any:
    """Read a chat that is written as JSON; text that is none stays text.

    Raises:
        UserError: It looks like JSON and cannot be read, or holds no list.
    """
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: {field} looks like JSON and is none ({brief(error)}); give a list of messages, or put "
            "plain text under text"
        ) from error
    return messages if isinstance(messages, list) else [messages]


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message as chat templates read it, from either spelling in use; what else it has stays.

    Raises:
        UserError: It has no role, or neither content nor tool calls.
    """
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: a message is a record with role and content, or from and value")
    rest = {key: value for key, value in message.items() if value is not None}  # a column of a table has Nones
    role, content = rest.pop("role", rest.pop("from", None)), rest.pop("content", rest.pop("value", None))
    if not isinstance(role, str):
        raise UserError(f"{where}: a message has no role (or from); it has {', '.join(map(str, message)) or 'nothing'}")
    if content is None and not rest.get("tool_calls"):
        raise UserError(f"{where}: a message of role {role!r} has no content (or value)")
    if content is not None and not isinstance(content, str | list):
        raise UserError(f"{where}: the content of a message of role {role!r} is {type(content).__name__}, not text")
    return {"role": SHAREGPT.get(role, role), "content": content, **rest}
