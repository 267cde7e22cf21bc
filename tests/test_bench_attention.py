# SPDX-License-Identifier: MIT
"""The benchmark of the kernels: its formulas, and what it says where it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import bench_attention  # noqa: E402 (beside the scripts, not in the package)
import gpu_evidence  # noqa: E402 (likewise)

SHAPES = {
    shape.name: shape for kind in ("decode", "prefill") for shape in bench_attention.shapes(kind)
}


@pytest.mark.parametrize("script", ["bench_attention.py", "gpu_check.sh"])
def test_without_a_gpu_it_says_so_and_exits_with_3(script):
    command = [sys.executable] if script.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*command, str(ROOT / "scripts" / script)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr == f"{script} needs a CUDA device, and PyTorch sees none\n"
    assert done.stdout == ""


def test_bytes_and_operations_of_a_decode_step():
    shape = SHAPES["MQA 32/1, D 128, B 8, T 4096"]
    assert shape.cache_bytes() == 8 * 4096 * 2 * 128 * 2
    assert shape.bytes() == shape.cache_bytes() + 2 * 8 * 32 * 128 * 2
    assert shape.flops() == 4 * 8 * 32 * 4096 * 128


def test_latent_values_are_read_once():
    shape = SHAPES["MLA 128 heads, D 576, B 1, T 4096"]
    assert shape.cache_bytes() == 4096 * 576 * 2
    assert shape.flops() == 2 * 128 * 4096 * (576 + 512)


def test_causal_prefill_counts_half_of_the_pairs():
    shape = SHAPES["MQA 71/1, D 64, S = T = 512"]
    assert shape.flops() == 4 * 71 * 64 * 512 * 513 // 2


def test_records_rows_and_verdicts():
    shape = SHAPES["MQA 32/1, D 128, B 8, T 4096"]
    ours, sdpa = bench_attention.OURS, bench_attention.SDPA
    peaks = (shape.bytes() / 0.9e-3, 1e15)  # the copy would take 0.9 ms, the product less
    timed = {ours: bench_attention.Timed(print, True), sdpa: bench_attention.Timed(print, False)}
    times = {ours: [1.0] * 50, sdpa: [3.0] * 50}
    records = bench_attention.records_of(shape, timed, times, peaks)
    mine = records[ours]
    assert mine["roofline"] == pytest.approx(0.9)
    assert mine["gb_per_s"] == pytest.approx(shape.bytes() / 1e6)
    assert mine["tflop_per_s"] == pytest.approx(shape.flops() / 1e9)
    line = bench_attention.row(shape, records, [ours, sdpa, "FlashInfer"])
    assert line == (
        f"| {shape.name} | 1.000 (1.000–1.000) | 3.000 (3.000–3.000, no graph) | – "
        f"| {shape.bytes() / 1e6:.0f} | {shape.flops() / 1e9:.1f} | 90 % | 3.00 | 3.00 |"
    )
    assert bench_attention.verdicts([(shape, records)]) == [
        "* decode, K and V ≥ 16 MiB: ≥ 85% of the roofline: met on 1 of 1 shapes",
        "* MQA decode: ≥ 2 × SDPA: met on 1 of 1 shapes",
    ]


def test_evidence_tells_what_failed_and_what_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "gpu_state", lambda: {"name": "Tesla T4"})
    (tmp_path / "build.code").write_text("0\n")
    (tmp_path / "build.log").write_text("…\n114 kernels\n")
    (tmp_path / "cases.code").write_text("1\n")
    (tmp_path / "cases.log").write_text("1 failed, 1 passed, 1 skipped\n")
    (tmp_path / "cases.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "benchmark.jsonl").write_text('{"roofline": 0.5}\n')
    found = gpu_evidence.evidence(tmp_path)
    assert found["steps"]["build"] == {"result": "ok", "last_line": "114 kernels"}
    assert found["steps"]["cases"]["result"] == "failed"
    assert found["steps"]["memcheck"] == {"result": "not run"}
    assert found["cases"] == {"passed": 1, "skipped": 1, "failed": 1, "failures": ["c"]}
    assert found["conformance"] is None
    assert found["benchmark"] == [{"roofline": 0.5}]


#: What `pip install torch numpy pytest` does not bring, and scripts/gpu_check.sh must not ask for.
NOT_ON_A_BARE_MACHINE = ("click", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "polygraphy")


def test_what_gpu_check_runs_needs_torch_and_numpy_only():
    modules = "bench_attention, gpu_evidence, kernel_resources, test_device, test_conformance"
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, 'scripts', 'tests']\n"
        f"sys.modules.update(dict.fromkeys({NOT_ON_A_BARE_MACHINE!r}))\n"
        f"import {modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
