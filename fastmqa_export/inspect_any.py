# SPDX-License-Identifier: MIT
"""Looks at a file of any kind that this package writes, by its first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmqa_export import plan_header, shared_library
from fastmqa_export.inspect import describe, inspect_file
from fastmqa_export.inspect_engine import describe_engine, inspect_engine
from fastmqa_export.inspect_library import describe_library, inspect_library


def inspect_any(path: Path) -> tuple[dict[str, Any], str]:
    """What `fastmqa-export inspect` shows of an ONNX file, an engine or a compiled library.

    Returns:
        Plain values, and the same in words for people.

    Raises:
        ModelFileError: if it is no ONNX model, or somebody else's library.
        EngineError: if it is called an engine and is none.
    """
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
    if head == shared_library.MAGIC:
        info = inspect_library(path)
        return info, describe_library(info)
    if head in plan_header.TAGS or path.suffix in (".plan", ".engine"):
        info = inspect_engine(path)
        return info, describe_engine(info)
    info = inspect_file(path)
    return info, describe(info)
