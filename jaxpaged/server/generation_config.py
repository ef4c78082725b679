"""Sampling parameters that a checkpoint's makers recommend: what requests get that say nothing themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpaged.convert.checkpoint import locate
from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.sampling_params import SamplingParams

FILE = "generation_config.json"
NAMES = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Theirs -> ours."""


def sampling_defaults(source: str, model: str | Path) -> Mapping[str, Any]:
    """Those of the model's own file with "auto", none with "vllm", else those of another folder. Raises ConfigError."""
    if source == "vllm":
        return {}
    folder = locate(model) if source == "auto" else Path(source)
    path = folder / FILE
    if source == "auto" and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        given = {ours: found[theirs] for theirs, ours in NAMES.items() if found.get(theirs) is not None}
        SamplingParams(**given)
    except (OSError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, RequestError) else " ".join(str(error).split())
        raise ConfigError(f"cannot use {path}: {reason}; mend it, or give --generation-config vllm") from None
    return given
