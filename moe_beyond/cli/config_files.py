"""Configuration files, read without trusting them; errors name the file."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, get_loader, set_loader  # type: ignore[attr-defined]
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from moe_beyond.cli.builtin_configs import find_config
from moe_beyond.cli.library_errors import as_user_error
from moe_beyond.cli.parser import CommandParser, option_strings, parser_error_message
from moe_beyond.errors import UserError, unknown
from moe_beyond.json_fields import brief

MAX_VALUES = 100_000
"""Maximum number of values in a YAML text after its aliases are expanded; nested aliases can stand for billions."""
MAX_DEPTH = 100
"""Maximum nesting of values; a depth of a thousand can overflow the stack."""
ALLOWED_BASES = (
    *(L.LightningModule, L.LightningDataModule, L.Callback, Logger, Profiler, Strategy, Accelerator, Precision),
    *(CheckpointIO, ClusterEnvironment, LayerSync),
)
"""Base classes of the classes that a configuration may name."""
GROUPS = "model", "data", "trainer"
"""Options that contain other options; none of them can be null."""
LOAD = get_loader("yaml")  # reads 1e-3 as a number, which plain YAML does not


def guard_yaml() -> None:
    """Make jsonargparse read YAML with `read_yaml`."""
    set_loader("yaml", read_yaml, exceptions=(yaml.YAMLError,), json_superset=True)


def read_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does.

    Args:
        text: Content of a YAML file.

    Raises:
        UserError: The content is too large or too deep, or names a class that a configuration may not name.
    """
    _check_size(text)
    content = LOAD(text)
    for name in _class_paths(content):
        _check_class(name)
    return content


def _check_size(text: str) -> None:
    """Refuse endlessly nested brackets and nested aliases before anything is built from them."""
    sizes: dict[str, float] = {}  # by anchor, with its aliases expanded; infinite while it is still open
    opened: list[tuple[str | None, float]] = [(None, 0)]
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
            if anchor is not None:
                sizes[anchor] = math.inf
            if len(opened) > MAX_DEPTH:
                raise UserError(f"nests values more than {MAX_DEPTH} deep; flatten them")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        else:
            size = sizes.get(str(anchor), 1) if isinstance(event, yaml.AliasEvent) else 1
        if anchor is not None:
            sizes[anchor] = size
        opened[-1] = opened[-1][0], opened[-1][1] + size
    if opened[0][1] > MAX_VALUES:
        raise UserError(f"aliases stand for more than {MAX_VALUES:,} values; write fewer")


def _class_paths(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(name := content.get("class_path"), str):
            yield name
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from _class_paths(part)


def _check_class(path: str) -> None:
    """Refuse an import path unless it names a subclass of `ALLOWED_BASES`; jsonargparse resolves bare names.

    `LambdaCallback` calls any function, so it would let a configuration run any command.
    """
    module, _, name = path.rpartition(".")
    try:
        named_class = getattr(importlib.import_module(module), name, None) if module else None
    except (ImportError, ValueError) as error:
        raise UserError(f"class_path {path}: cannot be imported ({brief(error)})") from error
    wrong = module and not (isinstance(named_class, type) and issubclass(named_class, ALLOWED_BASES))
    if wrong or name == LambdaCallback.__name__:
        raise UserError(f"class_path {path}: is not a class that a configuration may name")


class ConfigFile(ActionConfigFile):
    """``-c FILE``; errors begin with the file's name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file, or the built-in configuration of that name, into ``cfg``."""
        if not values.strip():
            raise UserError("-c: the name of the file is empty; name a configuration file in YAML")
        try:
            is_yaml = any(mark in values for mark in ":{\n") and not Path(values).is_file()
            source = values if is_yaml else str(find_config(values))
            content = read_yaml(source if is_yaml else Path(source).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise UserError("is not a mapping of options to values")
            _check_names(parser, content)
            with as_user_error(constructing=True):
                self.apply_config(parser, cfg, self.dest, source)
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            line = "" if mark is None else f", line {mark.line + 1}"
            raise UserError(f"{values}{line}: is not YAML ({brief(problem or error)})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{values}: is not text in UTF-8") from error
        except (TypeError, KeyError) as error:
            message = parser_error_message(parser, str(error), error)
            raise UserError(f"{values}: {message.removeprefix('--')}") from error
        except UserError as error:
            raise UserError(f"{values}: {str(error).removeprefix('--')}") from error


def _check_names(parser: CommandParser, content: dict[str, Any]) -> None:
    """Refuse an unknown option or a group of options that is null; errors of jsonargparse would not name the file."""
    for name in GROUPS:
        if name in content and content[name] is None:
            raise UserError(f"{name}: is null; give its settings, or remove it from the file")
    options = {option.removeprefix("--") for option in option_strings(parser)}
    groups = {name.partition(".")[0] for name in options}
    trainer = content.get("trainer")
    names = [str(name) for name in content]
    names += [f"trainer.{name}" for name in trainer] if isinstance(trainer, dict) else []
    for name in names:
        if name not in options | groups:
            raise unknown("option", name, options | groups)
