"""Prompts into token ids: plain text by the tokenizer, chats by the model's own template."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_beyond.collect.config import Collection, Row
from moe_beyond.collect.prompts import Prompt
from moe_beyond.errors import UserError
from moe_beyond.fields import brief, shown
from moe_beyond.traces.splits import parse_blocks, validation_numbers, without_copies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_ROLES = ("user", "assistant")
"""Roles that every chat template writes."""
SENTINEL = "\N{REPLACEMENT CHARACTER}?"
"""A content that no message has, to see whether a template writes contents of a role at all."""
UNREAD = "key_that_no_template_reads"
"""A key of a content part, to see whether a template writes a list out as it is."""


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", config: Any, asked: Collection, source: str
) -> list[Row]:
    """Tokenize prompts, cut them, and decide their splits: all that can be wrong with prompts is found here.

    Args:
        prompts: Prompts of the model.
        tokenizer: Tokenizer of the model.
        config: Configuration of the model, for its number of positions.
        asked: Settings of the collection.
        source: File or data set of the prompts, for error messages.

    Raises:
        UserError: There is none, one is empty or too long or of a kind that the template does not write, or two have
            one name.
    """
    if not prompts:
        raise UserError(f"{source}: holds no prompt")
    name, count = Counter(prompt.sequence_id for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source}: {count} prompts are called {shown(name)}; give each an id of its own, or none")
    rows = [(prompt, _cut(prompt, token_ids_of(prompt, tokenizer), config, asked)) for prompt in prompts]
    if asked.val_blocks is None:
        return rows
    texts = {number: tuple(ids) for number, (_, ids) in enumerate(rows)}
    lengths = {number: len(ids) for number, ids in texts.items()}
    held_out = without_copies(validation_numbers(lengths, *parse_blocks(asked.val_blocks)), texts)
    return [
        (replace(prompt, split="validation" if number in held_out else "train"), ids)
        for number, (prompt, ids) in enumerate(rows)
    ]


def token_ids_of(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize a prompt; a chat goes through the model's own template, ready for its answer.

    Raises:
        UserError: It is empty, or no text, or the tokenizer has no template, or one that refuses or passes over a
            message.
    """
    if isinstance(prompt.text, str):
        ids = list(tokenizer(prompt.text).input_ids) if prompt.text.strip() else []
    elif not isinstance(prompt.text, Sequence):
        raise UserError(f"{prompt.sequence_id}: is {type(prompt.text).__name__}, not text or a list of messages")
    elif tokenizer.chat_template is None:
        raise UserError(
            f"{prompt.sequence_id}: is a chat, and the tokenizer has no chat template; give plain text, or the "
            "instruction-tuned model"
        )
    else:
        ids = _chat_ids(prompt, tokenizer)
    if not ids:
        raise UserError(f"{prompt.sequence_id}: is empty; the model has nothing to read")
    return ids


def _cut(prompt: Prompt, token_ids: list[int], config: Any, asked: Collection) -> list[int]:
    """Cut a prompt to ``max_tokens``.

    Raises:
        UserError: With what is to be written it is longer than the model has positions all the same.
    """
    token_ids = token_ids[: asked.max_tokens]
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and len(token_ids) + asked.generate > most:
        left = most - asked.generate
        advice = "--max-tokens N cuts it" if left > 0 else f"generate fewer than {most:,} tokens"
        more = f" and {asked.generate} to write" if asked.generate else ""
        raise UserError(
            f"{prompt.sequence_id}: has {len(token_ids):,} tokens{more}, and the model {most:,} positions; {advice}"
        )
    return token_ids


def _chat_ids(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Write a chat by the template, and tokenize it.

    Raises:
        UserError: The template refuses it, or writes nothing of one of its messages.
    """
    name = prompt.sequence_id
    given = [dict(message) for message in prompt.text if isinstance(message, Mapping)]
    if not given or len(given) < len(prompt.text) or not all({"role", "content"} <= m.keys() for m in given):
        raise UserError(f"{name}: is not a chat: a list of messages, each with role and content")
    messages = _with_text(given, tokenizer, name)
    written = _written(messages, tokenizer, name)
    for place, message in enumerate(messages):
        for key, other in _changes(message):
            changed = [*messages[:place], other, *messages[place + 1 :]]
            if _written(changed, tokenizer, name) == written:
                raise UserError(
                    f"{name}: the chat template of the tokenizer passes over {key} of a message of role "
                    f"{message['role']!r}; leave it out, or give a model whose template writes it"
                )
    answered = messages[-1]["role"] == "assistant"
    ids = _apply(messages, tokenizer, name, add_generation_prompt=not answered, tokenize=True, return_dict=False)
    return list(itertools.chain(ids))


def _changes(message: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what a template might pass over of a message, each with the message that differs in it."""
    changes = []
    if message["role"] not in PLAIN_ROLES and message["content"]:
        changes.append(("the content", {**message, "content": SENTINEL}))
    if message.get("tool_calls"):
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        changes.append(("tool_calls", {**rest, "content": message["content"] or ""}))
    return changes


def _with_text(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> list[dict[str, Any]]:
    """Return messages whose parts the template reads; for one that reads text only, the texts of the parts in one.

    Raises:
        UserError: A part is no text, or the template writes the text neither of the parts nor of the whole.
    """
    if not any(isinstance(message["content"], list) for message in messages):
        return messages
    joined = [{**message, "content": _joined(message["content"], message["role"], name)} for message in messages]
    plain = all(_is_plain(part) for message in messages for part in _parts(message))
    try:
        read = plain and _writes_parts(messages, tokenizer, name)
    except UserError:  # a template that takes text only
        read = False
    if read:
        return messages
    written = _written(joined, tokenizer, name)
    for before, message in zip(messages, joined, strict=True):
        if isinstance(before["content"], list) and message["content"].strip() not in written:
            raise UserError(
                f"{name}: the chat template of the tokenizer does not write the text of a message of role "
                f"{message['role']!r}, as parts or as one text; change the message, or give plain text"
            )
    return joined


def _writes_parts(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> bool:
    """Tell whether a template writes the text of each part once, in order, and does not write out a list as it is.

    Texts that nothing else holds stand for those of the parts, and a key that no template reads for all else of a list.
    """
    marks: list[str] = []
    marked = []
    for message in messages:
        parts = []
        for part in _parts(message):
            marks.append(f"{SENTINEL}{len(marks)}.")
            parts.append({**part, "text": marks[-1], UNREAD: ""})
        marked.append({**message, "content": parts} if parts else message)
    written = _written(marked, tokenizer, name)
    places = [written.find(mark) for mark in marks]
    return UNREAD not in written and -1 not in places and places == sorted(places)


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _is_plain(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _joined(content: Any, role: str, name: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(
                f"{name}: a message of role {role!r} has a content part of type {kind!r}; only text is recorded"
            )
        texts.append(text)
    return "".join(texts)


def _written(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    return str(_apply(messages, tokenizer, name, tokenize=False))


def _apply(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str, **how: Any) -> Any:
    """Apply the chat template.

    Raises:
        UserError: It refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise UserError(
            f"{name}: the chat template of the tokenizer refuses it (roles {roles}: {brief(error, 160)}); "
            "change the messages, or give plain text"
        ) from error
