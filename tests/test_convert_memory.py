"""Peak host memory: a checkpoint passes through one tensor at a time. Measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxpaged.convert.families import family_of
from jaxpaged.convert.rules import hf_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}

# VmHWM, the most that was resident: ru_maxrss would begin with what pytest itself held when it forked.
PEAK = """
import sys
from pathlib import Path
def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
"""
LOAD = """
import jax
from jaxpaged.convert.load import load
jax.device_put(0).block_until_ready()
before = peak()
params = load(sys.argv[1], dtype=sys.argv[3]).params
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
QUANTISE = """
import jax
from jaxpaged.convert.load import load
jax.device_put(0).block_until_ready()
before = peak()
params = load(sys.argv[1], quantization=sys.argv[3]).params
print(peak() - before, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""
CONVERT = """
from jaxpaged.convert.__main__ import convert
before = peak()
done = convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], to_hf="hf" in sys.argv[2])
print(peak() - before, done.num_bytes)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc"),
]


@pytest.fixture(scope="module", params=["llama", "phi3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 350 MB in float32; Phi-3 fuses q, k and v, gate and up."""
    path: Path = tmp_path_factory.mktemp("large")
    config = CONFIG | {"model_type": request.param}
    family = family_of(config)
    spec = family.spec(config)
    shapes = hf_shapes(family.rules(spec, ()), spec)
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def peak_over_size(program: str, *args: str) -> float:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK + program, *args], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > 150e6
    return peak / size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_weights_and_little_more(folder: Path, dtype: str) -> None:
    assert 0.8 < peak_over_size(LOAD, str(folder), "", dtype) < 1.15


def test_quantising_makes_no_floats_of_a_whole_model(folder: Path) -> None:
    """`peak_over_size` wants a model of 150 MB: of half a one, less than 0.65 is less than 1.3."""
    assert 0.4 < peak_over_size(QUANTISE, str(folder), "", "int8") < 0.65


@pytest.mark.parametrize("target", ["native", "hf"])
def test_converting_holds_a_few_tensors(folder: Path, tmp_path: Path, target: str) -> None:
    assert peak_over_size(CONVERT, str(folder), str(tmp_path / target), "float32") < 0.5
