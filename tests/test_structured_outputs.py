"""Answers that must have a form: they have it, whatever shares the batch, and nobody else's tokens change."""

from __future__ import annotations

import json
import pickle
import re
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import byte_level_metadata, sentencepiece_metadata

from jaxpaged import LLM, BeamSearchParams, RequestError, SamplingParams, StructuredOutputsParams
from jaxpaged.engine import grammar as grammars
from jaxpaged.engine.grammar import Grammars
from jaxpaged.engine.tokenizer import Tokenizer, load_tokenizer
from jaxpaged.errors import QueueFullError
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

TOKENIZER = load_tokenizer(byte_level_metadata())
EOS = TOKENIZER.vocab_size - 2
VOCAB = 288  # padded past the tokenizer's 265, as many models' are; whole words of 32 bits
_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(VOCAB, 16, 256, (_BLOCK,) * 2, _NORM, 16, tied_head=False)
PARAMS = jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=1))
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ban", "an"]}, "size": {"type": "integer", "minimum": 3, "maximum": 12}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
PROMPTS = ["ban", "an 12", "123", "banana", "a", "45"]
# Patterns whose intersection has as many states as there are subsets of them.
EXPLOSION = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(14)]}


def make(tokenizer: Tokenizer | None = TOKENIZER, **given):
    roomy = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_pages": 257, "page_size": 4, "warmup": False}
    return LLM((SPEC, PARAMS), tokenizer=tokenizer, **(roomy | given))


@pytest.fixture(scope="module")
def llm():
    return make()


@pytest.fixture(autouse=True)
def no_page_is_leaked(llm):
    yield
    assert llm.engine.stats().pages_held == 0


def asking(seed=0, max_tokens=80, **form):
    given = {name: form.pop(name) for name in list(form) if name not in StructuredOutputsParams.__dataclass_fields__}
    return SamplingParams(seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**form), **given)


def answers(llm, prompts, params):
    return [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]


def tokens(llm, prompts, params):
    return [[c.token_ids for c in completions] for completions in answers(llm, prompts, params)]


FORMS = [
    ({"regex": "[ab]{3}-[0-9]{2,4}"}, lambda text: re.fullmatch("[ab]{3}-[0-9]{2,4}", text)),
    ({"choice": ["banana", 'say "ü"\n', "\\d"]}, lambda text: text in ("banana", 'say "ü"\n', "\\d")),
    ({"grammar": 'start: "a" start "n" | "12"'}, lambda text: re.fullmatch("(a*)12(n*)", text)),
    (
        {"json": SCHEMA, "whitespace_pattern": " ?"},
        lambda text: set(json.loads(text)) == {"name", "size"} and 3 <= json.loads(text)["size"] <= 12,
    ),
    ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, lambda text: text == re.sub(r"\s", "", text)),
    ({"json": {"type": "boolean"}}, lambda text: text in ("true", "false")),
]


@pytest.mark.parametrize(("form", "fits"), FORMS, ids=[f"{next(iter(form))}" for form, _ in FORMS])
def test_the_answer_has_its_form_and_then_stops(llm, form, fits):
    for seed, (completion,) in enumerate(answers(llm, PROMPTS, [asking(seed, **form) for seed in range(len(PROMPTS))])):
        assert completion.finish_reason == "stop" and completion.stop_reason is None, seed
        assert fits(completion.text), completion.text


def test_any_json_object_is_one(llm):
    # Much of this tiny model's JSON would never end by itself.
    bias = {TOKENIZER.encode(text)[0]: 4.0 for text in '"}]'}
    for (completion,) in answers(llm, PROMPTS, asking(json_object=True, max_tokens=200, logit_bias=bias)):
        assert isinstance(json.loads(completion.text), dict)


def test_in_a_mixed_batch_everybody_has_the_tokens_of_being_alone(llm):
    forms = [
        asking(1, json=SCHEMA, disable_any_whitespace=True, logprobs=2),
        asking(2, regex="(ban){2,9}", temperature=0),
        asking(3, regex="[a-z]{4}[0-9]*x", n=3, max_tokens=200),
    ]
    plain = [
        SamplingParams(seed=4, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=30, logprobs=1),
        SamplingParams(seed=5, max_tokens=20, n=2, frequency_penalty=0.5),
    ]
    params = [one for pair in zip(forms, plain, strict=True) for one in pair]
    alone = [tokens(llm, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    together = answers(llm, PROMPTS, params)
    assert [[c.token_ids for c in completions] for completions in together] == alone
    assert {c.finish_reason for completions in together[::2] for c in completions} == {"stop"}
    assert len({tuple(ids) for ids in alone[4]}) > 1


def test_others_keep_a_token_every_step_beside_a_form(llm):
    engine = llm.engine
    engine.add_request("form", "ban", asking(regex="[ab]{100}", max_tokens=100))
    engine.add_request("plain", "an", SamplingParams(max_tokens=40, ignore_eos=True))
    steps = 0
    while not any(output.request_id == "plain" and output.finished for output in engine.step()):
        steps += 1
    assert steps <= 43
    engine.abort("form")
    engine.step()


@pytest.mark.slow
@pytest.mark.long
def test_on_a_mesh_the_answers_are_the_same(llm):
    params = [asking(seed, regex="[a-z]{3}[0-9]{1,5}x") for seed in range(5)] + [SamplingParams(seed=9, max_tokens=12)]
    assert tokens(make(tensor_parallel_size=2, data_parallel_size=2), PROMPTS, params) == tokens(llm, PROMPTS, params)


def test_preempted_requests_go_on_where_their_grammars_stood(llm):
    params = [asking(seed, regex="([a-z]{2}[0-9]{2}){12}") for seed in range(6)]
    tight = make(num_pages=30)
    assert tokens(tight, PROMPTS, params) == tokens(llm, PROMPTS, params)
    assert tight.engine.stats().num_preemptions > 0


def test_after_sleep_all_is_computed_anew_and_the_form_goes_on(llm):
    params = asking(regex="([a-z]{2}[0-9]{2}){5}")
    (expected,) = tokens(llm, ["ban"], params)[0]
    engine = llm.engine
    engine.add_request("r", "ban", params)
    outputs = [output for _ in range(15) for output in engine.step()]
    assert 3 < len(outputs[-1].outputs[0].token_ids) < 20
    engine.sleep()
    engine.wake_up()
    while not outputs[-1].finished:
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == expected


def test_a_fork_goes_on_from_the_middle_of_a_form(llm):
    engine = llm.engine
    engine.add_request("r", "ban", asking(regex="[a-z]{12}[0-9]{3}"))
    last = next(o for _ in range(20) for o in engine.step() if len(o.outputs[0].token_ids) >= 5)
    assert engine.fork("r", 2) == [1, 2]
    while not last.finished:
        last = next(iter(engine.step()), last)
    texts = [completion.text for completion in last.outputs]
    assert len(texts) == 3 and len(set(texts)) > 1
    assert all(re.fullmatch("[a-z]{12}[0-9]{3}", text) for text in texts)


def test_logprobs_are_those_of_the_models_own_distribution(llm):
    (completion,) = answers(llm, ["ban"], asking(json=SCHEMA, logprobs=0))[0]
    (scores,) = llm.score(["ban"], [completion.token_ids])
    own = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    np.testing.assert_allclose(own, scores, atol=1e-3)


def test_a_form_goes_together_with_the_other_parameters(llm):
    a, b, n = (TOKENIZER.encode(text)[0] for text in "abn")
    rows = [
        asking(1, regex="[abn]{20}", allowed_token_ids=[a, b]),
        asking(2, regex="[abn]{20}", logit_bias={n: 1e6}),
        asking(3, regex="[abn]{1,60}", min_tokens=30, max_tokens=60),
        asking(4, regex="([abn]{3})+", ignore_eos=True, max_tokens=40),
        asking(5, regex="[abn]{20}", stop=["an"]),
        asking(6, regex="[abn]{20}", repetition_penalty=1.5, bad_words=["b"], top_k=5),
    ]
    allowed, biased, least, endless, stopped, penalised = (c for (c,) in answers(llm, PROMPTS, rows))
    assert set(allowed.token_ids) <= {a, b} and re.fullmatch("[ab]{20}", allowed.text)
    assert biased.token_ids == [n] * 20
    assert len(least.token_ids) >= 30 and re.fullmatch("[abn]{1,60}", least.text)
    assert EOS not in endless.token_ids and endless.finish_reason == "length" and len(endless.token_ids) == 40
    assert stopped.finish_reason == "stop" and (stopped.stop_reason == "an" or "an" not in stopped.text)
    assert re.fullmatch("[abn]{20}", penalised.text) and b not in penalised.token_ids


def test_where_no_token_is_left_that_request_alone_ends(llm):
    digit, b = TOKENIZER.encode("1")[0], TOKENIZER.encode("b")[0]
    plain = SamplingParams(temperature=0, max_tokens=10)
    expected = tokens(llm, PROMPTS[:2], plain)
    rows = [
        plain,
        plain,
        asking(regex="[ab]{9}", allowed_token_ids=[digit]),
        asking(regex="b[a]{9}", allowed_token_ids=[b]),
    ]
    first, second, (never,), (later,) = answers(llm, PROMPTS[:4], rows)
    assert [[c.token_ids for c in completions] for completions in (first, second)] == expected
    assert (never.finish_reason, never.token_ids) == ("error", [])
    assert (later.finish_reason, later.text) == ("error", "b")
    assert "no token is left that structured_outputs" in later.stop_reason


def test_a_matcher_that_fails_ends_its_request_alone(llm, monkeypatch):
    take = grammars.Matcher.look_ahead

    def fail(matcher):
        if matcher._state.is_accepting():
            raise grammars.GrammarError("the grammar cannot go on: too complex")
        take(matcher)

    monkeypatch.setattr(grammars.Matcher, "look_ahead", fail)
    (failed,), (other,) = answers(llm, PROMPTS[:2], [asking(regex="a(b?)c?"), asking(regex="a{3}")])
    assert (failed.finish_reason, failed.stop_reason) == ("error", "the grammar cannot go on: too complex")
    assert (other.finish_reason, other.text) == ("stop", "aaa")


BRANCHES = [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(20)]
CIRCLE = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
OVERLAP = {"oneOf": [{"type": "integer"}, {"minimum": 3}]}
REFUSED = [
    ({"json": {"$ref": "#"}}, "no text fits it"),
    ({"json": {"$defs": CIRCLE, "$ref": "#/$defs/a"}}, "no text fits it"),
    ({"json": {"type": "object", "not": {"required": ["a"]}}}, 'Unimplemented keys: ["not"]'),
    ({"json": {"$ref": "https://example.com/x.json"}}, "does not fetch resources"),
    ({"json": {"type": "strange"}}, "strange"),
    ({"json": {"type": "string", "minLength": 5, "maxLength": 3}}, "cannot be compiled"),
    ({"json": OVERLAP | {"x-guidance": {"lenient": True, "coerce_one_of": True}}}, "oneOf"),
    ({"json": {"allOf": BRANCHES}}, "too large"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"grammar": "start: nowhere"}, "nowhere"),
    ({"grammar": "start: start"}, "no text fits it"),
    ({"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000}, "too deeply nested"),
]


@pytest.mark.parametrize(("form", "why"), REFUSED, ids=[f"{why}" for _, why in REFUSED])
def test_what_cannot_be_compiled_is_refused_with_the_reason(llm, form, why):
    with pytest.raises(RequestError, match=re.escape(why)) as caught:
        llm.generate("ban", asking(**form), use_tqdm=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 450


WRONG = [
    ({}, "has 0 of json, regex, choice, grammar, json_object; give exactly 1"),
    ({"json": {}, "regex": "a"}, "has 2 of json, .*; give exactly 1 of json, regex"),
    ({"json_object": False}, "has 0 of"),
    ({"json": 3}, "json is 3; it must be a JSON schema"),
    ({"json": "{"}, "json is no JSON schema"),
    ({"json": {"a": {1, 2}}}, "json is no JSON schema"),
    ({"json": {"const": float("nan")}}, "json is no JSON schema"),
    ({"json": {"enum": [f"{n}" * 10 for n in range(9_000)]}}, r"json has \d+,\d+ characters; at most 131,072"),
    ({"choice": []}, "at least 1 text"),
    ({"choice": "yes"}, "it must be a list of texts"),
    ({"choice": ["a", ""]}, "none of them empty"),
    ({"regex": ""}, "regex is ''"),
    ({"regex": "a\ud800"}, "lone surrogate"),
    ({"grammar": 5}, "grammar is 5"),
    ({"json": {}, "disable_any_whitespace": 1}, "must be True or False"),
    ({"jsn": {}}, "no field 'jsn'; did you mean 'json'"),
]


@pytest.mark.parametrize(("form", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_forms_are_refused_before_any_engine_sees_them(form, message):
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**form)


def test_a_form_may_be_given_as_a_mapping_and_is_hashable():
    params = SamplingParams(structured_outputs={"json": SCHEMA})
    assert params == SamplingParams(structured_outputs=StructuredOutputsParams(json=json.dumps(SCHEMA)))
    assert hash(params) == hash(SamplingParams(structured_outputs={"json": SCHEMA}))
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(RequestError, match="must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs="json")


def test_beams_take_no_form():
    with pytest.raises(RequestError, match="no field 'structured_outputs'; known: beam_width"):
        BeamSearchParams(beam_width=2, structured_outputs=StructuredOutputsParams(regex="a"))


def test_without_a_tokenizer_a_form_is_refused():
    with pytest.raises(RequestError, match="the model came without one"):
        make(tokenizer=None).generate([1, 2], asking(regex="a"), use_tqdm=False)


# Vocabularies


@pytest.mark.parametrize("metadata", [byte_level_metadata(), sentencepiece_metadata()], ids=["bytes", "pieces"])
def test_the_grammars_vocabulary_is_the_tokenizers(metadata):
    tokenizer = load_tokenizer(metadata)
    made = Grammars(tokenizer, tokenizer.eos_token_ids, VOCAB)
    made.get(StructuredOutputsParams(regex="a"))
    for token in set(range(tokenizer.vocab_size)) - tokenizer.special_token_ids:
        own = tokenizer.token_bytes(token) or tokenizer.token_text(token).encode()
        assert own == b"\xff" or made._vocabulary.decode_bytes([token]) == own, token


@pytest.mark.parametrize("metadata", [byte_level_metadata(), sentencepiece_metadata()], ids=["bytes", "pieces"])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("vocab_size", [265, 288, 300])
def test_every_tokenization_that_spells_the_text_is_followed(metadata, eos, vocab_size):
    tokenizer = load_tokenizer(metadata)
    made = Grammars(tokenizer, tokenizer.eos_token_ids if eos else (), vocab_size)
    matcher = made.get(StructuredOutputsParams(grammar='start: " banana é"')).matcher(may_end=eos)
    text = tokenizer.continued
    spelled: list[int] = []
    while True:
        bits = np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        assert allowed and max(allowed) < tokenizer.vocab_size
        spelled.append(allowed[-1])
        if matcher.take(spelled[-1]):
            break
        matcher.look_ahead()
    assert text(spelled) == " banana é"


@pytest.mark.slow
def test_a_model_without_an_end_stops_where_its_grammar_does():
    endless = load_tokenizer(byte_level_metadata())
    endless.eos_token_ids = frozenset()
    (stopped,), (cut,) = answers(
        make(endless), PROMPTS[:2], [asking(regex="[ab]{7}"), asking(regex="[ab]*", max_tokens=9)]
    )
    assert (stopped.finish_reason, len(stopped.text)) == ("stop", 7)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 9)
    assert set(cut.text) <= {"a", "b"}


def test_white_space_ends_even_where_the_model_would_never_end_it():
    matcher = SHARED.get(StructuredOutputsParams(json=SCHEMA)).matcher(may_end=True)
    for token in TOKENIZER.encode("{" + " " * 64):
        matcher.take(token)
    matcher.look_ahead()
    (space,) = TOKENIZER.encode(" ")
    assert not matcher.allowed[space // 32] >> np.uint32(space % 32) & 1


# Compiling


def test_a_form_is_compiled_once_and_the_oldest_are_forgotten(monkeypatch):
    made = Grammars(TOKENIZER, [EOS], VOCAB)
    forms = [StructuredOutputsParams(regex=f"a{{{n}}}") for n in range(1, 6)]
    monkeypatch.setattr(grammars, "CACHE_BYTES", 3.5 * grammars._weight(made_source(made, forms[0])))
    first = [made.get(form) for form in forms[:3]]
    assert made.get(StructuredOutputsParams(regex="a{1}")) is first[0]
    made.get(forms[3])  # the second was used longest ago
    assert made.get(forms[0]) is first[0] and made.get(forms[2]) is first[2]
    assert made.get(forms[1]) is not first[1]


def made_source(made, form):
    made.get(form)
    return made._source(form)


def test_what_takes_too_long_is_ended_and_the_next_form_compiles(monkeypatch):
    made = Grammars(TOKENIZER, [EOS], VOCAB)
    made.get(StructuredOutputsParams(regex="a"))
    monkeypatch.setattr(grammars, "TIME_LIMIT", 0.3)
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"take over 0\.3 s to compile; make them simpler"):
        made.get(StructuredOutputsParams(json=EXPLOSION))
    assert time.monotonic() - began < 4  # to the end of it would take over 10 s
    made.get(StructuredOutputsParams(regex="b"))


def test_what_takes_too_much_memory_ends_another_process_and_not_this_one(monkeypatch):
    monkeypatch.setattr(grammars, "MEMORY_LIMIT", 48 << 20)
    made = Grammars(TOKENIZER, [EOS], VOCAB)
    with pytest.raises(RequestError, match="take over 48 MB to compile; make them simpler"):
        made.get(StructuredOutputsParams(json={"allOf": EXPLOSION["allOf"][:13]}))
    made.get(StructuredOutputsParams(regex="b"))


def test_who_waits_for_others_forms_is_told_to_come_again(monkeypatch):
    made = Grammars(TOKENIZER, [EOS], VOCAB)
    made.get(StructuredOutputsParams(regex="a"))
    monkeypatch.setattr(grammars, "PATIENCE", 0.05)
    with made._compiling, pytest.raises(QueueFullError, match="try again later"):
        made.get(StructuredOutputsParams(regex="b"))
    made.get(StructuredOutputsParams(regex="a"))


def test_thousands_of_choices_may_begin_alike():
    choices = [f"ban{n * 7919 % 100003}" for n in range(6_000)]
    matcher = SHARED.get(StructuredOutputsParams(choice=choices)).matcher(may_end=True)
    tokens = TOKENIZER.encode(choices[77])
    for token in tokens[:-1]:
        assert not matcher.take(token)
        matcher.look_ahead()
    assert matcher.allowed[tokens[-1] // 32] >> np.uint32(tokens[-1] % 32) & 1


@given(st.text(alphabet='ab"\\n{}é1 ', min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_any_text_can_be_a_choice(text):
    matcher = SHARED.get(StructuredOutputsParams(choice=[text, text + "!"])).matcher(may_end=True)
    assert not any(matcher.take(token) for token in TOKENIZER.encode(text))
    matcher.look_ahead()
    bits = np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little")
    assert sorted(np.flatnonzero(bits)) == sorted([TOKENIZER.encode("!")[0], EOS])


SHARED = Grammars(TOKENIZER, [EOS], VOCAB)
