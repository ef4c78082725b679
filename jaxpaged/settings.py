"""How frozen settings check themselves: known names, whole numbers, ranges. The values belong to their own files."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, ClassVar, Self, get_args

from jaxpaged.errors import JaxpagedError


class Settings:
    """Base of a frozen dataclass whose constructor answers an unknown field with the nearest known one.

    `error` is the type raised by every check of the class.
    """

    error: ClassVar[type[JaxpagedError]]

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Refuse names that are not fields; everything else is the dataclass's own."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # only dataclasses derive from this
        for name in given:
            if name not in known:
                raise cls.error(f"{cls.__name__} has no field {name!r}{nearest(name, known)}")
        return super().__new__(cls)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_int(self, name: str, low: int | None = None, high: int | None = None) -> None:
        """Store the field as an int, or raise where it is none or lies outside [low, high]."""
        value = getattr(self, name)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise self.error(f"{name} is {value!r}; it must be a whole number{_range(low, high)}")
        whole = operator.index(value)
        if (low is not None and whole < low) or (high is not None and whole > high):
            raise self.error(f"{name} is {whole:,}; it must be a whole number{_range(low, high)}")
        self._set(name, whole)

    def _check_float(self, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
        """Store the field as a finite float in [low, high], or in (low, high] where `above`; else raise."""
        given = getattr(self, name)
        wanted = f"it must be a finite number{_range(low, high, above=above)}"
        if isinstance(given, (bool, str)):
            raise self.error(f"{name} is {given!r}; {wanted}")
        try:
            value = float(given)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{name} is {given!r}; {wanted}") from None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            raise self.error(f"{name} is {value:g}; {wanted}")
        self._set(name, value)

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise self.error(f"{name} is {getattr(self, name)!r}; it must be True or False")

    def _check_choice(self, name: str, choices: Any) -> None:
        """`choices` is a Literal."""
        if getattr(self, name) not in get_args(choices):
            raise self.error(f"{name} is {getattr(self, name)!r}; known: {', '.join(get_args(choices))}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of `known`, or all of them where none is close."""
    options = list(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(options)}"


def _range(low: float | None, high: float | None, *, above: bool = False) -> str:
    bounded = [end is not None and math.isfinite(end) for end in (low, high)]
    match bounded:
        case [True, True] if not above:
            return f" from {low:,} to {high:,}"
        case [True, True]:
            return f" above {low:,} and at most {high:,}"
        case [True, False]:
            return f" above {low:,}" if above else f" of at least {low:,}"
    return ""
