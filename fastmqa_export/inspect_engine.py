# SPDX-License-Identifier: MIT
"""What an engine holds: its header and its record, and its layers where TensorRT can load it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from fastmqa_export import plugins
from fastmqa_export.engine_builder import MODULES
from fastmqa_export.engine_record import check_engine
from fastmqa_export.engine_session import create_runtime
from fastmqa_export.errors import EngineError, MissingDependencyError
from fastmqa_export.plan_header import read_header
from fastmqa_export.tensorrt_log import make_log
from fastmqa_export.tensorrt_plugins import load_plugins


def inspect_engine(path: Path) -> dict[str, Any]:
    """What `fastmqa-export inspect` shows of an engine, as plain values.

    Returns:
        file, backend, the builder's version, bytes; ``made_from``, what the record beside it says,
        or None; ``layers``, what TensorRT's inspector says, or None with the reason in
        ``no_layers``; ``problems``.

    Raises:
        EngineError: if it is no engine.
    """
    header = read_header(path)
    size, problems, record = path.stat().st_size, [], None
    if header.bytes is not None and size != header.bytes:
        problems.append(f"{size} bytes of {header.bytes}: it is cut short, or changed")
    try:
        record = check_engine(path)
    except EngineError as error:
        problems.append(str(error))
    layers, reason = None, "the file is damaged"
    if not problems:
        try:
            layers, reason = _layers(path, header.backend), ""
        except (EngineError, MissingDependencyError) as error:
            reason = str(error)
    return {
        "file": path.name,
        "backend": header.backend,
        "version": header.version,
        "bytes": size,
        "made_from": dataclasses.asdict(record.made_from) if record else None,
        "layers": layers,
        "no_layers": reason,
        "problems": problems,
    }


def _layers(path: Path, backend: str) -> list[str]:
    """Names of an engine's layers, by TensorRT's inspector, which loads it on the GPU."""
    module = MODULES[backend]
    try:
        trt: Any = importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the Python package {module}, whose inspector lists them, is not installed"
        ) from error
    log = make_log(trt)
    runtime = create_runtime(trt, log)
    if backend == "tensorrt":
        with contextlib.suppress(MissingDependencyError):
            load_plugins(trt, [str(plugins.trt_plugin_path())], log)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(f"{module} cannot load it here: {''.join(log.messages[:1]).strip()}")
    inspector = engine.create_engine_inspector()
    told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    # Names alone, unless the engine was built to say more.
    return [layer if isinstance(layer, str) else layer["Name"] for layer in told["Layers"]]


def describe_engine(info: dict[str, Any], shown: int = 30) -> str:
    """The same for people."""
    lines = [f"{info['file']}: {info['backend']} {info['version']}, {info['bytes']:,} bytes"]
    if made_from := info["made_from"]:
        lines.append(f"for {', '.join(f'SM{sm}' for sm in made_from['sms'])}")
        lines += [f"from {name} ({digest[:12]}…)" for name, digest in made_from["model"].items()]
        built_in = " inside" if made_from["version_compatible"] else ""
        lines += [f"plugin{built_in}: {x} ({d[:12]}…)" for x, d in made_from["plugins"].items()]
        if made_from["capacity"]:
            lines.append(f"KV cache of {made_from['capacity']} tokens, written in place")
        for phase, profile in made_from["profiles"].items():
            ranges = (f"{dim} {lo}…{hi} (best {opt})" for dim, (lo, opt, hi) in profile.items())
            lines.append(f"{phase}: {', '.join(ranges)}")
    else:
        lines.append("no record beside it says what it was made from")
    if info["layers"] is None:
        lines.append(f"layers: not listed: {info['no_layers']}")
    else:
        lines.append(f"layers: {len(info['layers'])}")
        lines += [f"  {name}" for name in info["layers"][:shown]]
        if len(info["layers"]) > shown:
            lines.append("  … all with --json")
    return "\n".join([*lines, *(f"problem: {problem}" for problem in info["problems"])])
