# SPDX-License-Identifier: MIT
"""Where the compiled kernels, their sources and nvcc are: the only module that knows."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastmqa_export.errors import MissingDependencyError

if TYPE_CHECKING:
    from fastmqa_export.kernels import KernelLibrary

#: Path of the library of kernels, before all other places.
LIBRARY_VARIABLE: Final = "FASTMQA_KERNELS"
LIBRARY_NAME: Final = "libfastmqa_kernels.so"

PACKAGE: Final = Path(__file__).resolve().parent

NVCC_REMEDY: Final = (
    'pip install "cuda-toolkit[nvcc,cudart,cccl]", or install the CUDA toolkit, or set CUDACXX to '
    "its path"
)


def library_path() -> Path:
    """The library of kernels: $FASTMQA_KERNELS, that of the wheel, or that of the build folder.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
    """
    if given := os.environ.get(LIBRARY_VARIABLE):
        if Path(given).is_file():
            return Path(given)
        raise MissingDependencyError(
            f"{LIBRARY_VARIABLE} is {given}, which is no file; build the library "
            f"({build_command()}) or unset the variable"
        )
    places = [
        PACKAGE / "lib" / LIBRARY_NAME,
        PACKAGE.parent / "build" / "plugins" / LIBRARY_NAME,
    ]
    for path in places:
        if path.is_file():
            return path
    raise MissingDependencyError(
        f"the CUDA kernels are not built: no {' and no '.join(map(str, places))}, and "
        f"{LIBRARY_VARIABLE} is not set; build them: {build_command()}"
    )


def build_command() -> str:
    """What builds the library of kernels to where it is looked for."""
    build = PACKAGE.parent / "build" / "plugins"
    return f"cmake -S {_sources_or_name()} -B {build} && cmake --build {build}"


@functools.cache
def kernel_library() -> KernelLibrary:
    """The library of kernels, loaded once.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
        KernelError: if what was found cannot be loaded.
    """
    path = library_path()
    from fastmqa_export.kernels import KernelLibrary  # here: `doctor` runs without torch

    return KernelLibrary(path)


def sources() -> Path:
    """The folder of the C++ and CUDA sources: of the wheel, or beside the package in a clone.

    Raises:
        MissingDependencyError: if this installation has none.
    """
    places = [PACKAGE / "kernel_sources", PACKAGE.parent / "plugins"]
    for folder in places:
        if (folder / "include" / "fastmqa" / "attention.h").is_file():
            return folder
    raise MissingDependencyError(
        f"the kernels' sources are missing: no {' and no '.join(map(str, places))}; install the "
        "package anew, or use a clone of its repository"
    )


def _sources_or_name() -> str:
    try:
        return str(sources())
    except MissingDependencyError:
        return "plugins"


def find_nvcc() -> Path:
    """The CUDA compiler: $CUDACXX, on PATH, $CUDA_HOME, /usr/local/cuda, or of the PyPI wheel.

    Raises:
        MissingDependencyError: saying where was looked and how to install it.
    """
    if given := os.environ.get("CUDACXX"):
        if found := shutil.which(given):
            return Path(found)
        raise MissingDependencyError(
            f"CUDACXX is {given}, which is no program; correct or unset it, or {NVCC_REMEDY}"
        )
    if found := shutil.which("nvcc"):
        return Path(found)
    for path in _nvcc_places():
        if os.access(path, os.X_OK) and path.is_file():
            return path
    raise MissingDependencyError(
        "nvcc is not on PATH, not in $CUDA_HOME/bin, /usr/local/cuda/bin or this environment's "
        f"packages; {NVCC_REMEDY}"
    )


def _nvcc_places() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")
    # The wheels' folder is named for CUDA's version, nvidia/cu13, and was nvidia/cuda_nvcc.
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"))
