#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""One decode step of attention on the CPU: the function body against what a user could pick.

Contenders, all in one process, in a new random order each repetition:

* the function body in onnxruntime, specialised (no feature live), and with lengths and causality;
* onnxruntime's Attention-23, and its GroupQueryAttention with past and present in one buffer;
* torch's scaled dot-product attention with ``enable_gqa``, and on packed heads.

Each contender computes as many attentions as a model may have layers, one after the other and each
with keys and values of its own, in all more than a cache holds; times are of one. Batch and keys
are dynamic in all files, inputs and outputs of onnxruntime are bound once, and each timed call
follows an untimed one of its own. Times count only where no other process used more than a tenth of
a core. Every result is checked against the float64 oracle first. Rounds make all sessions anew,
because where buffers come to lie in memory matters.

Prints Markdown: median milliseconds with p10–p90, the ratio (median over repetitions) of the best
of Attention, GroupQueryAttention and ``enable_gqa`` to the body, and the body's GFLOP/s. Beside
them stands a product of two 1536 × 1536 matrices in onnxruntime: no body made of MatMul can be
faster than that. A benchmark is no test: the exit code is 0 whatever the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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

RIVALS = ("ORT Attention", "ORT GroupQueryAttention", "torch enable_gqa")
#: What is asked of the first and of the second contender, for multi-query attention.
TARGETS = {"body, specialised": 3.5, "body, lengths and causal": 3.0}


#: Layers of a contender: so many that their keys and values exceed ``CACHE_BYTES``, at most this.
MOST_LAYERS = 32
CACHE_BYTES = 64 << 20


class Contender(NamedTuple):
    """``step`` is what is timed, so many ``calls`` of attention; ``result`` gives the first y."""

    step: Callable[[], Any]
    result: Callable[[], Any]
    calls: int = 1


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


def flops(case: Case) -> int:
    """Of the two products."""
    return 2 * case.B * case.H * case.S * case.T * (case.D + case.V)


def layers(case: Case, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Inputs of a contender's attentions, one after the other."""
    first = case.tensors(dtype)
    cached = sum(first[name].nbytes for name in ("k", "v") if name in first)
    count = min(-(-CACHE_BYTES // cached), MOST_LAYERS) if case.S == 1 else 1
    return [first, *({name: x.clone() for name, x in first.items()} for _ in range(count - 1))]


def repeated(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """A file's one node so many times, with inputs and outputs of its own: q, q1, q2, ..."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, (node,) = result.graph, model.graph.node
    own = {value.name for value in (*graph.input, *graph.output)}
    for i in range(1, count):
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"{node.name}{i}"
        for names in (copy.input, copy.output):
            names[:] = [f"{name}{i}" if name in own else name for name in names]
        for name, values in (("input", graph.input), ("output", graph.output)):
            for value in getattr(model.graph, name):
                values.add().CopyFrom(value)
                values[-1].name += str(i)
    return result


def session(
    model: onnx.ModelProto, threads: int, library: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session of that many threads, which stop when a step ends and so disturb no one else."""
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def bound(
    model: onnx.ModelProto,
    feeds: list[dict[str, np.ndarray]],
    out: tuple[int, ...],
    threads: int,
    library: Path | None = None,
) -> Contender:
    """The file's node for each of the feeds, y of shape ``out``.

    Inputs and outputs are bound once; a present is the buffer of its past.
    """
    runner = session(repeated(model, len(feeds)), threads, library)
    binding = runner.io_binding()
    outputs = [value.name for value in model.graph.output]
    first = None
    for i, feed in enumerate(feeds):
        suffix = str(i or "")
        values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in feed.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name + suffix, value)
        y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(out, next(iter(feed.values())).dtype))
        first = first or y
        for name in outputs:
            shared = values.get(name.replace("present", "past"))
            binding.bind_ortvalue_output(name + suffix, shared or y)
    return Contender(lambda: runner.run_with_iobinding(binding), first.numpy, len(feeds))


def torch_contender(
    attention: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    inputs: list[dict[str, torch.Tensor]],
) -> Contender:
    """Calls that allocate their results, as PyTorch does."""

    def step() -> None:
        for each in inputs:
            attention(each)

    return Contender(step, lambda: attention(inputs[0]).numpy(), len(inputs))


def node(case: Case, dtype: torch.dtype, threads: int, library: Path | None = None) -> Contender:
    """Our node as a file has it: head counts and sizes fixed, batch and keys dynamic.

    It runs as the function body, or as the custom op where its library is given.
    """
    inputs = layers(case, dtype)
    model = ir.to_proto(single_node_model(case.attributes(), inputs[0], dynamic=False))
    for value in model.graph.input:
        for axis, name in ((0, "b"), (2, "t" if value.name in ("k", "v") else "s")):
            if axis < len(value.type.tensor_type.shape.dim):
                value.type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.value_info[:]
    feeds = [{name: x.numpy() for name, x in each.items()} for each in inputs]
    return bound(model, feeds, (case.B, case.H, case.S, case.V), threads, library)


def standard_node(case: Case, kind: str, dtype: int) -> onnx.ModelProto:
    """A model of ONNX's Attention or of onnxruntime's GroupQueryAttention."""
    scale = case.attributes().scale

    def value(name: str, shape: list[Any], elem: int = dtype) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, elem, shape)

    if kind == "Attention":
        causal = int(case.is_causal)
        node = helper.make_node("Attention", ["q", "k", "v"], ["y"], scale=scale, is_causal=causal)
        inputs = [value("q", ["b", case.H, "s", case.D])]
        inputs += [value(n, ["b", case.Hkv, "t", case.D]) for n in ("k", "v")]
        outputs = [value("y", ["b", case.H, "s", None])]
    else:
        names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
        node = helper.make_node(
            "GroupQueryAttention", names, ["y", "present_k", "present_v"],
            domain="com.microsoft", num_heads=case.H, kv_num_heads=case.Hkv, scale=scale,
        )  # fmt: skip
        inputs = [value("q", ["b", "s", case.H * case.D])]
        inputs += [value(n, ["b", "s", case.Hkv * case.D]) for n in ("k", "v")]
        cache = ["b", case.Hkv, "t", case.D]
        inputs += [value("past_k", cache), value("past_v", cache)]
        inputs += [value("seqlens_k", ["b"], TensorProto.INT32)]
        inputs += [value("total", [1], TensorProto.INT32)]
        outputs = [value("y", ["b", "s", case.H * case.D])]
        outputs += [value("present_k", cache), value("present_v", cache)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def contenders(case: Case, dtype: torch.dtype, threads: int) -> dict[str, Contender]:
    """What can run the case."""
    inputs = layers(case, dtype)
    # All keys are valid, so that every contender does the same work.
    live = dataclasses.replace(case, kv_lengths=(case.T,) * case.B, is_causal=True)
    made = {
        "body, specialised": node(case, dtype, threads),
        "body, lengths and causal": node(live, dtype, threads),
    }
    elem = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    if case.values_in_k:
        for each in inputs:
            each["v"] = each["k"]
    arrays = [{name: x.numpy() for name, x in each.items()} for each in inputs]
    out = (case.B, case.H, 1, arrays[0]["v"].shape[3])
    wide = bound(standard_node(case, "Attention", elem), arrays, out, threads)
    made["ORT Attention"] = wide._replace(result=lambda: wide.result()[..., : case.V])
    if not case.values_in_k:  # it wants V = D
        new = [
            {
                "q": x["q"].reshape(case.B, 1, -1),
                "k": x["k"][:, :, -1].reshape(case.B, 1, -1),
                "v": x["v"][:, :, -1].reshape(case.B, 1, -1),
                # PyTorch's memory like the others': NumPy's has huge pages, which read faster.
                "past_k": torch.from_numpy(x["k"]).clone().numpy(),
                "past_v": torch.from_numpy(x["v"]).clone().numpy(),
                "seqlens_k": np.full(case.B, case.T - 1, np.int32),
                "total": np.array([case.T], np.int32),
            }
            for x in arrays
        ]
        made["ORT GroupQueryAttention"] = bound(
            standard_node(case, "GroupQueryAttention", elem),
            new, (case.B, 1, case.H * case.D), threads,
        )  # fmt: skip
    sdpa = torch.nn.functional.scaled_dot_product_attention
    scale = case.attributes().scale
    packed = (case.B, case.Hkv, case.H // case.Hkv, case.D)
    made["torch enable_gqa"] = torch_contender(
        lambda x: sdpa(x["q"], x["k"], x["v"][..., : case.V], scale=scale, enable_gqa=True), inputs
    )
    made["torch packed"] = torch_contender(
        lambda x: sdpa(x["q"].reshape(packed), x["k"], x["v"][..., : case.V], scale=scale), inputs
    )
    return made


def check(case: Case, dtype: torch.dtype, made: dict[str, Contender]) -> None:
    """Refuse to time what is wrong."""
    t = case.tensors(dtype)
    expected, _ = reference.attention(
        *(t.get(n) for n in OP_INPUTS),  # type: ignore[arg-type]
        attributes=case.attributes(),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, contender in made.items():
        contender.step()
        y = torch.as_tensor(contender.result()).double().reshape(expected.shape)
        error = (y - expected).abs().max().item()
        if not error < tolerance:
            raise SystemExit(f"{case.name}: {name} is wrong by {error}")


def others_cpu_seconds() -> float:
    """CPU time on this machine of everyone but this process, and what its host took away."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(
    made: dict[str, Contender], seconds: float, *, pause: float = 0.0
) -> tuple[dict[str, list[float]], bool]:
    """Interleaved times in milliseconds, and whether the machine did nothing else meanwhile.

    Spells in which it did do not count. If 10 × ``seconds`` pass without enough quiet ones, all do.
    Before each turn nothing runs for ``pause`` seconds, and then its contender, untimed.
    """
    quiet: dict[str, list[float]] = {name: [] for name in made}
    every: dict[str, list[float]] = {name: [] for name in made}
    begin, quiet_seconds = time.perf_counter(), 0.0
    while quiet_seconds < seconds and time.perf_counter() < begin + 10 * seconds:
        spell: dict[str, list[float]] = {name: [] for name in made}
        others, start = others_cpu_seconds(), time.perf_counter()
        while time.perf_counter() < start + 0.3:
            for name in random.sample(list(made), len(made)):
                step = made[name].step
                time.sleep(pause)
                turn = time.perf_counter()
                step()
                while time.perf_counter() < turn + pause:
                    step()
                before = time.perf_counter()
                step()
                spell[name].append((time.perf_counter() - before) * 1e3 / made[name].calls)
        wall = time.perf_counter() - start
        was_quiet = others_cpu_seconds() - others < 0.1 * wall
        quiet_seconds += wall * was_quiet
        for name, times in spell.items():
            every[name] += times
            quiet[name] += times * was_quiet
    is_quiet = quiet_seconds >= seconds
    return (quiet if is_quiet else every), is_quiet


def matmul_gflops(threads: int) -> float:
    """GFLOP/s of a large float32 product in onnxruntime, the best of a few."""
    n = 1536
    value = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [n, n]) for x in "aby"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])], "g", value[:2], value[2:]
    )
    opsets = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    a = np.random.default_rng(0).standard_normal((n, n), np.float32)
    contender = bound(model, [{"a": a, "b": a}], (n, n), threads)
    times, _ = measure({"matmul": contender}, 1.0)
    return 2 * n**3 / min(times["matmul"]) / 1e6


def row(
    label: str, times: dict[str, list[float]], header: list[str], work: int
) -> tuple[str, list[float]]:
    """One line of the table, and the two ratios."""
    cells = []
    for name in header:
        cells.append("–")
        if name in times:
            p10, p50, p90 = np.percentile(times[name], (10, 50, 90))
            cells[-1] = f"{p50:.2f} ({p10:.2f}–{p90:.2f})"
    best = np.min([times[name] for name in RIVALS if name in times], axis=0)
    ratios = [float(np.median(best / times[name])) for name in TARGETS]
    gflops = work / float(np.median(times["body, specialised"])) / 1e6
    cells += [f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"{gflops:.0f}"]
    return f"| {label} | {' | '.join(cells)} |", ratios


def table(dtype: torch.dtype, threads: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Print the table for that many threads; all times in milliseconds, by case and contender."""
    torch.set_num_threads(threads)
    plural = "s" if threads > 1 else ""
    print(f"\n{threads} thread{plural}, milliseconds, median (p10–p90); ", end="")
    print(f"MatMul 1536³: {matmul_gflops(threads):.0f} GFLOP/s, load {os.getloadavg()[0]:.1f}\n")
    everything: dict[str, Any] = {}
    header: list[str] = []
    met: dict[str, list[str]] = {name: [] for name in TARGETS}
    for case in CASES:
        times: dict[str, list[float]] = {}
        all_quiet = True
        for _ in range(rounds):
            made = contenders(case, dtype, threads)
            check(case, dtype, made)
            found, is_quiet = measure(made, seconds / rounds)
            all_quiet &= is_quiet
            for name, milliseconds in found.items():
                times.setdefault(name, []).extend(milliseconds)
        everything[case.name] = times
        if not header:
            header = list(times)
            print(f"| decode | {' | '.join(header)} | specialised × | live × | GFLOP/s |")
            print("|---" * (len(header) + 4) + "|")
        line, ratios = row(case.name + " (busy)" * (not all_quiet), times, header, flops(case))
        print(line, flush=True)
        for (name, target), ratio in zip(TARGETS.items(), ratios, strict=True):
            if case.name.startswith("MQA"):
                met[name].append(f"{ratio:.2f} {'met' if ratio >= target else 'missed'}")
    print()
    for name, target in TARGETS.items():
        print(f"* {name}, MQA, {target} × asked: {', '.join(met[name])}")
    return everything


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--rounds", type=int, default=2, help="times that sessions are made anew")
    parser.add_argument("--json", type=Path, help="write all times there")
    arguments = parser.parse_args()
    random.seed(0)
    info = machine()
    print(
        f"{info['cpu']}, {info['cores']} cores; {arguments.dtype}; Python "
        f"{platform.python_version()}, onnxruntime {onnxruntime.__version__}, torch "
        f"{torch.__version__}"
    )
    dtype = getattr(torch, arguments.dtype)
    results = {
        f"{threads} threads": table(dtype, threads, arguments.seconds, arguments.rounds)
        for threads in arguments.threads
    }
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": info, "dtype": arguments.dtype, "milliseconds": results})
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
