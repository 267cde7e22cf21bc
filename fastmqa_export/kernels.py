# SPDX-License-Identifier: MIT
"""The library of CUDA kernels, by its C interface (plugins/include/fastmqa/attention.h).

The structs here mirror that header field by field; a test compares their sizes and names with it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Mapping
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
        *(
            (f"{name}_strides", Strides)
            for name in ("q", "k", "v", "y", "lse")
        ),
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
        y: (B, H, S, V), or (B, S, H, V) with ``layout`` = 1; uninitialised.
        lse: float32 (B, H, S), or None; uninitialised.
        inputs: the other tensors that ``params`` points into, kept alive.
    """

    params: AttentionParams
    y: Tensor
    lse: Tensor | None
    inputs: tuple[Tensor, ...]


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
) -> Call:
    """Arguments of the op, already checked, as the kernels take them.

    Tensors whose rows are not aligned to 16 bytes, or whose last axis is not contiguous, are
    copied; every other stride is passed on.
    """
    q, k = _rows_aligned(q), _rows_aligned(k)
    v = None if v is None else _rows_aligned(v)
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    q_start = None if q_start is None else q_start.contiguous()
    swapped = attributes.layout == Layout.BSHD
    v_head_size = attributes.v_head_size if v is None else v.shape[3]
    y = q.new_empty((*q.shape[:3], v_head_size))
    q_bhsd, y_bhsd = (x.transpose(1, 2) if swapped else x for x in (q, y))
    batch, heads, queries, head_size = q_bhsd.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32) if return_lse else None

    params = AttentionParams(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=_address(v),
        attn_mask=_address(attn_mask),
        kv_lengths=_address(kv_lengths),
        q_start=_address(q_start),
        y=y.data_ptr(),
        lse=_address(lse),
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
        window_left=attributes.window_left,
        window_right=attributes.reach_right,
        dtype=DTYPES[q.dtype],
        softmax_precision=int(attributes.softmax_precision),
        scale=attributes.scale,
        softcap=attributes.softcap,
    )
    if v is not None:
        params.v_strides = Strides(*v.stride()[:3])
    if lse is not None:
        params.lse_strides = Strides(*lse.stride())
    if attn_mask is not None:
        params.mask_dtype = DTYPES[attn_mask.dtype]
        full = attn_mask.expand(batch, heads, queries, k.shape[2])
        params.mask_strides = MaskStrides(*full.stride())
    inputs = (q, k, v, attn_mask, kv_lengths, q_start)
    return Call(params, y, lse, tuple(x for x in inputs if x is not None))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows_aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it if the kernels could not read its rows 16 bytes at a time."""
    multiple = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(
        stride % multiple == 0
        for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)
        if size > 1
    )
    return x if aligned and (x.stride(3) == 1 or x.shape[3] == 1) else x.contiguous()


class KernelLibrary:
    """A library with the C interface of attention.h: the CUDA kernels, or their emulation.

    Args:
        path: the shared library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        call = ctypes.POINTER(AttentionParams), ctypes.POINTER(Device)
        text = ctypes.c_char_p, ctypes.c_size_t
        for name, result, arguments in (
            ("supports", ctypes.c_int32, (*call, *text)),
            ("workspace_bytes", ctypes.c_size_t, call),
            ("run", ctypes.c_int32, (*call, ctypes.c_void_p, *text)),
            ("query_device", ctypes.c_int32, (ctypes.c_int32, call[1], *text)),
            ("describe_launches", ctypes.c_size_t, (*call, *text)),
            ("describe_variants", ctypes.c_size_t, text),
        ):
            function = getattr(library, f"fastmqa_{name}")
            function.restype, function.argtypes = result, arguments
        self.library: Any = library

    def device(self, ordinal: int) -> Device:
        """The CUDA device of that number.

        Raises:
            KernelError: if there is none.
        """
        device = Device()
        self._check(self.library.fastmqa_query_device, ordinal, device)
        return device

    def run(self, call: Call, device: Device, stream: int = 0) -> None:
        """Enqueue the kernels on a CUDA stream (its address; 0: the default one).

        Raises:
            ConfigError: if no kernel covers the call on that device, or the call is not valid.
            KernelError: if CUDA refuses the launch.
        """
        size = self.library.fastmqa_workspace_bytes(call.params, device)
        # Freed at once, as PyTorch's allocator allows: later work of the stream comes after.
        workspace = call.y.new_empty(size, dtype=torch.uint8) if size else None
        call.params.workspace = _address(workspace)
        self._check(self.library.fastmqa_run, call.params, device, stream)

    def supports(self, call: Call, device: Device) -> None:
        """Return if a kernel covers the call on that device.

        Raises:
            ConfigError: naming the variants that are near.
        """
        self._check(self.library.fastmqa_supports, call.params, device)

    def launches(self, call: Call, device: Device) -> dict[str, Any]:
        """The launches that `run` would enqueue, see docs/kernels.md."""
        described: dict[str, Any] = self._json("describe_launches", call.params, device)
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

    @staticmethod
    def _check(function: Any, *arguments: Any) -> None:
        text = ctypes.create_string_buffer(512)
        code = function(*arguments, text, len(text))
        if code != 0:
            raise (KernelError if code == 3 else ConfigError)(text.value.decode())

