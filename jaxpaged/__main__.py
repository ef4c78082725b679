"""`jaxpaged COMMAND`, one of those below. A failure is one line `error: ...` and exit status 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NamedTuple, NoReturn

from jaxpaged.cli.options import unknown_flags
from jaxpaged.errors import JaxpagedError


class Command(NamedTuple):
    """A command's module, imported only when it is asked for, and its line of help."""

    module: str
    help: str


COMMANDS = {
    "generate": Command("jaxpaged.cli.generate", "complete prompts"),
    "chat": Command("jaxpaged.cli.chat", "talk with a model in the terminal"),
    "serve": Command("jaxpaged.cli.serve", "serve a model through an OpenAI-compatible HTTP API"),
    "plan": Command("jaxpaged.cli.plan", "say whether a model fits so many devices, and what a step would take"),
    "run-batch": Command("jaxpaged.cli.run_batch", "answer the lines of an OpenAI batch file"),
    "export": Command("jaxpaged.cli.export", "write a model with its compiled steps, to start without tracing"),
    "convert": Command("jaxpaged.convert.__main__", "convert a checkpoint to the native format, or back"),
    "bench": Command("jaxpaged.cli.bench", "measure where KV memory goes, or a running server under load"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command and give its exit status. JAXPAGED_DEBUG=1 shows the traceback of a failure."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="jaxpaged", description="LLM inference native to JAX.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        for name, command in COMMANDS.items():
            subparser = commands.add_parser(name, help=command.help, description=command.help)
            if argv[:1] == [name]:
                importlib.import_module(command.module).add_arguments(subparser)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            chosen: Parser = commands.choices[args.command]
            chosen.error(unknown_flags(unknown, chosen))
        return int(importlib.import_module(COMMANDS[args.command].module).run(args))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("JAXPAGED_DEBUG"):
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


def _explain(error: BaseException) -> str:
    match error:
        case KeyboardInterrupt():
            return "interrupted"
        case JaxpagedError():
            return str(error)
        case OSError(filename=str(name), strerror=reason):
            return f"{name}: {reason}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}; JAXPAGED_DEBUG=1 shows where"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        parser.exit(message=f"jaxpaged {version('jaxpaged')}\n")


if __name__ == "__main__":
    sys.exit(main())
