# SPDX-License-Identifier: MIT
"""A library of kernels in a few loops on the host (`naive_kernels.cpp`), for tests of the glue."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
INCLUDE = TESTS.parent / "plugins" / "include"


def compile_cpp(source: Path, output: Path, *flags: str) -> Path:
    """Compile a file that sees attention.h; a test that needs it is skipped without a compiler."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(INCLUDE)]
    subprocess.run([*command, *flags, str(source), "-o", str(output)], check=True)
    return output


@functools.cache
def naive_library() -> Path:
    """The library, compiled once."""
    folder = Path(tempfile.mkdtemp(prefix="fastmqa-naive-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "libnaive.so"
    return compile_cpp(TESTS / "naive_kernels.cpp", path, "-shared", "-fPIC")
