# SPDX-License-Identifier: MIT
"""The TensorRT plugin without TensorRT: its sources, compiled with `trt/driver.cpp`, from Python.

Structs are those of NvInferRuntime.h; a test compares their sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import emulated
import host_library

from fastmqa_export.kernels import Device

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins" / "trt"
OP = ROOT / "plugins" / "op"
SOURCES = ROOT / "tests" / "trt"
NAIVE = (SOURCES / "naive.cpp", ROOT / "tests" / "naive_kernels.cpp")

#: Without unique symbols, so that the library can be unloaded, as one that hides them can.
_FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror")
#: IPluginCreator, of which only 10.x's registry still speaks.
_DEPRECATED = "-Wno-deprecated-declarations"
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
ADDRESS = ("-fsanitize=address", "-fno-omit-frame-pointer")

#: Set in the process that tests run in once more: see `driver_under_test`.
UNDER_ASAN = os.environ.get("FASTMQA_TRT_DRIVER") == "asan"

BUILD, RUNTIME = 0, 1

#: nvinfer1::PluginFieldType
FIELD_TYPES = {
    **{"FLOAT16": 0, "FLOAT32": 1, "FLOAT64": 2, "INT8": 3, "INT16": 4, "INT32": 5, "CHAR": 6},
    **{"DIMS": 7, "BF16": 9, "INT64": 10},
}
#: nvinfer1::DataType
TYPES = {
    **{"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "uint8": 5, "bfloat16": 7},
    "int64": 8,
}
LINEAR = 0
CHANNELS_LAST = 8


@functools.cache
def headers() -> Path | None:
    """The folder of NvInfer.h, looked for as scripts/tensorrt_headers.sh does."""
    root = os.environ.get("TENSORRT_ROOT")
    places = [
        os.environ.get("TENSORRT_INCLUDE_DIR"),
        f"{root}/include" if root else None,
        "/usr/include",
        f"/usr/include/{platform.machine()}-linux-gnu",
        ROOT / "build" / "tensorrt" / "include",
    ]
    return next((Path(p) for p in places if p and (Path(p) / "NvInfer.h").is_file()), None)


@functools.cache
def missing() -> str | None:
    """What compiling the plugin needs and this machine lacks, or None."""
    if emulated.missing():
        return emulated.missing()
    return None if headers() else "TensorRT's headers are missing; set TENSORRT_INCLUDE_DIR"


def major_of_headers() -> int:
    """Of TensorRT."""
    text = (headers() / "NvInferVersion.h").read_text("utf-8")
    return int(re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text)[1])


def compile_library(
    sources: Sequence[Path], *flags: str, link: Sequence[str] = (), name: str
) -> Path:
    """A shared library that sees the plugin's headers, TensorRT's and CUDA's."""
    flags = (
        *(*_FLAGS, _DEPRECATED, *flags, '-DFASTMQA_KERNELS_ID="tests"'),
        *("-isystem", str(headers()), "-isystem", str(emulated.cuda_headers())),
        *("-I", str(ROOT / "plugins" / "include")),
    )
    contract = ROOT / "plugins" / "include" / "fastmqa" / "attention.h"
    seen = [*PLUGIN.glob("*.h"), *OP.glob("*.h"), contract]
    return host_library.compile_library(sources, seen, flags, (*link, "-ldl"), name=name)


def driver_library(*, under_asan: bool = UNDER_ASAN) -> Path:
    """The driver with the emulated kernels and UBSan, or with AddressSanitizer as well.

    That one cannot follow the emulation's fibers: its kernels are naive, and take float32 only.
    """
    sources = [*sorted(PLUGIN.glob("*.cpp")), *sorted(OP.glob("*.cpp")), SOURCES / "driver.cpp"]
    if under_asan:
        return compile_library([*sources, *NAIVE], *UNDEFINED, *ADDRESS, name="driver")
    kernels = emulated.build(emulated.ALL_VARIANTS)
    link = (str(kernels), f"-Wl,-rpath,{kernels.parent}")
    return compile_library(sources, *UNDEFINED, link=link, name="driver")


def fake_tensorrt() -> Path:
    """What the plugin takes for the TensorRT that it is compiled for, once it is loaded."""
    soname = f"-Wl,-soname,libnvinfer.so.{major_of_headers()}"
    return compile_library([SOURCES / "fake_tensorrt.cpp"], link=(soname,), name="fake_tensorrt")


class PluginField(ctypes.Structure):
    """Holds on to its name and data."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class PluginFieldCollection(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(PluginField))]


class Dims(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int32), ("d", ctypes.c_int64 * 8)]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Dims:
        return cls(len(sizes), (ctypes.c_int64 * 8)(*sizes))

    def sizes(self) -> tuple[int, ...]:
        return tuple(self.d[: self.rank])


class TensorDesc(ctypes.Structure):
    _fields_ = [
        ("dims", Dims),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class DynamicTensorDesc(ctypes.Structure):
    _fields_ = [("desc", TensorDesc), ("min", Dims), ("max", Dims), ("opt", Dims)]


_STRUCTS = (PluginField, PluginFieldCollection, Dims, TensorDesc, DynamicTensorDesc)

_NUMBERS = {"FLOAT32": ctypes.c_float, "INT32": ctypes.c_int32, "INT64": ctypes.c_int64}
_NUMBERS |= {"FLOAT64": ctypes.c_double, "INT8": ctypes.c_int8}


def field(name: str | None, value: Any, type_name: str = "", length: int | None = None) -> Any:
    """A field of these values (one, several, or None: a null pointer)."""
    type_name = type_name or ("FLOAT32" if name in ("scale", "softcap") else "INT32")
    values = [] if value is None else value if isinstance(value, list) else [value]
    data = (_NUMBERS.get(type_name, ctypes.c_int32) * max(1, len(values)))(*values)
    made = PluginField(
        None if name is None else name.encode(),
        None if value is None else ctypes.addressof(data),
        FIELD_TYPES[type_name],
        len(values) if length is None else length,
    )
    made.kept = data
    return made


def read_fields(collection: Any) -> dict[str, int | float]:
    """Values by name, of a collection whose fields have one each."""
    names = {number: name for name, number in FIELD_TYPES.items()}
    found = {}
    for i in range(collection.count):
        one = collection.fields[i]
        assert one.length == 1
        found[one.name.decode()] = _NUMBERS[names[one.type]].from_address(one.data).value
    return found


class Driver:
    """The library, and the GPU that it pretends to be on."""

    def __init__(self, path: Path) -> None:
        self.tensorrt: Any = ctypes.CDLL(str(fake_tensorrt()))
        self.tensorrt.logged_by_process.restype = ctypes.c_char_p
        self.library: Any = ctypes.CDLL(str(path))
        self.library.driver_give_logger(True)
        # ctypes takes a pointer for an int of 32 bits unless told.
        for name in ("create", "clone", "attach", "serialise", "field_names"):
            getattr(self.library, f"driver_{name}").restype = ctypes.c_void_p
        for name in ("workspace", "take_log", "size_of"):
            getattr(self.library, f"driver_{name}").restype = ctypes.c_size_t
        self.library.driver_name.restype = ctypes.c_char_p
        self.library.driver_supports_format.restype = ctypes.c_bool
        sizes = [self.library.driver_size_of(i) for i in range(len(_STRUCTS))]
        assert sizes == [ctypes.sizeof(struct) for struct in _STRUCTS]

    def set_device(self, sm: int, sm_count: int = 2) -> None:
        """The GPU from now on, for plugins that have not asked yet; 0: none."""
        device = Device(sm, sm_count, emulated.SHARED_BYTES.get(sm, 0))
        self.library.driver_set_device(ctypes.byref(device))

    def take_log(self) -> str:
        """What was logged since the last time."""
        text = ctypes.create_string_buffer(1 << 16)
        assert self.library.driver_take_log(text, len(text)) < len(text)
        return text.value.decode()

    def create(self, fields: Sequence[Any], phase: int = BUILD, layer: str = "a.node") -> Plugin:
        """A plugin of these fields.

        Raises:
            Refused: with the log.
        """
        array = (PluginField * max(1, len(fields)))(*fields)
        collection = PluginFieldCollection(len(fields), array)
        return self.created(
            self.library.driver_create(layer.encode(), ctypes.byref(collection), phase)
        )

    def created(self, pointer: int | None) -> Plugin:
        if not pointer:
            raise RefusedError(self.take_log())
        return Plugin(self, pointer)

    def of_attributes(self, attributes: Mapping[str, Any]) -> Plugin:
        return self.create([field(name, value) for name, value in attributes.items()])

    def field_names(self) -> list[tuple[str, int]]:
        address = self.library.driver_field_names()
        collection = PluginFieldCollection.from_address(address)
        fields = [collection.fields[i] for i in range(collection.count)]
        assert all((one.data, one.length) == (None, 1) for one in fields)
        return [(one.name.decode(), one.type) for one in fields]


@functools.cache
def _driver() -> Driver:
    return Driver(driver_library())


@contextlib.contextmanager
def driver_under_test() -> Iterator[Driver]:
    """The driver on a GPU of SM75; all that is logged must be taken."""
    driver = _driver()
    driver.set_device(75)
    driver.take_log()
    yield driver
    assert driver.take_log() == "", "what is logged is looked at"


class RefusedError(Exception):
    """What the plugin logged when it returned a failure."""


class Plugin:
    """One plugin object; freed with this one."""

    def __init__(self, driver: Driver, pointer: int) -> None:
        self.driver = driver
        self._pointer = ctypes.c_void_p(pointer)

    def __del__(self) -> None:
        self.driver.library.driver_destroy(self._pointer)

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.driver.library, f"driver_{name}")(self._pointer, *arguments)

    def _check(self, name: str, *arguments: Any) -> None:
        if self._call(name, *arguments) != 0:
            raise RefusedError(self.driver.take_log())

    def clone(self) -> Plugin:
        return self.driver.created(self._call("clone"))

    def attach(self) -> Plugin:
        return self.driver.created(self._call("attach"))

    def names(self) -> list[str]:
        """Namespace, name, version, timing cache ID, metadata."""
        return [self._call("name", i).decode() for i in range(5)]

    @property
    def outputs(self) -> int:
        return int(self._call("outputs"))

    def serialise(self) -> dict[str, int | float]:
        """What an engine stores of it."""
        address = self._call("serialise")
        if not address:
            raise RefusedError(self.driver.take_log())
        return read_fields(PluginFieldCollection.from_address(address))

    def through_an_engine(self) -> Plugin:
        """The plugin that an engine makes of this one's fields."""
        return self.driver.create([field(n, x) for n, x in self.serialise().items()], RUNTIME)

    def output_types(self, inputs: Sequence[str], count: int | None = None) -> list[str]:
        count = self.outputs if count is None else count
        made = (ctypes.c_int32 * 2)()
        given = (ctypes.c_int32 * len(inputs))(*(TYPES[name] for name in inputs))
        self._check("output_types", made, count, given, len(inputs))
        names = {number: name for name, number in TYPES.items()}
        return [names[number] for number in made[:count]]

    def output_shapes(self, inputs: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Numbers below 0 are symbols."""
        given = (Dims * len(inputs))(*map(Dims.of, inputs))
        made = (Dims * 2)()
        self._check("output_shapes", given, len(inputs), made, self.outputs)
        return [made[i].sizes() for i in range(self.outputs)]

    def supports_format(self, position: int, tensors: Sequence[DynamicTensorDesc]) -> bool:
        array = (DynamicTensorDesc * len(tensors))(*tensors)
        return bool(self._call("supports_format", position, array, 6, len(tensors) - 6))

    def configure(self, tensors: Sequence[DynamicTensorDesc]) -> None:
        self._check("configure", *_split(tensors))

    def workspace(self, tensors: Sequence[DynamicTensorDesc]) -> int:
        return int(self._call("workspace", *_split(tensors)))

    def tactics(self) -> list[int]:
        made = (ctypes.c_int32 * self._call("tactic_count"))()
        self._check("tactics", made, len(made))
        return list(made)

    def set_tactic(self, tactic: int) -> None:
        self._check("set_tactic", tactic)

    def shape_change(self, tensors: Sequence[TensorDesc]) -> None:
        self._check("shape_change", *_split(tensors))

    def enqueue(self, tensors: Sequence[TensorDesc], addresses: Sequence[int], space: int) -> None:
        """Addresses of the inputs, then of the outputs, then of the workspace."""
        inputs, _, outputs, _ = _split(tensors)
        pointers = [(ctypes.c_void_p * len(p))(*p) for p in (addresses[:6], addresses[6:])]
        self._check("enqueue", inputs, outputs, *pointers, ctypes.c_void_p(space or None))


def _split(tensors: Sequence[Any]) -> tuple[Any, int, Any, int]:
    """Arrays of inputs and of outputs, with their lengths."""
    inputs, outputs = ((type(tensors[0]) * len(t))(*t) for t in (tensors[:6], tensors[6:]))
    return inputs, len(inputs), outputs, len(outputs)
