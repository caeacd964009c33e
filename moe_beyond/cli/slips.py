"""Mistakes in options as errors of one line, whichever library noticed them."""

import inspect
import re
import traceback
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from moe_beyond.errors import UserError, nearest, unknown
from moe_beyond.fields import brief

PACKAGE = Path(__file__).parents[1]
LONGEST = 400
"""Characters of a library's message that are shown."""
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
ABOUT_CODE = (AssertionError, AttributeError, LookupError, NameError)
"""Errors of a library that was called wrongly, in contrast to one that was given a wrong value."""


class OneLineErrors(ArgumentParser):
    """A parser that raises a `UserError` of one line where argparse would print its usage and exit.

    Attributes:
        verb: The verb whose options these are.
        example: A command line to show where something is missing.
        given: Words that are being parsed.
    """

    verb = ""
    example = ""
    given: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise it."""
        raise UserError(parsing_slip(self, message, ex)) from ex

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Parse, after refusing an option that is given twice and does not repeat."""
        self.given = [word for word in args or () if isinstance(word, str)]
        check_repetition(self, self.given)
        return super().parse_args(args, *more, **options)


def option_strings(options: OneLineErrors) -> list[str]:
    """List the long options of a parser, in the order that help shows them."""
    actions = options._actions  # noqa: SLF001  (argparse has no public list)
    words = [word for action in actions for word in action.option_strings]
    return list(dict.fromkeys(word for word in words if word.startswith("--") and not word.endswith("+")))


def check_repetition(options: OneLineErrors, words: Iterable[str]) -> None:
    """Refuse an option that is given twice, unless it is one that repeats.

    An option of a class (``--model.width``) may be given again for the next class (after ``--model``).

    Raises:
        UserError: One is given twice.
    """
    parsers = [options]
    seen: set[str] = set()
    for word in words:
        if word == "--":
            return
        for action in parsers[-1]._actions:  # noqa: SLF001
            if not action.option_strings and isinstance(action.choices, dict) and word in action.choices:
                parsers.append(action.choices[word])  # the options after a subcommand are its own
        name = word.partition("=")[0]
        if not name.startswith("--") or _repeats(parsers[-1], name):
            seen = {other for other in seen if not other.startswith(name.rstrip("+") + ".")}
            continue
        if name in seen:
            raise UserError(f"{name}: is given twice, and takes one value; leave one of them out")
        seen = {other for other in seen if not other.startswith(name + ".")} | {name}


def _repeats(options: OneLineErrors, name: str) -> bool:
    action = options._option_string_actions.get(name)  # noqa: SLF001
    repeats = action is not None and (action.nargs == 0 or re.search("Append|ConfigFile", type(action).__name__))
    return bool(repeats) or name.endswith("+")


def parsing_slip(options: OneLineErrors, message: str, error: BaseException | None) -> str:
    """Make one line of a parser's complaint.

    Args:
        options: The parser. One that jsonargparse makes for the arguments of a class has ``exit_on_error`` off.
        message: The message of the parser.
        error: The exception behind the message, or None.
    """
    text = _flat(message.split("Given value type")[0])  # what follows is the whole configuration
    verb, example = options.verb, options.example
    if text.startswith("the following arguments are required: "):
        names = text.partition(": ")[2].split(", ")
        if not options.exit_on_error:
            return f"{_owner(options)} needs {', '.join(names)}"
        missing = " and ".join(_as_typed(options, name.removeprefix(f"{verb}.")) for name in names)
        return f"{verb} needs {missing}" + (f"; for example: {example}" if example else "")
    if "nrecognized arguments" in text:
        return f"{text}; {_meant(options, text.partition(': ')[2].split())}"
    if match := re.match(r"Option '([^']*)' is not accepted", text):
        return _no_argument(options, match[1])
    if match := re.match(r"Subcommand '[^']*' does not accept option '([^']*)'", text):
        near = _near(f"--{match[1]}", option_strings(_of_verb(options)))
        return f"{verb} has no option {match[1]}; {_or_help(near, verb)}"
    if match := re.match(r'Parser key "([^"]*)"', text):
        return _value_slip(options, match[1], message, error)
    return f"{text}; {_or_help(None, verb)}"


def _owner(options: OneLineErrors) -> str:
    """Return the name of the class whose arguments these are."""
    return next(iter(options.groups or {}), "the class")


def _of_verb(options: OneLineErrors) -> OneLineErrors:
    """Return the parser of the verb's options, which may be a subparser of this one."""
    below: list[dict[str, OneLineErrors]] = [
        action.choices
        for action in options._actions  # noqa: SLF001
        if isinstance(action.choices, dict)
    ]
    return next((parsers[options.verb] for parsers in below if options.verb in parsers), options)


def _as_typed(options: OneLineErrors, name: str) -> str:
    """Return a missing argument as the user would type it."""
    for action in _of_verb(options)._actions:  # noqa: SLF001
        if name in (action.dest, *action.option_strings, action.metavar):
            value = str(action.metavar) if re.fullmatch(r"[A-Z/]+", str(action.metavar)) else ""
            return f"{action.option_strings[-1]} {value}".strip() if action.option_strings else str(value or name)
    return f"--{name}"


def _meant(options: OneLineErrors, words: list[str]) -> str:
    """Say which options the words that the parser does not know may have meant."""
    names = option_strings(options)
    actions = options._actions  # noqa: SLF001
    positional = {f"--{action.dest}": action for action in actions if not action.option_strings}
    if any(word.partition("=")[0] in positional for word in words):
        name = next(word.partition("=")[0] for word in words if word.partition("=")[0] in positional)
        return f"{options.verb} takes {positional[name].metavar} without {name}, as in: {options.example}"
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    near = list(filter(None, (_near(flag, names) for flag in flags)))
    if not flags and "--traces" in names and "--traces" not in options.given:
        return f"did you mean --traces {words[0]}?"
    if not flags and words[0] in options.given:
        before = [word for word in options.given[: options.given.index(words[0])] if word.startswith("--")]
        if before and _repeats(options, before[-1]):
            return f"write {before[-1]} again for each value: {before[-1]} {words[0]}"
    return "; ".join(f"did you mean {option}?" for option in near) or _or_help(None, options.verb)


def _near(flag: str, names: Iterable[str]) -> str | None:
    """Return the option nearest to a flag; for a dotted flag, also one whose first part is misspelt."""
    names = list(names)
    if near := nearest(flag, names, cutoff=0.7):
        return near
    head, dot, tail = flag.partition(".")
    other = nearest(head, (name.partition(".")[0] for name in names), cutoff=0.7)
    return f"{other}.{tail}" if dot and other not in (None, head) else None


def _or_help(near: str | None, verb: str) -> str:
    return f"did you mean {near.removeprefix('--')}?" if near else f"moe-beyond {verb} --help lists the options".strip()


def _no_argument(options: OneLineErrors, name: str) -> str:
    names = [word.removeprefix("--") for word in option_strings(options) if word != "--help"]
    near = nearest(name, names)
    hint = f"it has {', '.join(names) or 'none'}" if near is None else f"did you mean {near!r}?"
    return f"{_owner(options)} has no argument '{name}'; {hint}"


def _value_slip(options: OneLineErrors, key: str, message: str, error: BaseException | None) -> str:
    """Say which option has which wrong value."""
    key = key.removeprefix(f"{options.verb}.")
    action = next((a for a in _of_verb(options)._actions if a.dest == key), None)  # noqa: SLF001
    where = action.option_strings[0] if action is not None and action.option_strings else key
    where = where if options.exit_on_error else key
    chain = list(_causes(error))
    inner = next((cause for cause in chain if isinstance(cause, UserError)), None)
    if inner is not None:
        last = "; a flag reaches only the last one, so set the others in a -c FILE"
        hint = last if "NestedArg" in message and "has no argument" in str(inner) and "list[" in message else ""
        dotted = re.match(r"[\w.]+: expects ", str(inner))
        if match := re.fullmatch(r"\w+ needs (.*)", str(inner)):
            hint = f"; give {', '.join(f'{where}.{name}' for name in match[1].split(', '))}"
            hint += f"; for example: {options.example}" if key in ("data", "model") else ""
        return f"{where}{'.' if dotted else ': '}{inner}{hint}"
    reason = _flat(str(chain[-1])) if chain else _flat(message)
    hint_of_type = getattr(action, "_typehint", None)
    if match := re.match(r"Expected a dot import path string: (.*)", reason):
        return f"{where}: {unknown('class', match[1], class_names(hint_of_type))}"
    if match := re.search(r"- (\w+ (?:needs|has no argument) .*)", message):
        return f"{where}: {match[1]}"
    reason, _, value = reason.partition(". Got value: ")
    if reason.startswith("Expected a") and hint_of_type is not None:
        given = value or _flat(message.rpartition("Given value: ")[2])
        if (names := class_names(hint_of_type)) and re.fullmatch(r"[A-Za-z_][\w.]*", given):
            return f"{where}: {unknown('class', given, names)}"
        return f"{where}: expects {' or '.join(kinds(hint_of_type))} (got {given!r})"
    reason = reason.removeprefix(f'Parser key "{key}": ')
    return f"{where}: {reason}" + (f" (got {value!r})" if value else "")


def kinds(hint: Any) -> list[str]:
    """Describe the values that a type hint takes, one entry per kind."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        several = [kind for part in inside for kind in kinds(part)]
        return [kind for kind in dict.fromkeys(several) if kind != "null" or len(inside) == 2]
    if origin is Literal:
        return [str(value) for value in inside]
    if hint in KINDS:
        return [KINDS[hint]]
    if origin is not None:
        return [f"a {getattr(origin, '__name__', 'list').lower()}"]
    return [f"a {getattr(hint, '__name__', str(hint))}"]


def class_names(hint: Any) -> list[str]:
    """List the names of the classes that a type hint takes: the concrete classes among each base and its subclasses."""
    if get_args(hint):
        return sorted({name for part in get_args(hint) for name in class_names(part)})
    if not isinstance(hint, type) or hint in KINDS:
        return []
    classes, waiting = set(), [hint]
    while waiting:
        base = waiting.pop()
        waiting += base.__subclasses__()
        if not inspect.isabstract(base) and not base.__name__.startswith("_"):
            classes.add(base.__name__)
    return sorted(classes)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _flat(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def one_line(where: str = "", *, constructing: bool = False) -> Iterator[None]:
    """Turn an error of a library about an option into one line; a fault of this package keeps its traceback.

    An error is about an option if no code of this package is between the command line and the code that raised it, if
    a callback of a library raised it, or if a class of torch refuses what it is constructed with.
    While classes are constructed, it also is if a library rejects a value that a class of this package passes on.

    Args:
        where: Place of the fault to name; by default the class that raised the error.
        constructing: Whether the block constructs what the configuration names.

    Raises:
        UserError: An option is at fault.
    """
    try:
        yield
    except Exception as error:
        chain = list(_causes(error))
        cause = next(link for link in chain if link.__cause__ is None or not _raised_in(link, "jsonargparse"))
        ours = next((link for link in chain if isinstance(link, UserError)), None)
        if ours is not None:
            text = str(ours).strip().splitlines()[-1]  # torch puts the traceback of a worker process before it
            raise UserError(text.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
        if isinstance(error, OSError) or not _is_about_an_option(cause, constructing):
            raise
        who = where or _speaker(cause)
        raise UserError(f"{who + ': ' if who else ''}{brief(cause, LONGEST).rstrip('.')}") from error


def _is_about_an_option(error: BaseException, constructing: bool) -> bool:
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if _is_of_a_callback(error) or _is_of_a_constructor(error, files):
        return True
    through_ours = any(PACKAGE in file.parents and file.parent != PACKAGE / "cli" for file in files)
    module = type(error).__module__
    if "DataLoader worker process" in str(error) or any("autograd" in file.parts for file in files):
        return False
    if module.startswith("wandb"):
        return False  # `finishing_wandb` says it
    if not through_ours:
        return constructing or not isinstance(error, ABOUT_CODE)
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("moe_beyond")
    of_a_library = module.startswith(("lightning", "torch.", "torch._dynamo", "torch._inductor"))
    of_a_library |= isinstance(error, (ValueError, ArithmeticError)) and _raised_in(error, "lightning")
    rejects = constructing and PACKAGE not in files[-1].parents and isinstance(error, (ValueError, RuntimeError))
    return of_a_library or rejects or isinstance(error, MemoryError)


def _is_of_a_callback(error: BaseException) -> bool:
    """Tell whether a callback, logger or profiler of a library raised it, with no code of this package in between."""
    from lightning import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    speakers = [frame.f_locals.get("self") for frame in frames]
    theirs = [
        place
        for place, speaker in enumerate(speakers)
        if isinstance(speaker, (Callback, Logger, Profiler)) and PACKAGE not in _file(frames[place]).parents
    ]
    return bool(theirs) and not any(PACKAGE in _file(frame).parents for frame in frames[theirs[-1] :])


def _is_of_a_constructor(error: BaseException, files: list[Path]) -> bool:
    """Tell whether a class of torch refuses a value that it is constructed with, as loaders and optimizers do."""
    last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return isinstance(error, ValueError) and last.f_code.co_name == "__init__" and "torch" in files[-1].parts


def _file(frame: types.FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _raised_in(error: BaseException, package: str) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and package in Path(frames[-1].f_code.co_filename).parts


def _speaker(error: BaseException) -> str:
    """Return the name of the class in which an error was raised, among those that a configuration can name."""
    import lightning as L
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    named = (L.Trainer, L.Callback, L.LightningModule, L.LightningDataModule, Logger, Profiler, Strategy)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # A module that lacks an attribute is not the one that asks for it.
    speakers = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name != "__getattr__"]
    return next((type(speaker).__name__ for speaker in reversed(speakers) if isinstance(speaker, named)), "")
