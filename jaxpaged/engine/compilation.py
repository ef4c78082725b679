"""Functions compiled ahead of time: where they come from, how many at once, where they are kept between runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import jax
from tqdm import tqdm

Jitted = tuple[Callable[..., Any], dict[str, Any]]
"""A function and the options of jax.jit."""

Key = tuple[str, tuple[Hashable, ...]]
"""A function's name and what it is compiled for: sizes, or a caller's own function."""


class Lowered(Protocol):
    """What can be compiled, in any thread: jax.stages.Lowered."""

    def compile(self) -> Callable[..., Any]:
        """The compiled function."""


Build = Callable[[str, Jitted, tuple[Any, ...]], Lowered]
"""build(name, jitted, shapes) -> the function lowered for arguments of these shapes."""


def traced(name: str, jitted: Jitted, shapes: tuple[Any, ...]) -> Lowered:
    """Traced and lowered here and now."""
    del name
    function, options = jitted
    lowered: Lowered = jax.jit(function, **options).lower(*shapes)
    return lowered


class OfCompiler(Protocol):
    """What `kept` needs of an object: its compiler, and room for what was made."""

    compiler: Compiler
    made: dict[Hashable, Any]


Owner = TypeVar("Owner", bound=OfCompiler)
Sizes = ParamSpec("Sizes")
Made = TypeVar("Made")


def kept(make: Callable[Concatenate[Owner, Sizes], Made]) -> Callable[Concatenate[Owner, Sizes], Made]:
    """A method that gives a compiled function for sizes, and once it is compiled the same one: to make up shapes and
    shardings of all arguments takes as long as the call, and a step asks each time.
    """

    @wraps(make)
    def known(self: Owner, /, *sizes: Sizes.args, **named: Sizes.kwargs) -> Made:
        key = make.__name__, sizes, *named.items()
        if key in self.made:
            found: Made = self.made[key]
            return found
        made = make(self, *sizes, **named)
        if not self.compiler.is_ahead:
            self.made[key] = made
        return made

    return known


class Compiler:
    """Owns the compiled functions: each is made once, ahead of time or when it is first asked for."""

    def __init__(self) -> None:
        self.is_compiling = False
        self._functions: dict[Key, Callable[..., Any]] = {}
        self._ahead: Callable[[Key, Lowered], None] | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether functions that are asked for are only begun."""
        return self._ahead is not None

    @property
    def num_compiled(self) -> int:
        """Functions compiled so far, each for a shape of its own."""
        return len(self._functions)

    def get(self, key: Key, build: Build, jitted: Jitted, shapes: tuple[Any, ...]) -> Callable[..., Any]:
        """The function for this key; while `ahead` runs, its compilation is only begun."""
        if key in self._functions:
            return self._functions[key]
        name, sizes = key
        lowered = build("-".join((name, *map(str, sizes))), jitted, shapes)
        if self._ahead is not None:
            self._ahead(key, lowered)
            return _not_yet
        self.is_compiling = True
        try:
            self._functions[key] = lowered.compile()
        finally:
            self.is_compiling = False
        return self._functions[key]

    def ahead(self, jobs: Sequence[Callable[[], object]], *, show_progress: bool) -> None:
        """Compile what each job asks for, one function on each core: XLA lets go of Python meanwhile.

        They are lowered in this thread, whose settings of JAX are the caller's.
        """
        futures: dict[Key, Future[Callable[..., Any]]] = {}
        bar = tqdm(total=len(jobs), desc="compiling", unit="function", disable=not show_progress, leave=False)
        with bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:

            def begin(key: Key, lowered: Lowered) -> None:
                if key not in futures:
                    futures[key] = threads.submit(lowered.compile)
                    futures[key].add_done_callback(lambda _: bar.update())

            self._ahead = begin
            try:
                for job in jobs:
                    job()
                self._functions |= {key: future.result() for key, future in futures.items()}
            finally:
                self._ahead = None
                for future in futures.values():
                    future.cancel()


def _not_yet(*_: Any) -> Any:
    raise RuntimeError("a function was called while it was being compiled ahead")


def use_compilation_cache(directory: str | Path | None) -> None:
    """Keep compiled steps between runs: in the given folder, else where the program says, else in the user's cache."""
    if directory is None and jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(directory) if directory is not None else home / "jaxpaged" / "compiled"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)  # compiled code is code: nobody else may write it
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
