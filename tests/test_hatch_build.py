# SPDX-License-Identifier: MIT
"""What a wheel gets: the libraries where the machine can compile them, and a note in any case."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]

#: In the place of CMake: writes the libraries that the variable names, or fails.
CMAKE = """#!/bin/sh
case $1 in
  -S) echo "-- The TensorRT plugin: headers of 10.14" && echo "-- onnxruntime's API 21"
    printf '%s ' "$@" >"$4/configured" ;;
  *) for name in $LIBRARIES; do echo built >"$2/$name" || exit; done ;;
esac
[ -n "$LIBRARIES" ] || { echo "no room" >&2 && exit 1; }
"""


@pytest.fixture
def hook(monkeypatch, tmp_path):
    """The build hook, without hatchling, on a machine with only what is put into ``tmp_path``."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = SimpleNamespace
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "FASTMQA_BUILD_LIBRARIES", "FASTMQA_SMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "bin").mkdir()
    return module.Libraries(root=str(ROOT))


def put(path: Path, text: str = "#!/bin/sh\n") -> None:
    path.write_text(text)
    path.chmod(0o755)


def build(hook, version="standard"):
    data = {"force_include": {}}
    hook.initialize(version, data)
    return data, {Path(place).name: Path(file) for file, place in data["force_include"].items()}


def test_without_nvcc_the_wheel_is_pure_and_says_why(hook):
    data, files = build(hook)
    assert list(files) == ["built.txt"]
    assert (
        files["built.txt"].read_text().startswith("no library was compiled at installation: nvcc")
    )
    assert "tag" not in data and hook.dependencies() == []
    hook.finalize("standard", data, "")
    assert not files["built.txt"].exists()


def test_a_variable_leaves_the_libraries_out(hook, tmp_path, monkeypatch):
    put(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("FASTMQA_BUILD_LIBRARIES", "0")
    assert list(build(hook)[1]) == ["built.txt"]


def test_an_editable_installation_compiles_nothing(hook, tmp_path):
    put(tmp_path / "bin" / "nvcc")
    data, files = build(hook, "editable")
    assert not files and "tag" not in data
    hook.finalize("editable", data, "")


@pytest.mark.parametrize(
    "made",
    [
        ("libfastmqa_kernels.so",),
        ("libfastmqa_kernels.so", "libfastmqa_trt.so"),
        ("libfastmqa_cpu.so", "libfastmqa_kernels.so", "libfastmqa_ort.so"),
    ],
)
def test_what_was_compiled_is_in_the_wheel(hook, tmp_path, monkeypatch, made):
    put(tmp_path / "bin" / "nvcc")
    put(tmp_path / "bin" / "cmake", CMAKE)
    monkeypatch.setenv("LIBRARIES", " ".join(made))
    monkeypatch.setenv("FASTMQA_SMS", "75;86")
    data, files = build(hook)
    assert sorted(files) == ["built.txt", *made]
    assert data["tag"].startswith("py3-none-linux_") and not data["pure_python"]
    assert "-DFASTMQA_SMS=75;86" in (files["built.txt"].parent / "configured").read_text()
    note = files["built.txt"].read_text()
    assert note.endswith("The TensorRT plugin: headers of 10.14\nonnxruntime's API 21\n")
    assert "cmake>=3.25" in hook.dependencies()


def test_a_compiler_that_fails_ends_the_installation(hook, tmp_path, monkeypatch):
    put(tmp_path / "bin" / "nvcc")
    put(tmp_path / "bin" / "cmake", CMAKE)
    monkeypatch.setenv("LIBRARIES", "")
    with pytest.raises(RuntimeError, match="FASTMQA_BUILD_LIBRARIES=0 installs without"):
        build(hook)
