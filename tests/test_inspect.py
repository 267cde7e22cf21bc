# SPDX-License-Identifier: MIT
"""What `inspect` says of good, odd and broken files."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from fastmqa_export.errors import ModelFileError
from fastmqa_export.inspect import describe, float_type, inspect_file

KEPT = Path(__file__).parent / "data" / "fused_attention_v1.onnx"


def test_a_file_of_ours():
    info = inspect_file(KEPT)
    assert info["opsets"] == {"ai.onnx": 23, "fastmqa": 1}
    assert info["has_function"]
    assert info["problems"] == []
    (node,) = info["fused_attention"]
    assert node["live"] == ["lengths"]
    assert node["attributes"]["window_left"] == 2
    assert node["shapes"]["k"] == ["k0", "k1", "k2", "k3"]
    assert info["functions"] == ["fastmqa::FusedAttention"]
    assert (info["inline_bytes"], info["external_bytes"]) == (1 + 4, 0)  # neutral mask and q_start
    assert float_type(KEPT) == "float32"
    text = describe(info)
    assert "fastmqa::FusedAttention: 1 nodes, with a function body" in text
    assert "kv_lengths: int32" in text


def changed(tmp_path, change) -> Path:
    model = onnx.load(KEPT)
    node = next(n for n in model.graph.node if n.op_type == "FusedAttention")
    change(model, node)
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def newer_feature(model, node):
    next(a for a in node.attribute if a.name == "features").i = 64


def no_function(model, node):
    del model.functions[:]


def no_namespace(model, node):
    kept = [a for a in node.attribute if a.name != "plugin_namespace"]
    del node.attribute[:]
    node.attribute.extend(kept)


def fewer_inputs(model, node):
    del node.input[5:]


def empty_input(model, node):
    node.input[3] = ""


def newer_op(model, node):
    next(entry for entry in model.opset_import if entry.domain == "fastmqa").version = 2


def attribute(node, name):
    return next(a for a in node.attribute if a.name == name)


def refused_value(model, node):
    attribute(node, "softcap").f = -1


def other_type(model, node):
    attribute(node, "features").CopyFrom(helper.make_attribute("features", b"\xff"))


def unknown_attribute(model, node):
    node.attribute.append(helper.make_attribute("sinks", [1.0]))


def no_scale(model, node):
    node.attribute.remove(attribute(node, "scale"))


def odd_head_size(model, node):
    for value in model.graph.input[1:3]:
        value.type.tensor_type.shape.dim[3].dim_value = 20


PROBLEMS = {
    empty_input: "left out: attn_mask",
    newer_op: "version 2 of domain fastmqa; this version knows 1",
    refused_value: "softcap=-1.0 is neither 0 (off) nor a positive",
    other_type: "attributes of another type than the op's: features",
    unknown_attribute: "unknown attributes: sinks",
    no_scale: "the attribute scale is missing",
    odd_head_size: "head sizes D=20, V=20 are not covered",
    newer_feature: "unknown feature bits 0x40: made by a later version",
    no_function: "no function body",
    no_namespace: "plugin_namespace is not 'fastmqa'",
    fewer_inputs: "5 inputs instead of 6",
}


@pytest.mark.parametrize("change", PROBLEMS)
def test_problems_are_found(change, tmp_path):
    info = inspect_file(changed(tmp_path, change))
    assert any(PROBLEMS[change] in problem for problem in info["problems"])
    assert "problem: " in describe(info)


def plain_model() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_a_file_without_attention_can_be_inspected_but_not_compared(tmp_path):
    onnx.save(plain_model(), tmp_path / "m.onnx")
    assert inspect_file(tmp_path / "m.onnx")["fused_attention"] == []
    with pytest.raises(ModelFileError, match="has no fastmqa::FusedAttention node"):
        float_type(tmp_path / "m.onnx")


def test_the_suffix_does_not_matter(tmp_path):
    (tmp_path / "m.json").write_bytes(KEPT.read_bytes())
    assert inspect_file(tmp_path / "m.json")["has_function"]


def test_a_missing_or_short_weights_file_is_a_problem(tmp_path):
    model = plain_model()
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.onnx.data")
    onnx.save(model, tmp_path / "m.onnx")
    info = inspect_file(tmp_path / "m.onnx")
    assert info["weights_files"] == ["m.onnx.data"]
    assert info["external_bytes"] == 16
    assert info["problems"] == ["weights file m.onnx.data is missing beside the model"]
    (tmp_path / "m.onnx.data").write_bytes(bytes(15))
    problems = inspect_file(tmp_path / "m.onnx")["problems"]
    assert problems == ["weights file m.onnx.data is cut short: 15 bytes of 16"]
    (tmp_path / "m.onnx.data").write_bytes(bytes(16))
    assert inspect_file(tmp_path / "m.onnx")["problems"] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.onnx", b"hello, this is text and no protobuf", "no ONNX model"),
        ("m.onnx", b"", "it holds no graph"),
        ("m.onnx", KEPT.read_bytes()[:400], "no ONNX model"),
        ("m.onnx", None, "does not exist; give an .onnx file"),
        ("m.plan", b"", "is an engine or a library; give an .onnx file"),
        ("m.so", b"", "is an engine or a library; give an .onnx file"),
    ],
)
def test_other_files_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError) as error:
        inspect_file(tmp_path / name)
    assert message in str(error.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="is a folder"):
        inspect_file(tmp_path)
