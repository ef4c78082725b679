"""Which form of an op runs here, where there are two: the reference in jnp, or one Pallas kernel for NVIDIA GPUs."""

from __future__ import annotations

from typing import Literal

from jaxpaged.kernels.tiles import current_device

Backend = Literal["auto", "reference", "triton"]
_BACKENDS = ("auto", "reference", "triton")


def choose(backend: Backend, *, interpret: bool = False) -> Backend:
    """The backend that `auto` is here; others as they are."""
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    if backend != "auto":
        return backend
    device = current_device()
    return "triton" if interpret or (device.platform == "gpu" and "NVIDIA" in device.name) else "reference"
