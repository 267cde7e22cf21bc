# SPDX-License-Identifier: MIT
"""Files that look like engines and plugins to whoever does not run them."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastmqa_export.engine_record import EngineRecord, Ingredients, digest, record_path
from fastmqa_export.inspect_library import FACT_SHEET

PLAN_BYTES = 128

FACTS = {
    "name": "FusedAttention",
    "version": "1",
    "namespace": "fastmqa",
    "tensorrt": "10.14.1",
    "fields": {"scale": "FLOAT32", "features": "INT32"},
}


def write_plan(
    path: Path,
    tag: bytes = b"ftrt",
    serialisation: int = 0,
    version: tuple[int, int, int, int] = (10, 14, 1, 48),
) -> Path:
    """An engine's header, and nothing behind it."""
    head = struct.pack("<4sI8xQ4B", tag, serialisation, PLAN_BYTES, *version)
    path.write_bytes(head + bytes(PLAN_BYTES - len(head)))
    return path


def write_record(plan: Path, tensorrt: str = "10.14.1.48", **made_from: Any) -> None:
    """The record beside an engine, as `build` writes it; by default of a graph without a cache."""
    ingredients: dict[str, Any] = {
        "backend": "tensorrt",
        "sms": (75,),
        "model": {"m.onnx": "a" * 64},
        "plugins": {"libfastmqa_trt.so": "c" * 64},
        "capacity": None,
        "profiles": {"prefill": {"batch": (1, 4, 4), "sequence": (1, 16, 64)}},
        "workspace_mib": 64,
        "optimization_level": 3,
        "version_compatible": False,
    }
    record = EngineRecord(
        tensorrt=tensorrt,
        bytes=plan.stat().st_size,
        sha256=digest(plan),
        made_from=Ingredients(**ingredients | made_from),
    )
    record_path(plan).write_text(record.to_json())


def compile_library(path: Path, source: str) -> Path:
    """A shared library of some C++; a test that needs it is skipped without a compiler."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    path.with_suffix(".cpp").write_text(source)
    command = ["c++", "-shared", "-fPIC", "-nostdlib", "-o", path, path.with_suffix(".cpp")]
    subprocess.run(command, check=True)
    return path


def fake_plugin(path: Path, section: str = FACT_SHEET) -> Path:
    """A TensorRT plugin's export and fact sheet."""
    return compile_library(
        path,
        f'[[gnu::section("{section}"), gnu::used]]\n'
        f"const char kFacts[] = {json.dumps(json.dumps(FACTS))};\n"
        'extern "C" void getCreators() {}\n'
        '[[gnu::visibility("hidden")]] int hidden_helper;\n',
    )
