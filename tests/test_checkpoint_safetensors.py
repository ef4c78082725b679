"""Reading Hugging Face folders: what safetensors wrote comes back, and bad ones give CheckpointError only."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.convert.checkpoint import open_checkpoint
from jaxpaged.convert.safetensors_reader import read_file
from jaxpaged.errors import CheckpointError

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64", "int64", "int8", "uint8", "bool")
CONFIG = {"model_type": "llama", "hidden_size": 4}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": rng.standard_normal((6, 4), np.float32),
        "model.norm.weight": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
        "lm_head.weight": rng.standard_normal((6, 4)).astype(np.float16),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    safetensors.numpy.save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of one file per tensor, and their index."""
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors())}
    for name, file in weight_map.items():
        safetensors.numpy.save_file({name: tensors()[name]}, tmp_path / file)
    write_index(tmp_path, weight_map)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def error_of(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    saved = np.arange(24).reshape(2, 3, 4).astype(getattr(ml_dtypes, dtype, dtype))
    safetensors.numpy.save_file({"x": saved}, tmp_path / "model.safetensors")

    read = read_file(tmp_path / "model.safetensors")["x"].read()

    assert read.dtype == saved.dtype
    assert read.tobytes() == saved.tobytes()
    assert read.shape == (2, 3, 4)


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_a_folder_gives_its_tensors_one_by_one(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(layout))

    assert checkpoint.format == "hf"
    assert checkpoint.config == CONFIG
    assert checkpoint.names == tensors().keys()
    assert checkpoint.nbytes == sum(x.nbytes for x in tensors().values())
    for name, saved in tensors().items():
        assert checkpoint.shape(name) == saved.shape
        np.testing.assert_array_equal(checkpoint.read(name), saved)


def test_the_dtype_is_that_of_most_bytes(folder: Path) -> None:
    assert open_checkpoint(folder).dtype == np.float32


def test_the_hub_cache_may_link_out_of_its_folders(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tmp_path_factory.mktemp("models--org--name")
    snapshot, blobs = model / "snapshots" / "0a1b", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))

    assert open_checkpoint(snapshot).names == tensors().keys()


def test_a_path_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    assert "does not exist; pass a checkpoint's folder" in error_of(tmp_path / "absent")


def test_a_hub_id_that_cannot_be_fetched_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = error_of("some-org/some.model")
    assert "some-org/some.model is no path here" in message
    assert "no connection" in message
    assert "\n" not in message


def test_a_hub_id_opens_the_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(folder))
    assert open_checkpoint("some-org/some.model").path == folder


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "is empty; a checkpoint folder holds config.json and model.safetensors"),
        (["pytorch_model.bin", "config.json"], "only pickled weights (pytorch_model.bin)"),
        (["model-q4.gguf"], "pass that file itself"),
        (["consolidated.safetensors", "config.json"], "has neither model.safetensors nor model.safetensors.index.json"),
        (["README.md"], "has no model.safetensors (found README.md)"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_has(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert says in error_of(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a": 1, "a": 2}', "[" * 100_000, "\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in error_of(folder)


def test_weights_without_a_config_are_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has weights but no config.json" in error_of(folder)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
            "modeling_x.XForCausalLM), which we never do",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights (gptq)"),
    ],
)
def test_what_we_never_read_is_refused(folder: Path, extra: dict[str, Any], says: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | extra))
    assert says in error_of(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "fetch it again" in error_of(folder)


def test_a_file_cut_short_after_it_was_opened_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-80])
    with pytest.raises(CheckpointError, match="cut short while being read"):
        for name in checkpoint.names:
            checkpoint.read(name)


@pytest.mark.parametrize("length", [9, 10**6, 2**62, 2**64 - 1])
def test_a_header_of_lying_length_is_refused(folder: Path, length: int) -> None:
    raw_file(folder / "model.safetensors", {"x": entry(0, 4, [1])}, bytes(4), length)
    assert "model.safetensors" in error_of(folder)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, "offsets overlap"),
        ({"a": entry(0, 4, [1]), "b": entry(6, 10, [1])}, "leave a hole"),
        ({"a": entry(0, 400, [100])}, "cut short"),
        ({"a": entry(0, 4, [1])}, "followed by something else"),
        ({"a": entry(4, 0, [1])}, "not [begin, end]"),
        ({"a": entry(-4, 0, [1])}, "not [begin, end]"),
        ({"a": entry(0, 8, [1])}, "spans 8 bytes, but F32 [1] takes 4"),
        ({"a": entry(0, 8, [2**40, 2**40])}, "spans 8 bytes"),
        ({"a": entry(0, 8, [-2])}, "not a list of sizes"),
        ({"a": entry(0, 8, [True, 2])}, "not a list of sizes"),
        ({"a": entry(0, 8, "2")}, "not a list of sizes"),  # type: ignore[arg-type]
        ({"a": entry(0, 8, [2], "F31")}, "dtype 'F31', which we cannot read"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "is not described by"),
        ({"a": 3}, "is not described by"),
        ([], "is a JSON list"),
        (b'{"a": 1, "a": 2}', "a key appears twice"),
        (b"\xff\xff", "not valid JSON"),
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(folder: Path, header: Any, says: str) -> None:
    raw_file(folder / "model.safetensors", header, bytes(8))
    message = error_of(folder)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "sub/../../out.safetensors", "link", "", 3, "a\0b"]
)
def test_an_index_that_names_what_lies_outside_its_folder_is_refused(sharded: Path, name: Any) -> None:
    outside = sharded.parent / "out.safetensors"
    safetensors.numpy.save_file({"lm_head.weight": np.zeros(4, np.float32)}, outside)
    (sharded / "link").symlink_to(outside)
    write_index(sharded, {"lm_head.weight": name})
    message = error_of(sharded)
    assert repr(name) in message
    assert "\n" not in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    assert "lacks 1 of the 3 files that model.safetensors.index.json names: model-1.safetensors" in error_of(sharded)


def test_tensors_that_a_shard_lacks_are_all_named(sharded: Path) -> None:
    here = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors())}
    write_index(sharded, here | {"first": "model-0.safetensors", "second": "model-0.safetensors"})
    message = error_of(sharded)
    assert "lacks 2 tensors" in message
    assert "first" in message
    assert "second" in message


def test_a_tensor_held_by_two_shards_is_refused(sharded: Path) -> None:
    shutil.copyfile(sharded / "model-0.safetensors", sharded / "model-1.safetensors")
    write_index(sharded, {"model.embed_tokens.weight": "model-0.safetensors", "x": "model-1.safetensors"})
    assert "lacks 1 tensors" in error_of(sharded)
    write_index(
        sharded, {"model.embed_tokens.weight": "model-0.safetensors"} | {"lm_head.weight": "model-2.safetensors"}
    )
    safetensors.numpy.save_file(tensors(), sharded / "model-2.safetensors")
    assert "both hold model.embed_tokens.weight" in error_of(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    assert "has no weight_map" in error_of(sharded)


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255)), max_size=4))
def test_a_damaged_file_gives_tensors_or_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    safetensors.numpy.save_file(tensors(), file)
    data = bytearray(file.read_bytes())
    for at, bits in flips:
        data[at % len(data)] ^= bits
    file.write_bytes(data[: len(data) - cut])
    try:
        found = read_file(file)
    except CheckpointError:
        return
    assert sum(tensor.read().nbytes for tensor in found.values()) <= len(data)
