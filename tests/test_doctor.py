# SPDX-License-Identifier: MIT
"""`doctor` finds what is missing or too old, and never fails itself."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from fakes import fake_plugin
from naive import naive_library

from fastmqa_export import doctor, plugins
from fastmqa_export.doctor import describe, examine, required_missing
from fastmqa_export.errors import MissingDependencyError


def check(name: str) -> doctor.Check:
    return next(check for check in examine() if check.name == name)


@pytest.fixture
def installed(monkeypatch):
    """Pretends other versions: a name to a version, None for not installed."""

    def pretend(**versions):
        real = importlib.metadata.version

        def version(name):
            key = name.replace("-", "_")
            if key not in versions:
                return real(name)
            if versions[key] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[key]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_this_environment_has_what_is_needed():
    checks = examine()
    assert not required_missing(checks)
    text = describe(checks)
    for name in ("torch", "onnxruntime", "transformers", "polygraphy"):
        assert name in text


def test_no_onnxruntime(installed):
    installed(onnxruntime=None, onnxruntime_gpu=None)
    found = check("onnxruntime")
    assert found.status == "missing"
    assert "fastmqa_export[cpu]" in found.remedy
    assert required_missing(examine())


def test_both_onnxruntimes(installed):
    installed(onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    found = check("onnxruntime")
    assert found.status == "warning"
    assert "overwrites the other's files" in found.detail


def test_an_old_onnxruntime(installed, monkeypatch):
    installed(onnxruntime="1.23.2", onnxruntime_gpu=None)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(__version__="1.23.2"))
    found = check("onnxruntime")
    assert found.status == "warning"
    assert ">=1.28" in found.remedy


def test_cuda_that_is_listed_but_cannot_start(monkeypatch):
    """The session falls back to the CPU without a word; `doctor` looks at what it got."""
    session = types.SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    fake = types.SimpleNamespace(
        __version__="1.32.0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=types.SimpleNamespace,
        InferenceSession=lambda *_: session,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    assert check("onnxruntime").detail.endswith("usable providers: CPU")


@pytest.mark.parametrize(
    ("version", "status"), [("5.23.1", "ok"), ("5.24.0", "warning"), (None, "missing")]
)
def test_transformers_must_be_the_release_that_is_hooked(installed, version, status):
    installed(transformers=version)
    assert check("transformers").status == status


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_a_package_that_breaks_on_import_is_a_finding(error, monkeypatch):
    def broken(name):
        raise error("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = check("onnxscript")
    assert found.status == "missing"
    assert "libfoo.so" in found.detail


def test_a_package_that_does_not_say_its_version():
    assert check("gguf").detail == importlib.metadata.version("gguf")


def test_optional_packages_do_not_fail_the_whole(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    checks = examine()
    assert check("gguf").status == "missing"
    assert not required_missing(checks)
    assert "optional" in describe(checks)


@pytest.fixture
def kernels(monkeypatch):
    """Chooses the library of kernels."""

    def choose(path):
        monkeypatch.setenv("FASTMQA_KERNELS", str(path))

    plugins.kernel_library.cache_clear()
    yield choose
    plugins.kernel_library.cache_clear()


def test_the_library_of_kernels(kernels, tmp_path):
    kernels(naive_library())
    found = check("kernels")
    assert found.status == "ok"
    assert found.detail == f"{naive_library()}, 2 variants, code for no GPU"


def test_libraries_without_code_for_the_gpu(kernels, plugin, monkeypatch):
    kernels(naive_library())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    for name in ("kernels", "plugin"):
        found = check(name)
        assert found.status == "warning"
        assert found.detail.endswith("code for no GPU, not for this GPU")
        assert "scripts/build_kernels.sh" in found.remedy


def test_no_library_of_kernels(kernels, tmp_path):
    kernels(tmp_path / "gone.so")
    found = check("kernels")
    assert found.status == "missing" and not found.required
    assert "CUDA takes PyTorch's operators" in found.detail
    assert "gone.so, which is no file; build the library (cmake -S " in found.detail


def test_a_library_of_kernels_that_does_not_load(kernels, tmp_path):
    (tmp_path / "broken.so").touch()
    kernels(tmp_path / "broken.so")
    assert "broken.so is no library of kernels" in check("kernels").detail


def test_nvcc(monkeypatch):
    monkeypatch.setenv("CUDACXX", sys.executable)
    assert check("nvcc").detail == sys.executable
    monkeypatch.setenv("CUDACXX", "gone")
    assert "cuda-toolkit[nvcc,cudart,cccl]" in check("nvcc").remedy


def test_examining_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastmqa_export.doctor import examine\n"
        "print(next(check for check in examine() if check.name == 'torch').status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "missing\n", done.stderr


@pytest.mark.parametrize(
    ("version", "status", "detail"),
    [
        ("10.9.0", "warning", "10.9.0, but an engine with the plugin needs 10.10"),
        ("10.14.1", "warning", "an engine with a KV cache (else: export with --cache none)"),
        ("11.4.0", "ok", "11.4.0"),
    ],
)
def test_what_a_tensorrt_can_do(version, status, detail, tensorrt):
    tensorrt(version)
    found = check("tensorrt")
    assert found.status == status
    assert detail in found.detail


def test_no_plugin(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMQA_TRT_PLUGIN", str(tmp_path / "gone.so"))
    found = check("plugin")
    assert found.status == "missing" and not found.required
    assert "gone.so, which is no file" in found.detail


@pytest.fixture
def tensorrt(tmp_path, monkeypatch):
    """A package `tensorrt` of some version, for this process and others.

    Its registry finds the creator or not, or loading a library ends the process.
    """

    def pretend(version: str, registry: str = "found = 1") -> None:
        (tmp_path / "tensorrt.py").write_text(
            f"import os\n__version__ = {version!r}\nclass get_plugin_registry:\n"
            f"    {registry}\n"
            "    def load_library(self, path): getattr(self, 'crash', id)(3)\n"
            "    def get_creator(self, *names): return self.found\n"
        )

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield pretend
    sys.modules.pop("tensorrt", None)


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    path = fake_plugin(tmp_path / "plugin.so")  # compiled for TensorRT 10.14.1
    monkeypatch.setenv("FASTMQA_TRT_PLUGIN", str(path))
    return path


def test_a_plugin_without_tensorrt(plugin, monkeypatch):
    monkeypatch.setattr(doctor, "_has", lambda name: False)
    found = check("plugin")
    assert found.status == "ok"
    assert found.detail.startswith(f"{plugin}, for TensorRT 10.14.1")
    assert found.detail.endswith("TensorRT is not installed, so it was not loaded")


@pytest.mark.parametrize(
    ("version", "registry", "status", "detail"),
    [
        ("10.15.0", "found = 1", "ok", "; TensorRT 10.15.0 loads it"),
        ("11.4.0", "found = 1", "warning", ", but TensorRT 11.4.0 is installed"),
        ("10.15.0", "found = None", "warning", "finds no creator FusedAttention::1::fastmqa"),
        ("10.15.0", "crash = os._exit", "warning", "TensorRT does not load it: exit code 3"),
    ],
)
def test_a_plugin_and_a_tensorrt(version, registry, status, detail, tensorrt, plugin):
    tensorrt(version, registry)
    found = check("plugin")
    assert found.status == status
    assert detail in found.detail
    assert bool(found.remedy) == (status == "warning")


def test_a_plugin_of_somebody_else(tmp_path, monkeypatch):
    path = fake_plugin(tmp_path / "plugin.so", section=".theirs")
    monkeypatch.setenv("FASTMQA_TRT_PLUGIN", str(path))
    assert "none of fastmqa_export" in check("plugin").detail


def test_known_failures_are_explained(runner):
    from fastmqa_export.cli import main

    text = runner.invoke(main, ["doctor", "--explain"]).stdout
    for sign in ("TensorScatter(24)", "FP32 GEMM", "48 KB", "plugin_namespace", "Triton"):
        assert sign in text
    listed = json.loads(runner.invoke(main, ["doctor", "--explain", "--json"]).stdout)
    assert len(listed) == text.count("→")
    assert all(entry["remedy"] and entry["cause"] for entry in listed)


@pytest.mark.parametrize(
    ("name", "variable", "words"),
    [
        ("custom op", "FASTMQA_ORT_LIBRARY", "onnxruntime runs the function in the file"),
        ("cpu kernel", "FASTMQA_CPU_KERNELS", "attention on the CPU takes PyTorch's operators"),
    ],
)
def test_no_library_for_the_cpu(name, variable, words, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, str(tmp_path / "gone.so"))
    plugins.cpu_kernels.cache_clear()
    found = check(name)
    plugins.cpu_kernels.cache_clear()
    assert found.status == "missing" and not found.required
    assert found.detail.startswith(words) and "gone.so, which is no file" in found.detail


def test_a_custom_op_that_onnxruntime_does_not_load(monkeypatch):
    monkeypatch.setenv("FASTMQA_ORT_LIBRARY", str(naive_library()))
    found = check("custom op")
    assert found.status == "warning" and "RegisterCustomOps" in found.detail
    assert found.remedy.startswith("build it anew: cmake -S ")


def test_the_custom_op_that_was_built():
    try:
        path = plugins.ort_library_path()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    found = check("custom op")
    assert (found.status, found.detail.split(";")[0]) == ("ok", str(path))
