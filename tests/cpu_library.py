# SPDX-License-Identifier: MIT
"""The CPU kernel's library for tests, and programs of its sources under sanitizers."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
BUILD = ROOT / "build" / "cpu"

#: All that the library is made of.
SOURCES = [*sorted((PLUGINS / "cpu").glob("*.cpp")), PLUGINS / "kernels" / "check.cpp"]
_DEPENDENCIES = [
    *SOURCES,
    *(PLUGINS / "cpu").glob("*.h"),
    *(PLUGINS / "include" / "fastmqa").glob("*.h"),
    PLUGINS / "kernels" / "check.h",
    PLUGINS / "cpu" / "CMakeLists.txt",
]


@functools.cache
def highway() -> Path | None:
    """The folder of Highway's headers, as plugins/cpu/CMakeLists.txt looks for it."""
    places = [os.environ.get("HWY_INCLUDE_DIR"), ROOT / "build" / "highway" / "include"]
    places += ["/usr/include", "/usr/local/include"]
    found = (Path(p) for p in places if p is not None and (Path(p) / "hwy/highway.h").is_file())
    return next(found, None)


@functools.cache
def missing() -> str | None:
    """What the library needs and this machine lacks, or None."""
    if built() is not None:
        return None
    for program in ("g++", "cmake"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None if highway() else "Highway's headers (libhwy-dev) are not installed"


@functools.cache
def built() -> Path | None:
    """A library that is newer than all it is made of, if there is one."""
    newest = max(file.stat().st_mtime for file in _DEPENDENCIES)
    for folder in (ROOT / "build" / "plugins", BUILD):
        library = folder / "libfastmqa_cpu.so"
        if library.is_file() and library.stat().st_mtime >= newest:
            return library
    return None


@functools.cache
def library() -> Path:
    """The library, built by CMake if it is not there or older than its sources."""
    if found := built():
        return found
    run(["cmake", "-S", str(PLUGINS / "cpu"), "-B", str(BUILD)])
    run(["cmake", "--build", str(BUILD), "--parallel", "2"])
    (BUILD / "libfastmqa_cpu.so").touch()  # a change that needed no linking made it no newer
    return BUILD / "libfastmqa_cpu.so"


def program(source: Path, *flags: str) -> Path:
    """A program of a source file, the naive kernels and the CPU kernel's sources.

    It is kept by the hash of all that decides it. It has the code of one instruction set, the one
    that ``flags`` allow the compiler.
    """
    naive = ROOT / "tests" / "naive_kernels.cpp"
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in (source, naive, *_DEPENDENCIES):
        digest.update(file.read_bytes())
    path = BUILD / f"{source.stem}-{digest.hexdigest()[:20]}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        oracle = partial.with_suffix(".naive.o")  # not slowed down by what the program is made for
        include = ("-I", PLUGINS / "include", "-I", PLUGINS / "kernels", "-I", PLUGINS / "cpu")
        files = (*include, "-isystem", highway(), source, oracle, *SOURCES, "-o", partial)
        run(["g++", "-std=c++20", "-O2", *map(str, (*include, "-c", naive, "-o", oracle))])
        run(["g++", "-std=c++20", "-DHWY_COMPILE_ONLY_STATIC", *flags, *map(str, files)])
        oracle.unlink()
        partial.rename(path)
    return path


def run(command: list[str], **environment: str) -> str:
    """What a command prints; a failure shows all of it."""
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, f"{command[0]}: {result.returncode}\n{result.stdout[-6000:]}"
    return result.stdout
