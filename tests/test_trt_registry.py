# SPDX-License-Identifier: MIT
"""The compiled plugin in TensorRT's own registry: that of the lean runtime, which needs no GPU.

In processes of their own, so that a crash is a failed test. What the registry does with a plugin
beyond creating it, `test_trt_plugin.py` does in its place.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest

from fastmqa_export import plugins
from fastmqa_export.config import OP_DOMAIN, OP_NAME, OP_VERSION
from fastmqa_export.errors import MissingDependencyError
from fastmqa_export.shared_library import SharedLibrary

#: In the process: TensorRT's `registry`, and what the tests use of it.
PRELUDE = """
import ctypes, json, sys
import numpy as np
import tensorrt_lean as trt

path, name, version, namespace = sys.argv[1:]
registry = trt.get_plugin_registry()

def found():
    return registry.get_creator(name, version, namespace)

kept = []  # what PluginField points to
def fields(**given):
    made = []
    for key, x in given.items():
        one = np.array([x], np.float32 if isinstance(x, float) else np.int32)
        kept.append(one)
        kind = "FLOAT32" if isinstance(x, float) else "INT32"
        made.append(trt.PluginField(key, one, getattr(trt.PluginFieldType, kind)))
    return trt.PluginFieldCollection(made)

def answer(**what):
    print(json.dumps(what))
"""


def major_of_lean() -> int:
    import tensorrt_lean  # installed, or the tests are skipped

    return int(tensorrt_lean.__version__.split(".")[0])


@pytest.fixture(scope="module")
def library():
    if importlib.util.find_spec("tensorrt_lean") is None:
        pytest.skip("tensorrt_lean is not installed")
    try:
        return plugins.trt_plugin_path().resolve()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def in_process(library, code: str) -> dict:
    """What the process answered, and its ``stderr``."""
    names = [OP_NAME, str(OP_VERSION), OP_DOMAIN]
    command = [sys.executable, "-c", PRELUDE + code, library, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


PROPERTIES = """
def properties(plugin):  # lets go of the interfaces before the plugin
    kinds = trt.PluginCapabilityType
    core, build, runtime = map(
        plugin.get_capability_interface, (kinds.CORE, kinds.BUILD, kinds.RUNTIME)
    )
    names = [core.plugin_name, core.plugin_version, core.plugin_namespace]
    return [*names, build.num_outputs, runtime is not None]

registry.load_library(path)
creator = found()
answers = []
node = dict(scale=0.125, layout=1)
engine = dict(is_causal=0, window_left=-1, window_right=-1, softcap=0.0, softmax_precision=1,
              v_head_size=0, op_version=1, sm_count=40, shared_bytes=65536)
for phase, more in ((trt.TensorRTPhase.BUILD, {}), (trt.TensorRTPhase.RUNTIME, engine)):
    for features in (0, 16):
        plugin = creator.create_plugin("a.node", fields(**node, **more, features=features), phase)
        answers.append(properties(plugin))
names = [(one.name, one.type.name, one.size) for one in creator.field_names]
answer(answers=answers, names=names, api=str(creator.api_language))
"""


def test_the_registry_loads_and_creates_it_in_both_phases(library):
    said = in_process(library, PROPERTIES)
    for outputs, answer in zip((1, 2, 1, 2), said["answers"], strict=True):
        assert answer == [OP_NAME, str(OP_VERSION), OP_DOMAIN, outputs, True]
    assert said["names"][0] == ["scale", "FLOAT32", 1]
    assert said["names"][-1] == ["features", "INT32", 1]
    assert said["api"] == "APILanguage.CPP"
    assert said["stderr"] == ""


REFUSED = """
registry.load_library(path)
made = [
    found().create_plugin("layers.7", fields(**given), trt.TensorRTPhase.BUILD)
    for given in ({}, {"scale": 1}, {"scale": 0.5, "features": 64})
]
answer(made=[one is not None for one in made])
"""


def test_wrong_fields_are_refused_with_a_message(library):
    """On stderr: the lean runtime has no log without a GPU."""
    said = in_process(library, REFUSED)
    assert said["made"] == [False] * 3
    expected = ["field scale is missing", "field scale is of type INT32; it must be FLOAT32"]
    expected.append("features=64 has unknown bits 0x40")
    for line, message in zip(said["stderr"].splitlines(), expected, strict=True):
        assert line.startswith(f"{OP_DOMAIN}::{OP_NAME} layers.7, createPlugin: {message}")


LOADED_TWICE = """
first = registry.load_library(path)
second = registry.load_library(path)
left = found() is not None
registry.deregister_library(first)
again = registry.load_library(path)
loaded = [one is not None for one in (first, second, again)]
answer(loaded=loaded, found=[left, found() is not None])
"""


def test_loading_it_twice_is_safe(library):
    """TensorRT refuses the second time, as it does with every plugin that it knows already."""
    said = in_process(library, LOADED_TWICE)
    assert said["loaded"] == [True, False, True]
    assert said["found"] == [True, True]


OPENED = """
opened = ctypes.CDLL(path)
before = found() is not None
loaded = registry.load_library(path)
plugin = found().create_plugin("a", fields(scale=0.5), trt.TensorRTPhase.BUILD)
answer(registered=before, loaded=loaded is not None, made=plugin is not None)
"""


def test_opening_it_registers_it_where_the_versions_agree(library):
    """As Triton Inference Server does; afterwards it can be loaded all the same.

    A library that was compiled for another major version leaves the registry alone, whose virtual
    functions it would mistake.
    """
    said = in_process(library, OPENED)
    facts = json.loads(SharedLibrary(library).section(".fastmqa_facts").rstrip(b"\0"))
    same_major = int(facts["tensorrt"].split(".")[0]) == major_of_lean()
    expected = {"registered": same_major, "loaded": True, "made": True, "stderr": ""}
    assert said == expected


def test_without_tensorrt_it_can_be_opened(library):
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).getCreators is not None)"
    command = [sys.executable, "-c", code, library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_it_shows_two_functions_and_needs_no_tensorrt(library):
    assert SharedLibrary(library).exports() == ["getCreators", "setLoggerFinder"]
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed.stdout)
    allowed = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*)\.so\.\d+"
    assert needed and all(re.fullmatch(allowed, name) for name in needed), needed
    command = ["nm", "-D", "--undefined-only", library]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    strong = [line.split()[1] for line in symbols.splitlines() if line.split()[0] == "U"]
    foreign = [name for name in strong if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)", name)]
    assert foreign == []
