"""The commands, and from words to one of them with its arguments. Nothing takes long to import before one is chosen."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from jaxpaged.cli.options import unknown_flags


class Command(NamedTuple):
    """A command's module, imported only when it is asked for, its line of help, and what takes it long to import."""

    module: str
    help: str
    needs: str | None = None


COMMANDS = {
    "generate": Command("jaxpaged.cli.generate", "complete prompts", "jaxpaged.llm"),
    "chat": Command("jaxpaged.cli.chat", "talk with a model in the terminal", "jaxpaged.llm"),
    "serve": Command("jaxpaged.cli.serve", "serve a model through an OpenAI-compatible HTTP API", "jaxpaged.llm"),
    "plan": Command(
        "jaxpaged.cli.plan",
        "say whether a model fits so many devices, and what a step would take",
        "jaxpaged.engine.forecast",
    ),
    "run-batch": Command("jaxpaged.cli.run_batch", "answer the lines of an OpenAI batch file", "jaxpaged.llm"),
    "export": Command(
        "jaxpaged.cli.export", "write a model with its compiled steps, to start without tracing", "jaxpaged.llm"
    ),
    "convert": Command("jaxpaged.convert.__main__", "convert a checkpoint to the native format, or back"),
    "bench": Command("jaxpaged.cli.bench", "measure where KV memory goes, or a running server under load"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def chosen(argv: list[str]) -> Callable[[], Any]:
    """The command that is asked for, ready to run: whatever takes long to import has been. Raises SystemExit."""
    parser = Parser(prog="jaxpaged", description="LLM inference native to JAX.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if argv[:1] == [name]:
            importlib.import_module(command.module).add_arguments(subparser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        asked: Parser = commands.choices[args.command]
        asked.error(unknown_flags(unknown, asked))
    command = COMMANDS[args.command]
    if command.needs is not None:
        importlib.import_module(command.needs)
    module = importlib.import_module(command.module)
    return lambda: module.run(args)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        parser.exit(message=f"jaxpaged {version('jaxpaged')}\n")
