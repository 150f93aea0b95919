"""File operations that a crash can only fall between: each is done, and on the disk, when it returns."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def make_folder(path: Path) -> None:
    """Makes an empty folder."""
    path.mkdir()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it. A crash may leave a part of it."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not name the file
        error.filename = error.filename or str(path)
        raise


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder in one step; a file that ``target`` names is replaced."""
    os.replace(source, target)


def sync_folder(path: Path) -> None:
    """Waits until the disk has the names in a folder."""
    if os.name == "nt":  # folders cannot be opened there, and renames are journalled
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(path: Path) -> None:
    """Deletes a folder and what is in it. A crash may leave a part of it."""
    shutil.rmtree(path)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one, whole."""
    part = path.with_name(f".{path.name}.part")
    write_file(part, content)
    rename(part, path)
