"""The engine's steps on a mesh, compiled ahead of time for 4 and 8 H200s: two sums a layer, no weight or page moved.

Skipped where the compiler's wheels are absent; `make test-aot` installs them in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest
from hlo import Moved, groups, moved
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxpaged import EngineConfig
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.forecast import Forecaster
from jaxpaged.engine.runner import Runner
from jaxpaged.model.blocks import BLOCK
from jaxpaged.model.params import map_specs
from jaxpaged.model.sharding import Placement, ShardingRules
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Moe, Norm, Rope

pytestmark = [
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
    # jax 0.11 announces the end of its Triton lowering, which our range of versions has.
    pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning"),
]

LAYERS, VOCAB, ROWS = 2, 128256, 64
NORM = Norm("rms", 1e-5)
LLAMA = Decoder(  # Llama 3 8B, but for the number of layers
    VOCAB,
    4096,
    8192,
    (Block(Attention(32, 8, 128, 128**-0.5, Rope(5e5, 128)), Mlp(14336, "silu"), NORM),) * LAYERS,
    NORM,
    4096,
    tied_head=False,
)
MIXTURE = replace(  # with Qwen3 30B A3B's experts
    LLAMA, blocks=(replace(LLAMA.blocks[0], ffn=Moe(128, 8, 768, "silu", renormalize=True)),) * LAYERS
)
POOL_BYTES = LAYERS * 4096 * 16 * 2 * 8 * 128 * 2


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache() -> Iterator[None]:
    """A program for a device that is not there can be written to the cache, and not read again."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@cache
def compiled(
    num_devices: int,
    name: str,
    size: int | Bucket,
    data: int = 1,
    sequence: int = 1,
    batch_invariant: bool = False,
    spec: Decoder = LLAMA,
    experts: str | None = None,
) -> Any:
    """A runner's function for so many H200s, times the others. The runner has shapes of weights, and no pool."""
    mesh = aot.mesh("H200", data=data, sequence=sequence, model=num_devices)
    rules = ShardingRules(data="data" if data > 1 else None, sequence="sequence" if sequence > 1 else None)
    rules = replace(rules, experts=experts)
    settings: dict[str, Any] = {"max_num_seqs": ROWS, "max_num_batched_tokens": ROWS + 512, "max_model_len": 4096}
    config = EngineConfig(num_pages=4096, batch_invariant=batch_invariant, **settings)
    params = map_specs(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), spec)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return getattr(Runner(spec, params, config, Placement(mesh, rules)).functions, name)(size)


@pytest.mark.parametrize("num_devices", [4, 8])
@pytest.mark.parametrize("bucket", [Bucket(ROWS, 0, 0), Bucket(ROWS, 512, 16)], ids=["decode", "mixed"])
def test_a_step_sums_twice_a_layer_and_once_for_the_embedding_and_moves_nothing_else(bucket, num_devices):
    step = compiled(num_devices, "forward", bucket)
    found = moved(step.as_text())
    assert found == {Moved("all-reduce", "bf16", (bucket.num_tokens, 4096)): 2 * LAYERS + 1}
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == POOL_BYTES // num_devices
    assert memory.temp_size_in_bytes < POOL_BYTES // num_devices // 2

    forecaster = Forecaster(LLAMA, "bfloat16", EngineConfig(tensor_parallel_size=num_devices))
    told = forecaster.decode_step(bucket.num_tokens, 1)
    assert (told.num_sums, told.sum_bytes) == (2 * LAYERS + 1, bucket.num_tokens * 4096 * 2)
    given = memory.argument_size_in_bytes - memory.alias_size_in_bytes - forecaster.weight_bytes()
    assert 0 < given < 1 << 20  # token ids, page tables and the like


@pytest.mark.parametrize("experts", [None, "model"], ids=["columns", "whole experts"])
def test_a_mixture_is_summed_as_an_mlp_is_and_no_row_or_weight_goes_to_another_device(experts):
    step = compiled(4, "forward", Bucket(ROWS, 0, 0), spec=MIXTURE, experts=experts)
    assert moved(step.as_text()) == {Moved("all-reduce", "bf16", (ROWS, 4096)): 2 * LAYERS + 1}
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == POOL_BYTES // 4
    assert memory.temp_size_in_bytes < 64 << 20 < 3 * 128 * 4096 * 768 * 2 // 4  # a layer's experts on a device


@pytest.mark.parametrize(
    ("name", "num_devices"), [("sample", 4), ("sample", 8), ("logprobs", 8), ("edit", 8), ("restrict", 8)]
)
def test_what_follows_a_step_moves_no_row_of_logits(name, num_devices):
    function = compiled(num_devices, name, ROWS)
    largest = max((array.size for array in moved(function.as_text())), default=0)
    most = {"sample": ROWS * (VOCAB // 128 + num_devices), "logprobs": ROWS * 20 * num_devices, "edit": 4096}
    assert largest <= most.get(name, 0) < ROWS * VOCAB // num_devices
    assert function.memory_analysis().temp_size_in_bytes < 4 * ROWS * VOCAB


@pytest.mark.parametrize("name", ["forward", "sample"])
def test_data_shards_do_what_one_does_and_no_word_passes_between_them(name):
    size = Bucket(ROWS, 512, 16) if name == "forward" else ROWS
    alone, both = (compiled(4, name, size, data) for data in (1, 2))
    assert moved(alone.as_text()) == moved(both.as_text())
    assert groups(both.as_text())
    assert all(max(group) < 4 or min(group) >= 4 for group in groups(both.as_text()))
    alone, both = alone.memory_analysis(), both.memory_analysis()
    assert alone.alias_size_in_bytes == both.alias_size_in_bytes
    assert abs(alone.temp_size_in_bytes - both.temp_size_in_bytes) < 1 << 16


def test_rows_computed_in_blocks_are_summed_in_blocks():
    step = compiled(2, "forward", Bucket(ROWS, 512, 16), data=2, batch_invariant=True)
    assert moved(step.as_text()) == {Moved("all-reduce", "bf16", (BLOCK, 4096)): 2 * LAYERS + 1}
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == POOL_BYTES // 2
    assert memory.temp_size_in_bytes < POOL_BYTES // 4
    for name in ("sample", "logprobs"):
        function = compiled(2, name, ROWS, data=2, batch_invariant=True)
        assert max(array.size for array in moved(function.as_text())) <= BLOCK * (VOCAB // 128 + 2)


def test_a_prompt_split_over_4_pairs_of_gpus_moves_heads_and_the_sums_of_fewer_rows():
    """An all-to-all for each of q, k, v and what attention gives; sums of a quarter of the rows; the last hidden states
    and those of the rows that are sampled.
    """
    bucket = Bucket(ROWS, 512, 16)
    step = compiled(2, "forward", bucket, sequence=4)
    tokens = bucket.num_tokens // 4
    found = moved(step.as_text())
    exchanged = sum(array.size * count for array, count in found.items() if array.kind == "all-to-all")
    assert exchanged == LAYERS * tokens * 2 * (32 + 8) * 128 // 2
    others = {array: count for array, count in found.items() if array.kind != "all-to-all"}
    assert others == {
        Moved("all-reduce", "bf16", (tokens, 4096)): 2 * LAYERS + 1,
        Moved("all-gather", "bf16", (bucket.num_tokens, 4096)): 1,
        Moved("all-reduce", "bf16", (bucket.num_rows, 4096)): 1,
    }
    assert step.memory_analysis().alias_size_in_bytes == POOL_BYTES // 8

    decode = moved(compiled(2, "forward", Bucket(ROWS, 0, 0), sequence=4).as_text())
    sums = Moved("all-reduce", "bf16", (ROWS, 4096))
    assert decode == {sums: 2 * LAYERS + 1, Moved("all-gather", "bf16", (ROWS, 16, 128)): LAYERS}
