# SPDX-License-Identifier: MIT
"""``torch.ops.fastmqa.fused_attention``: schema, shapes, gradients, compilation and export."""

import pytest
import torch
from cases import CASES
from torch.library import opcheck

from fastmqa_export import reference
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import ConfigError
from fastmqa_export.op import fused_attention

BY_NAME = {case.name: case for case in CASES}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


Q, K = normal(2, 4, 3, 8), normal(2, 2, 5, 8)

CALLS = {
    "plain": ((Q, K, K, None, None, None), {"scale": 0.3}),
    "causal_lengths": ((Q, K, K, None, lengths(5, 2), None), {"scale": 0.3, "is_causal": True}),
    "window_start": ((Q, K, K, None, None, lengths(1, 2)), {"scale": 0.3, "window_left": 1}),
    "float_mask": ((Q, K, K, normal(2, 1, 3, 5), None, None), {"scale": 0.3, "softcap": 2.0}),
    "bool_mask": ((Q, K, K, normal(1, 1, 3, 5) > 0, None, None), {"scale": 0.3}),
    "values_in_k": ((Q, K, None, None, lengths(5, 4), None), {"scale": 0.3, "v_head_size": 4}),
    "layout": ((Q.transpose(1, 2), K, K, None, None, None), {"scale": 0.3, "layout": 1}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("op", ["fused_attention", "fused_attention_with_lse"])
def test_the_library_finds_the_op_well_made(op, name):
    arguments, attributes = CALLS[name]
    arguments = [
        x.clone().requires_grad_(x.is_floating_point()) if x is not None else None
        for x in arguments
    ]
    opcheck(getattr(torch.ops.fastmqa, op).default, tuple(arguments), attributes)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_agree_with_finite_differences(name, return_lse):
    arguments, attributes = CALLS[name]
    if return_lse and name == "causal_lengths":
        # In an empty row the log-sum-exp is −inf, which has no differences.
        arguments = (*arguments[:4], lengths(5, 4), None)
    leaves = [
        x.clone().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in arguments
    ]
    live = [x for x in leaves if x is not None and x.requires_grad]

    def call(*tensors):
        given = iter(tensors)
        filled = [next(given) if x is not None and x.requires_grad else x for x in leaves]
        return fused_attention(*filled, **attributes, return_lse=return_lse)

    assert torch.autograd.gradcheck(call, live)


def test_a_row_that_sees_no_key_has_a_zero_gradient():
    q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
    y, lse = fused_attention(q, k, k, None, lengths(0, 0), return_lse=True)
    (y.sum() + lse.sum()).backward()
    assert not y.any()
    assert (lse == -torch.inf).all()
    assert not q.grad.any()
    assert not k.grad.any()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    def call(q, k):
        return fused_attention(q, k, k, is_causal=True).sum()

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for sizes in ((2, 4, 3, 8), (3, 4, 5, 8)):
        q = normal(*sizes).requires_grad_()
        k = normal(sizes[0], 2, 7, 8).requires_grad_()
        compiled(q, k).backward()
        expected = torch.autograd.grad(call(q, k), (q, k))
        torch.testing.assert_close((q.grad, k.grad), expected)


def test_exports_as_one_node_with_dynamic_sizes():
    class Module(torch.nn.Module):
        def forward(self, q, k, kv_lengths):
            return fused_attention(q, k, k, None, kv_lengths, is_causal=True)

    batch, sequence, keys = (torch.export.Dim(name) for name in ("batch", "sequence", "keys"))
    program = torch.export.export(
        Module(),
        (Q, K, lengths(5, 4)),
        dynamic_shapes=({0: batch, 2: sequence}, {0: batch, 2: keys}, {0: batch}),
    )
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops == [torch.ops.fastmqa.fused_attention.default]
    q, k = normal(3, 4, 6, 8), normal(3, 2, 9, 8)
    expected = Module()(q, k, lengths(9, 7, 6))
    torch.testing.assert_close(program.module()(q, k, lengths(9, 7, 6)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["lengths_causal_gqa_bhsd", "mask_float_gqa_bshd"])
def test_computes_in_float32_and_returns_the_inputs_type(name, dtype):
    case = BY_NAME[name]
    t = case.tensors(dtype)
    arguments = [t.get(n) for n in OP_INPUTS]
    attributes = {"scale": 0.25, "layout": case.layout, "is_causal": case.is_causal}
    y, lse = fused_attention(*arguments, **attributes, return_lse=True)
    expected, _ = reference.attention(
        *arguments, attributes=case.attributes(), compute_dtype=torch.float32
    )
    assert y.dtype == dtype
    assert lse.dtype == torch.float32
    assert y.is_contiguous()
    assert torch.equal(y, expected.to(dtype))


def test_meta_tensors_have_the_right_shapes():
    q, k = Q.to("meta"), K.to("meta")
    y, lse = fused_attention(q.transpose(1, 2), k, None, v_head_size=4, layout=1, return_lse=True)
    assert y.shape == (2, 3, 4, 4)
    assert lse.shape == (2, 4, 3)


MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool)

REFUSED = {
    "rank": (lambda: fused_attention(Q[0], K, K), "q has rank 3; it must have 4"),
    "dtype": (
        lambda: fused_attention(Q, K.float(), K),
        "k is torch.float32 and q is torch.float64",
    ),
    "integers": (lambda: fused_attention(Q.int(), K.int(), K.int()), "q is torch.int32"),
    "head size": (lambda: fused_attention(Q, K[..., :4], K), "k is (2, 2, 5, 4)"),
    "batch": (lambda: fused_attention(Q, K[:1], K[:1]), "k is (1, 2, 5, 8)"),
    "heads": (
        lambda: fused_attention(Q, normal(2, 3, 5, 8), normal(2, 3, 5, 8)),
        "H=4 query heads",
    ),
    "values": (lambda: fused_attention(Q, K, K[:, :, :4]), "v is (2, 2, 4, 8)"),
    "no values": (lambda: fused_attention(Q, K), "v is None, so v_head_size must say"),
    "two values": (lambda: fused_attention(Q, K, K, v_head_size=4), "v_head_size=4 although v is"),
    "too many columns": (lambda: fused_attention(Q, K, v_head_size=9), "exceeds D=8"),
    "mask rank": (lambda: fused_attention(Q, K, K, MASK[0]), "attn_mask is (1, 3, 5)"),
    "mask shape": (lambda: fused_attention(Q, K, K, MASK[..., :4]), "attn_mask is (2, 1, 3, 4)"),
    "mask dtype": (lambda: fused_attention(Q, K, K, MASK.int()), "attn_mask is torch.int32"),
    "lengths dtype": (
        lambda: fused_attention(Q, K, K, None, lengths(1, 2).long()),
        "kv_lengths is torch.int64 (2,); it must be int32 (B=2,)",
    ),
    "lengths shape": (
        lambda: fused_attention(Q, K, K, None, lengths(1)),
        "kv_lengths is torch.int32",
    ),
    "start": (
        lambda: fused_attention(Q, K, K, None, None, lengths(1)),
        "q_start is torch.int32 (1,)",
    ),
    "half softmax": (
        lambda: fused_attention(Q, K, K, softmax_precision=10),
        "softmax_precision=10 (FLOAT16) with torch.float64 inputs",
    ),
    "both causal": (lambda: fused_attention(Q, K, K, is_causal=True, window_right=1), "give one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments_are_named(name):
    call, message = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)
