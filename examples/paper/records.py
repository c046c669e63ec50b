"""``runs.jsonl`` has a line for each run. Several processes can fill it together."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# These four values name a run. Its ``id`` stands for its settings.
KEY = ("config", "split", "label", "seed")


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """A lock on ``path``. It yields whether this process has the lock. A killed process releases it."""
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
    """A new path to write to. After all is written, it replaces ``path`` in one step."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Records:
    """The lines of a file. Each call reads them anew, because another process may have added some."""

    def __init__(self, path: Path, lock: Path) -> None:
        self.path, self.lock = path, lock

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, **values: Any) -> dict[str, Any] | None:
        """The record with all of these values, or None."""
        return next((r for r in self.all() if all(r.get(name) == value for name, value in values.items())), None)

    def put(self, record: dict[str, Any]) -> None:
        """Add ``record``. It replaces an earlier record of the same run."""
        with held(self.lock):
            key = [record[name] for name in KEY]
            kept = [r for r in self.all() if [r[name] for name in KEY] != key]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in [*kept, record]))
