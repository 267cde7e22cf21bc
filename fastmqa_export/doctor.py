# SPDX-License-Identifier: MIT
"""What is installed, what is missing, and what to do about it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from fastmqa_export import plugins
from fastmqa_export.config import OP_DOMAIN, OP_NAME, OP_VERSION
from fastmqa_export.errors import KernelError, MissingDependencyError
from fastmqa_export.inspect_library import fact_sheet, name_sms
from fastmqa_export.shared_library import DeviceCode, SharedLibrary

#: Oldest onnxruntime whose CPU kernels for what exported files use were found right.
MIN_ONNXRUNTIME: Final = (1, 28)
#: The release of transformers whose attention interface and cache are hooked.
TRANSFORMERS: Final = "5.23."


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok"; "warning": works, but not as well as it could; "missing": does not work.
        detail: what was found.
        remedy: what to do; empty if nothing.
        required: whether the tool is of no use without it.
    """

    name: str
    status: Literal["ok", "warning", "missing"]
    detail: str
    remedy: str = ""
    required: bool = False


def examine() -> list[Check]:
    """Look at everything; never fails, whatever is broken."""
    checks: list[tuple[str, Callable[[], Check], bool]] = [
        ("python", _python, True),
        ("torch", _torch, True),
        *((name, _package(name), True) for name in ("onnx", "onnx_ir", "onnxscript")),
        ("polygraphy", _package("polygraphy"), True),
        ("onnxruntime", _onnxruntime, True),
        ("transformers", _transformers, False),
        *((name, _package(name, extra="hf"), False) for name in ("gguf", "accelerate")),
        ("tensorrt", _tensorrt, False),
        ("tensorrt_rtx", _package("tensorrt_rtx", extra="rtx"), False),
        ("plugin", _plugin, False),
        ("tritonclient", _package("tritonclient", extra="triton"), False),
        ("kernels", _kernels, False),
        ("cpu kernel", _cpu_kernel, False),
        ("custom op", _custom_op, False),
        ("nvcc", _nvcc, False),
        ("disk", _disk, False),
    ]
    found = []
    for name, look, required in checks:
        try:
            check = look()
        except (Exception, SystemExit) as error:  # a broken package is a finding, not a crash
            check = Check(name, "missing", f"{type(error).__name__}: {error}", "reinstall it")
        found.append(dataclasses.replace(check, required=required))
    return found


def required_missing(checks: Sequence[Check]) -> bool:
    """Whether something is missing that nothing works without."""
    return any(check.required and check.status == "missing" for check in checks)


def describe(checks: Sequence[Check]) -> str:
    """The findings for people."""
    lines = []
    for check in checks:
        status = check.status
        if status == "missing" and not check.required:
            status = "not installed (optional)"  # type: ignore[assignment]
        lines.append(f"{check.name:<13} {status}: {check.detail}")
        if check.remedy:
            lines.append(f"{'':<13} → {check.remedy}")
    return "\n".join(lines)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.prefix}")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _package(name: str, extra: str = "") -> Callable[[], Check]:
    def look() -> Check:
        install = f"pip install 'fastmqa_export{f'[{extra}]' if extra else ''}'"
        if not _has(name):
            return Check(name, "missing", "not installed", install)
        # Some print on import; a check is no place for that.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module: Any = importlib.import_module(name)
        version = getattr(module, "__version__", None) or importlib.metadata.version(name)
        return Check(name, "ok", str(version))

    return look


def _torch() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("torch", "ok", f"{torch.__version__}, no CUDA device: everything runs on CPU")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return Check("torch", "ok", f"{torch.__version__}, {name} (SM{major}{minor})")


def _onnxruntime() -> Check:
    name = "onnxruntime"
    installed = {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    install = "pip install 'fastmqa_export[cpu]', or [gpu] on a machine with an NVIDIA GPU"
    if not installed:
        return Check(name, "missing", "not installed", install)
    listed = " and ".join(f"{package} {version}" for package, version in installed.items())
    if len(installed) == 2:
        remedy = "pip uninstall both, then install the one that you need"
        return Check(name, "warning", f"{listed}: each overwrites the other's files", remedy)
    import onnxruntime

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MIN_ONNXRUNTIME:
        least = ".".join(map(str, MIN_ONNXRUNTIME))
        detail = f"{listed}: kernels before {least} give wrong numbers for some masks"
        return Check(name, "warning", detail, f"pip install '{next(iter(installed))}>={least}'")
    providers = [p.removesuffix("ExecutionProvider") for p in _usable_providers(onnxruntime)]
    return Check(name, "ok", f"{listed}, usable providers: {', '.join(providers)}")


def _usable_providers(onnxruntime: Any) -> list[str]:
    """Those that a session really gets: one that cannot start falls back to the CPU silently."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    providers: list[str] = session.get_providers()
    return providers


def _transformers() -> Check:
    name, install = "transformers", "pip install 'fastmqa_export[hf]'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed; needed for Hugging Face and GGUF", install)
    if not version.startswith(TRANSFORMERS):
        detail = f"{version}, but Hugging Face models are exported with {TRANSFORMERS}x"
        return Check(name, "warning", detail, install)
    return Check(name, "ok", version)


def _tensorrt() -> Check:
    from fastmqa_export.engine_builder import MIN_TENSORRT, MIN_TENSORRT_CACHE

    found = _package("tensorrt", extra="tensorrt")()
    if found.status != "ok":
        return found
    version = tuple(int(part) for part in found.detail.split(".")[:2])
    for least, lacks in (
        (MIN_TENSORRT, "an engine with the plugin"),
        (MIN_TENSORRT_CACHE, "an engine with a KV cache (else: export with --cache none)"),
    ):
        if version < least:
            needed = ".".join(map(str, least))
            return dataclasses.replace(
                found,
                status="warning",
                detail=f"{found.detail}, but {lacks} needs {needed}",
                remedy=f"pip install 'tensorrt>={needed}'",
            )
    return found


def _plugin() -> Check:
    name = "plugin"
    try:
        path = plugins.trt_plugin_path()
    except MissingDependencyError as error:
        return Check(name, "missing", f"engines take standard ops for attention: {error}")
    library = SharedLibrary(path)
    facts, code = fact_sheet(library), library.device_code()
    detail = f"{path}, for TensorRT {facts['tensorrt']}, code for {name_sms(code.sms)}"
    if not _runs_here(code):
        return Check(name, "warning", f"{detail}, not for this GPU", _BUILD_FOR_ALL)
    build = f"build it with that TensorRT's headers: TENSORRT_ROOT=... {plugins.build_command()}"
    if not _has("tensorrt"):
        return Check(name, "ok", f"{detail}; TensorRT is not installed, so it was not loaded")
    installed, reason = _try_to_load(_LOAD, str(path), OP_NAME, str(OP_VERSION), OP_DOMAIN)
    if reason:
        return Check(name, "warning", f"{detail}; TensorRT does not load it: {reason}", build)
    if installed.split(".")[0] != facts["tensorrt"].split(".")[0]:
        return Check(name, "warning", f"{detail}, but TensorRT {installed} is installed", build)
    return Check(name, "ok", f"{detail}; TensorRT {installed} loads it")


_LOAD: Final = """
import sys, tensorrt
path, *creator = sys.argv[1:]
registry = tensorrt.get_plugin_registry()
registry.load_library(path)
if registry.get_creator(*creator) is None:
    sys.exit("its registry finds no creator " + "::".join(creator))
print(tensorrt.__version__)
"""


def _try_to_load(code: str, *arguments: str) -> tuple[str, str]:
    """What a few lines of Python print, and why they failed; empty if they did not.

    In a process of its own, which a library that does not fit may end.
    """
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 0:
        return done.stdout.strip(), ""
    said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return "", said[0]


def _cpu_kernel() -> Check:
    name = "cpu kernel"
    try:
        library = plugins.cpu_kernels()
    except (MissingDependencyError, KernelError) as error:
        return Check(name, "missing", f"attention on the CPU takes PyTorch's operators: {error}")
    return Check(name, "ok", f"{library.path}, runs with {library.targets()[0]}")


def _custom_op() -> Check:
    name = "custom op"
    try:
        path = plugins.ort_library_path()
    except MissingDependencyError as error:
        return Check(name, "missing", f"onnxruntime runs the function in the file: {error}")
    if not _has("onnxruntime"):
        return Check(name, "ok", f"{path}; onnxruntime is not installed, so it was not loaded")
    version, reason = _try_to_load(_REGISTER, str(path))
    if reason:
        build = f"build it anew: {plugins.build_command()}"
        return Check(name, "warning", f"{path}; onnxruntime does not load it: {reason}", build)
    return Check(name, "ok", f"{path}; onnxruntime {version} loads it")


_REGISTER: Final = """
import sys, onnxruntime
onnxruntime.SessionOptions().register_custom_ops_library(sys.argv[1])
print(onnxruntime.__version__)
"""


def _kernels() -> Check:
    name = "kernels"
    try:
        library = plugins.kernel_library()
    except (MissingDependencyError, KernelError) as error:
        return Check(name, "missing", f"attention on CUDA takes PyTorch's operators: {error}")
    code = SharedLibrary(library.path).device_code()
    detail = f"{library.path}, {len(library.variants())} variants, code for {name_sms(code.sms)}"
    if not _runs_here(code):
        return Check(name, "warning", f"{detail}, not for this GPU", _BUILD_FOR_ALL)
    return Check(name, "ok", detail)


_BUILD_FOR_ALL: Final = "build it for this GPU too: scripts/build_kernels.sh 75 80 90 100 120"


def _runs_here(code: DeviceCode) -> bool:
    """False if there is a GPU, and none of the code is for it."""
    import torch

    if not torch.cuda.is_available():
        return True
    major, minor = torch.cuda.get_device_capability()
    return code.runs_on(10 * major + minor)


def _nvcc() -> Check:
    try:
        return Check("nvcc", "ok", str(plugins.find_nvcc()))
    except MissingDependencyError:
        detail = "not found; only building kernels and `kernels emit` need it"
        return Check("nvcc", "missing", detail, plugins.NVCC_REMEDY)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 5:
        return Check("disk", "warning", f"{free:.1f} GiB free here", "free some space")
    return Check("disk", "ok", f"{free:.0f} GiB free here")
