# SPDX-License-Identifier: MIT
"""A stand-in for NVIDIA's module ``tensorrt``: writes down what it is asked, and builds nothing.

Its classes have the names of the real ones, and no more attributes than those have; a test compares
the two. $RECORDING names the file that the calls go to, one JSON array a line, and $BEHAVIOUR holds
a JSON object with what it is to do.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import onnx

_DEFAULTS = {
    "version": "10.16.1.11",
    "creator": True,  # whether the plugin library holds one
    "log_load": [],  # errors that are logged when it is loaded
    "taken": None,  # nodes that the plugin is taken for; null: all
    "parser_errors": [],  # [operator, node, reason]
    "log": [],  # errors that are logged before the build ends
    "end": "plan",  # or "none", "full disk", "abort", "kill", "sleep", "steps", "exception"
    "fresh_timings": False,  # refuses those that it is given
}
_behaviour = _DEFAULTS | json.loads(os.environ["BEHAVIOUR"])

__version__ = _behaviour["version"]


def _note(*call: Any) -> None:
    with Path(os.environ["RECORDING"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


class _Recorded:
    """Notes what its attributes are set to, and has no others than the class names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        is_plain = isinstance(value, int | float | str | list | tuple)
        _note(name, value if is_plain else type(value).__name__)
        object.__setattr__(self, name, value)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    _registered: Any = None  # the first builder's, as in TensorRT: before it, nothing is logged


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class LayerType(enum.Enum):
    PLUGIN_V3 = enum.auto()
    MATRIX_MULTIPLY = enum.auto()


class MemoryPoolType(enum.Enum):
    WORKSPACE = enum.auto()


class BuilderFlag(enum.Enum):
    TF32 = enum.auto()
    VERSION_COMPATIBLE = enum.auto()


class IPluginRegistry:
    def load_library(self, plugin_path: str) -> None:
        _note("load_library", plugin_path)
        for message in _behaviour["log_load"] if ILogger._registered else ():
            ILogger._registered.log(ILogger.ERROR, message)

    def get_creator(self, type: str, version: str, plugin_namespace: str) -> object | None:
        _note("get_creator", type, version, plugin_namespace)
        return object() if _behaviour["creator"] else None


def get_plugin_registry() -> IPluginRegistry:
    return IPluginRegistry()


class ILayer:
    type = LayerType.MATRIX_MULTIPLY


class INetworkDefinition:
    num_layers = 0

    def get_layer(self, index: int) -> ILayer:
        layer = ILayer()
        if index < _behaviour["taken"]:
            layer.type = LayerType.PLUGIN_V3
        return layer


class IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        _note("set_shape", input, min, opt, max)


class ITimingCache:
    def serialize(self) -> bytes:
        return b"timings of the stand-in"


class IBuilderConfig(_Recorded):
    builder_optimization_level = None
    plugins_to_serialize = None
    progress_monitor = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        _note("set_memory_pool_limit", pool.name, pool_size)

    def set_flag(self, flag: BuilderFlag) -> None:
        _note("set_flag", flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        _note("clear_flag", flag.name)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        _note("add_optimization_profile")
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        _note("create_timing_cache", serialized_timing_cache.decode())
        return ITimingCache()

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        refused, _behaviour["fresh_timings"] = _behaviour["fresh_timings"], False
        return not refused


class Builder:
    def __init__(self, logger: Any) -> None:
        ILogger._registered = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        _note("create_network", flags)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        _note("build_serialized_network", os.getpid())
        config.progress_monitor.phase_start("Timing", None, 2)
        config.progress_monitor.step_complete("Timing", 0)
        config.progress_monitor.phase_finish("Timing")
        for message in _behaviour["log"]:
            ILogger._registered.log(ILogger.ERROR, message)
        ILogger._registered.log(ILogger.WARNING, "a warning that nobody asked for")
        match _behaviour["end"]:
            case "none":
                return None
            case "full disk":
                raise OSError(28, "No space left on device")
            case "abort":
                print("terminate called after throwing an instance", file=sys.stderr, flush=True)
                os.abort()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                time.sleep(60)
            case "steps":
                for step in range(600):
                    config.progress_monitor.step_complete("Timing", step)
                    time.sleep(0.1)
            case "exception":
                raise ValueError("a defect of ours")
        return b"plan of the stand-in"


class ParserError:
    def __init__(self, operator: str, name: str, reason: str) -> None:
        self.node_operator = lambda: operator
        self.node_name = lambda: name
        self.desc = lambda: reason


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network

    def parse(self, model: bytes, path: str) -> bool:
        graph = onnx.load_from_string(model).graph
        dims = {
            x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
            for x in (*graph.input, *graph.output)
        }
        _note("parse", path, dims)
        nodes = sum(node.op_type == "FusedAttention" for node in graph.node)
        if _behaviour["taken"] is None:
            _behaviour["taken"] = nodes
        self._network.num_layers = nodes + 1
        return not _behaviour["parser_errors"]

    @property
    def num_errors(self) -> int:
        return len(_behaviour["parser_errors"])

    def get_error(self, index: int) -> ParserError:
        return ParserError(*_behaviour["parser_errors"][index])
