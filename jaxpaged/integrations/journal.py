"""Rows that are done, kept in a folder that many workers share: what a killed job or worker had finished stays.

Every worker appends to a file of its own, a JSON line a row, and reads on in those of the others before it begins
anything. So no file has two writers, and any folder that all machines see will do.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxpaged.errors import ConfigError

_META = "journal.json"


class Journal:
    """The finished rows of one job, by id."""

    def __init__(self, folder: str | Path, job: Mapping[str, Any]) -> None:
        """Open the folder, or make it. Raises ConfigError where it holds the rows of another job than `job`."""
        self._folder = Path(folder)
        self._rows: dict[str, dict[str, Any]] = {}
        self._read: dict[str, int] = {}  # bytes of each file so far
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own = self._folder / f"rows-{uuid.uuid4().hex}.jsonl"
        self._check(json.loads(json.dumps(job)))

    def finished(self, ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """The rows among `ids` that anybody has finished until now."""
        for path in sorted(self._folder.glob("rows-*.jsonl")):
            self._read_on(path)
        return {row_id: self._rows[row_id] for row_id in ids if row_id in self._rows}

    def finish(self, row_id: str, row: Mapping[str, Any]) -> None:
        """Keep a row, whatever happens to this process from now on."""
        with self._own.open("ab") as file:
            file.write(json.dumps([row_id, row]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self, job: Any) -> None:
        path = self._folder / _META
        aside = self._folder / f".{uuid.uuid4().hex}"
        aside.write_text(json.dumps(job, indent=1))
        try:
            os.link(aside, path)  # whole or not at all, and by one worker only
        except FileExistsError:
            found = json.loads(path.read_text())
            if changed := sorted(key for key in found.keys() | job.keys() if found.get(key) != job.get(key)):
                was = ", ".join(f"{key} was {found.get(key)!r} and is {job.get(key)!r}" for key in changed)
                raise ConfigError(
                    f"{self._folder} holds the finished rows of another job: {was}; choose another folder"
                ) from None
        finally:
            aside.unlink()

    def _read_on(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._read.get(path.name, 0))
            lines = file.read().split(b"\n")
        whole = lines[:-1]  # what follows the last newline is still being written, or was when its writer died
        for line in whole:
            row_id, row = json.loads(line)
            self._rows.setdefault(row_id, row)
        self._read[path.name] = self._read.get(path.name, 0) + sum(len(line) + 1 for line in whole)
