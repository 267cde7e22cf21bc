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
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}
#: numpy reports a write that the disk cut short so, without an error number.
_SHORT_WRITE = "requested and"


def check_writable_folder(folder: Path) -> None:
    """Make the folder if it does not exist, and try that files can be written to it.

    Raises:
        OutputError: if not.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 file as a whole or not at all.

    Args:
        path: in an existing folder.
        text: what it holds.
        errors: what becomes of a lone surrogate, as in `str.encode`.

    Raises:
        OutputError: if it cannot be written; what was there before is untouched.
    """
    with staged_folder(path.parent, [path.name]) as folder, (folder / path.name).open("wb") as file:
        file.write(text.encode("utf-8", errors))
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
        OutputError: if something cannot be written, or a name is taken by something that is no
            file; what was there before is untouched.
    """
    for name in names:
        _check_replaceable(target / name)
    with _explained(target):
        staging = Path(tempfile.mkdtemp(prefix=".fastmqa-", dir=target))
        try:
            yield staging
            _move(names, staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_tree(target: Path) -> Iterator[Path]:
    """Write a whole folder: it takes the place of ``target`` when it is complete, or not at all.

    Args:
        target: a folder, which is removed with all that it holds, or nothing yet.

    Raises:
        OutputError: if something cannot be written; what was there before is untouched.
    """
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fastmqa-", dir=target.parent))
        new, old = staging / "new", staging / "old"
        try:
            new.mkdir()
            yield new
            with contextlib.ExitStack() as undo:
                if os.path.lexists(target):
                    target.replace(old)
                    undo.callback(old.replace, target)
                new.replace(target)
                undo.pop_all()
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def place(source: Path, target: Path) -> None:
    """Put a file in a second place: a hard link where the file system has them, else a copy.

    For files that are replaced and never written to, as all of ours are: a link keeps what it has.

    Raises:
        OutputError: if it cannot be written.
    """
    with _explained(target):
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)


def _check_replaceable(path: Path) -> None:
    """Refuse a folder, and above all a device: root's rename would replace even /dev/null."""
    with _explained(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write to {path}: it is no regular file; choose another name")


def _move(names: Sequence[str], staging: Path, target: Path) -> None:
    """Move all files into place, or put back what was there.

    What is there is first set aside, last name first: at no time does an old file stand beside the
    new one that it refers to.
    """
    aside = Path(tempfile.mkdtemp(dir=staging))
    with contextlib.ExitStack() as undo:
        for name in reversed(names):
            if os.path.lexists(target / name):
                (target / name).replace(aside / name)
                undo.callback((aside / name).replace, target / name)
        for name in names:
            (staging / name).replace(target / name)
            undo.callback((target / name).unlink)
        undo.pop_all()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cut_short = error.errno is None and _SHORT_WRITE in str(error)
        number = errno.ENOSPC if cut_short else error.errno
        reason = _ADVICE.get(number or 0, str(error))
        raise OutputError(f"cannot write to {path}: {reason}") from error
