# SPDX-License-Identifier: MIT
"""From the SOURCE argument of the command line to a model."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any, Final

import torch

from fastmqa_export.builtin import PRESETS, BuiltinOptions, BuiltinSource, create
from fastmqa_export.errors import FastMqaError, MissingDependencyError, SourceError
from fastmqa_export.modules import LatentAttention, MultiQueryAttention
from fastmqa_export.source import Source

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

ACCEPTED: Final = (
    "a built-in (mqa, mla, or a preset such as mqa-4096), a Hugging Face folder, a .gguf file, or "
    "package.module:factory"
)


def load_source(
    source: str,
    dtype: torch.dtype,
    *,
    options: BuiltinOptions | None = None,
    allow_pickle: bool = False,
) -> Source:
    """Load a model.

    Args:
        source: one of `ACCEPTED`. A factory takes no arguments and returns a module of
            `fastmqa_export.modules`, a transformers model, or a `Source`.
        dtype: of weights and caches; a factory's model is turned into it.
        options: sizes for ``mqa`` and ``mla``; presets have their own.
        allow_pickle: also read pickled checkpoints, which can run code of their author.

    Raises:
        SourceError: if there is no such source, or it cannot be loaded.
        ConfigError: if built-in sizes do not fit together.
        MissingDependencyError: if the packages for Hugging Face models are not installed.
    """
    if source in ("mqa", "mla"):
        return create(source, options or BuiltinOptions(), dtype)
    if source in PRESETS:
        if options not in (None, BuiltinOptions()):
            raise SourceError(
                f"{source} is a preset with sizes of its own; use mqa or mla to choose sizes"
            )
        return create(source, PRESETS[source][1], dtype)
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        made: Source = _huggingface().HuggingFaceSource(path, dtype, allow_pickle=allow_pickle)
        return made
    if path.exists():
        raise SourceError(f"{source} is neither a folder nor a .gguf file; accepted is {ACCEPTED}")
    module_name, colon, factory = source.partition(":")
    if colon and module_name and factory and "/" not in source:
        return _from_factory(module_name, factory, dtype)
    close = difflib.get_close_matches(source, ["mqa", "mla", *PRESETS], n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise SourceError(
        f"{source!r} is no built-in, and no such file or folder exists; accepted is {ACCEPTED}."
        f"{hint}"
    )


def _from_factory(module_name: str, factory: str, dtype: torch.dtype) -> Source:
    name = f"{module_name}:{factory}"
    try:
        made = getattr(importlib.import_module(module_name), factory)()
    except FastMqaError:
        raise
    except Exception as error:
        raise SourceError(
            f"{name} failed: {type(error).__name__}: {error}. It must be importable from here (set "
            "PYTHONPATH if it is not installed) and callable without arguments"
        ) from error
    if isinstance(made, Source):
        return made
    if isinstance(made, MultiQueryAttention | LatentAttention):
        return BuiltinSource(name, made, dtype)
    if isinstance(made, torch.nn.Module) and hasattr(made, "set_attn_implementation"):
        source: Source = _huggingface().HuggingFaceSource.from_model(made.to(dtype), name)
        return source
    raise SourceError(
        f"{name} returned {type(made).__name__}; a factory returns a module of "
        "fastmqa_export.modules, a transformers model, or a fastmqa_export.source.Source"
    )


def _huggingface() -> Any:
    """The module for Hugging Face models, loaded only when one is asked for."""
    try:
        return importlib.import_module("fastmqa_export.huggingface")
    except ImportError as error:
        raise MissingDependencyError(
            f"Hugging Face and GGUF models need transformers, which cannot be imported ({error}): "
            "pip install 'fastmqa_export[hf]'"
        ) from error
