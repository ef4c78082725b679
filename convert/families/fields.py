"""Typed, checked access to a Hugging Face config.json: what is missing or odd raises one line with field and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpaged.errors import CheckpointError
from jaxpaged.model.spec import Activation

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
"""Above any real model; a lying config must not make us build a billion blocks before tensors are counted."""
MAX_EXPERTS = 1024
"""Above any real mixture, for the same reason."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


class Fields:
    """A config over its family's defaults, which config.json may leave out."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], within: str = "") -> None:
        self._values = {**defaults, **config}
        self._within = within

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as JSON gave it, None where there is none."""
        return self._values.get(name)

    def size(self, name: str, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number that must be there."""
        value = self._required(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(name, f"must be a whole number from {least} to {most}")
        return value

    def maybe_size(self, name: str) -> int | None:
        """A positive whole number or None."""
        return self.size(name) if name in self else None

    def quotient(self, name: str, by: str) -> int:
        """The size `name` divided by the size `by`, which must divide it."""
        size, parts = self.size(name), self.size(by)
        if size % parts:
            raise self.error(name, f"is not a multiple of {by} = {parts}")
        return size // parts

    def number(self, name: str) -> float:
        """A finite number that must be there."""
        value = self._required(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(name, "must be a finite number")
        return float(value)

    def positive(self, name: str) -> float:
        """A number above zero that must be there."""
        value = self.number(name)
        if value <= 0:
            raise self.error(name, "must be above 0")
        return value

    def maybe_positive(self, name: str) -> float | None:
        """A number above zero or None."""
        return self.positive(name) if name in self else None

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return bool(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above zero."""
        values = self._listed(name, count)
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in values):
            raise self.error(name, "must hold numbers above 0")
        return tuple(float(v) for v in values)

    def layer_types(self, count: int) -> tuple[bool, ...]:
        """Which layers see a sliding window, from the list `layer_types` of `count` names."""
        values = self._listed("layer_types", count)
        if unknown := [v for v in values if v not in ("full_attention", "sliding_attention")]:
            raise self.error("layer_types", f"has {unknown[0]!r}; supported: full_attention, sliding_attention")
        return tuple(v == "sliding_attention" for v in values)

    def indices(self, name: str, count: int) -> frozenset[int]:
        """A list of numbers of layers, of `count`; null is an empty one."""
        values = self._values.get(name) or []
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < count for v in values):
            raise self.error(name, f"must be a list of whole numbers from 0 to {count - 1}")
        return frozenset(values)

    def switches(self, name: str, count: int) -> tuple[bool, ...]:
        """A list of `count` zeros and ones."""
        values = self._listed(name, count)
        if not all(v in (0, 1) for v in values):
            raise self.error(name, "must hold zeros and ones")
        return tuple(bool(v) for v in values)

    def activation(self, name: str) -> Activation:
        """One of the activations that we compute."""
        value = self._required(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.error(name, f"is an activation we do not know; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, *, unless: bool, why: str) -> None:
        """Raises where the flag `name` asks for what we do not compute."""
        if self.flag(name) != unless:
            raise self.error(name, why)

    def inner(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
        """The object `name` inside this one, null being an empty one."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value, defaults or {}, f"{self._within}{name}.")

    def over(self, values: Mapping[str, Any]) -> Fields:
        """These fields with `values` put over them."""
        return Fields(values, self._values, self._within)

    def error(self, name: str, problem: str) -> CheckpointError:
        """The error that says what is wrong with the field `name`, and its value."""
        shown = repr(self._values.get(name))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return CheckpointError(f"config.json: {self._within}{name} = {shown} {problem}")

    def _required(self, name: str) -> Any:
        if name not in self:
            raise CheckpointError(f"config.json lacks {self._within}{name}; add it as the model's authors give it")
        return self._values[name]

    def _listed(self, name: str, count: int) -> list[Any]:
        values = self._required(name)
        if not isinstance(values, list) or len(values) != count:
            found = f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
            raise self.error(name, f"must be a list of {count} entries, found {found}")
        return values
