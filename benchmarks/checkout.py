"""Which commit a row is of. Imports nothing of ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The checkout's, or as the environment gives it in COMMIT."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    if given := os.environ.get("COMMIT"):  # of a copy without its history
        return given
    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + "+changes" if git("status", "--porcelain", "--untracked-files=no") else head
