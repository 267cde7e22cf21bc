# SPDX-License-Identifier: MIT
"""Every case on the GPU, by the library of kernels; the same budgets as in the emulation."""

from __future__ import annotations

import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import HALF_SOFTMAX_CASES, KERNEL_CASES, Case

from fastmqa_export import plugins
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import MissingDependencyError
from fastmqa_export.kernels import Call, KernelLibrary, make_call

pytestmark = pytest.mark.gpu

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
RUNS = [
    pytest.param(case, dtype, id=f"{name}-{case.name}")
    for name, dtype in DTYPES.items()
    for case in KERNEL_CASES + (HALF_SOFTMAX_CASES if dtype == torch.float16 else [])
]


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    try:
        return plugins.kernel_library()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def run(library: KernelLibrary, case: Case, dtype: torch.dtype) -> Call:
    """The call after it ran: y and lse on the GPU, where NaN lay before."""
    tensors = {n: x.cuda() for n, x in case.tensors(dtype, poison=True).items()}
    call = make_call(
        *(tensors.get(n) for n in OP_INPUTS), attributes=case.attributes(), return_lse=case.lse
    )
    for output in (call.y, call.lse):
        if output is not None:
            output.fill_(torch.nan)
    device = library.device(torch.cuda.current_device())
    library.run(call, device, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return call


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_case(library: KernelLibrary, case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bfloat16 needs SM80")
    call = run(library, case, dtype)
    tensors = case.tensors(dtype)
    assert_within_budget(call.y.cpu(), tensors, case.attributes())
    if call.lse is not None:
        # Scores of float16 are 2^-11 off at most.
        tolerance = 2**-10 if case.softmax_precision == 10 else 1e-5
        expected = oracle(tensors, case.attributes())[1].float()
        torch.testing.assert_close(call.lse.cpu(), expected, rtol=tolerance, atol=4 * tolerance)
    again = run(library, case, dtype)
    assert torch.equal(again.y, call.y)
    if call.lse is not None:
        assert torch.equal(again.lse, call.lse)


def test_in_a_cuda_graph(library: KernelLibrary) -> None:
    """A graph replays what was captured, on what its inputs hold by then."""
    case = next(case for case in KERNEL_CASES if case.name == "long_decode")
    tensors = {n: x.cuda() for n, x in case.tensors(torch.float16).items()}
    call = make_call(
        *(tensors.get(n) for n in OP_INPUTS), attributes=case.attributes(), return_lse=False
    )
    device = library.device(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.run(call, device, torch.cuda.current_stream().cuda_stream)
    tensors["q"].mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    changed = case.tensors(torch.float16)
    changed["q"] = -changed["q"]
    assert_within_budget(call.y.cpu(), changed, case.attributes())
