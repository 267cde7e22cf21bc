# SPDX-License-Identifier: MIT
"""The function body in onnxruntime and in onnx's evaluator, on every case, within the budget."""

import dataclasses
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
from single_node import DTYPES, single_node_model

from fastmqa_export.config import (
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    OP_VERSION,
    AttentionAttributes,
    Feature,
)
from fastmqa_export.errors import ExportError
from fastmqa_export.function_body import (
    NodeUse,
    fused_attention_function,
    node_attributes,
    set_neutral_inputs,
)

FLOAT16, FLOAT32 = torch.float16, torch.float32
EVERY = [(case, FLOAT32) for case in CASES]
EVERY += [(case, FLOAT16) for case in (*CASES, *HALF_SOFTMAX_CASES)]
BY_NAME = {case.name: case for case in CASES}

pytestmark = [
    # An empty row is −inf − (−inf) in numpy too; the body then replaces the row by 0.
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


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


# A file fixes the head counts or leaves them dynamic; onnx's evaluator is a second opinion.
RUNTIMES = {
    "onnxruntime": ("onnxruntime", False),
    "onnxruntime-dynamic": ("onnxruntime", True),
    "onnx-dynamic": ("onnx", True),
}


@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=lambda x: getattr(x, "name", str(x)[6:]))
@pytest.mark.parametrize("where", RUNTIMES)
def test_every_case_is_within_the_budget(case, dtype, where):
    runtime, dynamic = RUNTIMES[where]
    tensors = case.tensors(dtype)
    model = ir.to_proto(single_node_model(case.attributes(), tensors, dynamic=dynamic))
    onnx.checker.check_model(model, full_check=True)
    check(case, tensors, run(runtime, model, tensors))


SIZES = {
    "one of everything": {"B": 1, "H": 1, "Hkv": 1, "S": 1, "T": 1},
    "one sequence": {"B": 1, "H": 8, "Hkv": 1, "S": 5, "T": 11},
    "decode": {"B": 3, "H": 6, "Hkv": 2, "S": 1, "T": 7},
    "more queries than keys": {"B": 2, "H": 4, "Hkv": 4, "S": 9, "T": 4},
    "other head sizes": {"B": 2, "H": 71, "Hkv": 1, "S": 2, "T": 3, "D": 24, "V": 40},
}


@pytest.fixture(scope="module", params=[0, 1], ids=["bhsd", "bshd"])
def dynamic_session(request):
    case = Case(name="any", is_causal=True, kv_lengths=(3, 3), layout=request.param, scale=0.3)
    model = single_node_model(case.attributes(), case.tensors(FLOAT32))
    return case, session(ir.to_proto(model))


@pytest.mark.parametrize("sizes", SIZES)
def test_one_file_runs_at_all_sizes_even_of_heads(dynamic_session, sizes):
    case, runner = dynamic_session
    case = dataclasses.replace(case, **SIZES[sizes])
    case = dataclasses.replace(case, kv_lengths=(3,) * case.B)
    tensors = case.tensors(FLOAT32)
    (y,) = runner.run(None, {name: x.numpy() for name, x in tensors.items()})
    assert_within_budget(torch.from_numpy(y), tensors, case.attributes())


# One body for different nodes

OTHERS = {
    "windows": AttentionAttributes(scale=1.0, window_left=1, window_right=2),
    "causal": AttentionAttributes(scale=1.0, is_causal=1),
    "softcap": AttentionAttributes(scale=1.0, softcap=9.0),
    "lengths": AttentionAttributes(scale=1.0, is_causal=1, features=2),
    "start": AttentionAttributes(scale=1.0, window_left=3, features=4),
    "values in k": AttentionAttributes(scale=1.0, v_head_size=8, features=8),
    "plain": AttentionAttributes(scale=1.0),
    "right": AttentionAttributes(scale=1.0, window_right=2),
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


def is_live(name: str, attributes: AttentionAttributes) -> bool:
    """Whether a node with these attributes uses that input."""
    if name == "v":
        return not attributes.features & Feature.VALUES_IN_K
    bits = {
        "attn_mask": Feature.MASK,
        "kv_lengths": Feature.LENGTHS,
        "q_start": Feature.Q_START,
    }
    return name in ("q", "k") or bool(attributes.features & bits[name])


def two_node_model(
    nodes: list[AttentionAttributes], tensors: dict[str, torch.Tensor]
) -> onnx.ModelProto:
    """Two nodes on the same q, k and v, each with live inputs of its own, and one body."""
    values = {
        name: ir.val(name, dtype=DTYPES[x.dtype], shape=[f"{name}{i}" for i in range(x.dim())])
        for name, x in tensors.items()
    }
    calls, uses = [], []
    for name, attributes in zip(("y", "z"), nodes, strict=True):
        inputs = [values[n] if is_live(n, attributes) else None for n in OP_INPUTS]
        inputs[2] = inputs[2] or values["k"]
        call = ir.node(OP_NAME, inputs, node_attributes(attributes), domain=OP_DOMAIN, name=name)
        call.outputs[0].name, call.outputs[0].type = name, values["q"].type
        call.outputs[0].shape = ir.Shape([f"{name}{i}" for i in range(4)])
        calls.append(call)
        mask = values["attn_mask"].dtype if is_live("attn_mask", attributes) else None
        uses.append(NodeUse(attributes=attributes, dtype=values["q"].dtype, mask_dtype=mask))
    graph = ir.Graph(
        list(values.values()),
        [call.outputs[0] for call in calls],
        nodes=calls,
        opset_imports={"": 23, OP_DOMAIN: OP_VERSION},
        name="two_nodes",
    )
    set_neutral_inputs(graph)
    model = ir.Model(graph, ir_version=10)
    function = fused_attention_function(uses, opset=23)
    model.functions[function.identifier()] = function
    return ir.to_proto(model)


# The layers of Gemma 3 differ as in the first; each other is a feature that only one node has.
TWO_NODES = {
    "window": ({"is_causal": 1}, {"is_causal": 1, "window_left": 2}),
    "softcap": ({"softcap": 0.5}, {}),
    "causal": ({"is_causal": 1}, {}),
    "causal, right": ({"is_causal": 1}, {"window_right": 2}),
    "left, right": ({"window_left": 1}, {"window_right": 1}),
    "lengths": ({"features": 2, "is_causal": 1}, {"is_causal": 1}),
    "start": ({"features": 4, "is_causal": 1}, {"is_causal": 1}),
    "start, lengths": ({"features": 4, "window_left": 1}, {"features": 2, "is_causal": 1}),
    "bool mask": ({"features": 1}, {}),
    "bool mask, causal": ({"features": 1}, {"is_causal": 1}),
    "float mask": ({"features": 1}, {}),
    "float mask, lengths": ({"features": 1, "softcap": 1.0}, {"features": 2}),
    "values in k": ({"features": 8, "v_head_size": 8}, {}),
    "everything, nothing": (
        {"features": 15, "v_head_size": 8, "is_causal": 1, "window_left": 2, "softcap": 1.0},
        {},
    ),
}


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
@pytest.mark.parametrize("order", [1, -1], ids=["", "reversed"])
@pytest.mark.parametrize("name", TWO_NODES)
def test_two_nodes_of_one_file_mean_each_its_own(name, order, runtime):
    mask = "float" if "float" in name else "bool"
    sizes = {"H": 6, "Hkv": 2, "kv_lengths": (4, 11), "q_start": (2, 7)}
    given = Case(name=name, mask=mask, mask_shape="BT", **sizes).tensors(FLOAT32)
    nodes = [AttentionAttributes(scale=0.25, **values) for values in TWO_NODES[name]][::order]
    tensors = {n: x for n, x in given.items() if any(is_live(n, each) for each in nodes)}
    results = run(runtime, two_node_model(nodes, tensors), tensors)
    for result, attributes in zip(results, nodes, strict=True):
        own = {n: x for n, x in tensors.items() if is_live(n, attributes)}
        assert_within_budget(result, own, attributes)


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
    with pytest.raises(ExportError, match=rf"must agree in their {what}, and these have .+, .+: "):
        fused_attention_function(REFUSED[what], opset=23)


# What the body is made of


def ops_of(**values) -> set[str]:
    use = dataclasses.replace(with_attributes(**values), heads=8, kv_heads=1)
    return {node.op_type for node in fused_attention_function([use], opset=23)}


PLAIN = {"Constant", "Mul", "Concat", "Reshape", "Transpose", "MatMul", "Softmax"}
LENGTHS = {"Shape", "Squeeze", "Range", "Less", "LessOrEqual", "Where", "Min", "Max", "Cast"}
CAUSAL = {"Shape", "Squeeze", "Range", "Less", "LessOrEqual", "Where", "Min", "Add", "Sub"}
EXPECTED_OPS = {
    "nothing": ({}, PLAIN),
    "layout": ({"layout": 1}, PLAIN),
    "softcap": ({"softcap": 1.0}, PLAIN | {"Div", "Tanh"}),
    "values in k": ({"features": 8, "v_head_size": 8}, PLAIN | {"Slice"}),
    "causal": ({"is_causal": 1}, PLAIN | CAUSAL),
    "lengths": ({"features": 2}, PLAIN | LENGTHS),
    "lengths and causal": ({"features": 2, "is_causal": 1}, PLAIN | LENGTHS | CAUSAL),
    "window": ({"window_left": 1}, PLAIN | CAUSAL | {"Neg", "Max", "And", "GreaterOrEqual"}),
    "log-sum-exp": (
        {"features": 16},
        PLAIN - {"Softmax"} | {"ReduceMax", "Sub", "Exp", "ReduceSum", "Div", "Log", "Add"}
        | {"Squeeze"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED_OPS)
def test_an_unused_feature_leaves_no_trace(name):
    values, expected = EXPECTED_OPS[name]
    assert ops_of(**values) == expected


def test_all_attributes_are_declared():
    function = fused_attention_function([USE], opset=23)
    names = {field.name for field in dataclasses.fields(AttentionAttributes)}
    assert set(function.attributes) == names | {"plugin_namespace", "plugin_version"}


# Hostile values


PADDED = [case for case in CASES if case.kv_lengths is not None]
# One query row per KV head makes a matrix-vector product, summed in parts of which one can become
# ∞ and another −∞: there the body needs the scores to be finite, not only the keys.
GARBAGE = [(case, FLOAT32, 3e38 if case.Hkv < case.H or case.S > 1 else 1e36) for case in PADDED]
GARBAGE += [(case, FLOAT16, 6e4) for case in PADDED]


@pytest.mark.parametrize(
    ("case", "dtype", "huge"),
    GARBAGE,
    ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")),
)
def test_huge_numbers_beyond_the_lengths_change_no_bit(case, dtype, huge):
    tensors = case.tensors(dtype)
    runner = session(ir.to_proto(single_node_model(case.attributes(), tensors)))
    beyond = (torch.arange(case.T) >= torch.tensor(case.kv_lengths)[:, None])[:, None, :, None]

    def with_garbage(garbage: float) -> list[bytes]:
        dirty = {n: x.masked_fill(beyond, garbage) if n in "kv" else x for n, x in tensors.items()}
        return [x.tobytes() for x in runner.run(None, {n: x.numpy() for n, x in dirty.items()})]

    assert with_garbage(0.0) == with_garbage(huge) == with_garbage(-huge)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_nan_is_never_hidden(case, name, runtime):
    """Where the oracle has a NaN the body has one, and the other sequence has none."""
    tensors = case.tensors(FLOAT32)
    name = "k" if name not in tensors else name
    tensors[name][1, 0, 0] = torch.nan
    expected, lse = oracle(tensors, case.attributes())
    model = ir.to_proto(single_node_model(case.attributes(), tensors))
    (y,) = run(runtime, model, tensors)
    sees_a_key = (lse != -torch.inf)[..., None]
    assert y[expected.isnan() & sees_a_key].isnan().all()
    assert not y[0].isnan().any()


# A file of version 1 means the same for ever

KEPT = Path(__file__).parent / "data"


def kept_case() -> Case:
    return dataclasses.replace(BY_NAME["lengths_window_mqa_bhsd"], seed=1)


def write_kept_file() -> None:
    """Made once, by ``python tests/test_function_body.py``; never to be made again."""
    if (KEPT / "fused_attention_v1.onnx").exists():
        raise SystemExit("kept for ever: a file made today would prove nothing about older ones")
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


if __name__ == "__main__":
    write_kept_file()
