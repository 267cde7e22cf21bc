# SPDX-License-Identifier: MIT
"""The custom op's CUDA provider, in onnxruntime, with emulated kernels on the host."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import custom_op
import ort_on_host
import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import CASES, KERNEL_CASES, Case
from ort_on_host import CudaOnHost

pytestmark = [
    pytest.mark.skipif(ort_on_host.missing() is not None, reason=ort_on_host.missing() or ""),
    pytest.mark.usefixtures("one_thread"),
]

ROOT = Path(__file__).parents[1]
BY_NAME = {case.name: case for case in KERNEL_CASES}
#: Every feature in both layouts, at one ratio, and the sizes that take several tiles and splits.
NAMES = [case.name for case in CASES if "_gqa_" in case.name]
NAMES += ["falcon_71_1", "mla_576_512", "mla_288_256", "long_window", "decode_48_1_d128"]

DTYPES = {75: torch.float16, 80: torch.bfloat16}


@pytest.fixture(scope="module")
def library() -> CudaOnHost:
    return CudaOnHost()


@pytest.fixture
def gpu(library) -> CudaOnHost:
    library.set_device(75)
    library.take_scratch_bytes()
    return library


def session_of(gpu: CudaOnHost, case: Case, dtype: torch.dtype):
    model = custom_op.single_node(case.attributes(), case.tensors(dtype))
    return custom_op.create(model, gpu.path)


@pytest.mark.parametrize("sm", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_feature_is_within_the_budget(gpu, name, sm):
    case, dtype = BY_NAME[name], DTYPES[sm]
    gpu.set_device(sm)
    session = session_of(gpu, case, dtype)
    tensors, attributes = case.tensors(dtype), case.attributes()
    y, *lse = custom_op.run(session, attributes, case.tensors(dtype, poison=True))
    assert_within_budget(y, tensors, attributes)
    if lse:
        expected = oracle(tensors, attributes)[1].float()
        torch.testing.assert_close(lse[0], expected, rtol=1e-5, atol=4e-5)


def test_float32_and_a_softmax_in_float16(gpu):
    for case, dtype in (
        (BY_NAME["causal_gqa_bhsd"], torch.float32),
        (dataclasses.replace(BY_NAME["causal_gqa_bhsd"], softmax_precision=10), torch.float16),
    ):
        tensors, attributes = case.tensors(dtype), case.attributes()
        (y,) = custom_op.run(session_of(gpu, case, dtype), attributes, tensors)
        assert_within_budget(y, tensors, attributes)


DECODE = BY_NAME["decode_48_1_d128"]


def decode(gpu: CudaOnHost, session):
    y, _ = custom_op.run(session, DECODE.attributes(), DECODE.tensors(torch.float16))
    return y, gpu.take_scratch_bytes()


def test_scratch_memory_is_asked_for_where_keys_are_split(gpu):
    session = session_of(gpu, DECODE, torch.float16)
    _, few = decode(gpu, session)
    gpu.set_device(75, sm_count=40)
    y, many = decode(gpu, session_of(gpu, DECODE, torch.float16))
    assert few < many
    assert_within_budget(y, DECODE.tensors(torch.float16), DECODE.attributes())
    # The device was described when the first session was made, and is not asked for again.
    assert decode(gpu, session)[1] == few
    short = dataclasses.replace(DECODE, T=16, kv_lengths=None)
    custom_op.run(
        session_of(gpu, short, torch.float16), short.attributes(), short.tensors(torch.float16)
    )
    assert gpu.take_scratch_bytes() == 0


def test_full_memory_is_an_error_of_the_run(gpu):
    gpu.set_device(75, sm_count=40)
    session = session_of(gpu, DECODE, torch.float16)
    before, _ = decode(gpu, session)
    gpu.set_memory_full(True)
    try:
        with pytest.raises(Exception, match=r"node 'node_.*': the GPU's memory is full"):
            decode(gpu, session)
    finally:
        gpu.set_memory_full(False)
    assert torch.equal(decode(gpu, session)[0], before)


def test_without_a_gpu_the_session_is_refused(gpu):
    gpu.set_device(0)
    with pytest.raises(Exception, match=r"node 'node_.*': CUDA device 0: no CUDA-capable device"):
        session_of(gpu, DECODE, torch.float16)


def test_what_no_kernel_covers_names_the_nearest(gpu):
    case = dataclasses.replace(BY_NAME["causal_gqa_bhsd"], D=264, V=264)
    with pytest.raises(Exception, match=r"node 'node_.*': .*264"):
        custom_op.run(
            session_of(gpu, case, torch.float16), case.attributes(), case.tensors(torch.float16)
        )


def test_bfloat16_needs_a_newer_gpu(gpu):
    case = BY_NAME["causal_gqa_bhsd"]
    with pytest.raises(Exception, match=r"node 'node_.*': .*bfloat16"):
        custom_op.run(
            session_of(gpu, case, torch.bfloat16), case.attributes(), case.tensors(torch.bfloat16)
        )


def test_in_the_cuda_provider_of_onnxruntime_gpu():
    """Over a toolkit that only copies, see the script; the package has 250 MB."""
    folder = ROOT / "build" / "onnxruntime-gpu"
    if not (folder / "onnxruntime").is_dir():
        pytest.skip(f"onnxruntime-gpu is not in {folder}")
    script = ROOT / "tests" / "ort" / "cuda_provider.py"
    result = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    *placed, ran = result.stdout.splitlines()[1:]
    assert len(placed) == 3
    assert all("FusedAttention node 'node_FusedAttention_0': CUDA device 0" in x for x in placed)
    assert ran.endswith("cases ran on CUDAExecutionProvider within the budget")
