"""Weights in 8 or 4 bits: an engine computes what the rounded weights say, wherever they come from and lie."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from real_model import smollm2_gguf
from test_plan import bytes_by_device
from test_sharded_loading import some_of
from tiny_models import write_checkpoint

from jaxpaged import LLM, EngineConfig, SamplingParams
from jaxpaged.__main__ import main
from jaxpaged.convert import quantizing
from jaxpaged.convert.__main__ import convert
from jaxpaged.convert.checkpoint import open_checkpoint
from jaxpaged.convert.families import family_of
from jaxpaged.convert.load import leaves, load, readers, recipe_for
from jaxpaged.convert.rules import hf_shapes
from jaxpaged.engine.exports import as_if_on
from jaxpaged.engine.forecast import Forecaster
from jaxpaged.engine.weights import check_readable
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.functional import init_adapter, score
from jaxpaged.model.params import dummy_params, flatten, in_floats, quantize_params, quantized_as
from jaxpaged.model.quantized import STEPS, Quantized, quantize
from jaxpaged.model.sharding import parallel
from jaxpaged.model.spec import Decoder, Quantization, from_json

SHAPE = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 96},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE, "attention_bias": True},
    "qwen3": {"model_type": "qwen3", **SHAPE, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **SHAPE, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "mixtral": {"model_type": "mixtral", **SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek": dict(tiny_models.CASES["deepseek_v3"].config) | {"vocab_size": 96},
}
CASES = [(name, dtype) for name in CONFIGS for dtype in STEPS if dtype != "int4" or name not in ("mixtral", "deepseek")]
ENGINE = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 64, "page_size": 4, "warmup": False}
PROMPTS = [np.random.default_rng(i).integers(0, 96, 5 + 4 * i).tolist() for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@cache
def spec_of(name: str) -> Decoder:
    return family_of(CONFIGS[name]).spec(CONFIGS[name])


@cache
def weights_of(name: str, seed: int = 1) -> Any:
    return dummy_params(spec_of(name), seed)


def rounded(params: Any) -> Any:
    """Floats again, by numpy and no function of ours."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return leaf
        values, scale = np.asarray(leaf.values).astype(np.float32), np.asarray(leaf.scale)
        return jnp.asarray(values * np.repeat(scale, values.shape[-2] // scale.shape[-2], axis=-2))

    return jax.tree.map(of, params, is_leaf=lambda node: isinstance(node, Quantized))


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def checkpoint(folder: Any, name: str) -> Any:
    spec = spec_of(name)
    return write_checkpoint(folder, CONFIGS[name], hf_shapes(family_of(CONFIGS[name]).rules(spec, ()), spec))


def assert_equal(one: Any, other: Any) -> None:
    for (path, a), (same, b) in zip(flatten(one), flatten(other), strict=True):
        assert (path, a.dtype, a.shape) == (same, b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), err_msg=path)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_are_those_of_the_rounded_weights(name: str, dtype: Any) -> None:
    spec = quantized_as(spec_of(name), dtype)
    params = quantize_params(weights_of(name), spec)
    tokens = jnp.asarray(PROMPTS[5], jnp.int32)
    apply = jax.jit(Decoder.apply, static_argnums=0)
    got, want = apply(spec, params, tokens), apply(in_floats(spec), rounded(params), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))
    assert np.abs(apply(in_floats(spec), weights_of(name), tokens) - want).max() > 1e-3  # it was rounded
    paths = {path for path, _ in flatten(params)}
    for leaf in ("embed.w", "layers.0.norm1.w", *(["head.w"] if not spec.tied_head else [])):
        assert leaf in paths
    assert {f"layers.1.mixer.{x}.w.{part}" for x in "qo" for part in Quantized._fields} <= paths
    assert ("layers.1.ffn.router.w" in paths) == (name in ("mixtral", "deepseek"))


@pytest.mark.parametrize(
    "how", [Quantization("int8"), Quantization("int4", 32), Quantization("int8", 16), Quantization("fp8")]
)
def test_no_weight_is_off_by_more_than_half_a_step(how: Quantization) -> None:
    w = np.random.default_rng(0).standard_normal((3, 64, 40)).astype(np.float32) * np.logspace(-6, 6, 40, dtype="f4")
    w[1, :, 7] = 0
    found = quantize(w, how)
    assert_equal({"w": found}, {"w": jax.jit(quantize, static_argnums=1)(jnp.asarray(w), how)})
    off = np.abs(np.asarray(rounded(found)) - w)
    step = np.repeat(found.scale, 64 // found.scale.shape[-2], axis=-2)
    if how.dtype == "fp8":
        np.testing.assert_array_less(off, np.maximum(np.abs(w) / 16, step * 2**-10) * 1.0001 + 1e-30)
    else:
        np.testing.assert_array_less(off, step * 0.5001 + 1e-30)
    assert not np.asarray(rounded(found))[1, :, 7].any()


def slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": {"max_num_batched_tokens": 7},
    "preempted": {"num_pages": 14, "max_model_len": 48},
    "with drafts": {"speculative_config": {"method": "ngram"}},
    "batch invariant": {"batch_invariant": True},
}


@cache
def want(name: str, dtype: Any) -> list[list[int]]:
    spec = quantized_as(spec_of(name), dtype)
    return tokens_of(LLM((spec_of(name), rounded(quantize_params(weights_of(name), spec))), **ENGINE))


@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [
        *(("llama", "int8", way) for way in ("alone", "chunked")),
        *(slow("llama", "int8", way) for way in ("batched", "preempted", "with drafts", "batch invariant")),
        *(slow("qwen3", "int4", way) for way in ("chunked", "preempted")),
        slow("gemma2", "fp8", "batched"),
        slow("mixtral", "int8", "chunked"),
        slow("deepseek", "int8", "chunked"),
    ],
)
def test_tokens_are_those_of_the_rounded_weights_in_every_way(name: str, dtype: Any, way: str) -> None:
    llm = LLM((spec_of(name), weights_of(name)), quantization=dtype, **(ENGINE | WAYS[way]))
    assert tokens_of(llm) == want(name, dtype)
    assert (llm.engine.stats().num_preemptions > 0) == (way == "preempted")


def test_nothing_compiles_after_warm_up_and_float_weights_are_taken_without_compiling_a_step() -> None:
    llm = LLM((spec_of("llama"), weights_of("llama")), quantization="int8", **(ENGINE | {"warmup": True}))
    compiled = llm.engine.stats().num_compilations
    before = tokens_of(llm)
    llm.engine.update_params(jax.tree.map(np.asarray, weights_of("llama", 2)))
    fresh = LLM((spec_of("llama"), weights_of("llama", 2)), quantization="int8", **ENGINE)
    assert_equal(llm.engine.params, fresh.engine.params)
    assert tokens_of(llm) == tokens_of(fresh) != before
    llm.engine.update_params(quantize_params(weights_of("llama"), llm.engine.spec))
    assert tokens_of(llm) == before
    assert llm.engine.stats().num_compilations == compiled


def test_new_weights_that_do_not_fit_change_nothing_and_are_told_in_floats() -> None:
    llm = LLM((spec_of("llama"), weights_of("llama")), quantization="int8", **ENGINE)
    held = llm.engine.params
    lacking = {name: leaf for name, leaf in weights_of("llama").items() if name != "norm"}
    with pytest.raises(ConfigError, match=r"missing norm\.w \(64,\)$"):
        llm.engine.update_params(lacking)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights_of("llama"))
    with pytest.raises(ConfigError, match=r"embed\.w is bfloat16, needs float32"):
        llm.engine.update_params(half)
    with pytest.raises(ConfigError, match=r"mixer\.q\.w\.values is float32, needs int8"):
        llm.engine.update_params(jax.tree.map(lambda w: w.astype(jnp.float32), held))
    assert llm.engine.params is held


@pytest.mark.slow
def test_scores_are_those_of_the_rounded_weights_and_floats_can_be_trained_through_them() -> None:
    spec = quantized_as(spec_of("llama"), "int8")
    params = quantize_params(weights_of("llama"), spec)
    tokens = jnp.asarray([PROMPTS[1], PROMPTS[1][::-1]], jnp.int32)
    lengths = jnp.asarray([9, 7], jnp.int32)
    scored = jax.jit(partial(score, spec=spec))
    got, want = scored(params, tokens, lengths), scored(rounded(params), tokens, lengths)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    llm = LLM((spec, params), **ENGINE)
    np.testing.assert_allclose(llm.score([PROMPTS[1]])[0], want[0], rtol=1e-4, atol=1e-4)

    def loss(embedding: jax.Array, params: Any) -> jax.Array:
        return scored({**params, "embed": {"w": embedding}}, tokens, lengths).sum()

    embedding = params["embed"]["w"]
    through, exact = (jax.jit(jax.grad(loss))(embedding, p) for p in (params, rounded(params)))
    np.testing.assert_allclose(through, exact, rtol=1e-3, atol=1e-4 * float(jnp.abs(exact).max()))
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda p: scored(p, tokens, lengths).sum())(params)


@pytest.mark.slow
def test_adapters_stand_beside_quantised_weights() -> None:
    spec, settings = spec_of("llama"), {"enable_lora": True, "max_loras": 1, "max_lora_rank": 4, **ENGINE}
    adapter = {
        path: factors._replace(b=jax.random.normal(jax.random.key(1), factors.b.shape))
        for path, factors in init_adapter(spec, 4, jax.random.key(0)).items()
    }
    quantised = LLM((spec, weights_of("llama")), quantization="int8", **settings)
    floats = LLM((spec, rounded(quantised.engine.params)), **settings)
    answers = []
    for llm in (quantised, floats):
        llm.update_lora("mine", adapter)
        names = [None, "mine"] * (len(PROMPTS) // 2)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=names)
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1] != want("llama", "int8")


@pytest.mark.parametrize(("name", "dtype"), [("llama", "int8"), ("gemma2", "int4"), ("mixtral", "fp8")])
def test_a_checkpoint_is_quantised_as_it_is_read(tmp_path: Any, name: str, dtype: Any) -> None:
    folder = checkpoint(tmp_path / "hf", name)
    spec = quantized_as(spec_of(name), dtype)
    want = quantize_params(load(folder).params, spec)
    loaded = load(folder, quantization=dtype)
    assert loaded.spec == spec
    assert_equal(loaded.params, want)
    if dtype == "int4":
        return
    placement = parallel(4)  # more than the two kv heads
    on_mesh = load(folder, quantization=dtype, put_for=placement.put_for)
    assert_equal(on_mesh.params, jax.tree.map(np.asarray, placement.place(want, spec)))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_parts_of_quantised_leaves_are_the_wholes(tmp_path: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(checkpoint(tmp_path / "hf", name))
    recipe, float32 = recipe_for(opened, "int8"), np.dtype(np.float32)
    whole = dict(leaves(opened, recipe, float32))
    monkeypatch.setattr(quantizing, "_PIECE", 1000)
    for path, read in readers(opened, recipe, float32):
        index = some_of(whole[path].shape)
        np.testing.assert_array_equal(read(*index), whole[path][np.ix_(*index)], err_msg=path)


MESHES: dict[str, dict[str, int]] = {
    "tensor 2": {"tensor_parallel_size": 2},
    "tensor 8": {"tensor_parallel_size": 8},
    "tensor 2, data 2": {"tensor_parallel_size": 2, "data_parallel_size": 2},
    "prompts split": {"tensor_parallel_size": 2, "prefill_context_parallel_size": 2},
    "stages": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
}


@pytest.mark.parametrize(
    ("name", "dtype", "mesh"),
    [
        *(slow("llama", "int8", mesh) for mesh in MESHES),
        slow("gemma2", "fp8", "tensor 8"),
        slow("deepseek", "int8", "tensor 2"),
        *(slow("mixtral", "int8", mesh) for mesh in ("tensor 2", "tensor 8", "tensor 2, data 2")),
    ],
)
def test_a_mesh_gives_the_same_tokens(name: str, dtype: Any, mesh: str) -> None:
    sizes = MESHES[mesh]
    llm = LLM((spec_of(name), weights_of(name)), quantization=dtype, **(ENGINE | sizes))
    assert tokens_of(llm) == want(name, dtype)
    if "data_parallel_size" not in sizes:
        settings = EngineConfig(quantization=dtype, **(ENGINE | sizes))
        held = set(bytes_by_device(llm.engine.params).values())
        forecast = Forecaster(spec_of(name), "float32", settings).weight_bytes()
        assert forecast == max(held)
    new = weights_of(name, 2)
    llm.engine.update_params(new)
    assert tokens_of(llm) == tokens_of(LLM((spec_of(name), new), quantization=dtype, **ENGINE))


def test_int4_on_a_mesh_is_refused() -> None:
    with pytest.raises(ConfigError, match="int4 weights do not work on a mesh yet; use int8 or fp8"):
        LLM((spec_of("qwen3"), weights_of("qwen3")), quantization="int4", tensor_parallel_size=2, **ENGINE)
    assert main(["plan", "llama-3-8b", "--devices", "2", "--tensor-parallel-size", "2", "-q", "int4"]) == 1


@pytest.mark.parametrize("dtype", STEPS)
def test_a_step_holds_no_second_copy_of_the_weights(dtype: Any) -> None:
    """XLA on CPU makes floats of a tile at a time; it copies fp8 and int4, which it cannot slice, as bytes."""
    config = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    spec = family_of(config).spec(config)
    llm = LLM((spec, dummy_params(spec)), quantization=dtype, **ENGINE)
    runner = llm.engine.runner
    floats = 4 * sum(leaf.size for path, leaf in flatten(runner.params) if path.endswith(".values"))
    memory = runner.functions.forward(runner.buckets[0]).memory_analysis()
    assert memory.temp_size_in_bytes < floats / (8 if dtype == "int8" else 3)
    assert memory.argument_size_in_bytes < floats / 2


@pytest.mark.parametrize("dtype", ["int8", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp8", "int4"))])
def test_a_native_folder_holds_quantised_weights_and_loads_as_they_are(tmp_path: Any, dtype: Any) -> None:
    source = checkpoint(tmp_path / "hf", "llama")
    done = convert(str(source), tmp_path / "native", quantization=dtype)
    want, got = load(source, quantization=dtype), load(tmp_path / "native")
    assert from_json((tmp_path / "native" / "spec.json").read_text()) == got.spec == want.spec
    assert_equal(got.params, want.params)
    assert done.num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(got.params))  # a byte for each 4 bits on disk
    if dtype != "int4":
        assert_equal(load(tmp_path / "native", put_for=parallel(2).put_for).params, want.params)
    assert tokens_of(LLM(tmp_path / "native", quantization=dtype, **ENGINE)) == tokens_of(
        LLM(source, quantization=dtype, **ENGINE)
    )
    other = "fp8" if dtype == "int8" else "int8"
    with pytest.raises(ConfigError, match=f"the weights are {dtype} already and quantization is '{other}'; leave it"):
        LLM(tmp_path / "native", quantization=other, **ENGINE)


def test_back_in_hugging_faces_format_weights_are_floats(tmp_path: Any) -> None:
    source = checkpoint(tmp_path / "hf", "mixtral")
    convert(str(source), tmp_path / "native", quantization="int8")
    convert(str(tmp_path / "native"), tmp_path / "back", to_hf=True)
    assert_equal(load(tmp_path / "back").params, rounded(load(tmp_path / "native").params))
    for options in ({"to_hf": True}, {"verify": True}):
        with pytest.raises(CheckpointError, match="--quantization is int8; leave one of them out"):
            convert(str(source), tmp_path / "other", quantization="int8", **options)
    assert not (tmp_path / "other").exists()


def test_weights_that_are_not_finite_are_not_quantised(tmp_path: Any) -> None:
    from safetensors.numpy import load_file, save_file

    folder = checkpoint(tmp_path / "hf", "llama")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"^layers\.1\.ffn\.up\.w holds weights that are not finite"):
        load(folder, quantization="int8")


def test_what_cannot_be_quantised_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="quantization is 'awq'; known: int8, fp8, int4"):
        EngineConfig(quantization="awq")  # type: ignore[arg-type]
    odd = {**CONFIGS["llama"], "intermediate_size": 72}
    spec = family_of(odd).spec(odd)
    with pytest.raises(ConfigError, match=r"do not divide the 72 of layers\.0\.ffn\.down\.w; use int8 or fp8"):
        LLM((spec, dummy_params(spec)), quantization="int4", **ENGINE)
    with pytest.raises(ConfigError, match=r"int4 has scales for groups of rows, .* use int8 or fp8$"):
        LLM((spec_of("mixtral"), weights_of("mixtral")), quantization="int4", **ENGINE)


def test_experts_of_fp8_are_refused_for_gpus_that_cannot_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    with as_if_on("cuda", "NVIDIA A100"), pytest.raises(ConfigError, match=r"8\.9 on; NVIDIA A100 has 8\.0: use int8$"):
        check_readable(quantized_as(spec_of("mixtral"), "fp8"))
    assert main(["plan", "mixtral-8x7b", "--devices", "1", "--gpu", "NVIDIA A100", "-q", "fp8"]) == 1
    assert "NVIDIA A100 has 8.0: use int8" in capsys.readouterr().out


def test_the_plan_counts_what_quantised_weights_take(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        assert main(["plan", "llama-3-8b", "--devices", "1", "--memory", "80GiB", *more]) == 0
        return capsys.readouterr().out

    assert "weights of bfloat16" in said() and "14.96 GiB" in said()
    assert "weights of int8 and bfloat16" in said("--quantization", "int8") and "8.46 GiB" in said("-q", "int8")
    assert "5.41 GiB" in said("-q", "int4")  # with a scale for each 128 rows


def test_the_command_line_quantises(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "hf", "llama")
    assert main(["convert", str(folder), str(tmp_path / "native"), "--quantization", "int8"]) == 0
    assert json.loads((tmp_path / "native" / "spec.json").read_text())["quantization"]["dtype"] == "int8"
    with pytest.raises(SystemExit):
        main(["generate", str(folder), "x", "--quantization", "gptq"])
    assert "invalid choice: 'gptq'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_in_8_bits_knows_the_capital_of_france() -> None:
    llm = LLM(smollm2_gguf(), quantization="int8", max_model_len=64, max_num_seqs=2)
    message = {"role": "user", "content": "What is the capital of France?"}
    (output,) = llm.chat([message], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris."
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.params)) < 4 * 135e6 / 2
