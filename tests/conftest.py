"""How every test runs: eight virtual CPU devices, strict dtypes and ranks, no hub, compiled steps kept between runs.

`--device gpu` runs on the GPU at hand instead, for the tests that mean something there (`make gpu`): kernels that are
interpreted elsewhere are compiled, float32 products are full ones, and warnings, which are that machine's, pass.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jaxtyping
import numpy as np
import pytest

if TYPE_CHECKING:  # what a run without these fixtures need not import
    import openai
    from running_server import RunningServer

ROOT = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
HAVE_BEARTYPE = importlib.util.find_spec("beartype") is not None
if HAVE_BEARTYPE:
    jaxtyping.install_import_hook([*MODEL, "jaxpaged.kernels"], "beartype.beartype")

HAVE_TORCH = importlib.util.find_spec("torch") is not None
GOLDEN = ROOT / "tests" / "golden"

Arrays = Mapping[str, np.ndarray]


# A shell that starts the tests in the background has SIGINT ignored for them; what Ctrl-C does is tested all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="store what torch computes under tests/golden/")
    parser.addoption("--device", choices=["cpu", "gpu"], default="cpu", help="where to run (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    on_gpu = config.getoption("--device") == "gpu"
    platforms = os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if on_gpu else "cpu")  # tests start processes too
    jax.config.update("jax_platforms", platforms)
    if on_gpu:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
        jax.config.update("jax_default_matmul_precision", "highest")
        config.addinivalue_line("filterwarnings", "default")
        if jax.default_backend() != "gpu":
            raise pytest.UsageError(
                f"--device gpu, but JAX runs on {jax.default_backend()} (JAX_PLATFORMS={platforms})"
            )


def pytest_report_header() -> list[str]:
    return [] if HAVE_BEARTYPE else ["shapes in signatures go unchecked: beartype is not installed"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and not HAVE_TORCH:
        pytest.skip("needs torch, which is installed for Python 3.11 only")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], Arrays]], Arrays]:
    """`golden(name, compute)`: what compute() makes with torch or, where torch is absent, what was stored of it.

    Where both are there they must agree, so that stored arrays do not grow stale; `--write-golden` stores them anew.
    On a GPU's machine torch may be of any version, and what was stored stands.
    """
    have_torch = HAVE_TORCH and request.config.getoption("--device") == "cpu"

    def reference(name: str, compute: Callable[[], Arrays]) -> Arrays:
        path = GOLDEN / f"{name}.npz"
        if have_torch and request.config.getoption("--write-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **compute())
        assert path.exists(), f"{path.relative_to(ROOT)} is not stored yet; run pytest --write-golden where torch is"
        with np.load(path) as file:
            stored = dict(file)
        if have_torch:
            fresh = compute()
            assert fresh.keys() == stored.keys(), f"{path.name} is stale; run pytest --write-golden"
            for key, array in fresh.items():
                np.testing.assert_allclose(
                    stored[key], array, rtol=1e-4, atol=1e-4, err_msg=f"{path.name} is stale; run pytest --write-golden"
                )
        return stored

    return reference


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """OpenAI's own, asking the `server` of the test's module."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def no_page_is_leaked(server: RunningServer) -> Iterator[None]:
    """Of the `server` of the test's module, once a test is over."""
    yield
    assert server.pages_held() == 0
