# SPDX-License-Identifier: MIT
"""As much of the module `tensorrt` as an engine needs, over onnxruntime and host memory.

A plan of it names an ONNX file and profiles. A run really takes place, on the memory that was
bound, and what TensorRT refuses (a shape beyond its profile, an unbound tensor) is refused here.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__version__ = "10.15.0.1"
_HEADER = b"ftrt" + bytes(20) + bytes(int(part) for part in __version__.split("."))

DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
}

#: What a test makes it say or refuse; `calls` is (profile, {input: shape}) of each run.
calls: list[tuple[int, dict[str, tuple[int, ...]]]] = []
refusals: dict[str, str] = {}


def write_plan(
    plan: Path,
    model: Path,
    capacity: int | None,
    profiles: list[dict[str, tuple[int, int]]],
    *,
    host_code: bool = False,
) -> Path:
    """A plan for an exported file; a profile is the (min, max) of "batch" and "sequence"."""
    plan.write_bytes(
        _HEADER
        + json.dumps(
            {
                "model": str(model),
                "capacity": capacity,
                "profiles": profiles,
                "host_code": host_code,
            }
        ).encode()
    )
    return plan


class ILogger:
    ERROR = 1

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class Registry:
    creators: dict[tuple[str, str, str], object]

    def __init__(self) -> None:
        self.creators = {}

    def load_library(self, path: str) -> object | None:
        if b"FusedAttention" not in Path(path).read_bytes():
            return None
        self.creators["FusedAttention", "1", "fastmqa"] = handle = object()
        return handle

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return self.creators.get((name, version, namespace))


registry = Registry()


def get_plugin_registry() -> Registry:
    return registry


class Runtime:
    def __init__(self, log: ILogger) -> None:
        self._log = log
        self.engine_host_code_allowed = False
        if "runtime" in refusals:
            log.log(ILogger.ERROR, refusals["runtime"])

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        assert "runtime" not in refusals, "TensorRT 11 crashes here"
        if "engine" in refusals:
            self._log.log(ILogger.ERROR, refusals["engine"])
            return None
        described = json.loads(data[len(_HEADER) :])
        if described["host_code"] and not self.engine_host_code_allowed:
            self._log.log(ILogger.ERROR, "engine host code is not allowed")
            return None
        return ICudaEngine(described, self._log)


class ICudaEngine:
    def __init__(self, described: dict[str, Any], log: ILogger) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._log = log
        self._session = onnxruntime.InferenceSession(
            described["model"], options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {x.name: x for x in self._session.get_inputs()}
        self._tensors = self._inputs | {x.name: x for x in self._session.get_outputs()}
        self._capacity, self._profiles = described["capacity"], described["profiles"]
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self._tensors[name].type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        fixed = {} if self._capacity is None else {"capacity": self._capacity}
        return tuple(
            fixed.get(d, -1) if isinstance(d, str) else d for d in self._tensors[name].shape
        )

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        sizes = self._profiles[profile]
        low, high = (
            tuple(
                (self._capacity if d == "capacity" else sizes[d][end]) if isinstance(d, str) else d
                for d in self._tensors[name].shape
            )
            for end in (0, 1)
        )
        return [low, high, high]

    def get_aliased_input_tensor(self, output: str) -> str | None:
        if "alias" in refusals or not output.startswith("present."):
            return None
        return output.replace("present.", "past_key_values.")

    def create_execution_context(self) -> IExecutionContext | None:
        if "context" in refusals:
            self._log.log(ILogger.ERROR, refusals["context"])
            return None
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile = engine, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if not all(a <= x <= b for a, x, b in zip(low, shape, high, strict=True)):
            self._engine._log.log(ILogger.ERROR, f"{name}: {shape} is not in [{low}, {high}]")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine._tensors
        self._addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        sizes: dict[str, int] = {}
        for x, shape in self._shapes.items():
            named = zip(self._engine._inputs[x].shape, shape, strict=True)
            sizes.update((d, size) for d, size in named if isinstance(d, str))
        return tuple(sizes.get(d, d) for d in self._engine._tensors[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        if "run" in refusals:
            self._engine._log.log(ILogger.ERROR, refusals["run"])
            return False
        calls.append((self._profile, dict(self._shapes)))
        binding = self._engine._session.io_binding()
        for name, x in self._engine._tensors.items():
            is_input = name in self._engine._inputs
            if not is_input and (past := self._engine.get_aliased_input_tensor(name)):
                assert self._addresses[name] == self._addresses[past]
            bind = binding.bind_input if is_input else binding.bind_output
            shape = self.get_tensor_shape(name)
            bind(name, "cpu", 0, _TYPES[x.type][1], shape, self._addresses[name])
        self._engine._session.run_with_iobinding(binding)
        return True


def reset() -> None:
    """Forget what earlier tests did."""
    calls.clear()
    refusals.clear()
    registry.creators.clear()
