"""One's own function on the logits: with a state, in mixed batches, after preemption, in forks, compiled once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import moved

from jaxpaged import LLM, LogitsProcessor, RequestError, SamplingParams
from jaxpaged.engine.processors import ROWS
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,) * 2, _NORM, 16, tied_head=False)
PARAMS = jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=1))
PROMPTS = [np.random.default_rng(i).integers(0, 40, 3 + i).tolist() for i in range(12)]


def make(**settings):
    roomy = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_pages": 128, "page_size": 4, "warmup": False}
    return LLM((SPEC, PARAMS), **(roomy | settings))


def only_even(logits, state):
    return jnp.where(jnp.arange(40) % 2 == 0, logits, -jnp.inf), state


# No token twice: the state has a mark for each token of the prompt and of the answer.
NEW_TOKENS = LogitsProcessor(
    apply=lambda logits, seen: (jnp.where(seen, -jnp.inf, logits), seen),
    init=lambda prompt: np.isin(np.arange(40), prompt),
    observe=lambda seen, token: seen.at[token].set(True),
)


def generate(llm, each, prompts=PROMPTS):
    return [[c.token_ids for c in o.outputs] for o in llm.generate(prompts, each, use_tqdm=False)]


def drawn(processor, **more):
    return [SamplingParams(max_tokens=10, seed=i, logits_processor=processor, **more) for i in range(len(PROMPTS))]


def test_functions_change_their_own_rows_of_a_mixed_batch():
    each = [SamplingParams(max_tokens=10, seed=i) for i in range(12)]
    mixed = [p if i % 3 == 0 else drawn(only_even if i % 3 == 1 else NEW_TOKENS)[i] for i, p in enumerate(each)]
    plain = generate(make(), each)
    for index, (prompt, (tokens,)) in enumerate(zip(PROMPTS, generate(make(), mixed), strict=True)):
        match index % 3:
            case 0:
                assert tokens == plain[index][0]
            case 1:
                assert all(token % 2 == 0 for token in tokens)
            case 2:
                assert len({*prompt, *tokens}) == len(set(prompt)) + 10


@pytest.mark.slow
def test_states_outlive_preemption():
    expected = generate(make(), drawn(NEW_TOKENS))
    crowded = make(num_pages=24)
    assert generate(crowded, drawn(NEW_TOKENS)) == expected
    assert crowded.engine.stats().num_preemptions > 0


def test_each_completion_and_fork_has_a_state_of_its_own():
    llm = make()
    for prompt, completions in zip(PROMPTS, generate(llm, drawn(NEW_TOKENS, n=3)), strict=True):
        assert len({tuple(c) for c in completions}) > 1
        assert all(len({*prompt, *c}) == len(set(prompt)) + 10 for c in completions)
    engine = llm.engine
    engine.add_request("forked", [1, 2, 3], drawn(NEW_TOKENS)[0], output_kind="final")
    for _ in range(5):
        engine.step()
    engine.fork("forked", 2)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    for completion in outputs[0].outputs:
        assert len({1, 2, 3, *completion.token_ids}) == 13


def test_a_function_is_traced_and_compiled_once_for_all_batches():
    traced = []

    def counting(logits, state):
        traced.append(1)
        return logits, state

    llm = make()
    generate(llm, drawn(None))
    generate(llm, drawn(only_even))  # every bucket has its rows taken and put back now
    compiled = llm.engine.stats().num_compilations
    generate(llm, drawn(counting))
    assert llm.engine.stats().num_compilations == compiled + 1
    assert len(traced) == 2  # to check it, and to compile it
    generate(llm, drawn(counting))
    assert len(traced) == 2


REFUSED = [
    (lambda logits, state: logits[:5], "cannot be traced"),
    (lambda logits, state: (logits[:5], state), r"gives logits from apply of float32\[5\]; it must be float32\[40\]"),
    (LogitsProcessor(lambda logits, n: (logits, n[None]), init=lambda _: np.int32(0)), "a state from apply"),
    (LogitsProcessor(lambda logits, n: (logits, n), observe=lambda n, token: token), "a state from observe"),
]


@pytest.mark.parametrize(("processor", "message"), REFUSED, ids=["no pair", "logits", "state", "observed state"])
def test_functions_that_do_not_fit_are_refused_before_anything_runs(processor, message):
    with pytest.raises(RequestError, match=message):
        make().engine.add_request("0", [1, 2], SamplingParams(logits_processor=processor))


def test_what_is_no_function_is_refused():
    with pytest.raises(RequestError, match="logits_processor is 3; it must be a function"):
        SamplingParams(logits_processor=3)


MESHES = [
    {"data_parallel_size": 2, "tensor_parallel_size": 2, "num_pages": 24},
    *(
        pytest.param(sizes, marks=pytest.mark.long)
        for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2})
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_functions_see_whole_rows_on_a_mesh(mesh):
    """Of their own sequences, on whatever data shard, in completions and after preemption too."""

    def cut_below_the_median(logits, state):
        return jnp.where(logits < jnp.median(logits), -jnp.inf, logits), state

    each = [
        (SamplingParams(max_tokens=10, seed=i), *(drawn(f, n=2)[i] for f in (cut_below_the_median, NEW_TOKENS)))[i % 3]
        for i in range(12)
    ]
    expected = generate(make(), each)
    llm = make(**mesh)
    assert generate(llm, each) == expected
    assert llm.engine.stats().num_preemptions > 0 or "num_pages" not in mesh
    assert generate(llm, each) == expected
    compiled = llm.engine.stats().num_compilations
    assert generate(llm, each) == expected
    assert llm.engine.stats().num_compilations == compiled
    calls = llm.engine.runner._compiler._functions.items()
    moves = [moved(call.as_text()) for (name, _), call in calls if name in ("take", "put")]
    assert max(array.size for found in moves for array in found) <= ROWS * 40


def test_only_one_process_takes_them(monkeypatch):
    engine = make().engine
    monkeypatch.setattr(type(engine.runner), "num_processes", 2)
    with pytest.raises(RequestError, match="logits_processor does not work over 2 processes yet"):
        engine.add_request("0", [1, 2], SamplingParams(logits_processor=only_even))
