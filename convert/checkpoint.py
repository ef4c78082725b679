"""A checkpoint on disk, whatever its format: its config, and its tensors under Hugging Face names, read when asked for.

Three formats: a Hugging Face folder ("hf"), our own folder ("native", told by its spec.json; its tensors bear the names
of our leaves) and one GGUF file ("gguf"). A string that looks like `org/name` and is no path is fetched from the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxpaged.convert.fp8_blocks import fp8_blocks, scaled_by_blocks
from jaxpaged.convert.gguf_architectures import gguf_config, gguf_tensors
from jaxpaged.convert.gguf_reader import read_gguf
from jaxpaged.convert.safetensors_reader import parse_json, read_folder
from jaxpaged.convert.stored_tensor import Array, StoredTensor
from jaxpaged.errors import CheckpointError

Format = Literal["hf", "native", "gguf"]

SPEC = "spec.json"
CONFIG = "config.json"
HF_CONFIG = "hf_config.json"
"""The HF config in a native folder, needed on the way back only. Under its usual name transformers would take the
folder for one of its own, find no weight that it knows, and make some up."""

_KNOWN_CODE = re.compile(r"(configuration|modeling)_deepseek\.\w+")
"""What DeepSeek's checkpoints bring along though nobody needs it: it says what the family of that name computes."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. Nothing is open and no weight is in memory; `read` fetches one tensor."""

    path: Path
    format: Format
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def names(self) -> frozenset[str]:
        """The tensors' names."""
        return frozenset(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors take in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The dtype that most bytes are stored as, None where that is a quantised format; of a native folder's weights
        those that are not quantised count.
        """
        sizes: dict[np.dtype[Any] | None, int] = {}
        for name, tensor in self.tensors.items():
            if self.format == "native" and name.endswith((".w.values", ".w.scale")):
                continue
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=None)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read(name)` will have."""
        return self.tensors[name].shape

    def read(self, name: str) -> Array:
        """One tensor, in its stored dtype; a quantised one as float32."""
        return self.tensors[name].read()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint and check its headers. Raises CheckpointError, one line that says what to do."""
    found = locate(path)
    if found.is_file():
        return _open_gguf(found)
    if orbax_tree(found) is not None:
        raise CheckpointError(
            f"{found} is an Orbax checkpoint, which LLM and the commands that answer take as it is; "
            "jaxpaged.integrations.orbax reads it too"
        )
    if (found / SPEC).is_file():
        config = _read_config(found / HF_CONFIG) if (found / HF_CONFIG).exists() else {}
        return Checkpoint(found, "native", config, read_folder(found))
    config, tensors = read_config(found), read_folder(found)
    if (blocks := fp8_blocks(config)) is not None:
        tensors = scaled_by_blocks(tensors, *blocks)
    return Checkpoint(found, "hf", {k: v for k, v in config.items() if k != "quantization_config"}, tensors)


def orbax_tree(path: str | Path) -> Path | None:
    """Where in a folder a tree lies that Orbax saved, None where none does. `integrations.orbax` reads it."""
    folders = (Path(path).expanduser() / name for name in (".", "params", "default"))
    try:
        return next((folder for folder in folders if (folder / "_METADATA").is_file()), None)
    except OSError:  # no name of a file: whoever opens it will say so
        return None


def orbax_spec(folder: Path) -> Path | None:
    """The file that says what an Orbax checkpoint is of, beside it or up to two folders above: a run has one."""
    files = (above / SPEC for above in (folder, *folder.absolute().parents[:2]))
    return next((file for file in files if file.is_file()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a Hugging Face folder. Raises CheckpointError where it is none that we can serve."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(_no_config(folder))
    config = _read_config(folder / CONFIG)
    _refuse_remote_code(config, folder / CONFIG)
    _refuse_quantised(config, folder / CONFIG)
    return config


def locate(path: str | Path, *, with_weights: bool = True) -> Path:
    """The folder or file on this machine; a hub id is fetched. Raises CheckpointError where there is none."""
    local = Path(path).expanduser()
    try:
        if local.exists():
            return local
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot look at {str(path)!r}: {error}") from error
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return _fetch(path, _HUB_FILES if with_weights else [CONFIG, SPEC])
    raise CheckpointError(f"{path} does not exist; pass a checkpoint's folder, a .gguf file or a hub id (org/name)")


def _fetch(hub_id: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id} is no path here, and the hub did not give it ({type(error).__name__}: {reason}); "
            f"check the name and the connection, or pass a folder"
        ) from error


def _open_gguf(path: Path) -> Checkpoint:
    if path.name.endswith(".safetensors"):
        raise CheckpointError(
            f"{path} is one file of a checkpoint; pass its folder {path.parent}, which has config.json"
        )
    file = read_gguf(path)
    config = gguf_config(path, file)
    return Checkpoint(path, "gguf", config, gguf_tensors(path, file, config))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; fetch the file again") from error


def _refuse_remote_code(config: dict[str, Any], path: Path) -> None:
    asked = config.get("auto_map", {})
    if isinstance(asked, dict) and all(_KNOWN_CODE.fullmatch(str(name)) for name in asked.values()):
        return
    if "auto_map" in config:
        names = ", ".join(str(name) for name in asked.values()) if isinstance(asked, dict) else str(asked)
        raise CheckpointError(
            f"{path} asks to run code that comes with the checkpoint (auto_map: {names}), which we never do; "
            f"if {config.get('model_type')!r} is a plain architecture, delete auto_map from the file and try again"
        )


def _refuse_quantised(config: dict[str, Any], path: Path) -> None:
    quantised = config.get("quantization_config")
    if quantised and fp8_blocks(config) is None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{path} describes quantised weights ({method}), which we do not read; "
            f"pass the unquantised checkpoint or a GGUF file"
        )


def _no_config(folder: Path) -> str:
    try:
        read_folder(folder)
    except CheckpointError as error:
        return str(error)  # names what lies there instead of weights, the more telling of the two
    return f"{folder} has weights but no {CONFIG}, so their architecture is unknown; fetch it from where they come from"
