# SPDX-License-Identifier: MIT
"""Stages are lines in a log, a bar on a terminal, and nothing when quiet."""

import sys

import pytest

from fastmqa_export.progress import Progress


def stages(progress: Progress) -> None:
    with progress.stage("load"):
        progress.say("half of it")
    with progress.stage("save"):
        pass


def test_a_log_has_a_line_per_stage(capsys):
    stages(Progress(2))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["[1/2] load", "[2/2] save"]


def test_a_terminal_has_a_bar_that_names_the_stage(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    stages(Progress(2))
    text = capsys.readouterr().err
    assert "─ half of it" in text
    assert "━━" in text.split("save")[0]


def test_quiet_says_nothing(capsys):
    stages(Progress(2, quiet=True))
    assert capsys.readouterr().err == ""


def test_a_failed_stage_is_not_reported_as_done(capsys):
    progress = Progress(1)
    with pytest.raises(KeyError), progress.stage("load"):
        raise KeyError
    assert capsys.readouterr().err == ""
