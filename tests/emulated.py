# SPDX-License-Identifier: MIT
"""Builds the kernels for the host, with `emulation/` in the place of the GPU, and runs calls."""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastmqa_export.config import OP_INPUTS, AttentionAttributes
from fastmqa_export.emit import SHARED_KB
from fastmqa_export.kernels import Device, KernelLibrary, make_call

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"
PLUGINS = ROOT / "plugins"

#: The files that hold the attention kernels (combine.cu is part of every library).
ALL_VARIANTS = sorted((PLUGINS / "kernels" / "instantiations").glob("*float*.cu"))

#: Devices by SM: shared memory of a block as each has it.
SHARED_BYTES = {int(arch.removeprefix("sm_")): kb << 10 for arch, kb in SHARED_KB.items()}
SHARED_BYTES[70] = 96 << 10  # of a GPU that is too old

_FLAGS = (
    *("-std=c++20", "-O1", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-include", "fastmqa/arch/simt.hpp", "-x", "c++"),
)
_SANITIZER = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")


@functools.cache
def missing() -> str | None:
    """What the emulation needs and this machine lacks, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if cuda_headers() is None:
        return "CUDA's headers (cuda_fp16.h) are not installed"
    return None


@functools.cache
def cuda_headers() -> Path | None:
    """The folder of CUDA's headers."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    roots += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"))]
    roots += [
        Path(torch.__file__).parents[1] / "nvidia" / name for name in ("cu13", "cuda_runtime")
    ]
    return next(
        (root / "include" for root in roots if (root / "include" / "cuda_fp16.h").exists()), None
    )


def build(sources: Iterable[Path], *, plugins: Path = PLUGINS, sanitized: bool = True) -> Path:
    """The library of these files of ``plugins`` (and the host's part), from build/emulation.

    Objects are kept by the hash of all that decides them, so that a second run compiles nothing.
    ``sanitized``: with UBSan, which makes an error of it end the process.
    """
    flags = (*_FLAGS, *(_SANITIZER if sanitized else ()))
    kernels = plugins / "kernels"
    include = [
        *("-isystem", str(cuda_headers())),
        *("-I", str(EMULATION / "include"), "-I", str(plugins / "include")),
        *("-I", str(kernels)),
    ]
    contract = plugins / "include" / "fastmqa"
    seen = [contract / "attention.h"]
    for folder_of_kernels in (contract / "arch", contract / "tile", kernels):
        seen += folder_of_kernels.rglob("*.*")
    headers = {
        ".cpp": sorted(file for file in seen if file.suffix == ".h"),
        ".cu": sorted(file for file in seen if file.suffix in (".h", ".cuh")),
    }
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        digest = hashlib.sha256(" ".join(flags).encode())
        emulated = sorted((EMULATION / "include").rglob("*.*"))
        for file in (source, *headers[source.suffix], *emulated):
            digest.update(file.read_bytes())
        made = folder / f"{source.stem}-{digest.hexdigest()[:20]}.o"
        # Another process of pytest may be compiling the very same.
        with made.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                partial = made.with_suffix(".partial.o")
                command = ["g++", *flags, *include, "-c", str(source), "-o", str(partial)]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                assert result.returncode == 0, result.stderr[-4000:]
                partial.rename(made)
        return made

    files = [EMULATION / "emulation.cpp", *sorted(kernels.glob("*.cpp")), kernels / "dispatch.cu"]
    files += [kernels / "instantiations" / "combine.cu", *sources]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, files))
    name = hashlib.sha256(" ".join(str(o) for o in objects).encode()).hexdigest()[:20]
    library = folder / f"libfastmqa_emulated-{name}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.so")
        command = ["g++", "-shared", *(_SANITIZER[:1] if sanitized else ()), *map(str, objects)]
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(library)
    return library


class EmulatedKernels:
    """The kernels' library on the host."""

    def __init__(self, path: Path) -> None:
        self.library = KernelLibrary(path)
        self._seed = self.library.library.fastmqa_emulation_seed
        self._seed.argtypes = (ctypes.c_uint32,)

    def run(
        self,
        tensors: Mapping[str, Tensor],
        attributes: AttentionAttributes,
        *,
        sm: int,
        sm_count: int = 2,
        return_lse: bool = False,
        seed: int = 0,
        tactic: int = 0,
    ) -> tuple[Tensor, Tensor | None, int]:
        """Y, lse and the index of the variant that ran.

        Inputs and outputs lie between guards of NaN: what is read beyond a tensor spoils the
        result, and what is written there is found here.
        """
        inputs = {name: Guarded(tensor) for name, tensor in tensors.items()}
        call = make_call(
            *(inputs[n].tensor if n in inputs else None for n in OP_INPUTS),
            attributes=attributes,
            return_lse=return_lse,
        )
        guarded = [*inputs.values()]
        y = Guarded(torch.full_like(call.y, torch.nan))
        guarded.append(y)
        call.params.y = y.tensor.data_ptr()
        lse = None
        if call.lse is not None:
            lse = Guarded(torch.full_like(call.lse, torch.nan))
            guarded.append(lse)
            call.params.lse = lse.tensor.data_ptr()
        device = Device(sm, sm_count, SHARED_BYTES[sm])
        functions = self.library.library
        if size := functions.fastmqa_workspace_bytes(call.params, device, tactic):
            workspace = Guarded(torch.full((size,), 0xFF, dtype=torch.uint8))
            guarded.append(workspace)
            call.params.workspace = workspace.tensor.data_ptr()
        self._seed(seed)
        self.library._check(functions.fastmqa_run, call.params, device, tactic, 0)
        for tensor in guarded:
            tensor.check()
        variant = self.library.launches(call, device, tactic)["variant"]["index"]
        return y.tensor, None if lse is None else lse.tensor, variant


class Guarded:
    """A copy of a tensor between guard bytes, with the same strides."""

    _BYTES = 256

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        self._memory = torch.full((size + 2 * self._BYTES + 64,), 0xFF, dtype=torch.uint8)
        self._begin = self._BYTES + -(self._memory.data_ptr() + self._BYTES) % 64
        self._end = self._begin + size
        inner = self._memory[self._begin : self._end].view(tensor.dtype)
        self.tensor = inner.as_strided(tensor.shape, tensor.stride(), inner.storage_offset())
        self.tensor.copy_(tensor)

    def check(self) -> None:
        """Assert that nothing was written outside."""
        for part in (self._memory[: self._begin], self._memory[self._end :]):
            assert bool((part == 0xFF).all()), "a byte outside a tensor was written"


def strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values with the axes in another order in memory, and a gap of NaN after each row."""
    stored = tensor.permute(order)
    wide = torch.full((*stored.shape[:-1], stored.shape[-1] + 8), torch.nan, dtype=tensor.dtype)
    wide[..., : stored.shape[-1]] = stored
    back = tuple(order.index(axis) for axis in range(4))
    return wide[..., : stored.shape[-1]].permute(back)
