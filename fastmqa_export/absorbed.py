# SPDX-License-Identifier: MIT
"""Multi-head latent attention of DeepSeek and its kin, directly on the latents that are cached.

DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C: with c the latent (r columns) and k_R
the rotary key of a token, the score of head i is (q_C · W_UK,i c + q_R · k_R) · scale. Moving W_UK
to the query and W_UV to the output leaves attention of H query heads over one KV head whose keys
are [c ; k_R] and whose values are their first r columns. The scale stays that of the whole head.

transformers caches c and k_R, but expands them to keys and values of every head in each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def can_absorb(module: nn.Module) -> bool:
    """Whether a module is such an attention, its expansion linear without a bias."""
    expansion = getattr(module, "kv_b_proj", None)
    has_parts = all(hasattr(module, name) for name in ("expand_kv", "kv_lora_rank", "v_head_dim"))
    return has_parts and isinstance(expansion, nn.Linear) and expansion.bias is None


@contextlib.contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Let every such attention hand on latents instead of expanding them, for a while."""
    found: list[Any] = [module for module in model.modules() if can_absorb(module)]
    for module in found:
        module.expand_kv = _latents
    try:
        yield
    finally:
        for module in found:
            del module.expand_kv


def is_adapted(module: Any) -> bool:
    """Whether `adapted` is in force for a module."""
    return getattr(module, "expand_kv", None) is _latents


def absorbed_query(module: Any, query: Tensor) -> Tensor:
    """Queries (B, H, S, nope + rope) with W_UK moved into them: (B, H, S, r + rope)."""
    nope = module.qk_nope_head_dim
    return torch.cat([query[..., :nope] @ _expansion(module)[:, :nope], query[..., nope:]], -1)


def expanded_output(module: Any, output: Tensor) -> Tensor:
    """Attention over latents (B, H, S, r) to values (B, H, S, V) by W_UV."""
    return output @ _expansion(module)[:, module.qk_nope_head_dim :].transpose(1, 2)


def _expansion(module: Any) -> Tensor:
    """W_UK and W_UV of each head below each other: (H, nope + V, r)."""
    weight: Tensor = module.kv_b_proj.weight
    return weight.view(module.num_heads, -1, module.kv_lora_rank)


def _latents(latent: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys [c ; k_R] (B, 1, T, r + rope), twice: the values lie in them.

    A cache of ours holds both parts in one buffer and gives no second one.
    """
    keys = latent if rotary is None else torch.cat([latent, rotary], -1)
    return keys, keys
