"""Which adapter a request wants, in vLLM's words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxpaged.errors import RequestError


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by its name and number, each its own, and where it is read from when it is first asked for.

    `lora_path` is a folder as PEFT saves it; None for one that the engine has been given by `update_lora`.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | Path | None = None

    def __post_init__(self) -> None:
        """Raises RequestError where a field is none that can be."""
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise RequestError(f"lora_name is {self.lora_name!r:.80}; it must be a text that is not empty")
        number = self.lora_int_id
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise RequestError(f"lora_int_id is {number!r:.80}; it must be a whole number of at least 1")
        if not isinstance(self.lora_path, (str, Path, type(None))):
            raise RequestError(f"lora_path is {self.lora_path!r:.80}; name the folder of an adapter")
        if self.lora_path is not None:
            object.__setattr__(self, "lora_path", str(self.lora_path))  # so that equal ones are equal
