"""metrics.jsonl: one JSON object a line, one line for each step and one more for each evaluation."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from fastlm.data.files import write_all, write_atomically


class Metrics:
    """Appends to a metrics file. What it held of steps after `keep_steps` goes, for they will be done again."""

    def __init__(self, path: Path, keep_steps: int):
        kept = [row for row in read(path) if row["step"] <= keep_steps]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, **row: float) -> None:
        """Unbuffered, so that it can be watched. ValueError for what is no number: no JSON spells it."""
        write_all(self._descriptor, (json.dumps(row, allow_nan=False) + "\n").encode())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def read(path: Path) -> list[dict]:
    """The rows of a metrics file; of none, if there is no file. What is no row is left out.

    Such as a last line cut off by a kill, or one damaged on the disk: no reason to lose a run with good checkpoints.
    """
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows
