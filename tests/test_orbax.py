"""Checkpoints of params that lie on a mesh, by Orbax and our own: restored onto any other, each device its slices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_processes import free_port
from test_sharding import ENGINE, MODELS, llama, tokens_of, weights

from jaxpaged import LLM, CheckpointError
from jaxpaged.convert.load import describe, load
from jaxpaged.convert.native import save_params
from jaxpaged.model.params import dummy_params, flatten
from jaxpaged.model.sharding import Placement, parallel
from jaxpaged.model.spec import Decoder

ocp = pytest.importorskip("orbax.checkpoint")
from jaxpaged.integrations import orbax  # noqa: E402

MESHES = {
    "1": None,
    "tp 2": parallel(2),
    "tp 4": parallel(4),
    "tp 8": parallel(8),
    "dp 2 x tp 2": parallel(2, 2),
    "dp 4": parallel(1, 4),
    "sp 2 x tp 2": parallel(2, 1, 2),
    "pp 2 x tp 2": parallel(2, layers=2),
}


def lying(spec: Decoder, placement: Placement | None) -> Any:
    """The spec's own weights as a trainer would have them there: cut where they divide, and else whole."""
    params = weights(spec)
    if placement is None:
        return params
    mesh = placement.mesh
    return jax.tree.map(lambda w: jax.device_put(w, orbax._spread(w.shape, mesh, mesh.axis_names)), params)


def assert_lies_as_placed(found: Any, spec: Decoder, placement: Placement | None, params: Any = None) -> None:
    params = weights(spec) if params is None else params
    want = params if placement is None else placement.place(params, spec)
    for (path, a), (_, b) in zip(flatten(found), flatten(want), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("awkward", "tp 8"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("grouped", "1"), ("awkward", "1"))),
    ],
)
def test_a_checkpoint_of_one_mesh_is_restored_onto_others(tmp_path: Path, name: str, saved: str) -> None:
    """Grouped kv heads are repeated on eight devices, awkward ones filled up on all."""
    spec = MODELS[name]
    params = lying(spec, MESHES[saved])
    orbax.save(tmp_path / "orbax", spec, params)
    save_params(tmp_path / "native", spec, params)
    for placement in MESHES.values():
        found, restored = orbax.load(tmp_path / "orbax", placement=placement)
        assert found == spec
        assert_lies_as_placed(restored, spec, placement)
        native = load(tmp_path / "native", put_for=placement.put_for if placement else None)
        assert_lies_as_placed(native.params, spec, placement)


@pytest.mark.parametrize("name", ["llama", "awkward"])
def test_a_device_is_given_its_share_even_where_heads_must_be_fitted(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = MODELS[name]
    orbax.save(tmp_path / "saved", spec, weights(spec))
    asked = []
    restore = orbax._Saved.restore
    monkeypatch.setattr(orbax._Saved, "restore", lambda *args: (asked.append(args[1]), restore(*args))[1])
    _, found = orbax.load(tmp_path / "saved", placement=MESHES["tp 8"])
    (target,) = asked
    for (path, leaf), (_, fitted) in zip(flatten(target), flatten(found), strict=True):
        part = leaf.sharding.shard_shape(leaf.shape)
        assert "norm" in path or np.prod(part) == leaf.size / 8
        assert all(part[dim] == n for dim, n in enumerate(leaf.shape) if n != fitted.shape[dim])  # no head is cut


@pytest.mark.slow
def test_a_trainers_run_is_served_step_by_step_and_only_its_weights_are_read(tmp_path: Path) -> None:
    """A `CheckpointManager`'s folders, one spec for all, an optimizer's state beside the weights."""
    spec = MODELS["grouped"]
    run = tmp_path / "run"
    orbax.write_spec(run, spec)
    with ocp.CheckpointManager(run) as manager:
        for step, seed in ((7, 1), (12, 2)):
            params = jax.tree.map(lambda w, seed=seed: w * seed, lying(spec, MESHES["dp 2 x tp 2"]))
            state = {"params": params, "opt_state": {"mu": params, "nu": params}, "step": step}
            manager.save(step, args=ocp.args.StandardSave(state))
    with pytest.raises(CheckpointError, match="run holds no tree that Orbax saved; name one of its steps, 7, 12"):
        orbax.load(run)
    before = bytes_read()
    llm = LLM(run / "7", tensor_parallel_size=4, **ENGINE)
    assert bytes_read() - before < 2 * sum(w.nbytes for w in jax.tree.leaves(params))  # of 3, and what describes them
    assert_lies_as_placed(llm.engine.params, spec, MESHES["tp 4"])
    assert tokens_of(llm) == tokens_of(LLM((spec, weights(spec)), **ENGINE))
    assert describe(run / "7").spec == spec
    llm.engine.update_params(orbax.load(run / "12")[1])
    assert tokens_of(llm) == tokens_of(LLM(str(run / "12" / "default"), dtype="float32", **ENGINE))


def bytes_read() -> int:
    """From files, by tensorstore, which reads for Orbax."""
    import tensorstore

    (found,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(found["values"][0]["value"])


def test_a_familys_tree_is_restored_onto_a_mesh(tmp_path: Path) -> None:
    from jaxpaged.convert.families import FAMILIES
    from jaxpaged.convert.rules import store_tensors

    spec = MODELS["awkward"]
    ours = dict(flatten(weights(spec)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", {"model": dict(store_tensors(FAMILIES["llama"].rules(spec, ()), ours.get))})
    found = orbax.load_tree(tmp_path / "x", spec, "llama", inside="model", placement=MESHES["tp 4"])
    assert_lies_as_placed(found, spec, MESHES["tp 4"])


def test_weights_are_read_as_what_most_of_them_are_or_as_asked(tmp_path: Path) -> None:
    spec = MODELS["llama"]
    half = jax.tree.map(lambda w: w if w.ndim == 1 else w.astype(jnp.bfloat16), weights(spec))
    orbax.save(tmp_path / "half", spec, half)
    for dtype, want in (("auto", jnp.bfloat16), ("float32", jnp.float32)):
        _, found = orbax.load(tmp_path / "half", dtype=dtype, placement=MESHES["tp 2"])
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(want)}
    with pytest.raises(CheckpointError, match="cannot load weights as 'int8'; choose auto, float32"):
        orbax.load(tmp_path / "half", dtype="int8")


def test_what_cannot_be_loaded_or_saved_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MODELS["grouped"]
    params = weights(spec)

    def told(call: Any, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(CheckpointError) as error:
            call(*args, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    orbax.save(tmp_path / "a", spec, params)
    assert "a exists; choose another place" in told(orbax.save, tmp_path / "a", spec, params)
    assert "a exists; choose another destination" in told(save_params, tmp_path / "a", spec, params)
    fitted = MESHES["tp 8"].place(params, spec)
    for save in (orbax.save, save_params):
        message = told(save, tmp_path / "b", spec, fitted)
        assert "layers.0.mixer.k.w has shape (32, 64), needs (32, 32)" in message
        assert not (tmp_path / "b").exists()
    assert "is an Orbax checkpoint" in told(load, tmp_path / "a")
    assert "holds no tree that Orbax saved; name a folder" in told(orbax.load, tmp_path / "none")

    orbax.write_spec(tmp_path / "a", MODELS["awkward"])
    assert "layers.0.mixer.q.w has shape (32, 64), needs (32, 72)" in told(LLM, tmp_path / "a", **ENGINE)
    (tmp_path / "a" / "spec.json").write_text("{")
    assert "spec.json does not describe a model" in told(LLM, tmp_path / "a", **ENGINE)
    (tmp_path / "a" / "spec.json").unlink()
    assert "write it with jaxpaged.integrations.orbax.write_spec" in told(LLM, tmp_path / "a", **ENGINE)

    orbax.write_spec(tmp_path / "a", spec)
    (tmp_path / "a" / "params" / "_METADATA").write_text("{")
    assert "Orbax cannot read" in told(LLM, tmp_path / "a", **ENGINE)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.delitem(sys.modules, "jaxpaged.integrations.orbax")
    monkeypatch.delattr(sys.modules["jaxpaged.integrations"], "orbax")
    assert "is an Orbax checkpoint; pip install 'jaxpaged[orbax]'" in told(LLM, tmp_path / "a", **ENGINE)


@pytest.mark.slow
def test_two_processes_read_their_halves_and_save_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut or in stages; even of one kv head, which both hold, and though what was saved lay on one device."""
    monkeypatch.setattr(orbax, "_SMALLEST_CHUNK", 1 << 15)  # so that the tiny model's leaves have several
    spec = llama(8, 1, dim=256)
    params = dummy_params(spec, seed=1)
    orbax.save(tmp_path / "one", spec, params)
    script = Path(__file__).with_name("orbax_process.py")
    command = [sys.executable, str(script), f"127.0.0.1:{free_port()}", "2"]
    both = [
        subprocess.Popen([*command, str(i), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        for process in both:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            told = json.loads(out.splitlines()[-1])
            assert told["right"] == [True, True]
            print(f"read {told['read']} of {sum(w.nbytes for w in jax.tree.leaves(params))} bytes")
            assert max(told["read"]) < 0.6 * sum(w.nbytes for w in jax.tree.leaves(params))
    finally:
        for process in both:
            process.kill()
            process.communicate()
    for placement in (None, MESHES["tp 4"]):
        _, found = orbax.load(tmp_path / "both", placement=placement)
        assert_lies_as_placed(found, spec, placement, params)
