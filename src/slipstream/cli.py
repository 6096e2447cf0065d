"""`slipstream ...`: typed functions are the command line (jsonargparse), one recipe drives training."""

from __future__ import annotations

import errno
import inspect
import logging
import re
import sys
import warnings
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, get_args, get_origin

import docstring_parser
from datasets.utils import logging as datasets_logging
from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils import logging as transformers_logging

from slipstream.commands.data import regenerate, synthesize
from slipstream.commands.decoding import evaluate, generate, tune
from slipstream.commands.heads import export, import_, inspect_
from slipstream.commands.hub import push
from slipstream.commands.training import capture, train
from slipstream.configs.errors import SlipstreamError, out_of_memory
from slipstream.configs.recipe import Recipe
from slipstream.configs.suggest import near
from slipstream.quickstart import quickstart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def doctor() -> None:
    """Print versions, devices, what is missing, and the command that installs it."""
    from slipstream.doctor import examine

    examine()


COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__.rstrip("_"): f  # `import_` cannot be called `import` in Python
    for f in (
        quickstart,
        synthesize,
        regenerate,
        capture,
        train,
        generate,
        evaluate,
        tune,
        export,
        import_,
        inspect_,
        push,
        doctor,
    )
}

_KIND = r"(typing\.Literal\[.*?\]|<class '[\w.]+'>)"  # as jsonargparse writes what it expected
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}

_SMALLER = {  # what to set where memory runs out
    "capture": "lower data.batch_tokens or data.max_length",
    "train": "see what slipstream train --plan says, or set target.device_map auto",
    "regenerate": "lower --batch_size",
    "evaluate": "lower --batch_size or --max_new_tokens",
}

RESUMED = ("quickstart", "synthesize", "regenerate", "capture", "train", "evaluate")
RECIPE_COMMANDS = ("capture", "train")  # their first parameter is a recipe: a file, and an option for every field


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="slipstream",
        description="Train, tune and run draft heads.",
        version=version("slipstream"),
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").split("\n")[0]
        sub = ArgumentParser(description=summary, exit_on_error=False)
        if name in RECIPE_COMMANDS:
            sub.add_argument("--config", action="config", help="a recipe in YAML")
            sub.add_class_arguments(Recipe, as_group=False)
        _add_options(sub, function)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _add_options(parser: ArgumentParser, function: Callable[..., None]) -> None:
    """A command's parameters as options: flags take no value, lists take several, and `from_` is `--from`."""
    parameters = inspect.signature(function, eval_str=True).parameters
    texts = {about.arg_name: about.description for about in docstring_parser.parse(function.__doc__ or "").params}
    flags = {name for name, p in parameters.items() if p.default is False}
    lists = {name for name, p in parameters.items() if get_origin(p.annotation) is list}
    words = {name for name in parameters if name.endswith("_")}  # what they are without it is a word of Python's
    skip: set[str | int] = {*flags, *lists, *words, "recipe"}
    parser.add_function_arguments(function, as_group=False, as_positional=function is inspect_, skip=skip)
    for name, p in parameters.items():
        option = f"--{name.rstrip('_')}"
        if name in flags:
            parser.add_argument(option, action="store_true", help=texts[name])
        elif name in lists:
            (kind,) = get_args(p.annotation)
            parser.add_argument(option, nargs="+", type=kind, default=p.default, help=texts[name])
        elif name in words:
            shown = option[2:].upper()
            parser.add_argument(option, type=p.annotation, required=True, dest=name, metavar=shown, help=texts[name])


def _known(command: str | None) -> list[str]:
    """Options of a command, or the commands."""
    if command is None:
        return list(COMMANDS)
    own = [key.rstrip("_") for key in inspect.signature(COMMANDS[command]).parameters]
    if command not in RECIPE_COMMANDS:
        return own
    sections = {section.name: section.default_factory for section in fields(Recipe)}
    return ["config", *own[1:], *(f"{name}.{f.name}" for name, kind in sections.items() for f in fields(kind))]  # type: ignore[arg-type]


def _explain(message: str, command: str | None, config: str | None) -> str:
    """jsonargparse's message in one line and plain words, with the near name where a key is unknown."""
    line = " ".join(message.split())
    if line.startswith("Problems parsing config:"):
        told = line.partition(": ")[2].replace('"<unicode string>", ', "")
        return f"{config} is not YAML: {told}" if config else line
    wrong = re.search(rf'key "([\w.]+)"(?: element \d+)?:.*?Expected an? {_KIND}.*?(?:Got|Given) value: (.*)$', line)
    if wrong:
        key, kind, given = wrong.groups()
        words = re.findall(r"'([^']+)'", kind)
        if kind.startswith("typing"):
            return f"{key} must be one of {', '.join(words)}, not {given!r}"
        return f"{key} must be {_KINDS.get(words[0], words[0])}, not {given!r}"
    unknown = re.search(r"invalid choice: '(.*?)'", line)
    if unknown and command is None:
        return f"unknown command {unknown.group(1)!r}{near(unknown.group(1), _known(None))}"
    found = re.search(r"(?:[Kk]ey|[Oo]ption|arguments:) ['\"]?(?:--)?([\w.]+)", line)
    if found and re.search(r"not expected|nrecognized|not accepted|does not accept", line):
        key = found.group(1)
        return f"unknown key {key!r}{near(key, _known(command))}"
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with one line on stderr and status 2."""
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    datasets_logging.set_verbosity(logging.CRITICAL)
    given = list(arguments if arguments is not None else sys.argv[1:])
    command = next((a for a in given if a in COMMANDS), None)
    try:
        parser = _parser()
        settings = parser.instantiate(parser.parse_args(arguments))
        values = vars(settings[settings.command])
        if settings.command in RECIPE_COMMANDS:
            del values["config"]
            values["recipe"] = Recipe(**{field.name: values.pop(field.name) for field in fields(Recipe)})
        COMMANDS[settings.command](**values)
    except (SlipstreamError, ArgumentError) as error:
        config = given[given.index("--config") + 1] if "--config" in given[:-1] else None
        told = _explain(str(error), command, config) if isinstance(error, ArgumentError) else error
        print(f"slipstream: {told}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        smaller = _SMALLER.get(command or "", "take a smaller target, or another --device")
        print(f"slipstream: out of memory: {smaller}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"slipstream: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        told = "interrupted; the same command goes on where it stopped" if command in RESUMED else "interrupted"
        print(f"slipstream: {told}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
