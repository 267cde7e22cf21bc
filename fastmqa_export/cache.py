# SPDX-License-Identifier: MIT
"""Key/value caches: preallocated buffers written in place, and their functional twin for tracing.

Shape letters: B sequences, Hkv key/value heads, S new tokens, T capacity (tokens that fit in a
buffer), D and V the sizes of a key and a value.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastmqa_export.config import OP_DOMAIN
from fastmqa_export.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a token.

    Attributes:
        kv_heads: Hkv.
        key_size: D, the columns of a key.
        value_size: V, the columns of a value; 0: the layer's values are columns of its keys, and
            it has no buffer for them.

    Raises:
        ConfigError: if a size is negative, or kv_heads or key_size is 0.
    """

    kv_heads: int
    key_size: int
    value_size: int

    def __post_init__(self) -> None:
        """Refuse sizes that no buffer has."""
        if self.kv_heads < 1 or self.key_size < 1 or self.value_size < 0:
            raise ConfigError(
                f"{self}: kv_heads and key_size are at least 1, and value_size is at least 0 "
                "(0: the values are columns of the keys)"
            )


class KvCache(abc.ABC):
    """Keys and values of the tokens seen so far, for all layers of a model.

    A forward pass of S new tokens calls `update` once per layer, attends to the whole buffers with
    `kv_lengths`, and after the last layer whoever runs the model calls `advance`.

    Attributes:
        keys: for each layer (B, Hkv, T, D); tokens 0 … position_b − 1 of sequence b are valid.
        values: for each layer (B, Hkv, T, V), or None where the values are columns of the keys.
        position: int64 (B,), how many tokens of each sequence are cached: where the next is
            written.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor | None], position: Tensor
    ) -> None:
        if not keys or len(keys) != len(values):
            raise ConfigError(
                f"{len(keys)} key and {len(values)} value buffers; a cache has one of each for "
                "every layer, and at least one layer (None for values that lie in the keys)"
            )
        self.keys = list(keys)
        self.values = list(values)
        self.position = position

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        """T, how many tokens of a sequence fit."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind all keys and values, as allocated."""
        buffers = [*self.keys, *(buffer for buffer in self.values if buffer is not None)]
        return sum(buffer.untyped_storage().nbytes() for buffer in buffers)

    @overload
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    @overload
    def update(self, layer: int, k: Tensor, v: None = None) -> tuple[Tensor, None]: ...

    def update(
        self, layer: int, k: Tensor, v: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Write new tokens at position_b … position_b + S − 1 of each sequence b.

        ``position`` stays as it is, so that the next layer writes to the same place.

        Args:
            layer: index of the layer.
            k: (B, Hkv, S, D), the cache's dtype.
            v: (B, Hkv, S, V); None exactly where the layer's values are columns of its keys.

        Returns:
            K: (B, Hkv, T, D) and V: (B, Hkv, T, V) or None, the layer's whole buffers; what lies
            beyond `kv_lengths` of them is not to be used.

        Raises:
            ConfigError: if the layer does not exist, a shape or dtype is not its own, or the tokens
                do not fit.
        """
        if not 0 <= layer < len(self.keys):
            raise ConfigError(
                f"layer={layer}, but the cache has layers 0 to {len(self.keys) - 1}; make it with "
                "one CacheLayer for each layer of the model"
            )
        buffer = self.values[layer]
        if (v is None) != (buffer is None):
            raise ConfigError(
                f"layer {layer}: v is {'not ' if v is None else ''}given, but its cache has "
                f"{'no' if buffer is None else 'a'} value buffer; CacheLayer.value_size is 0 "
                "exactly where the values are columns of the keys"
            )
        self.keys[layer] = self._write(self.keys[layer], k)
        if v is not None and buffer is not None:
            self.values[layer] = self._write(buffer, v)
        return self.keys[layer], self.values[layer]

    def kv_lengths(self, new_tokens: int) -> Tensor:
        """Valid tokens of each sequence once ``new_tokens`` = S are written: int32 (B,)."""
        return (self.position + new_tokens).to(torch.int32)

    @abc.abstractmethod
    def advance(self, count: int | Tensor) -> None:
        """Count the tokens written since the last call as cached.

        Args:
            count: the same for all sequences, or an integer (B,). Fewer than were written leaves
                the rest (right padding) to be overwritten; a negative number takes tokens back.
        """

    @abc.abstractmethod
    def _write(self, buffer: Tensor, update: Tensor) -> Tensor:
        """The buffer (B, Hkv, T, ·) with the update (B, Hkv, S, ·) written at the position."""


class StaticCache(KvCache):
    """A cache in preallocated buffers that are written in place: no concatenation, no copy.

    For inference: the buffers keep numbers and no gradients.

    Args:
        layers: what each layer keeps of a token.
        batch: B.
        capacity: T.
        dtype: of keys and values.
        device: of all buffers; None: PyTorch's default.

    Raises:
        ConfigError: if there is no layer, or batch or capacity is less than 1.
    """

    def __init__(
        self,
        layers: Sequence[CacheLayer],
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ConfigError(f"batch={batch}, capacity={capacity}: both are at least 1")

        def buffer(heads: int, columns: int) -> Tensor:
            return torch.zeros(batch, heads, capacity, columns, dtype=dtype, device=device)

        super().__init__(
            [buffer(layer.kv_heads, layer.key_size) for layer in layers],
            [
                buffer(layer.kv_heads, layer.value_size) if layer.value_size else None
                for layer in layers
            ],
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def advance(self, count: int | Tensor) -> None:
        """Count tokens as cached, see `KvCache.advance`.

        Raises:
            ConfigError: if a position would leave [0, capacity].
        """
        _check_room(self.position + count, 0, self.capacity)
        self.position += count

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens: new buffers, zero beyond a copy of the old ones.

        Raises:
            ConfigError: if ``capacity`` is less than the present one.
        """
        if capacity < self.capacity:
            raise ConfigError(
                f"grow({capacity}) of a cache of capacity {self.capacity}; a cache does not "
                "shrink, make a new one"
            )

        def grown(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            return new

        # One buffer after the other, so that only one of them is held twice.
        for layer, old in enumerate(self.values):
            self.keys[layer] = grown(self.keys[layer])
            self.values[layer] = None if old is None else grown(old)

    def reset(self) -> None:
        """Forget all tokens; the numbers stay in the buffers until they are overwritten."""
        self.position.zero_()

    def _write(self, buffer: Tensor, update: Tensor) -> Tensor:
        _check_write(buffer, update, self.position)
        return _write_rows_(buffer, update.detach(), self.position)


class TracedCache(KvCache):
    """A cache of graph inputs: each `update` makes new buffers with ``fastmqa::cache_write``.

    For exporting a decoding step: after the forward pass ``keys`` and ``values`` are the graph's
    outputs. Nothing looks at a tensor's contents, so batch, S and T may all be symbolic; that the
    tokens fit is up to whoever runs the graph.

    Args:
        keys: for each layer (B, Hkv, T, D).
        values: for each layer (B, Hkv, T, V), or None.
        position: int64 (B,).

    Raises:
        ConfigError: if there is no layer, or not as many keys as values.
    """

    def advance(self, count: int | Tensor) -> None:
        """Count tokens as cached, see `KvCache.advance`; the sum is a new tensor."""
        self.position = self.position + count

    def _write(self, buffer: Tensor, update: Tensor) -> Tensor:
        written: Tensor = torch.ops.fastmqa.cache_write(buffer, update, self.position)
        return written


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """How much memory a cache takes, measured on its buffers, beside that of multi-head attention.

    Attributes:
        bytes_total: of all keys and values, as allocated.
        bytes_per_sequence: of one sequence at full capacity, all layers.
        bytes_per_token: of one token of one sequence, all layers.
        mha_bytes_per_token: the same if every query head had a K and a V of its own, in the same
            dtype and as many layers.
    """

    bytes_total: int
    bytes_per_sequence: int
    bytes_per_token: int
    mha_bytes_per_token: int

    @property
    def reduction(self) -> float:
        """Part of multi-head attention's bytes that is saved, 0 to 1; negative if it costs more."""
        return 1 - self.bytes_per_token / self.mha_bytes_per_token

    @property
    def users_factor(self) -> float:
        """How many times as many sequences fit in the same memory as with multi-head attention."""
        return self.mha_bytes_per_token / self.bytes_per_token


def cache_stats(cache: KvCache, *, num_heads: int, head_dim: int) -> CacheStats:
    """Measure a cache against that of multi-head attention.

    Args:
        cache: its buffers must be allocated as they are used (no views of larger storages).
        num_heads: H, query heads of the model.
        head_dim: size of a head of its queries, keys and values, uncompressed.
    """
    total = cache.nbytes
    return CacheStats(
        bytes_total=total,
        bytes_per_sequence=total // cache.batch,
        bytes_per_token=total // (cache.batch * cache.capacity),
        mha_bytes_per_token=sum(2 * num_heads * head_dim * k.element_size() for k in cache.keys),
    )


@torch.library.custom_op(
    f"{OP_DOMAIN}::cache_write",
    mutates_args=(),
    schema="(Tensor cache, Tensor update, Tensor position) -> Tensor",
)
def cache_write(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    """A copy of a cache with new tokens written to it: ONNX ``TensorScatter``-24, axis −2, linear.

    Args:
        cache: (B, Hkv, T, D), any dtype.
        update: (B, Hkv, S, D), the same dtype; S ≤ T.
        position: int64 (B,); row s of sequence b is written to row position_b + s.

    Returns:
        (B, Hkv, T, D).

    Raises:
        ConfigError: if shapes or dtypes do not fit, or rows lie outside the cache (unless traced).
    """
    _check_write(cache, update, position)
    return _write_rows_(cache.clone(memory_format=torch.contiguous_format), update, position)


@cache_write.register_fake
def _(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    _check_write(cache, update, position)
    return cache.new_empty(cache.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, update, position = inputs
    ctx.save_for_backward(position)
    ctx.update_shape = update.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    (position,) = ctx.saved_tensors
    grad_update = grad.gather(2, _row_index(position, ctx.update_shape))
    overwritten = torch.zeros_like(grad_update)
    return torch.ops.fastmqa.cache_write(grad, overwritten, position), grad_update, None


cache_write.register_autograd(_backward, setup_context=_setup_context)


def _check_write(cache: Tensor, update: Tensor, position: Tensor) -> None:
    """Shapes and dtypes only, so that fake tensors pass."""
    if cache.dim() != 4 or update.dim() != 4 or update.dtype != cache.dtype:
        raise ConfigError(
            f"update is {update.dtype} {tuple(update.shape)} and the cache {cache.dtype} "
            f"{tuple(cache.shape)}; both have one dtype and rank 4, (B, Hkv, S, D) and "
            "(B, Hkv, T, D)"
        )
    batch, heads, _, columns = cache.shape
    if update.shape[0] != batch or update.shape[1] != heads or update.shape[3] != columns:
        raise ConfigError(
            f"update is {tuple(update.shape)}; with a cache of {tuple(cache.shape)} it must be "
            f"(B={batch}, Hkv={heads}, S, D={columns})"
        )
    if position.dtype != torch.int64 or position.dim() != 1 or position.shape[0] != batch:
        raise ConfigError(
            f"position is {position.dtype} {tuple(position.shape)}; it must be int64 (B={batch},)"
        )


def _check_room(position: Tensor, new_tokens: int, capacity: int) -> None:
    lowest, highest = (int(end) for end in position.aminmax())
    if lowest < 0:
        raise ConfigError(f"position {lowest} lies before the first token of the cache, 0")
    if highest + new_tokens > capacity:
        raise ConfigError(
            f"{new_tokens} new tokens at position {highest} exceed the capacity {capacity}; call "
            f"grow({highest + new_tokens}) or more on the StaticCache first"
        )


def _row_index(position: Tensor, shape: Sequence[int]) -> Tensor:
    """For each element of an update (B, Hkv, S, D), the row of the cache that it is written to."""
    rows = position[:, None] + torch.arange(shape[2], device=position.device)
    return rows[:, None, :, None].expand(shape)


def _write_rows_(buffer: Tensor, update: Tensor, position: Tensor) -> Tensor:
    _check_room(position, update.shape[2], buffer.shape[2])
    return buffer.scatter_(2, _row_index(position, update.shape), update)
