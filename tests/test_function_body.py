# SPDX-License-Identifier: MIT
"""The function body in onnxruntime and in onnx's evaluator, on every case, within the budget."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import CASES, HALF_SOFTMAX_CASES, Case
from onnx.reference import ReferenceEvaluator
from single_node import single_node_model

from fastmqa_export.config import OP_DOMAIN, OP_NAME, AttentionAttributes
from fastmqa_export.errors import ExportError
from fastmqa_export.function_body import NodeUse, fused_attention_function

FLOAT16, FLOAT32 = torch.float16, torch.float32
EVERY = [(case, FLOAT32) for case in CASES]
EVERY += [(case, FLOAT16) for case in (*CASES, *HALF_SOFTMAX_CASES)]
BY_NAME = {case.name: case for case in CASES}

pytestmark = pytest.mark.filterwarnings(
    # An empty row is −inf − (−inf) in numpy too; the body then replaces the row by 0.
    "ignore:invalid value encountered in subtract:RuntimeWarning"
)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(runtime: str, model: onnx.ModelProto, tensors: dict[str, torch.Tensor]):
    feed = {name: x.numpy() for name, x in tensors.items()}
    runner = session(model) if runtime == "onnxruntime" else ReferenceEvaluator(model)
    return [torch.from_numpy(x) for x in runner.run(None, feed)]


def check(case: Case, tensors, outputs) -> None:
    assert_within_budget(outputs[0], tensors, case.attributes())
    if case.lse:
        _, expected = oracle(tensors, case.attributes())
        tolerance = 2e-2 if tensors["q"].dtype == FLOAT16 else 1e-5
        torch.testing.assert_close(outputs[1].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=lambda x: getattr(x, "name", str(x)[6:]))
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
def test_every_case_is_within_the_budget(case, dtype, runtime):
    tensors = case.tensors(dtype)
    # Head counts that the file does not fix in one runtime, that it does fix in the other.
    model = ir.to_proto(single_node_model(case.attributes(), tensors, dynamic=runtime == "onnx"))
    onnx.checker.check_model(model, full_check=True)
    check(case, tensors, run(runtime, model, tensors))


# One body for different nodes

OTHERS = {
    "windows": AttentionAttributes(scale=1.0, window_left=1, window_right=2),
    "causal": AttentionAttributes(scale=1.0, is_causal=1),
    "softcap": AttentionAttributes(scale=1.0, softcap=9.0),
    "lengths": AttentionAttributes(scale=1.0, is_causal=1, features=2),
    "start": AttentionAttributes(scale=1.0, window_left=3, features=4),
    "values in k": AttentionAttributes(scale=1.0, v_head_size=8, features=8),
    "plain": AttentionAttributes(scale=1.0),
}
MIXED = [
    case
    for case in CASES
    if case.Hkv == 3 and not case.layout and not case.lse and case.name != "lse_mask_gqa_bhsd"
]


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
@pytest.mark.parametrize("other", OTHERS)
def test_a_body_that_serves_other_nodes_too_gives_the_same(case, other):
    tensors = case.tensors(FLOAT32)
    model = single_node_model(case.attributes(), tensors, union=[OTHERS[other]])
    check(case, tensors, run("onnxruntime", ir.to_proto(model), tensors))


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
def test_layers_may_differ_in_their_window(runtime):
    """As in Gemma 3: one body, two nodes, a window on one of them."""
    case = BY_NAME["causal_mqa_bhsd"]
    tensors = case.tensors(FLOAT32)
    windowed = dataclasses.replace(case.attributes(), window_left=2)
    model = single_node_model(case.attributes(), tensors, union=[windowed])
    first = next(node for node in model.graph if node.op_type == OP_NAME)
    attributes = {name: a.value for name, a in first.attributes.items()}
    second = ir.node(
        OP_NAME, first.inputs, {**attributes, "window_left": 2}, domain=OP_DOMAIN, name="second"
    )
    output = second.outputs[0]
    output.name, output.type, output.shape = "z", first.outputs[0].type, first.outputs[0].shape
    model.graph.append(second)
    model.graph.outputs.append(output)
    y, z = run(runtime, ir.to_proto(model), tensors)
    assert_within_budget(y, tensors, case.attributes())
    assert_within_budget(z, tensors, windowed)
    assert not torch.equal(y, z)


USE = NodeUse(attributes=AttentionAttributes(scale=1.0), dtype=ir.DataType.FLOAT)
MASKED = dataclasses.replace(USE, attributes=AttentionAttributes(scale=1.0, features=1))


def with_attributes(**values) -> NodeUse:
    return dataclasses.replace(USE, attributes=AttentionAttributes(scale=1.0, **values))


REFUSED = {
    "type of q, k and v": [USE, dataclasses.replace(USE, dtype=ir.DataType.FLOAT16)],
    "layout": [USE, with_attributes(layout=1)],
    "softmax_precision": [USE, with_attributes(softmax_precision=10)],
    "log-sum-exp output": [USE, with_attributes(features=16)],
    "type of attn_mask": [
        dataclasses.replace(MASKED, mask_dtype=ir.DataType.BOOL),
        dataclasses.replace(MASKED, mask_dtype=ir.DataType.FLOAT),
    ],
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mixture_that_one_body_cannot_express_is_refused(what):
    with pytest.raises(ExportError, match=f"must agree in their {what}"):
        fused_attention_function(REFUSED[what], opset=23)


# What the body is made of


def ops_of(**values) -> set[str]:
    use = dataclasses.replace(with_attributes(**values), heads=8, kv_heads=1)
    return {node.op_type for node in fused_attention_function([use], opset=23)}


def test_an_unused_feature_leaves_no_trace():
    assert ops_of() == {
        "Constant", "Mul", "Concat", "Reshape", "Transpose", "MatMul", "Softmax",
    }  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [{}, {"is_causal": 1}, {"features": 2}, {"window_left": 1}, {"softcap": 1.0}, {"features": 16}],
)
def test_standard_attention_is_never_used(values):
    assert "Attention" not in ops_of(**values)


def test_all_attributes_are_declared():
    function = fused_attention_function([USE], opset=23)
    names = {field.name for field in dataclasses.fields(AttentionAttributes)}
    assert set(function.attributes) == names | {"plugin_namespace", "plugin_version"}


# Hostile values


@pytest.mark.parametrize(("dtype", "huge"), [(FLOAT32, 3e38), (FLOAT16, 6e4)])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_numbers_beyond_the_lengths_change_no_bit(dtype, huge, sign):
    case = BY_NAME["lengths_causal_gqa_bhsd"]
    tensors = case.tensors(dtype)
    model = ir.to_proto(single_node_model(case.attributes(), tensors))
    (clean,) = run("onnxruntime", model, tensors)
    beyond = torch.arange(case.T) >= torch.tensor(case.kv_lengths)[:, None]
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(beyond[:, None, :, None], sign * huge)
    (dirty,) = run("onnxruntime", model, tensors)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "case", ["plain_gqa_bhsd", "lengths_causal_gqa_bhsd", "mask_float_gqa_bhsd"]
)
def test_nan_is_never_hidden(name, case):
    case = BY_NAME[case]
    tensors = case.tensors(FLOAT32)
    tensors[name][0, 0, 0] = torch.nan
    model = ir.to_proto(single_node_model(case.attributes(), tensors))
    (y,) = run("onnxruntime", model, tensors)
    assert y[0].isnan().any()
    assert not y[1].isnan().any()


# A file of version 1 means the same for ever

KEPT = Path(__file__).parent / "data"


def kept_case() -> Case:
    return dataclasses.replace(BY_NAME["lengths_window_mqa_bhsd"], seed=1)


def write_kept_file() -> None:
    """Made once, by `python tests/test_function_body.py`; never to be made again."""
    case = kept_case()
    tensors = case.tensors(FLOAT32)
    expected, _ = oracle(tensors, case.attributes())
    KEPT.mkdir(exist_ok=True)
    ir.save(single_node_model(case.attributes(), tensors), KEPT / "fused_attention_v1.onnx")
    arrays = {name: x.numpy() for name, x in tensors.items()}
    np.savez(KEPT / "fused_attention_v1.npz", y=expected.numpy(), **arrays)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
def test_the_file_of_version_1_means_what_it_meant(runtime):
    model = onnx.load(KEPT / "fused_attention_v1.onnx")
    arrays = dict(np.load(KEPT / "fused_attention_v1.npz"))
    expected = arrays.pop("y")
    (y,) = run(runtime, model, {name: torch.from_numpy(x) for name, x in arrays.items()})
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-6)


if __name__ == "__main__" and not os.path.exists(KEPT / "fused_attention_v1.onnx"):  # noqa: PTH110
    write_kept_file()
