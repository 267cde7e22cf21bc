# SPDX-License-Identifier: MIT
"""A kernel's PTX and its launches for one case, as the library would launch it.

For emulators, debuggers and profilers: the PTX is compiled from the sources that ship, and the
launches come from the very host code that ships, compiled without its kernels in a few seconds.
What is written is described in docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastmqa_export import files, plugins
from fastmqa_export.config import Layout
from fastmqa_export.errors import ConfigError, KernelError
from fastmqa_export.kernels import Call, Device, Planner, make_call
from fastmqa_export.op import checked_attributes
from fastmqa_export.progress import Progress

#: Shared memory that one block may have, in KB, by architecture.
SHARED_KB: Final[Mapping[str, int]] = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
}
DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
MASKS: Final = {"bool": torch.bool, "float": torch.float32}

PTX_NAME: Final = "kernel.ptx"
LAUNCH_NAME: Final = "launch.json"

_INT32: Final = 2**31
#: What keeps dummy addresses of tensors apart, and aligned.
_DUMMY_STEP: Final = 1 << 20
_FLAGS: Final = ("-std=c++20", "-O3", "--expt-relaxed-constexpr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the op without its data, and the number of SMs that it is planned for.

    Attributes:
        B: batch.
        H: query heads.
        Hkv: key and value heads.
        S: queries.
        T: keys.
        D: head size of q and k.
        V: head size of v and y.
        dtype: "float16", "bfloat16" or "float32".
        scale: of the op, like the next five.
        is_causal: see `fastmqa_export.config.AttentionAttributes`.
        window_left: likewise.
        window_right: likewise.
        softcap: likewise.
        softmax_precision: likewise.
        attn_mask: None, "bool" or "float" (float32), of shape (B, H, S, T).
        kv_lengths: B numbers, or None.
        q_start: B numbers, or None.
        v: false: the values are the first V columns of k.
        layout: 0, or 1: q and y are (B, S, H, ·).
        lse: whether the log-sum-exp is written too.
        sm_count: streaming multiprocessors.
    """

    B: int
    H: int
    Hkv: int
    S: int
    T: int
    D: int
    V: int
    dtype: str
    scale: float
    sm_count: int
    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    softmax_precision: int = 1
    attn_mask: str | None = None
    kv_lengths: Sequence[int] | None = None
    q_start: Sequence[int] | None = None
    v: bool = True
    layout: int = 0
    lse: bool = True

    @classmethod
    def parse(cls, values: Any) -> Case:
        """The case that a JSON file's value describes.

        Raises:
            ConfigError: naming the key, what was given and what is accepted.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a case is an object with {', '.join(_KEYS)}; given: {values!r:.60}")
        if unknown := [key for key in values if key not in _KEYS]:
            raise ConfigError(
                f"unknown key {', '.join(map(repr, unknown))} of a case; known: {', '.join(_KEYS)}"
            )
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [key for key in required if key not in values]:
            raise ConfigError(
                f"a case lacks {', '.join(missing)}; always needed: {', '.join(required)}"
            )
        for key, value in values.items():
            holds, accepted = _KEYS[key]
            if not holds(value):
                raise ConfigError(f"{key} of a case is {json.dumps(value)}; it must be {accepted}")
        for key in ("kv_lengths", "q_start"):
            if (given := values.get(key)) is not None and len(given) != values["B"]:
                raise ConfigError(f"{key} of a case has {len(given)} numbers; B is {values['B']}")
        return cls(**values | {"is_causal": bool(values.get("is_causal", False))})

    def call(self) -> tuple[Call, dict[str, Tensor]]:
        """The call with tensors that have no memory, at made-up addresses; and all its tensors.

        Raises:
            ConfigError: for what the op does not accept.
        """

        def empty(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q_shape = (
            (self.B, self.H, self.S) if self.layout == Layout.BHSD else (self.B, self.S, self.H)
        )
        try:
            q = empty(*q_shape, self.D)
            k = empty(self.B, self.Hkv, self.T, self.D)
            v = empty(self.B, self.Hkv, self.T, self.V) if self.v else None
            mask = None
            if self.attn_mask is not None:
                mask = empty(self.B, self.H, self.S, self.T, dtype=MASKS[self.attn_mask])
            lengths, start = (
                None if given is None else empty(self.B, dtype=torch.int32)
                for given in (self.kv_lengths, self.q_start)
            )
            tensors = (q, k, v, mask, lengths, start)
            attributes = checked_attributes(
                *tensors,
                scale=self.scale,
                is_causal=self.is_causal,
                window_left=self.window_left,
                window_right=self.window_right,
                softcap=self.softcap,
                softmax_precision=self.softmax_precision,
                v_head_size=0 if self.v else self.V,
                layout=self.layout,
            )
            addresses = itertools.count(_DUMMY_STEP, _DUMMY_STEP)
            call = make_call(
                *tensors,
                attributes=attributes,
                return_lse=self.lse,
                address=lambda _: next(addresses),
            )
        except RuntimeError as error:  # torch cannot count that many bytes
            raise ConfigError(f"the sizes of the case are too large: {error}") from error
        outputs = {"y": call.y} | ({} if call.lse is None else {"lse": call.lse})
        return call, dict(call.inputs) | outputs


def _is_int(low: int, high: int = _INT32 - 1) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _is_number(x: Any) -> bool:
    return isinstance(x, float) or _is_int(-_INT32)(x)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool)


def _is_none_or_ints(x: Any) -> bool:
    return x is None or (isinstance(x, list) and all(map(_is_int(-_INT32), x)))


_Rule = tuple[Callable[[Any], bool], str]
_SIZE: Final[_Rule] = (_is_int(1), "an integer from 1 to 2^31 - 1")
_WINDOW: Final[_Rule] = (_is_int(-1), "a number of keys, or -1 for unbounded")
_NUMBER: Final[_Rule] = (_is_number, "a number")
_BOOL: Final[_Rule] = (_is_bool, "true or false")
_INTS: Final[_Rule] = (_is_none_or_ints, "null or a list of B 32-bit integers")
#: For each key of a case: what its value must be.
_KEYS: Final[Mapping[str, _Rule]] = {
    **dict.fromkeys(("B", "H", "Hkv", "S", "T", "D", "V"), _SIZE),
    "dtype": (lambda x: x in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
    "scale": _NUMBER,
    "is_causal": (lambda x: x in (0, 1) and isinstance(x, int), "true or false"),
    "window_left": _WINDOW,
    "window_right": _WINDOW,
    "softcap": _NUMBER,
    "softmax_precision": (lambda x: _is_int(1)(x) and x in (1, 10), "1 (float32) or 10 (float16)"),
    "attn_mask": (lambda x: x is None or x in tuple(MASKS), 'null, "bool" or "float"'),
    "kv_lengths": _INTS,
    "q_start": _INTS,
    "v": (_is_bool, "true, or false for values in k"),
    "layout": (lambda x: _is_int(0)(x) and x in tuple(Layout), "0 or 1"),
    "lse": _BOOL,
    "sm_count": _SIZE,
}


def read_case(path: Path) -> Case:
    """The case in a JSON file.

    Raises:
        ConfigError: if it cannot be read, or is no case.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from error
    return Case.parse(values)


def emit(case: Case, arch: str, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write ``kernel.ptx`` and ``launch.json`` for the case: both of them, or none.

    Args:
        case: the call.
        arch: a key of `SHARED_KB`.
        folder: where they are written; made if it does not exist.
        progress: told of two stages.

    Returns:
        What ``launch.json`` holds.

    Raises:
        ConfigError: if no kernel covers the case there, or the case contradicts itself.
        MissingDependencyError: without nvcc or the kernels' sources.
        KernelError: if nvcc fails.
        OutputError: if the files cannot be written.
    """
    if arch not in SHARED_KB:
        raise ConfigError(f"arch is {arch}; it must be one of {', '.join(SHARED_KB)}")
    progress = progress or Progress(2, quiet=True)
    call, tensors = case.call()
    nvcc, sources = plugins.find_nvcc(), plugins.sources()
    files.check_writable_folder(folder)
    device = Device(int(arch.removeprefix("sm_")), case.sm_count, SHARED_KB[arch] << 10)
    with progress.stage("plan the launches"):
        plan = build_planner(nvcc, sources).launches(call, device)
    if plan["workspace_bytes"]:
        tensors["workspace"] = call.y.new_empty(plan["workspace_bytes"], dtype=torch.uint8)
    with progress.stage(f"compile the kernels for {arch}"):
        ptx = compile_ptx(nvcc, sources, arch, plan, case.dtype)
    described = {
        "arch": arch,
        "case": dataclasses.asdict(case),
        "variant": plan["variant"],
        "splits": plan["splits"],
        "tensors": {name: _describe_tensor(name, tensor) for name, tensor in tensors.items()},
        "launches": [
            {
                "entry": entry_of(launch["kernel"], ptx),
                "grid": [launch["grid"], 1, 1],
                "block": [launch["block"], 1, 1],
                "shared_bytes": launch["shared_bytes"],
                "params": launch["params"],
            }
            for launch in plan["launches"]
        ],
    }
    with files.staged_folder(folder, [PTX_NAME, LAUNCH_NAME]) as staging:
        (staging / PTX_NAME).write_text(ptx, encoding="utf-8")
        (staging / LAUNCH_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def describe(emitted: Mapping[str, Any], folder: Path) -> str:
    """What was written, for people."""
    variant = emitted["variant"]
    lines = [
        f"{folder / PTX_NAME} and {LAUNCH_NAME}: variant {variant['index']}, {variant['dtype']}, "
        f"D={variant['head_size']}, V={variant['v_head_size']}, tiles of {variant['block_rows']} "
        f"rows by {variant['block_keys']} keys, {emitted['splits']} split(s)"
    ]
    lines += [
        f"{launch['grid'][0]} blocks of {launch['block'][0]} threads, "
        f"{launch['shared_bytes']} bytes of shared memory: {launch['entry']}"
        for launch in emitted["launches"]
    ]
    return "\n".join(lines)


def _describe_tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    role = {"y": "output", "lse": "output", "workspace": "workspace"}.get(name, "input")
    return {
        "role": role,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
        "bytes": tensor.numel() * tensor.element_size(),
    }


@functools.cache
def build_planner(nvcc: Path, sources: Path) -> Planner:
    """The library's planning, compiled without its kernels.

    Raises:
        KernelError: if nvcc fails.
    """
    kernels = sources / "kernels"
    files_of_planner = [
        kernels / name for name in ("planner.cu", "check.cpp", "plan.cpp", "describe.cpp")
    ]
    with tempfile.TemporaryDirectory(prefix="fastmqa-") as folder:
        library = Path(folder) / "planner.so"
        # One virtual architecture, since there is no device code; and the files side by side.
        flags = ["-arch=compute_75", "-t0", "-shared", "-Xcompiler", "-fPIC"]
        # The wheel's libraries are where its nvcc does not look.
        flags += ["-L", str(nvcc.resolve().parents[1] / "lib")]
        _run_nvcc(nvcc, sources, [*flags, *map(str, files_of_planner), "-o", str(library)])
        return Planner(library)  # stays loaded when the file is gone


def compile_ptx(nvcc: Path, sources: Path, arch: str, plan: Mapping[str, Any], dtype: str) -> str:
    """PTX of the kernels that a plan launches, and of no others.

    Raises:
        KernelError: if nvcc fails.
    """
    index = plan["variant"]["index"]
    instances = {
        "attention": ("attention.cuh", f"attention_kernel<{index}>"),
        "combine": ("combine.cuh", f"combine_kernel<DType::k{_CPP_DTYPES[dtype]}>"),
    }
    chosen = [instances[launch["kernel"]] for launch in plan["launches"]]
    unit = [
        *(f'#include "{header}"' for header, _ in chosen),
        "namespace fastmqa {",
        *(
            f"template __global__ void {kernel}(const __grid_constant__ KernelParams);"
            for _, kernel in chosen
        ),
        "}  // namespace fastmqa",
    ]
    with tempfile.TemporaryDirectory(prefix="fastmqa-") as folder:
        source, ptx = Path(folder) / "kernel.cu", Path(folder) / PTX_NAME
        source.write_text("\n".join(unit) + "\n", encoding="utf-8")
        _run_nvcc(nvcc, sources, ["-ptx", f"-arch={arch}", str(source), "-o", str(ptx)])
        return ptx.read_text(encoding="utf-8")


_CPP_DTYPES: Final = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "Float32"}


def _run_nvcc(nvcc: Path, sources: Path, arguments: Sequence[str]) -> None:
    includes = ["-I", str(sources / "include"), "-I", str(sources / "kernels")]
    command = [str(nvcc), *_FLAGS, *includes, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise KernelError(f"cannot run {nvcc}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()[-20:]
        raise KernelError(
            f"{nvcc} ended with {done.returncode} (it must be CUDA 12.8 or newer, with a g++ that "
            "knows C++20):\n" + "\n".join(lines)
        )


def entry_of(kernel: str, ptx: str) -> str:
    """The name of a kernel in PTX, which is mangled.

    Raises:
        KernelError: if there is not exactly one.
    """
    names = re.findall(rf"\.entry\s+(\w*{kernel}_kernel\w*)", ptx)
    if len(names) != 1:
        raise KernelError(f"the PTX holds {len(names)} entries of the {kernel} kernel, not one")
    return str(names[0])
