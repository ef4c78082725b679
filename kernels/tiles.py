"""Backend and tile sizes of the attention kernels by device, shape and dtype. Owns the rule; measured choices are data.

`tuned/<device>.json` holds what was measured on a device: {"decode": [row, ...], "ragged": [row, ...]}, each row a set
of conditions (`group`, `head_dim`, `pool`: all those given must hold), the backend that is fastest where they do
("triton" if it names none) and that backend's sizes. The first row that fits wins: `auto` takes its backend, and a
backend that is asked for by name takes the first row of its own. A size that a row leaves out is the rule's.

The rule, for devices and shapes without a row, is triton, with what compiles for H200 and A100 without a spill:
- decode reads 64 keys at a time with 4 warps, 32 where a head is wider than 128 or a number wider than two bytes;
- a prompt's tile has 128 rows (tokens x query heads of a group) and 8 warps, on Hopper with 64 keys at a time (wgmma),
  elsewhere with 32; fewer where heads are wide, where pools are 8-bit, and in float32, which has no tensor cores;
- five stages: the page ids of a block are loaded before its keys and take a stage of their own, so that three or four
  keep one block of keys in shared memory and five keep two (decode, D = 128: 39 KB and 72 KB); three where 8-bit
  pools meet an A100, whose registers five would exceed;
- latents, whose accumulator is 512 wide, have tiles of 32 rows (float32: 16) and 8 warps, with 64 keys at a time on
  Hopper and 32 elsewhere (float32: 16, and three stages): 64 rows spill;
- decode splits keys until there are two programs for every multiprocessor, and not at all where sequences suffice.
Mosaic's tiles have up to 128 rows and 128 keys, 64 and 64 of wide heads, and as many stages as fit in shared memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

TUNED = Path(__file__).parent / "tuned"
SHARED = 227 << 10  # bytes of shared memory that a program may take on Hopper
Op = Literal["decode", "ragged"]
KernelBackend = Literal["triton", "mosaic"]
_SIZES = ("block_q", "block_k", "num_warps", "num_stages")
_CONDITIONS = ("group", "head_dim", "pool")
_BACKENDS = ("triton", "mosaic")


class Tiles(NamedTuple):
    """How a program is cut: `block_q` tokens, `block_k` keys at a time, by so many warps, loads so many turns ahead."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Device(NamedTuple):
    """What the code is compiled for. A GPU's numbers are an A100's where nothing better is known."""

    platform: str  # "cpu", "gpu", "tpu"
    name: str  # the maker's
    capability: float = 8.0  # CUDA's compute capability
    multiprocessors: int = 108


_KNOWN = {"H200": (9.0, 132), "H100": (9.0, 132), "A100": (8.0, 108)}


def current_device() -> Device:
    """The device of the mesh in whose context the code is traced, else the default device."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return _known(described.platform, described.device_kind)
    config: Any = jax.config  # its types leave this out
    device = config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return _known(device.platform, device.device_kind)
    return Device("gpu", device.device_kind, float(device.compute_capability), int(device.core_count))


def _known(platform: str, name: str) -> Device:
    return Device(platform, name, *next((numbers for word, numbers in _KNOWN.items() if word in name), ()))


def backend_for(op: Op, device: Device, *, group: int, head_dim: int, pool: Any) -> KernelBackend | None:
    """The backend that was the fastest on this device, if anybody has measured it. `group` is H / K."""
    rows = _rows(op, device, group, head_dim, pool)
    return next((row.get("backend", "triton") for row in rows), None)


def tiles_for(
    op: Op,
    device: Device,
    *,
    group: int,
    head_dim: int,
    pool: Any,
    backend: KernelBackend = "triton",
    **given: int | None,
) -> Tiles:
    """The sizes that were given, else measured on this device, else the rule's."""
    if backend == "mosaic":
        sizes = _mosaic_rule(op, group, head_dim)._asdict()
    else:
        sizes = rule(op, device, group, head_dim, jnp.dtype(pool).itemsize)._asdict()
    rows = _rows(op, device, group, head_dim, pool)
    row = next((row for row in rows if row.get("backend", "triton") == backend), {})
    sizes |= {k: row[k] for k in _SIZES if k in row}
    return Tiles(**sizes | {k: v for k, v in given.items() if v is not None})


def splits_for(device: Device, *, num_seqs: int, kv_heads: int, max_keys: int, block_k: int) -> int:
    """How many items of work a decoding sequence is cut into on average; 1 where they fill the device as they are."""
    if num_seqs * kv_heads >= 2 * device.multiprocessors:
        return 1
    wanted = -(-2 * device.multiprocessors // (num_seqs * kv_heads))
    return max(1, min(wanted, max_keys // (2 * block_k)))


def heads_together(heads: int, kv_heads: int, v_dim: int | None, pool: Any) -> int:
    """Query heads that a program takes: all that share a kv head; with `v_dim`, as many as have rows in a tile."""
    if v_dim is None:
        return heads // kv_heads
    return max(n for n in range(1, _latent_rows(jnp.dtype(pool).itemsize) + 1) if heads // kv_heads % n == 0)


def _latent_rows(itemsize: int) -> int:
    return 16 if itemsize == 4 else 32


def rule(op: Op, device: Device, group: int, head_dim: int, itemsize: int) -> Tiles:
    """The sizes that are taken where nothing was measured."""
    wide = head_dim > 128
    if head_dim > 256:
        rows, block_k = _latent_rows(itemsize), 16 if itemsize == 4 else 64 if device.capability == 9.0 else 32
        block_q = 1 if op == "decode" else max(1, rows // group)
        return Tiles(block_q, block_k, num_warps=8, num_stages=3 if itemsize == 4 else 5)
    if op == "decode":
        block_k = 64 // (2 if wide else 1) // (2 if itemsize == 4 else 1)
        return Tiles(1, block_k, num_warps=4, num_stages=3 if itemsize == 1 and device.capability < 9.0 else 5)
    if itemsize == 4:
        rows, block_k = (16 if wide else 32), 16
    elif device.capability == 9.0:
        rows, block_k = (64 if wide and itemsize == 1 else 128), (32 if wide else 64)
    else:
        rows, block_k = (64 if wide or itemsize == 1 else 128), 32
    return Tiles(max(1, rows // group), block_k, num_warps=8, num_stages=5)


def _mosaic_rule(op: Op, group: int, head_dim: int) -> Tiles:
    rows, block_k = (128, 128) if head_dim <= 128 else (64, 64)
    sizes = Tiles(1 if op == "decode" else max(1, rows // group), block_k, num_warps=4, num_stages=1)
    fitting = (n for n in (4, 3, 2) if mosaic_shared_bytes(op, group, head_dim, sizes._replace(num_stages=n)) <= SHARED)
    return sizes._replace(num_stages=next(fitting, 1))


def mosaic_shared_bytes(op: Op, group: int, head_dim: int, sizes: Tiles) -> int:
    """The shared memory that a Mosaic kernel takes, barriers and gaps counted generously."""
    rows, pitch = -(-sizes.block_q * group // 64) * 64, -(-head_dim // 64) * 64
    tiles = rows * head_dim + rows * pitch + sizes.num_stages * 2 * sizes.block_k * head_dim
    return 2 * tiles + (4 * rows * pitch if op == "decode" else 0) + 4096


def _rows(op: Op, device: Device, group: int, head_dim: int, pool: Any) -> Iterator[dict[str, Any]]:
    """The rows that were measured on this device and fit, in order."""
    facts = {"group": group, "head_dim": head_dim, "pool": jnp.dtype(pool).name}
    for row in _tuned(TUNED / f"{file_name(device.name)}.json").get(op, ()):
        if all(row[c] == facts[c] for c in _CONDITIONS if c in row):
            yield row


@cache
def _tuned(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.exists():
        return {}
    table: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    for row in (row for rows in table.values() for row in rows):
        known = (*_CONDITIONS, "backend", *_SIZES)
        if unknown := row.keys() - {*known}:
            raise ValueError(f"{path.name}: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        if (backend := row.get("backend", "triton")) not in _BACKENDS:
            raise ValueError(f"{path.name}: unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    return table


def file_name(device: str) -> str:
    """What a device's file under `tuned/` is called, without its suffix."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
