"""Loading the model to record, and its tokenizer; safetensors alone."""

from typing import TYPE_CHECKING, Any

from moe_beyond.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "cpu", load_in: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", float | None]:
    """Load a causal language model.

    Args:
        name: A folder, or a name on the Hub.
        revision: Of the model.
        dtype: To compute in; ``"auto"`` as stored.
        device: Where to.
        load_in: ``"8bit"`` or ``"4bit"``, which bitsandbytes does; not tested.

    Returns:
        The model, its tokenizer, and the bits per parameter where they are not those of its dtype.

    Raises:
        UserError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    more: dict[str, Any] = {}
    if load_in is not None:
        from transformers import BitsAndBytesConfig

        told = {f"load_in_{load_in}": True}
        more["quantization_config"] = BitsAndBytesConfig(**told)  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True, **more)
        if load_in is None:
            model = model.to(device)  # type: ignore[arg-type]
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:  # the last of torch without CUDA
        raise UserError(f"--model {name}: cannot be loaded ({' '.join(str(error).split())[:240]})") from error
    return model, tokenizer, None if load_in is None else float(load_in.removesuffix("bit"))
