# SPDX-License-Identifier: MIT
"""The built-in sources: one attention module of this package, its weights random by a seed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmqa_export import reference
from fastmqa_export.cache import TracedCache
from fastmqa_export.errors import ConfigError
from fastmqa_export.modules import LatentAttention, LatentForm, MultiQueryAttention
from fastmqa_export.onnx_export import Exportable, TensorSpec
from fastmqa_export.op import checked_attributes, fused_attention
from fastmqa_export.runtime import StepModel, next_power_of_two
from fastmqa_export.source import AttentionShape, Source, to_numpy


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltinOptions:
    """Sizes and behaviour of a built-in module, as the command line gives them.

    Attributes:
        hidden: width of the model.
        heads: H.
        kv_heads: Hkv of ``mqa``; H makes it MHA, anything between GQA.
        head_dim: D; 0: hidden / heads.
        compression: latent columns of ``mla`` per column of a head.
        form: "absorbed" or "expanded", for ``mla``.
        causal: a query sees keys up to its own position.
        window: how many keys a query sees, its own included; 0: all.
        softcap: cap of the scores; 0: none.
        rope_theta: base of the rotary embedding; 0: none.
        seed: of the random weights.
    """

    hidden: int = 512
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 0
    compression: float = 0.5
    form: LatentForm = "absorbed"
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    rope_theta: float = 10000.0
    seed: int = 0


#: Sizes (hidden, heads) of the presets ``mqa-512`` … ``mla-4096``.
PRESET_SIZES: Final = {512: 8, 1024: 16, 2048: 32, 4096: 32}
PRESETS: Final[Mapping[str, tuple[str, BuiltinOptions]]] = {
    f"{kind}-{hidden}": (kind, BuiltinOptions(hidden=hidden, heads=heads))
    for kind in ("mqa", "mla")
    for hidden, heads in PRESET_SIZES.items()
}


class BuiltinSource(Source):
    """A `MultiQueryAttention` or `LatentAttention` module."""

    kind = "built-in"
    input_name = "hidden_states"
    output_name = "output"

    def __init__(
        self,
        name: str,
        module: MultiQueryAttention | LatentAttention,
        dtype: torch.dtype,
    ) -> None:
        """Take a module; its weights are rounded to ``dtype`` once, for the oracle too."""
        self.name = name
        self.dtype = dtype
        self.module = module.to(dtype).eval().requires_grad_(False)
        shape = self.shape()
        kind = {1: "MQA", shape.num_heads: "MHA"}.get(shape.num_kv_heads, "GQA")
        self.description = (
            f"{'MLA' if shape.latent_columns else kind}, hidden {module.hidden_size}, "
            f"{shape.num_heads} heads of {shape.head_dim}"
        )
        self._wide: MultiQueryAttention | LatentAttention | None = None

    def shape(self) -> AttentionShape:
        """Sizes of the attention."""
        m = self.module
        if isinstance(m, LatentAttention):
            return AttentionShape(1, m.num_heads, 1, m.head_dim, 2 * m.latent_size)
        return AttentionShape(1, m.num_heads, m.num_kv_heads, m.head_dim)

    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.module.parameters())

    @contextlib.contextmanager
    def traceable(self, cache: str) -> Iterator[Exportable]:
        """The module behind graph inputs: with a static cache, or with lengths only."""
        hidden = ("batch", "sequence", self.module.hidden_size)
        metadata = {"source": self.name, "cache": cache, "architecture": self.description}
        inputs = [TensorSpec(self.input_name, self.dtype, hidden)]
        if cache == "none":
            inputs.append(TensorSpec("lengths", torch.int32, ("batch",)))
            yield Exportable(
                _WithoutCache(self.module), tuple(inputs), (self.output_name,), metadata
            )
            return
        if self.module.attributes.reach_right != 0:
            raise ConfigError(
                "a cache decodes token after token, so its attention must be causal; this one is "
                "not: export it with --cache none"
            )
        layer = self.module.cache_layer()
        inputs.append(TensorSpec("position", torch.int64, ("batch",)))
        for name, size in (("key", layer.key_size), ("value", layer.value_size)):
            shape = ("batch", layer.kv_heads, "capacity", size)
            inputs.append(TensorSpec(f"past_key_values.0.{name}", self.dtype, shape))
        outputs = (self.output_name, "present.0.key", "present.0.value")
        yield Exportable(_WithCache(self.module), tuple(inputs), outputs, metadata)

    def sample(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Standard normal hidden states (B, N, E)."""
        shape = (batch, length, self.module.hidden_size)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def steps(self) -> StepModel:
        """The module with its cache in place."""
        return _Steps(self.module)

    def evaluate(self, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The module over one sequence, its attention written in PyTorch's own operators."""
        if dtype == torch.float64 != self.dtype:
            self._wide = self._wide or copy.deepcopy(self.module).double()
            module = self._wide
        else:
            module = self.module
        module.attention = fused_attention if dtype == torch.float64 else _plain_attention
        try:
            with torch.no_grad():
                cache = module.new_cache(1, x.shape[1])
                y = module(x.to(dtype), cache)
        finally:
            module.attention = fused_attention
        outputs = {
            self.output_name: y,
            "present.0.key": cache.keys[0],
            "present.0.value": cache.values[0],
        }
        return {name: x for name, x in outputs.items() if x is not None}


class _Steps:
    """A `fastmqa_export.runtime.StepModel` of the module in PyTorch."""

    def __init__(self, module: MultiQueryAttention | LatentAttention) -> None:
        self.module = module

    def reset(self, batch: int, capacity: int = 1) -> None:
        self.cache = self.module.new_cache(batch, next_power_of_two(capacity))

    def step(self, x: NDArray[Any]) -> NDArray[Any]:
        needed = int(self.cache.position.max()) + x.shape[1]
        if needed > self.cache.capacity:
            self.cache.grow(next_power_of_two(needed))
        with torch.no_grad():
            weight = next(self.module.parameters())
            return to_numpy(self.module(torch.from_numpy(x).to(weight.dtype), self.cache))

    def advance(self, counts: Sequence[int] | NDArray[Any]) -> None:
        self.cache.advance(torch.as_tensor(counts))


def create(name: str, options: BuiltinOptions, dtype: torch.dtype) -> BuiltinSource:
    """The built-in source ``mqa`` or ``mla`` with these sizes.

    Raises:
        ConfigError: if the sizes do not fit together.
    """
    if options.heads < 1 or options.hidden < 1:
        raise ConfigError(f"--hidden {options.hidden} --heads {options.heads}: both must be ≥ 1")
    if not 0 < options.compression < 1:
        raise ConfigError(
            f"--compression {options.compression}: it is the share of a head's columns that a "
            "latent keeps, between 0 and 1"
        )
    common: dict[str, Any] = {
        "head_dim": options.head_dim or None,
        "is_causal": options.causal,
        "window_left": options.window - 1 if options.window else -1,
        "softcap": options.softcap,
        "rope_theta": options.rope_theta or None,
    }
    kind = name.partition("-")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if kind == "mla":
            head_dim = options.head_dim or options.hidden // options.heads
            latent = round(head_dim * options.compression)
            module: MultiQueryAttention | LatentAttention = LatentAttention(
                options.hidden, options.heads, latent, form=options.form, **common
            )
        else:
            module = MultiQueryAttention(options.hidden, options.heads, options.kv_heads, **common)
    return BuiltinSource(name, module, dtype)


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    *,
    scale: float | None = None,
    **values: Any,
) -> Tensor:
    """`fused_attention`, in PyTorch's own operators of q's dtype."""
    tensors = (q, k, v, attn_mask, kv_lengths, q_start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attributes = checked_attributes(*tensors, scale=scale, **values)
    return reference.attention_in_dtype(*tensors, attributes=attributes)


class _WithCache(torch.nn.Module):
    """hidden_states (B, S, E), position (B,), key and value buffers to output and buffers."""

    def __init__(self, module: MultiQueryAttention | LatentAttention) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, hidden_states: Tensor, position: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        cache = TracedCache([past_key], [past_value], position)
        output = self.module(hidden_states, cache)
        return output, cache.keys[0], cache.values[0]


class _WithoutCache(torch.nn.Module):
    """hidden_states (B, S, E), padded on the right, and lengths (B,) to output."""

    def __init__(self, module: MultiQueryAttention | LatentAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden_states: Tensor, lengths: Tensor) -> tuple[Tensor]:
        return (self.module(hidden_states, kv_lengths=lengths),)
