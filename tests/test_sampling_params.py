"""Sampling parameters: one stored form each, and one clear line for every wrong value."""

import dataclasses
import pickle

import numpy as np
import pytest

from jaxpaged.errors import JaxpagedError, RequestError
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "bad_words": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "logit_bias": None,
        "allowed_token_ids": None,
        "best_of": None,  # of vLLM until 0.6
        "logits_processor": None,  # ours
        "structured_outputs": None,
    }


WRONG = [
    ({"n": 0}, "n is 0; it must be a whole number of at least 1"),
    ({"n": 1.5}, "n is 1.5; it must be a whole number of at least 1"),
    ({"n": True}, "n is True"),
    ({"n": 3, "best_of": 2}, "best_of is 2 but n is 3; raise it to n, or lower n"),
    ({"best_of": 0}, "best_of is 0; it must be a whole number of at least 1"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be a finite number from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty is -3"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a finite number from 1e-06 to 1,000,000.0"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; it must be a finite number from 1e-06"),
    ({"temperature": -0.1}, "temperature is -0.1; it must be a finite number of at least 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"temperature": None}, "temperature is None"),
    ({"top_p": 0}, "top_p is 0; it must be a finite number above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"top_k": -2}, "top_k is -2; it must be a whole number of at least -1"),
    ({"top_k": 2.0}, "top_k is 2.0"),
    ({"min_p": 1.5}, "min_p is 1.5; it must be a finite number from 0 to 1"),
    ({"seed": "a"}, "seed is 'a'; it must be a whole number"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number of at least 1"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; it must be at most max_tokens, 8"),
    ({"logprobs": -1}, "logprobs is -1; it must be a whole number of at least 0"),
    ({"prompt_logprobs": -2}, "prompt_logprobs is -2"),
    ({"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
    ({"stop": ["a", ""]}, "stop contains ''"),
    ({"stop": 3}, "stop is 3; it must be a list of strings"),
    ({"stop": "a", "detokenize": False}, "set detokenize=True or use stop_token_ids"),
    ({"bad_words": "word"}, "bad_words is 'word'; it must be a list of strings"),
    ({"stop_token_ids": [-1]}, "stop_token_ids contains -1"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list of token ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty; name at least 1"),
    ({"allowed_token_ids": ["a"]}, "allowed_token_ids contains 'a'"),
    ({"logit_bias": [1]}, "logit_bias is [1]; it must map token ids to numbers"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan; it must be a number from -1e+06"),
    ({"logit_bias": {1: 1e39}}, "logit_bias of token 1 is 1e+39; it must be a number from -1e+06 to 1e+06"),
    ({"logit_bias": {-4: 1.0}}, "logit_bias contains -4"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[repr(given) for given, _ in WRONG])
def test_wrong_value_is_one_line_with_value_and_range(given, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, JaxpagedError)


def test_unknown_field_names_the_nearest_known():
    with pytest.raises(RequestError, match=r"no field 'temprature'; did you mean 'temperature'\?"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"no field 'zzz'; known: n, presence_penalty"):
        SamplingParams(zzz=0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "stored"), [("end", ("end",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()), (None, ())]
)
def test_stop_is_stored_as_a_tuple(given, stored):
    assert SamplingParams(stop=given).stop_strings == stored


@pytest.mark.parametrize(("given", "stored"), [(0, 0.0), (1e-9, 0.01), (0.0099, 0.01), (0.01, 0.01), (1.7, 1.7)])
def test_tiny_temperature_is_raised_but_zero_stays_greedy(given, stored):
    params = SamplingParams(temperature=given)
    assert params.temperature == stored
    assert params.greedy == (stored == 0)


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**70)])
def test_any_whole_number_is_a_seed(seed):
    assert SamplingParams(seed=seed).seed == seed


def test_numpy_numbers_are_stored_as_python_numbers():
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), stop_token_ids=np.array([1, 2]), logit_bias={np.int32(3): 1}
    )
    assert [type(x) for x in (params.n, params.temperature, params.stop_token_ids[0])] == [int, float, int]
    assert params.logit_bias == {3: 1.0} and type(next(iter(params.logit_bias))) is int


def test_equal_params_hash_alike_and_survive_pickling_and_replace():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, allowed_token_ids=[1, 2], max_tokens=None)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params) == params and hash(dataclasses.replace(params)) == hash(params)
    assert dataclasses.replace(params, n=2) != params


def test_params_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "make", [SamplingParams, lambda **given: BeamSearchParams(beam_width=2, max_tokens=4, **given)]
)
def test_temperature_is_a_number_of_the_device(make):
    given = (0.0, 1e-9, 0.5, 1e300)
    assert [make(temperature=value).temperature for value in given] == [0.0, 0.01, 0.5, 1e6]
