"""Layers in pipeline stages: the same tokens, each stage's weights and pages on its devices, groups that overlap."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from everything import everything
from hlo import Moved, moved
from jax.sharding import Mesh
from real_model import smollm2_gguf
from test_sharding import ENGINE, MODELS, PROMPTS, llama, tokens_of, weights

from jaxpaged import LLM, SamplingParams, ShardingRules
from jaxpaged.engine.batch import Bucket
from jaxpaged.errors import ConfigError
from jaxpaged.model.params import flatten
from jaxpaged.model.sharding import Placement, parallel
from jaxpaged.model.stages import make_stages

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def engine_of(name: str = "llama", stages: int = 2, **settings) -> LLM:
    return LLM((MODELS[name], weights(MODELS[name])), pipeline_parallel_size=stages, **(ENGINE | settings))


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma"))])
def test_stages_cut_over_devices_give_the_tokens_of_one(name):
    staged = engine_of(name, tensor_parallel_size=2)
    assert tokens_of(staged) == tokens_of(LLM((MODELS[name], weights(MODELS[name])), **ENGINE))
    assert staged.engine.stats().pages_held == 0


@pytest.mark.slow
def test_smollm2_answers_the_same_from_stages():
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
    said = []
    for sizes in ({}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}):
        llm = LLM(smollm2_gguf(), max_num_seqs=4, max_model_len=128, num_pages=64, warmup=False, **sizes)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        said.append([o.outputs[0].token_ids for o in outputs])
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "more"),
    [
        ("data", {}),
        pytest.param("prefill_context", {"host_cache_gb": 2**-14}, marks=pytest.mark.long),
        pytest.param("tensor", {"cache_dtype": "int8"}, marks=pytest.mark.long),
    ],
)
def test_all_that_a_step_can_do_is_done_in_stages(axis, more):
    said = []
    for sizes in ({"stages": 1}, {f"{axis}_parallel_size": 2}):
        llm = engine_of(num_pages=24, **sizes, **more)
        said.append(everything(llm, times=2))  # the second time with what was kept
        assert bool(llm.engine.stats().host_pages_moved_in) == ("host_cache_gb" in more)
    (tokens, one), (staged_tokens, staged) = said
    assert staged_tokens == tokens
    for a, b in zip(one, staged, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2 if "cache_dtype" in more else 1e-4)


def test_each_stage_holds_its_layers_and_a_tied_head_is_held_at_both_ends():
    llm = engine_of("gpt2", tensor_parallel_size=2)
    held = {path: {d.id for d in leaf.sharding.device_set} for path, leaf in flatten(llm.engine.params)}
    assert {path: ids for path, ids in held.items() if not path.startswith("layers")} == {
        **{"embed.w": {0, 1, 2, 3}, "positions.w": {0, 1}},
        **{"norm.w": {2, 3}, "norm.b": {2, 3}},
    }
    assert all(
        ids == ({0, 1} if path.startswith("layers.0.") else {2, 3}) for path, ids in held.items() if "layers" in path
    )
    for leaf, ids in zip(jax.tree.leaves(llm.engine.runner.cache), ({0, 1}, {2, 3}), strict=True):
        assert {(s.device.id, s.data.nbytes) for s in leaf.addressable_shards} == {(i, leaf.nbytes // 2) for i in ids}


@pytest.mark.parametrize("bucket", [Bucket(4, 0, 0), Bucket(4, 32, 4)], ids=["decode", "mixed"])
def test_a_stage_sums_twice_a_layer_and_moves_neither_weights_nor_pages(bucket):
    llm = LLM((llama(), weights(llama())), pipeline_parallel_size=2, tensor_parallel_size=2, **ENGINE)
    of_stages = llm.engine.runner.functions._of
    pools = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.runner.cache))
    for functions, others in zip(of_stages, (1, 0), strict=True):
        compiled = functions.forward(bucket)
        sums = Moved("all-reduce", "f32", (bucket.num_tokens, llama().dim))
        assert moved(compiled.as_text()) == {sums: 2 + others}
        assert compiled.memory_analysis().alias_size_in_bytes >= pools / 2 / 2


def test_groups_are_dispatched_one_after_the_other_and_keep_their_sequences():
    llm = engine_of(max_num_seqs=4)
    runner, seen = llm.engine.runner, []
    dispatch = runner.dispatch

    def watched(plans, before):
        seen.append([chunk.sequence.request_id for plan in plans for chunk in plan.decodes])
        return dispatch(plans, before)

    runner.dispatch = watched
    llm.generate([[1, 2, 3], [4, 5, 6], [7, 8, 9], [2, 4, 6]], replace(GREEDY, ignore_eos=True), use_tqdm=False)
    decoding = [ids for ids in seen if ids]
    assert all(len(ids) == 2 for ids in decoding)
    assert decoding[::2] == [decoding[0]] * 5 and decoding[1::2] == [decoding[1]] * 5
    assert set(decoding[0]).isdisjoint(decoding[1])


@pytest.mark.slow
def test_a_prompt_that_begins_like_another_of_the_same_step_finds_its_pages_filled():
    head = np.random.default_rng(3).integers(0, 64, 16).tolist()
    prompts = [[*head, tail] for tail in range(4)]
    llm = engine_of(max_num_batched_tokens=64)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [0, 16, 16, 16]
    one = engine_of(stages=1, max_num_batched_tokens=64).generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in one]


@pytest.mark.slow
def test_new_weights_sleep_and_lost_weights_are_as_on_one_device():
    spec = MODELS["gpt2"]
    llm, others = engine_of("gpt2"), jax.tree.map(lambda w: w * 1.5, weights(spec))
    want = tokens_of(LLM((spec, others), **ENGINE))
    before = tokens_of(llm)
    llm.engine.update_params(others)
    assert tokens_of(llm) == want != before
    placed = llm.engine.params
    llm.engine.sleep(2)
    llm.engine.wake_up(jax.tree.map(lambda w: w + 0, placed))
    assert tokens_of(llm) == want
    llm.engine.add_request("lost", PROMPTS[0], GREEDY)
    llm.engine.step()
    for leaf in jax.tree.leaves(llm.engine.params):
        leaf.delete()
    with pytest.raises(ConfigError, match="deleted, or donated"):
        llm.engine.step()
    llm.engine.update_params(others)
    while llm.engine.has_unfinished:
        outputs = llm.engine.step()
    assert list(outputs[0].outputs[0].token_ids) == want[0]


def test_stages_share_the_layers_as_equally_as_can_be():
    assert [(s.begin, s.end) for s in make_stages(30, 4)] == [(0, 8), (8, 16), (16, 23), (23, 30)]
    assert [s.is_first for s in make_stages(3, 3)] == [True, False, False]
    assert [s.is_last for s in make_stages(3, 3)] == [False, False, True]


MESH = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("host", "model"))


def test_a_mesh_of_ones_own_takes_stages_along_any_axis():
    llm = LLM((llama(), weights(llama())), mesh=MESH, sharding_rules=ShardingRules(layers="host"), **ENGINE)
    held = [{d.id for d in layer["mixer"]["q"]["w"].sharding.device_set} for layer in llm.engine.params["layers"]]
    assert held == [{0, 1}, {2, 3}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: engine_of(stages=3), "the model has 2 layers, too few for 3 pipeline stages; take at most 2"),
        (lambda: engine_of(stages=0), "pipeline_parallel_size is 0"),
        (lambda: parallel(4, layers=4), "tensor_parallel_size is 4 and pipeline_parallel_size 4, 16 .* JAX sees 8"),
        (lambda: Placement(MESH, ShardingRules(layers="model")), "layers and heads, kv_heads.* layers of its own"),
        (
            lambda: Placement(MESH, ShardingRules(layers="stage")),
            "cut layers along mesh axis 'stage', but the mesh has",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(call, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
