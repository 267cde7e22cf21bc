#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Full TensorRT on this machine's GPU: engines with the plugin, compared and looked into.

For a few attentions: export, build with the plugin and from the function, compare both engines with
onnxruntime, PyTorch and the float64 oracle, and see in TensorRT's inspector that the plugin is
there, and that no copy stands around it or around the cache. Everything by the command line, as a
user would. Writes FOLDER/tensorrt.json; ends with 1 if anything is not as it should be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "mqa": ["mqa", "--hidden", "1024", "--heads", "16"],
    "gqa": ["mqa", "--hidden", "1024", "--heads", "16", "--kv-heads", "4"],
    "window_softcap": [
        "mqa",
        "--hidden",
        "512",
        "--heads",
        "8",
        "--window",
        "9",
        "--softcap",
        "30",
    ],
    "mla": ["mla", "--hidden", "1024", "--heads", "16"],
}
#: What TensorRT calls a layer that only copies, or changes a layout.
COPY = re.compile(r"(?i)reformat|copy")


def command(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and stderr of a command."""
    line = [sys.executable, "-m", "fastmqa_export", *arguments, "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr.strip()


def copies(layers: list[str]) -> list[str]:
    """Layers that copy what an attention or the cache reads or writes."""
    ours = re.compile(r"(?i)fused_?attention|past_key_values|present")
    return [layer for layer in layers if COPY.search(layer) and ours.search(layer)]


def check(name: str, source: list[str], cache: str, folder: Path) -> dict[str, Any]:
    """What was found of one attention."""
    model = folder / f"{name}_{cache}.onnx"
    found: dict[str, Any] = {"source": " ".join(source), "cache": cache, "problems": []}

    def run(*arguments: str) -> dict[str, Any]:
        code, result, words = command(*arguments)
        if code:
            found["problems"].append(f"{arguments[0]} ended with {code}: {words[-500:]}")
        return result

    options = ["--dtype", "float16", "--cache", cache]
    run("export", *source, "-o", str(model), *options)
    for kind in ("plugin", "no-plugin"):
        plan = model.with_suffix(f".{kind}.plan")
        run("build", str(model), "-o", str(plan), f"--{kind}", "--max-batch", "8")
        compared = run("compare", str(model), "--source", *source, "--engine", str(plan))
        layers = run("inspect", str(plan)).get("layers") or []
        found[kind] = {
            "accuracy": compared.get("accuracy"),
            "layers": len(layers),
            "copies": copies(layers),
        }
        if kind == "plugin" and found[kind]["copies"]:
            found["problems"].append(f"copied: {', '.join(found[kind]['copies'])}")
    return found


def main() -> None:
    """The command line: the folder for files and findings."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        check(name, source, cache, folder)
        for name, source in SOURCES.items()
        for cache in ("static", "none")
    ]
    (folder / "tensorrt.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for each in found:
        said = "; ".join(each["problems"]) or "ok"
        print(f"{each['source']}, cache {each['cache']}: {said}")
    sys.exit(any(each["problems"] for each in found))


if __name__ == "__main__":
    main()
