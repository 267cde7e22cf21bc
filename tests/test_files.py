# SPDX-License-Identifier: MIT
"""Results are written as a whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
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


def test_a_move_that_fails_puts_back_what_was_there(tmp_path):
    (tmp_path / "data").write_text("old")
    (tmp_path / "model").write_text("old")
    with (
        pytest.raises(OutputError, match="cannot write to"),
        staged_folder(tmp_path, ["data", "new", "model"]) as folder,
    ):
        (folder / "data").write_text("new")
        (folder / "new").write_text("new")  # and no model: its move is the one that fails
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"data": "old", "model": "old"}


def test_a_folder_in_the_way_is_found_before_anything_is_written(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OutputError, match="a folder of that name is in the way"):
        write_text(tmp_path / "a", "x")
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """As root, a rename would replace a device: /dev/null would be gone for everyone."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="no regular file; choose another name"):
        write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_weights_that_a_full_disk_cuts_short(tmp_path):
    """numpy, which writes the weights, gives no error number then."""
    with (
        pytest.raises(OutputError, match="the disk is full"),
        staged_folder(tmp_path, []),
        Path("/dev/full").open("wb") as file,
    ):
        np.zeros(100_000).tofile(file)


def test_a_name_too_long(tmp_path):
    with pytest.raises(OutputError, match="the name is too long; choose a shorter one"):
        write_text(tmp_path / ("a" * 300), "x")


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
