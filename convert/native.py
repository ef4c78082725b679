"""Checkpoints on the way out: our native folder, or a Hugging Face one, whole or not at all.

A native folder holds model.safetensors (the leaves under their own paths; sharded where large), spec.json (everything
the model is), hf_config.json (the HF config it came with), and the tokenizer and generation files as they were.
Quantised weights lie there as they are; on the way to Hugging Face's format they become floats again.
"""

from __future__ import annotations

import errno
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.convert.checkpoint import CONFIG, HF_CONFIG, SPEC, Checkpoint
from jaxpaged.convert.families import family_of
from jaxpaged.convert.load import Recipe, leaf_dtypes, leaves
from jaxpaged.convert.rules import hf_shapes, load_leaves, store_tensors
from jaxpaged.convert.safetensors_reader import inside
from jaxpaged.convert.safetensors_writer import MAX_SHARD_BYTES, write_folder
from jaxpaged.convert.stored_tensor import Array
from jaxpaged.errors import CheckpointError
from jaxpaged.model.params import Params, check_params, flatten, in_floats, param_specs
from jaxpaged.model.quantized import Quantized, dequantize
from jaxpaged.model.spec import Decoder, to_json

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

Progress = Callable[[int], object]


def write_native(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    dtype: np.dtype[Any],
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill `folder` with the checkpoint in our own format, floats as `dtype`."""
    shapes, dtypes = native_shapes(recipe), leaf_dtypes(recipe.spec, dtype)
    tensors, metadata = leaves(checkpoint, recipe, dtype), {"format": "jaxpaged"}
    write_folder(folder, shapes, dtypes, tensors, metadata=metadata, progress=progress, max_shard_bytes=max_shard_bytes)
    (folder / SPEC).write_text(to_json(recipe.spec), encoding="utf-8")
    _write_json(folder / HF_CONFIG, text_config(checkpoint.config))
    _copy_side_files(checkpoint, folder)


def native_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The tensors of a native folder, in the order in which `leaves` gives them."""
    specs = dict(flatten(param_specs(recipe.spec)))
    stored = [path for rule in recipe.rules for path in rule.paths]
    paths = [name for path in stored for name in (path, f"{path}.values", f"{path}.scale") if name in specs]
    return {path: specs[path].shape for path in paths}


def stored_bytes(spec: Decoder, dtype: np.dtype[Any]) -> int:
    """Bytes of a native folder's tensors, floats as `dtype`."""
    dtypes = leaf_dtypes(spec, dtype)
    return sum(math.prod(leaf.shape) * dtypes[path].itemsize for path, leaf in flatten(param_specs(spec)))


def write_hf(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    dtype: np.dtype[Any],
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill `folder` with the checkpoint as transformers reads it, quantised weights as floats."""
    if not checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.path} has no {HF_CONFIG}, which the way back needs; convert the original again"
        )
    config = text_config(checkpoint.config)
    family = family_of(config)
    spec = in_floats(recipe.spec)
    if family.spec(config) != spec:
        raise CheckpointError(
            f"{checkpoint.path}: {HF_CONFIG} and {SPEC} describe different models; convert the original again"
        )
    rules = family.rules(spec, ())
    shapes = hf_shapes(rules, spec)
    tensors = store_tensors(rules, _LeafReader(checkpoint, recipe).read)
    own = leaf_dtypes(spec, dtype)
    dtypes = {name: own[rule.paths[0]] for rule in rules for name in rule.sources}
    metadata = {"format": "pt"}  # transformers before version 5 refuses a file without it
    write_folder(folder, shapes, dtypes, tensors, metadata=metadata, progress=progress, max_shard_bytes=max_shard_bytes)
    old = {key: value for key, value in config.items() if key != "torch_dtype"}
    _write_json(folder / CONFIG, old | {"dtype": dtype.name})
    _copy_side_files(checkpoint, folder)


def save_params(path: str | Path, spec: Decoder, params: Params) -> None:
    """Write a new native folder with `params`, of whatever devices of this process they lie on, leaf by leaf.

    Raises CheckpointError where there is something already, or where `params` are not the spec's own.
    """
    if problems := check_params(spec, params):
        raise CheckpointError(f"the params do not fit the spec: {problems[0]} ({len(problems):,} misfits in all)")
    given, specs = dict(flatten(params)), dict(flatten(param_specs(spec)))
    floats = (leaf for path, leaf in given.items() if specs[path].dtype is None)
    dtype = np.dtype(max(floats, key=lambda leaf: leaf.size).dtype)
    dtypes, num_bytes = leaf_dtypes(spec, dtype), stored_bytes(spec, dtype)
    final = Path(path).expanduser()
    with new_folder(final, None, num_bytes=num_bytes, overwrite=False) as folder:
        write_folder(
            folder,
            {name: leaf.shape for name, leaf in given.items()},
            dtypes,
            ((name, np.asarray(leaf)) for name, leaf in given.items()),
            metadata={"format": "jaxpaged"},
            progress=lambda num_bytes: None,
        )
        (folder / SPEC).write_text(to_json(spec), encoding="utf-8")


class _LeafReader:
    """Leaves by path, in floats, whatever the checkpoint's format; those of one tensor are kept together, no others."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe):
        self.checkpoint = checkpoint
        self.rules = {path: rule for rule in recipe.rules for path in rule.paths}
        self.kept: dict[str, Array] = {}

    def read(self, path: str) -> Array:
        if f"{path}.values" in self.rules:
            values, scale = (self.read(f"{path}.{part}") for part in Quantized._fields)
            floats: Array = dequantize(Quantized(values, scale), np.float32)
            return floats
        if path not in self.kept:
            self.kept = dict(load_leaves([self.rules[path]], self.checkpoint.read))
        return self.kept[path]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model alone, where the checkpoint holds more than that (Gemma 3 with vision)."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return dict(config)
    shared = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    outer = {key: config[key] for key in shared if key in config}
    return outer | {"model_type": f"{config.get('model_type')}_text"} | inner


@contextmanager
def new_folder(destination: Path, source: Path | None, *, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A folder beside `destination` that takes its place if the body succeeds, and is gone if it fails.

    Raises CheckpointError where the destination may not be written or has no room for `num_bytes`.
    """
    destination = destination.absolute()
    _check_destination(destination, source, num_bytes, overwrite)
    aside = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
    try:
        aside.mkdir()
        yield aside
        _put_in_place(aside, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(
                f"no room for {num_bytes:,} bytes at {destination.parent} ({error.strerror}); nothing was left there: "
                f"free some space or write elsewhere"
            ) from error
        raise CheckpointError(
            f"cannot write {destination}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, destination: Path) -> None:
    """Rename; what was there is removed last, and comes back where the new one cannot take its place."""
    if not destination.exists():
        aside.rename(destination)
        return
    replaced = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.replaced")
    destination.rename(replaced)
    try:
        aside.rename(destination)
    except BaseException:
        replaced.rename(destination)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write_tokenizer(
    folder: Path,
    tokenizer_json: str,
    *,
    chat_template: str | None,
    named_tokens: Mapping[str, str],
    eos_token_ids: Sequence[int],
) -> None:
    """The tokenizer files of a checkpoint that had none: one made from a GGUF's metadata."""
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    template = {"chat_template": chat_template} if chat_template is not None else {}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **named_tokens, **template},
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": list(eos_token_ids)})


def _check_destination(destination: Path, source: Path | None, num_bytes: int, overwrite: bool) -> None:
    if not destination.parent.is_dir():
        raise CheckpointError(
            f"cannot write {destination}: the folder {destination.parent} does not exist; make it first"
        )
    target = destination.resolve()
    if source is not None and target in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(f"{destination} holds the source {source}; choose another destination")
    if destination.exists():
        if not overwrite:
            raise CheckpointError(f"{destination} exists; choose another destination or pass --overwrite")
        ours = destination.is_dir() and any((destination / name).exists() for name in (SPEC, CONFIG))
        if not ours and not (destination.is_dir() and not any(destination.iterdir())):
            raise CheckpointError(
                f"{destination} is no checkpoint folder, so it is not overwritten; remove it yourself"
            )
    if (free := shutil.disk_usage(destination.parent).free) < num_bytes:
        raise CheckpointError(
            f"{destination.parent} has {free:,} bytes free, the checkpoint takes {num_bytes:,}; "
            f"free some space or write elsewhere"
        )


def _copy_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.format == "gguf":
        return
    for name in SIDE_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(inside(checkpoint.path, name, checkpoint.path), folder / name)
    generation = folder / "generation_config.json"
    if not generation.exists():
        # A native folder has no config.json to tell the tokenizer where an answer ends.
        known = {key: checkpoint.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(generation, {key: value for key, value in known.items() if value is not None})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
