"""Compile for an NVIDIA GPU that is not there: PTX, registers, spills, and the launches of a whole program.

Needs the wheels jax-cuda13-plugin, jax-cuda13-pjrt (of jax's own version) and nvidia-cuda-nvcc, nothing of a driver:
`make test-aot` installs them in an environment of their own. Nothing is run and nothing autotuned, so this shows that
a program is valid, what it takes and how it is launched, and never how fast it is.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver is looked for

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Without the three versions XLA believes in an old driver, and leaves cuBLAS and custom calls out of command buffers.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
_HOPPER = {"cores": 132, "fpus": 128, "shared_memory": 233472, "shared_memory_optin": 232448, "clock": 1.98, "major": 9}
_GPUS: dict[str, dict[str, Any]] = {
    "H200": _HOPPER | {"name": "NVIDIA H200", "bandwidth": 4800 * 10**9, "l2": 62914560, "memory": 150 * 10**9},
    "A100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "cores": 108,
        "fpus": 64,
        "shared_memory": 167936,
        "shared_memory_optin": 166912,
        "bandwidth": 2039 * 10**9,
        "l2": 41943040,
        "clock": 1.41,
        "memory": 84 * 10**9,
        "major": 8,
    },
}
_OURS = re.compile(r"\.visible \.entry (paged_attention|sampling|expert_product)")
_ARCHITECTURE = {"H200": "sm_90a", "A100": "sm_80"}


class Kernel(NamedTuple):
    """What ptxas says of a kernel, and how often an instruction stands in it."""

    name: str
    registers: int
    spilled_bytes: int
    instructions: Counter[str]
    ptx: str


class Program(NamedTuple):
    """A compiled program: its hand-written kernels, its launches, and the bytes it takes beside its arguments."""

    kernels: dict[str, Kernel]
    launches: Counter[str]  # by kind of thunk: kCommandBuffer, kCustomKernel, kKernel, ...
    temporary_bytes: int
    aliased_bytes: int


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "needs the wheel jax-cuda13-plugin; run make test-aot"
    return None if _ptxas() else "needs the wheel nvidia-cuda-nvcc; run make test-aot"


def compile_for(
    gpu: str, function: Callable[..., Any], *args: Any, dump: Path, donate: tuple[int, ...] = ()
) -> Program:
    """`function` compiled for `gpu` with arguments of these shapes; `dump` is an empty folder."""
    one = mesh(gpu, x=1)
    everywhere = NamedSharding(one, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), args)
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        lowered = jax.jit(function, donate_argnums=donate).lower(*shapes)
    options = {"xla_dump_to": str(dump), "xla_dump_emitter_re": "ptx"}
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)  # Mosaic compiles for itself, and looks here each time
    compiled = lowered.compile(compiler_options=options)
    memory = compiled.memory_analysis()
    ours = [path for path in sorted(dump.glob("*.ptx")) if _OURS.search(path.read_text())]
    kernels = {k.name: k for k in (_inspect(path, gpu) for path in ours)}
    return Program(kernels, _launches(dump), memory.temp_size_in_bytes, memory.alias_size_in_bytes)


@functools.cache
def mesh(gpu: str, **axes: int) -> Mesh:
    """A mesh of these axes, of GPUs in one host."""
    target, topology = _TARGET.format(**_GPUS[gpu]), f"1x1x{math.prod(axes.values())}"
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology)
    return topologies.make_mesh(found, tuple(axes.values()), tuple(axes))


@functools.cache
def _ptxas() -> Path | None:
    return next((p for folder in sys.path for p in Path(folder).glob("nvidia/*/bin/ptxas")), None)


def _inspect(path: Path, gpu: str) -> Kernel:
    text = path.read_text()
    command = [str(_ptxas()), "-v", f"-arch={_ARCHITECTURE[gpu]}", str(path), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (name,) = re.findall(r"\.visible \.entry (\w+)", text)
    (registers,) = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    words = ("cp.async.cg", "cp.async.ca", "cp.async.bulk.tensor", "mma.sync", "wgmma.mma_async")
    spilled_bytes = sum(int(n) for pair in spills for n in pair)
    name = name.removesuffix("_mosaic_gpu_kernel")
    return Kernel(name, int(registers), spilled_bytes, Counter({word: text.count(word) for word in words}), text)


def _launches(dump: Path) -> Counter[str]:
    """Launches by kind. The list made after command buffers were formed exists only where one was."""
    (path,) = sorted(dump.glob("*thunk_sequence_after*")) or sorted(dump.glob("*thunk_sequence*"))
    return Counter(re.findall(r": (k\w+)", path.read_text()))
