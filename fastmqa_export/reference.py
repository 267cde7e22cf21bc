# SPDX-License-Identifier: MIT
"""The oracle: `FusedAttention` as its definition reads, in float64 or float32.

It never imports what it judges. It is written to be checked by eye, and holds the S × T scores in
memory. Shape letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, S queries, T keys,
D head size of q and k, V head size of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmqa_export.config import AttentionAttributes, Layout, SoftmaxPrecision
from fastmqa_export.errors import ConfigError


def visible_keys(
    sequence: int,
    keys: int,
    attributes: AttentionAttributes,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query may see by position: causality, windows and lengths, without masks.

    Args:
        sequence: S.
        keys: T.
        attributes: ``is_causal``, ``window_left`` and ``window_right`` are used.
        kv_lengths: int (B,), leading valid keys L_b, clamped to [0, T]; None: T.
        q_start: int (B,), position of each sequence's first query; None: L_b − S.
        device: where the result is made.

    Returns:
        bool (B, 1, S, T), or (1, 1, S, T) if neither tensor is given: true = may attend.
    """
    key = torch.arange(keys, device=device)
    length = torch.full((1,), keys, device=device)
    if kv_lengths is not None:
        length = kv_lengths.to(torch.int64).clamp(0, keys)
    start = length - sequence if q_start is None else q_start.to(torch.int64)
    position = start[:, None, None] + torch.arange(sequence, device=device)[:, None]  # (B, S, 1)
    seen = (key < length[:, None, None]).expand(position.shape[0], sequence, keys)
    if attributes.window_left >= 0:
        seen = seen & (key >= position - attributes.window_left)
    if attributes.reach_right >= 0:
        seen = seen & (key <= position + attributes.reach_right)
    return seen[:, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    *,
    attributes: AttentionAttributes,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``fastmqa::FusedAttention``, version 1, with all arithmetic in ``compute_dtype``.

    With x = scale · q kᵀ, capped to c · tanh(x / c) where ``softcap`` = c > 0, a float mask added,
    and keys excluded by masks, lengths, causality and windows at −inf::

        m = max_t x;  e = exp(x − m);  y = (e / Σ_t e) v;  lse = m + log Σ_t e

    Scaled dot-product attention is Vaswani et al. 2017 (arXiv:1706.03762), equation 1; one K and V
    shared by the H / Hkv heads of a group is Shazeer 2019 (arXiv:1911.02150) and Ainslie et al.
    2023 (arXiv:2305.13245); the cap is that of Gemma 2 (arXiv:2408.00118), section 2.

    ``softmax_precision`` = FLOAT16 rounds x, x − m and e to float16; sums and products stay in
    ``compute_dtype``.

    Args:
        q: (B, H, S, D), or (B, S, H, D) with ``layout`` = 1; any strides.
        k: (B, Hkv, T, D); H is a multiple of Hkv.
        v: (B, Hkv, T, V); None: the first ``v_head_size`` columns of k.
        attn_mask: rank 4, each dimension 1 or that of (B, H, S, T); bool: true = may attend;
            float: added, −inf excludes a key and a finite minimum does not. None: no mask.
        kv_lengths: int32 (B,), leading valid keys, clamped to [0, T]; None: T. What lies beyond
            is never used, so it may be NaN.
        q_start: int32 (B,), position of the first query; None: the queries are the last S tokens.
        attributes: scale, windows and the rest; its ``features`` are ignored in favour of which
            arguments are given.
        compute_dtype: float64 or float32.

    Returns:
        y: (B, H, S, V), or (B, S, H, V) with ``layout`` = 1, in ``compute_dtype``; 0 in a row that
            may see no key.
        lse: (B, H, S), natural logarithm, in ``compute_dtype``; −inf where y is such a 0.

    Raises:
        ConfigError: if H is not a multiple of Hkv.
    """
    q, k, v = _operands(q, k, v, kv_lengths, attributes, compute_dtype)
    scores = masked(
        capped_scores(q, k, attributes), attn_mask, kv_lengths, q_start, attributes=attributes
    )
    weights, lse = softmax(scores, half=attributes.softmax_precision == SoftmaxPrecision.FLOAT16)
    y = _unpack(_pack(weights, k.shape[1]) @ v, q.shape[1])
    y = y.masked_fill((lse == -torch.inf)[..., None], 0)  # even where v holds a NaN
    return (y.transpose(1, 2) if attributes.layout == Layout.BSHD else y), lse


def attention_gradients(
    grad_y: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    *,
    attributes: AttentionAttributes,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `attention`; the rounding of a FLOAT16 softmax counts as the identity.

    With P the weights and ∘ the elementwise product (FlashAttention, arXiv:2205.14135, appendix B;
    the cap and the log-sum-exp added)::

        dV = Pᵀ dY;  dP = dY Vᵀ;  dX = P ∘ (dP − rowsum(P ∘ dP) + dlse);  dmask = dX
        dS = dX ∘ (1 − (capped / c)²);  dQ = scale · dS K;  dK = scale · dSᵀ Q

    Args:
        grad_y: shape of y.
        grad_lse: (B, H, S), or None if the log-sum-exp has no gradient.
        q: as in `attention`, like all that follow.
        k: keys.
        v: values, None where they lie in k.
        attn_mask: mask.
        kv_lengths: lengths.
        q_start: positions.
        attributes: of the op.
        compute_dtype: float64 or float32.

    Returns:
        Gradients of q, k, v and attn_mask in ``compute_dtype``; None for v where the values lie in
        k, and for a mask that is absent or bool.
    """
    separate_values = v is not None
    q, k, values = _operands(q, k, v, kv_lengths, attributes, compute_dtype)
    grad_y = grad_y.to(compute_dtype)
    if attributes.layout == Layout.BSHD:
        grad_y = grad_y.transpose(1, 2)
    heads, kv_heads = q.shape[1], k.shape[1]
    capped = capped_scores(q, k, attributes)
    scores = masked(capped, attn_mask, kv_lengths, q_start, attributes=attributes)
    weights, _ = softmax(scores, half=attributes.softmax_precision == SoftmaxPrecision.FLOAT16)

    grad_v = _pack(weights, kv_heads).transpose(-1, -2) @ _pack(grad_y, kv_heads)
    grad_weights = _unpack(_pack(grad_y, kv_heads) @ values.transpose(-1, -2), heads)
    inner = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        inner = inner + grad_lse.to(compute_dtype)[..., None]
    grad_scores = weights * inner
    grad_mask = None
    if attn_mask is not None and attn_mask.is_floating_point():
        grad_mask = grad_scores.sum_to_size(attn_mask.shape)
    if attributes.softcap > 0:
        grad_scores = grad_scores * (1 - (capped / attributes.softcap) ** 2)
    grad_scores = _pack(grad_scores * attributes.scale, kv_heads)
    grad_q = _unpack(grad_scores @ k, heads)
    grad_k = grad_scores.transpose(-1, -2) @ _pack(q, kv_heads)
    if not separate_values:
        grad_k[..., : attributes.v_head_size] += grad_v
    return (
        grad_q.transpose(1, 2) if attributes.layout == Layout.BSHD else grad_q,
        grad_k,
        grad_v if separate_values else None,
        grad_mask,
    )


def capped_scores(q: Tensor, k: Tensor, attributes: AttentionAttributes) -> Tensor:
    """Scores (B, H, S, T) of q (B, H, S, D) and k (B, Hkv, T, D), scaled and capped, unmasked."""
    scores = _pack(q * attributes.scale, k.shape[1]) @ k.transpose(-1, -2)
    return _capped(_unpack(scores, q.shape[1]), attributes)


def masked(
    scores: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    *,
    attributes: AttentionAttributes,
) -> Tensor:
    """Scores (B, H, S, T) with a float mask added and every excluded key at −inf."""
    sequence, keys = scores.shape[2:]
    keep = visible_keys(sequence, keys, attributes, kv_lengths, q_start, scores.device)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            keep = keep & attn_mask
        else:
            scores = scores + attn_mask.to(scores.dtype)
    return scores.masked_fill(~keep, -torch.inf)


def softmax(scores: Tensor, *, half: bool) -> tuple[Tensor, Tensor]:
    """Weights (…, T) and log-sum-exp (…) of scores (…, T); weights of an empty row are 0.

    ``half`` rounds scores, their distance to the maximum and the exponentials to float16.
    """

    def rounded(x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype) if half else x

    scores = rounded(scores)
    row_max = scores.amax(-1, keepdim=True)
    # A row of nothing but −inf would give −inf − (−inf) = NaN; subtracting 0 there gives e = 0.
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)
    weights = rounded(torch.exp(rounded(scores - row_max)))
    row_sum = weights.sum(-1, keepdim=True)
    lse = (row_max + row_sum.log()).squeeze(-1)
    return weights / row_sum.masked_fill(row_sum == 0, 1), lse


def attention_in_dtype(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    *,
    attributes: AttentionAttributes,
    sequential: bool = False,
) -> Tensor:
    """The same formula as PyTorch's operators give it in q's own dtype: the yardstick of budgets.

    Products are in q's dtype and the softmax in float32, as transformers' eager attention does it;
    K and V are repeated for every head of a group. An implementation may be about twice as far
    from the float64 oracle as this is (the rule of FlashAttention's tests).

    No standard fixes the order in which a product is summed, and in float32 that order is most of
    the error. ``sequential`` sums one term after the other, which is as good an order as that of
    PyTorch's blocked matmul and the other extreme.

    Args and shapes: as in `attention`. Returns y in q's dtype.
    """
    product = _sequential_matmul if sequential else torch.matmul
    q, k, v = _operands(q, k, v, kv_lengths, attributes, q.dtype)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = product(q * attributes.scale, k.transpose(-1, -2))
    scores = masked(
        _capped(scores, attributes), attn_mask, kv_lengths, q_start, attributes=attributes
    )
    half = attributes.softmax_precision == SoftmaxPrecision.FLOAT16
    weights = scores.softmax(-1, dtype=torch.float16 if half else at_least_float32(q.dtype))
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    y = product(weights.masked_fill(empty, 0).to(q.dtype), v)
    return y.transpose(1, 2) if attributes.layout == Layout.BSHD else y


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    kv_lengths: Tensor | None,
    attributes: AttentionAttributes,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q (B, H, S, D), k and v in ``dtype``, with zeros in k and v beyond the lengths."""
    if attributes.layout == Layout.BSHD:
        q = q.transpose(1, 2)
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ConfigError(f"H={heads} query heads are not a multiple of Hkv={kv_heads}")
    if kv_lengths is not None:
        # 0 · NaN is NaN: what lies beyond the length must be gone before it is multiplied.
        key = torch.arange(k.shape[2], device=k.device)
        beyond = (key >= kv_lengths.to(torch.int64)[:, None])[:, None, :, None]
        k = k.masked_fill(beyond, 0)
        v = v if v is None else v.masked_fill(beyond, 0)
    k = k.to(dtype)
    return q.to(dtype), k, k[..., : attributes.v_head_size] if v is None else v.to(dtype)


def _capped(scores: Tensor, attributes: AttentionAttributes) -> Tensor:
    if attributes.softcap > 0:
        scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
    return scores


def _sequential_matmul(a: Tensor, b: Tensor) -> Tensor:
    total = a[..., :1] * b[..., :1, :]
    for i in range(1, a.shape[-1]):
        total = total + a[..., i : i + 1] * b[..., i : i + 1, :]
    return total


def _pack(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, S, ·) to (B, Hkv, G · S, ·): the rows that share one K and V, below each other."""
    batch, heads, sequence, columns = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * sequence, columns)


def _unpack(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, G · S, ·) to (B, H, S, ·)."""
    batch, kv_heads, rows, columns = x.shape
    return x.reshape(batch, heads, rows * kv_heads // heads, columns)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums and softmax of inputs of a type are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
