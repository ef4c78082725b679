"""Tile sizes of the attention kernels by device, shape and dtype. Owns the rule; measured choices override it as data.

`tuned/<device>.json` holds what was measured on a device: {"decode": [row, ...], "ragged": [row, ...]}, each row a set
of conditions (`group`, `head_dim`, `pool`: all those given must hold) and the tile sizes to use where they do.
The first row that fits wins; a size it leaves out is the rule's.

The rule, for devices and shapes without a row, is what compiles without spilling a register for H200 and A100:
- decode reads 64 keys at a time with 4 warps, 32 where a head is wider than 128 or a number wider than two bytes;
- a prompt's tile has 128 rows (tokens x query heads of a group) and 8 warps, on Hopper with 64 keys at a time (wgmma),
  elsewhere with 32; fewer where heads are wide, where pools are 8-bit, and in float32, which has no tensor cores;
- five stages: the page ids of a block are loaded before its keys and take a stage of their own, so that three or four
  keep one block of keys in shared memory and five keep two (decode, D = 128: 39 KB and 72 KB); three where 8-bit
  pools meet an A100, whose registers five would exceed;
- decode splits keys until there are two programs for every multiprocessor, and not at all where sequences suffice.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

TUNED = Path(__file__).parent / "tuned"
_SIZES = ("block_q", "block_k", "num_warps", "num_stages")
_CONDITIONS = ("group", "head_dim", "pool")


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


def tiles_for(
    op: Literal["decode", "ragged"], device: Device, *, group: int, head_dim: int, pool: Any, **given: int | None
) -> Tiles:
    """The sizes that were given, else measured on this device, else the rule's. `group` is H / K."""
    pool = jnp.dtype(pool)
    sizes = rule(op, device, group, head_dim, pool.itemsize)._asdict()
    facts = {"group": group, "head_dim": head_dim, "pool": pool.name}
    for row in _tuned(TUNED / f"{file_name(device.name)}.json").get(op, ()):
        if all(row[c] == facts[c] for c in _CONDITIONS if c in row):
            sizes |= {k: row[k] for k in _SIZES if k in row}
            break
    return Tiles(**sizes | {k: v for k, v in given.items() if v is not None})


def splits_for(device: Device, *, num_seqs: int, kv_heads: int, max_keys: int, block_k: int) -> int:
    """How many items of work a decoding sequence is cut into on average; 1 where they fill the device as they are."""
    if num_seqs * kv_heads >= 2 * device.multiprocessors:
        return 1
    wanted = -(-2 * device.multiprocessors // (num_seqs * kv_heads))
    return max(1, min(wanted, max_keys // (2 * block_k)))


def rule(op: Literal["decode", "ragged"], device: Device, group: int, head_dim: int, itemsize: int) -> Tiles:
    """The sizes that are taken where nothing was measured."""
    wide = head_dim > 128
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


@cache
def _tuned(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.exists():
        return {}
    table: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    for row in (row for rows in table.values() for row in rows):
        if unknown := row.keys() - {*_SIZES, *_CONDITIONS}:
            raise ValueError(
                f"{path.name}: unknown {', '.join(sorted(unknown))}; known: {', '.join(_CONDITIONS + _SIZES)}"
            )
    return table


def file_name(device: str) -> str:
    """What a device's file under `tuned/` is called, without its suffix."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
