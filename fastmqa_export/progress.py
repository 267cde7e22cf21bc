# SPDX-License-Identifier: MIT
"""Tells on stderr what long work is at: a bar on a terminal, one line per stage in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import click


class Progress:
    """The stages of one job.

    On a terminal a bar counts the stages and names the present one; elsewhere each finished stage
    is one line with its time.
    """

    def __init__(self, stages: int, *, quiet: bool = False) -> None:
        """Prepare for that many stages."""
        self._stages, self._done, self._quiet = stages, 0, quiet
        self._live = sys.stderr.isatty() and not quiet

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage; a failure ends the line, and the error speaks for itself."""
        start = time.monotonic()
        self.say(name)
        try:
            yield
        except BaseException:
            self._clear()
            raise
        self._done += 1
        self._clear()
        if not self._quiet:
            mark = f"[{self._done}/{self._stages}]"
            click.echo(f"{mark} {name} ({time.monotonic() - start:.1f} s)", err=True)

    def say(self, detail: str) -> None:
        """Name what is being done within the present stage."""
        if self._live:
            width = 24
            full = width * self._done // self._stages
            bar = "━" * full + "─" * (width - full)
            click.echo(f"\r\033[2K{bar} {detail}", nl=False, err=True)

    def _clear(self) -> None:
        if self._live:
            click.echo("\r\033[2K", nl=False, err=True)
