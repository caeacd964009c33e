"""Predictor folders: ``model.safetensors``, ``config.json`` and a card. No other file is loaded."""

import hashlib
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_beyond.errors import UserError
from moe_beyond.files import is_earlier_result, read_json, replacing_folder, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.io.card import card
from moe_beyond.predictors.registry import ARCHITECTURES, PACKAGE, create
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest
from moe_beyond.unfinished import read_whole
from moe_beyond.version import __version__

FORMAT_VERSION = 1


def save_predictor(
    predictor: Predictor, folder: str | Path, training: dict[str, Any], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a predictor folder; an existing predictor folder is replaced.

    Args:
        predictor: Fitted predictor to write.
        folder: Folder to write.
        training: Training record as JSON-serialisable values: ``fingerprint``, ``split``, ``model_id``, ``tokenizer``,
            and so on.
        dtype: Data type of stored floating-point weights (default: float32); float16 halves the folder.

    Raises:
        UserError: The folder exists and is not a predictor folder.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_predictor(folder))):
        raise UserError(f"{folder} exists and is not a predictor folder, or holds other files too; choose another")
    weights = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else _narrowest(tensor)).contiguous()
        for name, tensor in predictor.state_dict().items()
    }
    information = predictor.information
    config = {
        "format_version": FORMAT_VERSION,
        "architecture": predictor.architecture,
        "package": ARCHITECTURES.package(predictor.architecture),
        "arguments": predictor.arguments(),
        "geometry": predictor.geometry.to_json(),
        "vocab_size": predictor.vocab_size,
        "lookaheads": list(information.lookaheads),
        "available_after": information.available_after,
        "causal": information.causal,
        "hidden_states": information.hidden_states,
        "activation": predictor.activation,
        "parameters": sum(weight.numel() for weight in weights.values() if weight.is_floating_point()),
        "calibration": None if predictor.calibration is None else predictor.calibration.to_json(),
        "training": training,
        "tool_version": __version__,
    }
    with replacing_folder(folder, overwrite=True) as temporary:
        save_file(weights, temporary / WEIGHTS_FILE)
        config["sha256"] = hashlib.sha256((temporary / WEIGHTS_FILE).read_bytes()).hexdigest()
        write_json(temporary / CONFIG_FILE, config)
        summary = next(iter((type(predictor).__doc__ or "").splitlines()), "")
        (temporary / CARD_FILE).write_text(card(summary, config), encoding="utf-8")


def _narrowest(numbers: torch.Tensor) -> torch.dtype:
    """Return the smallest integer type that holds the numbers: vocabulary tables are a large part of a small folder."""
    for dtype in (torch.int16, torch.int32):
        bounds = torch.iinfo(dtype)
        if numbers.numel() == 0 or (bounds.min <= int(numbers.min()) and int(numbers.max()) <= bounds.max):
            return dtype
    return numbers.dtype


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration of a predictor folder.

    Args:
        folder: Path of the predictor folder.

    Raises:
        UserError: The folder is not a predictor folder of this format.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{folder}: is not a predictor folder (it has no {CONFIG_FILE})")
    config = read_json(path)
    if not isinstance(config, dict) or "architecture" not in config or "format_version" not in config:
        raise UserError(f"{path}: is not the configuration of a predictor")
    if config["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {config['format_version']!r}; this package reads {FORMAT_VERSION}")
    return config


def _is_predictor(folder: Path) -> bool:
    try:
        read_config(folder)
    except UserError:
        return False
    return is_earlier_result(folder, CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)


def read_predictor(folder: str | Path) -> Predictor:
    """Read a predictor folder, which other processes may replace meanwhile.

    Args:
        folder: Path of the predictor folder.

    Returns:
        The predictor in evaluation mode, on the CPU.

    Raises:
        UserError: The folder is not a predictor folder, its architecture is not registered or belongs to another
            package, or its weights are damaged or do not match its configuration.
    """
    folder = Path(folder)
    return read_whole(folder, lambda: _read_predictor(folder))


def _read_predictor(folder: Path) -> Predictor:
    config = read_config(folder)
    source = f"{folder / CONFIG_FILE}"
    try:
        geometry, vocab_size = Geometry.from_json(config["geometry"], source=source), int(config["vocab_size"])
        arguments, sha256 = dict(config["arguments"]), config["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: a field is missing or wrong ({error})") from error
    package = str(config.get("package", PACKAGE))
    predictor = create(config["architecture"], geometry, vocab_size, source=source, package=package, **arguments)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise UserError(f"{path}: not found")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path}: is damaged (its sha256 is not the one in {CONFIG_FILE})")
    try:
        load_weights(predictor, load_file(path), str(path))
    except SafetensorError as error:
        raise UserError(f"{path}: is not a safetensors file ({error})") from error
    if (calibration := config.get("calibration")) is not None:
        shape = len(predictor.information.lookaheads), geometry.num_layers
        predictor.calibration = Calibration.from_json(calibration, shape, source)
    training = config.get("training")
    predictor.fitted_on = training if isinstance(training, dict) else None
    return predictor.eval()


def load_weights(predictor: Predictor, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load weights into a predictor; keys and shapes must match exactly.

    Args:
        predictor: Predictor to change.
        weights: Tensor of each state-dict key.
        source: Path of the file, for error messages.

    Raises:
        UserError: A key is missing or unknown, or a shape differs.
    """
    try:
        predictor.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 240)
        raise UserError(f"{source}: the weights do not match a {predictor.architecture} ({reason})") from error


def check_fits(predictor: Predictor, manifest: Manifest, traces: str, tokenizer_sha256: str | None = None) -> None:
    """Check that a predictor can score a trace set: the same model shape and tokenizer, and all data that it reads.

    Args:
        predictor: Predictor to check.
        manifest: Manifest of the trace set.
        traces: Path of the trace set, for error messages.
        tokenizer_sha256: Hash of the tokenizer that the predictor was fitted with; None if it is not recorded.

    Raises:
        UserError: The predictor cannot score the trace set.
    """
    if predictor.geometry.shape() != manifest.geometry.shape():
        raise UserError(
            f"{traces}: has {manifest.geometry.describe_shape()}, "
            f"but the predictor was fitted for {predictor.geometry.describe_shape()}"
        )
    if not manifest.has_token_ids and predictor.information.token_ids:
        raise UserError(
            f"{traces}: has no token ids, which {predictor.architecture} requires; use popularity, history or eamc"
        )
    if predictor.information.hidden_states and manifest.hidden_size is None:
        raise UserError(
            f"{traces}: has no hidden states, which {predictor.architecture} requires; collect with --record "
            "experts,gate_weights,hidden_states"
        )
    if predictor.information.hidden_states and predictor.hidden_size != manifest.hidden_size:
        raise UserError(
            f"{traces}: its hidden states have width {manifest.hidden_size}, "
            f"but the predictor was fitted for {predictor.hidden_size}"
        )
    if not predictor.information.token_ids and NO_TOKEN_IDS.vocab_size in (
        predictor.vocab_size,
        manifest.tokenizer.vocab_size,
    ):
        return  # one side has no tokenizer, and neither needs one
    sha256 = manifest.tokenizer.sha256
    same = sha256 is not None and sha256 == tokenizer_sha256  # additional ids are padding and added tokens: unknown
    if predictor.vocab_size != manifest.tokenizer.vocab_size and not same:
        raise UserError(
            f"{traces}: its tokenizer {manifest.tokenizer.name!r} has {manifest.tokenizer.vocab_size} ids, "
            f"but the predictor was fitted with {predictor.vocab_size}"
        )
    if tokenizer_sha256 is not None and sha256 is not None and sha256 != tokenizer_sha256:
        raise UserError(
            f"{traces}: its tokenizer {manifest.tokenizer.name!r} is not the tokenizer of the predictor's training text"
        )
