# SPDX-License-Identifier: MIT
"""Results are written as a whole or not at all."""

import errno
from pathlib import Path

import pytest

from fastmqa_export.errors import OutputError
from fastmqa_export.files import check_writable_folder, staged_folder, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "zwei ×")
    assert path.read_text("utf-8") == "zwei ×"
    assert list(tmp_path.iterdir()) == [path]


def test_several_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")

    def write(fail: bool) -> None:
        with staged_folder(tmp_path, ["b", "a"]) as folder:
            (folder / "a").write_text("new")
            if fail:
                raise OSError(errno.ENOSPC, "No space left on device")
            (folder / "b").write_text("new")

    with pytest.raises(OutputError, match="the disk is full; free some space"):
        write(fail=True)
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"a": "old"}
    write(fail=False)
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def test_other_errors_pass_through_and_leave_nothing(tmp_path):
    with pytest.raises(KeyError), staged_folder(tmp_path, ["a"]) as folder:
        (folder / "a").write_text("new")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        check_writable_folder(tmp_path / "file" / "folder")
    with pytest.raises(OutputError, match="a file of that name is in the way of a folder"):
        check_writable_folder(tmp_path / "file")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_each_reason_comes_with_advice(code, tmp_path, monkeypatch):
    def mkdir(*_, **__):
        raise OSError(code, "refused")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OutputError, match="choose another place"):
        check_writable_folder(tmp_path / "x")
