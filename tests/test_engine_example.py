# SPDX-License-Identifier: MIT
"""The C++ example fits TensorRT's headers, links, and does on a stand-in what it says.

`fake_engine` stands for TensorRT and CUDA on host memory; TensorRT's own headers are seen by the
compiler only, and its library by the linker as two symbols.
"""

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import trt_driver

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "engines" / "examples" / "generate.cpp"
FAKE = Path(__file__).parent / "fake_engine"
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def cuda() -> Path:
    """The folder of CUDA."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    headers = emulated.cuda_headers()
    if headers is None:
        pytest.skip("needs CUDA's headers")
    return headers.parent


def compiled(*arguments: str | Path) -> None:
    command = ["g++", *STRICT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_fits_tensorrts_headers_and_links(cuda, tmp_path):
    headers = trt_driver.headers()
    if headers is None:
        pytest.skip("needs TensorRT's headers: scripts/tensorrt_headers.sh")
    runtime = sorted(cuda.glob("lib*/libcudart_static.a"))
    if not runtime:
        pytest.skip("needs CUDA's runtime library")
    stub = tmp_path / "nvinfer.cpp"
    stub.write_text('extern "C" void* createInferRuntime_INTERNAL(void*, int) { return nullptr; }')
    compiled("-shared", "-fPIC", stub, "-o", tmp_path / "libnvinfer.so")
    program = tmp_path / "generate"
    includes = ("-isystem", headers, "-isystem", cuda / "include")
    libraries = ("-L", tmp_path, "-lnvinfer", runtime[0], "-ldl", "-lpthread", "-lrt")
    rpath = f"-Wl,-rpath,{tmp_path}"
    compiled(*includes, EXAMPLE, "-o", program, *libraries, rpath)
    done = subprocess.run(
        [program, program, "x.so", "1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "Error: TensorRT cannot start\n")


@pytest.fixture(scope="module")
def program(cuda, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("example") / "generate"
    checks = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    includes = ("-I", FAKE, "-isystem", cuda / "include")
    compiled(*checks, *includes, EXAMPLE, FAKE / "cuda.cpp", "-o", path)
    return path


@pytest.fixture
def run(program, tmp_path):
    def call(plan: str, *tokens: str, plugin: str = "libfastmqa_trt.so", **environment: str):
        (tmp_path / "model.plan").write_text(plan)
        return subprocess.run(
            [program, tmp_path / "model.plan", plugin, *tokens],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )

    return call


@pytest.mark.parametrize("kind", ["float", "half"])
@pytest.mark.parametrize("prompt", [[3, 1, 4, 1, 5], [7]], ids=["prompt", "one token"])
def test_it_continues_a_prompt_with_the_cache_in_place(run, prompt, kind):
    tokens = list(prompt)
    for _ in range(16):
        tokens.append((sum(tokens) + 1) % 64)
    done = run(f"{len(tokens) - 1} 8 2 {kind}", *map(str, prompt))
    assert done.stderr == ""
    assert done.stdout.split() == [str(token) for token in tokens[len(prompt) :]]


FAILURES = {
    "a full cache": (("10 8 2", "1", "2"), "the KV cache of 10 tokens is full; build the engine"),
    "a long prompt": (("40 2 2", "1", "2", "3"), "the engine takes prompts of 2 tokens; build it"),
    "no cache": (("40 8 1", "1"), "the engine has no KV cache"),
    "a dynamic cache": (("-1 8 2", "1"), "the capacity of the KV cache is not fixed; use"),
    "no memory": (("1000000000000 8 2", "1"), "cannot allocate GPU memory: out of memory"),
    "another version": (("x", "1"), "TensorRT refuses "),
    "no number": (("40 8 2", "1", "two"), "two is no token id"),
    "an empty token": (("40 8 2", ""), " is no token id"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_wrong_is_said(run, name):
    arguments, message = FAILURES[name]
    done = run(*arguments)
    assert done.returncode == 1
    assert f"Error: {message}" in done.stderr


def test_libraries_and_files_that_are_missing(run, program, tmp_path):
    done = run("40 8 2", "1", plugin="other.so")
    assert done.stderr == "Error: no fastmqa::FusedAttention in other.so\n"
    done = run("40 8 2", "1", FAKE_NO_GPU="1")
    assert done.stderr == "Error: TensorRT cannot start\n"
    command = [program, tmp_path / "gone.plan", "libfastmqa_trt.so", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == f"Error: cannot read {tmp_path / 'gone.plan'}\n"
    done = subprocess.run(command[:2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:7]) == (2, "Usage: ")
