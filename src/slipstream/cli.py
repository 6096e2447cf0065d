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
from pathlib import Path
from typing import TYPE_CHECKING

import docstring_parser
from datasets.utils import logging as datasets_logging
from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils import logging as transformers_logging

from slipstream.commands.data import regenerate, synthesize
from slipstream.commands.decoding import evaluate, generate, tune
from slipstream.commands.hub import push
from slipstream.commands.training import train
from slipstream.configs.errors import SlipstreamError
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
    f.__name__: f for f in (quickstart, synthesize, regenerate, train, generate, evaluate, tune, push, doctor)
}


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
        if function is train:
            sub.add_argument("--config", action="config", help="a recipe in YAML")
            sub.add_class_arguments(Recipe, as_group=False)
            sub.add_argument("--out", type=Path, required=True, help="folder of the run")
        else:
            flags: set[str | int] = {
                p.name for p in inspect.signature(function).parameters.values() if p.default is False
            }
            sub.add_function_arguments(function, as_group=False, skip=flags)
            for about in docstring_parser.parse(function.__doc__ or "").params:
                if about.arg_name in flags:  # jsonargparse would want a value
                    sub.add_argument(f"--{about.arg_name}", action="store_true", help=about.description)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _known(command: str | None) -> list[str]:
    """Options of a command, or the commands."""
    if command is None:
        return list(COMMANDS)
    if command != "train":
        return list(inspect.signature(COMMANDS[command]).parameters)
    sections = {section.name: section.default_factory for section in fields(Recipe)}
    return ["config", "out", *(f"{name}.{f.name}" for name, kind in sections.items() for f in fields(kind))]  # type: ignore[arg-type]


def _explain(message: str, command: str | None) -> str:
    """jsonargparse's message in one line, with the near name where a key is unknown."""
    line = " ".join(message.split())
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
    try:
        parser = _parser()
        settings = parser.instantiate(parser.parse_args(arguments))
        values = vars(settings[settings.command])
        if settings.command == "train":
            train(Recipe(**{field.name: values[field.name] for field in fields(Recipe)}), values["out"])
        else:
            COMMANDS[settings.command](**values)
    except (SlipstreamError, ArgumentError) as error:
        command = next((a for a in (arguments if arguments is not None else sys.argv[1:]) if a in COMMANDS), None)
        told = _explain(str(error), command) if isinstance(error, ArgumentError) else error
        print(f"slipstream: {told}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"slipstream: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("slipstream: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
