# SPDX-License-Identifier: MIT
"""Falcon computes attention itself instead of through transformers' interface: this adapts it.

Falcon-7B is the model with the most query heads per KV head in use, 71:1. Where the newer Falcons
repeat keys and values for every query head before they cache them, ours are cached once per KV
head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.models.falcon import modeling_falcon


@contextlib.contextmanager
def adapted(model: nn.Module, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Let every Falcon attention within ``model`` call ``attention`` for a while.

    Args:
        model: any model; others than Falcon stay as they are.
        attention: as transformers' attention interface takes it.
    """
    found = [m for m in model.modules() if isinstance(m, modeling_falcon.FalconAttention)]
    for module in found:
        module.forward = functools.partial(_forward, module, attention)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _forward(
    module: Any,
    attention: Callable[..., tuple[Tensor, None]],
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    heads = _split_heads(module, module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in heads)
    if position_embeddings is not None:  # without: ALiBi, which ``attention`` refuses
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, _weights = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.inv_norm_factor,
        alibi=alibi,
    )
    return module.dense(output.flatten(2)), None


def _split_heads(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, all columns) to q (B, S, H, D) and k, v (B, S, Hkv, D)."""
    if not module.new_decoder_architecture:
        q, k, v = module._split_heads(fused)
        return q, k, v
    group = module.num_heads // module.num_kv_heads
    grouped = fused.view(*fused.shape[:2], module.num_kv_heads, group + 2, module.head_dim)
    return grouped[:, :, :, :-2].flatten(2, 3), grouped[:, :, :, -2], grouped[:, :, :, -1]
