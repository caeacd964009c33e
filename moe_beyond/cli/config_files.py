"""Configuration files, read without trusting them; errors name the file."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader, set_loader  # type: ignore[attr-defined]

from moe_beyond.cli.allowed_classes import allow_only_known_classes, check_class
from moe_beyond.cli.builtin_configs import find_config
from moe_beyond.cli.library_errors import as_user_error
from moe_beyond.cli.parser import TRUST, CommandParser, option_strings, parser_error_message
from moe_beyond.errors import UserError, unknown
from moe_beyond.safe_text import brief, printable, shown
from moe_beyond.yaml_files import ERRORS, check_size, line_of, read_text, reason_of

GROUPS = "model", "data", "trainer"
"""Options that contain other options; none of them can be null."""
LOAD = get_loader("yaml")  # reads 1e-3 as a number, which plain YAML does not


def guard_configurations(*, trusted: bool) -> None:
    """Bound the YAML that jsonargparse reads, and the classes that it may import, for the whole process.

    Args:
        trusted: Whether any class may be imported.
    """
    set_loader("yaml", read_bounded if trusted else read_yaml, exceptions=ERRORS, json_superset=True)
    if not trusted:
        allow_only_known_classes()


def read_bounded(text: str) -> Any:
    """Read YAML as jsonargparse does.

    Args:
        text: Content of a YAML file, or the value of an option.

    Raises:
        UserError: The content is too large or too deep, or names a pipe.
    """
    check_size(text)
    content = LOAD(text)
    for value in _texts(content):
        if _is_pipe(value):  # jsonargparse would read it as a further configuration, and reading may never end
            raise UserError(f"{shown(value)} is a pipe; name a file")
        with suppress(*ERRORS):  # jsonargparse also tries to read text as YAML
            check_size(value)
    return content


def read_yaml(text: str) -> Any:
    """Read YAML as `read_bounded` does.

    Args:
        text: Content of a YAML file, or the value of an option.

    Raises:
        UserError: The content is too large or too deep, or names a class that a configuration may not name.
    """
    content = read_bounded(text)
    for path in _class_paths(content):
        check_class(path)
    return content


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list | tuple | set):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _texts(part)


def _is_pipe(name: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):  # no such file, or no possible name
        return False


def _class_paths(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if isinstance(name := content.get("class_path"), str):
            yield name
        content = list(content.values())
    if isinstance(content, list | tuple | set):
        for part in content:
            yield from _class_paths(part)


def check_options(argv: Sequence[str]) -> None:
    """Refuse values of options that `read_yaml` refuses, by the name of the option.

    Args:
        argv: The command and its options.

    Raises:
        UserError: A value names a class that a configuration may not name, is too large, or names a pipe.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option.removeprefix("--").partition(".")[0] in GROUPS:
            try:
                get_loader("yaml")(value if equals else following)
            except UserError as error:
                raise UserError(f"{option}: {error}") from error
            except ERRORS:  # not YAML; the parser reports it
                continue


class ConfigFile(ActionConfigFile):
    """``-c FILE``; errors begin with the file's name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file, or the built-in configuration of that name, into ``cfg``."""
        if not values.strip():
            raise UserError("-c: the name of the file is empty; name a configuration file in YAML")
        is_yaml = any(mark in values for mark in ":{\n") and not os.path.exists(values)
        source, location = values, "-c" if is_yaml else printable(values)
        try:
            source = values if is_yaml else str(find_config(values))
            content = get_loader("yaml")(source if is_yaml else read_text(source))
            if not isinstance(content, dict):
                raise UserError("is not a mapping of options to values")
            _check_names(parser, content)
            with as_user_error(constructing=True):
                self.apply_config(parser, cfg, self.dest, source)
        except yaml.YAMLError as error:
            raise UserError(f"{location}{line_of(error)}: is not YAML ({brief(reason_of(error))})") from error
        except (TypeError, KeyError) as error:
            message = parser_error_message(parser, str(error), error)
            raise UserError(f"{location}: {printable(message.removeprefix('--'))}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: is not YAML ({brief(error)})") from error
        except UserError as error:
            message = str(error).removeprefix(f"{source}: ").removeprefix("--")
            raise UserError(f"{location}: {printable(message)}") from error


def _check_names(parser: CommandParser, content: dict[str, Any]) -> None:
    """Refuse an unknown option or a group of options that is null; errors of jsonargparse would not name the file."""
    for name in GROUPS:
        if name in content and content[name] is None:
            raise UserError(f"{name}: is null; give its settings, or remove it from the file")
    if content.pop("trust_config", False):
        raise UserError(f"trust_config: a file cannot trust itself; give {TRUST} on the command line")
    options = {option.removeprefix("--") for option in option_strings(parser)}
    groups = {name.partition(".")[0] for name in options}
    trainer = content.get("trainer")
    names = [str(name) for name in content]
    names += [f"trainer.{name}" for name in trainer] if isinstance(trainer, dict) else []
    for name in names:
        if name not in options | groups:
            raise unknown("option", name, options | groups)
