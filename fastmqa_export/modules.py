# SPDX-License-Identifier: MIT
"""Attention layers with small caches: multi-query, grouped-query and latent attention.

Shape letters: B batch, E hidden size, H query heads, Hkv key/value heads, S new tokens, T tokens
attended to (with a cache its capacity), D head size, R latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastmqa_export.cache import CacheLayer, CacheStats, KvCache, StaticCache, cache_stats
from fastmqa_export.config import AttentionAttributes, Layout, SoftmaxPrecision
from fastmqa_export.errors import ConfigError
from fastmqa_export.op import fused_attention

#: The two ways to compute latent attention; they give the same numbers.
LatentForm = Literal["absorbed", "expanded"]


class AttentionModule(nn.Module):
    """What the attention layers share: projections, RoPE, the cache, and one call of the op.

    Attributes:
        attributes: of the op, as the layer calls it.
        attention: a function with the signature of `fastmqa_export.op.fused_attention`, which is
            the default; another one in its place (PyTorch's own operators, an oracle) leaves the
            rest of the layer as it is.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None,
        *,
        is_causal: bool,
        window_left: int,
        softcap: float,
        rope_theta: float | None,
        bias: bool,
        softmax_precision: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1 or num_kv_heads < 1:
            raise ConfigError(
                f"hidden_size={hidden_size}, num_heads={num_heads}, num_kv_heads={num_kv_heads}: "
                "all are at least 1"
            )
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; each "
                "key/value head serves as many query heads (1: MQA, num_heads: MHA)"
            )
        if head_dim is None and hidden_size % num_heads:
            raise ConfigError(
                f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; give "
                "head_dim, the size of one head"
            )
        if head_dim is None:
            head_dim = hidden_size // num_heads
        if head_dim < 1:
            raise ConfigError(f"head_dim={head_dim}; it is at least 1")
        if rope_theta is not None and (rope_theta <= 0 or head_dim % 2):
            raise ConfigError(
                f"rope_theta={rope_theta} with head_dim={head_dim}; RoPE rotates pairs of columns "
                "by a base > 0 (usually 10000): give an even head_dim, or rope_theta=None"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.attributes = AttentionAttributes(
            scale=head_dim**-0.5,
            is_causal=int(is_causal),
            window_left=window_left,
            softcap=softcap,
            softmax_precision=softmax_precision,
            layout=Layout.BSHD,
        )
        self.attention: Callable[..., Any] = fused_attention

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        self.q_proj = linear(hidden_size, num_heads * head_dim)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = linear(num_heads * head_dim, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        cache: KvCache | None = None,
        layer: int = 0,
        kv_lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend from new tokens to themselves and to what a cache holds.

        Without a cache the tokens' positions are 0 … S − 1. With one they are those behind the
        cached tokens; keys and values are written to it, but the caller calls ``cache.advance(S)``,
        once after the last layer. In right-padded batches with a cache, causality keeps queries
        from the padding behind them: advance by the tensor of each sequence's own length.

        Args:
            hidden_states: (B, S, E), the layer's dtype.
            cache: what earlier tokens left, of at least ``layer`` + 1 layers like `cache_layer`.
            layer: this layer's index in the cache.
            kv_lengths: int32 (B,), without a cache only: how many leading tokens of a right-padded
                sequence are real; rows of the result beyond mean nothing. None: S.

        Returns:
            (B, S, E), the same dtype.

        Raises:
            ConfigError: for a shape that does not fit, kv_lengths beside a cache, or a cache that
                is full.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ConfigError(
                f"hidden_states is {tuple(hidden_states.shape)}; it must be "
                f"(B, S, E={self.hidden_size})"
            )
        if cache is not None and kv_lengths is not None:
            raise ConfigError(
                "kv_lengths with a cache, which knows its lengths; leave kv_lengths out, and call "
                "cache.advance with the number of real tokens of each sequence"
            )
        sequence = hidden_states.shape[1]
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_theta is not None:
            positions = torch.arange(sequence, device=hidden_states.device)[None]
            if cache is not None:
                positions = cache.position[:, None] + positions
            cos, sin = rotary_factors(positions, self.head_dim, self.rope_theta, q.dtype)
            q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        k, v = self._cached_form(k.transpose(1, 2), v.transpose(1, 2))
        q_start = None
        if cache is not None:
            k, v = cache.update(layer, k, v)
            kv_lengths = cache.kv_lengths(sequence)
        elif kv_lengths is not None:
            q_start = torch.zeros_like(kv_lengths)
        y = self._attend(q, k, v, kv_lengths, q_start)
        output: Tensor = self.o_proj(y.flatten(2))
        return output

    def cache_layer(self) -> CacheLayer:
        """What this layer keeps of a token."""
        return CacheLayer(self.num_kv_heads, self.head_dim, self.head_dim)

    def new_cache(self, batch: int, capacity: int) -> StaticCache:
        """An empty cache for this layer alone, in its dtype and on its device."""
        weight = self.q_proj.weight
        return StaticCache(
            [self.cache_layer()], batch, capacity, dtype=weight.dtype, device=weight.device
        )

    def cache_stats(self, cache: KvCache) -> CacheStats:
        """Measure a cache against that of multi-head attention with as many heads of this size."""
        return cache_stats(cache, num_heads=self.num_heads, head_dim=self.head_dim)

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, rope_theta={self.rope_theta}"
        )

    def _cached_form(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is cached of k and v (B, Hkv, S, D)."""
        return k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, q_start: Tensor | None
    ) -> Tensor:
        """Result (B, S, H, D) of q (B, S, H, D) on k and v as they are cached."""
        y: Tensor = self.attention(
            q,
            k,
            v,
            None,
            kv_lengths,
            q_start,
            scale=self.attributes.scale,
            is_causal=bool(self.attributes.is_causal),
            window_left=self.attributes.window_left,
            softcap=self.attributes.softcap,
            softmax_precision=int(self.attributes.softmax_precision),
            layout=int(self.attributes.layout),
        )
        return y


class MultiQueryAttention(AttentionModule):
    """Attention whose query heads share keys and values in groups: MQA, GQA or MHA.

    Shazeer 2019 (arXiv:1911.02150), section 3, and Ainslie et al. 2023 (arXiv:2305.13245).

    Args:
        hidden_size: E.
        num_heads: H, query heads.
        num_kv_heads: Hkv; 1 is MQA, ``num_heads`` is MHA, a divisor in between is GQA.
        head_dim: D; None: hidden_size / num_heads.
        is_causal: tokens see only themselves and earlier ones.
        window_left: how many tokens before itself a token sees; −1 = all.
        softcap: c > 0 caps scores to c·tanh(x / c).
        rope_theta: base of rotary position embeddings, see `rotate_half`; None: none.
        bias: whether the four projections have a bias.
        softmax_precision: 1 (FLOAT), or 10 (FLOAT16) in float16.
        dtype: of the weights; None: PyTorch's default.
        device: of the weights; None: PyTorch's default.

    Raises:
        ConfigError: for sizes that do not divide, an odd head_dim with RoPE, or attributes that the
            op refuses.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int = 1,
        head_dim: int | None = None,
        *,
        is_causal: bool = True,
        window_left: int = -1,
        softcap: float = 0.0,
        rope_theta: float | None = None,
        bias: bool = False,
        softmax_precision: int = SoftmaxPrecision.FLOAT,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            is_causal=is_causal,
            window_left=window_left,
            softcap=softcap,
            rope_theta=rope_theta,
            bias=bias,
            softmax_precision=softmax_precision,
            dtype=dtype,
            device=device,
        )


class LatentAttention(AttentionModule):
    """Attention with one shared key and value head that is cached in compressed form: simple MLA.

    With x a token and W the weights of the layers of that name (the low-rank joint compression of
    DeepSeek-V2, arXiv:2405.04434, section 2.1, for a single head, K and V apart)::

        cached:    c_k = W_k_compress rope(W_k x);  c_v = W_v_compress W_v x
        expanded:  y = attention(q, W_k_expand c_k, W_v_expand c_v)
        absorbed:  y = W_v_expand attention(W_k_expandᵀ q, c_k, c_v)

    Both forms give the same numbers up to rounding: q·(W c) = (Wᵀ q)·c, which holds for W =
    W_k_expand because RoPE comes before the compression and nothing depends on the position
    behind it. The scale of both is 1/sqrt(D), not 1/sqrt(R): the scores are the same numbers.

    Args:
        hidden_size: E.
        num_heads: H, query heads.
        latent_size: R, columns of each of the two latents; less than head_dim.
        head_dim: D, uncompressed; None: hidden_size / num_heads.
        form: "absorbed" attends to the latents (less to read: for decoding), "expanded" to rebuilt
            keys and values (less to compute: for prefill). May be set at any time.
        is_causal: tokens see only themselves and earlier ones.
        window_left: how many tokens before itself a token sees; −1 = all.
        softcap: c > 0 caps scores to c·tanh(x / c).
        rope_theta: base of rotary position embeddings, see `rotate_half`; None: none.
        bias: whether the projections of q, k, v and the output have a bias; compression and
            expansion have none.
        softmax_precision: 1 (FLOAT), or 10 (FLOAT16) in float16.
        dtype: of the weights; None: PyTorch's default.
        device: of the weights; None: PyTorch's default.

    Raises:
        ConfigError: for sizes that do not divide, a latent_size that compresses nothing, an odd
            head_dim with RoPE, an unknown form, or attributes that the op refuses.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        latent_size: int,
        head_dim: int | None = None,
        *,
        form: LatentForm = "absorbed",
        is_causal: bool = True,
        window_left: int = -1,
        softcap: float = 0.0,
        rope_theta: float | None = None,
        bias: bool = False,
        softmax_precision: int = SoftmaxPrecision.FLOAT,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            1,
            head_dim,
            is_causal=is_causal,
            window_left=window_left,
            softcap=softcap,
            rope_theta=rope_theta,
            bias=bias,
            softmax_precision=softmax_precision,
            dtype=dtype,
            device=device,
        )
        if not 1 <= latent_size < self.head_dim:
            raise ConfigError(
                f"latent_size={latent_size} with head_dim={self.head_dim}; accepted is 1 to "
                f"{self.head_dim - 1}: without compression use MultiQueryAttention"
            )
        self.latent_size = latent_size
        self.form = form

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)

        self.k_compress = linear(self.head_dim, latent_size)
        self.v_compress = linear(self.head_dim, latent_size)
        self.k_expand = linear(latent_size, self.head_dim)
        self.v_expand = linear(latent_size, self.head_dim)

    @property
    def form(self) -> LatentForm:
        """Which of the two forms `forward` computes."""
        return self._form

    @form.setter
    def form(self, form: LatentForm) -> None:
        if form not in get_args(LatentForm):
            raise ConfigError(f"form={form!r} is neither {' nor '.join(get_args(LatentForm))}")
        self._form: LatentForm = form

    def cache_layer(self) -> CacheLayer:
        """What this layer keeps of a token: the two latents."""
        return CacheLayer(1, self.latent_size, self.latent_size)

    def extra_repr(self) -> str:
        """The sizes and the form, for ``print``."""
        return f"{super().extra_repr()}, latent_size={self.latent_size}, form={self.form}"

    def _cached_form(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_compress(k), self.v_compress(v)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, q_start: Tensor | None
    ) -> Tensor:
        if self.form == "expanded":
            k, v = self.k_expand(k), self.v_expand(v)
            return super()._attend(q, k, v, kv_lengths, q_start)
        absorbed = super()._attend(q @ self.k_expand.weight, k, v, kv_lengths, q_start)
        y: Tensor = self.v_expand(absorbed)
        return y


def FastMQA(
    hidden_dim: int,
    num_heads: int,
    enable_mla: bool = False,
    mla_compression: float = 0.5,
    **options: Any,
) -> MultiQueryAttention | LatentAttention:
    """The constructor of the FastMQA project: multi-query attention, or latent attention.

    Args:
        hidden_dim: E.
        num_heads: H.
        enable_mla: `LatentAttention` instead of `MultiQueryAttention`.
        mla_compression: R / D, rounded to a whole R; only with ``enable_mla``.
        **options: further arguments of the two classes.

    Raises:
        ConfigError: as the two classes do, and if mla_compression is not between 0 and 1.
    """
    if not enable_mla:
        return MultiQueryAttention(hidden_dim, num_heads, **options)
    if not 0 < mla_compression < 1:
        raise ConfigError(
            f"mla_compression={mla_compression}; it is the latent's part of a head, between 0 and 1"
        )
    head_dim = options.get("head_dim") or hidden_dim // max(num_heads, 1)
    return LatentAttention(hidden_dim, num_heads, round(head_dim * mla_compression), **options)


def rotary_factors(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles p · theta^(−2i / D) of position p and pair i.

    RoFormer (arXiv:2104.09864), equation 15 counted from i = 0. Angles are computed in float32
    (float64 for float64), elementwise: an inference engine may have no float32 matrix product.

    Args:
        positions: int (B, S), or (1, S) if all sequences share them.
        head_dim: D, even.
        theta: base of the angles, usually 10000.
        dtype: of the results.

    Returns:
        cos and sin: (B or 1, S, 1, D / 2).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pair = torch.arange(head_dim // 2, dtype=wide, device=positions.device)
    frequencies = theta ** (pair * (-2 / head_dim))
    angles = (positions[..., None].to(wide) * frequencies)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, S, H, D) as in Llama: pair i is columns i and i + D / 2.

    RoFormer (arXiv:2104.09864), equation 34 with its columns reordered.

    Args:
        x: queries or keys.
        cos: (B or 1, S, 1, D / 2), of `rotary_factors`, x's dtype.
        sin: likewise.
    """
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
