# SPDX-License-Identifier: MIT
"""Shared libraries of a few C++ files, compiled once and kept by the hash of what decides them."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compile_library(
    sources: Sequence[Path],
    headers: Iterable[Path],
    flags: Sequence[str],
    link: Sequence[str] = (),
    *,
    name: str,
    only_for: Callable[[Path], Sequence[str]] = lambda source: (),
) -> Path:
    """A library of ``sources``, from build/host_libraries if the same was compiled before.

    Args:
        sources: what is compiled, each by itself.
        headers: what they include of ours.
        flags: for all of them, and for linking.
        link: what is linked beside them.
        name: of the library.
        only_for: more flags for a source.
    """
    more = {str(source): list(only_for(source)) for source in sources}
    digest = hashlib.sha256(repr((flags, link, more)).encode())
    for file in (*sorted(headers), *sources):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "host_libraries"
    library = folder / f"lib{name}-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    partial = folder / f"{library.stem}.{os.getpid()}"
    partial.mkdir(parents=True)

    def run(*command: object) -> None:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]

    def compiled(source: Path) -> Path:
        made = partial / f"{source.parent.name}-{source.stem}.o"
        run("g++", *flags, *only_for(source), "-c", source, "-o", made)
        return made

    try:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        run("g++", "-shared", *flags, *objects, *link, "-o", partial / library.name)
        (partial / library.name).rename(library)
    finally:
        shutil.rmtree(partial)
    return library
