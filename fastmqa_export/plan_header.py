# SPDX-License-Identifier: MIT
"""What the first bytes of an engine say: who built it, and with which version.

TensorRT's own tool reads the version so (``trtexec --getPlanVersionOnly``, samples/common of the
open-source repository). TensorRT-RTX has the same layout after a tag of its own, and the size of
the whole file at byte 16: read in engines of version 1.7.1.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Final, Literal

from fastmqa_export.errors import EngineError

#: How an engine begins.
TAGS: Final[dict[bytes, Literal["tensorrt", "tensorrt-rtx"]]] = {
    b"ftrt": "tensorrt",
    b"vtrt": "tensorrt-rtx",
}
#: Tag, version of the serialisation, 8 bytes, size of the file, four parts of the version.
_HEADER: Final = struct.Struct("<4sI8xQ4B")
_SERIALISATION: Final = 0


@dataclasses.dataclass(frozen=True)
class PlanHeader:
    """The beginning of an engine.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        version: of that builder, "10.14.1.48".
        bytes: size of the whole file, None where the header does not say it.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    bytes: int | None


def read_header(plan: Path) -> PlanHeader:
    """Read an engine's header.

    Raises:
        EngineError: if the file is no engine, or one of a format that this version does not know.
    """
    try:
        with plan.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise EngineError(f"{plan} cannot be read: {error.strerror or error}") from error
    if len(head) < _HEADER.size or head[:4] not in TAGS:
        raise EngineError(
            f"{plan} is no engine of TensorRT, nor of TensorRT-RTX: it begins with "
            f"{head[:4]!r}; `fastmqa-export build` writes engines"
        )
    tag, serialisation, size, *version = _HEADER.unpack(head)
    backend = TAGS[tag]
    if serialisation != _SERIALISATION:
        raise EngineError(
            f"{plan} is an engine of {backend} with serialisation {serialisation}; this version "
            f"knows {_SERIALISATION}"
        )
    return PlanHeader(
        backend, ".".join(map(str, version)), size if backend == "tensorrt-rtx" else None
    )
