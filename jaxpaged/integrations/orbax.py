"""Orbax checkpoints: params under their own names beside the spec, and those that other trainers wrote.

Our own is an Orbax `StandardCheckpointer` tree in a folder with `spec.json`, so that any Orbax program reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpaged.errors import CheckpointError
from jaxpaged.integrations import trees
from jaxpaged.model.params import Params
from jaxpaged.model.spec import Decoder, from_json, to_json

_SPEC, _TREE = "spec.json", "params"


def save(path: str | Path, spec: Decoder, params: Params) -> None:
    """Write a new folder with `spec` and `params`. Raises CheckpointError where there is something already."""
    folder = Path(path).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder} exists; choose another place, or remove it")
    folder.mkdir(parents=True)
    (folder / _SPEC).write_text(to_json(spec), encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _TREE, dict(params))


def load(path: str | Path) -> tuple[Decoder, Params]:
    """What `save` wrote: a (spec, params) pair, as `LLM` takes it."""
    folder = Path(path).absolute()
    try:
        spec = from_json((folder / _SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _SPEC} does not describe a model ({error}); save it again") from error
    return spec, load_tree(folder / _TREE, spec)


def load_tree(path: str | Path, spec: Decoder, family: str | None = None, *, inside: str | None = None) -> Params:
    """The params of `spec` from a tree that any trainer saved, its names as `trees.to_params` reads them.

    `inside` names the part of the checkpoint that holds the weights, where it holds more (an optimizer's state).
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name one that Orbax wrote")
    with ocp.StandardCheckpointer() as checkpointer:
        tree: Any = checkpointer.restore(folder)
    if inside is not None:
        if inside not in tree:
            raise CheckpointError(f"{folder} holds {', '.join(sorted(tree))}, and no {inside}; name one of them")
        tree = tree[inside]
    return trees.to_params(jax.tree.map(jax.numpy.asarray, tree), spec, family)
