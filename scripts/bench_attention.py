#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Attention on a GPU: our kernels against what a user could pick, the same shapes in one run.

Contenders: torch's scaled dot-product attention with ``enable_gqa``, and in decode on packed heads;
FlashAttention and FlashInfer where they are installed and take the shape; with ``--tensorrt``
engines of our plugin, of the function in standard ops and of ONNX's Attention. Each result is
compared with the first of them that runs before it is timed.

A time is that of one replay of a CUDA graph between two events, after L2 was overwritten, the
contenders in a new random order each time; a contender that cannot be captured is timed without a
graph and marked so. A share of the roofline is the least time for the shape's bytes (Q and Y once,
K and V once per KV head) at the speed of a device copy, or for its operations (2 (D + V) per
visible pair of query and key) at that of a large matrix product, whichever is longer, over the
time; copy and product are measured in the same run.

Prints Markdown: median milliseconds (p10–p90). A benchmark is no test: the exit code is 0 whatever
the figures, and 3 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastmqa_export import plugins
from fastmqa_export.config import AttentionAttributes, Feature
from fastmqa_export.errors import FastMqaError, MissingDependencyError
from fastmqa_export.kernels import make_call

OURS = "fastmqa"
SDPA = "SDPA enable_gqa"
#: Asked of us, see the issues: shares of the roofline, and times faster than SDPA.
DECODE_SHARE, PREFILL_SHARE, MQA_RATIO = 0.85, 0.60, 2.0
LARGE_CACHE = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call. Letters as everywhere: B H Hkv S T D V."""

    name: str
    B: int
    H: int
    Hkv: int
    S: int
    T: int
    D: int
    V: int
    values_in_k: bool = False

    @property
    def is_decode(self) -> bool:
        """One query that sees all keys; otherwise as many as keys, causal."""
        return self.S == 1

    @property
    def scale(self) -> float:
        """That of DeepSeek's heads before absorption, 192 columns, or the usual one."""
        return (192 if self.values_in_k else self.D) ** -0.5

    def cache_bytes(self, size: int = 2) -> int:
        """K and V."""
        columns = self.D + (0 if self.values_in_k else self.V)
        return size * self.B * self.Hkv * self.T * columns

    def bytes(self, size: int = 2) -> int:
        """The least that is read and written: Q, K, V and Y once each."""
        return self.cache_bytes(size) + size * self.B * self.H * self.S * (self.D + self.V)

    def flops(self) -> int:
        """Of the two products, over the pairs that are visible: S = T is causal, S = 1 sees all."""
        pairs = self.T if self.is_decode else self.S * (self.S + 1) // 2
        return 2 * self.B * self.H * pairs * (self.D + self.V)


def shapes(kind: str) -> Iterator[Shape]:
    """Decode steps or prefills."""
    mqa128 = {"H": 32, "Hkv": 1, "D": 128, "V": 128}
    mqa64 = {"H": 71, "Hkv": 1, "D": 64, "V": 64}
    gqa = {"H": 32, "Hkv": 8, "D": 128, "V": 128}
    if kind == "decode":
        models: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
            ("MQA 32/1", mqa128, (1024, 4096, 16384, 65536)),
            ("MQA 71/1", mqa64, (4096, 16384)),
            ("MQA 48/1", {**mqa128, "H": 48}, (4096, 16384)),
            ("GQA 32/8", gqa, (4096, 16384)),
            ("GQA 9/3", {"H": 9, "Hkv": 3, "D": 64, "V": 64}, (4096, 16384)),
        ]
        for heads in (16, 128):
            latent = {"H": heads, "Hkv": 1, "D": 576, "V": 512, "values_in_k": True}
            models.append((f"MLA {heads} heads", latent, (4096, 16384)))
        for name, sizes, lengths in models:
            for b in (1, 8):
                for t in lengths:
                    yield Shape(
                        name=f"{name}, D {sizes['D']}, B {b}, T {t}", B=b, S=1, T=t, **sizes
                    )
    else:
        for name, sizes in (("MQA 32/1", mqa128), ("GQA 32/8", gqa), ("MQA 71/1", mqa64)):
            for t in (512, 1024, 2048, 4096, 8192):
                yield Shape(name=f"{name}, D {sizes['D']}, S = T = {t}", B=1, S=t, T=t, **sizes)


class Contender(NamedTuple):
    """``step`` enqueues one call and returns y; ``view`` makes (B, H, S, V) of that."""

    step: Callable[[], Tensor]
    view: Callable[[Tensor], Tensor] = lambda y: y


class NotApplicable(Exception):
    """A contender is not installed, or does not take a shape."""


def ours(shape: Shape, q: Tensor, k: Tensor, v: Tensor | None) -> Contender:
    """The library of kernels."""
    attributes = AttentionAttributes(
        scale=shape.scale,
        is_causal=0 if shape.is_decode else 1,
        v_head_size=shape.V if v is None else 0,
        features=int(Feature.VALUES_IN_K) if v is None else 0,
    )
    library = plugins.kernel_library()
    call = make_call(q, k, v, None, None, None, attributes=attributes, return_lse=False)
    device = library.device(torch.cuda.current_device())

    def step() -> Tensor:
        library.run(call, device, torch.cuda.current_stream().cuda_stream)
        return call.y

    return Contender(step)


def sdpa(shape: Shape, q: Tensor, k: Tensor, v: Tensor | None) -> Contender:
    """What PyTorch users write."""
    values = k[..., : shape.V] if v is None else v
    attention = torch.nn.functional.scaled_dot_product_attention
    causal = not shape.is_decode
    return Contender(
        lambda: attention(q, k, values, is_causal=causal, scale=shape.scale, enable_gqa=True)
    )


def sdpa_packed(shape: Shape, q: Tensor, k: Tensor, v: Tensor | None) -> Contender:
    """In decode, the heads that share keys can be the rows of one query."""
    if not shape.is_decode:
        raise NotApplicable("decode only")
    values = k[..., : shape.V] if v is None else v
    attention = torch.nn.functional.scaled_dot_product_attention
    packed = q.reshape(shape.B, shape.Hkv, shape.H // shape.Hkv, shape.D)
    return Contender(
        lambda: attention(packed, k, values, scale=shape.scale),
        lambda y: y.reshape(shape.B, shape.H, 1, shape.V),
    )


def imported(name: str) -> Any:
    """A module that may be missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotApplicable(f"{name} is not installed") from error


def flash_attention(shape: Shape, q: Tensor, k: Tensor, v: Tensor | None) -> Contender:
    """FlashAttention, with K and V as it likes them: (B, T, Hkv, ·)."""
    module = imported("flash_attn")
    if v is None:
        raise NotApplicable("it has no absorbed MLA")
    qs, ks, vs = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    if shape.is_decode:
        step = lambda: module.flash_attn_with_kvcache(qs, ks, vs, softmax_scale=shape.scale)  # noqa: E731
    else:
        step = lambda: module.flash_attn_func(qs, ks, vs, softmax_scale=shape.scale, causal=True)  # noqa: E731
    return Contender(step, lambda y: y.transpose(1, 2))


def flash_infer(shape: Shape, q: Tensor, k: Tensor, v: Tensor | None) -> Contender:
    """FlashInfer's calls for one sequence, with K and V as it likes them: (T, Hkv, ·)."""
    module = imported("flashinfer")
    if v is None or shape.B > 1:
        raise NotApplicable("its calls for one sequence, without MLA")
    qs, ks, vs = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    if shape.is_decode:
        step = lambda: module.single_decode_with_kv_cache(  # noqa: E731
            qs[0], ks, vs, sm_scale=shape.scale, use_tensor_cores=True
        )
        return Contender(step, lambda y: y[None, :, None])
    step = lambda: module.single_prefill_with_kv_cache(  # noqa: E731
        qs, ks, vs, causal=True, sm_scale=shape.scale
    )
    return Contender(step, lambda y: y.transpose(0, 1)[None])


def tensorrt_engine(kind: str) -> Callable[[Shape, Tensor, Tensor, Tensor | None], Contender]:
    """An engine of one attention, see tensorrt_contenders.py."""

    def make(shape: Shape, q: Tensor, k: Tensor, v: Tensor | None) -> Contender:
        imported("tensorrt")
        import tensorrt_contenders  # wants onnx, which the other contenders do not

        if v is None and kind == tensorrt_contenders.NATIVE:
            raise NotApplicable("its keys and values have one head size")
        sizes = dataclasses.asdict(shape) | {"is_causal": not shape.is_decode}
        case = tensorrt_contenders.Case(**sizes, scale=shape.scale)
        y = q.new_empty((shape.B, shape.H, shape.S, shape.V))
        tensors = {"q": q, "k": k, "v": k if v is None else v, "y": y}
        return Contender(tensorrt_contenders.step(case, kind, tensors))

    return make


CONTENDERS: dict[str, Callable[[Shape, Tensor, Tensor, Tensor | None], Contender]] = {
    OURS: ours,
    SDPA: sdpa,
    "SDPA packed": sdpa_packed,
    "FlashAttention": flash_attention,
    "FlashInfer": flash_infer,
}


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random q, k and v on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int, rows: int, columns: int) -> Tensor:
        size = (shape.B, heads, rows, columns)
        return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

    q, k = normal(shape.H, shape.S, shape.D), normal(shape.Hkv, shape.T, shape.D)
    return q, k, None if shape.values_in_k else normal(shape.Hkv, shape.T, shape.V)


class Timed(NamedTuple):
    """What is replayed, and whether by a graph."""

    replay: Callable[[], Any]
    in_graph: bool


def captured(step: Callable[[], Any]) -> Timed:
    """A graph of one step; the step itself if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return Timed(step, False)
    return Timed(graph.replay, True)


def prepared(
    shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, Timed], dict[str, str], list[Any]]:
    """The contenders that run and are right, why the others do not, and what to keep alive."""
    q, k, v = inputs(shape, dtype)
    tolerance = 2e-2 if dtype == torch.float16 else 6e-2
    timed: dict[str, Timed] = {}
    reasons: dict[str, str] = {}
    keep: list[Any] = [q, k, v]
    expected: Tensor | None = None
    # The rivals first: one of them is what the others have to agree with.
    for name in sorted(CONTENDERS, key=lambda name: name == OURS):
        try:
            contender = CONTENDERS[name](shape, q, k, v)
            y = contender.view(contender.step()).float()
            torch.cuda.synchronize()
        except NotApplicable as error:
            reasons[name] = str(error)
            continue
        except (
            *(RuntimeError, ValueError, TypeError, AssertionError, AttributeError),
            FastMqaError,
        ) as error:
            if name == OURS:
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if expected is None:
            expected = y.clone()
        apart = (y - expected).abs().max().item()
        if not apart < tolerance:
            raise SystemExit(f"{shape.name}: {name} is {apart} away from the others")
        timed[name] = captured(contender.step)
        keep.append(contender)
    return timed, reasons, keep


class Flush:
    """Overwrites L2."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._memory = torch.empty(max(4 * size, 256 << 20), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        """Enqueue that."""
        self._memory.zero_()


def measure(timed: dict[str, Timed], samples: int, flush: Callable[[], None]) -> dict[str, list]:
    """Milliseconds of each, interleaved."""
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in timed}
    for _ in range(samples):
        for name in random.sample(list(timed), len(timed)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            timed[name].replay()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}


def roofline(dtype: torch.dtype, samples: int, flush: Callable[[], None]) -> tuple[float, float]:
    """Bytes per second of a device copy, and operations per second of a matrix product."""
    free, _ = torch.cuda.mem_get_info()
    count = min(1 << 30, free // 4)
    source, target = (torch.zeros(count, dtype=torch.uint8, device="cuda") for _ in range(2))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    timed = {
        "copy": captured(lambda: target.copy_(source)),
        "product": captured(lambda: torch.matmul(a, b, out=out)),
    }
    times = measure(timed, samples, flush)
    copy, product = (statistics.median(times[name]) / 1e3 for name in timed)
    return 2 * count / copy, 2 * n**3 / product


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature, now."""
    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,"
        "temperature.gpu"
    )
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"name": torch.cuda.get_device_name(0)}
    return dict(zip(fields.split(","), answer.strip().split(", "), strict=True))


def versions() -> dict[str, str]:
    """Of what ran, and the commit."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("flash_attn", "flashinfer", "tensorrt"):
        try:
            found[name] = importlib.import_module(name).__version__
        except (ImportError, AttributeError):
            found[name] = "none"
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found["commit"] = done.stdout.strip() or "unknown"
    except OSError:
        found["commit"] = "unknown"
    return found


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """p10, median and p90."""
    tenths = statistics.quantiles(times, n=10)
    return tenths[0], statistics.median(times), tenths[-1]


def records_of(
    shape: Shape,
    timed: dict[str, Timed],
    times: dict[str, list[float]],
    peaks: tuple[float, float],
) -> dict[str, dict[str, Any]]:
    """What is said of each contender on a shape."""
    least = max(shape.bytes() / peaks[0], shape.flops() / peaks[1])
    records = {}
    for name, milliseconds in times.items():
        p10, median, p90 = percentiles(milliseconds)
        seconds = median / 1e3
        records[name] = {
            "shape": dataclasses.asdict(shape),
            "contender": name,
            "milliseconds": median,
            "p10": p10,
            "p90": p90,
            "samples": len(milliseconds),
            "in_graph": timed[name].in_graph,
            "gb_per_s": shape.bytes() / seconds / 1e9,
            "tflop_per_s": shape.flops() / seconds / 1e12,
            "roofline": least / seconds,
        }
    return records


def row(shape: Shape, records: dict[str, dict[str, Any]], header: list[str]) -> str:
    """A line of the table: times, then ours in bytes and operations, and how much faster it is."""
    cells = [shape.name]
    for name in header:
        if name not in records:
            cells.append("–")
            continue
        r = records[name]
        graph = "" if r["in_graph"] else ", no graph"
        cells.append(f"{r['milliseconds']:.3f} ({r['p10']:.3f}–{r['p90']:.3f}{graph})")
    mine = records[OURS]
    rivals = [r["milliseconds"] for name, r in records.items() if name != OURS]
    cells += [
        f"{mine['gb_per_s']:.0f}",
        f"{mine['tflop_per_s']:.1f}",
        f"{100 * mine['roofline']:.0f} %",
        f"{records[SDPA]['milliseconds'] / mine['milliseconds']:.2f}" if SDPA in records else "–",
        f"{min(rivals) / mine['milliseconds']:.2f}" if rivals else "–",
    ]
    return f"| {' | '.join(cells)} |"


def verdicts(results: list[tuple[Shape, dict[str, dict[str, Any]]]]) -> list[str]:
    """What was asked, and on how many shapes it was met."""
    share, prefill, ratio = [], [], []
    for shape, records in results:
        mine = records[OURS]
        if not shape.is_decode:
            prefill.append(mine["roofline"] >= PREFILL_SHARE)
        elif shape.cache_bytes() >= LARGE_CACHE:
            share.append(mine["roofline"] >= DECODE_SHARE)
        if shape.is_decode and shape.name.startswith("MQA") and SDPA in records:
            faster = records[SDPA]["milliseconds"] / mine["milliseconds"]
            ratio.append(faster >= MQA_RATIO)
    asked = [
        (f"decode, K and V ≥ 16 MiB: ≥ {DECODE_SHARE:.0%} of the roofline", share),
        (f"prefill: ≥ {PREFILL_SHARE:.0%} of the roofline", prefill),
        (f"MQA decode: ≥ {MQA_RATIO:g} × SDPA", ratio),
    ]
    return [f"* {what}: met on {sum(met)} of {len(met)} shapes" for what, met in asked if met]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=["decode", "prefill"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--samples", type=int, default=50, help="of each time")
    parser.add_argument("--quick", action="store_true", help="every fourth shape")
    parser.add_argument(
        "--tensorrt", action="store_true", help="engines too; each is built, which takes long"
    )
    parser.add_argument("--json", type=Path, help="write a line of JSON per shape and contender")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_attention.py needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        sys.exit(3)
    try:
        plugins.kernel_library()
    except MissingDependencyError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

    if arguments.tensorrt:
        for kind in ("TensorRT plugin", "TensorRT function", "TensorRT Attention"):
            CONTENDERS[kind] = tensorrt_engine(kind)
    random.seed(0)
    dtype = getattr(torch, arguments.dtype)
    flush = Flush()
    before, built = gpu_state(), versions()
    peaks = roofline(dtype, arguments.samples, flush)
    print(f"{before['name']}; {arguments.dtype}; {', '.join(f'{k} {v}' for k, v in built.items())}")
    print(f"Copy {peaks[0] / 1e9:.0f} GB/s, matrix product {peaks[1] / 1e12:.1f} TFLOP/s.")
    common = {"gpu": before, "versions": built, "dtype": arguments.dtype}
    common |= {"copy_gb_per_s": peaks[0] / 1e9, "product_tflop_per_s": peaks[1] / 1e12}
    lines: list[str] = []
    results = []
    for kind in arguments.kinds or ["decode", "prefill"]:
        header = [
            name for name in CONTENDERS if kind == "decode" or CONTENDERS[name] != sdpa_packed
        ]
        titles = [*header, "GB/s", "TFLOP/s", "of the roofline", "× SDPA", "× best rival"]
        print(f"\n| {kind} | {' | '.join(titles)} |\n" + "|---" * (len(titles) + 1) + "|")
        missing: dict[str, str] = {}
        for shape in list(shapes(kind))[:: 4 if arguments.quick else 1]:
            timed, reasons, keep = prepared(shape, dtype)
            times = measure(timed, arguments.samples, flush)
            records = records_of(shape, timed, times, peaks)
            results.append((shape, records))
            print(row(shape, records, header), flush=True)
            lines += [json.dumps(record | common) for record in records.values()]
            missing |= {name: reason for name, reason in reasons.items() if name in header}
            del timed, keep
        for name, reason in missing.items():
            print(f"\n{name} is missing from some or all rows: {reason}")
    print()
    print(*verdicts(results), sep="\n")
    after = gpu_state()
    print(f"\nSM clock {before.get('clocks.sm')} before, {after.get('clocks.sm')} after.")
    if arguments.json:
        arguments.json.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
