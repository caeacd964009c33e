"""Tokenizing prompts: plain text with the tokenizer, chats with the model's own template."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_beyond.collect.config import CollectConfig, TokenizedPrompt
from moe_beyond.collect.prompts import Prompt
from moe_beyond.errors import UserError
from moe_beyond.safe_text import brief, shown
from moe_beyond.traces.splits import held_out_numbers, parse_blocks, without_copies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_ROLES = ("user", "assistant")
"""Roles that every chat template writes."""
SENTINEL = "\N{REPLACEMENT CHARACTER}?"
"""Message content that shows whether a template writes the contents of a role."""
UNREAD = "key_that_no_template_reads"
"""Key of a content part that shows whether a template writes a list unchanged."""


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    model_config: Any,
    config: CollectConfig,
    source: str,
) -> list[TokenizedPrompt]:
    """Tokenize and truncate prompts, and assign their splits; every mistake in prompts is found here.

    Args:
        prompts: Prompts of the model.
        tokenizer: Tokenizer of the model.
        model_config: Configuration of the model, for its number of positions.
        config: Settings of the collection.
        source: File or data set of the prompts, for error messages.

    Raises:
        UserError: There are no prompts, one is empty, too long or unsupported by the template, two have one name, or
            both the prompts and the settings choose splits.
    """
    if not prompts:
        raise UserError(f"{source}: has no prompts; give a file or data set with at least one")
    name, count = Counter(prompt.sequence_id for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source}: {count} prompts have the id {shown(name)}; give every prompt its own id, or none")
    rows = [(prompt, _truncate(prompt, token_ids_of(prompt, tokenizer), model_config, config)) for prompt in prompts]
    return _hold_out(rows, config, source)


def _hold_out(rows: list[TokenizedPrompt], config: CollectConfig, source: str) -> list[TokenizedPrompt]:
    """Move blocks of consecutive prompts to the splits of the settings; copies of other prompts stay.

    Raises:
        UserError: The prompts have splits already, or a split would be empty.
    """
    given = next((prompt.split for prompt, _ in rows if prompt.split != "train"), None)
    texts = {number: tuple(ids) for number, (_, ids) in enumerate(rows)}
    splits: dict[int, str] = {}
    for split, (option, blocks) in config.blocks().items():
        if given is not None:
            raise UserError(f"{option}: the prompts of {source} have splits (got {shown(given)}); leave {option} out")
        lengths = {number: len(ids) for number, ids in texts.items()}
        held_out = without_copies(held_out_numbers(lengths, *parse_blocks(blocks), option), texts, option)
        splits |= dict.fromkeys(held_out, split)
        texts = {number: ids for number, ids in texts.items() if number not in held_out}
    return [(replace(prompt, split=splits.get(number, prompt.split)), ids) for number, (prompt, ids) in enumerate(rows)]


def token_ids_of(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize a prompt; a chat is written by the model's own template, up to the start of the answer.

    Args:
        prompt: Prompt of the model.
        tokenizer: Tokenizer of the model.

    Raises:
        UserError: The prompt is empty or no text, the tokenizer has no template, or the template refuses or ignores a
            message.
    """
    if isinstance(prompt.text, str):
        ids = list(tokenizer(prompt.text).input_ids) if prompt.text.strip() else []
    elif not isinstance(prompt.text, Sequence):
        raise UserError(f"{prompt.sequence_id}: must be text or a list of messages (got {type(prompt.text).__name__})")
    elif tokenizer.chat_template is None:
        raise UserError(
            f"{prompt.sequence_id}: is a chat, and the tokenizer has no chat template; give plain text, or the "
            "instruction-tuned model"
        )
    else:
        ids = _chat_ids(prompt, tokenizer)
    if not ids:
        raise UserError(f"{prompt.sequence_id}: is empty; give a prompt of at least one token")
    return ids


def _truncate(prompt: Prompt, token_ids: list[int], model_config: Any, config: CollectConfig) -> list[int]:
    """Truncate a prompt to ``max_tokens``.

    Raises:
        UserError: The truncated prompt and the tokens to generate exceed the model's positions.
    """
    token_ids = token_ids[: config.max_tokens]
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(token_ids) + config.generate > positions:
        fits = positions > config.generate
        advice = "truncate it (--max-tokens N)" if fits else f"generate fewer than {positions:,} tokens"
        extra = f" and {config.generate} to generate" if config.generate else ""
        raise UserError(
            f"{prompt.sequence_id}: exceeds the {positions:,} positions of the model (got {len(token_ids):,} "
            f"tokens{extra}); {advice}"
        )
    return token_ids


def _chat_ids(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Write a chat with the template, and tokenize it.

    Raises:
        UserError: The template refuses the chat, or ignores a part of a message.
    """
    name = prompt.sequence_id
    chat = [dict(message) for message in prompt.text if isinstance(message, Mapping)]
    if not chat or len(chat) < len(prompt.text) or not all({"role", "content"} <= m.keys() for m in chat):
        raise UserError(f"{name}: is not a chat; give a list of messages, each with role and content")
    messages = _readable(chat, tokenizer, name)
    text = _rendered(messages, tokenizer, name)
    for place, message in enumerate(messages):
        for part, variant in _variants(message):
            changed = [*messages[:place], variant, *messages[place + 1 :]]
            if _rendered(changed, tokenizer, name) == text:
                raise UserError(
                    f"{name}: the chat template of the tokenizer ignores {part} of a message of role "
                    f"{message['role']!r}; omit it, or give a model whose template writes it"
                )
    answered = messages[-1]["role"] == "assistant"
    ids = _apply(messages, tokenizer, name, add_generation_prompt=not answered, tokenize=True, return_dict=False)
    return list(itertools.chain(ids))


def _variants(message: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the parts of a message that a template might ignore, each with a message that differs in it."""
    variants = []
    if message["role"] not in PLAIN_ROLES and message["content"]:
        variants.append(("the content", {**message, "content": SENTINEL}))
    if message.get("tool_calls"):
        others = {key: value for key, value in message.items() if key != "tool_calls"}
        variants.append(("tool_calls", {**others, "content": message["content"] or ""}))
    return variants


def _readable(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> list[dict[str, Any]]:
    """Return messages that the template reads: with content parts, or with their texts joined if it reads only text.

    Raises:
        UserError: A part is no text, or the template writes neither the parts nor the joined text.
    """
    if not any(isinstance(message["content"], list) for message in messages):
        return messages
    joined = [{**message, "content": _joined(message["content"], message["role"], name)} for message in messages]
    plain = all(_is_plain(part) for message in messages for part in _parts(message))
    try:
        reads_parts = plain and _writes_parts(messages, tokenizer, name)
    except UserError:  # the template reads only text
        reads_parts = False
    if reads_parts:
        return messages
    text = _rendered(joined, tokenizer, name)
    for original, message in zip(messages, joined, strict=True):
        if isinstance(original["content"], list) and message["content"].strip() not in text:
            raise UserError(
                f"{name}: the chat template of the tokenizer does not write the text of a message of role "
                f"{message['role']!r}, as parts or as one text; change the message, or give plain text"
            )
    return joined


def _writes_parts(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> bool:
    """Return whether a template writes the text of each part once, in order, and no list unchanged.

    The check replaces the texts by unique marks, and adds a key that no template reads to each part.
    """
    marks: list[str] = []
    marked = []
    for message in messages:
        parts = []
        for part in _parts(message):
            marks.append(f"{SENTINEL}{len(marks)}.")
            parts.append({**part, "text": marks[-1], UNREAD: ""})
        marked.append({**message, "content": parts} if parts else message)
    text = _rendered(marked, tokenizer, name)
    places = [text.find(mark) for mark in marks]
    return UNREAD not in text and -1 not in places and places == sorted(places)


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
                f"{name}: a content part of a message of role {role!r} must be text (got type {kind!r}); remove it"
            )
        texts.append(text)
    return "".join(texts)


def _rendered(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    return str(_apply(messages, tokenizer, name, tokenize=False))


def _apply(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str, **options: Any) -> Any:
    """Apply the chat template.

    Raises:
        UserError: The template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
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
            f"{name}: the chat template of the tokenizer refuses the chat (roles {roles}: {brief(error, 160)}); "
            "change the messages, or give plain text"
        ) from error
