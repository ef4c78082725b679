"""Memory lent to the trainer in the same process: the pool and the weights go, and come back without compiling."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.errors import AsleepError, ConfigError
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,) * 2, _NORM, 16, tied_head=False)
PROMPTS = [np.random.default_rng(i).integers(0, 40, 5 + 3 * i).tolist() for i in range(6)]
PARAMS = SamplingParams(temperature=0.8, max_tokens=12, seed=3)


def weights(seed=1):
    return jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=seed))


def make(params):
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 61, "page_size": 4}
    return LLM((SPEC, params), warmup=False, **settings)


def generate(llm):
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def run(engine, after, nap):
    """Tokens by request, with a nap after so many steps."""
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, PARAMS)
    done, steps = {}, 0
    while engine.has_unfinished:
        if steps == after:
            nap()
        done |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
        steps += 1
    return [done[str(index)] for index in range(len(PROMPTS))]


def pools():
    """How many arrays with the pool's shape are in memory."""
    gc.collect()
    return sum(a.shape == (61, 4, 2, 2, 8) for a in jax.live_arrays())


@pytest.mark.parametrize(("level", "after"), [(1, 0), (1, 3), (2, 5), (2, 9)])
def test_requests_under_way_sleep_too_and_go_on_with_the_same_tokens(level, after):
    params = weights()
    llm = make(params)
    expected = generate(llm)
    compiled = llm.engine.stats().num_compilations

    def nap():
        llm.engine.sleep(level)
        assert llm.engine.is_sleeping
        llm.engine.wake_up(params if level == 2 else None)
        assert not llm.engine.is_sleeping

    assert run(llm.engine, after, nap) == expected
    assert llm.engine.stats().num_compilations == compiled


def test_the_pool_is_freed_and_the_weights_are_where_nobody_else_holds_them():
    before = pools()
    llm = make(weights())
    old = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(llm.engine.params)]
    pool = jax.tree.leaves(llm.engine.runner.cache)
    assert pools() == before + 2
    llm.engine.sleep(1)
    assert all(leaf.is_deleted() for leaf in pool)
    assert pools() == before
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(llm.engine.params)] == old
    num_arrays = len(jax.live_arrays())
    llm.engine.sleep(2)
    gc.collect()
    assert num_arrays - len(jax.live_arrays()) == len(old)


def test_a_trainers_arrays_outlive_level_2():
    params = weights()
    llm = make(params)
    expected = generate(llm)
    llm.engine.sleep(2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    llm.engine.wake_up(params)
    for ours, given in zip(jax.tree.leaves(llm.engine.params), jax.tree.leaves(params), strict=True):
        assert ours.unsafe_buffer_pointer() == given.unsafe_buffer_pointer()
    assert generate(llm) == expected


def test_what_cannot_be_done_asleep_says_so_and_the_rest_waits():
    llm = make(weights())
    engine = llm.engine
    engine.sleep(2)
    with pytest.raises(AsleepError, match=r"call wake_up\(\) before step\(\)"):
        engine.step()
    with pytest.raises(ConfigError, match=r"call wake_up\(params\)"):
        engine.wake_up()
    with pytest.raises(ConfigError, match="missing head"):
        engine.wake_up({k: v for k, v in weights().items() if k != "head"})
    with pytest.raises(ConfigError, match="level is 3; known: 1"):
        engine.sleep(3)
    assert engine.is_sleeping
    engine.add_request("a", PROMPTS[0], PARAMS)
    engine.add_request("b", PROMPTS[1], PARAMS)
    assert engine.abort("b")
    engine.update_params(weights(2))
    engine.wake_up()
    done = {}
    while engine.has_unfinished:
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert done["b"].finish_reason == "abort"
    assert done["a"].token_ids == generate(make(weights(2)))[0]
