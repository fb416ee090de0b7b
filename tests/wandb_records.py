"""Reading the file of an offline W&B run: its records are protobufs that the wandb package defines.

The file is a log as LevelDB writes it: after a header of 7 bytes (``:W&B``, a magic number, a version), blocks of
32 KiB, in which records lie in one piece or, across the end of a block, in several; each piece with its checksum,
length and kind.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} begins with {data[:4]!r}"
    at, pieces = 7, b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:  # too little for the head of a piece: filled up with zeros
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        if kind == 0 or len(piece) < length:
            return  # what follows has not been written yet
        assert checksum == zlib.crc32(bytes([kind]) + piece), f"damaged at byte {at}"
        at += 7 + length
        pieces = piece if kind in (_FULL, _FIRST) else pieces + piece
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(pieces)
            yield record


@dataclass
class OfflineRun:
    """What an offline run holds, as W&B would show it once it is synchronised."""

    directory: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Name (or glob) -> its MetricRecord."""
    artifacts: list[Any] = field(default_factory=list)
    """Its ArtifactRecords."""
    kinds: set[str] = field(default_factory=set)

    def values(self, name: str) -> list[tuple[int, Any]]:
        """(trainer/global_step, value) of a metric."""
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]

    def files(self, name: str) -> list[Path]:
        """The media files under a name of the history, oldest first."""
        found = []
        for _, value in self.values(name):
            paths = value.get("filenames") or [value["path"]]
            found += [self.directory / "files" / path for path in paths]
        return found


def offline_runs(root: Path) -> list[OfflineRun]:
    """The offline runs under a ``save_dir``, oldest first."""
    return [read_run(path) for path in sorted(root.glob("**/offline-run-*/run-*.wandb"))]


def read_run(path: Path, patience_s: float = 30.0) -> OfflineRun:
    """One run that has been finished, from its ``.wandb`` file, which W&B's own process may still be writing."""
    until = time.monotonic() + patience_s
    run = _read_run(path)
    while "exit" not in run.kinds and time.monotonic() < until:
        time.sleep(0.05)
        run = _read_run(path)
    assert "exit" in run.kinds, f"{path} does not end"
    return run


def _read_run(path: Path) -> OfflineRun:
    run = OfflineRun(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        run.kinds.add(kind)
        if kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "run":
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
    return run


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found
