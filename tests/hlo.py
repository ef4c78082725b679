"""What a compiled program moves between devices, read from its HLO: which collectives, of what arrays, among whom."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({_KINDS})(-start)?\(", re.MULTILINE)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


class Moved(NamedTuple):
    """One array that one collective gives."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


def moved(text: str) -> Counter[Moved]:
    """Every array that a collective gives, and how often; XLA may have joined several collectives into one."""
    found: Counter[Moved] = Counter()
    for result, kind, start in _COLLECTIVE.findall(text):
        arrays = [Moved(kind, dtype, _shape(dims)) for dtype, dims in _ARRAY.findall(result)]
        if start and (kind != "all-reduce" or result.startswith("((")):  # gives what it was given, too, and flags
            given = [a for a in arrays if a.dtype != "u32"]
            arrays = given[len(given) // 2 :]
        found.update(arrays)
    return found


def groups(text: str) -> list[list[int]]:
    """Devices that some collective lets talk with each other; a permutation's pairs count as groups."""
    found = []
    for shape, order, axes in _IOTA.findall(text):
        ids = np.arange(math.prod(_shape(order))).reshape(_shape(order))
        ids = ids.transpose(_shape(axes)) if axes else ids
        found += ids.reshape(_shape(shape)).tolist()
    for listed in _LISTED.findall(text):
        found += [list(_shape(group)) for group in re.findall(r"\{([\d,]+)\}", listed)]
    return found


def _shape(dims: str) -> tuple[int, ...]:
    return tuple(int(n) for n in dims.split(",") if n)


def products(text: str) -> Counter[int]:
    """How many numbers each matrix product gives, and how many products give as many."""
    found = re.findall(r" = [a-z]\w*\[([\d,]*)\]\S* dot\(", text)
    return Counter(math.prod(_shape(dims)) for dims in found)
