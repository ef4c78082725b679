"""The kernel of experts' products against the reference: in Pallas' interpreter or, with --device gpu, compiled."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import INTERPRET

from jaxpaged.kernels.expert_product import expert_product

# jax 0.11 announces the end of its Triton lowering, which our range of versions has.
pytestmark = pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")

UGLY = {
    "one block, one expert": (1, 16, 32, 1, 48, [0], 1),
    "none used": (2, 16, 32, 3, 16, [0, 2], 0),
    "some unused, experts again and again": (6, 16, 64, 4, 32, [3, 3, 0, 1, 2, 2], 4),
    "widths that no tile divides": (3, 32, 50, 5, 37, [4, 0, 4], 3),
    "narrower than a tile": (2, 16, 7, 2, 3, [1, 0], 2),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in UGLY), ("some unused, experts again and again", "bfloat16")]
)
def test_the_kernel_multiplies_as_the_reference_does(name, dtype):
    blocks, size, width, num_experts, columns, experts, used = UGLY[name]
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (blocks, size, width), dtype)
    weights = jax.random.normal(keys[1], (num_experts, width, columns), dtype)
    args = rows, weights, jnp.asarray(experts, jnp.int32), jnp.int32(used)
    kernel = jax.jit(partial(expert_product, backend="triton", interpret=INTERPRET, block_k=32, block_f=16))
    got, reference = kernel(*args), expert_product(*args, backend="reference")
    plain = jnp.einsum("nbm,nmf->nbf", rows, weights[args[2]], preferred_element_type=jnp.float32)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    for found in (got, reference):
        assert found.dtype == dtype
        np.testing.assert_allclose(found[:used].astype(jnp.float32), plain[:used], **tolerance)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["some unused, experts again and again", "widths that no tile divides"])
def test_weights_in_8_bits_are_multiplied_and_then_scaled(name, dtype):
    blocks, size, width, num_experts, columns, experts, used = UGLY[name]
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (blocks, size, width))
    weights = jax.random.randint(keys[1], (num_experts, width, columns), -100, 100).astype(dtype)
    scale = jax.random.uniform(keys[2], (num_experts, 1, columns))
    args = rows, weights, jnp.asarray(experts, jnp.int32), jnp.int32(used), scale
    kernel = jax.jit(partial(expert_product, backend="triton", interpret=INTERPRET, block_k=32, block_f=16))
    plain = jnp.einsum("nbm,nmf->nbf", rows, (weights.astype(jnp.float32) * scale)[args[2]])
    for found in (kernel(*args), expert_product(*args, backend="reference")):
        np.testing.assert_allclose(found[:used], plain[:used], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(("sizes", "message"), [({"block_k": 24}, "block_k: 24"), ({"block_f": 8}, "block_f: 8")])
def test_tiles_that_cannot_be_compiled_are_refused(sizes, message):
    args = jnp.zeros((1, 16, 32)), jnp.zeros((1, 32, 16)), jnp.zeros(1, jnp.int32), jnp.int32(1)
    with pytest.raises(ValueError, match=message):
        expert_product(*args, backend="triton", interpret=INTERPRET, **sizes)


def test_the_gradient_is_refused_with_what_has_one():
    args = jnp.zeros((1, 16, 32)), jnp.zeros((1, 32, 16)), jnp.zeros(1, jnp.int32), jnp.int32(1)
    with pytest.raises(NotImplementedError, match="every_expert"):
        jax.grad(lambda rows: expert_product(rows, *args[1:]).sum())(args[0])
