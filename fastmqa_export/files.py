# SPDX-License-Identifier: MIT
"""The one place where results are written, so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastmqa_export.errors import OutputError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EACCES: "no permission to write there; choose another place",
    errno.EPERM: "no permission to write there; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another place",
    errno.EEXIST: "a file of that name is in the way of a folder; choose another place",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
}


def check_writable_folder(folder: Path) -> None:
    """Make the folder if it does not exist, and try that files can be written to it.

    Raises:
        OutputError: if not.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        OutputError: if it cannot be written; what was there before is untouched.
    """
    with staged_folder(path.parent, [path.name]) as folder, (folder / path.name).open("wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def staged_folder(target: Path, names: Sequence[str]) -> Iterator[Path]:
    """Write several files into ``target`` together: all of them, or none.

    Args:
        target: an existing folder.
        names: files that the caller writes into the folder that the context gives, in the order
            in which they are moved: a file before the one that refers to it.

    Raises:
        OutputError: if something cannot be written; what was there before is untouched.
    """
    with _explained(target):
        staging = Path(tempfile.mkdtemp(prefix=".fastmqa-", dir=target))
        try:
            yield staging
            for name in names:
                (staging / name).replace(target / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _ADVICE.get(error.errno or 0, str(error))
        raise OutputError(f"cannot write to {path}: {reason}") from error
