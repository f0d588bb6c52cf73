"""Results of the stages before RL: kept in folders, and used again only while their inputs are unchanged."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARKER = "stage.json"


def fingerprint(inputs: Mapping[str, object]) -> str:
    """SHA-256 of what a result depends on, as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def file_fingerprint(name: str) -> str:
    """Of a data file its content, of a model folder its files' names, sizes and times; a Hub name stands for itself."""
    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        stats = {str(file.relative_to(path)): file.stat() for file in sorted(path.rglob("*")) if file.is_file()}
        return fingerprint({file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()})
    return name


@dataclass(frozen=True)
class StageFolder:
    """One stage's result. ``begin`` empties the folder; ``finish`` marks it complete, last and atomically."""

    path: Path
    inputs: Mapping[str, object] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    @property
    def facts(self) -> dict[str, Any]:
        """What ``finish`` wrote; {} before."""
        marker = self.path / MARKER
        return dict(json.loads(marker.read_text())) if marker.is_file() else {}

    @property
    def is_done(self) -> bool:
        """Whether the result is there, complete, and made from these inputs."""
        return self.facts.get("fingerprint") == self.fingerprint

    def begin(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def finish(self, **facts: object) -> None:
        marker = self.path / MARKER
        staged = marker.with_suffix(".tmp")
        staged.write_text(json.dumps({"fingerprint": self.fingerprint, **facts}, indent=2, default=str) + "\n")
        os.replace(staged, marker)
