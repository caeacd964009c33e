"""Predictor folders: ``model.safetensors``, ``config.json`` and a card. No other file is loaded."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from moe_beyond.errors import UserError
from moe_beyond.files import file_in, is_earlier_result, read_json, replacing_folder, sealed, write_json
from moe_beyond.predictor_config import FORMAT_VERSION, check_config
from moe_beyond.predictors.base import Predictor
from moe_beyond.predictors.calibration import Calibration
from moe_beyond.predictors.io.card import card
from moe_beyond.predictors.io.weights import build
from moe_beyond.predictors.registry import ARCHITECTURES
from moe_beyond.pretrained import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from moe_beyond.safe_text import brief, shown
from moe_beyond.safetensors_header import parse_header
from moe_beyond.traces.manifest import NO_TOKEN_IDS, Manifest
from moe_beyond.traces.reader import TraceSet
from moe_beyond.unfinished import read_whole
from moe_beyond.version import __version__


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
        UserError: The folder exists and is not a predictor folder, or a field of the record cannot be read again.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_predictor(folder))):
        raise UserError(f"{folder} exists and is not a predictor folder, or holds other files too; choose another")
    weights = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else _narrowest(tensor)).contiguous()
        for name, tensor in predictor.state_dict().items()
    }
    config = {
        "format_version": FORMAT_VERSION,
        "architecture": predictor.architecture,
        "package": ARCHITECTURES.package(predictor.architecture),
        "arguments": predictor.arguments(),
        "geometry": predictor.geometry.to_json(),
        "vocab_size": predictor.vocab_size,
        **_description(predictor),
        "calibration": None if predictor.calibration is None else predictor.calibration.to_json(),
        "training": training,
        "tool_version": __version__,
    }
    with replacing_folder(folder, overwrite=True) as temporary:
        save_file(weights, temporary / WEIGHTS_FILE)
        config["sha256"] = hashlib.sha256((temporary / WEIGHTS_FILE).read_bytes()).hexdigest()
        check_config(config, f"{folder / CONFIG_FILE}")
        write_json(temporary / CONFIG_FILE, sealed(config))
        (temporary / CARD_FILE).write_text(card(predictor, config), encoding="utf-8")


def _description(predictor: Predictor) -> dict[str, Any]:
    """Return the fields that follow from the architecture, its arguments and its weights."""
    information = predictor.information
    return {
        "lookaheads": list(information.lookaheads),
        "causal": information.causal,
        "hidden_states": list(information.hidden_states),
        "activation": predictor.activation,
        "parameters": sum(each.numel() for each in predictor.state_dict().values() if each.is_floating_point()),
    }


def _narrowest(numbers: torch.Tensor) -> torch.dtype:
    """Return the smallest integer type that holds the numbers: vocabulary tables are a large part of a small folder."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        bounds = torch.iinfo(dtype)
        if numbers.numel() == 0 or (bounds.min <= int(numbers.min()) and int(numbers.max()) <= bounds.max):
            return dtype
    return numbers.dtype


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration of a predictor folder.

    Args:
        folder: Path of the predictor folder.

    Raises:
        UserError: The folder is not a predictor folder of this format, or a field is missing or wrong.
    """
    if not (Path(folder) / CONFIG_FILE).exists():
        raise UserError(f"{folder}: is not a predictor folder (it has no {CONFIG_FILE})")
    path = file_in(folder, CONFIG_FILE)
    return check_config(read_json(path), str(path))


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
            package, its configuration contradicts itself, or its weights are damaged or do not match it.
    """
    folder = Path(folder)
    return read_whole(folder, lambda: _read_predictor(folder))


def _read_predictor(folder: Path) -> Predictor:
    config, source = read_config(folder), f"{folder / CONFIG_FILE}"
    path = file_in(folder, WEIGHTS_FILE)
    if not path.exists():
        raise UserError(f"{path}: not found")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != config["sha256"]:
        raise UserError(f"{path}: is damaged (its sha256 is not the one in {CONFIG_FILE})")
    parse_header(io.BytesIO(content), len(content), path)
    try:
        weights = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is not a safetensors file ({brief(error)})") from error
    predictor = build(config, weights, source, str(path))
    for name, expected in _description(predictor).items():
        if config[name] != expected:
            raise UserError(
                f"{source}: {name} contradicts the architecture and its arguments (got {shown(config[name])}, not "
                f"{shown(expected)}); save the predictor again"
            )
    if (calibration := config["calibration"]) is not None:
        shape = len(predictor.information.lookaheads), predictor.geometry.num_layers
        predictor.calibration = Calibration.from_json(calibration, shape, source)
    predictor.fitted_on = config["training"]
    return predictor


def check_states(predictor: Predictor, manifest: Manifest, traces: str) -> None:
    """Check that a trace set has the hidden states that a predictor reads, if it reads any.

    Args:
        predictor: Predictor to check.
        manifest: Manifest of the trace set.
        traces: Path of the trace set, for error messages.

    Raises:
        UserError: The states are missing, those of some layers are missing, or they have another width.
    """
    if not predictor.information.hidden_states:
        return
    if manifest.states is None:
        raise UserError(
            f"{traces}: has no hidden states, which {predictor.architecture} requires; collect with --record "
            "experts,gate_weights,hidden_states"
        )
    if manifest.states.layers != manifest.geometry.moe_layers:
        raise UserError(
            f"{traces}: has hidden states of {len(manifest.states.layers)} of {manifest.geometry.num_layers} MoE "
            f"layers, and {predictor.architecture} reads those of all; collect with --state-layers all"
        )
    widths = manifest.hidden_size, manifest.states.projected_from
    if widths[1] is not None and predictor.projected_from is None:
        raise UserError(
            f"{traces}: its hidden states are projected from {widths[1]} to {widths[0]} values, and this "
            f"{predictor.architecture} reads those of the model; collect without --state-width"
        )
    read = predictor.hidden_size, predictor.projected_from
    if widths not in (read, (predictor.projected_from, None)):
        raise UserError(
            f"{traces}: its hidden states have width {_width(*widths)}, "
            f"but the predictor was fitted for {_width(*read)}"
        )


def _width(width: int | None, projected_from: int | None) -> str:
    return str(width) if projected_from is None else f"{width} (projected from {projected_from})"


def check_projection(predictor: Predictor, traces: TraceSet) -> None:
    """Check that a trace set's hidden states have the projection of the predictor, if they are projected.

    Args:
        predictor: Fitted predictor, which fits the manifest of the trace set.
        traces: Trace set to read.

    Raises:
        UserError: The projections differ, or the file of the projection is damaged.
    """
    for kind in predictor.information.hidden_states if traces.projection is not None else ():
        own = predictor.projection_of(kind)
        if own is not None and not own.equals(getattr(traces.projection, kind)):
            raise UserError(
                f"{traces.folder}: its hidden states have another projection than those of the predictor's training "
                "text; collect both sets from the same model"
            )


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
    check_states(predictor, manifest, traces)
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
