"""`python -m jaxpaged.convert SRC DST`: a checkpoint into our format, or back into Hugging Face's."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpaged.convert.checkpoint import Checkpoint, open_checkpoint
from jaxpaged.convert.gguf_reader import gguf_metadata
from jaxpaged.convert.load import DTYPES, Recipe, load, recipe_for, resolve_dtype, whole
from jaxpaged.convert.native import new_folder, stored_bytes, write_hf, write_native, write_tokenizer
from jaxpaged.convert.verify import Comparison, compare, reference_logits, sample_tokens
from jaxpaged.engine.tokenizer import load_tokenizer
from jaxpaged.errors import CheckpointError, JaxpagedError
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import in_floats, num_params
from jaxpaged.model.spec import WeightDtype


class Conversion(NamedTuple):
    """What a conversion did; `comparison` where it was verified."""

    family: str
    num_params: int
    num_bytes: int
    seconds: float
    destination: Path
    comparison: Comparison | None


def convert(
    source: str,
    destination: str | Path,
    *,
    dtype: str = "auto",
    quantization: WeightDtype | None = None,
    to_hf: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Conversion:
    """Write the checkpoint `source` to the folder `destination`, whole or not at all.

    With a `quantization` a native folder holds the weights of products so. `verify` compares logits with transformers'
    before anything appears at `destination`. Raises CheckpointError, and ConfigError where it cannot be quantised so.
    """
    if quantization is not None and (to_hf or verify):
        raise CheckpointError(
            f"{'--to-hf writes floats' if to_hf else '--verify compares what was not rounded'}, and --quantization is "
            f"{quantization}; leave one of them out"
        )
    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    recipe = recipe_for(checkpoint, quantization)
    target = resolve_dtype(dtype, checkpoint.dtype)
    count = num_params(recipe.spec)
    num_bytes = stored_bytes(in_floats(recipe.spec) if to_hf else recipe.spec, target)
    final = Path(destination).expanduser()
    fill = write_hf if to_hf else write_native
    with new_folder(final, checkpoint.path, num_bytes=num_bytes, overwrite=overwrite) as folder:
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=final.name, disable=not show_progress) as bar:
            fill(folder, checkpoint, recipe, target, bar.update)
        write_gguf_tokenizer(folder, checkpoint)
        comparison = _verify(checkpoint, recipe, folder, target) if verify else None
    family = str(checkpoint.config.get("model_type"))
    return Conversion(family, count, num_bytes, time.perf_counter() - start, final, comparison)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, for `jaxpaged convert` too."""
    parser.add_argument(
        "source", metavar="SRC", help="a Hugging Face folder, a native folder, a .gguf file or a hub id"
    )
    parser.add_argument("destination", metavar="DST", help="the folder to write; appears only when it is complete")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="what to store (default: as SRC)")
    parser.add_argument(
        "--quantization", "-q", choices=get_args(WeightDtype), help="store the weights of products in 8 or 4 bits"
    )
    parser.add_argument("--to-hf", action="store_true", help="write a Hugging Face folder instead of a native one")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers' (needs torch)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint folder")


def run(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say and print a summary. Raises CheckpointError."""
    # A conversion that is terminated cleans up as one that is interrupted.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = convert(
            args.source,
            args.destination,
            dtype=args.dtype,
            quantization=args.quantization,
            to_hf=args.to_hf,
            verify=args.verify,
            overwrite=args.overwrite,
            show_progress=True,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    size = f"{done.num_params:,} parameters, {done.num_bytes:,} bytes"
    print(f"{done.destination}: {done.family}, {size}, {done.seconds:.1f} s")
    if done.comparison is not None:
        print(f"max logit error {done.comparison.max_error:.2e}, largest logit {done.comparison.max_logit:.2f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; errors are one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.convert", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except JaxpagedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130


def write_gguf_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """The tokenizer that a GGUF file holds, as files of `folder`; nothing for other checkpoints, which have files."""
    if checkpoint.format != "gguf":
        return
    tokenizer = load_tokenizer(gguf_metadata(checkpoint.path))
    if tokenizer is None:
        return
    write_tokenizer(
        folder,
        tokenizer.backend.to_str(),
        chat_template=tokenizer.chat_template,
        named_tokens=tokenizer.named_tokens,
        eos_token_ids=sorted(tokenizer.eos_token_ids),
    )


def _verify(source: Checkpoint, recipe: Recipe, folder: Path, dtype: np.dtype[np.generic]) -> Comparison:
    """What was written against transformers, which reads the source or, where that is native, what was written."""
    written = open_checkpoint(folder)
    reference = written if source.format == "native" else source
    if reference.format == "native":
        raise CheckpointError("--verify compares with transformers, but neither side is its format; add --to-hf")
    tokens = sample_tokens(recipe.spec.vocab_size, recipe.spec.max_positions)
    # Both sides hold weights rounded to dtype and compute in float32, so that only mistakes tell.
    ours = load(
        source.path if reference is written else folder,
        dtype=dtype.name,
        put_for=lambda spec: lambda path, leaf, read: jnp.asarray(whole(leaf, read), jnp.float32),
    )
    logits = np.asarray(apply(ours.params, jnp.asarray(tokens), ours.spec))
    found = compare(logits, reference_logits(reference, tokens, dtype.name))
    if not found.agrees:
        advice = (
            "; transformers does not read all of a GGUF's metadata: convert --to-hf, and verify from there"
            if reference.format == "gguf"
            else ""
        )
        raise CheckpointError(
            f"logits differ from transformers' by {found.max_error:.2e} (the largest is {found.max_logit:.2f}), "
            f"so nothing was written{advice}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
