"""`jaxpaged plan`: whether a model fits so many devices, what is left for keys and values, and what a step would take.

No device is asked and no weight is read. Without parallel sizes, all that make up the devices are compared.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpaged.cli.options import add_fields
from jaxpaged.config import PARALLEL_SIZES, EngineConfig
from jaxpaged.errors import ConfigError

if TYPE_CHECKING:
    from jaxpaged.engine.forecast import DecodeStep, Forecast, Forecaster, Speeds

ENGINE_FIELDS = (
    *("tensor_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size", "memory_utilization"),
    *("page_size", "num_pages", "max_model_len", "max_num_seqs", "quantization", "cache_dtype"),
    *("enable_lora", "max_loras", "max_lora_rank"),
)
_UNITS = {"": 1} | {f"{p}{b}": n**i for b, n in (("B", 1000), ("iB", 1024)) for i, p in enumerate("KMGT", 1)}
_SPEEDS = {"flops": 1e12, "hbm_bandwidth": 1e9, "link_bandwidth": 1e9}
_COLUMNS = (
    *("tensor", "data", "weights/device", "pool/device", "tokens", "full sequences"),
    *("decodes", "sent/device", "takes", "tokens/s"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model", help="as for serve, or a folder with nothing but a config.json, or a known shape such as llama-3-8b"
    )
    parser.add_argument("--devices", type=int, required=True, metavar="INT", help="how many there are")
    parser.add_argument(
        "--memory",
        default="80GiB",
        help="of each, as far as JAX may use it: of a GPU's three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says "
        "more (default: %(default)s)",
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose kernels are meant (default: NVIDIA H100)")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: auto, as in the checkpoint)",
    )
    group.add_argument("--data-parallel-size", type=int, metavar="INT", help="copies of the model (default: the rest)")
    add_fields(group, EngineConfig, [f for f in fields(EngineConfig) if f.name in ENGINE_FIELDS])
    group = parser.add_argument_group("the decode step that is predicted")
    group.add_argument(
        "--context-len",
        type=int,
        default=1024,
        metavar="INT",
        help="tokens of each sequence; fewer where the pool has no room (default: %(default)s)",
    )
    group.add_argument("--flops", type=float, default=989, metavar="TFLOP/S", help="(default: %(default)s, an H100's)")
    group.add_argument("--hbm-bandwidth", type=float, default=3350, metavar="GB/S", help="(default: %(default)s)")
    group.add_argument(
        "--link-bandwidth", type=float, default=450, metavar="GB/S", help="each way (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was asked; 1 where no way fits. Raises JaxpagedError."""
    from jaxpaged.engine.forecast import Forecaster, Speeds  # only here: `--help` needs no jax

    for name in ("devices", *PARALLEL_SIZES, "context_len"):
        if (number := getattr(args, name, None)) is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {number:,}; it must be at least 1")
    memory, speeds = _memory(args.memory), Speeds(*(_above_zero(args, *item) for item in _SPEEDS.items()))
    splits = _splits(args.devices, {name: getattr(args, name, None) for name in PARALLEL_SIZES})
    spec, dtype = _model(args.model, args.dtype)
    given = {name: getattr(args, name) for name in ENGINE_FIELDS if hasattr(args, name)}
    config = EngineConfig(**given)  # what is wrong whatever the split is said once
    problems, fitting = [], []
    for tensor, data in splits:
        try:
            forecaster = Forecaster(spec, dtype, replace(config, tensor_parallel_size=tensor))
            found = forecaster.fit(memory, args.gpu)
        except ConfigError as error:
            problems.append(f"tensor parallel {tensor} x data parallel {data} does not fit: {error}")
        else:
            fitting.append((tensor, data, found, _step(forecaster, found, args.context_len)))

    split, stages = config.prefill_context_parallel_size, config.pipeline_parallel_size
    more = (f", in {stages:,} stages" if stages > 1 else "") + (f", prompts split over {split:,}" if split > 1 else "")
    held = spec.quantization.dtype if spec.quantization else config.quantization
    of = f"{held} and {dtype}" if held else dtype
    print(f"{args.model}, weights of {of}, on {args.devices:,} devices of {_size(memory)}{more}")
    if len(splits) == 1 and fitting:
        print(_details(*fitting[0], speeds))
    elif fitting:
        print(_table([_row(*way, speeds) for way in fitting]))
    print(*problems, sep="\n", end="\n" if problems else "")
    if fitting:
        print(
            f"Times are the least that {speeds.flops / 1e12:,g} TFLOP/s, {speeds.hbm / 1e9:,g} GB/s of memory and "
            f"{speeds.link / 1e9:,g} GB/s of links each way\nallow: given, not measured, and without launches, "
            "latencies and the host."
        )
    return 0 if fitting else 1


def _details(tensor: int, data: int, found: Forecast, step: DecodeStep, speeds: Speeds) -> str:
    computing, reading, links = (f"{seconds * 1e3:9.3f} ms" for seconds in step.seconds(speeds))
    total, read = step.total(speeds), step.weight_bytes + step.kv_bytes
    adapters = f"\n  adapters  {_size(found.adapter_bytes):>12}" if found.adapter_bytes else ""
    return f"""\
fits with tensor parallel {tensor} x data parallel {data}
each device holds
  weights   {_size(found.weight_bytes):>12}{adapters}
  pool      {_size(found.pool_bytes):>12}   {found.num_pages:,} pages, {found.page_bytes:,} bytes each
  left      {_size(found.free_bytes):>12}
each copy of the model has room for
  {found.num_tokens:,} tokens, or {found.num_full_seqs:,} sequences of {found.max_model_len:,}
each device, where a copy decodes {step.num_seqs:,} sequences of {step.context_len:,} tokens
  computes  {step.flops / 1e12:6.3f} TFLOP {computing}
  reads     {_size(read):>12} {reading}   {_size(step.weight_bytes)} weights, {_size(step.kv_bytes)} keys and values
  sends     {_size(step.link_bytes):>12} {links}   {step.num_sums:,} all-reduces of {_size(step.sum_bytes)}
  takes     {"":12} {total * 1e3:9.3f} ms   {data * step.num_seqs / total:,.0f} tokens/s in all"""


def _row(tensor: int, data: int, found: Forecast, step: DecodeStep, speeds: Speeds) -> tuple[str, ...]:
    total = step.total(speeds)
    return (
        f"{tensor}",
        f"{data}",
        _size(found.weight_bytes),
        _size(found.pool_bytes),
        f"{data * found.num_tokens:,}",
        f"{data * found.num_full_seqs:,} x {found.max_model_len:,}",
        f"{data * step.num_seqs:,} x {step.context_len:,}",
        _size(step.link_bytes),
        f"{total * 1e3:.3f} ms",
        f"{data * step.num_seqs / total:,.0f}",
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (_COLUMNS, *rows)]
    return "\n".join("  ".join(line) for line in lines)


def _step(forecaster: Forecaster, found: Forecast, context_len: int) -> DecodeStep:
    """All sequences that a step may hold, each as long as asked where the pool has room for that."""
    num_seqs = min(forecaster.config.max_num_seqs, found.num_pages - 1)
    return forecaster.decode_step(num_seqs, min(context_len, found.max_model_len, found.num_tokens // num_seqs))


def _splits(devices: int, given: Mapping[str, int | None]) -> list[tuple[int, int]]:
    """(tensor, data) parallel sizes whose product, with the prompts' split and the stages, is the number of devices."""
    tensor, data, context, stages = (given[name] for name in PARALLEL_SIZES)
    rest, left_over = divmod(devices, (context or 1) * (stages or 1))
    found = [(t, rest // t) for t in range(1, rest + 1) if rest % t == left_over == 0]
    found = [(t, d) for t, d in found if tensor in (None, t) and data in (None, d)]
    if not found:
        sizes = [f"--{name.replace('_', '-')} {size:,}" for name, size in given.items() if size is not None]
        raise ConfigError(
            f"--devices is {devices:,}, which {' x '.join(sizes)} does not make; choose sizes whose product it is"
        )
    return found


def _model(name: str, dtype: str) -> tuple[Any, str]:
    """The spec of a checkpoint or of a known shape, and the dtype of its weights on a GPU."""
    from jaxpaged.bench.shapes import SHAPES
    from jaxpaged.convert.families import FAMILIES
    from jaxpaged.convert.load import DTYPES, describe

    if name in SHAPES and not Path(name).exists():
        spec, stored = FAMILIES[SHAPES[name]["model_type"]].spec(SHAPES[name]), None
    else:
        spec, stored = describe(name)
    if dtype != "auto":
        return spec, dtype
    return spec, next((known for known, its in DTYPES.items() if its == stored), "bfloat16")


def _memory(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", text)
    number = float(found[1]) * _UNITS[found[2] or ""] if found else 0
    if not 1 <= number < 2**60:
        raise ConfigError(f"--memory is {text!r}; write it as 80GiB, 80GB or a number of bytes")
    return int(number)


def _above_zero(args: argparse.Namespace, name: str, unit: float) -> float:
    value: float = getattr(args, name)
    if not 0 < value < float("inf"):
        raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be a finite number above 0")
    return value * unit


def _size(count: int) -> str:
    """Bytes in the largest unit of which there is one: 1.50 GiB."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):,.2f} {unit}"
    return f"{count} B"
