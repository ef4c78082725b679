"""With batch_invariant, a token's logprob has the same bits in any company, however its prefix was computed."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import LLM, ConfigError, EngineConfig, RequestError, SamplingParams, functional
from jaxpaged.engine.mesh_limits import check_mesh
from jaxpaged.model.blocks import BLOCK, in_blocks
from jaxpaged.model.params import dummy_params
from jaxpaged.model.sharding import parallel
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Moe, Norm, Rope

_NORM = Norm("rms", 1e-5)
_LAYERS = tuple(
    Block(Attention(6, 2, 32, 32**-0.5, Rope(1e4, 32), window=window), ffn, _NORM)
    for window, ffn in ((None, Mlp(192, "silu")), (9, Moe(6, 2, 96, "silu", renormalize=True)))
)
SPEC = Decoder(300, 96, 512, _LAYERS, _NORM, 96, tied_head=False, logit_softcap=30.0)
PAGE = 4
ALONE = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "num_pages": 64}


def params_of(dtype="float32"):
    return jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=1, dtype=jnp.dtype(dtype)))


def make(settings=ALONE, dtype="float32", batch_invariant=True):
    common = {"page_size": PAGE, "max_model_len": 128, "warmup": False, "batch_invariant": batch_invariant}
    return LLM((SPEC, params_of(dtype)), **(settings | common))


def make_prompts(count, longest=60):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, int(length)).tolist() for length in rng.integers(1, longest, count)]


def generate(llm, prompts, max_tokens=8):
    """Tokens drawn, and their logprobs."""
    each = [SamplingParams(max_tokens=max_tokens, seed=index, logprobs=0) for index in range(len(prompts))]
    outputs = [o.outputs[0] for o in llm.generate(prompts, each, use_tqdm=False)]
    return [o.token_ids for o in outputs], [
        np.asarray([entry[t].logprob for t, entry in zip(o.token_ids, o.logprobs, strict=True)], np.float32)
        for o in outputs
    ]


def largest_difference(some, others):
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("tensor", "data"),
    [
        (1, 1),
        pytest.param(2, 2, marks=pytest.mark.slow),
        *(pytest.param(*sizes, marks=(pytest.mark.slow, pytest.mark.long)) for sizes in ((2, 1), (4, 1), (1, 2))),
    ],
)
def test_logprobs_are_equal_alone_together_in_chunks_from_cached_prefixes_after_preemption_and_scored(tensor, data):
    """On one device or on a mesh: the bits are that mesh's."""
    prompts = make_prompts(6 if data == 1 else 20)
    mesh = {"tensor_parallel_size": tensor, "data_parallel_size": data}
    alone = make(ALONE | mesh)
    tokens, expected = generate(alone, prompts)
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, tokens, strict=True)]
    whole = alone.score(texts)

    crowded = {"max_num_seqs": 3 * data, "max_num_batched_tokens": 9, "num_pages": 33}
    llm = make(crowded | {"long_prefill_token_threshold": PAGE} | mesh)
    for _ in range(2):  # the second time prefixes are found
        same_tokens, logprobs = generate(llm, prompts)
        assert same_tokens == tokens
        assert largest_difference(logprobs, expected) == 0
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert largest_difference(llm.score(prompts, tokens), expected) == 0
    assert largest_difference(llm.score(texts), whole) == 0
    assert largest_difference([w[len(p) - 1 :] for w, p in zip(whole, prompts, strict=True)], expected) == 0


def padded(texts, width):
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(tokens), jnp.asarray([len(text) for text in texts], jnp.int32)


def test_the_pure_function_gives_the_engines_bits_in_any_program():
    texts = make_prompts(4, longest=40)
    expected = make().score(texts)
    params = params_of()
    score = partial(functional.score, spec=SPEC, page_size=16, batch_invariant=True)
    tokens, lengths = padded(texts, 48)
    values = jax.jit(score)(params, tokens, lengths)
    loss = jax.jit(jax.value_and_grad(lambda p: (lambda v: (v.sum(), v))(score(p, tokens, lengths)), has_aux=True))
    (_, beside_gradients), _ = loss(params)
    for row, again, text, want in zip(values, beside_gradients, texts, expected, strict=True):
        assert np.array_equal(row[: len(text) - 1], want)
        assert np.array_equal(again, row)


def test_a_rows_place_and_company_do_not_change_a_product():
    """What the mode stands on, and what a matrix product as such does not give."""
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3 * BLOCK, 576), (576, 192)]))
    product = jax.jit(lambda x: in_blocks(lambda rows: rows @ w, x, x[:, 0] < jnp.inf))
    everything = product(x)
    for shift in (1, 7, BLOCK - 1):
        assert np.array_equal(product(jnp.roll(x, shift, 0)), jnp.roll(everything, shift, 0))
    for count in (1, 2, BLOCK + 1):
        assert np.array_equal(product(x[:count]), everything[:count])


def test_scores_of_texts_without_anything_to_score_are_empty():
    llm = make()
    assert [len(s) for s in llm.score([[5], [5, 6]])] == [0, 1]
    assert [len(s) for s in llm.score([[5], [5, 6]], [[], [7, 8]])] == [0, 2]
    assert len(llm.score([[1] * 128])[0]) == 127  # as long as a sequence can be
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.score([[5], []])
    with pytest.raises(RequestError, match="prompt 0 and its completion have 129 tokens but max_model_len is 128"):
        llm.score([[1] * 100], [[1] * 29])
    with pytest.raises(RequestError, match="2 prompts but 1 completions; give one for each"):
        llm.score([[5], [6]], [[7]])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prefill_context_parallel_size": 2}, "with prefill_context_parallel_size 2 yet; leave it out, or take 1"),
        ({"pipeline_parallel_size": 2}, "with pipeline_parallel_size 2 yet"),
    ],
)
def test_meshes_that_compute_rows_otherwise_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make(ALONE | sizes)


def test_meshes_whose_sums_have_an_order_of_their_own_are_refused(monkeypatch):
    """As if these were GPUs, and as if they were two processes'."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices = [SimpleNamespace(platform="gpu", process_index=index // 4) for index in range(8)]
    for count, message in ((2, None), (4, "take tensor_parallel_size 2 at most"), (8, "over 2 processes yet")):
        placement = parallel(count)
        mesh = SimpleNamespace(devices=np.asarray(devices[:count]), shape=placement.mesh.shape)
        object.__setattr__(placement, "mesh", mesh)
        with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
            check_mesh(placement, EngineConfig(batch_invariant=True))


def test_requests_under_way_go_on_while_others_are_scored():
    engine = make().engine
    engine.add_request("mine", [3, 1, 4], SamplingParams(temperature=0, max_tokens=2), output_kind="final")
    engine.score([[2, 7, 1, 8, 2, 8]] * 3, [[1, 8, 2, 8]] * 3)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [(o.request_id, len(o.outputs[0].token_ids)) for o in outputs] == [("mine", 2)]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_hundred_prompts_have_equal_logprobs_however_they_are_computed(dtype, capsys):
    prompts = make_prompts(200, longest=90)
    rows = {
        f"batches of {n}": {"max_num_seqs": n, "max_num_batched_tokens": 128, "num_pages": 1024} for n in (3, 8, 32)
    }
    rows["a page at a time"] = rows["batches of 8"] | {"long_prefill_token_threshold": PAGE}
    rows["too few pages"] = {"max_num_seqs": 32, "max_num_batched_tokens": 64, "num_pages": 100}
    for batch_invariant in (True, False):
        alone = make(dtype=dtype, batch_invariant=batch_invariant)
        tokens, expected = generate(alone, prompts, max_tokens=24)
        if batch_invariant:
            texts = list(zip(prompts, tokens, strict=True))
        whole = alone.score(*zip(*texts, strict=True))
        found = {}
        for name, settings in rows.items() if batch_invariant else list(rows.items())[2:4]:  # enough of the default
            llm = make(settings, dtype, batch_invariant)
            for again in ("", ", prefixes cached") if batch_invariant else ("",):
                others, logprobs = generate(llm, prompts, max_tokens=24)
                same = [i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a == b]
                found[name + again] = largest_difference([logprobs[i] for i in same], [expected[i] for i in same])
                assert not batch_invariant or len(same) == 200
            found[name + ", scored"] = largest_difference(llm.score(*zip(*texts, strict=True)), whole)
            if name == "too few pages":
                assert llm.engine.stats().num_preemptions > 0
        if batch_invariant:
            assert largest_difference(whole, expected) == 0
            assert set(found.values()) == {0.0}
        with capsys.disabled():
            mode = "invariant" if batch_invariant else "default"
            print(f"\n{dtype}, {mode}: largest difference {max(found.values()):.1e}")
            print("\n".join(f"  {name}: {value:.1e}" for name, value in found.items()))
