#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the CUDA kernels take of a GPU: reads ptxas's words in a build folder of plugins/.

``check`` fails if a kernel spills registers or has a stack frame. ``table`` prints Markdown: each
kernel's registers, shared memory and occupancy on each GPU. ``sms`` prints what a full build is
for. The standard library is enough.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {1: "float32", 10: "float16", 16: "bfloat16"}


class Kernel(NamedTuple):
    """One kernel as ptxas compiled it for one SM; spills are bytes of loads and stores."""

    symbol: str
    sm: int
    registers: int
    stack: int
    spills: int
    static_shared: int


_KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<sm>\d+)a?'\n"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_ptxas(text: str) -> list[Kernel]:
    """The kernels that ``ptxas -v`` tells of."""
    kernels = []
    for found in _KERNEL.finditer(text):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        kernels.append(
            Kernel(
                symbol=found["symbol"],
                sm=int(found["sm"]),
                registers=int(found["registers"]),
                stack=int(found["stack"]),
                spills=int(found["stores"]) + int(found["loads"]),
                static_shared=int(shared[1]) if shared else 0,
            )
        )
    announced = text.count("Compiling entry function")
    if len(kernels) != announced:
        raise SystemExit(f"ptxas tells of {announced} kernels, of which {len(kernels)} were read")
    return kernels


def read_build(folder: Path) -> list[Kernel]:
    """The kernels of a build folder, less those whose source is gone."""
    kernels = []
    for log in sorted(folder.rglob("*.o.log")):
        # …/fastmqa_kernels.dir/kernels/instantiations/NAME.cu.o.log
        source = ROOT / "plugins" / "kernels" / "instantiations" / log.name.removesuffix(".o.log")
        if source.exists():
            kernels += parse_ptxas(log.read_text("utf-8"))
    return kernels


def with_local_memory(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Those that keep something in local memory, which is device memory: slow."""
    return [kernel for kernel in kernels if kernel.spills or kernel.stack]


def built_variants(library: Path) -> list[dict[str, Any]]:
    """The variants that a library holds, by its own words."""
    describe = ctypes.CDLL(str(library.resolve())).fastmqa_describe_variants
    describe.restype, describe.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t)
    buffer = ctypes.create_string_buffer(describe(None, 0))
    describe(buffer, len(buffer))
    variants: list[dict[str, Any]] = json.loads(buffer.value)
    return variants


def variant_name(variant: Mapping[str, Any]) -> str:
    """For people: type, head sizes, tile, warps, stages."""
    v = variant
    return (
        f"{v['dtype']} {v['head_size']}/{v['v_head_size']}, {v['block_rows']} × {v['block_keys']}, "
        f"{v['warps_rows']} × {v['warps_keys']} warps, {v['stages']} "
        f"stage{'s' if v['stages'] > 1 else ''}"
    )


def template_arguments(symbol: str) -> list[int]:
    """The numbers among the template arguments of a mangled name."""
    return [int(x) for x in re.findall(r"L(?:[a-z]|N\w*?E)(\d+)E", symbol)]


class Gpu(NamedTuple):
    """What an SM has; ``code`` is the SM whose code runs on it."""

    name: str
    sm: int
    code: int
    threads: int
    blocks: int
    shared_kb: int


GPUS = (
    Gpu("75", 75, 75, 1024, 16, 64),
    Gpu("80", 80, 80, 2048, 32, 164),
    Gpu("86", 86, 80, 1536, 16, 100),
    Gpu("89", 89, 80, 1536, 24, 100),
    Gpu("90", 90, 90, 2048, 32, 228),
    Gpu("100", 100, 100, 2048, 32, 228),
    Gpu("120", 120, 120, 1536, 24, 100),
)


def code_for(sm: int) -> int:
    """Of the SMs that a full build is for, that whose code a GPU runs; SM80's PTX if none."""
    same_generation = [gpu.code for gpu in GPUS if gpu.sm // 10 == sm // 10 and gpu.sm <= sm]
    return max(same_generation, default=80)


def blocks_per_sm(gpu: Gpu, *, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks of a kernel an SM holds at once; 0: not even one.

    The rules of CUDA's occupancy calculator (cuda_occupancy.h): 64 Ki registers in four parts,
    which warps get in units of 256; shared memory in units of 128 bytes, or 256 on SM75; from SM80
    on, 1 KB more for each block.
    """
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (65536 // 4 // per_warp) * 4 // warps
    unit, reserved = (128, 1024) if gpu.sm >= 80 else (256, 0)
    allocated = -(-(shared_bytes + reserved) // unit) * unit
    by_shared = gpu.shared_kb * 1024 // allocated if allocated else gpu.blocks
    return min(by_registers, by_shared, gpu.threads // (32 * warps), gpu.blocks)


class Row(NamedTuple):
    """A kernel with what it takes on each SM that it was compiled for."""

    name: str
    threads: int
    shared_bytes: int
    by_sm: dict[int, Kernel]


def rows_of(kernels: Iterable[Kernel], variants: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The kernels in the order of the variants, then the others."""
    by_index = {v["index"]: v for v in variants}
    rows: dict[tuple[int, str], Row] = {}
    for kernel in kernels:
        numbers = template_arguments(kernel.symbol)
        if "attention_kernel" in kernel.symbol:
            place = numbers[0]
            variant = by_index[place]
            threads = 32 * variant["warps_rows"] * variant["warps_keys"]
            row = Row(variant_name(variant), threads, variant["shared_bytes"], {})
        else:
            kind = re.search(r"(combine)_kernel", kernel.symbol)
            if kind is None:
                raise SystemExit(f"what kernel is {kernel.symbol}?")
            place = len(by_index)
            row = Row(f"{kind[1]}, {DTYPES[numbers[0]]}", 128, kernel.static_shared, {})
        rows.setdefault((place, row.name), row).by_sm[kernel.sm] = kernel
    return [rows[key] for key in sorted(rows)]


def table(rows: Iterable[Row], gpus: Iterable[Gpu]) -> list[str]:
    """Markdown: the kernels that are there for all of these GPUs."""
    gpus = list(gpus)
    codes = sorted({gpu.code for gpu in gpus})
    header = ["kernel", "threads", "shared KB"]
    header += [f"registers {code}" for code in codes] + ["spills"]
    header += [f"SM{gpu.name}" for gpu in gpus]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        if not all(code in row.by_sm for code in codes):
            continue
        cells = [row.name, str(row.threads), f"{row.shared_bytes / 1024:.1f}"]
        cells += [str(row.by_sm[code].registers) for code in codes]
        spills = [f"SM{c}: {row.by_sm[c].spills}" for c in codes if row.by_sm[c].spills]
        cells.append(", ".join(spills) or "0")
        for gpu in gpus:
            blocks = blocks_per_sm(
                gpu,
                threads=row.threads,
                registers=row.by_sm[gpu.code].registers,
                shared_bytes=row.shared_bytes,
            )
            cells.append(f"{blocks} ({blocks * row.threads // 32})" if blocks else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(folder: Path, built: str) -> str:
    """All of docs/kernels-resources.md."""
    library = folder / "libfastmqa_kernels.so"
    kernels = read_build(folder)
    rows = rows_of(kernels, built_variants(library))
    sms = ", ".join(str(sm) for sm in sorted({kernel.sm for kernel in kernels}))
    lines = [
        "# What each kernel takes of a GPU",
        "",
        "Written by `scripts/build_all.sh`, from what ptxas says; no GPU had a part in it.",
        "",
        f"{len(rows)} kernels for SM {sms}, and PTX of SM 80: {built}, "
        f"{library.stat().st_size / 1e6:.1f} MB. Of the {len(kernels)} that came of it, "
        f"{len(with_local_memory(kernels)) or 'none'} spill registers or use a stack; the column "
        "has the bytes.",
        "",
        "A name gives type, head sizes D/V, rows × keys of a tile, warps over rows × keys, and "
        "stages of keys and values in shared memory. Under each SM: blocks that it holds at once, "
        "and warps in brackets; – where a block needs more shared memory than it has. SM86 and 89 "
        "run SM80's code.",
        "",
        "## SM75",
        "",
        *table(rows, [gpu for gpu in GPUS if gpu.sm < 80]),
        "",
        "## SM80 and newer",
        "",
        *table(rows, [gpu for gpu in GPUS if gpu.sm >= 80]),
    ]
    return "\n".join(lines)


def check(folder: Path) -> None:
    """Print how many kernels there are, or end with those that spill."""
    kernels = read_build(folder)
    if not kernels:
        raise SystemExit(f"{folder} holds no log of ptxas: build with scripts/build_kernels.sh")
    wrong = with_local_memory(kernels)
    for kernel in wrong:
        print(
            f"sm_{kernel.sm}: {kernel.symbol}: {kernel.spills} bytes of spills, "
            f"a stack frame of {kernel.stack} bytes, {kernel.registers} registers",
            file=sys.stderr,
        )
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(kernels)} kernels spill or use a stack")
    print(f"{len(kernels)} kernels, no spills and no stack")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "table"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
    command = commands.choices["table"]
    command.add_argument("--built", default="", help="by what and how fast it was built")
    command = commands.add_parser("sms")
    command.add_argument("sm", type=int, nargs="?", help="of one GPU: prints whose code it runs")
    arguments = parser.parse_args()
    if arguments.command == "check":
        check(arguments.folder)
    elif arguments.command == "table":
        print(page(arguments.folder, arguments.built))
    else:
        codes = sorted({gpu.code for gpu in GPUS})
        print(*(codes if arguments.sm is None else [code_for(arguments.sm)]))


if __name__ == "__main__":
    main()
