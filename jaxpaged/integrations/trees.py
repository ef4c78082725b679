"""Anybody's pytree of weights as our params, and params as anybody's tree, told by the leaves' names alone.

A tree may be a nested dict, a flax nnx State or Module, linen variables, an equinox module: whatever names its leaves.
Names are ours (`layers.0.mixer.q.w`), and then the arrays themselves are handed over; or a family's as Hugging Face has
them (`model.layers.0.self_attn.q_proj.weight`, [out, in]), which the converter's table of that family reads in both
directions; or those in flax's dialect of them (`layers_0`, and `kernel` [in, out], `embedding`, `scale`).
"""

from __future__ import annotations

import re
from typing import Any

import jax

from jaxpaged.convert.families import FAMILIES
from jaxpaged.convert.rules import Rule, hf_shapes, load_leaves, store_tensors
from jaxpaged.errors import ConfigError
from jaxpaged.model.params import Params, check_params, flatten, in_floats, map_specs, param_specs
from jaxpaged.model.spec import Decoder

_WRAPPERS = ("params.", "raw_value", "value")
_FLAX = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def to_params(tree: Any, spec: Decoder, family: str | None = None) -> Params:
    """The params of `spec` that `tree` holds; leaves with our own names are the same arrays, not copies.

    `family` (an HF `model_type`, such as "llama") says which names they are where they are not ours. Raises ConfigError
    that lists what is missing, left over or of another shape.
    """
    named = {_plain(name): leaf for name, leaf in _named(tree)}
    spec = spec if any(name.endswith(".w.values") for name in named) else in_floats(spec)
    ours = dict(flatten(param_specs(spec)))
    if family is None:
        _check(f"names that are ours{_hint(named)}", _misfits({p: s.shape for p, s in ours.items()}, _shapes(named)))
        return map_specs(lambda path, _: named[path], spec)
    theirs = dict(_as_hf(name, leaf) for name, leaf in named.items())
    rules = _rules(spec, family, theirs)
    want = hf_shapes(rules, spec)
    extra = {name for name in theirs.keys() - want.keys() if FAMILIES[family].ignores(name, spec)}
    theirs = {name: leaf for name, leaf in theirs.items() if name not in extra}
    _check(f"the names of {family}", _misfits(want, _shapes(theirs)))
    leaves = dict(load_leaves(rules, theirs.__getitem__))
    return map_specs(lambda path, _: leaves[path], spec)


def to_tree(params: Params, spec: Decoder, like: Any, family: str | None = None) -> Any:
    """`params` as a tree with the structure and names of `like`, whose own leaves only serve as a pattern.

    Leaves of `like` that hold no weights, such as buffers, stay. Raises ConfigError where names do not fit.
    """
    _check("the spec's params", check_params(spec, params))
    ours = dict(flatten(params))
    names = [name for name, _ in _named(like)]
    if family is None:
        found = {name: ours.get(_plain(name)) for name in names}
        covered = {_plain(name) for name in names}
        left = ours.keys() - covered
    else:
        rules = _rules(spec, family, {_as_hf(_plain(name), None)[0]: None for name in names})
        tensors = dict(store_tensors(rules, ours.__getitem__))
        found = {name: _in_dialect(name, tensors) for name in names}
        left = tensors.keys() - {_as_hf(_plain(name), None)[0] for name in names}
    _check("the tree's names", [f"no place for {name}" for name in sorted(left)])
    leaves, structure = jax.tree.flatten(like)
    new = [leaf if found[name] is None else found[name] for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def names(tree: Any) -> list[str]:
    """The names of a tree's leaves, in its own order, without what libraries put around them."""
    return [_plain(name) for name, _ in _named(tree)]


def _named(tree: Any) -> list[tuple[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(".".join(_key(key) for key in path), leaf) for path, leaf in paths]


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _plain(name: str) -> str:
    """Without what a library puts around a name: a collection before it, a variable's value behind it."""
    return re.sub(r"\.(raw_value|value)$", "", re.sub(r"^params\.", "", name))


def _as_hf(name: str, leaf: Any) -> tuple[str, Any]:
    """An HF name and tensor for one of flax's; others are as they are."""
    head, _, last = name.rpartition(".")
    hf_name = re.sub(r"\b([a-z]+)_(\d+)\b", r"\1.\2", f"{head}.{_FLAX.get(last, last)}".removeprefix("."))
    return hf_name, leaf.T if last == "kernel" and leaf is not None else leaf


def _in_dialect(name: str, tensors: dict[str, Any]) -> Any:
    plain = _plain(name)
    tensor = tensors.get(_as_hf(plain, None)[0])
    return tensor.T if tensor is not None and plain.endswith(".kernel") else tensor


def _rules(spec: Decoder, family: str, names: Any) -> list[Rule]:
    if family not in FAMILIES:
        raise ConfigError(f"family is {family!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family].rules(spec, names)


def _shapes(named: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(leaf, "shape", ())) for name, leaf in named.items()}


def _misfits(want: dict[str, tuple[int, ...]], have: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"missing {name} {want[name]}" for name in want if name not in have]
    problems += [f"unexpected {name} {have[name]}" for name in have if name not in want]
    return problems + [
        f"{name} has shape {have[name]}, needs {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]


def _hint(named: dict[str, Any]) -> str:
    return (
        " (name the family if they are Hugging Face's)" if any(n.endswith(("weight", "kernel")) for n in named) else ""
    )


def _check(what: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"the tree does not fit {what}: " + "; ".join(problems))
