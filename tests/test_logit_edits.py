"""Penalties, biases and forbidden tokens beside a plain formula, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.engine.logit_edits import row_edits
from jaxpaged.engine.request import Sequence
from jaxpaged.sampling_params import SamplingParams

VOCAB = 9
EOS = 8


def sequence(prompt: list[int], output: list[int], bad_words: tuple[tuple[int, ...], ...] = (), **params) -> Sequence:
    """As it stands when its next token is about to be sampled: planned, hence pending."""
    return Sequence(
        request_id="r",
        index=0,
        params=SamplingParams(**params),
        prompt_len=len(prompt),
        token_ids=prompt + output,
        max_tokens=99,
        seed=(0, 0),
        eos_token_ids=frozenset([EOS]),
        bad_words=bad_words,
        num_pending_tokens=1,
    )


def after(one: Sequence, logits: np.ndarray) -> np.ndarray:
    """The logits with the sequence's edits made, as `jaxpaged.model.sampling.edit` makes them."""
    logits = logits.astype(np.float64)
    edits = row_edits(one)
    if edits is not None:
        assert len(set(edits.token_ids.tolist())) == len(edits.token_ids) == len(edits.factor) == len(edits.add)
        assert [x.dtype for x in edits] == [np.int32, np.float32, np.float32]
        old = logits[edits.token_ids]
        logits[edits.token_ids] = np.where(old > 0, old / edits.factor, old * edits.factor) + edits.add
    return logits


def plain(one: Sequence, logits: np.ndarray) -> np.ndarray:
    """The same, token by token, from what the parameters mean."""
    params, output = one.params, one.token_ids[one.prompt_len :]
    changed = logits.astype(np.float64)
    for token in range(VOCAB):
        if token in one.token_ids:
            changed[token] *= params.repetition_penalty if changed[token] <= 0 else 1 / params.repetition_penalty
        changed[token] -= params.frequency_penalty * output.count(token)
        changed[token] -= params.presence_penalty * (token in output)
        changed[token] += (params.logit_bias or {}).get(token, 0.0)
        if len(output) < params.min_tokens and (token == EOS or token in params.stop_token_ids):
            changed[token] = -math.inf
        for *head, last in one.bad_words:
            if token == last and output[len(output) - len(head) :] == head:
                changed[token] = -math.inf
    return changed


tokens = st.integers(0, VOCAB - 1)
words = st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)
penalties = st.sampled_from([-1.5, -0.25, 0.0, 0.5, 2.0])
settings_of_requests = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.25, 2.0]),
        "frequency_penalty": penalties,
        "presence_penalty": penalties,
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.0, 3.0])),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(tokens, max_size=2),
    },
)


@given(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6), words, settings_of_requests)
def test_all_edits_together_are_what_their_parameters_say(
    prompt: list[int], output: list[int], bad_words: tuple[tuple[int, ...], ...], params: dict
) -> None:
    one = sequence(prompt, output, bad_words, **params)
    logits = np.linspace(-2, 2, VOCAB)
    np.testing.assert_allclose(after(one, logits), plain(one, logits), atol=1e-5)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5, "top_p": 0.5}, {"frequency_penalty": 1.0}, {"presence_penalty": 1.0}, {"logit_bias": {}}],
    ids=str,
)
def test_where_nothing_is_to_change_there_are_no_edits(params: dict) -> None:
    assert row_edits(sequence([1, 2], [], **params)) is None


def test_repetition_counts_the_prompt_frequency_and_presence_do_not() -> None:
    logits = np.ones(VOCAB)
    assert after(sequence([1], [2], repetition_penalty=2.0), logits).tolist() == [1, 0.5, 0.5, 1, 1, 1, 1, 1, 1]
    both = {"frequency_penalty": 0.5, "presence_penalty": 1.0}
    assert after(sequence([1], [2, 2, 3], **both), logits).tolist() == [1, 1, -1, -0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("num_output", range(5))
def test_no_token_before_min_tokens_ends_the_answer(num_output: int) -> None:
    """The first `min_tokens` tokens are none of those; the one after may be."""
    one = sequence([1], [2] * num_output, min_tokens=3, stop_token_ids=[4])
    banned = np.flatnonzero(np.isinf(after(one, np.zeros(VOCAB)))).tolist()
    assert banned == ([4, EOS] if num_output < 3 else [])


def test_tokens_still_on_the_device_count_as_generated() -> None:
    one = sequence([1], [2], min_tokens=3)
    one.num_pending_tokens = 3  # two unread ones, and the one to be sampled
    assert row_edits(one) is None


def test_a_bad_words_last_token_is_forbidden_after_its_others_only() -> None:
    word = ((5, 6, 7),)
    assert np.isinf(after(sequence([1], [5, 6], word), np.zeros(VOCAB))).nonzero()[0].tolist() == [7]
    assert row_edits(sequence([1], [6, 5], word)) is None
    assert row_edits(sequence([1, 5], [6], word)) is None  # the prompt is the caller's own
    assert np.isinf(after(sequence([1], [], ((3,),)), np.zeros(VOCAB))).nonzero()[0].tolist() == [3]


def test_a_bias_does_not_bring_back_what_is_forbidden() -> None:
    one = sequence([1], [], min_tokens=1, logit_bias={EOS: 1e6})
    assert after(one, np.zeros(VOCAB))[EOS] == -math.inf
