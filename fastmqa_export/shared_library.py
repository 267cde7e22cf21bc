# SPDX-License-Identifier: MIT
"""What a compiled library holds, read from its bytes: nothing of it is loaded or run.

ELF is as in the System V ABI (64 bit, little-endian). CUDA code lies in the section ``.nv_fatbin``
as containers of one image per compute capability; NVIDIA documents the tools that print them, not
the format, which is read here as nvcc 13.0 writes it.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fastmqa_export.errors import ModelFileError

MAGIC: Final = b"\x7fELF"

_IDENT_64_BIT_LITTLE_ENDIAN: Final = b"\x02\x01"
#: name, type, flags, address, offset, size, link, info, alignment, entry size
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
#: name, info, other, section, value, size
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_NO_BITS: Final = 8
#: Numbers from here on are no sections.
_RESERVED: Final = 0xFF00

_FATBIN_MAGIC: Final = 0xBA55ED50
#: magic, version, size of the header, size of what follows
_FATBIN: Final = struct.Struct("<IHHQ")
#: kind, version, size of the header, size of the image; at byte 28 the compute capability
_IMAGE: Final = struct.Struct("<HHIQ12xI")


class CodeKind(enum.IntEnum):
    """What an image of CUDA code is."""

    PTX = 1
    MACHINE_CODE = 2


@dataclasses.dataclass(frozen=True)
class DeviceCode:
    """CUDA code in a library.

    Attributes:
        sms: compute capabilities with machine code, 75 for 7.5.
        ptx: those with PTX, which newer GPUs translate when the library is loaded.
    """

    sms: tuple[int, ...]
    ptx: tuple[int, ...]

    def runs_on(self, sm: int) -> bool:
        """Whether a GPU of that compute capability can run it.

        Machine code runs on the later minor versions of its major one, PTX on everything later.
        """
        same_major = (x for x in self.sms if x // 10 == sm // 10)
        return any(x <= sm for x in (*same_major, *self.ptx))


class SharedLibrary:
    """The sections of an ELF file.

    Raises:
        ModelFileError: if the file is none, or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = path.read_bytes()
            self._sections = dict(self._read_sections())
        except (OSError, struct.error, IndexError, ValueError) as error:
            raise ModelFileError(
                f"{path} is no library for 64-bit Linux, or is cut short ({error})"
            ) from error

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return len(self._bytes)

    def section(self, name: str) -> bytes:
        """What a section holds; empty if there is none of that name."""
        return self._sections.get(name, b"")

    def exports(self) -> list[str]:
        """Names of the functions and objects that it defines for others, sorted."""
        names, symbols = self.section(".dynstr"), self.section(".dynsym")
        whole = len(symbols) - len(symbols) % _SYMBOL.size
        defined = (
            _text(names, name)
            for name, _, _, section, _, _ in _SYMBOL.iter_unpack(symbols[:whole])
            if 0 < section < _RESERVED
        )
        return sorted(defined)

    def device_code(self) -> DeviceCode:
        """The CUDA code in it."""
        found = set(_images(self.section(".nv_fatbin")))
        sms, ptx = (
            tuple(sorted(sm for kind, sm in found if kind == wanted))
            for wanted in (CodeKind.MACHINE_CODE, CodeKind.PTX)
        )
        return DeviceCode(sms, ptx)

    def _read_sections(self) -> Iterator[tuple[str, bytes]]:
        if self._bytes[:6] != MAGIC + _IDENT_64_BIT_LITTLE_ENDIAN:
            raise ValueError(f"it begins with {self._bytes[:4]!r}")
        (table,) = struct.unpack_from("<Q", self._bytes, 0x28)
        entry, count, names = struct.unpack_from("<HHH", self._bytes, 0x3A)
        headers = [_SECTION.unpack_from(self._bytes, table + i * entry) for i in range(count)]

        def content(header: tuple[int, ...]) -> bytes:
            _, kind, _, _, offset, size, *_ = header
            if kind == _NO_BITS:
                return b""
            if offset + size > len(self._bytes):
                raise ValueError(f"{offset + size} bytes of it are needed, {len(self._bytes)} here")
            return self._bytes[offset : offset + size]

        strings = content(headers[names])
        for header in headers:
            yield _text(strings, header[0]), content(header)


def _text(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode("utf-8", "backslashreplace")


def _images(section: bytes) -> Iterator[tuple[int, int]]:
    """Kind and compute capability of each image; containers begin at multiples of 8 bytes."""
    position = 0
    while position + _FATBIN.size <= len(section):
        magic, _, header, size = _FATBIN.unpack_from(section, position)
        if magic != _FATBIN_MAGIC:
            position += 8
            continue
        image, position = position + header, position + header + size
        while image + _IMAGE.size <= position:
            kind, _, header, size, sm = _IMAGE.unpack_from(section, image)
            yield kind, sm
            image += header + size
