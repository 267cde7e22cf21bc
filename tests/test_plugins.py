# SPDX-License-Identifier: MIT
"""Where the kernels' library, their sources and nvcc are looked for, and what is said without."""

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path

import pytest
from naive import naive_library

from fastmqa_export import plugins
from fastmqa_export.errors import KernelError, MissingDependencyError


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """An installation in an empty place, with nothing set and nothing on PATH."""
    for name in ("FASTMQA_KERNELS", "FASTMQA_ORT_LIBRARY", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(plugins, "PACKAGE", tmp_path / "clone" / "fastmqa_export")
    plugins.kernel_library.cache_clear()
    yield
    plugins.kernel_library.cache_clear()


@pytest.fixture
def clone(tmp_path) -> Path:
    return tmp_path / "clone"


def put(path: Path, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(mode)
    return path


def test_the_variable_comes_before_the_wheel_and_the_wheel_before_the_build(
    clone, tmp_path, monkeypatch
):
    built = put(clone / "build" / "plugins" / "libfastmqa_kernels.so")
    assert plugins.library_path() == built
    packaged = put(clone / "fastmqa_export" / "lib" / "libfastmqa_kernels.so")
    assert plugins.library_path() == packaged
    own = put(tmp_path / "own.so")
    monkeypatch.setenv("FASTMQA_KERNELS", str(own))
    assert plugins.library_path() == own


def test_without_a_library_the_build_command_is_named(clone):
    put(clone / "plugins" / "include" / "fastmqa" / "attention.h")
    with pytest.raises(MissingDependencyError) as caught:
        plugins.kernel_library()
    text = str(caught.value)
    assert f"no {clone}/fastmqa_export/lib/libfastmqa_kernels.so" in text
    assert f"no {clone}/build/plugins/libfastmqa_kernels.so" in text
    assert "FASTMQA_KERNELS is not set" in text
    assert f"cmake -S {clone}/plugins -B {clone}/build/plugins && cmake --build" in text


def test_a_variable_that_leads_nowhere_is_not_passed_over(clone, monkeypatch):
    put(clone / "build" / "plugins" / "libfastmqa_kernels.so")
    monkeypatch.setenv("FASTMQA_KERNELS", "/nowhere.so")
    with pytest.raises(MissingDependencyError, match=r"FASTMQA_KERNELS is /nowhere\.so, which is"):
        plugins.library_path()


@pytest.mark.parametrize(
    ("find", "name", "headers"),
    [
        (plugins.cpu_library_path, "libfastmqa_cpu.so", "HWY_INCLUDE_DIR"),
        (plugins.trt_plugin_path, "libfastmqa_trt.so", "TENSORRT_ROOT"),
        (plugins.ort_library_path, "libfastmqa_ort.so", "ONNXRUNTIME_INCLUDE_DIR"),
    ],
    ids=["cpu", "trt", "ort"],
)
def test_the_other_libraries_are_found_alike(clone, find, name, headers):
    with pytest.raises(MissingDependencyError, match=rf"is not built: no .*{name}.*{headers}=..."):
        find()
    built = put(clone / "build" / "plugins" / name)
    assert find() == built


def test_the_custom_op_may_be_missing_but_not_where_the_variable_says(clone, monkeypatch):
    assert plugins.ort_library_if_built() is None
    built = put(clone / "build" / "plugins" / "libfastmqa_ort.so")
    assert plugins.ort_library_if_built() == built
    monkeypatch.setenv("FASTMQA_ORT_LIBRARY", "/nowhere.so")
    with pytest.raises(MissingDependencyError, match="FASTMQA_ORT_LIBRARY is /nowhere"):
        plugins.ort_library_if_built()


def test_the_library_is_loaded_once(monkeypatch):
    monkeypatch.setenv("FASTMQA_KERNELS", str(naive_library()))
    library = plugins.kernel_library()
    assert library is plugins.kernel_library()
    assert len(library.variants()) == 2


def test_a_broken_library_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMQA_KERNELS", str(put(tmp_path / "empty.so")))
    with pytest.raises(KernelError, match="is no library of kernels"):
        plugins.kernel_library()


def test_sources_are_those_of_the_wheel_or_of_the_clone(clone):
    with pytest.raises(MissingDependencyError, match=r"sources are missing: no .*; install"):
        plugins.sources()
    put(clone / "plugins" / "include" / "fastmqa" / "attention.h")
    assert plugins.sources() == clone / "plugins"
    put(clone / "fastmqa_export" / "kernel_sources" / "include" / "fastmqa" / "attention.h")
    assert plugins.sources() == clone / "fastmqa_export" / "kernel_sources"


def test_this_clone_has_its_sources(monkeypatch):
    monkeypatch.undo()
    assert (plugins.sources() / "kernels" / "attention.cuh").is_file()


@pytest.fixture
def no_toolkit(monkeypatch):
    """Neither packages nor a toolkit in its usual place: a machine may have them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    real = plugins._nvcc_places
    usual = Path("/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(plugins, "_nvcc_places", lambda: (p for p in real() if p != usual))
    monkeypatch.setattr(shutil, "which", lambda name: name if Path(name).is_file() else None)


def test_nvcc_where_it_is_looked_for(no_toolkit, tmp_path, monkeypatch):
    with pytest.raises(MissingDependencyError) as caught:
        plugins.find_nvcc()
    assert 'pip install "cuda-toolkit[nvcc,cudart,cccl]"' in str(caught.value)

    wheel = put(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", 0o755)
    package = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path / "nvidia")]
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": package}.get)
    assert plugins.find_nvcc() == wheel
    older = put(tmp_path / "nvidia" / "cuda_nvcc" / "bin" / "nvcc", 0o755)
    wheel.chmod(0o644)
    assert plugins.find_nvcc() == older

    home = put(tmp_path / "cuda" / "bin" / "nvcc", 0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert plugins.find_nvcc() == home
    monkeypatch.setattr(shutil, "which", {"nvcc": "/on/path/nvcc"}.get)
    assert plugins.find_nvcc() == Path("/on/path/nvcc")
    monkeypatch.setattr(shutil, "which", {"nvcc": "/on/path/nvcc", "mine": "/mine"}.get)
    monkeypatch.setenv("CUDACXX", "mine")
    assert plugins.find_nvcc() == Path("/mine")
    monkeypatch.setenv("CUDACXX", "gone")
    with pytest.raises(MissingDependencyError, match="CUDACXX is gone, which is no program"):
        plugins.find_nvcc()
