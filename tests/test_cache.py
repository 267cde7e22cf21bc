# SPDX-License-Identifier: MIT
"""Caches: written in place, equal to their functional twin and to ONNX TensorScatter."""

import dataclasses
import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fastmqa_export.cache import CacheLayer, StaticCache, TracedCache, cache_stats
from fastmqa_export.errors import ConfigError

LAYER = CacheLayer(kv_heads=2, key_size=5, value_size=3)
KEYS_ONLY = CacheLayer(kv_heads=1, key_size=6, value_size=0)
BATCH, CAPACITY = 3, 8

#: Where each sequence stands, and how many tokens are written there.
WRITES = {
    "prefill": ((0, 0, 0), 4),
    "one_token": ((3, 3, 3), 1),
    "own_positions": ((0, 5, 2), 3),
    "to_the_end": ((4, 0, 4), 4),
    "everything": ((0, 0, 0), 8),
    "nothing": ((8, 0, 4), 0),
}
writes = pytest.mark.parametrize(("position", "tokens"), WRITES.values(), ids=WRITES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(position: tuple[int, ...], dtype: torch.dtype = torch.float32) -> StaticCache:
    """A cache of two layers with noise in every row."""
    cache = StaticCache([LAYER, LAYER], BATCH, CAPACITY, dtype=dtype)
    for seed, buffer in enumerate([*cache.keys, *cache.values]):
        assert buffer is not None
        buffer.copy_(normal(*buffer.shape, dtype=dtype, seed=seed))
    cache.position.copy_(torch.tensor(position))
    return cache


def new_tokens(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return (
        normal(BATCH, LAYER.kv_heads, tokens, LAYER.key_size, dtype=dtype, seed=10),
        normal(BATCH, LAYER.kv_heads, tokens, LAYER.value_size, dtype=dtype, seed=11),
    )


def written(buffer: torch.Tensor, update: torch.Tensor, position: tuple[int, ...]) -> torch.Tensor:
    """What TensorScatter's pseudocode leaves in a buffer."""
    result = buffer.clone()
    for sequence, start in enumerate(position):
        result[sequence, :, start : start + update.shape[2]] = update[sequence]
    return result


@writes
@every_dtype
def test_update_writes_its_rows_and_leaves_the_others_bitwise_equal(
    position: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> None:
    cache = filled(position, dtype)
    before = filled(position, dtype)
    k, v = new_tokens(tokens, dtype)
    cache.update(1, k, v)
    assert torch.equal(cache.keys[1], written(before.keys[1], k, position))
    assert torch.equal(cache.values[1], written(before.values[1], v, position))
    assert torch.equal(cache.keys[0], before.keys[0])
    assert torch.equal(cache.values[0], before.values[0])
    assert torch.equal(cache.position, before.position)


def test_update_is_in_place_and_returns_the_whole_buffers() -> None:
    cache = StaticCache([LAYER], BATCH, CAPACITY)
    addresses = cache.keys[0].data_ptr(), cache.values[0].data_ptr(), cache.position.data_ptr()
    bytes_before = cache.nbytes
    k, v = cache.update(0, *new_tokens(4))
    cache.advance(4)
    assert (k.data_ptr(), v.data_ptr(), cache.position.data_ptr()) == addresses
    assert (cache.keys[0].data_ptr(), cache.values[0].data_ptr()) == addresses[:2]
    assert k.shape == (BATCH, LAYER.kv_heads, CAPACITY, LAYER.key_size)
    assert cache.nbytes == bytes_before


def test_update_keeps_no_graph() -> None:
    cache = StaticCache([LAYER], BATCH, CAPACITY)
    k, v = new_tokens(1)
    cached_k, cached_v = cache.update(0, k.requires_grad_(), v.requires_grad_())
    assert not cached_k.requires_grad
    assert not cached_v.requires_grad


def test_each_sequence_has_its_own_position() -> None:
    cache = StaticCache([LAYER], BATCH, CAPACITY)
    k, v = new_tokens(4)
    cache.update(0, k, v)
    cache.advance(torch.tensor([4, 1, 0]))  # the rest was right padding
    assert cache.position.tolist() == [4, 1, 0]
    token_k, token_v = k[:, :, :1] + 1, v[:, :, :1] + 1
    keys, _ = cache.update(0, token_k, token_v)
    assert torch.equal(
        keys, written(written(torch.zeros_like(keys), k, (0,) * 3), token_k, (4, 1, 0))
    )
    lengths = cache.kv_lengths(1)
    assert lengths.tolist() == [5, 2, 1]
    assert lengths.dtype == torch.int32


def test_tokens_can_be_taken_back() -> None:
    cache = StaticCache([LAYER], BATCH, CAPACITY)
    cache.advance(5)
    cache.advance(torch.tensor([-2, 0, -5]))
    assert cache.position.tolist() == [3, 5, 0]


def test_values_in_keys_have_no_buffer() -> None:
    cache = StaticCache([KEYS_ONLY], BATCH, CAPACITY, dtype=torch.float16)
    k = normal(BATCH, 1, 2, 6, dtype=torch.float16)
    keys, values = cache.update(0, k)
    assert values is None
    assert torch.equal(keys[:, :, :2], k)
    assert cache.nbytes == BATCH * CAPACITY * 6 * 2


def test_grow_keeps_tokens_and_adds_zeros() -> None:
    cache = filled((8, 2, 5))
    keys, values = cache.keys[1].clone(), cache.values[1].clone()
    cache.grow(13)
    assert cache.capacity == 13
    assert torch.equal(cache.keys[1][:, :, :CAPACITY], keys)
    assert torch.equal(cache.values[1][:, :, :CAPACITY], values)
    assert not cache.keys[1][:, :, CAPACITY:].any()
    assert not cache.values[1][:, :, CAPACITY:].any()
    assert cache.position.tolist() == [8, 2, 5]
    assert cache.nbytes == 2 * BATCH * LAYER.kv_heads * 13 * (5 + 3) * 4
    cache.update(0, *new_tokens(5))


def test_grow_without_value_buffer() -> None:
    cache = StaticCache([KEYS_ONLY], BATCH, CAPACITY)
    cache.grow(9)
    assert cache.keys[0].shape == (BATCH, 1, 9, 6)
    assert cache.values == [None]


def test_reset_starts_again_without_allocating() -> None:
    cache = filled((8, 2, 5))
    address = cache.keys[0].data_ptr()
    cache.reset()
    assert cache.position.tolist() == [0, 0, 0]
    assert cache.keys[0].data_ptr() == address


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: filled((0, 6, 2)).update(0, *new_tokens(3)),
            r"3 new tokens at position 6 exceed the capacity 8; call grow\(9\)",
        ),
        (lambda: filled((0, 6, 2)).advance(3), r"position 9 exceed the capacity 8; call grow\(9\)"),
        (lambda: filled((0, 6, 2)).advance(-1), r"position -1 lies before the first token"),
        (lambda: filled((0, 6, 2)).grow(7), r"grow\(7\) of a cache of capacity 8"),
        (
            lambda: filled((0, 0, 0)).update(2, *new_tokens(1)),
            r"layer=2, but the cache has layers 0 to 1",
        ),
        (
            lambda: filled((0, 0, 0)).update(0, new_tokens(1)[0]),
            r"layer 0: v is not given, but its cache has a value buffer",
        ),
        (
            lambda: StaticCache([KEYS_ONLY], 1, 1).update(0, *(normal(1, 1, 1, 6),) * 2),
            r"layer 0: v is given, but its cache has no value buffer",
        ),
        (
            lambda: filled((0, 0, 0)).update(0, *reversed(new_tokens(1))),
            r"update is \(3, 2, 1, 3\); with a cache of \(3, 2, 8, 5\) it must be "
            r"\(B=3, Hkv=2, S, D=5\)",
        ),
        (
            lambda: filled((0, 0, 0)).update(0, *new_tokens(1, torch.float16)),
            r"update is torch.float16 .* and the cache torch.float32 .*one dtype and rank 4",
        ),
        (lambda: StaticCache([LAYER], 0, 1), r"batch=0, capacity=1: both are at least 1"),
        (lambda: StaticCache([], 1, 1), r"0 key and 0 value buffers"),
        (lambda: TracedCache([normal(1)], [], normal(1)), r"1 key and 0 value buffers"),
        (lambda: CacheLayer(0, 4, 4), r"kv_heads and key_size are at least 1"),
    ],
    ids=[
        "update_overflow",
        "advance_overflow",
        "advance_below_zero",
        "grow_shrinks",
        "no_such_layer",
        "values_missing",
        "values_unexpected",
        "shape",
        "dtype",
        "empty_batch",
        "no_layers",
        "unequal_layers",
        "layer_sizes",
    ],
)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_refused_update_writes_nothing() -> None:
    cache, before = filled((0, 6, 2)), filled((0, 6, 2))
    with pytest.raises(ConfigError, match="capacity"):
        cache.update(0, *new_tokens(3))
    assert torch.equal(cache.keys[0], before.keys[0])


@writes
def test_cache_write_equals_static_cache(position: tuple[int, ...], tokens: int) -> None:
    cache, before = filled(position), filled(position)
    k, v = new_tokens(tokens)
    traced = TracedCache(before.keys, before.values, before.position)
    original = traced.keys[0]
    traced_k, traced_v = traced.update(0, k, v)
    cached_k, cached_v = cache.update(0, k, v)
    assert torch.equal(traced_k, cached_k)
    assert torch.equal(traced_v, cached_v)
    assert traced.keys[0] is not original
    assert torch.equal(original, filled(position).keys[0])  # the input is left alone
    assert torch.equal(traced.kv_lengths(tokens), cache.kv_lengths(tokens))


def test_traced_position_is_a_new_tensor() -> None:
    position = torch.tensor([0, 1, 2])
    cache = TracedCache([normal(3, 1, 8, 4)], [None], position)
    cache.advance(2)
    assert cache.position.tolist() == [2, 3, 4]
    assert position.tolist() == [0, 1, 2]


@writes
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cache_write_is_tensor_scatter(
    position: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> None:
    cache, update = filled(position, dtype).keys[0], new_tokens(tokens, dtype)[0]
    element = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
    node = helper.make_node(
        "TensorScatter", ["cache", "update", "position"], ["present"], axis=-2, mode="linear"
    )
    graph = helper.make_graph(
        [node],
        "cache_write",
        [
            helper.make_tensor_value_info("cache", element, ["B", "Hkv", "T", "D"]),
            helper.make_tensor_value_info("update", element, ["B", "Hkv", "S", "D"]),
            helper.make_tensor_value_info("position", TensorProto.INT64, ["B"]),
        ],
        [helper.make_tensor_value_info("present", element, ["B", "Hkv", "T", "D"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    onnx.checker.check_model(model)
    (present,) = ReferenceEvaluator(model).run(
        None,
        {
            "cache": cache.numpy(),
            "update": update.numpy(),
            "position": np.array(position, np.int64),
        },
    )
    actual = torch.ops.fastmqa.cache_write(cache, update, torch.tensor(position))
    assert np.array_equal(actual.numpy(), present)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_cache_write_is_a_proper_torch_op(tokens: int, requires_grad: bool) -> None:
    cache = normal(3, 2, 8, 5).requires_grad_(requires_grad)
    update = normal(3, tokens, 2, 5).transpose(1, 2).requires_grad_(requires_grad)
    arguments = (cache, update, torch.tensor([0, 5, 2]))
    torch.library.opcheck(torch.ops.fastmqa.cache_write.default, arguments)


def test_cache_write_gradients() -> None:
    cache = normal(2, 2, 6, 3, dtype=torch.float64).requires_grad_()
    update = normal(2, 2, 2, 3, dtype=torch.float64, seed=1).requires_grad_()
    position = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda c, u: torch.ops.fastmqa.cache_write(c, u, position), (cache, update)
    )


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (torch.tensor([0, 7]), r"2 new tokens at position 7 exceed the capacity 8"),
        (torch.tensor([0, -1]), r"position -1 lies before the first token"),
        (torch.tensor([0, 1], dtype=torch.int32), r"position is torch.int32 \(2,\); it must be"),
        (torch.tensor([0]), r"position is torch.int64 \(1,\); it must be int64 \(B=2,\)"),
    ],
    ids=["beyond", "negative", "int32", "wrong_batch"],
)
def test_cache_write_refuses(position: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        torch.ops.fastmqa.cache_write(normal(2, 1, 8, 4), normal(2, 1, 2, 4), position)


def test_cache_write_shapes_on_meta_tensors() -> None:
    cache = torch.empty(2, 1, 8, 4, device="meta")
    position = torch.empty(2, dtype=torch.int64, device="meta")
    assert torch.ops.fastmqa.cache_write(cache, cache[:, :, :3], position).shape == cache.shape
    with pytest.raises(ConfigError, match=re.escape("it must be (B=2, Hkv=1, S, D=4)")):
        torch.ops.fastmqa.cache_write(cache, cache[..., :3], position)


def test_stats_are_measured_on_the_buffers() -> None:
    layers = [CacheLayer(1, 64, 64), CacheLayer(1, 64, 64)]
    cache = StaticCache(layers, 2, 16, dtype=torch.float16)
    stats = cache_stats(cache, num_heads=8, head_dim=64)
    assert dataclasses.asdict(stats) == {
        "bytes_total": 2 * 2 * 16 * 128 * 2,
        "bytes_per_sequence": 2 * 16 * 128 * 2,
        "bytes_per_token": 2 * 128 * 2,
        "mha_bytes_per_token": 8 * 2 * 128 * 2,
    }
    assert stats.reduction == 7 / 8
    assert stats.users_factor == 8


def test_stats_of_values_in_keys() -> None:
    stats = cache_stats(StaticCache([CacheLayer(1, 576, 0)], 2, 16), num_heads=128, head_dim=128)
    assert stats.bytes_per_token == 576 * 4
    assert stats.users_factor == 2 * 128 * 128 / 576
