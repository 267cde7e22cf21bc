# SPDX-License-Identifier: MIT
"""The attention layers: with and without a cache, absorbed and expanded, against PyTorch's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

from fastmqa_export import reference
from fastmqa_export.accuracy import ErrorBudget, measure
from fastmqa_export.cache import CacheLayer, KvCache, TracedCache
from fastmqa_export.config import AttentionAttributes
from fastmqa_export.errors import ConfigError
from fastmqa_export.modules import (
    AttentionModule,
    FastMQA,
    LatentAttention,
    MultiQueryAttention,
    rotary_factors,
    rotate_half,
)
from fastmqa_export.op import fused_attention

HIDDEN, HEADS, HEAD_DIM, LATENT = 48, 6, 8, 3
BATCH, SEQUENCE = 3, 9
#: Absolute, in float64, at outputs of magnitude 1: only the order of sums differs.
ROUNDING = 1e-12

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope_theta": 10000.0},
    "window": {"window_left": 2},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": True},
    "everything": {"rope_theta": 500.0, "window_left": 3, "softcap": 2.0, "bias": True},
}
KINDS: dict[str, Callable[..., AttentionModule]] = {
    "mqa": lambda **options: MultiQueryAttention(HIDDEN, HEADS, **options),
    "gqa": lambda **options: MultiQueryAttention(HIDDEN, HEADS, 3, **options),
    "mha": lambda **options: MultiQueryAttention(HIDDEN, HEADS, HEADS, **options),
    "mla_absorbed": lambda **options: LatentAttention(HIDDEN, HEADS, LATENT, **options),
    "mla_expanded": lambda **options: LatentAttention(
        HIDDEN, HEADS, LATENT, form="expanded", **options
    ),
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("option", OPTIONS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)


@pytest.fixture(autouse=True)
def _small_sizes_and_no_gradients() -> Iterator[None]:
    """One thread: a second one only waits at these sizes, tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def make(
    kind: str, option: str = "plain", dtype: torch.dtype = torch.float64, **more: Any
) -> AttentionModule:
    """A layer with the same weights each time; they are so large that attention is not uniform."""
    module = KINDS[kind](**{**OPTIONS[option], **more}, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        columns = parameter.shape[-1]
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * columns**-0.5)
    return module.to(dtype)


def hidden(
    batch: int = BATCH, sequence: int = SEQUENCE, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, sequence, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)


def run_with_cache(
    module: AttentionModule, x: Tensor, chunks: list[int], capacity: int = SEQUENCE + 3
) -> Tensor:
    cache = module.new_cache(x.shape[0], capacity)
    outputs = []
    for chunk in x.split(chunks, 1):
        outputs.append(module(chunk, cache))
        cache.advance(chunk.shape[1])
    return torch.cat(outputs, 1)


@every_kind
@every_option
@pytest.mark.parametrize(
    "chunks",
    [[1] * SEQUENCE, [5, 1, 1, 1, 1], [4, 3, 2], [SEQUENCE]],
    ids=["token_by_token", "prefill_then_decode", "chunks", "at_once"],
)
def test_steps_with_a_cache_equal_one_forward_without(
    kind: str, option: str, chunks: list[int]
) -> None:
    module, x = make(kind, option), hidden()
    assert_same(run_with_cache(module, x, chunks), module(x))


@every_kind
@every_option
def test_right_padding_without_a_cache(kind: str, option: str) -> None:
    module, x, lengths = make(kind, option), hidden(), [4, 9, 1]
    y = module(x, kv_lengths=torch.tensor(lengths, dtype=torch.int32))
    alone = [module(x[b : b + 1, :length])[0] for b, length in enumerate(lengths)]
    assert_same(torch.cat([y[b, :length] for b, length in enumerate(lengths)]), torch.cat(alone))


@every_kind
@every_option
def test_right_padded_prefill_then_ragged_decode(kind: str, option: str) -> None:
    """Sequences of 4, 6 and 1 tokens, three steps more each: as if each had been alone."""
    module, x, lengths, steps = make(kind, option), hidden(), torch.tensor([4, 6, 1]), 3
    cache = module.new_cache(BATCH, 6 + steps)
    module(x[:, :6], cache)
    cache.advance(lengths)
    outputs = []
    for step in range(steps):
        outputs.append(module(x[torch.arange(BATCH), lengths + step][:, None], cache))
        cache.advance(1)
    alone = [module(x[b : b + 1, : n + steps])[0, n:] for b, n in enumerate(lengths.tolist())]
    assert_same(torch.cat(outputs, 1), torch.stack(alone))


@every_kind
def test_without_causality_padding_is_not_seen(kind: str) -> None:
    module, x = make(kind, is_causal=False), hidden()
    lengths = torch.tensor([4, 9, 1], dtype=torch.int32)
    y = module(x, kv_lengths=lengths)
    assert_same(y[:1, :4], module(x[:1, :4]))
    assert_same(y[2:, :1], module(x[2:, :1]))
    assert not torch.allclose(y[:1, :4], make(kind)(x[:1, :4]))


@every_kind
def test_what_lies_in_a_fresh_cache_is_not_seen(kind: str) -> None:
    module, x = make(kind, "everything"), hidden()
    cache = module.new_cache(BATCH, SEQUENCE + 2)
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    assert_same(module(x, cache), module(x))


@every_kind
def test_a_layer_uses_its_own_part_of_a_cache(kind: str) -> None:
    module, x = make(kind), hidden()
    one = module.new_cache(BATCH, SEQUENCE)
    cache = TracedCache(
        [torch.zeros_like(one.keys[0]) for _ in range(2)],
        [torch.zeros_like(one.values[0]) for _ in range(2)],
        one.position,
    )
    assert_same(module(x, cache, layer=1), module(x, one))
    assert torch.equal(cache.keys[1], one.keys[0])
    assert not cache.keys[0].any()


def causal_window(sequence: int, left: int) -> Tensor:
    distance = torch.arange(sequence)[:, None] - torch.arange(sequence)
    return (distance >= 0) & ((distance <= left) if left >= 0 else True)


def rotated_as_complex_numbers(x: Tensor, theta: float) -> Tensor:
    """RoFormer, equation 12: multiply by e^(i p θ), with pairs (j, j + D/2); x is (B, H, S, D)."""
    half = x.shape[-1] // 2
    exponents = -2 * torch.arange(half, dtype=x.dtype) / x.shape[-1]
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * theta**exponents
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, HEADS])
@pytest.mark.parametrize("option", ["plain", "rope", "window", "bias"])
def test_equals_pytorch_attention_on_the_same_projections(kv_heads: int, option: str) -> None:
    module, x = make("mha", option), hidden()
    if kv_heads != HEADS:
        module = MultiQueryAttention(
            HIDDEN, HEADS, kv_heads, **OPTIONS[option], dtype=torch.float64
        )

    def heads(projected: Tensor, count: int) -> Tensor:
        return projected.view(BATCH, SEQUENCE, count, HEAD_DIM).transpose(1, 2)

    q = heads(module.q_proj(x), HEADS)
    k, v = heads(module.k_proj(x), kv_heads), heads(module.v_proj(x), kv_heads)
    if module.rope_theta is not None:
        q = rotated_as_complex_numbers(q, module.rope_theta)
        k = rotated_as_complex_numbers(k, module.rope_theta)
    mask = causal_window(SEQUENCE, module.attributes.window_left)
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_same(module(x), module.o_proj(y.transpose(1, 2).reshape(BATCH, SEQUENCE, -1)))


def test_softcap_equals_its_formula() -> None:
    module, x = make("mqa", "softcap"), hidden()
    q = module.q_proj(x).view(BATCH, SEQUENCE, HEADS, HEAD_DIM).transpose(1, 2)
    scores = q @ module.k_proj(x)[:, None].transpose(-1, -2) / HEAD_DIM**0.5
    assert scores.max() > 3  # above the cap, which is 1.5
    capped = 1.5 * torch.tanh(scores / 1.5)
    weights = capped.masked_fill(~causal_window(SEQUENCE, -1), -torch.inf).softmax(-1)
    y = (weights @ module.v_proj(x)[:, None]).transpose(1, 2).reshape(BATCH, SEQUENCE, -1)
    assert_same(module(x), module.o_proj(y))


def test_rope_depends_on_the_distance_only() -> None:
    q, k = hidden()[:1, :1, None, :8], hidden()[:1, 1:2, None, :8]

    def score(q_position: int, k_position: int) -> Tensor:
        at = [
            rotary_factors(torch.tensor([[p]]), 8, 10000.0, torch.float64)
            for p in (q_position, k_position)
        ]
        return (rotate_half(q, *at[0]) * rotate_half(k, *at[1])).sum()

    assert_same(score(7, 3), score(1004, 1000))
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


@every_dtype
def test_rope_angles_are_float32_in_half_precision(dtype: torch.dtype) -> None:
    """Position 4000 in float16 itself would be off by up to one, an angle by a radian."""
    positions = torch.arange(3990, 4001)[None]
    exact = rotary_factors(positions, 64, 10000.0, torch.float64)[0]
    error = (rotary_factors(positions, 64, 10000.0, dtype)[0].double() - exact).abs().max()
    assert error <= torch.finfo(dtype).eps / 2 + 4000 * torch.finfo(torch.float32).eps


@every_option
@pytest.mark.parametrize("cached", [False, True], ids=["forward", "decode"])
def test_absorbed_equals_expanded(option: str, cached: bool) -> None:
    absorbed, expanded, x = make("mla_absorbed", option), make("mla_expanded", option), hidden()
    if cached:
        steps = [4, 1, 1, 3]
        assert_same(run_with_cache(absorbed, x, steps), run_with_cache(expanded, x, steps))
    else:
        assert_same(absorbed(x), expanded(x))


def test_form_is_switchable_between_prefill_and_decode() -> None:
    module, x = make("mla_expanded", "everything"), hidden()
    assert isinstance(module, LatentAttention)
    cache = module.new_cache(BATCH, SEQUENCE)
    prefill = module(x[:, :5], cache)
    cache.advance(5)
    module.form = "absorbed"
    assert_same(torch.cat((prefill, module(x[:, 5:], cache)), 1), module(x))


@pytest.mark.parametrize(("form", "head_size"), [("absorbed", LATENT), ("expanded", HEAD_DIM)])
def test_scale_is_that_of_the_unabsorbed_head(form: str, head_size: int) -> None:
    calls: list[tuple[int, float]] = []

    def recording(q: Tensor, *tensors: Any, scale: float, **options: Any) -> Any:
        calls.append((q.shape[-1], scale))
        return fused_attention(q, *tensors, scale=scale, **options)

    module = make(f"mla_{form}")
    module.attention = recording
    module(hidden())
    assert calls == [(head_size, HEAD_DIM**-0.5)]


def test_the_scale_of_the_latent_would_be_wrong() -> None:
    """What the test above guards against is not lost in rounding."""
    absorbed, expanded, x = make("mla_absorbed"), make("mla_expanded"), hidden()

    def default_scale(*tensors: Any, scale: float, **options: Any) -> Any:
        return fused_attention(*tensors, **options)  # 1/sqrt of q's last dimension

    absorbed.attention = default_scale
    assert (absorbed(x) - expanded(x)).abs().max() > 1e-2


def same_dtype_attention(*tensors: Any, is_causal: bool, **options: Any) -> Tensor:
    """PyTorch's operators in the dtype of q, with the signature of the op."""
    attributes = AttentionAttributes(is_causal=int(is_causal), **options)
    return reference.attention_in_dtype(*tensors, attributes=attributes)


@every_kind
@every_dtype
@pytest.mark.parametrize("cached", [False, True], ids=["forward", "decode"])
def test_every_dtype_within_the_budget_of_pytorch(
    kind: str, dtype: torch.dtype, cached: bool
) -> None:
    """Against the same layer in float64; the budget is the error with PyTorch's operators."""
    module, exact = make(kind, "everything", dtype), make(kind, "everything", dtype).double()
    x = hidden(dtype=dtype)
    oracle = exact(x.double())
    y = run_with_cache(module, x, [5, 1, 3]) if cached else module(x)
    assert y.dtype == module.new_cache(1, 1).keys[0].dtype == dtype
    module.attention = same_dtype_attention
    error, yardstick = measure(y, oracle, dtype), measure(module(x), oracle, dtype)
    assert ErrorBudget().accepts(error, yardstick), (error, yardstick)


@every_kind
def test_softmax_precision_reaches_the_op(kind: str) -> None:
    module = make(kind, dtype=torch.float16, softmax_precision=10)
    x = hidden(dtype=torch.float16)
    assert not torch.equal(module(x), make(kind, dtype=torch.float16)(x))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("mqa", CacheLayer(1, HEAD_DIM, HEAD_DIM)),
        ("gqa", CacheLayer(3, HEAD_DIM, HEAD_DIM)),
        ("mha", CacheLayer(HEADS, HEAD_DIM, HEAD_DIM)),
        ("mla_absorbed", CacheLayer(1, LATENT, LATENT)),
        ("mla_expanded", CacheLayer(1, LATENT, LATENT)),
    ],
)
def test_cache_layer_and_stats(kind: str, layer: CacheLayer) -> None:
    module = make(kind, dtype=torch.float16)
    assert module.cache_layer() == layer
    cache = module.new_cache(2, 5)
    assert cache.keys[0].shape == (2, layer.kv_heads, 5, layer.key_size)
    stats = module.cache_stats(cache)
    assert stats.bytes_per_token == 2 * layer.kv_heads * layer.key_size * 2
    assert stats.users_factor == HEADS * HEAD_DIM / (layer.kv_heads * layer.key_size)


def test_fastmqa_makes_multi_query_attention() -> None:
    module = FastMQA(64, 4, rope_theta=100.0)
    assert isinstance(module, MultiQueryAttention)
    assert (module.num_kv_heads, module.head_dim, module.rope_theta) == (1, 16, 100.0)


@pytest.mark.parametrize(
    ("options", "latent_size"),
    [({}, 8), ({"mla_compression": 0.25}, 4), ({"head_dim": 32}, 16), ({"form": "expanded"}, 8)],
    ids=str,
)
def test_fastmqa_makes_latent_attention(options: dict[str, Any], latent_size: int) -> None:
    module = FastMQA(64, 4, enable_mla=True, **options)
    assert isinstance(module, LatentAttention)
    assert module.latent_size == latent_size


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "kv_heads": (
        lambda: MultiQueryAttention(48, 6, 4),
        r"num_heads=6 is not a multiple of num_kv_heads=4; each key/value head",
    ),
    "hidden_size": (
        lambda: MultiQueryAttention(50, 6),
        r"hidden_size=50 is not a multiple of num_heads=6; give head_dim",
    ),
    "fastmqa_hidden_size": (
        lambda: FastMQA(50, 6, enable_mla=True),
        r"hidden_size=50 is not a multiple of num_heads=6; give head_dim",
    ),
    "no_heads": (lambda: MultiQueryAttention(48, 0), r"num_heads=0, num_kv_heads=1: all are"),
    "head_dim": (lambda: MultiQueryAttention(48, 6, head_dim=0), r"head_dim=0; it is at least 1"),
    "odd_head_dim_with_rope": (
        lambda: MultiQueryAttention(48, 6, head_dim=7, rope_theta=1e4),
        r"rope_theta=10000.0 with head_dim=7; .*give an even head_dim, or rope_theta=None",
    ),
    "rope_theta": (lambda: MultiQueryAttention(48, 6, rope_theta=0.0), r"a base > 0"),
    "window": (lambda: MultiQueryAttention(48, 6, window_left=-2), r"window_left=-2"),
    "softcap": (lambda: MultiQueryAttention(48, 6, softcap=-1.0), r"softcap=-1.0"),
    "softmax_precision": (
        lambda: MultiQueryAttention(48, 6, softmax_precision=2),
        r"softmax_precision=2 is neither",
    ),
    "no_compression": (
        lambda: LatentAttention(48, 6, 8),
        r"latent_size=8 with head_dim=8; accepted is 1 to 7: .*use MultiQueryAttention",
    ),
    "no_latent": (lambda: LatentAttention(48, 6, 0), r"latent_size=0 with head_dim=8"),
    "form": (
        lambda: LatentAttention(48, 6, 4, form="eager"),  # type: ignore[arg-type]
        r"form='eager' is neither absorbed nor expanded",
    ),
    "form_set_later": (
        lambda: setattr(LatentAttention(48, 6, 4), "form", "eager"),
        r"form='eager' is neither absorbed nor expanded",
    ),
    "mla_compression": (
        lambda: FastMQA(48, 6, enable_mla=True, mla_compression=1.0),
        r"mla_compression=1.0; it is the latent's part of a head, between 0 and 1",
    ),
    "hidden_states": (
        lambda: make("mqa")(torch.zeros(2, 47)),
        r"hidden_states is \(2, 47\); it must be \(B, S, E=48\)",
    ),
    "lengths_beside_a_cache": (
        lambda: make("mqa")(
            hidden(), make("mqa").new_cache(BATCH, 9), kv_lengths=torch.ones(3, dtype=torch.int32)
        ),
        r"kv_lengths with a cache, which knows its lengths; leave kv_lengths out",
    ),
    "full_cache": (
        lambda: make("mqa")(hidden(), make("mqa").new_cache(BATCH, 8)),
        r"9 new tokens at position 0 exceed the capacity 8; call grow\(9\)",
    ),
    "cache_of_another_kind": (
        lambda: make("mqa")(hidden(), make("gqa").new_cache(BATCH, 9)),
        r"update is \(3, 1, 9, 8\); with a cache of \(3, 3, 9, 8\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@every_kind
def test_state_dict_goes_into_a_new_layer(kind: str) -> None:
    module, other, x = make(kind, "everything"), KINDS[kind](**OPTIONS["everything"]), hidden()
    other.double().load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@every_kind
def test_prints_its_sizes(kind: str) -> None:
    assert f"num_heads={HEADS}" in repr(make(kind))


class DecodingStep(nn.Module):
    """What the exporter traces: cache buffers are inputs and outputs."""

    def __init__(self, attention: AttentionModule) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: Tensor, position: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, ...]:
        cache: KvCache = TracedCache([past_key], [past_value], position)
        y = self.attention(hidden_states, cache)
        return y, cache.keys[0], cache.values[0]


def export_step(module: AttentionModule, dtype: torch.dtype) -> torch.export.ExportedProgram:
    cache = module.new_cache(2, 7)
    batch, sequence, capacity = Dim("batch"), Dim("sequence"), Dim("capacity")
    return torch.export.export(
        DecodingStep(module),
        (hidden(2, 3, dtype), cache.position, cache.keys[0], cache.values[0]),
        dynamic_shapes=(
            {0: batch, 1: sequence},
            {0: batch},
            {0: batch, 2: capacity},
            {0: batch, 2: capacity},
        ),
    )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_exports_with_dynamic_shapes(kind: str, dtype: torch.dtype) -> None:
    module = make(kind, "everything", dtype)
    program = export_step(module, dtype)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("fastmqa.fused_attention.default") == 1
    assert targets.count("fastmqa.cache_write.default") == 2

    # Other sizes than those traced, prefill and then one token at positions of their own.
    x, cache = hidden(dtype=dtype), module.new_cache(BATCH, 11)
    step = program.module()
    y, key, value = step(x[:, :6], cache.position, cache.keys[0], cache.values[0])
    assert torch.equal(y, module(x[:, :6], cache))
    lengths = torch.tensor([6, 2, 4])
    cache.advance(lengths)
    y, key, value = step(x[:, 6:7], lengths, key, value)
    assert torch.equal(y, module(x[:, 6:7], cache))
    assert torch.equal(key, cache.keys[0])
    assert torch.equal(value, cache.values[0])


@every_kind
def test_exports_without_a_cache(kind: str) -> None:
    module = make(kind, "everything")
    batch, sequence = Dim("batch"), Dim("sequence")
    lengths = torch.tensor([4, 2], dtype=torch.int32)
    program = torch.export.export(
        module,
        (hidden(2, 4),),
        {"kv_lengths": lengths},
        dynamic_shapes={
            "hidden_states": {0: batch, 1: sequence},
            "kv_lengths": {0: batch},
        },
    )
    lengths = torch.tensor([9, 1, 5], dtype=torch.int32)
    y = program.module()(hidden(), kv_lengths=lengths)
    assert torch.equal(y, module(hidden(), kv_lengths=lengths))


@pytest.mark.parametrize("kind", ["mqa", "mla_absorbed"])
def test_gradients_reach_every_weight(kind: str) -> None:
    module = make(kind, "everything")
    with torch.enable_grad():
        module(hidden()).square().sum().backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
