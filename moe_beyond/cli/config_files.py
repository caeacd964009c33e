"""Configuration files: read without trusting them, and named where something in them is wrong."""

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

from moe_beyond.cli.slips import OneLineErrors, one_line, option_strings, parsing_slip
from moe_beyond.errors import UserError, unknown
from moe_beyond.fields import brief

MOST_VALUES = 100_000
"""Values in a YAML text after its aliases are expanded; aliases of aliases can stand for billions."""
DEEPEST = 100
"""Values inside values; a thousand can overflow the stack."""
NAMED = (
    *(L.LightningModule, L.LightningDataModule, L.Callback, Logger, Profiler, Strategy, Accelerator, Precision),
    *(CheckpointIO, ClusterEnvironment, LayerSync),
)
"""Bases of the classes that a configuration may name."""
GROUPS = "model", "data", "trainer"
"""Options that hold other options; none of them can be null."""
LOAD = get_loader("yaml")  # it reads 1e-3 as a number, which plain YAML does not


def guard_yaml() -> None:
    """Let jsonargparse read YAML by `read_yaml`."""
    set_loader("yaml", read_yaml, exceptions=(yaml.YAMLError,), json_superset=True)


def read_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, unless it grows too large or names what a configuration may not name.

    Raises:
        UserError: It does.
    """
    _check_size(text)
    content = LOAD(text)
    for name in _class_paths(content):
        _check_class(name)
    return content


def _check_size(text: str) -> None:
    """Refuse brackets inside brackets without end, and aliases of aliases, before anything is built from them."""
    sizes: dict[str, float] = {}  # by anchor, with its aliases expanded; endless while it is still open
    opened: list[tuple[str | None, float]] = [(None, 0)]
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
            if anchor is not None:
                sizes[anchor] = math.inf
            if len(opened) > DEEPEST:
                raise UserError(f"holds values inside values, more than {DEEPEST} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        else:
            size = sizes.get(str(anchor), 1) if isinstance(event, yaml.AliasEvent) else 1
        if anchor is not None:
            sizes[anchor] = size
        opened[-1] = opened[-1][0], opened[-1][1] + size
    if opened[0][1] > MOST_VALUES:
        raise UserError(f"its aliases stand for more than {MOST_VALUES:,} values; write fewer")


def _class_paths(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(name := content.get("class_path"), str):
            yield name
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from _class_paths(part)


def _check_class(path: str) -> None:
    """Refuse an import path unless it is that of a class in `NAMED`; jsonargparse resolves bare names.

    `LambdaCallback`, which calls any function that it is given, would let a configuration run any command.
    """
    module, _, name = path.rpartition(".")
    try:
        named = getattr(importlib.import_module(module), name, None) if module else None
    except (ImportError, ValueError) as error:
        raise UserError(f"class_path {path}: cannot be imported ({brief(error)})") from error
    wrong = module and not (isinstance(named, type) and issubclass(named, NAMED))
    if wrong or name == LambdaCallback.__name__:
        raise UserError(f"class_path {path}: is none of the classes that a configuration may name")


class ConfigFile(ActionConfigFile):
    """``-c FILE``, with the file in front of whatever is wrong in it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take in the file."""
        if not values.strip():
            raise UserError("-c: the name of the file is empty; name a configuration file in YAML")
        path = Path(values)
        try:
            if not path.is_file() and not any(mark in values for mark in ":{\n"):  # else it is YAML itself
                raise UserError("not found" if not path.is_dir() else "is a folder; name a file")
            content = read_yaml(path.read_text(encoding="utf-8") if path.is_file() else values)
            if not isinstance(content, dict):
                raise UserError("is not a mapping of options to values")
            _check_names(parser, content)
            with one_line(constructing=True):
                self.apply_config(parser, cfg, self.dest, values)
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            line = "" if mark is None else f", line {mark.line + 1}"
            raise UserError(f"{values}{line}: is not YAML ({brief(problem or error)})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{values}: is not text in UTF-8") from error
        except (TypeError, KeyError) as error:
            slip = parsing_slip(parser, str(error), error)
            raise UserError(f"{values}: {slip.removeprefix('--')}") from error
        except UserError as error:
            raise UserError(f"{values}: {str(error).removeprefix('--')}") from error


def _check_names(parser: OneLineErrors, content: dict[str, Any]) -> None:
    """Refuse an unknown option, and a group of options that is null: later, jsonargparse no longer knows the file."""
    for name in GROUPS:
        if name in content and content[name] is None:
            raise UserError(f"{name}: is null; give its settings, or leave {name} out of the file")
    options = {word.removeprefix("--") for word in option_strings(parser)}
    groups = {name.partition(".")[0] for name in options}
    trainer = content.get("trainer")
    names = [str(name) for name in content]
    names += [f"trainer.{name}" for name in trainer] if isinstance(trainer, dict) else []
    for name in names:
        if name not in options | groups:
            raise unknown("option", name, options | groups)
