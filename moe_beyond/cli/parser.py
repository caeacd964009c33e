"""The parser of a command, whose errors are one line that names the option and the remedy."""

import inspect
import math
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from moe_beyond.errors import UserError, nearest, unknown
from moe_beyond.safe_text import brief

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}

# jsonargparse has no structured errors, so its messages are matched.
MISSING = "the following arguments are required: "
UNRECOGNIZED = "nrecognized arguments"
OPTION_NOT_ACCEPTED = re.compile(r"Option '([^']*)' is not accepted")
OPTION_NOT_OF_COMMAND = re.compile(r"Subcommand '[^']*' does not accept option '([^']*)'")
WRONG_VALUE = re.compile(r'Parser key "([^"]*)"')
NOT_A_CLASS = re.compile(r"Expected a dot import path string: (.*)")
WRONG_ARGUMENT = re.compile(r"- (\w+ (?:needs|has no argument) .*)")
CLASS_NAME = re.compile(r"[A-Za-z_][\w.]*")
NOT_ALLOWED = "is not a class that a configuration may name"
DENIED = re.compile(rf"Importing '([^']*)' is not allowed|class_path (\S+): {NOT_ALLOWED}")
TRUST = "--trust-config"
"""Option that lets a configuration name any class."""


class CommandParser(ArgumentParser):
    """Parser that raises a `UserError` of one line instead of printing its usage and exiting.

    Attributes:
        command: Name of the command.
        example: Example command line, shown if an argument is missing.
        given: Arguments that are being parsed.
    """

    command = ""
    example = ""
    given: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error.

        Raises:
            UserError: Always.
        """
        raise UserError(parser_error_message(self, message, ex)) from ex

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Parse arguments; an option that does not repeat may be given once."""
        self.given = [argument for argument in args or () if isinstance(argument, str)]
        check_repetition(self, self.given)
        return super().parse_args(args, *more, **options)


def option_strings(parser: ArgumentParser) -> list[str]:
    """Return the long options of a parser, in the order of its help."""
    strings = [string for action in parser._actions for string in action.option_strings]  # noqa: SLF001
    return list(dict.fromkeys(string for string in strings if string.startswith("--") and not string.endswith("+")))


def check_repetition(parser: ArgumentParser, arguments: Iterable[str]) -> None:
    """Refuse an option that is given twice and does not repeat.

    An option of a class (``--model.width``) may be given again for the next class (after ``--model``).

    Args:
        parser: Parser of the arguments.
        arguments: Arguments of the command line.

    Raises:
        UserError: An option is given twice.
    """
    seen: set[str] = set()
    for argument in arguments:
        if argument == "--":
            return
        parser = _subparsers(parser).get(argument, parser)  # the options after a subcommand are its own
        name = argument.partition("=")[0]
        if not name.startswith("--") or _repeats(parser, name):
            seen = {other for other in seen if not other.startswith(name.rstrip("+") + ".")}
            continue
        if name in seen:
            raise UserError(f"{name}: is given twice, and takes one value; leave one of them out")
        seen = {other for other in seen if not other.startswith(name + ".")} | {name}


def _repeats(parser: ArgumentParser, name: str) -> bool:
    action = parser._option_string_actions.get(name)  # noqa: SLF001
    repeats = action is not None and (action.nargs == 0 or re.search("Append|ConfigFile", type(action).__name__))
    return bool(repeats) or name.endswith("+")


def _subparsers(parser: ArgumentParser) -> dict[str, Any]:
    """Return the parsers of a parser's subcommands, by name."""
    choices = [a.choices for a in parser._actions if not a.option_strings and isinstance(a.choices, dict)]  # noqa: SLF001
    return {name: subparser for named in choices for name, subparser in named.items()}


def parser_error_message(parser: CommandParser, message: str, error: BaseException | None) -> str:
    """Turn a parser's complaint into one line.

    Args:
        parser: Parser that complains. jsonargparse makes one for the arguments of each class; its ``exit_on_error`` is
            False.
        message: Message of the parser.
        error: Exception that caused the message; None if there is none.
    """
    text = _flat(message.split("Given value type")[0])  # the whole configuration follows
    command = parser.command
    if denied := next(filter(None, map(DENIED.search, map(str, (message, *causes_of(error))))), None):
        key = WRONG_VALUE.match(text)
        option = "" if key is None else f"--{key[1].removeprefix(f'{command}.')}: "
        return f"{option}{not_allowed(denied[1] or denied[2])}"
    if text.startswith(MISSING):
        return _missing_message(parser, text.removeprefix(MISSING).split(", "))
    if UNRECOGNIZED in text:
        return f"{text}; {_suggestion(parser, text.partition(': ')[2].split())}"
    if match := OPTION_NOT_ACCEPTED.match(text):
        return _no_argument_message(parser, match[1])
    if match := OPTION_NOT_OF_COMMAND.match(text):
        near = _nearest_option(f"--{match[1]}", option_strings(_command_parser(parser)))
        return f"{command} has no option {match[1]}; {_option_hint(near, command)}"
    if match := WRONG_VALUE.match(text):
        return _value_message(parser, match[1], message, error)
    return f"{text}; {_option_hint(None, command)}"


def not_allowed(path: str) -> str:
    """Return the message about a class that a configuration may not name.

    Args:
        path: Import path, or the name of a class.
    """
    return f"class_path {brief(path, 100)}: {NOT_ALLOWED}; if you trust its author, add {TRUST}"


def _missing_message(parser: CommandParser, names: list[str]) -> str:
    """Return the message about missing arguments."""
    command, example = parser.command, parser.example
    if not parser.exit_on_error:
        return f"{_class_name(parser)} needs {', '.join(names)}"
    missing = " and ".join(_as_typed(parser, name.removeprefix(f"{command}.")) for name in names)
    return f"{command} needs {missing}" + (f"; for example: {example}" if example else "")


def _class_name(parser: ArgumentParser) -> str:
    """Return the name of the class whose arguments a parser reads."""
    return next(iter(parser.groups or {}), "the class")


def _command_parser(parser: CommandParser) -> Any:
    """Return the parser of the command's options, which may be a subparser of ``parser``."""
    return _subparsers(parser).get(parser.command, parser)


def _as_typed(parser: CommandParser, name: str) -> str:
    """Return an argument as the user would type it."""
    for action in _command_parser(parser)._actions:  # noqa: SLF001
        if name in (action.dest, *action.option_strings, action.metavar):
            value = str(action.metavar) if re.fullmatch(r"[A-Z/]+", str(action.metavar)) else ""
            return f"{action.option_strings[-1]} {value}".strip() if action.option_strings else str(value or name)
    return f"--{name}"


def _suggestion(parser: CommandParser, unrecognized: list[str]) -> str:
    """Return a suggestion for arguments that the parser does not recognize."""
    options = option_strings(parser)
    positional = {f"--{action.dest}": action for action in parser._actions if not action.option_strings}  # noqa: SLF001
    names = [argument.partition("=")[0] for argument in unrecognized]
    if name := next((name for name in names if name in positional), None):
        return f"{parser.command} takes {positional[name].metavar} without {name}, as in: {parser.example}"
    flags = [name for name in names if name.startswith("--")]
    if not flags and "--traces" in options and "--traces" not in parser.given:
        return f"did you mean --traces {unrecognized[0]}?"
    if not flags and unrecognized[0] in parser.given:
        earlier = parser.given[: parser.given.index(unrecognized[0])]
        option = next((argument for argument in reversed(earlier) if argument.startswith("--")), None)
        if option is not None and _repeats(parser, option):
            return f"write {option} again for each value: {option} {unrecognized[0]}"
    near = [option for option in (_nearest_option(flag, options) for flag in flags) if option]
    return "; ".join(f"did you mean {option}?" for option in near) or _option_hint(None, parser.command)


def _nearest_option(flag: str, options: Iterable[str]) -> str | None:
    """Return the option nearest to a flag; for a dotted flag, also one whose first part is misspelt."""
    options = list(options)
    if near := nearest(flag, options, cutoff=0.7):
        return near
    head, dot, tail = flag.partition(".")
    other = nearest(head, (option.partition(".")[0] for option in options), cutoff=0.7)
    return f"{other}.{tail}" if dot and other not in (None, head) else None


def _option_hint(near: str | None, command: str) -> str:
    if near:
        return f"did you mean {near.removeprefix('--')}?"
    return f"moe-beyond {command} --help lists the options".strip()


def _no_argument_message(parser: CommandParser, name: str) -> str:
    names = [option.removeprefix("--") for option in option_strings(parser) if option != "--help"]
    near = nearest(name, names)
    hint = f"it has {', '.join(names) or 'none'}" if near is None else f"did you mean {near!r}?"
    return f"{_class_name(parser)} has no argument '{name}'; {hint}"


def _value_message(parser: CommandParser, key: str, message: str, error: BaseException | None) -> str:
    """Return the message about a wrong value.

    Args:
        parser: Parser that complains.
        key: Dotted name of the option, such as ``"model.width"``.
        message: Message of the parser, of several lines.
        error: Exception that caused the message; None if there is none.
    """
    key = key.removeprefix(f"{parser.command}.")
    action = next((action for action in _command_parser(parser)._actions if action.dest == key), None)  # noqa: SLF001
    option = action.option_strings[0] if parser.exit_on_error and action and action.option_strings else key
    causes = list(causes_of(error))
    if inner := next((str(cause) for cause in causes if isinstance(cause, UserError)), None):
        return _nested_message(parser, option, key, message, inner)
    type_hint = getattr(action, "_typehint", None)
    reason = _flat(str(causes[-1])) if causes else _flat(message)
    if match := NOT_A_CLASS.match(reason):
        return f"{option}: {unknown('class', match[1], class_names(type_hint))}"
    if match := WRONG_ARGUMENT.search(message):
        return f"{option}: {match[1]}"
    reason, _, value = reason.partition(". Got value: ")
    if reason.startswith("Expected a") and type_hint is not None:
        value = value or _flat(message.rpartition("Given value: ")[2])
        if (names := class_names(type_hint)) and CLASS_NAME.fullmatch(value):
            return f"{option}: {unknown('class', value, names)}"
        value = _typed(parser, option) or value
        return f"{option}: expects {' or '.join(describe_type(type_hint))} (got {value!r}){_number_hint(value)}"
    reason = reason.removeprefix(f'Parser key "{key}": ')
    return f"{option}: {reason}" + (f" (got {value!r})" if value else "")


def _typed(parser: CommandParser, option: str) -> str | None:
    """Return the value of an option as it was typed: YAML reads ``1e3`` as 1000.0; None if it was not typed."""
    typed = None
    for argument, following in zip_longest(parser.given, parser.given[1:]):
        name, equals, value = argument.partition("=")
        if name == option:
            typed = value if equals else following
    return typed


def _number_hint(value: str) -> str:
    """Return advice for a number in a form that an option does not accept."""
    try:
        number = float(value)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return "; give a finite number"
    return f"; write {int(number)}" if number.is_integer() else ""


def _nested_message(parser: CommandParser, option: str, key: str, message: str, inner: str) -> str:
    """Return the message about a wrong argument of a class, from the message ``inner`` of the class's own parser."""
    hint = ""
    if needs := re.fullmatch(r"\w+ needs (.*)", inner):
        hint = f"; give {', '.join(f'{option}.{name}' for name in needs[1].split(', '))}"
        hint += f"; for example: {parser.example}" if key in ("data", "model") else ""
    elif "has no argument" in inner and "NestedArg" in message and "list[" in message:
        hint = "; a flag reaches only the last one, so set the others in a -c FILE"
    is_argument_of_the_class = re.match(r"[\w.]+: expects ", inner)
    return f"{option}{'.' if is_argument_of_the_class else ': '}{inner}{hint}"


def describe_type(hint: Any) -> list[str]:
    """Describe the values of a type hint, one entry per kind.

    Example:
        >>> describe_type(int | None), describe_type(Literal["min", "max"])
        (['a whole number', 'null'], ['min', 'max'])
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        several = [name for member in members for name in describe_type(member)]
        return [name for name in dict.fromkeys(several) if name != "null" or len(members) == 2]
    if origin is Literal:
        return [str(value) for value in members]
    if hint in TYPE_NAMES:
        return [TYPE_NAMES[hint]]
    if origin is not None:
        return [f"a {getattr(origin, '__name__', 'list').lower()}"]
    return [f"a {getattr(hint, '__name__', str(hint))}"]


def class_names(hint: Any) -> list[str]:
    """Return the names of the concrete classes that a type hint accepts, subclasses included."""
    if get_args(hint):
        return sorted({name for part in get_args(hint) for name in class_names(part)})
    if not isinstance(hint, type) or hint in TYPE_NAMES:
        return []
    classes, bases = set(), [hint]
    while bases:
        base = bases.pop()
        bases += base.__subclasses__()
        if not inspect.isabstract(base) and not base.__name__.startswith("_"):
            classes.add(base.__name__)
    return sorted(classes)


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an exception and its causes; the first cause comes last."""
    while error is not None:
        yield error
        error = error.__cause__


def _flat(text: str) -> str:
    return " ".join(text.split())
