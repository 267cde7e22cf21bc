# SPDX-License-Identifier: MIT
"""The main job: export a model, prove the file, measure it, and write the report."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import onnx.inliner
import torch

from fastmqa_export import __version__
from fastmqa_export.compare import ONNXRUNTIME, SAME_DTYPE, WITH_KERNEL, Comparison, compare
from fastmqa_export.files import check_writable_folder
from fastmqa_export.inspect import describe_value, load_model
from fastmqa_export.language import PROMPTS
from fastmqa_export.onnx_export import ExportedFile, export
from fastmqa_export.progress import Progress
from fastmqa_export.report import write_report
from fastmqa_export.runtime import OnnxModel, create_session
from fastmqa_export.source import AttentionShape, Source
from fastmqa_export.timing import time_steps

#: Cached tokens at which the report times a step.
TIMED_LENGTHS: Final = (64, 512)

_PACKAGES: Final = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "polygraphy",
    "transformers",
    "numpy",
)


def export_source(source: Source, path: Path, cache: str) -> ExportedFile:
    """Export a source to one file."""
    with source.traceable(cache) as exportable:
        return export(exportable, path)


def run(
    load: Callable[[], Source],
    folder: Path,
    *,
    cache: str = "static",
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 48,
    threads: int = 0,
    library: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Export, compare, time, and write ``report.json`` and ``report.html``.

    Args:
        load: gives the model.
        folder: where ``model.onnx`` and the reports go; made if it does not exist.
        cache: "static" or "none".
        prompts: continued greedily by a language model.
        new_tokens: tokens per prompt.
        threads: for onnxruntime and PyTorch; 0: as many as cores.
        library: the custom op, with which onnxruntime is judged and timed too.
        quiet: no progress on stderr.

    Returns:
        What ``report.json`` holds, see `fastmqa_export.report`.
    """
    check_writable_folder(folder)
    progress = Progress(5 if cache == "static" else 4, quiet=quiet)
    if threads:
        torch.set_num_threads(threads)
    with progress.stage("load the model"):
        source = load()
    start = time.monotonic()
    with progress.stage("export to ONNX"):
        exported = export_source(source, folder / "model.onnx", cache)
    seconds = time.monotonic() - start
    peak = peak_memory_bytes()
    with progress.stage("compare with PyTorch and the float64 oracle"):
        comparison = compare(
            source,
            exported.path,
            library=library,
            prompts=prompts,
            new_tokens=new_tokens,
            threads=threads,
            progress=progress.say,
        )
    timings: list[dict[str, Any]] = []
    if cache == "static":
        with progress.stage("time PyTorch and onnxruntime"):
            timings = _timings(source, exported.path, threads, library)
    with progress.stage("write the report"):
        result = {
            "tool": {"name": "fastmqa_export", "version": __version__},
            "source": _describe_source(source),
            "export": {
                **describe_file(exported, cache),
                "seconds": seconds,
                "peak_memory_bytes": peak,
            },
            "graph": count_ops(exported.path),
            **describe_comparison(comparison, source),
            "kv_cache": kv_cache_table(source.shape(), source.dtype),
            "timings": timings,
            "versions": versions(),
            "machine": machine(),
        }
        write_report(result, folder)
    return result


def describe_file(exported: ExportedFile, cache: str) -> dict[str, Any]:
    """What was written, for the report."""
    model = load_model(exported.path)
    return {
        "file": exported.path.name,
        "bytes": exported.path.stat().st_size,
        "data_bytes": exported.data_path.stat().st_size if exported.data_path else 0,
        "opset": exported.opset,
        "ir_version": model.ir_version,
        "cache": cache,
        "fused_nodes": exported.fused_nodes,
        "inputs": [describe_value(value) for value in model.graph.input],
        "outputs": [describe_value(value) for value in model.graph.output],
    }


def count_ops(path: Path) -> dict[str, dict[str, int]]:
    """Ops of the graph with each attention written out, and with each as one node."""
    model = load_model(path)

    def count(m: onnx.ModelProto) -> dict[str, int]:
        return dict(collections.Counter(n.op_type for n in m.graph.node).most_common())

    return {"unfused": count(onnx.inliner.inline_local_functions(model)), "fused": count(model)}


def describe_comparison(comparison: Comparison, source: Source) -> dict[str, Any]:
    """The sections of the report that the comparison fills."""
    labels = {SAME_DTYPE: f"PyTorch {_name(source.dtype)}"}
    return {
        "accuracy": [
            {
                "dtype": _name(source.dtype),
                **{f.name: getattr(o, f.name) for f in dataclasses.fields(o) if f.name != "reason"},
                "error_ratio": o.error_ratio,
                "passed": o.passed,
            }
            for o in comparison.outputs
        ],
        "error_distribution": [
            {"label": labels.get(runner, runner), "edges": comparison.decades, "counts": counts}
            for runner, counts in comparison.distribution.items()
        ],
        "language": [dataclasses.asdict(result) for result in comparison.language],
        "verdict": {"passed": comparison.passed, "reasons": list(comparison.reasons)},
    }


def kv_cache_table(
    shape: AttentionShape, dtype: torch.dtype, context: int = 4096
) -> dict[str, Any]:
    """Bytes of the cache if the same heads were MHA, GQA, MQA or latent."""
    heads, kv, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
    source = "MLA" if shape.latent_columns else {1: "MQA", heads: "MHA"}.get(kv, "GQA")
    groups = kv if source == "GQA" else heads // 4 if heads % 4 == 0 and heads > 4 else 0
    latent = shape.latent_columns or d
    columns = {  # of keys and values, per token and layer
        "MHA": (f"{heads} × {d}", 2 * heads * d),
        "GQA": (f"{groups} × {d}", 2 * groups * d),
        "MQA": (f"1 × {d}", 2 * d),
        "MLA": (f"latent, {latent} columns", latent),
    }
    mha = columns["MHA"][1]
    return {
        "dtype": _name(dtype),
        "context": context,
        "rows": [
            {
                "attention": kind,
                "layout": layout,
                "bytes_per_token": shape.layers * count * dtype.itemsize,
                "bytes_per_sequence": shape.layers * count * dtype.itemsize * context,
                "reduction": 1 - count / mha,
                "users_factor": mha / count,
                "is_source": kind == source,
            }
            for kind, (layout, count) in columns.items()
            if count
        ],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that made the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int | None:
    """The most memory this process has held so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.is_file():
        text = info.read_text(encoding="utf-8", errors="replace")
        first = text.partition("\n\n")[0].splitlines()
        found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first)}
        cpu = found.get("model name", cpu)
        if "cpu family" in found:  # clouds cut the name short, and so hide the generation
            cpu += f" (family {found['cpu family']}, model {found['model']})"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count() or 1, "gpu": gpu}


def _describe_source(source: Source) -> dict[str, Any]:
    shape = source.shape()
    return {
        "name": source.name,
        "kind": source.kind,
        "description": source.description,
        "layers": shape.layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "parameters": source.parameters(),
        "dtype": _name(source.dtype),
    }


def _timings(
    source: Source, path: Path, threads: int, library: Path | None
) -> list[dict[str, Any]]:
    models = {
        f"PyTorch {_name(source.dtype)}": source.steps(),
        ONNXRUNTIME: OnnxModel(create_session(path, threads=threads)),
    }
    if library is not None:
        session = create_session(path, threads=threads, library=library)
        models[WITH_KERNEL] = OnnxModel(session)
    return [
        {**dataclasses.asdict(timing), "runtime": runtime, "threads": threads or os.cpu_count()}
        for cached in TIMED_LENGTHS
        for runtime, model in models.items()
        for timing in time_steps(model, source, cached)
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
