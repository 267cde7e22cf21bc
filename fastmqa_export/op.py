# SPDX-License-Identifier: MIT
"""``torch.ops.fastmqa.fused_attention``: the op as PyTorch sees it.

Schema, shape rules (for fake tensors too, so that ``torch.compile`` and ``torch.export`` trace it
as one node with dynamic sizes), an eager implementation and gradients. The eager implementation is
the reference in float32 (float64 for float64 inputs); tensors on the CPU and on CUDA take the
library of kernels for it where that is built and covers the call.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from fastmqa_export import plugins, reference
from fastmqa_export.config import (
    OP_DOMAIN,
    AttentionAttributes,
    Layout,
    SoftmaxPrecision,
)
from fastmqa_export.cpu_kernels import CpuKernels
from fastmqa_export.errors import ConfigError, MissingDependencyError
from fastmqa_export.kernels import KernelLibrary, make_call

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_TENSORS = (
    "Tensor q, Tensor k, Tensor? v=None, Tensor? attn_mask=None, Tensor? kv_lengths=None, "
    "Tensor? q_start=None"
)
_ATTRIBUTES = (
    "float scale, bool is_causal=False, int window_left=-1, int window_right=-1, "
    "float softcap=0.0, int softmax_precision=1, int v_head_size=0, int layout=0"
)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    softmax_precision: int = SoftmaxPrecision.FLOAT,
    v_head_size: int = 0,
    layout: int = Layout.BHSD,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which groups of query heads share keys and values; one node when exported.

    The same as ``torch.ops.fastmqa.fused_attention`` (``…_with_lse`` with ``return_lse``), with a
    default for ``scale``. `fastmqa_export.reference.attention` gives the formula.

    Args:
        q: (B, H, S, D), or (B, S, H, D) with ``layout`` = 1; float16, bfloat16, float32 (or
            float64, which no exported file takes).
        k: (B, Hkv, T, D), q's dtype; H is a multiple of Hkv.
        v: (B, Hkv, T, V), q's dtype; None: the first ``v_head_size`` columns of k.
        attn_mask: rank 4, each dimension 1 or that of (B, H, S, T); bool (true = may attend), q's
            dtype or float32 (added).
        kv_lengths: int32 (B,), how many leading keys are valid; None: T.
        q_start: int32 (B,), position of the first query; None: the queries are the last S tokens.
        scale: multiplies q·k; None: 1/sqrt(D).
        is_causal: a query sees keys up to its own position.
        window_left: how many keys before its own position a query sees; −1 = all.
        window_right: how many keys after its own position a query sees; −1 = all.
        softcap: c > 0 caps scores to c·tanh(x / c).
        softmax_precision: 1 (FLOAT), or 10 (FLOAT16) for float16 inputs.
        v_head_size: V, only where v is None.
        layout: 0 or 1, see q.
        return_lse: return the log-sum-exp of each row too.

    Returns:
        y: (B, H, S, V), or (B, S, H, V) with ``layout`` = 1, in q's dtype; a row that may see no
            key is 0.
        lse: float32 (float64 for float64 inputs) (B, H, S), natural logarithm; −inf in such a row.

    Raises:
        ConfigError: for shapes, dtypes or attributes that the op does not accept.
    """
    op = (
        torch.ops.fastmqa.fused_attention_with_lse
        if return_lse
        else torch.ops.fastmqa.fused_attention
    )
    result: Tensor | tuple[Tensor, Tensor] = op(
        q,
        k,
        v,
        attn_mask,
        kv_lengths,
        q_start,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        softmax_precision=softmax_precision,
        v_head_size=v_head_size,
        layout=layout,
    )
    return result


def checked_attributes(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    **values: Any,
) -> AttentionAttributes:
    """The op's attributes for these arguments, ``features`` included, all shapes checked.

    Works on fake tensors: only sizes that the op ties together are compared. ``values`` may leave
    out attributes that have a default (PyTorch's dispatcher drops those).

    Raises:
        ConfigError: naming the argument, what was given and what is accepted.
    """
    v_head_size = values.get("v_head_size", 0)
    if v is None and v_head_size <= 0:
        raise ConfigError("v is None, so v_head_size must say how many columns of k are the values")
    if v is not None and v_head_size != 0:
        raise ConfigError(
            f"v_head_size={v_head_size} although v is given; it is only for values in k"
        )
    attributes = AttentionAttributes.of_call(
        values, v=v, attn_mask=attn_mask, kv_lengths=kv_lengths, q_start=q_start
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is None:
            continue
        if tensor.dim() != 4:
            raise ConfigError(f"{name} has rank {tensor.dim()}; it must have 4")
        if tensor.dtype not in _DTYPES or tensor.dtype != q.dtype:
            raise ConfigError(
                f"{name} is {tensor.dtype} and q is {q.dtype}; q, k and v share one dtype, "
                "float16, bfloat16, float32 or float64"
            )
    batch, sequence = q.shape[0], q.shape[2 if attributes.layout == Layout.BHSD else 1]
    heads = q.shape[1 if attributes.layout == Layout.BHSD else 2]
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != q.shape[3]:
        raise ConfigError(
            f"k is {tuple(k.shape)}; with q {tuple(q.shape)} it must be "
            f"(B={batch}, Hkv, T, D={q.shape[3]})"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"H={heads} query heads are not a multiple of Hkv={kv_heads} in k")
    if v is not None and (v.shape[0] != batch or v.shape[1] != kv_heads or v.shape[2] != keys):
        raise ConfigError(
            f"v is {tuple(v.shape)}; with k {tuple(k.shape)} it must be (B, Hkv, T, V)"
        )
    if attributes.v_head_size > k.shape[3]:
        raise ConfigError(f"v_head_size={attributes.v_head_size} exceeds D={k.shape[3]} of k")
    if attn_mask is not None:
        _check_mask(attn_mask, (batch, heads, sequence, keys), q.dtype)
    for name, tensor in (("kv_lengths", kv_lengths), ("q_start", q_start)):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.shape[0] != batch:
            raise ConfigError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be int32 (B={batch},)"
            )
    if attributes.softmax_precision == SoftmaxPrecision.FLOAT16 and q.dtype != torch.float16:
        raise ConfigError(
            f"softmax_precision=10 (FLOAT16) with {q.dtype} inputs; it is only for float16 ones"
        )
    return attributes


def _check_mask(mask: Tensor, full: tuple[int, ...], dtype: torch.dtype) -> None:
    wide = reference.at_least_float32(dtype)
    if mask.dtype not in (torch.bool, dtype, wide):
        allowed = f"bool or {wide}" if dtype == wide else f"bool, {dtype} or {wide}"
        raise ConfigError(f"attn_mask is {mask.dtype}; it must be {allowed}")
    if mask.dim() != 4 or any(
        have != 1 and have != want for have, want in zip(mask.shape, full, strict=True)
    ):
        raise ConfigError(
            f"attn_mask is {tuple(mask.shape)}; it must have rank 4, each dimension 1 or that of "
            f"(B, H, S, T) = {tuple(full)}"
        )


def _run(*tensors: Any, **values: Any) -> tuple[Tensor, Tensor]:
    q = tensors[0]
    y, lse = reference.attention(
        *tensors,
        attributes=checked_attributes(*tensors, **values),
        compute_dtype=reference.at_least_float32(q.dtype),
    )
    return y.to(q.dtype).contiguous(), lse


def _run_cpu(*tensors: Any, return_lse: bool, **values: Any) -> tuple[Tensor, Tensor | None]:
    """By the CPU kernel, or `_run` where there is none or it does not cover the call."""
    library = _cpu_kernels()
    if library is not None and tensors[0].dtype != torch.float64 and tensors[0].numel() > 0:
        attributes = checked_attributes(*tensors, **values)
        call = make_call(*tensors, attributes=attributes, return_lse=return_lse)
        with contextlib.suppress(ConfigError):
            library.run(call, library.pool(torch.get_num_threads()))
            return call.y, call.lse
    return _run(*tensors, **values)


@functools.cache
def _cpu_kernels() -> CpuKernels | None:
    """The CPU kernel, or None where it is not built: looked for once, since every call asks."""
    try:
        return plugins.cpu_kernels()
    except MissingDependencyError:
        return None


def _run_cuda(*tensors: Any, return_lse: bool, **values: Any) -> tuple[Tensor, Tensor | None]:
    """By the library of kernels, or `_run` where it cannot: a warning says why, once.

    Without a warning in float64, which is for comparisons, and for empty tensors.
    """
    q = tensors[0]
    if q.dtype != torch.float64 and q.numel() > 0:
        try:
            library = plugins.kernel_library()
            with torch.cuda.device(q.device):
                stream = torch.cuda.current_stream().cuda_stream
                ordinal = torch.cuda.current_device()
                return run_kernels(
                    library, ordinal, stream, *tensors, return_lse=return_lse, **values
                )
        except (MissingDependencyError, _NotCovered) as error:
            _warn_once(f"fused_attention takes PyTorch's operators on CUDA: {error}")
    return _run(*tensors, **values)


class _NotCovered(Exception):
    """No kernel of the library covers a call."""


def run_kernels(
    library: KernelLibrary,
    ordinal: int,
    stream: int,
    *tensors: Any,
    return_lse: bool,
    **values: Any,
) -> tuple[Tensor, Tensor | None]:
    """Y, and lse if it is wanted, by the kernels of a library on the device of that number."""
    attributes = checked_attributes(*tensors, **values)
    call = make_call(*tensors, attributes=attributes, return_lse=return_lse)
    try:
        library.run(call, library.device(ordinal), stream)
    except ConfigError as error:
        raise _NotCovered(str(error)) from error
    return call.y, call.lse


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _fake(*tensors: Any, **values: Any) -> tuple[Tensor, Tensor]:
    q, _, v = tensors[:3]
    attributes = checked_attributes(*tensors, **values)
    y = q.new_empty((*q.shape[:3], attributes.v_head_size if v is None else v.shape[3]))
    rows = q.shape[:3] if attributes.layout == Layout.BHSD else (q.shape[0], q.shape[2], q.shape[1])
    return y, q.new_empty(rows, dtype=reference.at_least_float32(q.dtype))


@torch.library.custom_op(
    f"{OP_DOMAIN}::fused_attention",
    mutates_args=(),
    schema=f"({_TENSORS}, *, {_ATTRIBUTES}) -> Tensor",
)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    **values: Any,
) -> Tensor:
    return _run(q, k, v, attn_mask, kv_lengths, q_start, **values)[0]


@torch.library.custom_op(
    f"{OP_DOMAIN}::fused_attention_with_lse",
    mutates_args=(),
    schema=f"({_TENSORS}, *, {_ATTRIBUTES}) -> (Tensor, Tensor)",
)
def _attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    **values: Any,
) -> tuple[Tensor, Tensor]:
    return _run(q, k, v, attn_mask, kv_lengths, q_start, **values)


@_attention.register_kernel("cpu")
def _(*tensors: Any, **values: Any) -> Tensor:
    return _run_cpu(*_six(tensors), return_lse=False, **values)[0]


@_attention_with_lse.register_kernel("cpu")
def _(*tensors: Any, **values: Any) -> tuple[Tensor, Tensor | None]:
    return _run_cpu(*_six(tensors), return_lse=True, **values)


@_attention.register_kernel("cuda")
def _(*tensors: Any, **values: Any) -> Tensor:
    return _run_cuda(*_six(tensors), return_lse=False, **values)[0]


@_attention_with_lse.register_kernel("cuda")
def _(*tensors: Any, **values: Any) -> tuple[Tensor, Tensor | None]:
    return _run_cuda(*_six(tensors), return_lse=True, **values)


# The gradient is an op of its own, opaque to tracing as the forward is. An absent gradient is an
# empty tensor, since an op's outputs cannot be optional.
@torch.library.custom_op(
    f"{OP_DOMAIN}::fused_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor? grad_lse, {_TENSORS}, *, {_ATTRIBUTES}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad_y: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    **values: Any,
) -> tuple[Tensor, ...]:
    tensors = (q, k, v, attn_mask, kv_lengths, q_start)
    gradients = reference.attention_gradients(
        grad_y,
        grad_lse,
        *tensors,
        attributes=checked_attributes(*tensors, **values),
        compute_dtype=reference.at_least_float32(q.dtype),
    )
    return tuple(
        q.new_empty(0) if gradient is None or x is None else gradient.to(x.dtype).contiguous()
        for gradient, x in zip(gradients, tensors, strict=False)
    )


@_attention.register_fake
def _(*tensors: Any, **values: Any) -> Tensor:
    return _fake(*_six(tensors), **values)[0]


@_attention_with_lse.register_fake
def _(*tensors: Any, **values: Any) -> tuple[Tensor, Tensor]:
    return _fake(*_six(tensors), **values)


@_attention_backward.register_fake
def _(grad_y: Tensor, grad_lse: Tensor | None, *tensors: Any, **values: Any) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if x is not None and x.is_floating_point() else grad_y.new_empty(0)
        for x in _six(tensors)[:4]
    )


def _six(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*tensors, *(None,) * (6 - len(tensors)))


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Any
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.values = keyword_only_inputs


def _backward(ctx: Any, grad_y: Tensor, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
    gradients = torch.ops.fastmqa.fused_attention_backward(
        grad_y, grad_lse, *ctx.saved_tensors, **ctx.values
    )
    wanted = [
        gradient if needed and x is not None and x.is_floating_point() else None
        for gradient, needed, x in zip(
            gradients, ctx.needs_input_grad, ctx.saved_tensors, strict=False
        )
    ]
    return (*wanted, None, None)


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_with_lse.register_autograd(_backward, setup_context=_setup_context)
