# SPDX-License-Identifier: MIT
"""onnxruntime-gpu's own CUDA provider with our node, by hand, on a machine without a GPU.

    pip install --no-deps --target FOLDER onnxruntime-gpu
    python tests/ort/cuda_provider.py FOLDER

Libraries of the CUDA toolkit's names take the host's memory for the GPU's, copy there and do
nothing else. With them the provider starts, and its choice of nodes, its streams and its allocators
are its own. Our library is then asked which provider its node is given to, and the one with
emulated kernels (`cuda_on_host.cpp`) runs cases.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Functions of which more is wanted than success.
ANSWERS = """
#include <stdlib.h>
#include <string.h>
static char ignored;
int cudaMalloc(void** memory, size_t bytes) { *memory = malloc(bytes); return 0; }
int cudaHostAlloc(void** memory, size_t bytes, unsigned flags) { return cudaMalloc(memory, bytes); }
int cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { *stream = &ignored; return 0; }
int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
int cudaGetDevice(int* ordinal) { *ordinal = 0; return 0; }
int cudaMemGetInfo(size_t* left, size_t* all) { *left = *all = (size_t)1 << 30; return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int ordinal) { *value = 8; return 0; }
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  memcpy(to, from, bytes);
  return 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
const char* cudaGetErrorString(int error) { return "no error"; }
const char* cudaGetErrorName(int error) { return "cudaSuccess"; }
"""


def make_stubs(folder: Path, provider: Path) -> None:
    """Every CUDA library that the provider needs, with all functions that it needs."""

    def lines(*command: object) -> list[str]:
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True
        ).stdout.splitlines()

    undefined = {line.split()[-1].split("@")[0] for line in lines("nm", "-D", "-u", provider)}
    wanted = {name for name in undefined if re.match(r"(__)?cu(da|blas|rand|dnn|[A-Z])", name)}
    wanted -= set(re.findall(r"(\w+)\(", ANSWERS))
    source = folder / "stubs.c"
    functions = [f"void* {name}(void) {{ return 0; }}\n" for name in sorted(wanted)]
    source.write_text(ANSWERS + "".join(functions), encoding="utf-8")
    needed = [line for line in lines("readelf", "-d", provider) if "NEEDED" in line]
    for name in re.findall(r"\[(libcu\w+\.so[.\d]*)\]", "\n".join(needed)):
        soname = f"-Wl,-soname,{name}"
        lines("gcc", "-shared", "-fPIC", "-w", soname, source, "-o", folder / name)


PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def ask() -> None:
    """In a process that finds the stubs."""
    import custom_op
    import onnxruntime
    import torch
    from budgets import assert_within_budget
    from cases import CASES
    from ort_on_host import CudaOnHost

    from fastmqa_export import plugins

    print(f"onnxruntime-gpu {onnxruntime.__version__}")
    case = CASES[0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = custom_op.single_node(case.attributes(), case.tensors(dtype))
        try:
            custom_op.create(model, plugins.ort_library_path(), providers=PROVIDERS)
        except Exception as error:  # of our CUDA kernel, which finds no GPU
            print(f"{dtype}: {error}")

    gpu = CudaOnHost()
    gpu.set_device(80, sm_count=40)
    gpu.stand_aside()
    names = [case for case in CASES if "_gqa_" in case.name or case.name.startswith("long")]
    for case in names:
        tensors, attributes = case.tensors(torch.float16), case.attributes()
        session = custom_op.create(
            custom_op.single_node(attributes, tensors),
            gpu.path,
            providers=PROVIDERS,
            record_ep_graph_assignment_info="1",
        )
        (assigned,) = session.get_provider_graph_assignment_info()
        assert assigned.ep_name == "CUDAExecutionProvider", assigned.ep_name
        assert_within_budget(custom_op.run(session, attributes, tensors)[0], tensors, attributes)
    print(f"{len(names)} cases ran on {assigned.ep_name} within the budget")


def main() -> None:
    """Make the stubs, and ask in another process."""
    if len(sys.argv) == 1:
        return ask()
    site = Path(sys.argv[1]).resolve()
    provider = site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        sys.exit(f"there is no {provider}; install onnxruntime-gpu into {site}")
    with tempfile.TemporaryDirectory(prefix="fastmqa-stubs-") as stubs:
        make_stubs(Path(stubs), provider)
        paths = [site, ROOT, ROOT / "tests"]
        environment = os.environ | {
            "LD_LIBRARY_PATH": stubs,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }
        sys.exit(subprocess.run([sys.executable, __file__], env=environment).returncode)


if __name__ == "__main__":
    main()
