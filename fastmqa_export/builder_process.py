# SPDX-License-Identifier: MIT
"""Starts the process that builds an engine, follows it, and says how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fastmqa_export import errors
from fastmqa_export.engine_builder import BuildRequest
from fastmqa_export.errors import EngineError
from fastmqa_export.progress import Progress


def run_builder(request: BuildRequest, progress: Progress) -> str:
    """Let a process of its own build, and tell of its progress.

    Returns:
        The version of TensorRT that built.

    Raises:
        FastMqaError: what the process raised; `EngineError` if it died without a word.
        OSError: if it could not write.
    """
    command = [sys.executable, "-P", "-m", "fastmqa_export.engine_builder"]
    places = [os.fspath(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl+C is for this process, which then ends that one
        ) as process,
    ):
        try:
            event = _talk(process, request, progress)
        except BaseException:
            process.kill()
            raise
        process.wait()
        if version := event.get("done"):
            return str(version)
        if "errno" in event:
            raise OSError(event["errno"], event["error"])
        if "error" in event:
            raise getattr(errors, event["type"])(event["error"])
        raise EngineError(_death(process.returncode, log, event))


def _talk(
    process: subprocess.Popen[str], request: BuildRequest, progress: Progress
) -> dict[str, Any]:
    """Give the request; the last event that comes back."""
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):  # it died already; its log says of what
        process.stdin.write(json.dumps(dataclasses.asdict(request)))
        process.stdin.close()
    event: dict[str, Any] = {}
    for line in process.stdout:
        with contextlib.suppress(ValueError):  # a line that its death cut short
            event = json.loads(line)
        if "say" in event:
            progress.say(event["say"])
    return event


def _death(code: int, log: IO[bytes], event: Mapping[str, Any]) -> str:
    """What is known of a process that said neither ``done`` nor ``error``."""
    how = f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    at = f" while it was at: {event['say']}" if "say" in event else ""
    log.seek(0)
    last = log.read().decode("utf-8", "replace").strip().splitlines()[-5:]
    text = "\n".join([f"the process that builds {how}{at}", *last])
    if code == -signal.SIGKILL:
        text += (
            "\n→ most likely the system ran out of memory: close other programs, or lower "
            "--max-batch or --max-sequence"
        )
    return text
