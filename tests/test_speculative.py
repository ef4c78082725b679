"""Guessing ahead changes how many steps a request takes, and nothing else that anybody can see."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_engine import PARAMS, PROMPTS, ROOMY, SPEC, make, run
from tiny_chat_model import write_chat_model

from jaxpaged import LLM, ConfigError, EngineConfig, SamplingParams
from jaxpaged.__main__ import main
from jaxpaged.engine import exports
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.drafts import Lookup

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SEEDED = [SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=16) for i in range(len(PROMPTS))]


class Known:
    """Guesses what came last time after the same tokens, every eighth one wrongly."""

    def __init__(self, answers):
        self.answers = answers  # prompts with what followed

    def __call__(self, token_ids, count):
        found = next((a for a in self.answers if tuple(a[: len(token_ids)]) == token_ids), ())
        first = len(token_ids)
        return [token ^ (place % 8 == 3) for place, token in enumerate(found[first : first + count], first)]


KNOWN = Known([])


def guessing(**settings):
    return make(speculative_config={"method": KNOWN, "num_speculative_tokens": 6}, **settings)


def know(answers, prompts=PROMPTS):
    KNOWN.answers = [p + list(a) for p, a in zip(prompts, answers, strict=True)]


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def ahead():
    return guessing()


def accepted(llm):
    return llm.engine.stats().num_accepted_tokens


@pytest.fixture(scope="module")
def seeded(plain):
    return run(plain, PROMPTS, SEEDED)


CUTS = {
    "in a batch": {},
    "alone": {"max_num_seqs": 1},
    "chunked": {"max_num_batched_tokens": 7},
    "preempted": {"num_pages": 14, "max_model_len": 48},
    "without prefix cache": {"enable_prefix_caching": False},
    "8-bit pages": {"cache_dtype": "int8"},
}
SLOW = ("chunked", "8-bit pages")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(how, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, how in CUTS.items()],
)
def test_guesses_change_no_token(ahead, seeded, settings):
    want = run(make(**settings), PROMPTS, SEEDED) if "cache_dtype" in settings else seeded
    know(want)
    llm = guessing(**settings) if settings else ahead
    assert run(llm, PROMPTS, SEEDED) == want
    stats = llm.engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_drafted_tokens
    assert stats.pages_held == 0
    assert (stats.num_preemptions > 0) == (settings.get("num_pages") == 14)


def test_what_comes_true_is_not_computed_again(plain, ahead):
    def steps_of(llm):
        before = llm.engine.stats().num_steps
        return run(llm, PROMPTS[:4], GREEDY), llm.engine.stats().num_steps - before

    want, plain_steps = steps_of(plain)
    know(want, PROMPTS[:4])
    tokens, steps = steps_of(ahead)
    assert tokens == want
    assert steps < 0.6 * plain_steps


def test_a_model_that_repeats_itself_is_guessed_from_its_own_answer(plain):
    params = SamplingParams(temperature=0, max_tokens=60)
    llm = make(speculative_config={"method": "ngram"}, max_num_seqs=1)
    assert run(llm, [3, 3, 3, 3], params).token_ids == run(plain, [3, 3, 3, 3], params).token_ids
    assert accepted(llm) > 30
    assert llm.engine.stats().num_steps < 30


def test_logprobs_forks_and_deltas_are_those_without_guesses(plain, ahead):
    params = SamplingParams(n=3, temperature=0.9, seed=3, max_tokens=16, logprobs=3, stop_token_ids=[11, 12])
    want, got = [], []
    for llm, outputs in ((plain, want), (ahead, got)):
        know([c.token_ids for c in want], [PROMPTS[3]] * len(want))
        before = accepted(llm)
        outputs += llm.generate([PROMPTS[3]], params, use_tqdm=False)[0].outputs
    assert accepted(ahead) > before
    for a, b in zip(got, want, strict=True):
        assert (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason)
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
        assert [next(iter(entry)) for entry in a.logprobs] == a.token_ids
        assert a.weight_versions == [0] * len(a.token_ids)
    engine = ahead.engine
    engine.add_request("deltas", PROMPTS[3], params, output_kind="delta")
    pieces: dict[int, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            for completion in output.outputs:
                pieces.setdefault(completion.index, []).extend(completion.token_ids)
    assert [pieces[index] for index in sorted(pieces)] == [c.token_ids for c in want]


def test_bias_holds_for_every_guessed_token_and_what_needs_the_history_is_not_guessed(plain, ahead):
    biased = SamplingParams(temperature=0, max_tokens=12, logit_bias={7: 30.0}, allowed_token_ids=[7, 8])
    know([[7] * 12], PROMPTS[:1])
    before = accepted(ahead)
    assert run(ahead, PROMPTS[0], biased).token_ids == [7] * 12
    assert (after := accepted(ahead)) > before
    penalised = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.2, logit_bias={7: 3.0})
    assert run(ahead, PROMPTS[0], penalised).token_ids == run(plain, PROMPTS[0], penalised).token_ids
    assert accepted(ahead) == after


def test_text_ends_before_a_stop_string_in_the_midst_of_a_guess(tmp_path):
    folder = write_chat_model(tmp_path / "model")
    plain = LLM(folder, warmup=False, **ROOMY)
    params = SamplingParams(temperature=0, max_tokens=40)
    (whole,) = plain.generate(["hello"], params, use_tqdm=False)
    answer = whole.outputs[0]
    know([answer.token_ids], [whole.prompt_token_ids])
    llm = LLM(folder, warmup=False, speculative_config={"method": KNOWN}, **ROOMY | {"max_num_seqs": 1})
    stop = answer.text[9:12]
    cut = SamplingParams(temperature=0, max_tokens=40, stop=stop)
    want, got = (x.generate(["hello"], cut, use_tqdm=False)[0].outputs[0] for x in (plain, llm))
    assert (got.text, got.token_ids, got.stop_reason) == (want.text, want.token_ids, stop)
    assert accepted(llm) > 0


@pytest.mark.slow
def test_batch_invariant_logprobs_keep_their_bits():
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=0)
    want = make(batch_invariant=True).generate(PROMPTS[:3], params, use_tqdm=False)
    know([o.outputs[0].token_ids for o in want], PROMPTS[:3])
    llm = guessing(batch_invariant=True)
    got = llm.generate(PROMPTS[:3], params, use_tqdm=False)
    assert [o.outputs[0].logprobs for o in got] == [o.outputs[0].logprobs for o in want]
    assert accepted(llm) > 0


@pytest.mark.slow
def test_a_model_cut_over_two_devices_guesses_too(seeded):
    know(seeded)
    llm = guessing(tensor_parallel_size=2)
    assert run(llm, PROMPTS, SEEDED) == seeded
    assert accepted(llm) > 0


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up_and_no_step_copies_the_pool(seeded):
    know(seeded)
    llm = guessing(warmup=True, num_pages=2000)
    before = llm.engine.stats().num_compilations
    assert run(llm, PROMPTS, SEEDED) == seeded
    assert llm.engine.stats().num_compilations == before
    runner = llm.engine.runner
    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.cache))
    drafted = [bucket for bucket in runner.buckets if bucket.num_drafts]
    assert drafted[-1] == Bucket(0, 28, 4, 24)
    for bucket in drafted:
        memory = runner.functions.forward(bucket).memory_analysis()
        assert memory.alias_size_in_bytes >= pool
        assert memory.temp_size_in_bytes < pool / 4


def test_an_export_guesses_as_it_was_told(tmp_path, plain):
    from safetensors.numpy import save_file

    from jaxpaged.model.params import flatten
    from jaxpaged.model.spec import to_json

    (tmp_path / "spec.json").write_text(to_json(SPEC))
    save_file({path: np.array(leaf) for path, leaf in flatten(PARAMS)}, tmp_path / "model.safetensors")
    config = EngineConfig(
        **(ROOMY | {"max_num_seqs": 1}), speculative_config={"num_speculative_tokens": 3}, warmup=False
    )
    exports.write(tmp_path, SPEC, np.float32, config, ["cpu"])
    llm = LLM.from_export(tmp_path)
    prompt, params = [3, 3, 3, 3], SamplingParams(temperature=0, max_tokens=40)
    assert run(llm, prompt, params).token_ids == run(plain, prompt, params).token_ids
    assert accepted(llm) > 0
    with pytest.raises(ConfigError, match=r"speculative_config is None but .* was compiled for"):
        LLM.from_export(tmp_path, speculative_config=None)
    own = EngineConfig(num_pages=9, speculative_config={"method": lambda tokens, count: []})
    with pytest.raises(ConfigError, match="method is a function, which cannot be written down"):
        exports.write(tmp_path, SPEC, np.float32, own, ["cpu"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "eagle"}, "method is 'eagle'; known: ngram, or a function"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0; it must be a whole number from 1 to 64"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5 but prompt_lookup_max is 4; lower the one"),
        ({"num_spec_tokens": 3}, "no field 'num_spec_tokens'; did you mean 'num_speculative_tokens'"),
        ("ngram", "speculative_config is 'ngram'; give a SpeculativeConfig or its fields"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(speculative_config=given)


@pytest.mark.parametrize("size", ["data_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"])
def test_meshes_that_cannot_check_guesses_say_so(size):
    with pytest.raises(ConfigError, match=f"speculative_config does not work with {size} 2 yet; leave it out"):
        make(speculative_config={}, **{size: 2})


def test_the_command_line_takes_it_as_json(capsys, tmp_path):
    model = str(write_chat_model(tmp_path / "model"))
    settings = ["--max-num-seqs", "1", "--no-warmup", "--max-tokens", "4"]
    assert main(["generate", model, "hi", "--speculative-config", '{"num_speculative_tokens": 2}', *settings]) == 0
    capsys.readouterr()
    for wrong, message in (("{", "Expecting property name"), ("[]", "must be an object"), ('{"x": 1}', "no field 'x'")):
        with pytest.raises(SystemExit):
            main(["generate", model, "hi", "-sc", wrong, *settings])
        error = capsys.readouterr().err
        assert message in error
        assert 'such as {"method": "ngram"' in error


# Prompt lookup


def lookup(tokens, count=4, shortest=1, longest=3):
    found = Lookup()
    for end in range(1, len(tokens)):
        found.draft(tokens[:end], 1, shortest, longest)
    grown = found.draft(tokens, count, shortest, longest)
    assert grown == Lookup().draft(tokens, count, shortest, longest)
    return grown


def test_the_longest_run_wins_and_of_equals_the_latest():
    assert lookup([1, 2, 3, 7, 8, 3, 9, 9, 2, 3]) == [7, 8, 3, 9]
    assert lookup([3, 7, 0, 3, 8, 0, 3]) == [8, 0, 3, 8]
    assert lookup([1, 2, 3]) == []
    assert lookup([1, 5, 2, 5], shortest=2) == []


def test_a_repetition_goes_on():
    assert lookup([1, 2, 1, 2], count=5) == [1, 2, 1, 2, 1]
    assert lookup([4, 4], count=3) == [4, 4, 4]
