"""`jaxpaged run-batch`: the lines of an OpenAI batch file, answered by one model in another file."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from tqdm import tqdm

from jaxpaged.cli.answer_options import add_answer_arguments, answer_options
from jaxpaged.cli.options import add_engine_arguments, add_lora_modules, engine_options, lora_modules
from jaxpaged.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_engine_arguments(parser)
    group = parser.add_argument_group("batch")
    group.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="JSONL", help="a request a line, as OpenAI's API has it"
    )
    group.add_argument("-o", "--output-file", type=Path, required=True, metavar="JSONL", help="an answer a line")
    group.add_argument("--resume", action="store_true", help="keep what the output file has, and answer the rest")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="TEXT", help="what lines may call the model (default: MODEL)"
    )
    add_lora_modules(group)
    add_answer_arguments(group)
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Load, answer, tell. Raises JaxpagedError; whatever happens, what was answered is written."""
    try:
        from jaxpaged.server import batch_file
        from jaxpaged.server.app import App, ServerOptions
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("jaxpaged"):
            raise
        raise ConfigError(f"{error.name} is not installed; run pip install 'jaxpaged[serve]'") from None
    from jaxpaged.server.async_engine import AsyncEngine

    num_lines = sum(1 for _ in batch_file.lines(args.input_file))  # first: loading takes long
    if args.output_file.exists() and not args.resume:
        raise ConfigError(f"{args.output_file} exists; remove it, or give --resume to go on where it ends")
    modules, answers = lora_modules(args), answer_options(args)
    engine = AsyncEngine.load(args.model, lora_modules=modules, **engine_options(args))
    models = tuple(args.served_model_name or [str(args.model)])
    app = App(engine, ServerOptions(models=models, **answers))
    try:
        with tqdm(total=num_lines, unit="line", disable=args.disable_tqdm) as bar:
            work = batch_file.run(app, args.input_file, args.output_file, resume=args.resume, told=bar.update)
            counts = asyncio.run(work)
    finally:
        engine.stop()
    print(f"{args.output_file}: {counts.answered:,} lines answered, {counts.refused:,} refused", end="")
    print(f", {counts.before:,} answered before" if args.resume else "")
    return 0
