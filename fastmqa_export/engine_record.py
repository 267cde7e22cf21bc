# SPDX-License-Identifier: MIT
"""The record beside an engine, ``model.plan.json``: what it was made from, and if it still fits.

TensorRT says little about a plan that it does not take, and nothing about one that was made from
another model. Only the standard library is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from fastmqa_export.errors import EngineError

#: Version of the record's keys.
FORMAT: Final = 1

#: The smallest, best and largest size of each dynamic dimension.
Profile = Mapping[str, tuple[int, int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ingredients:
    """Everything that decides what an engine is, except TensorRT's version.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        sms: compute capabilities that it runs on, 75 for 7.5.
        model: SHA-256 of the ONNX file and then of its weights' files, by name.
        plugins: SHA-256 of the plugin libraries that it was built with, by name.
        capacity: T, tokens that its KV cache holds; None: it has no cache.
        profiles: the sizes of "batch" and "sequence" for "prefill" and, where there is a cache,
            for "decode"; TensorRT's profiles 0 and 1.
        workspace_mib: the most scratch memory, in 2^20 bytes, that a kernel may ask for.
        optimization_level: of TensorRT's builder.
        version_compatible: whether later versions of TensorRT may run it, with plugins inside.
    """

    backend: str
    sms: tuple[int, ...]
    model: Mapping[str, str]
    plugins: Mapping[str, str]
    capacity: int | None
    profiles: Mapping[str, Profile]
    workspace_mib: int
    optimization_level: int
    version_compatible: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` gave, after JSON made lists of its tuples."""
        profiles = {
            phase: {name: tuple(sizes) for name, sizes in profile.items()}
            for phase, profile in values["profiles"].items()
        }
        return cls(**{**values, "sms": tuple(values["sms"]), "profiles": profiles})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What the file beside an engine holds.

    Attributes:
        tensorrt: version of TensorRT, or of TensorRT-RTX, that built it.
        bytes: size of the plan.
        sha256: of the plan.
        made_from: see `Ingredients`.
    """

    tensorrt: str
    bytes: int
    sha256: str
    made_from: Ingredients

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"


def record_path(plan: Path) -> Path:
    """Where the record of a plan lies."""
    return plan.with_name(f"{plan.name}.json")


def read_record(plan: Path) -> EngineRecord | None:
    """The record of a plan; None if there is none.

    Raises:
        EngineError: if what is there is no record, or one of a later version.
    """
    path = record_path(plan)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise EngineError(
                f"{path} has another format than {FORMAT}; install a newer fastmqa_export, or "
                "build the engine anew"
            )
        made_from = Ingredients.from_json(values.pop("made_from"))
        return EngineRecord(made_from=made_from, **values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(
            f"{path} is no record of an engine ({type(error).__name__}: {error}); delete it, or "
            "build the engine anew"
        ) from error


def check_engine(plan: Path, model: Path | None = None) -> EngineRecord | None:
    """Compare a plan with its record, and with the model that it is to be used for.

    Args:
        plan: the engine.
        model: an ONNX file; its weights are looked for beside it.

    Returns:
        The record; None if there is none, as for an engine that another tool built.

    Raises:
        EngineError: if the plan is missing, empty, cut short or changed, the record is none, or
            the engine was built from another model.
    """
    if not plan.is_file():
        what = "is a folder" if plan.is_dir() else "does not exist"
        raise EngineError(f"{plan} {what}; `fastmqa-export build` writes engines")
    size = plan.stat().st_size
    record = read_record(plan)
    expected = record.bytes if record else None
    if size == 0 or (expected is not None and size < expected):
        of = f" of {expected}" if expected else ""
        raise EngineError(f"{plan} is cut short: {size} bytes{of}; copy it again, or build it anew")
    if record is None:
        return None
    if digest(plan) != record.sha256:
        raise EngineError(
            f"{plan} is not the engine that {record_path(plan).name} describes; copy both again, "
            "or build it anew"
        )
    if model is not None:
        _check_model(plan, record, model)
    return record


def _check_model(plan: Path, record: EngineRecord, model: Path) -> None:
    names = iter(record.made_from.model.items())
    _, sha256 = next(names)  # the ONNX file, whatever it is called now
    for path, expected in [(model, sha256), *((model.parent / n, d) for n, d in names)]:
        if not path.is_file() or digest(path) != expected:
            raise EngineError(
                f"{plan} is stale: {path} is not what it was built from; build it anew"
            )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
