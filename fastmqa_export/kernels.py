# SPDX-License-Identifier: MIT
"""The library of CUDA kernels, by its C interface (plugins/include/fastmqa/attention.h).

The structs here mirror that header field by field; a test compares their sizes and names with it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastmqa_export.config import AttentionAttributes, Layout
from fastmqa_export.errors import ConfigError, KernelError

#: Numbers of onnx.TensorProto.DataType.
DTYPES: Final[Mapping[torch.dtype, int]] = {
    torch.float32: 1,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}

_LARGEST_INT32: Final = 2**31 - 1


class Strides(ctypes.Structure):
    """Distances in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class MaskStrides(ctypes.Structure):
    """Distances in elements, 0 along an axis that is broadcast."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row", "key")]


class AttentionParams(ctypes.Structure):
    """``fastmqa::AttentionParams``."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q",
                "k",
                "v",
                "attn_mask",
                "kv_lengths",
                "q_start",
                "y",
                "lse",
                "workspace",
            )
        ),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v", "y", "lse")),
        ("mask_strides", MaskStrides),
        *(
            (name, ctypes.c_int32)
            for name in (
                "batch",
                "heads",
                "kv_heads",
                "queries",
                "keys",
                "head_size",
                "v_head_size",
                "window_left",
                "window_right",
                "dtype",
                "mask_dtype",
                "softmax_precision",
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Device(ctypes.Structure):
    """``fastmqa::Device``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("sm", "sm_count", "shared_bytes")]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the op as the kernels take it.

    Attributes:
        params: what the library gets; its pointers are those of the tensors.
        inputs: the tensors that ``params`` reads, by name, kept alive.
        y: (B, H, S, V), or (B, S, H, V) with ``layout`` = 1; uninitialised.
        lse: float32 (B, H, S), or None; uninitialised.
    """

    params: AttentionParams
    inputs: Mapping[str, Tensor]
    y: Tensor
    lse: Tensor | None


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    *,
    attributes: AttentionAttributes,
    return_lse: bool,
    address: Callable[[Tensor], int] = Tensor.data_ptr,
) -> Call:
    """Arguments of the op, already checked, as the kernels take them.

    Tensors whose rows are not aligned to 16 bytes, or whose last axis is not contiguous, are
    copied; every other stride is passed on.

    Args:
        q: as in `fastmqa_export.fused_attention`, like the next five.
        k: keys.
        v: values, or None: they lie in k.
        attn_mask: mask, or None.
        kv_lengths: lengths, or None.
        q_start: positions, or None.
        attributes: of the op, for these arguments.
        return_lse: whether the log-sum-exp is wanted.
        address: where a tensor lies; another function for tensors without memory.

    Raises:
        ConfigError: if the tensors are on different devices, or a size does not fit 32 bits.
    """
    q, k = _rows_aligned(q, address), _rows_aligned(k, address)
    v = None if v is None else _rows_aligned(v, address)
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    q_start = None if q_start is None else q_start.contiguous()
    given = {
        "q": q,
        "k": k,
        "v": v,
        "attn_mask": attn_mask,
        "kv_lengths": kv_lengths,
        "q_start": q_start,
    }
    inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in inputs.items():
        if tensor.device != q.device:
            raise ConfigError(f"{name} is on {tensor.device} and q on {q.device}; move one of them")
        if max(tensor.shape) > _LARGEST_INT32:
            raise ConfigError(f"{name} is {tuple(tensor.shape)}; sizes are below 2^31")

    v_head_size = attributes.v_head_size if v is None else v.shape[3]
    y = q.new_empty((*q.shape[:3], v_head_size))
    swapped = attributes.layout == Layout.BSHD
    q_bhsd, y_bhsd = (x.transpose(1, 2) if swapped else x for x in (q, y))
    batch, heads, queries, head_size = q_bhsd.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32) if return_lse else None

    params = AttentionParams(
        **{name: address(tensor) for name, tensor in inputs.items()},
        y=address(y),
        q_strides=Strides(*q_bhsd.stride()[:3]),
        k_strides=Strides(*k.stride()[:3]),
        y_strides=Strides(*y_bhsd.stride()[:3]),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        queries=queries,
        keys=k.shape[2],
        head_size=head_size,
        v_head_size=v_head_size,
        window_left=min(attributes.window_left, _LARGEST_INT32),
        window_right=min(attributes.reach_right, _LARGEST_INT32),
        dtype=DTYPES[q.dtype],
        softmax_precision=int(attributes.softmax_precision),
        scale=attributes.scale,
        softcap=attributes.softcap,
    )
    if v is not None:
        params.v_strides = Strides(*v.stride()[:3])
    if lse is not None:
        params.lse = address(lse)
        params.lse_strides = Strides(*lse.stride())
    if attn_mask is not None:
        params.mask_dtype = DTYPES[attn_mask.dtype]
        full = attn_mask.expand(batch, heads, queries, k.shape[2])
        params.mask_strides = MaskStrides(*full.stride())
    return Call(params, inputs, y, lse)


def _rows_aligned(x: Tensor, address: Callable[[Tensor], int]) -> Tensor:
    """``x``, or a copy of it if the kernels could not read its rows 16 bytes at a time."""
    multiple = 16 // x.element_size()
    aligned = address(x) % 16 == 0 and all(
        stride % multiple == 0
        for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)
        if size > 1
    )
    if aligned and (x.stride(3) == 1 or x.shape[3] == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def load(path: Path, functions: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> Any:
    """The library, with the result and argument types of its functions set.

    Raises:
        KernelError: if it cannot be loaded, or lacks one of them.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in functions.items():
            function = getattr(library, f"fastmqa_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} is no library of kernels ({error}); build it again") from error
    return library


_TEXT = (ctypes.c_char_p, ctypes.c_size_t)
_CALL = (ctypes.POINTER(AttentionParams), ctypes.POINTER(Device))
_TACTIC = ctypes.c_int32


class Planner:
    """A library that can say how a call is launched, without launching it.

    Args:
        path: the shared library.

    Raises:
        KernelError: if it cannot be loaded, or is another library.
    """

    _functions: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
        "describe_launches": (ctypes.c_size_t, (*_CALL, _TACTIC, *_TEXT)),
        "describe_variants": (ctypes.c_size_t, _TEXT),
    }

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library: Any = load(path, self._functions)

    def launches(self, call: Call, device: Device, tactic: int = 0) -> dict[str, Any]:
        """The launches that `KernelLibrary.run` would enqueue, see docs/kernels.md.

        Args:
            call: its tensors need no memory.
            device: where it would run.
            tactic: how it is divided; 0: as the planner chooses.

        Raises:
            ConfigError: if no kernel covers the call on that device, or the call is not valid.
        """
        described: dict[str, Any] = self._json("describe_launches", call.params, device, tactic)
        if "error" in described:
            raise ConfigError(described["error"])
        return described

    def variants(self) -> list[dict[str, Any]]:
        """The kernels that the library holds, in the order in which they are looked through."""
        variants: list[dict[str, Any]] = self._json("describe_variants")
        return variants

    def _json(self, name: str, *arguments: Any) -> Any:
        function = getattr(self.library, f"fastmqa_{name}")
        size = function(*arguments, None, 0)
        buffer = ctypes.create_string_buffer(size)
        function(*arguments, buffer, size)
        return json.loads(buffer.value)


class KernelLibrary(Planner):
    """A library with the C interface of attention.h: the CUDA kernels, or their emulation.

    Args:
        path: the shared library.

    Raises:
        KernelError: if it cannot be loaded, or is another library.
    """

    _functions = {  # noqa: RUF012 (never changed; the base class declares it as a Mapping)
        **Planner._functions,
        "supports": (ctypes.c_int32, (*_CALL, *_TEXT)),
        "workspace_bytes": (ctypes.c_size_t, (*_CALL, _TACTIC)),
        "workspace_bound": (ctypes.c_size_t, _CALL),
        "run": (ctypes.c_int32, (*_CALL, _TACTIC, ctypes.c_void_p, *_TEXT)),
        "query_device": (ctypes.c_int32, (ctypes.c_int32, _CALL[1], *_TEXT)),
    }

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._devices: dict[int, Device] = {}

    def device(self, ordinal: int) -> Device:
        """The CUDA device of that number; asked once.

        Raises:
            KernelError: if there is none.
        """
        if ordinal not in self._devices:
            device = Device()
            self._check(self.library.fastmqa_query_device, ordinal, device)
            self._devices[ordinal] = device
        return self._devices[ordinal]

    def run(self, call: Call, device: Device, stream: int = 0, tactic: int = 0) -> None:
        """Enqueue the kernels on a CUDA stream (its address; 0: the default one).

        Args:
            call: with its tensors.
            device: where they are.
            stream: a ``cudaStream_t``.
            tactic: how it is divided; 0: as the planner chooses.

        Raises:
            ConfigError: if no kernel covers the call on that device, or the call is not valid.
            KernelError: if CUDA refuses the launch.
        """
        size = self.library.fastmqa_workspace_bytes(call.params, device, tactic)
        # Freed at once, as PyTorch's allocator allows: later work of the stream comes after.
        workspace = call.y.new_empty(size, dtype=torch.uint8) if size else None
        call.params.workspace = None if workspace is None else workspace.data_ptr()
        self._check(self.library.fastmqa_run, call.params, device, tactic, stream)

    def supports(self, call: Call, device: Device) -> None:
        """Return if a kernel covers the call on that device.

        Raises:
            ConfigError: naming the variants that are near.
        """
        self._check(self.library.fastmqa_supports, call.params, device)

    @staticmethod
    def _check(function: Any, *arguments: Any) -> None:
        text = ctypes.create_string_buffer(512)
        code = function(*arguments, text, len(text))
        if code != 0:
            raise (KernelError if code == 3 else ConfigError)(text.value.decode())
