"""A file of JSON lines that grows with a run's steps and is cut where a resume begins: metrics and skipped steps.

Invariant: lines are in step order, each flushed when it is written; a torn last line is dropped. After a resume the
file reads as if the run had never stopped. Light: imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.storage import ArtifactError


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file in order; a torn last line is left out, a missing file has none.

    Raises:
        ArtifactError: a line is not JSON.
    """
    return parse_json_lines(path.read_text(encoding="utf-8"), where=str(path)) if path.exists() else []


def parse_json_lines(text: str, *, where: str) -> list[dict[str, Any]]:
    """Return the lines of a file's content in order; a torn last line is left out.

    Args:
        text: the content.
        where: path or URL, for messages.

    Raises:
        ArtifactError: a line is not JSON.
    """
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            lines += [json.loads(line)] if line else []
        except ValueError as error:
            raise ArtifactError(f"read {where}: line {number} must be JSON, got {line[:60]!r}; remove it") from error
    return lines


class JsonLines:
    """Such a file, open for appending."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Open after `step`, cutting off what is beyond it.

        Args:
            path: made where it is missing.
            step: steps that the run has taken, 0 for a new one; lines have their own in `step`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [line for line in read_json_lines(path) if line["step"] <= step]
        """The lines that the file began with."""
        self._file = path.open("a+", encoding="utf-8")
        self._file.truncate(sum(len(_encode(line)) for line in self.kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; a number that is not finite is a ValueError, as JSON has none."""
        self._file.write(_encode(line))
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def _encode(line: dict[str, Any]) -> str:
    # ASCII, so characters are bytes; decoding and encoding again changes nothing.
    return json.dumps(line, allow_nan=False) + "\n"
