"""How every test runs: eight virtual CPU devices, strict dtypes and ranks, no hub, compiled steps kept between runs."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the processes that tests start
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Small programs are most of what the tests compile, so all of them are kept, from one run to the next.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxpaged" / "tests"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# The shapes in signatures are checked wherever a test calls or traces a function. Not in model.cache: JAX builds the
# pytree KVCache from whatever it maps a function to, so its fields are not always the arrays they are declared as.
MODEL = [
    f"jaxpaged.model.{p.stem}"
    for p in (ROOT / "jaxpaged" / "model").glob("*.py")
    if p.stem not in ("__init__", "cache")
]
jaxtyping.install_import_hook([*MODEL, "jaxpaged.kernels"], "beartype.beartype")

HAVE_TORCH = importlib.util.find_spec("torch") is not None
GOLDEN = ROOT / "tests" / "golden"

Arrays = Mapping[str, np.ndarray]


# A shell that starts the tests in the background has SIGINT ignored for them; what Ctrl-C does is tested all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="store what torch computes under tests/golden/")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and not HAVE_TORCH:
        pytest.skip("needs torch, which is installed for Python 3.11 only")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], Arrays]], Arrays]:
    """`golden(name, compute)`: what compute() makes with torch or, where torch is absent, what was stored of it.

    Where both are there they must agree, so that stored arrays do not grow stale; `--write-golden` stores them anew.
    """

    def reference(name: str, compute: Callable[[], Arrays]) -> Arrays:
        path = GOLDEN / f"{name}.npz"
        if HAVE_TORCH and request.config.getoption("--write-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **compute())
        assert path.exists(), f"{path.relative_to(ROOT)} is not stored yet; run pytest --write-golden where torch is"
        with np.load(path) as file:
            stored = dict(file)
        if HAVE_TORCH:
            fresh = compute()
            assert fresh.keys() == stored.keys(), f"{path.name} is stale; run pytest --write-golden"
            for key, array in fresh.items():
                np.testing.assert_allclose(
                    stored[key], array, rtol=1e-4, atol=1e-4, err_msg=f"{path.name} is stale; run pytest --write-golden"
                )
        return stored

    return reference
