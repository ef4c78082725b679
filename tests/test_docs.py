"""What the documents say is so: generated parts are up to date, links lead somewhere, the README's program runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from real_model import smollm2_gguf

from jaxpaged.__main__ import main
from jaxpaged.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_readme_lists_the_families_that_the_code_has() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "families_table.py"))
    text = (ROOT / "README.md").read_text()
    assert script["with_table"](text) == text, "run make table"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert not [t for t in targets if not (document.parent / t).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_documents_name_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^ {4})make ((?:[a-z-]+ ?)+)", document.read_text(), re.MULTILINE)
    assert {word for line in named for word in line.split()} <= targets


def commands_of(document: Path) -> list[list[str]]:
    """The arguments of each line that calls jaxpaged."""
    text = document.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:.*&& )?jaxpaged (.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("[", "").replace("]", ""), comments=True) for line in lines]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands_of(d)], ids=lambda path: path.name)
def test_commands_that_documents_show_are_understood(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in commands_of(document):
        monkeypatch.setattr(f"{COMMANDS[argv[0]].module}.run", lambda args: 0)
        assert main(argv) == 0


@pytest.mark.slow
def test_the_readme_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert program.count("path/to/model") == 1
    exec(compile(program.replace("path/to/model", str(smollm2_gguf())), "README.md", "exec"), {})
    assert "The capital of France is" in capsys.readouterr().out
