"""Imports run downward: server, llm -> engine -> model -> kernels; convert -> model. The host side needs no jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The plain words that every part shares; they import each other and nothing else of ours.
WORDS = (
    "jaxpaged.errors",
    "jaxpaged.settings",
    "jaxpaged.logits_processor",
    "jaxpaged.lora_request",
    "jaxpaged.structured_outputs",
    "jaxpaged.sampling_params",
    "jaxpaged.speculative_config",
    "jaxpaged.outputs",
    "jaxpaged.config",
)

# What a module, or whatever lies below it, may import of ours. The longest name that fits rules; a name not found here
# stands at the top (llm, server, the command line) and may import everything.
MAY_IMPORT = {
    "jaxpaged.kernels": ("jaxpaged.kernels",),
    "jaxpaged.model": ("jaxpaged.model", "jaxpaged.kernels", "jaxpaged.errors"),
    "jaxpaged.functional": ("jaxpaged.model", "jaxpaged.kernels", "jaxpaged.errors"),
    "jaxpaged.convert": (
        *("jaxpaged.convert", "jaxpaged.errors", "jaxpaged.model.spec", "jaxpaged.model.params"),
        *("jaxpaged.model.lora", "jaxpaged.model.quantized"),
    ),
    "jaxpaged.convert.__main__": ("jaxpaged",),
    "jaxpaged.engine": ("jaxpaged.engine", "jaxpaged.model", "jaxpaged.kernels", *WORDS),
} | dict.fromkeys(WORDS, WORDS)

WITHOUT_JAX = (
    *WORDS,
    "jaxpaged",
    "jaxpaged.engine.request",
    "jaxpaged.engine.adapters",
    "jaxpaged.engine.page_pool",
    "jaxpaged.engine.drafts",
    "jaxpaged.engine.scheduler",
    "jaxpaged.engine.tokenizer",
    "jaxpaged.engine.detokenizer",
)


def source_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((p for p in candidates if p.exists()), None)


def all_modules() -> list[str]:
    """Every module of the package, those behind the two links included."""
    paths = [
        *ROOT.glob("jaxpaged/**/*.py"),
        *ROOT.glob("jaxpaged/kernels/**/*.py"),
        *ROOT.glob("jaxpaged/convert/**/*.py"),
    ]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths}
    return sorted(names)


def imports_of(module: str) -> Iterator[str]:
    """The absolute names of the modules that `module` imports, wherever in the file; `if TYPE_CHECKING` left out."""
    path = source_of(module)
    assert path is not None, module
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    unseen = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for child in block.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if base.startswith("jaxpaged") and source_of(name) else base


def lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("module", all_modules())
def test_imports_run_downward(module: str) -> None:
    rule = max((name for name in MAY_IMPORT if lies_in(module, name)), key=len, default=None)
    if rule is None:
        return
    ours = {name for name in imports_of(module) if lies_in(name, "jaxpaged")}
    upward = sorted(name for name in ours if not any(lies_in(name, allowed) for allowed in MAY_IMPORT[rule]))
    assert not upward, f"{module} may import {MAY_IMPORT[rule]} of ours"


@pytest.mark.parametrize("module", [m for m in WITHOUT_JAX if source_of(m)])
def test_the_host_side_needs_no_jax(module: str) -> None:
    reached, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [n for n in imports_of(name) if lies_in(n, "jaxpaged")] if source_of(name) else []
    assert not [n for m in reached if source_of(m) for n in imports_of(m) if lies_in(n, "jax") or lies_in(n, "jaxlib")]


def test_the_kernels_folder_stands_alone() -> None:
    names = [m for m in all_modules() if lies_in(m, "jaxpaged.kernels")]
    assert names
    foreign = {n.partition(".")[0] for m in names for n in imports_of(m)} - sys.stdlib_module_names
    assert foreign <= {"jax", "jaxlib", "jaxtyping", "numpy", "jaxpaged"}


def test_importing_jaxpaged_leaves_jax_as_it_was() -> None:
    program = """if True:
        import jax
        before = dict(jax.config.values)
        from jaxpaged import *
        changed = {k for k in before if jax.config.values[k] != before[k]}
        assert not changed, f"importing jaxpaged changed jax.config: {changed}"
        jax.config.update("jax_num_cpu_devices", 3)  # raises once a backend has started
        assert len(jax.devices("cpu")) == 3
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_who_reads_no_gguf_needs_no_gguf() -> None:
    """Machines with a GPU often have all else."""
    program = "import sys; sys.modules['gguf'] = None; import jaxpaged.llm"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
