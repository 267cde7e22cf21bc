# SPDX-License-Identifier: MIT
"""The oracle against an implementation that shares nothing with it, and against PyTorch's own."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import CASES, HALF_SOFTMAX_CASES, Case
from torch.nn.functional import scaled_dot_product_attention

from fastmqa_export import reference
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import ConfigError


def by_the_table(case: Case, t: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Y (B, H, S, V) and lse (B, H, S), key after key, as the op's table reads."""
    q = t["q"].swapaxes(1, 2) if case.layout else t["q"]
    k, v = t["k"], t.get("v", t["k"])
    scale = case.D**-0.5 if case.scale is None else case.scale
    y, lse = np.zeros((case.B, case.H, case.S, case.V)), np.zeros((case.B, case.H, case.S))

    def rounded(x: float) -> float:
        return float(np.float16(x)) if case.softmax_precision == 10 else x

    for b, h, s in np.ndindex(case.B, case.H, case.S):
        group = h // (case.H // case.Hkv)
        length = case.T if case.kv_lengths is None else min(max(case.kv_lengths[b], 0), case.T)
        position = (length - case.S if case.q_start is None else case.q_start[b]) + s
        seen = {}
        for key in range(length):
            if case.is_causal and key > position:
                continue
            if case.window_left >= 0 and key < position - case.window_left:
                continue
            if case.window_right >= 0 and key > position + case.window_right:
                continue
            score = float(q[b, h, s] @ k[b, group, key]) * scale
            if case.softcap:
                score = case.softcap * math.tanh(score / case.softcap)
            if case.mask:
                mask = t["attn_mask"]
                at = tuple(
                    0 if n == 1 else i for n, i in zip(mask.shape, (b, h, s, key), strict=True)
                )
                if case.mask == "bool" and not mask[at]:
                    continue
                if case.mask == "float":
                    if mask[at] == -np.inf:
                        continue
                    score += float(mask[at])
            seen[key] = rounded(score)
        if not seen:
            lse[b, h, s] = -np.inf
            continue
        highest = max(seen.values())
        weights = {key: rounded(math.exp(rounded(x - highest))) for key, x in seen.items()}
        total = sum(weights.values())
        lse[b, h, s] = highest + math.log(total)
        for key, weight in weights.items():
            y[b, h, s] += weight / total * v[b, group, key, : case.V]
    return y, lse


def run(case: Case, dtype: torch.dtype = torch.float64, **kwargs):
    tensors = case.tensors(dtype, poison=True)
    return reference.attention(
        *(tensors.get(name) for name in OP_INPUTS), attributes=case.attributes(), **kwargs
    )


@pytest.mark.parametrize("case", CASES + HALF_SOFTMAX_CASES, ids=lambda case: case.name)
def test_attention_is_what_the_table_says_and_never_uses_the_padding(case):
    arrays = {name: x.numpy() for name, x in case.tensors(torch.float64, poison=True).items()}
    expected_y, expected_lse = by_the_table(case, arrays)
    y, lse = run(case)
    y = y.transpose(1, 2) if case.layout else y
    np.testing.assert_allclose(y.numpy(), expected_y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-12, atol=1e-12)


SDPA = [c for c in CASES if not (c.softcap or c.kv_lengths or c.q_start or c.values_in_k)]
SDPA = [c for c in SDPA if c.window_left == -1 == c.window_right and not c.layout]


@pytest.mark.parametrize("case", SDPA, ids=lambda case: case.name)
def test_attention_is_torch_sdpa_where_that_can_do_it(case):
    case = dataclasses.replace(case, T=max(case.S, case.T))  # SDPA gives NaN in empty rows
    t = case.tensors(torch.float64)
    mask = t.get("attn_mask")
    if case.is_causal:  # SDPA aligns causality to the first key, we to the last
        causal = torch.ones(case.S, case.T, dtype=torch.bool).tril(case.T - case.S)[None, None]
        if mask is None:
            mask = causal
        elif mask.dtype == torch.bool:
            mask = mask & causal
        else:
            mask = mask.masked_fill(~causal, -torch.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    if mask is not None:
        mask = mask.expand(case.B, case.H, case.S, case.T)
    expected = scaled_dot_product_attention(
        t["q"], t["k"], t["v"], mask, scale=case.attributes().scale, enable_gqa=True
    )
    y, lse = run(case)
    seen = (lse > -torch.inf)[..., None]
    torch.testing.assert_close(y * seen, expected.nan_to_num() * seen, rtol=1e-12, atol=1e-12)
    assert not y.masked_select(~seen).any()


GRADIENTS = [
    c for c in CASES if c.Hkv == 2 or c.name.endswith("gqa_bhsd") or "values_in_k" in c.name
]


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_gradients_are_those_of_the_formula(case):
    t = case.tensors(torch.float64)
    leaves = {n: x.requires_grad_() for n, x in t.items() if x.is_floating_point()}
    tensors = [t.get(name) for name in OP_INPUTS]
    y, lse = reference.attention(*tensors, attributes=case.attributes())
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    visible = lse.masked_fill(lse == -torch.inf, 0)
    expected = torch.autograd.grad((y, visible), list(leaves.values()), (grad_y, grad_lse))
    found = dict(
        zip(
            ("q", "k", "v", "attn_mask"),
            reference.attention_gradients(grad_y, grad_lse, *tensors, attributes=case.attributes()),
            strict=True,
        )
    )
    for name, gradient in zip(leaves, expected, strict=True):
        # Through an empty row autograd computes 0 · NaN; the formula gives the limit, 0.
        actual = found[name]
        assert actual is not None and torch.isfinite(actual).all()
        finite = torch.isfinite(gradient)
        tolerance = 1e-9 if gradient.dtype == torch.float64 else 1e-5  # a float32 mask's own type
        torch.testing.assert_close(
            actual[finite], gradient[finite].to(actual), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("sequential", [False, True])
def test_the_yardstick_is_close_in_float32_and_exact_enough_in_float64(sequential):
    case = next(c for c in CASES if c.name == "lengths_causal_gqa_bhsd")
    expected, _ = run(case)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        t = case.tensors(dtype)
        y = reference.attention_in_dtype(
            *(t.get(n) for n in OP_INPUTS), attributes=case.attributes(), sequential=sequential
        )
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_strides_do_not_matter():
    case = next(c for c in CASES if c.name == "causal_mqa_bhsd")
    t = case.tensors(torch.float64)
    expected, _ = run(case)
    strided = {n: x.transpose(2, 3).contiguous().transpose(2, 3) for n, x in t.items()}
    y, _ = reference.attention(*(strided.get(n) for n in OP_INPUTS), attributes=case.attributes())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_heads_that_do_not_divide_are_refused():
    case = dataclasses.replace(CASES[0], H=8, Hkv=3)
    with pytest.raises(ConfigError, match="H=8 query heads are not a multiple of Hkv=3"):
        run(case)
