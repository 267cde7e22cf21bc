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
from fastmqa_export.config import OP_INPUTS, AttentionAttributes
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


BSHD = [case for case in CASES if case.layout]


@pytest.mark.parametrize("case", BSHD, ids=lambda case: case.name)
def test_the_layouts_differ_in_nothing_but_the_order_of_axes(case):
    y, lse = run(case)
    other_y, other_lse = run(dataclasses.replace(case, layout=0))
    assert torch.equal(y, other_y.transpose(1, 2))
    assert torch.equal(lse, other_lse)


# S = 2, T = 4, as rows of 0 and 1: which keys the first and the second query see.
VISIBLE = {
    "all": ({}, None, None, ["1111", "1111"]),
    "causal": ({"is_causal": 1}, None, None, ["1110", "1111"]),
    "left": ({"window_left": 1}, None, None, ["0111", "0011"]),
    "right": ({"window_right": 0}, None, None, ["1110", "1111"]),
    "both": ({"window_left": 1, "window_right": 1}, None, 0, ["1100", "1110"]),
    "length": ({}, 3, None, ["1110", "1110"]),
    "length too long": ({}, 9, None, ["1111", "1111"]),
    "length negative": ({}, -2, None, ["0000", "0000"]),
    "length, causal": ({"is_causal": 1}, 3, None, ["1100", "1110"]),
    "length shorter than S, causal": ({"is_causal": 1}, 1, None, ["0000", "1000"]),
    "start, causal": ({"is_causal": 1}, None, 0, ["1000", "1100"]),
    "start before the first key": ({"is_causal": 1}, None, -1, ["0000", "1000"]),
    "start beyond the last key": ({"window_left": 1}, None, 4, ["0001", "0000"]),
    "start beyond the length": ({"is_causal": 1}, 2, 3, ["1100", "1100"]),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_visible_keys(name):
    values, length, start, expected = VISIBLE[name]
    given = (None if x is None else torch.tensor([x], dtype=torch.int32) for x in (length, start))
    seen = reference.visible_keys(2, 4, AttentionAttributes(scale=1.0, **values), *given)
    assert seen.shape == (1, 1, 2, 4)
    assert ["".join(str(int(x)) for x in row) for row in seen[0, 0]] == expected


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


@pytest.mark.parametrize("heads", [(8, 1), (9, 3), (4, 4)], ids=str)
def test_causal_attention_is_that_of_torch_where_s_is_t(heads):
    case = Case(name="square", H=heads[0], Hkv=heads[1], S=7, T=7, is_causal=True)
    q, k, v = case.tensors(torch.float64).values()
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(run(case)[0], expected, rtol=1e-12, atol=1e-12)


GQA = [case for case in CASES if case.name.endswith("gqa_bhsd")]
GRADIENTS = [*GQA, *(case for case in CASES if "values_in_k" in case.name and case not in GQA)]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_gradients_are_those_of_the_formula(case, with_lse):
    t = case.tensors(torch.float64)
    leaves = {n: x.double().requires_grad_() for n, x in t.items() if x.is_floating_point()}
    tensors = [{**t, **leaves}.get(name) for name in OP_INPUTS]
    outputs = reference.attention(*tensors, attributes=case.attributes())[: 1 + with_lse]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    expected = torch.autograd.grad(outputs, list(leaves.values()), given)
    grad_y, grad_lse = (*given, None)[:2]
    gradients = reference.attention_gradients(
        grad_y, grad_lse, *tensors, attributes=case.attributes()
    )
    found = dict(zip(OP_INPUTS, gradients, strict=False))
    assert {name for name, x in found.items() if x is not None} == set(leaves)
    for name, gradient in zip(leaves, expected, strict=True):
        # The log-sum-exp of an empty row is log 0: autograd makes NaN there, the formula 0.
        comparable = torch.isfinite(gradient)
        assert with_lse or comparable.all()
        assert torch.isfinite(found[name]).all()
        torch.testing.assert_close(
            found[name][comparable], gradient[comparable], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("case", GQA, ids=lambda case: case.name)
def test_the_yardstick_is_the_same_formula(case, sequential):
    t = case.tensors(torch.float64, poison=True)
    y = reference.attention_in_dtype(
        *(t.get(n) for n in OP_INPUTS), attributes=case.attributes(), sequential=sequential
    )
    torch.testing.assert_close(y, run(case)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_yardstick_computes_in_its_inputs_type(sequential, dtype):
    case = next(c for c in CASES if c.name == "lengths_causal_gqa_bhsd")
    t = case.tensors(dtype)
    tensors = [t.get(n) for n in OP_INPUTS]
    y = reference.attention_in_dtype(*tensors, attributes=case.attributes(), sequential=sequential)
    expected, _ = reference.attention(*tensors, attributes=case.attributes())
    assert y.dtype == dtype
    error = (y.double() - expected).abs().max().item()
    assert 0 < error < 8 * torch.finfo(dtype).eps


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
