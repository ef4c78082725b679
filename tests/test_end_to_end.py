"""A real checkpoint, SmolLM2-135M-Instruct: the tokens that transformers gives, however the requests are run."""

from __future__ import annotations

import numpy as np
import pytest
from real_model import smollm2_gguf

from jaxpaged import LLM, SamplingParams

END = 2
CAPITAL = [504, 3575, 282, 4649, 314, 7042, 30, 2]
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a hash table is to a child.",
    "List three primary colours.",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 12?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes with exact amounts in grams.",
    "Why is the sky blue?",
    "Name the planets of the solar system in order, starting at the sun.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarise in one sentence: The quick brown fox jumps over the lazy dog while the cat sleeps by the warm stove.",
    "What should I pack for a week in the mountains in winter?",
    "Tell me a story about a robot that learns to paint, in five sentences.",
    "How do vaccines work?",
    "Complete the sentence: Once upon a time, in a village far away,",
]
NUM_TOKENS = 40


def load(**settings):
    return LLM(smollm2_gguf(), warmup=False, max_model_len=256, **settings)


@pytest.fixture(scope="module")
def llm():
    return load(max_num_seqs=16)


@pytest.fixture(scope="module")
def prompts(llm):
    return [llm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def greedy(llm, prompts):
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def batched(llm, prompts):
    return greedy(llm, prompts)


def test_the_capital_of_france(llm):
    (output,) = llm.chat(
        [{"role": "user", "content": QUESTIONS[0]}], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False
    )
    assert output.outputs[0].token_ids == CAPITAL
    assert output.outputs[0].text == "The capital of France is Paris."
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


WAYS = {
    "alone": {"max_num_seqs": 1},
    "chunked": {"max_num_seqs": 4, "max_num_batched_tokens": 7},
    "preempted": {"max_num_seqs": 16, "num_pages": 30},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS.keys())
def test_real_prompts_give_the_same_tokens_in_every_way(prompts, batched, settings):
    llm = load(**settings)
    assert greedy(llm, prompts) == batched
    assert (llm.engine.stats().num_preemptions > 0) == ("num_pages" in settings)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(golden, prompts, batched):
    """Greedy in float32, token for token: a rounding that differs would show within 16 x 40 tokens."""
    want = golden("smollm2_greedy", lambda: {"tokens": _tokens_of_transformers(prompts)})["tokens"]
    got = np.full_like(want, -1)
    for row, tokens in zip(got, batched, strict=True):
        row[: len(tokens)] = tokens
    np.testing.assert_array_equal(got, want)


def _tokens_of_transformers(prompts):
    """One by one, from the same dequantised weights; -1 past the end."""
    import baseline
    import torch

    model = baseline.load(smollm2_gguf(), None, "float32")
    tokens = np.full((len(prompts), NUM_TOKENS), -1, np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, eos_token_id=END)
        row[: out.shape[1] - len(prompt)] = out[0, len(prompt) :].numpy()
    return tokens
