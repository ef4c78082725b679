"""The engine on a tiny model: what comes out for what was asked, whatever shares the batch and however it is cut."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_chat_model import write_chat_model

from jaxpaged import LLM, Engine, EngineConfig, RequestError, SamplingParams
from jaxpaged.engine.step_functions import StepFunctions
from jaxpaged.errors import ConfigError
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

VOCAB, LENGTH = 64, 96
_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(48, "silu"), _NORM)
SPEC = Decoder(VOCAB, 32, LENGTH, (_BLOCK,) * 2, _NORM, 32, tied_head=False)
FRESH = dummy_params(SPEC, seed=1)
PARAMS = jax.tree.map(lambda w: w * 3, FRESH)  # sharper, so that ties are rare; rounding grows a hundredfold too
ROOMY = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 64, "page_size": 4}
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((5, 17, 1, 30, 9, 4, 23, 12))]


def make(params=PARAMS, **settings):
    return LLM((SPEC, params), **(ROOMY | {"warmup": False} | settings))


@pytest.fixture(scope="module")
def llm():
    return make(warmup=True, host_cache_gb=2**-9)


@pytest.fixture(scope="module")
def chat_llm(tmp_path_factory):
    return LLM(write_chat_model(tmp_path_factory.mktemp("chat") / "model"), warmup=False, **ROOMY)


def run(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return outputs[0].outputs[0] if isinstance(prompts[0], int) else [o.outputs[0].token_ids for o in outputs]


@jax.jit
def padded_logits(params, tokens):
    return apply(params, tokens, SPEC)


def logits_after(tokens, params=PARAMS):
    """The model's logits of what follows `tokens`, dense: padding behind them is never seen."""
    padded = jnp.asarray([*tokens] + [0] * (LENGTH - len(tokens)), jnp.int32)
    return np.asarray(padded_logits(params, padded))[len(tokens) - 1]


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


def greedy(prompt, count, change=lambda logits, output: logits):
    output = []
    for _ in range(count):
        output.append(int(np.argmax(change(logits_after(prompt + output).copy(), output))))
    return output


def test_greedy_tokens_are_those_of_the_dense_model(llm):
    got = run(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    assert got == [greedy(p, 12) for p in PROMPTS]


CUTS = {
    "alone": {"max_num_seqs": 1},
    "chunked": {"max_num_batched_tokens": 7},
    "preempted": {"num_pages": 14, "max_model_len": 48},
    "preempted, a host tier behind": {"num_pages": 14, "max_model_len": 48, "host_cache_gb": 2**-14},
    "without prefix cache": {"enable_prefix_caching": False},
    "other pages": {"page_size": 16, "num_pages": 32},
}


@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS.keys())
def test_a_seeded_request_gives_the_same_tokens_however_it_is_run(llm, settings):
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=16) for i in range(len(PROMPTS))]
    other = make(**settings)
    assert run(other, PROMPTS, params) == run(llm, PROMPTS, params)
    stats = other.engine.stats()
    if "num_pages" in settings and settings["num_pages"] == 14:
        assert stats.num_preemptions > 0
    assert (stats.host_pages_moved_in > 0) == ("host_cache_gb" in settings)
    assert other.engine.stats().pages_held == 0


def test_sequences_of_one_request_differ_and_repeat(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=10)
    first, again = (llm.generate([PROMPTS[3]], params, use_tqdm=False)[0] for _ in range(2))
    tokens = [completion.token_ids for completion in first.outputs]
    assert len({tuple(t) for t in tokens}) == 3
    assert [completion.token_ids for completion in again.outputs] == tokens
    assert [completion.index for completion in first.outputs] == [0, 1, 2]


@pytest.mark.parametrize("length", [1, 4, 7, 17])
def test_completions_that_share_their_prompts_pages_are_those_computed_alone(llm, length):
    prompt = PROMPTS[3][:length]
    params = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=10, repetition_penalty=1.1, logprobs=2)
    alone = make(max_num_seqs=1, enable_prefix_caching=False)
    shared, single = (x.generate([prompt], params, use_tqdm=False)[0].outputs for x in (llm, alone))
    assert [c.token_ids for c in shared] == [c.token_ids for c in single]
    assert [c.cumulative_logprob for c in shared] == pytest.approx([c.cumulative_logprob for c in single], abs=1e-3)


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_the_likeliest_of_more_completions_are_given_once_all_have_ended(llm, kind):
    given = {"temperature": 1.0, "seed": 7, "max_tokens": 10, "stop_token_ids": [3, 9, 20]}
    (every,) = llm.generate([PROMPTS[3]], SamplingParams(n=5, logprobs=0, **given), use_tqdm=False)
    likeliest = sorted(every.outputs, key=lambda c: -c.cumulative_logprob)[:2]
    llm.engine.add_request("best", PROMPTS[3], SamplingParams(n=2, best_of=5, **given), output_kind=kind)
    outputs = []
    while llm.engine.has_unfinished:
        outputs += llm.engine.step()
    (best,) = outputs
    assert [c.token_ids for c in best.outputs] == [c.token_ids for c in likeliest]
    assert [(c.index, c.logprobs) for c in best.outputs] == [(0, None), (1, None)]
    assert [c.cumulative_logprob for c in best.outputs] == pytest.approx([c.cumulative_logprob for c in likeliest])
    assert llm.engine.stats().pages_held == 0


def test_requests_without_a_seed_differ_from_each_other(llm):
    a, b = run(llm, [PROMPTS[0]] * 2, SamplingParams(temperature=1.0, max_tokens=20))
    assert a != b


def test_logprobs_are_those_of_the_dense_model_whatever_bias_was_sampled_with():
    llm = make(FRESH)
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=8, logprobs=4, logit_bias={9: 8.0})
    completion = run(llm, PROMPTS[1], params)
    tokens = list(PROMPTS[1])
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        expected = log_softmax(logits_after(tokens, FRESH))
        assert next(iter(entry)) == token
        assert set(np.argsort(-expected)[:4].tolist()) <= entry.keys()
        for other, found in entry.items():
            assert found.logprob == pytest.approx(expected[other], abs=2e-5)
            assert found.rank == 1 + int((expected > expected[other]).sum())
        tokens.append(token)
    total = sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("budget", [32, 7])
def test_prompt_logprobs_and_score_are_those_of_the_dense_model(budget):
    llm = make(FRESH, max_num_batched_tokens=budget)
    prompt = PROMPTS[3]
    run(llm, prompt, SamplingParams(max_tokens=1))  # its pages are cached now, and must not be used
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=2, prompt_logprobs=3), use_tqdm=False)
    assert output.num_cached_tokens == 0
    assert output.prompt_logprobs[0] is None
    expected = [log_softmax(logits_after(prompt[:i], FRESH)) for i in range(1, len(prompt))]
    for token, row, entry in zip(prompt[1:], expected, output.prompt_logprobs[1:], strict=True):
        assert entry[token].logprob == pytest.approx(row[token], abs=2e-5)
        assert set(np.argsort(-row)[:3].tolist()) <= entry.keys()
    (scores,) = llm.score([prompt])
    np.testing.assert_allclose(scores, [row[t] for t, row in zip(prompt[1:], expected, strict=True)], atol=2e-5)


def repetition(logits, seen, factor):
    for token in set(seen):
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    return logits


def test_penalties_follow_their_formulas(llm):
    prompt = PROMPTS[4]

    def change(logits, output):
        logits = repetition(logits, prompt + output, 1.3)
        for token in set(output):
            logits[token] -= 0.7 * output.count(token) + 0.9
        return logits

    params = SamplingParams(
        temperature=0, max_tokens=25, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.9
    )
    assert run(llm, prompt, params).token_ids == greedy(prompt, 25, change)


def test_bias_and_allowed_tokens_steer_the_choice(llm):
    allowed = [3, 33, 63]
    tokens = run(llm, PROMPTS[0], SamplingParams(max_tokens=20, allowed_token_ids=allowed)).token_ids
    assert set(tokens) <= set(allowed)
    tokens = run(llm, PROMPTS[0], SamplingParams(max_tokens=5, logit_bias={9: 100.0})).token_ids
    assert tokens == [9] * 5


def test_min_tokens_puts_off_the_end(llm):
    ends = dict(temperature=0, max_tokens=12, stop_token_ids=list(range(0, VOCAB, 2)))
    at_once = run(llm, PROMPTS[0], SamplingParams(**ends))
    later = run(llm, PROMPTS[0], SamplingParams(**ends, min_tokens=6))
    assert all(token % 2 for token in at_once.token_ids[:-1])
    assert at_once.stop_reason == at_once.token_ids[-1]
    assert len(later.token_ids) > 6 or later.finish_reason == "length"
    assert all(token % 2 for token in later.token_ids[:6])


def test_end_of_sequence_stops_unless_ignored():
    expected = greedy(PROMPTS[0], 10)
    engine = Engine(SPEC, PARAMS, EngineConfig(warmup=False, **ROOMY), eos_token_ids=[expected[4]])
    first_end = expected.index(expected[4])
    engine.add_request("stops", PROMPTS[0], SamplingParams(temperature=0, max_tokens=10))
    engine.add_request("ignores", PROMPTS[0], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output.outputs[0] for output in engine.step()}
    assert (done["stops"].token_ids, done["stops"].finish_reason) == (expected[: first_end + 1], "stop")
    assert (done["ignores"].token_ids, done["ignores"].finish_reason) == (expected, "length")


def test_a_sequence_ends_at_the_models_length():
    llm = make(max_model_len=20)
    completion = run(llm, PROMPTS[1], SamplingParams(max_tokens=50))
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


def test_a_repeated_prompt_is_read_from_the_cache():
    llm = make()
    params = SamplingParams(temperature=0, max_tokens=8)
    first, second = (llm.generate([PROMPTS[3]], params, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 28)  # 7 full pages of the 30 tokens
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    llm.reset_prefix_cache()
    assert llm.generate([PROMPTS[3]], params, use_tqdm=False)[0].num_cached_tokens == 0


def test_an_evicted_prompt_comes_back_from_the_host_until_the_cache_is_reset():
    llm = make(num_pages=25, host_cache_gb=2**-14)
    stats = llm.engine.stats()
    assert stats.host_pages_total == 2**16 // stats.page_bytes
    params = SamplingParams(temperature=0, max_tokens=8)
    first = llm.generate([PROMPTS[3]], params, use_tqdm=False)[0]
    cached = []
    for reset in (False, True):
        flood = [[token, int(reset)] * 40 for token in (2, 3)]
        llm.generate(flood, SamplingParams(max_tokens=1), use_tqdm=False)
        if reset:
            llm.reset_prefix_cache()
        again = llm.generate([PROMPTS[3]], params, use_tqdm=False)[0]
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
        cached.append((again.num_cached_tokens, llm.engine.stats().host_cache_hits))
    assert cached == [(28, 28), (0, 28)]
    stats = llm.engine.stats()
    assert (stats.host_pages_moved_in, stats.host_pages_held) == (7, 0)
    assert stats.host_pages_moved_out > 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_cache_gb": 1e-8}, r"host_cache_gb is 1e-08, 10 bytes, but a page takes 1,024; raise it"),
        ({"host_cache_gb": 1e9}, r"host_cache_gb is 1e\+09 but .* GiB of the host's memory are free; lower it"),
    ],
)
def test_a_host_tier_that_does_not_fit_is_refused_with_both_numbers(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_an_aborted_request_says_so_and_leaves_no_page():
    engine = make().engine
    engine.add_request("a", PROMPTS[1], SamplingParams(max_tokens=50))
    engine.add_request("b", PROMPTS[3], SamplingParams(max_tokens=9, temperature=0))
    for _ in range(4):
        engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    done = {}
    while engine.has_unfinished:
        done |= {o.request_id: o for o in engine.step() if o.finished}
    assert done["a"].outputs[0].finish_reason == "abort"
    assert done["b"].outputs[0].token_ids == greedy(PROMPTS[3], 9)
    assert engine.stats().pages_held == 0
    assert engine.stats().pages_free + engine.stats().pages_cached == engine.stats().pages_total


def test_logits_that_are_not_finite_end_that_request_alone():
    """Token 5 poisons whoever has it in its prompt, and its pages must not poison the next one."""
    bad = PARAMS | {"embed": {"w": PARAMS["embed"]["w"].at[5].set(jnp.nan)}}
    llm = LLM((SPEC, bad), warmup=False, **(ROOMY | {"num_pages": 24}))
    prompts = [[token if token != 5 else 6 for token in p] for p in PROMPTS[:4]]
    params = SamplingParams(temperature=0, max_tokens=6, logit_bias={5: -100.0})
    clean = run(llm, prompts, params)
    for _ in range(4):  # often enough that every page has been in bad hands
        outputs = llm.generate([prompts[0], [5] * 40, prompts[1]], params, use_tqdm=False)
        assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
        llm.reset_prefix_cache()
    assert run(llm, prompts, params) == clean
    assert llm.engine.stats().pages_held == 0


def test_streamed_pieces_make_the_whole(chat_llm):
    params = SamplingParams(temperature=0, max_tokens=15, logprobs=1)
    pieces = list(chat_llm.stream("banana", params))
    (whole,) = chat_llm.generate(["banana"], params, use_tqdm=False)
    assert "".join(p.outputs[0].text for p in pieces) == whole.outputs[0].text
    assert [t for p in pieces for t in p.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert sum(len(p.outputs[0].logprobs) for p in pieces) == 15
    assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_stream_that_is_closed_ends_its_request(chat_llm):
    stream = chat_llm.stream("banana", SamplingParams(max_tokens=400))
    next(stream)
    stream.close()
    while chat_llm.engine.has_unfinished:
        chat_llm.engine.step()
    assert chat_llm.engine.stats().pages_held == 0


def test_streams_and_batches_share_the_engine(chat_llm):
    params = SamplingParams(temperature=0, max_tokens=10)
    expected = chat_llm.generate(["banana", "cherry"], params, use_tqdm=False)
    stream = chat_llm.stream("banana", params)
    text = next(stream).outputs[0].text
    (other,) = chat_llm.generate(["cherry"], params, use_tqdm=False)
    text += "".join(piece.outputs[0].text for piece in stream)
    assert [text, other.outputs[0].text] == [o.outputs[0].text for o in expected]


def test_a_stop_string_ends_the_text_before_it(chat_llm):
    (whole,) = chat_llm.generate(["banana"], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[7:10]
    params = SamplingParams(temperature=0, max_tokens=20, stop=stop)
    pieces = list(chat_llm.stream("banana", params))
    assert "".join(p.outputs[0].text for p in pieces) == text[: text.index(stop)]
    assert (pieces[-1].outputs[0].finish_reason, pieces[-1].outputs[0].stop_reason) == ("stop", stop)


def test_bad_words_do_not_come(chat_llm):
    (whole,) = chat_llm.generate(["banana"], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    tokenizer = chat_llm.tokenizer
    word = next(t for t in map(tokenizer.token_text, whole.outputs[0].token_ids) if t.isascii() and t.isalpha())
    params = SamplingParams(temperature=0, max_tokens=12, bad_words=[word])
    (without,) = chat_llm.generate(["banana"], params, use_tqdm=False)
    assert word not in map(tokenizer.token_text, without.outputs[0].token_ids)
    assert len(without.outputs[0].token_ids) == 12


REFUSED = [
    ([], {}, "the prompt is empty"),
    ([1] * 96, {}, r"the prompt has 96 tokens but max_model_len is 96"),
    ([1, 64], {}, r"the prompt holds 64; token ids of this model are 0 to 63"),
    ([1, -1], {}, "the prompt holds -1"),
    ([1, 2.5], {}, "the prompt holds 2.5"),
    ("text", {}, "came without a tokenizer"),
    ([1], {"stop": "x"}, "need a tokenizer"),
    ([1], {"logit_bias": {64: 1.0}}, "token id 64 is named but this model's are 0 to 63"),
    ([1], {"min_tokens": 2, "allowed_token_ids": [5], "stop_token_ids": [4, 5]}, "each of the 1 allowed tokens ends"),
    ([1], {"logprobs": 21}, "logprobs is 21; it must be 0 to 20"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_can_never_be_served_is_refused_at_once(llm, prompt, params, message):
    with pytest.raises(RequestError, match=message):
        llm.engine.add_request("x", prompt, SamplingParams(**params))
    assert not llm.engine.abort("x")


def test_one_bad_prompt_refuses_the_batch_and_leaves_nothing(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate([PROMPTS[0], [], PROMPTS[1]], use_tqdm=False)
    assert llm.engine.stats().num_waiting == 0
    assert run(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4)).token_ids == greedy(PROMPTS[0], 4)


def test_a_pool_too_small_for_the_length_names_what_fits():
    with pytest.raises(ConfigError, match=r"raise num_pages to 25 or lower max_model_len to 28"):
        make(num_pages=8, max_model_len=96)
    assert make(num_pages=8).engine.max_model_len == 28


def test_params_that_do_not_fit_name_every_leaf():
    wrong = PARAMS | {"extra": {"w": jnp.zeros(3)}, "norm": {"w": jnp.zeros(5)}}
    with pytest.raises(ConfigError, match=r"unexpected extra\.w \(3,\); norm\.w has shape \(5,\), needs \(32,\)"):
        LLM((SPEC, wrong), **ROOMY)


def test_weights_may_be_numpys():
    llm = make(jax.tree.map(np.asarray, PARAMS))
    assert run(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4)).token_ids == greedy(PROMPTS[0], 4)


def test_a_mixed_run_compiles_nothing_after_warm_up(llm):
    rng = np.random.default_rng(0)
    before = llm.engine.stats().num_compilations
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 60)).tolist() for _ in range(100)]
    kinds = [
        {},
        {"temperature": 0.0},
        {"logprobs": 5, "top_k": 3},
        {"repetition_penalty": 1.2, "min_tokens": 3},
        {"allowed_token_ids": [1, 2, 3]},
        {"prompt_logprobs": 2, "top_p": 0.5},
        {"n": 3, "seed": 1, "min_p": 0.1},
    ]
    params = [SamplingParams(max_tokens=int(rng.integers(1, 20)), **kinds[i % len(kinds)]) for i in range(100)]
    with _no_compilation():
        outputs = llm.generate(prompts, params, use_tqdm=False)
        again = llm.generate(prompts, params, use_tqdm=False)
    assert all(o.finished for o in outputs + again)
    assert llm.engine.stats().num_compilations == before
    assert llm.engine.stats().host_pages_moved_in > 0


class _no_compilation:
    """Fails where JAX compiles anything at all, whoever asked for it."""

    def __enter__(self):
        self.compiled = []
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event, seconds, **_):
        if "backend_compile" in event:
            self.compiled.append(event)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listen)
        assert self.compiled == []


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_no_step_copies_the_pool(kv_heads):
    block = replace(_BLOCK, mixer=replace(_BLOCK.mixer, kv_heads=kv_heads))
    spec = replace(SPEC, blocks=(block,) * 2)
    settings = ROOMY | {"num_pages": 32768, "host_cache_gb": 2**-9}  # far more memory than activations take
    runner = LLM((spec, dummy_params(spec)), warmup=False, **settings).engine.runner
    pool_bytes = sum(pool.nbytes for pool in jax.tree.leaves(runner.cache))
    for whole in (runner.functions.scrub(), runner.functions.copy_pages(), runner.functions.write_pages()):
        assert whole.memory_analysis().alias_size_in_bytes >= pool_bytes
    copied = 32 * pool_bytes // runner.cache.num_pages
    for some in (runner.functions.copy_pages(), runner.functions.read_pages(), runner.functions.write_pages()):
        assert some.memory_analysis().temp_size_in_bytes < copied + 2**16
    for bucket in runner.buckets:
        memory = runner.functions.forward(bucket).memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes
        activations = 64 * bucket.num_tokens * (VOCAB + 48 + 8 * 32) * 4 + 2**20
        assert memory.temp_size_in_bytes < activations < pool_bytes / 2


def test_on_a_cpu_no_step_turns_weights_of_bfloat16_or_their_pool_into_float32(caplog):
    spec = replace(SPEC, blocks=(replace(_BLOCK, ffn=replace(_BLOCK.ffn, dim=8192)),) * 2)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), dummy_params(spec))
    settings = ROOMY | {"num_pages": 4096, "warmup": False}
    runner = LLM((spec, params), **settings).engine.runner
    assert not caplog.records
    for bucket in runner.buckets:
        temporary = runner.functions.forward(bucket).memory_analysis().temp_size_in_bytes
        assert temporary < 32 * 8192 * 4 + 10 * bucket.num_tokens * 8192 * 4  # one weight of three a layer; activations
    written = LLM((spec, params), cache_dtype="bfloat16", **settings).engine.runner
    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(written.cache))
    assert written.functions.forward(written.buckets[-1]).memory_analysis().temp_size_in_bytes > pool / 2
    assert [record.message[:49] for record in caplog.records] == ["on a CPU XLA turns a pool of bfloat16 into float3"]


def test_layers_share_one_table_of_angles_and_the_memory_of_activations():
    def step(num_layers):
        spec = replace(SPEC, blocks=(_BLOCK,) * num_layers)
        runner = LLM((spec, dummy_params(spec)), warmup=False, **ROOMY | {"max_num_batched_tokens": 512}).engine.runner
        return runner.functions.forward(runner.buckets[-1])

    two, twelve = step(2), step(12)
    assert twelve.as_text().count(" cosine(") == two.as_text().count(" cosine(") == 1
    two, twelve = (s.memory_analysis().temp_size_in_bytes for s in (two, twelve))
    assert twelve < 1.1 * two


def test_warm_up_takes_a_step_of_every_bucket_and_leaves_the_pool_empty(monkeypatch):
    taken = []
    forward = StepFunctions.forward

    def counted(functions, bucket):
        compiled = forward(functions, bucket)
        return lambda *args: taken.append(bucket) or compiled(*args)

    with monkeypatch.context() as patched:
        patched.setattr(StepFunctions, "forward", counted)
        llm = make(warmup=True)
    assert taken == llm.engine.runner.buckets
    assert all(not pool.any() for pool in jax.tree.leaves(llm.engine.runner.cache))
    assert run(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4)).token_ids == greedy(PROMPTS[0], 4)
