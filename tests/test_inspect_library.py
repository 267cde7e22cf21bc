# SPDX-License-Identifier: MIT
"""Libraries are read without being run: sections, exports, CUDA code, the plugin's fact sheet."""

import dataclasses
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from fakes import FACTS, compile_library, fake_plugin
from naive import compile_cpp, naive_library

from fastmqa_export import plugins
from fastmqa_export.config import OP_DOMAIN, OP_NAME, OP_VERSION, AttentionAttributes
from fastmqa_export.errors import MissingDependencyError, ModelFileError
from fastmqa_export.inspect_any import inspect_any
from fastmqa_export.inspect_library import fact_sheet, inspect_library
from fastmqa_export.shared_library import DeviceCode, SharedLibrary

ROOT = Path(__file__).parent.parent


def fatbin(*images: tuple[int, int], padding: int = 0) -> bytes:
    """A container of nvcc's, with images of (kind, compute capability) that hold nothing."""
    body = b"".join(
        struct.pack("<HHIQ12xI", kind, 0x101, 64, 24, sm) + bytes(32 + 24) for kind, sm in images
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + bytes(padding)


def test_the_cuda_code_of_a_library(tmp_path):
    section = fatbin((2, 75)) + fatbin((2, 80), (1, 80), padding=8) + fatbin((2, 80))
    array = f"alignas(8) const unsigned char k[] = {{{', '.join(map(str, section))}}};"
    library = compile_library(
        tmp_path / "l.so",
        f'[[gnu::section(".nv_fatbin"), gnu::used]] {array}',
    )
    assert SharedLibrary(library).device_code() == DeviceCode(sms=(75, 80), ptx=(80,))


@pytest.mark.parametrize(
    ("sm", "runs"), [(70, False), (75, True), (80, True), (89, True), (90, False), (120, True)]
)
def test_which_gpus_run_it(sm, runs):
    """SM80's code on SM89, PTX of SM100 on what comes later, nothing on another major version."""
    assert DeviceCode(sms=(75, 80), ptx=(100,)).runs_on(sm) is runs


def test_the_library_of_kernels_has_code_for_what_it_was_built_for():
    try:
        library = plugins.library_path()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    cache = library.parent / "CMakeCache.txt"
    if not cache.is_file():
        pytest.skip(f"{library} was not built by CMake here")
    (sms,) = re.findall(r"^FASTMQA_SMS:STRING=(.*)$", cache.read_text(), re.MULTILINE)
    info, text = inspect_any(library)
    assert info["sms"] == sorted(map(int, sms.split(";")))
    assert info["kind"] == "CUDA kernels"
    assert len(info["variants"]) > 50
    assert "float16 from SM75 on, D/V: 32/32, 64/64" in text


def test_kernels_without_cuda_code():
    info = inspect_library(naive_library())
    assert (info["sms"], info["ptx"], len(info["variants"])) == ([], [], 2)


def test_the_plugin(tmp_path):
    path = fake_plugin(tmp_path / "plugin.so")
    info, text = inspect_any(path)
    assert info["kind"] == "TensorRT plugin"
    assert info["bytes"] == path.stat().st_size
    assert info["plugin"] == FACTS
    assert "creator: fastmqa::FusedAttention, version 1, compiled for TensorRT 10.14.1" in text
    assert "  scale: FLOAT32\n  features: INT32" in text


def test_the_plugins_fact_sheet_states_the_contract(tmp_path):
    """The very file of the plugin, compiled alone."""
    include = ROOT / "build" / "tensorrt" / "include"
    cuda = Path("/usr/local/cuda/include")
    if not (include / "NvInferVersion.h").is_file() or not cuda.is_dir():
        pytest.skip("needs TensorRT's headers (scripts/tensorrt_headers.sh) and CUDA's")
    flags = [f"-I{ROOT / 'plugins' / 'include'}", f"-isystem{include}", f"-isystem{cuda}"]
    source = ROOT / "plugins" / "trt" / "fact_sheet.cpp"
    path = compile_cpp(source, tmp_path / "facts.so", "-std=c++20", "-shared", "-fPIC", *flags)
    types = {"float": "FLOAT32", "int": "INT32"}
    version = (include / "NvInferVersion.h").read_text(encoding="utf-8")
    numbers = re.findall(r"#define TRT_(?:MAJOR|MINOR|PATCH)_ENTERPRISE (\d+)", version)
    assert fact_sheet(SharedLibrary(path)) == {
        "name": OP_NAME,
        "version": str(OP_VERSION),
        "namespace": OP_DOMAIN,
        "tensorrt": ".".join(numbers),
        "fields": {
            field.name: types[str(field.type)] for field in dataclasses.fields(AttentionAttributes)
        },
    }


def test_the_plugin_that_is_built():
    try:
        path = plugins.trt_plugin_path()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    info = inspect_library(path)
    assert info["plugin"]["name"] == OP_NAME
    assert info["sms"] == inspect_library(plugins.library_path())["sms"]


def test_exports_are_what_nm_prints(tmp_path):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    for library in (naive_library(), fake_plugin(tmp_path / "plugin.so")):
        command = ["nm", "-D", "--defined-only", "--format=just-symbols", library]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = {name.partition("@")[0] for name in printed.split()}
        assert set(SharedLibrary(library).exports()) == names


def test_other_libraries(tmp_path):
    other = compile_library(tmp_path / "other.so", 'extern "C" void f() {}')
    with pytest.raises(ModelFileError, match="none of fastmqa_export: it exports none of getCr"):
        inspect_library(other)
    plugin = fake_plugin(tmp_path / "theirs.so", section=".theirs")
    with pytest.raises(ModelFileError, match=r"it has no section \.fastmqa_facts"):
        inspect_library(plugin)


@pytest.mark.parametrize("kept", [5, 40, 64, 2000, -1])
def test_a_library_that_is_cut_short(kept, tmp_path):
    content = fake_plugin(tmp_path / "plugin.so").read_bytes()
    (tmp_path / "cut.so").write_bytes(content[:kept])
    with pytest.raises(ModelFileError, match="no library for 64-bit Linux, or is cut short"):
        SharedLibrary(tmp_path / "cut.so")


def test_no_library_at_all(tmp_path):
    (tmp_path / "l.so").write_bytes(b"MZ, a library for Windows")
    with pytest.raises(ModelFileError, match=r"it begins with b'MZ, '"):
        SharedLibrary(tmp_path / "l.so")
    with pytest.raises(ModelFileError, match="No such file"):
        SharedLibrary(tmp_path / "gone.so")
