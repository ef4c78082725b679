"""Weights swapped under a live engine: the trainer's arrays themselves, without compiling, at a known token."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.bench.shapes import SHAPES
from jaxpaged.convert.families import FAMILIES
from jaxpaged.errors import ConfigError
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,) * 2, _NORM, 16, tied_head=False)
OLD, NEW = (jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=seed)) for seed in (1, 2))
PROMPTS = [np.random.default_rng(i).integers(0, 40, 5 + 3 * i).tolist() for i in range(6)]
PARAMS = SamplingParams(temperature=0, max_tokens=12)


def make(params=OLD, **settings):
    roomy = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 64, "page_size": 4, "warmup": False}
    return LLM((SPEC, params), **(roomy | settings))


def generate(llm):
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def run(engine, after=0, then=lambda: None):
    """Outputs by request, with a call after so many steps."""
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, PARAMS)
    done = {}
    steps = 0
    while engine.has_unfinished:
        if steps == after:
            then()
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
        steps += 1
    return [done[str(index)] for index in range(len(PROMPTS))]


def test_the_engine_uses_the_given_arrays_themselves_and_compiles_nothing():
    llm = make()
    before = generate(llm)
    compiled = llm.engine.stats().num_compilations
    llm.engine.update_params(NEW)
    for ours, given in zip(jax.tree.leaves(llm.engine.params), jax.tree.leaves(NEW), strict=True):
        assert ours.unsafe_buffer_pointer() == given.unsafe_buffer_pointer()
    after = generate(llm)
    assert after == generate(make(NEW))
    assert after != before
    assert llm.engine.stats().num_compilations == compiled


def swap_a_hundred_times(spec, trees, **settings):
    """An engine at work on 32 requests while its weights go to and fro, a swap before each step."""
    engine = LLM((spec, trees[0]), max_num_seqs=32, page_size=4, max_model_len=128, warmup=False, **settings).engine
    for index in range(32):
        prompt = np.random.default_rng(index).integers(0, spec.vocab_size, 3).tolist()
        engine.add_request(f"busy {index}", prompt, SamplingParams(max_tokens=110, seed=index, ignore_eos=True))
    for _ in range(4):
        engine.step()
    compiled = engine.stats().num_compilations
    for swap in range(1, 101):
        engine.update_params(trees[swap % 2])
        ours, given = jax.tree.leaves(engine.params), jax.tree.leaves(trees[swap % 2])
        assert all(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in zip(ours, given, strict=True))
        engine.step()
        assert engine.stats().num_running == 32
    assert engine.stats().num_compilations == compiled
    return engine


@pytest.mark.slow
def test_requests_after_a_hundred_swaps_at_full_load_are_answered_as_by_a_fresh_engine():
    engine = swap_a_hundred_times(replace(SPEC, max_positions=128), (OLD, NEW), num_pages=1200)
    engine.update_params(NEW)
    assert [o.token_ids for o in run(engine)] == generate(make(NEW))


@pytest.mark.slow
def test_weights_of_smollm2s_shape_are_swapped_a_hundred_times_at_full_load():
    config = SHAPES["smollm2-135m"]
    spec = FAMILIES[config["model_type"]].spec(config)
    first, second = (dummy_params(spec, seed) for seed in (1, 2))
    engine = swap_a_hundred_times(
        spec, (first, second), num_pages=1200, max_num_batched_tokens=128, batch_invariant=True
    )
    engine.update_params(second)
    prompt, params = [1, 2, 3, 4, 5], SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    engine.add_request("after", prompt, params, output_kind="final")
    after = next(o for _ in range(200) for o in engine.step() if o.request_id == "after")
    fresh = LLM((spec, second), max_num_seqs=1, num_pages=16, page_size=4, warmup=False, batch_invariant=True)
    (expected,) = fresh.generate([prompt], params, use_tqdm=False)
    assert after.outputs[0].token_ids == expected.outputs[0].token_ids
    assert after.outputs[0].logprobs == expected.outputs[0].logprobs


def test_weights_that_lie_on_another_device_are_moved_to_the_engines():
    llm = make()
    generate(llm)
    compiled = llm.engine.stats().num_compilations
    elsewhere = jax.device_put(NEW, jax.devices()[1])
    llm.engine.update_params(elsewhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(llm.engine.params)} == {NEW["norm"]["w"].sharding}
    assert generate(llm) == generate(make(NEW))
    assert llm.engine.stats().num_compilations == compiled


def test_prefixes_of_old_weights_are_not_found():
    llm = make()
    generate(llm)
    llm.engine.update_params(NEW)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [0] * len(PROMPTS)


def test_keep_goes_on_and_tells_which_weights_made_which_token():
    engine = make().engine
    outputs = run(engine, after=6, then=lambda: engine.update_params(NEW))
    plain = generate(make())
    assert {v for o in outputs for v in o.weight_versions} == {0, 1}
    for output, tokens in zip(outputs, plain, strict=True):
        versions = output.weight_versions
        assert versions == sorted(versions)
        old = versions.count(0)
        assert output.token_ids[:old] == tokens[:old]
    assert len(outputs[0].token_ids) == 12


@pytest.mark.parametrize("after", [0, 1, 5])
def test_weights_donated_under_a_live_engine_cost_no_request_its_tokens(after):
    given = jax.tree.map(jnp.copy, OLD)
    engine = make(given).engine
    train = jax.jit(lambda params: jax.tree.map(lambda w: w * 1.5, params), donate_argnums=0)

    def donate():
        train(given)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"deleted, or donated .*; call update_params with the new arrays"):
                engine.step()
        with pytest.raises(ConfigError, match=r"\d+ of the new params were deleted or donated, embed.w the first"):
            engine.update_params(given)
        engine.update_params(OLD)

    assert [o.token_ids for o in run(engine, after, then=donate)] == generate(make())
    assert engine.stats().pages_held == 0


def test_recompute_gives_what_the_new_weights_say_of_the_tokens_so_far():
    engine = make().engine
    outputs = run(engine, after=6, then=lambda: engine.update_params(NEW, policy="recompute"))
    fresh = make(NEW)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        old = output.weight_versions.count(0)
        rest = SamplingParams(temperature=0, max_tokens=12 - old)
        if old == 12:
            continue
        (expected,) = fresh.generate([prompt + output.token_ids[:old]], rest, use_tqdm=False)
        assert output.token_ids[old:] == expected.outputs[0].token_ids
    assert 0 < outputs[0].weight_versions.count(0) < 12


def test_abort_ends_what_is_under_way():
    engine = make().engine
    outputs = run(engine, after=4, then=lambda: engine.update_params(NEW, policy="abort"))
    assert {o.finish_reason for o in outputs} == {"abort"}
    assert engine.stats().pages_held == 0


def test_params_that_do_not_fit_change_nothing_and_name_every_leaf():
    llm = make()
    expected = generate(llm)
    wrong = {k: v for k, v in NEW.items() if k != "head"} | {"norm": {"w": jnp.zeros(5)}, "more": {"w": jnp.zeros(2)}}
    with pytest.raises(ConfigError) as error:
        llm.engine.update_params(wrong)
    for part in ("missing head.w (16, 40)", "unexpected more.w (2,)", "norm.w has shape (5,), needs (16,)"):
        assert part in str(error.value)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), NEW)
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer\.q\.w is bfloat16, needs float32"):
        llm.engine.update_params(half)
    with pytest.raises(ConfigError, match="policy is 'wait'; known: keep, recompute, abort"):
        llm.engine.update_params(NEW, policy="wait")
    assert generate(llm) == expected
