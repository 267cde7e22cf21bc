# SPDX-License-Identifier: MIT
"""Runs nvcc's PTX of every tensor-core variant in an emulator and writes docs/kernels-ptx.md.

The emulator is ptxemu, a tool of the developers that is not part of this repository: its folder's
parent goes on PYTHONPATH, with numba and ml_dtypes. Run it after a change of a kernel:

    PYTHONPATH=FOLDER .venv/bin/python scripts/ptx_counters.py
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from budgets import BUDGET, oracle, same_dtype_error  # noqa: E402
from cases import Case as Inputs  # noqa: E402

from fastmqa_export import emit, plugins  # noqa: E402
from fastmqa_export.accuracy import measure  # noqa: E402

PAGE = ROOT / "docs" / "kernels-ptx.md"
SECTOR_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Run:
    """What a variant did in one case; ``ratio``s are to the least that is possible."""

    arch: str
    case: str
    variant: dict[str, Any]
    splits: int
    races: int
    unwaited: int
    conflicts: int
    wavefronts: int
    mma: int
    mma_ratio: float
    bytes_ratio: float
    workspace_ratio: float
    touched_ratio: float
    error_ratio: float
    seconds: float


def cases() -> Iterator[tuple[str, emit.Case]]:
    """Arch and case, so that every tensor-core variant runs once: decode, and prefill."""
    sizes = ((32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    kinds = [("sm_75", "float16")]
    kinds += [(arch, dtype) for arch in ("sm_80", "sm_86") for dtype in ("float16", "bfloat16")]
    kinds += [("sm_90", "float16")]
    for arch, sm_count in (("sm_75", 40), ("sm_80", 108)):
        for heads, d, v in ((71, 64, 64), (32, 128, 128), (48, 128, 128), (16, 576, 512)):
            columns = d if d > 256 else d + v
            yield arch, emit.Case(
                B=1, Hkv=1, H=heads, S=1, T=(16 << 20) // (2 * columns), D=d, V=v,
                dtype="float16", scale=d**-0.5, v=d <= 256, is_causal=True, sm_count=sm_count,
            )  # fmt: skip
    for arch, dtype in kinds:
        for d, v in (*sizes, (288, 256), (576, 512)):
            # Of what sm_80 shows too, sm_90 shows a part; sm_86 has a tile for less shared memory.
            if (arch == "sm_90" and d not in (64, 128, 576)) or (arch == "sm_86" and d != 576):
                continue
            shared: dict[str, Any] = {
                "B": 1, "Hkv": 1, "D": d, "V": v, "dtype": dtype, "scale": d**-0.5, "v": d <= 256,
                "is_causal": True,
            }  # fmt: skip
            # Rows of a decode decide the tile; with one SM and many rows, the largest is taken.
            for heads in (16, 40, 64, 71, 128):
                yield arch, emit.Case(**shared, H=heads, S=1, T=2048, sm_count=2)
            yield arch, emit.Case(**shared, H=1, S=512, T=512, sm_count=1)
            yield arch, emit.Case(**shared, H=4, S=64, T=256, sm_count=1)


def name_of(case: emit.Case) -> str:
    """The case in a few words."""
    kind = "decode" if case.S == 1 else "prefill"
    return f"{kind} H{case.H} S{case.S} T{case.T}"


def inputs_of(case: emit.Case) -> Inputs:
    """The same case with data."""
    return Inputs(
        name="", B=case.B, H=case.H, Hkv=case.Hkv, S=case.S, T=case.T, D=case.D, V=case.V,
        scale=case.scale, is_causal=case.is_causal, values_in_k=not case.v,
    )  # fmt: skip


def live(case: emit.Case) -> np.ndarray:
    """(rows of one KV head, T): whether a row sees a key."""
    group = case.H // case.Hkv
    position = case.T - case.S + np.arange(case.S * group) // group
    return np.arange(case.T)[None] <= position[:, None]


def blocked(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which blocks of that size hold a true element."""
    height, width = (-(-n // size) for n, size in zip(matrix.shape, (rows, columns), strict=True))
    padded = np.zeros((height * rows, width * columns), bool)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(height, rows, width, columns).any((1, 3))


def least_mma(case: emit.Case, variant: dict[str, Any]) -> int:
    """Matrix instructions for the fragments of 16 rows with at least one live score."""
    depth = 8 if variant["min_sm"] == 75 else 16
    seen = live(case)
    scores = blocked(seen, 16, 8).sum() * variant["head_size"] // depth
    outputs = blocked(seen, 16, depth).sum() * variant["v_head_size"] // 8
    return int(case.B * case.Hkv * (scores + outputs))


def least_bytes(case: emit.Case, variant: dict[str, Any], *, once: bool = False) -> int:
    """Q and y once; keys and values once per tile of rows, of key tiles with a live score.

    ``once``: once for all tiles of rows.
    """
    seen = live(case)
    tiles = blocked(seen, len(seen) if once else variant["block_rows"], variant["block_keys"])
    keys = np.minimum(
        variant["block_keys"], case.T - np.arange(tiles.shape[1]) * variant["block_keys"]
    )
    columns = case.D if not case.v else case.D + case.V
    read = (tiles * keys).sum() * columns * case.Hkv
    return int(2 * case.B * (read + case.H * case.S * (case.D + case.V)))


def run(arch: str, case: emit.Case, plan: dict[str, Any], ptx: str) -> Run:
    """Run the launches of a plan."""
    import ptxemu  # type: ignore[import-not-found]

    started = time.perf_counter()
    variant = plan["variant"]
    inputs = inputs_of(case)
    dtype = emit.DTYPES[case.dtype]
    tensors = inputs.tensors(dtype)
    module = ptxemu.Module(ptx)
    as_bytes = {n: x.contiguous().reshape(-1).view(torch.uint8).numpy() for n, x in tensors.items()}
    sizes = {"y": 2 * case.B * case.H * case.S * case.V, "lse": 4 * case.B * case.H * case.S}
    sizes["workspace"] = plan["workspace_bytes"]
    memory = {n: module.alloc(x) for n, x in as_bytes.items()}
    memory |= {n: module.alloc(np.full(max(s, 16), 0xFF, np.uint8)) for n, s in sizes.items()}
    stats = []
    for launch in plan["launches"]:
        (param,) = launch["params"]
        data = bytearray.fromhex(param["hex"])
        for offset, tensor in param["pointers"].items():
            data[int(offset) : int(offset) + 8] = memory[tensor].to_bytes(8, "little")
        entry = emit.entry_of(launch["kernel"], ptx)
        stats.append(
            module.launch(
                entry, launch["grid"], launch["block"], [bytes(data)],
                shared_bytes=launch["shared_bytes"],
            )
        )  # fmt: skip
    raw = module.read(memory["y"], np.uint8, (sizes["y"],))
    y = torch.from_numpy(raw).view(dtype).view(case.B, case.H, case.S, case.V)
    expected, _ = oracle(tensors, inputs.attributes())
    limit = BUDGET.limit(same_dtype_error(tensors, inputs.attributes(), expected))
    main = stats[0]
    sectors = sum(s.global_load.parts + s.global_store.parts for s in stats)
    # A split's outputs are written by one kernel and read by the other.
    workspace = 2 * sizes["workspace"]
    least = least_bytes(case, variant)
    shared = [main.shared_load, main.shared_store, main.shared_async]
    return Run(
        arch=arch,
        case=name_of(case),
        variant=variant,
        splits=plan["splits"],
        races=sum(len(s.races) for s in stats),
        unwaited=sum(s.poison_reads if isinstance(s.poison_reads, int) else len(s.poison_reads)
                     for s in stats),
        conflicts=sum(x.conflicts for x in shared),
        wavefronts=sum(x.parts for x in shared),
        mma=main.mma,
        mma_ratio=main.mma / least_mma(case, variant),
        bytes_ratio=(sectors * SECTOR_BYTES - workspace) / least,
        workspace_ratio=workspace / least,
        touched_ratio=main.global_unique_bytes / least_bytes(case, variant, once=True),
        error_ratio=measure(y, expected, dtype).max_abs / limit,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def table(runs: list[Run]) -> str:
    """The page."""
    lines = [
        "# The kernels in an emulator",
        "",
        "nvcc's PTX of every tensor-core variant, run by ptxemu on a CPU; written by",
        "`scripts/ptx_counters.py`. No GPU had a part in it. Over all runs: "
        f"{sum(r.races for r in runs)} races, {sum(r.unwaited for r in runs)} reads of cp.async "
        f"data before its wait, {sum(r.conflicts for r in runs)} bank conflicts in "
        f"{sum(r.wavefronts for r in runs):,} shared-memory wavefronts of the attention kernels, "
        "no access out of bounds (the emulator stops at one).",
        "",
        "- *mma*: matrix instructions, against the count of fragments (16 rows, with 8 keys for "
        "the scores and the instruction's depth for the outputs) that hold a live score.",
        "- *bytes*: 32-byte sectors of device memory, read and written, against q and y once and k "
        "and v once per KV head and tile of rows, counting key tiles with a live score.",
        "- *splits*: what the workspace adds to that, written by the attention kernel and read by "
        "the combine kernel. The first rows are whole decodes, of 16 MB of keys and values, "
        "planned for a T4's 40 or an A100's 108 SMs; in the others, made for 2 SMs, keys are few.",
        "- *touched*: different bytes that the attention kernel touches, against q, y, and k and v "
        "once: what a cache that holds the rest would still have to move.",
        "- *error*: of y against the float64 oracle, in parts of the budget.",
        "",
        "| arch | dtype | D/V | rows × keys | warps | stages | case | splits | mma | of least | "
        "bytes of least | splits add | touched | error | wavefronts |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        v = r.variant
        lines.append(
            f"| {r.arch} | {v['dtype']} | {v['head_size']}/{v['v_head_size']} | "
            f"{v['block_rows']} × {v['block_keys']} | {v['warps_rows']} × {v['warps_keys']} | "
            f"{v['stages']} | {r.case} | {r.splits} | {r.mma} | {r.mma_ratio:.2f} | "
            f"{r.bytes_ratio:.3f} | {r.workspace_ratio:.3f} | {r.touched_ratio:.3f} | "
            f"{r.error_ratio:.2f} | "
            f"{r.wavefronts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all variants, two at a time, and write the page."""
    nvcc, sources = plugins.find_nvcc(), plugins.sources()
    planner = emit.build_planner(nvcc, sources)
    seen: set[tuple[str, int]] = set()
    work = []
    for arch, case in cases():
        call, _ = case.call()
        device = emit.Device(int(arch[3:]), case.sm_count, emit.SHARED_KB[arch] << 10)
        plan = planner.launches(call, device)
        # A variant is run once, but for the long decodes.
        if (arch, plan["variant"]["index"]) not in seen or case.sm_count > 2:
            seen.add((arch, plan["variant"]["index"]))
            work.append((arch, case, plan))
    wanted = {v["index"] for v in planner.variants() if v["dtype"] != "float32"}
    if missed := wanted - {index for _, index in seen}:
        raise SystemExit(f"no case runs the variants {sorted(missed)}")
    torch.set_num_threads(1)
    runs = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        compiled = [
            pool.submit(emit.compile_ptx, nvcc, sources, arch, plan, case.dtype)
            for arch, case, plan in work
        ]
        for (arch, case, plan), ptx in zip(work, compiled, strict=True):
            runs.append(run(arch, case, plan, ptx.result()))
            r = runs[-1]
            print(
                f"{len(runs)}/{len(work)} {arch} {json.dumps(r.variant['index'])} {r.case}: "
                f"races {r.races} conflicts {r.conflicts} mma {r.mma_ratio:.2f} bytes "
                f"{r.bytes_ratio:.3f} +{r.workspace_ratio:.3f} "
                f"touched {r.touched_ratio:.3f} error {r.error_ratio:.2f} "
                f"({r.seconds:.1f} s)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    bad = [r for r in runs if r.races or r.unwaited or not r.error_ratio <= 1]
    PAGE.write_text(table(runs), encoding="utf-8")
    if bad or not math.isfinite(sum(r.mma_ratio for r in runs)):
        raise SystemExit(f"{len(bad)} runs are wrong; see {PAGE}")


if __name__ == "__main__":
    main()
