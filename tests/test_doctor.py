# SPDX-License-Identifier: MIT
"""`doctor` finds what is missing or too old, and never fails itself."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest
from naive import naive_library

from fastmqa_export import doctor, plugins
from fastmqa_export.doctor import describe, examine, required_missing


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
    assert found.detail == f"{naive_library()}, 2 variants, for SM75 and SM80 onwards"


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
