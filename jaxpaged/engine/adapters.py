"""The adapters that an engine knows, and which of them lies in which slot of the device. Owns both, on the host.

An adapter gets a slot when a sequence that wants it is admitted: a free one, else that of the adapter whose last
sequence began or ended longest ago, of those that nobody who runs has. Where all that have a slot run, the sequence
waits, and those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.lora_request import LoRARequest
from jaxpaged.settings import nearest

Factors = tuple[np.ndarray, np.ndarray]
"""a [M, r] and b [r, F] of one linear."""

ReadAdapter = Callable[[str | Path], Mapping[str, tuple[Any, Any]]]
"""read(path) -> the factors of a folder's adapter by the path of their linear, its scale in b. CheckpointError."""

_VERSIONS = count(1)


@dataclass(slots=True, eq=False)
class Adapter:
    """One of them. `version` is another with each set of numbers, whoever has them: pages are shared within it only."""

    request: LoRARequest
    factors: Mapping[str, Factors]
    version: int
    slot: int | None = None

    @property
    def salt(self) -> bytes:
        """What pages that were computed with these numbers are told by."""
        return b"adapter " + self.version.to_bytes(8, "little")


class Wants(Protocol):
    """What there is to know of a sequence."""

    adapter: Adapter | None


class Adapters:
    """What `lora_request` may name. Without slots, nothing."""

    def __init__(
        self,
        num_slots: int,
        max_rank: int,
        shapes: Mapping[str, tuple[int, int]],
        dtype: Any,
        read: ReadAdapter | None = None,
    ) -> None:
        """`shapes` are those of the weights that can be adapted, `dtype` is that of the factors on the device."""
        self.num_slots, self.max_rank, self.dtype = num_slots, max_rank, np.dtype(dtype)
        self._shapes, self._read = shapes, read
        self._known: dict[str, Adapter] = {}
        self._seated: list[Adapter] = []  # who has a slot, the one used last at the end
        self._loads: list[Adapter] = []
        self._running: list[Collection[Wants]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def requests(self) -> list[LoRARequest]:
        """Those that are known, as `add` and `update` were told."""
        return [adapter.request for adapter in list(self._known.values())]  # any thread may ask

    def free_number(self) -> int:
        """A lora_int_id that none of them has."""
        return max((request.lora_int_id for request in self.requests()), default=0) + 1

    def find(self, wanted: LoRARequest | str | None) -> Adapter | None:
        """The adapter that a request wants; one that is not known is read now. None where it wants none.

        Raises RequestError where there is none of that name, CheckpointError or ConfigError where it cannot be read.
        """
        if wanted is None:
            return None
        if isinstance(wanted, LoRARequest):
            self.add(wanted)
            return self._known[wanted.lora_name]
        self._check_enabled()
        if not isinstance(wanted, str) or wanted not in self._known:
            raise RequestError(f"there is no adapter {wanted!r:.80}{nearest(str(wanted), self._known)}")
        return self._known[wanted]

    def add(self, wanted: LoRARequest) -> bool:
        """Read an adapter, unless it is known; whether it was read."""
        self._check_enabled()
        name, path = wanted.lora_name, wanted.lora_path
        if name in self._known:
            known = self._known[name].request
            if known != wanted:
                raise RequestError(
                    f"{wanted} does not fit the adapter of that name, {known}; remove_lora({name!r}) first, or choose "
                    "another name"
                )
            return False
        taken = next((r for r in self.requests() if r.lora_int_id == wanted.lora_int_id), None)
        if taken is not None:
            raise RequestError(f"lora_int_id {taken.lora_int_id} is {taken.lora_name!r} already; choose another")
        if path is None:
            raise RequestError(f"there is no adapter {name!r} and no lora_path to read it from; name its folder")
        if self._read is None:
            raise RequestError(
                f"the names in {path} are Hugging Face's, and the model came as arrays, without them; "
                "give the adapter as arrays, with update_lora"
            )
        self._known[name] = Adapter(wanted, self._checked(name, self._read(path), 1.0), next(_VERSIONS))
        return True

    def update(self, name: str, factors: Mapping[str, tuple[Any, Any]], scale: float) -> Adapter:
        """Make an adapter known by its arrays, or give the known one these."""
        self._check_enabled()
        checked = self._checked(name, factors, scale)
        if name not in self._known:
            self._known[name] = Adapter(LoRARequest(name, self.free_number()), checked, next(_VERSIONS))
            return self._known[name]
        adapter = self._known[name]
        adapter.factors, adapter.version = checked, next(_VERSIONS)
        if adapter.slot is not None:
            self._loads.append(adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; who asked for it already keeps it."""
        self.find(name)
        del self._known[name]

    def watch(self, running: Collection[Wants]) -> None:
        """The adapters of those who run, as a scheduler keeps them, are in use."""
        self._running.append(running)

    def seat(self, adapter: Adapter) -> bool:
        """Give an adapter a slot, unless it has one; False where all that have one are in use."""
        if adapter.slot is None:
            if len(self._seated) < self.num_slots:
                adapter.slot = len(self._seated)
            else:
                in_use = {sequence.adapter for running in self._running for sequence in running}
                idle = next((a for a in self._seated if a not in in_use), None)
                if idle is None:
                    return False
                adapter.slot, idle.slot = idle.slot, None
                self._seated.remove(idle)
            self._seated.append(adapter)
            self._loads.append(adapter)
        self.touch(adapter)
        return True

    def touch(self, adapter: Adapter) -> None:
        """It is the one used last, if it has a slot."""
        if adapter.slot is not None:
            self._seated.remove(adapter)
            self._seated.append(adapter)

    def loads(self) -> list[Adapter]:
        """Those whose numbers are to be put in their slots before the next step, until they are `loaded`."""
        return [adapter for adapter in dict.fromkeys(self._loads) if adapter.slot is not None]

    def loaded(self) -> None:
        """All of them have been."""
        self._loads.clear()

    def _check_enabled(self) -> None:
        if not self.num_slots:
            raise RequestError("a lora_request came but enable_lora is False; set enable_lora=True")

    def _checked(self, name: str, given: Mapping[str, tuple[Any, Any]], scale: float) -> dict[str, Factors]:
        """The factors on the host, as the device will hold them. Raises ConfigError where they do not fit the model."""
        found = {}
        for path, (a, b) in given.items():
            if path not in self._shapes:
                raise ConfigError(f"adapter {name!r}: {path} is no linear that takes one{nearest(path, self._shapes)}")
            rows, columns = self._shapes[path]
            rank = np.shape(a)[-1]
            if np.shape(a) != (rows, rank) or np.shape(b) != (rank, columns):
                raise ConfigError(
                    f"adapter {name!r}: {path} has factors {np.shape(a)} and {np.shape(b)}, needs ({rows}, r) and "
                    f"(r, {columns})"
                )
            if rank > self.max_rank:
                raise ConfigError(
                    f"adapter {name!r}: {path} has rank {rank} but max_lora_rank is {self.max_rank}; raise it"
                )
            scaled = np.asarray(b, np.float32) * np.float32(scale)
            found[path] = np.array(a, self.dtype), scaled.astype(self.dtype)
            if not all(np.isfinite(x.astype(np.float32)).all() for x in found[path]):
                raise ConfigError(f"adapter {name!r}: {path} holds numbers that are not finite in {self.dtype}")
        return found
