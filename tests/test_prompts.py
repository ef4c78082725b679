"""Prompts in every form that callers have them in, from one thread or several."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_chat_model import write_chat_model

from jaxpaged import LLM, AsyncEngine, RequestError, SamplingParams, StructuredOutputsParams

ROOMY = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_pages": 129, "page_size": 4, "warmup": False}
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("prompts") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **ROOMY)


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


ONE = [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), jnp.array([1, 2]), np.array([1, 2], np.uint8)]


@pytest.mark.parametrize("prompt", ["ban", {"prompt": "ban"}, *ONE], ids=lambda prompt: type(prompt).__name__)
def test_one_prompt_is_one(llm, prompt):
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == (llm.tokenizer.encode("ban") if isinstance(prompt, (str, dict)) else [1, 2])
    assert all(type(token) is int for token in output.prompt_token_ids)


@pytest.mark.parametrize("kind", [list, tuple, iter], ids=str)
def test_several_prompts_of_any_form_are_answered_in_their_order(llm, kind):
    ids = llm.tokenizer.encode("ban")
    forms = ["ban", ids, np.array(ids), jnp.array(ids), {"prompt": "ban"}, {"prompt_token_ids": ids, "prompt": "BAN"}]
    outputs = llm.generate(kind([*forms, "123"]), GREEDY, use_tqdm=False)
    assert len(set(texts(outputs[:-1]))) == 1 and [o.prompt_token_ids for o in outputs[:-1]] == [ids] * len(forms)
    assert [o.prompt for o in outputs] == ["ban", None, None, None, "ban", "BAN", "123"]
    assert texts(outputs[-1:]) == texts(llm.generate("123", GREEDY, use_tqdm=False))


def test_rows_of_an_array_are_prompts_and_nothing_gets_nothing(llm):
    rows = llm.generate(np.array([[1, 2, 3], [3, 2, 1]]), GREEDY, use_tqdm=False)
    assert [row.prompt_token_ids for row in rows] == [[1, 2, 3], [3, 2, 1]]
    assert llm.generate([], GREEDY) == llm.generate(iter(()), GREEDY) == llm.generate(np.array([]), GREEDY) == []
    assert llm.score([]) == [] and llm.embed([]).shape == (0, 32)
    assert llm.score([{"prompt": "ban"}], [np.array([1])])[0].shape == (1,)
    assert [o.outputs[0].text for o in llm.stream({"prompt": "ban"}, GREEDY)]


def test_a_salt_shares_pages_with_its_own_only(llm):
    prompt = {"prompt": "banana banana banana", "cache_salt": "a"}
    cached = [llm.generate(prompt | {"cache_salt": salt}, GREEDY)[0].num_cached_tokens for salt in "aab"]
    assert cached[0] == cached[2] == 0 < cached[1]


REFUSED = [
    ({"text": "x"}, "a prompt has no 'text'; known: prompt, prompt_token_ids, cache_salt"),
    ({"prompt": "x", "multi_modal_data": {}}, "a prompt has no 'multi_modal_data'"),
    ({}, "the prompt is {}; give its text as 'prompt', or 'prompt_token_ids'"),
    ({"prompt": [1]}, "give its text as 'prompt'"),
    ({"prompt": "x", "cache_salt": 3}, "cache_salt is 3; it must be text"),
    (np.array([1.5]), r"an array of float64 of shape \(1,\); token ids are whole numbers"),
    (np.array(3), r"an array of int64 of shape \(\)"),
    (np.zeros((1, 2, 3), int), r"an array of int64 of shape \(2, 3\)"),
    (5, "the prompts are a int; give text"),
    (None, "the prompts are a NoneType"),
    (b"ban", "the prompt is a bytes"),
    ([None], "the prompt is a NoneType"),
    ([1, "x"], "the prompt holds 'x'"),
    ([{"prompt_token_ids": [1, "x"]}], "the prompt holds 'x'"),
    ("x" * 5_000_000, "the prompt has 5,000,000 characters but max_model_len is 512"),
    ([[1] * 600], "the prompt has 600 tokens but max_model_len is 512"),
]


@pytest.mark.parametrize(("prompts", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_no_prompt_is_said_to_be_none(llm, prompts, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm.engine.stats().num_waiting == 0


def test_parameters_of_another_kind_are_refused(llm):
    with pytest.raises(RequestError, match=r"the sampling parameters are {'temperature': 0}; give a SamplingParams"):
        llm.generate("ban", {"temperature": 0})
    with pytest.raises(RequestError, match="give a BeamSearchParams"):
        llm.beam_search("ban", GREEDY)


def test_a_chat_takes_what_its_template_asks_for_and_nothing_else(llm):
    hello = [{"role": "user", "content": "ban"}, {"role": "assistant", "content": "12"}]
    plain = llm.encode_chat(hello)
    assert llm.encode_chat(hello, enable_thinking=False, tools=None) == plain
    assert (
        llm.encode_chat(hello, continue_final_message=True)
        == plain[: len(llm.tokenizer.encode("user:ban\nassistant:12"))]
    )
    with pytest.raises(RequestError, match="the chat template asks for no 'temperature'; known: add_generation_prompt"):
        llm.chat(hello, temperature=0)
    other = {"chat_template": "{{ who }}{{ messages[0].content }}", "chat_template_kwargs": {"who": "123"}}
    (output,) = llm.chat(hello, GREEDY, use_tqdm=False, **other)
    assert output.prompt_token_ids == llm.tokenizer.encode("123ban")


def test_threads_share_one_model_and_get_what_they_would_get_alone(llm):
    pairs = [(f"ban {i}", f"ban {i}an") for i in range(8)]
    alone = [texts(llm.generate(pair, GREEDY, use_tqdm=False)) for pair in pairs]
    found, most = {}, []
    step = llm.engine.step
    llm.engine.step = lambda: (most.append(llm.engine.stats().num_running), step())[1]

    def ask(place):
        if place % 4 == 3:
            found[place] = ["".join(o.outputs[0].text for o in llm.stream(p, GREEDY)) for p in pairs[place]]
        else:
            found[place] = texts(llm.generate(pairs[place], GREEDY, use_tqdm=False))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        llm.engine.step = step
    assert [found.get(place) for place in range(8)] == alone
    assert max(most) > 2, "they run together"
    assert not llm._inbox and llm.engine.stats().pages_held == 0


def test_it_runs_inside_an_event_loop_as_a_notebook_has_one(llm):
    async def cell():
        return llm.generate("ban", GREEDY, use_tqdm=False)

    assert texts(asyncio.run(cell())) == texts(llm.generate("ban", GREEDY, use_tqdm=False))


def test_async_prompts_have_the_same_forms(folder, llm):
    async def ask():
        async with AsyncEngine.load(folder, **ROOMY) as engine:
            ids = np.array(llm.tokenizer.encode("ban"))
            for prompt in ({"prompt": "ban"}, {"prompt_token_ids": ids, "prompt": "ban"}, ids):
                async for output in engine.generate(prompt, GREEDY, output_kind="final"):
                    yield output
            assert (await engine.embed({"prompt": "ban"})).shape == (32,)

    async def run():
        return [output async for output in ask()]

    outputs = asyncio.run(run())
    assert texts(outputs) == texts(llm.generate(["ban"] * 3, GREEDY, use_tqdm=False))
    assert [output.prompt for output in outputs] == ["ban", "ban", None]


def test_outputs_and_parameters_are_plain_data(llm):
    form = StructuredOutputsParams(regex="[ab]+")
    params = SamplingParams(
        n=2, logprobs=2, prompt_logprobs=1, seed=3, stop=["x"], logit_bias={1: 2.0}, structured_outputs=form
    )
    for twin in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), copy.copy(params)):
        assert twin == params and twin.form == form
    outputs = llm.generate("ban", params, use_tqdm=False)
    assert pickle.loads(pickle.dumps(outputs)) == outputs == copy.deepcopy(outputs)


def test_a_model_that_is_dropped_takes_its_memory_along(folder):
    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before, sizes = live(), []
    for _ in range(3):
        model = LLM(folder, **ROOMY)
        model.generate("ban", GREEDY, use_tqdm=False)
        gone = weakref.ref(model)
        del model
        sizes.append(live() - before)
        assert gone() is None
    assert sizes == [0, 0, 0]
