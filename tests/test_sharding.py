"""Models cut over a mesh of virtual devices: the same tokens, equal shares, two sums a layer, errors that help."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Moved, moved
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from real_model import smollm2_gguf

from jaxpaged import LLM, SamplingParams
from jaxpaged.engine.batch import Bucket
from jaxpaged.errors import ConfigError
from jaxpaged.model.decoder import apply
from jaxpaged.model.head_layout import fit_heads, fit_leaf, head_layout
from jaxpaged.model.params import dummy_params, flatten, map_specs, param_specs
from jaxpaged.model.sharding import Placement, ShardingRules, parallel
from jaxpaged.model.spec import Attention, Block, Decoder, LatentAttention, Mlp, Moe, Norm, Rope

RMS, LAYER = Norm("rms", 1e-5), Norm("layer", 1e-5)
ENGINE = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 48, "page_size": 4, "warmup": False}


def llama(heads: int = 8, kv_heads: int = 8, dim: int = 32) -> Decoder:
    block = Block(Attention(heads, kv_heads, 8, 8**-0.5, Rope(1e4, 8)), Mlp(2 * dim, "silu"), RMS)
    return Decoder(64, dim, 96, (block,) * 2, RMS, dim, tied_head=False)


def gpt2() -> Decoder:
    mixer = Attention(8, 8, 8, 8**-0.5, None, qkv_bias=True, out_bias=True)
    block = Block(mixer, Mlp(64, "gelu_tanh", gated=False, bias=True), LAYER)
    return Decoder(64, 64, 96, (block,) * 2, LAYER, 64, tied_head=True, learned_positions=0)


def gemma() -> Decoder:
    norm = Norm("rms", 1e-6, plus_one=True)
    local = Attention(8, 2, 16, 0.25, Rope(1e4, 16), qk_norm=norm, window=8)
    blocks = tuple(
        Block(mixer, Mlp(64, "gelu_tanh"), norm, "sandwich")
        for mixer in (local, Attention(8, 2, 16, 0.25, Rope(1e6, 16), qk_norm=norm))
    )
    return Decoder(64, 48, 96, blocks, norm, 48, tied_head=True, embed_scale=48**0.5)


def mixture() -> Decoder:
    block = llama().blocks[0]
    moe = Moe(8, 2, 48, "silu", renormalize=True, shared=Mlp(32, "silu"), shared_gate=True)
    return replace(llama(), blocks=(block, replace(block, ffn=moe)))


def latents() -> Decoder:
    mixer = LatentAttention(8, 16, 8, 12, 16**-0.5, Rope(1e4, 8), RMS, q_rank=24)
    return replace(llama(), blocks=(replace(llama().blocks[0], mixer=mixer),) * 2)


def norms_over_all_heads() -> Decoder:
    mixer = Attention(8, 2, 8, 8**-0.5, Rope(1e4, 8), qk_norm=RMS, norm_all_heads=True)
    return replace(llama(), blocks=(replace(llama().blocks[0], mixer=mixer),))


MODELS = {"llama": llama(), "grouped": llama(8, 4), "awkward": llama(9, 3), "gpt2": gpt2(), "gemma": gemma()}
MODELS |= {"mixture": mixture(), "norms over all heads": norms_over_all_heads(), "latents": latents()}
PROMPTS = [np.random.default_rng(i).integers(0, 64, n).tolist() for i, n in enumerate((5, 40, 9))]


def weights(spec: Decoder):
    return jax.tree.map(lambda w: w * 3, dummy_params(spec, seed=1))  # sharp, so that ties are rare


def tokens_of(llm: LLM) -> list[list[int]]:
    params = [SamplingParams(temperature=0, max_tokens=6)] * 2 + [SamplingParams(seed=5, top_p=0.9, max_tokens=6)]
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("name", "size"),
    [("grouped", 8)]
    + [
        pytest.param(name, size, marks=(pytest.mark.slow, *([pytest.mark.long] if size == 4 else [])))
        for name, sizes in {
            "llama": (2, 4, 8),
            "awkward": (2, 4, 8),
            "gpt2": (2, 4, 8),
            "gemma": (2, 4, 8),
            "mixture": (2, 4),
            "norms over all heads": (2,),
        }.items()
        for size in sizes
    ],
)
def test_a_model_cut_over_devices_gives_the_tokens_of_one(name, size):
    spec = MODELS[name]
    params = weights(spec)
    cut = LLM((spec, params), tensor_parallel_size=size, **ENGINE)
    assert tokens_of(cut) == tokens_of(LLM((spec, params), **ENGINE))
    assert len(cut.engine.params["embed"]["w"].sharding.device_set) == size


@pytest.mark.slow
def test_8_bit_pages_moves_to_the_host_and_limits_on_logits_work_on_a_mesh():
    spec = llama(8, 4)
    params = weights(spec)
    settings = ENGINE | {"cache_dtype": "int8", "host_cache_gb": 2**-14, "num_pages": 20}
    asked = [
        SamplingParams(temperature=0, max_tokens=6, logprobs=3, n=2),
        SamplingParams(temperature=0, max_tokens=6, repetition_penalty=1.2, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=6, allowed_token_ids=[3, 5, 8]),
    ]
    ran = []
    for sizes in ({}, {"tensor_parallel_size": 4}, {"prefill_context_parallel_size": 4}):
        llm = LLM((spec, params), **sizes, **settings)
        outputs = llm.generate(PROMPTS, asked, use_tqdm=False)
        ran.append([[c.token_ids for c in o.outputs] for o in outputs])
        assert llm.engine.stats().pages_leaked == 0
    assert ran[0] == ran[1] == ran[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 4, "sharding_rules": ShardingRules(experts="model")},
        *(
            pytest.param({"tensor_parallel_size": 2, name: 2}, marks=pytest.mark.long)
            for name in ("data_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size")
        ),
    ],
    ids=["experts shared out", "data", "sequence", "layers"],
)
def test_a_mixture_of_experts_gives_the_same_tokens_on_every_kind_of_mesh(sizes):
    spec = mixture()
    params = weights(spec)
    assert tokens_of(LLM((spec, params), **sizes, **ENGINE)) == tokens_of(LLM((spec, params), **ENGINE))


def test_each_device_holds_its_share_of_weights_and_pool():
    spec = llama(dim=256)
    engine = LLM((spec, weights(spec)), tensor_parallel_size=8, **ENGINE).engine
    cut = [w for path, w in flatten(engine.params) if "norm" not in path]
    for leaf in (*cut, *jax.tree.leaves(engine.runner.cache)):
        sizes = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert sizes == {leaf.nbytes // 8}
    assert sum(w.nbytes for path, w in flatten(engine.params) if "norm" in path) < 0.005 * sum(w.nbytes for w in cut)


@pytest.mark.parametrize("name", ["llama", "gemma", "mixture", "latents"])
@pytest.mark.parametrize("bucket", [Bucket(4, 0, 0), Bucket(4, 32, 4)], ids=["decode", "mixed"])
def test_a_step_sums_twice_a_layer_and_once_for_the_embedding_and_moves_nothing_else(name, bucket):
    spec = MODELS[name]
    llm = LLM((spec, weights(spec)), tensor_parallel_size=2, **ENGINE)
    compiled = llm.engine.runner.functions.forward(bucket)
    sums = Moved("all-reduce", "f32", (bucket.num_tokens, spec.dim))
    shared = name == "mixture"  # a shared expert's output is one more sum
    assert moved(compiled.as_text()) == {sums: 2 * len(spec.blocks) + shared + 1}
    pools = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.runner.cache))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pools / 2


@pytest.mark.parametrize("vocab", [2048, 4992])  # a device has 4 blocks of 128, or 9.75
def test_sampling_gathers_no_row_of_logits(vocab):
    spec = replace(llama(), vocab_size=vocab)
    llm = LLM((spec, weights(spec)), tensor_parallel_size=4, **ENGINE)
    found = moved(llm.engine.runner.functions.sample(4).as_text())
    assert 0 < max(m.size for m in found) <= 4 * 128


@pytest.mark.slow
def test_the_callers_mesh_is_used_whatever_its_axes_are_called_and_whoever_decides_along_them():
    spec = llama()
    params = weights(spec)
    devices = np.asarray(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("copies", "cut"), axis_types=(AxisType.Explicit,) * 2)
    llm = LLM((spec, params), mesh=mesh, sharding_rules=ShardingRules.on("cut"), **ENGINE)
    assert tokens_of(llm) == tokens_of(LLM((spec, params), **ENGINE))
    assert llm.engine.params["layers"][0]["ffn"]["up"]["w"].sharding.spec == PartitionSpec(None, "cut")


def test_a_trainers_arrays_that_lie_as_the_engines_do_are_taken_as_they_are():
    spec = llama()
    llm = LLM((spec, weights(spec)), tensor_parallel_size=2, **ENGINE)
    placement = llm.engine.runner.placement
    new = jax.tree.map(lambda w: w + 0.5, llm.engine.params)
    llm.engine.update_params(new)
    held = llm.engine.params["layers"][1]["mixer"]["q"]["w"]
    assert held is new["layers"][1]["mixer"]["q"]["w"]
    llm.engine.update_params(weights(spec))  # these lie on one device
    assert llm.engine.params["embed"]["w"].sharding == NamedSharding(placement.mesh, PartitionSpec("model", None))
    assert tokens_of(llm) == tokens_of(LLM((spec, weights(spec)), **ENGINE))


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 8), (32, 8), (6, 2), (14, 2), (5, 5), (7, 1)])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 8, 16])
def test_every_query_head_is_computed_once_beside_its_own_kv_head(heads, num_shards):
    layout = head_layout(*heads, num_shards)
    group = heads[0] // heads[1]
    assert sorted(h for h in layout.q if h is not None) == list(range(heads[0]))
    assert len(layout.kv) % num_shards == 0
    each = len(layout.q) // len(layout.kv)
    for index, head in enumerate(layout.q):
        assert head is None or layout.kv[index // each] == head // group
    if heads[1] % num_shards == 0:
        assert layout == (tuple(range(heads[0])), tuple(range(heads[1])))


def test_fitted_weights_compute_the_same_as_those_they_were_made_from():
    spec = MODELS["awkward"]
    params = weights(spec)
    fitted = fit_heads(spec, 4)
    given = dict(flatten(params))
    made = map_specs(lambda path, leaf: fit_leaf(given[path], path, spec, 4), spec)
    assert {p: np.shape(w) for p, w in flatten(made)} == {p: s.shape for p, s in flatten(param_specs(fitted))}
    tokens = jnp.asarray(PROMPTS[1], jnp.int32)
    np.testing.assert_allclose(apply(made, tokens, fitted), apply(params, tokens, spec), atol=1e-4)


REFUSED = [
    (lambda: parallel(9), "tensor_parallel_size is 9 but JAX sees 8 cpu device"),
    (
        lambda: parallel(3).fit(llama(9, 3)),
        r"vocab is 64 \(embed.w\), which the 3 .* take 2 or 4 devices",
    ),
    (
        lambda: parallel(4).fit(norms_over_all_heads()),
        "8 query and 2 kv heads, .* one norm together, .* 4 devices",
    ),
    (lambda: parallel(3, rules=ShardingRules(vocab=None)).fit(mixture()), "ffn is 64 .* take 2 or 4 devices"),
    (lambda: Placement(Mesh(np.asarray(jax.devices()[:2]), ("x",))), r"ShardingRules.on\('x'\)"),
    (lambda: parallel(2, rules=ShardingRules(kv_heads=None)), "name one axis for both"),
    (lambda: parallel(2, rules=ShardingRules(embed="model")).fit(llama()), "cut vocab and embed along .*'model'"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_does_not_fit_a_mesh_is_refused_with_what_would(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_mesh_refuses_what_does_not_go_with_it():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("model",))
    with pytest.raises(ConfigError, match="leave one of them out"):
        LLM((llama(), weights(llama())), mesh=mesh, tensor_parallel_size=2, **ENGINE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long), 8])
def test_smollm2_answers_the_same_from_2_4_and_8_devices(size):
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
    greedy = SamplingParams(temperature=0, max_tokens=16)
    settings = {"max_num_seqs": 4, "max_model_len": 128, "num_pages": 64, "warmup": False}
    answers = []
    for more in ({}, {"tensor_parallel_size": size}):
        llm = LLM(smollm2_gguf(), **settings, **more)
        answers.append([o.outputs[0].token_ids for o in llm.generate(prompts, greedy, use_tqdm=False)])
    assert answers[0] == answers[1]
