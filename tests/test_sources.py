# SPDX-License-Identifier: MIT
"""Rules of the C++ and CUDA sources that a compiler does not know."""

import re
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[1] / "plugins"
ENDINGS = {".h", ".cuh", ".cpp", ".cu"}
FILES = {str(f.relative_to(PLUGINS)): f for f in PLUGINS.rglob("*") if f.suffix in ENDINGS}

#: Folder, and the folders whose headers it may include besides its own.
MAY_INCLUDE = {
    "include/fastmqa": set(),
    "include/fastmqa/arch": set(),
    "include/fastmqa/tile": {"fastmqa/arch", "fastmqa"},
    "kernels": {"fastmqa/arch", "fastmqa/tile", "fastmqa"},
    "kernels/instantiations": {".."},
    "op": {"fastmqa"},
    "ort": {"fastmqa", "../op"},
    "trt": {"fastmqa", "../op"},
    "cpu": {"fastmqa"},
}
FRAMEWORKS = re.compile(r"NvInfer|onnxruntime|torch/|ATen|c10/|cutlass|cute/")
#: Whose headers one folder may see, and what else of the system's besides the standard library.
ADAPTORS = {"ort": "onnxruntime", "trt": "NvInfer"}
SYSTEM_OF_TRT = {"cuda_runtime_api.h", "dlfcn.h"}


def code_of(path: Path) -> str:
    """The file without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", FILES)
def test_a_file_includes_only_what_lies_below_it(name):
    folder = str(Path(name).parent)
    for bracket, included in re.findall(r'#include ([<"])([^>"]+)', code_of(FILES[name])):
        framework = FRAMEWORKS.search(included)
        assert not framework or framework[0] == ADAPTORS.get(folder), included
        if folder == "trt" and bracket == "<" and included.endswith(".h") and not framework:
            assert included in SYSTEM_OF_TRT | {"fastmqa/attention.h"}, included
        parent = str(Path(included).parent)
        if bracket == '"':
            own_folder = "." if folder != "kernels/instantiations" else ".."
            assert parent == own_folder or parent in MAY_INCLUDE[folder], included
        elif included.startswith("fastmqa/"):
            own = folder.removeprefix("include/")
            assert parent in MAY_INCLUDE[folder] | {own}, included


@pytest.mark.parametrize("name", FILES)
def test_what_the_emulation_replaces_stands_in_one_folder(name):
    code = code_of(FILES[name])
    assert "<<<" not in code, "kernels are started by launch()"
    if not name.startswith("include/fastmqa/arch/"):
        assert not re.search(r"\basm\b", code), "instructions are functions of arch/ptx.cuh"
        assert "__CUDA_ARCH__" not in code, "differences between SMs end in arch/"
        assert "extern __shared__" not in code, "shared memory is dynamic_smem()"


def test_the_contract_knows_nothing_of_cuda():
    included = re.findall(r"#include <(.+)>", FILES["include/fastmqa/attention.h"].read_text())
    assert included == ["cstddef", "cstdint"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_its_licence(name):
    assert FILES[name].read_text().startswith("// SPDX-License-Identifier: MIT\n")
