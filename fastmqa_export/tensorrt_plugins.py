# SPDX-License-Identifier: MIT
"""Our plugin in TensorRT's registry, for its builder and its runtime alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmqa_export.config import OP_DOMAIN, OP_NAME, OP_VERSION
from fastmqa_export.errors import EngineError, ModelFileError
from fastmqa_export.inspect_library import fact_sheet
from fastmqa_export.shared_library import SharedLibrary
from fastmqa_export.tensorrt_log import explain


def load_plugins(trt: Any, libraries: Sequence[str], log: Any) -> None:
    """Load libraries into TensorRT's registry, where its parser and its runtime look for plugins.

    Args:
        trt: the module ``tensorrt``.
        libraries: their paths.
        log: an `fastmqa_export.tensorrt_log.make_log`.

    Raises:
        EngineError: if they are of another TensorRT, or hold no plugin for the op.
    """
    registry = trt.get_plugin_registry()
    for library in libraries:
        _check_major(trt, Path(library))
        registry.load_library(library)
    # What counts is that the creator is there: a library that registered itself gives no handle.
    if registry.get_creator(OP_NAME, str(OP_VERSION), OP_DOMAIN) is None:
        raise EngineError(
            explain(
                f"TensorRT {trt.__version__} finds no {OP_DOMAIN}::{OP_NAME} in "
                f"{', '.join(libraries)}; build the plugin anew with the headers of this TensorRT",
                log.messages,
            )
        )
    log.messages.clear()


def _check_major(trt: Any, library: Path) -> None:
    """TensorRT would load it, and its interfaces may have changed since."""
    try:
        compiled = fact_sheet(SharedLibrary(library))["tensorrt"]
    except ModelFileError:  # not ours, or none at all: TensorRT will say so
        return
    if compiled.split(".")[0] != trt.__version__.split(".")[0]:
        raise EngineError(
            f"{library} was compiled for TensorRT {compiled}, and this is {trt.__version__}; build "
            "the plugin anew with the headers of this TensorRT"
        )
