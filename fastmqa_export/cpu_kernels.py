# SPDX-License-Identifier: MIT
"""The CPU kernel, by its C interface (plugins/include/fastmqa/attention_cpu.h)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Final

import torch

from fastmqa_export.errors import ConfigError, KernelError
from fastmqa_export.kernels import AttentionParams, Call, load


class ThreadPool(ctypes.Structure):
    """``fastmqa::cpu::ThreadPool``: threads, and the function that gives them work."""

    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p),
    ]


_TEXT: Final = (ctypes.c_char_p, ctypes.c_size_t)
_CALL: Final = ctypes.POINTER(AttentionParams)
_POOL: Final = ctypes.POINTER(ThreadPool)


class CpuKernels:
    """A library with the C interface of attention_cpu.h.

    Args:
        path: the shared library.

    Raises:
        KernelError: if it cannot be loaded, or is another library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library: Any = load(
            path,
            {
                "cpu_supports": (ctypes.c_int32, (_CALL, *_TEXT)),
                "cpu_workspace_bytes": (ctypes.c_size_t, (_CALL, ctypes.c_int32)),
                "cpu_run": (ctypes.c_int32, (_CALL, _POOL, *_TEXT)),
                "cpu_create_pool": (None, (ctypes.c_int32, _POOL)),
                "cpu_destroy_pool": (None, (_POOL,)),
                "cpu_target": (ctypes.c_char_p, (ctypes.c_int32,)),
                "cpu_use_target": (None, (ctypes.c_int32,)),
            },
        )
        self._pools: dict[tuple[int, int], ThreadPool] = {}

    def targets(self) -> list[str]:
        """Instruction sets that the library has code for and this machine runs, best first."""
        names: list[str] = []
        while name := self.library.fastmqa_cpu_target(len(names)):
            names.append(name.decode())
        return names

    def pool(self, threads: int) -> ThreadPool:
        """That many threads of the library's own, started once and kept.

        Raises:
            KernelError: if the system gives no more threads.
        """
        # Threads do not live on in a process that was forked.
        key = (os.getpid(), threads)
        if key not in self._pools:
            pool = ThreadPool()
            self.library.fastmqa_cpu_create_pool(threads, pool)
            if not pool.pool:
                raise KernelError(f"{threads} threads could not be started; ask for fewer")
            self._pools[key] = pool
        return self._pools[key]

    def supports(self, call: Call) -> None:
        """Return if the kernel takes the call.

        Raises:
            ConfigError: saying which of its sizes, types or attributes it does not take.
        """
        self._check(self.library.fastmqa_cpu_supports, call.params)

    def run(self, call: Call, pool: ThreadPool) -> None:
        """Compute the call's y and lse.

        Args:
            call: with its tensors, in host memory.
            pool: what `pool` gave, or the caller's own.

        Raises:
            ConfigError: if the call is not valid, or not supported.
        """
        size = self.library.fastmqa_cpu_workspace_bytes(call.params, pool.threads)
        workspace = torch.empty(size, dtype=torch.uint8)
        call.params.workspace = workspace.data_ptr()
        self._check(self.library.fastmqa_cpu_run, call.params, pool)

    @staticmethod
    def _check(function: Any, *arguments: Any) -> None:
        text = ctypes.create_string_buffer(512)
        if function(*arguments, text, len(text)) != 0:
            raise ConfigError(text.value.decode())
