# SPDX-License-Identifier: MIT
"""An engine loaded by TensorRT, with one execution context for each of its profiles.

Everything runs on the CUDA stream that PyTorch works on, so that its tensors can be bound as they
are. CUDA graphs and streams of its own wait until a GPU with TensorRT has run this.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastmqa_export import plugins
from fastmqa_export.engine_builder import INSTALL, MODULES
from fastmqa_export.engine_record import EngineRecord, check_engine
from fastmqa_export.errors import ConfigError, EngineError, MissingDependencyError
from fastmqa_export.plan_header import PlanHeader, read_header
from fastmqa_export.tensorrt_log import explain, make_log
from fastmqa_export.tensorrt_plugins import load_plugins

#: TensorRT's names of the types that exported files have.
_DTYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}


class EngineSession:
    """An engine, ready to run.

    Args:
        plan: the engine's file.
        plugin: the plugin library; None: where `fastmqa_export.plugins` finds it, if the record
            beside the engine says that it needs one.
        model: the ONNX file that the engine must have been built from; None: not checked.
        allow_host_code: run the code for the CPU that a version-compatible engine carries. It can
            do what its author wanted; allow it only for engines of people whom you trust.
        device: where tensors lie; TensorRT reads "cuda".

    Attributes:
        label: what runs it, for tables.
        input_names: in the engine's order, like ``output_names``.
        profiles: how many there are.

    Raises:
        EngineError: if the plan is damaged, stale, or refused by TensorRT, with its reason.
        ConfigError: if a plugin is given for an engine that takes none.
        MissingDependencyError: without TensorRT, or without the plugin that the engine needs.
    """

    def __init__(
        self,
        plan: Path,
        *,
        plugin: Path | None = None,
        model: Path | None = None,
        allow_host_code: bool = False,
        device: torch.device | str = "cuda",
    ) -> None:
        record, header = check_engine(plan, model), read_header(plan)
        self._name = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[header.backend]
        self.plan, self.device = plan, torch.device(device)
        self.label = f"{self._name} engine"
        library = _plugin(header, record, plugin)
        trt = self._import(header.backend)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"{plan} needs a GPU, and PyTorch finds no CUDA device here: check nvidia-smi"
            )
        self._log = make_log(trt)
        runtime = create_runtime(trt, self._log)
        if allow_host_code:
            runtime.engine_host_code_allowed = True
        if library is not None:
            load_plugins(trt, [str(library)], self._log)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise self._error(
                f"{self._name} {trt.__version__} refuses {plan}, which version {header.version} "
                "built"
            )
        # The engine lives no longer than its runtime, nor a context than its engine.
        self._runtime, self._engine = runtime, engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self.input_names = [name for name in names if name in inputs]
        self.output_names = [name for name in names if name not in inputs]
        self.profiles: int = engine.num_optimization_profiles
        self._contexts = [self._create_context(i) for i in range(self.profiles)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output; −1 where it is dynamic."""
        return tuple(self._engine.get_tensor_shape(name))

    def dtype(self, name: str) -> torch.dtype:
        """The type of an input or output."""
        found = self._engine.get_tensor_dtype(name).name
        if found not in _DTYPES:
            raise EngineError(
                f"{name} of {self.plan} is {found}; engines of exported files have "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[found]

    def limits(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input in a profile."""
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)

    def alias(self, output: str) -> str | None:
        """The input whose buffer an output is written to, None if it has one of its own."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):  # TensorRT before 10.15
            return None
        name: str | None = self._engine.get_aliased_input_tensor(output)
        return name

    def run(
        self, profile: int, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Enqueue one run.

        Args:
            profile: whose context runs it; all shapes must lie within its limits.
            inputs: every input, contiguous, on the device.
            buffers: outputs that are written to these tensors; the others get new ones.

        Returns:
            All outputs. Reading them waits for the run.

        Raises:
            EngineError: if TensorRT refuses a shape or the run.
        """
        context = self._contexts[profile]
        self._log.messages.clear()
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._error(f"{name} of {self.plan} cannot be {tuple(tensor.shape)}")
            context.set_tensor_address(name, tensor.data_ptr())
        if missing := context.infer_shapes():
            raise self._error(f"{self.plan} needs {', '.join(missing)}, which were not given")
        outputs = {}
        for name in self.output_names:
            outputs[name] = (
                buffers[name]
                if name in buffers
                else torch.empty(
                    tuple(context.get_tensor_shape(name)),
                    dtype=self.dtype(name),
                    device=self.device,
                )
            )
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(self._stream()):
            raise self._error(f"{self.plan} cannot be run")
        return outputs

    def _import(self, backend: str) -> Any:
        try:
            return importlib.import_module(MODULES[backend])
        except ImportError as error:
            raise MissingDependencyError(
                f"{self._name}, which runs {self.plan}, cannot be imported ({error}); "
                f"{INSTALL[backend]}"
            ) from error

    def _create_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream()):
            raise self._error(f"no execution context for profile {profile} of {self.plan}")
        return context

    def _stream(self) -> int:
        """The handle of the stream that PyTorch works on; 0 off the GPU."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _error(self, what: str) -> EngineError:
        return EngineError(explain(what, self._log.messages))


def create_runtime(trt: Any, log: Any) -> Any:
    """TensorRT's runtime.

    Raises:
        EngineError: if it cannot start, as without a driver.
    """
    what = f"{trt.__name__} {trt.__version__} cannot start"
    try:
        runtime = trt.Runtime(log)
    except TypeError as error:  # what its binding makes of a null pointer
        raise EngineError(explain(what, log.messages)) from error
    # TensorRT 11's binding gives an object around the null pointer, which must not be touched.
    if log.messages:
        raise EngineError(explain(what, log.messages))
    return runtime


def _plugin(header: PlanHeader, record: EngineRecord | None, given: Path | None) -> Path | None:
    """The library to load before the engine, None if it needs none."""
    if given is not None:
        if header.backend != "tensorrt":
            raise ConfigError(
                f"a plugin library is given ({given}), but {header.backend} takes no plugins; "
                "leave it out"
            )
        if not given.is_file():
            raise MissingDependencyError(
                f"the plugin library {given} does not exist; build it: {plugins.build_command()}"
            )
        return given
    made_from = record.made_from if record else None
    if made_from and made_from.plugins and not made_from.version_compatible:
        return plugins.trt_plugin_path()
    return None
