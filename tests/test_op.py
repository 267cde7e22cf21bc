# SPDX-License-Identifier: MIT
"""``torch.ops.fastmqa.fused_attention``: schema, shapes, gradients, compilation and export."""

import contextlib
import types

import pytest
import torch
from cases import CASES
from naive import naive_library
from torch.library import opcheck

from fastmqa_export import op as op_module
from fastmqa_export import plugins, reference
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import ConfigError, KernelError
from fastmqa_export.op import fused_attention

BY_NAME = {case.name: case for case in CASES}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


Q, K = normal(2, 4, 3, 8), normal(2, 2, 5, 8)

MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool)

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


@pytest.mark.parametrize("name", CALLS)
def test_every_variant_is_traced_with_its_gradient(name):
    arguments, attributes = CALLS[name]

    def call(*leaves):
        y, lse = fused_attention(*leaves, **attributes, return_lse=True)
        return y.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()

    def gradients(function):
        leaves = [x if x is None else x.clone() for x in arguments]
        live = [x.requires_grad_() for x in leaves if x is not None and x.is_floating_point()]
        return torch.autograd.grad(function(*leaves), live)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(gradients(compiled), gradients(call))


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


def no_cpu_kernels(monkeypatch):
    """Also where they are built."""
    monkeypatch.setenv("FASTMQA_CPU_KERNELS", "/nowhere.so")
    monkeypatch.setattr(plugins, "cpu_kernels", plugins.cpu_kernels.__wrapped__)
    monkeypatch.setattr(op_module, "_cpu_kernels", op_module._cpu_kernels.__wrapped__)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["lengths_causal_gqa_bhsd", "mask_float_gqa_bshd"])
def test_computes_in_float32_and_returns_the_inputs_type(name, dtype, monkeypatch):
    no_cpu_kernels(monkeypatch)
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


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.float32, torch.bool])
def test_a_mask_may_be_bool_or_float32_or_of_the_inputs_type(mask_dtype):
    q, k = normal(2, 4, 3, 8, dtype=torch.float16), normal(2, 2, 5, 8, dtype=torch.float16)
    added = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0]).expand(1, 1, 3, 5)
    mask = added == 0 if mask_dtype == torch.bool else added.to(mask_dtype)
    y = fused_attention(q, k, k, mask)
    assert torch.equal(y, fused_attention(q, k, k, added))
    assert not torch.equal(y, fused_attention(q, k, k))


def test_integers_and_booleans_have_no_gradient():
    leaves = [x.clone().requires_grad_() for x in (Q, K, K)]
    others = (MASK, lengths(5, 4), lengths(1, 2))
    y = fused_attention(*leaves, *others)
    edges = [edge for edge, _ in y.grad_fn.next_functions]
    assert [edge is not None for edge in edges] == [True] * 3 + [False] * 3
    y.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in leaves)


def test_no_gradient_is_computed_where_none_is_asked_for():
    q, k = Q.clone(), K.clone().requires_grad_()
    fused_attention(q, k, K).sum().backward()
    assert q.grad is None
    assert k.grad is not None


@pytest.mark.parametrize("layout", [0, 1])
def test_inputs_may_be_strided_and_the_result_is_contiguous(layout):
    q = (Q.transpose(1, 2) if layout else Q).clone()
    expected = fused_attention(q, K, K, layout=layout)
    wide = [torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0] for x in (q, K)]
    assert not any(x.is_contiguous() for x in wide)
    y = fused_attention(wide[0], wide[1], wide[1], layout=layout)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


def test_meta_tensors_have_the_right_shapes():
    q, k = Q.to("meta"), K.to("meta")
    y, lse = fused_attention(q.transpose(1, 2), k, None, v_head_size=4, layout=1, return_lse=True)
    assert y.shape == (2, 3, 4, 4)
    assert lse.shape == (2, 4, 3)


REFUSED = {
    "rank": (lambda: fused_attention(Q[0], K, K), "q has rank 3; it must have 4"),
    "dtype": (
        lambda: fused_attention(Q, K.float(), K),
        "k is torch.float32 and q is torch.float64",
    ),
    "rank of k": (lambda: fused_attention(Q, K[0], K), "k has rank 3; it must have 4"),
    "rank of v": (lambda: fused_attention(Q, K, K[0]), "v has rank 3; it must have 4"),
    "dtype of v": (lambda: fused_attention(Q, K, K.half()), "v is torch.float16 and q is"),
    "integers": (lambda: fused_attention(Q.int(), K.int(), K.int()), "q is torch.int32"),
    "head size": (lambda: fused_attention(Q, K[..., :4], K), "k is (2, 2, 5, 4)"),
    "batch": (lambda: fused_attention(Q, K[:1], K[:1]), "k is (1, 2, 5, 8)"),
    "heads": (
        lambda: fused_attention(Q, normal(2, 3, 5, 8), normal(2, 3, 5, 8)),
        "H=4 query heads",
    ),
    "no heads": (lambda: fused_attention(Q, K[:, :0], K[:, :0]), "not a multiple of Hkv=0"),
    "values": (lambda: fused_attention(Q, K, K[:, :, :4]), "v is (2, 2, 4, 8)"),
    "no values": (lambda: fused_attention(Q, K), "v is None, so v_head_size must say"),
    "two values": (lambda: fused_attention(Q, K, K, v_head_size=4), "v_head_size=4 although v is"),
    "too many columns": (lambda: fused_attention(Q, K, v_head_size=9), "exceeds D=8"),
    "mask rank": (lambda: fused_attention(Q, K, K, MASK[0]), "attn_mask is (1, 3, 5)"),
    "mask shape": (lambda: fused_attention(Q, K, K, MASK[..., :4]), "attn_mask is (2, 1, 3, 4)"),
    "mask dtype": (lambda: fused_attention(Q, K, K, MASK.int()), "attn_mask is torch.int32"),
    "mask too exact": (
        lambda: fused_attention(Q.half(), K.half(), K.half(), MASK.double()),
        "attn_mask is torch.float64; it must be bool, torch.float16 or torch.float32",
    ),
    "mask of other layout": (
        lambda: fused_attention(Q.transpose(1, 2), K, K, MASK.transpose(1, 2), layout=1),
        "that of (B, H, S, T) = (2, 4, 3, 5)",
    ),
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
    "unknown layout": (lambda: fused_attention(Q, K, K, layout=2), "layout=2 is neither 0"),
    "window": (lambda: fused_attention(Q, K, K, window_left=-2), "window_left=-2"),
    "softcap": (lambda: fused_attention(Q, K, K, softcap=-1.0), "softcap=-1.0 is neither"),
    "scale": (lambda: fused_attention(Q, K, K, scale=float("inf")), "scale=inf is not finite"),
    "both causal": (lambda: fused_attention(Q, K, K, is_causal=True, window_right=1), "give one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments_are_named(name):
    call, message = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)


def test_shapes_are_refused_while_tracing_too():
    with pytest.raises(ConfigError, match="k is "):
        fused_attention(Q.to("meta"), K[..., :4].to("meta"), K.to("meta"))


class CpuKernelThatTakesFloat32:
    """Writes what nothing else would."""

    def pool(self, threads):
        return threads

    def run(self, call, pool):
        assert pool == torch.get_num_threads()
        if call.y.dtype != torch.float32:
            raise ConfigError("only float32")
        call.y.fill_(7)
        if call.lse is not None:
            call.lse.fill_(8)


def test_cpu_tensors_take_the_cpu_kernel(monkeypatch):
    monkeypatch.setattr(op_module, "_cpu_kernels", CpuKernelThatTakesFloat32)
    x = float32(1, 2, 3, 8)
    assert (fused_attention(x, x, x) == 7).all()
    y, lse = fused_attention(x, x, x, return_lse=True)
    assert (y == 7).all() and (lse == 8).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_the_cpu_kernel_does_not_cover_takes_the_reference(dtype, monkeypatch):
    x = normal(1, 2, 3, 8, dtype=dtype)
    expected = op_module._run(x, x, x, None, None, None, scale=8**-0.5)[0]
    monkeypatch.setattr(op_module, "_cpu_kernels", CpuKernelThatTakesFloat32)
    assert torch.equal(fused_attention(x, x, x), expected)
    none = float32(1, 2, 0, 8)
    assert fused_attention(none, float32(1, 2, 5, 8), float32(1, 2, 5, 8)).shape == (1, 2, 0, 8)


def test_without_the_cpu_kernel_the_reference_is_taken(monkeypatch):
    x = float32(1, 2, 3, 8)
    expected = op_module._run(x, x, x, None, None, None, scale=8**-0.5)[0]
    no_cpu_kernels(monkeypatch)
    assert torch.equal(fused_attention(x, x, x), expected)


def test_what_is_wrong_is_no_reason_for_the_reference_on_the_cpu(monkeypatch):
    monkeypatch.setattr(op_module, "_cpu_kernels", CpuKernelThatTakesFloat32)
    x = float32(1, 2, 3, 8)
    with pytest.raises(ConfigError, match="softcap"):
        fused_attention(x, x, x, softcap=-1.0)


@pytest.fixture
def cuda(monkeypatch):
    """What CUDA tensors take, with a library of kernels that wants tensors on the host."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setenv("FASTMQA_KERNELS", str(naive_library()))
    plugins.kernel_library.cache_clear()
    op_module._warn_once.cache_clear()

    def call(*tensors, return_lse=True, **values):
        tensors = (*tensors, *[None] * (6 - len(tensors)))
        return op_module._run_cuda(*tensors, return_lse=return_lse, **{"scale": 0.3} | values)

    call.stream = stream
    yield call
    plugins.kernel_library.cache_clear()
    op_module._warn_once.cache_clear()


def float32(*shape: int) -> torch.Tensor:
    return normal(*shape, dtype=torch.float32)


@pytest.mark.parametrize("name", ["fused_attention", "fused_attention_with_lse"])
def test_cuda_tensors_have_an_implementation_of_their_own(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmqa::{name}", "CUDA")


@pytest.mark.parametrize("name", CALLS)
def test_the_library_of_kernels_is_called(cuda, name, monkeypatch):
    arguments, attributes = CALLS[name]
    arguments = [x.float() if x is not None and x.is_floating_point() else x for x in arguments]
    expected = op_module._run(*arguments, **attributes)
    monkeypatch.setattr(op_module, "_run", None)  # or the reference would answer
    y, lse = cuda(*arguments, **attributes)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(lse, expected[1])
    assert y.is_contiguous() and lse.is_contiguous()
    assert cuda(*arguments, return_lse=False, **attributes)[1] is None


def test_what_the_library_does_not_cover_takes_the_reference_and_says_so_once(cuda):
    q, k = normal(1, 2, 3, 8, dtype=torch.float16), normal(1, 1, 5, 8, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="PyTorch's operators on CUDA: only float32"):
        y, lse = cuda(q, k, k)
    torch.testing.assert_close((y, lse), op_module._run(q, k, k, None, None, None, scale=0.3))
    cuda(q, k, k)  # a second warning would be an error


def test_without_a_library_the_reference_is_taken_and_said_once(cuda, monkeypatch):
    monkeypatch.setenv("FASTMQA_KERNELS", "/nowhere.so")
    x = float32(1, 2, 3, 8)
    with pytest.warns(RuntimeWarning, match=r"CUDA: FASTMQA_KERNELS is /nowhere.so.*cmake -S"):
        y, _ = cuda(x, x, x)
    torch.testing.assert_close(y, op_module._run(x, x, x, None, None, None, scale=0.3)[0])
    cuda(x, x, x)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param((Q, K, K), id="float64"),
        pytest.param(
            (float32(2, 4, 0, 8), float32(2, 2, 5, 8), float32(2, 2, 5, 8)), id="no_queries"
        ),
    ],
)
def test_float64_and_nothing_take_the_reference_in_silence(cuda, tensors, monkeypatch):
    monkeypatch.setenv("FASTMQA_KERNELS", "/nowhere.so")
    y, lse = cuda(*tensors)
    assert y.shape == tensors[0].shape and lse.shape == tensors[0].shape[:3]


def test_what_is_wrong_is_no_reason_for_the_reference(cuda):
    x = float32(1, 2, 3, 8)
    with pytest.raises(ConfigError, match="q_start is on meta and q on cpu"):
        cuda(x, x, x, None, None, lengths(1).to("meta"))
    with pytest.raises(ConfigError, match="softcap"):
        cuda(x, x, x, softcap=-1.0)
    cuda.stream.cuda_stream = 1
    with pytest.raises(KernelError, match="launch: out of order"):
        cuda(x, x, x)
