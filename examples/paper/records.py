"""``runs.jsonl``: one line a run, and what several processes need to fill it together."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A run is these four; its ``id`` tells apart the settings it was made with.
KEY = ("config", "split", "label", "seed")


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """A lock on ``path``, which a killed process lets go of; yields whether it was had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` in one step when all is written."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Records:
    """The lines of a file, read anew at each question: another process may have added to it."""

    def __init__(self, path: Path, lock: Path) -> None:
        self.path, self.lock = path, lock

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, **values: Any) -> dict[str, Any] | None:
        """The record that has all of these."""
        return next((r for r in self.all() if all(r.get(name) == value for name, value in values.items())), None)

    def put(self, record: dict[str, Any]) -> None:
        """Add ``record``, in the place of an earlier one of the same run."""
        with held(self.lock):
            key = [record[name] for name in KEY]
            kept = [r for r in self.all() if [r[name] for name in KEY] != key]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in [*kept, record]))
