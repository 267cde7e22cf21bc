#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""One decode step of attention on the CPU: the function body against what a user could pick.

Contenders, all in one process, in a new random order each repetition, outputs preallocated:

* the function body in onnxruntime, specialised (no feature live), and with lengths and causality;
* onnxruntime's Attention-23, and its GroupQueryAttention with past and present in one buffer;
* torch's scaled dot-product attention with ``enable_gqa``, and on packed heads.

Every result is checked against the float64 oracle first. Prints Markdown: median milliseconds with
p10–p90, and the ratio (median over repetitions) of the best of Attention, GroupQueryAttention and
``enable_gqa`` to the body. A benchmark is no test: the exit code is 0 whatever the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cases import Case
from single_node import single_node_model

from fastmqa_export import reference
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.pipeline import machine

Step = Callable[[], Any]
RIVALS = ("ORT Attention", "ORT GroupQueryAttention", "torch enable_gqa")


def decode(name: str, **sizes: Any) -> Case:
    """A decode step, S = 1."""
    return Case(name=name, S=1, **sizes)


MQA = {"H": 32, "Hkv": 1, "D": 128, "V": 128}
CASES = [
    *(decode(f"MQA 32/1, B {b}, T {t}", B=b, T=t, **MQA) for b in (1, 8) for t in (1024, 4096)),
    decode("GQA 32/8, B 1, T 4096", B=1, T=4096, H=32, Hkv=8, D=128, V=128),
    decode("GQA 9/3, B 1, T 2048", B=1, T=2048, H=9, Hkv=3, D=64, V=64),
    decode("MHA 16/16, B 1, T 1024", B=1, T=1024, H=16, Hkv=16, D=64, V=64),
    decode(
        "MLA 16 heads, B 1, T 4096",
        B=1, T=4096, H=16, Hkv=1, D=576, V=512, values_in_k=True, scale=192**-0.5,
    ),
]  # fmt: skip


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """A session of that many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def bound(runner: onnxruntime.InferenceSession, feed: dict[str, Any], out: tuple[int, ...]) -> Step:
    """A step with inputs and outputs bound once; an output that is also an input is that buffer."""
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in feed.items()}
    binding = runner.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(out, next(iter(feed.values())).dtype))
    for output in runner.get_outputs():
        shared = values.get(output.name.replace("present", "past"))
        binding.bind_ortvalue_output(output.name, shared or y)

    def step() -> np.ndarray[Any, Any]:
        runner.run_with_iobinding(binding)
        return y.numpy()  # type: ignore[no-any-return]

    return step


def standard_node(case: Case, kind: str, dtype: int) -> onnx.ModelProto:
    """A model of ONNX's Attention or of onnxruntime's GroupQueryAttention."""
    scale = case.attributes().scale

    def value(name: str, shape: list[Any], elem: int = dtype) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, elem, shape)

    if kind == "Attention":
        node = helper.make_node("Attention", ["q", "k", "v"], ["y"], scale=scale)
        inputs = [value("q", ["b", case.H, 1, case.D])]
        inputs += [value(n, ["b", case.Hkv, "t", case.D]) for n in ("k", "v")]
        outputs = [value("y", ["b", case.H, 1, case.V])]
    else:
        names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
        node = helper.make_node(
            "GroupQueryAttention", names, ["y", "present_k", "present_v"],
            domain="com.microsoft", num_heads=case.H, kv_num_heads=case.Hkv, scale=scale,
        )  # fmt: skip
        inputs = [value("q", ["b", 1, case.H * case.D])]
        inputs += [value(n, ["b", 1, case.Hkv * case.D]) for n in ("k", "v")]
        cache = ["b", case.Hkv, "t", case.D]
        inputs += [value("past_k", cache), value("past_v", cache)]
        inputs += [value("seqlens_k", ["b"], TensorProto.INT32)]
        inputs += [value("total", [1], TensorProto.INT32)]
        outputs = [value("y", ["b", 1, case.H * case.D])]
        outputs += [value("present_k", cache), value("present_v", cache)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def contenders(case: Case, dtype: torch.dtype, threads: int) -> dict[str, Step]:
    """What can run the case: name to a function that gives y."""
    t = case.tensors(dtype)
    live = dataclasses.replace(case, kv_lengths=(case.T,) * case.B, is_causal=True)
    shape = (case.B, case.H, 1, case.V)
    steps: dict[str, Step] = {}
    for name, each in (("body, specialised", case), ("body, lengths and causal", live)):
        tensors = each.tensors(dtype)
        model = ir.to_proto(single_node_model(each.attributes(), tensors, dynamic=False))
        del model.graph.value_info[:]
        feed = {n: x.numpy() for n, x in tensors.items()}
        steps[name] = bound(session(model, threads), feed, shape)
    elem = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    q, k = t["q"].numpy(), t["k"].numpy()
    v = t["v"].numpy() if "v" in t else k
    runner = session(standard_node(case, "Attention", elem), threads)
    padded = bound(runner, {"q": q, "k": k, "v": v}, (case.B, case.H, 1, v.shape[3]))
    steps["ORT Attention"] = lambda: padded()[..., : case.V]
    if not case.values_in_k:
        new = {
            "q": q.reshape(case.B, 1, -1),
            "k": k[:, :, -1].reshape(case.B, 1, -1),
            "v": v[:, :, -1].reshape(case.B, 1, -1),
            "past_k": k.copy(),
            "past_v": v.copy(),
            "seqlens_k": np.full(case.B, case.T - 1, np.int32),
            "total": np.array([case.T], np.int32),
        }
        runner = session(standard_node(case, "GroupQueryAttention", elem), threads)
        steps["ORT GroupQueryAttention"] = bound(runner, new, (case.B, 1, case.H * case.D))
    tq, tk = t["q"], t["k"]
    tv = t["v"] if "v" in t else tk[..., : case.V]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    scale = case.attributes().scale
    steps["torch enable_gqa"] = lambda: sdpa(tq, tk, tv, scale=scale, enable_gqa=True)
    packed = tq.reshape(case.B, case.Hkv, case.H // case.Hkv, case.D)
    steps["torch packed"] = lambda: sdpa(packed, tk, tv, scale=scale)
    return steps


def check(case: Case, dtype: torch.dtype, steps: dict[str, Step]) -> None:
    """Refuse to time what is wrong."""
    t = case.tensors(dtype)
    expected, _ = reference.attention(
        *(t.get(n) for n in OP_INPUTS),  # type: ignore[arg-type]
        attributes=case.attributes(),
    )
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for name, step in steps.items():
        y = torch.as_tensor(np.asarray(step())).double().reshape(expected.shape)
        error = (y - expected).abs().max().item()
        if not error < tolerance:
            raise SystemExit(f"{case.name}: {name} is wrong by {error}")


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Interleaved times in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 15:
        for name in random.sample(list(steps), len(steps)):
            steps[name]()
            start = time.perf_counter()
            steps[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--json", type=Path, help="write all times there")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    random.seed(0)
    info = machine()
    print(
        f"{info['cpu']}, {info['cores']} cores; {arguments.dtype}; Python "
        f"{platform.python_version()}, onnxruntime {onnxruntime.__version__}, torch "
        f"{torch.__version__}"
    )
    everything = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread(s), milliseconds, median (p10–p90):\n")
        header: list[str] = []
        for case in CASES:
            steps = contenders(case, dtype, threads)
            check(case, dtype, steps)
            times = measure(steps, arguments.seconds)
            everything[f"{threads} threads, {case.name}"] = times
            if not header:
                header = list(steps)
                print(f"| decode | {' | '.join(header)} | specialised × | live × |")
                print("|---" * (len(header) + 3) + "|")
            cells = []
            for name in header:
                if name not in times:
                    cells.append("–")
                    continue
                p10, p50, p90 = np.percentile(times[name], (10, 50, 90))
                cells.append(f"{p50:.2f} ({p10:.2f}–{p90:.2f})")
            best = np.min([times[name] for name in RIVALS if name in times], axis=0)
            ratios = [np.median(best / times[name]) for name in header[:2]]
            print(f"| {case.name} | {' | '.join(cells)} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(everything))


if __name__ == "__main__":
    with torch.no_grad():
        main()
