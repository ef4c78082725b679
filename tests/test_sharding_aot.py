"""The engine's steps on a mesh, compiled ahead of time for 4 and 8 H200s: two sums a layer, no weight or page moved.

Skipped where the compiler's wheels are absent; `make test-aot` installs them in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot
import jax
import jax.numpy as jnp
import pytest
from hlo import Moved, moved

from jaxpaged import EngineConfig
from jaxpaged.engine.batch import Bucket
from jaxpaged.engine.forecast import Forecaster
from jaxpaged.engine.runner import Runner
from jaxpaged.model.params import map_specs
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

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
POOL_BYTES = LAYERS * 4096 * 16 * 2 * 8 * 128 * 2


def compiled(num_devices: int, function: Callable[[Runner], Any]) -> Any:
    """What `function` asks a runner on so many H200s for. The runner has shapes of weights, and no pool."""
    mesh = aot.mesh("H200", num_devices, "model")
    settings: dict[str, Any] = {"max_num_seqs": ROWS, "max_num_batched_tokens": ROWS + 512, "max_model_len": 4096}
    config = EngineConfig(tensor_parallel_size=num_devices, num_pages=4096, **settings)
    params = map_specs(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), LLAMA)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(Runner(LLAMA, params, config, Placement(mesh)))


@pytest.mark.parametrize("num_devices", [4, 8])
@pytest.mark.parametrize("bucket", [Bucket(ROWS, 0, 0), Bucket(ROWS, 512, 16)], ids=["decode", "mixed"])
def test_a_step_sums_twice_a_layer_and_once_for_the_embedding_and_moves_nothing_else(bucket, num_devices):
    step = compiled(num_devices, lambda runner: runner._forward(bucket))
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


@pytest.mark.parametrize(
    ("name", "num_devices"), [("sample", 4), ("sample", 8), ("logprobs", 8), ("edit", 8), ("restrict", 8)]
)
def test_what_follows_a_step_moves_no_row_of_logits(name, num_devices):
    function = compiled(num_devices, lambda runner: getattr(runner, f"_{name}")(ROWS))
    largest = max((array.size for array in moved(function.as_text())), default=0)
    most = {"sample": ROWS * (VOCAB // 128 + num_devices), "logprobs": ROWS * 20 * num_devices, "edit": 4096}
    assert largest <= most.get(name, 0) < ROWS * VOCAB // num_devices
    assert function.memory_analysis().temp_size_in_bytes < 4 * ROWS * VOCAB
