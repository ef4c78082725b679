"""Beam search against transformers, whatever pages and seats it gets; and its pages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CASES, weight, write_checkpoint

from jaxpaged import LLM, BeamSearchParams, Engine, EngineConfig, RequestError, SamplingParams
from jaxpaged.convert.families import family_of
from jaxpaged.convert.rules import hf_shapes, load_leaves
from jaxpaged.model.params import map_specs
from jaxpaged.outputs import RequestOutput

CASE = CASES["llama"]
EOS = [3, 20, 40, 41, 60, 71, 90]
PROMPTS = [[5, 17, 80, 2, 33, 9, 11], [50], [8, 8, 61, 12] * 4]
SEARCHES = {
    "plain": BeamSearchParams(3, max_tokens=12, ignore_eos=True),
    "with ends": BeamSearchParams(4, max_tokens=12),
    "first to end": BeamSearchParams(3, max_tokens=14, early_stopping=True),
    "no penalty, exhaustive": BeamSearchParams(4, max_tokens=10, early_stopping="never", length_penalty=0.0),
    "long ones": BeamSearchParams(2, max_tokens=16, early_stopping="never", length_penalty=2.0),
    "short ones": BeamSearchParams(6, max_tokens=10, length_penalty=-1.0),
}
ROOMY = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_pages": 128, "page_size": 4, "max_model_len": 64}
Golden = Callable[[str, Callable[[], Mapping[str, np.ndarray]]], Mapping[str, np.ndarray]]


@cache
def model():
    family = family_of(CASE.config)
    spec = family.spec(CASE.config)
    rules = family.rules(spec, ())
    shapes = hf_shapes(rules, spec)
    leaves = dict(load_leaves(rules, lambda tensor: weight(tensor, shapes[tensor])))
    return spec, map_specs(lambda path, leaf: jnp.asarray(leaves[path]), spec), shapes


def make(**settings: object) -> Engine:
    spec, params, _ = model()
    return Engine(spec, params, EngineConfig(warmup=False, **(ROOMY | settings)), eos_token_ids=EOS)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert engine.stats().pages_held == 0
    return done


def search(engine: Engine, params: BeamSearchParams) -> list[RequestOutput]:
    for index, prompt in enumerate(PROMPTS):
        engine.add_beam_search(str(index), prompt, params)
    done = finish(engine)
    return [done[str(index)] for index in range(len(PROMPTS))]


@cache
def roomy_search(name: str) -> list[RequestOutput]:
    return search(make(), SEARCHES[name])


@cache
def of_transformers() -> Mapping[str, np.ndarray]:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), CASE.config, model()[2])
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, params in SEARCHES.items():
        wanted = {k: v for k, v in asdict(params).items() if k in ("length_penalty", "early_stopping")}
        for index, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            out = hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=params.beam_width,
                num_return_sequences=params.beam_width,
                max_new_tokens=params.max_tokens,
                do_sample=False,
                eos_token_id=None if params.ignore_eos else EOS,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **wanted,
            )
            arrays[f"{name}_{index}"] = out.sequences[:, len(prompt) :].numpy().astype(np.int32)
            arrays[f"{name}_{index}_scores"] = out.sequences_scores.numpy()
    return arrays


def to_end(token_ids: list[int], params: BeamSearchParams) -> list[int]:
    ends = [i + 1 for i, token in enumerate(token_ids) if token in EOS and not params.ignore_eos]
    return token_ids[: ends[0]] if ends else token_ids


@pytest.mark.parametrize("name", SEARCHES)
def test_hypotheses_are_those_of_transformers(name: str, golden: Golden) -> None:
    expected, params = golden("beam_search", of_transformers), SEARCHES[name]
    for index, output in enumerate(roomy_search(name)):
        theirs = [to_end(row, params) for row in expected[f"{name}_{index}"].tolist()]
        assert [c.token_ids for c in output.outputs] == theirs
        scores = [c.cumulative_logprob / len(c.token_ids) ** params.length_penalty for c in output.outputs]
        assert scores == pytest.approx(expected[f"{name}_{index}_scores"].tolist(), abs=1e-4)
        ends = [row[-1] in EOS and not params.ignore_eos for row in theirs]
        assert [c.finish_reason for c in output.outputs] == ["stop" if end else "length" for end in ends]


SCARCE = {
    "fewer seats than beams": {"max_num_seqs": 2},
    "one seat": {"max_num_seqs": 1},
    "few pages": {"num_pages": 17},
    "few pages, no prefix cache": {"num_pages": 17, "enable_prefix_caching": False},
    "chunks": {"max_num_batched_tokens": 8, "long_prefill_token_threshold": 3},
}


@pytest.mark.parametrize("settings", SCARCE.values(), ids=SCARCE.keys())
@pytest.mark.parametrize("name", [pytest.param("with ends", marks=pytest.mark.slow), "short ones"])
def test_beams_find_the_same_with_few_seats_and_pages(name: str, settings: dict[str, int]) -> None:
    for got, expected in zip(search(make(**settings), SEARCHES[name]), roomy_search(name), strict=True):
        assert [c.token_ids for c in got.outputs] == [c.token_ids for c in expected.outputs]


def test_one_beam_is_greedy() -> None:
    engine = make()
    engine.add_beam_search("beam", PROMPTS[0], BeamSearchParams(1, max_tokens=10, ignore_eos=True))
    engine.add_request("greedy", PROMPTS[0], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    done = finish(engine)
    assert done["beam"].outputs[0].token_ids == done["greedy"].outputs[0].token_ids


def test_beams_share_the_pages_of_what_they_have_in_common() -> None:
    engine = make()
    engine.add_beam_search("0", PROMPTS[2], BeamSearchParams(6, max_tokens=12, ignore_eos=True))
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.stats().pages_held)
    assert most <= 4 + 6 * 3  # 4 pages of the prompt once, at most 3 of its own for each beam
    assert engine.stats().num_preemptions == 0


def test_a_temperature_flattens_what_is_scored() -> None:
    spec, params, _ = model()
    flat = params | {"head": jax.tree.map(lambda w: w * 0.5, params["head"])}
    engine = Engine(spec, flat, EngineConfig(warmup=False, **ROOMY), eos_token_ids=EOS)
    plain = search(engine, BeamSearchParams(4, max_tokens=8))
    warm = search(make(), BeamSearchParams(4, max_tokens=8, temperature=2.0))
    for a, b in zip(plain, warm, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
        assert [c.cumulative_logprob for c in a.outputs] == pytest.approx([c.cumulative_logprob for c in b.outputs])
    assert [c.cumulative_logprob for c in warm[0].outputs] != [
        c.cumulative_logprob for c in roomy_search("with ends")[0].outputs
    ]


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_search_can_be_aborted_at_any_moment(steps: int) -> None:
    engine = make()
    engine.add_beam_search("0", PROMPTS[0], BeamSearchParams(4, max_tokens=12, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    assert engine.abort("0")
    output = finish(engine)["0"]
    assert {c.finish_reason for c in output.outputs} <= {"abort"}


def test_llm_searches_for_every_prompt() -> None:
    spec, params, _ = model()
    llm = LLM((spec, params), warmup=False, **ROOMY)
    outputs = llm.beam_search(PROMPTS, SEARCHES["plain"], use_tqdm=False)
    for got, expected in zip(outputs, roomy_search("plain"), strict=True):
        assert [c.token_ids for c in got.outputs] == [c.token_ids for c in expected.outputs]


def test_more_beams_than_a_step_can_tell_are_refused() -> None:
    with pytest.raises(RequestError, match=r"beam_width is 14, which takes the 21 likeliest tokens .* lower it by 1"):
        make().add_beam_search("0", [1], BeamSearchParams(14))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"beam_width": 0}, "beam_width is 0"), ({"beam_width": 2, "early_stopping": "soon"}, "early_stopping is 'soon'")],
)
def test_wrong_parameters_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BeamSearchParams(**given)
