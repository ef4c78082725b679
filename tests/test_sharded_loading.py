"""Loading onto a mesh: parts of tensors equal the whole ones' parts, and no other byte is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from real_model import smollm2_gguf
from test_convert_gguf import ARCHITECTURES, write_gguf
from test_families import tiny
from tiny_models import CASES, write_checkpoint

from jaxpaged.convert import stored_tensor
from jaxpaged.convert.__main__ import convert
from jaxpaged.convert.checkpoint import Checkpoint, open_checkpoint
from jaxpaged.convert.load import leaves, load, readers, recipe_for
from jaxpaged.convert.rules import Rule
from jaxpaged.convert.stored_tensor import BYTES_READ
from jaxpaged.model.head_layout import fit_leaf, fitted_axes
from jaxpaged.model.params import flatten
from jaxpaged.model.sharding import Placement, parallel

FLOAT32 = np.dtype(np.float32)
FUSED = ("phi3", "gpt_neox", "gpt2", "llama_9_heads_3_kv_head_dim_24")


def some_of(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Some indices along each axis, out of order in every other one."""
    rng = np.random.default_rng(len(shape))
    some = [np.sort(rng.choice(size, max(1, size // 3), replace=False)) for size in shape]
    return [index[::-1] if axis % 2 else index for axis, index in enumerate(some)]


def assert_parts_are_the_wholes(checkpoint: Checkpoint, *, exact_bytes: bool = True) -> None:
    recipe = recipe_for(checkpoint)
    whole = dict(leaves(checkpoint, recipe, FLOAT32))
    for path, read in readers(checkpoint, recipe, FLOAT32):
        index = some_of(whole[path].shape)
        before = BYTES_READ.total
        part = read(*index)
        np.testing.assert_array_equal(part, whole[path][np.ix_(*index)], err_msg=path)
        if exact_bytes:
            assert BYTES_READ.total - before == part.nbytes, path


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "mixtral", *FUSED])
def test_a_part_of_a_leaf_reads_its_own_bytes(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", CASES[name].config, tiny(name).shapes)
    assert_parts_are_the_wholes(open_checkpoint(folder))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3"])
def test_a_part_of_a_gguf_leaf_reads_its_own_bytes(tmp_path: Path, name: str) -> None:
    assert_parts_are_the_wholes(open_checkpoint(write_gguf(tmp_path / "x.gguf", *ARCHITECTURES[name])))


def test_a_part_of_a_quantised_leaf_reads_whole_blocks_and_no_more() -> None:
    checkpoint = open_checkpoint(smollm2_gguf())
    recipe = recipe_for(checkpoint)
    found = dict(readers(checkpoint, recipe, FLOAT32))
    down, q = "layers.3.ffn.down.w", "layers.3.mixer.q.w"
    whole = dict(
        leaves(checkpoint, recipe._replace(rules=[r for r in recipe.rules if {down, q} & {*r.paths}]), FLOAT32)
    )
    for path, index in {down: [np.arange(768, 1536), np.arange(576)], q: [np.arange(576), np.arange(64, 192)]}.items():
        before = BYTES_READ.total
        np.testing.assert_array_equal(found[path](*index), whole[path][np.ix_(*index)])
        assert BYTES_READ.total - before == math.prod(map(len, index)) // 32 * 20  # Q4_1: 32 numbers in 20 bytes


def test_a_tensor_that_cannot_be_cut_is_read_whole_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "hf", CASES["llama"].config, tiny("llama").shapes))
    recipe = recipe_for(checkpoint)
    opaque = recipe._replace(rules=[Rule(r.paths, r.sources, r.load, r.store) for r in recipe.rules[:1]])
    with caplog.at_level("INFO", "jaxpaged"):
        ((_, read),) = readers(checkpoint, opaque, FLOAT32)
        np.testing.assert_array_equal(read(np.array([3, 1]), np.array([0])).shape, (2, 1))
    assert f"{opaque.rules[0].sources[0]} cannot be read in parts" in caplog.text


def test_rows_that_lie_together_are_one_read_in_whatever_order_and_however_often_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "hf", CASES["llama"].config, tiny("llama").shapes))
    table = checkpoint.tensors["model.embed_tokens.weight"]
    whole, rows = table.read(), np.array([9, 4, 3, 9, 5])
    fill, lengths = stored_tensor._fill, []
    monkeypatch.setattr(stored_tensor, "_fill", lambda *args: (lengths.append(fill(*args)), lengths[-1])[1])
    np.testing.assert_array_equal(table.read_part(rows, np.arange(whole.shape[1])), whole[rows])
    assert lengths == [3 * whole[0].nbytes, whole[0].nbytes]


@pytest.mark.parametrize("path", ["layers.0.mixer.q.w", "layers.0.mixer.k.w", "layers.1.mixer.o.w", "embed.w"])
@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_fitted_axes_say_what_fitting_does(path: str, num_shards: int) -> None:
    model = tiny("llama_9_heads_3_kv_head_dim_24")
    leaf = np.asarray(dict(flatten(model.params))[path])
    axes = fitted_axes(path, model.spec, num_shards)
    found = leaf[np.ix_(*axes)]
    for dim, axis in enumerate(axes):
        found = np.where(np.expand_dims(axis < 0, [d for d in range(found.ndim) if d != dim]), 0, found)
    np.testing.assert_array_equal(found, fit_leaf(leaf, path, model.spec, num_shards))


def numbers(params: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(params)}


@pytest.mark.parametrize("name", ["llama_9_heads_3_kv_head_dim_24", "phi3"])
def test_a_mesh_gets_what_one_device_gets_and_each_byte_is_read_once(tmp_path: Path, name: str) -> None:
    """Whatever wrote the checkpoint, and whatever mesh loads it."""
    config = CASES[name].config | {"vocab_size": 96}
    shapes = {k: tuple(96 if n == 97 else n for n in shape) for k, shape in tiny(name).shapes.items()}
    hf = write_checkpoint(tmp_path / "hf", config, shapes)
    convert(str(hf), tmp_path / "native")
    one = load(hf)
    assert one.bytes_read == sum(tensor.nbytes for tensor in open_checkpoint(hf).tensors.values())
    meshes = [
        parallel(2),
        parallel(4),
        parallel(2, layers=2),
        Placement(Mesh(np.reshape(jax.devices(), (4, 2)), ("dp", "model"))),
    ]
    for source in (hf, tmp_path / "native"):
        for placement in meshes:
            loaded = load(source, put_for=placement.put_for)
            assert loaded.bytes_read == one.bytes_read
            want = placement.place(one.params, one.spec)
            assert all(
                a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (loaded.params, want)), strict=True)
            )
            assert all(np.array_equal(found, numbers(want)[path]) for path, found in numbers(loaded.params).items())
    half = load(hf, dtype="bfloat16", put_for=meshes[0].put_for).params
    want = meshes[0].place(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one.params), one.spec)
    assert all(
        part.dtype == jnp.bfloat16 and np.array_equal(part, numbers(want)[p]) for p, part in numbers(half).items()
    )
