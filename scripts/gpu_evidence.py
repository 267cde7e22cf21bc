#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes one file of what scripts/gpu_check.sh found: docs/evidence/gpu-CARD.json."""

from __future__ import annotations

import datetime
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_attention import gpu_state, versions

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "cases", "conformance", "memcheck", "racecheck", "initcheck", "benchmark")
STEPS += ("tensorrt", "tensorrt_benchmark")


def cases(path: Path) -> dict[str, Any]:
    """Counts of pytest's report, and the names of what failed."""
    if not path.exists():
        return {}
    total, failures, skipped = 0, [], 0
    for case in ET.parse(path).getroot().iter("testcase"):
        total += 1
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failures.append(case.get("name"))
        elif "skipped" in kinds:
            skipped += 1
    passed = total - len(failures) - skipped
    return {"passed": passed, "skipped": skipped, "failed": len(failures), "failures": failures}


def step(folder: Path, name: str) -> dict[str, Any]:
    """How a step ended; the last line of its log that says something."""
    code = folder / f"{name}.code"
    if not code.exists():
        return {"result": "not run"}
    log = (folder / f"{name}.log").read_text("utf-8", "replace").strip().splitlines()
    result = "ok" if code.read_text().strip() == "0" else "failed"
    return {"result": result, "last_line": log[-1][:300] if log else ""}


def read_json(path: Path) -> Any:
    """What a step wrote; None if it did not run."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def read_lines(path: Path) -> list[Any]:
    """The like, a value per line."""
    return (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )


def evidence(folder: Path) -> dict[str, Any]:
    """All of the file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": gpu_state(),
        "versions": versions(),
        "steps": {name: step(folder, name) for name in STEPS},
        "cases": cases(folder / "cases.xml"),
        "conformance": read_json(folder / "conformance.json"),
        "benchmark": read_lines(folder / "benchmark.jsonl"),
        "tensorrt": read_json(folder / "tensorrt" / "tensorrt.json"),
        "tensorrt_benchmark": read_lines(folder / "tensorrt.jsonl"),
    }


def main() -> None:
    """The command line: the folder with the logs."""
    found = evidence(Path(sys.argv[1]))
    card = re.sub(r"[^a-z0-9]+", "-", found["gpu"]["name"].lower()).strip("-")
    path = ROOT / "docs" / "evidence" / f"gpu-{card}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
