"""Generating text with a model, one sequence at a time."""

import math
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from moe_beyond.collect.config import MIN_TEMPERATURE
from moe_beyond.collect.devices import input_device
from moe_beyond.collect.forward import batch_seed, default_generation
from moe_beyond.collect.load import Checkpoint
from moe_beyond.collect.prompts import SURROGATE, Prompt
from moe_beyond.collect.tokenize import token_ids_of
from moe_beyond.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Choice of the generated tokens.

    Attributes:
        max_new_tokens: Largest number of tokens per prompt (default: 64).
        temperature: Sampling temperature; 0 chooses the most probable token (default: 0).
        seed: Random seed, with which a collection of single prompts samples the same tokens (default: 0).
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: A number is out of range.
        """
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: must be at least 1 (got {self.max_new_tokens})")
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"--temperature: must be 0 (greedy) or at least {MIN_TEMPERATURE} (got {self.temperature:g})"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed: must be from 0 to 2**63 - 1 (got {self.seed})")


@dataclass(frozen=True)
class Generation:
    """A prompt and the text that follows it.

    Attributes:
        prompt: Text or chat.
        prompt_ids: Token ids of the prompt.
        token_ids: Token ids that the model generated, without the prompt.
        text: Text of the generated tokens.
        logits: Logits of the generated tokens, ``(n, V)``; None if they were not kept.
    """

    prompt: Prompt
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    logits: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the name of the prompt, the numbers of tokens, and the generated text."""
        return {
            "sequence_id": self.prompt.sequence_id,
            "prompt_tokens": len(self.prompt_ids),
            "generated_tokens": len(self.token_ids),
            "text": self.text,
        }


class _Streamer(TextStreamer):
    """Prints generated text word by word.

    Args:
        tokenizer: Tokenizer of the model.
        stream: Destination of the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stream: IO[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text; the last one ends its line."""
        print(text, end="\n" if stream_end else "", file=self._stream, flush=True)


class Conversation:
    """Messages of a user and answers of a model, in one prompt.

    A tokenizer without a chat template gets plain text, one line per message.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._is_chat = tokenizer.chat_template is not None
        self._messages: list[dict[str, str]] = []

    def prompt(self, message: str) -> Prompt:
        """Return the prompt for the answer to a message of the user, which is not added.

        Args:
            message: Text of the user.

        Raises:
            UserError: The message is not text in UTF-8.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        name = f"turn-{len(self._messages) // 2 + 1}"
        if SURROGATE.search(message):
            raise UserError(f"{name}: is not text in UTF-8; write the message in UTF-8")
        if self._is_chat:
            return Prompt(tuple(messages), name, "chat")
        return Prompt("\n".join(each["content"] for each in messages), name, "chat")

    def add(self, message: str, answer: str) -> None:
        """Add a message of the user and the answer of the model."""
        self._messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]


class TextGenerator:
    """Generates the text that follows prompts, and prints it word by word.

    ``generation_config.json`` of the model is ignored except its end tokens, as in a collection.

    Args:
        checkpoint: Files of the model.
        sampling: Choice of the tokens.
        stream: Destination of the text; None prints nothing (default: None).
        keep_logits: Whether logits are kept (default: False).

    Attributes:
        tokenizer: Tokenizer of the model.
    """

    def __init__(
        self, checkpoint: Checkpoint, sampling: Sampling, stream: IO[str] | None = None, *, keep_logits: bool = False
    ) -> None:
        self.tokenizer = checkpoint.tokenizer
        self._positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
        self._sampling, self._stream, self._keep_logits = sampling, stream, keep_logits

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Tokenize a prompt.

        Args:
            prompt: Text or chat.

        Raises:
            UserError: The prompt is empty or too long, or the chat template refuses it.
        """
        ids = token_ids_of(prompt, self.tokenizer)
        new = self._sampling.max_new_tokens
        if self._positions is not None and len(ids) + new > self._positions:
            raise UserError(
                f"{prompt.sequence_id}: exceeds the {self._positions:,} positions of the model (got {len(ids):,} "
                f"tokens and {new:,} to generate); shorten it, or generate fewer tokens (--max-new-tokens)"
            )
        return ids

    def generate(self, model: "PreTrainedModel", prompt: Prompt) -> Generation:
        """Generate the text that follows a prompt.

        Args:
            model: Causal language model, offloaded or not.
            prompt: Text or chat.

        Raises:
            UserError: The prompt is too long, or an expert cannot be read.
        """
        prompt_ids = self.token_ids(prompt)
        ids = torch.tensor([prompt_ids], device=input_device(model))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        decoding: dict[str, Any] = {"do_sample": False}
        if self._sampling.temperature:
            decoding = {"do_sample": True, "temperature": self._sampling.temperature, "top_k": 0, "top_p": 1.0}
        streamer = None if self._stream is None else _Streamer(self.tokenizer, self._stream)
        with torch.random.fork_rng(), default_generation(model):
            torch.manual_seed(batch_seed([(prompt, prompt_ids)], self._sampling.seed))
            output: Any = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._sampling.max_new_tokens,
                pad_token_id=pad, streamer=streamer, return_dict_in_generate=True, output_logits=self._keep_logits,
                **decoding,
            )  # fmt: skip
        generated = output.sequences[0, len(prompt_ids) :].tolist()
        logits = torch.cat(output.logits).cpu() if self._keep_logits else None
        text = str(self.tokenizer.decode(generated, skip_special_tokens=True))
        return Generation(prompt, prompt_ids, generated, text, logits)
