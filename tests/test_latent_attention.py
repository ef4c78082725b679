"""Multi-head latent attention: its two forms, pages that hold latents, and the engine on them, however it is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_engine import LENGTH, PROMPTS, ROOMY, VOCAB, run
from test_families import tiny
from test_plan import bytes_by_device
from test_sharded_loading import some_of
from tiny_models import CASES, write_checkpoint

from jaxpaged import LLM, ConfigError, EngineConfig, SamplingParams
from jaxpaged.bench.shapes import SHAPES
from jaxpaged.convert.__main__ import convert
from jaxpaged.convert.checkpoint import open_checkpoint
from jaxpaged.convert.families import FAMILIES
from jaxpaged.convert.load import load, readers, recipe_for
from jaxpaged.convert.rules import load_leaves
from jaxpaged.engine.forecast import Forecaster
from jaxpaged.errors import CheckpointError
from jaxpaged.kernels.reference import attention
from jaxpaged.model.latent import absorbed, expanded
from jaxpaged.model.moe import route
from jaxpaged.model.params import dummy_params, flatten
from jaxpaged.model.rope import rope_table
from jaxpaged.model.spec import Block, Decoder, ExpertGroups, LatentAttention, Mlp, Moe, Norm, Rope

_NORM = Norm("rms", 1e-5)
_MIXER = LatentAttention(6, 20, 10, 14, 0.25, Rope(1e4, 6, interleaved=True), _NORM, q_rank=12)
_MOE = Moe(
    *(8, 2, 24, "silu", True),
    shared=Mlp(16, "silu"),
    scoring="sigmoid",
    selection_bias=True,
    groups=ExpertGroups(4, 2, best_of=2),
    scale=2.5,
)
SPEC = Decoder(
    *(VOCAB, 32, LENGTH, (Block(_MIXER, Mlp(48, "silu"), _NORM), Block(_MIXER, _MOE, _NORM)), _NORM, 32),
    tied_head=False,
)


def sharp_weights():
    """Sharp enough for ties to be rare, with a bias that changes who is chosen."""
    params = jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=1))
    params["layers"][1]["ffn"]["selection_bias"] = jnp.linspace(-0.5, 0.5, _MOE.experts)
    return params


PARAMS = sharp_weights()


def make(**settings):
    return LLM((SPEC, PARAMS), **(ROOMY | {"warmup": False} | settings))


SEEDED = [SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=16) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def llm():
    return make()


@pytest.fixture(scope="module")
def seeded():
    return run(make(max_num_seqs=1), PROMPTS, SEEDED)


def test_both_forms_are_the_same_function_and_so_are_their_gradients():
    x, p = jax.random.normal(jax.random.key(1), (9, 32)), dummy_params(SPEC)["layers"][0]["mixer"]
    positions = jnp.arange(9, dtype=jnp.int32)
    tables = {_MIXER.rope: rope_table(_MIXER.rope, positions, positions)}

    def attend(q, k, v, a, sinks):
        return attention(q, k, k[..., : a.kv_rank] if v is None else v, scale=a.scale), None

    def loss(form):
        return jax.jit(jax.value_and_grad(lambda x, p: jnp.sin(form(x, p, _MIXER, tables, attend)[0]).sum(), (0, 1)))

    got, want = loss(absorbed)(x, p), loss(expanded)(x, p)

    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)


def test_a_page_holds_latents_and_what_is_rotated_of_keys_and_nothing_else(llm):
    numbers = 2 * (20 + 6)  # of two layers
    assert llm.engine.stats().page_bytes == ROOMY["page_size"] * numbers * 4
    assert {pool.pages.shape for pool in llm.engine.runner.cache.pools} == {(ROOMY["num_pages"], 4, 1, 1, 26)}
    spec = FAMILIES["deepseek_v3"].spec(SHAPES["deepseek-v3"])
    assert Forecaster(spec, "bfloat16", EngineConfig()).pool_bytes(1) == 61 * 16 * 576 * 2


CUTS = {
    "in chunks and guessing ahead": {
        "max_num_batched_tokens": 12,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    },
    "preempted, a host tier behind": {"num_pages": 14, "max_model_len": 48, "host_cache_gb": 2**-14},
}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(cut, id=name, marks=[pytest.mark.slow] * ("preempted" in name)) for name, cut in CUTS.items()],
)
def test_a_request_gives_the_same_tokens_however_it_is_run(settings, seeded):
    other = make(**settings)
    assert run(other, PROMPTS, SEEDED) == seeded
    stats = other.engine.stats()
    assert (stats.num_preemptions > 0) == ("host_cache_gb" in settings)
    assert (stats.num_accepted_tokens > 0) == ("speculative_config" in settings)
    assert stats.pages_held == stats.pages_leaked == 0


def test_cached_prefixes_and_shared_pages_hold_the_same_latents(llm, seeded):
    assert run(llm, PROMPTS, SEEDED) == seeded
    before = llm.engine.stats().prefix_cache_hits
    assert run(llm, PROMPTS, SEEDED) == seeded
    assert llm.engine.stats().prefix_cache_hits > before
    forked = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=10)
    shared = [c.token_ids for c in llm.generate([PROMPTS[3]], forked, use_tqdm=False)[0].outputs]
    alone = make(max_num_seqs=1).generate([PROMPTS[3]], forked, use_tqdm=False)[0].outputs
    assert shared == [c.token_ids for c in alone]


def test_weights_of_bfloat16_say_about_what_those_of_float32_do():
    spec = replace(SPEC, blocks=SPEC.blocks[:1])  # who is chosen by a hair may be another in bfloat16
    params = dummy_params(spec, seed=1)
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    want, got = (LLM((spec, p), warmup=False, **ROOMY).score(PROMPTS[:4]) for p in (params, rounded))
    for one, other in zip(want, got, strict=True):
        np.testing.assert_allclose(other, one, atol=0.1)


def test_no_step_copies_the_pool():
    runner = make(num_pages=32768, host_cache_gb=2**-9).engine.runner
    pool_bytes = sum(pool.nbytes for pool in jax.tree.leaves(runner.cache))
    for whole in (runner.functions.scrub(), runner.functions.copy_pages(), runner.functions.write_pages()):
        assert whole.memory_analysis().alias_size_in_bytes >= pool_bytes
    for bucket in runner.buckets:
        memory = runner.functions.forward(bucket).memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / 2


@pytest.mark.slow
def test_logprobs_are_the_same_bits_in_any_company_where_that_is_asked_for():
    asked = [replace(params, logprobs=0) for params in SEEDED]
    alone, crowded = make(batch_invariant=True, max_num_seqs=1), make(batch_invariant=True, max_num_batched_tokens=9)

    def told(llm):
        outputs = [o.outputs[0] for o in llm.generate(PROMPTS[:4], asked[:4], use_tqdm=False)]
        return [(o.token_ids, o.cumulative_logprob) for o in outputs]

    assert told(crowded) == told(alone)


MESHES = [
    pytest.param({"tensor_parallel_size": 4}, marks=pytest.mark.slow),  # which 6 heads do not divide equally
    *(
        pytest.param({"tensor_parallel_size": 2, name: 2}, marks=pytest.mark.slow)
        for name in ("data_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size")
    ),
    pytest.param({"tensor_parallel_size": 8}, marks=pytest.mark.slow),
    pytest.param({"tensor_parallel_size": 2, "batch_invariant": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_devices_share_the_heads_and_each_holds_all_latents(sizes, seeded):
    llm = make(**sizes)
    assert run(llm, PROMPTS, SEEDED) == seeded
    one, stages = make().engine.runner.cache, sizes.get("pipeline_parallel_size", 1)
    held = bytes_by_device(llm.engine.runner.cache)
    assert set(held.values()) == {sum(leaf.nbytes for leaf in jax.tree.leaves(one)) // stages}
    heads = {shard.data.shape[0] for shard in llm.engine.params["layers"][0]["mixer"]["k_up"]["w"].addressable_shards}
    assert heads == {-(-6 // (sizes["tensor_parallel_size"] * sizes.get("prefill_context_parallel_size", 1)))} or (
        "prefill_context_parallel_size" in sizes
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_dtype": "int8"}, "cache_dtype is 'int8', but pages of latents"),
        ({"attention_backend": "triton"}, "attention_backend is 'triton', which needs an NVIDIA GPU"),
    ],
)
def test_what_latents_do_not_go_with_is_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_a_forecast_is_what_the_arrays_take_and_counts_what_a_step_computes():
    settings = EngineConfig(tensor_parallel_size=2, **(ROOMY | {"warmup": False}))
    forecaster = Forecaster(SPEC, "float32", settings)
    llm = LLM((SPEC, PARAMS), config=settings)
    assert set(bytes_by_device(llm.engine.params).values()) == {forecaster.weight_bytes()}
    assert set(bytes_by_device(llm.engine.runner.cache).values()) == {forecaster.pool_bytes(ROOMY["num_pages"])}
    step = Forecaster(replace(SPEC, blocks=SPEC.blocks[:1]), "float32", EngineConfig()).decode_step(3, 50)
    attention_products = 32 * 12 + 12 * 6 * 16 + 32 * 26 + 6 * 20 * (10 + 14) + 6 * 14 * 32
    products = attention_products + 3 * 32 * 48 + 32 * VOCAB
    assert step.flops == 2 * 3 * products + 3 * 50 * 6 * 2 * (26 + 20)
    assert step.kv_bytes == 3 * 50 * 26 * 4


def test_experts_are_of_the_best_groups_and_weighted_without_the_bias():
    x, p = jax.random.normal(jax.random.key(3), (40, 32)), PARAMS["layers"][1]["ffn"]
    scores = 1 / (1 + np.exp(-np.asarray(x @ p["router"]["w"], np.float64)))
    biased = scores + np.asarray(p["selection_bias"], np.float64)

    routes = route(x, p, _MOE)

    for row, (experts, weights) in enumerate(zip(*map(np.asarray, routes), strict=True)):
        groups = biased[row].reshape(4, 2).sum(1)
        best = [e for e in range(8) if groups[e // 2] >= np.sort(groups)[-2]]
        chosen = sorted(best, key=lambda e: -biased[row][e])[:2]
        assert experts.tolist() == chosen
        np.testing.assert_allclose(weights, 2.5 * scores[row][chosen] / scores[row][chosen].sum(), rtol=1e-5)


@pytest.fixture
def v3(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "hf", CASES["deepseek_v3"].config, tiny("deepseek_v3").shapes)


def test_a_selection_bias_stays_float32_whatever_the_rest_is_loaded_as(v3, tmp_path):
    name, leaf = "model.layers.1.mlp.gate.e_score_correction_bias", "layers.1.ffn.selection_bias"
    stored = load_file(v3 / "model.safetensors")[name]
    native, back = tmp_path / "native", tmp_path / "back"
    convert(v3, native, dtype="bfloat16")
    convert(native, back, to_hf=True)
    params = load(native).params["layers"][1]
    assert params["mixer"]["k_up"]["w"].dtype == jnp.bfloat16
    for found in (params["ffn"]["selection_bias"], load_file(back / "model.safetensors")[name]):
        np.testing.assert_array_equal(found, stored, err_msg=leaf)


def test_orbax_gives_the_selection_bias_back_as_it_was(tmp_path):
    orbax = pytest.importorskip("jaxpaged.integrations.orbax")
    params = dummy_params(SPEC, dtype="bfloat16")
    params["layers"][1]["ffn"]["selection_bias"] = PARAMS["layers"][1]["ffn"]["selection_bias"]
    orbax.save(tmp_path / "run", SPEC, params)
    _, found = orbax.load(tmp_path / "run")
    assert {path: leaf.dtype for path, leaf in flatten(found)} == {path: x.dtype for path, x in flatten(params)}
    bias = found["layers"][1]["ffn"]["selection_bias"]
    np.testing.assert_array_equal(bias, params["layers"][1]["ffn"]["selection_bias"])


@pytest.fixture
def fp8(v3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The checkpoint with matrices of float8 in blocks of 16 x 32: its tensors, and what they then mean."""
    tensors, blocks = load_file(v3 / "model.safetensors"), (16, 32)
    meant, stored = dict(tensors), dict(tensors)
    for name, x in tensors.items():
        if (x.ndim == 2 and "self_attn" in name) or "experts" in name:
            padded = np.pad(x, [(0, -n % size) for n, size in zip(x.shape, blocks, strict=True)])
            cut = padded.reshape(-(-x.shape[0] // 16), 16, -(-x.shape[1] // 32), 32)
            scales = np.abs(cut).max((1, 3)) / 448
            numbers = (cut / scales[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
            whole = (numbers.astype(np.float32) * scales[:, None, :, None]).reshape(padded.shape)
            meant[name] = whole[: x.shape[0], : x.shape[1]]
            stored[name] = np.ascontiguousarray(numbers.reshape(padded.shape)[: x.shape[0], : x.shape[1]])
            stored[name + "_scale_inv"] = scales
    save_file(stored, v3 / "model.safetensors", {"format": "pt"})
    config = json.loads((v3 / "config.json").read_text())
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
    (v3 / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return stored, meant


def test_float8_blocks_are_read_as_what_they_mean_whole_and_in_part(v3, fp8, tmp_path):
    model, (_, meant) = tiny("deepseek_v3"), fp8
    want = dict(load_leaves(model.rules, meant.__getitem__))
    checkpoint = open_checkpoint(v3)
    recipe = recipe_for(checkpoint)
    for path, read in readers(checkpoint, recipe, np.dtype(np.float32)):
        np.testing.assert_array_equal(read(*map(np.arange, want[path].shape)), want[path], err_msg=path)
        some = some_of(want[path].shape)
        np.testing.assert_array_equal(read(*some), want[path][np.ix_(*some)], err_msg=path)
    convert(v3, tmp_path / "back", to_hf=True, dtype="float32")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for name, tensor in meant.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_float8_without_its_scales_or_with_others_is_refused(v3, fp8):
    (stored, _), name = fp8, "model.layers.0.self_attn.o_proj.weight"
    scales = stored.pop(name + "_scale_inv")
    save_file(stored, v3 / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is float8 and has no scales"):
        load(v3)
    save_file(stored | {name + "_scale_inv": scales[:1]}, v3 / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape \[1, 2\], but \[48, 56\] numbers .* need \[3, 2\]"):
        load(v3)


def test_layers_that_guess_ahead_and_code_that_comes_along_are_left_where_they_are(v3):
    config = json.loads((v3 / "config.json").read_text())
    (v3 / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}})
    )
    tensors = load_file(v3 / "model.safetensors")
    more = {"model.layers.3.eh_proj.weight": np.zeros((48, 96), np.float32)}
    save_file(tensors | more, v3 / "model.safetensors", {"format": "pt"})
    assert len(load(v3).spec.blocks) == 3
