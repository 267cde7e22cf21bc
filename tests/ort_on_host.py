# SPDX-License-Identifier: MIT
"""Compiles onnxruntime's custom op for CUDA with the emulated kernels (`ort/cuda_on_host.cpp`)."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import emulated
import host_library

from fastmqa_export.kernels import Device

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
DRIVER = ROOT / "tests" / "ort" / "cuda_on_host.cpp"

_FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-DORT_API_MANUAL_INIT"),
)


@functools.cache
def headers() -> Path | None:
    """The folder of onnxruntime_cxx_api.h, looked for as scripts/debian_headers.sh does."""
    given = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    places = [Path(given)] if given else []
    places += [Path("/usr/include/onnxruntime"), Path("/usr/include/onnxruntime/core/session")]
    places += [ROOT / "build" / "onnxruntime" / "include"]
    return next((p for p in places if (p / "onnxruntime_cxx_api.h").is_file()), None)


@functools.cache
def missing() -> str | None:
    """What compiling the custom op needs and this machine lacks, or None."""
    if emulated.missing():
        return emulated.missing()
    return None if headers() else "onnxruntime's headers are missing; set ONNXRUNTIME_INCLUDE_DIR"


class CudaOnHost:
    """The library, and the device that it takes for its own.

    Attributes:
        path: what onnxruntime loads.
    """

    def __init__(self) -> None:
        """Compile it, unless it was before."""
        self.path = _library(emulated.build(emulated.ALL_VARIANTS))
        self._library = ctypes.CDLL(str(self.path))
        self._library.take_scratch_bytes.restype = ctypes.c_size_t

    def set_device(self, sm: int, sm_count: int = 2) -> None:
        """SM 0: there is none."""
        device = Device(sm, sm_count, emulated.SHARED_BYTES.get(sm, 0))
        self._library.set_device(ctypes.byref(device))

    def stand_aside(self) -> None:
        """Be CUDA's provider, and answer nothing in onnxruntime's place."""
        self._library.stand_aside()

    def set_memory_full(self, full: bool) -> None:
        """Whether scratch memory is refused from now on."""
        self._library.set_memory_full(full)

    def take_scratch_bytes(self) -> int:
        """How much scratch memory was asked for since the last call."""
        return self._library.take_scratch_bytes()


def _library(kernels: Path) -> Path:
    sources = [*sorted((PLUGINS / "op").glob("*.cpp")), *sorted((PLUGINS / "ort").glob("*.cpp"))]
    sources = [*(x for x in sources if x.name != "attention_cpu.cpp"), DRIVER]
    seen = [*(PLUGINS / "op").glob("*.h"), *(PLUGINS / "ort").glob("*.h")]
    seen += [PLUGINS / "include" / "fastmqa" / "attention.h"]
    renamed = ("-DRegisterCustomOps=RegisterForCuda",)
    return host_library.compile_library(
        sources,
        seen,
        (*_FLAGS, "-isystem", str(headers()), "-I", str(PLUGINS / "include")),
        (str(kernels), f"-Wl,-rpath,{kernels.parent}"),
        name="cuda_on_host",
        only_for=lambda source: renamed if source.name == "register.cpp" else (),
    )
