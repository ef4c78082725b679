"""Every family against transformers: logits, greedy tokens through the paged cache, names, configs of both dialects."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CASES, NUM_GENERATED, Case, transformers_reference, weight, write_checkpoint

from jaxpaged.convert.families import FAMILIES, family_of
from jaxpaged.convert.rules import Rule, hf_shapes, load_leaves, store_tensors
from jaxpaged.errors import CheckpointError
from jaxpaged.model.cache import KVCache, init_cache
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import Params, check_params, flatten, map_specs
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope, from_json, to_json
from jaxpaged.model.step import StepInputs, forward

Golden = Callable[[str, Callable[[], Mapping[str, np.ndarray]]], Mapping[str, np.ndarray]]

PAGE_SIZE = 4
CHUNK = 12
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Tiny(NamedTuple):
    spec: Decoder
    rules: list[Rule]
    shapes: dict[str, tuple[int, ...]]
    params: Params


@cache
def tiny(name: str) -> Tiny:
    """The case's model, converted."""
    config = CASES[name].config
    family = family_of(config)
    spec = family.spec(config)
    rules = family.rules(spec, ())
    shapes = hf_shapes(rules, spec)
    leaves = dict(load_leaves(rules, lambda tensor: weight(tensor, shapes[tensor])))
    return Tiny(spec, rules, shapes, map_specs(lambda path, leaf: jnp.asarray(leaves[path]), spec))


@pytest.fixture
def reference(golden: Golden) -> Callable[[Case], Mapping[str, np.ndarray]]:
    """What transformers says of a case."""
    return lambda case: golden(f"families/{case.name}", lambda: computed_reference(case.name))


@cache
def computed_reference(name: str) -> Mapping[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), CASES[name].config, tiny(name).shapes)
        return transformers_reference(Path(folder), CASES[name])


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@every_case
def test_dense_logits_equal_transformers(case: Case, reference: Callable[[Case], Mapping[str, np.ndarray]]) -> None:
    model = tiny(case.name)
    assert_same_logits(apply(model.params, jnp.asarray(case.tokens()), model.spec), reference(case)["logits"])


@every_case
def test_paged_steps_equal_transformers(case: Case, reference: Callable[[Case], Mapping[str, np.ndarray]]) -> None:
    want = reference(case)
    continuations = [want[f"ids_{i}"].tolist() for i in range(len(case.prompts()))]

    got = paged_logits(tiny(case.name), case.prompts(), continuations)

    for i, logits in enumerate(got):
        assert_same_logits(logits, want[f"logits_{i}"])
        assert logits.argmax(-1).tolist() == continuations[i]


def paged_logits(model: Tiny, prompts: list[list[int]], continuations: list[list[int]]) -> list[np.ndarray]:
    """Logits after each prompt and after each of its continuation's tokens but the last.

    All prompts run side by side: first in chunks of `CHUNK` tokens, which begin and end inside of pages, then a token of
    each at a time.
    """
    texts = [np.array(prompt + more, np.int32) for prompt, more in zip(prompts, continuations, strict=True)]
    pages_each = -(-max(map(len, texts)) // PAGE_SIZE)
    # Pages dealt out in turn, so that no sequence's pages lie side by side; page 0 is the null page.
    tables = 1 + np.arange(len(texts) * pages_each, dtype=np.int32).reshape(pages_each, len(texts)).T
    kv_cache = init_cache(model.spec, tables.size + 1, PAGE_SIZE, "float32")
    step = jax.jit(forward, static_argnames="spec", donate_argnums=1)
    computed = [0] * len(texts)
    logits: list[list[np.ndarray]] = [[] for _ in texts]

    def run(cache: KVCache, counts: list[int], size: int, num_decode: int) -> KVCache:
        inputs = step_inputs(texts, [len(p) for p in prompts], tables, computed, counts, size, num_decode)
        cache, out = step(model.params, cache, inputs, jnp.zeros(1, jnp.int32), model.spec)
        for i, count in enumerate(counts):
            computed[i] += count
            if count and computed[i] >= len(prompts[i]):
                logits[i].append(np.asarray(out.logits[i]))
        return cache

    while any(c < len(p) for c, p in zip(computed, prompts, strict=True)):
        budget, counts = CHUNK, []
        for c, prompt in zip(computed, prompts, strict=True):
            counts.append(min(budget, len(prompt) - c))
            budget -= counts[-1]
        kv_cache = run(kv_cache, counts, CHUNK, 0)
    for _ in range(NUM_GENERATED - 1):
        kv_cache = run(kv_cache, [1] * len(texts), len(texts), len(texts))
    return [np.stack(rows) for rows in logits]


def step_inputs(
    texts: list[np.ndarray],
    prompt_lens: list[int],
    tables: np.ndarray,
    computed: list[int],
    counts: list[int],
    size: int,
    num_decode: int,
) -> StepInputs:
    """The step that computes the next `counts` tokens of each text, padded to `size` tokens."""
    tokens, positions, rope_lens = (np.zeros(size, np.int32) for _ in range(3))
    slots = np.full(size, 10**6, np.int32)
    ends = np.cumsum(counts)
    for i, (start, count) in enumerate(zip(computed, counts, strict=True)):
        rows, places = slice(ends[i] - count, ends[i]), np.arange(start, start + count, dtype=np.int32)
        tokens[rows], positions[rows] = texts[i][places], places
        rope_lens[rows] = np.maximum(prompt_lens[i], places + 1)
        slots[rows] = tables[i, places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
    offsets = np.zeros(1, np.int32) if num_decode else np.concatenate([[0], ends]).astype(np.int32)
    return StepInputs(
        token_ids=jnp.asarray(tokens),
        feedback=jnp.full(size, -1, jnp.int32),
        positions=jnp.asarray(positions),
        rope_lens=jnp.asarray(rope_lens),
        slots=jnp.asarray(slots),
        page_table=jnp.asarray(tables),
        kv_lens=jnp.asarray(np.add(computed, counts), jnp.int32),
        cu_q_lens=jnp.asarray(offsets),
        logit_rows=jnp.asarray(np.maximum(ends - 1, 0), jnp.int32),
    )
