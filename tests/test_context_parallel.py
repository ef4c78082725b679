"""A prompt's tokens split over a mesh axis: the same answers, a share of every product, no weight or page moved."""

from __future__ import annotations

from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest
from hlo import moved, products
from jax.sharding import Mesh
from real_model import smollm2_gguf
from test_sharding import ENGINE, MODELS, tokens_of, weights

from jaxpaged import LLM, SamplingParams
from jaxpaged.engine.batch import Bucket
from jaxpaged.errors import ConfigError
from jaxpaged.model.sharding import Placement, ShardingRules, parallel

SLOW = pytest.mark.slow


def engine_of(name: str, sequence: int, tensor: int = 1, data: int = 1, **settings) -> LLM:
    sizes = {"prefill_context_parallel_size": sequence, "tensor_parallel_size": tensor, "data_parallel_size": data}
    return LLM((MODELS[name], weights(MODELS[name])), **sizes, **(ENGINE | settings))


@cache
def tokens_of_one(name: str) -> list[list[int]]:
    return tokens_of(engine_of(name, 1))


@pytest.mark.parametrize(
    ("name", "sequence", "tensor", "data"),
    [("gemma", 4, 1, 1)]
    + [pytest.param(name, 4, 1, 1, marks=SLOW) for name in ("llama", "gpt2")]
    + [pytest.param("gemma", *sizes, marks=SLOW) for sizes in ((4, 2, 1), (2, 2, 2))],
)
def test_prompts_split_over_devices_give_the_tokens_of_one(name, sequence, tensor, data):
    # Neither 3 nor 30 rows can be split equally.
    cut = engine_of(name, sequence, tensor, data, max_num_seqs=3, max_num_batched_tokens=30)
    assert tokens_of(cut) == tokens_of_one(name)
    for leaf in jax.tree.leaves(cut.engine.runner.cache):
        padded = leaf.nbytes // (sequence * tensor * data)
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {padded}


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=SLOW), pytest.param("gemma", marks=SLOW)])
def test_each_device_computes_a_quarter_of_the_rows_and_moves_no_weight_and_no_page(name):
    spec, bucket = MODELS[name], Bucket(4, 28, 4)
    cut = engine_of(name, 4).engine.runner
    one = LLM((cut.spec, weights(cut.spec)), **ENGINE).engine.runner  # as many heads, some of them twice
    whole, part = (products(runner.functions.forward(bucket).as_text()) for runner in (one, cut))
    head = Counter({bucket.num_rows * spec.vocab_size: 1})
    assert whole > head
    assert part - head == Counter({size // 4: count for size, count in (whole - head).items()})

    found = moved(cut.functions.forward(bucket).as_text())
    exchanged = sum(m.size * count for m, count in found.items() if m.kind == "all-to-all")
    mixers = [block.mixer for block in cut.spec.blocks]
    assert exchanged == sum(2 * (a.heads + a.kv_heads) * a.head_dim * bucket.num_tokens // 4 for a in mixers)
    others = Counter({(m.kind, m.shape): count for m, count in found.items() if m.kind != "all-to-all"})
    assert others == {("all-gather", (32, spec.dim)): 1, ("all-reduce", (bucket.num_rows, spec.dim)): 1}


def test_a_step_that_only_decodes_moves_what_each_device_attended_and_nothing_else():
    runner = engine_of("llama", 4).engine.runner
    found = {
        (m.kind, m.shape): count for m, count in moved(runner.functions.forward(Bucket(4, 0, 0)).as_text()).items()
    }
    assert found == {("all-gather", (4, 8, 8)): 2}


@pytest.mark.slow
def test_smollm2_answers_a_long_prompt_the_same_from_4_devices():
    prompt = "The quick brown fox jumps over the lazy dog. " * 12 + "The capital of France is"
    settings = {"max_num_seqs": 2, "max_model_len": 256, "num_pages": 64, "warmup": False}
    answers = []
    for size in (1, 4):
        llm = LLM(smollm2_gguf(), prefill_context_parallel_size=size, max_num_batched_tokens=64, **settings)
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        answers.append(output.outputs[0].token_ids)
    assert answers[0] == answers[1]


DEVICES = np.asarray(jax.devices()[:2])
REFUSED = [
    (
        lambda: parallel(2, 2, 4),
        "tensor_parallel_size is 2 and data_parallel_size 2 and prefill_.* 4, 16 ",
    ),
    (
        lambda: Placement(Mesh(DEVICES, ("model",)), ShardingRules(sequence="model")),
        "cut sequence and heads, kv_heads, ffn, vocab along mesh axis 'model'",
    ),
    (lambda: engine_of("llama", 0), "prefill_context_parallel_size is 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_split_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
