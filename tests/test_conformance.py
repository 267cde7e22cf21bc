# SPDX-License-Identifier: MIT
"""The emulated instructions against silicon: emulation/conformance.cu, on the host and on a GPU.

scripts/gpu_check.sh keeps a GPU's results in its evidence file (docs/evidence/gpu-*.json), so that
the emulation is compared with every GPU that has been seen, on machines without one too.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
PLUGINS = ROOT / "plugins"
EVIDENCE = sorted((ROOT / "docs" / "evidence").glob("gpu-*.json"))
#: scripts/gpu_check.sh collects results of the GPU here.
KEEP = os.environ.get("FASTMQA_KEEP_CONFORMANCE")

INPUT = np.dtype(
    [
        ("rows", np.uint16, (32, 8)),
        ("row_of", np.uint32, 32),
        ("half_a", np.uint32, (32, 4)),
        ("half_b", np.uint32, (32, 2)),
        ("bfloat16_a", np.uint32, (32, 4)),
        ("bfloat16_b", np.uint32, (32, 2)),
        ("c", np.float32, (32, 4)),
        ("exponents", np.float32, 32),
        ("half_exponents", np.uint32, 32),
        ("factors", np.uint32, (3, 32)),
    ]
)
OUTPUT = np.dtype(
    [
        ("ldmatrix_x4", np.uint32, (32, 4)),
        ("ldmatrix_x4_trans", np.uint32, (32, 4)),
        ("ldmatrix_x2", np.uint32, (32, 2)),
        ("ldmatrix_x2_trans", np.uint32, (32, 2)),
        ("mma_half", np.float32, (32, 4)),
        ("mma_bfloat16", np.float32, (32, 4)),
        ("stored", np.uint16, (32, 8)),
        ("copied", np.uint16, (2, 32, 8)),
        ("ex2", np.float32, 32),
        ("ex2_half", np.uint32, 32),
        ("fma", np.uint32, 32),
        ("opaque", np.uint32, 32),
    ]
)
#: Moved or rounded once: the bits have to be equal.
EXACT = ("ldmatrix_x4", "ldmatrix_x4_trans", "ldmatrix_x2", "ldmatrix_x2_trans")
EXACT += ("stored", "copied", "fma", "opaque")


def inputs(warps: int = 16) -> np.ndarray:
    """Random registers, the same on every machine."""
    rng = np.random.default_rng(7)

    def halves(*shape: int, scale: float = 1.0) -> np.ndarray:
        values = rng.standard_normal((*shape, 2)) * scale
        return values.astype(np.float16).view(np.uint32)[..., 0]

    def bfloat16s(*shape: int) -> np.ndarray:
        bits = rng.standard_normal((*shape, 2)).astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint32)[..., 0]

    given = np.zeros(warps, INPUT)
    given["rows"] = rng.integers(0, 1 << 16, given["rows"].shape)
    given["row_of"] = [rng.permutation(32) for _ in range(warps)]
    given["half_a"], given["half_b"] = halves(warps, 32, 4), halves(warps, 32, 2)
    given["bfloat16_a"], given["bfloat16_b"] = bfloat16s(warps, 32, 4), bfloat16s(warps, 32, 2)
    given["c"] = rng.standard_normal(given["c"].shape)
    given["exponents"] = rng.uniform(-150, 20, given["exponents"].shape)
    given["exponents"][0, :4] = 0, -np.inf, np.nan, -126
    given["half_exponents"] = halves(warps, 32, scale=8)
    given["factors"] = halves(warps, 3, 32)
    return given


def disagreement(emulated: np.ndarray, silicon: np.ndarray, sm: int) -> list[str]:
    """The functions whose results differ by more than their instructions leave open.

    An mma may add its products in any order, and truncates sums to fewer bits than float32 has: a
    few units in the last place of the largest sum. ex2 is within 2 ulp, in float16 2^-9.9.
    """
    wrong = [name for name in EXACT if not np.array_equal(emulated[name], silicon[name])]

    def compare(name: str, got: np.ndarray, given: np.ndarray, bound: np.ndarray | float) -> None:
        with np.errstate(invalid="ignore"):
            apart = np.abs(got.astype(np.float64) - given.astype(np.float64))
        same = (got == given) | (np.isnan(got) & np.isnan(given))
        if not np.all(same | (apart <= bound)):
            wrong.append(name)

    for name in ("mma_half", "mma_bfloat16") if sm >= 80 else ("mma_half",):
        compare(name, emulated[name], silicon[name], 2.0**-17)  # sums are below 64
    ex2 = silicon["ex2"]
    compare("ex2", emulated["ex2"], ex2, np.where(np.isfinite(ex2), np.abs(ex2), 0) * 2.0**-21)
    halves = [x["ex2_half"].view(np.float16) for x in (emulated, silicon)]
    bound = np.where(np.isfinite(halves[1]), np.abs(halves[1].astype(np.float64)), 0) * 2.0**-9
    compare("ex2_half", *halves, bound + 2.0**-24)
    return wrong


def run(program: Path, sm: int, folder: Path) -> np.ndarray:
    """What a program of conformance.cu makes of the inputs."""
    inputs().tofile(folder / "inputs")
    command = [str(program), str(folder / "inputs"), str(folder / "outputs"), str(sm)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / "outputs", OUTPUT)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    headers = cuda_headers()
    if headers is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", str(headers)]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    flags += ["-I", str(EMULATION / "include"), "-I", str(PLUGINS / "include"), "-x", "c++"]
    sources = [str(EMULATION / n) for n in ("conformance.cu", "runtime.cpp", "emulation.cpp")]
    subprocess.run(["g++", *flags, *sources, "-o", str(folder / "conformance")], check=True)
    return run(folder / "conformance", 80, folder)


def nvcc() -> str | None:
    """The CUDA compiler, if this machine has one."""
    from fastmqa_export.errors import MissingDependencyError
    from fastmqa_export.plugins import find_nvcc

    try:
        return str(find_nvcc())
    except MissingDependencyError:
        return None


def cuda_headers() -> Path | None:
    """The folder of CUDA's headers."""
    import emulated as emulation

    return emulation.cuda_headers()


def compile_for(sm: int, folder: Path) -> Path:
    """The program of conformance.cu for one SM."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("needs nvcc")
    program = folder / "conformance"
    flags = ["--options-file", str(PLUGINS / "nvcc.options"), "-I", str(PLUGINS / "include")]
    command = [compiler, *flags, f"-arch=sm_{sm}", str(EMULATION / "conformance.cu")]
    for folder in Path(compiler).resolve().parents[1].glob("lib"):  # of the wheels, beside lib64
        command += ["-L", str(folder)]
    done = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


def test_the_emulation_moves_what_it_should(emulated: np.ndarray) -> None:
    given = inputs()
    assert not disagreement(emulated, emulated, 80)
    np.testing.assert_array_equal(emulated["stored"], given["rows"])
    np.testing.assert_array_equal(emulated["opaque"], given["row_of"])
    # A lane shows what its neighbour copied; odd lanes copied zeros.
    assert not emulated["copied"][:, :, ::2].any()
    np.testing.assert_array_equal(emulated["copied"][:, 0, 1::2], given["rows"][:, ::2])
    np.testing.assert_array_equal(emulated["copied"][:, 1, 1::2], given["rows"][:, ::-1][:, ::2])
    a, b, c = (x.view(np.float16).astype(np.float64) for x in np.moveaxis(given["factors"], 1, 0))
    np.testing.assert_array_equal(emulated["fma"].view(np.float16), (a * b + c).astype(np.float16))


@pytest.mark.parametrize("field", OUTPUT.names)
def test_a_difference_in_one_lane_is_found(emulated: np.ndarray, field: str) -> None:
    silicon = emulated.copy()
    values = silicon[field]
    last = values.flat[-1]
    is_float = values.dtype == np.float32
    for changed in (last + 1, np.nan) if is_float else (last ^ values.dtype.type(0x0100),):
        values.flat[-1] = changed
        assert disagreement(emulated, silicon, 80) == [field]


@pytest.mark.parametrize("sm", [75, 80])
def test_nvcc_compiles_the_program(sm: int, tmp_path: Path) -> None:
    assert compile_for(sm, tmp_path).stat().st_size


@pytest.mark.gpu
def test_the_gpu_agrees_lane_by_lane(emulated: np.ndarray, tmp_path: Path) -> None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    silicon = run(compile_for(sm, tmp_path), sm, tmp_path)
    if KEEP:
        packed = base64.b64encode(zlib.compress(silicon.tobytes(), 9)).decode()
        Path(KEEP).write_text(json.dumps({"sm": sm, "outputs": packed}))
    assert not disagreement(emulated, silicon, sm)


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_gpus_seen_before_agree(emulated: np.ndarray, path: Path) -> None:
    kept = json.loads(path.read_text("utf-8"))["conformance"]
    if kept is None:
        pytest.skip("its run of gpu_check.sh ended before")
    silicon = np.frombuffer(zlib.decompress(base64.b64decode(kept["outputs"])), OUTPUT)
    assert not disagreement(emulated, silicon, kept["sm"])
