"""Checkpoints that are complete or not there, and are read without running code.

A checkpoint is a folder ``epoch-EEEE-step-SSSSSSS``: tensors as safetensors, everything else in ``state.json``, with
the size and SHA-256 of each tensor file, and of itself::

    write .tmp-NAME/*, fsync each  ->  fsync the folder  ->  rename to NAME  ->  fsync the parent  ->  delete old ones

A folder with a final name is therefore complete whenever the process died. The last one is the one whose name sorts
last; old ones are renamed before they are deleted, so that half of one never has a final name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import files
from .config import FORMAT

NAME = re.compile(r"epoch-\d{4,}-step-\d{7,}")
STATE = "state.json"


class Checkpoint(NamedTuple):
    """What one holds: ``facts`` of JSON, and named tensors (on the CPU) by the stem of their file."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def name_of(epoch: int, step: int) -> str:
    """Name of the checkpoint after ``step`` steps of an epoch, both counted from 0."""
    return f"epoch-{epoch:04d}-step-{step:07d}"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are; made by the first :meth:`save`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def save(
        self,
        name: str,
        facts: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        keep: Collection[str] = (),
    ) -> Path:
        """Writes a checkpoint, then deletes all but it and those in ``keep``.

        Args:
            name: from :func:`name_of`. One of this name that is there already stays as it is: a run that goes on comes
                to the same state.
            facts: for ``state.json``.
            tensors: named tensors by the stem of their file, without shared memory.
            keep: names of older checkpoints that stay.

        Raises:
            OSError: it could not be written; the older ones are as they were.
        """
        target = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            self._remove_parts()
            try:
                self._write(target, facts, tensors)
            except OSError:  # a full disk: what was written is of no use
                self._remove_parts()
                raise
        self._remove({*self.names()} - {name, *keep})
        return target

    def _write(self, target: Path, facts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        from safetensors.torch import save

        part = target.with_name(f".tmp-{target.name}")
        files.make_folder(part)
        written = {}
        for stem, named in tensors.items():
            content = save(dict(named), {"format": "pt"})
            files.write_file(part / f"{stem}.safetensors", content)
            written[f"{stem}.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        body = {"format": FORMAT, **facts, "files": written}
        text = json.dumps({"sha256": _sum(body), **body}, indent=1)
        files.write_file(part / STATE, text.encode())
        files.sync_folder(part)
        files.rename(part, target)
        files.sync_folder(self.folder)

    def load(self, name: str) -> Checkpoint:
        """Reads a checkpoint.

        Raises:
            ValueError: a file is missing, damaged, or of another format; names the file and the way out.
            OSError: a file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.folder / name
        facts = self._facts(path)
        tensors = {}
        for file, expected in facts["files"].items():
            content = self._content(path, file)
            if len(content) != expected["bytes"]:
                raise self._damaged(path, file, f"it has {len(content)} bytes, {expected['bytes']} were written")
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise self._damaged(path, file, "its SHA-256 is not that of what was written")
            try:
                tensors[file.removesuffix(".safetensors")] = load(content)
            except SafetensorError as error:
                raise self._damaged(path, file, str(error)) from error
        return Checkpoint(path, facts, tensors)

    def _facts(self, path: Path) -> dict[str, Any]:
        content = self._content(path, STATE)
        try:
            body = json.loads(content)
            found = body.pop("sha256")
            expected = body["files"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(path, STATE, f"it is no {STATE} of a checkpoint ({error})") from error
        if body.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint {str(path / STATE)!r} has format {body.get('format')!r}; this version reads {FORMAT}. "
                f"Go on with the version that wrote it, or {self._way_out(path)}."
            )
        if found != _sum(body) or not all(re.fullmatch(r"\w+\.safetensors", name) for name in expected):
            raise self._damaged(path, STATE, "its SHA-256 is not that of what was written")
        return body

    def _content(self, path: Path, file: str) -> bytes:
        try:
            return (path / file).read_bytes()
        except FileNotFoundError:
            raise self._damaged(path, file, "there is no such file") from None

    def _damaged(self, path: Path, file: str, what: str) -> ValueError:
        return ValueError(f"checkpoint {str(path / file)!r} is damaged: {what}. To go on, {self._way_out(path)}.")

    def _way_out(self, path: Path) -> str:
        before = [name for name in self.names() if name < path.name]
        there = f"resume from {before[-1]}" if before else "start from the beginning"
        return f"delete the folder {str(path)!r} to {there}, or pass --no-resume to delete the whole run and start over"

    def clear(self) -> None:
        """Deletes all checkpoints."""
        if self.folder.is_dir():
            self._remove_parts()
            self._remove(self.names())

    def _remove(self, names: Collection[str]) -> None:
        for name in sorted(names):
            trash = self.folder / f".old-{name}"
            files.rename(self.folder / name, trash)
            files.remove_folder(trash)

    def _remove_parts(self) -> None:
        """Deletes what a crash has left."""
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith((".tmp-", ".old-")):
                files.remove_folder(path)


def _sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
