# SPDX-License-Identifier: MIT
"""TensorRT's contenders of scripts/bench_attention.py: one attention as an engine of its own.

The same file is built twice, with our plugin and from the function that it carries, and a third
file holds ONNX's own ``Attention``. Types and sizes are fixed, so the builder knows all it can.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cases import Case
from single_node import single_node_model

from fastmqa_export import plugins
from fastmqa_export.tensorrt_log import make_log
from fastmqa_export.tensorrt_plugins import load_plugins

PLUGIN, FUNCTION, NATIVE = KINDS = ("TensorRT plugin", "TensorRT function", "TensorRT Attention")

ONNX_TYPES = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}


def our_node(case: Case, dtype: torch.dtype, *, plugin: bool) -> onnx.ModelProto:
    """A ``FusedAttention`` node with its function, which TensorRT takes without a plugin's name."""
    on_meta = {name: tensor.to("meta") for name, tensor in case.tensors(dtype).items()}
    model = ir.to_proto(single_node_model(case.attributes(), on_meta, dynamic=False))
    if not plugin:
        (node,) = model.graph.node
        kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model


def native_node(case: Case, dtype: torch.dtype) -> onnx.ModelProto:
    """ONNX's ``Attention``. Causal is right only with S = T: TensorRT aligns it to the top left."""
    assert not case.values_in_k and (not case.is_causal or case.S == case.T)
    rows, keys = (case.B, case.H, case.S), (case.B, case.Hkv, case.T)
    q, k, v, y = (
        helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape)
        for name, shape in (
            ("q", (*rows, case.D)),
            ("k", (*keys, case.D)),
            ("v", (*keys, case.V)),
            ("y", (*rows, case.V)),
        )
    )
    node = helper.make_node(
        "Attention",
        ["q", "k", "v"],
        ["y"],
        scale=case.attributes().scale,
        is_causal=int(case.is_causal),
    )
    graph = helper.make_graph([node], "native", [q, k, v], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def build(model: onnx.ModelProto, *, plugin: bool) -> tuple[Any, Any]:
    """A runtime of TensorRT's, and the engine that it loaded.

    Raises:
        RuntimeError: if TensorRT refuses the model, with what it said.
    """
    import tensorrt as trt

    log = make_log(trt)
    if plugin:
        load_plugins(trt, [str(plugins.trt_plugin_path())], log)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    plan = None
    if parser.parse(model.SerializeToString()):
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError(f"TensorRT refuses it: {'; '.join(log.messages)[:200]}")
    runtime = trt.Runtime(log)
    return runtime, runtime.deserialize_cuda_engine(plan)


class EngineStep:
    """Enqueues an engine on PyTorch's stream, on these tensors."""

    def __init__(self, runtime: Any, engine: Any, tensors: Mapping[str, Tensor]) -> None:
        self._kept = runtime, engine, tensors  # as long as the context that points to them
        self._context = engine.create_execution_context()
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            self._context.set_tensor_address(name, tensors[name].data_ptr())
        self._y = tensors["y"]

    def __call__(self) -> Tensor:
        """Y, once the stream has come so far."""
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT cannot enqueue the engine")
        return self._y


def step(case: Case, kind: str, tensors: Mapping[str, Tensor]) -> EngineStep:
    """An attention of one of `KINDS`.

    Args:
        case: its sizes and attributes.
        kind: of the engine.
        tensors: q, k, v and y on the GPU.
    """
    dtype = tensors["q"].dtype
    plugin = kind == PLUGIN
    model = native_node(case, dtype) if kind == NATIVE else our_node(case, dtype, plugin=plugin)
    return EngineStep(*build(model, plugin=plugin), tensors)
