"""LoRA adapters as PEFT saves them, as factors of our linears: names and fusions go by the family's own rules.

A module's `lora_A` [r, in] and `lora_B` [out, r] say B A is added to its [out, in] weight, so our [in, out] leaf gets
A.T times those columns of B.T that are the leaf's part of the module: all, or some where HF fuses several linears.
What would be left out, such as DoRA's magnitudes or a trained bias, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.convert.checkpoint import locate
from jaxpaged.convert.families import family_of
from jaxpaged.convert.rules import Part
from jaxpaged.convert.safetensors_reader import parse_json, read_file
from jaxpaged.convert.stored_tensor import Array, StoredTensor
from jaxpaged.errors import CheckpointError
from jaxpaged.model.lora import Adapter, Factors, adaptable
from jaxpaged.model.params import in_floats
from jaxpaged.model.spec import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_OTHER_BASES = ("pissa", "olora", "corda", "loftq")
"""Ways to begin that change the base weights, which then are not those that are served."""


class _Target(NamedTuple):
    """A linear of ours, as a part of an HF module."""

    path: str
    part: Part


def read_adapter(path: str | Path, spec: Decoder, config: Mapping[str, Any]) -> Adapter:
    """The adapter in a folder, or of a hub id, for the model of this HF config; its scale is in `b`.

    Raises CheckpointError, one line that says what to do, where it is none, or changes more than linears that we adapt.
    """
    folder = locate(path)
    settings = _settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; save the adapter with safetensors")
    tensors = read_file(folder / WEIGHTS)
    targets = _targets(spec, config)
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        module = found["module"] if found else name
        if found is None or module not in targets:
            raise CheckpointError(
                f"{folder} changes {module}, which takes no adapter here; train one without it, or merge the adapter"
            )
        halves.setdefault(module, {})[found["which"]] = tensor
    adapter: dict[str, Factors] = {}
    for module, pair in halves.items():
        a, b = _read_pair(folder, module, pair, settings)
        adapter |= {target.path: _part(folder, module, a, b, target, spec) for target in targets[module]}
    return adapter


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        settings = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror or error}; name a folder that PEFT saved an adapter to"
        ) from error
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {settings.get('peft_type')!r}; only 'LORA' is served")
    refused = {
        "use_dora": "DoRA's magnitudes are not served",
        "modules_to_save": "whole modules that an adapter replaces are not served",
        "lora_bias": "biases of an adapter are not served",
        "trainable_token_indices": "changed embeddings are not served",
        "alora_invocation_tokens": "adapters that begin inside of a prompt are not served",
    }
    for name, why in refused.items():
        if settings.get(name):
            raise CheckpointError(f"{file}: {name} is {settings[name]!r:.80}, and {why}; merge the adapter instead")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(
            f"{file}: bias is {settings['bias']!r}, and trained biases are not served; merge the adapter instead"
        )
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_OTHER_BASES):
        raise CheckpointError(
            f"{file}: init_lora_weights is {begun!r}, which changes the base weights; convert it to a plain adapter "
            "(PEFT: path_initial_model_for_weight_conversion)"
        )
    return settings


def _targets(spec: Decoder, config: Mapping[str, Any]) -> dict[str, list[_Target]]:
    """HF module -> our linears that are parts of it."""
    weights = {f"{path}.w": path for path in adaptable(spec)}
    found: dict[str, list[_Target]] = {}
    for rule in family_of(config).rules(in_floats(spec), ()):
        parts = zip(rule.paths, rule.parts or (), strict=False)
        targets = [_Target(weights[path], part) for path, part in parts if path in weights and isinstance(part, Part)]
        if len(targets) == len(rule.paths) and not rule.stacks:
            found[rule.sources[0].removesuffix(".weight")] = targets
    return found


def _read_pair(
    folder: Path, module: str, pair: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[Array, Array]:
    """lora_A [r, in], and lora_B [out, r] times the scale."""
    if missing := {"A", "B"} - pair.keys():
        raise CheckpointError(f"{folder / WEIGHTS} lacks lora_{missing.pop()} of {module}; save the adapter again")
    a, b = (pair[which].read().astype(np.float32) for which in "AB")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, needs [r, in] and "
            "[out, r]; save the adapter again"
        )
    return a, b * np.float32(_scale(folder, module, len(a), settings))


def _scale(folder: Path, module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r); alpha may be another one for modules whose names end as a pattern says."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{folder / CONFIG}: alpha_pattern is {patterns!r:.80}; it must be an object")
    alpha = settings.get("lora_alpha")
    for pattern, value in patterns.items():
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise CheckpointError(f"{folder / CONFIG}: alpha_pattern {pattern!r} is no pattern: {error}") from None
        if matches:
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"{folder / CONFIG}: lora_alpha is {alpha!r:.80}; it must be a finite number")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _part(folder: Path, module: str, a: Array, b: Array, target: _Target, spec: Decoder) -> Factors:
    """The factors of one of our linears in a module."""
    rows, columns = adaptable(spec)[target.path].shape
    try:
        part = b.T[:, target.part.columns]
    except IndexError:
        part = b.T[:, :0]
    if a.shape[1] != rows or part.shape[1] != columns:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which do not fit "
            f"{target.path} [{rows}, {columns}]; the adapter is of another model"
        )
    return Factors(a.T, part)
