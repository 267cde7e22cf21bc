# SPDX-License-Identifier: MIT
"""One engine built by TensorRT or TensorRT-RTX, in a process of its own.

The process reads a `BuildRequest` from stdin and writes events to stdout, one JSON object a line.
Its own process, because a builder can end it: TensorRT-RTX aborts where a registered plugin matches
a node, and the system kills what takes too much memory. The Python modules ``tensorrt`` and
``tensorrt_rtx`` differ only where `BuildRequest.made_from.backend` is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from onnx import ModelProto

from fastmqa_export.config import OP_NAME
from fastmqa_export.engine_record import Ingredients, Profile
from fastmqa_export.errors import (
    ConfigError,
    EngineError,
    FastMqaError,
    MissingDependencyError,
)
from fastmqa_export.inspect import describe_value, fused_nodes, load_model
from fastmqa_export.tensorrt_log import explain, make_log
from fastmqa_export.tensorrt_plugins import load_plugins

#: What TensorRT must be at least, and what it must be for a KV cache that is written in place.
MIN_TENSORRT: Final = (10, 10)
MIN_TENSORRT_CACHE: Final = (10, 15)

#: For each backend, the Python module that builds, and what installs it.
MODULES: Final[Mapping[str, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL: Final[Mapping[str, str]] = {
    "tensorrt": (
        "pip install 'fastmqa_export[tensorrt]'; --backend tensorrt-rtx builds without a GPU"
    ),
    "tensorrt-rtx": "pip install 'fastmqa_export[rtx]'",
}

#: The smallest, best and largest shape of an input.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

#: Seconds between two progress messages.
_INTERVAL: Final = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """All that the process needs to know.

    Attributes:
        made_from: what to build.
        model: path of the ONNX file.
        plan: path of the file to write; with "tensorrt", kernel timings go to ``plan``.timing.
        plugins: paths of libraries to load before parsing.
        timings: path of kernel timings to begin with, which need not exist.
    """

    made_from: Ingredients
    model: str
    plan: str
    plugins: Sequence[str]
    timings: str

    @property
    def name(self) -> str:
        """What builds, for people."""
        return {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[self.made_from.backend]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `dataclasses.asdict` and JSON made of a request."""
        values = json.loads(text)
        return cls(**{**values, "made_from": Ingredients.from_json(values["made_from"])})


def main() -> None:
    """Build what stdin asks for; the last event is ``done`` or ``error``."""
    # Libraries that print to stdout must not write between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def emit(**event: Any) -> None:
        try:
            events.write(json.dumps(event) + "\n")
        except BrokenPipeError:  # nobody waits for the engine any more
            os._exit(1)

    try:
        version = build(BuildRequest.from_json(sys.stdin.read()), lambda text: emit(say=text))
        emit(done=version)
    except FastMqaError as error:
        emit(error=str(error), type=type(error).__name__)
    except OSError as error:
        emit(error=error.strerror or str(error), errno=error.errno)


def build(request: BuildRequest, say: Callable[[str], None]) -> str:
    """Write the plan.

    Args:
        request: what to build.
        say: is told what the builder is at.

    Returns:
        The version of TensorRT.

    Raises:
        ConfigError: if it cannot build for an SM.
        EngineError: if it refuses a plugin, the model or the build, with its reason.
        MissingDependencyError: if TensorRT is missing, or too old.
    """
    trt = _import(request)
    log = make_log(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what its binding makes of a null pointer
        raise EngineError(explain(f"{request.name} cannot start", log.messages)) from error
    if log.messages:  # TensorRT 11's binding hides the null pointer in an object
        raise EngineError(explain(f"{request.name} cannot start", log.messages))
    # After the builder, which brings the log, and before the parser, which takes what is there.
    if request.plugins:
        load_plugins(trt, request.plugins, log)
    # TensorRT 11 ignores the flag: there, types are always those of the file.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    say("parse the model")
    model = load_model(Path(request.model))
    inputs = [describe_value(value) for value in model.graph.input]
    _parse(trt, request, model, network, log)
    config = builder.create_builder_config()
    _configure(trt, request, config)
    for profile in request.made_from.profiles.values():
        _add_profile(
            request, make_shapes(inputs, profile, request.made_from.capacity), builder, config
        )
    monitor = _make_monitor(trt, say)  # a name of its own: TensorRT may not keep it alive
    config.progress_monitor = monitor
    timings = _attach_timings(request, config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(explain(f"{request.name} cannot build the engine", log.messages))
    Path(request.plan).write_bytes(plan)
    if timings is not None:
        timings_path(Path(request.plan)).write_bytes(timings.serialize())
    return str(trt.__version__)


def _import(request: BuildRequest) -> Any:
    backend = request.made_from.backend
    try:
        trt = importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise MissingDependencyError(
            f"{request.name} cannot be imported ({error}); {INSTALL[backend]}"
        ) from error
    if backend == "tensorrt":
        found = tuple(int(part) for part in trt.__version__.split(".")[:2])
        if found < MIN_TENSORRT:
            raise MissingDependencyError(
                f"TensorRT is {trt.__version__}; engines with the plugin need "
                f"{_dotted(MIN_TENSORRT)} or newer: pip install 'tensorrt>={_dotted(MIN_TENSORRT)}'"
            )
        if request.made_from.capacity is not None and found < MIN_TENSORRT_CACHE:
            raise MissingDependencyError(
                f"TensorRT is {trt.__version__}; a KV cache written in place needs "
                f"{_dotted(MIN_TENSORRT_CACHE)} or newer. Update TensorRT, or export the model "
                "with --cache none"
            )
    return trt


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _parse(trt: Any, request: BuildRequest, model: ModelProto, network: Any, log: Any) -> None:
    if request.made_from.capacity is not None:
        _make_static(model, "capacity", request.made_from.capacity)
    parser = trt.OnnxParser(network, log)
    # Given the path too, it reads weights beside the file by itself, however large they are.
    if not parser.parse(model.SerializeToString(), request.model):
        raise EngineError(_parser_errors(request, parser, log))
    if request.plugins:
        layers = (network.get_layer(i) for i in range(network.num_layers))
        taken = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
        nodes = len(fused_nodes(model))
        if taken != nodes:
            raise EngineError(
                f"TensorRT's parser took the plugin for {taken} of {nodes} {OP_NAME} nodes, and "
                "their function in standard ops for the others; update TensorRT, or build with "
                "--no-plugin"
            )


def _make_static(model: ModelProto, dimension: str, size: int) -> None:
    """Give a dimension its size, which TensorRT's layer for KV caches must know."""
    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == dimension:
                dim.dim_value = size


def _parser_errors(request: BuildRequest, parser: Any, log: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    reasons = []
    for error in errors:
        node = f"{error.node_operator()} node {error.node_name()!r}: " if error.node_name() else ""
        reasons.append(node + error.desc())
    # A reason is often only in the log.
    return explain(f"{request.name} cannot parse {request.model}", reasons or log.messages)


def _configure(trt: Any, request: BuildRequest, config: Any) -> None:
    config.set_memory_pool_limit(
        trt.MemoryPoolType.WORKSPACE, request.made_from.workspace_mib << 20
    )
    config.builder_optimization_level = request.made_from.optimization_level
    # Products of float32 are of float32, not of numbers cut to TF32's 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.made_from.backend == "tensorrt-rtx":
        _set_targets(trt, request, config)
    if request.made_from.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.plugins_to_serialize = list(request.plugins)


def _set_targets(trt: Any, request: BuildRequest, config: Any) -> None:
    """Say for which GPUs to build ahead of time."""
    sms = request.made_from.sms
    offered = {name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)}
    if unknown := [sm for sm in sms if f"SM{sm}" not in offered]:
        known = ", ".join(sorted((name[2:] for name in offered), key=int))
        raise ConfigError(
            f"{request.name} {trt.__version__} does not build for "
            f"{', '.join(f'SM{sm}' for sm in unknown)}; --sm takes {known}. For another GPU, build "
            "on it with --backend tensorrt"
        )
    config.num_compute_capabilities = len(sms)
    for i, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)


def make_shapes(
    inputs: Sequence[Mapping[str, Any]], profile: Profile, capacity: int | None
) -> dict[str, Shapes]:
    """What a profile means for each input that has a dynamic dimension.

    Args:
        inputs: name and shape of each input of a file.
        profile: sizes of the dynamic dimensions, except the capacity.
        capacity: T; None where no input has such a dimension.
    """
    sizes: dict[str, Any] = {**profile, "capacity": (capacity,) * 3}

    def shape(dims: Sequence[str | int], end: int) -> tuple[int, ...]:
        return tuple(sizes[d][end] if isinstance(d, str) else d for d in dims)

    return {
        x["name"]: (shape(x["shape"], 0), shape(x["shape"], 1), shape(x["shape"], 2))
        for x in inputs
        if any(isinstance(d, str) for d in x["shape"])
    }


def _add_profile(
    request: BuildRequest, shapes: Mapping[str, Shapes], builder: Any, config: Any
) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in shapes.items():
        profile.set_shape(name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{request.name} refuses the optimization profile {shapes}")


def timings_path(plan: Path) -> Path:
    """Where the kernel timings of a plan lie."""
    return plan.with_name(f"{plan.name}.timing")


def _attach_timings(request: BuildRequest, config: Any) -> Any:
    """The cache of kernel timings; TensorRT-RTX times nothing ahead of time, and has none."""
    if request.made_from.backend == "tensorrt-rtx":
        return None
    path = Path(request.timings)
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    # Of another GPU or version, or damaged: begin anew.
    if timings is None or not config.set_timing_cache(timings, False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _make_monitor(trt: Any, say: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of the steps of each phase; TensorRT calls it from several threads."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self.told >= _INTERVAL:
                self.told = time.monotonic()
                say(f"{phase_name}: {step + 1} of {self.steps.get(phase_name, '?')}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


if __name__ == "__main__":
    main()
