"""The devices of this machine, and models that are spread over several of them, host memory and disk."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from moe_beyond.errors import UserError
from moe_beyond.files import read_json

AUTO = "auto"


def devices() -> list[str]:
    """List the devices of this machine, accelerators first."""
    return [*(f"{_accelerator()}:{number}" for number in range(_count())), "cpu"]


def placement(named: str | None) -> str | dict[str, Any]:
    """Read ``--device``: what transformers calls a ``device_map``.

    Args:
        named: A device; ``auto``, to spread the model over all devices, host memory and disk; or a JSON file with a
            device map, module name to device. By default the accelerator of this rank, or else the CPU.

    Returns:
        The name of one device, ``auto``, or the device map.

    Raises:
        UserError: There is no such device here, or accelerate, which spreads models, is not installed.
    """
    here = devices()
    if named is None or (named and named == _accelerator()):
        return here[int(os.environ.get("LOCAL_RANK", 0)) % _count() if _count() else 0]
    known = ", ".join([*here, AUTO])
    if named == AUTO:
        _check_accelerate(named)
        return AUTO
    if named.endswith(".json"):
        places = read_json(named)
        if not isinstance(places, dict) or not all(isinstance(place, str | int) for place in places.values()):
            raise UserError(f'--device {named}: is not a device map; write {{"MODULE": "cpu", "MODULE": "disk", ...}}')
        for module, place in places.items():
            if place not in (*here, *range(_count()), _accelerator(), "disk"):
                raise UserError(f"--device {named}: {module} goes to {place!r}; choose one of: {', '.join(here)}, disk")
        _check_accelerate(named)
        return places
    if named not in here:
        without = "" if _count() else " (this PyTorch sees no GPU)"
        raise UserError(f"--device {named}: there is no such device here{without}; choose one of: {known}")
    return named


def _check_accelerate(named: str) -> None:
    if find_spec("accelerate") is None:
        raise UserError(
            f"--device {named}: wants accelerate, which is not installed; run: pip install 'moe-beyond[offload]', or "
            f"choose one of: {', '.join(devices())}"
        )


def _accelerator() -> str:
    """Return what PyTorch calls the accelerators here (``cuda``, ``mps``, ...), or ``""``."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "" if kind is None else kind.type


def _count() -> int:
    return torch.accelerator.device_count() if _accelerator() else 0


def describe(model: nn.Module) -> str:
    """Say where a model is computed: ``cuda:0 (NVIDIA H200)``, ``cpu``, ``cuda:0, cpu and disk``."""
    places = getattr(model, "hf_device_map", None)
    names = [str(place) for place in (places.values() if places else [input_device(model)])]
    names = [f"{_accelerator()}:{name}" if name.isdigit() else name for name in dict.fromkeys(names)]
    return ", ".join(
        f"{name} ({torch.cuda.get_device_name(name)})" if name.startswith("cuda") else name for name in names
    )


def input_device(model: Any) -> torch.device:
    """Return the device that token ids go to: where the input embedding is computed, wherever its weight waits."""
    embedding = _input_embedding(model)
    for module in (embedding, model):
        hook = getattr(module, "_hf_hook", None)  # accelerate's, or several of it
        for part in (hook, *getattr(hook, "hooks", ())):
            place = getattr(part, "execution_device", None)
            if place is not None and torch.device(place).type != "meta":
                return torch.device(place)
    weight = getattr(embedding, "weight", None)
    weights = [weight, *model.parameters()] if isinstance(weight, torch.Tensor) else [*model.parameters()]
    return next((tensor.device for tensor in weights if not tensor.is_meta), torch.device("cpu"))


def embedding_rows(model: Any) -> int:
    """Return how many token ids a model can read; 0 if it does not say."""
    embedding = _input_embedding(model)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return int(weight.shape[0])
    if isinstance(rows := getattr(embedding, "num_embeddings", None), int):
        return rows
    config = getattr(model, "config", None)
    size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    return size if isinstance(size, int) else 0


def _input_embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # how transformers says that there is none
        return None
