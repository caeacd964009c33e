"""Prompts as tools write them: every text is read, whole, and what cannot be is named."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _helpers.common import error_line
from _helpers.hub_stand_in import Hub
from transformers import AutoConfig, AutoTokenizer

import moe_beyond.collect.prompts as reading
from moe_beyond.collect.config import CollectConfig
from moe_beyond.collect.prompts import Prompt, as_prompts, read_prompts
from moe_beyond.collect.tokenize import token_ids_of, tokenize_prompts
from moe_beyond.errors import UserError
from moe_beyond.pretrained import shipped_folder

SMALL = shipped_folder("small-moe")
CASES = Path(__file__).parents[1] / "data" / "cases" / "prompts"
CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
EVERY_ROLE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    "{% endif %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('Only user') }}{% endif %}{{ '' + m.content }}"
    "{% endfor %}"
)


def texts(path: Path | str) -> list[Any]:
    return [prompt.text for prompt in read_prompts(str(path))]


def tokenizer(template: str | None = None) -> Any:
    found = AutoTokenizer.from_pretrained(SMALL)
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("u2028.txt", ["first part\u2028second part", "third"]),
        ("bom.txt", ["import os", "import sys"]),
        ("bom.jsonl", ["import os"]),
        ("array.json", [CHAT]),
        ("array_pretty.json", ["import os"]),
        ("trailing_blank.jsonl", ["import os"]),
        ("parts.jsonl", [({"role": "user", "content": [{"type": "text", "text": "hi"}]},)]),
        (
            "alpaca.jsonl",
            ["List the names used in this code\n\nimport os and import sys then def f of x return x"],
        ),
    ],
)
def test_files_that_tools_write(name: str, expected: list[Any]) -> None:
    assert texts(CASES / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"a\x0cb\r\nc\x85d\xc2\x85e\rf\n\n \t\nlast", None),
        ("p.txt", "a\u2029b\u0085c\u001cd\n".encode(), ["a\u2029b\u0085c\u001cd"]),
        ("p.txt", b"one\r\ntwo\r\n", ["one", "two"]),
        ("p.jsonl", '{"text": "a\u2028b"}\r\n\n{"prompt": "c"}\n'.encode(), ["a\u2028b", "c"]),
        ("p.jsonl", b' [{"text": "a"},\n\n {"text": "b"}]', ["a", "b"]),
        ("p.json", b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("p.json", b'{\n "text": "a"\n}\n', ["a"]),
        ("p.json", json.dumps(CHAT).encode(), [CHAT]),
        ("p.jsonl", (json.dumps(CHAT) + "\n" + json.dumps(CHAT)).encode(), [CHAT, CHAT]),
        ("p.jsonl", b'{"instruction": "a", "input": "", "output": "o"}', ["a"]),
        ("p.jsonl", b'{"instruction": "a", "context": "b"}', ["a\n\nb"]),
        ("p.jsonl", b'{"prompt": null, "text": "a"}', ["a"]),
        ("p.csv", b'\xef\xbb\xbfid,prompt\r\n7,"a ""b""\n\nc"\r\n8,d\r\n', ['a "b"\n\nc', "d"]),
        ("p.txt", b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "two"]),
        ("p.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', ["a", "b"]),
        ("P.TXT", b"one\n", ["one"]),
        ("P.JSONL", b'{"text": "a"}\n', ["a"]),
        ("P.JSON", b'{\n"text": "a"}\n', ["a"]),
        ("P.Csv", b"text\na\n", ["a"]),
        ("P.TSV", b"text\tn\na\tb\n", ["a"]),
        ("p.json", b'["a",\n "b"]', ["a", "b"]),
        ("p.jsonl", b'"a"\n"b"\n', ["a", "b"]),
        ("p.json", b"[]", []),
        ("p.jsonl", json.dumps({"messages": json.dumps(CHAT)}).encode(), [CHAT]),
        ("p.csv", b'messages\n"[{""role"": ""user"", ""content"": ""hi""}]"\n', [({"role": "user", "content": "hi"},)]),
        ("p.jsonl", b'{"messages": "hi"}', ["hi"]),
        ("p.tsv", "question\tn\na\u2028b\t1\n".encode(), ["a\u2028b"]),
    ],
)
def test_ends_of_lines_and_shapes_of_files(tmp_path: Path, name: str, content: bytes, expected: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if expected is None:
        with pytest.raises(UserError, match=r"p\.txt: is not UTF-8 text \(after line 0\); save it as UTF-8"):
            texts(path)
    else:
        assert texts(path) == expected


def test_a_parquet_file_and_a_column_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"messages": [list(CHAT)], "body": ["text"], "id": ["x"]}), path)
    assert [(prompt.text, prompt.sequence_id) for prompt in read_prompts(str(path))] == [(CHAT, "x")]
    assert texts(f"{path}:body") == ["text"]
    with pytest.raises(UserError, match=r"unknown column of .*p\.parquet: row 1 'bdy'; did you mean 'body'\?"):
        texts(f"{path}:bdy")


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"question": "q", "answer": "a", "id": 3, "empty": ""}\n\n{"instruction": "i", "input": "j"}\n')
    notices: list[str] = []
    prompts = list(read_prompts(str(path), notices.append))
    assert [(prompt.sequence_id, prompt.source, prompt.text) for prompt in prompts] == [
        ("3", "p.jsonl:2", "q"),
        ("p-4", "p.jsonl:4", "i\n\nj"),
    ]
    assert notices == [
        f"{path}: 2 blank lines skipped",
        f"{path}: prompts are the text of question, instruction, input; not read: answer",
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "ab".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("p.jsonl", '{"text": "ab"}'.encode("utf-16-le"), "line 1 has NUL bytes; save it as UTF-8 text"),
        ("p.txt", b"a\nb\0c\n", "line 2 has NUL bytes; save it as UTF-8 text"),
        ("p.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON (Expecting value: line 1 column 10 (char 9))"),
        ("p.json", b'[{"text": "a"},]', "is not JSON (Illegal trailing comma before end of array"),
        ("p.jsonl", b"3", "line 1: must be a record with a text in one of"),
        ("p.json", b'["a", " "]', "record 2: is empty"),
        ("p.jsonl", b'{\n "text": "a"\n}\n', "line 1 is not JSON (Expecting property name enclosed in double quotes: "),
        (
            "p.jsonl",
            b'{"instruction": "a", "input": 5}',
            "line 1: input must be text, because it follows instruction (got 5)",
        ),
        (
            "p.jsonl",
            b'{"instruction": "a", "context": ["b"]}',
            "line 1: context must be text, because it follows instruction (got a list of 1",
        ),
        (
            "p.jsonl",
            b'{"messages": "[{"}',
            "line 1: messages starts like JSON and cannot be parsed (Expecting property name",
        ),
        (
            "p.jsonl",
            b'{"conversations": "[3]"}',
            "line 1: a message must be a record with role and content, or from and",
        ),
        ("p.jsonl", b'{"body": "a"}', "line 1: has no messages or conversations or prompt or text or question or"),
        ("p.jsonl", b'{"messages": [{"content": "a"}]}', "line 1: a message has no role (or from); it has content"),
        (
            "p.jsonl",
            b'{"other": 1, "a\\nb": 2}',
            "line 1: has no messages or conversations or prompt or text or question or "
            "instruction; it has other, a b; rename one, or select it: FILE:COLUMN",
        ),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: a message of role 'user' has no content (or value)"),
        ("p.csv", b"prompt,n\na\n", "row 1 has more or fewer cells than the header"),
        ("p.parquet", b"PAR1", "is not a Parquet file"),
        ("p.md", b"a", "prompts cannot be read from this kind of file (got .md); give one of: .txt, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        texts(tmp_path / name)
    if not says.startswith("is not JSON (Ill"):  # words of the standard library, which differ by its version
        assert f"{name}: {says}" in str(error.value)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("prompts.csv", "prompts.csv: there is no such file of prompts; did you mean prompts.txt?"),
        ("table.csv", "table.csv: there is no such file of prompts; give a file of prompts"),
        ("What is Python?", "What is Python?: there is no such file of prompts; give a file of prompts"),
        ("promts.txt", "promts.txt: there is no such file of prompts; did you mean prompts.txt?"),
        ("data/promts", "data/promts: there is no such file of prompts; give a file of prompts"),
        ("squad", "squad: there is no such file of prompts; give a file of prompts"),
        ("./org/name", "./org/name: there is no such file of prompts; give a file of prompts"),
        ("~/none.jsonl:text", "~/none.jsonl:text: there is no such file of prompts; give a file of prompts"),
    ],
)
def test_what_is_no_file_never_waits_for_the_hub(hub: Hub, tmp_path, monkeypatch, capsys, named, says) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "data").mkdir()
    line = error_line(capsys, ["collect", "--model", SMALL, "--prompts", named, "--out", "traces"])
    assert line.startswith(says)
    assert not hub.asked


def test_a_data_set_that_the_hub_does_not_have_is_asked_for_once(hub: Hub, tmp_path, monkeypatch, capsys) -> None:
    line = error_line(capsys, ["collect", "--model", SMALL, "--prompts", "org/none:train", "--out", tmp_path / "t"])
    assert line.startswith("--prompts org/none: there is no such repository of this kind")
    assert [path for path in hub.asked if "org/none" in path] == ["GET /api/datasets/org/none"]


def test_chats_go_to_the_template_with_all_roles_parts_and_tool_calls() -> None:
    every = tokenizer(EVERY_ROLE)

    def written(*messages: dict[str, Any]) -> str:
        return every.decode(token_ids_of(Prompt(messages, "c"), every))

    assert written({"role": "user", "content": "hi"}) == "<user>hi<assistant>"
    assert written(*CHAT) == "<user>hi<assistant>hello"
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    chat = (
        {"role": "system", "content": "be"},
        {"role": "developer", "content": "do"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "it", "name": "look"},
    )
    assert written(*chat) == "<system>be<developer>do<assistant>look<tool>it<assistant>"
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert written(parts) == "<user>[a][b]<assistant>"


@pytest.mark.parametrize("template", [TWO_ROLES, STRICT])
def test_parts_are_joined_for_a_template_that_reads_text_only(template: str) -> None:
    plain = tokenizer(template)
    parts = Prompt(({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},), "c")
    assert token_ids_of(parts, plain) == token_ids_of(Prompt(({"role": "user", "content": "ab"},), "c"), plain)


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (TWO_ROLES, [{"role": "tool", "content": "x"}], "ignores the content of a message of role 'tool'"),
        (
            TWO_ROLES,
            [{"role": "system", "content": "x"}, *CHAT],
            "ignores the content of a message of role 'system'",
        ),
        (
            TWO_ROLES,
            [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
            "ignores tool_calls of a message of role 'assistant'",
        ),
        (STRICT, list(CHAT), "the chat template of the tokenizer refuses the chat (roles user, assistant: Only user)"),
        (
            EVERY_ROLE,
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "a content part of a message of role 'user' must be text (got type 'image')",
        ),
        (EVERY_ROLE, ["hi"], "is not a chat; give a list of messages, each with role and content"),
        (EVERY_ROLE, [], "is not a chat; give a list of messages, each with role and content"),
        (None, list(CHAT), "is a chat, and the tokenizer has no chat template"),
    ],
)
def test_what_a_template_does_not_write_is_refused_by_name(template, messages, says) -> None:
    with pytest.raises(UserError) as error:
        token_ids_of(Prompt(tuple(messages), "chat-1"), tokenizer(template))
    assert str(error.value).startswith("chat-1: ")
    assert says in str(error.value)


def test_sharegpt_spells_roles_in_its_own_way() -> None:
    assert reading._message({"from": "human", "value": "a"}, "x") == {"role": "user", "content": "a"}
    assert reading._message({"from": "gpt", "value": "a"}, "x") == {"role": "assistant", "content": "a"}
    assert reading._message({"from": "observation", "value": "a"}, "x") == {"role": "observation", "content": "a"}


def test_a_script_may_give_texts_chats_records_and_prompts() -> None:
    own = Prompt("d", "mine", split="validation")
    found = as_prompts(["a", list(CHAT), CHAT, {"prompt": "b", "id": "x"}, {"messages": list(CHAT)}, own])
    assert [prompt.text for prompt in found] == ["a", CHAT, CHAT, "b", CHAT, "d"]
    assert [prompt.sequence_id for prompt in found] == ["prompt-1", "prompt-2", "prompt-3", "x", "prompt-5", "mine"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("text", "prompts: must be a list of prompts (got one str); write [...] around it"),
        (None, "prompts: must be a list of prompts (got one NoneType)"),
        (list(CHAT), "prompts[0]: is a message; a chat is a list of messages, so give [[message, ...], ...]"),
        ([3], "prompts[0]: must be a record with a text in one of"),
        (["a", ["b", "c"]], "prompts[1]: must be a record with a text in one of"),
        ([{"body": "a"}], "prompts[0]: has no messages or"),
    ],
)
def test_what_a_script_may_not_give_is_one_line(given: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        as_prompts(given)
    assert str(error.value).startswith(says)


def test_prompts_are_checked_before_weights_are_loaded() -> None:
    small, config = tokenizer(), AutoConfig.from_pretrained(SMALL)
    for prompts, says in (
        ([Prompt("a", "x"), Prompt("b", "x")], "2 prompts have the id 'x'; give every prompt its own id, or none"),
        ([Prompt("a", ""), Prompt("b", ""), Prompt("c", "")], "3 prompts have the id ''"),
        ([], "has no prompts"),
        ([Prompt("long " * 5000, "p0")], r"p0: exceeds the 1,024 positions of the model"),
    ):
        with pytest.raises(UserError, match=says):
            tokenize_prompts(prompts, small, config, CollectConfig(), "prompts.txt")


HALF = "has half a character (a lone surrogate); write the whole character, or remove it"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "id": ""}, "its id must be text (got '')"),
        ({"prompt": "a", "id": " \t"}, "its id must be text"),
        ({"prompt": "a", "id": ["x"]}, "id must be text or a number (got a list of 1)"),
        ({"prompt": "a", "id": True}, "id must be text or a number (got True)"),
        ({"prompt": "a", "id": "x\ny"}, "its id must be text of at most 4096 characters without control characters"),
        ({"prompt": "a", "id": "\x1b[31mx"}, "its id must be text of at most 4096 characters without control"),
        ({"prompt": "a", "id": "\ud83d"}, HALF),
        ({"prompt": "a\ude00b"}, HALF),
        ({"instruction": "a", "input": "\ud83d"}, HALF),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, HALF),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}, HALF),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"\ud83d": 1}}]}]}, HALF),
        ([{"role": "user", "content": "\ud83d"}], HALF),
    ],
)
def test_ids_and_texts_that_no_trace_set_holds_are_refused_by_line(tmp_path: Path, record: Any, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "\\ud83d\\ude00", "id": "whole"}}\n{json.dumps(record)}\n')
    with pytest.raises(UserError) as error:
        texts(path)
    assert str(error.value).startswith(f"{path}: line 2: {says}")
    with pytest.raises(UserError) as error:
        as_prompts([record])
    assert str(error.value).startswith(f"prompts[0]: {says}")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt("a", ""), "prompts[1]: its id must be text (got '')"),
        (Prompt("a", 3), "prompts[1]: its id must be text (got 3)"),  # type: ignore[arg-type]
        (Prompt("\udfff", "x"), f"prompts[1]: {HALF}"),
        ("\udfff", f"prompts[1]: {HALF}"),
        (Prompt("a", "x", split="a/b"), "prompts[1]: its split must be a plain name (got 'a/b')"),
        (Prompt("a", "x", source="\n"), "prompts[1]: its source must be text"),
    ],
)
def test_prompts_of_a_script_are_checked_alike(prompt: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        as_prompts(["fine", prompt])
    assert str(error.value).startswith(says)


def test_a_file_whose_name_is_no_text_gives_names_that_are(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xff.txt"))
    path.write_text("a\n")
    (prompt,) = read_prompts(str(path))
    assert (prompt.sequence_id, prompt.source) == ("p\\xdcff-1", "p\\xdcff.txt:1")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("", "--prompts: must not be empty (got an empty text); give a file of prompts, or a data set"),
        ("empty", "empty: is an empty folder; give a file of prompts, or a folder of a data set"),
        ("odd", "odd: cannot be loaded as a data set ("),
        ("pipe", "pipe: is no regular file, and prompts are read twice; save the prompts in a file (.txt, .jsonl)"),
        ("pipe:text", "pipe: is no regular file"),
    ],
)
def test_what_is_neither_a_file_nor_a_data_set_is_one_line(tmp_path: Path, monkeypatch, named: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "file.odd").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as error:
        texts(named)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


TYPED = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}{% endif %}{% endfor %}"  # fmt: skip  # noqa: E501
FIRST = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"  # fmt: skip  # noqa: E501
DUMPED = "{% for m in messages %}{{ m.content|tojson }}{% endfor %}"
PART_A, PART_B = {"type": "text", "text": "one"}, {"type": "text", "text": "two"}


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (TYPED, [PART_A, PART_B], "[one][two]"),
        (TYPED, ["one", "two"], "onetwo"),
        (TYPED, [{"text": "one"}, PART_B], "onetwo"),
        (FIRST, [PART_A], "one"),
        (FIRST, [PART_A, PART_B], "onetwo"),
        (FIRST, [PART_A, PART_A], "oneone"),
        (FIRST, [PART_A, {"type": "text", "text": "ne"}], "onene"),
        (DUMPED, [PART_A, PART_B], '"onetwo"'),
        (DUMPED.replace("tojson", "tojson(indent=1)"), [PART_A, PART_B], '"onetwo"'),
    ],
)
def test_the_text_of_every_part_is_in_what_the_model_reads(template, content, expected: str) -> None:
    every = tokenizer(template)
    ids = token_ids_of(Prompt(({"role": "user", "content": content},), "c"), every)
    assert every.decode(ids) == expected


@pytest.mark.parametrize(
    ("template", "content", "says"),
    [
        ("{{ 1 / 0 }}", "hi", "c: the chat template of the tokenizer refuses the chat (roles user: division by zero)"),
        ("{{ messages[7].content.x }}", "hi", "c: the chat template of the tokenizer refuses the chat (roles user: "),
        ("{{ messages[0].content[0].text }}", [PART_A, PART_B], "c: the chat template of the tokenizer does not write"),
    ],
)
def test_a_template_that_fails_or_leaves_text_out_is_one_line(template, content, says: str) -> None:
    with pytest.raises(UserError) as error:
        token_ids_of(Prompt(({"role": "user", "content": content},), "c"), tokenizer(template))
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
