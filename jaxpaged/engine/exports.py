"""Compiled steps that start without the model's code: written with `jax.export` on any machine, run on the one meant.

A folder holds, beside a native checkpoint, `export.json` (what was exported, by which versions, under which config) and
`steps/<platform>/<function and bucket>.bin`, StableHLO each. Weights stay outside: they are arguments of the functions.
What is read back is compiled by XLA, through the compilation cache; nothing of the model is traced or lowered.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tqdm import tqdm

from jaxpaged.config import PARALLEL_SIZES, EngineConfig
from jaxpaged.engine.compilation import Build, Jitted, Lowered
from jaxpaged.engine.runner import Runner
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.kernels.tiles import current_device
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import sampling, step
from jaxpaged.model.params import map_specs, quantized_as
from jaxpaged.model.quantized import Quantized
from jaxpaged.model.spec import Decoder

MANIFEST = "export.json"
FORMAT = 1
DEVICES = {"cpu": ("cpu", "cpu"), "cuda": ("gpu", "NVIDIA H100 80GB HBM3"), "tpu": ("tpu", "TPU v5")}
"""Platform of jax.export -> the same in JAX's devices, and the device that is meant where none is named."""

# What no compiled function depends on; all else of a config is compiled in.
_FREE = {
    "memory_utilization",
    "enable_prefix_caching",
    "host_cache_gb",
    "scheduling_policy",
    "long_prefill_token_threshold",
    "max_num_partial_prefills",
    "max_num_queued_requests",
    "seed",
    "warmup",
    "compilation_cache_dir",
}
# The Pallas kernels. JAX promises nothing of their form from one version to the next, so `read` asks for the same one.
_KERNELS = ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")
_LAYOUT = "LayoutConstraint"  # says how axes are ordered; older than any jax that we take


class Export(NamedTuple):
    """What a folder says of its steps for the device at hand."""

    folder: Path
    config: EngineConfig
    platform: str

    def build(self, name: str, jitted: Jitted, shapes: tuple[Any, ...]) -> Lowered:
        """The runner's `Build`: of `jitted` only the options are looked at."""
        _, options = jitted
        _register()
        file = self.folder / "steps" / self.platform / f"{name}.bin"
        try:
            exported = jax.export.deserialize(bytearray(file.read_bytes()))
            lowered: Lowered = jax.jit(exported.call, **options).lower(*shapes)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}; export the model again") from error
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file} does not fit this engine ({reason}); export the model again") from error
        return lowered


def write(
    folder: Path,
    spec: Decoder,
    dtype: Any,
    config: EngineConfig,
    platforms: Sequence[str],
    *,
    gpu: str | None = None,
    show_progress: bool = False,
) -> int:
    """Export every function and bucket for every platform into `folder`; how many functions that were.

    `gpu` names the NVIDIA GPU meant ("NVIDIA H200"). Needs neither the weights nor the devices. Raises ConfigError
    where the config leaves open what must be compiled in, or does not fit a platform.
    """
    if config.num_pages is None:
        raise ConfigError("num_pages is not set, and the pool's size is compiled in; set it for the device meant")
    for name in PARALLEL_SIZES:
        if (size := getattr(config, name)) != 1:
            raise ConfigError(f"{name} is {size:,}; exports are for one device, set 1")
    if config.enable_lora:
        raise ConfigError("enable_lora is True, and steps with adapters are not exported yet; leave it out")
    if config.speculation is not None and config.speculation.method != "ngram":
        raise ConfigError("speculative_config.method is a function, which cannot be written down; export with ngram")
    _register()
    spec = quantized_as(spec, config.quantization)
    params = map_specs(lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or dtype), spec)
    count = 0
    devices: dict[str, Any] = {}
    for platform in platforms:
        steps = folder / "steps" / platform
        steps.mkdir(parents=True)
        with as_if_on(platform, gpu):
            devices[platform] = current_device()._asdict()
            runner = Runner(
                spec, params, dataclasses.replace(config, host_cache_gb=0.0), build=_writer(steps, platform)
            )
            for job in tqdm(
                runner.functions.jobs(), desc=f"exporting for {platform}", disable=not show_progress, leave=False
            ):
                job()
        count += len(list(steps.iterdir()))
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.speculation is not None:
        settings["speculative_config"] = dataclasses.asdict(config.speculation)
    manifest = {
        "format": FORMAT,
        "jax": jax.__version__,
        "jaxpaged": version("jaxpaged"),
        "devices": devices,
        "config": {name: value for name, value in settings.items() if name != "compilation_cache_dir"},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return count


def read(folder: str | Path, **settings: Any) -> Export:
    """The export in `folder` for the device at hand, under its config; `settings` change what is not compiled in.

    Raises CheckpointError where the folder, its versions or its devices do not fit, ConfigError where a setting does
    not.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, devices, given = manifest["format"], manifest["devices"], manifest["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no export ({error}); make one with `jaxpaged export`") from error
    again = "export the model again"
    if found != FORMAT:
        raise CheckpointError(f"{folder} has format {found}, this jaxpaged reads {FORMAT}; {again}")
    if manifest["jaxpaged"] != version("jaxpaged"):
        raise CheckpointError(
            f"{folder} was written by jaxpaged {manifest['jaxpaged']}, this is {version('jaxpaged')}; {again}"
        )
    device = current_device()
    platform = "cuda" if device.platform == "gpu" else device.platform
    if platform not in devices:
        raise CheckpointError(f"{folder} was exported for {', '.join(devices)}, this is a {platform}; {again} for it")
    theirs, ours = manifest["jax"], jax.__version__
    if _number(ours) < _number(theirs) or (platform == "cuda" and ours != theirs):
        needs = "the same one" if platform == "cuda" else "that or a newer one"
        raise CheckpointError(f"{folder} was exported by jax {theirs}, this is {ours}; install {needs}, or {again}")
    if platform == "cuda" and devices[platform]["capability"] != device.capability:
        raise CheckpointError(
            f"{folder} was exported for a {devices[platform]['name']} (compute capability "
            f"{devices[platform]['capability']}), this is a {device.name} ({device.capability}); {again} for it"
        )
    exported, asked = EngineConfig(**given), EngineConfig(**(given | settings))  # which tells of unknown names
    for name in settings.keys() - _FREE:
        if getattr(asked, name) != getattr(exported, name):
            raise ConfigError(
                f"{name} is {getattr(asked, name)!r} but {folder} was compiled for {given[name]!r}; leave it out, or "
                f"{again}"
            )
    return Export(folder, asked, platform)


def _writer(steps: Path, platform: str) -> Build:
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (*_KERNELS, _LAYOUT)]

    def build(name: str, jitted: Jitted, shapes: tuple[Any, ...]) -> Lowered:
        function, options = jitted
        export = jax.export.export(jax.jit(function, **options), platforms=[platform], disabled_checks=checks)
        (steps / f"{name}.bin").write_bytes(export(*shapes).serialize())
        return _Written()

    return build


class _Written:
    """Stands for a function that was written down, and is not to run here."""

    def compile(self) -> Callable[..., Any]:
        return self.compile


def as_if_on(platform: str, gpu: str | None) -> AbstractContextManager[Any]:
    """Tracing in this context takes the kernels and sizes that such a device would."""
    if platform not in DEVICES:
        raise ConfigError(f"cannot export for {platform!r}; known: {', '.join(DEVICES)}")
    kind, name = DEVICES[platform]
    name = gpu if gpu is not None and platform == "cuda" else name
    described = AbstractDevice(device_kind=name, num_cores=None, platform=kind)
    context: AbstractContextManager[Any] = use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=described))
    return context


@cache
def _register() -> None:
    """Tell jax.export, once, how to write down the trees that the functions take and give."""
    named = (
        Quantized,
        kv_cache.Pool,
        step.StepInputs,
        step.ForwardOutputs,
        *(sampling.SamplingInputs, sampling.Sampled, sampling.Logprobs, sampling.Edits),
    )
    for kind in named:
        jax.export.register_namedtuple_serialization(kind, serialized_name=f"jaxpaged.{kind.__name__}")
    jax.export.register_pytree_node_serialization(
        kv_cache.KVCache,
        serialized_name="jaxpaged.KVCache",
        serialize_auxdata=lambda aux: b"",
        deserialize_auxdata=lambda aux: (),
    )


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
