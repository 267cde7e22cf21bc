# SPDX-License-Identifier: MIT
"""What TensorRT says when it refuses something, and what to do about it.

TensorRT returns nothing and writes its reason to a log, so the log is kept and read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

#: What to do about what TensorRT says; the first that fits.
_ADVICE: Final = (
    (
        r"incompatible device",
        "an engine runs on the kind of GPU that built it: build it on this one",
    ),
    (
        r"header\.size == blobSize",
        "the file is cut short: copy it again, or build it anew",
    ),
    (
        r"Version tag does not match|this version of TensorRT|incompatible serialization version",
        "an engine runs in the version that built it: install that version, or build the engine "
        "anew; with --version-compatible, later versions run it too",
    ),
    (
        r"(?i)could not find plugin|Creator\w* not found",
        "the engine holds layers of a plugin: give its library with --plugin, or set "
        "FASTMQA_TRT_PLUGIN",
    ),
    (
        r"(?i)host ?code",
        "the engine carries code for the CPU: if you trust who built it, give --allow-host-code",
    ),
    (
        r"FP32 GEMM is not supported",
        "TensorRT-RTX has no float32 matrix products on SM75: export the model with --dtype "
        "float16, or leave 75 out of --sm",
    ),
    (
        r"HW-specific datatypes",
        "the oldest GPU asked for lacks a type of the file, as SM75 lacks bfloat16: export the "
        "model with --dtype float16, or leave that SM out of --sm",
    ),
    (
        r"within workspace limit",
        "lower --max-batch or --max-sequence, or give a recipe with a larger workspace_mib",
    ),
    (
        r"bad_alloc",
        "the machine, not the GPU, ran out of memory: close other programs",
    ),
    (
        r"(?i)out ?of ?memory|memory allocation|insufficient memory|MEM_ALLOC_FAILED",
        "close other programs on the GPU, lower --max-batch, --max-sequence or --capacity, or give "
        "a recipe with a smaller workspace_mib",
    ),
    (
        r"Plugin not found",
        "neither a plugin nor a function of the file covers that op: export the model with "
        "`fastmqa-export export`, which writes both",
    ),
    (
        r"(?i)cudaError \d+|no CUDA-capable device|CUDA initialization failure",
        "TensorRT builds on the GPU that it builds for: check it with nvidia-smi, or build without "
        "a GPU with --backend tensorrt-rtx --sm ...",
    ),
)


def explain(what: str, messages: Sequence[str]) -> str:
    """What failed, the reason that TensorRT gave, and what to do about it."""
    text = "\n".join(dict.fromkeys(message.strip() for message in messages))
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), None)
    return what + (f": {text}" if text else "") + (f"\n→ {advice}" if advice else "")


def make_log(trt: Any) -> Any:
    """An ``ILogger`` that keeps errors in ``messages``, and is otherwise silent.

    Args:
        trt: the module ``tensorrt``, or one with its names.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is not known before the import
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.messages.append(message)

    return Log()
