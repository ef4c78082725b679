"""Loading and converting: what goes in comes out, whatever the format, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxpaged.convert.__main__ import convert, main
from jaxpaged.convert.checkpoint import open_checkpoint
from jaxpaged.convert.families import family_of
from jaxpaged.convert.load import leaves, load, recipe_for
from jaxpaged.convert.native import new_folder, write_native
from jaxpaged.convert.rules import hf_shapes
from jaxpaged.errors import CheckpointError
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import flatten
from jaxpaged.model.spec import from_json

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
PHI3 = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": None}
NEOX = LLAMA | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.5}
NEOX |= {"hidden_act": "gelu"}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 48,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3}
CONFIGS = {"llama": LLAMA, "phi3": PHI3, "gpt_neox": NEOX, "gpt2": GPT2, "mixtral": MIXTRAL}

Save = Callable[..., Path]


def random_tensors(config: dict[str, Any], dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors under the names and shapes that the config asks for."""
    rng = np.random.default_rng(1)
    family = family_of(config)
    spec = family.spec(config)
    shapes = hf_shapes(family.rules(spec, ()), spec)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return {name: (rng.standard_normal(shape) * 0.3).astype(kind) for name, shape in shapes.items()}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(config, tensors=None) -> an HF folder."""

    def folder(config: dict[str, Any] = LLAMA, tensors: dict[str, np.ndarray] | None = None, name: str = "hf") -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(
            random_tensors(config) if tensors is None else tensors, path / "model.safetensors", {"format": "pt"}
        )
        return path

    return folder


def all_tensors(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# Loading.


def test_params_have_the_numbers_of_the_tensors(save: Save) -> None:
    tensors = random_tensors(LLAMA)
    model = load(save(tensors=tensors))
    np.testing.assert_array_equal(model.params["embed"]["w"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        model.params["layers"][1]["mixer"]["q"]["w"], tensors["model.layers.1.self_attn.q_proj.weight"].T
    )
    assert model.format == "hf"
    assert model.config == LLAMA


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float32"),  # on a CPU
        ("float16", "float16", "float16"),
        ("float64", "auto", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float16"),
    ],
)
def test_weights_load_as_stored_or_as_asked(save: Save, stored: str, asked: str, loaded: str) -> None:
    model = load(save(tensors=random_tensors(LLAMA, stored)), dtype=asked)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {loaded}


def test_an_unknown_dtype_is_refused_with_the_known_ones(save: Save) -> None:
    assert "choose auto, float32, bfloat16, float16" in error_of(load, save(), dtype="int4")


def test_put_places_every_leaf_once(save: Save) -> None:
    placed: dict[str, tuple[int, ...]] = {}

    def put(path: str, leaf: Any, read: Any) -> jax.Array:
        assert path not in placed
        array = read(*map(np.arange, leaf.shape))
        assert array.shape == leaf.shape
        placed[path] = array.shape
        return jnp.asarray(array)

    model = load(save(), put_for=lambda spec: put)
    assert placed == {path: leaf.shape for path, leaf in flatten(model.params)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_tensor_is_read_once_and_let_go(save: Save, config: dict[str, Any]) -> None:
    path = save(config)
    checkpoint = open_checkpoint(path)
    reads: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(checkpoint, name)

        def read(self, name: str) -> np.ndarray:
            reads.append(name)
            return checkpoint.read(name)

    for _ in leaves(Counting(), recipe_for(checkpoint), np.dtype(np.float32)):  # type: ignore[arg-type]
        pass
    assert sorted(reads) == sorted(checkpoint.names)


def test_large_tensors_come_first(save: Save) -> None:
    checkpoint = open_checkpoint(save())
    sizes = [array.size for _, array in leaves(checkpoint, recipe_for(checkpoint), np.dtype(np.float32))]
    assert sizes == sorted(sizes, reverse=True)


def test_all_tensors_that_do_not_fit_are_listed_before_one_is_read(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(LLAMA)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["lm_head.weight"] = np.zeros((50, 16), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((48, 16), np.int32)
    path = save(tensors=tensors)
    monkeypatch.setattr("jaxpaged.convert.stored_tensor.StoredTensor.read", lambda self: pytest.fail("read a tensor"))

    message = error_of(load, path)

    assert "5 tensors do not fit" in message
    assert message.splitlines()[1:] == [
        "  missing model.norm.weight [16]",
        "  missing model.layers.1.mlp.up_proj.weight [24, 16]",
        "  unexpected model.layers.2.mlp.up_proj.weight [24, 16]",
        "  model.embed_tokens.weight holds int32, needs floats",
        "  lm_head.weight has shape [50, 16], needs [48, 16]",
    ]


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"])
def test_buffers_and_the_copy_of_a_tied_head_are_left_unread(save: Save, extra: str) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    path = save(tied, random_tensors(tied) | {extra: np.zeros(3, np.float32)})
    assert "head" not in load(path).params


def test_an_unknown_architecture_is_refused_with_the_known_ones(save: Save) -> None:
    message = error_of(load, save(LLAMA | {"model_type": "rwkv"}, {}))
    assert "'rwkv'" in message
    assert "llama, mistral" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 2**31 - 1, "num_attention_heads": 1},
        {"head_dim": 2**31 - 1, "vocab_size": 2**31 - 1},
        {"rope_parameters": {"partial_rotary_factor": 1e308}},
    ],
)
def test_a_config_of_absurd_sizes_is_refused_without_making_them(save: Save, fields: dict[str, Any]) -> None:
    tensors = random_tensors(LLAMA)
    assert "hf: " in error_of(load, save(LLAMA | {"num_key_value_heads": None} | fields, tensors))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"type": "Decoder"}', '{"type": "Norm", "kind": "rms", "eps": 1e-5}']
)
def test_a_damaged_spec_is_refused(save: Save, tmp_path: Path, text: str) -> None:
    convert(str(save()), tmp_path / "native")
    (tmp_path / "native" / "spec.json").write_text(text)
    assert "does not describe a model" in error_of(load, tmp_path / "native")


def test_the_language_model_of_a_multimodal_checkpoint_converts_alone(save: Save, tmp_path: Path) -> None:
    text = {k: v for k, v in LLAMA.items() if k not in ("architectures", "eos_token_id")}
    text |= {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    text |= {"tie_word_embeddings": True}
    whole = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 7]}
    tensors = random_tensors(whole)
    source = save(whole, tensors | {"vision_tower.patch.weight": np.zeros(3, np.float32)})

    convert(str(source), tmp_path / "native")
    convert(str(source), tmp_path / "one", to_hf=True)
    convert(str(tmp_path / "native"), tmp_path / "two", to_hf=True)

    assert all_tensors(tmp_path / "one").keys() == random_tensors(text).keys()
    assert_same(all_tensors(tmp_path / "one"), all_tensors(tmp_path / "two"))
    assert load(tmp_path / "two").spec == load(source).spec
    assert_same(dict(flatten(load(tmp_path / "two").params)), dict(flatten(load(source).params)))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["eos_token_id"] == [1, 7]


# Converting.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_the_same_checkpoint(save: Save, tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    tensors = random_tensors(config, dtype)
    source = save(config, tensors)

    convert(str(source), tmp_path / "native")
    convert(str(tmp_path / "native"), tmp_path / "back", to_hf=True)

    assert_same(all_tensors(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {"dtype": dtype}


def test_a_native_folder_loads_as_its_source_does(save: Save, tmp_path: Path) -> None:
    source = save()
    convert(str(source), tmp_path / "native")
    ours, theirs = load(tmp_path / "native"), load(source)

    assert ours.format == "native"
    assert ours.spec == theirs.spec == from_json((tmp_path / "native" / "spec.json").read_text())
    assert ours.config == theirs.config
    assert_same(dict(flatten(ours.params)), dict(flatten(theirs.params)))


def test_a_native_folder_needs_its_spec_and_tensors_alone(save: Save, tmp_path: Path) -> None:
    convert(str(save(LLAMA | {"model_type": "mistral", "sliding_window": 8})), tmp_path / "native")
    (tmp_path / "native" / "hf_config.json").unlink()
    assert load(tmp_path / "native").spec.blocks[0].mixer.window == 8
    message = error_of(convert, str(tmp_path / "native"), tmp_path / "back", to_hf=True)
    assert "has no hf_config.json, which the way back needs" in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA | {"model_type": "a name no family has"}, "not a known architecture"),
        (LLAMA | {"rms_norm_eps": 0.1}, "hf_config.json and spec.json describe different models"),
    ],
)
def test_going_back_needs_the_config_it_came_with(
    save: Save, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    convert(str(save()), tmp_path / "native")
    (tmp_path / "native" / "hf_config.json").write_text(json.dumps(config))
    assert says in error_of(convert, str(tmp_path / "native"), tmp_path / "back", to_hf=True)
    assert not (tmp_path / "back").exists()


def test_large_checkpoints_are_sharded(save: Save, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save())
    native = tmp_path / "native"
    native.mkdir()
    write_native(native, checkpoint, recipe_for(checkpoint), np.dtype(np.float32), lambda n: None, max_shard_bytes=4000)
    shards = sorted(native.glob("model-*.safetensors"))
    assert len(shards) > 2
    largest = max(array.nbytes for array in all_tensors(native).values())
    assert all(sum(t.nbytes for t in safetensors.numpy.load_file(s).values()) <= max(4000, largest) for s in shards)
    assert_same(dict(flatten(load(native).params)), dict(flatten(load(checkpoint.path).params)))


def test_what_we_write_the_safetensors_library_reads(save: Save, tmp_path: Path) -> None:
    convert(str(save()), tmp_path / "native", dtype="bfloat16")
    theirs = safetensors.numpy.load_file(tmp_path / "native" / "model.safetensors")
    assert_same(all_tensors(tmp_path / "native"), theirs)


def test_tokenizer_files_come_along(save: Save, tmp_path: Path) -> None:
    source = save()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f"{name} as it was")
    convert(str(source), tmp_path / "native")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "native" / name).read_text() == f"{name} as it was"
    assert json.loads((tmp_path / "native" / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_a_summary_says_what_was_done(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(save()), str(tmp_path / "native"), "--dtype", "bfloat16"]) == 0
    num_params = sum(x.size for x in random_tensors(LLAMA).values())
    assert f"llama, {num_params:,} parameters, {2 * num_params:,} bytes" in capsys.readouterr().out


# Failing.


@pytest.fixture
def nothing_left(tmp_path: Path) -> Any:
    """Checks that the folder holds at the end what the test says it may."""
    yield
    assert {p.name for p in tmp_path.iterdir()} <= {"hf", "kept"}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "no room for"), (errno.EDQUOT, "no room for"), (errno.EIO, "cannot write")],
)
def test_a_failing_disk_leaves_nothing(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def failing(*args: Any) -> bytes:
        raise OSError(number, "the disk's own words")

    monkeypatch.setattr("jaxpaged.convert.safetensors_writer._header", failing)
    message = error_of(convert, str(save()), tmp_path / "native")
    assert says in message
    assert "the disk's own words" in message


@pytest.mark.usefixtures("nothing_left")
def test_the_command_fails_with_one_line_where_files_may_not_grow(save: Save, tmp_path: Path) -> None:
    program = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000));"
        "runpy.run_module('jaxpaged.convert', run_name='__main__')"
    )
    arguments = [str(save()), str(tmp_path / "native")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    error = done.stderr.splitlines()[-1]  # the progress bar stands before it
    assert error.startswith("error: no room for")
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("nothing_left")
def test_too_little_room_is_found_before_writing(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = error_of(convert, str(save()), tmp_path / "native")
    assert "has 1,000 bytes free, the checkpoint takes" in message


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def interrupted(*args: Any) -> str:
        signal.raise_signal(number)
        return "unreachable"

    monkeypatch.setattr("jaxpaged.convert.native.to_json", interrupted)
    assert main([str(save()), str(tmp_path / "native")]) == 130
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_left")
def test_an_error_is_one_line_on_stderr(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(save(LLAMA | {"model_type": "rwkv"}, {})), str(tmp_path / "native")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("nothing_left")
def test_a_source_cut_short_while_it_is_converted_leaves_nothing(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save()

    def cut(*args: Any, **kwargs: Any) -> Any:
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:2000])
        return new_folder(*args, **kwargs)

    monkeypatch.setattr("jaxpaged.convert.__main__.new_folder", cut)
    assert "cut short" in error_of(convert, str(source), tmp_path / "native")


def test_an_existing_destination_is_kept(save: Save, tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    assert "exists; choose another destination or pass --overwrite" in error_of(
        convert, str(save()), tmp_path / "native"
    )
    assert not list((tmp_path / "native").iterdir())


def test_overwriting_replaces_a_checkpoint_whole(save: Save, tmp_path: Path) -> None:
    source = save()
    convert(str(source), tmp_path / "native", dtype="float16")
    (tmp_path / "native" / "stale").touch()
    convert(str(source), tmp_path / "native", overwrite=True)
    assert load(tmp_path / "native").params["embed"]["w"].dtype == jnp.float32
    assert not (tmp_path / "native" / "stale").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "native"}


def test_a_replacement_that_fails_leaves_the_old_checkpoint(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save()
    convert(str(source), tmp_path / "native", dtype="float16")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EACCES, "not allowed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert "not allowed" in error_of(convert, str(source), tmp_path / "native", overwrite=True)
    assert load(tmp_path / "native").params["embed"]["w"].dtype == jnp.float16
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "native"}


def test_overwriting_spares_what_is_no_checkpoint(save: Save, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").touch()
    message = error_of(convert, str(save()), tmp_path / "letters", overwrite=True)
    assert "is no checkpoint folder, so it is not overwritten" in message
    assert (tmp_path / "letters" / "to-mother.txt").exists()


@pytest.mark.parametrize("destination", ["hf", "hf/../hf", "."])
def test_overwriting_spares_the_source(save: Save, tmp_path: Path, destination: str) -> None:
    source = save()
    (tmp_path / "config.json").touch()
    assert "holds the source" in error_of(convert, str(source), tmp_path / destination, overwrite=True)
    assert load(source)


def test_a_destination_without_a_parent_is_refused(save: Save, tmp_path: Path) -> None:
    assert "does not exist; make it first" in error_of(convert, str(save()), tmp_path / "a" / "b")


# Against transformers.


@pytest.mark.torch
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_goes_back_has_transformers_logits(save: Save, tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    there = convert(str(save(config)), tmp_path / "native", dtype=dtype, verify=True)
    back = convert(str(tmp_path / "native"), tmp_path / "back", to_hf=True, verify=True)
    for done in (there, back):
        assert done.comparison is not None
        assert done.comparison.max_error < 1e-4
        assert done.comparison.max_logit > 0.1


@pytest.mark.torch
def test_verification_notices_a_wrong_spec(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(params: Any, tokens: Any, spec: Any) -> jax.Array:
        return apply(params, tokens, spec) * 2

    monkeypatch.setattr("jaxpaged.convert.__main__.apply", doubled)
    message = error_of(convert, str(save()), tmp_path / "native", verify=True)
    assert "logits differ from transformers'" in message
    assert not (tmp_path / "native").exists()


def test_two_native_sides_have_no_reference(save: Save, tmp_path: Path) -> None:
    convert(str(save()), tmp_path / "native")
    assert "add --to-hf" in error_of(convert, str(tmp_path / "native"), tmp_path / "other", verify=True)
    assert not (tmp_path / "other").exists()
