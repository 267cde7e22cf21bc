# SPDX-License-Identifier: MIT
"""MQA, GQA and MLA attention from PyTorch to ONNX and TensorRT, with one fused op and its proof.

What is in ``__all__`` is imported when it is first used, so that importing the package loads
nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FastMQA": "modules",
    "LatentAttention": "modules",
    "MultiQueryAttention": "modules",
    "OnnxModel": "runtime",
    "StaticCache": "cache",
    "create_session": "runtime",
    "fused_attention": "op",
    "generate": "runtime",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
