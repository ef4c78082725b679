"""Text as it comes: equal to decoding everything at the end, cut exactly at stop strings, never shown too early."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_model import smollm2_gguf
from tiny_vocabularies import byte_level_metadata, sentencepiece_metadata

from jaxpaged.convert.gguf_reader import gguf_metadata
from jaxpaged.engine.detokenizer import Detokenizer
from jaxpaged.engine.tokenizer import Tokenizer, load_tokenizer
from jaxpaged.sampling_params import SamplingParams

TEXTS = [
    "The capital of France is Paris.",
    "naïve café, 10:30: 25 °C",
    "你好,世界。今日は良い天気ですね。",
    "👍🏽 family 👨‍👩‍👧‍👦 flags 🇫🇷🇯🇵 done",
    "\U0001d518\U0001d52b \u200d\ufffd\n\n\ttabs  spaces ",
]


@functools.cache
def smollm2() -> Tokenizer:
    tokenizer = load_tokenizer(gguf_metadata(smollm2_gguf()))
    assert tokenizer is not None
    return tokenizer


@functools.cache
def byte_level() -> Tokenizer:
    tokenizer = load_tokenizer(byte_level_metadata())
    assert tokenizer is not None
    return tokenizer


@functools.cache
def sentencepiece() -> Tokenizer:
    tokenizer = load_tokenizer(sentencepiece_metadata())
    assert tokenizer is not None
    return tokenizer


def stream(tokenizer, token_ids, *, prompt=(), **params):
    """The deltas of one token at a time, and the detokenizer at the end."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), prompt)
    deltas = []
    for token_id in token_ids:
        stopped = detokenizer.append([token_id])
        deltas.append(detokenizer.delta())
        if stopped is not None:
            break
    detokenizer.finish()
    return [*deltas, detokenizer.delta()], detokenizer


SPECIAL, BYTES = st.integers(0, 16), st.integers(17, 17 + 255)  # as SmolLM2 numbers them


@given(token_ids=st.lists(st.integers(0, 49151) | BYTES | SPECIAL, max_size=40), skip=st.booleans())
@settings(deadline=None, max_examples=300)
def test_deltas_of_random_tokens_add_up_to_the_decoded_text(token_ids, skip):
    deltas, detokenizer = stream(smollm2(), token_ids, skip_special_tokens=skip)
    assert "".join(deltas) == detokenizer.text == smollm2().decode(token_ids, skip_special_tokens=skip)


@given(token_ids=st.lists(st.integers(0, 255), max_size=30))
@settings(deadline=None, max_examples=300)
def test_random_bytes_decode_as_at_the_end(token_ids):
    deltas, _ = stream(byte_level(), token_ids)
    assert "".join(deltas) == byte_level().decode(token_ids)


@given(text=st.text(max_size=30))
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("tokenizer", [smollm2, byte_level, sentencepiece])
def test_any_text_comes_back(tokenizer, text):
    token_ids = tokenizer().encode(text, add_special_tokens=False)
    deltas, _ = stream(tokenizer(), token_ids, skip_special_tokens=False)
    assert "".join(deltas) == tokenizer().decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [smollm2, sentencepiece])
def test_no_delta_holds_half_a_character(tokenizer, text):
    text = text.replace("\ufffd", "")
    deltas, _ = stream(tokenizer(), tokenizer().encode(text, add_special_tokens=False))
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("text", ["👍", "世", "a👍", "ab世"])
@pytest.mark.parametrize("tokenizer", [smollm2, byte_level, sentencepiece])
def test_incomplete_tail_is_flushed_as_decode_would(tokenizer, text):
    cut = tokenizer().encode(text, add_special_tokens=False)[:-1]
    deltas, _ = stream(tokenizer(), cut)
    assert "\ufffd" not in "".join(deltas[:-1])
    assert "".join(deltas) == tokenizer().decode(cut)


def test_each_character_is_shown_with_the_token_that_completes_it():
    token_ids = [byte_level().backend.token_to_id(c) for c in "ðŁĺĢ"]  # the four bytes of U+1F600
    deltas, _ = stream(byte_level(), [*token_ids, *token_ids])
    assert deltas == ["", "", "", "😀", "", "", "", "😀", ""]


@pytest.mark.parametrize(("prompt", "text"), [((), "ban an"), ([1], " ban an")])
def test_leading_space_stays_after_a_prompt(prompt, text):
    token_ids = sentencepiece().encode("ban an", add_special_tokens=False)
    deltas, _ = stream(sentencepiece(), token_ids, prompt=prompt)
    assert "".join(deltas) == text


def test_invalid_bytes_between_pieces_become_one_replacement_each():
    pieces = sentencepiece().encode("an", add_special_tokens=False)
    token_ids = [*pieces, 3 + 0xE4, 3 + 0xB8, *pieces]
    deltas, _ = stream(sentencepiece(), token_ids)
    assert "".join(deltas) == sentencepiece().decode(token_ids) == "an\ufffd\ufffd an"


def cut_at_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By hand: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


LETTERS = st.text(alphabet="ab1 ", min_size=1, max_size=4)


@given(
    token_ids=st.lists(st.sampled_from(byte_level().encode("a b 1 an ana 12 123 ban", False)), max_size=30),
    stops=st.lists(LETTERS, min_size=1, max_size=4),
    include=st.booleans(),
)
@settings(deadline=None, max_examples=500)
def test_stop_string_cuts_where_reading_by_character_would(token_ids, stops, include):
    deltas, detokenizer = stream(byte_level(), token_ids, stop=stops, include_stop_str_in_output=include)
    text, stop = cut_at_stop(byte_level().decode(token_ids), stops, include)
    assert ("".join(deltas), detokenizer.stop_reason) == (text, stop)
    assert detokenizer.text == text


@given(
    token_ids=st.lists(st.sampled_from(byte_level().encode("a b 1 an ana 12 123 ban", False)), max_size=20),
    stops=st.lists(LETTERS, min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_only_what_may_become_a_stop_string_is_held_back(token_ids, stops):
    detokenizer = Detokenizer(byte_level(), SamplingParams(stop=stops))
    for num_tokens, token_id in enumerate(token_ids, 1):
        if detokenizer.append([token_id]) is not None:
            return
        text = byte_level().decode(token_ids[:num_tokens])
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
        held = max(len(beginning) for beginning in beginnings if text.endswith(beginning))
        assert detokenizer.text == text[: len(text) - held]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens_and_characters_of_the_real_vocabulary(text, include):
    stop = text[len(text) // 3 : len(text) // 3 + 4]
    token_ids = smollm2().encode(text)
    deltas, detokenizer = stream(smollm2(), token_ids, stop=[stop], include_stop_str_in_output=include)
    assert ("".join(deltas), detokenizer.stop_reason) == cut_at_stop(text, [stop], include)


def test_stop_completed_before_min_tokens_is_text():
    token_ids = byte_level().encode("ab ab ab", False)
    deltas, detokenizer = stream(byte_level(), token_ids, stop="ab", min_tokens=4)
    assert detokenizer.num_tokens == len(byte_level().encode("ab ab", False))
    assert "".join(deltas) == "ab "


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_stop_may_begin_before_min_tokens_and_be_completed_by_that_token(min_tokens):
    deltas, detokenizer = stream(byte_level(), byte_level().encode("bbab", False), stop="ba", min_tokens=min_tokens)
    assert detokenizer.stop_reason == "ba" and "".join(deltas) == "b"


def test_tokens_after_the_stop_in_the_same_call_are_not_taken():
    detokenizer = Detokenizer(byte_level(), SamplingParams(stop="b"))
    assert detokenizer.append(byte_level().encode("a1b1b", False)) == "b"
    assert detokenizer.num_tokens == 3
    assert detokenizer.append(byte_level().encode("aaa", False)) == "b"
    assert (detokenizer.num_tokens, detokenizer.text) == (3, "a1")


def test_held_text_is_shown_at_the_end_if_no_stop_came():
    deltas, detokenizer = stream(byte_level(), byte_level().encode("a12", False), stop="123")
    assert deltas == ["a", "", "12"]
    assert detokenizer.stop_reason is None


@pytest.mark.parametrize(("tokenizer", "detokenize"), [(None, True), (byte_level(), False)])
def test_without_tokenizer_or_by_choice_there_is_no_text(tokenizer, detokenize):
    deltas, detokenizer = stream(tokenizer, [65, 66], detokenize=detokenize)
    assert deltas == ["", "", ""]
    assert detokenizer.num_tokens == 2


def test_no_token_is_decoded_with_many_others(monkeypatch):
    tokenizer = load_tokenizer(sentencepiece_metadata())
    token_ids = [*tokenizer.encode("ban an " * 200, False), *[3 + 0xFF] * 500, *tokenizer.encode("世界" * 200, False)]
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **skip: lengths.append(len(ids)) or decode(ids, **skip))
    stream(tokenizer, token_ids)
    assert sorted(lengths)[-2:] == [4, 1 + 500]  # a character of three bytes; the run of invalid ones, once
