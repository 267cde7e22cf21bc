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
    from fastmqa_export.cpu_kernels import CpuKernels
    from fastmqa_export.kernels import KernelLibrary

#: Environment variables that name a library's path, before all other places.
LIBRARY_VARIABLE: Final = "FASTMQA_KERNELS"
CPU_VARIABLE: Final = "FASTMQA_CPU_KERNELS"
TRT_VARIABLE: Final = "FASTMQA_TRT_PLUGIN"
ORT_VARIABLE: Final = "FASTMQA_ORT_LIBRARY"
LIBRARY_NAME: Final = "libfastmqa_kernels.so"
CPU_NAME: Final = "libfastmqa_cpu.so"
TRT_NAME: Final = "libfastmqa_trt.so"
ORT_NAME: Final = "libfastmqa_ort.so"

PACKAGE: Final = Path(__file__).resolve().parent

#: The custom op has the CPU kernel in it, and is built with it.
_HEADERS_OF_ORT: Final = "ONNXRUNTIME_INCLUDE_DIR=... HWY_INCLUDE_DIR=..."

NVCC_REMEDY: Final = (
    'pip install "cuda-toolkit[nvcc,cudart,cccl]", or install the CUDA toolkit, or set CUDACXX to '
    "its path"
)


def library_path() -> Path:
    """The library of kernels: $FASTMQA_KERNELS, that of the wheel, or that of the build folder.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
    """
    return _find(LIBRARY_NAME, LIBRARY_VARIABLE, "the CUDA kernels are not built", build_command())


def cpu_library_path() -> Path:
    """The CPU kernel: $FASTMQA_CPU_KERNELS, that of the wheel, or that of the build folder.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
    """
    command = f"{_HEADERS_OF_ORT} {build_command()}"
    return _find(CPU_NAME, CPU_VARIABLE, "the CPU kernel is not built", command)


def trt_plugin_path() -> Path:
    """The TensorRT plugin: $FASTMQA_TRT_PLUGIN, that of the wheel, or that of the build folder.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
    """
    command = f"TENSORRT_ROOT=... {build_command()}"
    return _find(TRT_NAME, TRT_VARIABLE, "the TensorRT plugin is not built", command)


def ort_library_path() -> Path:
    """The custom op of onnxruntime: $FASTMQA_ORT_LIBRARY, of the wheel, or of the build folder.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
    """
    command = f"{_HEADERS_OF_ORT} {build_command()}"
    return _find(ORT_NAME, ORT_VARIABLE, "onnxruntime's custom op is not built", command)


def ort_library_if_built() -> Path | None:
    """The same, or None.

    Raises:
        MissingDependencyError: if $FASTMQA_ORT_LIBRARY is set and no file.
    """
    try:
        return ort_library_path()
    except MissingDependencyError:
        if os.environ.get(ORT_VARIABLE):
            raise
        return None


def _find(name: str, variable: str, complaint: str, command: str) -> Path:
    if given := os.environ.get(variable):
        if Path(given).is_file():
            return Path(given)
        raise MissingDependencyError(
            f"{variable} is {given}, which is no file; build the library ({command}) or unset the "
            "variable"
        )
    places = [PACKAGE / "lib" / name, PACKAGE.parent / "build" / "plugins" / name]
    for path in places:
        if path.is_file():
            return path
    # What hatch_build.py wrote when the wheel was made.
    note = PACKAGE / "lib" / "built.txt"
    said = f" ({note.read_text(encoding='utf-8').strip()})" if note.is_file() else ""
    raise MissingDependencyError(
        f"{complaint}: no {' and no '.join(map(str, places))}, and {variable} is not set{said}; "
        f"build it: {command}"
    )


def build_command() -> str:
    """What builds the libraries to where they are looked for."""
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


@functools.cache
def cpu_kernels() -> CpuKernels:
    """The CPU kernel, loaded once.

    Raises:
        MissingDependencyError: saying where was looked and how to build it.
        KernelError: if what was found cannot be loaded.
    """
    path = cpu_library_path()
    from fastmqa_export.cpu_kernels import CpuKernels  # as above

    return CpuKernels(path)


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
