"""`jaxpaged export`: a model and its compiled steps in one folder, from which `LLM.from_export` starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxpaged.cli.options import add_engine_arguments, engine_options
from jaxpaged.config import EngineConfig

PLATFORMS = ("cpu", "cuda", "tpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_engine_arguments(parser)
    parser.add_argument("destination", metavar="DST", help="the folder to write; appears only when it is complete")
    parser.add_argument(
        "--platforms",
        type=lambda text: text.split(","),
        default=["cpu"],
        metavar="LIST",
        help=f"what to export for, none of which need be here: {','.join(PLATFORMS)} (default: cpu)",
    )
    parser.add_argument("--gpu", metavar="NAME", help="the NVIDIA GPU meant by cuda (default: NVIDIA H100)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint folder")


def run(args: argparse.Namespace) -> int:
    """Export as the parsed arguments say and print a summary. Raises JaxpagedError."""
    options = engine_options(args)
    dtype = options.pop("dtype", "auto")
    options.pop("tokenizer", None)
    count, num_bytes = export(
        args.model,
        args.destination,
        EngineConfig(**options),
        dtype=dtype,
        platforms=args.platforms,
        gpu=args.gpu,
        overwrite=args.overwrite,
        show_progress=True,
    )
    print(
        f"{args.destination}: {count:,} functions for {', '.join(args.platforms)}, {num_bytes:,} bytes beside weights"
    )
    return 0


def export(
    model: str,
    destination: str | Path,
    config: EngineConfig,
    *,
    dtype: str = "auto",
    platforms: list[str],
    gpu: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> tuple[int, int]:
    """Write the folder whole or not at all; how many functions there are, and their bytes."""
    from jaxpaged.convert.__main__ import write_gguf_tokenizer  # only here: `--help` needs no jax
    from jaxpaged.convert.checkpoint import open_checkpoint
    from jaxpaged.convert.load import recipe_for, resolve_dtype
    from jaxpaged.convert.native import new_folder, stored_bytes, write_native
    from jaxpaged.engine import exports

    checkpoint = open_checkpoint(model)
    recipe = recipe_for(checkpoint, config.quantization)
    target = resolve_dtype(dtype, checkpoint.dtype)
    final = Path(destination).expanduser()
    size = stored_bytes(recipe.spec, target)
    with new_folder(final, checkpoint.path, num_bytes=size, overwrite=overwrite) as folder:
        more: dict[str, Any] = {"gpu": gpu, "show_progress": show_progress}
        count = exports.write(folder, recipe.spec, target, config, platforms, **more)
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*.bin"))
        write_native(folder, checkpoint, recipe, target, lambda written: None)
        write_gguf_tokenizer(folder, checkpoint)
    return count, num_bytes
