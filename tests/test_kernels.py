# SPDX-License-Identifier: MIT
"""The C interface of the kernels from Python: structs, strides, errors.

What a call means is tried with `naive_kernels.cpp`, which reads attention.h and nothing else.
"""

import ctypes
import ctypes.util
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from naive import INCLUDE, compile_cpp, naive_library

from fastmqa_export import kernels, reference
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import ConfigError, KernelError
from fastmqa_export.kernels import Device, KernelLibrary, make_call

HEADER = (INCLUDE / "fastmqa" / "attention.h").read_text(encoding="utf-8")
STRUCTS = ("Strides", "MaskStrides", "AttentionParams", "Device")


@pytest.fixture
def library() -> KernelLibrary:
    return KernelLibrary(naive_library())


def call_of(case: Case, dtype: torch.dtype = torch.float32, **changed: torch.Tensor):
    tensors = case.tensors(dtype, poison=True) | changed
    return make_call(
        *(tensors.get(name) for name in OP_INPUTS),
        attributes=case.attributes(),
        return_lse=case.lse,
    )


def nothing(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, **given):
    arguments = {"attn_mask": None, "kv_lengths": None, "q_start": None} | given
    attributes = Case(name="", values_in_k=v is None, V=8).attributes()
    return make_call(q, k, v, **arguments, attributes=attributes, return_lse=False)


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_have_the_fields_of_the_header(name):
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", HEADER, re.DOTALL)[1]
    declarations = re.sub(r"//[^\n]*", "", body)
    fields = re.findall(r"[\s*](\w+);", declarations)
    assert fields == [field for field, _ in getattr(kernels, name)._fields_]


def test_structs_lie_in_memory_as_the_compiler_lays_them(tmp_path):
    lines = []
    expected = []
    for name in STRUCTS:
        struct = getattr(kernels, name)
        lines.append(f'std::printf("{name} %zu\\n", sizeof(fastmqa::{name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, kind in struct._fields_:
            lines.append(
                f'std::printf("{name}.{field} %zu %zu\\n", offsetof(fastmqa::{name}, {field}), '
                f"sizeof(fastmqa::{name}::{field}));"
            )
            offset = getattr(struct, field).offset
            expected.append(f"{name}.{field} {offset} {ctypes.sizeof(kind)}")
    source = tmp_path / "layout.cpp"
    includes = "#include <cstdio>\n#include <fastmqa/attention.h>\n"
    source.write_text(f"{includes}int main() {{\n{chr(10).join(lines)}\n}}\n")
    program = compile_cpp(source, tmp_path / "layout")
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected


def test_dtypes_and_codes_are_those_of_the_header():
    numbers = dict(re.findall(r"k(\w+) = (\d+)", HEADER))
    named = {"float32": "Float32", "bool": "Bool", "float16": "Float16", "bfloat16": "BFloat16"}
    for dtype, number in kernels.DTYPES.items():
        assert numbers[named[str(dtype).removeprefix("torch.")]] == str(number)
    assert numbers["CudaError"] == "3"  # which becomes a KernelError


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_means_what_the_op_means(library, case):
    call = call_of(case)
    library.run(call, library.device(0))
    tensors = case.tensors(torch.float32)
    y, lse = reference.attention(
        *(tensors.get(name) for name in OP_INPUTS), attributes=case.attributes()
    )
    torch.testing.assert_close(call.y.double(), y, rtol=1e-5, atol=1e-6)
    assert (call.lse is not None) == case.lse
    if case.lse:
        torch.testing.assert_close(call.lse.double(), lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [0, 1])
def test_strides_are_those_of_the_tensors(layout):
    q, k = nothing(2, 4, 6, 64)[..., :32], nothing(2, 5, 2, 32).transpose(1, 2)
    v = nothing(2, 2, 10, 8)[:, :, ::2]
    mask = torch.zeros(2, 1, 1, 5)
    attributes = Case(name="", layout=layout, lse=True).attributes()
    call = make_call(q, k, v, mask, None, None, attributes=attributes, return_lse=True)
    p = call.params
    heads, queries = (6, 4) if layout else (4, 6)
    assert (p.batch, p.heads, p.kv_heads, p.queries, p.keys) == (2, heads, 2, queries, 5)
    assert (p.head_size, p.v_head_size) == (32, 8)
    assert call.y.shape == (2, 4, 6, 8)
    assert call.lse.shape == (2, heads, queries)

    def of(strides):
        return tuple(getattr(strides, name) for name, _ in strides._fields_)

    row, head = (6 * 64, 64) if layout else (64, 6 * 64)
    assert of(p.q_strides) == (4 * 6 * 64, head, row)
    assert of(p.k_strides) == (5 * 2 * 32, 32, 2 * 32)
    assert of(p.v_strides) == (2 * 10 * 8, 10 * 8, 2 * 8)
    row, head = (6 * 8, 8) if layout else (8, 6 * 8)
    assert of(p.y_strides) == (4 * 6 * 8, head, row)
    assert of(p.lse_strides) == (24, queries, 1)
    assert of(p.mask_strides) == (5, 0, 0, 1)
    pointers = (p.q, p.k, p.v, p.attn_mask)
    assert pointers == tuple(x.data_ptr() for x in (q, k, v, mask)), "nothing was copied"
    assert (p.kv_lengths, p.q_start, p.workspace) == (None, None, None)


@pytest.mark.parametrize(
    "k",
    [
        pytest.param(torch.arange(1 * 2 * 5 * 16 + 1.0)[1:].view(1, 2, 5, 16), id="address"),
        pytest.param(torch.arange(1 * 2 * 5 * 18.0).view(1, 2, 5, 18)[..., :16], id="row"),
        pytest.param(torch.arange(1 * 2 * 5 * 16.0).view(1, 2, 16, 5).mT, id="columns"),
    ],
)
def test_what_cannot_be_read_16_bytes_at_a_time_is_copied(library, k):
    case = Case(name="", B=1, H=2, Hkv=2, S=1, T=5)
    call = call_of(case, k=k / 100)
    assert call.inputs["k"].data_ptr() != k.data_ptr()
    assert call.params.k == call.inputs["k"].data_ptr()
    assert call.params.k % 16 == 0 and call.params.k_strides.row % 4 == 0
    torch.testing.assert_close(call.inputs["k"], k / 100, rtol=0, atol=0)
    library.run(call, library.device(0))


def test_strided_lengths_are_made_contiguous(library):
    lengths = torch.tensor([7, -1, 11, -1], dtype=torch.int32)[::2]
    case = Case(name="", kv_lengths=(7, 11))
    calls = [call_of(case), call_of(case, kv_lengths=lengths)]
    for call in calls:
        library.run(call, library.device(0))
    torch.testing.assert_close(calls[0].y, calls[1].y, rtol=0, atol=0)


def test_tensors_on_another_device_are_refused():
    q = nothing(1, 2, 3, 8)
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(ConfigError, match="kv_lengths is on meta and q on cpu"):
        plain(q, q, q, kv_lengths=lengths)


def test_numbers_beyond_32_bits_do_not_wrap():
    q = nothing(1, 2, 3, 8)
    attributes = Case(name="", window_left=2**32 + 3, window_right=2**40).attributes()
    call = make_call(q, q, q, None, None, None, attributes=attributes, return_lse=False)
    assert call.params.window_left == call.params.window_right == 2**31 - 1
    k = torch.empty(1, 2, 2**32 + 3, 8, dtype=torch.float16, device="meta")
    addresses = itertools.count(16, 16)
    with pytest.raises(ConfigError, match=r"k is .*sizes are below 2\^31"):
        make_call(
            q.to("meta"),
            k,
            None,
            None,
            None,
            None,
            attributes=Case(name="", values_in_k=True).attributes(),
            return_lse=False,
            address=lambda _: next(addresses),
        )


def test_errors_of_the_library_become_ours(library):
    call = call_of(Case(name=""), torch.float16)
    device = library.device(0)
    for refuse in (library.run, library.supports, library.launches):
        with pytest.raises(ConfigError, match="only float32"):
            refuse(call, device)
    call = call_of(Case(name=""))
    library.supports(call, device)
    assert library.launches(call, device) == {"launches": []}
    with pytest.raises(KernelError, match="out of order"):
        library.run(call, device, stream=1)


def test_a_device_is_asked_for_once(library):
    assert library.device(2) is library.device(2)
    assert library.device(2).sm_count == 42
    with pytest.raises(KernelError, match="invalid device ordinal"):
        library.device(4)


def test_what_is_no_library_of_kernels(tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(KernelError, match=r"lib.so is no library of kernels \(.*\); build it"):
        KernelLibrary(path)
    with pytest.raises(KernelError, match=r"fastmqa_describe_launches.*; build it again"):
        KernelLibrary(Path(ctypes.util.find_library("c")))


def test_a_workspace_is_given(library):
    call = call_of(Case(name=""))
    library.run(call, Device(75, 1, 1))
    assert call.params.workspace
