# SPDX-License-Identifier: MIT
"""The emulation that stands in for a GPU: its lane maps, and what it finds wrong with a kernel.

Kernels are those of `emulation/probes.cu`. Expected values are written from the PTX manual's
tables the other way round: from a matrix element to the lane that holds it.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
SUCCESS, INVALID_CONFIGURATION, LAUNCH_FAILURE = 0, 9, 719  # of cudaError_t
SEEDS = range(8)

Probe = Callable[..., int]


class Emulation:
    """The probes as `probe.name(inputs, outputs, mode)`."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.fastmqa_emulation_error.restype = ctypes.c_char_p
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Probe:
        function = getattr(self._library, name)

        def call(inputs: np.ndarray | None, outputs: np.ndarray | None, mode: int = 0) -> int:
            arrays = [
                ctypes.c_void_p(None if x is None else x.ctypes.data) for x in (inputs, outputs)
            ]
            return function(*arrays, mode)

        return call

    def error(self) -> str:
        return self._library.fastmqa_emulation_error().decode()

    def cuda_error(self, code: int) -> str:
        return self._library.cudaGetErrorString(code).decode()

    def seed(self, seed: int) -> None:
        self._library.fastmqa_emulation_seed(seed)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Emulation:
    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not shutil.which("g++") or not (headers / "cuda_fp16.h").exists():
        pytest.skip("needs g++ and CUDA's headers (CUDA_HOME)")
    path = tmp_path_factory.mktemp("emulation") / "probes.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    flags += ["-isystem", str(headers)]
    flags += ["-I", str(EMULATION / "include"), "-I", str(ROOT / "plugins" / "include")]
    sources = [str(EMULATION / "emulation.cpp"), str(EMULATION / "probes.cu")]
    subprocess.run(["g++", *flags, "-x", "c++", *sources, "-o", str(path)], check=True)
    return Emulation(path)


@pytest.fixture
def probe(library):
    library.seed(0)
    return library


def aligned(*rows: np.ndarray) -> np.ndarray:
    """A copy whose address is a multiple of 16, as copies of 16 bytes need."""
    source = np.concatenate(rows)
    memory = np.zeros(source.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + source.nbytes].view(source.dtype)
    copy[:] = source
    return copy


@pytest.mark.parametrize(
    ("mode", "matrices", "transposed"),
    [
        pytest.param(0, 4, False, id="x4"),
        pytest.param(1, 4, True, id="x4_trans"),
        pytest.param(2, 2, False, id="x2"),
        pytest.param(3, 2, True, id="x2_trans"),
    ],
)
def test_ldmatrix_gives_each_element_to_its_lane(probe, mode, matrices, transposed):
    rows = np.random.default_rng(0).integers(0, 1 << 16, (32, 8), np.uint16)
    registers = np.zeros((32, 4), np.uint32)
    assert probe.ldmatrix(rows, registers, mode) == SUCCESS
    expected = np.zeros((32, 4, 2), np.uint16)
    for i in range(matrices):
        for row in range(8):
            for column in range(8):
                element = rows[(5 * (8 * i + row) + 3) % 32, column]
                major, minor = (column, row) if transposed else (row, column)
                expected[4 * major + minor // 2, i, minor % 2] = element
    np.testing.assert_array_equal(registers.view(np.uint16).reshape(32, 4, 2), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_multiplies_and_adds(probe, dtype):
    rng = np.random.default_rng(1)
    a = rng.integers(-8, 9, (16, 16)).astype(np.float32) / 4  # exact in both types, as are the sums
    b = rng.integers(-8, 9, (16, 8)).astype(np.float32) / 4
    c = rng.integers(-8, 9, (16, 8)).astype(np.float32)

    def bits(x: np.float32) -> int:
        half = x.view(np.uint32) >> 16 if dtype == "bfloat16" else np.float16(x).view(np.uint16)
        return int(half)

    fragments = np.zeros(32 * 6 * 2, np.uint16)
    a_lanes, b_lanes = fragments[:256].reshape(32, 4, 2), fragments[256:].reshape(32, 2, 2)
    sums = np.zeros((32, 4), np.float32)
    for row in range(16):
        for k in range(16):
            register = row // 8 + 2 * (k // 8)
            a_lanes[row % 8 * 4 + k % 8 // 2, register, k % 2] = bits(a[row, k])
    for k in range(16):
        for column in range(8):
            b_lanes[column * 4 + k % 8 // 2, k // 8, k % 2] = bits(b[k, column])
    for row in range(16):
        for column in range(8):
            sums[row % 8 * 4 + column // 2, row // 8 * 2 + column % 2] = c[row, column]
    assert probe.mma(fragments, sums, dtype == "bfloat16") == SUCCESS
    result = np.zeros((16, 8), np.float32)
    for row in range(16):
        for column in range(8):
            result[row, column] = sums[row % 8 * 4 + column // 2, row // 8 * 2 + column % 2]
    np.testing.assert_array_equal(result, a @ b + c)


def test_every_float16_is_converted(probe):
    halves = np.arange(1 << 16).astype(np.uint16)
    floats = np.zeros(1 << 16, np.float32)
    assert probe.convert(halves, floats, 1 << 16) == SUCCESS
    np.testing.assert_array_equal(floats, halves.view(np.float16).astype(np.float32))
    assert np.signbit(floats[0x8000])


@pytest.mark.parametrize("mode", [1, 2, 16, 31, 32 + 5, 32 + 30])
def test_shuffles(probe, mode):
    values = np.arange(100, 132).astype(np.uint32)
    result = np.zeros(32, np.uint32)
    assert probe.shuffle(values, result, mode) == SUCCESS
    lanes = np.arange(32) ^ mode if mode < 32 else np.full(32, mode - 32)
    np.testing.assert_array_equal(result, values[lanes])


def test_cp_async_arrives_with_its_wait_and_not_before(probe):
    rows = [np.full(8, x, np.uint16) for x in (1, 2, 3)]
    moments = np.zeros((6, 4, 8), np.uint16)
    assert probe.cp_async(aligned(*rows), moments) == SUCCESS
    poison = 0xFFFF
    for element in range(8):
        assert moments[:, :, element].tolist() == [
            [poison, poison, poison, poison],
            [poison, poison, poison, poison],
            [1, poison, poison, poison],
            [1, 2, 0, poison],
            [1, 2, 0, poison],
            [1, 2, 0, 3],
        ]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        pytest.param(1, "exits with 1 cp.async never waited for", id="no_wait"),
        pytest.param(2, "cp.async at byte 8 of shared memory, unaligned", id="to"),
        pytest.param(3, "cp.async from 0x[0-9a-f]*8, unaligned", id="from"),
        pytest.param(4, "cp.async at byte 512 of shared memory, which has 512", id="outside"),
    ],
)
def test_cp_async_misused(probe, mode, message):
    moments = np.zeros((6, 4, 8), np.uint16)
    assert probe.cp_async(aligned(np.zeros(24, np.uint16)), moments, mode) == LAUNCH_FAILURE
    assert re.fullmatch(f"block 0, thread \\d+: {message}", probe.error())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mode", "partner"),
    [pytest.param(0, 32, id="syncthreads"), pytest.param(2, 1, id="syncwarp")],
)
def test_a_missing_barrier_reads_nan(probe, mode, partner, seed):
    probe.seed(seed)
    words = np.zeros(64, np.float32)
    assert probe.exchange(None, words, mode) == SUCCESS
    np.testing.assert_array_equal(words, np.arange(64) ^ partner)
    assert probe.exchange(None, words, mode + 1) == SUCCESS
    assert np.isnan(words).sum() == 32  # whoever came first


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        pytest.param(
            0,
            "block 0, warp 1: its lanes do not meet; "
            "(__shfl_xor_sync: 55555555, __syncwarp: aaaaaaaa|"
            "__syncwarp: aaaaaaaa, __shfl_xor_sync: 55555555)",
            id="different",
        ),
        pytest.param(
            1,
            "block 0, warp 1: its lanes do not meet; __syncwarp: 55555555, exited: aaaaaaaa",
            id="exited",
        ),
        pytest.param(
            2,
            "block 0, warp 1: its lanes do not meet; __syncwarp: 55555555, __syncthreads: aaaaaaaa",
            id="at_barrier",
        ),
        pytest.param(3, r"block 0, thread \d\d: __trap", id="trap"),
        pytest.param(
            4,
            r"block 0, thread \d\d: __syncwarp with the mask ffff0000, which lacks the caller",
            id="mask_without_caller",
        ),
        pytest.param(
            5,
            r"block 0, thread \d\d: __shfl_sync of lane 0, which the mask aaaaaaaa lacks",
            id="mask_without_source",
        ),
    ],
)
def test_lanes_that_do_not_meet_end_the_launch(probe, mode, message, seed):
    probe.seed(seed)
    out = np.zeros(64, np.float32)
    assert probe.part(None, out, mode) == LAUNCH_FAILURE
    assert re.fullmatch(message, probe.error())
    assert probe.cuda_error(LAUNCH_FAILURE) == probe.error()
    assert probe.part(None, out, 6) == SUCCESS  # what is left of a failed launch is no obstacle
    assert probe.error() == ""
    assert np.flatnonzero(out == 0).tolist() == [5]  # which exited before the barrier


@pytest.mark.parametrize(
    ("byte", "message"),
    [(-1, "before the start"), (-1024, "before the start"), (512, "past the end")],
)
def test_writing_outside_shared_memory_is_found(probe, byte, message):
    assert probe.stray(None, None, byte) == LAUNCH_FAILURE
    assert probe.error() == f"block 1 wrote {message} of its shared memory"


def test_shared_memory_holds_what_the_kernel_keeps_there(probe):
    assert probe.stray(None, None, 511) == SUCCESS
    assert probe.too_little_shared_memory(None, None) == LAUNCH_FAILURE
    assert "wants 512 bytes of shared memory and was launched with 511" in probe.error()


@pytest.mark.parametrize("threads", [0, 33, 1056])
def test_a_launch_that_cuda_refuses_or_that_splits_a_warp(probe, threads):
    assert probe.launch_threads(None, None, threads) == INVALID_CONFIGURATION
    assert f"of {threads} threads" in probe.error()


def test_the_seed_chooses_the_order(probe):
    def order(seed: int) -> list[int]:
        probe.seed(seed)
        out = np.zeros(513, np.uint32)
        assert probe.order(None, out) == SUCCESS
        return out[1:].tolist()

    runs = [order(seed) for seed in SEEDS]
    assert runs == [order(seed) for seed in SEEDS]
    assert all(sorted(run) == list(range(512)) for run in runs)
    blocks = {tuple(thread // 128 for thread in run[::128]) for run in runs}
    warps = {tuple(thread % 128 // 32 for thread in run[:128:32]) for run in runs}
    lanes = {tuple(thread % 32 for thread in run[:32]) for run in runs}
    assert len(blocks) > 4 and len(warps) > 4 and len(lanes) == len(SEEDS)


def test_os_threads_launch_at_once(probe):
    def errors(mode: int) -> set[tuple[int, str]]:
        result = set()
        for _ in range(500):
            code = probe.part(None, np.zeros(64, np.float32), mode)
            result.add((code, probe.error()))
        return result

    with ThreadPoolExecutor(4) as pool:
        good, exited, also_good, at_barrier = pool.map(errors, [6, 1, 6, 2])
    assert good == also_good == {(SUCCESS, "")}
    assert [(code, "exited" in text) for code, text in exited] == [(LAUNCH_FAILURE, True)]
    assert [(code, "__syncthreads" in text) for code, text in at_barrier] == [
        (LAUNCH_FAILURE, True)
    ]


def test_fma_rounds_once(probe):
    a, b, c = np.random.default_rng(2).normal(0, 8, (3, 64)).astype(np.float16)
    a[0], b[0], c[0] = 1 + 2**-10, 1 - 2**-10, -1  # the product alone would be rounded to 1
    out = np.zeros(64, np.float16)
    assert probe.arithmetic(np.concatenate([a, b, c]), out) == SUCCESS
    exact = a.astype(np.float64) * b + c
    np.testing.assert_array_equal(out, exact.astype(np.float16))
    assert out[0] == np.float16(-(2**-20))


def test_ex2(probe):
    special = [0, -np.inf, np.inf, np.nan, -126, -126.5, -149, 1.5]
    x = np.array(special * 4, np.float32)
    out = np.zeros(32, np.float32)
    assert probe.arithmetic(x, out, 2) == SUCCESS
    expected = [1, 0, np.inf, np.nan, 2**-126, 0, 0, 2**1.5]
    np.testing.assert_allclose(out, np.float32(expected * 4), rtol=2**-22)
    halves = np.linspace(-26, 16, 64).astype(np.float16)
    out = np.zeros(64, np.float16)
    assert probe.arithmetic(halves, out, 1) == SUCCESS
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, np.exp2(halves.astype(np.float64)).astype(np.float16))


def test_both_ptx_headers_declare_the_same_functions():
    def declarations(folder: Path) -> list[str]:
        text = (folder / "fastmqa" / "arch" / "ptx.cuh").read_text("utf-8")
        found = re.findall(r"((?:template <[^>]*>\s*)?__device__[^{;]*\))\s*{", text)
        return sorted(" ".join(x.split()) for x in found)

    real = declarations(ROOT / "plugins" / "include")
    assert len(real) >= 12
    assert declarations(EMULATION / "include") == real
