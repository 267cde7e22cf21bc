# SPDX-License-Identifier: MIT
"""What the FastMQA project says of itself, measured: memory, accuracy and numerical stability."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from budgets import BUDGET, assert_within_budget, oracle, same_dtype_error
from torch import Tensor

from fastmqa_export import reference
from fastmqa_export.accuracy import measure
from fastmqa_export.cache import KvCache, StaticCache, TracedCache, cache_stats
from fastmqa_export.config import OP_INPUTS, AttentionAttributes
from fastmqa_export.errors import ConfigError
from fastmqa_export.modules import AttentionModule, FastMQA, MultiQueryAttention
from fastmqa_export.op import checked_attributes, fused_attention

GIB = 2**30
HALF = [torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
both_kinds = pytest.mark.parametrize("enable_mla", [False, True], ids=["mqa", "mla"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # the layers' weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Memory: 32 sequences of 4096 tokens, 32 heads of 128, one layer.
BATCH, HEADS, TOKENS, HEAD_DIM = 32, 32, 4096, 128
#: Size in float32 in GiB; the part saved, and how many times as many sequences fit, as claimed.
MEMORY_CLAIMS = {
    "mha": (4.0, 0.0, 1),
    "mqa": (0.125, 96.9, 32),
    "mla_latent_64": (0.0625, 98.4, 64),
}


def allocate(kind: str, dtype: torch.dtype) -> KvCache:
    if kind == "mha":
        # As large, but not zeroed as a StaticCache is: no page of it is touched, so that a small
        # machine can allocate it.
        shape = (BATCH, HEADS, TOKENS, HEAD_DIM)
        k, v = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        return TracedCache([k], [v], torch.zeros(BATCH, dtype=torch.int64))
    # The layer's weights are not needed, so they stay on the meta device.
    module = FastMQA(HEADS * HEAD_DIM, HEADS, enable_mla=kind != "mqa", device="meta")
    return StaticCache([module.cache_layer()], BATCH, TOKENS, dtype=dtype)


@pytest.mark.parametrize(("kind", "claim"), MEMORY_CLAIMS.items(), ids=MEMORY_CLAIMS)
@every_dtype
def test_cache_memory(kind: str, claim: tuple[float, float, int], dtype: torch.dtype) -> None:
    size_gib, saved_percent, users = claim
    stats = cache_stats(allocate(kind, dtype), num_heads=HEADS, head_dim=HEAD_DIM)
    assert stats.bytes_total == size_gib * GIB * dtype.itemsize / 4
    assert round(100 * stats.reduction, 1) == saved_percent
    assert stats.users_factor == users
    assert stats.bytes_per_sequence * BATCH == stats.bytes_total
    assert stats.bytes_per_token * TOKENS == stats.bytes_per_sequence


# Accuracy: the op inside a layer, on the queries, keys and values that the layer gives it.


class Recording:
    """`fused_attention` that keeps its last call."""

    def __call__(self, *tensors: Tensor | None, **options: Any) -> Any:
        y = fused_attention(*tensors, **options)  # type: ignore[arg-type]
        live = dict(zip(OP_INPUTS, tensors, strict=True))
        self.tensors = {name: tensor for name, tensor in live.items() if tensor is not None}
        self.attributes: AttentionAttributes = checked_attributes(*tensors, **options)  # type: ignore[arg-type]
        self.y = y
        return y


def no_attention(q: Tensor, k: Tensor, v: Tensor, *tensors: Any, **options: Any) -> Tensor:
    return q.new_zeros(*q.shape[:3], v.shape[3])


def recorded(module: AttentionModule, x: Tensor, queries: int) -> Recording:
    """The op's call for the last ``queries`` tokens of x, which see all earlier ones in a cache.

    Filling a layer's cache does not need its attention, so that is left out before.
    """
    cache, split = module.new_cache(x.shape[0], x.shape[1]), x.shape[1] - queries
    recording = Recording()
    with torch.no_grad():
        if split:
            module.attention = no_attention
            module(x[:, :split], cache)
            cache.advance(split)
        module.attention = recording
        module(x[:, split:], cache)
    return recording


#: hidden size, heads, tokens S; and how many of the S tokens are queries: all, or, where the
#: oracle's S × S scores would take minutes, the last ones, each of which sees all S keys.
SIZES = {
    "512_8_heads": (512, 8, 256, 256),
    "1024_16_heads": (1024, 16, 512, 512),
    "2048_32_heads": (2048, 32, 1024, 64),
    "4096_32_heads": (4096, 32, 2048, 32),
}


@pytest.mark.parametrize(("hidden", "heads", "tokens", "queries"), SIZES.values(), ids=SIZES)
@both_kinds
def test_sizes_are_within_the_budget(
    hidden: int, heads: int, tokens: int, queries: int, enable_mla: bool
) -> None:
    module = FastMQA(hidden, heads, enable_mla=enable_mla, rope_theta=10000.0)
    call = recorded(module, normal(1, tokens, hidden), queries)
    assert call.tensors["q"].shape[1:3] == (queries, heads)
    assert call.tensors["k"].shape[1:3] == (1, tokens)
    assert_within_budget(call.y, call.tensors, call.attributes)


# Stability, condition 1 and 2: tiny and huge values.

ATTRIBUTES = AttentionAttributes(scale=64**-0.5, is_causal=1)


def uniform_inputs(magnitude: float, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 8, 5, 64), "k": (2, 1, 33, 64), "v": (2, 1, 33, 64)}
    return {
        name: ((torch.rand(shape, generator=generator) * 2 - 1) * magnitude).to(dtype)
        for name, shape in shapes.items()
    }


def run_op(tensors: dict[str, Tensor], attributes: AttentionAttributes = ATTRIBUTES) -> Tensor:
    options = dataclasses.asdict(attributes)
    del options["features"]
    options["is_causal"] = bool(options["is_causal"])
    y = fused_attention(*(tensors.get(name) for name in OP_INPUTS), **options)  # type: ignore[arg-type]
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize(
    ("magnitude", "dtype"),
    [
        (1e-6, torch.float32),
        (1e-6, torch.bfloat16),
        (1e-6, torch.float16),
        (1e6, torch.float32),
        (1e6, torch.bfloat16),
    ],
    ids=str,
)
def test_tiny_and_huge_values(magnitude: float, dtype: torch.dtype) -> None:
    tensors = uniform_inputs(magnitude, dtype)
    y = run_op(tensors)
    expected, _ = oracle(tensors, ATTRIBUTES)
    assert y.isfinite().all()
    assert y.any()
    # An infinite yardstick would accept anything.
    assert math.isfinite(same_dtype_error(tensors, ATTRIBUTES, expected).max_abs)
    assert_within_budget(y, tensors, ATTRIBUTES)


def test_huge_float16_values_where_float16_scores_overflow() -> None:
    """Values up to 6e4: PyTorch's operators in float16 give NaN; scores in float32 do not."""
    tensors = uniform_inputs(6e4, torch.float16)
    yardstick = reference.attention_in_dtype(*tensors.values(), attributes=ATTRIBUTES)
    assert not yardstick.isfinite().all()
    expected, _ = oracle(tensors, ATTRIBUTES)
    assert measure(run_op(tensors), expected, torch.float16).max_ulp <= 1


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1e6])
def test_tiny_and_huge_values_through_a_layer(
    enable_mla: bool, dtype: torch.dtype, magnitude: float
) -> None:
    module = FastMQA(128, 4, enable_mla=enable_mla, dtype=dtype)
    x = normal(2, 9, 128).to(dtype) * magnitude
    call = recorded(module, x, 9)
    expected, _ = oracle(call.tensors, call.attributes)
    assert math.isfinite(same_dtype_error(call.tensors, call.attributes, expected).max_abs)
    assert_within_budget(call.y, call.tensors, call.attributes)
    assert module(x).isfinite().all()


# Condition 3: mixed precision.


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_mask_with_half_inputs(dtype: torch.dtype) -> None:
    tensors = uniform_inputs(1.0, dtype)
    tensors["attn_mask"] = normal(2, 1, 5, 33) * 3
    assert_within_budget(run_op(tensors), tensors, ATTRIBUTES)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_mask_is_not_rounded_to_half(dtype: torch.dtype) -> None:
    """Around 500 neighbours in float16 are 0.25 apart: rounding the mask would be seen."""
    tensors = uniform_inputs(1.0, dtype)
    tensors["attn_mask"] = 500 + normal(2, 1, 5, 33)
    rounded = tensors | {"attn_mask": tensors["attn_mask"].to(dtype)}
    expected, _ = oracle(tensors, ATTRIBUTES)
    assert measure(run_op(tensors), expected, dtype).max_ulp <= 1
    assert measure(run_op(rounded), expected, dtype).max_ulp > 10


@both_kinds
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_layer_beside_the_float32_layer_of_the_same_weights(
    enable_mla: bool, dtype: torch.dtype
) -> None:
    half = FastMQA(128, 4, enable_mla=enable_mla, rope_theta=10000.0, dtype=dtype)
    single, plain = copy.deepcopy(half).float(), copy.deepcopy(half)
    plain.attention = lambda *tensors, is_causal, **options: reference.attention_in_dtype(
        *tensors, attributes=AttentionAttributes(is_causal=int(is_causal), **options)
    )
    x = normal(2, 9, 128).to(dtype)
    expected = single(x.float()).double()
    error, yardstick = (measure(layer(x), expected, dtype) for layer in (half, plain))
    assert BUDGET.accepts(error, yardstick), (error, yardstick)


def test_mixed_dtypes_of_q_and_k_are_refused_not_cast() -> None:
    tensors = uniform_inputs(1.0, torch.float16)
    with pytest.raises(ConfigError, match=r"k is torch\.float32 and q is torch\.float16"):
        run_op(tensors | {"k": tensors["k"].float()})


# Condition 4: extreme ratios of query heads to key/value heads.


@pytest.mark.parametrize(("heads", "head_dim"), [(71, 64), (48, 128)], ids=["71_1", "48_1"])
@pytest.mark.parametrize("queries", [17, 1], ids=["prefill", "decode"])
@every_dtype
def test_extreme_head_ratios(heads: int, head_dim: int, queries: int, dtype: torch.dtype) -> None:
    module = MultiQueryAttention(256, heads, head_dim=head_dim, rope_theta=10000.0, dtype=dtype)
    call = recorded(module, normal(2, 17, 256).to(dtype), queries)
    assert call.tensors["q"].shape[2] == heads
    assert call.tensors["k"].shape[1] == 1
    assert_within_budget(call.y, call.tensors, call.attributes)


# Condition 5: zero gradients.


@both_kinds
@every_dtype
def test_zero_upstream_gradient_gives_zero_gradients(enable_mla: bool, dtype: torch.dtype) -> None:
    module = FastMQA(64, 4, enable_mla=enable_mla, rope_theta=10000.0, softcap=5.0, dtype=dtype)
    x = normal(2, 7, 64).to(dtype).requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.zeros_like(y))
    assert [gradient.count_nonzero().item() for gradient in gradients] == [0] * len(gradients)


@pytest.mark.parametrize("masked_by", ["mask", "float_mask", "lengths"])
@every_dtype
def test_gradients_of_fully_masked_rows_are_zero(masked_by: str, dtype: torch.dtype) -> None:
    """Sequence 0 sees no key at all, sequence 1 all of them."""
    tensors = {n: x.requires_grad_() for n, x in uniform_inputs(1.0, dtype).items()}
    keep = torch.tensor([False, True])[:, None, None, None]
    if masked_by == "mask":
        tensors["attn_mask"] = keep
    elif masked_by == "float_mask":
        tensors["attn_mask"] = torch.zeros(2, 1, 1, 1).masked_fill(~keep, -torch.inf)
    else:
        tensors["kv_lengths"] = torch.tensor([0, 33], dtype=torch.int32)
    y = run_op(tensors)
    assert not y[0].any()
    gradients = torch.autograd.grad(y.float().square().sum(), [tensors[n] for n in "qkv"])
    assert [bool(gradient.isfinite().all()) for gradient in gradients] == [True] * 3
    assert [bool(gradient[0].any()) for gradient in gradients] == [False] * 3
    assert [bool(gradient[1].any()) for gradient in gradients] == [True] * 3


@both_kinds
def test_gradients_of_a_layer_with_an_empty_sequence_are_finite(enable_mla: bool) -> None:
    module = FastMQA(64, 4, enable_mla=enable_mla, rope_theta=10000.0)
    x = normal(2, 7, 64).requires_grad_()
    y = module(x, kv_lengths=torch.tensor([0, 7], dtype=torch.int32))
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    assert [bool(gradient.isfinite().all()) for gradient in gradients] == [True] * len(gradients)
    assert not gradients[0][0].any()
