# SPDX-License-Identifier: MIT
"""Polygraphy finds attention that is written out, and the node in its place gives the same numbers.

What is only like attention stays as it is.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from polygraphy.backend.onnx import infer_shapes
from torch import nn
from torch.nn import functional

from fastmqa_export.config import OP_DOMAIN, OP_INPUTS, OP_NAME
from fastmqa_export.errors import ConfigError
from fastmqa_export.inspect import fused_nodes, inspect_file

gs = pytest.importorskip("onnx_graphsurgeon", reason="needs onnx-graphsurgeon")
pattern = pytest.importorskip("fastmqa_export.pattern")

H, D = 6, 16


def repeat_kv(x, groups):
    batch, heads, keys, size = x.shape
    wide = x[:, :, None].expand(batch, heads, groups, keys, size)
    return wide.reshape(batch, heads * groups, keys, size)


class Attention(nn.Module):
    """Attention as models write it out; `style` says how."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style

    def forward(self, q, k, v, mask):
        groups = q.shape[1] // k.shape[1]
        if self.style == "sdpa":
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.style == "tile":  # query head h has key head h % Hkv, which the op does not know
            k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
        elif self.style != "broadcast":
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        scores = q @ k.transpose(2, 3)
        if self.style == "fill":
            scores = (scores * 0.3).masked_fill(~mask, float("-inf"))
        else:
            scores = scores / D**0.5 + mask
        return functional.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


class TwoLayers(nn.Module):
    """One without a mask, then one with a mask of (S, T)."""

    def forward(self, q, k, v, mask):
        y = (0.2 * q @ k.transpose(2, 3)).softmax(-1) @ v
        return ((y @ k.transpose(2, 3)) * 0.1 + mask[0, 0]).softmax(-1) @ v


#: Module, Hkv, dtype of q, dtype of the mask, nodes.
MODELS = {
    "mqa_broadcast": (Attention("broadcast"), 1, torch.float32, torch.float32, 1),
    "gqa_repeat_float16": (Attention("repeat"), 2, torch.float16, torch.float16, 1),
    "gqa_sdpa": (Attention("sdpa"), 2, torch.float32, torch.bool, 1),
    "gqa_other_order": (Attention("tile"), 2, torch.float32, torch.float32, 1),
    "gqa_fill": (Attention("fill"), 2, torch.float32, torch.bool, 1),
    "two_layers": (TwoLayers(), 1, torch.float32, torch.float32, 2),
}


def tensors(kv_heads, dtype, mask_dtype, batch=2, queries=3, keys=7):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    mask = normal(batch, 1, queries, keys)
    if mask_dtype == torch.bool:
        mask = (mask > 0).logical_or(torch.arange(keys) == 0)
    k, v = (normal(batch, kv_heads, keys, D).to(dtype) for _ in range(2))
    return normal(batch, H, queries, D).to(dtype), k, v, mask.to(mask_dtype)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Files of torch.onnx.export with dynamic batch, S and T; each is made when asked for."""
    folder, made = tmp_path_factory.mktemp("patterns"), {}

    def export(name: str) -> Path:
        if name not in made:
            module, *kinds, _ = MODELS[name]
            made[name] = folder / f"{name}.onnx"
            b, s, t = (torch.export.Dim(x) for x in ("batch", "sequence", "keys"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # several inputs share a dimension, it says
                program = torch.onnx.export(
                    module.eval(),
                    tensors(*kinds),
                    input_names=["q", "k", "v", "mask"],
                    output_names=["y"],
                    dynamo=True,
                    opset_version=pattern.MIN_OPSET,
                    dynamic_shapes=({0: b, 2: s}, {0: b, 2: t}, {0: b, 2: t}, {0: b, 2: s, 3: t}),
                    verbose=False,
                )
            program.save(made[name])
        return made[name]

    return export


def polygraphy(command: str, model: Path, *options: str) -> str:
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("polygraphy")), "plugin", command, str(model)),
            *("--shape-inference", "--plugin-dir", str(pattern.PLUGIN_DIR), *options),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def replace(model: Path) -> onnx.ModelProto:
    """What polygraphy's match and replace do, without the start of two processes."""
    graph = gs.import_onnx(infer_shapes(onnx.load(model)))
    named = graph.tensors()
    for match in pattern.get_matching_subgraphs(graph):
        inputs, outputs = ([named[x] for x in match[kind]] for kind in ("inputs", "outputs"))
        pattern.replace_with_plugin(graph, inputs, outputs, match["attributes"], OP_NAME)
    return gs.export_onnx(graph)


def run(model: Path, inputs) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = dict(zip(("q", "k", "v", "mask"), (x.numpy() for x in inputs), strict=True))
    return session.run(None, feed)[0]


@pytest.mark.parametrize("name", MODELS)
def test_attention_becomes_a_node_with_the_same_numbers(name, exported, tmp_path):
    _, kv_heads, dtype, mask_dtype, nodes = MODELS[name]
    model, path = replace(exported(name)), tmp_path / "replaced.onnx"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    found = fused_nodes(model)
    assert len(found) == nodes
    assert not {"MatMul", "Softmax"} & {node.op_type for node in model.graph.node}
    assert [(f.domain, f.name) for f in model.functions] == [(OP_DOMAIN, OP_NAME)]
    assert all(len(node.input) == len(OP_INPUTS) and all(node.input) for node in found)
    assert inspect_file(path)["problems"] == []
    q, k, *_ = found[0].input
    assert (q, k) == ("q", "k" if name != "gqa_other_order" else "repeat"), "no repetition is left"
    for sizes in ({}, {"batch": 1, "queries": 5, "keys": 11}):
        inputs = tensors(kv_heads, dtype, mask_dtype, **sizes)
        ours, theirs = run(path, inputs), run(exported(name), inputs)
        assert ours.dtype == theirs.dtype
        tolerance = 2e-3 if dtype == torch.float16 else 1e-5
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        assert np.abs(theirs).max() > 0.1


def test_the_commands_of_polygraphy(exported, tmp_path):
    model, config = exported("gqa_sdpa"), tmp_path / "config.yaml"
    polygraphy("match", model, "-o", str(config))
    assert "op: FusedAttention" in config.read_text()
    replaced = tmp_path / "replaced.onnx"
    said = polygraphy("replace", model, "--config", str(config), "-o", str(replaced))
    assert f"replaced 1 instances of {OP_NAME}" in said
    assert onnx.load(replaced) == replace(model)


def attributes(model: onnx.ModelProto, op_type: str) -> dict[str, onnx.AttributeProto]:
    (node,) = (n for n in model.graph.node if n.op_type == op_type)
    return {a.name: a for a in node.attribute}


def constant(model: onnx.ModelProto, op_type: str, index: int = 1) -> onnx.TensorProto:
    node = next(n for n in model.graph.node if n.op_type == op_type)
    return next(x for x in model.graph.initializer if x.name == node.input[index])


def over_queries(model):
    attributes(model, "Softmax")["axis"].i = 2


def keys_as_they_are(model):
    attributes(model, "Transpose")["perm"].ints[:] = [0, 1, 2, 3]


def scaled_by_a_tensor(model):
    node = next(n for n in model.graph.node if n.op_type == "Div")
    node.input[1] = node.input[0]


def a_sum_of_three(model):
    node = next(n for n in model.graph.node if n.op_type == "Softmax")
    model.graph.node.insert(
        list(model.graph.node).index(node),
        onnx.helper.make_node("Add", [node.input[0], "mask"], ["twice"]),
    )
    node.input[0] = "twice"


def a_finite_fill(model):
    value = constant(model, "Where")
    value.CopyFrom(onnx.numpy_helper.from_array(np.array(-1e9, np.float32), value.name))


def an_older_opset(model):
    model.opset_import[0].version = pattern.MIN_OPSET - 1


NEAR_MISSES = {
    "softmax over queries": ("mqa_broadcast", over_queries),
    "keys not transposed": ("mqa_broadcast", keys_as_they_are),
    "scaled by a tensor": ("mqa_broadcast", scaled_by_a_tensor),
    "two masks": ("mqa_broadcast", a_sum_of_three),
    "filled with a finite number": ("gqa_fill", a_finite_fill),
    "an older opset": ("mqa_broadcast", an_older_opset),
}


def matches(model: onnx.ModelProto) -> list:
    return pattern.get_matching_subgraphs(gs.import_onnx(model))


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays_as_it_is(name, exported):
    base, change = NEAR_MISSES[name]
    model = onnx.load(exported(base))
    assert len(matches(model)) == 1
    change(model)
    assert matches(model) == []


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        pytest.param("q", ["batch", "heads", "sequence", D], id="unknown number of heads"),
        pytest.param("qkv", ["batch", 1, None, D], id="unknown size"),
        pytest.param("k", [1, 1, "keys", D], id="keys of another batch"),
        pytest.param("v", ["batch", 1, "other", D], id="values of other keys"),
        pytest.param("mask", ["batch", 2, "sequence", "keys"], id="mask of two heads"),
        pytest.param("v", ["batch", 1, "keys", 20], id="head size that no kernel has"),
    ],
)
def test_shapes_that_do_not_prove_it(inputs, shape, exported):
    model = onnx.load(exported("mqa_broadcast"))
    for value in model.graph.input:
        if value.name in (inputs if inputs == "mask" else list(inputs)):
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    assert matches(model) == []


def test_replacing_asks_for_shapes(exported):
    graph = gs.import_onnx(onnx.load(exported("mqa_broadcast")))
    (match,) = pattern.get_matching_subgraphs(graph)
    named = graph.tensors()
    named["k"].shape = None
    inputs, outputs = ([named[x] for x in match[kind]] for kind in ("inputs", "outputs"))
    with pytest.raises(ConfigError, match="of k are not known; give --shape-inference"):
        pattern.replace_with_plugin(graph, inputs, outputs, match["attributes"], OP_NAME)


def test_the_folder_is_named_as_the_plugin():
    name = pattern.get_plugin_metadata()["name"]
    assert (pattern.PLUGIN_DIR / name / "pattern.py").is_file()
    assert [path.name for path in pattern.PLUGIN_DIR.iterdir()] == [name]
