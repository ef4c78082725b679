"""Writes the README's table of families from the code: `--write` puts it in place, without it the table is printed."""

from __future__ import annotations

import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

from jaxpaged.convert.families import FAMILIES
from jaxpaged.convert.gguf_architectures import ARCHITECTURES

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- families: begin (written by `make table`) -->\n"
END = "<!-- families: end -->\n"


def table() -> str:
    """A line per file of convert/families/: its model types and its docstring's first line. Then what GGUF is read."""
    model_types = defaultdict(list)
    for model_type, family in FAMILIES.items():
        model_types[family.spec.__module__].append(f"`{model_type}`")
    lines = ["| `model_type` | what is read |", "|---|---|"]
    for module, names in sorted(model_types.items(), key=lambda item: item[1]):
        summary = (import_module(module).__doc__ or "").partition("\n")[0].removesuffix(".")
        file = module.rpartition(".")[2] + ".py"
        lines.append(f"| {', '.join(names)} | {summary} ([{file}](convert/families/{file})) |")
    gguf = ", ".join(f"`{name}`" for name in sorted(ARCHITECTURES))
    return "\n".join([*lines, "", f"As GGUF: {gguf}."]) + "\n"


def with_table(text: str) -> str:
    """`text` with what stands between the two marks replaced by the table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(with_table(README.read_text()))
    else:
        print(table(), end="")
