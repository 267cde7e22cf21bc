# SPDX-License-Identifier: MIT
"""What a compiled library of this package holds, without TensorRT and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fastmqa_export.errors import ModelFileError
from fastmqa_export.shared_library import SharedLibrary

#: Where the plugin keeps what it is: plugins/trt/fact_sheet.cpp.
FACT_SHEET: Final = ".fastmqa_facts"

#: What a library is, by a function that it exports.
_KINDS: Final = {
    "getCreators": "TensorRT plugin",
    "RegisterCustomOps": "onnxruntime custom op",
    "fastmqa_describe_variants": "CUDA kernels",
    "fastmqa_cpu_run": "CPU kernels",
}


def inspect_library(path: Path) -> dict[str, Any]:
    """What `fastmqa-export inspect` shows of a library, as plain values.

    Returns:
        file, kind, bytes, ``sms`` (compute capabilities with machine code) and ``ptx`` (those that
        newer GPUs translate from); of CUDA kernels ``variants``; of the TensorRT plugin ``plugin``:
        the creator's name, version, namespace and fields with their types, and the version of
        TensorRT whose headers it was compiled with.

    Raises:
        ModelFileError: if it is no library of this package.
        KernelError: if it is one of CUDA kernels that cannot be loaded.
    """
    library = SharedLibrary(path)
    exports = library.exports()
    kind = next((kind for function, kind in _KINDS.items() if function in exports), None)
    if kind is None:
        raise ModelFileError(
            f"{path} is a library, but none of fastmqa_export: it exports none of "
            f"{', '.join(_KINDS)}"
        )
    code = library.device_code()
    info: dict[str, Any] = {
        "file": path.name,
        "kind": kind,
        "bytes": library.size,
        "sms": list(code.sms),
        "ptx": list(code.ptx),
    }
    if kind == "CUDA kernels":
        from fastmqa_export.kernels import Planner  # here: it imports torch

        info["variants"] = Planner(path.resolve()).variants()
    if kind == "TensorRT plugin":
        info["plugin"] = fact_sheet(library)
    return info


def fact_sheet(library: SharedLibrary) -> dict[str, Any]:
    """What a TensorRT plugin says of itself, see `inspect_library`.

    Raises:
        ModelFileError: if it says nothing: somebody else's, or an older one.
    """
    text = library.section(FACT_SHEET).rstrip(b"\0")
    try:
        facts: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ModelFileError(
            f"{library.path} is a TensorRT plugin, but none of fastmqa_export: it has no section "
            f"{FACT_SHEET}"
        ) from error
    return facts


def describe_library(info: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{info['file']}: {info['kind']}, {info['bytes']:,} bytes"]
    if info["sms"] or info["ptx"]:
        ptx = f"; PTX of {name_sms(info['ptx'])} for newer ones" if info["ptx"] else ""
        lines.append(f"code for {name_sms(info['sms'])}{ptx}")
    if plugin := info.get("plugin"):
        lines.append(
            f"creator: {plugin['namespace']}::{plugin['name']}, version {plugin['version']}, "
            f"compiled for TensorRT {plugin['tensorrt']}"
        )
        lines.append("fields:")
        lines += [f"  {name}: {kind}" for name, kind in plugin["fields"].items()]
    if variants := info.get("variants"):
        lines.append(f"variants: {len(variants)}")
        rows: dict[tuple[str, int], list[str]] = {}
        for v in variants:
            sizes = f"{v['head_size']}/{v['v_head_size']}"
            rows.setdefault((v["dtype"], v["min_sm"]), []).append(sizes)
        lines += [
            f"  {dtype} from SM{sm} on, D/V: {', '.join(dict.fromkeys(sizes))}"
            for (dtype, sm), sizes in rows.items()
        ]
    return "\n".join(lines)


def name_sms(numbers: Sequence[int]) -> str:
    """Compute capabilities for people."""
    return ", ".join(f"SM{sm}" for sm in numbers) or "no GPU"
