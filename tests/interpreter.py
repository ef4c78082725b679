"""Whether the tests' kernels run in an interpreter, or compiled on the GPU at hand (`pytest --device gpu`)."""

import jax

INTERPRET = jax.default_backend() != "gpu"
