"""Devices of this machine, and device maps that spread a model over several devices, host memory and disk."""

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


def placement(name: str | None) -> str | dict[str, Any]:
    """Read ``--device``; transformers calls the result a ``device_map``.

    Args:
        name: A device; ``auto``, which spreads the model over all devices, host memory and disk; or a JSON file with a
            device map, module name -> device. None is the accelerator of this rank, otherwise the CPU.

    Returns:
        The name of one device, ``auto``, or the device map.

    Raises:
        UserError: This machine has no such device, or accelerate, which spreads models, is not installed.
    """
    names = devices()
    if name is None or (name and name == _accelerator()):
        return names[int(os.environ.get("LOCAL_RANK", 0)) % _count() if _count() else 0]
    if name == AUTO:
        _check_accelerate(name)
        return AUTO
    if name.endswith(".json"):
        device_map = read_json(name)
        if not isinstance(device_map, dict) or not all(isinstance(place, str | int) for place in device_map.values()):
            raise UserError(f'device {name}: is not a device map; write {{"MODULE": "cpu", "MODULE": "disk", ...}}')
        for module, place in device_map.items():
            if place not in (*names, *range(_count()), _accelerator(), "disk"):
                raise UserError(
                    f"device {name}: no such device for {module} (got {place!r}); choose one of: {', '.join(names)}, "
                    "disk"
                )
        _check_accelerate(name)
        return device_map
    if name not in names:
        raise _no_such_device(name, [*names, AUTO])
    return name


def one_device(name: str | None) -> str:
    """Read ``--device`` of a model that is not spread.

    Args:
        name: A device. None is the accelerator of this rank, otherwise the CPU.

    Returns:
        The name of the device.

    Raises:
        UserError: The name is no device, or this machine has no such device.
    """
    names = devices()
    if name == AUTO or (name is not None and name.endswith(".json")):
        raise UserError(
            f"device {name}: an offloaded model has one device; leave it out, or choose one of: {', '.join(names)}"
        )
    if name is not None and name not in (*names, _accelerator() or None):
        raise _no_such_device(name, names)
    place = placement(name)
    assert isinstance(place, str), "neither auto nor a device map"
    return place


def _no_such_device(name: str, choices: list[str]) -> UserError:
    reason = "" if _count() else " (this PyTorch sees no GPU)"
    return UserError(f"device {name}: this machine has no such device{reason}; choose one of: {', '.join(choices)}")


def _check_accelerate(name: str) -> None:
    if find_spec("accelerate") is None:
        raise UserError(
            f"device {name}: needs accelerate, which is not installed; run: pip install 'moe-beyond[offload]', or "
            f"choose one of: {', '.join(devices())}"
        )


def _accelerator() -> str:
    """Return PyTorch's name of the accelerators of this machine (``cuda``, ``mps``, ...), or ``""``."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "" if kind is None else kind.type


def _count() -> int:
    return torch.accelerator.device_count() if _accelerator() else 0


def describe(model: nn.Module) -> str:
    """Describe the devices of a model, such as ``cuda:0 (NVIDIA H200)``, ``cpu`` or ``cuda:0, cpu, disk``.

    Args:
        model: Model whose weights are loaded.
    """
    places = getattr(model, "hf_device_map", None)
    names = [str(place) for place in (places.values() if places else [input_device(model)])]
    names = [f"{_accelerator()}:{name}" if name.isdigit() else name for name in dict.fromkeys(names)]
    return ", ".join(
        f"{name} ({torch.cuda.get_device_name(name)})" if name.startswith("cuda") else name for name in names
    )


def input_device(model: Any) -> torch.device:
    """Return the device for token ids, which computes the input embedding even if its weight is offloaded.

    Args:
        model: Model whose weights are loaded.
    """
    embedding = _input_embedding(model)
    for module in (embedding, model):
        hook = getattr(module, "_hf_hook", None)  # of accelerate; may contain several
        for part in (hook, *getattr(hook, "hooks", ())):
            place = getattr(part, "execution_device", None)
            if place is not None and torch.device(place).type != "meta":
                return torch.device(place)
    weight = getattr(embedding, "weight", None)
    weights = [weight, *model.parameters()] if isinstance(weight, torch.Tensor) else [*model.parameters()]
    return next((tensor.device for tensor in weights if not tensor.is_meta), torch.device("cpu"))


def embedding_rows(model: Any) -> int:
    """Return the number of token ids that a model embeds; 0 if it is unknown.

    Args:
        model: Model whose weights are loaded.
    """
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
    except (AttributeError, NotImplementedError):  # transformers' signal for a model without one
        return None
